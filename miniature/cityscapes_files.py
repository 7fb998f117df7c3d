"""The miniature world in Cityscapes' layout: pictures of towns, and the label id of each pixel.

It has the same names as `nuscenes_tables.py`. Each picture is frame 19 of a drive of its own, as
most labelled ones of Cityscapes are. Instances, colours and polygons are not written, nor a test
split. Riders, two-wheelers, trains, walls, fences and traffic lights do not occur.
"""
import numpy as np
from PIL import Image

from miniature.rays import camera_rig, first_hit
from miniature.scenes import picture, plan_scene
from miniature.street import (BARRIER, BUS, CAR, MANMADE, PEDESTRIAN, POLE, ROAD, SIDEWALK, SIGN,
                              TERRAIN, TRUCK, VEGETATION)

TABLES = ()
CITIES = {
    "train": """aachen bochum bremen cologne darmstadt dusseldorf erfurt hamburg hanover jena
        krefeld monchengladbach strasbourg stuttgart tubingen ulm weimar zurich""".split(),
    "val": ["frankfurt", "lindau", "munster"]}
SKY = 23
IDS = {ROAD: 7, SIDEWALK: 8, MANMADE: 11, BARRIER: 14, VEGETATION: 21, TERRAIN: 22, PEDESTRIAN: 24,
       CAR: 26, TRUCK: 27, BUS: 28}  # BARRIER: guard rail, which is not learnt
PARTS = {POLE: 17, SIGN: 20}


def version_of(split):
    """The folder of the tables; here the folders of pictures and labels are in it."""
    return "."


def folders_of(options):
    """None beside the cities', which `write_scene` makes."""
    return []


def names_of(options):
    """By split a name per scene: CITY_DDDDDD, with the number of its first drive."""
    names = {}
    for split, asked in (("train", sum(options["train"])), ("val", options["val"])):
        parts = np.array_split(np.arange(asked), len(CITIES[split]))
        names[split] = [f"{city}_{k * options['frames']:06d}"
                        for city, part in zip(CITIES[split], parts) for k in range(len(part))]
    return names


def write_scene(job):
    """Write one scene's pictures and labels below `out`."""
    out, options, split, number, condition, name = job
    plan = plan_scene(options, split, number, condition)
    city, first = name.split("_")
    for k in range(options["frames"]):
        stem = f"{city}_{int(first) + k:06d}_000019"
        image, _, _ = picture(options, plan, k, "left")
        for pixels, kind, ending in ((image, "leftImg8bit", "leftImg8bit"),
                                     (label_ids(options, plan, k), "gtFine", "gtFine_labelIds")):
            folder = out / kind / split / city
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{stem}_{ending}.png")
    return {}


def label_ids(options, plan, frame):
    """Cityscapes' id of what is in the middle of each pixel, uint8 [H, W]."""
    view, things = plan["frames"][frame]["left"], plan["street"].things
    ids = np.zeros(len(things["kind"]), np.uint8)
    for column, numbers in (("kind", IDS), ("part", PARTS)):  # a part's counts more
        for value, number in numbers.items():
            ids[things[column] == value] = number
    # the renderer tells the class of a pixel, but not which thing it is of
    rig = camera_rig(view["turn"], view["eye"], options["image_size"], wide=view["wide"])
    _, who = first_hit(plan["street"], rig)
    return np.where(who < 0, SKY, ids[who]).astype(np.uint8).reshape(options["image_size"])


def finish(out, tables, options):
    """Nothing is left to do, and there are no tables."""
    return {}

"""The miniature world in nuScenes' layout: samples, lidarseg labels, tables of v1.0-trainval.

`world.py` asks each layout for the same names: TABLES, `version_of`, `folders_of`, `names_of`,
`write_scene` and `finish`.
"""
import numpy as np
from PIL import Image

from miniature.scenes import (CAMERAS, JPEG, calibration_row, log_row, picture, plan_scene,
                              sensor_rows, sweep, token_of)
from miniature.street import BARRIER, BUS, CAR, CATEGORIES, PEDESTRIAN, TRUCK

VERSION = "v1.0-trainval"
TABLES = """attribute calibrated_sensor category ego_pose instance lidarseg log map sample
sample_annotation sample_data scene sensor visibility""".split()


def version_of(split):
    """The folder of a split's tables."""
    return VERSION


def names_of(options):
    """The names that scenes can have, by split."""
    from nuscenes.utils import splits  # slow to import, and no worker needs it
    return {"train": splits.train, "val": splits.val}


def channels_of(options):
    return ["LIDAR_TOP", *list(CAMERAS)[:options["cameras"]]]


def folders_of(options):
    """The folders below the root in which `write_scene` and `finish` write, without the tables'."""
    samples = [f"samples/{channel}" for channel in channels_of(options)]
    return [*samples, "maps", f"lidarseg/{VERSION}"]


def describe(plan):
    """A description in nuScenes' manner.

    The condition is read from it: night, else rain, else day-clear.
    """
    names = {CAR: "parked cars", TRUCK: "truck", BUS: "bus", PEDESTRIAN: "peds on sidewalk",
             BARRIER: "barriers"}
    street = plan["street"]
    near = np.abs(street.things["at"][:, 0] - street.length - 15) < 15
    words = [word for kind, word in names.items() if kind in street.things["kind"][near]]
    if street.cross_half > 0:
        words.append("intersection")
    if len(street.lamps) > 6:
        words.append("street lamps")
    text = ", ".join(words) or "empty street"
    texts = {"day-clear": text.capitalize(), "day-rain": f"Rain, {text}", "night": f"Night, {text}"}
    return texts[plan["condition"]]


def points_of(options, plan, frame):
    """A sweep as nuScenes has it, column by column, as the device turns.

    Returns points float32 [N, 5] (x, y, z in m, intensity 0..255, ring; ring 0 is the lowest beam)
    and their fine classes uint8 [N].
    """
    found = sweep(options, plan, frame, "LIDAR_TOP")
    beams, _ = found["grid"]
    ring = beams - 1 - found["beam"]
    points = np.column_stack([found["place"], found["intensity"], ring]).astype(np.float32)
    order = np.lexsort((ring, found["step"]))
    return points[order], found["kind"][order].astype(np.uint8)


def write_scene(job):
    """Write one scene's pictures, sweeps and labels below `out`; returns its rows of the tables."""
    out, options, split, number, condition, name = job
    plan = plan_scene(options, split, number, condition)
    height, width = options["image_size"]
    last = len(plan["frames"]) - 1
    rows = {table: [] for table in TABLES}

    def token(*parts):
        return token_of("/".join(map(str, (options["seed"], name, *parts))))

    def linked(kind, k, *parts):
        """Tokens of the keyframes before and after; nuScenes has an empty string at the ends."""
        return dict(prev=token(kind, k - 1, *parts) if k > 0 else "",
                    next=token(kind, k + 1, *parts) if k < last else "")

    # the scene's rows and its sensors'
    log = log_row(plan, token("log"), ("n008", "n015")[number % 2])
    rows["log"].append(log)
    rows["scene"].append(dict(
        token=token("scene"), log_token=log["token"], nbr_samples=last + 1, name=name,
        first_sample_token=token("sample", 0), description=describe(plan),
        last_sample_token=token("sample", last)))
    for channel in plan["sensors"]:
        rows["calibrated_sensor"].append(
            calibration_row(plan, token("calibration", channel), channel, options["image_size"]))

    # the keyframes: each sensor's file and its rows
    for k, views in enumerate(plan["frames"]):
        rows["sample"].append(dict(
            token=token("sample", k), timestamp=views["LIDAR_TOP"]["time"],
            scene_token=token("scene"), **linked("sample", k)))
        for channel, view in views.items():
            key = token("data", k, channel)
            stem = f"samples/{channel}/{log['logfile']}__{channel}__{view['time']}"
            if channel == "LIDAR_TOP":
                file, kind, size = f"{stem}.pcd.bin", "pcd", (0, 0)
                points, classes = points_of(options, plan, k)
                points.tofile(out / file)
                labels = f"lidarseg/{VERSION}/{key}_lidarseg.bin"
                classes.tofile(out / labels)
                rows["lidarseg"].append(dict(token=key, sample_data_token=key, filename=labels))
            else:
                file, kind, size = f"{stem}.jpg", "jpg", (height, width)
                image, _, _ = picture(options, plan, k, channel)
                Image.fromarray(image).save(out / file, **JPEG)
            rows["ego_pose"].append(dict(token=key, timestamp=view["time"], **view["pose"]))
            rows["sample_data"].append(dict(
                token=key, sample_token=token("sample", k), ego_pose_token=key,
                timestamp=view["time"], calibrated_sensor_token=token("calibration", channel),
                fileformat=kind, is_key_frame=True, height=size[0], width=size[1], filename=file,
                **linked("data", k, channel)))
    return rows


def finish(out, tables, options):
    """Fill the tables that are not about one scene; write the map. Returns all tables."""
    tables["sensor"] = sensor_rows(channels_of(options))
    for index, name in enumerate(CATEGORIES):
        row = dict(token=token_of(name), name=name, description="", index=index)
        tables["category"].append(row)
    for k, level in enumerate(("v0-40", "v40-60", "v60-80", "v80-100"), 1):
        tables["visibility"].append(dict(token=str(k), level=level, description=""))
    Image.new("L", (8, 8)).save(out / "maps/blank.png")
    logs = [log["token"] for log in tables["log"]]
    tables["map"] = [dict(token=token_of("map"), category="semantic_prior",
                          filename="maps/blank.png", log_tokens=logs)]
    return tables

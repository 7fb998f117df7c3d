"""nuImages: labelled images of six cameras, and the class of each of their pixels.

    python -m readers.nuimages --data /data/nuimages        # are all files whole? The counts

nuscenes-devkit reads its tables. What the names of this file mean is said in readers/table.py.
"""
import base64
from collections import defaultdict

import numpy as np

from plumbing.errors import InputError
from plumbing.fingerprint import digest
from readers.nuscenes import CLASSES as NUSCENES_CLASSES
from readers.paths import check_files, size_of
from readers.table import as_bytes, damage_named, main

SPLITS = ("train", "val")
# What nuImages labels of nuScenes' classes: ignore, the 10 classes of objects, the road
CLASSES = NUSCENES_CLASSES[:NUSCENES_CLASSES.index("driveable_surface") + 1]
# What a mean over 13 classes has beside (S3PT, Table 9): the own car, and all other pixels
ALL_CLASSES = (*CLASSES, "ego_vehicle", "background")
EGO = ALL_CLASSES.index("ego_vehicle")


def labels_of(root, columns, frame):
    """The class of each pixel of an image, uint8 [H, W], 0 where nothing is labelled.

    Objects are drawn over surfaces. Raises InputError for a damaged mask.
    """
    classes = drawn(root, columns, frame)
    classes[classes == EGO] = 0
    return classes


def all_labels_of(root, columns, frame):
    """The same of ALL_CLASSES: a pixel without a class is background."""
    classes = drawn(root, columns, frame)
    classes[classes == 0] = ALL_CLASSES.index("background")
    return classes


def drawn(root, columns, frame):
    """The masks of an image in the order of drawing: uint8 [H, W], 0 where there is none."""
    from pycocotools.mask import decode
    classes = np.zeros(columns["image_size"][frame, 0], np.uint8)
    begin, end = columns["first"][frame:frame + 2]
    for m in range(begin, end):
        runs = columns["runs"][columns["start"][m]:columns["start"][m + 1]]
        if covered(runs) != classes.size:  # pycocotools would leave the rest to chance
            path = columns["image"][frame, 0].decode()
            raise InputError(f"{root}: a mask of {path} is damaged: its runs do not cover the "
                             "image; extract the tables again")
        mask = decode({"size": list(classes.shape), "counts": runs.tobytes()})  # [H, W] 0 or 1
        classes[mask == 1] = columns["kind"][m]
    return classes


def sources(root, version=None):
    """The JSON files of v1.0-train and v1.0-val, or of one version.

    Raises InputError for a wrong root.
    """
    folders = [root / (version or f"v1.0-{split}") for split in SPLITS]
    folders = [folder for folder in folders if (folder / "object_ann.json").is_file()]
    if not folders:
        there = ", ".join(sorted(path.name for path in root.glob("v1.0-*") if path.is_dir()))
        there = f"; there is {there}" if there else ""
        raise InputError(f"--data {root}: not a nuImages root: no {version or 'v1.0-train or'} "
                         f"{'' if version else 'v1.0-val '}with an object_ann.json{there}; "
                         "download nuImages, or make a miniature one with miniature/world.py "
                         "--dataset nuimages")
    return [path for folder in dict.fromkeys(folders) for path in sorted(folder.glob("*.json"))]


def damage(root, columns, frame):
    """What is wrong with an image's file: that it is empty."""
    path = columns["image"][frame, 0].decode()
    return "" if size_of(root, path) else f"{path} is empty; extract it again"


# ---- masks -------------------------------------------------------------------------------------

def covered(runs):
    """How many pixels a mask's runs span, in it or not: uint8 [bytes] -> int; -1 for a damaged one.

    pycocotools packs a number into bytes of 48 + 6 bits: five bits of it, the lowest first, and 32
    unless it is the number's last byte. Bit 16 of the last byte is the sign. From the fourth number
    on, a number is the difference to the one two before.
    """
    bits = runs.astype(np.int64) - 48
    last = bits & 32 == 0
    if len(bits) == 0 or bits.min() < 0 or bits.max() > 63 or not last[-1]:
        return -1

    # Put the bits of each number in their places, and add them up
    begin = np.flatnonzero(np.append(True, last[:-1]))
    lengths = np.diff(np.append(begin, len(bits)))
    place = 5 * (np.arange(len(bits)) - np.repeat(begin, lengths))
    numbers = np.add.reduceat((bits & 31) << place, begin)
    negative = bits[last] & 16
    numbers -= np.where(negative, 1 << (place[last] + 5), 0)

    # Undo the differences: of the odd numbers and of the even ones, the very first left out
    for n in (1, 2):
        numbers[n::2] = np.cumsum(numbers[n::2])
    return int(numbers.sum()) if (numbers >= 0).all() else -1


# ---- nuImages' tables --------------------------------------------------------------------------

def table(root, version=None):
    """The labelled images: the columns that readers/table.py lists, and their M masks.

    first [S + 1]: first[s]:first[s + 1] are the masks of image s, in the order of drawing.
    kind [M]: index into ALL_CLASSES. start [M + 1]: start[m]:start[m + 1] are the bytes of mask m
    in runs: uint8, run lengths as pycocotools packs them.
    """
    images, kinds, runs = [], [], []  # images: split, path, size, number of masks, record
    folders = dict.fromkeys(path.parent for path in sources(root, version))
    for folder in folders:
        with damage_named(root, folder.name):
            views, masks = _read_version(str(root), folder.name)

        # The images in the order of their paths, and the masks of each
        for file, size, token in sorted(views):
            said = [f"{file} {size}".encode()]
            for kind, mask_size, counts in masks[token]:
                if mask_size != size:
                    raise InputError(f"--data {root}: {folder.name}: a mask of size {mask_size} "
                                     f"for {file} of {size}; extract it again")
                kinds.append(kind)
                runs.append(counts)
                # The record is of CLASSES alone, so that it knows runs from before the others
                said += [bytes([kind if kind < EGO else 0]), counts]
            split = folder.name.removeprefix("v1.0-")
            images.append((split, file, size, len(masks[token]), digest(said)))

    # One array a column
    if not images:
        raise InputError(f"--data {root}: its tables have no sample; extract them again")
    split, image, size, count, record = zip(*images)
    check_files(root, image)
    return {"split": as_bytes(split), "image": as_bytes(image)[:, None],
            "image_size": np.array(size)[:, None], "record": as_bytes(record),
            "first": np.cumsum([0, *count]), "kind": np.array(kinds, np.uint8),
            "start": np.cumsum([0, *map(len, runs)]),
            "runs": np.frombuffer(b"".join(runs), np.uint8)}


def _read_version(root, version):
    """A split's labelled images and {token of an image: its masks, in the order of drawing}.

    An image is (path, [height, width], token), a mask (index into ALL_CLASSES, [height, width],
    runs).
    """
    from nuimages import NuImages
    from nuscenes.eval.detection.utils import category_to_detection_name

    def class_of(category):
        if category == "flat.driveable_surface":
            return CLASSES.index("driveable_surface")
        if category == "vehicle.ego":
            return EGO
        return CLASSES.index(category_to_detection_name(category) or "ignore")

    nuim = NuImages(version, str(root))
    kinds = {category["token"]: class_of(category["name"]) for category in nuim.category}

    # The masks, drawn in the devkit's order
    masks = defaultdict(list)
    objects = sorted(nuim.object_ann, key=lambda mark: mark["token"])
    for mark in (*nuim.surface_ann, *objects):
        mask = mark["mask"]
        if mask is not None:
            counts = base64.b64decode(mask["counts"], validate=True)
            kind = kinds[mark["category_token"]]
            masks[mark["sample_data_token"]].append((kind, mask["size"], counts))

    views = []
    for sample in nuim.sample:
        view = nuim.get("sample_data", sample["key_camera_token"])
        views.append((view["filename"], [int(view["height"]), int(view["width"])], view["token"]))
    return views, masks


if __name__ == "__main__":
    main("nuimages")

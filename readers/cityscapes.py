"""Cityscapes: pictures of 27 cities by day, and the class of each of their pixels.

    python -m readers.cityscapes --data /data/cityscapes    # are all files whole? The counts

Cordts et al., CVPR 2016. leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, in one folder:

    leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png
    gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png

A city is a scene. The labels of test are placeholders without a class. Without gtFine the pictures
are there for what needs no labels. What the names of this file mean is said in readers/table.py.
"""
import io
from pathlib import Path

import numpy as np
from PIL import Image

from plumbing.errors import InputError
from readers.kitti import names_in
from readers.paths import MODES, size_in_header, size_of
from readers.table import as_bytes, main

SPLITS = ("train", "val", "test")
# The id of each class, in the order of the train ids (cityscapesScripts, helpers/labels.py)
IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
    "traffic_light": 19, "traffic_sign": 20, "vegetation": 21, "terrain": 22, "sky": 23,
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32,
    "bicycle": 33}
CLASSES = ("ignore", *IDS)
# Of the ids 0 to 33. A licence plate's is -1 and never drawn: its pixels are the car's
CLASS_TABLE = np.zeros(34, np.uint8)
CLASS_TABLE[list(IDS.values())] = np.arange(1, len(CLASSES))
SHARE = "frames"
PAPER_FRAMES = {"train": 2975, "val": 500, "test": 1525}

# Folders, how the names in them end, and the archives
PICTURES, LABELS = "leftImg8bit", "gtFine"
PICTURE, LABEL = "_leftImg8bit.png", "_gtFine_labelIds.png"
PICTURE_ZIP, LABEL_ZIP = "leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"
NO_LABELS = f"  no gtFine: for what needs no labels; else extract {LABEL_ZIP} beside leftImg8bit"


# ---- labels --------------------------------------------------------------------------------------

def labels(path, count=None):
    """The class of each pixel, uint8 [H, W]: indices into CLASSES. `count` is for scans.

    Raises InputError for what is no PNG of one channel of 8 bits, for another size than that of its
    picture, and for ids beyond the table.
    """
    from plumbing.files import looks_like, read_bytes
    from readers.files import way_out  # here, because it needs torch, which tables do not
    content = read_bytes(path, f"extract {LABEL_ZIP} again")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.verify()  # the checksums, which decoding does not compare
        with Image.open(io.BytesIO(content)) as picture:
            ids = np.array(picture)  # [H, W]
    except MemoryError:
        raise
    except Exception:  # a damaged file can raise nearly anything
        guess = way_out(looks_like(content))
        raise InputError(f"{path}: no PNG, or a damaged one; {guess}") from None
    if picture.mode != "L":
        raise InputError(f"{path}: a PNG of mode {picture.mode}, not of one 8-bit channel; take "
                         f"the file *{LABEL}")
    # A city's folder has the same place below leftImg8bit
    *root, _, split, city, name = Path(path).parts
    size = size_in_header(Path(*root, PICTURES, split, city, name.replace(LABEL, PICTURE)))
    if ids.shape != size:
        raise InputError(f"{path}: {ids.shape[0]}x{ids.shape[1]} pixels, its picture has "
                         f"{size[0]}x{size[1]}; {way_out('')}")
    if ids.max() >= len(CLASS_TABLE):
        guess = f"train ids? Take the file *{LABEL}" if ids.max() == 255 else ""
        raise InputError(f"{path}: id {ids.max()}, Cityscapes has 0 to {len(CLASS_TABLE) - 1}; "
                         f"{way_out(guess)}")
    return CLASS_TABLE[ids]


def damage(root, columns, frame):
    """What is wrong with a frame by its files' sizes and headers, in words; "" for nothing."""
    picture, path = (columns[name].reshape(-1)[frame].decode() for name in ("image", "labels"))
    for file in filter(None, (picture, path)):
        if size_of(root, file) == 0:
            return f"{file} is empty; extract it again"
    size = tuple(columns["image_size"][frame, 0])
    if not all(size):
        return f"{picture} is no picture of 8-bit RGB; extract it again, and touch its folder"
    if path and size_in_header(Path(root, path), ("L",)) != size:
        return (f"{path} is no PNG of one 8-bit channel and {size[0]}x{size[1]} pixels, as its "
                f"picture; extract {LABEL_ZIP} again")
    return ""


# ---- files ---------------------------------------------------------------------------------------

def cities(root, kind):
    """The folders of the cities, of all splits; kind: PICTURES or LABELS."""
    found = []
    for split in SPLITS:
        folders = sorted((root / kind / split).glob("[!.]*"))
        found += [folder for folder in folders if folder.is_dir()]
    return found


def home(root):
    """The folder with leftImg8bit in it, which may be given too. InputError for another one."""
    place = root.parent if root.name in (PICTURES, LABELS) else root
    if cities(place, PICTURES):
        return place
    below = [folder.parent for folder in sorted(root.glob(f"*/{PICTURES}"))]
    way = f"give {below[0]}" if below else f"extract {PICTURE_ZIP} and {LABEL_ZIP} into it"
    raise InputError(f"--data {root}: not a Cityscapes root: no folder of a city in {PICTURES}/"
                     f"train, val or test; {way}")


def sources(root):
    """The folders whose listings are the table."""
    return cities(root, PICTURES) + cities(root, LABELS)


def table(root):
    """All pictures. Raises InputError where only a part of those of train and val have labels."""
    frames, paths = [], []
    for folder in cities(root, PICTURES):
        split, city = folder.parts[-2:]
        labelled = set(names_in(root / LABELS / split / city, LABEL))
        for name in names_in(folder, PICTURE):
            frames.append((split, city, f"{PICTURES}/{split}/{city}/{name}{PICTURE}"))
            path = f"{LABELS}/{split}/{city}/{name}{LABEL}"
            paths.append(path if name in labelled else "")
    if not frames:
        raise InputError(f"--data {root}: no *{PICTURE} in any city; extract {PICTURE_ZIP} again")

    # Labels of a part only are an archive that was not extracted whole
    missing = [frame[2] for frame, path in zip(frames, paths) if not path and frame[0] != "test"]
    if any(paths) and missing:
        raise InputError(f"--data {root}: {len(missing)} pictures have no file *{LABEL}, the first "
                         f"is {missing[0]}; extract {LABEL_ZIP} again, or take gtFine away")
    splits, scenes, images = zip(*frames)
    sizes = [size_in_header(root / image, MODES) for image in images]
    columns = {"split": as_bytes(splits), "scene": as_bytes(scenes), "labels": as_bytes(paths),
               "image": as_bytes(images)[:, None], "image_size": np.array(sizes)[:, None]}
    return columns if any(paths) else columns | {"notes": as_bytes([NO_LABELS])}


if __name__ == "__main__":
    main("cityscapes")

"""A folder of pictures of any names and sizes: for features of images, without LiDAR and labels.

    python -m readers.pictures --data /data/pictures    # every picture's header, and the counts

A picture is a file that ends in .jpg, .jpeg or .png, in whatever case, in the folder or anywhere
below it. What begins with a dot is left out. All pictures are of the split "train". The scene of a
picture is the folder that it is in. Its condition is the first folder on the way to it: that of
night/monday/1.jpg is "night". The folders tell conditions only where each picture is in one whose
name can be a condition's, and there are at most MOST of them. conditions.json can tell others.
A picture is read as it is stored, without the turn that EXIF may ask for.

What the names of this file mean is said in readers/table.py.
"""
import os
import re

import numpy as np

from plumbing.errors import InputError
from plumbing.files import unreadable
from plumbing.fingerprint import digest
from readers.conditions import is_name
from readers.paths import MODES, PICTURES, size_in_header, size_of
from readers.table import as_bytes, main

MOST = 20  # conditions: more folders than that are drives or classes
# A table holds names as UTF-8, and messages are of one line
NO_NAME = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


def sources(root):
    """The folders and the pictures: with another name, size or date they are another table."""
    folders, pictures = walk(root)
    return [*map(root.joinpath, folders), *map(root.joinpath, pictures)]


def table(root):
    """All pictures in the order of their paths: the columns that readers/table.py lists."""
    _, paths = walk(root)
    sizes = [size_in_header(root / path, MODES) for path in paths]
    scenes = [os.path.dirname(path) or "." for path in paths]
    record = [digest([f"{path} {size}".encode()]) for path, size in zip(paths, sizes)]
    columns = {"split": np.full(len(paths), b"train"), "scene": as_bytes(scenes),
               "image": as_bytes(paths)[:, None], "image_size": np.array(sizes)[:, None],
               "record": as_bytes(record)}
    return columns | conditions_of(paths)


def damage(root, columns, frame):
    """What is wrong with a picture by its size and header, in words; "" for nothing."""
    path = columns["image"][frame, 0].decode()
    if size_of(root, path) == 0:
        return f"{path} is empty; copy it again"
    if columns["image_size"][frame].all():
        return ""
    # Rare, so the whole picture is read, and the error says what it looks like
    from readers.files import read_image  # here, because it needs torch, which tables do not
    try:
        read_image(os.path.join(root, path), (8, 8))
    except InputError as error:
        return str(error).removeprefix(f"{root}{os.sep}")
    return ""


# ---- folders -------------------------------------------------------------------------------------

def walk(root):
    """The folders of a root and the pictures in them: two sorted lists of paths relative to it.

    Links are followed. Raises InputError for a root without pictures, for a link to nothing, and
    for names that cannot be kept.
    """
    if not root.is_dir():
        raise InputError(f"--data {root}: is a file; give the folder that it is in")
    folders, pictures = [], []
    waiting = [(".", ())]  # a folder, and where the folders really are that it is in
    while waiting:
        folder, above = waiting.pop()
        real = os.path.realpath(root / folder)
        if real in above:  # a link back, which would go on for ever
            continue
        folders.append(folder)
        for name in names_in(root / folder):
            path = os.path.normpath(os.path.join(folder, name))
            if os.path.isdir(root / path):
                waiting.append((path, (*above, real)))
            elif name.lower().endswith(PICTURES):
                check_picture(root, path)
                pictures.append(path)
    if not pictures:
        raise InputError(f"--data {root}: no picture in it or below it (.jpg, .jpeg or .png, in "
                         "folders and files that do not begin with a dot)")
    return sorted(folders), sorted(pictures)


def names_in(folder):
    """The names in a folder that do not begin with a dot. InputError where it cannot be read."""
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError as error:
        raise unreadable(folder, error, "give another folder") from None


def check_picture(root, path):
    """Raise InputError for a name that cannot be kept, and for what is no file."""
    if NO_NAME.search(path):
        raise InputError(f"--data {root}: {ascii(path)}: a name that is no UTF-8, or that has a "
                         "control character; rename it")
    if not os.path.isfile(root / path):
        raise InputError(f"--data {root}: {path} is no file (a link to nothing?); mend or remove "
                         "it")


def conditions_of(paths):
    """The columns conditions and condition by the pictures' first folders, or a note why not."""
    first = [path.partition("/")[0] if "/" in path else "" for path in paths]
    names, numbers = np.unique(first, return_inverse=True)
    wrong = [path for path, name in zip(paths, first) if not is_name(name)]
    if not wrong and len(names) <= MOST:
        return {"conditions": as_bytes(names), "condition": numbers}
    reason = f"{len(names)} folders are more than {MOST}"
    if wrong:
        reason = f"{wrong[0]} is in no folder whose name can be a condition's"
    return {"notes": as_bytes([f"  conditions unstated: {reason}; conditions.json can tell them"])}


if __name__ == "__main__":
    main("pictures")

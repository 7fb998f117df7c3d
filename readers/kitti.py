"""What SemanticKITTI and SemanticPOSS share: where files lie, scans, labels of points.

    SS/velodyne/NNNNNN.bin    float32 x, y, z [m], intensity of each point: 16 bytes a point
    SS/labels/NNNNNN.label    uint32 of each point: class in the lower 16 bits, object in the upper

SS is a sequence: 00, 01, ... (semantic-kitti-api, README)
"""
import os

import numpy as np

from plumbing.errors import InputError
from readers.paths import size_of
from readers.table import UNKNOWN, as_bytes, shared

# Layouts in which scans are kept elsewhere: the numbers, and how many a point has
LAYOUTS = {"five columns (nuScenes)?": ("<f4", 5), "64-bit floats?": ("<f8", 4),
           "three columns?": ("<f4", 3), "big-endian floats?": (">f4", 4),
           "16-bit floats?": ("<f2", 4)}
# Whose scan it may be where the intensities are not 0..1, or not 0..255
OTHERS = {1: "SemanticPOSS? Give --data semanticposs=PATH",
          255: "SemanticKITTI? Give --data semantickitti=PATH"}


# ---- folders -------------------------------------------------------------------------------------

def sequences_folder(root, archives):
    """The folder of the sequences: root/dataset/sequences, root/sequences or root itself.

    archives: which ones to extract if it is none of them. Raises InputError then.
    """
    places = (root / "dataset/sequences", root / "sequences", root)
    for place in places:
        if any(place.glob("[0-9][0-9]/velodyne")):
            return place

    # What lies there in its place
    looked = ", ".join(map(str, places))
    wrong = f"--data {root}: no folder 00/velodyne, 01/velodyne, ... in {looked}"
    marks = ("training/velodyne", "training/label_2", "label_2")
    if any((root / mark).is_dir() for mark in marks):
        raise InputError(f"{wrong}; this is KITTI detection, which labels boxes and has no "
                         f"sequences: extract {archives}")
    if (root / "velodyne").is_dir():
        raise InputError(f"{wrong}; this is a single sequence: give the folder that it is in, and "
                         "leave its name, two digits")
    raise InputError(f"{wrong}; give the folder into which you extracted {archives}")


def folders_of(root, sequences, kinds):
    """The folders of these kinds ("velodyne", ...) that these sequences have."""
    folders = [root / sequence / kind for sequence in sequences for kind in kinds]
    return [folder for folder in folders if folder.is_dir()]


def names_in(folder, ending):
    """The names, without ending, of the files in a folder that have it; sorted."""
    if not folder.is_dir():
        return []
    files = [file for file in os.listdir(folder) if file.endswith(ending) and file[0] != "."]
    return sorted(file.removesuffix(ending) for file in files)


def frames_of(root, sequences):
    """[(sequence, name)] of all scans, in the order of their paths. InputError if there is none.

    The files are listed and not counted up: numbers may begin anywhere, and some may be left out.
    """
    found = []
    for sequence in sorted(sequences):
        found += [(sequence, name) for name in names_in(root / sequence / "velodyne", ".bin")]
    if not found:
        raise InputError(f"--data {root}: no .bin in the folders velodyne of the sequences "
                         f"{min(sequences)} to {max(sequences)}; extract the scans again")
    return found


def frame_columns(root, frames, split_of):
    """The columns split, scene, scan and labels of these frames; split_of: of each sequence.

    A sequence without labels may be there. Raises InputError where some of its labels are missing.
    """
    labelled = {sequence: set(names_in(root / sequence / "labels", ".label"))
                for sequence in split_of}
    # Each scan's labels have its name
    labels = []
    for sequence, name in frames:
        path = f"{sequence}/labels/{name}.label"
        if labelled[sequence] and name not in labelled[sequence]:
            raise InputError(f"--data {root}: {path} is missing; extract the labels again, or take "
                             f"all labels of sequence {sequence} away")
        labels.append(path if labelled[sequence] else "")
    return {"split": as_bytes([split_of[sequence] for sequence, _ in frames]),
            "scene": as_bytes([sequence for sequence, _ in frames]),
            "scan": as_bytes([f"{sequence}/velodyne/{name}.bin" for sequence, name in frames]),
            "labels": as_bytes(labels)}


# ---- files ---------------------------------------------------------------------------------------

def read_scan(path, brightest):
    """[A, 4]: x, y, z [m], intensity 0..brightest (1 or 255). InputError for what is no scan."""
    from plumbing.files import looks_like, read_bytes
    from readers.files import RANGES, implausible, other_layout, way_out  # they need torch
    content = read_bytes(path)
    points = np.empty((0, 4), "<f4")
    if len(content) % 16 or not content:
        wrong = f"cut short: {len(content)} bytes are not whole points of 4 floats"
    else:
        points = np.frombuffer(content, "<f4").reshape(-1, 4)
        ranges = RANGES | {"intensity": (0, brightest)}
        wrong = "" if plausible(points, ranges) else implausible(points, ranges)
        if not wrong and points[:, 3].max() <= 1 < brightest:
            wrong = f"intensities of 0..{points[:, 3].max():g}, not 0..{brightest}"
        if not wrong:
            return points

    # What it looks like
    guess = looks_like(content)
    if not guess and wrong.startswith("intensit") and not implausible(points):
        guess = OTHERS[brightest]
    guess = guess or other_layout(content, LAYOUTS, "x, y, z, intensity")
    raise InputError(f"{path}: {wrong}; {way_out(guess)}")


def plausible(points, ranges):
    """Whether points [N, 4] are a scan at first sight: if so, `implausible` finds nothing in it.

    This goes over a scan as few times as can be, as `plausible` of readers/files.py does.
    """
    from readers.files import NOWHERE
    least, most = ranges["z"]  # x and y have the same range
    darkest, brightest = ranges["intensity"]
    x, intensity = points[:, 0].copy(), points[:, 3].copy()  # faster in one piece
    return bool(least <= points.min() and points.max() <= most
                and darkest <= intensity.min() and intensity.max() <= brightest
                and np.count_nonzero(x == 0) < NOWHERE
                and (points[0] != points[-1]).all())


def class_table(fine):
    """The class of each raw label, uint8 [65536]. fine: {class: its raw labels}, in order."""
    table = np.full(1 << 16, UNKNOWN, np.uint8)
    for number, raw in enumerate(fine.values()):
        table[list(raw)] = number
    return table


def read_labels(path, classes, count=None):
    """Classes [count] of a scan's points; classes: `class_table`. InputError for other labels."""
    from plumbing.files import looks_like, read_bytes
    from readers.files import way_out
    content = read_bytes(path)
    if len(content) % 4 or count not in (None, len(content) // 4):
        bits = 8 * len(content) / max(1, count or 0)
        guess = looks_like(content)
        if not guess and bits in (8, 16, 64):
            guess = f"{bits:.0f}-bit labels? Write 32 bits a point"
        points = "whole labels of 4" if count is None else f"4 for each of {count} points"
        raise InputError(f"{path}: {len(content)} bytes are not {points}; {way_out(guess)}")
    raw = np.frombuffer(content, "<u4") & 0xFFFF  # without the number of the object
    found = classes[raw]
    unknown = raw[found == UNKNOWN]
    if len(unknown):
        raise InputError(f"{path}: label {unknown[0]} is of no class of this dataset; extract the "
                         "labels as they were released (neither learnt classes nor another "
                         "dataset's)")
    return found


def damage(root, columns, frame, scan, labels):
    """What is wrong with a frame's scan and labels by their sizes, in words; "" for nothing.

    scan, labels: the functions of the reader. They say it, and read only what has a wrong size.
    """
    path = columns["scan"][frame].decode()
    labels_path = columns["labels"][frame].decode()
    size = size_of(root, path)
    if size == 0:
        return f"{path} is empty; extract it again"
    if size % 16 == 0 and (not labels_path or size_of(root, labels_path) * 4 == size):
        return ""
    # Rare, so the whole files are read, and their contents say what they look like
    try:
        points = scan(os.path.join(root, path))
        labels(os.path.join(root, labels_path), len(points))
    except InputError as error:
        return str(error).removeprefix(f"{root}{os.sep}")
    return ""


if __name__ == "__main__":
    shared("kitti", ("semantickitti", "semanticposs"))

"""SemanticPOSS: scans of 40 beams on a campus, labels of points; no pictures, so for evaluation.

    python -m readers.semanticposs --data /data/poss        # are all files whole? The counts

Pan et al., IV 2020. Files are as SemanticKITTI's, and tag/NNNNNN.tag says which pixels of a range
image of 40 x 1800 have a point. What the names of this file mean is said in readers/table.py.
"""
from pathlib import Path

import numpy as np

from plumbing.errors import InputError
from readers import kitti
from readers.table import as_bytes, main

CAMERAS = ()
# The raw labels of each class; 1 to 3 and 18 to 20 are used for nothing
FINE = {
    "ignore": (0, 1, 2, 3, 18, 19, 20), "person": (4, 5), "rider": (6,), "car": (7,),
    "trunk": (8,), "plants": (9,), "traffic-sign": (10, 11, 12), "pole": (13,),
    "trashcan": (14,), "building": (15,), "cone/stone": (16,), "fence": (17,), "bike": (21,),
    "ground": (22,)}
CLASSES = tuple(FINE)
CLASS_TABLE = kitti.class_table(FINE)
SAMPLING = {  # as SemanticKITTI's: neither paper nor code of ScaLR says
    "fov": (64.0, 64.0, 8.0), "cell": 0.5, "voxel": 0.1, "max_points": 20000, "neighbors": 16,
    "intensity": (14.8, 16.7)}  # as COARSE3D has them; the table's, which are measured, come first
# 03 is held out in SALUDA and CoSMix; COARSE3D trains on it and holds out 02
SPLIT_OF = {"00": "train", "01": "train", "02": "train", "03": "val", "04": "train", "05": "train"}


def scan(path):
    """[A, 4]: x, y, z [m], intensity 0..255."""
    return kitti.read_scan(path, brightest=255)


def labels(path, count=None):
    """Classes [A] of the `count` points of a scan, indices into CLASSES."""
    return kitti.read_labels(path, CLASS_TABLE, count)


def home(root):
    """The folder of the sequences."""
    return kitti.sequences_folder(root, "SemanticPOSS")


def sources(root):
    """The folders whose listings are the table."""
    return kitti.folders_of(root, SPLIT_OF, ("velodyne", "labels"))


def damage(root, columns, frame):
    """What is wrong with a frame: an empty file, one cut short, or lengths that differ."""
    path = Path(root, columns["scan"][frame].decode())
    wrong = kitti.damage(root, columns, frame, scan, labels)
    tag = path.parent.parent / "tag" / f"{path.stem}.tag"
    if wrong or not tag.is_file():
        return wrong
    # A tag is a byte for each pixel, 0 or 1; nothing here needs more of it than their number
    count = np.count_nonzero(np.fromfile(tag, np.uint8))
    points = path.stat().st_size // 16
    if count != points:
        return (f"{tag.relative_to(root)} marks {count} points, {columns['scan'][frame].decode()} "
                f"has {points}; extract both again")
    return ""


def intensity_statistics(root, scans):
    """Mean and standard deviation of the intensities of all points, [2], one scan at a time.

    scans: paths. What cannot be read does not count. Raises InputError if that is all of them.
    """
    count, total, squares = 0, 0.0, 0.0
    first_error = None
    for path in scans:
        try:
            intensity = scan(root / path)[:, 3].astype(np.float64)
        except InputError as error:
            first_error = first_error or error
            continue
        count += len(intensity)
        total += intensity.sum()
        squares += np.square(intensity).sum()
    if count == 0:
        raise first_error
    # E[i^2] - E[i]^2 is exact enough here: intensities are 0..255, and sums are float64
    mean = total / count
    variance = squares / count - mean**2
    return np.array([mean, max(1.0, variance)**0.5])  # at least a step of 0..255, never 0


def table(root):
    """All scans of the sequences 00 to 05 that are here: the columns that readers/table.py lists.

    Nobody publishes ScaLR's statistics of the intensity, so they are measured, on all scans.
    """
    frames = kitti.frames_of(root, SPLIT_OF)
    columns = kitti.frame_columns(root, frames, SPLIT_OF)
    statistics = intensity_statistics(root, np.char.decode(columns["scan"]))
    mean, deviation = statistics
    note = (f"  intensity of all scans: mean {mean:.3f}, standard deviation {deviation:.3f}; no "
            "pictures: for --task seg3d and evaluation")
    return columns | {"intensity": statistics, "notes": as_bytes([note])}


if __name__ == "__main__":
    main("semanticposs")

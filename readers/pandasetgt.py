"""PandaSet by its LiDAR PandarGT, which looks ahead, and the front camera.

    python -m readers.pandasetgt --data /data/pandaset      # are all files whole? The counts

What the names of this file mean is said in readers/table.py.
"""
from readers import pandaset
from readers.pandaset import CLASSES, PAPER_FRAMES, damage
from readers.table import main

SENSOR = 1  # in the column d of a frame
CAMERAS = ("front_camera",)
# ScaLR, supplement B.2 (intensity), and its configurations: pre-training has one field of view for
# all datasets, probing and fine-tuning have a wider one for LiDARs that see as far as these
SAMPLING = pandaset.SAMPLING | {
    "intensity": (23.06113565, 16.76273235),
    "probe": {"fov": (128.0, 128.0, 8.0)}, "finetune": {"fov": (96.0, 96.0, 8.0)}}


def sources(root):
    """The folders that are listed and the JSON files. Raises InputError for a wrong root."""
    return pandaset.sources_of(root, CAMERAS)


def table(root):
    """The frames of the scenes that have labels: the columns that readers/table.py lists."""
    return pandaset.columns_of(root, CAMERAS)


def scan(path):
    """[A, 4], float64: x right, y ahead, z up [m], intensity 0..255."""
    return pandaset.read_points(path, SENSOR)


def labels(path, count=None):
    """Classes [A] of the points of a scan, indices into CLASSES."""
    return pandaset.read_labels(path, SENSOR)


if __name__ == "__main__":
    main("pandasetgt")

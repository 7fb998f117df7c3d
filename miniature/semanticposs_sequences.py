"""The miniature world in SemanticPOSS's layout: dataset/sequences/SS of scans, labels and tags.

It has the same names as `nuscenes_tables.py`, and its sequences are made as SemanticKITTI's. A tag
file says of each pixel of a range image, beam by beam, whether a point is there.
"""
import numpy as np

from miniature import semantickitti_sequences
from miniature.scenes import plan_scene, sweep
from miniature.semantickitti_sequences import (FORWARD, folders_of, places_of, raw_labels,
                                               version_of, write_sweep)
from miniature.street import (BARRIER, BUS, CAR, MANMADE, PEDESTRIAN, ROAD, SIDEWALK, TERRAIN,
                              TRUCK, VEGETATION)

__all__ = ["folders_of", "version_of"]
TABLES = ()
SEQUENCES = {"train": (0, 1, 2, 4, 5), "val": (3,)}
RAW = {PEDESTRIAN: 4, CAR: 7, TRUCK: 7, BUS: 7, VEGETATION: 9, MANMADE: 15, BARRIER: 17,
       ROAD: 22, SIDEWALK: 22, TERRAIN: 22}  # BARRIER: fence
OBJECTS = {kind: RAW[kind] for kind in (PEDESTRIAN, CAR)}
COLUMNS = 1800  # of the genuine range image


def names_of(options):
    """By split a name per scene: SS/NNNNNN, its sequence and its first frame's number."""
    return semantickitti_sequences.names_of(options, SEQUENCES)


def write_scene(job):
    """Write one scene's scans, labels and tags below `out`."""
    out, options, split, number, condition, name = job
    plan = plan_scene(options, split, number, condition, vehicle=int(name.split("/")[0]))
    for k, (folder, stem) in enumerate(places_of(out, options, name)):
        found = sweep(options, plan, k, "velodyne")
        points = np.column_stack([found["place"] @ FORWARD, found["intensity"]])
        write_sweep(folder, stem, points, raw_labels(found, RAW, OBJECTS))
        (folder / "tag").mkdir(exist_ok=True)
        tags_of(found).tofile(folder / f"tag/{stem}.tag")
    return {}


def tags_of(found):
    """bool [beams, columns] of a sweep: 1800 columns if its steps are every so many-th of them."""
    beams, steps = found["grid"]
    columns = COLUMNS if COLUMNS % steps == 0 else steps
    tags = np.zeros((beams, columns), bool)
    tags[found["beam"], found["step"] * (columns // steps)] = True
    return tags


def finish(out, tables, options):
    """Nothing is left to do, and there are no tables."""
    return {}

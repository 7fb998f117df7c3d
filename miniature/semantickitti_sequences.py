"""The miniature world in SemanticKITTI's layout: dataset/sequences/SS of scans, labels, pictures.

It has the same names as `nuscenes_tables.py`. A sequence is several streets, one after the other,
all driven with the same vehicle.
"""
import numpy as np
from PIL import Image

from miniature.domains import domain_of
from miniature.scenes import picture, plan_scene, pose_of, sweep
from miniature.street import (BARRIER, BUS, CAR, MANMADE, PEDESTRIAN, ROAD, SIDEWALK, TERRAIN,
                              TRUCK, VEGETATION)

TABLES = ("frames",)
SEQUENCES = {"train": (0, 1, 2, 3, 4, 5, 6, 7, 9, 10), "val": (8,)}
RAW = {CAR: 10, BUS: 13, TRUCK: 18, PEDESTRIAN: 30, ROAD: 40, SIDEWALK: 48, MANMADE: 50,
       BARRIER: 51, VEGETATION: 70, TERRAIN: 72}  # BARRIER: fence
MOVING = {CAR: 252, PEDESTRIAN: 254, BUS: 257, TRUCK: 258}
# Where camera 0 lies from camera 2, m. The genuine 6 cm would hardly move a picture's point here
OFFSET = np.array([.3, -.02, .05])
FORWARD = np.array([[0., -1, 0], [1, 0, 0], [0, 0, 1]])  # x forward, y left -> x right, y forward


def version_of(split):
    """The folder of a split's sequences."""
    return "dataset/sequences"


def folders_of(options):
    """None beside the sequences', which `write_scene` makes."""
    return []


def names_of(options, sequences=SEQUENCES):
    """By split a name per scene: SS/NNNNNN, its sequence and its first frame's number."""
    names, asked = {}, {"train": sum(options["train"]), "val": options["val"]}
    for split, numbers in sequences.items():
        parts = np.array_split(np.arange(asked[split]), len(numbers))
        names[split] = [f"{sequence:02d}/{k * options['frames']:06d}"
                        for sequence, part in zip(numbers, parts) for k in range(len(part))]
    return names


def places_of(out, options, name):
    """Of a scene's frames: folder of the sequence and file name without its ending."""
    sequence, first = name.split("/")
    return [(out / version_of(None) / sequence, f"{int(first) + k:06d}")
            for k in range(options["frames"])]


def raw_labels(found, raw, moving):
    """Labels uint32 [N] of a sweep: class in the lower 16 bits, instance in the upper ones.

    raw, moving: {fine class: id}; what is in moving has instances.
    """
    table = np.zeros((2, 256), np.uint32)
    for row, ids in enumerate((raw, raw | moving)):
        for kind, number in ids.items():
            table[row, kind] = number
    # the ground's things have instance 0, and so has all else that is no object
    instance = np.where(np.isin(found["kind"], list(moving)), found["instance"], 0)
    return table[found["moves"], found["kind"]] | instance.astype(np.uint32) << 16


def write_sweep(folder, stem, points, labels):
    """Write velodyne/STEM.bin and labels/STEM.label. points [N, 4], labels uint32 [N]."""
    for name in ("velodyne", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    points.astype("<f4").tofile(folder / f"velodyne/{stem}.bin")
    labels.astype("<u4").tofile(folder / f"labels/{stem}.label")


def in_order(found, *values):
    """The values [N, ...] of a sweep, beam by beam, each from the front once around to the left."""
    _, steps = found["grid"]
    turned = ((steps - 1) // 2 - found["step"]) % steps
    order = np.lexsort((turned, found["beam"]))
    return [value[order] for value in values]


def write_scene(job):
    """Write one scene's scans, labels and pictures below `out`; returns a row per frame."""
    out, options, split, number, condition, name = job
    sequence = name.split("/")[0]
    plan = plan_scene(options, split, number, condition, vehicle=int(sequence))
    rows = []
    for k, (folder, stem) in enumerate(places_of(out, options, name)):
        found = sweep(options, plan, k, "velodyne")
        points = np.column_stack([found["place"] @ FORWARD, found["intensity"]])
        write_sweep(folder, stem, *in_order(found, points, raw_labels(found, RAW, MOVING)))
        (folder / "image_2").mkdir(exist_ok=True)
        image, _, _ = picture(options, plan, k, "image_2")
        Image.fromarray(image).save(folder / f"image_2/{stem}.png")
        turn, eye = pose_of(plan, k, "image_2")
        # camera 0 has the axes of camera 2
        rows.append(dict(sequence=sequence, scene=name, time=plan["frames"][k]["image_2"]["time"],
                         pose=(turn, eye + turn @ OFFSET), lidar_to_camera=calibration(plan)))
    return {"frames": rows}


def calibration(plan):
    """[3, 4]: from the LiDAR's frame, x forward and y left, to camera 0's."""
    (at_lidar, lidar, _), (at, camera, _) = (plan["sensors"][c] for c in ("velodyne", "image_2"))
    inverse = camera.rotation_matrix.T
    shift = inverse @ (at_lidar - at) - OFFSET
    return np.column_stack([inverse @ lidar.rotation_matrix @ FORWARD, shift])


def projections(options):
    """{"P0": [3, 4], ..., "P3"}: from camera 0's frame to the pixels of cameras 0 to 3."""
    height, width = options["image_size"]
    focal = width / 2 / domain_of(options)["wide"]["image_2"]
    matrix = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    offsets = {"P0": np.zeros(3), "P1": np.array([-.54, 0, 0]), "P2": OFFSET,
               "P3": OFFSET - (.54, 0, 0)}
    return {key: np.column_stack([matrix, matrix @ offset]) for key, offset in offsets.items()}


def finish(out, tables, options):
    """Write each sequence's calib.txt, poses.txt and times.txt; there are no tables."""
    sequences = {}
    for row in tables["frames"]:
        sequences.setdefault(row["sequence"], []).append(row)
    for sequence, rows in sequences.items():
        matrices = projections(options) | {"Tr": rows[0]["lidar_to_camera"]}
        calib = [f"{key}: {numbers(matrix)}" for key, matrix in matrices.items()]
        # poses are relative to the sequence's first one; a new street begins 10 s later
        turn, eye = rows[0]["pose"]
        poses, times, clock = [], [], 0.
        for before, row in zip([rows[0], *rows], rows):
            same = row["scene"] == before["scene"]
            clock += (row["time"] - before["time"]) / 1e6 if same else 10
            times.append(f"{clock:e}")
            turn_now, eye_now = row["pose"]
            poses.append(numbers(np.column_stack([turn.T @ turn_now, turn.T @ (eye_now - eye)])))
        for name, lines in (("calib", calib), ("poses", poses), ("times", times)):
            path = out / version_of(None) / sequence / f"{name}.txt"
            path.write_text("\n".join(lines) + "\n")
    return {}


def numbers(matrix):
    return " ".join(f"{value:.12e}" for value in matrix.ravel())

"""What the readers of PandaSet's two LiDARs share: where files lie, points, labels, cameras.

    SSS/lidar/NN.pkl.gz                 points of both LiDARs, in the frame of the world
    SSS/lidar/poses.json                of the vehicle, one a frame
    SSS/annotations/semseg/NN.pkl.gz    the points' classes; only some scenes have this folder
    SSS/camera/NAME/NN.jpg, intrinsics.json, poses.json
    SSS/meta/gps.json                   latitudes, by which ScaLR tells training and validation

SSS is a scene of three digits, NN a frame of two (pandaset-devkit). Xiao et al., ITSC 2021.
"""
import functools
import os
from pathlib import Path

import numpy as np

from plumbing.errors import InputError
from readers.pandaset_poses import dated, inverse_of, pose_at, read_intrinsics, read_poses, split_of
from readers.paths import check_files, size_in_header, size_of
from readers.pickles import AGAIN, LABELS, POINTS, read_frame, wrong_file
from readers.table import UNKNOWN, as_bytes, shared

CAMERAS = ("front_camera", "front_left_camera", "front_right_camera", "left_camera",
           "right_camera", "back_camera")
FINE = {  # the raw labels of each class, as ScaLR merges them
    "ignore": (0, 1, 2, 3, 4, 22, 24, 25, 32, 33, 40), "road": (7,), "traffic_sign": (36, 38),
    "barrier": (35, 39), "pedestrian": (30, 31), "vegetation": (5,), "road_marking": (8, 9, 10),
    "sidewalk": (11,), "manmade": (41, 42), "traffic_cone": (34, 37), "car": (13,),
    "motorcycle": (18,), "truck": (14, 15, 16), "bus": (23,), "bicycle": (26,),
    "other_vehicle": (17, 19, 20, 21, 27, 28, 29), "ground": (6,), "driveway": (12,)}
CLASSES = tuple(FINE)
PAPER_FRAMES = {"train": 3920}
# The origin of a pose is near the road, that of other datasets' scans is a LiDAR on a roof
ROAD = 1.6  # metres that z is lowered
SAMPLING = {  # see readers/nuscenes.py
    "fov": (64.0, 64.0, 8.0), "cell": 0.5, "voxel": 0.1, "max_points": 20000, "neighbors": 16}
NO_POSE = ("its pose or that of one of its images is none (poses.json has fewer than there are "
           f"frames, or one is no rotation); {AGAIN}")


# ---- points and labels -------------------------------------------------------------------------

def read_points(path, sensor):
    """One LiDAR's points [A, 4], float64: x right, y ahead, z up [m], intensity 0..255.

    path: ROOT/SSS/lidar/NN.pkl.gz. sensor: 0 Pandar64, 1 PandarGT. The origin of both is 1.6 m
    above the vehicle's, which is near the road. Raises InputError.
    """
    path = Path(path)
    frame = _frame(*dated(path))
    rows = _rows_of(path, frame, sensor)
    poses = read_poses(*dated(path.with_name("poses.json")))
    pose = pose_at(poses, path)
    if not np.isfinite(pose).all():
        raise InputError(f"{path}: {NO_POSE}")
    # The inverse pose, in double precision: the world's coordinates have thousands of metres
    world = np.column_stack([frame[name][rows] for name in "xyz"])
    points = np.empty((len(rows), 4))
    points[:, :3] = (world - pose[:3, 3]) @ pose[:3, :3]
    points[:, 2] -= ROAD
    points[:, 3] = frame["i"][rows]
    return points


def read_labels(path, sensor):
    """Classes [A] of one LiDAR's points, uint8. path: ROOT/SSS/annotations/semseg/NN.pkl.gz.

    Which rows are the sensor's stands in the frame of the points. Raises InputError.
    """
    path = Path(path)
    of_points = path.parents[2] / "lidar" / path.name
    frame = _frame(*dated(of_points))
    raw = read_frame(path, LABELS)["class"]
    count = len(frame["d"])
    if len(raw) != count:
        raise InputError(f"{path}: {len(raw)} labels for {count} points in {of_points}; {AGAIN}")
    unknown = raw[~np.isin(raw, KNOWN)]
    if len(unknown):
        raise InputError(f"{path}: class {unknown[0]} is of no table of PandaSet's (0 to "
                         f"{KNOWN.max()}); {AGAIN}")
    return CLASS_TABLE[raw[_rows_of(of_points, frame, sensor)].astype(np.uint8)]


def class_table():
    """The class of each raw label, uint8 [256]."""
    table = np.full(256, UNKNOWN, np.uint8)
    for number, raw in enumerate(FINE.values()):
        table[list(raw)] = number
    return table


CLASS_TABLE = class_table()
KNOWN = np.flatnonzero(CLASS_TABLE != UNKNOWN)


def _rows_of(path, frame, sensor):
    """The rows of one LiDAR in a frame: those of the other may stand anywhere between."""
    rows = np.flatnonzero(frame["d"] == sensor)
    if len(rows) == 0:
        raise InputError(f"{path}: no point of the LiDAR d = {sensor}; {AGAIN}")
    return rows


@functools.lru_cache(maxsize=1)
def _frame(path, size, date):
    """The columns of a LiDAR frame, for which points and labels of an item ask."""
    return read_frame(path, POINTS)


# ---- the table ---------------------------------------------------------------------------------

def scenes_of(root):
    """The folders of the scenes that have labels. Raises InputError for a wrong root."""
    scenes = sorted(path.parent for path in root.glob("[0-9][0-9][0-9]/lidar"))
    labelled = [scene for scene in scenes if (scene / "annotations/semseg").is_dir()]
    if labelled:
        return labelled
    if scenes:
        raise InputError(f"--data {root}: none of its {len(scenes)} scenes has the folder "
                         "annotations/semseg (76 of 103 have it); extract the annotations too")
    inside = sorted(root.glob("*/[0-9][0-9][0-9]/lidar"))
    hint = "download PandaSet, or make a miniature one with miniature/world.py --dataset pandaset"
    if inside:
        hint = f"there are scenes in {inside[0].parents[1]}: give that"
    elif (root / "lidar").is_dir():
        hint = f"this is one scene: give the folder of scenes, {root.parent}"
    raise InputError(f"--data {root}: not a PandaSet root: no folder SSS/lidar in it, SSS being "
                     f"three digits; {hint}")


def sources_of(root, cameras):
    """The folders that are listed and the JSON files. Raises InputError for a wrong root."""
    sources = [root]
    labelled = scenes_of(root)
    for scene in sorted(root.glob("[0-9][0-9][0-9]")):
        # A scene without labels may get some
        if scene not in labelled:
            sources += [scene, scene / "annotations"]
            continue
        sources += [scene / "lidar", scene / "annotations/semseg", scene / "lidar/poses.json",
                    scene / "meta/gps.json"]
        for camera in cameras:
            folder = scene / "camera" / camera
            sources += [folder, folder / "poses.json", folder / "intrinsics.json"]
    return [path for path in sources if path.exists()]


def check_cameras(root, folders):
    """Raise InputError where a scene lacks the folder of a camera."""
    for folder in folders:
        if not folder.is_dir():
            hint = " (of the cameras, --data pandasetgt=PATH needs the front one alone)"
            raise InputError(f"--data {root}: scene {folder.parents[1].name} has no folder camera/"
                             f"{folder.name}; download the scene again, or take it away"
                             f"{hint if len(folders) > 1 else ''}")


def columns_of(root, cameras):
    """The frames of the scenes that have labels: the columns that readers/table.py lists."""
    strings = ("scene", "split", "scan", "labels", "image")
    columns = {name: [] for name in (*strings, "cam_from_lidar", "intrinsics")}
    shift = np.eye(4)
    shift[2, 3] = ROAD
    for scene in scenes_of(root):
        split = split_of(scene / "meta/gps.json")
        poses = read_poses(*dated(scene / "lidar/poses.json"))
        folders = [scene / "camera" / camera for camera in cameras]
        check_cameras(root, folders)
        views = [read_poses(*dated(folder / "poses.json")) for folder in folders]
        intrinsics = [read_intrinsics(folder / "intrinsics.json") for folder in folders]

        # Frames are listed, because their numbers may have gaps
        for path in sorted((scene / "lidar").glob("[0-9][0-9].pkl.gz")):
            columns["scene"].append(scene.name)
            columns["split"].append(split)
            columns["scan"].append(f"{scene.name}/lidar/{path.name}")
            columns["labels"].append(f"{scene.name}/annotations/semseg/{path.name}")
            images = [f"{scene.name}/camera/{camera}/{path.name[:2]}.jpg" for camera in cameras]
            columns["image"].append(images)
            columns["intrinsics"].append(intrinsics)
            world = pose_at(poses, path) @ shift
            cameras_from_lidar = [inverse_of(pose_at(view, path)) @ world for view in views]
            columns["cam_from_lidar"].append(cameras_from_lidar)
    if not columns["scan"]:
        raise InputError(f"--data {root}: no frame SSS/lidar/NN.pkl.gz in its scenes; {AGAIN}")
    # What is named has to be there, before headers are read
    for name in ("scan", "labels", "image"):
        check_files(root, np.ravel(columns[name]).tolist(), "download these scenes again")
    sizes = [[size_in_header(root / path) for path in row] for row in columns["image"]]
    for name, values in columns.items():
        columns[name] = as_bytes(values) if name in strings else np.array(values)
    return columns | {"image_size": np.array(sizes), "cameras": as_bytes(cameras)}


def damage(root, columns, frame):
    """What is wrong with a frame: no pose, an empty file, no gzip, one cut short, no picture."""
    scan = columns["scan"][frame].decode()
    if not np.isfinite(columns["cam_from_lidar"][frame]).all():
        return f"{scan}: {NO_POSE}"
    for path in (scan, columns["labels"][frame].decode()):
        wrong = wrong_file(os.path.join(root, path))
        if wrong:
            return f"{path}: {wrong}"
    # A picture of no size is one whose header could not be read
    for path, size in zip(columns["image"][frame], columns["image_size"][frame]):
        if size_of(root, path.decode()) == 0:
            return f"{path.decode()} is empty; {AGAIN}"
        if not size.all():
            return f"{path.decode()} is no picture; {AGAIN}, and touch its folder"
    return ""


if __name__ == "__main__":
    shared("pandaset", ("pandaset64", "pandasetgt"))

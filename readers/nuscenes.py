"""nuScenes: scans, six cameras, labels of points; conditions by the scenes' descriptions.

    python -m readers.nuscenes --data /data/nuscenes        # are all files whole? The counts

nuscenes-devkit reads its tables. What the names of this file mean is said in readers/table.py.
"""
import functools
import json
import re
from pathlib import Path

import numpy as np

from plumbing.errors import InputError
from plumbing.fingerprint import digest
from readers.paths import check_files, size_of
from readers.table import UNKNOWN, as_bytes, damage_named, main

VERSION = "v1.0-trainval"
CONDITIONS = ("day-clear", "day-rain", "night")
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT",
           "CAM_FRONT_LEFT")
CLASSES = ("ignore", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle",
           "pedestrian", "traffic_cone", "trailer", "truck", "driveable_surface", "other_flat",
           "sidewalk", "terrain", "manmade", "vegetation")
CLASS_OF = {  # lidarseg's categories, as the lidarseg challenge merges them
    "human.pedestrian.adult": "pedestrian", "human.pedestrian.child": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "vehicle.car": "car", "vehicle.motorcycle": "motorcycle", "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus", "vehicle.bus.rigid": "bus", "vehicle.truck": "truck",
    "vehicle.construction": "construction_vehicle", "vehicle.trailer": "trailer",
    "movable_object.barrier": "barrier", "movable_object.trafficcone": "traffic_cone",
    "flat.driveable_surface": "driveable_surface", "flat.sidewalk": "sidewalk",
    "flat.terrain": "terrain", "flat.other": "other_flat",
    "static.manmade": "manmade", "static.vegetation": "vegetation"}
IGNORED = ("noise", "animal", "human.pedestrian.personal_mobility", "human.pedestrian.stroller",
           "human.pedestrian.wheelchair", "movable_object.debris",
           "movable_object.pushable_pullable", "static_object.bicycle_rack", "static.other",
           "vehicle.ego", "vehicle.emergency.ambulance", "vehicle.emergency.police")
CLASS_OF |= dict.fromkeys(IGNORED, "ignore")
# Hardly any of them is there at night (collaborative-distillation paper, C.3)
LEFT_OUT = {"night": ("bus", "trailer", "construction_vehicle")}
SAMPLING = {  # ScaLR, supplement B.2, and its configuration
    "fov": (64.0, 64.0, 8.0),  # half extents along x, y, z [m]
    "cell": 0.5,               # side of the planes' cells [m]
    "voxel": 0.1,              # side of the voxels of which one point is kept [m]
    "max_points": 20000,       # at most so many points: the ones nearest to a random one
    "neighbors": 16,           # of a point, in the embedding
    "intensity": (18.742355, 22.04632),  # mean and standard deviation
}
PAPER_FRAMES = {"train": 28130}  # v1.0-trainval
STRINGS = ("scene", "split", "scan", "labels", "image", "record")  # columns of them
NO_POSE = ("the calibration or ego pose of it or of one of its images is none (a rotation of "
           "length 0, or numbers that are not finite); extract the tables again")


# ---- files ---------------------------------------------------------------------------------------

def scan(path):
    """[A, 4]: x, y, z [m], intensity 0..255."""
    from readers.files import read_scan  # here, because it needs torch, which tables do not
    return read_scan(path)


def labels(path, count=None):
    """Classes [A] of the `count` points of a scan, indices into CLASSES: a file of lidarseg."""
    from readers.files import read_labels
    version = Path(path).parent  # ROOT/lidarseg/VERSION
    return read_labels(path, label_map(version.parent.parent, version.name), count)


@functools.cache
def label_map(root, version):
    """The class of each label of lidarseg, uint8 [256], by the table of categories."""
    classes = np.full(256, UNKNOWN, np.uint8)
    for category in json.loads((root / version / "category.json").read_bytes()):
        if category["name"] in CLASS_OF:
            classes[category["index"]] = CLASSES.index(CLASS_OF[category["name"]])
    return classes


def sources(root, version=VERSION):
    """The JSON files of a version. Raises InputError for a wrong root or version."""
    folder = root / version
    if not (folder / "sample_data.json").is_file():
        there = sorted(path.name for path in root.glob("v1.0-*") if path.is_dir())
        if there:
            hint = "give one of them as --version"
            if "v1.0-train" in there or "v1.0-val" in there:
                hint = "nuImages is --data nuimages=PATH"
            raise InputError(f"--data {root}: no --version {version}; there is {', '.join(there)}; "
                             f"{hint}")
        raise InputError(f"--data {root}: not a nuScenes root (no folder v1.0-*); download "
                         "nuScenes, or make the miniature world with demo.py")
    return sorted(folder.glob("*.json"))


def check(root, version=VERSION):
    """Raise InputError if maps or labels of points are wrong: the devkit would blame the tables."""
    with damage_named(root, version):
        _check_beside(root, version)


def damage(root, columns, frame):
    """What is wrong with a frame: no pose, an empty file, a scan cut short, labels missing."""
    path = columns["scan"][frame].decode()
    posed = np.isfinite(columns["cam_from_lidar"][frame]).all()
    if not (posed and np.isfinite(columns["intrinsics"][frame]).all()):
        return f"{path}: {NO_POSE}"
    images = np.char.decode(columns["image"][frame])
    return _damage(root, path, columns["labels"][frame].decode(), images)


def _check_beside(root, version):
    def named(table):
        path = root / version / f"{table}.json"
        if not path.is_file():
            return []
        return [record["filename"] for record in json.loads(path.read_bytes())]

    check_files(root, named("map"),
                "they are in the archive of the metadata: extract all of it, maps/ too")
    for table, archive, ending in (("lidarseg", "nuScenes-lidarseg", ".bin"),
                                   ("panoptic", "nuScenes-panoptic", ".npz")):
        files = named(table)
        check_files(root, files, f"extract {archive} into this folder, all of it")
        there = sum(file.suffix == ending for file in (root / table / version).glob("*"))
        if files and there > len(files):
            raise InputError(f"--data {root}: {there} files in {table}/{version}, but {table}.json "
                             f"names {len(files)}; remove those that are not of this version")


def _damage(root, scan, labels, images):
    """What is wrong with a frame's files: one empty, a scan cut short, labels missing; else ""."""
    for path in (scan, *images):
        if size_of(root, path) == 0:
            return f"{path} is empty; extract it again"
    size = size_of(root, scan)
    if size % 20 == 0 and (not labels or size_of(root, labels) * 20 == size):
        return ""

    # readers.files needs torch, and only a damaged frame needs readers.files
    from plumbing.files import looks_like
    from readers.files import other_layout, way_out, wider_labels
    content = Path(root, scan).read_bytes()
    guess = looks_like(content) or other_layout(content)
    if labels and not guess:
        guess = wider_labels(size_of(root, labels), size / 20)
    wrong = f"{scan} has {size} bytes, not 20 a point"
    if labels:
        wrong += f" with one label each in {labels}"
    return f"{wrong}; {way_out(guess)}"


# ---- conditions --------------------------------------------------------------------------------

def condition_of(description):
    """Condition of a scene, an index into CONDITIONS, from the words of its description.

    It is night if a word begins with "night", else rain if a word begins with "rain", else clear.
    md4all's published rule for nuScenes looks for night and rain anywhere, and finds rain in
    "train" and "terrain" too.
    """
    def says(what):
        return re.search(rf"(?<![^\W\d_]){what}", description.lower())  # no letter before it

    if says("night"):
        return CONDITIONS.index("night")
    return CONDITIONS.index("day-rain" if says("rain") else "day-clear")


def published_condition_of(description):
    """Condition of a scene by md4all's rule: see `condition_of`."""
    text = description.lower()
    if "night" in text:
        return CONDITIONS.index("night")
    return CONDITIONS.index("day-rain" if "rain" in text else "day-clear")


# ---- nuScenes' tables --------------------------------------------------------------------------

def table(root, version=VERSION):
    """The keyframes of a version: the columns that readers/table.py lists."""
    with damage_named(root, version):
        _check_beside(root, version)
        columns = _read_frames(str(root), version)
        frames, cameras = columns["image"].shape
        shapes = {"image_size": (2,), "cam_from_lidar": (4, 4), "intrinsics": (3, 3)}
        for name, shape in shapes.items():
            values = columns[name]
            if values.shape != (frames, cameras, *shape) or values.dtype.kind not in "iuf":
                numbers = " x ".join(map(str, shape))
                raise ValueError(f"{name} of some image is not {numbers} numbers")
        for name in ("scan", "labels", "image"):
            check_files(root, [path.decode() for path in columns[name].flat if path])
    return columns


def _read_frames(root, version):
    """The columns of `table`, through nuscenes-devkit."""
    from nuscenes.nuscenes import NuScenes
    nusc = NuScenes(version, root, verbose=False)
    split_of = _splits(version)
    lidarseg = getattr(nusc, "lidarseg", [])
    labels = {record["sample_data_token"]: record["filename"] for record in lidarseg}
    channels = {sensor["channel"] for sensor in nusc.sensor if sensor["modality"] == "camera"}
    cameras = [channel for channel in CAMERAS if channel in channels]

    # What the tables say of each frame
    frames = {name: [] for name in ("scene", "split", "condition", "scan", "labels", "image",
                                    "image_size", "cam_from_lidar", "intrinsics", "record")}
    notes = []
    for scene in nusc.scene:
        condition = condition_of(scene["description"])
        published = published_condition_of(scene["description"])
        if condition != published:
            words = " ".join(scene["description"].split())
            notes.append(f"  {scene['name']}, \"{words}\": {CONDITIONS[condition]} here, "
                         f"{CONDITIONS[published]} by md4all's rule, which looks inside of "
                         "words")
        token = scene["first_sample_token"]
        while token:
            sample = nusc.get("sample", token)
            token = sample["next"]
            lidar, views, mounts, egos = _records(nusc, sample, cameras)
            said = _said(scene, condition, (lidar, *views), mounts, egos)
            frames["record"].append(digest([said]))
            frames["scene"].append(scene["name"])
            frames["split"].append(split_of.get(scene["name"], "other"))
            frames["condition"].append(condition)
            frames["scan"].append(lidar["filename"])
            frames["labels"].append(labels.get(lidar["token"], ""))
            frames["image"].append([view["filename"] for view in views])
            frames["image_size"].append([(view["height"], view["width"]) for view in views])
            frames["intrinsics"].append([mount["camera_intrinsic"] for mount in mounts[1:]])
            frames["cam_from_lidar"].append(_cam_from_lidar(mounts, egos))

    columns = {}
    for name, values in frames.items():
        columns[name] = as_bytes(values) if name in STRINGS else np.array(values)
    if labels:
        label_map.cache_clear()  # the table of categories may have changed since
        columns["label_map"] = label_map(Path(root), version)
    return columns | {"cameras": as_bytes(cameras), "notes": as_bytes(notes)}


def _splits(version):
    """{name of a scene: its split}, as nuScenes publishes them."""
    from nuscenes.utils.splits import create_splits_scenes
    scenes = create_splits_scenes()
    prefix = "mini_" if version == "v1.0-mini" else ""
    split_of = {}
    for split in ("train", "val", "test"):
        split_of |= dict.fromkeys(scenes.get(prefix + split, ()), split)
    return split_of


def _records(nusc, sample, cameras):
    """A frame's records: the scan's; the images'; each one's calibrated sensor; its ego pose."""
    lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    views = [nusc.get("sample_data", sample["data"][camera]) for camera in cameras]
    mounts, egos = [], []
    for record in (lidar, *views):
        mounts.append(nusc.get("calibrated_sensor", record["calibrated_sensor_token"]))
        egos.append(nusc.get("ego_pose", record["ego_pose_token"]))
    return lidar, views, mounts, egos


def _said(scene, condition, files, mounts, egos):
    """All that the tables say of a frame, as bytes; of this its `record` is the hash."""
    said = [scene["name"], condition]
    for record in files:
        said += [record["filename"], record["height"], record["width"]]
    for record in (*mounts, *egos):
        said += [record["translation"], record["rotation"]]
    said += [mount["camera_intrinsic"] for mount in mounts]
    return repr(said).encode("utf-8", "backslashreplace")


def _cam_from_lidar(mounts, egos):
    """For each camera [4, 4]: lidar -> ego -> global -> ego at the image's time -> camera."""
    lidar_to_global = _pose(egos[0]) @ _pose(mounts[0])
    return [_pose(mount, inverse=True) @ _pose(ego, inverse=True) @ lidar_to_global
            for mount, ego in zip(mounts[1:], egos[1:])]


def _pose(record, inverse=False):
    """A record's pose, float64 [4, 4]. NaN where its rotation is none; the devkit would go on."""
    from nuscenes.utils.geometry_utils import transform_matrix
    from pyquaternion import Quaternion
    translation = record["translation"]
    rotation = record["rotation"]
    if len(translation) != 3 or len(rotation) != 4:
        raise ValueError(f"pose {record['token']} has a translation of {len(translation)} numbers "
                         f"and a rotation of {len(rotation)}")
    if not abs(np.linalg.norm(rotation) - 1) < 1e-3:
        return np.full((4, 4), np.nan)
    return transform_matrix(translation, Quaternion(rotation), inverse)


if __name__ == "__main__":
    main("nuscenes")

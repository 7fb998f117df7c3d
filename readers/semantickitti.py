"""SemanticKITTI: scans of 64 beams, labels of points, the left colour camera.

    python -m readers.semantickitti --data /data/kitti      # are all files whole? The counts

Behley et al., ICCV 2019, on the scans and pictures of KITTI's odometry benchmark (Geiger et al.,
CVPR 2012). A sequence SS has velodyne/, labels/ (00 to 10), image_2/ and calib.txt. The last two
are read here, the others by readers/kitti.py. What the names of this file mean is said in
readers/table.py.
"""
import numpy as np

from plumbing.errors import InputError
from readers import kitti
from readers.paths import size_in_header, size_of
from readers.table import as_bytes, main

# The raw labels of each class (semantic-kitti.yaml, learning_map), from 252 on of what moves
FINE = {
    "ignore": (0, 1, 52, 99), "car": (10, 252), "bicycle": (11,), "motorcycle": (15,),
    "truck": (18, 258), "other-vehicle": (13, 16, 20, 256, 257, 259), "person": (30, 254),
    "bicyclist": (31, 253), "motorcyclist": (32, 255), "road": (40, 60), "parking": (44,),
    "sidewalk": (48,), "other-ground": (49,), "building": (50,), "fence": (51,),
    "vegetation": (70,), "trunk": (71,), "terrain": (72,), "pole": (80,), "traffic-sign": (81,)}
CLASSES = tuple(FINE)
CLASS_TABLE = kitti.class_table(FINE)
SAMPLING = {  # ScaLR, supplement B.2, and its configuration; see readers/nuscenes.py
    "fov": (64.0, 64.0, 8.0), "cell": 0.5, "voxel": 0.1, "max_points": 20000, "neighbors": 16,
    "intensity": (0.28613698, 0.14090556)}
SPLIT_OF = dict.fromkeys((f"{number:02}" for number in range(11)), "train")
SPLIT_OF["08"] = "val"
SPLIT_OF |= dict.fromkeys((f"{number:02}" for number in range(11, 22)), "test")
SHARE = "frames"  # 1 % is every 100th training scan, as in SLidR and ScaLR
PAPER_FRAMES = {"train": 19130}
ARCHIVES = ("data_odometry_velodyne.zip and data_odometry_labels.zip (and, for stages 1 and 2, "
            "data_odometry_color.zip and data_odometry_calib.zip)")
NO_PICTURES = "  no image_2 in any sequence: for --task seg3d and evaluation, not for the stages"


# ---- files ---------------------------------------------------------------------------------------

def scan(path):
    """[A, 4]: x, y, z [m], remission 0..1."""
    return kitti.read_scan(path, brightest=1)


def labels(path, count=None):
    """Classes [A] of the `count` points of a scan, indices into CLASSES."""
    return kitti.read_labels(path, CLASS_TABLE, count)


def home(root):
    """The folder of the sequences."""
    return kitti.sequences_folder(root, ARCHIVES)


def sources(root):
    """The folders whose listings are the table, and the calibrations."""
    folders = kitti.folders_of(root, SPLIT_OF, ("velodyne", "labels", "image_2"))
    files = [file for sequence in SPLIT_OF for file in calibration_files(root, sequence)]
    return folders + [file for file in files if file.is_file()]


def damage(root, columns, frame):
    """What is wrong with a frame: an empty file, one cut short, lengths that differ, no picture."""
    if "image" in columns:
        path = columns["image"][frame, 0].decode()
        if size_of(root, path) == 0:
            return f"{path} is empty; extract it again"
        if not columns["image_size"][frame].all():
            return f"{path} is no picture; extract it again, and touch its folder"
    return kitti.damage(root, columns, frame, scan, labels)


# ---- camera --------------------------------------------------------------------------------------

def calibration_files(root, sequence):
    """Where a sequence's calibration may be: beside its scans, or in ScaLR's tree of them."""
    beside = root / sequence / "calib.txt"
    apart = root.parent.parent / "calib/dataset/sequences" / sequence / "calib.txt"
    return beside, apart


def calibration(root, sequence):
    """cam_from_lidar [4, 4] and intrinsics [3, 3] of image_2. InputError where there is none.

    A pixel is P2 . Tr . point. P2 [3, 4] projects what is in the frame of camera 0, and its fourth
    column is the offset of camera 2. With K = P2[:, :3] it is K . (point + K^-1 . P2[:, 3]), so
    that this offset becomes a part of the transform.
    """
    from plumbing.files import read_bytes
    places = calibration_files(root, sequence)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise InputError(f"--data {root}: no calibration of sequence {sequence}: looked for "
                         f"{' and '.join(map(str, places))}; extract data_odometry_calib.zip, or "
                         "take all folders image_2 away (seg3d needs no pictures)")
    # Lines of a name and its numbers
    rows = {}
    for line in read_bytes(file).decode("latin-1").splitlines():
        name, _, numbers = line.partition(":")
        rows[name.strip()] = numbers.split()
    if "Tr_velo_to_cam" in rows or "R0_rect" in rows:
        raise InputError(f"{file}: of KITTI detection (Tr_velo_to_cam, R0_rect); extract "
                         "data_odometry_calib.zip, whose calib.txt has P2 and Tr")
    projection = _matrix(file, rows, "P2")
    cam0_from_lidar = np.vstack([_matrix(file, rows, "Tr"), [0, 0, 0, 1]])
    rotation = cam0_from_lidar[:3, :3]
    intrinsics = projection[:, :3]
    # What no camera on a car has
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
        raise InputError(f"{file}: Tr does not begin with a rotation; extract it again")
    if np.linalg.matrix_rank(intrinsics) < 3:
        raise InputError(f"{file}: P2 is no camera's (of rank below 3); extract it again")
    # Camera 2 beside camera 0
    offset = np.eye(4)
    offset[:3, 3] = np.linalg.solve(intrinsics, projection[:, 3])
    return offset @ cam0_from_lidar, intrinsics


def _matrix(file, rows, name):
    """A line of a calibration as [3, 4]. Raises InputError if it is missing or damaged."""
    try:
        numbers = np.array(rows.get(name, ()), float)
    except ValueError:
        numbers = np.full(12, np.nan)
    if len(numbers) != 12 or not np.isfinite(numbers).all():
        there = ", ".join(name for name in rows if name) or "nothing"
        raise InputError(f"{file}: no line {name}: with 12 numbers (there is {there}); extract "
                         "data_odometry_calib.zip")
    return numbers.reshape(3, 4)


# ---- the table -----------------------------------------------------------------------------------

def table(root):
    """All scans of the sequences 00 to 21 that are here: the columns that readers/table.py lists.

    Where no sequence has pictures, the camera's columns are left out and no calibration is needed.
    Raises InputError where some have, and others lack pictures or calibration.
    """
    frames = kitti.frames_of(root, SPLIT_OF)
    columns = kitti.frame_columns(root, frames, SPLIT_OF)
    pictures = set()
    for sequence in SPLIT_OF:
        names = kitti.names_in(root / sequence / "image_2", ".png")
        pictures.update((sequence, name) for name in names)
    if not pictures:
        return columns | {"notes": as_bytes([NO_PICTURES])}

    # All scans have one, or none has
    missing = [frame for frame in frames if frame not in pictures]
    if missing:
        sequence, name = missing[0]
        raise InputError(f"--data {root}: {len(missing)} of {len(frames)} scans have no picture, "
                         f"the first is {sequence}/image_2/{name}.png; extract "
                         "data_odometry_color.zip again, or take sequences without pictures away")
    views = {sequence: calibration(root, sequence) for sequence in sorted({s for s, _ in frames})}
    images = [f"{sequence}/image_2/{name}.png" for sequence, name in frames]
    sizes = [size_in_header(root / image) for image in images]
    return columns | {
        "cameras": as_bytes(["image_2"]), "image": as_bytes(images)[:, None],
        "image_size": np.array(sizes)[:, None],                                      # [F, 1, 2]
        "cam_from_lidar": np.array([views[sequence][0] for sequence, _ in frames])[:, None],
        "intrinsics": np.array([views[sequence][1] for sequence, _ in frames])[:, None]}


if __name__ == "__main__":
    main("semantickitti")

"""A driving frame: an index of nuScenes, LiDAR-to-pixel projection, the 3D encoder's inputs, ragged batches.

    python data.py --data /data/nuscenes        # build the index once, check every file, print the counts

Everything here is NumPy on the CPU, one frame and one camera at a time; `collate` makes the batch of tensors.
Pixels are (row, col) of the *resized* image and may be fractional; distances are metres; clouds are points-first.
"""
import argparse
import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.spatial import cKDTree

from errors import InputError, one_line_errors

DEPTHS = (0.1, 80.0)  # metres that depth estimation is trained on and judged by; md4all's protocol
FORMAT = 2  # of the index cache: count up when what is stored changes
CONDITIONS = ("day-clear", "day-rain", "night")
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
CLASSES = ("ignore", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian", "traffic_cone",
           "trailer", "truck", "driveable_surface", "other_flat", "sidewalk", "terrain", "manmade", "vegetation")

# How a LiDAR scan becomes the 3D encoder's input (ScaLR, supplement B.2, and its released configuration): half extents
# along x, y, z [m]; side of the planes' cells [m]; side of the voxels of which one point is kept [m]; how many points at
# most, the ones nearest to a random one; neighbours of a point; mean and standard deviation of intensity on nuScenes.
CLOUD = {"fov": (64.0, 64.0, 8.0), "cell": 0.5, "voxel": 0.1, "max_points": 20000, "neighbors": 16,
         "intensity": (18.742355, 22.04632)}


# ---- index ----

@dataclasses.dataclass
class Index:
    """F frames (keyframes) of C cameras of one nuScenes version. Strings are bytes arrays; paths are relative to root."""
    root: str
    cameras: list            # C channel names
    scene: np.ndarray        # [F]
    split: np.ndarray        # [F] b"train", b"val", b"test"
    condition: np.ndarray    # [F] index into CONDITIONS
    lidar: np.ndarray        # [F] path
    lidarseg: np.ndarray     # [F] path, b"" where there are no labels
    image: np.ndarray        # [F, C] path
    image_size: np.ndarray   # [F, C, 2] height, width
    cam_from_lidar: np.ndarray   # [F, C, 4, 4] float64: lidar -> ego -> global -> ego at the image's time -> camera
    intrinsics: np.ndarray   # [F, C, 3, 3]
    coarse: np.ndarray       # [256] lidarseg's fine label -> index into CLASSES

    def select(self, split, conditions=CONDITIONS, limit=None):
        """Frame numbers of a split under these conditions, at most `limit`, spread evenly over the scenes' order."""
        wanted = np.isin(self.condition, [CONDITIONS.index(c) for c in conditions])
        rows = np.flatnonzero((self.split == split.encode()) & wanted)
        if limit is not None and limit < len(rows):
            rows = rows[np.linspace(0, len(rows) - 1, limit).round().astype(int)]
        if len(rows) == 0:
            raise InputError(f"--data {self.root}: no frame of split '{split}' under {', '.join(conditions)}; "
                             f"`python data.py --data {self.root}` prints what is there")
        return rows

    def summary(self):
        """The counts per split and condition as a printable table."""
        lidarseg = "yes" if (self.lidarseg != b"").all() else "no" if (self.lidarseg == b"").all() else "in part"
        lines = [f"{self.root}: {len(self.scene)} frames, {len(self.cameras)} cameras, lidarseg: {lidarseg}",
                 f"  {'split':6} {'condition':10} scenes  frames  images"]
        for split in np.unique(self.split):
            for number, name in enumerate(CONDITIONS):
                rows = (self.split == split) & (self.condition == number)
                if rows.any():
                    lines.append(f"  {split.decode():6} {name:10} {len(np.unique(self.scene[rows])):6}  "
                                 f"{rows.sum():6}  {rows.sum() * len(self.cameras):6}")
        return "\n".join(lines)


def condition_of(description):
    """Condition of a nuScenes scene from its description, as md4all reads it: night, else rain, else clear."""
    text = description.lower()
    return CONDITIONS.index("night" if "night" in text else "day-rain" if "rain" in text else "day-clear")


def load_index(root, version="v1.0-trainval", here=False):
    """The `Index` of a nuScenes root, from the cache if the tables have not changed since it was written.

    It is built by this file run as a script unless `here`, so that a training process never holds the devkit's tables.
    Raises InputError for a wrong root or version and for files that the tables name but that are not there.
    """
    root = Path(root).resolve()
    tables = root / version
    if not (tables / "sample_data.json").is_file():
        there = sorted(p.name for p in root.glob("v1.0-*") if p.is_dir())
        raise InputError(f"--data {root}: " + (
            f"no --version {version}; there is {', '.join(there)}" if there else
            "not a nuScenes root (no folder v1.0-*); download nuScenes, or make the miniature world with demo.py"))
    state = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(tables.glob("*.json"))]
    key = hashlib.sha256(repr((FORMAT, str(root), version, state)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "collaborative-distillation", f"{key}.npz")
    if not cache.is_file() and here:
        fields = _read_tables(str(root), version)
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez_compressed(partial, **fields)
        partial.replace(cache)
    elif not cache.is_file():
        done = subprocess.run([sys.executable, __file__, "--data", str(root), "--version", version], capture_output=True,
                              text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["killed, perhaps for memory"])[-1]
            raise InputError(reason.partition("error: ")[2] or f"--data {root}: reading the tables failed: {reason}")
    with np.load(cache, allow_pickle=False) as stored:
        fields = {name: stored[name] for name in stored.files}
    return Index(root=str(root), cameras=[c.decode() for c in fields.pop("cameras")], **fields)


def _read_tables(root, version):
    """The fields of `Index` from the dataset's own tables, through nuscenes-devkit."""
    from nuscenes.eval.lidarseg.utils import LidarsegClassMapper
    from nuscenes.nuscenes import NuScenes
    from nuscenes.utils.geometry_utils import transform_matrix
    from nuscenes.utils.splits import create_splits_scenes
    from pyquaternion import Quaternion

    def pose(record, inverse=False):
        return transform_matrix(record["translation"], Quaternion(record["rotation"]), inverse)

    try:
        nusc = NuScenes(version, root, verbose=False)
    except (AssertionError, KeyError, ValueError, OSError) as error:
        raise InputError(f"--data {root}: nuscenes-devkit cannot open {version}: {error}; extract it again") from None
    prefix = "mini_" if version == "v1.0-mini" else ""
    splits = create_splits_scenes()
    split_of = {scene: name for name in ("train", "val", "test") for scene in splits.get(prefix + name, ())}
    labels = {record["sample_data_token"]: record["filename"] for record in getattr(nusc, "lidarseg", [])}
    channels = {s["channel"] for s in nusc.sensor if s["modality"] == "camera"}
    cameras = [c for c in CAMERAS if c in channels]

    frames = {name: [] for name in
              "scene split condition lidar lidarseg image image_size cam_from_lidar intrinsics".split()}
    for scene in sorted(nusc.scene, key=lambda s: s["name"]):
        token = scene["first_sample_token"]
        while token:
            sample = nusc.get("sample", token)
            token = sample["next"]
            lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
            lidar_to_global = (pose(nusc.get("ego_pose", lidar["ego_pose_token"]))
                               @ pose(nusc.get("calibrated_sensor", lidar["calibrated_sensor_token"])))
            views = [nusc.get("sample_data", sample["data"][camera]) for camera in cameras]
            mounts = [nusc.get("calibrated_sensor", view["calibrated_sensor_token"]) for view in views]
            frames["scene"].append(scene["name"])
            frames["split"].append(split_of.get(scene["name"], "other"))
            frames["condition"].append(condition_of(scene["description"]))
            frames["lidar"].append(lidar["filename"])
            frames["lidarseg"].append(labels.get(lidar["token"], ""))
            frames["image"].append([view["filename"] for view in views])
            frames["image_size"].append([(view["height"], view["width"]) for view in views])
            frames["intrinsics"].append([mount["camera_intrinsic"] for mount in mounts])
            frames["cam_from_lidar"].append([
                pose(mount, inverse=True) @ pose(nusc.get("ego_pose", view["ego_pose_token"]), inverse=True)
                @ lidar_to_global for view, mount in zip(views, mounts)])
    coarse = np.zeros(256, np.uint8)
    if labels:
        for fine, index in LidarsegClassMapper(nusc).fine_idx_2_coarse_idx_mapping.items():
            coarse[fine] = index
    _check_files(root, frames)
    strings = {"scene", "split", "lidar", "lidarseg", "image"}
    fields = {name: np.array(rows, dtype=np.bytes_ if name in strings else None) for name, rows in frames.items()}
    return fields | {"coarse": coarse, "cameras": np.array(cameras, dtype=np.bytes_)}


def _check_files(root, frames):
    """Raise InputError for the first file that the tables name and that is missing or cut short."""
    def size(path):
        return os.path.getsize(file) if os.path.isfile(file := os.path.join(root, path)) else 0
    paths = frames["lidar"] + [p for p in frames["lidarseg"] if p] + [p for views in frames["image"] for p in views]
    if bad := [path for path in paths if size(path) == 0]:
        raise InputError(f"--data {root}: {len(bad)} of {len(paths)} files that the tables name are missing or empty, "
                         f"the first is {bad[0]}; extract all archives of this version into this folder")
    for scan, labels in zip(frames["lidar"], frames["lidarseg"]):
        if size(scan) % 20 or (labels and size(labels) * 20 != size(scan)):
            raise InputError(f"--data {root}: {scan} has {size(scan)} bytes, not 20 a point"
                             + (f" with one label each in {labels}" if labels else "") + "; extract it again")


# ---- one frame ----

def read_scan(path):
    """A nuScenes scan `[N, 4]`: x, y, z [m], intensity 0..255."""
    content = _read(path)
    if len(content) == 0 or len(content) % 20:
        raise InputError(f"{path}: cut short: {len(content)} bytes are not whole points of 5 floats; extract it again")
    return np.frombuffer(content, np.float32).reshape(-1, 5)[:, :4]


def read_labels(path, coarse, count):
    """Classes `[count]` (index into CLASSES, 0 ignored) of a lidarseg file."""
    fine = np.frombuffer(_read(path), np.uint8)
    if len(fine) != count:
        raise InputError(f"{path}: {len(fine)} labels for {count} points; extract it again")
    return coarse[fine]


def _read(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; extract the dataset again") from None


def read_image(path, size):
    """The image resized to `size` = (H, W), bilinear with antialiasing: uint8 `[3, H, W]`."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)  # PIL's is antialiased
    except OSError as error:
        raise InputError(f"{path}: not a readable image ({error}); extract it again".replace("\n", " ")) from None
    return np.array(image).transpose(2, 0, 1)


def project(xyz, cam_from_lidar, intrinsics, size, min_depth=1.0):
    """The points that a camera sees.

    Args: xyz [N, 3] in the LiDAR's frame, cam_from_lidar [4, 4], intrinsics [3, 3], size = (H, W) of the raw image.
    Returns: visible [M] int, pixels [M, 2] (row, col) in the raw image, depths [M] in metres. A point is visible if it
    is more than min_depth away and 0 < row < H-1, 0 < col < W-1 (nuscenes-devkit's rule, whose margin is 1).
    """
    camera = xyz @ cam_from_lidar[:3, :3].T + cam_from_lidar[:3, 3]  # [N, 3]
    visible = np.flatnonzero(camera[:, 2] > min_depth)
    camera = camera[visible] @ intrinsics.T
    pixels = camera[:, 1::-1] / camera[:, 2:]  # [M, 2] row, col
    inside = ((pixels > 0) & (pixels < np.asarray(size) - 1)).all(1)
    return visible[inside], pixels[inside], camera[inside, 2]


def rotate_and_flip(xyz, rng):
    """ScaLR's augmentation (Sec. 4.2): a rotation about z by U(-pi, pi), with probability 2/3 a flip of one of x, y."""
    angle = rng.uniform(-np.pi, np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    flip = rng.integers(3)
    if flip < 2:
        matrix[:, flip] *= -1
    return (xyz @ matrix).astype(xyz.dtype)


def inside_fov(xyz, fov):
    """Mask of the points inside the open box of half extents `fov`, with 1e-4 m to spare."""
    return (np.abs(xyz) < np.asarray(fov) - 1e-4).all(1)


def one_per_voxel(xyz, voxel, rng=None):
    """Numbers of the points kept, one per occupied voxel: a random one, or the first where rng is None."""
    order = np.arange(len(xyz)) if rng is None else rng.permutation(len(xyz))
    key = np.floor(xyz[order] / voxel).astype(np.int64) + 2**20  # three numbers of 21 bits, so sorting is 1-D
    _, first = np.unique((key[:, 0] << 42) | (key[:, 1] << 21) | key[:, 2], return_index=True)
    return np.sort(order[first])


def nearest_to(xyz, center, count):
    """Numbers of the `count` points nearest to `center` [3], in their own order."""
    return np.sort(np.argpartition(((xyz - center) ** 2).sum(1), count - 1)[:count])


def plane_sizes(fov, cell):
    """Cells (H, W) of the planes z, y, x: x-y, x-z and y-z of the box of half extents `fov`."""
    x, y, z = (round(2 * side / cell) for side in fov)
    return (x, y), (x, z), (y, z)


def plane_cells(xyz, fov, cell):
    """Flat cell numbers row * W + col of points [N, 3] on the planes z, y, x: int64 [3, N]."""
    x, y, z = np.floor((xyz + np.asarray(fov)) / cell).astype(np.int64).T
    (_, width_xy), (_, width_z), _ = plane_sizes(fov, cell)
    return np.stack([x * width_xy + y, x * width_z + z, y * width_z + z])


def nearest_neighbors(xyz, count):
    """The `count` nearest other points of each point: int64 [N, count]. Small clouds repeat the ones that they have."""
    available = min(count, len(xyz) - 1)
    if available < 1:
        return np.zeros((len(xyz), count), np.int64)
    found = cKDTree(xyz).query(xyz, k=available + 1)[1]  # [N, 1 + available]
    itself = found == np.arange(len(xyz))[:, None]
    itself[~itself.any(1), -1] = True  # where many points coincide it need not be among its nearest
    found = found[~itself].reshape(len(xyz), available)
    return found[:, np.arange(count) % available].astype(np.int64)


def point_features(xyz, intensity, mean, std):
    """[N, 5]: standardised intensity, x, y, z, radius (ScaLR, supplement B.2)."""
    return np.column_stack([(intensity - mean) / std, xyz, np.linalg.norm(xyz, axis=1)]).astype(np.float32)


def nearest_per_pixel(pixels, depths):
    """Numbers of the points that remain when of all points on one (whole) pixel only the nearest is kept."""
    order = np.argsort(depths, kind="stable")
    first = np.unique(np.floor(pixels[order]).astype(np.int64), axis=0, return_index=True)[1]
    return np.sort(order[first])


class Frames(torch.utils.data.Dataset):
    """Camera views of the frames `rows` of an `Index`; `frames[epoch, number]` is one view.

    Args:
        cameras: "random" (one of a frame's, drawn anew each epoch), "all" (an item for each), or a channel name.
        image_size: (H, W) that images are resized to. None: no image.
        cloud: as `CLOUD`, for the 3D encoder's inputs; None: all visible points, no inputs of the 3D encoder.
        training: a random point of each voxel; False: the first. augment: rotate and flip the cloud.
        labels: read lidarseg. max_depth: keep the nearest point of each pixel, up to this depth [m].

    An item is a dict: condition (index into CONDITIONS); image uint8 [3, H, W]; pixels [N, 2] (row, col) in the resized
    image; depths [N] metres; labels [N]; with a cloud also feats [N, 5], cells [3, N], neighbors [N, K].
    All randomness of an item is a function of (seed, epoch, number), whatever the process or batch that it falls into.
    """

    def __init__(self, index, rows, cameras="all", image_size=None, cloud=None, training=False, augment=False,
                 labels=False, max_depth=None, seed=0):
        if cameras not in ("random", "all", *index.cameras):
            raise InputError(f"--cameras {cameras}: choose random, all, or one of {', '.join(index.cameras)}")
        if labels and (unlabelled := np.count_nonzero(index.lidarseg[rows] == b"")):
            raise InputError(f"--data {index.root}: {unlabelled} of {len(rows)} frames have no lidarseg labels; extract it")
        self.index, self.rows, self.cameras, self.image_size, self.cloud = index, rows, cameras, image_size, cloud
        self.training, self.augment, self.labels, self.max_depth, self.seed = training, augment, labels, max_depth, seed

    def __len__(self):
        return len(self.rows) * (len(self.index.cameras) if self.cameras == "all" else 1)

    def __getitem__(self, key):
        epoch, number = key
        rng = np.random.default_rng((self.seed, epoch, number))
        index, count = self.index, len(self.index.cameras)
        if self.cameras == "all":
            number, camera = divmod(number, count)
        else:
            camera = rng.integers(count) if self.cameras == "random" else index.cameras.index(self.cameras)
        row = self.rows[number]

        def path(name):
            return os.path.join(index.root, name.decode())

        # points that this camera sees
        scan = read_scan(path(index.lidar[row]))  # [N, 4]
        raw_size = index.image_size[row, camera]
        keep, pixels, depths = project(scan[:, :3], index.cam_from_lidar[row, camera], index.intrinsics[row, camera],
                                       raw_size)
        item = {"condition": int(index.condition[row])}
        if self.image_size is not None:
            pixels = pixels * (np.asarray(self.image_size) / raw_size)
            item["image"] = torch.from_numpy(read_image(path(index.image[row, camera]), self.image_size))
        arrays = {"pixels": pixels.astype(np.float32), "depths": depths.astype(np.float32)}
        if self.labels:
            arrays["labels"] = read_labels(path(index.lidarseg[row]), index.coarse, len(scan))[keep].astype(np.int64)
        if self.max_depth is not None:
            first = nearest_per_pixel(pixels, depths)
            first = first[depths[first] <= self.max_depth]
            arrays, keep = {name: values[first] for name, values in arrays.items()}, keep[first]

        # the 3D encoder's inputs
        if options := self.cloud:
            xyz = rotate_and_flip(scan[keep, :3], rng) if self.augment else scan[keep, :3]
            chosen = np.flatnonzero(inside_fov(xyz, options["fov"]))
            chosen = chosen[one_per_voxel(xyz[chosen], options["voxel"], rng if self.training else None)]
            if len(chosen) > options["max_points"]:
                center = xyz[chosen[rng.integers(len(chosen))]]
                chosen = chosen[nearest_to(xyz[chosen], center, options["max_points"])]
            xyz, intensity = xyz[chosen], scan[keep[chosen], 3]
            arrays = {name: values[chosen] for name, values in arrays.items()}
            arrays["feats"] = point_features(xyz, intensity, *options["intensity"])
            arrays["cells"] = plane_cells(xyz, options["fov"], options["cell"])
            arrays["neighbors"] = nearest_neighbors(xyz, options["neighbors"])
        return item | {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}


def collate(items):
    """A ragged batch: points of all items one after the other, `batch` [N] the item of each, neighbors as batch rows."""
    counts = torch.tensor([len(item["pixels"]) for item in items])
    offsets = counts.cumsum(0) - counts
    out = {name: [item[name] for item in items] for name in items[0]}
    for name, values in out.items():
        if name == "neighbors":
            values = [rows + start for rows, start in zip(values, offsets.tolist())]
        join = {"condition": torch.tensor, "image": torch.stack, "cells": lambda cells: torch.cat(cells, dim=1)}
        out[name] = join.get(name, torch.cat)(values)
    return out | {"batch": torch.repeat_interleave(torch.arange(len(items)), counts)}


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="nuScenes root: the folder with samples/ and v1.0-*/")
    parser.add_argument("--version", default="v1.0-trainval", help="version folder (default: %(default)s)")
    args = parser.parse_args()
    print(load_index(args.data, args.version, here=True).summary())


if __name__ == "__main__":
    main()

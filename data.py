"""A driving frame: LiDAR-to-pixel projection, the 3D encoder's inputs, augmentation, ragged batches.

Everything here is NumPy on the CPU, one frame and one camera at a time; `collate` makes the batch of tensors.
Pixels are (row, col) of the *resized* image and may be fractional; distances are metres; clouds are points-first.
"""
import os

import numpy as np
import torch
from scipy.spatial import cKDTree

from errors import InputError
from readers.files import read_image, read_labels, read_scan

DEPTHS = (0.1, 80.0)  # metres that depth estimation is trained on and judged by; md4all's protocol

# How a LiDAR scan becomes the 3D encoder's input (ScaLR, supplement B.2, and its released configuration): half extents
# along x, y, z [m]; side of the planes' cells [m]; side of the voxels of which one point is kept [m]; how many points at
# most, the ones nearest to a random one; neighbours of a point; mean and standard deviation of intensity on nuScenes.
CLOUD = {"fov": (64.0, 64.0, 8.0), "cell": 0.5, "voxel": 0.1, "max_points": 20000, "neighbors": 16,
         "intensity": (18.742355, 22.04632)}


# ---- one frame ----

def project(xyz, cam_from_lidar, intrinsics, size, min_depth=1.0):
    """The points that a camera sees.

    Args: xyz [N, 3] in the LiDAR's frame, cam_from_lidar [4, 4], intrinsics [3, 3], size = (H, W) of the raw image.
    Returns: visible [M] int, pixels [M, 2] (row, col) in the raw image, depths [M] in metres. A point is visible if it
    is more than min_depth away and 0 < row < H-1, 0 < col < W-1 (nuscenes-devkit's rule, whose margin is 1).
    """
    camera = cam_from_lidar[:3, :3] @ xyz.T + cam_from_lidar[:3, 3:]      # [3, N]
    ahead = np.flatnonzero(camera[2] > min_depth)
    col, row, depth = intrinsics @ camera[:, ahead]
    row, col = row / depth, col / depth
    inside = (row > 0) & (row < size[0] - 1) & (col > 0) & (col < size[1] - 1)
    return ahead[inside], np.column_stack([row[inside], col[inside]]), depth[inside]


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
    ranks = [1, *(np.arange(count) % available + 2)]
    found = cKDTree(xyz).query(xyz, k=ranks)[1]  # [N, 1 + count]
    first, others, itself = found[:, :1], found[:, 1:], np.arange(len(xyz))[:, None]
    return np.where(others == itself, first, others)  # where the first is another point, it is at the same place


def point_features(xyz, intensity, mean, std):
    """[N, 5]: standardised intensity, x, y, z, radius (ScaLR, supplement B.2)."""
    return np.column_stack([(intensity - mean) / std, xyz, np.linalg.norm(xyz, axis=1)]).astype(np.float32)


def nearest_per_pixel(pixels, depths):
    """Numbers of the points that remain when of all points on one (whole) pixel only the nearest is kept."""
    order = np.argsort(depths, kind="stable")
    first = np.unique(np.floor(pixels[order]).astype(np.int64), axis=0, return_index=True)[1]
    return np.sort(order[first])


class Frames(torch.utils.data.Dataset):
    """Views of the frames `rows` of an `Index`; `frames[epoch, number]` is one view.

    Args:
        cameras: "random" (one of a frame's, drawn anew each epoch), "all" (an item for each), a channel name, or "scan": the
            whole LiDAR scan, without image and pixels.
        image_size: (H, W) that images are resized to. None: no image.
        cloud: as `CLOUD`, for the 3D encoder's inputs; None: all visible points, no inputs of the 3D encoder.
        training: a random point of each voxel; False: the first. augment: rotate and flip the cloud.
        labels: read lidarseg. max_depth: keep the nearest point of each pixel, up to this depth [m].
        skip_bad: take the next frame in the place of one that cannot be read; the item's `bad` has its number and why.
        every_point: with "scan", labels of all points, and `nearest` of those that the 3D encoder gets; no limit on them.

    An item is a dict: condition (index into CONDITIONS); image uint8 [3, H, W]; pixels [N, 2] (row, col) in the resized
    image; depths [N] metres; labels [N]; with a cloud also feats [N, 5], cells [3, N], neighbors [N, K]. With every_point
    labels [A] and nearest [A] of all A points.
    All randomness of an item is a function of (seed, epoch, number), whatever the process or batch that it falls into.
    Subclasses may change what a sensor gives: `scan`, `image`.
    """

    def __init__(self, index, rows, cameras="all", image_size=None, cloud=None, training=False, augment=False,
                 labels=False, max_depth=None, every_point=False, skip_bad=False, seed=0):
        if cameras not in ("random", "all", "scan", *index.cameras):
            raise InputError(f"--cameras {cameras}: choose random, all, scan, or one of {', '.join(index.cameras)}")
        if labels and (unlabelled := np.count_nonzero(index.lidarseg[rows] == b"")):
            raise InputError(f"--data {index.root}: {unlabelled} of {len(rows)} frames have no lidarseg labels; extract it")
        self.index, self.rows, self.cameras, self.image_size, self.cloud = index, rows, cameras, image_size, cloud
        self.training, self.augment, self.labels, self.max_depth = training, augment, labels, max_depth
        self.every_point, self.skip_bad, self.seed = every_point, skip_bad, seed

    def __len__(self):
        return len(self.rows) * (len(self.index.cameras) if self.cameras == "all" else 1)

    def scan(self, row):
        """[N, 4]: the LiDAR scan of a frame, as read_scan."""
        return read_scan(os.path.join(self.index.root, self.index.lidar[row].decode()))

    def image(self, row, camera):
        """uint8 [3, H, W]: the image of a frame's camera in the size asked for."""
        path = os.path.join(self.index.root, self.index.image[row, camera].decode())
        return read_image(path, self.image_size, self.index.image_size[row, camera])

    def locate(self, key):
        """(frame, camera or None, generator of the item's randomness) of (epoch, number)."""
        epoch, number = key
        rng = np.random.default_rng((self.seed, epoch, number))
        count, camera = len(self.index.cameras), None
        if self.cameras == "all":
            number, camera = divmod(number, count)
        elif self.cameras != "scan":
            camera = rng.integers(count) if self.cameras == "random" else self.index.cameras.index(self.cameras)
        return self.rows[number], camera, rng

    def name(self, key):
        """The file by which a person finds an item: its image, or its scan."""
        row, camera, _ = self.locate(key)
        return (self.index.lidar[row] if camera is None else self.index.image[row, camera]).decode()

    def __getitem__(self, key):
        return next_good(self, key) if self.skip_bad else self.view(key)

    def view(self, key):
        """One item; InputError if it cannot be read."""
        row, camera, rng = self.locate(key)
        index = self.index
        if index.bad[row]:
            raise InputError(f"{index.root}: {index.bad[row].decode()}")
        scan, item, arrays = self.scan(row), {"condition": int(index.condition[row])}, {}  # scan: [A, 4]

        # points that this camera sees
        if self.cameras == "scan":
            keep = np.arange(len(scan))
        else:
            raw_size = index.image_size[row, camera]
            keep, pixels, depths = project(scan[:, :3], index.cam_from_lidar[row, camera], index.intrinsics[row, camera],
                                           raw_size)
            if self.image_size is not None:
                pixels = pixels * (np.asarray(self.image_size) / raw_size)
                item["image"] = torch.from_numpy(self.image(row, camera))
            arrays |= {"pixels": pixels.astype(np.float32), "depths": depths.astype(np.float32)}
        if self.labels:
            labels = read_labels(os.path.join(index.root, index.lidarseg[row].decode()), index.coarse, len(scan))
            arrays["labels"] = labels[keep].astype(np.int64)
        if self.max_depth is not None:
            first = nearest_per_pixel(pixels, depths)
            first = first[depths[first] <= self.max_depth]
            arrays, keep = {name: values[first] for name, values in arrays.items()}, keep[first]

        # the 3D encoder's inputs
        if options := self.cloud:
            xyz = rotate_and_flip(scan[keep, :3], rng) if self.augment else scan[keep, :3]
            chosen = np.flatnonzero(inside_fov(xyz, options["fov"]))
            chosen = chosen[one_per_voxel(xyz[chosen], options["voxel"], rng if self.training else None)]
            if len(chosen) == 0:
                raise InputError(f"{self.name(key)}: no LiDAR point of its scan ({index.lidar[row].decode()}) is in view and within reach; "
                                 "do scan, image and calibration belong together?")
            if len(chosen) > options["max_points"] and not self.every_point:
                center = xyz[chosen[rng.integers(len(chosen))]]
                chosen = chosen[nearest_to(xyz[chosen], center, options["max_points"])]
            if self.every_point:
                arrays["nearest"] = cKDTree(xyz[chosen]).query(xyz)[1].astype(np.int64)
            else:
                arrays = {name: values[chosen] for name, values in arrays.items()}
            xyz, intensity = xyz[chosen], scan[keep[chosen], 3]
            arrays["feats"] = point_features(xyz, intensity, *options["intensity"])
            arrays["cells"] = plane_cells(xyz, options["fov"], options["cell"])
            arrays["neighbors"] = nearest_neighbors(xyz, options["neighbors"])
        return item | {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}


def next_good(frames, key):
    """frames.view(key), or the next item that can be read; its `bad` is [(frame number, why it cannot be read)] of those before it."""
    epoch, number = key
    bad = []
    for step in range(min(len(frames), 100)):
        other = epoch, (number + step) % len(frames)
        try:
            return frames.view(other) | {"bad": bad}
        except InputError as error:
            bad.append((int(frames.locate(other)[0]), str(error)))
    raise InputError(f"{len(bad)} items in a row cannot be read, the last: {bad[-1][1]}")


def collate(items):
    """A ragged batch: points of all items one after the other, `batch` [N] the item of each, point numbers as batch rows."""
    per_point = next(name for name in ("feats", "features", "pixels") if name in items[0])  # features: of a cached encoder
    counts = torch.tensor([len(item[per_point]) for item in items])
    offsets = counts.cumsum(0) - counts
    out = {name: [item[name] for item in items] for name in items[0]}
    for name, values in out.items():
        if name in ("neighbors", "nearest"):
            values = [rows + start for rows, start in zip(values, offsets.tolist())]
        join = {"condition": torch.tensor, "image": torch.stack, "cells": lambda cells: torch.cat(cells, dim=1),
                "bad": lambda reasons: sum(reasons, [])}
        out[name] = join.get(name, torch.cat)(values)
    return out | {"batch": torch.repeat_interleave(torch.arange(len(items)), counts)}

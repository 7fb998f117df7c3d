"""A driving frame: LiDAR-to-pixel projection, augmentation, the 3D encoder's inputs, batches.

Everything here is NumPy on the CPU, one frame and one camera at a time; `collate` makes the batch
of tensors. Pixels are (row, col) of the *resized* image and may be fractional. Distances are
metres. Clouds are points-first.
"""
import os

import numpy as np
import torch
from scipy.spatial import cKDTree

from plumbing.errors import InputError
from readers.files import read_image, read_labels, read_scan

DEPTHS = (0.1, 80.0)  # metres that depth estimation is trained on and judged by; md4all's protocol

# How a LiDAR scan becomes the 3D encoder's input (ScaLR, supplement B.2, and its configuration)
CLOUD = {
    "fov": (64.0, 64.0, 8.0),  # half extents along x, y, z [m]
    "cell": 0.5,               # side of the planes' cells [m]
    "voxel": 0.1,              # side of the voxels of which one point is kept [m]
    "max_points": 20000,       # at most so many points: the ones nearest to a random one
    "neighbors": 16,           # of a point, in the embedding
    "intensity": (18.742355, 22.04632),  # mean and standard deviation on nuScenes
}


# ---- what a camera sees --------------------------------------------------------------------------

def project(xyz, cam_from_lidar, intrinsics, size, min_depth=1.0):
    """The points that a camera sees.

    Args:
        xyz: [N, 3] in the LiDAR's frame. cam_from_lidar: [4, 4]. intrinsics: [3, 3].
        size: (H, W) of the raw image.
    Returns: visible [M] int, pixels [M, 2] (row, col) in the raw image, depths [M] in metres.
    A point is visible if it is more than min_depth away and 0 < row < H-1, 0 < col < W-1
    (nuscenes-devkit's rule, whose margin is 1).
    """
    # Into the camera's frame, z ahead
    camera = cam_from_lidar[:3, :3] @ xyz.T + cam_from_lidar[:3, 3:]  # [3, N]
    ahead = np.flatnonzero(camera[2] > min_depth)
    # Onto its image
    col, row, depth = intrinsics @ camera[:, ahead]
    row, col = row / depth, col / depth
    inside = (row > 0) & (row < size[0] - 1) & (col > 0) & (col < size[1] - 1)
    return ahead[inside], np.column_stack([row[inside], col[inside]]), depth[inside]


def nearest_per_pixel(pixels, depths):
    """Numbers of the points that remain when each (whole) pixel keeps its nearest point only."""
    order = np.argsort(depths, kind="stable")
    whole = np.floor(pixels[order]).astype(np.int64)
    first = np.unique(whole, axis=0, return_index=True)[1]
    return np.sort(order[first])


# ---- what the 3D encoder gets --------------------------------------------------------------------

def rotate_and_flip(xyz, rng):
    """ScaLR's augmentation (Sec. 4.2) of points [N, 3].

    A rotation about z by U(-pi, pi), then with probability 2/3 a flip of one of x and y.
    """
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
    """Numbers of the points kept, one a voxel: a random one, or the first where rng is None."""
    order = np.arange(len(xyz)) if rng is None else rng.permutation(len(xyz))
    # A voxel's three numbers of 21 bits make one, so that sorting is 1-D
    x, y, z = (np.floor(xyz[order] / voxel).astype(np.int64) + 2**20).T
    _, first = np.unique((x << 42) | (y << 21) | z, return_index=True)
    return np.sort(order[first])


def nearest_to(xyz, center, count):
    """Numbers of the `count` points nearest to `center` [3], in their own order."""
    squares = ((xyz - center) ** 2).sum(1)
    return np.sort(np.argpartition(squares, count - 1)[:count])


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
    """The `count` nearest other points of each point: int64 [N, count].

    Small clouds repeat the ones that they have; a single point is its own neighbour.
    """
    available = min(count, len(xyz) - 1)
    if available < 1:
        return np.zeros((len(xyz), count), np.int64)
    # The first found is the point itself. Only where two share a place it may be the other one,
    # and then the point itself is among the others: there the first takes its place.
    ranks = [1, *(np.arange(count) % available + 2)]
    found = cKDTree(xyz).query(xyz, k=ranks)[1]  # [N, 1 + count]
    first, others = found[:, :1], found[:, 1:]
    itself = np.arange(len(xyz))[:, None]
    return np.where(others == itself, first, others)


def point_features(xyz, intensity, mean, std):
    """[N, 5]: standardised intensity, x, y, z, radius (ScaLR, supplement B.2)."""
    radius = np.linalg.norm(xyz, axis=1)
    return np.column_stack([(intensity - mean) / std, xyz, radius]).astype(np.float32)


# ---- items ---------------------------------------------------------------------------------------

def take(points, rows):
    """These rows of all per-point fields {name: [N, ...]}."""
    return {name: values[rows] for name, values in points.items()}


class Frames(torch.utils.data.Dataset):
    """Views of the frames `rows` of an `Index`; `frames[epoch, number]` is one view.

    Args:
        cameras: "random" (one of a frame's, drawn anew each epoch), "all" (an item for each), a
            channel name, or "scan": the whole LiDAR scan, without image and pixels.
        image_size: (H, W) that images are resized to. None: no image.
        cloud: as `CLOUD`, for the 3D encoder's inputs. None: all visible points, no inputs.
        training: keep a random point of each voxel; False: the first. augment: rotate and flip.
        labels: read lidarseg. max_depth: keep the nearest point of a pixel, up to so many metres.
        every_point: with "scan", labels of all points, and `nearest` of those that the 3D encoder
            gets, which are not limited in number.
        skip_bad: take the next frame in the place of one that cannot be read; the item's `bad` has
            its number and why.

    An item is a dict: condition (index into CONDITIONS); image uint8 [3, H, W]; pixels [N, 2] (row,
    col) in the resized image; depths [N] metres; labels [N]; with a cloud also feats [N, 5],
    cells [3, N], neighbors [N, K]; with every_point labels [A] and nearest [A] of all A points.
    All randomness of an item is a function of (seed, epoch, number), whatever the process or batch
    that it falls into. Subclasses may change what a sensor gives: `scan`, `image`.
    """

    def __init__(self, index, rows, cameras="all", image_size=None, cloud=None, training=False,
                 augment=False, labels=False, max_depth=None, every_point=False, skip_bad=False,
                 seed=0):
        if cameras not in ("random", "all", "scan", *index.cameras):
            known = ", ".join(index.cameras)
            raise InputError(f"--cameras {cameras}: choose random, all, scan, or one of {known}")
        unlabelled = np.count_nonzero(index.lidarseg[rows] == b"")
        if labels and unlabelled:
            raise InputError(f"--data {index.root}: {unlabelled} of {len(rows)} frames have no "
                             "lidarseg labels; extract it")
        self.index = index
        self.rows = rows
        self.cameras = cameras
        self.image_size = image_size
        self.cloud = cloud
        self.training = training
        self.augment = augment
        self.labels = labels
        self.max_depth = max_depth
        self.every_point = every_point
        self.skip_bad = skip_bad
        self.seed = seed

    def __len__(self):
        return len(self.rows) * (len(self.index.cameras) if self.cameras == "all" else 1)

    def scan(self, frame):
        """[A, 4]: the LiDAR scan of a frame, as read_scan gives it."""
        return read_scan(os.path.join(self.index.root, self.index.lidar[frame].decode()))

    def image(self, frame, camera):
        """uint8 [3, H, W]: the image of a frame's camera in the size asked for."""
        path = os.path.join(self.index.root, self.index.image[frame, camera].decode())
        return read_image(path, self.image_size, self.index.image_size[frame, camera])

    def locate(self, key):
        """(frame, camera or None, generator of the item's randomness) of (epoch, number)."""
        epoch, number = key
        rng = np.random.default_rng((self.seed, epoch, number))
        count = len(self.index.cameras)
        camera = None
        if self.cameras == "all":
            number, camera = divmod(number, count)
        elif self.cameras == "random":
            camera = rng.integers(count)
        elif self.cameras != "scan":
            camera = self.index.cameras.index(self.cameras)
        return self.rows[number], camera, rng

    def name(self, key):
        """The file by which a person finds an item: its image, or its scan."""
        frame, camera, _ = self.locate(key)
        path = self.index.lidar[frame] if camera is None else self.index.image[frame, camera]
        return path.decode()

    def __getitem__(self, key):
        return next_good(self, key) if self.skip_bad else self.view(key)

    def view(self, key):
        """One item. Raises InputError if it cannot be read."""
        index = self.index
        frame, camera, rng = self.locate(key)
        if index.bad[frame]:
            raise InputError(f"{index.root}: {index.bad[frame].decode()}")
        points = self.points(frame, camera)
        if self.max_depth is not None:
            points = take(points, nearest_per_pixel(points["pixels"], points["depths"]))
            points = take(points, points["depths"] <= self.max_depth)
        if self.cloud:
            points = self.encoder_inputs(points, rng, key)
        item = {"condition": int(index.condition[frame])}
        if camera is not None and self.image_size is not None:
            item["image"] = torch.from_numpy(self.image(frame, camera))
        for name, values in points.items():
            if name in ("xyz", "intensity"):
                continue
            if values.dtype == np.float64:  # pixels and depths are computed in double precision
                values = values.astype(np.float32)
            item[name] = torch.from_numpy(np.ascontiguousarray(values))
        return item

    def points(self, frame, camera):
        """A scan's points that a camera sees, or all where camera is None: {name: [N, ...]}.

        xyz, intensity; with a camera pixels in the resized image and depths; labels if asked for.
        """
        index = self.index
        scan = self.scan(frame)  # [A, 4]
        seen = np.arange(len(scan))
        of_camera = {}
        if camera is not None:
            raw_size = index.image_size[frame, camera]
            seen, pixels, depths = project(scan[:, :3], index.cam_from_lidar[frame, camera],
                                           index.intrinsics[frame, camera], raw_size)
            if self.image_size is not None:
                pixels = pixels * (np.asarray(self.image_size) / raw_size)
            of_camera = {"pixels": pixels, "depths": depths}
        points = {"xyz": scan[seen, :3], "intensity": scan[seen, 3]} | of_camera
        if self.labels:
            path = os.path.join(index.root, index.lidarseg[frame].decode())
            labels = read_labels(path, index.coarse, len(scan))  # [A]
            points["labels"] = labels[seen].astype(np.int64)
        return points

    def encoder_inputs(self, points, rng, key):
        """The points that the 3D encoder gets, one of each voxel in view, and its inputs."""
        options = self.cloud
        xyz = rotate_and_flip(points["xyz"], rng) if self.augment else points["xyz"]

        # Which points
        chosen = np.flatnonzero(inside_fov(xyz, options["fov"]))
        drawn_by = rng if self.training else None
        chosen = chosen[one_per_voxel(xyz[chosen], options["voxel"], drawn_by)]
        if len(chosen) == 0:
            scan = self.index.lidar[self.locate(key)[0]].decode()
            raise InputError(f"{self.name(key)}: no LiDAR point of its scan ({scan}) is in view "
                             "and within reach; do scan, image and calibration belong together?")
        if len(chosen) > options["max_points"] and not self.every_point:
            center = xyz[chosen[rng.integers(len(chosen))]]
            chosen = chosen[nearest_to(xyz[chosen], center, options["max_points"])]

        # What the encoder takes of them
        if self.every_point:
            kept = points | {"nearest": cKDTree(xyz[chosen]).query(xyz)[1].astype(np.int64)}
        else:
            kept = take(points, chosen)
        xyz = xyz[chosen]
        return kept | {
            "feats": point_features(xyz, points["intensity"][chosen], *options["intensity"]),
            "cells": plane_cells(xyz, options["fov"], options["cell"]),
            "neighbors": nearest_neighbors(xyz, options["neighbors"])}


def next_good(frames, key):
    """frames.view(key), or the next item that can be read.

    Its `bad` is [(frame number, why it cannot be read)] of those before it.
    """
    epoch, number = key
    bad = []
    for step in range(min(len(frames), 100)):
        other = epoch, (number + step) % len(frames)
        try:
            return frames.view(other) | {"bad": bad}
        except InputError as error:
            bad.append((int(frames.locate(other)[0]), str(error)))
    raise InputError(f"{len(bad)} items in a row cannot be read, the last: {bad[-1][1]}")


# ---- batches -------------------------------------------------------------------------------------

def _one_list(lists):
    return sum(lists, [])


def _beside(planes):
    return torch.cat(planes, dim=1)


# How the values of a field of several items become one
JOIN = {"condition": torch.tensor, "image": torch.stack, "bad": _one_list,
        "pixels": torch.cat, "depths": torch.cat, "labels": torch.cat,      # [N, ...]
        "feats": torch.cat, "cells": _beside, "neighbors": torch.cat, "nearest": torch.cat,
        "features": torch.cat}                                              # of a cached encoder
NUMBERS = ("neighbors", "nearest")  # they number points of an item, and become rows of the batch


def collate(items):
    """A ragged batch: the points of all items one after the other; `batch` [N] is each one's item.

    Raises ValueError for a field that JOIN does not name.
    """
    unknown = [name for name in items[0] if name not in JOIN]
    if unknown:
        raise ValueError(f"collate does not know the field {unknown[0]!r}: say in data.JOIN how "
                         "the items' values are joined")
    # How many points each item has, and the row of the batch at which they start
    per_point = next(name for name in ("feats", "features", "pixels") if name in items[0])
    counts = torch.tensor([len(item[per_point]) for item in items])
    starts = (counts.cumsum(0) - counts).tolist()
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        if name in NUMBERS:
            values = [numbers + start for numbers, start in zip(values, starts)]
        batch[name] = JOIN[name](values)
    return batch | {"batch": torch.repeat_interleave(torch.arange(len(items)), counts)}

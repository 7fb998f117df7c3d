"""A view of a driving frame: LiDAR-to-pixel projection, augmentation, items, ragged batches.

Everything here is NumPy on the CPU, one frame and one camera at a time; `collate` makes the batch
of tensors. Pixels are (row, col) of the *resized* image and may be fractional. Distances are
metres. Clouds are points-first. What a dataset is, readers/ says; what a 3D encoder makes of a
cloud, its own `prepare` says.
"""
import numpy as np
import torch
from scipy.spatial import cKDTree

from plumbing.errors import InputError
from readers.files import labelled_pixels, read_image
from readers.table import check_conditions, no_scans, spread

DEPTHS = (0.1, 80.0)  # metres that depth estimation is trained on and judged by; md4all's protocol


# ---- several datasets ----------------------------------------------------------------------------

def select(tables, split, conditions=None, limit=None, percent=100, skip_bad=False):
    """The frames of a split in each of these tables: at most `limit` in all, evenly spread.

    A table of which `limit` takes none is left out. conditions: names; ["all"] is as None. Other
    arguments, and errors: see `FrameTable.select`.
    """
    conditions = None if conditions == ["all"] else conditions
    check_conditions(tables, conditions)
    of_split = [table.select(split, conditions, percent, skip_bad=True) for table in tables]
    starts = np.cumsum([0, *map(len, of_split)])
    kept = spread(np.arange(starts[-1]), limit)
    chosen = []
    for table, start, end in zip(of_split, starts, starts[1:]):
        of_table = kept[(kept >= start) & (kept < end)]
        if len(of_table):
            chosen.append(table.only(table.rows[of_table - start]))
    for table in () if skip_bad else chosen:
        table.refuse_bad()
    return chosen


def set_sampling(tables, stored=None, task=None, flags=None):
    """Set how the scans of these tables become points. Returns {dataset: sampling}.

    It is what a checkpoint says, `stored` {dataset: sampling}, else the dataset's SAMPLING. The
    entry of SAMPLING for the task, "probe" or "finetune", replaces values of either. flags: values
    that stage 1 was given by hand. They hold for every dataset and task. Raises InputError for a
    dataset without scans.
    """
    flags = flags or {}
    known = {}
    for table in tables:
        if not table.sampling:
            raise InputError(no_scans(table.root, table.reader))
        sampling = (stored or {}).get(table.name, table.sampling)
        sampling = sampling | table.sampling.get(task, {}) | flags
        for name in ("probe", "finetune"):
            sampling.pop(name, None)
        if known.setdefault(table.name, sampling) != sampling:
            raise InputError(f"--data: the roots of {table.name} have intensities of other "
                             "statistics; take one of them")
        table.sampling = sampling
    return known


# ---- what a camera sees --------------------------------------------------------------------------

def project(xyz, cam_from_lidar, intrinsics, size, min_depth=1.0, margin=1):
    """The points that a camera sees.

    Args:
        xyz: [N, 3] in the LiDAR's frame. cam_from_lidar: [4, 4]. intrinsics: [3, 3].
        size: (H, W) of the raw image.
    Returns: visible [M] int, pixels [M, 2] (row, col) in the raw image, depths [M] in metres.
    A point is visible if it is more than min_depth ahead and 0 < row < H - margin,
    0 < col < W - margin (nuscenes-devkit's rule, with a margin of 1, for all datasets).
    """
    # Into the camera's frame, z ahead
    camera = cam_from_lidar[:3, :3] @ xyz.T + cam_from_lidar[:3, 3:]  # [3, N]
    ahead = np.flatnonzero(camera[2] > min_depth)
    # Onto its image
    col, row, depth = intrinsics @ camera[:, ahead]
    row, col = row / depth, col / depth
    inside = (row > 0) & (row < size[0] - margin) & (col > 0) & (col < size[1] - margin)
    return ahead[inside], np.column_stack([row[inside], col[inside]]), depth[inside]


def nearest_per_pixel(pixels, depths):
    """Numbers [M] of those points [N, 2] (row, col) that are nearest in their (whole) pixel."""
    order = np.argsort(depths, kind="stable")
    whole = np.floor(pixels[order]).astype(np.int64)
    first = np.unique(whole, axis=0, return_index=True)[1]
    return np.sort(order[first])


# ---- points --------------------------------------------------------------------------------------

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


def one_per_voxel(xyz, voxel, rng=None):
    """Numbers [M] of the points kept, one a voxel: a random one, or the first where rng is None.

    xyz: [N, 3] in metres, not beyond 2^20 voxels. voxel: its side in metres.
    """
    order = np.arange(len(xyz)) if rng is None else rng.permutation(len(xyz))
    # A voxel's three numbers of 21 bits make one, so that sorting is 1-D
    x, y, z = (np.floor(xyz[order] / voxel).astype(np.int64) + 2**20).T
    _, first = np.unique((x << 42) | (y << 21) | z, return_index=True)
    return np.sort(order[first])


def nearest_to(xyz, center, count):
    """Numbers of the `count` points nearest to `center` [3], in their own order."""
    squares = ((xyz - center) ** 2).sum(1)
    return np.sort(np.argpartition(squares, count - 1)[:count])


def thin(xyz, rows, rng, sampling):
    """Of the points `rows` one a voxel and, of too many, those nearest to a random one.

    sampling: "voxel" [m]; "max_points", or None; "keep": "first" takes a voxel's first point in
    place of a random one.
    """
    drawn_by = None if sampling.get("keep") == "first" else rng
    rows = rows[one_per_voxel(xyz[rows], sampling["voxel"], drawn_by)]
    most = sampling["max_points"]
    if most is not None and len(rows) > most:
        center = xyz[rows[rng.integers(len(rows))]]
        rows = rows[nearest_to(xyz[rows], center, most)]
    return rows


# ---- items ---------------------------------------------------------------------------------------

def take(points, rows):
    """These rows of all per-point fields {name: [N, ...]}."""
    return {name: values[rows] for name, values in points.items()}


class Frames(torch.utils.data.Dataset):
    """Views of the frames of one or several `FrameTable`s; `frames[epoch, number]` is one view.

    Args:
        cameras: "random" (one of a frame's, drawn anew each epoch), "all" (an item for each), a
            channel name, or "scan": the whole LiDAR scan, without image and pixels.
        image_size: (H, W) that images are resized to. None: no image.
        prepare: a 3D encoder's, (xyz, intensity, rng, sampling) -> (rows, inputs). None: no 3D
            encoder.
        target: "labels"; "depths": of the nearest point of each pixel, up to DEPTHS; or None.
        points: which of a scan's points the 3D encoder gets: "random", one of each voxel;
            "augmented", the same of a cloud that is rotated and flipped; "first" of each voxel;
            "every": the first of each voxel, without `max_points`. The item then keeps all A
            points, and nearest[a] is the row of the 3D encoder's point nearest to point a.
        skip_bad: take the next frame in the place of one that cannot be read; the item's `bad` has
            its number and why.
    `most`, set afterwards, limits an item's points to that many, drawn anew each epoch.

    An item is a dict: condition (index into `conditions`, -1 where the dataset states none);
    of several datasets also dataset (index into `datasets`);
    image uint8 [3, H, W]; pixels [N, 2] (row, col) in the resized image; depths [N] metres; labels
    [N]; inputs, the 3D encoder's: {name: [N, ...]}; nearest [A] of all A points. With
    neither target nor 3D encoder there is only the image, and no scan is read.
    All randomness of an item is a function of (seed, epoch, number), whatever the process or batch
    that it falls into.
    """

    def __init__(self, tables, cameras="all", image_size=None, prepare=None, target=None,
                 points="first", skip_bad=False, seed=0):
        for table in tables:
            table.require(cameras, target)
        self.tables = tables
        self.cameras = cameras
        self.image_size = image_size
        self.prepare = prepare
        self.target = target
        self.points = points
        self.skip_bad = skip_bad
        self.seed = seed
        self.most = None
        self.dense = any("scan" not in table for table in tables)
        of_tables = [name for table in tables for name in table.conditions]
        self.conditions = tuple(dict.fromkeys(of_tables))
        self.datasets = tuple(dict.fromkeys(table.name for table in tables))
        # Numbers of the first item and of the first frame of each table, and what comes after
        self.first_item = np.cumsum([0, *(len(table) * self.views(table) for table in tables)])
        self.first_frame = np.cumsum([0, *(len(table["split"]) for table in tables)])

    def views(self, table):
        """How many items a frame is."""
        return table["image"].shape[1] if self.cameras == "all" else 1

    def __len__(self):
        return int(self.first_item[-1])

    def frame_count(self):
        """How many frames there are to draw from."""
        return sum(map(len, self.tables))

    def locate(self, key):
        """(number of the table, frame, camera or None, generator of the item's randomness)."""
        epoch, number = key
        rng = np.random.default_rng((self.seed, epoch, number))
        which = int(np.searchsorted(self.first_item, number, side="right")) - 1
        table = self.tables[which]
        place, view = divmod(number - self.first_item[which], self.views(table))
        camera = None
        if self.cameras == "all":
            camera = view
        elif self.cameras == "random":
            camera = rng.integers(table["image"].shape[1])
        elif self.cameras != "scan":
            camera = table.cameras.index(self.cameras)
        return which, table.rows[place], camera, rng

    def number_of_frame(self, key):
        """An item's frame, numbered through all tables."""
        which, frame, *_ = self.locate(key)
        return int(self.first_frame[which] + frame)

    def name(self, key):
        """The file by which a person finds an item: its image, or its scan."""
        which, frame, camera, _ = self.locate(key)
        table = self.tables[which]
        path = table["scan"][frame] if camera is None else table["image"][frame, camera]
        return path.decode()

    def __getitem__(self, key):
        return next_good(self, key) if self.skip_bad else self.view(key)

    def view(self, key):
        """One item. Raises InputError if it cannot be read."""
        which, frame, camera, rng = self.locate(key)
        table = self.tables[which]
        if "bad" in table and table["bad"][frame]:
            raise InputError(f"{table.root}: {table['bad'][frame].decode()}")

        # Points: of a scan, or labelled pixels
        points = {}
        if "scan" not in table and self.target:
            points = labelled_pixels(table.labels(frame), self.image_size)
        elif self.target or self.prepare:
            points = self.points_of(table, frame, camera)
        if self.dense:  # labelled pixels have no depth, and an item has what the others have
            points.pop("depths", None)
        if self.target == "depths":
            points = take(points, nearest_per_pixel(points["pixels"], points["depths"]))
            points = take(points, points["depths"] <= DEPTHS[1])
        inputs = {}
        if self.prepare:
            points, inputs = self.encoder_inputs(table, points, rng, key)
        elif points and self.most and len(points["pixels"]) > self.most:
            points = take(points, rng.choice(len(points["pixels"]), self.most, replace=False))

        # As tensors
        item = {"condition": self.condition_of(table, frame)}
        if len(self.datasets) > 1:
            item["dataset"] = self.datasets.index(table.name)
        if camera is not None and self.image_size is not None:
            item["image"] = read_image(table.path("image", frame, camera), self.image_size,
                                       table["image_size"][frame, camera])
        for name, values in points.items():
            if name not in ("xyz", "intensity"):
                item[name] = as_tensor(values)
        if inputs:
            item["inputs"] = {name: as_tensor(values) for name, values in inputs.items()}
        return item

    def condition_of(self, table, frame):
        """A frame's condition, index into `conditions`; -1 where its dataset states none."""
        if not table.conditions:
            return -1
        return self.conditions.index(table.conditions[table["condition"][frame]])

    def points_of(self, table, frame, camera):
        """A scan's points that a camera sees, or all where camera is None: {name: [N, ...]}.

        xyz, intensity; with a camera pixels in the resized image and depths; labels if asked for.
        """
        scan = table.reader.scan(table.path("scan", frame))  # [A, 4]
        seen = np.arange(len(scan))
        of_camera = {}
        if camera is not None:
            raw_size = table["image_size"][frame, camera]
            seen, pixels, depths = project(scan[:, :3], table["cam_from_lidar"][frame, camera],
                                           table["intrinsics"][frame, camera], raw_size)
            if self.image_size is not None:
                pixels = pixels * (np.asarray(self.image_size) / raw_size)
            of_camera = {"pixels": pixels, "depths": depths}
        points = {"xyz": scan[seen, :3], "intensity": scan[seen, 3]} | of_camera
        if self.target == "labels":
            labels = table.labels(frame, len(scan))  # [A]
            if len(labels) != len(scan):
                raise InputError(f"{table.path('labels', frame)}: {len(labels)} labels for "
                                 f"{len(scan)} points; write both anew")
            points["labels"] = labels[seen].astype(np.int64)
        return points

    def encoder_inputs(self, table, points, rng, key):
        """(the points that the 3D encoder gets, or all where every one counts; its inputs)."""
        xyz = points["xyz"]
        if self.points == "augmented":
            xyz = rotate_and_flip(xyz, rng)
        sampling = table.sampling
        if self.points in ("first", "every"):
            sampling = sampling | {"keep": "first"}
        if self.points == "every":
            sampling = sampling | {"max_points": None}
        rows, inputs = self.prepare(xyz, points["intensity"], rng, sampling)
        if len(rows) == 0:
            scan = table["scan"][self.locate(key)[1]].decode()
            raise InputError(f"{self.name(key)}: no LiDAR point of its scan ({scan}) is in view "
                             "and within reach; do scan, image and calibration belong together?")
        if self.points == "every":
            nearest = cKDTree(xyz[rows]).query(xyz)[1]
            return points | {"nearest": nearest.astype(np.int64)}, inputs
        return take(points, rows), inputs


def as_tensor(values):
    """A tensor of an array; pixels and depths are computed in double precision and end as float."""
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(values))


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
            bad.append((frames.number_of_frame(other), str(error)))
    raise InputError(f"{len(bad)} items in a row cannot be read, the last: {bad[-1][1]}")


# ---- batches -------------------------------------------------------------------------------------

# How the values of a field of several items become one. `inputs` has fields of its own: each has a
# row a point, and they stand one below the other.
JOIN = {"condition": torch.tensor, "dataset": torch.tensor, "image": torch.stack,
        "bad": lambda lists: sum(lists, []),
        "pixels": torch.cat, "depths": torch.cat, "labels": torch.cat, "nearest": torch.cat,
        "features": torch.cat}  # of a cached encoder
NUMBERS = ("neighbors", "nearest")  # they number points of an item, and become rows of the batch


def collate(items):
    """A ragged batch: the points of all items one after the other; `view` [N] is each one's item.

    The points are those that the 3D encoder gets where there is one. Raises ValueError for a field
    that JOIN does not name.
    """
    unknown = [name for name in items[0] if name not in JOIN and name != "inputs"]
    if unknown:
        raise ValueError(f"collate does not know the field {unknown[0]!r}: say in data.JOIN how "
                         "the items' values are joined")
    # How many points each item has, and the row of the batch at which they start
    counts = torch.tensor([point_count(item) for item in items])
    starts = (counts.cumsum(0) - counts).tolist()

    def joined(name, values, join):
        if name in NUMBERS:
            values = [numbers + start for numbers, start in zip(values, starts)]
        return join(values)

    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        if name == "inputs":
            batch[name] = {part: joined(part, [inputs[part] for inputs in values], torch.cat)
                           for part in values[0]}
        else:
            batch[name] = joined(name, values, JOIN[name])
    return batch | {"view": torch.repeat_interleave(torch.arange(len(items)), counts)}


def point_count(item):
    """How many points an item has; 0 for an image alone."""
    if "inputs" in item:
        return len(next(iter(item["inputs"].values())))
    return len(item.get("features", item.get("pixels", ())))

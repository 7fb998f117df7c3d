"""Where a picture's depth map comes from: its LiDAR scan, completed by IP-Basic, or a folder.

Depth tells two things of like looks apart when tokens are clustered (S3PT, Sec. 3.3). A scan gives
depth to few pixels. IP-Basic fills the gaps by dilations, a median and a blur (Ku et al., CRV 2018,
and its public code). Everything here is NumPy and SciPy on the CPU. Depths are metres, and 0 says
that there is none.
"""
import contextlib
import hashlib
import io
import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import (convolve1d, maximum_filter, maximum_filter1d, median_filter,
                           minimum_filter)

from data import nearest_per_pixel, project
from plumbing.errors import InputError
from plumbing.files import looks_like, read_bytes, unreadable
from plumbing.fingerprint import digest
from readers.cache import caches

FILLS = ("fast", "extended", "multiscale", "multiscale-extended")
BLURS = ("bilateral", "gaussian", "none")
MAX_DEPTH = 100.0  # metres, from which depths are counted back
FARTHEST = 99.8    # metres: what is as far would count as empty
EMPTY = 0.1        # what is not above it is no depth
BINS = ((EMPTY, 15, 7), (15, 30, 5), (30, FARTHEST, 3))  # metres above, up to; side of the cross
HALF = "<f2"       # numbers of the cache
MAGIC = {".npy": b"\x93NUMPY", ".png": b"\x89PNG"}  # how files begin
FORMAT = 1         # of the cache: count up when reading, projection or completion change


# ---- IP-Basic ------------------------------------------------------------------------------------
# A map's nearness is MAX_DEPTH minus depth, and 0 where there is none. So the largest value of a
# window is its nearest one, and what is empty never wins. Borders are the nearest pixel's: windows
# that are symmetric then see nothing that is not in them.

def complete(depths, fill="fast", blur="bilateral"):
    """A sparse depth map, completed: a new float32 array [H, W].

    Args:
        depths: [H, W] metres. What is 0.1 m or less, or 99.8 m or more, is taken as unknown.
        fill: "fast" is IP-Basic's fast variant; "multiscale" dilates near points more than far
            ones and rejects outliers; "extended" and "multiscale-extended" also continue each
            column's topmost depth to the top of the map.
        blur: "bilateral" or "gaussian", with 5 x 5 pixels, or "none".
    What is 0.1 m or less in the result is unknown. Without a blur it is exactly 0.
    """
    if fill not in FILLS or blur not in BLURS:
        raise ValueError(f"fill {fill!r} is not in {FILLS}, or blur {blur!r} not in {BLURS}")
    # What cannot be counted back from MAX_DEPTH is left out
    known = (depths > EMPTY) & (depths < FARTHEST)
    depths = np.where(known, depths, 0).astype(np.float32)
    steps = multiscale if fill.startswith("multiscale") else fast
    return inverse(steps(depths, fill.endswith("extended"), blur))


def inverse(values):
    """Nearness of depths, or depths of nearness."""
    return np.where(values > EMPTY, MAX_DEPTH - values, values)


def fast(depths, extend, blur):
    """Nearness [H, W] by the fast variant."""
    # Two crosses of 3 x 3, one after the other, are the diamond of 5 x 5
    nearness = cross(cross(inverse(depths), 3), 3)
    nearness = filled(closed(nearness), 7)
    if extend:
        nearness = filled(extended(nearness), 31)
    # Blurs
    nearness = median(nearness)
    if blur == "bilateral":
        return bilateral(nearness, 1.5)
    if blur == "gaussian":
        return np.where(nearness > EMPTY, gaussian(nearness), nearness)
    return nearness


def multiscale(depths, extend, blur):
    """Nearness [H, W] by the multi-scale variant."""
    # Bins of depth, each dilated by a cross of its own; the nearest bin lies on top
    nearness = inverse(depths)
    parts = []
    for above, most, size in BINS:
        part = np.where((depths > above) & (depths <= most), nearness, 0)
        parts.append(cross(part, size))
    nearness = closed(np.maximum.reduce(parts))
    nearness = np.where(nearness > EMPTY, median(nearness), nearness)

    # Holes, but nothing above a column's topmost depth
    nearness = filled(nearness, 9, ~above_top(nearness))
    if extend:
        nearness = extended(nearness)
    inside = ~above_top(nearness)  # [H, W]
    for _ in range(6):
        nearness = filled(nearness, 5, inside)

    # Blurs
    known = inside & (nearness > EMPTY)
    nearness = np.where(known, median(nearness), nearness)
    if blur == "bilateral":
        return np.where(known, bilateral(nearness, 0.5), nearness)
    if blur == "gaussian":
        known &= nearness > EMPTY
        return np.where(known, gaussian(nearness), nearness)
    return nearness


def cross(nearness, size):
    """Dilation by a cross of `size` x `size` pixels."""
    rows = maximum_filter1d(nearness, size, axis=0, mode="nearest")
    return np.maximum(rows, maximum_filter1d(nearness, size, axis=1, mode="nearest"))


def closed(nearness):
    """Dilation and erosion, 5 x 5: closes holes without growing."""
    nearness = maximum_filter(nearness, 5, mode="nearest")
    return minimum_filter(nearness, 5, mode="nearest")


def filled(nearness, size, inside=True):
    """What is empty, and `inside` [H, W], takes the dilation of `size` x `size` pixels."""
    empty = (nearness < EMPTY) & inside
    return np.where(empty, maximum_filter(nearness, size, mode="nearest"), nearness)


def above_top(nearness):
    """Where a pixel is above the topmost known one of its column; nowhere in an empty column."""
    top = (nearness > EMPTY).argmax(0)  # [W]
    return np.arange(len(nearness))[:, None] < top


def extended(nearness):
    """Each column's topmost known value, continued to the top."""
    top = (nearness > EMPTY).argmax(0)[None]  # [1, W]
    return np.where(above_top(nearness), np.take_along_axis(nearness, top, 0), nearness)


def median(nearness):
    """The median of 5 x 5 pixels, empty ones too."""
    return median_filter(nearness, 5, mode="nearest")


def gaussian(nearness):
    """The binomial blur of 5 x 5 pixels, empty ones too."""
    weights = np.array([1, 4, 6, 4, 1]) / 16
    for axis in (0, 1):
        nearness = convolve1d(nearness, weights, axis=axis, mode="mirror")
    return nearness


def bilateral(nearness, sigma):
    """The mean of a disc of 13 pixels, weighed by distance and by likeness.

    sigma: of likeness [m]. That of distance is 2 pixels.
    """
    height, width = nearness.shape
    padded = np.pad(nearness, 2, mode="reflect")
    weights = np.ones_like(nearness)  # the pixel's own; its difference from itself is 0
    shifts = np.zeros_like(nearness)
    for row in range(-2, 3):
        for col in range(-2, 3):
            square = row ** 2 + col ** 2
            if not 0 < square <= 4:
                continue
            other = padded[2 + row:2 + row + height, 2 + col:2 + col + width]
            difference = other - nearness
            weight = np.exp(difference ** 2 * (-0.5 / sigma ** 2) - square / 8)
            weights += weight
            shifts += weight * difference
    return nearness + shifts / weights


# ---- depth maps of scans -------------------------------------------------------------------------

def projected(scan_xyz, cam_from_lidar, intrinsics, raw_size, size):
    """The sparse depth map float32 [h, w] of a scan's points in a camera. The nearest point wins.

    size: (h, w) of the map, of raw_size (H, W). Other arguments: see `data.project`.
    """
    _, pixels, depths = project(scan_xyz, cam_from_lidar, intrinsics, raw_size)
    pixels = pixels * (np.asarray(size) / raw_size)
    nearest = nearest_per_pixel(pixels, depths)
    rows, cols = pixels[nearest].astype(np.int64).T
    sparse = np.zeros(size, np.float32)
    sparse[rows, cols] = depths[nearest]
    return sparse


def map_size(raw_size):
    """(h, w) of the depth map of a picture of raw_size (H, W).

    It is a quarter of a picture of 600 rows or more. IP-Basic's windows are made for 64 beams: in a
    map as large as the picture they do not reach from one of nuScenes' 32 beams to the next. A
    small picture's map is as large as the picture.
    """
    height, width = (int(side) for side in raw_size)
    if height < 600:
        return height, width
    return round(height / 4), round(width / 4)


class LidarDepth:
    """Completed depth maps of the scans that tables name, each one made once and kept on disk.

    Args:
        fill: see `complete`. The blur is bilateral.
        folder: of the files; by default one in the user's cache.
    A file holds half-precision numbers, [h, w] of `map_size`. A scan of another size or date, or
    another calibration, has another file. Several processes may make the same one. A damaged one is
    made anew.
    """

    def __init__(self, fill="fast", folder=None):
        self.fill = fill
        self.folder = Path(folder or caches() / "collaborative-distillation/depth")

    def __call__(self, table, frame, camera):
        """The map [h, w] float32 of a picture, metres, 0 where unknown; 0 in a table without scans.

        Raises InputError where the scan cannot be read or none of its points is in view, and where
        the map cannot be kept.
        """
        if "scan" not in table:
            return np.zeros(map_size(table["image_size"][frame, camera]), np.float32)
        # From the cache, or made
        path = self.path(table, frame, camera)
        depths = kept(path, map_size(table["image_size"][frame, camera]))
        if depths is None:
            # Rounded as the file is, so that the first time is like every other
            depths = self.made(table, frame, camera).astype(HALF)
            store(path, depths)
        return depths.astype(np.float32)

    def path(self, table, frame, camera):
        """The file of a map: its name is a hash of all that the map is made of."""
        scan = os.path.abspath(table.path("scan", frame))
        try:
            status = os.stat(scan)
        except OSError as error:
            raise unreadable(scan, error, "extract the dataset again") from None
        parts = [FORMAT, self.fill, table.name, scan, status.st_size, status.st_mtime_ns]
        for column in ("cam_from_lidar", "intrinsics", "image_size"):
            parts.append(table[column][frame, camera].tolist())
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        return self.folder / key[:2] / f"{key}.zlib"  # a single folder would be slow to list

    def made(self, table, frame, camera):
        """The completed map of a picture [h, w], from its scan."""
        scan = table.reader.scan(table.path("scan", frame))  # [A, 4]
        raw_size = table["image_size"][frame, camera]
        sparse = projected(scan[:, :3], table["cam_from_lidar"][frame, camera],
                           table["intrinsics"][frame, camera], raw_size, map_size(raw_size))
        depths = complete(sparse, self.fill)
        depths = np.where(depths > EMPTY, depths, 0)
        if not depths.any():
            image = table["image"][frame, camera].decode()
            raise InputError(f"{image}: no LiDAR point of its scan ({table['scan'][frame].decode()}"
                             ") is in view and within reach; do scan, image and calibration belong "
                             "together? --on-bad-frame skip takes another picture in its place")
        return depths


def kept(path, size):
    """The map of this size that `store` wrote; None where there is none, or it is damaged."""
    try:
        content = zlib.decompress(path.read_bytes())  # which compares a checksum
        return np.frombuffer(content, HALF).reshape(size)
    except (OSError, zlib.error, ValueError):
        return None


def store(path, depths):
    """Write a map, whole or not at all. Raises InputError where it cannot be kept.

    A file has a name of its own until it is whole, because several processes may write the same
    map.
    """
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            partial = file.name
            file.write(zlib.compress(depths.tobytes()))
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path.parent.parent}: depth maps cannot be kept there "
                         f"({error.strerror}); mend that folder, or set XDG_CACHE_HOME to "
                         "another") from None
    finally:
        if partial:
            with contextlib.suppress(OSError):  # it has been renamed
                os.unlink(partial)


# ---- depth maps of a folder ----------------------------------------------------------------------

class FolderDepth:
    """Depth maps of a folder, one a picture, which any other method may have made.

    That of ROOT/a/b.jpg is FOLDER/a/b.npy, metres as floats [h, w], or FOLDER/a/b.png, millimetres
    in 16 bits, of the picture's own size. 0 is unknown.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def check(self, tables):
        """Raise InputError unless there is a map for every picture and the first can be used.

        Only the first map is read here; another that cannot be used ends the run where it is met.
        """
        if not self.folder.is_dir():
            raise InputError(f"--depth-maps {self.folder}: no such folder; give that of the depth "
                             "maps")
        images = images_of(tables)
        missing = [image for image in images if not self.path(image).is_file()]
        if missing:
            raise InputError(f"--depth-maps {self.folder}: {len(missing)} of {len(images)} "
                             f"pictures have no depth map, the first is {missing[0]}; its map is "
                             f"{self.path(missing[0])} (millimetres in 16 bits) or the same with "
                             ".npy (metres)")
        self(tables[0], tables[0].rows[0], 0)

    def fingerprint(self, tables):
        """What the pictures' maps are: how many, and a hash of the bytes of 16, evenly spread."""
        images = images_of(tables)
        some = images[::max(1, len(images) // 16)][:16]
        return {"maps": len(images), "content": digest(self.path(image).read_bytes()
                                                       for image in some)}

    def __call__(self, table, frame, camera):
        """The map [h, w] float32 of a picture, metres, 0 where unknown.

        Raises InputError where there is none, or none that can be used.
        """
        path = self.path(table["image"][frame, camera].decode())
        depths = read_map(path)
        check_depths(path, depths, table["image_size"][frame, camera])
        return depths

    def path(self, image):
        """The map of an image: .npy where there is one, else .png."""
        path = (self.folder / image).with_suffix(".npy")
        return path if path.is_file() else path.with_suffix(".png")


def images_of(tables):
    """The paths of all pictures of some tables, below their roots."""
    return [image.decode() for table in tables for image in table["image"][table.rows].flat]


def read_map(path):
    """The metres float32 [h, w] of an .npy or .png file. Raises InputError for what is none."""
    content = read_bytes(path, "write a depth map for each picture, or leave --depth-maps out")
    try:
        if path.suffix == ".npy":
            depths = np.load(io.BytesIO(content), allow_pickle=False)
            what = f"{depths.dtype} of shape {depths.shape}"
            fits = depths.ndim == 2 and depths.dtype.kind == "f"
        else:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                what = f"an image of mode {image.mode}"
                fits = image.mode in ("I;16", "I")  # the second: 16 bits in earlier Pillows
                depths = np.array(image) / 1000
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        reason = looks_like(content) or f"no {path.suffix} file"
        if content.startswith(MAGIC[path.suffix]):
            reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: not a readable depth map ({reason}); write it anew") from None
    if not fits:
        raise InputError(f"{path}: {what}, not metres as floats [h, w] (.npy) or millimetres in "
                         "16 bits of grey (.png); write it anew")
    return depths.astype(np.float32)


def check_depths(path, depths, raw_size):
    """Raise InputError for a map of another size than its picture, or one that tells nothing."""
    if depths.shape != tuple(raw_size):
        raise InputError(f"{path}: of another size than its picture, "
                         f"{'x'.join(map(str, depths.shape))} and not "
                         f"{'x'.join(map(str, raw_size))}; write it anew")
    wrong = np.count_nonzero(~(np.isfinite(depths) & (depths >= 0)))
    if wrong:
        raise InputError(f"{path}: {wrong} of {depths.size} depths are negative or not finite; "
                         "write 0 where there is none")
    if not depths.any():
        raise InputError(f"{path}: all depths are 0; write it anew, or take its picture away")

"""Files of a dataset: read, checked, and named where they are damaged or something else.

An InputError says in one line which file it is, what is wrong with it, and the way out. Damage
that leaves a good file of another content cannot be seen here; docs/run.md lists such damage.
"""
import functools
import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from plumbing.errors import InputError, say
from plumbing.files import looks_like, read_bytes
from readers.jpeg import stretches
from readers.paths import MODES
from readers.table import UNKNOWN

AGAIN = "extract it again"


def way_out(guess):
    """A guess of what a file looks like, or "", followed by what helps else."""
    return f"{guess}, or {AGAIN}" if guess else AGAIN


# ---- scans and labels --------------------------------------------------------------------------

# What the columns of a scan may hold. No LiDAR on a car sees as far as 500 m. The rings are the
# beams' numbers: the largest devices have 128 (nuScenes' has 32), and where the columns are mixed
# up, the fifth soon has more.
RANGES = {"x": (-500, 500), "y": (-500, 500), "z": (-500, 500), "intensity": (0, 255),
          "ring": (0, 127)}
NOWHERE = 16  # points at x = y = z = 0: so many are a hole (or points without a return)
MANY = 100  # points in one plane, or of one intensity: so many are no scan

# Layouts in which scans are kept elsewhere: the numbers, and how many a point has
LAYOUTS = {"64-bit floats?": ("<f8", 5), "64-bit floats, four columns?": ("<f8", 4),
           "four columns (KITTI)?": ("<f4", 4), "six columns?": ("<f4", 6),
           "three columns?": ("<f4", 3), "big-endian floats?": (">f4", 5),
           "big-endian floats, four columns?": (">f4", 4), "big-endian 64-bit floats?": (">f8", 5),
           "16-bit floats?": ("<f2", 5)}


def read_scan(path):
    """A nuScenes scan `[N, 4]`: x, y, z [m], intensity 0..255. InputError for what is none."""
    content = read_bytes(path)
    if len(content) % 20 or not content:
        wrong = f"cut short: {len(content)} bytes are not whole points of 5 floats"
    else:
        scan = np.frombuffer(content, "<f4").reshape(-1, 5)
        wrong = "" if plausible(scan) else implausible(scan)
        if not wrong:
            return scan[:, :4]
    guess = looks_like(content) or other_layout(content)
    if not guess and wrong.startswith("intensities"):
        guess = "KITTI's scale? Multiply them by 255"
    raise InputError(f"{path}: {wrong}; {way_out(guess)}")


def plausible(scan):
    """Whether a scan [N, 5] is one at first sight: if so, `implausible` finds nothing in it.

    Each item of data asks this, so it goes over the whole scan as few times as can be.
    """
    least, most = RANGES["z"]  # x and y have the same range
    darkest, brightest = RANGES["intensity"]
    lowest, highest = RANGES["ring"]
    x, intensity, ring = (scan[:, column].copy() for column in (0, 3, 4))  # faster in one piece
    return bool(least <= scan.min() and scan.max() <= most
                and darkest <= intensity.min() and 1 < intensity.max() <= brightest
                and lowest <= ring.min() and ring.max() <= highest
                and np.array_equal(ring, np.rint(ring))
                and np.count_nonzero(x == 0) < NOWHERE
                and (scan[0, :4] != scan[-1, :4]).all())


def implausible(points, ranges=RANGES):
    """What no LiDAR gives in points [N, C >= 3] (x, y, z [m], intensity, ring), in words, or "".

    ranges: of the columns, in their order.
    """
    columns = np.ascontiguousarray(points.T)  # [C, N]
    with np.errstate(invalid="ignore"):
        low, high = columns.min(1), columns.max(1)
    if not np.isfinite([low, high]).all():
        count = np.count_nonzero(~np.isfinite(columns).all(0))
        return f"{count} of {len(points)} points are not finite numbers"
    nowhere = 0
    if np.count_nonzero(columns[0] == 0) >= NOWHERE:
        nowhere = np.count_nonzero(~columns[:3].any(0))
    if nowhere >= NOWHERE:
        return (f"{nowhere} of {len(points)} points are at x = y = z = 0, a hole (points without a "
                "return are to be left out)")
    for name, column, first, last in zip(ranges, columns, low, high):
        least, most = ranges[name]
        if first < least or last > most:
            number = np.argmax((column < least) | (column > most))
            return f"{name} of point {number} is {column[number]:g}, not within {least}..{most}"
        if first == last and len(points) >= MANY and name != "ring":
            return f"{name} of all {len(points)} points is {first:g}"
    if len(columns) == 5:
        ring = columns[4]
        if not np.array_equal(ring, np.rint(ring)):
            number = np.argmax(ring != np.rint(ring))
            return f"ring of point {number} is {ring[number]:g}, not a whole number"
        if 0 < high[3] <= 1 and (columns[3] % 1).any():
            return f"intensities of 0..{high[3]:g}, not 0..255"
    return ""


def other_layout(content, layouts=LAYOUTS, columns="x, y, z, intensity, ring"):
    """In which of these layouts a file holds plausible points, and what to do, in words, or "".

    columns: those that it should have.
    """
    for name, (kind, count) in layouts.items():
        if content and len(content) % (count * np.dtype(kind).itemsize) == 0:
            points = np.frombuffer(content, kind).reshape(-1, count)[:, :4]
            if not implausible(points) and np.abs(points[:, :3]).max() > 1:
                return f"{name} Write 32-bit little-endian floats {columns}"
    return ""


def wider_labels(size, count):
    """How many bits a label seems to have in a file of `size` bytes for `count` points; "" if 8."""
    bits = 8 * size / max(1, count)
    return f"{bits:.0f}-bit labels? Write one byte a point" if bits in (16, 32, 64) else ""


def read_labels(path, coarse, count=None):
    """Classes of a lidarseg file `[count]`, one byte a point; coarse: [256], each byte's class."""
    content = read_bytes(path)
    fine = np.frombuffer(content, np.uint8)
    if count is not None and len(fine) != count:
        guess = looks_like(content) or wider_labels(len(fine), count)
        raise InputError(f"{path}: {len(fine)} labels for {count} points; {way_out(guess)}")
    classes = coarse[fine]
    unknown = fine[classes == UNKNOWN]
    if len(unknown):
        raise InputError(f"{path}: label {unknown[0]} is of no category of this dataset; "
                         "extract lidarseg and its tables again")
    return classes


# ---- images ------------------------------------------------------------------------------------

def read_image(path, size, raw_size=None):
    """The image, bilinearly resized with antialiasing to `size` = (H, W): uint8 [3, H, W].

    A large JPEG is decoded at 1/2, 1/4 or 1/8 of its resolution, the smallest that is still 1.5
    times `size`. This is faster and gives nearly the same picture (experiments/bench.py prints how
    nearly). raw_size and errors: see `decoded`.
    """
    image = decoded(path, (3 * size[0] // 2, 3 * size[1] // 2), raw_size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W]
    # This is PIL's bilinear resize to one level of 255, and faster
    small = F.interpolate(pixels[None], tuple(size), mode="bilinear", antialias=True)
    return small[0]


def decoded(path, least, raw_size=None):
    """The image in Pillow's RGB; a JPEG at 1/2, 1/4 or 1/8 if that still has `least` = (H, W).

    raw_size: (H, W) that it must have, or None. Raises InputError for another size, for anything
    but 8-bit RGB or grey, and for damage.
    """
    content = read_bytes(path)
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if raw_size is not None and (height, width) != (raw_size[0], raw_size[1]):
                raise InputError(f"{path}: {height}x{width} pixels, the tables say "
                                 f"{raw_size[0]}x{raw_size[1]}; {AGAIN}")
            if image.mode not in MODES:
                raise InputError(f"{path}: an image of mode {image.mode}, not 8-bit RGB; its "
                                 f"colours would be guessed. Convert it, or {AGAIN}")
            image.draft("RGB", (least[1], least[0]))
            if image.format in ("JPEG", "MPO") and can_be_watched():  # MPO: a JPEG and others
                decode_jpeg(image, content)
            image.load()
            if image.format == "PNG":  # decoding compares no checksums
                with Image.open(io.BytesIO(content)) as again:
                    again.verify()
            return image if image.mode == "RGB" else image.convert("RGB")
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError:
        guess = way_out(looks_like(content))
        raise InputError(f"{path}: not a readable image (of no known format); {guess}") from None
    except Exception as error:  # a damaged file can raise nearly anything
        reason = f"{path}: not a readable image ({error}); {AGAIN}".replace("\n", " ")
        raise InputError(reason) from None


def labelled_pixels(labels, size):
    """The pixels of an image that have a class, at the size (H, W): {name: [N, ...]}.

    labels: uint8 [h, w], 0 where there is none. To the size by the nearest pixel.
    """
    labels = np.array(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))
    pixels = np.argwhere(labels > 0)
    return {"pixels": pixels.astype(np.float64), "labels": labels[tuple(pixels.T)].astype(np.int64)}


# ---- JPEG --------------------------------------------------------------------------------------
# Where a JPEG is damaged, libjpeg only warns, and Pillow does not show the warning: the rest of the
# picture is grey, shifted or of other colours. What libjpeg warns of is seen here from outside.

TOO_FEW = "cut short, or damaged: its data end before the picture does"


def decode_jpeg(image, content):
    """Load an opened JPEG as image.load() does, but raise ValueError where libjpeg would warn.

    While libjpeg decodes, it takes eight bytes at once from what it has been given, or none. When
    it has all of a stretch (a scan, or the part of one between two restarts), it looks for the
    next marker, and drops at once each byte that is none. So the last byte of a stretch is kept
    back: if the byte before is dropped, damage has left more data than the picture needs. And
    after the last byte and some filling, a byte has to be dropped, or there are too few data.
    """
    if any(0 in table for table in image.quantization.values()):
        raise ValueError("damaged: a hole in its tables")
    ends, single = stretches(content)

    # As image.load() sets the decoder up
    image.load_prepare()
    (tile,) = image.tile
    name, extents, _, args = tile
    decoder = Image._getdecoder(image.mode, name, args, image.decoderconfig)
    decoder.setimage(image.im, extents)
    kept = b""    # what the decoder has been given and has not taken
    done = False  # whether it has the whole picture

    def drops(*parts):
        """Give the decoder these; whether it drops the last one, or has the picture already."""
        nonlocal kept, done
        for part in parts:
            if done:
                return True
            before = kept
            kept += part
            taken, error = decoder.decode(kept)
            if error:
                raise ValueError("a broken data stream")
            done = taken < 0
            kept = kept[max(taken, 0):]
        return done or not (before or kept)

    # Stretch by stretch: all but its last byte, the last of these alone;
    # then its last byte with the filling, and one byte more
    at = 0
    try:
        for end, filling in ends:
            if drops(content[at:end - 2], content[end - 2:end - 1]):
                raise ValueError("damaged: its data are for more than the picture")
            if not drops(content[end - 1:end] + filling, b"\0"):
                raise ValueError(TOO_FEW)
            at = end
        if not single:
            drops(content[at:])
        if not done:
            raise ValueError(TOO_FEW)
    finally:
        decoder.cleanup()
    image.tile = []  # it is loaded


@functools.cache
def can_be_watched():
    """Whether `decode_jpeg` tells good JPEGs from damaged ones with the libjpeg that is here.

    It uses a private function of Pillow and habits of libjpeg, which another build may not have.
    No good picture may be refused there, so it is tried once in a process.
    """
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    found = []
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 3}):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "JPEG", quality=90, **options)
        whole = file.getvalue()
        too_few = whole[:-300] + whole[-2:]
        too_many = whole[:-2] + bytes(range(90)) + whole[-2:]
        for content in (whole, too_few, too_many):
            try:
                with Image.open(io.BytesIO(content)) as image:
                    decode_jpeg(image, content)
                found.append(True)
            except MemoryError:  # says nothing of Pillow
                raise
            except Exception:  # whatever another version of Pillow makes of it
                found.append(False)
    known = found == [True, False, False] * 3
    if not known:
        say(f"Pillow {Image.__version__}: damaged JPEGs are not found out, its decoder is an "
            "unknown one")
    return known

"""Files of a dataset: read, checked, and named where they are damaged or something else.

An InputError says in one line which file it is, what is wrong with it, and the way out. Damage
after which a file is a good one of another content cannot be seen here; README.md lists it.
"""
import errno
import functools
import io
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from errors import FILES, MEMORY, InputError, say
from index import UNKNOWN

AGAIN = "extract it again"


# ---- what the system says, and what a file looks like ------------------------------------------

WAYS_OUT = {
    errno.EMFILE: FILES, errno.ENFILE: FILES, errno.ENOMEM: MEMORY,
    errno.EACCES: "give the user of this run the right to read it",
    errno.EPERM: "give the user of this run the right to read it",
    errno.EISDIR: "a file is needed here",
    errno.EIO: "the disk or the network fails, see `dmesg`; repair that first"}

# How files begin that often stand in another's place: what they are, and what to do.
BEGINNINGS = {
    b"version https://git-lfs": "a Git-LFS pointer? Get the file itself with `git lfs pull`",
    b"<!doctype html": "a web page? Download the file again, logged in if that is asked for",
    b"<html": "a web page? Download the file again, logged in if that is asked for",
    b"<?xml": "an error message of a server? Download the file again",
    b"\x1f\x8b": "a gzip archive? Unpack it",
    b"pk\3\4": "a zip archive (.npz)? Unpack it",
    b"\x93numpy": "NumPy's format (.npy)? Write the numbers alone: numpy.load(FILE).tofile(...)",
    b"# .pcd": "a PCD file with a header? Convert it"}


def read_bytes(path, missing="extract the dataset again"):
    """The bytes of a file; `missing`: the way out where it is not there."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error, missing) from None


def unreadable(path, error, missing):
    """The InputError for an OSError, which is the system's and seldom the file's fault."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return InputError(f"{path}: no such file; {missing}")
    way = WAYS_OUT.get(error.errno, "the system cannot read it now; repair that first")
    return InputError(f"{path}: {error.strerror or error}; {way}")


def looks_like(content):
    """What bytes that cannot be read look like, and what to do, in words; "" if like nothing."""
    head = content[:1000].lstrip().lower()
    for beginning, meaning in BEGINNINGS.items():
        if head.startswith(beginning):
            return meaning
    if content[8:10] == b'{"':
        return ("a safetensors file? Convert it once: "
                "torch.save(safetensors.torch.load_file(FILE), 'weights.pth')")
    if content and content.count(0) == len(content):
        return "zeros only, of a copy that was broken off? Copy it again"
    if head and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "text? Convert it to binary"
    return ""


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

# Layouts in which scans are kept elsewhere: the numbers, and how many a point has.
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
    (least, most), (darkest, brightest), (lowest, highest) = [*RANGES.values()][2:]
    x, intensity, ring = (scan[:, column].copy() for column in (0, 3, 4))  # faster in one piece
    return bool(least <= scan.min() and scan.max() <= most
                and darkest <= intensity.min() and 1 < intensity.max() <= brightest
                and lowest <= ring.min() and ring.max() <= highest
                and np.array_equal(ring, np.rint(ring))
                and np.count_nonzero(x == 0) < NOWHERE
                and (scan[0, :4] != scan[-1, :4]).all())


def implausible(points):
    """What no LiDAR gives in points [N, C >= 3] (x, y, z [m], intensity, ring), in words, or ""."""
    columns = np.ascontiguousarray(points.T)  # [C, N]
    with np.errstate(invalid="ignore"):
        low, high = columns.min(1), columns.max(1)
    if not np.isfinite([low, high]).all():
        count = np.count_nonzero(~np.isfinite(columns).all(0))
        return f"{count} of {len(points)} points are not finite numbers"
    nowhere = np.count_nonzero(columns[0] == 0)
    if nowhere >= NOWHERE and (nowhere := np.count_nonzero(~columns[:3].any(0))) >= NOWHERE:
        return (f"{nowhere} of {len(points)} points are at x = y = z = 0, a hole (points without a "
                "return are to be left out)")
    for (name, (least, most)), column, first, last in zip(RANGES.items(), columns, low, high):
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


def other_layout(content):
    """In which of LAYOUTS a file holds plausible points, and what to do, in words, or ""."""
    for name, (kind, count) in LAYOUTS.items():
        if content and len(content) % (count * np.dtype(kind).itemsize) == 0:
            points = np.frombuffer(content, kind).reshape(-1, count)[:, :4]
            if not implausible(points) and np.abs(points[:, :3]).max() > 1:
                return f"{name} Write 32-bit little-endian floats x, y, z, intensity, ring"
    return ""


def wider_labels(size, count):
    """How many bits a label seems to have in a file of so many bytes for so many points; "" if 8."""
    bits = 8 * size / max(1, count)
    return f"{bits:.0f}-bit labels? Write one byte a point" if bits in (16, 32, 64) else ""


def read_labels(path, coarse, count):
    """Classes `[count]` (index into index.CLASSES, 0 ignored) of a lidarseg file."""
    content = read_bytes(path)
    fine = np.frombuffer(content, np.uint8)
    if len(fine) != count:
        guess = looks_like(content) or wider_labels(len(fine), count)
        raise InputError(f"{path}: {len(fine)} labels for {count} points; {way_out(guess)}")
    classes = coarse[fine]
    if (unknown := classes == UNKNOWN).any():
        raise InputError(f"{path}: label {fine[unknown][0]} is of no category of this dataset; "
                         "extract lidarseg and its tables again")
    return classes


# ---- images ------------------------------------------------------------------------------------

def read_image(path, size, raw_size=None):
    """The image resized to `size` = (H, W), bilinear with antialiasing: uint8 `[3, H, W]`.

    raw_size: (H, W) that it must have, or None. Raises InputError for another size, for anything
    but 8-bit RGB or grey, and for damage. A JPEG of at least three times the size is decoded at a
    half (a quarter, an eighth) of its resolution, in which it is still one and a half times the
    size or more: faster, and nearly the same picture (experiments/bench.py prints how nearly).
    """
    content = read_bytes(path)
    try:
        with Image.open(io.BytesIO(content)) as image:
            if raw_size is not None and image.size != (raw_size[1], raw_size[0]):
                raise InputError(f"{path}: {image.size[1]}x{image.size[0]} pixels, the tables say "
                                 f"{raw_size[0]}x{raw_size[1]}; {AGAIN}")
            if image.mode not in ("RGB", "L"):
                raise InputError(f"{path}: an image of mode {image.mode}, not 8-bit RGB; its "
                                 f"colours would be guessed. Convert it, or {AGAIN}")
            image.draft("RGB", (3 * size[1] // 2, 3 * size[0] // 2))
            if image.format in ("JPEG", "MPO") and can_be_watched():  # MPO: a JPEG and others
                decode_jpeg(image, content)
            image = image if image.mode == "RGB" else image.convert("RGB")
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, H, W]
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError:
        guess = way_out(looks_like(content))
        raise InputError(f"{path}: not a readable image (of no known format); {guess}") from None
    except Exception as error:  # a damaged file can raise nearly anything
        reason = f"{path}: not a readable image ({error}); {AGAIN}".replace("\n", " ")
        raise InputError(reason) from None
    # PIL's bilinear resize to one level of 255, and faster.
    small = F.interpolate(pixels[None], tuple(size), mode="bilinear", antialias=True)
    return small[0].numpy()


# ---- JPEG --------------------------------------------------------------------------------------
# Where a JPEG is damaged, libjpeg only warns, and Pillow does not even that: the rest of the
# picture is grey, shifted or of other colours. What libjpeg warns of is seen here from outside.

EOI, SOS, DHT, DRI, RESTARTS = 0xD9, 0xDA, 0xC4, 0xDD, range(0xD0, 0xD8)
MARKER = re.compile(rb"\xff[^\0\xff]")              # and not data, nor filling before another
ALONE = {0x01, 0xD8, EOI, *RESTARTS}                # they have no length and no content
FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
BASELINE, HUFFMAN = {0xC0, 0xC1}, {0xC0, 0xC1, 0xC2}  # of the frames: one scan will do; coding
HOLE = bytes(16)                                    # has eight zeros at a place that is whole
TOO_FEW = "cut short, or damaged: its data end before the picture does"
ZEROS, ONES = bytes(8), b"\xff\0" * 8              # 64 bits as data


def decode_jpeg(image, content):
    """Load an opened JPEG as image.load() does, but raise ValueError where libjpeg would warn.

    While libjpeg decodes, it takes eight bytes at once from what it has been given, or none. When
    it has all of a stretch (a scan, or the part of one between two restarts), it looks for the
    next marker, and drops each byte that is none at once. So the last byte of a stretch is kept
    back: if the one before is dropped, there are more data than picture, from damage before it.
    And after the last byte and some filling, a byte has to be dropped, or there are too few data.
    """
    if any(0 in table for table in image.quantization.values()):
        raise ValueError("damaged: a hole in its tables")
    ends, single = stretches(content)
    image.load_prepare()
    (name, extents, _, args), = image.tile
    decoder = Image._getdecoder(image.mode, name, args, image.decoderconfig)
    decoder.setimage(image.im, extents)
    kept, done, at = b"", False, 0  # kept: what the decoder has been given and has not taken

    def drops(*parts):
        """Give the decoder these; whether it has no use for the last one, or none at all."""
        nonlocal kept, done
        for part in parts:
            if done:
                return True
            before, kept = kept, kept + part
            taken, error = decoder.decode(kept)
            if error:
                raise ValueError("a broken data stream")
            done, kept = taken < 0, kept[max(taken, 0):]
        return done or not (before or kept)

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

    It uses a private function of Pillow and habits of libjpeg, so it is tried once in a process:
    where another build has others, no good picture may be refused.
    """
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    found = []
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 3}):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "JPEG", quality=90, **options)
        whole = file.getvalue()
        for content in (whole, whole[:-300] + whole[-2:], whole[:-2] + bytes(range(90)) + whole[-2:]):
            try:
                with Image.open(io.BytesIO(content)) as image:
                    decode_jpeg(image, content)
                found.append(True)
            except Exception:  # whatever another version of Pillow makes of it
                found.append(False)
    if found != [True, False, False] * 3:
        say(f"Pillow {Image.__version__}: damaged JPEGs are not found out, its decoder is an unknown one")
    return found == [True, False, False] * 3


def stretches(content):
    """The stretches of compressed data in a JPEG, and whether all are of a single scan.

    A stretch is (its end, what to fill it up with: bits that are no code, or one of which a block
    takes many). There are none unless the data are Huffman-coded. Raises ValueError for holes in
    them and in the tables, and for restarts out of order. A short hole can leave all else in
    order, and coded data have no long runs of zeros, unless zeros say that nothing follows.
    """
    found, codes, begin, coded, restarts, scans, frame = [], {}, None, False, 0, 0, None
    zeros = 0 in np.frombuffer(content, np.uint64, len(content) // 8)  # else there is no hole
    for mark, kind, payload in segments(content):
        if begin is not None:
            end = mark
            while content[end - 1] == 255:  # a marker may have any number of these before it
                end -= 1
            found.append((end, ZEROS if coded else ONES))
            if zeros and coded and content.find(HOLE, begin, end) >= 0:
                raise ValueError("damaged: a hole of zeros in its data")
        begin = None
        if kind in FRAMES:
            frame = kind
        elif kind == DHT:
            codes |= codes_of_zeros(payload)
        elif kind == SOS:
            *_, last, bits = payload  # bits: of a progressive one, refined ones are not coded
            tables = [16 | table & 15 for table in payload[2:2 * payload[0] + 1:2]]
            coded = last > 0 and bits < 16 and any(codes.get(table, 0) & 15 for table in tables)
            begin, restarts, scans = mark + 4 + len(payload), 0, scans + 1
        elif kind in RESTARTS:
            if kind != RESTARTS[restarts % 8]:
                raise ValueError("damaged: a restart is missing")
            begin, restarts = mark + 2, restarts + 1
    return (found, scans == 1 and frame in BASELINE) if frame in HUFFMAN else ([], False)


def segments(content):
    """A JPEG's segments up to its end: (place of the marker, marker, payload)."""
    end, data, several, parts = 0, False, False, 0  # several: there are more scans, or restarts
    while found := MARKER.search(content, end):
        mark = found.start()
        if not data and content[end:mark].strip(b"\xff"):
            raise ValueError("damaged: bytes between its segments")
        kind, end = content[mark + 1], mark + 2
        if kind not in ALONE:
            end += int.from_bytes(content[end:end + 2], "big")
        payload = content[mark + 4:end]
        yield mark, kind, payload
        data = kind == SOS or kind in RESTARTS
        if kind in FRAMES:
            several, parts = several or kind not in BASELINE, payload[5]
        several |= kind == DRI or kind == SOS and payload[0] < parts
        if kind == SOS and not several:
            end = end_of_picture(content, end)
        elif kind == EOI:
            return


def end_of_picture(content, begin):
    """Place of the first end marker, or of the last byte: as MARKER would find, but faster."""
    places = [len(content) - 1]
    for start in (begin, begin + 1):
        pairs = np.frombuffer(content, "<u2", (len(content) - start) // 2, start)
        if (is_end := pairs == EOI << 8 | 0xFF).any():
            places.append(start + 2 * int(is_end.argmax()))
    return min(places)


def codes_of_zeros(payload):
    """{table: symbol whose code is all zeros} of a DHT segment; ValueError for a hole in it."""
    found = {}
    while payload:
        count = sum(payload[1:17])
        symbols = payload[17:17 + count]
        if symbols.count(0) > 1:  # each is there once
            raise ValueError("damaged: a hole in its tables")
        found[payload[0]] = symbols[0] if symbols else 0
        payload = payload[17 + count:]
    return found

"""Files that open but are damaged or something else are refused in a line; good ones are read."""
import errno
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
from readers import files
from data import CLOUD, Frames
from errors import InputError
from experiments import bench
from readers.files import TOO_FEW, read_image, read_labels, read_scan
from index import load_index


def refusal(read, path, *arguments):
    """The message with which `read` refuses a file: one line that begins with its name."""
    with pytest.raises(InputError) as error:
        read(path, *arguments)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value)


# ---- JPEG --------------------------------------------------------------------------------------

SIZE = (96, 160)
NOISE = np.random.default_rng(0).normal(0, 8, (*SIZE, 3))
COARSE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 10, 3), dtype=np.uint8))
STREET = np.clip(np.asarray(COARSE.resize(SIZE[::-1])) + NOISE, 0, 255).astype(np.uint8)
SLOPE = np.linspace(120, 0, 96).astype(np.uint8)[:, None, None]
PICTURES = {"a street": STREET, "one colour": np.full_like(STREET, 77),
            "half black": np.where(np.arange(160)[:, None] < 80, STREET, np.uint8(0)),
            "half grey": np.where(np.arange(96)[:, None, None] < 48, STREET, np.uint8(128)),
            "a slope below": np.where(np.arange(96)[:, None, None] < 16, STREET, SLOPE)}
KINDS = {"baseline": {}, "fine": {"quality": 100, "subsampling": 0}, "coarse": {"quality": 10},
         "4:2:2": {"subsampling": 1}, "tables of its own": {"optimize": True},
         "coarse, with its own": {"quality": 10, "optimize": True}, "grey": {"mode": "L"},
         "progressive": {"progressive": True}, "rows": {"restart_marker_rows": 1},
         "restarts": {"restart_marker_blocks": 3},
         "restarts, progressive": {"restart_marker_blocks": 7, "progressive": True}}


def jpeg(kind="baseline", picture="a street"):
    options = {"mode": "RGB", "quality": 90, "exif": b"Exif\0\0" + bytes(300)} | KINDS[kind]
    file = io.BytesIO()
    Image.fromarray(PICTURES[picture]).convert(options.pop("mode")).save(file, "JPEG", **options)
    return file.getvalue()


def test_a_pillow_that_cannot_be_watched_refuses_no_good_picture(tmp_path, monkeypatch, capsys):
    assert files.can_be_watched()
    (tmp_path / "a.jpg").write_bytes(jpeg())
    before = read_image(tmp_path / "a.jpg", (24, 40), SIZE)
    monkeypatch.setattr(files, "decode_jpeg", lambda image, content: image._getdecoder())
    files.can_be_watched.cache_clear()
    try:
        assert not files.can_be_watched()
        assert "damaged JPEGs are not found out" in capsys.readouterr().out
        assert np.array_equal(read_image(tmp_path / "a.jpg", (24, 40), SIZE), before)
    finally:
        files.can_be_watched.cache_clear()


def scan_by_scan():
    """A JPEG of three scans without progression, of a colour each: three grey ones in one."""
    grey = []
    for channel in range(3):
        file = io.BytesIO()
        Image.fromarray(STREET[:, :, channel]).save(file, "JPEG")
        grey.append(file.getvalue())
    frame, start = grey[0].index(b"\xff\xc0"), grey[0].index(b"\xff\xda")
    parts = b"\3\1\x11\0\2\x11\0\3\x11\0"
    head = grey[0][:frame] + b"\xff\xc0\0\x11" + grey[0][frame + 4:frame + 9] + parts
    head += grey[0][frame + 13:start]
    scans = [grey[n][start:start + 5] + bytes([n + 1]) + grey[n][start + 6:-2] for n in range(3)]
    return head + b"".join(scans) + b"\xff\xd9"


def loaded(content, size, load):
    image = Image.open(io.BytesIO(content))
    image.draft("RGB", size)
    load(image)
    return np.array(image)


def assert_decoded_as_pillow_does(content, *sizes):
    for size in sizes:
        ours = loaded(content, size, lambda image: files.decode_jpeg(image, content))
        assert np.array_equal(ours, loaded(content, size, lambda image: image.load()))


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_good_jpegs_are_decoded_as_pillow_does(kind, picture):
    content = jpeg(kind, picture)
    more_behind = content + b"x\xff\xd9\xff\xd8" + bytes(99)
    filled = content[:-2] + b"\xff" * 4 + b"\xd9"
    for variant in (content, more_behind, filled):
        assert_decoded_as_pillow_does(variant, SIZE[::-1], (40, 24))  # whole, and at a quarter


def test_zeros_are_no_hole_where_they_say_that_nothing_follows():
    content = jpeg("progressive", "one colour")
    tables = jpeg()[jpeg().index(b"\xff\xc4"):jpeg().index(b"\xff\xda")]  # its own follow later on
    assert_decoded_as_pillow_does(content.replace(b"\xff\xc4", tables + b"\xff\xc4", 1), SIZE[::-1])


def test_colours_may_come_one_after_the_other(tmp_path):
    assert_decoded_as_pillow_does(scan_by_scan(), SIZE[::-1])
    (tmp_path / "image.jpg").write_bytes(hole(scan_by_scan(), 4000, 600))
    refusal(read_image, tmp_path / "image.jpg", SIZE)


def test_the_real_images_are_decoded_as_pillow_does(real):
    paths = sorted((real / "samples").glob("CAM_*/*.jpg"))
    for path in paths:
        assert_decoded_as_pillow_does(path.read_bytes(), (672, 336))
    assert len(paths) == 6


def frame_of(content):
    """Where the segment with a JPEG's height and width begins."""
    return re.search(rb"\xff[\xc0\xc2]\0[\x0b\x11]\x08", content).start()


def taller(content, rows):
    """The same data for a picture of other height."""
    at = frame_of(content) + 5
    return content[:at] + (SIZE[0] + rows).to_bytes(2, "big") + content[at + 2:]


def wider(content, columns):
    """The same data for a picture of other width."""
    at = frame_of(content) + 7
    return content[:at] + columns.to_bytes(2, "big") + content[at + 2:]


def hole(content, begin, length):
    return content[:begin] + bytes(length) + content[begin + length:]


def without_restart(content, number):
    """Without the data between two restarts."""
    marks = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", content)]
    return content[:marks[number - 1]] + content[marks[number]:]


def inside(content, part):
    """A place in the compressed data."""
    begin = content.rindex(b"\xff\xda") + 14
    return begin + int(part * (len(content) - 2 - begin))


def in_the_middle(change):
    """A harm from 30 to 50 % of the compressed data: change(the data there) -> other data."""
    def harm(content):
        begin, end = inside(content, 0.3), inside(content, 0.5)
        return content[:begin] + change(content[begin:end]) + content[end:]
    return harm


def in_the_codes(content):
    """A hole in the rarer half of what the last table has codes for."""
    begin = content.rindex(b"\xff\xc4")
    end = begin + 2 + int.from_bytes(content[begin + 2:begin + 4], "big")
    return hole(content, (begin + 21 + end) // 2, end - (begin + 21 + end) // 2)


HARMS = {
    "a hole": (in_the_middle(lambda b: bytes(len(b))), "damaged"),
    "bytes missing": (lambda b: b[:inside(b, 0.2)] + b[inside(b, 0.7):], "damaged"),
    "bytes of another file": (in_the_middle(lambda b: np.random.default_rng(2).bytes(len(b))),
                              "damaged|broken"),
    "an end": (in_the_middle(lambda b: b"\xff\xd9" + b), TOO_FEW),
    "a marker": (in_the_middle(lambda b: b"\xff\x99" + b), "damaged|broken"),
    "too few rows": (lambda b: taller(b, 16), TOO_FEW),
    "too many rows": (lambda b: taller(b, -16), "damaged: its data are for more than the picture"),
    "no end": (lambda b: b[:-2], TOO_FEW),
    "half of it": (lambda b: b[:len(b) // 2], TOO_FEW),
    "a hole between segments": (lambda b: hole(b, b.index(b"\xff\xe0") + 18, 310),
                                "damaged: bytes between its segments"),
    "a hole in the steps": (lambda b: hole(b, b.index(b"\xff\xdb") + 20, 30),
                            "damaged: a hole in its tables"),
    "a hole in the codes": (in_the_codes, "damaged: a hole in its tables"),
    "a hole in the first scan": (lambda b: hole(b, b.index(b"\xff\xda") + 20, 60), "damaged"),
    "a coding unknown": (lambda b: b[:frame_of(b) + 1] + b"\xc5" + b[frame_of(b) + 2:], "broken")}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_jpegs_are_refused(tmp_path, kind, harm):
    change, words = HARMS[harm]
    (tmp_path / "image.jpg").write_bytes(change(jpeg(kind)))
    message = refusal(read_image, tmp_path / "image.jpg", SIZE)
    assert re.search(words if kind == "baseline" else "damaged|broken", message)


@pytest.mark.parametrize("kind, picture, columns", [
    ("grey", "a street", 8), ("baseline", "a street", 16),
    ("coarse, with its own", "one colour", 32)])
def test_a_block_too_few_is_seen(tmp_path, kind, picture, columns):
    """Two of them, where a block can take two bits."""
    path, options = tmp_path / "image.jpg", {"mode": "RGB", "quality": 90} | KINDS[kind]
    Image.fromarray(PICTURES[picture][:8]).convert(options.pop("mode")).save(path, **options)
    read_image(path, SIZE)
    path.write_bytes(wider(path.read_bytes(), 160 + columns))
    assert TOO_FEW in refusal(read_image, path, SIZE)


@pytest.mark.parametrize("number", [3, -1])
def test_a_restart_that_is_missing(tmp_path, number):
    (tmp_path / "image.jpg").write_bytes(without_restart(jpeg("restarts"), number))
    assert "damaged: " in refusal(read_image, tmp_path / "image.jpg", SIZE)


@pytest.mark.parametrize("kind", ["baseline", "tables of its own", "grey"])
def test_a_hole_is_seen_where_all_else_is_in_order(tmp_path, monkeypatch, kind):
    content, path, silent = jpeg(kind), tmp_path / "image.jpg", 0
    for part in np.linspace(0.02, 0.95, 25):
        path.write_bytes(hole(content, inside(content, part), 16))
        with monkeypatch.context() as without:
            without.setattr(files, "HOLE", bytes(10**6))
            try:
                wrong = np.abs(read_image(path, SIZE) - STREET.transpose(2, 0, 1).astype(int))
                silent += wrong.mean() > 10
            except InputError:
                pass
        refusal(read_image, path, SIZE)
    assert silent > 0  # libjpeg would have said nothing


# ---- scans and labels --------------------------------------------------------------------------

def some_scan(count=1000):
    rng = np.random.default_rng(3)
    columns = [rng.uniform(-90, 90, (count, 2)), rng.uniform(-3, 15, count),
               rng.integers(0, 256, count), rng.integers(0, 32, count)]
    return np.column_stack(columns).astype(np.float32)


def changed(columns, change):
    def harm(scan):
        scan[:, columns] = change(scan[:, columns])
        return scan
    return harm


def at(point, column, value):
    def harm(scan):
        scan[point, column] = value
        return scan
    return harm


SCANS = {
    "64-bit floats": (lambda s: s.astype("<f8"), "64-bit floats? Write 32-bit"),
    "64-bit floats of four": (lambda s: s[:, :4].astype("<f8"), "64-bit floats, four columns?"),
    "four columns": (lambda s: s[:, :4], r"four columns (KITTI)? Write 32-bit"),
    "four columns, cut short": (lambda s: s[:999, :4], "four columns (KITTI)?"),
    "three columns": (lambda s: s[:, :3], "three columns?"),
    "six columns": (lambda s: s[:, [0, 1, 2, 3, 4, 0]], "six columns?"),
    "big-endian": (lambda s: s.astype(">f4"), "big-endian floats? Write 32-bit little-endian"),
    "big-endian 64-bit": (lambda s: s.astype(">f8"), "big-endian 64-bit floats?"),
    "16-bit floats": (lambda s: s.astype("<f2"), "16-bit floats?"),
    "integers": (lambda s: s.astype("<i4"), "not finite|not a whole number|not within"),
    "text": (lambda s: str(s.tolist())[:10_000].encode(), "text? Convert it to binary"),
    "a good one": (lambda s: s, None),
    "15 points nowhere": (at(slice(500, 515), slice(3), 0), None),
    "a small hole": (at(slice(500, 516), slice(5), 0), "16 of 1000 points are at x = y = z = 0"),
    "a hole": (lambda s: hole(s.tobytes(), 10_001, 512), "2[56] of 1000 points are at x"),
    "zeros to the end": (at(slice(500, 1000), slice(5), 0), "500 of 1000 points are at x ="),
    "only zeros": (lambda s: bytes(20000), "zeros only, of a copy that was broken off?"),
    "points without a return": (at(slice(0, 1000, 3), slice(3), 0), "334 of 1000 .* be left out"),
    "KITTI's scale": (changed(3, lambda i: i / 255),
                      "intensities of 0..1, not 0..255; KITTI's scale? Multiply them by 255"),
    "16-bit intensities": (changed(3, lambda i: 257 * i), "intensity of point 0 .* not within 0"),
    "a negative intensity": (at(7, 3, -1), "intensity of point 7 is -1, not within 0..255"),
    "one intensity": (changed(3, lambda i: 0 * i + 9), "intensity of all 1000 points is 9"),
    "a flat world": (changed(2, lambda z: 0 * z), "z of all 1000 points is 0"),
    "millimetres": (changed(slice(3), lambda xyz: 1000 * xyz), "x of point 0 is .* not within"),
    "one point far away": (at(999, 1, 501), "y of point 999 is 501, not within -500..500"),
    "one far below": (at(5, 2, -1e30), r"z of point 5 is -1e\+30"),
    "half a ring": (at(8, 4, 3.5), "ring of point 8 is 3.5, not a whole number"),
    "a negative ring": (at(8, 4, -1), "ring of point 8 is -1, not within 0..127"),
    "a large ring": (at(8, 4, 128), "ring of point 8 is 128, not within 0..127"),
    "intensity and ring": (lambda s: s[:, [0, 1, 2, 4, 3]], "ring of point .*, not within 0..127"),
    "intensity first": (lambda s: s[:, [3, 0, 1, 2, 4]], "not within"),
    "moved by a number": (lambda s: np.roll(s.ravel(), 1), "not within"),
    "no number": (at(3, 4, np.nan), "1 of 1000 points are not finite numbers"),
    "no finite one": (at(3, 0, -np.inf), "1 of 1000 points are not finite numbers"),
    "all dark": (changed(3, lambda i: np.minimum(i, 1)), None),
    "nothing": (lambda s: b"", "cut short: 0 bytes are not whole points of 5 floats; extract it"),
    "a point in part": (lambda s: s.tobytes()[:-3],
                        "cut short: 19997 bytes are not whole points of 5 floats; extract it")}


@pytest.mark.parametrize("harm", SCANS)
def test_scans(tmp_path, harm):
    change, words = SCANS[harm]
    content = change(some_scan())
    content = content if isinstance(content, bytes) else np.ascontiguousarray(content).tobytes()
    (tmp_path / "scan.bin").write_bytes(content)
    if words is None:
        assert read_scan(tmp_path / "scan.bin").tobytes() == change(some_scan())[:, :4].tobytes()
    else:
        message = refusal(read_scan, tmp_path / "scan.bin")
        assert words in message or re.search(words, message)
        assert message.endswith("extract it again")


def test_good_scans_are_read(world, real):
    for root in (world, real):
        paths = list((root / "samples/LIDAR_TOP").iterdir())
        for path in paths:
            scan = np.fromfile(path, np.float32).reshape(-1, 5)
            assert np.array_equal(read_scan(path), scan[:, :4])
            alike = (scan[0, :4] == scan[-1, :4]).any()  # then there is a closer look
            assert files.plausible(scan) or alike
        assert paths


@pytest.mark.parametrize("kind, words", [("<u2", "40 labels for 20 points; 16-bit labels?"),
                                         ("<u4", "80 labels for 20 points; 32-bit labels?"),
                                         ("<i8", "64-bit labels? Write one byte a point, or ")])
def test_wider_labels_are_named(tmp_path, kind, words):
    path, coarse = tmp_path / "labels.bin", np.zeros(256, np.uint8)
    np.arange(20).astype(kind).tofile(path)
    assert words in refusal(read_labels, path, coarse, 20)
    path.write_bytes(bytes(20))  # all of them may be 0
    assert read_labels(path, coarse, 20).tolist() == [0] * 20


# ---- other things than files of a dataset ------------------------------------------------------

READERS = {"scan": read_scan, "labels": lambda path: read_labels(path, np.zeros(256, np.uint8), 7),
           "image": lambda path: read_image(path, SIZE), "checkpoint": checkpoints.read}
STRANGERS = {
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12345\n",
                  "a Git-LFS pointer? Get the file itself with `git lfs pull`"),
    "a page": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page? Download the"),
    "an answer": (b"<?xml version='1.0'?><Error/>", "an error message of a server? Download the"),
    "an archive": (b"\x1f\x8b\x08" + bytes(range(200)), "a gzip archive? Unpack it"),
    "text": (b"Quota exceeded, try again later", "text? Convert it to binary"),
    "zeros": (bytes(4000), "zeros only, of a copy that was broken off? Copy it again")}


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("reader", READERS)
def test_strangers_are_named(tmp_path, reader, stranger):
    content, words = STRANGERS[stranger]
    (tmp_path / "file").write_bytes(content)
    assert words in refusal(READERS[reader], tmp_path / "file")


@pytest.mark.parametrize("number, words", [
    (errno.EMFILE, "Too many open files; .*ulimit -n.*fewer --workers"),
    (errno.EACCES, "Permission denied; .*right to read it"),
    (errno.EIO, "Input/output error; the disk or the network fails"),
    (errno.ESTALE, "the system cannot read it now"),
    (errno.ENOMEM, "Cannot allocate memory; .*memory is used up")])
@pytest.mark.parametrize("reader", READERS)
def test_the_system_s_errors_are_not_the_file_s(tmp_path, monkeypatch, reader, number, words):
    (tmp_path / "file").write_bytes(jpeg())

    def fails(self, *_, **__):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(Path, "open", fails)
    message = refusal(READERS[reader], tmp_path / "file")
    assert re.search(words, message) and "extract" not in message and "torch.save" not in message


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_not_there(tmp_path, reader):
    message = refusal(READERS[reader], tmp_path / "gone")
    way_out = "give the path of one that is there" if reader == "checkpoint" else "extract the dataset again"
    assert message.endswith(f"no such file; {way_out}")


def test_too_little_memory_is_not_the_file_s_fault(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise MemoryError
    monkeypatch.setattr(files, "decode_jpeg", fails)
    monkeypatch.setattr(torch, "load", fails)
    (tmp_path / "file").write_bytes(jpeg())
    for reader in ("image", "checkpoint"):
        with pytest.raises(MemoryError):
            READERS[reader](tmp_path / "file")


# ---- checkpoints -------------------------------------------------------------------------------

def test_a_hole_in_weights_is_found(tmp_path):
    path, weights = tmp_path / "last.pth", torch.arange(1.0, 5001.0)
    torch.save({"kind": "probe", "weights": weights}, path)
    whole = path.read_bytes()
    middle = whole.index(weights[2500:2600].numpy().tobytes())
    path.write_bytes(hole(whole, middle, 512))
    assert "damaged: its record last/data/0 is not what" in refusal(checkpoints.read, path)
    path.write_bytes(whole)
    assert torch.equal(checkpoints.read(tmp_path)["weights"], weights)


def test_weights_without_checksums_are_read(tmp_path):
    torch.save(torch.ones(3), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.ones(3), tmp_path / "new.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("old.pth", "new.pth"):
        assert checkpoints.read(tmp_path / name).tolist() == [1, 1, 1]


def test_safetensors_are_named(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "a safetensors file? Convert it once: torch.save(" in refusal(checkpoints.read, path)


# ---- what it costs -----------------------------------------------------------------------------

def test_the_bench_says_what_the_checks_cost(world, monkeypatch):
    frames = Frames(load_index(world, here=True), [0], "all", (40, 80), CLOUD)
    monkeypatch.setattr(bench, "seconds", lambda run, device: (run(), 1.5)[1])
    line = bench.check_cost(frames, 3)
    assert line.endswith("image of a data item: 3000.00 of 1500.0 ms, 200.0%.")

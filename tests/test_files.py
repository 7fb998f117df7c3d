"""Files that open but are damaged or something else are refused in a line; good ones are read."""
import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import open_one
from test_jpeg import SIZE, hole, jpeg, refusal

from data import Frames
from experiments import bench
from plumbing.weights import read as read_weights
from readers import files
from readers.files import read_image, read_labels, read_scan
from waffleiron import prepare

# ---- scans and labels --------------------------------------------------------------------------

def some_scan(count=1000):
    """A plausible scan, float32 [count, 5]."""
    rng = np.random.default_rng(3)
    columns = [rng.uniform(-90, 90, (count, 2)), rng.uniform(-3, 15, count),
               rng.integers(0, 256, count), rng.integers(0, 32, count)]
    return np.column_stack(columns).astype(np.float32)


def changed(columns, change):
    """A harm to these columns of a scan: change(what they hold) -> what they hold then."""
    def harm(scan):
        scan[:, columns] = change(scan[:, columns])
        return scan
    return harm


def at(point, column, value):
    """A harm to these points of a scan: `value` in a column."""
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
    path = tmp_path / "scan.bin"
    change, words = SCANS[harm]
    scan = change(some_scan())
    path.write_bytes(scan if isinstance(scan, bytes) else scan.tobytes())
    if words is None:
        assert read_scan(path).tobytes() == scan[:, :4].tobytes()
    else:
        message = refusal(read_scan, path)
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
    path = tmp_path / "labels.bin"
    coarse = np.zeros(256, np.uint8)
    np.arange(20).astype(kind).tofile(path)
    assert words in refusal(read_labels, path, coarse, 20)
    path.write_bytes(bytes(20))  # all of them may be 0
    assert read_labels(path, coarse, 20).tolist() == [0] * 20


# ---- other things than files of a dataset ------------------------------------------------------

READERS = {"scan": read_scan, "labels": lambda path: read_labels(path, np.zeros(256, np.uint8), 7),
           "image": lambda path: read_image(path, SIZE), "checkpoint": read_weights}
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
    way_out = "extract the dataset again"
    if reader == "checkpoint":
        way_out = "give the path of one that is there"
    assert message.endswith(f"no such file; {way_out}")


def test_too_little_memory_is_not_the_file_s_fault(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise MemoryError
    files.can_be_watched.cache_clear()  # nor the decoder's, which is tried at the first image
    with monkeypatch.context() as patched:
        patched.setattr(files, "decode_jpeg", fails)
        patched.setattr(torch, "load", fails)
        (tmp_path / "file").write_bytes(jpeg())
        for reader in ("image", "checkpoint"):
            with pytest.raises(MemoryError):
                READERS[reader](tmp_path / "file")
    assert files.can_be_watched()


# ---- checkpoints -------------------------------------------------------------------------------

def test_a_hole_in_weights_is_found(tmp_path):
    path = tmp_path / "last.pth"
    weights = torch.arange(1.0, 5001.0)
    torch.save({"kind": "probe", "weights": weights}, path)
    whole = path.read_bytes()
    middle = whole.index(weights[2500:2600].numpy().tobytes())
    path.write_bytes(hole(whole, middle, 512))
    assert "damaged: its record last/data/0 is not what" in refusal(read_weights, path)
    path.write_bytes(whole)
    assert torch.equal(read_weights(tmp_path)["weights"], weights)


def test_weights_without_checksums_are_read(tmp_path):
    torch.save(torch.ones(3), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.ones(3), tmp_path / "new.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("old.pth", "new.pth"):
        assert read_weights(tmp_path / name).tolist() == [1, 1, 1]


def test_safetensors_are_named(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "a safetensors file? Convert it once: torch.save(" in refusal(read_weights, path)


# ---- what it costs -----------------------------------------------------------------------------

def test_the_bench_says_what_the_checks_cost(world, monkeypatch):
    frames = Frames([open_one(world).only(np.array([0]))], "all", (40, 80), prepare)
    files.can_be_watched()  # it is tried once in a process, and is no item's cost
    monkeypatch.setattr(bench, "seconds", lambda run, device: (run(), 1.5)[1])
    line = bench.check_cost(frames, 3)
    assert line.endswith("image of a data item: 3000.00 of 1500.0 ms, 200.0%.")

"""Frames out of pickles: what pandas wrote is read; what is no gzip file, cut short, too large, or
lacks a column is told. `test_forged_pickles.py` has the hostile ones."""
import gzip
import re
import tracemalloc
import zlib

import numpy as np
import pytest
from conftest import ROOT, SHARED
from pandasets import FLOATS, layout_of, refusal, some_columns, with_array, write_pickle

from miniature.pandaset_files import (ARRAY, DTYPE, RECONSTRUCT, Made, array_of, frame_of, pickled,
                                      write_frame)
from plumbing.errors import InputError
from readers import pickles
from readers.pickles import LABELS, NAMES, POINTS, read_frame, wrong_file

GOLDEN = np.load(ROOT / "tests/golden/pandas_frames.npz")  # what three versions of pandas wrote
REAL = SHARED / "real/pandaset"
NINE = {"pandas.core.frame.DataFrame", "pandas.core.internals.managers.BlockManager",
        "pandas.core.indexes.base._new_Index", "pandas.core.indexes.base.Index",
        "pandas.core.indexes.range.RangeIndex", "numpy.core.multiarray._reconstruct",
        "numpy.ndarray", "numpy.dtype", "builtins.slice"}
MEGABYTE = 1 << 20




# ---- what pandas wrote -------------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 20, 3000])
def test_a_frame_in_the_genuine_form_is_read_back(tmp_path, count):
    columns = some_columns(count)
    write_frame(tmp_path / "00.pkl.gz", columns, "index")
    found = read_frame(tmp_path / "00.pkl.gz", POINTS)
    assert list(found) == list(POINTS)
    for name, values in columns.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == values.dtype
        assert not found[name].flags.writeable
    assert wrong_file(tmp_path / "00.pkl.gz") == ""

    write_frame(tmp_path / "labels.pkl.gz", {"class": columns["d"] + 7})
    found = read_frame(tmp_path / "labels.pkl.gz", LABELS)
    np.testing.assert_array_equal(found["class"], columns["d"] + 7)


@pytest.mark.parametrize("name", GOLDEN.files)
def test_frames_of_three_versions_of_pandas_in_three_protocols(tmp_path, name):
    path = tmp_path / "x.pkl.gz"
    path.write_bytes(GOLDEN[name].tobytes())
    if name.startswith("labels"):
        assert read_frame(path, LABELS)["class"].tolist() == [7, 13, 5, 42]
        return
    # The numbers from which the frames were made; "reordered" has i in a block of its own
    x = np.arange(4)
    expected = {"x": x * 1.5 - 2, "y": x * -0.25, "z": x + 0.125, "i": x * 60.0, "t": 1.557e9 + x,
                "d": [0, 0, 1, 1]}
    found = read_frame(path, POINTS)
    for column, values in expected.items():
        values = values[2:] if name.startswith("filtered") else values
        assert found[column].tolist() == list(values), column


def test_columns_are_taken_by_name(tmp_path):
    """Whatever the order of the names, and of the columns in their block."""
    columns = some_columns()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        order = [*rng.permutation(["x", "y", "z", "i", "t"]).tolist(), "d"]
        frame = frame_of({name: columns[name] for name in order}, None)

        # The block of floats says by an array where its columns stand
        layout = layout_of(frame)
        turn = rng.permutation(5)
        values = np.stack([columns[order[column]] for column in turn])
        places = array_of((5,), FLOATS._replace(args=("i8", 0, 1)), turn.astype("<i8").tobytes())
        layout["blocks"][0] = {"values": array_of((5, 20), FLOATS, values.tobytes()),
                               "mgr_locs": places}
        found = read_frame(write_pickle(tmp_path / "x.pkl.gz", pickled(frame)), POINTS)
        for name in POINTS:
            np.testing.assert_array_equal(found[name], columns[name])


def test_arrays_in_the_order_of_columns_and_of_big_endian_numbers(tmp_path):
    columns = some_columns()
    values = np.stack([columns[name] for name in "xyzit"])
    for order, sign in (("F", "<"), ("C", ">"), ("F", ">")):
        dtype = Made(DTYPE, ("f8", 0, 1), (3, sign, None, None, None, -1, -1, 0))
        content = values.astype(f"{sign}f8").tobytes(order)
        array = Made(RECONSTRUCT, (ARRAY, (0,), b"b"), (1, (5, 20), dtype, order == "F", content))
        path = write_pickle(tmp_path / "x.pkl.gz", with_array(array))
        for name, expected in zip("xyzit", values):
            np.testing.assert_array_equal(read_frame(path, POINTS)[name], expected)


def test_pandas_reads_the_same(tmp_path):
    pandas = pytest.importorskip("pandas")
    for seed in range(10):
        columns = some_columns(1 + 50 * seed, seed)
        write_frame(tmp_path / "a.pkl.gz", columns, "index")
        frame = pandas.read_pickle(tmp_path / "a.pkl.gz")
        assert list(frame.columns) == list(POINTS)
        for name in POINTS:
            np.testing.assert_array_equal(frame[name].to_numpy(), columns[name])
        for protocol in (2, 3, 4, 5):
            frame.sample(frac=1, random_state=seed).to_pickle(tmp_path / "b.pkl.gz",
                                                             protocol=protocol)
            found = read_frame(tmp_path / "b.pkl.gz", POINTS)
            again = pandas.read_pickle(tmp_path / "b.pkl.gz")
            for name in POINTS:
                np.testing.assert_array_equal(found[name], again[name].to_numpy())


def test_genuine_files_have_the_nine_names_only():
    """And few steps: the limit is far away."""
    paths = sorted(REAL.glob("*/lidar/0*.pkl.gz")) + sorted(REAL.glob("*/annotations/semseg/0*.gz"))
    if not paths:
        pytest.skip("no real frames here")
    for path in paths[::5]:
        content = gzip.decompress(path.read_bytes())
        found = [(step.name, value) for step, value, _ in pickles.pickletools.genops(content)]
        names = {value.replace(" ", ".") for step, value in found if step == "GLOBAL"}
        assert names == NINE
        assert len(found) * 10 < pickles.MAX_STEPS
    assert set(list(NAMES)[:9]) == NINE


# ---- columns -----------------------------------------------------------------------------------

def test_columns_that_are_missing_are_named_with_those_there(tmp_path):
    columns = some_columns()
    del columns["i"]
    write_frame(tmp_path / "a.pkl.gz", columns)
    assert "no column 'i', the columns are x, y, z, t, d;" in refusal(tmp_path / "a.pkl.gz")
    assert "no column 'class'" in refusal(tmp_path / "a.pkl.gz", LABELS)


def test_lengths_that_differ_and_numbers_that_are_none(tmp_path):
    frame = frame_of(some_columns(), None)
    layout_of(frame)["blocks"][0]["values"] = array_of((5, 10), FLOATS, bytes(400))
    message = refusal(write_pickle(tmp_path / "a.pkl.gz", pickled(frame)))
    assert "different lengths {'x': 10, 'y': 10, 'z': 10, 'i': 10, 't': 10, 'd': 20}" in message
    for bad in (np.nan, np.inf, -np.inf):
        columns = some_columns()
        columns["z"][[3, 5]] = bad
        write_frame(tmp_path / "b.pkl.gz", columns)
        message = refusal(tmp_path / "b.pkl.gz")
        assert "2 of 20 numbers in column 'z' are not finite" in message


# ---- gzip --------------------------------------------------------------------------------------

FILES = {  # name: (what becomes of a good file, what the message says)
    "empty": (lambda packed: b"", "empty;"),
    "html": (lambda packed: b"<!DOCTYPE html><html>", "no gzip file; a web page?"),
    "zip": (lambda packed: b"PK\3\4" + packed, "no gzip file; a zip archive"),
    "Git LFS": (lambda packed: b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    "unpacked": (gzip.decompress, "no gzip file; a pickle that is unpacked? Pack it with gzip"),
    "zeros": (lambda packed: bytes(len(packed)), "no gzip file; zeros only"),
    "damaged": (lambda packed: packed[:60] + bytes(8) + packed[68:], "damaged ("),
    "another checksum": (lambda packed: packed[:-8] + bytes(4) + packed[-4:], "damaged ("),
    "more after it": (lambda packed: packed + packed, "bytes follow the gzip data")}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_gzip_are_told(tmp_path, kind):
    change, reason = FILES[kind]
    path = tmp_path / "00.pkl.gz"
    write_frame(path, some_columns(200))
    path.write_bytes(change(path.read_bytes()))
    assert reason in refusal(path)


def test_a_file_cut_short_anywhere_is_told(tmp_path):
    path = tmp_path / "00.pkl.gz"
    write_frame(path, some_columns(200))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for length in [1, 2, 5, 10, 18, *rng.integers(19, len(whole), 100), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert re.search("cut short|no gzip file", refusal(path))
    # Also where the last bytes happen to be a size
    path.write_bytes(whole[:-100] + whole[-4:])
    assert "cut short, the gzip data have no end" in refusal(path)


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    assert "no such file" in refusal(tmp_path / "00.pkl.gz")
    with pytest.raises(InputError, match="a file is needed here"):
        read_frame(tmp_path, POINTS)


def test_the_ends_of_a_file_tell_most_of_this(tmp_path):
    """Without unpacking: `damage` asks so."""
    path = tmp_path / "00.pkl.gz"
    write_frame(path, some_columns(200))
    whole = path.read_bytes()
    assert wrong_file(path) == ""
    sizes = {b"": "empty", whole[:-4] + bytes([200, 0, 0, 0]): "damaged (",
             whole[:-4] + bytes([0, 0, 0, 99]): "damaged (", b"P": "no gzip", b"\x1f": "no gzip",
             whole[:-1000]: "cut short, the gzip data have no end; download it again"}
    for content, reason in sizes.items():
        path.write_bytes(content)
        assert reason in wrong_file(path)
    assert "No such file" in wrong_file(tmp_path / "01.pkl.gz")


@pytest.mark.parametrize("size", [1.5, 40])
def test_a_file_too_large_is_refused_before_memory_is_taken(tmp_path, monkeypatch, size):
    """Whether its end says so or not."""
    monkeypatch.setattr(pickles, "MAX_BYTES", MEGABYTE)
    path = tmp_path / "00.pkl.gz"
    packed = gzip.compress(bytes(int(size * MEGABYTE)))
    for content in (packed, packed[:-4] + bytes([0, 0, 2, 0])):
        path.write_bytes(content)
        tracemalloc.start()
        try:
            assert "more than 1 MB unpacked; refused" in refusal(path)
            assert tracemalloc.get_traced_memory()[1] < 4 * MEGABYTE
        finally:
            tracemalloc.stop()


@pytest.mark.slow
def test_the_limit_is_256_mb(tmp_path):
    pack = zlib.compressobj(1, zlib.DEFLATED, 31)
    packed = [pack.compress(bytes(MEGABYTE)) for _ in range(257)]
    path = tmp_path / "00.pkl.gz"
    path.write_bytes(b"".join(packed) + pack.flush()[:-4] + bytes([0, 0, 0, 1]))
    assert "more than 256 MB unpacked" in refusal(path)

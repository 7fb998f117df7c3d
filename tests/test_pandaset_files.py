"""Frames as pandas 1.0 wrote them: the genuine bytes, read by pandas and by the reader."""
import gzip
import pickletools

import numpy as np
import pytest
from conftest import SHARED

from miniature.pandaset_files import write_frame
from readers.pickles import LABELS, POINTS, read_frame


def columns_of(count):
    """A LiDAR frame's columns with random numbers."""
    rng = np.random.default_rng(count)
    columns = {name: rng.normal(size=count) for name in "xyzit"}
    columns["d"] = rng.integers(0, 2, count)
    return columns


def test_pandaset_pickles_use_the_nine_names_of_pandas_1(tmp_path):
    path = tmp_path / "00.pkl.gz"
    write_frame(path, columns_of(300), "index")
    packed = path.read_bytes()
    assert packed[3] == 8 and packed[4:8] == bytes(4) and packed[10:17] == b"00.pkl\0"
    steps = list(pickletools.genops(gzip.decompress(packed)))
    names = {value for opcode, value, _ in steps if opcode.name == "GLOBAL"}
    assert names == {
        "pandas.core.frame DataFrame", "pandas.core.internals.managers BlockManager",
        "pandas.core.indexes.base _new_Index", "pandas.core.indexes.base Index",
        "pandas.core.indexes.range RangeIndex", "numpy.core.multiarray _reconstruct",
        "numpy ndarray", "numpy dtype", "builtins slice"}
    assert steps[0][1] == 3 and max(opcode.proto for opcode, _, _ in steps) <= 3


@pytest.mark.parametrize("count", [0, 1, 255, 256, 70_000])
def test_pandaset_frames_come_back(tmp_path, count):
    columns = columns_of(count)
    write_frame(tmp_path / "00.pkl.gz", columns, "index")
    write_frame(tmp_path / "01.pkl.gz", {"class": columns["d"]})
    if count:  # a reader may refuse a frame without points
        found = read_frame(tmp_path / "00.pkl.gz", POINTS)
        assert all((found[name] == columns[name]).all() for name in columns)
        assert (read_frame(tmp_path / "01.pkl.gz", LABELS)["class"] == columns["d"]).all()
    with pytest.raises(ValueError, match="float64 columns, then"):
        write_frame(tmp_path / "02.pkl.gz", dict(d=columns["d"], x=columns["x"]))


@pytest.mark.parametrize("count", [0, 1, 300])
def test_pandas_reads_the_frames(tmp_path, count):
    pandas = pytest.importorskip("pandas")
    columns = columns_of(count)
    write_frame(tmp_path / "00.pkl.gz", columns, "index")
    frame = pandas.read_pickle(tmp_path / "00.pkl.gz")
    assert list(frame) == list(POINTS) and isinstance(frame.index, pandas.RangeIndex)
    assert len(frame) == count and frame.index.name == "index"
    for name in POINTS:
        assert frame[name].dtype == columns[name].dtype
        assert (frame[name].to_numpy() == columns[name]).all()
    assert (frame[frame["d"] == 1]["x"].to_numpy() == columns["x"][columns["d"] == 1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("folder, columns, index", [
    ("lidar", POINTS, "index"), ("annotations/semseg", LABELS, None)])
def test_genuine_frames_are_written_byte_by_byte(tmp_path, folder, columns, index):
    path = SHARED / "real/pandaset/002" / folder / "00.pkl.gz"
    if not path.is_file():
        pytest.skip("no real frames here")
    found = read_frame(path, columns)
    write_frame(tmp_path / "00.pkl.gz", {name: found[name] for name in columns}, index)
    ours = gzip.decompress((tmp_path / "00.pkl.gz").read_bytes())
    assert ours == gzip.decompress(path.read_bytes())

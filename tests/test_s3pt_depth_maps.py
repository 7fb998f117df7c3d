"""Depth maps of scans, which are kept, and of a folder: what is read, and what is refused."""
import os
import pickle
import re
import threading

import numpy as np
import pytest
from PIL import Image
from runs import open_one

from plumbing.errors import InputError
from readers.frame_table import FrameTable
from s3pt import depth
from s3pt.depth import FolderDepth, LidarDepth, projected

RAMP = np.linspace(1, 60, 80 * 160).reshape(80, 160)  # metres


@pytest.fixture(scope="module")
def table(world):
    return open_one(world)


@pytest.fixture
def reads(table, monkeypatch):
    """The scans that are read from here on."""
    found = []
    read = table.reader.scan

    def noted(path):
        found.append(path)
        return read(path)

    monkeypatch.setattr(table.reader, "scan", noted)
    return found


def with_column(table, name, values):
    """The same frames with another column."""
    return FrameTable(table.reader, table.root, table.columns | {name: values}, table.conditions)


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_points_keep_their_depth(table, tmp_path):
    result = LidarDepth(folder=tmp_path)(table, 0, 0)
    assert result.dtype == np.float32 and result.shape == (80, 160)
    scan = table.reader.scan(table.path("scan", 0))
    points = projected(scan[:, :3], table["cam_from_lidar"][0, 0], table["intrinsics"][0, 0],
                       (80, 160), (80, 160))
    there = points > 0
    assert (result > 0).mean() > 2 * there.mean() > 0.4
    assert np.median(np.abs(result - points)[there]) < 0.5


def test_a_map_is_made_once(table, reads, tmp_path):
    first = LidarDepth("fast", tmp_path)(table, 0, 0)
    again = pickle.loads(pickle.dumps(LidarDepth("fast", tmp_path)))(table, 0, 0)
    assert len(reads) == 1 and len(files_in(tmp_path)) == 1
    np.testing.assert_array_equal(first, again)
    LidarDepth("fast", tmp_path)(table, 1, 0)
    LidarDepth("extended", tmp_path)(table, 0, 0)
    assert len(reads) == 3 and len(files_in(tmp_path)) == 3


def test_another_scan_or_calibration_is_another_map(copy, tmp_path, monkeypatch):
    table = open_one(copy)
    source = LidarDepth(folder=tmp_path / "maps")
    first = source(table, 0, 0)
    # Another lens, another place
    other = table["intrinsics"].copy()
    other[..., 0, 0] *= 1.5
    wider = with_column(table, "intrinsics", other)
    assert not np.array_equal(source(wider, 0, 0), first)
    moved = table["cam_from_lidar"].copy()
    moved[..., 2, 3] += 3
    assert not np.array_equal(source(with_column(table, "cam_from_lidar", moved), 0, 0), first)
    np.testing.assert_array_equal(source(table, 0, 0), first)
    # A scan of another date; of another reader; an older form of the cache
    assert len(files_in(tmp_path / "maps")) == 3
    os.utime(table.path("scan", 0), ns=(1, 1))
    source(table, 0, 0)
    assert len(files_in(tmp_path / "maps")) == 4
    monkeypatch.setattr(depth, "FORMAT", depth.FORMAT + 1)
    source(table, 0, 0)
    table.name = "another"
    source(table, 0, 0)
    assert len(files_in(tmp_path / "maps")) == 6


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:-1], lambda content: content[:len(content) // 2],
    lambda content: content[:90] + bytes([content[90] ^ 4]) + content[91:],
    lambda content: b"<html>", lambda content: depth.zlib.compress(b"12")])
def test_a_damaged_file_is_made_anew(table, reads, tmp_path, damage):
    source = LidarDepth(folder=tmp_path)
    first = source(table, 0, 0)
    (file,) = files_in(tmp_path)
    good = file.read_bytes()
    file.write_bytes(damage(good))
    np.testing.assert_array_equal(source(table, 0, 0), first)
    assert len(reads) == 2 and files_in(tmp_path) == [file] and file.read_bytes() == good


def test_several_may_make_the_same_map(table, tmp_path):
    found = []

    def make():
        found.append(LidarDepth(folder=tmp_path)(table, 0, 0))

    makers = [threading.Thread(target=make) for _ in range(6)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(found) == 6 and all((one == found[0]).all() for one in found)
    assert len(files_in(tmp_path)) == 1


def test_where_maps_are_kept(table, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    LidarDepth()(table, 0, 0)
    (file,) = files_in(tmp_path)
    assert file.parent.parent == tmp_path / "collaborative-distillation/depth"
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(InputError, match=f"{blocked}/maps: .*cannot be kept.*XDG_CACHE_HOME"):
        LidarDepth(folder=blocked / "maps")(table, 0, 0)


def test_a_full_disk_leaves_nothing_behind(table, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(depth.os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        LidarDepth(folder=tmp_path)(table, 0, 0)
    assert files_in(tmp_path) == []


def test_a_frame_without_points_in_view_is_named(table, tmp_path):
    away = table["cam_from_lidar"].copy()
    away[..., 2, 3] -= 1000
    with pytest.raises(InputError) as error:
        LidarDepth(folder=tmp_path)(with_column(table, "cam_from_lidar", away), 0, 0)
    message = str(error.value)
    for name in ("image", "scan"):
        assert table[name][0].item().decode() in message
    assert "--on-bad-frame skip" in message and "\n" not in message
    assert files_in(tmp_path) == []


def test_a_scan_that_is_gone_is_named(copy, tmp_path):
    table = open_one(copy)
    scan = table.path("scan", 0)
    os.remove(scan)
    with pytest.raises(InputError, match=f"{re.escape(scan)}: no such file"):
        LidarDepth(folder=tmp_path)(table, 0, 0)


def test_pictures_without_a_scan_have_no_depth(world, tmp_path):
    pictures = open_one(world / "samples", name="pictures")
    result = LidarDepth(folder=tmp_path)(pictures, 0, 0)
    assert result.shape == (80, 160) and not result.any()


# ---- maps of a folder ----------------------------------------------------------------------------

def map_of(folder, table, frame, suffix):
    """The file in which a frame's map is to be, in a folder that is there."""
    path = (folder / table["image"][frame, 0].decode()).with_suffix(suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_maps_of_a_folder(table, tmp_path):
    metres = RAMP.copy()
    metres[3, 4] = 0
    np.save(map_of(tmp_path, table, 0, ".npy"), metres)
    millimetres = np.rint(metres * 1000).astype(np.uint16)
    Image.fromarray(millimetres).save(map_of(tmp_path, table, 1, ".png"))
    two = table.only(np.array([0, 1]))
    source = pickle.loads(pickle.dumps(FolderDepth(tmp_path)))
    source.check([two])
    for frame in (0, 1):
        result = source(table, frame, 0)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, metres, atol=6e-4)

    # One that is missing is found before anything is read; so is a folder
    with pytest.raises(InputError) as error:
        source.check([two, table.only(np.array([2, 3]))])
    missing = table["image"][2, 0].decode()
    assert f"2 of 4 pictures have no depth map, the first is {missing}" in str(error.value)
    with pytest.raises(InputError, match="--depth-maps .*none: no such folder"):
        FolderDepth(tmp_path / "none").check([two])
    with pytest.raises(InputError, match=r"\.png: no such file; .*--depth-maps"):
        source(table, 2, 0)


@pytest.mark.parametrize("suffix, write, words", [
    *((".npy", lambda file, other=other: np.save(file, other), f"of another size .*{shape} and not")
      for other, shape in ((RAMP[1:], "79x160"), (RAMP[:, 1:], "80x159"), (RAMP[::2, ::2], "40x80"),
                           (RAMP.T, "160x80"), (RAMP[:0], "0x160"))),
    (".npy", lambda file: np.save(file, np.where(RAMP < 2, np.nan, RAMP)), "not finite"),
    (".npy", lambda file: np.save(file, np.where(RAMP < 2, np.inf, RAMP)), "not finite"),
    (".npy", lambda file: np.save(file, -RAMP), "12800 of 12800 depths are negative"),
    (".npy", lambda file: np.save(file, 0 * RAMP), "all depths are 0"),
    (".npy", lambda file: np.save(file, RAMP.astype(int)), r"int64 of shape \(80, 160\)"),
    (".npy", lambda file: np.save(file, RAMP[None]), r"shape \(1, 80, 160\)"),
    (".npy", lambda file: np.save(file, np.array([{}])), "not a readable depth map"),
    (".npy", lambda file: np.savez(file, RAMP), "a zip archive"),
    (".npy", lambda file: file.write(b"<html>"), "a web page"),
    (".npy", lambda file: file.write(b""), "not a readable depth map"),
    (".png", lambda file: Image.fromarray(RAMP.astype(np.uint8)).save(file, "PNG"), "mode L, "),
    (".png", lambda file: Image.new("RGB", (160, 80)).save(file, "PNG"), "mode RGB, "),
    (".png", lambda file: Image.new("I;16", (160, 80)).save(file, "PNG"), "all depths are 0"),
    (".png", lambda file: Image.new("L", (160, 80)).save(file, "JPEG"), "not a readable depth map"),
    (".png", lambda file: file.write(b"version https://git-lfs"), "git lfs pull")])
def test_maps_that_cannot_be_used_are_named(table, tmp_path, suffix, write, words):
    path = map_of(tmp_path, table, 0, suffix)
    with path.open("wb") as file:
        write(file)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: .*{words}") as error:
        FolderDepth(tmp_path).check([table.only(np.array([0]))])
    assert "\n" not in str(error.value) and "; " in str(error.value)


@pytest.mark.parametrize("suffix", [".npy", ".png"])
def test_a_map_that_is_cut_short_is_named(table, tmp_path, suffix):
    path = map_of(tmp_path, table, 0, suffix)
    with path.open("wb") as file:
        if suffix == ".npy":
            np.save(file, RAMP)
        else:
            Image.fromarray((1000 * RAMP).astype(np.uint16)).save(file, "PNG")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: not a readable depth map"):
        FolderDepth(tmp_path)(table, 0, 0)

"""nuScenes' tables: what is selected, under which condition; what is damaged beside them."""
import dataclasses
import errno
import json
import os
import shutil

import numpy as np
import pytest

import readers.table
from data import Frames
from plumbing.errors import InputError
from readers import nuscenes


def counts(found, split):
    """{condition: number of frames} of a split."""
    return {name: len(found.select(split, [name])) for name in nuscenes.CONDITIONS}


def test_index_of_the_world(world):
    found = nuscenes.load_index(world)
    assert counts(found, "train") == {"day-clear": 4, "day-rain": 2, "night": 2}
    assert counts(found, "val") == {"day-clear": 2, "day-rain": 2, "night": 2}
    assert "day-rain" in found.summary() and "lidarseg: yes" in found.summary()
    assert len(found.select("train", limit=3)) == 3
    with pytest.raises(InputError, match="no frame of split 'test'"):
        found.select("test")


def test_one_percent_are_the_100th_200th_and_so_on_scene_of_the_table():
    from nuscenes.utils.splits import create_splits_scenes
    train = create_splits_scenes()["train"][::-1]  # the table's order need not be that of names
    scenes = np.array([*np.repeat(train, 3), "scene-0003"], np.bytes_)
    fields = {field.name: None for field in dataclasses.fields(nuscenes.Index)}
    fields["scene"] = scenes
    fields["split"] = np.array([b"train"] * 2100 + [b"val"])
    fields["condition"] = np.arange(2101) % 3
    fields["bad"] = np.zeros(2101, "S1")
    found = nuscenes.Index(**fields)

    rows = found.select("train", percent=1)
    assert len(rows) == 21
    assert list(dict.fromkeys(scenes[rows].astype(str))) == train[99::100]
    assert len(found.select("train", percent=10)) == 210
    assert len(found.select("train")) == 2100
    assert len(found.select("train", ["night"], percent=1)) == 7  # the same scenes, fewer frames


# ---- conditions --------------------------------------------------------------------------------

# Descriptions of clear scenes, and what md4all's rule makes of them
OTHERWISE = {"Wait for train, peds": "day-rain", "Hilly terrain": "day-rain",
             "Drain, truck": "day-rain", "Knight Street": "night"}


@pytest.mark.parametrize("condition, descriptions", [
    ("night", ["Night, after rain, many cars", "Nighttime", "(night)"]),
    ("day-rain", ["Rain, parked truck", "Heavy RAINfall", "Rainy day", "after rain, bus",
                  "day_rain", "heavy-rain", "été Rain"]),
    ("day-clear", ["Turn left", "Difficult lighting", "", *OTHERWISE])])
def test_only_words_that_begin_with_rain_or_night_count(condition, descriptions):
    for text in descriptions:
        assert nuscenes.CONDITIONS[nuscenes.condition_of(text)] == condition, text


def test_the_index_prints_scenes_whose_condition_the_published_rule_reads_otherwise(
        world, copy, monkeypatch, capsys):
    table = copy / "v1.0-trainval/scene.json"
    scenes = json.loads(table.read_text())
    for scene, text in zip(scenes, [*OTHERWISE, "Rain, 学校"]):
        scene["description"] = text
    table.write_text(json.dumps(scenes))
    monkeypatch.setattr("sys.argv", ["nuscenes.py", "--data", str(copy)])
    nuscenes.main()
    printed = capsys.readouterr().out
    for scene, (text, published) in zip(scenes, OTHERWISE.items()):
        line = f'  {scene["name"]}, "{text}": day-clear here, {published} by md4all\'s rule'
        assert line in printed
    assert printed.count("md4all") == 4
    assert "md4all" not in nuscenes.load_index(world).summary()
    found = nuscenes.load_index(copy)
    rainy = found.scene == scenes[4]["name"].encode()
    assert (found.condition[rainy] == nuscenes.CONDITIONS.index("day-rain")).all()


def test_names_in_any_language(tmp_path, world):
    root = shutil.copytree(world, tmp_path / "Straße")
    (root / "samples/CAM_FRONT").rename(root / "samples/前相机")
    table = root / "v1.0-trainval/sample_data.json"
    table.write_text(table.read_text().replace("CAM_FRONT/", "前相机/"), "utf-8")
    scenes = root / "v1.0-trainval/scene.json"
    scenes.write_text(scenes.read_text().replace("scene-0001", "площадь"), "utf-8")
    found = nuscenes.load_index(root, here=True)
    assert found.image[0, 0].decode().startswith("samples/前相机/")
    assert "площадь" in np.char.decode(found.scene)
    frames = Frames(found, found.select("train"), image_size=(80, 160))
    assert frames[0, 0]["image"].shape == (3, 80, 160) and "前相机" in frames.name((0, 0))


# ---- the cache ---------------------------------------------------------------------------------

def test_the_index_always_looks_at_the_files_and_training_trusts_the_cache(
        copy, monkeypatch, capsys):
    nuscenes.load_index(copy, here=True)  # the cache is warm
    image = next((copy / "samples/CAM_FRONT").iterdir())
    scan = next((copy / "samples/LIDAR_TOP").iterdir())
    monkeypatch.setattr("sys.argv", ["nuscenes.py", "--data", str(copy)])

    # A damaged file and a missing one
    scan.write_bytes(scan.read_bytes()[:1001])
    nuscenes.main()
    wrong = f"bad: {scan.relative_to(copy)} has 1001 bytes, not 20 a point"
    assert wrong in capsys.readouterr().out
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(SystemExit):
        nuscenes.main()
    image.write_bytes(content)
    assert f"the first is {image.relative_to(copy)}" in capsys.readouterr().err
    assert (nuscenes.load_index(copy, look=False).bad == b"").all()

    # A table of another content, of the same size and date
    table = copy / "v1.0-trainval/scene.json"
    date = table.stat().st_mtime_ns
    table.write_text(table.read_text().replace("Night", "Light"))
    os.utime(table, ns=(date, date))
    readers.table.content_of.cache_clear()  # another process
    nights = [(nuscenes.load_index(copy, here=True, look=look).condition == 2).sum()
              for look in (False, None)]
    assert nights[0] > 0 == nights[1]


def test_second_start_reads_the_cache_alone(world, monkeypatch):
    first = nuscenes.load_index(world)
    monkeypatch.setattr(readers.table, "build_elsewhere", None)
    second = nuscenes.load_index(world)
    np.testing.assert_array_equal(first.cam_from_lidar, second.cam_from_lidar)
    assert first.image.tolist() == second.image.tolist()


@pytest.mark.slow
def test_the_index_is_built_by_another_process_with_the_same_errors(world, copy):
    scan = sorted((copy / "samples" / "LIDAR_TOP").iterdir())[0]
    content = scan.read_bytes()
    scan.write_bytes(content[:-7])
    found = nuscenes.load_index(copy)
    (reason,) = found.bad[found.lidar == str(scan.relative_to(copy)).encode()]
    assert b"not 20 a point" in reason

    table = copy / "v1.0-trainval/ego_pose.json"
    poses = table.read_text()
    table.write_text("[")
    message = f"--data {copy}: nuscenes-devkit cannot read v1.0-trainval .JSONDecodeError"
    with pytest.raises(InputError, match=message):
        nuscenes.load_index(copy)
    table.write_text(poses)
    scan.write_bytes(content)
    assert (nuscenes.load_index(copy).condition == nuscenes.load_index(world).condition).all()


def test_a_cache_that_cannot_be_written_is_named(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"the index cannot be kept there \(.*\); mend that"):
        nuscenes.load_index(world, here=True)


def test_a_full_disk_leaves_no_half_a_cache(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match="No space left on device"):
        readers.table.store_arrays(tmp_path / "key", {"split": np.zeros(3)})
    assert not list(tmp_path.iterdir())


# ---- damage ------------------------------------------------------------------------------------

def test_wrong_roots_are_named(tmp_path, world):
    with pytest.raises(InputError, match="not a nuScenes root"):
        nuscenes.load_index(tmp_path)
    with pytest.raises(InputError, match="no --version v1.0-mini; there is v1.0-trainval"):
        nuscenes.load_index(world, "v1.0-mini")


@pytest.mark.parametrize("kind, message", [
    ("maps", "1 of 1 files that the tables name are missing, the first is maps/blank.png; .* "
             "extract all of it, maps/ too$"),
    ("labels", "1 of 14 files .*lidarseg/v1.0-trainval/.*; extract nuScenes-lidarseg into this "
               "folder, all of it$"),
    ("labels of others", "15 files in lidarseg/v1.0-trainval, but lidarseg.json names 14; remove "
                         "those"),
    ("a table", r"nuscenes-devkit cannot read v1.0-trainval \(.*\); extract its tables again$")])
def test_what_lies_beside_the_tables_is_not_blamed_on_them(copy, kind, message):
    label = next((copy / "lidarseg/v1.0-trainval").iterdir())
    if kind == "maps":
        shutil.rmtree(copy / "maps")
    elif kind == "labels":
        label.unlink()
    elif kind == "labels of others":
        label.with_name("other_lidarseg.bin").write_bytes(b"")
    else:
        (copy / "v1.0-trainval/sample.json").write_text("[{}]")
    with pytest.raises(InputError, match=message):
        nuscenes.load_index(copy, here=True)


def labels_of(root, scan):
    """The file with the labels of a scan."""
    tables = root / "v1.0-trainval"
    records = json.loads((tables / "sample_data.json").read_text())
    (token,) = [record["token"] for record in records if record["filename"].endswith(scan.name)]
    records = json.loads((tables / "lidarseg.json").read_text())
    (file,) = [record["filename"] for record in records if record["sample_data_token"] == token]
    return root / file


@pytest.mark.parametrize("damage, message", [
    ("missing", "1 of .* missing"), ("cut", "not 20 a point"), ("labels", "one label each"),
    ("64 bits", "not 20 a point.*; 64-bit floats"),
    ("KITTI", "not 20 a point.*; four columns .KITTI."), ("wide labels", "; 16-bit labels")])
def test_damaged_files_are_found_at_the_start(copy, damage, message):
    scan = sorted((copy / "samples" / "LIDAR_TOP").iterdir())[0]
    points = np.fromfile(scan, np.float32).reshape(-1, 5)
    labels = labels_of(copy, scan)
    if damage == "missing":
        sorted((copy / "samples" / "CAM_FRONT").iterdir())[0].unlink()
    elif damage == "cut":
        scan.write_bytes(scan.read_bytes()[:-7])
    elif damage == "64 bits":
        scan.write_bytes(points.astype(np.float64).tobytes())
    elif damage == "KITTI":
        scan.write_bytes(points[:, :4].tobytes())
    elif damage == "labels":
        labels.write_bytes(labels.read_bytes()[:-1])
    else:
        labels.write_bytes(2 * labels.read_bytes())
    with pytest.raises(InputError, match=message):
        found = nuscenes.load_index(copy, here=True)
        for split in ("train", "val"):
            found.select(split)

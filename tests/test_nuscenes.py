"""nuScenes' tables: what is selected, under which condition; what is damaged beside them."""
import errno
import json
import os
import shutil

import numpy as np
import pytest
from runs import open_one

import readers.cache
from data import Frames, select
from plumbing.errors import InputError
from readers import nuscenes
from readers.table import UNKNOWN, FrameTable, main


def counts(found, split):
    """{condition: number of frames} of a split."""
    return {name: len(found.select(split, [name])) for name in nuscenes.CONDITIONS}


def test_index_of_the_world(world):
    found = open_one(world, here=False)
    assert counts(found, "train") == {"day-clear": 4, "day-rain": 2, "night": 2}
    assert counts(found, "val") == {"day-clear": 2, "day-rain": 2, "night": 2}
    assert "day-rain" in found.summary() and "labels: yes" in found.summary()
    assert len(select([found], "train", limit=3)[0]) == 3
    with pytest.raises(InputError, match="no frame of split 'test'"):
        found.select("test")


def test_one_percent_are_the_100th_200th_and_so_on_scene_of_the_table():
    from nuscenes.utils.splits import create_splits_scenes
    train = create_splits_scenes()["train"][::-1]  # the table's order need not be that of names
    scenes = np.array([*np.repeat(train, 3), "scene-0003"], np.bytes_)
    columns = {"scene": scenes, "split": np.array([b"train"] * 2100 + [b"val"]),
               "condition": np.arange(2101) % 3, "bad": np.zeros(2101, "S1")}
    found = FrameTable(nuscenes, "root", columns, nuscenes.CONDITIONS)

    rows = found.select("train", percent=1).rows
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


def test_classes_of_lidarseg_are_the_devkit_s(world):
    from nuscenes import NuScenes
    from nuscenes.eval.lidarseg.utils import LidarsegClassMapper
    mapper = LidarsegClassMapper(NuScenes("v1.0-trainval", str(world), verbose=False))
    assert nuscenes.CLASS_OF == mapper.fine_name_2_coarse_name_mapping
    assert list(nuscenes.CLASSES) == list(mapper.coarse_name_2_coarse_idx_mapping)
    assert sorted(mapper.coarse_name_2_coarse_idx_mapping.values()) == list(range(17))
    found = open_one(world)["label_map"]
    expected = mapper.fine_idx_2_coarse_idx_mapping
    assert len(expected) == 32
    for label in range(256):
        assert found[label] == expected.get(label, UNKNOWN)


def test_the_table_of_categories_counts_as_it_is_now(copy):
    def numbers(name):
        frames = Frames([open_one(copy)], image_size=(80, 160), target="labels")
        return (frames[0, 0]["labels"] == nuscenes.CLASSES.index(name)).tolist()
    plants, walls = numbers("vegetation"), numbers("manmade")
    assert any(plants) and any(walls)
    table = copy / "v1.0-trainval/category.json"
    text = table.read_text()
    swapped = text.replace("static.vegetation", "x").replace("static.manmade", "static.vegetation")
    table.write_text(swapped.replace('"x"', '"static.manmade"'))
    assert numbers("manmade") == plants and numbers("vegetation") == walls
    table.write_text(text.replace("static.vegetation", "static.hedge"))
    with pytest.raises(InputError, match="cannot read v1.0-trainval .KeyError: 'static.hedge'"):
        open_one(copy)


def test_the_index_prints_scenes_whose_condition_the_published_rule_reads_otherwise(
        world, copy, capsys):
    table = copy / "v1.0-trainval/scene.json"
    scenes = json.loads(table.read_text())
    for scene, text in zip(scenes, [*OTHERWISE, "Rain, 学校"]):
        scene["description"] = text
    table.write_text(json.dumps(scenes))
    main("nuscenes", ["--data", str(copy)])
    printed = capsys.readouterr().out
    for scene, (text, published) in zip(scenes, OTHERWISE.items()):
        line = f'  {scene["name"]}, "{text}": day-clear here, {published} by md4all\'s rule'
        assert line in printed
    assert printed.count("md4all") == 4
    assert "md4all" not in open_one(world).summary()
    found = open_one(copy)
    rainy = found["scene"] == scenes[4]["name"].encode()
    assert (found["condition"][rainy] == nuscenes.CONDITIONS.index("day-rain")).all()


def test_names_in_any_language(tmp_path, world):
    root = shutil.copytree(world, tmp_path / "Straße")
    (root / "samples/CAM_FRONT").rename(root / "samples/前相机")
    table = root / "v1.0-trainval/sample_data.json"
    table.write_text(table.read_text().replace("CAM_FRONT/", "前相机/"), "utf-8")
    scenes = root / "v1.0-trainval/scene.json"
    scenes.write_text(scenes.read_text().replace("scene-0001", "площадь"), "utf-8")
    found = open_one(root)
    assert found["image"][0, 0].decode().startswith("samples/前相机/")
    assert "площадь" in np.char.decode(found["scene"])
    frames = Frames([found.select("train")], image_size=(80, 160))
    assert frames[0, 0]["image"].shape == (3, 80, 160) and "前相机" in frames.name((0, 0))


# ---- the cache ---------------------------------------------------------------------------------

def test_the_index_always_looks_at_the_files_and_training_trusts_the_cache(
        copy, capsys):
    open_one(copy)  # the cache is warm
    image = next((copy / "samples/CAM_FRONT").iterdir())
    scan = next((copy / "samples/LIDAR_TOP").iterdir())

    # A damaged file and a missing one
    scan.write_bytes(scan.read_bytes()[:1001])
    with pytest.raises(SystemExit, match="3"):
        main("nuscenes", ["--data", str(copy)])
    wrong = f"bad: {scan.relative_to(copy)} has 1001 bytes, not 20 a point"
    assert wrong in capsys.readouterr().out
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(SystemExit):
        main("nuscenes", ["--data", str(copy)])
    image.write_bytes(content)
    assert f"the first is {image.relative_to(copy)}" in capsys.readouterr().err
    assert (open_one(copy, look=False)["bad"] == b"").all()

    # A table of another content, of the same size and date
    table = copy / "v1.0-trainval/scene.json"
    date = table.stat().st_mtime_ns
    table.write_text(table.read_text().replace("Night", "Light"))
    os.utime(table, ns=(date, date))
    readers.cache.content_of.cache_clear()  # another process
    nights = [(open_one(copy, look=look)["condition"] == 2).sum() for look in (False, None)]
    assert nights[0] > 0 == nights[1]


def test_second_start_reads_the_cache_alone(world, monkeypatch):
    first = open_one(world, here=False)
    monkeypatch.setattr(readers.cache, "build_elsewhere", None)
    second = open_one(world, here=False)
    np.testing.assert_array_equal(first["cam_from_lidar"], second["cam_from_lidar"])
    assert first["image"].tolist() == second["image"].tolist()


@pytest.mark.slow
def test_the_index_is_built_by_another_process_with_the_same_errors(world, copy):
    scan = sorted((copy / "samples" / "LIDAR_TOP").iterdir())[0]
    content = scan.read_bytes()
    scan.write_bytes(content[:-7])
    found = open_one(copy, here=False)
    (reason,) = found["bad"][found["scan"] == str(scan.relative_to(copy)).encode()]
    assert b"not 20 a point" in reason

    table = copy / "v1.0-trainval/ego_pose.json"
    poses = table.read_text()
    table.write_text("[")
    message = f"--data {copy}: nuscenes-devkit cannot read v1.0-trainval .JSONDecodeError"
    with pytest.raises(InputError, match=message):
        open_one(copy, here=False)
    table.write_text(poses)
    scan.write_bytes(content)
    found = open_one(copy, here=False)
    assert (found["condition"] == open_one(world, here=False)["condition"]).all()


def test_a_cache_that_cannot_be_written_is_named(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"the table cannot be kept there \(.*\); mend that"):
        open_one(world)


def test_a_full_disk_leaves_no_half_a_cache(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match="No space left on device"):
        readers.cache.store_arrays(tmp_path / "key", {"split": np.zeros(3)})
    assert not list(tmp_path.iterdir())


# ---- damage ------------------------------------------------------------------------------------

def test_wrong_roots_are_named(tmp_path, world):
    with pytest.raises(InputError, match="not a nuScenes root"):
        open_one(tmp_path)
    with pytest.raises(InputError, match="no --version v1.0-mini; there is v1.0-trainval"):
        open_one(world, "v1.0-mini")


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
        open_one(copy)


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
        found = open_one(copy)
        for split in ("train", "val"):
            found.select(split)

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

import index
from data import Frames
from errors import InputError


def test_index_of_the_world(world):
    found = index.load_index(world)
    assert {c: len(found.select("train", [c])) for c in index.CONDITIONS} == {"day-clear": 4, "day-rain": 2, "night": 2}
    assert {c: len(found.select("val", [c])) for c in index.CONDITIONS} == {"day-clear": 2, "day-rain": 2, "night": 2}
    assert "day-rain" in found.summary() and "lidarseg: yes" in found.summary()
    assert len(found.select("train", limit=3)) == 3
    with pytest.raises(InputError, match="no frame of split 'test'"):
        found.select("test")


def test_one_percent_are_the_100th_200th_and_so_on_scene_of_the_table():
    from nuscenes.utils.splits import create_splits_scenes
    train = create_splits_scenes()["train"][::-1]  # the order of the table need not be that of the names
    scenes = np.array([name for name in train for _ in range(3)] + ["scene-0003"], np.bytes_)
    frames = {field.name: None for field in dataclasses.fields(index.Index)} | {
        "scene": scenes, "split": np.array([b"train"] * 2100 + [b"val"]), "condition": np.arange(2101) % 3,
        "bad": np.zeros(2101, "S1")}
    found = index.Index(**frames)
    rows = found.select("train", percent=1)
    assert len(rows) == 21 and list(dict.fromkeys(scenes[rows].astype(str))) == train[99::100]
    assert len(found.select("train", percent=10)) == 210 and len(found.select("train")) == 2100
    assert len(found.select("train", ["night"], percent=1)) == 7  # the same scenes, some of their frames


def test_condition_of_description():
    names = [index.CONDITIONS[index.condition_of(text)] for text in
             ("Night, after rain, many cars", "Rain, parked truck", "Heavy RAINfall", "Turn left", "Difficult lighting")]
    assert names == ["night", "day-rain", "day-rain", "day-clear", "day-clear"]


OTHERWISE = {"Wait for train, peds": "day-rain", "Hilly terrain": "day-rain", "Drain, truck": "day-rain", "Knight Street": "night"}


def test_only_words_that_begin_with_rain_or_night_count():
    found = {text: index.CONDITIONS[index.condition_of(text)] for text in
             (*OTHERWISE, "Rainy day", "after rain, bus", "Nighttime", "(night)", "day_rain", "heavy-rain", "été Rain", "")}
    assert [found[text] for text in OTHERWISE] == ["day-clear"] * 4
    assert list(found.values())[4:] == ["day-rain", "day-rain", "night", "night", "day-rain", "day-rain", "day-rain", "day-clear"]


def test_the_index_prints_scenes_whose_condition_the_published_rule_reads_otherwise(tmp_path, world, monkeypatch, capsys):
    root = shutil.copytree(world, tmp_path / "copy")
    table = root / "v1.0-trainval/scene.json"
    scenes = json.loads(table.read_text())
    for scene, text in zip(scenes, [*OTHERWISE, "Rain, 学校"]):
        scene["description"] = text
    table.write_text(json.dumps(scenes))
    monkeypatch.setattr("sys.argv", ["index.py", "--data", str(root)])
    index.main()
    printed = capsys.readouterr().out
    for scene, (text, published) in zip(scenes, OTHERWISE.items()):
        assert f'  {scene["name"]}, "{text}": day-clear here, {published} by md4all\'s rule' in printed
    assert printed.count("md4all") == 4 and "md4all" not in index.load_index(world).summary()
    rows = [row for row, name in enumerate(index.load_index(root).scene) if name == scenes[4]["name"].encode()]
    assert (index.load_index(root).condition[rows] == index.CONDITIONS.index("day-rain")).all()


def test_names_in_any_language(tmp_path, world):
    root = shutil.copytree(world, tmp_path / "Straße")
    (root / "samples/CAM_FRONT").rename(root / "samples/前相机")
    table = root / "v1.0-trainval/sample_data.json"
    table.write_text(table.read_text().replace("CAM_FRONT/", "前相机/"), "utf-8")
    scenes = root / "v1.0-trainval/scene.json"
    scenes.write_text(scenes.read_text().replace("scene-0001", "площадь"), "utf-8")
    found = index.load_index(root, here=True)
    assert found.image[0, 0].decode().startswith("samples/前相机/") and "площадь" in np.char.decode(found.scene)
    frames = Frames(found, found.select("train"), image_size=(80, 160))
    assert frames[0, 0]["image"].shape == (3, 80, 160) and "前相机" in frames.name((0, 0))


@pytest.mark.parametrize("kind, message", [
    ("maps", "1 of 1 files that the tables name are missing, the first is maps/blank.png; .* extract all of it, maps/ too$"),
    ("labels", "1 of 14 files .*lidarseg/v1.0-trainval/.*; extract nuScenes-lidarseg into this folder, all of it$"),
    ("labels of others", "15 files in lidarseg/v1.0-trainval, but lidarseg.json names 14; remove those"),
    ("a table", r"nuscenes-devkit cannot read v1.0-trainval \(.*\); extract its tables again$")])
def test_what_lies_beside_the_tables_is_not_blamed_on_them(tmp_path, world, kind, message):
    root = shutil.copytree(world, tmp_path / "copy")
    label = next((root / "lidarseg/v1.0-trainval").iterdir())
    if kind == "maps":
        shutil.rmtree(root / "maps")
    elif kind == "labels":
        label.unlink()
    elif kind == "labels of others":
        label.with_name("other_lidarseg.bin").write_bytes(b"")
    else:
        (root / "v1.0-trainval/sample.json").write_text("[{}]")
    with pytest.raises(InputError, match=message):
        index.load_index(root, here=True)


def test_the_index_always_looks_at_the_files_and_training_trusts_the_cache(tmp_path, world, monkeypatch, capsys):
    root = shutil.copytree(world, tmp_path / "copy")
    index.load_index(root, here=True)  # the cache is warm
    image, scan = next((root / "samples/CAM_FRONT").iterdir()), next((root / "samples/LIDAR_TOP").iterdir())
    monkeypatch.setattr("sys.argv", ["index.py", "--data", str(root)])
    scan.write_bytes(scan.read_bytes()[:1001])
    index.main()
    assert f"bad: {scan.relative_to(root)} has 1001 bytes, not 20 a point" in capsys.readouterr().out
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(SystemExit):
        index.main()
    image.write_bytes(content)
    assert f"the first is {image.relative_to(root)}" in capsys.readouterr().err
    assert (index.load_index(root, look=False).bad == b"").all()
    table = root / "v1.0-trainval/scene.json"
    date = table.stat().st_mtime_ns
    table.write_text(table.read_text().replace("Night", "Light"))  # another content of the same size and date
    os.utime(table, ns=(date, date))
    index.content_of.cache_clear()  # another process
    nights = [(index.load_index(root, here=True, look=look).condition == 2).sum() for look in (False, None)]
    assert nights[0] > 0 == nights[1]


def test_second_start_reads_the_cache_alone(world, monkeypatch):
    first = index.load_index(world)
    monkeypatch.setattr(index.subprocess, "run", None)  # what would build it
    second = index.load_index(world)
    np.testing.assert_array_equal(first.cam_from_lidar, second.cam_from_lidar)
    assert first.image.tolist() == second.image.tolist()


@pytest.mark.slow
def test_the_index_is_built_by_another_process_with_the_same_errors(tmp_path, world):
    root = tmp_path / "copy"
    shutil.copytree(world, root)
    scan = sorted((root / "samples" / "LIDAR_TOP").iterdir())[0]
    content = scan.read_bytes()
    scan.write_bytes(content[:-7])
    assert b"not 20 a point" in (found := index.load_index(root)).bad[found.lidar == str(scan.relative_to(root)).encode()][0]
    table = root / "v1.0-trainval/ego_pose.json"
    poses = table.read_text()
    table.write_text("[")
    with pytest.raises(InputError, match=f"--data {root}: nuscenes-devkit cannot read v1.0-trainval .JSONDecodeError"):
        index.load_index(root)
    table.write_text(poses)
    scan.write_bytes(content)
    assert (index.load_index(root).condition == index.load_index(world).condition).all()


def test_wrong_roots_are_named(tmp_path, world):
    with pytest.raises(InputError, match="not a nuScenes root"):
        index.load_index(tmp_path)
    with pytest.raises(InputError, match="no --version v1.0-mini; there is v1.0-trainval"):
        index.load_index(world, "v1.0-mini")


@pytest.mark.parametrize("damage, message", [("missing", "1 of .* missing"), ("cut", "not 20 a point"),
                                             ("labels", "one label each"), ("64 bits", "not 20 a point.*; 64-bit floats"),
                                             ("KITTI", "not 20 a point.*; four columns .KITTI."), ("wide labels", "; 16-bit labels")])
def test_damaged_files_are_found_at_the_start(tmp_path, world, damage, message):
    root = tmp_path / "copy"
    shutil.copytree(world, root)
    scan = sorted((root / "samples" / "LIDAR_TOP").iterdir())[0]
    if damage == "missing":
        sorted((root / "samples" / "CAM_FRONT").iterdir())[0].unlink()
    elif damage == "cut":
        scan.write_bytes(scan.read_bytes()[:-7])
    elif damage in ("64 bits", "KITTI"):
        points = np.fromfile(scan, np.float32).reshape(-1, 5)
        scan.write_bytes((points.astype(np.float64) if damage == "64 bits" else points[:, :4]).tobytes())
    else:
        token = next(r["token"] for r in json.loads((root / "v1.0-trainval/sample_data.json").read_text()) if r["filename"].endswith(scan.name))
        tables = json.loads((root / "v1.0-trainval/lidarseg.json").read_text())
        labels = root / next(r["filename"] for r in tables if r["sample_data_token"] == token)
        labels.write_bytes(labels.read_bytes()[:-1] if damage == "labels" else 2 * labels.read_bytes())
    with pytest.raises(InputError, match=message):
        found = index.load_index(root, here=True)
        for split in ("train", "val"):
            found.select(split)

import dataclasses
import shutil

import numpy as np
import pytest

import index
from errors import InputError


def test_index_of_the_world(world):
    found = index.load_index(world)
    assert {c: len(found.select("train", [c])) for c in index.CONDITIONS} == {"day-clear": 4, "day-rain": 2, "night": 2}
    assert {c: len(found.select("val", [c])) for c in index.CONDITIONS} == {"day-clear": 2, "day-rain": 2, "night": 2}
    assert "day-rain" in found.summary() and "lidarseg: yes" in found.summary()
    assert len(found.select("train", limit=3)) == 3
    with pytest.raises(InputError, match="no frame of split 'test'"):
        found.select("test")


def test_one_percent_are_every_hundredth_training_scene():
    from nuscenes.utils.splits import create_splits_scenes
    train = create_splits_scenes()["train"]
    scenes = np.array([name for name in reversed(train) for _ in range(3)] + ["scene-0003"], np.bytes_)
    frames = {field.name: None for field in dataclasses.fields(index.Index)} | {
        "scene": scenes, "split": np.array([b"train"] * 2100 + [b"val"]), "condition": np.arange(2101) % 3,
        "bad": np.zeros(2101, "S1")}
    found = index.Index(**frames)
    rows = found.select("train", percent=1)
    assert len(rows) == 21 and sorted(set(scenes[rows].astype(str))) == sorted(train)[::100]
    assert len(found.select("train", percent=10)) == 210 and len(found.select("train")) == 2100
    assert len(found.select("train", ["night"], percent=1)) == 7  # the same scenes, some of their frames


def test_condition_of_description():
    names = [index.CONDITIONS[index.condition_of(text)] for text in
             ("Night, after rain, many cars", "Rain, parked truck", "Heavy RAINfall", "Turn left", "Difficult lighting")]
    assert names == ["night", "day-rain", "day-rain", "day-clear", "day-clear"]


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
                                             ("labels", "one label each")])
def test_damaged_files_are_found_at_the_start(tmp_path, world, damage, message):
    root = tmp_path / "copy"
    shutil.copytree(world, root)
    scan = sorted((root / "samples" / "LIDAR_TOP").iterdir())[0]
    if damage == "missing":
        sorted((root / "samples" / "CAM_FRONT").iterdir())[0].unlink()
    elif damage == "cut":
        scan.write_bytes(scan.read_bytes()[:-7])
    else:
        labels = sorted((root / "lidarseg" / "v1.0-trainval").iterdir())[0]
        labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(InputError, match=message):
        found = index.load_index(root, here=True)
        for split in ("train", "val"):
            found.select(split)

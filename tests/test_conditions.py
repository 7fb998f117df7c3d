"""conditions.json in a dataset's root: columns of the tables, fingerprints, faults of the file."""
import json
import os

import numpy as np
import pytest
import torch
from runs import (checkpoint_of, eval_args, fails_with_one_line, open_one, probe_args, stage1_args,
                  stage2_args)

import eval as evaluation
import probe
import stage1
import stage2
from data import Frames, select
from miniature.world import make_world
from plumbing.errors import InputError
from readers.table import main as show

STATED = ("day-clear", "day-rain", "night")


def name(root, conditions):
    """Write a root's conditions.json."""
    (root / "conditions.json").write_text(json.dumps(conditions))


def scenes(root, split, condition=None):
    """The scenes of a split, or those of them under one of nuScenes' conditions."""
    return open_one(root).select(split, condition and [condition]).scenes()


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """Root of a miniature nuImages: 4 images for training, 3 for validation."""
    root = tmp_path_factory.mktemp("nuimages") / "data"
    make_world(root, seed=9, train=(2, 1, 1), val=1, frames=1, workers=1, dataset="nuimages")
    return root


@pytest.fixture
def images(miniature):
    """The same, with its table and without a conditions.json afterwards."""
    yield miniature, open_one(miniature, name="nuimages")
    (miniature / "conditions.json").unlink(missing_ok=True)


def paths_of(table):
    return [path.decode() for path in table["image"][:, 0]]


# ---- nuScenes ------------------------------------------------------------------------------------

def test_scenes_of_a_new_condition_are_chosen_and_counted(copy):
    clear, night = scenes(copy, "train", "day-clear"), scenes(copy, "val", "night")
    name(copy, {clear[0]: "snow at dusk", clear[1]: "snow at dusk", night[0]: "fog"})
    table = open_one(copy)
    assert table.conditions == (*STATED, "fog", "snow at dusk")  # nuScenes' own, then by name
    assert table.select("train", ["snow at dusk"]).scenes() == clear[:2]
    assert table.select("train", ["day-clear"]).scenes() == clear[2:]
    assert table.select("val", ["night"]).scenes() == night[1:]
    assert len(table.select("val", ["fog", "night"])) == 2
    assert len(table.select("train")) == 8 and len(table.select("val")) == 6

    frames = Frames([table.select("train", ["snow at dusk", "night"])], image_size=(80, 160))
    found = [frames.conditions[frames[0, n]["condition"]] for n in range(len(frames))]
    assert sorted(found) == ["night", "night", "snow at dusk", "snow at dusk"]
    with pytest.raises(InputError, match="no frame of split 'train' under fog"):
        table.select("train", ["fog"])


def test_the_summary_has_the_new_condition(copy, capsys):
    name(copy, {scenes(copy, "train", "day-rain")[0]: "a long word for hail"})
    show("nuscenes", ["--data", str(copy)])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  split  condition            scenes  frames  images",
        "  train  day-clear                 4       4       4",
        "  train  day-rain                  1       1       1",
        "  train  night                     2       2       2",
        "  train  a long word for hail      1       1       1",
        "  val    day-clear                 2       2       2",
        "  val    day-rain                  2       2       2",
        "  val    night                     2       2       2"]


def test_a_scene_may_have_another_of_the_dataset_s_conditions(copy):
    scene = scenes(copy, "train", "night")[0]
    name(copy, {scene: "day-rain"})
    table = open_one(copy)
    assert table.conditions == STATED
    assert scene in table.select("train", ["day-rain"]).scenes()
    assert len(table.select("train", ["day-rain"])) == 3


def test_conditions_need_no_cache_of_their_own(copy):
    """The file is read at each opening: what was written since counts at once."""
    table = open_one(copy)
    for names in ({}, {scene: "x" for scene in table.scenes()}):
        if names:
            name(copy, names)
        found = open_one(copy, look=False)
        assert len(found.select("train", [*found.conditions])) == 8
    assert len(found.select("val", ["x"])) == 6
    (copy / "conditions.json").unlink()
    assert open_one(copy, look=False).conditions == STATED


# ---- nuImages ------------------------------------------------------------------------------------

def test_images_are_named_where_there_are_no_scenes(images):
    root, clean = images
    paths = paths_of(clean)
    assert clean.conditions == ()
    name(root, {path: "dusk" if n % 2 else "dawn" for n, path in enumerate(paths)})
    table = open_one(root, name="nuimages")
    assert table.conditions == ("dawn", "dusk")
    for number, condition in enumerate(("dawn", "dusk")):
        rows = np.concatenate([table.select(split, [condition]).rows for split in ("train", "val")])
        assert sorted(rows) == list(range(number, 7, 2))
    with pytest.raises(InputError, match="--conditions night: --data .* has dawn, dusk"):
        select([table], "train", ["night"])
    assert [line.split()[:2] for line in table.summary().splitlines()[2:]] == [
        ["train", "dawn"], ["train", "dusk"], ["val", "dawn"], ["val", "dusk"]]
    assert table.fingerprint() != clean.fingerprint()


def test_all_images_are_to_be_named(images):
    root, clean = images
    *most, last = paths_of(clean)
    name(root, dict.fromkeys(most, "dusk"))
    with pytest.raises(InputError) as error:
        open_one(root, name="nuimages")
    assert str(error.value) == (
        f"{root}/conditions.json: says nothing of {last}; the dataset states no conditions, so "
        "name all of its scenes")


# ---- what is wrong with the file -----------------------------------------------------------------

@pytest.mark.parametrize("content", [
    "", "{", "[]", "{}", "null", "3", '["fog"]', '"fog"', '{"scene-0001": 3}',
    '{"scene-0001": null}', '{"scene-0001": ["fog"]}', '{"scene-0001": {"fog": 1}}',
    '{"scene-0001": "fog", "scene-0002": 3}', b"\xff\xfe{", "[" * 100000])
def test_another_file_is_one_line(copy, content):
    content = content if isinstance(content, bytes) else content.encode()
    (copy / "conditions.json").write_bytes(content)
    refused(copy, r"conditions.json: not of the form \{scene: condition\}; write it anew, or ")


@pytest.mark.parametrize("wrong", ["", " ", "fog|rain", "fog\nrain", "full", "a/b", "fog,"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_wrong_name_is_one_line(copy, wrong, alone):
    train = scenes(copy, "train")
    name(copy, {train[0]: wrong} if alone else {train[0]: wrong, train[1]: "fog"})
    refused(copy, r"conditions.json: '.*' cannot be a condition's name; letters, digits")


def test_a_file_that_cannot_be_read_is_one_line(copy):
    (copy / "conditions.json").mkdir()
    refused(copy, "conditions.json: Is a directory; ")


def test_a_scene_that_is_not_there_is_one_line(copy):
    train = scenes(copy, "train")
    name(copy, {train[0]: "fog", "scene-9999": "fog", "scene-8888": "fog"})
    refused(copy, f"conditions.json: scene-8888 is no scene of this dataset; it has {train[0]}, ")


def refused(root, pattern):
    for look in (True, None, False):
        with pytest.raises(InputError, match=pattern) as error:
            open_one(root, look=look)
        assert "\n" not in str(error.value) and str(root) in str(error.value)


def test_any_language_is_a_name(copy):
    scene = scenes(copy, "val", "night")[0]
    name(copy, {scene: "Nebel_früh-2 霧"})
    assert open_one(copy).select("val", ["Nebel_früh-2 霧"]).scenes() == [scene]


# ---- fingerprints --------------------------------------------------------------------------------

def test_other_conditions_are_other_frames(copy):
    """Of the frames whose condition they are, and of no others."""
    first, second = scenes(copy, "val")[:2]
    train, val = [], []
    for names in ({}, {first: "fog"}, {second: "fog"}, {first: "fog", second: "fog"},
                  {first: "haze"}, {first: "fog"}):
        name(copy, names) if names else None
        table = open_one(copy)
        train.append(table.select("train").fingerprint())
        val.append(table.select("val").fingerprint())
    assert val[1] == val[5] and len({repr(each) for each in val}) == 5
    assert len({repr(each) for each in train}) == 1
    # the order of the file, and its spaces, do not count
    (copy / "conditions.json").write_text(json.dumps({second: "fog", first: "fog"}, indent=3))
    assert open_one(copy).select("val").fingerprint() == val[3]


# ---- scripts -------------------------------------------------------------------------------------

def test_an_unknown_condition_of_stage_1_is_one_line(copy, tmp_path, capsys):
    name(copy, {scenes(copy, "train")[0]: "fog"})
    line = fails_with_one_line(capsys, stage1.main, stage1_args(
        copy, tmp_path / "out", "--conditions", "day-clear", "haze"))
    assert f"--conditions haze: --data {copy} has day-clear, day-rain, night, fog" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_stage_1_learns_from_a_new_condition(copy, tmp_path):
    clear = scenes(copy, "train", "day-clear")
    name(copy, dict.fromkeys(clear[:3], "fog"))
    stage1.main(stage1_args(copy, tmp_path / "s1", "--steps", "2", "--conditions", "fog"))
    frames = checkpoint_of(tmp_path / "s1")["made_from"]["frames"]
    assert frames == select([open_one(copy)], "train", ["fog"])[0].fingerprint()
    assert frames["scenes"] == 3


def test_a_run_under_other_conditions_does_not_go_on(copy, tmp_path, capsys):
    clear = scenes(copy, "train", "day-clear")
    name(copy, dict.fromkeys(clear[:3], "fog"))
    argv = stage1_args(copy, tmp_path / "s1", "--steps", "2", "--conditions", "day-clear", "fog")
    stage1.main(argv)
    name(copy, dict.fromkeys(clear[:2], "fog"))  # the same four frames
    line = fails_with_one_line(capsys, stage1.main, argv)
    assert "frames: frames 4, scenes 4, tables " in line and "now: frames 4, scenes 4" in line


def columns_of(out):
    return json.loads(out.with_suffix(".json").read_text())


@pytest.mark.slow
def test_a_probe_is_judged_under_the_new_condition(copy, first, tmp_path, capsys):
    """From stage 2 on, for classes and for metres; a result is made anew where the file changes."""
    foggy = [scenes(copy, "val", condition)[0] for condition in STATED]
    name(copy, dict.fromkeys(foggy, "fog"))
    stage2.main(stage2_args(copy, first, tmp_path / "s2", "--steps", "2"))
    for task in ("seg", "depth"):
        probe.main(probe_args(copy, task, tmp_path / "s2", tmp_path / task, "--steps", "2"))
    assert "  val    fog             3       3       3" in capsys.readouterr().out
    argv = eval_args(tmp_path / "seg", tmp_path / "depth", out=tmp_path / "table")
    evaluation.main(argv)
    text = capsys.readouterr().out
    for heading in ("mIoU [%], higher is better", "RMSE [m], lower is better"):
        assert f"| {heading} | task | full | day-clear | day-rain | night | fog |" in text
    for result, metric in zip(columns_of(tmp_path / "table"), ("mIoU", "RMSE")):
        assert result["columns"] == ["full", *STATED, "fog"] == list(result[metric])
        assert np.isfinite(list(result[metric].values())).all()
        assert len(set(result[metric].values())) == 5

    # the three scenes of fog alone
    seg = evaluation.Evaluation(tmp_path / "seg", torch.device("cpu"))
    seg.frames.tables = select([open_one(copy)], "val", ["fog"])
    seg.frames.first_item = np.array([0, 3])
    alone = evaluation.measure(seg, workers=0)["mIoU"]
    assert alone["full"] == alone["fog"] == columns_of(tmp_path / "table")[0]["mIoU"]["fog"]

    # a result is of these conditions: stored, and not valid under others
    stamp = (tmp_path / "seg/results.json").stat().st_mtime_ns
    evaluation.main(argv)
    assert (tmp_path / "seg/results.json").stat().st_mtime_ns == stamp
    name(copy, dict.fromkeys(foggy[:2], "fog"))
    evaluation.main(argv)
    assert columns_of(tmp_path / "table")[0]["mIoU"]["fog"] != alone["fog"]


@pytest.mark.slow
def test_a_probe_of_images_is_judged_by_condition(images, tmp_path):
    root, clean = images
    data = f"nuimages={root}"
    probe.main(probe_args(data, "seg", "vit_mini8", tmp_path / "seg", "--weights", "random",
                          "--image-size", "80", "160", "--steps", "2"))
    argv = eval_args(tmp_path / "seg", out=tmp_path / "table")
    evaluation.main(argv)
    (before,) = columns_of(tmp_path / "table")
    assert list(before["mIoU"]) == before["columns"] == ["full"]
    paths = paths_of(clean)
    name(root, {path: "dusk" if n % 2 else "dawn" for n, path in enumerate(paths)})
    evaluation.main(argv)
    (after,) = columns_of(tmp_path / "table")
    assert list(after["mIoU"]) == after["columns"] == ["full", "dawn", "dusk"]
    assert after["mIoU"]["full"] == before["mIoU"]["full"]
    assert "| full | dawn | dusk |" in (tmp_path / "table.md").read_text()
    os.remove(root / "conditions.json")
    evaluation.main(argv)
    assert columns_of(tmp_path / "table")[0]["columns"] == ["full"]

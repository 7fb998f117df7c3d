"""--data: several datasets at once, other datasets than nuScenes, and what does not go together."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import (SPAWN, checkpoint_of, eval_args, fails_with_one_line, lines, model_of, probe_args,
                  stage1_args, stage2_args)

import eval as evaluation
import finetune
import probe
import stage1
import stage2
from miniature.world import make_world

CLEAR = "day-clear"


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Root of another world: 2 training scenes by clear day and 1 by night, 1 validation layout."""
    root = tmp_path_factory.mktemp("other") / "data"
    return make_world(root, seed=8, train=(2, 0, 1), val=1, frames=1, workers=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Root of a miniature nuImages: 4 images for training, 3 for validation."""
    root = tmp_path_factory.mktemp("nuimages") / "data"
    return make_world(root, seed=9, train=(2, 1, 1), val=1, frames=1, workers=1,
                      dataset="nuimages")


@pytest.fixture(scope="module")
def both(world, other):
    """--data of two roots of nuScenes."""
    return f"nuscenes={world},nuscenes={other}"


# ---- two roots -----------------------------------------------------------------------------------

@pytest.mark.slow
def test_both_stages_learn_from_two_roots(both, world, other, tmp_path, capsys):
    s1, s2 = tmp_path / "s1", tmp_path / "s2"
    stage1.main(stage1_args(both, s1, "--steps", "2"))
    said = capsys.readouterr().out
    assert f"{world}: " in said and f"{other}: " in said  # the counts of each
    checkpoint = checkpoint_of(s1)
    assert checkpoint["made_from"]["frames"]["frames"] == 4 + 2  # clear days
    assert checkpoint["made_from"]["frames"]["scenes"] == 6
    assert list(checkpoint["samplings"]) == ["nuscenes"]
    assert 1 < lines(s1)[-1]["loss"] < 1.6

    stage2.main(stage2_args(both, s1, s2, "--steps", "2"))
    assert checkpoint_of(s2)["made_from"]["frames"]["frames"] == 8 + 3
    assert 1 < lines(s2)[-1]["loss"] < 1.6


@pytest.mark.slow
def test_a_mixture_is_not_one_of_its_parts(both, world, first, tmp_path, capsys):
    shutil.copytree(first, tmp_path / "s1")
    message = fails_with_one_line(
        capsys, stage1.main, stage1_args(both, tmp_path / "s1", "--steps", "2"))
    assert "holds a run made from other frames: frames 4" in message
    assert "now: frames 6" in message
    # one root by its name is the bare path
    stage1.main(stage1_args(f"nuscenes={world}", tmp_path / "s1", "--steps", "2"))
    assert "s1: finished, at step 2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_limit_holds_for_all_of_them(both, tmp_path):
    stage1.main(stage1_args(both, tmp_path / "s1", "--steps", "1", "--limit", "3"))
    assert checkpoint_of(tmp_path / "s1")["made_from"]["frames"]["frames"] == 3


@pytest.mark.slow
def test_a_probe_on_two_roots_is_judged_on_both(both, world, other, second, tmp_path):
    out = tmp_path / "p"
    probe.main(probe_args(both, "depth", second, out, "--steps", "2"))
    checkpoint = checkpoint_of(out)
    assert checkpoint["data"] == [["nuscenes", str(world)], ["nuscenes", str(other)]]
    assert checkpoint["made_from"]["frames"]["frames"] == 8 + 3
    evaluation.main(eval_args(out, out=tmp_path / "table"))
    [result] = json.loads((tmp_path / "table.json").read_text())
    assert result["images"] == 6 + 3 and result["data"] == [str(world), str(other)]

    # RMSE is a mean over images: of the one's 6 and the other's 3
    parts = [evaluation.evaluate(out, torch.device("cpu"), str(root), workers=0)
             for root in (f"nuscenes={world}", f"nuscenes={other}")]
    assert [part["images"] for part in parts] == [6, 3]
    for column, counts in (("full", (6, 3)), (CLEAR, (2, 1)), ("night", (2, 1))):
        mean = np.average([part["RMSE"][column] for part in parts], weights=counts)
        assert result["RMSE"][column] == pytest.approx(mean, rel=1e-5)

    # its own data is both
    evaluation.main([*eval_args(out, out=tmp_path / "again"), "--data", both])
    assert sorted(path.name for path in out.glob("results*")) == ["results.json"]
    evaluation.main([*eval_args(out, out=tmp_path / "one"), "--data", str(world)])
    assert len(list(out.glob("results-*.json"))) == 1


@pytest.mark.slow
def test_a_mixture_of_which_a_part_is_gone(world, other, second, tmp_path, capsys):
    """Its result is shown as it was stored; without one, the part is named."""
    gone = shutil.copytree(other, tmp_path / "gone")
    out = tmp_path / "p"
    data = f"nuscenes={world},nuscenes={gone}"
    probe.main(probe_args(data, "seg", second, out, "--steps", "1"))
    evaluation.main(eval_args(out, out=tmp_path / "table"))
    shutil.rmtree(gone)
    capsys.readouterr()
    evaluation.main(eval_args(out, out=tmp_path / "again"))
    said = capsys.readouterr().out
    assert f"{out}: its result is shown as it was stored and not checked, {gone} is not" in said
    table, again = ((tmp_path / f"{name}.md").read_text() for name in ("table", "again"))
    assert table == again
    (out / "results.json").unlink()
    message = fails_with_one_line(
        capsys, evaluation.main, eval_args(out, out=tmp_path / "none"))
    assert f"--data {gone}: no such folder" in message


@pytest.mark.parametrize("task", ["seg", "seg3d"])
def test_other_probes_take_two_roots_too(both, first, second, tmp_path, task):
    out = tmp_path / "p"
    encoder = first if task == "seg3d" else second
    probe.main(probe_args(both, task, encoder, out, "--steps", "2"))
    evaluation.main(eval_args(out, out=tmp_path / "table"))
    [result] = json.loads((tmp_path / "table.json").read_text())
    assert result["images"] == 9 and 0 < result["mIoU"]["full"] < 100


@pytest.mark.slow
@pytest.mark.parametrize("script", ["stage1", "probe"])
def test_two_processes_learn_from_two_roots(both, first, tmp_path, script):
    """And index them first: the cache of the two is empty."""
    def command(out):
        more = ["--steps", "2", "--batch", "4"]
        if script == "stage1":
            return stage1_args(both, out, *more)
        return probe_args(both, "seg3d", first, out, *more)

    module = {"stage1": stage1, "probe": probe}[script]
    module.main(command(tmp_path / "one"))
    done = subprocess.run([sys.executable, *SPAWN, f"{script}.py", *command(tmp_path / "two")],
                          cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [lines(tmp_path / name)[-1]["loss"] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert model_of(tmp_path / "one").keys() == model_of(tmp_path / "two").keys()
    tables = (tmp_path / "cache" / "collaborative-distillation").iterdir()
    assert len(list(tables)) == 2  # one for each root


# ---- nuImages ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_probe_of_nuimages_and_its_evaluation(images, second, tmp_path, capsys):
    frozen, trained = tmp_path / "frozen", tmp_path / "trained"
    data = f"nuimages={images}"
    probe.main(probe_args(data, "seg", second, frozen, "--steps", "2"))
    finetune.main(probe_args(data, "seg", second, trained, "--steps", "2"))
    assert checkpoint_of(frozen)["data"] == [["nuimages", str(images)]]
    assert len(checkpoint_of(trained)["classes"]) == 11
    evaluation.main(eval_args(frozen, trained, out=tmp_path / "table"))
    results = json.loads((tmp_path / "table.json").read_text())
    assert [result["columns"] for result in results] == [["full"], ["full"]]
    assert results[0]["images"] == 3 and list(results[0]["mIoU"]) == ["full"]

    # a bare path is of the probe's own dataset
    moved = shutil.copytree(images, tmp_path / "moved")
    capsys.readouterr()
    evaluation.main([*eval_args(frozen, out=tmp_path / "bare"), "--data", str(moved)])
    [again] = json.loads((tmp_path / "bare.json").read_text())
    assert again["mIoU"] == results[0]["mIoU"]
    assert sorted(path.name for path in frozen.glob("results*")) == ["results.json"]  # same frames


@pytest.mark.slow
def test_what_a_dataset_lacks_is_one_line(images, world, first, second, tmp_path, capsys):
    out, data = tmp_path / "out", f"nuimages={images}"
    no_scans = f"--data {images}: nuimages has no LiDAR scans"

    def refusal(script, argv):
        return fails_with_one_line(capsys, script.main, argv)
    assert no_scans in refusal(stage1, stage1_args(data, out))
    assert no_scans in refusal(stage1, stage1_args(f"nuscenes={world},{data}", out))
    assert no_scans in refusal(stage2, stage2_args(data, first, out))
    assert no_scans in refusal(probe, probe_args(data, "seg3d", first, out))
    assert "--task depth: nuimages has no depths" in refusal(
        probe, probe_args(data, "depth", second, out))
    assert "--task depth: nuimages has no depths" in refusal(
        finetune, probe_args(data, "depth", second, out))
    assert "--cameras CAM_FRONT: choose one of random, all" in refusal(
        probe, probe_args(data, "seg", second, out, "--cameras", "CAM_FRONT"))
    # the classes differ
    for script in (probe, finetune):
        message = refusal(script, probe_args(f"nuscenes={world},{data}", "seg", second, out))
        assert "--data: nuscenes and nuimages have other classes; probe them one by one" in message
    assert not out.exists()


@pytest.mark.slow
def test_a_probe_is_not_judged_on_other_classes(images, world, second, tmp_path, capsys):
    for name, data, task in (("points", world, "seg"), ("pixels", f"nuimages={images}", "seg"),
                             ("depth", world, "depth")):
        probe.main(probe_args(data, task, second, tmp_path / name, "--steps", "1"))
    capsys.readouterr()

    def refusal(name, data):
        argv = [*eval_args(tmp_path / name, out=tmp_path / "table"), "--data", data]
        return fails_with_one_line(capsys, evaluation.main, argv)
    assert f"--data {images}: nuimages has other classes than the probe's data" in refusal(
        "points", f"nuimages={images}")
    assert f"--data {world}: nuscenes has other classes than the probe's data" in refusal(
        "pixels", f"nuscenes={world}")
    assert "--task depth: nuimages has no depths" in refusal("depth", f"nuimages={images}")
    assert "not a nuImages root" in refusal("pixels", str(world))
    assert f"--data {images}: no --version v1.0-trainval" in refusal("points", str(images))


@pytest.mark.slow
def test_one_version_of_nuimages_may_be_without_validation(images, world, second, tmp_path):
    args = probe_args(f"nuimages={images}", "seg", second, tmp_path / "p", "--steps", "1")
    probe.main([*args, "--batch", "1", "--version", "v1.0-train"])
    assert checkpoint_of(tmp_path / "p")["val"]["frames"] == 0


# ---- conditions ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_conditions_of_any_data_stand_side_by_side(copy, other, images, second, tmp_path):
    """conditions.json brings a name of its own; nuImages states none; one world has no rain."""
    scenes = json.loads((copy / "v1.0-trainval/scene.json").read_text())
    (copy / "conditions.json").write_text(json.dumps({scenes[-1]["name"]: "fog"}))
    scenes = json.loads((other / "v1.0-trainval/scene.json").read_text())
    dry = shutil.copytree(other, tmp_path / "dry")
    named = {scene["name"]: CLEAR for scene in scenes if "ain" in scene["description"]}
    (dry / "conditions.json").write_text(json.dumps(named))

    runs = {"fog": copy, "dry": dry, "images": f"nuimages={images}"}
    for name, data in runs.items():
        probe.main(probe_args(data, "seg", second, tmp_path / name, "--steps", "1"))
    evaluation.main(eval_args(*(tmp_path / name for name in runs), out=tmp_path / "table"))
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0].endswith("| full | day-clear | day-rain | night | fog |")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:5]]
    assert [row[1] for row in rows] == ["seg", "seg", "seg on nuimages"]
    numbers = [[cell.partition(" (")[0].replace(".", "").isdigit() for cell in row[2:]]
               for row in rows]
    assert numbers[0] == [True] * 5
    assert numbers[1] == [True, True, False, True, False] and rows[1][4] == "not run"
    assert rows[1][6] == "–"
    assert rows[2][3:] == ["–"] * 4

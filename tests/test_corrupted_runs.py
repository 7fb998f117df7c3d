"""Corrupted copies in use: by a probe's evaluation, by stage 2, with clean data; the commands."""
import json
import shutil

import numpy as np
import pytest
import torch
from runs import (checkpoint_of, eval_args, fails_with_one_line, largest_difference, lines,
                  model_of, probe_args, stage2_args)

import eval as evaluation
import probe
import stage2
from experiments import corruptions
from experiments.degradations import SCANS
from plumbing import run_folder


def make(data, out, corruption, severity, *more):
    """`make` of corruptions in this process."""
    corruptions.main(["make", "--data", str(data), "--out", str(out), "--corruption", corruption,
                      "--severity", str(severity), "--workers", "0", *more])
    return out


# ---- images --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def probes(world, tmp_path_factory):
    """A probe of two steps for each task on a random encoder."""
    root = tmp_path_factory.mktemp("probes")
    for task in ("seg", "depth"):
        probe.main(probe_args(
            world, task, "vit_mini8", root / task, "--weights", "random", "--image-size", "80",
            "160", "--steps", "2", "--head", "batchnorm", "--lr", "1"))
    return root


def evaluate(*probes, out, more=(), workers=0):
    """The rows of OUT.json of `images`."""
    corruptions.main(["images", *map(str, probes), "--out", str(out), "--workers", str(workers),
                      "--device", "cpu", "--copies", str(out.with_suffix(".copies")), *more])
    return json.loads(out.with_suffix(".json").read_text())


@pytest.mark.slow
def test_probes_on_corrupted_images(world, probes, tmp_path, capsys):
    again = shutil.copytree(probes / "depth", tmp_path / "again")
    seg_again = f"{probes}/./seg"
    rows = evaluate(probes / "seg", probes / "depth", again, seg_again, out=tmp_path / "table",
                    more=["--severity", "5"])
    assert len(rows) == 3  # the last one is the first

    device = torch.device("cpu")
    foggy = make(world, tmp_path / "foggy", "fog", 5, "--split", "val", "--image-size", "80", "160")
    for row, metric in zip(rows, ("mIoU", "RMSE", "RMSE")):
        results = row["results"]
        assert list(results) == ["clean", "fog", "gaussian_noise", "motion_blur"]
        assert row["severity"] == 5
        assert results["clean"] == evaluation.evaluate(row["run"], device, workers=0)
        # a copy in another place, of the same frames; its one column is the corruption's
        fog = evaluation.evaluate(row["run"], device, str(foggy), workers=0)
        assert results["fog"] | {"data": str(foggy)} == fog
        assert results["fog"][metric]["fog"] == results["fog"][metric]["full"]
        assert list(results["fog"][metric]) == ["full", "fog"]
        assert len({result[metric]["full"] for result in results.values()}) == 4
    for name, result in rows[1]["results"].items():
        assert result["RMSE"] == rows[2]["results"][name]["RMSE"]

    text = (tmp_path / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "mIoU [%], higher is better; severity 5" in text
    assert ("| RMSE [m], lower is better; severity 5 | clean | fog | gaussian_noise | "
            "motion_blur |") in text
    assert text.count("(+0.00)") == 4 and len(text.splitlines()) == 8


@pytest.mark.slow
def test_loading_processes_draw_the_same(probes, tmp_path):
    found = []
    for workers in (0, 1):
        found.append(evaluate(probes / "depth", out=tmp_path / str(workers), workers=workers,
                              more=["--corruptions", "fog", "--seed", "4"]))
        assert found[-1][0]["results"]["fog"].pop("data").startswith(f"{tmp_path}/{workers}.copies")
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_second_evaluation_takes_the_copies(world, probes, tmp_path, capsys):
    more = ["--corruptions", "motion_blur", "--data", str(world)]
    rows = evaluate(probes / "depth", out=tmp_path / "table", more=more)
    (made,) = (tmp_path / "table.copies").iterdir()
    capsys.readouterr()
    assert evaluate(probes / "seg", probes / "depth", out=tmp_path / "table", more=more)[1:] == rows
    said = capsys.readouterr().out
    assert said.count(f"{made}: made before with the same arguments, taken as it is") == 2
    assert f"written: {made}" not in said


# ---- stage 2 -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scans(world, tmp_path_factory):
    """Copies of `world` with corrupted scans: {corruption: folder}."""
    root = tmp_path_factory.mktemp("scans")
    return {name: make(world, root / name, name, 5, "--sensor", "lidar") for name in SCANS}


@pytest.mark.slow
def test_stage2_on_corrupted_clouds(world, first, scans, tmp_path):
    stage2.main(stage2_args(world, first, tmp_path / "clean", "--steps", "2"))
    for name in SCANS:
        stage2.main(stage2_args(scans[name], first, tmp_path / name, "--steps", "2"))
    losses = [lines(tmp_path / name)[-1]["loss"] for name in ("clean", *SCANS)]
    assert len(set(losses)) == 3 and max(losses) - min(losses) < 0.2


@pytest.mark.slow
def test_stage2_goes_on_with_the_same_corruption_only(world, first, scans, tmp_path, capsys):
    """Though the path of --data may change, and the tables say the same of all copies."""
    def run(out, data):
        stage2.main(stage2_args(data, first, tmp_path / out, "--steps", "2"))

    def refused(out, data):
        line = fails_with_one_line(capsys, lambda _: run(out, data), [])
        assert f"{tmp_path / out}" in line and "frames: " in line and "; now: " in line

    noise = scans["gaussian_noise"]
    run("clean", world)
    run("noisy", noise)
    before = (tmp_path / "noisy" / "log.jsonl").read_text()
    lidar = ("--sensor", "lidar")
    refused("noisy", make(world, tmp_path / "weaker", "gaussian_noise", 4, *lidar))
    refused("noisy", scans["density_decrease"])
    refused("noisy", make(world, tmp_path / "other", "gaussian_noise", 5, *lidar, "--seed", "1"))

    # nor do clean clouds go on with corrupted ones, or the other way round
    refused("clean", noise)
    refused("noisy", world)

    # the same: finished, nothing is done again, wherever the copy is
    run("noisy", noise)
    run("noisy", make(world, tmp_path / "alike", "gaussian_noise", 5, *lidar))
    assert (tmp_path / "noisy" / "log.jsonl").read_text() == before
    run("again", noise)
    assert largest_difference(model_of(tmp_path / "again"), model_of(tmp_path / "noisy")) == 0


@pytest.mark.slow
def test_a_stopped_stage2_goes_on_with_the_same_clouds_only(world, first, tmp_path, capsys,
                                                            monkeypatch):
    copies = {severity: make(world, tmp_path / severity, "density_decrease", severity, "--sensor",
                             "lidar") for severity in ("1", "2")}

    def run(severity):
        stage2.main(stage2_args(copies[severity], first, tmp_path / "out", "--steps", "3",
                                "--save-every", "0"))

    save = run_folder.save

    def save_and_stop(path, content):
        save(path, content)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run("2")
    assert "frames: " in fails_with_one_line(capsys, run, "1")
    run("2")
    assert checkpoint_of(tmp_path / "out")["step"] == 3


# ---- clean and corrupted together ----------------------------------------------------------------

@pytest.mark.slow
def test_clean_and_corrupted_frames_together(world, first, tmp_path, capsys):
    foggy = make(world, tmp_path / "foggy", "fog", 3, "--image-size", "80", "160")
    both = f"nuscenes={world},nuscenes={foggy}"
    stage2.main(stage2_args(both, first, tmp_path / "s2", "--steps", "2"))
    assert checkpoint_of(tmp_path / "s2")["made_from"]["frames"]["frames"] == 16

    # a probe of clean frames, judged on each and on both
    probe.main(probe_args(world, "seg", tmp_path / "s2", tmp_path / "probe", "--steps", "2"))
    full = []
    for number, data in enumerate((str(world), str(foggy), both)):
        out = tmp_path / f"table-{number}"
        evaluation.main([*eval_args(tmp_path / "probe", out=out), "--data", data])
        full.append(json.loads(out.with_suffix(".json").read_text())[0])
    conditions = ["day-clear", "day-rain", "night"]
    assert [list(result["mIoU"]) for result in full] == [
        ["full", *conditions], ["full", "fog"], ["full", *conditions, "fog"]]
    assert full[2]["images"] == 12
    for name in conditions:
        assert full[2]["mIoU"][name] == full[0]["mIoU"][name]
    assert full[2]["mIoU"]["fog"] == full[1]["mIoU"]["fog"] == full[1]["mIoU"]["full"]
    assert "judged on other frames than its own" in capsys.readouterr().out


# ---- the picture, and bad input ------------------------------------------------------------------

@pytest.mark.slow
def test_the_picture(world, tmp_path):
    from PIL import Image
    out = tmp_path / "new" / "show.png"
    corruptions.main(["show", "--data", str(world), "--image-size", "80", "160",
                      "--out", str(out)])
    with Image.open(out) as picture:
        assert picture.width == 1800 and 300 < picture.height < 700
        assert len(np.unique(np.asarray(picture))) > 100


def test_bad_input_is_one_line_and_exit_code_2(world, first, probes, tmp_path, capsys):
    def error(*argv):
        return fails_with_one_line(capsys, corruptions.main, list(map(str, argv)))

    probe.main(probe_args(world, "seg3d", first, tmp_path / "3d", "--steps", "1"))
    assert "3d of --task seg3d" in error("images", probes / "seg", tmp_path / "3d",
                                         "--device", "cpu")
    assert "no last.pth there" in error("images", tmp_path / "none", "--device", "cpu")
    assert "probe is needed" in error("images", first, "--device", "cpu")

    assert "not a nuScenes root" in error("make", "--data", tmp_path, "--out", tmp_path / "out",
                                          "--corruption", "fog")
    assert not (tmp_path / "out").exists()  # refused before anything was written

    assert "--camera CAM_X" in error("show", "--data", world, "--camera", "CAM_X")
    assert "--frame 999" in error("show", "--data", world, "--frame", "999")


def test_a_split_of_one_s_own_is_refused(probes, tmp_path, capsys):
    """The copies corrupt the dataset's own split, so such a probe would see clean pictures."""
    probe = torch.load(probes / "seg/last.pth", weights_only=True)
    probe["args"]["val_scenes"] = ["scene-0001"]
    (tmp_path / "own").mkdir()
    torch.save(probe, tmp_path / "own/last.pth")
    argv = ["images", str(tmp_path / "own"), "--out", str(tmp_path / "table"), "--device", "cpu"]
    line = fails_with_one_line(capsys, corruptions.main, argv)
    assert "own: has --val-scenes; use `make`, then eval.py --data COPY" in line


@pytest.mark.parametrize("argv", [
    [], ["images", "x", "--severity", "6"], ["images", "x", "--corruptions", "snow"],
    ["lidar", "fog", "--"], ["make", "--data", "x", "--out", "y"],
    ["make", "--data", "x", "--out", "y", "--corruption", "snow"],
    ["make", "--data", "x", "--out", "y", "--corruption", "fog", "--sensor", "radar"]])
def test_wrong_words_are_argparse_s_errors(argv):
    with pytest.raises(SystemExit) as exit_:
        corruptions.main(argv)
    assert exit_.value.code == 2

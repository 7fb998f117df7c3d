"""Corruptions applied: to frames, to a probe's evaluation, to stage 2; each draw is repeated."""
import functools
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from runs import (checkpoint_of, fails_with_one_line, largest_difference, lines, model_of,
                  probe_args, stage2_args)

import eval as evaluation
import probe
import stage2
from data import Frames
from experiments import corruptions
from experiments.corruptions import SCANS, CorruptedImages, CorruptedScans
from plumbing import run_folder
from plumbing.errors import InputError
from readers.nuscenes import load_index

SIZE = (80, 160)


# ---- frames --------------------------------------------------------------------------------------

def test_images_change_and_points_do_not(world):
    index = load_index(world)
    rows = index.select("val")
    noise = dict(image_size=SIZE, labels=True, corruption="gaussian_noise", severity=2)
    clean = Frames(index, rows, image_size=SIZE, labels=True)
    noisy = CorruptedImages(index, rows, **noise)
    part = CorruptedImages(index, rows[2:], **noise)
    other = CorruptedImages(index, rows, **noise, noise_seed=1)

    before, after = clean[0, 3], noisy[0, 3]
    for name in ("pixels", "depths", "labels"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["image"], after["image"])

    # whatever the epoch, the other frames and the process, but not the seed
    assert torch.equal(after["image"], part[7, 1]["image"])
    again = pickle.loads(pickle.dumps(noisy))
    assert torch.equal(after["image"], again[0, 3]["image"])
    assert not torch.equal(after["image"], other[0, 3]["image"])

    # frames draw each for itself
    drawn = []
    for n in (0, 1):
        drawn.append(noisy[0, n]["image"].float() - clean[0, n]["image"].float())
    assert abs(torch.corrcoef(torch.stack(drawn).flatten(1))[0, 1]) < 0.05


def test_cameras_draw_each_for_itself(world):
    index = load_index(world)
    frames = CorruptedImages(index, [0], image_size=SIZE, corruption="fog", severity=5)
    # one camera twice
    index.image = index.image[:, [0, 0]]
    index.image_size = index.image_size[:, [0, 0]]
    assert not np.array_equal(frames.image(0, 0), frames.image(0, 1))


@pytest.mark.parametrize("name", SCANS)
def test_scans_change_and_images_do_not(world, name):
    index = load_index(world)
    rows = index.select("train")
    clean = Frames(index, rows, image_size=SIZE)
    frames = CorruptedScans(index, rows, image_size=SIZE, corruption=name, severity=5)
    assert torch.equal(frames[0, 1]["image"], clean[0, 1]["image"])
    assert torch.equal(frames[0, 1]["pixels"], frames[3, 1]["pixels"])  # in each epoch alike
    again = pickle.loads(pickle.dumps(frames))
    assert np.array_equal(again.scan(rows[1]), frames.scan(rows[1]))
    left = 0.7 if name == "density_decrease" else 1
    count, fewer = len(clean[0, 1]["depths"]), len(frames[0, 1]["depths"])
    assert fewer == pytest.approx(count * left, rel=0.05)

    # each frame draws for itself: two frames of one scan
    index.lidar[rows[1]] = index.lidar[rows[0]]
    one, two = (frames.scan(row) for row in rows[:2])
    assert one.shape == two.shape and not np.array_equal(one, two)


@pytest.mark.parametrize("name", SCANS)
def test_corrupted_scans_have_no_labels(world, name):
    index = load_index(world)
    frames = CorruptedScans(index, index.select("train"), labels=True, corruption=name, severity=1)
    with pytest.raises(InputError, match="no labels"):
        frames[0, 0]


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
                      "--device", "cpu", *more])
    return json.loads(out.with_suffix(".json").read_text())


@pytest.mark.slow
def test_probes_on_corrupted_images(world, probes, tmp_path, capsys):
    again = shutil.copytree(probes / "depth", tmp_path / "again")
    seg_again = f"{probes}/./seg"
    rows = evaluate(probes / "seg", probes / "depth", again, seg_again, out=tmp_path / "table",
                    more=["--severity", "5"])
    assert len(rows) == 3  # the last one is the first

    device = torch.device("cpu")
    foggy = functools.partial(CorruptedImages, corruption="fog", severity=5)
    for row, metric in zip(rows, ("mIoU", "RMSE", "RMSE")):
        results = row["results"]
        assert list(results) == ["clean", "fog", "gaussian_noise", "motion_blur"]
        assert row["severity"] == 5
        assert results["clean"] == evaluation.evaluate(row["run"], device, workers=0)
        fog = evaluation.evaluate(row["run"], device, workers=0, dataset=foggy)
        assert results["fog"] == fog
        assert len({result[metric]["full"] for result in results.values()}) == 4
    for name, result in rows[1]["results"].items():
        assert result["RMSE"] == rows[2]["results"][name]["RMSE"]

    text = (tmp_path / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "mIoU [%], higher is better; severity 5" in text
    assert ("| RMSE [m], lower is better; severity 5 | clean | fog | gaussian_noise | "
            "motion_blur |") in text
    assert text.count("(+0.00)") == 4 and len(text.splitlines()) == 8


def test_loading_processes_draw_the_same(probes, tmp_path):
    found = []
    for workers in (0, 1):
        found.append(evaluate(probes / "depth", out=tmp_path / str(workers), workers=workers,
                              more=["--corruptions", "fog", "--seed", "4"]))
    assert found[0] == found[1]


# ---- stage 2 -------------------------------------------------------------------------------------

@pytest.mark.slow
def test_stage2_on_corrupted_clouds(world, first, tmp_path):
    stage2.main(stage2_args(world, first, tmp_path / "clean", "--steps", "2"))
    for name in SCANS:
        argv = stage2_args(world, first, tmp_path / name, "--steps", "2")
        corruptions.main(["lidar", name, "--severity", "5", "--", *argv])
    losses = [lines(tmp_path / name)[-1]["loss"] for name in ("clean", *SCANS)]
    assert len(set(losses)) == 3 and max(losses) - min(losses) < 0.2


@pytest.mark.slow
def test_stage2_goes_on_with_the_same_corruption_only(world, first, tmp_path, capsys):
    def run(out, *more):
        argv = stage2_args(world, first, tmp_path / out, "--steps", "2")
        corruptions.main(["lidar", *more, "--", *argv])

    def refused(out, *more):
        return fails_with_one_line(capsys, lambda argv: run(out, *argv), more)

    clean = stage2_args(world, first, tmp_path / "clean", "--steps", "2")
    noise = ["gaussian_noise", "--severity", "5"]
    stage2.main(clean)
    run("noisy", *noise)
    before = (tmp_path / "noisy" / "log.jsonl").read_text()
    assert "--severity 5, now 4" in refused("noisy", "gaussian_noise", "--severity", "4")
    assert "--corruption gaussian_noise, now density_decrease" in refused(
        "noisy", "density_decrease", "--severity", "5")
    assert "--noise-seed 0, now 1" in refused("noisy", *noise, "--seed", "1")

    # nor do clean clouds go on with corrupted ones, or the other way round
    assert "--corruption None, now gaussian_noise" in refused("clean", "gaussian_noise")
    clean[clean.index("--out") + 1] = str(tmp_path / "noisy")
    assert "now None" in fails_with_one_line(capsys, stage2.main, clean)

    # the same: finished, nothing is done again
    run("noisy", *noise)
    assert (tmp_path / "noisy" / "log.jsonl").read_text() == before
    run("again", *noise)
    assert largest_difference(model_of(tmp_path / "again"), model_of(tmp_path / "noisy")) == 0


def test_a_stopped_stage2_goes_on_with_the_same_clouds_only(world, first, tmp_path, capsys,
                                                            monkeypatch):
    argv = stage2_args(world, first, tmp_path / "out", "--steps", "3", "--save-every", "0")

    def run(severity):
        corruptions.main(["lidar", "density_decrease", "--severity", severity, "--", *argv])

    save = run_folder.save

    def save_and_stop(path, content):
        save(path, content)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run("2")
    assert "--severity 2, now 1" in fails_with_one_line(capsys, run, "1")
    run("2")
    assert checkpoint_of(tmp_path / "out")["step"] == 3


# ---- the picture, and bad input ------------------------------------------------------------------

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

    assert "after --" in error("lidar", "gaussian_noise")
    argv = stage2_args(tmp_path, first, tmp_path / "out")
    assert "not a nuScenes root" in error("lidar", "gaussian_noise", "--", *argv)
    assert not (tmp_path / "out").exists()  # refused before anything was written

    assert "--camera CAM_X" in error("show", "--data", world, "--camera", "CAM_X")
    assert "--frame 999" in error("show", "--data", world, "--frame", "999")


@pytest.mark.parametrize("argv", [
    [], ["images", "x", "--severity", "6"], ["images", "x", "--corruptions", "snow"],
    ["lidar", "fog", "--"]])
def test_wrong_words_are_argparse_s_errors(argv):
    with pytest.raises(SystemExit) as exit_:
        corruptions.main(argv)
    assert exit_.value.code == 2

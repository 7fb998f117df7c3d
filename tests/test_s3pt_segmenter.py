"""Segmenter's heads: the paper's settings, two steps of each, resuming, results, transfer."""
import json
import subprocess
import sys

import numpy as np
import pytest
import test_cityscapes
import torch
from conftest import ROOT
from runs import (RUN, SPAWN, checkpoint_of, fails_with_one_line, largest_difference, lines,
                  model_of, open_one)
from test_nuimages import rectangle, write

from metrics import class_iou
from plumbing import run_folder
from readers import cityscapes, nuimages
from s3pt import segmenter
from s3pt.segmenter import COMMON, parse, poly

SMALL = ["--scale", "160", "90", "--crop", "64", "--stride", "48", "--batch", "2", *RUN]
ROAD = nuimages.CLASSES.index("driveable_surface") - 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six training and three validation pictures of nuImages, drawn by hand."""
    root = tmp_path_factory.mktemp("nuimages")
    for split, count in (("train", 6), ("val", 3)):
        samples = {}
        for number in range(count):
            road = ("flat.driveable_surface", rectangle(0, 40 + 4 * number, 160, 90))
            own = ("vehicle.ego", rectangle(0, 80, 160, 90))
            car = ("vehicle.car", rectangle(20 * number, 30, 20 * number + 40, 60))
            samples[f"{split}{number}"] = ([road, own], [car])
        write(root, split, samples)
    open_one(root, name="nuimages")  # into the cache
    return root


@pytest.fixture(scope="module")
def towns(tmp_path_factory):
    """Two pictures of Cityscapes for validation: sky, a road, and on it a car and a person."""
    root = tmp_path_factory.mktemp("towns")
    for number in range(2):
        ids = np.full((90, 160), 23)
        ids[45:] = 7
        ids[40:60, 20:60] = 26
        ids[30:60, 100:110] = 24
        test_cityscapes.write(root, f"val/lindau/lindau_{number:06}_000019", ids)
    open_one(root, name="cityscapes")
    return root


def command(pictures, out, *more):
    return ["--data", f"nuimages={pictures}", "--encoder", "miniature/encoder.pth",
            "--out", str(out), *SMALL, *more]


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """Folder of two linear heads of two steps."""
    out = tmp_path_factory.mktemp("runs") / "linear"
    segmenter.main(command(pictures, out, "--head", "linear", "--steps", "2",
                           "--lr", "1e-2", "1e-3"))
    return out


def result(out, name="results"):
    return json.loads((out / f"{name}.json").read_text())


# ---- settings ------------------------------------------------------------------------------------

def test_the_bare_command_is_the_paper_s():
    args = parse(["--data", "nuimages=x", "--encoder", "runs/s3pt"])
    assert (args.steps, args.head, args.lr) == (160_000, "mask", [8e-4])
    assert (args.batch, args.weight_decay) == (8, 1e-4)
    assert (args.scale, args.crop, args.stride) == ([2048, 512], 512, 480)
    assert args.out == "runs/segmenter-s3pt-mask-nuimages"
    args = parse(["--data", "cityscapes=x", "--encoder", "e"])
    assert (args.scale, args.crop, args.stride) == ([2049, 1025], 768, 512)
    args = parse(["--data", "cityscapes=x", "--encoder", "e", "--crop", "518"])
    assert (args.scale, args.crop, args.stride) == ([2049, 1025], 518, 518)
    args = parse(["--data", "pictures=x", "--encoder", "e", "--crop", "64", "--stride", "32"])
    assert (args.scale, args.crop, args.stride) == (None, 64, 32)


def test_the_learning_rate_falls_to_a_tenth():
    assert poly(0, 100, 8e-4) == pytest.approx(8e-4)
    assert poly(50, 100, 1.0) == pytest.approx(0.1 + 0.9 * 0.53589, rel=1e-4)  # 2^-0.9
    rates = [poly(step, 100, 1.0) for step in range(100)]
    assert rates == sorted(rates, reverse=True)
    assert 0.1 < rates[-1] < 0.12


def test_common_classes_are_the_seven_of_both():
    assert list(COMMON["nuimages"]) == [name for name in COMMON["nuimages"]
                                        if name in nuimages.CLASSES]
    assert set(COMMON["cityscapes"]) <= set(cityscapes.CLASSES)
    assert set(COMMON["nuimages"].values()) == set(COMMON["cityscapes"].values()) == {
        "car", "truck", "bus", "bicycle", "motorcycle", "pedestrian", "road"}


@pytest.mark.parametrize("flags, message", [
    (["--encoder", "e", "--data", "pictures=x"], "--crop: pictures has no default"),
    (["--encoder", "e", "--stride", "600"], "--stride 600: leaves gaps; at most --crop 512"),
    (["--encoder", "e", "--image-size", "80", "160"], "--image-size: has no meaning here"),
    ([], "--encoder: give one to train heads on, or --evaluate RUN"),
    (["--evaluate", "r", "--weight-decay", "0"], "--weight-decay: not with --evaluate"),
    (["--evaluate", "r", "--crop", "64"], "--crop: not with --evaluate, whose run says it"),
    (["--evaluate", "r"], "r: no such file"),
])
def test_flags_that_do_not_go_together(capsys, flags, message):
    argv = flags if "--data" in flags else ["--data", "nuimages=x", *flags]
    assert message in fails_with_one_line(capsys, segmenter.main, argv)


def test_data_that_no_head_can_learn(pictures, tmp_path, capsys):
    argv = command(pictures, tmp_path / "run")
    wrong = fails_with_one_line(capsys, segmenter.main, [*argv, "--crop", "60"])
    assert "--crop 60 60: vit_mini8 has patches of 8 pixels" in wrong
    argv[1] = f"pictures={pictures}"
    wrong = fails_with_one_line(capsys, segmenter.main, argv)
    assert "pictures has no labels of pixels" in wrong
    assert not (tmp_path / "run").exists()


# ---- runs ----------------------------------------------------------------------------------------

def test_two_steps_of_two_linear_heads(run, capsys):
    checkpoint = checkpoint_of(run)
    assert checkpoint["kind"] == "segmenter" and checkpoint["step"] == 2
    assert tuple(checkpoint["classes"]) == nuimages.ALL_CLASSES[1:]
    assert checkpoint["model"]["0.weight"].shape == (13, 96, 1, 1)
    assert lines(run)[-1]["lr"] == pytest.approx([0.1 * lr + 0.9 * lr * 2**-0.9
                                                  for lr in (1e-2, 1e-3)])
    assert set(lines(run)[-1]["loss_of"]) == {"lr 0.01", "lr 0.001"}
    found = result(run)
    assert found["images"] == 3 and [head["lr"] for head in found["heads"]] == [1e-2, 1e-3]
    # Every pixel of every picture has one of the 13 classes
    for head in found["heads"]:
        counts = torch.tensor(head["counts"])
        assert counts.sum() == 3 * 90 * 160
        rows = head["columns"]["nuimages"]
        assert list(rows)[:2] == ["mean over 11 classes", "mean over 13 classes"]
        iou = 100 * class_iou(counts)
        assert rows["mean over 13 classes"] == pytest.approx(iou.nanmean().item())
        assert rows["mean over 11 classes"] == pytest.approx(iou[:11].nanmean().item())
    means = [head["columns"]["nuimages"]["mean over 13 classes"] for head in found["heads"]]
    assert found["best"] == means.index(max(means))


def test_a_finished_run_is_not_judged_again(run, pictures, monkeypatch, capsys):
    monkeypatch.setattr(segmenter, "judge", None)
    before = (run / "results.json").read_text()
    segmenter.main(command(pictures, run, "--head", "linear", "--steps", "2",
                           "--lr", "1e-2", "1e-3"))
    assert (run / "results.json").read_text() == before
    printed = capsys.readouterr().out
    assert "| mean over 13 classes | " in printed
    assert printed.count(", the best on val |") == 1


def test_on_its_own_data_evaluation_gives_what_training_gave(run, pictures):
    segmenter.main(["--evaluate", str(run), "--data", f"nuimages={pictures}", "--workers", "0",
                    "--device", "cpu"])
    assert result(run, "results-nuimages") == result(run)


@pytest.mark.slow
def test_heads_side_by_side_are_the_heads_alone(run, pictures, tmp_path):
    segmenter.main(command(pictures, tmp_path, "--head", "linear", "--steps", "2", "--lr", "1e-3"))
    both = {name.removeprefix("1."): value for name, value in model_of(run).items()
            if name.startswith("1.")}
    alone = {name.removeprefix("0."): value for name, value in model_of(tmp_path).items()}
    assert largest_difference(both, alone) < 1e-7


@pytest.mark.slow
def test_a_stopped_run_of_mask_transformers_goes_on_as_if_it_had_not(
        pictures, tmp_path, monkeypatch):
    def start(out):
        segmenter.main(command(pictures, out, "--steps", "4", "--save-every", "0"))
    start(tmp_path / "through")
    save = run_folder.save

    def save_and_stop(path, content):
        save(path, content)
        if content["step"] == 3 and str(path).endswith("last.pth"):
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "stopped")
    assert checkpoint_of(tmp_path / "stopped")["step"] == 3
    start(tmp_path / "stopped")
    assert largest_difference(*(model_of(tmp_path / name) for name in ("through", "stopped"))) == 0
    through, stopped = (lines(tmp_path / name) for name in ("through", "stopped"))
    assert [line["loss"] for line in through] == [line["loss"] for line in stopped]
    assert result(tmp_path / "through") == result(tmp_path / "stopped")


@pytest.mark.slow
def test_two_processes_are_one(pictures, tmp_path):
    more = ["--head", "mask", "--steps", "2", "--lr", "1e-3"]
    segmenter.main(command(pictures, tmp_path / "one", *more))
    done = subprocess.run([sys.executable, *SPAWN, "-m", "s3pt.segmenter",
                           *command(pictures, tmp_path / "two", *more)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = model_of(tmp_path / "one"), model_of(tmp_path / "two")
    differences = [(one[name] - two[name]).abs().flatten() for name in one]
    assert torch.cat(differences).mean() < 1e-5  # of two steps of 1e-3
    losses = [lines(tmp_path / name)[-1]["loss"] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    counts = [torch.tensor(result(tmp_path / name)["heads"][0]["counts"])
              for name in ("one", "two")]
    assert counts[0].sum() == counts[1].sum()
    assert (counts[0] - counts[1]).abs().sum() < 0.01 * counts[0].sum()


# ---- transfer ------------------------------------------------------------------------------------

def evaluate(run, towns):
    segmenter.main(["--evaluate", str(run), "--data", f"cityscapes={towns}", "--scale", "160",
                    "90", "--workers", "0", "--device", "cpu"])


def test_both_numbers_stand_over_the_same_seven_classes(run, towns, capsys):
    evaluate(run, towns)
    found = result(run, "transfer-cityscapes")
    assert found["best"] == result(run)["best"]
    for head, own in zip(found["heads"], result(run)["heads"]):
        inside, abroad = head["columns"]["nuimages"], head["columns"]["nuimages to cityscapes"]
        assert list(inside) == list(abroad)
        assert set(inside) == {"mean over 7 classes", *COMMON["nuimages"].values()}
        # In-domain, by the names: the truth of a common class, and what is said of it
        counts = torch.tensor(own["counts"], dtype=torch.double)
        kept = [nuimages.CLASSES.index(name) - 1 for name in COMMON["nuimages"]]
        hits = counts[ROAD, ROAD]
        union = counts[ROAD].sum() + counts[kept, ROAD].sum() - hits
        assert inside["road"] == pytest.approx((100 * hits / union).item())
    printed = capsys.readouterr().out
    assert "| IoU [%] | nuimages, lr 0.01" in printed and "| nuimages to cityscapes, lr" in printed


def test_heads_that_know_the_truth_transfer_without_loss(run, towns, monkeypatch):
    """The order of the classes differs: a head that says each common class by its own number."""
    own = list(nuimages.ALL_CLASSES[1:])
    theirs = {common: name for name, common in COMMON["cityscapes"].items()}

    def judge(_, pictures, names, windows, workers):
        assert len(names) == 19 and tuple(windows) == (64, 48)
        counts = torch.zeros(1, 19, 19, dtype=torch.long)
        for name, common in COMMON["nuimages"].items():
            truth = cityscapes.CLASSES.index(theirs[common]) - 1
            counts[0, truth, own.index(name)] = 10
        counts[0, cityscapes.CLASSES.index("rider") - 1, own.index("bicycle")] = 10
        return [type("Total", (), {"counts": counts})] * 2
    monkeypatch.setattr(segmenter, "judge", judge)
    evaluate(run, towns)
    rows = result(run, "transfer-cityscapes")["heads"][0]["columns"]["nuimages to cityscapes"]
    assert set(rows.values()) == {100.0} and len(rows) == 8


def test_what_cannot_be_transferred_is_refused_first(run, towns, tmp_path, monkeypatch,
                                                     capsys):
    def refused(folder=run, data=f"cityscapes={towns}"):
        return fails_with_one_line(capsys, segmenter.main, [
            "--evaluate", str(folder), "--data", data, "--workers", "0", "--device", "cpu"])
    assert "pictures has no labels of pixels" in refused(data=f"pictures={towns}")
    assert "image_encoder, but segmenter is needed" in refused(ROOT / "miniature/encoder.pth")
    with monkeypatch.context() as patch:
        patch.setitem(segmenter.COMMON, "cityscapes", {})
        assert "cityscapes has no class that is known to be one of nuimages's" in refused()
    checkpoint = checkpoint_of(run)
    torch.save(checkpoint, tmp_path / "last.pth")
    assert f"{tmp_path}: has no results.json" in refused(tmp_path)
    torch.save(checkpoint | {"total": 5}, tmp_path / "last.pth")
    assert "unfinished, step 2 of 5" in refused(tmp_path)
    (tmp_path / "results.json").write_text((run / "results.json").read_text())
    made_from = {"encoder": {"name": "vit_mini8", "weights": "1"}}
    torch.save(checkpoint | {"made_from": made_from}, tmp_path / "last.pth")
    assert "its head was made from another encoder" in refused(tmp_path)


@pytest.mark.slow
def test_a_head_learns_in_one_miniature_and_is_judged_in_another(tmp_path):
    from miniature.world import make_world
    small = dict(seed=4, val=1, frames=1, workers=1)
    streets = make_world(tmp_path / "streets", dataset="nuimages", train=(4, 1, 1), cameras=1,
                         **small)
    towns = make_world(tmp_path / "towns", dataset="cityscapes", train=(1, 0, 0), **small)
    segmenter.main(command(streets, tmp_path / "run", "--steps", "30", "--lr", "1e-3"))
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[-1] < 0.6 * losses[0]
    rows = result(tmp_path / "run")["heads"][0]["columns"]["nuimages"]
    assert rows["driveable_surface"] > 40 and rows["background"] > 60
    evaluate(tmp_path / "run", towns)
    (head,) = result(tmp_path / "run", "transfer-cityscapes")["heads"]
    for rows in head["columns"].values():
        assert 0 < rows["road"] < 100 and rows["car"] is not None

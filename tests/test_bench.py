"""experiments/bench.py: both formulations are the same function, the tables are whole, the ratios of the real keyframe."""
import re
from statistics import median

import numpy as np
import pytest
import torch
from torch import nn

import models
from data import CLOUD, Frames, collate, plane_sizes
from distill import sample_features
from experiments import bench
from index import load_index
from waffleiron import GRIDS as PAPERS_GRIDS
from waffleiron import WaffleIron

GRIDS = ((24, 20), (24, 8), (20, 8))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def double():
    """Else WaffleIron's 1 / points of a cell is in float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def cloud(count):
    """An item of `count` points on a part of each plane."""
    cells = [torch.randint(2, h - 3, (count,)) * w + torch.randint(0, w // 2, (count,)) for h, w in GRIDS]
    neighbors = (torch.arange(count)[:, None] + torch.randint(1, count, (count, 4))) % count
    return {"feats": torch.randn(count, 5), "cells": torch.stack(cells), "neighbors": neighbors}


def model_of(norm, **options):
    """A WaffleIron in float64 whose BatchNorms have seen something."""
    model = WaffleIron(channels=8, depth=4, out_channels=6, norm=norm, grids=GRIDS, **options)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return model


def outputs_and_gradients(model, batch):
    """Both formulations': a list of two (output, {name: gradient})."""
    found = []
    for plain in (True, False):
        model.zero_grad()
        out = bench.both_forms(batch)(model, plain)
        out.square().sum().backward()
        found.append((out.detach(), {name: p.grad for name, p in model.named_parameters()}))
    return found


# ---- the straightforward formulation is the same function ----------------------------------------------------------------

@pytest.mark.parametrize("options", [dict(norm="layernorm"), dict(norm="batchnorm"), dict(norm="layernorm", activation="gelu", head="mlp")])
def test_waffleiron_on_ragged_clouds(double, options):
    batch = collate([cloud(400), cloud(25)])      # 400: the embedding takes them in two pieces
    assert bench.pad(*(batch[name] for name in ("feats", "cells", "neighbors", "batch")))[0].shape == (2, 5, 400)
    (plain, plain_gradients), (ours, gradients) = outputs_and_gradients(model_of(**options).eval(), batch)
    assert ours.shape == (425, 6) and ours.abs().max() > 0.1
    torch.testing.assert_close(plain, ours)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    torch.testing.assert_close(plain_gradients, gradients)


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_in_training_mode_one_cloud_is_the_same_and_padding_is_not(double, norm):
    (plain, plain_gradients), (ours, gradients) = outputs_and_gradients(model_of(norm).train(), collate([cloud(40)]))
    torch.testing.assert_close(plain, ours)
    torch.testing.assert_close(plain_gradients, gradients)
    (plain, _), (ours, _) = outputs_and_gradients(model_of(norm).train(), collate([cloud(40), cloud(25)]))
    assert (plain - ours).abs().max() > 1e-3      # which is why the bench compares in eval()


def test_reading_an_upsampled_map_is_sampling():
    maps = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    pixels, batch = torch.stack([torch.randint(0, 56, (50,)), torch.randint(0, 98, (50,))], 1).double(), torch.arange(50) % 2
    torch.testing.assert_close(bench.plain_pixel_features(maps, pixels, batch, (56, 98)), sample_features(maps, pixels, batch, (56, 98)))


def test_data_items_of_the_miniature(world):
    index = load_index(world)
    frames = Frames(index, np.arange(len(index.lidar)), "all", (40, 80), CLOUD)
    for number in (0, 5):
        assert_same_item(bench.plain_item(frames, (0, number)), frames[0, number], levels=0)


def test_data_items_of_the_real_keyframe(real):
    frames = Frames(load_index(real, "v1.0-mini"), [0], "all", (224, 448), CLOUD)
    for number in range(6):
        assert_same_item(bench.plain_item(frames, (0, number)), frames[0, number], levels=10)


def assert_same_item(plain, ours, levels):
    ours = {name: value for name, value in ours.items() if name != "condition"}
    difference = (plain.pop("image").int() - ours.pop("image").int()).abs()
    assert difference.max() <= levels and difference.float().mean() <= 0.1 * levels
    assert plain.keys() == ours.keys() and len(ours["feats"]) > 100
    for name, value in ours.items():
        torch.testing.assert_close(plain[name], value, msg=name)


# ---- measuring -----------------------------------------------------------------------------------------------------------

def test_peak_bytes_is_above_what_was_there():
    held = torch.ones(64 * 2**20 // 4)
    peak = bench.peak_bytes(lambda: torch.ones(96 * 2**20 // 4).sum(), torch.device("cpu"))
    if peak is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 90 * 2**20 < peak < 110 * 2**20 and len(held)


@pytest.mark.parametrize("taken, repetitions", [(5.0, 2), (0.5, 4)])
def test_what_is_short_is_repeated_more_often(monkeypatch, taken, repetitions):
    monkeypatch.setattr(bench, "seconds", lambda run, device: taken)
    assert bench.repeat([None], torch.device("cpu"), 2) == [[taken]] * repetitions


def test_a_row_and_its_differences():
    learner = nn.Linear(3, 2)
    x = torch.randn(5, 3)

    def run(plain, precision):
        learner.zero_grad()
        out = learner(x) * (1.0 if plain else 1.001)
        out.sum().backward()
        return [out]

    row = bench.measure(bench.Case("a name", run, learner=learner), None, 1)
    assert row["differ"] == pytest.approx([1e-3, 1e-3], rel=1e-2) and len(row["times"]) > 4 and np.sum(row["times"]) >= 1
    assert learner.weight.grad is None
    assert bench.faster([(2, 1), (6, 2), (4, 4)]) == "2.0 (1.0–3.0)"
    assert bench.difference([torch.tensor([4.0, 2.0])], [torch.tensor([4.0, 1.0])]) == 0.25
    hours = bench.whole_run({"name": "a step", "times": [(9.0, 2.0), (9.0, 4.0), (9.0, 1.0)]}, 4, 7200, "an epoch")
    assert hours == "a step, here: 500.0 ms a view, so 1.0 hours of steps for an epoch."
    row["peaks"] = [None, None]
    assert "| a name |" in bench.table([row]) and bench.table([row]).count("not run") == 3


def test_steps_leave_the_weights_and_the_frozen_side(world):
    frames = Frames(load_index(world), [0], "all", (40, 80), CLOUD)
    batch = collate([frames[0, 0]])
    batch |= {"image": batch["image"] / 255, "pixels": batch["pixels"].floor()}
    encoder, model = models.load_image_encoder("vit_mini8", "random"), WaffleIron(channels=8, depth=3, out_channels=96)
    before = [p.detach().clone() for p in [*encoder.parameters(), *model.parameters()]]
    for case, frozen in zip(bench.step_cases(encoder, model, batch, (40, 80), torch.device("cpu"), wide=16), (encoder, model, None)):
        case.run(False, "bf16"), case.run(True, "bf16")
        assert any(p.grad is not None for p in case.learner.parameters()), case.name
        assert frozen is None or all(p.grad is None for p in frozen.parameters()), case.name
        case.learner.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(before, [*encoder.parameters(), *model.parameters()], strict=True))


# ---- the whole -----------------------------------------------------------------------------------------------------------

SMALL = ["--device", "cpu", "--widths", "8", "12", "--encoder", "vit_mini8", "--points", "30", "900", "--repeats", "1"]


@pytest.mark.slow
def test_a_small_run_writes_all_rows(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "IMAGE_SIZE", (40, 80))
    measured, measure = [], bench.measure
    monkeypatch.setattr(bench, "measure", lambda *arguments: measured.append(arguments) or measure(*arguments))
    bench.main(["--data", str(world), *SMALL, "--batch", "2", "--workers", "1", "--out", str(tmp_path / "sub" / "bench.md")])
    text = (tmp_path / "sub" / "bench.md").read_text()
    assert text == capsys.readouterr().out
    assert "nan" not in text and "inf" not in text and torch.__version__ in text
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()
                                              if line.startswith("|"))}
    for name in ("1 data items, voxels of the whole scan", "1 data items, voxels of a camera's points", "WI-6-8, forward",
                 "WI-6-8, forward + backward", "WI-6-12, forward", "WI-6-12, forward + backward", "stage-1 step, vit_mini8, WI-6-12, batch 2",
                 "stage-2 step, vit_mini8, WI-6-12, batch 2", "stage-2 image side, 1024 channels, batch 2"):
        cells = rows[name]
        assert len(cells) == 8 and re.fullmatch(r"[\d,]+ ms", cells[0]) and re.fullmatch(r"[\d,]+ ms", cells[1])
        assert re.fullmatch(r"[\d.]+ \([\d.]+–[\d.]+\)", cells[2]) and all(re.fullmatch(r"[\d,]+ MB|not run", c) for c in cells[3:5])
        assert cells[6] == "-" if "whole scan" in name else float(cells[6]) < 1e-4, name
        assert cells[7] == "-" or float(cells[7]) < 0.1, name    # a ReLU at 0
    assert rows["900 points"][0].isdigit() and rows["30 points"][2].endswith("µs")
    for stage, words in ((1, "49 epochs of about 20,000 clear frames, one camera each"), (2, "one epoch of 28,130 frames, six cameras each")):
        name = f"stage-{stage} step, vit_mini8, WI-6-12, batch 2"
        view_ms = float(re.search(rf"^{name}, here: ([\d.]+) ms a view, so [\d.]+ hours of steps for {words}.$", text, re.MULTILINE)[1])
        assert abs(2 * view_ms - float(rows[name][1].removesuffix(" ms").replace(",", ""))) < 1
    assert re.search(r"Precision: fp32. Loader: \d+ views/s, 1 processes. At least 1 repetitions and 1 s of each row", text)
    assert {arguments[1:] for arguments in measured} == {("fp32", 1)}


@pytest.mark.parametrize("flags, named", [
    (["--repeats", "0"], "--repeats"), (["--points", "30", "-1"], "--points"), (["--batch", "0"], "--batch"), (["--encoder", "no_such"], "no_such")])
def test_bad_flags_are_one_line(world, capsys, flags, named):
    with pytest.raises(SystemExit) as exit_:
        bench.main(["--data", str(world), *SMALL, *flags])
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and named in message and message.count("\n") == 1


@pytest.mark.slow
def test_ratios_on_the_real_keyframe(real):
    """With a wide margin: neither another job on the machine nor cheap memory must fail it."""
    frames = Frames(load_index(real, "v1.0-mini"), [0], "CAM_FRONT", None, CLOUD)
    batch = collate([frames[0, 0]])
    assert plane_sizes(CLOUD["fov"], CLOUD["cell"]) == PAPERS_GRIDS
    row = bench.measure(bench.waffleiron_cases(256, 6, 384, batch, torch.device("cpu"))[0][1], None, 2)
    assert median(plain / ours for plain, ours in row["times"]) > 1.1, row
    assert row["peaks"][0] is None or row["peaks"][1] < 0.5 * row["peaks"][0], row
    assert row["differ"][0] < 1e-4 and row["differ"][1] < 0.1, row  # of gradients: a ReLU's input may be 0 to rounding

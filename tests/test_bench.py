"""The bench: both formulations are the same function; its measures and tables; real ratios."""
import re
import weakref
from statistics import median

import numpy as np
import pytest
import torch
from torch import nn

import models
from data import Frames, collate
from distill import sample_features
from experiments import bench
from experiments.plain import pad, plain_image_item, plain_item, plain_pixel_features
from experiments.workloads import Case, both_forms, step_cases, waffleiron_cases
from readers.table import open_tables
from waffleiron import GRIDS as PAPERS_GRIDS
from waffleiron import WaffleIron, plane_sizes, prepare

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
    cells = []
    for h, w in GRIDS:
        row = torch.randint(2, h - 3, (count,))
        col = torch.randint(0, w // 2, (count,))
        cells.append(row * w + col)
    others = torch.randint(1, count, (count, 4))
    neighbors = (torch.arange(count)[:, None] + others) % count
    return {"inputs": {"points": torch.randn(count, 5), "cells": torch.stack(cells, 1),
                       "neighbors": neighbors}}


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
        out = both_forms(batch)(model, plain)
        out.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((out.detach(), gradients))
    return found


# ---- the plain formulation is the same function --------------------------------------------------

@pytest.mark.parametrize("options", [
    dict(norm="layernorm"), dict(norm="batchnorm"),
    dict(norm="layernorm", activation="gelu", head="mlp")])
def test_waffleiron_on_ragged_clouds(double, options):
    batch = collate([cloud(400), cloud(25)])      # 400: the embedding takes them in two pieces
    points, *_ = pad(batch)
    assert points.shape == (2, 5, 400)
    model = model_of(**options).eval()
    (plain, plain_gradients), (ours, gradients) = outputs_and_gradients(model, batch)
    assert ours.shape == (425, 6) and ours.abs().max() > 0.1
    torch.testing.assert_close(plain, ours)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    torch.testing.assert_close(plain_gradients, gradients)


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_in_training_mode_one_cloud_is_the_same_and_padding_is_not(double, norm):
    model = model_of(norm).train()
    (plain, plain_gradients), (ours, gradients) = outputs_and_gradients(model, collate([cloud(40)]))
    torch.testing.assert_close(plain, ours)
    torch.testing.assert_close(plain_gradients, gradients)
    model = model_of(norm).train()
    (plain, _), (ours, _) = outputs_and_gradients(model, collate([cloud(40), cloud(25)]))
    assert (plain - ours).abs().max() > 1e-3      # which is why the bench compares in eval()


def test_reading_an_upsampled_map_is_sampling():
    maps = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    row, col = torch.randint(0, 56, (50,)), torch.randint(0, 98, (50,))
    pixels = torch.stack([row, col], 1).double()
    arguments = maps, pixels, torch.arange(50) % 2, (56, 98)
    torch.testing.assert_close(plain_pixel_features(*arguments), sample_features(*arguments))


def test_data_items_of_the_miniature(world):
    tables = open_tables(str(world))
    frames = Frames(tables, "all", (40, 80), prepare)
    images = Frames(tables, "all", (40, 80))
    for number in (0, 5):
        assert_same_item(plain_item(frames, (0, number)), frames[0, number], levels=0)
        assert_same_image(plain_image_item(images, (0, number)), images[0, number])


@pytest.mark.slow
def test_data_items_of_the_real_keyframe(real):
    tables = one_frame(real, "v1.0-mini")
    frames = Frames(tables, "all", (224, 448), prepare)
    images = Frames(tables, "all", (224, 448))
    for number in range(6):
        assert_same_item(plain_item(frames, (0, number)), frames[0, number], levels=10)
        assert_same_image(plain_image_item(images, (0, number)), images[0, number])


def one_frame(root, version=None):
    """The first frame of a nuScenes root: a list of one table."""
    (table,) = open_tables(str(root), version)
    return [table.only([0])]


def assert_same_item(plain, ours, levels):
    ours = {name: value for name, value in ours.items() if name != "condition"}
    difference = (plain.pop("image").int() - ours.pop("image").int()).abs()
    assert difference.max() <= levels and difference.float().mean() <= 0.1 * levels
    assert plain.keys() == ours.keys() and len(ours["inputs"]["points"]) > 100
    plain |= plain.pop("inputs")
    ours |= ours.pop("inputs")
    assert plain.keys() == ours.keys()
    for name, value in ours.items():
        torch.testing.assert_close(plain[name], value, msg=name)


def assert_same_image(plain, ours):
    """The item of an image alone has that, and not what the plain one has of its scan."""
    assert ours.keys() == {"condition", "image"} and torch.equal(plain["image"], ours["image"])
    assert len(plain["pixels"]) == len(plain["depths"]) > 100


# ---- measuring -----------------------------------------------------------------------------------

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


@pytest.mark.slow
def test_a_row_and_its_differences():
    learner = nn.Linear(3, 2)
    x = torch.randn(5, 3)

    def run(plain, precision):
        learner.zero_grad()
        out = learner(x) * (1.0 if plain else 1.001)
        out.sum().backward()
        return [out]

    row = bench.measure(Case("a name", run, learner=learner), None, 1)
    assert row["differ"] == pytest.approx([1e-3, 1e-3], rel=1e-2)
    assert len(row["times"]) > 4 and np.sum(row["times"]) >= 1
    assert learner.weight.grad is None
    row["peaks"] = [None, None]
    text = bench.table([row])
    assert "| a name |" in text and text.count("not run") == 3


class OutOfMemory:
    """A case's run of which the plain side is out of memory in these precisions."""

    def __init__(self, learner, precisions, side=True):
        self.learner = learner
        self.precisions = precisions
        self.side = side
        self.runs = []

    def __call__(self, plain, precision):
        self.runs.append((plain, precision))
        self.learner.zero_grad()
        points = torch.ones(5, 3)
        self.held = weakref.ref(points)
        out = self.learner(points)
        out.sum().backward()
        if plain == self.side and precision in self.precisions:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return [out]


@pytest.mark.slow
@pytest.mark.parametrize("precisions", [("fp32", "bf16"), ("bf16",)])
def test_plain_out_of_memory_leaves_ours_measured(monkeypatch, precisions):
    learner = nn.Linear(3, 2)
    run = OutOfMemory(learner, precisions)
    held = []   # what the run held is gone when the cache is emptied
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(run.held()))
    row = bench.measure(Case("a name", run, learner=learner), "bf16", 1)
    assert all(plain is None and ours > 0 for plain, ours in row["times"])
    assert sum(ours for _, ours in row["times"]) >= 1
    assert row["peaks"][0] is None and len(row["peaks"]) == 2
    assert row["differ"] == ([None, None] if "fp32" in precisions else [0, 0])
    assert held == [None] * len(precisions)
    assert (False, "bf16") == run.runs[-1] and learner.weight.grad is None

    row["peaks"] = [None, 30 * 2**20]
    (cells,) = (cells for name, cells in table_rows(bench.table([row])).items() if name == "a name")
    plain, ours, ratio, plain_memory, memory, part, *differ = cells
    assert plain == plain_memory == "out of memory" and ratio == part == "-"
    assert re.fullmatch(r"\d+ ms", ours) and memory == "30 MB"
    assert differ == (["-", "-"] if "fp32" in precisions else ["0e+00", "0e+00"])
    assert "0.0 hours" in bench.whole_run(row, 1, 1, "a view")


@pytest.mark.slow
def test_plain_out_of_memory_in_float32_alone_is_measured_in_bfloat16():
    learner = nn.Linear(3, 2)
    row = bench.measure(Case("a name", OutOfMemory(learner, ["fp32"]), learner=learner), "bf16", 1)
    assert row["differ"] == [None, None] and np.sum(row["times"]) >= 1


@pytest.mark.parametrize("precisions", [("fp32",), ("bf16",)])
def test_ours_out_of_memory_ends_the_run(precisions):
    learner = nn.Linear(3, 2)
    run = OutOfMemory(learner, precisions, side=False)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="20.00 GiB"):
        bench.measure(Case("a name", run, learner=learner), "bf16", 1)


def test_what_the_tables_say_of_times_and_differences():
    assert bench.faster([(2, 1), (6, 2), (4, 4)]) == "2.0 (1.0–3.0)"
    assert bench.difference([torch.tensor([4.0, 2.0])], [torch.tensor([4.0, 1.0])]) == 0.25
    row = {"name": "a step", "times": [(9.0, 2.0), (9.0, 4.0), (9.0, 1.0)]}
    hours = bench.whole_run(row, 4, 7200, "an epoch")
    assert hours == "a step, here: 500.0 ms a view, so 1.0 hours of steps for an epoch."


def test_steps_leave_the_weights_and_the_frozen_side(world):
    frames = Frames(one_frame(world), "all", (40, 80), prepare)
    batch = collate([frames[0, 0]])
    batch |= {"image": batch["image"] / 255, "pixels": batch["pixels"].floor()}
    encoder = models.load_image_encoder("vit_mini8", "random")
    model = WaffleIron(channels=8, depth=3, out_channels=96)
    parameters = [*encoder.parameters(), *model.parameters()]
    before = [p.detach().clone() for p in parameters]
    cases = step_cases(encoder, model, batch, (40, 80), torch.device("cpu"), wide=16)
    for case, frozen in zip(cases, (encoder, model, None), strict=True):
        case.run(False, "bf16")
        case.run(True, "bf16")
        assert any(p.grad is not None for p in case.learner.parameters()), case.name
        assert frozen is None or all(p.grad is None for p in frozen.parameters()), case.name
        case.learner.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


# ---- the whole -----------------------------------------------------------------------------------

SMALL = ["--device", "cpu", "--widths", "8", "12", "--encoder", "vit_mini8",
         "--points", "30", "900", "--repeats", "1"]
STEPS = ("stage-1 step, vit_mini8, WI-6-12, batch 2", "stage-2 step, vit_mini8, WI-6-12, batch 2")
ROWS = ("1 data items, voxels of the whole scan", "1 data items, voxels of a camera's points",
        "1 images alone, scans read all the same",
        "WI-6-8, forward", "WI-6-8, forward + backward",
        "WI-6-12, forward", "WI-6-12, forward + backward",
        *STEPS, "stage-2 image side, 1024 channels, batch 2")


def table_rows(text):
    """{first cell: the others} of all tables of a markdown text."""
    rows = {}
    for line in text.splitlines():
        if line.startswith("|"):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[name] = cells
    return rows


@pytest.mark.slow
def test_a_small_run_writes_all_rows(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "IMAGE_SIZE", (40, 80))
    measured, measure = [], bench.measure

    def recorded(case, precision, repeats):
        measured.append((precision, repeats))
        return measure(case, precision, repeats)

    monkeypatch.setattr(bench, "measure", recorded)
    out = tmp_path / "sub" / "bench.md"
    bench.main(["--data", str(world), *SMALL, "--batch", "2", "--workers", "1", "--out", str(out)])
    text = out.read_text()
    assert text == capsys.readouterr().out
    assert "nan" not in text and "inf" not in text and torch.__version__ in text

    # The table of both formulations.
    rows = table_rows(text)
    for name in ROWS:
        plain, here, ratio, plain_memory, memory, _, outputs, gradients = rows[name]
        assert re.fullmatch(r"[\d,]+ ms", plain) and re.fullmatch(r"[\d,]+ ms", here)
        assert re.fullmatch(r"[\d.]+ \([\d.]+–[\d.]+\)", ratio)
        assert all(re.fullmatch(r"[\d,]+ MB|not run", cell) for cell in (plain_memory, memory))
        assert outputs == "-" if "whole scan" in name else float(outputs) < 1e-4, name
        assert gradients == "-" or float(gradients) < 0.1, name    # a ReLU at 0

    # The linear cost, whole runs, and what was asked for.
    assert rows["900 points"][0].isdigit() and rows["30 points"][2].endswith("µs")
    words = ("49 epochs of about 20,000 clear frames, one camera each",
             "one epoch of 28,130 frames, six cameras each")
    for name, run in zip(STEPS, words):
        line = rf"^{name}, here: ([\d.]+) ms a view, so [\d.]+ hours of steps for {run}.$"
        view_ms = float(re.search(line, text, re.MULTILINE)[1])
        step_ms = float(rows[name][1].removesuffix(" ms").replace(",", ""))
        assert abs(2 * view_ms - step_ms) < 1
    assert re.search(r"Precision: fp32. Loader: \d+ views/s, 1 processes. "
                     r"At least 1 repetitions and 1 s of each row", text)
    assert set(measured) == {("fp32", 1)}


@pytest.mark.parametrize("flags, named", [
    (["--repeats", "0"], "--repeats"), (["--points", "30", "-1"], "--points"),
    (["--batch", "0"], "--batch"), (["--encoder", "no_such"], "no_such")])
def test_bad_flags_are_one_line(world, capsys, flags, named):
    with pytest.raises(SystemExit) as exit_:
        bench.main(["--data", str(world), *SMALL, *flags])
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and named in message and message.count("\n") == 1


@pytest.mark.slow
def test_ratios_on_the_real_keyframe(real):
    """With a wide margin: neither another job on the machine nor cheap memory must fail it."""
    (table,) = one_frame(real, "v1.0-mini")
    batch = collate([Frames([table], "CAM_FRONT", prepare=prepare)[0, 0]])
    assert plane_sizes(table.sampling["fov"], table.sampling["cell"]) == PAPERS_GRIDS
    samplings = {"nuscenes": table.sampling}
    cases, _ = waffleiron_cases(256, 6, 384, batch, samplings, torch.device("cpu"))
    row = bench.measure(cases[1], None, 2)    # forward + backward
    assert median(plain / ours for plain, ours in row["times"]) > 1.1, row
    assert row["peaks"][0] is None or row["peaks"][1] < 0.5 * row["peaks"][0], row
    outputs, gradients = row["differ"]
    assert outputs < 1e-4 and gradients < 0.1, row    # a ReLU's input may be 0 to rounding

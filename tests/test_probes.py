"""Four probes of maps that are computed once: points, views, and heads judged as by eval.py."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from pandasets import laid_out
from runs import fails_with_one_line, open_one, probe_args

import eval as evaluation
import probe
from data import Frames, select
from distill import sample_features
from experiments import corruptions, probes
from experiments.probes import Views
from experiments.lay_out import lay_out
from models import load_image_encoder
from readers.table import open_tables

pytestmark = pytest.mark.slow

ENCODER = str(ROOT / "miniature/encoder.pth")
SIZE = (40, 80)
FLAGS = ["--image-size", *map(str, SIZE)]
CPU = torch.device("cpu")
ARGS = SimpleNamespace(workers=0, precision="fp32", seed=4, steps=3, batch=2, points=40)


# ---- points of views -----------------------------------------------------------------------------

def hand_made(counts=(7, 4, 5), size=(9, 17)):
    """Views of such numbers of points, whose maps [2, 3, 5] hold each cell's row and column.

    A view's number is added to its map. The labels of all views' points are numbered through.
    """
    generator = torch.Generator().manual_seed(0)
    rows, cols = torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij")
    maps = torch.stack([torch.stack([rows, cols]) + 10 * n for n in range(len(counts))])
    points, first = [], 0
    for count in counts:
        pixels = torch.rand(count, 2, generator=generator) * (torch.tensor(size) - 1)
        labels = torch.arange(first, first + count)
        points.append({"seg": {"pixels": pixels, "labels": labels}})
        first += count
    return Views(maps.half(), torch.tensor([0, 1, 1]), points, size)


def test_a_batch_has_the_views_that_were_asked_for_and_their_features():
    views = hand_made()
    features, batch = views.batch("seg", [2, 0])
    assert batch["labels"].tolist() == [11, 12, 13, 14, 15, *range(7)]
    assert batch["view"].tolist() == [0] * 5 + [1] * 7
    assert batch["condition"].tolist() == [1, 0]
    # The corners of map and image coincide: a map's cell is four pixels wide and high
    expected = batch["pixels"] / 4 + torch.tensor([20.0, 0]).repeat_interleave(
        torch.tensor([5, 7]))[:, None]
    torch.testing.assert_close(features, expected)


def test_features_are_those_of_the_maps_in_half_precision():
    views = hand_made()
    maps = torch.randn(3, 6, 3, 5, generator=torch.Generator().manual_seed(1))
    views = views._replace(maps=maps.half())
    features, batch = views.batch("seg", [1, 2])
    own = []
    for number in (1, 2):
        pixels = views.points[number]["seg"]["pixels"]
        none = torch.zeros(len(pixels), dtype=torch.long)
        own.append(sample_features(maps[[number]].half().float(), pixels, none, (9, 17)))
    assert features.dtype == torch.float32 and torch.equal(features, torch.cat(own))
    assert not torch.equal(features, sample_features(maps[[1, 2]], batch["pixels"], batch["view"],
                                                     (9, 17)))


def test_most_limits_the_points_of_each_view_by_draws_that_can_be_repeated():
    views = hand_made()

    def drawn(rng):
        _, batch = views.batch("seg", [0, 1, 2], 4, rng)
        # A point's pixel comes with its label
        for label, pixel in zip(batch["labels"].tolist(), batch["pixels"]):
            assert torch.equal(pixel, all_points["pixels"][label])
        return batch["labels"].tolist()

    _, all_points = views.batch("seg", [0, 1, 2])
    rng = np.random.default_rng(3)
    first, second = drawn(rng), drawn(rng)
    for found in (first, second):
        assert len(set(found)) == len(found) == 12
        assert set(found[:4]) < set(range(7)) and set(found[8:]) < set(range(11, 16))
        assert found[4:8] == [7, 8, 9, 10]  # no more than there are, in their order
    assert first != second
    rng = np.random.default_rng(3)
    assert [drawn(rng), drawn(rng)] == [first, second]


# ---- views of frames -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(panda, tmp_path_factory):
    """--data of the scenes with labels under "clear", and of a foggy copy."""
    root = tmp_path_factory.mktemp("street")
    laid_out(panda, root / "clean")
    corruptions.main(["make", "--data", f"pandaset64={root}/clean", "--out", f"{root}/fog",
                      "--corruption", "fog", "--severity", "5", "--workers", "0", *FLAGS])
    open_one(root / "fog", name="pandaset64")
    return f"pandaset64={root}/clean,pandaset64={root}/fog"


@pytest.fixture(scope="module")
def encoder():
    return load_image_encoder(ENCODER)


@pytest.fixture(scope="module")
def of_split(data, encoder):
    """{split: (Views, tables, names of the conditions)}."""
    tables = open_tables(data, look=False)
    return {split: probes.views_of(tables, split, encoder, SIZE, ARGS, CPU)
            for split in ("train", "val")}


def test_copies_share_their_points_and_each_has_its_maps(data, encoder, of_split):
    views, tables, conditions = of_split["train"]
    assert conditions == ("clear", "fog") and views.image_size == SIZE
    half = len(views.maps) // 2
    assert half == 4 * 6 == len(tables[0]) * 6  # frames of six cameras
    assert views.conditions.tolist() == [0] * half + [1] * half
    for clear, foggy in zip(views.points[:half], views.points[half:]):
        assert clear is foggy
    assert len(set(map(id, views.points))) == half

    # Of one view of either copy: everything as `Frames` gives it
    number = 8
    for place, table in enumerate(select(open_tables(data, look=False), "train")):
        of_copy = place * half + number
        for task, target in (("seg", "labels"), ("depth", "depths")):
            item = Frames([table], "all", SIZE, target=target)[0, number]
            points = views.points[of_copy][task]
            assert points.keys() == {"pixels", target} and len(points["pixels"]) > 50
            for name, values in points.items():
                assert torch.equal(values, item[name])
        with torch.no_grad():
            own = encoder(item["image"][None].float() / 255)[0]
        torch.testing.assert_close(views.maps[of_copy].float(), own, rtol=2e-3, atol=2e-3)
    assert views.maps.dtype == torch.float16
    assert not torch.equal(views.maps[number], views.maps[half + number])


# ---- heads ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["seg", "depth"])
def test_a_head_learns_from_its_views_alone(of_split, task):
    """What the other views' maps hold has no part in it; the same seed gives the same head."""
    views, _, _ = of_split["train"]
    half = len(views.maps) // 2
    numbers = range(half, 2 * half)  # those in fog
    outputs = 19 if task == "seg" else 1
    head = probes.train_head(task, views, numbers, outputs, ARGS).state_dict()
    maps = views.maps.clone()
    maps[:half] = torch.nan
    again = probes.train_head(task, views._replace(maps=maps), numbers, outputs, ARGS).state_dict()
    for name, values in head.items():
        assert torch.isfinite(values).all() and torch.equal(values, again[name]), name
    assert head["1.weight"].any()


def judged_by_both(data, task, out, more=()):
    """(what probes.judge, what eval.py makes of the head of a run of probe.py) on all cameras."""
    argv = probe_args(data, task, ENCODER, out, "--cameras", "all", "--head", "whitened", "--cache",
                      "--steps", "2", "--lr", "1e-2", *FLAGS, *more)
    probe.main(argv)
    _, encoder, head = evaluation.load_probe(out, CPU)
    tables = open_tables(data, look=False)
    views, val, conditions = probes.views_of(tables, "val", encoder, SIZE, ARGS, CPU)
    classes = probe.classes_of(tables, "seg")
    left_out = getattr(val[0].reader, "LEFT_OUT", {})
    own = probes.judge(task, head, views, conditions, classes, left_out)
    return own, evaluation.evaluate(out, CPU, workers=0)


@pytest.mark.parametrize("task", ["seg", pytest.param("depth", marks=pytest.mark.slow)])
def test_a_head_is_judged_as_by_eval(data, task, tmp_path):
    own, theirs = judged_by_both(data, task, tmp_path / "probe")
    metrics = ("mIoU", "IoU") if task == "seg" else ("RMSE", "RMSE_points")
    assert tuple(own) == metrics
    # The maps are in half precision, so a few points of thousands may change their class
    near = dict(abs=0.1) if task == "seg" else dict(rel=1e-3)
    for metric in metrics:
        assert list(own[metric]) == ["full", "clear", "fog"]
        for column, value in own[metric].items():
            assert value == pytest.approx(theirs[metric][column], **near)
    first = own[metrics[0]]
    assert abs(first["clear"] - first["fog"]) > 0.001  # else the columns could change places


def test_a_dataset_s_own_conditions_and_what_they_leave_out(world, tmp_path):
    """At night some classes are no part of nuScenes' mean."""
    own, theirs = judged_by_both(str(world), "seg", tmp_path / "probe")
    assert list(own["mIoU"]) == ["full", "day-clear", "day-rain", "night"]
    assert own["mIoU"] == pytest.approx(theirs["mIoU"], abs=0.1)
    assert "bus" in own["IoU"]["night"]  # which is left out
    night = [iou for name, iou in own["IoU"]["night"].items() if name != "bus"]
    assert own["mIoU"]["night"] == pytest.approx(np.mean(night), abs=0.01)


# ---- the command ---------------------------------------------------------------------------------

def run(data, out, *conditions):
    """The JSON of a run of two steps."""
    probes.main(["--data", data, "--encoder", ENCODER, "--conditions", *conditions, "--steps", "2",
                 "--batch", "2", "--seed", "6", "--device", "cpu", "--out", str(out), *FLAGS])
    return json.loads(out.read_text())


@pytest.fixture
def trained(monkeypatch):
    """[(task, the Views, the numbers of those that a head learnt from)] of a run."""
    found, train = [], probes.train_head

    def train_head(task, views, numbers, *more):
        found.append((task, views, list(numbers)))
        return train(task, views, numbers, *more)
    monkeypatch.setattr(probes, "train_head", train_head)
    return found


def test_four_probes_and_the_same_again(data, tmp_path, trained):
    result = run(data, tmp_path / "a.json", "clear", "fog")
    four = ["seg-all", "depth-all", "seg-first", "depth-first"]
    assert list(result) == ["encoder", "frames", "seed", *four]
    assert result["encoder"] == load_image_encoder(ENCODER).fingerprint() and result["seed"] == 6
    assert result["frames"]["frames"] == 2 * 2  # of validation, of both copies

    assert [task for task, *_ in trained] == ["seg", "depth"] * 2
    for (_, views, numbers), name in zip(trained, four):
        conditions = views.conditions[numbers].tolist()
        assert conditions == [0] * 24 + [1] * 24 * name.endswith("all")
        metric = "mIoU" if name.startswith("seg") else "RMSE"
        assert list(result[name][metric]) == ["full", "clear", "fog"]
    assert result["seg-all"] != result["seg-first"]
    assert result["depth-all"] != result["depth-first"]
    assert run(data, tmp_path / "b.json", "clear", "fog") == result


def test_conditions_of_which_there_is_no_frame_are_no_columns(world, tmp_path, trained):
    """nuScenes knows three conditions, though all scenes are under a fourth one here."""
    lay_out(open_one(world), tmp_path / "clean")
    result = run(str(tmp_path / "clean"), tmp_path / "a.json", "clear")
    for name, metric in (("seg-first", "mIoU"), ("depth-all", "RMSE")):
        assert list(result[name][metric]) == ["full", "clear"]
    assert {len(numbers) for *_, numbers in trained} == {8}  # all training scenes of one camera


def test_other_conditions_are_one_line(data, of_split, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probes, "views_of", lambda tables, split, *_: of_split[split])
    out = tmp_path / "a.json"
    for wrong in (["clear"], ["fog", "clear"], ["clear", "rain"], ["clear", "fog", "fog"]):
        line = fails_with_one_line(capsys, lambda _: run(data, out, *wrong), [])
        assert line.endswith(f"--conditions {' '.join(wrong)}: the frames of split 'val' in --data "
                             "have clear fog")
    assert not out.exists()

"""Datasets with one and with six cameras in one batch, and a 3D probe on another grid."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from runs import (SPAWN, checkpoint_of, eval_args, largest_difference, lines, model_of, probe_args,
                  stage1_args)

import eval as evaluation
import probe
import stage1
from data import Frames, collate, select, set_sampling
from models import load_point_encoder
from readers.table import open_tables
from waffleiron import plane_sizes, prepare

SIZE = (80, 160)
NAMES = ("nuscenes", "semantickitti", "pandaset64", "pandasetgt")


@pytest.fixture(scope="module")
def four(world, kitti, panda):
    """--data of the four datasets."""
    roots = (world, kitti, panda, panda)
    return ",".join(f"{name}={root}" for name, root in zip(NAMES, roots))


@pytest.fixture(scope="module")
def mixed(four, tmp_path_factory):
    """Folder of a stage 1 of three steps on the four."""
    out = tmp_path_factory.mktemp("mixed") / "s1"
    stage1.main(stage1_args(four, out, "--steps", "3", "--batch", "8", "--conditions", "all"))
    return out


def frames_of(data, cameras="random", points="augmented"):
    tables = select(open_tables(data, here=True), "train")
    set_sampling(tables)
    return Frames(tables, cameras, SIZE, prepare, points=points, seed=5)


def same(a, b):
    """Whether two items are equal, but for which dataset of how many they are of."""
    left_out = ("dataset", "condition", "inputs")
    first, second = ({name: value for name, value in (item | item["inputs"]).items()
                      if name not in left_out} for item in (a, b))
    assert first.keys() == second.keys() and len(first) == 6
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_batch_may_hold_all_of_them(four):
    frames = frames_of(four)
    assert frames.datasets == NAMES
    ends = [int(end) - 1 for end in frames.first_item[1:]]  # the last frame of each
    items = [frames[0, number] for number in ends]
    batch = collate(items)
    assert batch["dataset"].tolist() == [0, 1, 2, 3]
    assert batch["condition"].tolist()[1:] == [-1, -1, -1]
    assert batch["image"].shape == (4, 3, *SIZE)
    # each by its own statistics: intensities of 0..1 and of 0..255 are alike
    of_points = batch["dataset"][batch["view"]]
    for number in range(4):
        intensity = batch["inputs"]["points"][of_points == number, 0]
        assert len(intensity) > 50 and intensity.abs().mean() < 3

    # PandaSet's six cameras are drawn, SemanticKITTI has one
    start = int(frames.first_item[2])
    drawn = {frames.locate((epoch, start))[2] for epoch in range(40)}
    assert drawn == set(range(6))
    assert {frames.locate((epoch, ends[1]))[2] for epoch in range(9)} == {0}


@pytest.mark.slow
def test_a_frame_looks_the_same_alone_and_wherever_it_stands(kitti, panda):
    alone = frames_of(f"semantickitti={kitti}")
    two = frames_of(f"semantickitti={kitti},pandaset64={panda}")
    assert "dataset" not in alone[2, 1] and two[2, 1]["dataset"] == 0
    assert same(alone[2, 1], two[2, 1])  # with all that is random: its number is the same

    # In another order numbers are others, and so is what is random; nothing else is
    order = f"semantickitti={kitti},pandaset64={panda}", f"pandaset64={panda},semantickitti={kitti}"
    first, turned = (frames_of(data, "all", "first") for data in order)
    shift = int(turned.first_item[1])
    assert shift == 6 * len(turned.tables[0])
    assert same(first[0, 1], turned[0, shift + 1]) and same(first[0, len(first) - 1], turned[
        0, shift - 1])


@pytest.mark.slow
def test_a_stage_1_on_the_four(mixed, four, tmp_path):
    checkpoint = checkpoint_of(mixed)
    assert tuple(checkpoint["samplings"]) == NAMES
    intensities = [checkpoint["samplings"][name]["intensity"][0] for name in NAMES]
    assert intensities == [18.742355, 0.28613698, 18.23640649, 23.06113565]
    (line,) = lines(mixed)
    assert tuple(line["loss_of"]) == NAMES
    assert all(1 < value < 1.6 for value in line["loss_of"].values() if value is not None)

    # killed after the second step it goes on to the same weights and the same line
    again = stage1_args(four, tmp_path / "s1", "--steps", "3", "--batch", "8", "--conditions",
                        "all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1, "check_finite", stop_at(1))
        with pytest.raises(KeyboardInterrupt):
            stage1.main([*again, "--save-every", "0"])
    assert checkpoint_of(tmp_path / "s1")["step"] == 1
    stage1.main([*again, "--save-every", "0"])
    assert largest_difference(model_of(tmp_path / "s1"), checkpoint["model"]) == 0
    assert lines(tmp_path / "s1")[-1]["loss_of"] == pytest.approx(line["loss_of"], rel=1e-12)


def stop_at(last):
    """In the place of `check_finite`: as if the run was killed after step `last` - 1."""
    def check(loss, model, step, *_):
        if step == last:
            raise KeyboardInterrupt
    return check


@pytest.mark.slow
def test_two_processes_learn_the_same_of_the_four(four, mixed, tmp_path):
    out = tmp_path / "two"
    command = stage1_args(four, out, "--steps", "3", "--batch", "8", "--conditions", "all")
    done = subprocess.run([sys.executable, *SPAWN, "stage1.py", *command], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (one,), (two,) = lines(mixed), lines(out)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["loss_of"] == pytest.approx(one["loss_of"], rel=1e-5)


@pytest.mark.slow
def test_a_probe_on_one_of_them_and_its_evaluation(mixed, panda, kitti, tmp_path):
    """The field of view that stage 1 was given by hand holds; else the probe's is wider."""
    out = tmp_path / "p"
    probe.main(probe_args(f"pandaset64={panda}", "seg3d", mixed, out, "--steps", "2"))
    checkpoint = checkpoint_of(out)
    assert checkpoint["samplings"]["pandaset64"]["fov"] == (48.0, 48.0, 8.0)
    evaluation.main(eval_args(out, out=tmp_path / "table"))
    assert "seg3d on pandaset64 | " in (tmp_path / "table.md").read_text()
    (result,) = json.loads((tmp_path / "table.json").read_text())
    assert result["columns"] == ["full"] and result["images"] == 2
    with pytest.raises(SystemExit):
        evaluation.main([*eval_args(out, out=tmp_path / "b"), "--data", f"semantickitti={kitti}"])


@pytest.mark.slow
def test_weights_do_not_depend_on_the_grid(mixed, panda):
    encoder, stage1_checkpoint = load_point_encoder(mixed)
    (table,) = select(open_tables(f"pandaset64={panda}", here=True), "val", limit=1)
    own = table.sampling
    found = []
    for flags in ({"fov": (48.0, 48.0, 8.0), "cell": 1, "neighbors": 4}, {"cell": 1,
                                                                         "neighbors": 4}):
        table.sampling = own
        samplings = set_sampling([table], None, "probe", flags)
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        encoder.use(samplings)
        assert largest_difference(before, encoder.state_dict()) == 0
        frames = Frames([table], "scan", prepare=prepare, points="first")
        batch = collate([frames[0, 0]])
        with torch.no_grad():
            found.append((encoder.spec["grids"], batch, encoder.eval().features(batch)))
    (near, _, _), (far, wide, features) = found
    assert near == plane_sizes((48, 48, 8), 1) and far == plane_sizes((128, 128, 8), 1)

    # the same points on planes of either size have the same features
    inside = (wide["inputs"]["points"][:, 1:3].abs() < 47).all(1)
    shift = torch.tensor([80 * 256 + 80, 80 * 16, 80 * 16])  # of the origin, in cells
    assert inside.sum() > 500 and features.shape[1] == 16
    cut = cut_out(wide, inside)
    encoder.spec["grids"] = far
    with torch.no_grad():
        large = encoder.features(cut)
    row = cut["inputs"]["cells"] - shift
    across = torch.tensor([256, 16, 16])
    row, column = row // across, row % across
    small = cut | {"inputs": cut["inputs"] | {"cells": row * torch.tensor([96, 16, 16]) + column}}
    encoder.spec["grids"] = near
    with torch.no_grad():
        assert torch.equal(encoder.features(small), large)


def cut_out(batch, kept):
    """The points that are kept of a batch; a neighbour that is not becomes the point itself."""
    number = torch.full((len(kept),), -1)
    number[kept] = torch.arange(int(kept.sum()))
    inputs = {name: values[kept] for name, values in batch["inputs"].items()}
    neighbors = number[inputs["neighbors"]]
    own = torch.arange(len(neighbors)).unsqueeze(1)
    inputs["neighbors"] = torch.where(neighbors < 0, own, neighbors)
    return {"inputs": inputs, "view": batch["view"][kept]}

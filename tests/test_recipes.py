"""Stage 1's recipes against the papers' values, its schedules against numbers by hand, and that
what a recipe writes goes out in the released names and back."""
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT
from runs import SPAWN, fails_with_one_line, largest_difference, lines, model_of, stage1_args
from waffleirons import same_values

import stage1
from models import load_point_encoder
from plumbing.training import draws, reciprocal_sqrt
from releases.scalr import from_released, to_released

NEEDED = ["--data", "x", "--out", "y"]
# Collaborative distillation, Sec. 3.1 and 4.1; ScaLR, Sec. 4.1 and supplement B.2; ScaLR+'s release
PAPERS = {
    "cd": dict(conditions=["day-clear"], epochs=49, batch=8, lr=0.002, end_lr=0.00001,
               warmup_steps=3500, weight_decay=0.03, schedule=None, drop_path=None,
               activation=None, head=None, norm=None, image_size=None, recompute=False),
    "scalr": dict(conditions=["all"], epochs=None, batch=8, lr=0.002, end_lr=0.00001,
                  warmup_steps=3500, weight_decay=0.03, schedule=None, drop_path=None,
                  activation=None, head=None, norm=None, image_size=None, recompute=False),
    "scalr+": dict(conditions=["all"], epochs=65, batch=8, lr=0.002, weight_decay=0.03,
                   schedule="rsqrt", drop_path=0.2, activation="gelu", head="mlp", hidden=2048,
                   norm="layernorm", image_size=[448, 896], recompute=True)}
N, K, P64, PGT = "nuscenes", "semantickitti", "pandaset64", "pandasetgt"
FRAMES = {N: 28130, K: 19130, P64: 3920, PGT: 3920}  # for training, in the papers
# (width, batch): [(datasets, epochs, steps with the last incomplete batch dropped)], the papers'
EPOCHS = {
    (768, 8): [([N], 49, 172_284), ([N, K, P64, PGT], 25, 172_175)],
    (256, 16): [([N], 19, 33_402), ([K], 28, 33_460), ([P64], 136, 33_320), ([PGT], 136, 33_320),
                ([N, K], 11, 32_483), ([N, K, P64, PGT], 10, 34_430)]}


# ---- recipes -------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", PAPERS)
def test_recipes_are_the_papers(recipe):
    args = vars(stage1.parse([*NEEDED, "--recipe", recipe]))
    assert {name: args[name] for name in PAPERS[recipe]} == PAPERS[recipe]
    assert (args["channels"], args["depth"], args["cameras"]) == (768, 48, "random")
    assert stage1.RECIPES.keys() == PAPERS.keys()


def test_the_bare_command_is_the_recipe_of_the_paper():
    bare, named = (vars(stage1.parse([*NEEDED, *more])) for more in ([], ["--recipe", "cd"]))
    assert bare == named


def frames_of(datasets):
    """So many frames as the papers have of these datasets."""
    count = sum(FRAMES[name] for name in datasets)
    return type("", (), {"datasets": tuple(datasets), "__len__": lambda self: count})()


@pytest.mark.parametrize("width, batch, datasets, epochs, steps", [
    (*key, *row) for key, rows in EPOCHS.items() for row in rows])
def test_scalr_s_epochs_by_datasets_and_width(width, batch, datasets, epochs, steps, capsys):
    args = stage1.parse([*NEEDED, "--recipe", "scalr", "--channels", str(width)])
    frames = frames_of(reversed(datasets))  # their order does not matter
    stage1.fill_in_epochs(args, frames)
    assert (args.batch, args.epochs) == (batch, epochs)
    assert len(frames) // batch * epochs == steps
    said = capsys.readouterr().out
    assert said == f"--recipe scalr: conditions all, epochs {epochs}, batch {batch}\n"


@pytest.mark.parametrize("width, datasets, epochs", [
    (256, [K, P64], 23),     # 33 400 / (23 050 // 16) = 23.19
    (768, [N, K], 29),       # 172 000 / (47 260 // 8) = 29.12
    (768, [P64, PGT], 176),  # 172 000 / (7 840 // 8) = 175.5
    (384, [N, P64], 17)])    # 33 400 / (32 050 // 16) = 16.7
def test_other_mixtures_have_as_many_steps(width, datasets, epochs):
    args = stage1.parse([*NEEDED, "--recipe", "scalr", "--channels", str(width)])
    stage1.fill_in_epochs(args, frames_of(datasets))
    assert args.epochs == epochs


def test_what_is_given_is_not_replaced(capsys):
    given = ("--epochs 3 --batch 4 --conditions night --drop-path 0 --head linear "
             "--activation relu --schedule cosine --image-size 224 448 --no-recompute "
             "--norm batchnorm").split()
    args = stage1.parse([*NEEDED, "--recipe", "scalr+", *given])
    assert (args.epochs, args.batch, args.conditions) == (3, 4, ["night"])
    assert (args.drop_path, args.head, args.activation) == (0, "linear", "relu")
    assert (args.schedule, args.image_size, args.recompute) == ("cosine", [224, 448], False)
    assert args.norm == "batchnorm" and args.hidden == 2048
    stage1.fill_in_epochs(args, frames_of([N]))
    assert capsys.readouterr().out == "--recipe scalr+: hidden 2048\n"
    args = stage1.parse([*NEEDED, "--recipe", "scalr", "--epochs", "2", "--batch", "6"])
    stage1.fill_in_epochs(args, frames_of([N]))
    assert (args.epochs, args.batch) == (2, 6)


def test_the_paper_s_recipe_says_nothing(capsys):
    stage1.fill_in_epochs(stage1.parse(NEEDED), frames_of([N]))
    assert capsys.readouterr().out == ""


# ---- schedule ------------------------------------------------------------------------------------

def test_the_reciprocal_square_root_by_hand():
    """A run of 6 500 steps, 100 an epoch: T is 45 steps, the cool-down begins at 6 300."""
    peak = 0.002
    for step, rate in (
            (0, 0), (50, 0.001), (100, 0.002),  # linear in the first epoch
            (145, 0.00141421),                  # 0.002 / sqrt(1 + 45 / 45)
            (1000, 0.00043644),                 # 0.002 / sqrt(1 + 900 / 45) = 0.002 / sqrt(21)
            (6300, 0.00016977),                 # 0.002 / sqrt(1 + 6200 / 45) = 0.002 / 11.7804
            (6400, 0.00008489),                 # half of it
            (6500, 0)):
        assert reciprocal_sqrt(step, 6500, peak) == pytest.approx(rate, abs=5e-9)


@pytest.mark.parametrize("total", [1, 7, 65, 1000, 447_850])
def test_it_has_no_jumps_and_ends_at_zero(total):
    steps = range(0, total + 1, max(1, total // 5000))
    rates = [reciprocal_sqrt(step, total, 1.0) for step in steps]
    assert max(rates) <= 1 and min(rates) >= 0
    assert reciprocal_sqrt(total, total, 1.0) == 0
    # On both sides of where it begins to fall, and to cool down
    for border in (total / 65, total * 63 / 65):
        before, after = (reciprocal_sqrt(border + s * 1e-7, total, 1.0) for s in (-1, 1))
        assert before == pytest.approx(after, rel=1e-5)


def test_the_flag_chooses_the_schedule():
    args = Namespace(schedule="rsqrt", warmup_steps=3500, end_lr=1e-5, recipe=None)
    assert stage1.learning_rate(args, 145, 6500, 0.002) == pytest.approx(0.00141421, abs=5e-9)
    args.schedule = None
    assert stage1.learning_rate(args, 325, 6500, 0.002) == 0.001  # half of a warm-up of 650
    assert stage1.learning_rate(args, 6500, 6500, 0.002) == 1e-5
    # ScaLR's own warm-up is whole; a short run has a ninth
    args.recipe = "scalr"
    assert stage1.learning_rate(args, 1750, 33402, 0.002) == 0.001
    assert stage1.learning_rate(args, 50, 900, 0.002) == 0.001


# ---- drop path -----------------------------------------------------------------------------------

def test_draws_belong_to_items():
    """They depend on seed, epoch and number, and not on the batch that an item is in."""
    keys = [(0, 5), (0, 6), (1, 5)]
    numbers = draws(keys, 3, 40)
    assert numbers.shape == (40, 3) and numbers.dtype == torch.float32
    assert 0 <= numbers.min() and numbers.max() < 1 and abs(numbers.mean() - 0.5) < 0.1
    assert torch.equal(draws(keys[1:], 3, 40), numbers[:, 1:])
    assert len(numbers[0].unique()) == 3
    assert not torch.equal(draws(keys, 4, 40), numbers)


# ---- runs ----------------------------------------------------------------------------------------

RUNS = {"cd": "--norm layernorm", "scalr": "", "scalr+": "--image-size 80 160 --hidden 24"}


def run_args(world, out, recipe, *more):
    return stage1_args(world, out, "--recipe", recipe, *RUNS[recipe].split(), *more)


def run(world, out, recipe, *more):
    stage1.main(run_args(world, out, recipe, *more))
    return load_point_encoder(out)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RUNS)
def test_what_a_recipe_writes_goes_out_and_back(recipe, world, tmp_path, capsys):
    model, checkpoint = run(world, tmp_path / "s1", recipe, "--steps", "2")
    spec = model.spec
    plus = recipe == "scalr+"
    assert (spec["head"], spec["activation"]) == (("mlp", "gelu") if plus else ("linear", "relu"))
    assert (spec["drop_path"], spec["norm"]) == (0.2 if plus else 0, {
        "scalr": "batchnorm"}.get(recipe, "layernorm"))
    assert ("--recipe scalr" in capsys.readouterr().out) == (recipe != "cd")

    released = to_released(model)
    last = {"linear": "classif.weight", "mlp": "classif.2.weight"}[spec["head"]]
    assert released[last].shape == (96, 24 if plus else 16, 1)
    again = from_released(released, spec["grids"])
    assert again.spec == spec | {"hidden": again.spec["hidden"]}
    assert same_values(again.state_dict(), model.state_dict())
    if plus:
        rates = [line["lr"] for line in lines(tmp_path / "s1")]
        assert rates[-1] == reciprocal_sqrt(1, 2, 0.002)


@pytest.mark.slow
def test_drop_path_goes_on_where_it_stopped(world, tmp_path, monkeypatch):
    whole, _ = run(world, tmp_path / "whole", "scalr+", "--steps", "6", "--limit", "4")
    real = stage1.check_finite

    def stopped(loss, model, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        real(loss, model, step, *rest)
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(stage1, "check_finite", stopped)
        with pytest.raises(BaseException):
            run(world, parts, "scalr+", "--steps", "6", "--limit", "4")
    again, _ = run(world, parts, "scalr+", "--steps", "6", "--limit", "4")
    assert same_values(again.state_dict(), whole.state_dict())


@pytest.mark.slow
def test_drop_path_is_the_same_in_two_processes(world, tmp_path):
    more = ["--steps", "2", "--drop-path", "0.5"]
    one, _ = run(world, tmp_path / "one", "scalr+", *more)
    argv = run_args(world, tmp_path / "two", "scalr+", *more)
    subprocess.run([sys.executable, *SPAWN, str(ROOT / "stage1.py"), *argv], check=True,
                   capture_output=True)
    losses = [lines(tmp_path / name)[-1]["loss"] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    # AdamW's first step is the rate, 1e-3, times the gradient's sign
    assert largest_difference(one.state_dict(), model_of(tmp_path / "two")) < 1e-4


def test_another_recipe_is_another_run_and_the_default_may_be_named(world, first, tmp_path, capsys):
    """The recipe decides of the warm-up too, so its name counts beside its values."""
    out = shutil.copytree(first, tmp_path / "s1")
    argv = stage1_args(world, out, "--steps", "2", "--recipe", "scalr", "--epochs", "49")
    message = fails_with_one_line(capsys, stage1.main, argv)
    assert "--conditions ['day-clear'], now ['all']" in message
    assert "--recipe None, now scalr" in message
    stage1.main(stage1_args(world, out, "--steps", "2", "--recipe", "cd"))
    assert "finished, at step 2" in capsys.readouterr().out


@pytest.mark.parametrize("argv, message", [
    ("--recipe scalr-", "--recipe invalid choice: 'scalr-'"),
    ("--drop-path 1", "--drop-path 1: must be at least 0 and below 1"),
    ("--hidden 0", "--hidden 0: must be at least 1"),
    ("--head mlp3", "--head invalid choice: 'mlp3'"),
    ("--hidden 64", "--hidden 64: of --head mlp alone"),
    ("--schedule rsqrt --end-lr 0", "--end-lr: of --schedule cosine alone"),
    ("--recipe scalr+ --warmup-steps 9", "--warmup-steps: of --schedule cosine alone"),
    ("--encoder vit_mini8 vit_mini8 --weights random random", "vit_mini8 stands there twice"),
    ("--recipe scalr+ --norm batchnorm", "--recompute: not with BatchNorm")])
def test_mistakes_are_one_line(argv, message, world, tmp_path, capsys):
    argv = [*stage1_args(world, tmp_path / "none"), "--image-size", "80", "160", *argv.split()]
    assert message in fails_with_one_line(capsys, stage1.main, argv)
    assert not (tmp_path / "none").exists()

"""Flags: every number of every script is refused in one line where it can mean nothing."""
import argparse

import numpy as np
import pytest
from runs import fails_with_one_line

import demo
import eval as evaluation
import export
import finetune
import probe
import stage1
import stage2
import waffleiron
from experiments import ablations, bench, corruptions, reproduce, visualize
from miniature import overview, pretrain, world
from plumbing.arguments import Distinct, Parser, real, whole
from plumbing.errors import InputError, one_line_errors
from plumbing.training import Batches
from readers import nuscenes, table

# {script: (function, the arguments that get through its parser)}; None: it reads sys.argv
SCRIPTS = {
    "stage1": (stage1.parse, "--data x --out y"),
    "stage2": (stage2.parse, "--data x --out y --stage1 z"),
    "probe": (probe.parse, "--data x --encoder y --task seg"),
    "finetune": (finetune.parse, "--data x --encoder y --task seg"),
    "eval": (evaluation.main, "x"),
    "export": (export.parse, "x --out y"),
    "demo": (demo.main, None),
    "nuscenes": (lambda: table.main("nuscenes"), None),
    "nuimages": (lambda: table.main("nuimages"), None),
    "joint": (ablations.joint, ""),
    "2d-head": (ablations.head_2d, ""),
    "bench": (bench.parse, ""),
    "corruptions": (corruptions.main, ""),
    "reproduce": (reproduce.main, ""),
    "visualize": (visualize.parse, "pca --encoders x --data y"),
    "overview": (overview.main, "x y"),
    "pretrain": (pretrain.main, ""),
    "world": (world.main, None),
}


class Parsed(Exception):
    pass


def parsers_of(name, monkeypatch):
    """The parser of a script, and those of its commands."""
    found = []

    def record(self, *_, **__):
        found.append(self)
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", record)
    function, argv = SCRIPTS[name]
    with pytest.raises(Parsed):
        if argv is None:
            function()
        else:
            function(argv.split())
    for action in found[-1]._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices.values()
    return found


def check_number(action):
    """Assert that a flag takes its default and refuses what is no number or means nothing."""
    negative = "x" if action.dest == "point" else "-1e18"  # a point may lie anywhere
    for text in ("nan", "inf", "-inf", "1e999", "x", "", negative):
        with pytest.raises(argparse.ArgumentTypeError):
            action.type(text)
    if isinstance(action.default, (int, float)) and not isinstance(action.default, bool):
        assert action.type(str(action.default)) == action.default


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_of_every_script_refuses_what_means_nothing(name, monkeypatch):
    for parser in parsers_of(name, monkeypatch):
        assert isinstance(parser, Parser)
        for action in parser._actions:
            if action.type in (int, float):
                assert action.choices, action.option_strings  # plain numbers are only for choices
            elif action.type and action.type.__module__ == "plumbing.arguments":
                check_number(action)


def test_whole_numbers_and_real_ones():
    assert whole(1)("7") == 7
    assert whole(0)("0") == 0
    assert whole()(str(2**63 - 1)) == 2**63 - 1
    assert whole(1, 6)("6") == 6
    assert real(0)("0") == 0
    assert real(above=0)("1e-9") == 1e-9
    assert real()("-3") == -3
    assert real(0, 1)("1") == 1


@pytest.mark.parametrize("parse, text, message", [
    (whole(1), "0", "0: must be at least 1"),
    (whole(1, 6), "7", "7: must be at most 6"),
    (whole(1), "1.5", "1.5: must be a whole number, at least 1"),
    (whole(0), str(2**63), f"{2**63}: must be at most 9223372036854775807"),
    (real(above=0), "0", "0: must be above 0"),
    (real(0, below=1), "1", "1: must be at least 0 and below 1"),
    (real(), "nan", "nan: must be a finite number")])
def test_a_refusal_says_what_is_wanted(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{message}$"):
        parse(text)


@pytest.mark.parametrize("argv, message", [
    ("--seed -1", "--seed -1: must be at least 0"),
    ("--lr nan", "--lr nan: must be a finite number, above 0"),
    ("--batch two", "--batch two: must be a whole number, at least 1"),
    ("--norm x", "--norm invalid choice: 'x'"),
    ("--nothing", "unrecognized arguments: --nothing"),
    ("--batch", "--batch expected one argument"),
    ("--cell 0.7", "--cell 0.7: twice --fov 64 is not a whole number of cells"),
    ("--cell 300", "--cell 300: twice --fov 64 is not"),
    ("--voxel 1e-5", "--voxel 1e-05: --fov 64 has more than")])
def test_a_bad_flag_is_one_line_that_names_it(capsys, argv, message):
    @one_line_errors
    def main(argv):
        args = stage1.parse(argv)
        columns = {"split": np.array([b"train"])}
        frames = table.FrameTable(nuscenes, args.data, columns)
        waffleiron.build(args, stage1.samplings_of(args, [frames]), out_channels=4)
    argv = ["--data", "x", "--out", "y", *argv.split()]
    assert message in fails_with_one_line(capsys, main, argv)


def test_a_value_that_is_given_twice_is_taken_once():
    parser = Parser()
    parser.add_argument("--conditions", nargs="+", action=Distinct)
    assert parser.parse_args(["--conditions", "b", "a", "b"]).conditions == ["b", "a"]
    args = stage2.parse(["--data", "x", "--out", "y", "--stage1", "z",
                         "--conditions", "night", "day-rain", "night"])
    assert args.conditions == ["night", "day-rain"]


def test_seeds_may_be_times_in_nanoseconds():
    seed = 1_700_000_000_000_000_000
    assert stage1.parse(["--data", "x", "--out", "y", "--seed", str(seed)]).seed == seed
    orders = [Batches(items=50, batch=10, first=0, last=5, seed=s).of(0)
              for s in (seed, seed, seed + 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("script, flags, now", [
    ("stage1", "--data x --out y --warmup 0", "it is --warmup-steps of stage1.py"),
    ("stage2", "--data x --out y --stage1 z --checkpoint", "it is --recompute"),
    ("probe", "--data x --encoder y --task seg --finetune", "it is finetune.py"),
    ("probe", "--data x --encoder y --task nuimages", "it is --task seg --data nuimages=PATH"),
    ("probe", "--data x --encoder y --task seg --warmup-e 0", "arguments: --warmup-e")])
def test_what_had_another_name_is_said(script, flags, now):
    """No abbreviation is taken: --warmup would have another unit in each script."""
    with pytest.raises(InputError, match=now):
        SCRIPTS[script][0](flags.split())

"""Flags: every number of every script is refused in one line where it can mean nothing."""
import argparse

import pytest

import demo
import eval as evaluation
import export
import index
import nuimages_data
import probe
import stage1
import stage2
from plumbing.arguments import Distinct, Parser, real, whole
from experiments import ablations, bench, corruptions, reproduce, visualize
from miniature import overview, pretrain, world
from test_scripts import fails_with_one_line

SCRIPTS = {  # the arguments that are needed to get through a parser; a main that takes none reads sys.argv
    "stage1": (stage1.parse, "--data x --out y"), "stage2": (stage2.parse, "--data x --out y --stage1 z"),
    "probe": (probe.parse, "--data x --encoder y --task seg"), "export": (export.parse, "x --out y"), "bench": (bench.parse, ""),
    "visualize": (visualize.parse, "pca --encoders x --data y"), "joint": (ablations.joint, ""), "2d-head": (ablations.head_2d, ""),
    "corruptions": (corruptions.main, ""), "reproduce": (reproduce.main, ""), "pretrain": (pretrain.main, ""),
    "overview": (overview.main, "x y"), "eval": (evaluation.main, "x"), "demo": (demo.main, None), "index": (index.main, None),
    "nuimages": (nuimages_data.main, None), "world": (world.main, None)}


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
        function() if argv is None else function(argv.split())
    for action in found[-1]._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices.values()
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_of_every_script_refuses_what_means_nothing(name, monkeypatch):
    for parser in parsers_of(name, monkeypatch):
        assert isinstance(parser, Parser)
        for action in parser._actions:
            if action.type in (int, float):
                assert action.choices, action.option_strings  # plain numbers are only for choices
            elif action.type and action.type.__module__ == "plumbing.arguments":
                for text in ("nan", "inf", "-inf", "1e999", "x", "", "-1e18" if action.dest != "point" else "x"):
                    with pytest.raises(argparse.ArgumentTypeError):
                        action.type(text)
                if isinstance(action.default, (int, float)) and not isinstance(action.default, bool):
                    assert action.type(str(action.default)) == action.default  # the default is a value that it takes


def test_whole_numbers_and_real_ones():
    assert whole(1)("7") == 7 and whole(0)("0") == 0 and whole()(str(2**63 - 1)) == 2**63 - 1 and whole(1, 6)("6") == 6
    assert real(0)("0") == 0 and real(above=0)("1e-9") == 1e-9 and real()("-3") == -3 and real(0, 1)("1") == 1
    for parse, text, message in ((whole(1), "0", "0: must be at least 1"), (whole(1, 6), "7", "7: must be at most 6"),
                                 (whole(1), "1.5", "1.5: must be a whole number, at least 1"),
                                 (whole(0), str(2**63), "must be at most 9223372036854775807"), (real(above=0), "0", "0: must be above 0"),
                                 (real(0, below=1), "1", "1: must be at least 0 and below 1"),
                                 (real(), "nan", "nan: must be a finite number")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{message}$" if text != str(2**63) else message):
            parse(text)


def test_a_bad_flag_is_one_line_that_names_it(capsys):
    base = ["--data", "x", "--out", "y"]
    for more, message in ((["--seed", "-1"], "--seed -1: must be at least 0"), (["--lr", "nan"], "--lr nan: must be a finite number, above 0"),
                          (["--batch", "two"], "--batch two: must be a whole number, at least 1"), (["--norm", "x"], "--norm invalid choice: 'x'"),
                          (["--nothing"], "unrecognized arguments: --nothing"), (["--batch"], "--batch expected one argument"),
                          (["--cell", "0.7"], "--cell 0.7: twice --fov 64 is not a whole number of cells"),
                          (["--cell", "300"], "--cell 300: twice --fov 64 is not"), (["--voxel", "1e-5"], "--voxel 1e-05: --fov 64 has more than")):
        def main():
            from errors import one_line_errors
            one_line_errors(lambda: stage1.cloud_of(stage1.parse(base + more)))()
        assert message in fails_with_one_line(capsys, lambda argv: main(), None)


def test_a_value_that_is_given_twice_is_taken_once():
    parser = Parser()
    parser.add_argument("--conditions", nargs="+", action=Distinct)
    assert parser.parse_args(["--conditions", "b", "a", "b"]).conditions == ["b", "a"]
    args = stage2.parse(["--data", "x", "--out", "y", "--stage1", "z", "--conditions", "night", "day-rain", "night"])
    assert args.conditions == ["night", "day-rain"]


def test_seeds_may_be_times_in_nanoseconds():
    from training import Batches
    seed = 1_700_000_000_000_000_000
    assert stage1.parse(["--data", "x", "--out", "y", "--seed", str(seed)]).seed == seed
    orders = [Batches(items=50, batch=10, first=0, last=5, seed=s).of(0) for s in (seed, seed, seed + 1)]
    assert orders[0] == orders[1] != orders[2]

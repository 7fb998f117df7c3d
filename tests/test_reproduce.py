"""The claims in miniature: verdicts, rows, the runs that a claim needs, and what is run again."""
import functools
import itertools
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from runs import open_one

import finetune
import probe
import stage1
import stage2
from experiments import corruptions, reproduce, runs, s3pt_claims, scalr_claims
from experiments.claims import OCCURRING, Measured
from experiments.reproduce import (CLAIMS, COMMANDS, TASKS, WORLDS, Claim,
                                   Number, World)
from plumbing.errors import InputError
from s3pt import segmenter, settings

COLUMNS = ("full", "day-clear", "day-rain", "night")
CORRUPTIONS = ("clean", "fog", "gaussian_noise", "motion_blur")


# ---- verdicts ------------------------------------------------------------------------------------

def test_verdicts_follow_the_rule():
    assert reproduce.verdict([0.6], "mIoU") == "holds"
    assert reproduce.verdict([0.4], "mIoU") == "within noise"
    assert reproduce.verdict([-0.6], "mIoU") == "does not hold"
    assert reproduce.verdict([-0.2], "RMSE") == "holds"  # lower is better
    assert reproduce.verdict([0.2], "RMSE") == "does not hold"
    # "not worse" is claimed
    assert reproduce.verdict([-0.4], "mIoU", says="not worse") == "holds"
    assert reproduce.verdict([-0.6], "mIoU", says="not worse") == "does not hold"
    # That nothing changes is refuted on either side
    assert [reproduce.verdict([d], "mIoU", says="the same") for d in (-0.6, 0.4, 0.6)] == [
        "does not hold", "holds", "does not hold"]
    # mean 2, standard error 2 / sqrt(3) = 1.15, twice of it is more than the mean
    assert reproduce.verdict([0.0, 2.0, 4.0], "mIoU") == "within noise"
    # However wide the spread, two are the same only if their means are near
    assert reproduce.verdict([0.0, 2.0, 4.0], "mIoU", says="the same") == "does not hold"
    assert reproduce.verdict([-4.0, 0.0, 4.0], "mIoU", says="the same") == "holds"
    assert reproduce.verdict([1.0, 2.0, 3.0], "mIoU") == "holds"  # standard error 0.58


def test_a_row_says_both_numbers_and_their_spread():
    claim = Claim("x", "1", "a is better than b", Number("cd", "depth"), Number("base", "depth"),
                  (7.64, 8.37))
    assert reproduce.row(claim, [(8.0, 9.0), (8.2, 9.4)]) == (
        "| `x` | 1 | a is better than b | RMSE | 7.64 / 8.37 | "
        "8.10 ± 0.14 / 9.20 ± 0.28 | -1.10 ± 0.14 | holds |")
    assert reproduce.row(claim, [(8.0, 9.0)]).endswith("| 8.00 / 9.00 | -1.00 | holds |")


def test_what_is_near_an_untrained_encoder_gets_no_verdict():
    claim = Claim("x", "1", "a is better than b", Number("a", "seg"), Number("b", "seg"), None)
    near, far = [(17.0, 15.0), (17.5, 15.5)], [(17.0, 15.0), (19.5, 15.5)]  # a: 17.25 and 18.25
    assert reproduce.row(claim, near, [14.0, 15.0]).endswith("| near an untrained encoder |")
    assert reproduce.row(claim, near).endswith("| holds |")
    assert reproduce.row(claim, near, [14.0, 14.4]).endswith("| holds |")
    assert reproduce.row(claim, far, [14.0, 15.0]).endswith("| holds |")
    # The claimed to be worse may be the one that has learnt
    turned = [(worse, better) for better, worse in far]
    assert reproduce.row(claim, turned, [14.0, 15.0]).endswith("| does not hold |")


@pytest.mark.slow
def test_means_are_of_the_classes_that_the_worlds_have(world, kitti):
    of_kitti = scalr_claims.CLASSES[scalr_claims.OTHER]
    for root, dataset, names in ((world, "nuscenes", OCCURRING),
                                 (kitti, "semantickitti", of_kitti)):
        table = open_one(root, name=dataset)
        there = set().union(*(table.labels(row).tolist() for row in table.rows)) - {0}
        assert {table.reader.CLASSES[number] for number in there} == set(names)
        assert len(set(names)) == len(names)


# ---- runs ----------------------------------------------------------------------------------------

@pytest.fixture
def dry(tmp_path, monkeypatch):
    """(World, commands): the commands are recorded and not run.

    Each number of an evaluation is the number of commands so far.
    """
    world, commands = World(tmp_path, 5), []
    classes = {name for of_task in (scalr_claims.CLASSES, s3pt_claims.CLASSES)
               for names in of_task.values() for name in names}

    def run(command):
        command = shlex.split(command)
        commands.append(command)
        out = Path(out_of(command))
        out.mkdir(parents=True, exist_ok=True)
        columns = dict.fromkeys(COLUMNS, float(len(commands)))
        of_classes = dict.fromkeys(classes, float(len(commands)))
        result = {"mIoU": columns, "RMSE": columns, "IoU": {"full": of_classes}}
        if "s3pt.segmenter" in command:
            elsewhere = "--evaluate" in command
            column = "nuimages to cityscapes" if elsewhere else "nuimages"
            rows = {column: of_classes}
            path = f"{out}.json" if elsewhere else out / "results.json"
            Path(path).write_text(json.dumps({"heads": [{"columns": rows}]}))
        if command[0] == "eval.py":
            Path(f"{out}.json").write_text(json.dumps([result]))
        if command[1:3] == ["experiments.corruptions", "images"]:
            results = dict.fromkeys(CORRUPTIONS, result)
            Path(f"{out}.json").write_text(json.dumps([{"results": results}]))
    monkeypatch.setattr(runs, "run_command", run)
    return world, commands


def after(flag, command):
    return command[command.index(flag) + 1]


def out_of(command):
    if "--evaluate" in command:
        return f"{after('--evaluate', command)}/transfer-cityscapes"
    return after("--out", command)


def scripts(commands):
    return [command[0] for command in commands]


def both_numbers(world, claim):
    return world.number(claim.better), world.number(claim.worse)


def check_command(command, made):
    """That a script knows a command's flags, and that what it reads is among `made` already."""
    text = " ".join(command)
    for flag in ("--stage1", "--data"):
        if flag in command:
            for part in after(flag, command).split(","):
                assert part.rpartition("=")[2] in made, text
    if "experiments.ablations" in command:
        known = {"no-stage1", "2d-head", "joint", "stage1-all-conditions"}
        assert after("experiments.ablations", command) in known
    if "experiments.corruptions" in command:
        assert str(corruptions.parse(command[2:]).out) == out_of(command)
    parsers = {"stage1.py": stage1.parse, "stage2.py": stage2.parse, "probe.py": probe.parse,
               "finetune.py": finetune.parse, "s3pt.segmenter": segmenter.parse,
               "s3pt.train": functools.partial(settings.parse, "")}
    script, *rest = command[1:] if command[0] == "-m" else command
    if script in parsers and "--evaluate" not in command:
        args = parsers[script](rest)
        assert args.seed == 5 and args.out == out_of(command)
        encoders = args.encoder if isinstance(args.encoder, list) else [args.encoder]
        for encoder in encoders:
            if encoder not in (None, "vit_mini8", reproduce.ENCODER):
                assert {encoder, encoder.removesuffix("/encoder.pth")} & made, text


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_alone_runs_what_it_needs_in_order(dry, name):
    world, commands = dry
    values = both_numbers(world, CLAIMS[name])
    assert all(isinstance(value, float) for value in values)
    made = set()
    for command in commands:
        check_command(command, made)
        made.add(out_of(command))
    assert commands[0][0] == "miniature/world.py"
    count = len(commands)
    assert both_numbers(world, CLAIMS[name]) == values
    assert len(commands) == count  # nothing twice


def test_a_finished_command_is_run_again_only_if_it_changed(dry):
    world, commands = dry
    command = f"probe.py --out {world.folder}/x"
    world.make("x", command)
    again = World(world.folder.parent, 5)
    again.make("x", command)
    assert len(commands) == 1
    again.make("x", f"{command} --steps 2")
    assert len(commands) == 2


def test_what_needs_a_run_that_changed_is_run_again_too(dry, monkeypatch):
    world, commands = dry

    def runs_of_a_new_world():
        count = len(commands)
        World(world.folder.parent, 5).run("cd")
        return scripts(commands[count:])

    assert runs_of_a_new_world() == ["miniature/world.py", "stage1.py", "stage2.py"]
    monkeypatch.setitem(COMMANDS, "stage1", COMMANDS["stage1"] + " --epochs 2")
    assert runs_of_a_new_world() == ["stage1.py", "stage2.py"]
    # cut short: what has finished is not known any more
    world.note.write_text(world.note.read_text()[:40])
    assert runs_of_a_new_world() == ["miniature/world.py", "stage1.py", "stage2.py"]
    # a run that is gone is made again
    shutil.rmtree(world.folder / "stage1")
    assert runs_of_a_new_world() == ["stage1.py"]
    # another encoder as it was
    monkeypatch.setattr(reproduce, "ENCODER", "miniature/world.py")
    assert runs_of_a_new_world() == ["stage1.py", "stage2.py"]


def test_numbers_of_other_frames_or_protocols_are_no_claim(dry, monkeypatch):
    world, _ = dry
    results = iter([{"made_from": {"frames": {"frames": count}}, "protocol": {},
                     "mIoU": {"full": 1.0}} for count in (6, 18)])
    monkeypatch.setattr(world, "result", lambda number: next(results))
    with pytest.raises(InputError, match="claim full: cd and base cannot be compared: "
                                         "other frames: frames 18; now: frames 6"):
        world.values(CLAIMS["full"])


def test_a_failed_command_stops_everything_and_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: SimpleNamespace(wait=lambda: 2))
    world = World(tmp_path, 5)
    with pytest.raises(SystemExit) as stop:
        world.run("stage1")
    assert stop.value.code == 2 and not world.done


# ---- the claims, and the table -------------------------------------------------------------------

def test_every_run_and_task_of_a_claim_exists_and_every_run_has_a_claim():
    numbers = []
    for claim in CLAIMS.values():
        for side in (claim.better, claim.worse):
            numbers += [side] if isinstance(side, Number) else side
    runs = {number.run for number in numbers}
    assert runs <= {"base", *COMMANDS}
    # what others begin with
    assert set(COMMANDS) - runs == {*WORLDS, "labels", "2d-head-1", "weak", "other",
                                    "s3pt-stage1"}
    assert {number.task for number in numbers} == set(TASKS)
    for claim in CLAIMS.values():
        of_depth = claim.name.startswith("depth")
        assert claim.metric == ("RMSE" if of_depth else "mIoU")


def test_a_paper_s_part_of_the_page_is_replaced_and_the_others_stay():
    old = reproduce.page({"cd": reproduce.section("cd", ["| old |"], "run", [1, 2], 60),
                          "scalr": reproduce.section("scalr", ["| first |"], "run", [1], 60)})
    new = reproduce.page({"scalr": reproduce.section("scalr", ["| second |"], "run", [3], 60)}, old)
    assert new == old.replace("| first |", "| second |").replace("seed 1.", "seed 3.")
    assert new.count("## ") == 3 and new.index("| old |") < new.index("| second |")
    written = (ROOT / "results/miniature.md").read_text()
    assert reproduce.RULE in written and "| `night` | 1 |" in written
    # What was written by hand there would be lost
    begins = ("#", "|", "`python -m experiments.reproduce", "*claimed to", "*holds*", "Minutes of")
    assert all(line.startswith(begins) for line in written.splitlines() if line)


def test_the_page_s_rows_are_of_the_numbers_that_are_kept():
    page = (ROOT / "results/miniature.md").read_text()
    kept = Measured(ROOT / "results/miniature.json").kept()
    assert set(kept) == {claim.name for claim in s3pt_claims.CLAIMS}
    for name, seeds in kept.items():
        assert list(seeds) == ["1", "2", "3"]
        floors = [piece["floor"] for piece in seeds.values() if CLAIMS[name].floor]
        values = [piece["values"] for piece in seeds.values()]
        assert f"\n{reproduce.row(CLAIMS[name], values, floors)}\n" in page


def test_a_table_of_one_claim(dry, tmp_path, capsys):
    out = tmp_path / "table.md"
    reproduce.main(["--claim", "night", "--seeds", "5", "--runs", str(tmp_path / "runs"),
                    "--out", str(out)])
    text = out.read_text()
    assert text.count("\n| `") == 1 and "| `night` | 1 |" in text and reproduce.RULE in text
    assert text.strip() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reproduce.main(["--claim", "nihgt"])


def test_what_a_file_of_numbers_has_is_not_measured_again(dry, tmp_path, monkeypatch, capsys):
    """Seed by seed and claim by claim, in folders of runs that are gone."""
    _, commands = dry
    numbers = tmp_path / "numbers.json"

    def rows(*argv, runs):
        reproduce.main([*argv, "--runs", str(tmp_path / runs), "--numbers", str(numbers)])
        out = capsys.readouterr().out
        return [line for line in out.splitlines() if line.startswith("| `")][-1], len(commands)
    first, _ = rows("--claim", "night", "--seeds", "1", runs="a")
    again, count = rows("--claim", "night", "--seeds", "1", runs="b")
    assert first == again and not (tmp_path / "b").exists()
    both, more = rows("--claim", "night", "--seeds", "1", "2", runs="c")
    assert "±" in both and more > count and not (tmp_path / "c/seed-1").exists()
    assert rows("--claim", "night", "--seeds", "2", "1", runs="d") == (both, more)
    assert {name: list(seeds) for name, seeds in json.loads(numbers.read_text()).items()} == {
        "night": ["1", "2"]}
    assert rows("--claim", "full", "--seeds", "1", runs="e")[1] > more

    # By other commands it would be another number: of a run far away, of the probe, of a world
    for recipes, name in ((COMMANDS, "world"), (TASKS, "seg"), (COMMANDS, "stage1")):
        before = len(commands)
        monkeypatch.setitem(recipes, name, recipes[name] + " --more")
        assert rows("--claim", "night", "--seeds", "1", runs="f")[1] > before

    # Another experiment's file, say, is not written into
    for other in ("[1]", '{"night": 1}', (ROOT / "results/real.json").read_text()):
        numbers.write_text(other)
        with pytest.raises(SystemExit):
            rows("--claim", "night", runs="g")
        assert f"--numbers {numbers}: damaged, or of something else" in capsys.readouterr().err
        assert numbers.read_text() == other


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_s_recipe_has_all_that_it_runs(dry, name, monkeypatch):
    world, commands = dry
    before = reproduce.recipe_of(CLAIMS[name])
    both_numbers(world, CLAIMS[name])
    for run in {Path(out_of(command)).name for command in commands} & set(COMMANDS):
        monkeypatch.setitem(COMMANDS, run, COMMANDS[run] + " ")
        assert reproduce.recipe_of(CLAIMS[name]) != before, run
        monkeypatch.undo()


def test_minutes_stand_beside_trainings_of_other_lengths(dry, tmp_path, monkeypatch):
    clock = itertools.count(step=60)
    monkeypatch.setattr(runs.time, "time", lambda: next(clock))
    out = tmp_path / "table.md"
    reproduce.main(["--claim", "s3pt-over-cribo", "--seeds", "5", "--runs", str(tmp_path / "runs"),
                    "--out", str(out)])
    text = out.read_text()
    assert "less than 3 points above the same network untrained get no verdict." in text
    assert text.count("\nMinutes of a training of 1,495 steps: "
                      "`s3pt-cribo` 1, `s3pt` 1.\n") == 1


def test_commands_are_shell_lines():
    for command in COMMANDS.values():
        assert shlex.split(command)

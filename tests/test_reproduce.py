import json
import shlex
import shutil
from pathlib import Path

import pytest

import probe
import stage1
import stage2
from errors import InputError
from experiments import reproduce
from experiments.reproduce import CLAIMS, COMMANDS, TASKS, Claim, Number, World


def test_verdicts_follow_the_rule():
    assert reproduce.verdict([0.6], "mIoU") == "holds"
    assert reproduce.verdict([0.4], "mIoU") == "within noise"
    assert reproduce.verdict([-0.6], "mIoU") == "does not hold"
    assert reproduce.verdict([-0.2], "RMSE") == "holds"  # lower is better
    assert reproduce.verdict([0.2], "RMSE") == "does not hold"
    # mean 2, standard error 2 / sqrt(3) = 1.15, twice of it is more than the mean
    assert reproduce.verdict([0.0, 2.0, 4.0], "mIoU") == "within noise"
    assert reproduce.verdict([1.0, 2.0, 3.0], "mIoU") == "holds"  # standard error 0.58


def test_a_row_says_both_numbers_and_their_spread():
    claim = Claim("x", "1", "a is better than b", Number("cd", "depth"), Number("base", "depth"), (7.64, 8.37))
    assert reproduce.row(claim, [(8.0, 9.0), (8.2, 9.4)]) == (
        "| `x` | 1 | a is better than b | RMSE | 7.64 / 8.37 | 8.10 ± 0.14 / 9.20 ± 0.28 | -1.10 ± 0.14 | holds |")
    assert reproduce.row(claim, [(8.0, 9.0)]).endswith("| 8.00 / 9.00 | -1.00 | holds |")


@pytest.fixture
def dry(tmp_path, monkeypatch):
    """A World whose commands are recorded, not run; evaluations give the number of evaluations so far."""
    world, commands = World(tmp_path, 5), []

    def run(arguments, cwd):
        commands.append(arguments[1:])
        here = Path(arguments[arguments.index("--out") + 1])
        columns = {column: float(len(commands)) for column in ("full", "day-clear", "day-rain", "night")}
        result = {"mIoU": columns, "RMSE": columns}
        here.mkdir(parents=True, exist_ok=True)
        if arguments[1] == "eval.py":
            Path(f"{here}.json").write_text(json.dumps([result]))
        if "experiments.corruptions" in arguments and "images" in arguments:
            Path(f"{here}.json").write_text(json.dumps([{"results": dict.fromkeys(("clean", "fog", "gaussian_noise", "motion_blur"), result)}]))
        return type("Done", (), {"returncode": 0})
    monkeypatch.setattr(reproduce.subprocess, "run", run)
    return world, commands


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_alone_runs_what_it_needs_in_order(dry, name):
    world, commands = dry
    values = world.number(CLAIMS[name].better), world.number(CLAIMS[name].worse)
    assert all(isinstance(value, float) for value in values)
    made = set()
    for command in commands:
        text = " ".join(command)
        out = command[command.index("--out") + 1]
        if "experiments.ablations" in command:
            known = {"no-stage1", "2d-head", "joint", "stage1-all-conditions"}
            assert command[command.index("experiments.ablations") + 1] in known
        for flag in ("--stage1", "--data"):
            if flag in command:
                assert command[command.index(flag) + 1] in made, text
        if command[0] in ("stage1.py", "stage2.py", "probe.py"):  # the scripts know all flags
            args = {"stage1.py": stage1, "stage2.py": stage2, "probe.py": probe}[command[0]].parse(command[1:])
            assert args.seed == 5 and args.out == out
            if command[0] == "probe.py" and args.encoder != reproduce.ENCODER:
                assert args.encoder in made
        made.add(out)
    assert commands[0][0] == "miniature/world.py"
    count = len(commands)
    assert (world.number(CLAIMS[name].better), world.number(CLAIMS[name].worse)) == values and len(commands) == count  # nothing twice


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
    world.run("cd")
    first = [command[0] for command in commands]
    monkeypatch.setitem(COMMANDS, "stage1", COMMANDS["stage1"] + " --epochs 2")
    again = World(world.folder.parent, 5)
    again.run("cd")
    assert first == ["miniature/world.py", "stage1.py", "stage2.py"]
    assert [command[0] for command in commands[3:]] == ["stage1.py", "stage2.py"]
    again.note.write_text(again.note.read_text()[:40])  # cut short: what has finished is not known any more
    World(world.folder.parent, 5).run("cd")
    assert len(commands) == 8
    shutil.rmtree(world.folder / "stage1")  # a run that is gone is made again
    World(world.folder.parent, 5).run("cd")
    assert [command[0] for command in commands[8:]] == ["stage1.py"]
    monkeypatch.setattr(reproduce, "ENCODER", "miniature/world.py")  # another encoder as it was
    World(world.folder.parent, 5).run("cd")
    assert [command[0] for command in commands[9:]] == ["stage1.py", "stage2.py"]


def test_numbers_of_other_frames_or_protocols_are_no_claim(dry, monkeypatch):
    world, _ = dry
    results = iter([{"made_from": {"frames": {"frames": n}}, "protocol": {}, "mIoU": {"full": 1.0}} for n in (6, 18)])
    monkeypatch.setattr(world, "result", lambda number: next(results))
    with pytest.raises(InputError, match="claim full: cd and base cannot be compared: other frames: frames 18; now: frames 6"):
        world.values(CLAIMS["full"])


def test_a_failed_command_stops_everything_and_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 2}))
    world = World(tmp_path, 5)
    with pytest.raises(SystemExit) as stop:
        world.run("stage1")
    assert stop.value.code == 2 and not world.done


def test_every_run_and_task_of_a_claim_exists_and_every_run_has_a_claim():
    numbers = [number for claim in CLAIMS.values() for side in (claim.better, claim.worse)
               for number in (side if not isinstance(side, Number) else [side])]
    assert {number.run for number in numbers} <= {"base", *COMMANDS}
    assert set(COMMANDS) - {number.run for number in numbers} == {"world", "images", "labels", "2d-head-1"}  # what others begin with
    assert {number.task for number in numbers} == set(TASKS)
    assert all(claim.metric == ("RMSE" if "depth" in claim.name else "mIoU") for claim in CLAIMS.values())


def test_a_table_of_one_claim(dry, tmp_path, monkeypatch, capsys):
    reproduce.main(["--claim", "night", "--seeds", "5", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    assert text.count("\n| `") == 1 and "| `night` | 1 |" in text and reproduce.RULE in text
    assert text.strip() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reproduce.main(["--claim", "nihgt"])


def test_commands_are_shell_lines():
    for command in COMMANDS.values():
        assert shlex.split(command)

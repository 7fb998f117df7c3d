"""The experiment on real frames: its commands, which are recorded and not run, and the frames."""
from pathlib import Path

import pytest
from dry import OF_PROBES, PARSERS, VAL, out_of, parsed, recorded, script_of
from runs import fails_with_one_line, open_one

from experiments import real, runs
from experiments.real import COMMANDS, CONDITIONS, CORRUPTIONS, ENCODER, FIGURES, ROWS, SEEN


@pytest.fixture
def dry(panda, tmp_path, monkeypatch):
    return recorded(panda, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def everything(panda, tmp_path_factory):
    """(Dry, its commands): all rows of one seed, and the distance of pictures."""
    open_one(panda, name="pandaset64")  # cached by this process, which is sooner
    with pytest.MonkeyPatch.context() as patch:
        found = recorded(panda, tmp_path_factory.mktemp("real"), patch)
        patch.setattr(real, "check_pictures", lambda folder: None)
        commands = found.main("--seeds", "5", "--pictures", "/data/pictures")
    return found, commands


def places(data):
    """The last two parts of the paths of a --data."""
    return ["/".join(Path(part.partition("=")[2]).parts[-2:]) for part in data.split(",")]


def test_each_script_understands_its_commands(everything):
    dry, commands = everything
    for command in commands:
        name, _ = script_of(command)
        args = parsed(command)
        assert str(args.out) == out_of(command)
        if name == "experiments.real_figures" or "compare" in command:
            continue
        if name == "experiments.corruptions":
            assert args.condition is None and args.corruption == args.out.name
            assert args.severity == real.SEVERITY and not args.split
        elif name not in ("experiments.distance", "eval.py"):
            assert args.seed == 5 and args.val_scenes == [VAL]
        if name == "experiments.probes":
            assert tuple(args.conditions) == CONDITIONS
        if name == "experiments.distance":
            assert args.data == "pictures=/data/pictures"


def test_everything_is_made_once_and_before_it_is_needed(everything):
    dry, commands = everything
    outs = [out_of(command) for command in commands]
    assert len(set(outs)) == len(outs)
    folders = {str(dry.root / "runs/clean")}
    for command, out in zip(commands, outs):
        args = vars(parsed(command))
        needed = [part.partition("=")[2] for part in (args.get("data") or "").split(",")
                  if part.startswith("pandaset64=")]
        needed += [args.get("stage1"), args.get("encoder"), *(args.get("encoders") or ())]
        needed += args.get("probes") or ()
        for one in needed:
            assert one in (None, ENCODER, *folders), command
        folders.add(out)
    names = [Path(out).name for out in outs]
    assert names[:len(CORRUPTIONS)] == list(CORRUPTIONS)
    results = set()
    for name, row in ROWS.items():
        of_points = {f"{name}-seg3d", f"{name}-seg3d-table"}
        results |= of_points if row.script == "seg3d" else {f"{name}-{row.script}.json"}
    assert set(names) == {*CORRUPTIONS, *COMMANDS, *results, *FIGURES, "numbers.png"}


def test_only_the_probes_see_the_last_condition_and_the_trainings_are_alike(everything):
    """Stage 2 and its rivals have the same steps, batch and, on the same feature, rate."""
    _, commands = everything
    seen = ["runs/clean", *(f"copies/{name}" for name in SEEN)]
    found = {}
    for command in commands:
        name, _ = script_of(command)
        if name in (*PARSERS, "experiments.distance", "eval.py"):
            continue
        args = parsed(command)
        if name == "experiments.probes":
            assert places(args.data) == [*seen, f"copies/{CORRUPTIONS[-1]}"]
            continue
        found[Path(out_of(command)).name] = args
        assert places(args.data) in (["runs/clean"], seen)
        assert args.restart and args.workers == 0

    of_stage1 = {"cd": "stage1", "clear-only": "stage1", "twin": "stage1", "rich-cd": "rich-1",
                 "random-teacher": "random-3d", "labels": "labels-3d", "2d-head": "2d-head-1"}
    for name in ("joint", *of_stage1):
        args = found[name]
        rate = args.lr_2d if name == "joint" else args.lr
        assert (args.steps, args.batch) == (216, 6)
        assert rate == (3e-3 if name == "rich-cd" else 1e-3)
        assert args.conditions == ["all"] and args.cameras == "all"
        assert len(args.data.split(",")) == (1 if name == "clear-only" else 1 + len(SEEN))
    for name in ("stage1", "stage1-all", "labels-3d", "2d-head-1", "rich-1"):
        args = found[name]
        assert (args.steps, args.batch, args.channels, args.depth) == (450, 6, 64, 4)
        assert args.conditions == (["all"] if name == "stage1-all" else ["clear"])
        assert (len(args.data.split(",")) > 1) == (name == "stage1-all")
    # What was never trained
    assert found["random-3d"].lr < 1e-9 and found["random-3d"].end_lr == 0
    assert found["rich-1"].feature == "strides"
    assert {name: Path(found[name].stage1).name for name in of_stage1} == of_stage1


def test_rows_are_of_the_encoders_that_they_name(everything):
    _, commands = everything
    found = {}
    for command in commands:
        name, _ = script_of(command)
        args = vars(parsed(command))
        row = Path(out_of(command)).name.partition(".")[0].removesuffix("-probes")
        if name == "experiments.probes":
            found[row] = (Path(args["encoder"]).name, args["weights"], args["feature"])
        elif name == "probe.py":
            assert args["task"] == "seg3d"
            found[row.removesuffix("-seg3d")] = Path(args["encoder"]).name
        elif name == "experiments.distance":
            assert [Path(one).name for one in args["encoders"]] == [ENCODER, "cd", "twin"]
    own = {name: (name, None, None) for name in ROWS if name in COMMANDS}
    assert found == own | {
        "random": (ENCODER, "random", None), "imagenet": (ENCODER, None, None),
        "rich": (ENCODER, None, "strides"), "3d": "stage1", "3d-all": "stage1-all",
        "3d-random": "random-3d", "3d-labels": "labels-3d"}


# ---- what is run, and what is kept ---------------------------------------------------------------

def test_the_page_of_all_rows_is_written_and_a_second_start_runs_nothing(everything, monkeypatch):
    dry, commands = everything
    kept = dry.kept()
    assert list(kept["rows"]) == list(ROWS) and all(list(row) == ["5"]
                                                    for row in kept["rows"].values())
    assert kept["rows"]["cd"]["5"] == OF_PROBES
    assert kept["rows"]["3d"]["5"] == {"mIoU": {"full": 30.0}}  # of eval.py's list of one
    assert kept["rows"]["distance"]["5"] == [3.0, 2.0, 1.0]
    text = (dry.root / "page.md").read_text()
    assert "| `3d`: stage 1 on clear pictures | 1 | 30.0 |" in text
    assert "not run" not in text

    monkeypatch.setattr(runs, "run_command", dry.run)
    monkeypatch.setattr(real, "weights_file", lambda: None)
    monkeypatch.setattr(real, "check_pictures", lambda folder: None)
    assert dry.main("--seeds", "5", "--pictures", "/data/pictures") == []
    assert dry.kept() == kept and (dry.root / "page.md").read_text() == text


def test_only_what_is_needed_is_made(dry):
    assert dry.main("--only", "imagenet", "--seeds", "1") and dry.made() == [
        *CORRUPTIONS, "imagenet-probes.json"]
    dry.main("--only", "cd", "--seeds", "1")
    assert dry.made() == ["stage1", "cd", "cd-probes.json"]
    dry.main("--only", "3d", "twin", "--seeds", "1")
    assert dry.made() == ["3d-seg3d", "3d-seg3d-table", "twin", "twin-probes.json"]
    dry.main("--only", "cd", "--seeds", "1", "2")
    assert dry.made() == ["stage1", "cd", "cd-probes.json"]  # of the other seed, same copies
    assert all("seed-2" in out_of(command) for command in dry.commands)
    assert {name: list(row) for name, row in dry.kept()["rows"].items()} == {
        "imagenet": ["1"], "cd": ["1", "2"], "3d": ["1"], "twin": ["1"]}


def test_without_pictures_their_row_is_left_out(dry, capsys):
    dry.main("--seeds", "1")
    assert set(dry.kept()["rows"]) == set(ROWS) - {"distance"}
    line = fails_with_one_line(capsys, lambda argv: dry.main(*argv), ["--only", "distance"])
    assert line.endswith("--only distance: needs --pictures")


def test_results_of_other_frames_are_not_mixed_nor_lost(dry, capsys):
    dry.main("--only", "imagenet", "--seeds", "1")
    frames = dry.kept()["frames"]
    assert frames == {"dataset": "pandaset64", "train": 4, "train_scenes": "001, 002", "val": 2,
                      "val_scenes": VAL}
    dry.main("--only", "random", "--seeds", "1")
    assert set(dry.kept()["rows"]) == {"imagenet", "random"}
    assert "frames of pandaset64's scenes 001, 002 teach and 2 of\n003 judge" in (
        dry.root / "page.md").read_text()

    before = dry.kept()
    with pytest.raises(SystemExit):
        dry.main("--only", "random", "--seeds", "1", "--val-scenes", "002")
    assert "choose another name" in capsys.readouterr().err
    assert dry.kept() == before


def test_a_row_that_was_measured_elsewhere_is_not_made_again(dry):
    dry.main("--only", "imagenet", "--seeds", "1")
    (dry.root / "runs" / "seed-1" / "done.json").unlink()
    dry.main("--only", "imagenet", "--seeds", "1")
    assert dry.made() == []
    dry.main("--only", "imagenet", "--seeds", "1", "--again")
    assert dry.made() == ["imagenet-probes.json"]


def test_a_run_that_fails_leaves_the_rows_before_it(dry, monkeypatch):
    def run(command):
        if "clean_twin" in command:
            raise SystemExit(2)
        dry.run(command)
    monkeypatch.setattr(runs, "run_command", run)
    with pytest.raises(SystemExit):
        dry.main("--only", "cd", "twin", "--seeds", "1")
    assert set(dry.kept()["rows"]) == {"cd"}
    assert "| `cd`: + collaborative distillation | 1 | 40.0 |" in (
        dry.root / "page.md").read_text()
    monkeypatch.setattr(runs, "run_command", dry.run)
    dry.main("--only", "cd", "twin", "--seeds", "1")
    assert dry.made() == ["twin", "twin-probes.json"]


def test_runs_of_other_scenes_are_refused(dry, tmp_path, panda, capsys):
    """What was trained on them would be taken for runs of these."""
    dry.main("--only", "imagenet", "--seeds", "1")
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for name in ("001", "003"):
        (fewer / name).symlink_to(panda / name)
    dry.panda = fewer
    line = fails_with_one_line(capsys, lambda _: dry.main("--only", "imagenet"), [])
    assert line.endswith(f"--results {tmp_path}/page: has rows of {dry.kept()['frames']}, and "
                         "--data has {'dataset': 'pandaset64', 'train': 2, 'train_scenes': '001', "
                         "'val': 2, 'val_scenes': '003'}; choose another name")
    again = ["--only", "imagenet", "--results", str(tmp_path / "other")]
    line = fails_with_one_line(capsys, lambda argv: dry.main(*argv), again)
    assert line.endswith(f"--out {tmp_path}/runs: its runs are of other frames than those of "
                         "--data now (other train, train_scenes, frames, scenes, tables, files); "
                         "choose another folder")
    assert dry.commands == []


# ---- the command ---------------------------------------------------------------------------------

def test_the_list_has_every_row(capsys):
    real.main(["--list"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == [*ROWS, "figures"]
    for line, row in zip(said, ROWS.values()):
        assert line.endswith(row.words)


def test_bad_input_is_one_line(dry, tmp_path, panda, capsys):
    def error(*argv):
        return fails_with_one_line(capsys, real.main, ["--out", str(tmp_path / "runs"), *argv])

    assert "--data is missing: NAME=PATH" in error()
    two = f"pandaset64={panda},pandasetgt={panda}"
    assert error("--data", two).endswith(f"--data {two}: one dataset at a time")
    assert "no such folder" in error("--data", f"pandaset64={tmp_path}/nowhere")
    assert "not a PandaSet root" in error("--data", f"pandaset64={tmp_path}")
    assert "--only invalid choice: 'nothing'" in error("--only", "nothing")
    assert not (tmp_path / "runs").exists() and dry.commands == []
    assert "--val-scenes 902: no such scene" in error("--data", f"pandaset64={panda}")
    assert dry.commands == []

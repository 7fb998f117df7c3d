"""What experiments/real.py refuses, and what it keeps: its commands are recorded and not run."""
import json
import shutil

import pytest
from dry import OF_PROBES, parsed, recorded, script_of
from PIL import Image
from runs import fails_with_one_line

from experiments import real, runs
from experiments.real import CORRUPTIONS


@pytest.fixture
def dry(panda, tmp_path, monkeypatch):
    return recorded(panda, tmp_path, monkeypatch)


def test_several_scenes_judge_and_a_folder_may_have_any_name(dry):
    dry.root = dry.root / "a b {c}"
    commands = dry.main("--val-scenes", "002", "003", "--only", "cd", "--seeds", "1")
    assert dry.made() == [*CORRUPTIONS, "stage1", "cd", "cd-probes.json"]
    for command in commands:
        args = parsed(command)
        assert args.data.startswith(f"pandaset64={dry.root}/runs/clean")
        assert str(args.out).startswith(f"{dry.root}/runs/")
        if script_of(command)[0] != "experiments.corruptions":
            assert args.val_scenes == ["002", "003"]


def test_a_version_goes_to_every_script_that_reads_frames(dry, monkeypatch):
    """Of a dataset that has versions: here PandaSet is made to take one."""
    open_tables = real.open_tables
    monkeypatch.setattr(real, "open_tables", lambda found, version=None: open_tables(found))
    commands = dry.main("--version", "v1", "--only", "cd", "3d", "figures", "--seeds", "1")
    read = [parsed(command) for command in commands if "eval.py" not in command
            and "numbers" not in command]
    assert len(read) == len(CORRUPTIONS) + 5 and {args.version for args in read} == {"v1"}


def test_bad_frames_are_refused_before_anything_is_written(dry, panda, tmp_path, capsys):
    dry.panda = shutil.copytree(panda, tmp_path / "panda")
    picture = next((dry.panda / "001").rglob("*.jpg"))
    picture.write_bytes(b"")
    line = fails_with_one_line(capsys, lambda argv: dry.main(*argv), ["--only", "imagenet"])
    assert str(picture.relative_to(dry.panda)) in line and not (tmp_path / "runs").exists()


def test_other_frames_under_the_same_names_are_refused(dry, panda, tmp_path, capsys):
    dry.main("--only", "imagenet", "--seeds", "1")
    dry.panda = shutil.copytree(panda, tmp_path / "panda")
    dry.main("--only", "imagenet", "--seeds", "2")  # the same, moved
    assert dry.made() == ["imagenet-probes.json"]
    scan = tmp_path / "runs/clean/001/lidar/poses.json"
    assert scan.resolve() == dry.panda / "001/lidar/poses.json"
    picture = next((dry.panda / "001").rglob("*.jpg"))
    Image.new("RGB", Image.open(picture).size).save(picture)
    line = fails_with_one_line(capsys, lambda argv: dry.main(*argv), ["--only", "random"])
    assert "its runs are of other frames than those of --data now (other files)" in line


def test_a_folder_in_the_dataset_is_refused(dry, panda, tmp_path, capsys):
    dry.panda = dry.root = shutil.copytree(panda, tmp_path / "panda")
    line = fails_with_one_line(capsys, lambda argv: dry.main(*argv), ["--only", "imagenet"])
    assert line.endswith(f"--out {dry.root}/runs: lies in the dataset, of which it is to hold a "
                         "copy; choose a folder outside")


@pytest.mark.parametrize("content", ["{}", "[1]", "null", '{"frames": {}, "rows": {"cd": ', ""])
def test_a_file_that_holds_no_rows_is_not_overwritten(dry, tmp_path, capsys, content):
    file = tmp_path / "page.json"
    file.write_text(content)
    line = fails_with_one_line(capsys, lambda argv: dry.main(*argv), ["--only", "imagenet"])
    assert f"--results {tmp_path}/page: {file} is missing, damaged or of something else" in line
    assert file.read_text() == content and dry.commands == []
    file.rename(tmp_path / "page.md")  # another page, of which there are no rows
    fails_with_one_line(capsys, lambda argv: dry.main(*argv), ["--only", "imagenet"])
    assert (tmp_path / "page.md").read_text() == content


def test_rows_that_another_process_wrote_stay(dry, monkeypatch):
    dry.main("--only", "imagenet", "--seeds", "1")

    def run(command):
        dry.run(command)
        if "cd-probes" in command:  # meanwhile
            kept = dry.kept()
            kept["rows"]["random"] = {"1": OF_PROBES}
            (dry.root / "page.json").write_text(json.dumps(kept))
    monkeypatch.setattr(runs, "run_command", run)
    dry.main("--only", "cd", "--seeds", "1", "--results", f"{dry.root}/page.json")
    assert set(dry.kept()["rows"]) == {"imagenet", "cd", "random"}


def test_a_result_that_was_cut_short_is_named(dry, tmp_path, capsys):
    dry.main("--only", "imagenet", "--seeds", "1")
    file = tmp_path / "runs/seed-1/imagenet-probes.json"
    file.write_text("")
    argv = ["--only", "imagenet", "--seeds", "1", "--again"]
    line = fails_with_one_line(capsys, lambda argv: dry.main(*argv), argv)
    assert line.endswith(f"{file}: cannot be read; remove it, and what it is of is made again")
    file.unlink()
    dry.main(*argv)
    assert dry.made() == ["imagenet-probes.json"]

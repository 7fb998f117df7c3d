"""Folders of an earlier version, whose checkpoints had other keys, are refused in one sentence."""
import shutil

import pytest
import torch
from conftest import ROOT
from runs import checkpoint_of, eval_args, fails_with_one_line, probe_args, stage1_args, stage2_args

import eval as evaluation
import export
import finetune
import probe
import stage1
import stage2
from models import load_image_encoder
from plumbing.errors import InputError
from plumbing.weights import LAYOUT, WHO_WRITES, check_kind

CPU = torch.device("cpu")
SCRIPTS = {"stage1": stage1, "stage2": stage2, "probe": probe, "finetune": finetune}
RENAMED = {"backbone": None, "spec": "waffleiron", "samplings": "cloud", "layout": None,
           "encoder_weights": "backbone"}


@pytest.fixture(scope="module")
def runs(world, first, tmp_path_factory):
    """{script: folder of a run of one step}."""
    folder = tmp_path_factory.mktemp("runs")
    more = ["--steps", "1"]
    stage2.main(stage2_args(world, first, folder / "stage2", *more))
    probe.main(probe_args(world, "seg", folder / "stage2", folder / "probe", *more))
    finetune.main(probe_args(world, "seg", folder / "stage2", folder / "finetune", *more))
    return {"stage1": first} | {name: folder / name for name in ("stage2", "probe", "finetune")}


def as_earlier(folder, to):
    """A copy of a run's folder as an earlier version would have written it."""
    shutil.copytree(folder, to)
    for path in to.glob("*.pth"):
        content = torch.load(path, weights_only=True)
        before = {RENAMED.get(name, name): value for name, value in content.items()}
        before.pop(None, None)
        torch.save(before, path)
    return to


def args_of(script, world, runs, out):
    if script == "stage1":
        return stage1_args(world, out, "--steps", "1")
    if script == "stage2":
        return stage2_args(world, runs["stage1"], out, "--steps", "1")
    return probe_args(world, "seg", runs["stage2"], out, "--steps", "1")


@pytest.mark.parametrize("script", SCRIPTS)
def test_as_out_it_is_refused_and_set_aside(world, runs, tmp_path, script, capsys):
    out = as_earlier(runs[script], tmp_path / "run")
    (out / "results.json").write_text("{}")
    args = args_of(script, world, runs, out)
    message = fails_with_one_line(capsys, SCRIPTS[script].main, args)
    assert (f"--out {out} holds a run of an earlier version of this project, whose flags and keys "
            "had other names; choose another --out, or add --restart to set that run's files "
            "aside") in message
    assert "layout" not in checkpoint_of(out)  # it is as it was

    SCRIPTS[script].main([*args, "--restart"])
    assert f"--restart: the run in {out} is now in {out / 'replaced-1'}" in capsys.readouterr().out
    assert checkpoint_of(out)["layout"] == LAYOUT and checkpoint_of(out)["step"] == 1
    aside = {path.name for path in (out / "replaced-1").iterdir()}
    assert {"last.pth", "log.jsonl", "results.json"} <= aside
    assert not (out / "results.json").exists()
    assert "layout" not in checkpoint_of(out / "replaced-1")


def test_what_others_are_made_from_is_refused(world, runs, tmp_path, capsys):
    s1 = as_earlier(runs["stage1"], tmp_path / "s1")
    s2 = as_earlier(runs["stage2"], tmp_path / "s2")
    out = tmp_path / "out"

    def refused(script, argv, path, writer):
        return (f"{path}: written by an earlier version of this project, whose checkpoints have "
                f"other keys; write it anew with {writer}"
                ) in fails_with_one_line(capsys, script.main, argv)
    assert refused(stage2, stage2_args(world, s1, out), s1 / "last.pth", "stage1.py")
    assert refused(stage2, stage2_args(world, runs["stage1"], out, "--encoder", str(s2)), s2,
                   "stage2.py")
    assert refused(probe, probe_args(world, "seg3d", s1, out), s1 / "last.pth", "stage1.py")
    assert refused(probe, probe_args(world, "seg", s2, out), s2, "stage2.py")
    assert refused(finetune, probe_args(world, "seg", s2, out), s2, "stage2.py")
    assert refused(export, [str(s2), "--out", str(tmp_path / "e.pth")], s2, "stage2.py")
    assert not out.exists() and not (tmp_path / "e.pth").exists()


@pytest.mark.parametrize("script", ["probe", "finetune"])
def test_a_probe_is_refused_by_eval(runs, tmp_path, script, capsys):
    path = as_earlier(runs[script], tmp_path / "p")
    # whether its data and encoder are there or not, and of all checkpoints
    for given in (path, path / "last.pth", *path.glob("best.pth")):
        message = fails_with_one_line(
            capsys, evaluation.main, eval_args(given, out=tmp_path / "table"))
        assert f"{given}: written by an earlier version of this project" in message
    assert not (tmp_path / "table.md").exists()


def test_every_kind_is_refused_before_its_keys_are_asked_for():
    for kind in WHO_WRITES:
        for other in WHO_WRITES:
            with pytest.raises(InputError, match="^x: written by an earlier version"):
                check_kind({"kind": kind, "args": {"precision": None}}, "x", other)
        check_kind({"kind": kind, "args": {"precision": None}, "layout": LAYOUT}, "x", kind)


def test_the_encoder_that_comes_with_this_project_is_no_run_s():
    path = ROOT / "miniature" / "encoder.pth"
    assert "layout" not in torch.load(path, weights_only=True)
    encoder = load_image_encoder(str(path))
    assert encoder.spec == {"name": "vit_mini8", "feature": "norm", "image_size": (80, 160)}

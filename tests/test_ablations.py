"""Each ablation changes what it says and nothing else.

That is: which side learns, which head there is, and what stage 2 and the probes read.
"""
import pytest
import torch
from runs import (checkpoint_of, fails_with_one_line, largest_difference, lines, probe_args,
                  stage1_args, stage2_args)

import probe
import stage1
import stage2
from experiments import ablations
from models import load_image_encoder, load_point_encoder
from waffleiron import WaffleIron


def command(name, world, out, *more, first=None):
    """Arguments of an ablation; `first`: the stage 1 before it."""
    if first:
        return [name, *stage2_args(world, first, out, *more)]
    return [name, *stage1_args(world, out, *more)]


def run(argv):
    """Run an ablation and say what became of its module.

    Returns {"before", "after": state dicts, "parameters", "trained": names}.
    """
    seen = {}
    train = ablations.train

    def spy(args, device, frames, model, *others, **options):
        before = model.state_dict()
        seen["before"] = {name: value.clone() for name, value in before.items()}
        train(args, device, frames, model, *others, **options)
        seen["after"] = model.state_dict()
        seen["parameters"] = {name for name, _ in model.named_parameters()}
        seen["trained"] = {name for name, p in model.named_parameters() if p.requires_grad}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "train", spy)
        ablations.main(argv)
    return seen


def moved(seen):
    """Names in the state dict, statistics too, whose values the run changed."""
    before = seen["before"]
    return {name for name, value in seen["after"].items() if not torch.equal(value, before[name])}


def under(names, *prefixes):
    return {name for name in names if name.startswith(prefixes)}


def equal_under(prefix, state, part):
    """Whether a state dict holds the values of a part of it, whose names lack the prefix."""
    return all(torch.equal(state[f"{prefix}.{name}"], value) for name, value in part.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ablations")


@pytest.fixture(scope="module")
def labels(world, folder):
    out = folder / "labels"
    return out, run(command("no-stage1", world, out, "--steps", "2"))


@pytest.fixture(scope="module")
def head1(world, folder):
    out = folder / "head1"
    return out, run(command("2d-head", world, out, "--steps", "2"))


@pytest.fixture(scope="module")
def head2(world, folder, head1):
    out = folder / "head2"
    return out, run(command("2d-head", world, out, "--steps", "2", first=head1[0]))


@pytest.fixture(scope="module", params=["l2", "contrastive"])
def joint(world, folder, request):
    out = folder / f"joint-{request.param}"
    return out, run(command("joint", world, out, "--steps", "2", "--loss", request.param,
                            "--pairs", "16", "--lr-2d", "1e-3"))


# ---- who learns, and which head there is ---------------------------------------------------------

@pytest.mark.slow
def test_no_stage1_learns_from_labels_all_but_the_head_that_stage2_finds(labels):
    out, seen = labels
    names = seen["parameters"]
    assert not under(names, "encoder")  # there is no image side
    assert seen["after"]["classifier.weight"].shape == (16, 16)
    assert seen["after"]["point_encoder.head.weight"].shape == (96, 16)
    assert seen["trained"] == names - under(names, "point_encoder.head.")
    assert moved(seen) & names == seen["trained"]

    # what was not trained is what stage 1 begins with
    checkpoint = checkpoint_of(out)
    torch.manual_seed(3)
    fresh = WaffleIron(**checkpoint["spec"])
    assert torch.equal(checkpoint["model"]["head.weight"], fresh.head.weight)
    assert lines(out)[-1]["loss"] > 2  # log(16) + 1 or so, not a distance of unit vectors


def test_2d_head_in_stage1_teaches_with_a_random_head_and_a_frozen_encoder(head1):
    out, seen = head1
    names = seen["parameters"]
    assert not under(names, "point_encoder.head")  # no 3D head
    # from the image encoder's width to WaffleIron's
    assert seen["after"]["head.weight"].shape == (16, 96)
    assert seen["trained"] == moved(seen) & names == under(names, "point_encoder.")
    assert not under(moved(seen), "encoder", "head")
    assert 1 < lines(out)[-1]["loss"] < 1.6


def test_2d_head_in_stage2_learns_with_the_image_encoder_from_a_frozen_waffleiron(head1, head2):
    _, seen = head2
    names = seen["parameters"]
    assert not under(names, "point_encoder.head")
    assert seen["trained"] == moved(seen) & names == under(names, "encoder.", "head.")
    assert not under(moved(seen), "point_encoder")  # its BatchNorm's statistics included

    # the same head and the same WaffleIron as stage 1 left them
    first = checkpoint_of(head1[0])
    assert equal_under("head", seen["before"], first["head"])
    assert equal_under("point_encoder", seen["before"], first["model"])


def test_2d_head_may_learn_in_stage1_too(world, tmp_path):
    seen = run(command("2d-head", world, tmp_path / "out", "--steps", "2", "--train-head"))
    names = seen["parameters"]
    assert seen["trained"] == moved(seen) & names == under(names, "point_encoder.", "head.")


def test_joint_training_moves_both_encoders_and_the_3d_head_and_there_is_no_other(joint):
    _, seen = joint
    names = seen["parameters"]
    assert not under(names, "head")
    assert seen["after"]["point_encoder.head.weight"].shape == (96, 16)
    assert seen["trained"] == moved(seen) & names == names
    assert under(moved(seen), "point_encoder.embed.norm.running_mean")


@pytest.mark.slow
def test_joint_training_has_stage2_s_data_and_each_side_s_own_rate(world, tmp_path):
    out = tmp_path / "out"
    argv = command("joint", world, out)
    place = argv.index("--batch")
    del argv[place:place + 2]
    ablations.main([*argv, "--batch", "4"])  # 8 frames of one camera: an epoch of two steps
    checkpoint = checkpoint_of(out)
    args = checkpoint["args"]
    assert checkpoint["step"] == 2 and args["conditions"] == ["all"]
    peaks = [group["peak"] for group in checkpoint["optimizer"]["param_groups"]]
    assert peaks == [2e-5, 2e-3] == [stage2.LR["ViT"], args["lr"]]
    theirs = stage2.parse(["--data", "x", "--stage1", "y", "--out", "z"])
    for name in ("epochs", "cameras", "conditions"):
        assert args[name] == getattr(theirs, name)

    # but for the conditions that were given
    ablations.main(command("joint", world, tmp_path / "night", "--conditions", "night",
                           "--steps", "1"))
    assert checkpoint_of(tmp_path / "night")["made_from"]["frames"]["frames"] == 2


def test_epochs_and_conditions_are_only_other_flags(monkeypatch):
    calls = []
    monkeypatch.setattr(stage1, "main", lambda argv: calls.append(stage1.parse(argv)))
    monkeypatch.setattr(stage2, "main", lambda argv: calls.append(stage2.parse(argv)))
    common = ["--data", "d", "--out", "o"]

    longer = [*common, "--stage1", "s"]
    ablations.main(["stage2-epochs", *longer])
    assert vars(calls[-1]) == vars(stage2.parse(longer)) | {"epochs": 25}
    ablations.main(["stage2-epochs", *longer, "--epochs", "7", "--lr", "3"])
    assert calls[-1].epochs == 7 and calls[-1].lr == 3

    shallow = [*common, "--depth", "2"]
    ablations.main(["stage1-all-conditions", *shallow])
    assert vars(calls[-1]) == vars(stage1.parse(shallow)) | {"conditions": ["all"]}


# ---- what reads the results ----------------------------------------------------------------------

def test_stage2_reads_no_stage1_s_result(world, labels, tmp_path):
    _, content = load_point_encoder(labels[0])
    assert content["encoder"]["name_or_path"] == "vit_mini8"
    assert content["image_size"] == (80, 160) and content["samplings"]["nuscenes"]["cell"] == 1
    stage2.main(stage2_args(world, labels[0], tmp_path / "s2", "--steps", "2"))
    before = load_image_encoder("vit_mini8", weights="random").backbone.state_dict()
    after = load_image_encoder(str(tmp_path / "s2")).backbone.state_dict()
    assert largest_difference(after, before) > 0

    # its checkpoint has what stage 1's has, the image encoder's side left as it is
    stage1.main(stage1_args(world, tmp_path / "s1", "--steps", "1"))
    theirs = checkpoint_of(tmp_path / "s1").keys()
    assert theirs == checkpoint_of(labels[0]).keys() - {"classifier"}


def test_probes_read_the_image_encoders(world, head2, joint, tmp_path):
    for out, seen in (head2, joint):
        encoder = load_image_encoder(str(out))
        assert encoder.spec["image_size"] == (80, 160)
        assert equal_under("encoder.backbone", seen["after"], encoder.backbone.state_dict())

    out, seen = joint
    file = out / "point_encoder.pth"
    probe.main(probe_args(world, "depth", out, tmp_path / "2d", "--steps", "1"))
    probe.main(probe_args(world, "seg3d", file, tmp_path / "3d", "--steps", "1",
                          "--cameras", "all"))
    point_encoder, _ = load_point_encoder(file)
    assert equal_under("point_encoder", seen["after"], point_encoder.state_dict())


# ---- bad input -----------------------------------------------------------------------------------

def test_bad_input_is_one_line_and_exit_code_2(world, labels, head1, joint, tmp_path, capsys):
    out = tmp_path / "out"

    def error(name, *more, first=None, out=out):
        argv = command(name, world, out, *more, first=first)
        return fails_with_one_line(capsys, ablations.main, argv)

    assert "--temperature 0: must be above 0" in error("joint", "--temperature", "0")
    assert "--pairs 1: must be at least 2" in error("joint", "--pairs", "1")
    assert "--steps 0" in error("no-stage1", "--steps", "0")
    assert "--batch 99" in error("2d-head", "--batch", "99")
    assert "--train-head is for stage 1" in error("2d-head", "--train-head", first=head1[0])
    assert "--feature: leave it out" in error("2d-head", "--feature", "keys", first=head1[0])
    assert "not a checkpoint of stage 1 with a 2D head" in error("2d-head", first=labels[0])
    assert "no such file" in error("2d-head", first=tmp_path / "none")
    old = tmp_path / "old.pth"
    torch.save({**checkpoint_of(head1[0]), "layout": 1}, old)
    assert "by an earlier version of this project" in error("2d-head", first=old)
    assert not out.exists()

    # stage 2 as it is cannot go on from a stage 1 with a 2D head
    argv = stage2_args(world, head1[0], out)
    assert "point_encoder is needed" in fails_with_one_line(capsys, stage2.main, argv)

    # nor can one ablation, or stage 1, go on from another's folder
    assert "--ablation" in error("no-stage1", "--steps", "2", out=head1[0])
    assert "--ablation" in error("joint", "--steps", "2", out=labels[0])
    argv = stage1_args(world, labels[0], "--steps", "2")
    assert "--ablation" in fails_with_one_line(capsys, stage1.main, argv)


@pytest.mark.parametrize("argv, said", [
    ([], "required: name"),
    (["two-heads"], "invalid choice"),
    (["joint", "--loss", "l3"], "invalid choice"),
    (["stage2-epochs", "--data", "x"], "--stage1"),
    (["no-stage1", "--data", "x"], "--out"),
])
def test_wrong_words_are_argparse_s_errors(argv, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        ablations.main(argv)
    assert exit_.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("argv, said", [
    (["-h"], "no-stage1"),
    (["joint", "-h"], "--temperature"),
    (["2d-head", "-h"], "--train-head"),
    (["no-stage1", "-h"], "--channels"),
    (["stage2-epochs", "-h"], "--stage1"),
])
def test_help(argv, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        ablations.main(argv)
    assert exit_.value.code == 0 and said in capsys.readouterr().out

"""Each ablation changes what it says and nothing else: which side learns, which head there is, what stage 2 and the probes read."""
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import probe
import stage1
import stage2
import run_folder
import training
from conftest import ROOT
from data import Frames, collate
from experiments import ablations
from index import CONDITIONS, load_index
from models import load_image_encoder
from test_scripts import fails_with_one_line, largest_difference, lines, probe_args, stage1_args, stage2_args
from waffleiron import WaffleIron, load_waffleiron


def command(name, world, out, *more, first=None):
    """Arguments of an ablation; `first`: the stage 1 before it."""
    return [name, *(stage2_args(world, first, out, *more) if first else stage1_args(world, out, *more))]


def run(argv):
    """Run an ablation. Returns its module before and after, as state dicts, and the names of its parameters."""
    seen = {}

    def spy(*args):
        model = args[4]
        seen["before"] = {name: value.clone() for name, value in model.state_dict().items()}
        train(*args)
        seen["after"] = model.state_dict()
        seen["parameters"] = {name for name, _ in model.named_parameters()}
        seen["trained"] = {name for name, p in model.named_parameters() if p.requires_grad}
    train = ablations.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "train", spy)
        ablations.main(argv)
    return seen


def moved(seen):
    """Names in the state dict, statistics too, whose values the run changed."""
    return {name for name, value in seen["after"].items() if not torch.equal(value, seen["before"][name])}


def under(names, *prefixes):
    return {name for name in names if name.startswith(prefixes)}


def checkpoint_of(out):
    return torch.load(out / "last.pth", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("ablations")


@pytest.fixture(scope="module")
def labels(world, runs):
    return runs / "labels", run(command("no-stage1", world, runs / "labels", "--steps", "2"))


@pytest.fixture(scope="module")
def head1(world, runs):
    return runs / "head1", run(command("2d-head", world, runs / "head1", "--steps", "2"))


@pytest.fixture(scope="module")
def head2(world, runs, head1):
    return runs / "head2", run(command("2d-head", world, runs / "head2", "--steps", "2", first=head1[0]))


@pytest.fixture(scope="module", params=["l2", "contrastive"])
def joint(world, runs, request):
    out = runs / f"joint-{request.param}"
    return out, run(command("joint", world, out, "--steps", "2", "--loss", request.param, "--pairs", "16", "--lr-2d", "1e-3"))


# ---- who learns, and which head there is ----------------------------------------------------------------------------------

def test_no_stage1_learns_from_labels_all_but_the_head_that_stage2_finds(labels):
    out, seen = labels
    names = seen["parameters"]
    assert not under(names, "encoder")  # there is no image side
    assert seen["after"]["classifier.weight"].shape == (16, 16) and seen["after"]["waffleiron.head.weight"].shape == (96, 16)
    assert seen["trained"] == names - under(names, "waffleiron.head.")
    assert moved(seen) & names == seen["trained"]
    # what was not trained is what stage 1 begins with
    checkpoint = checkpoint_of(out)
    torch.manual_seed(3)
    fresh = WaffleIron(**checkpoint["waffleiron"])
    assert torch.equal(checkpoint["model"]["head.weight"], fresh.head.weight)
    assert lines(out)[-1]["loss"] > 2  # log(16) + 1 or so, not a distance of unit vectors


def test_2d_head_in_stage1_teaches_with_a_random_head_and_a_frozen_encoder(head1):
    out, seen = head1
    names = seen["parameters"]
    assert not under(names, "waffleiron.head")  # no 3D head
    assert seen["after"]["head.weight"].shape == (16, 96)  # from the image encoder's width to WaffleIron's
    assert seen["trained"] == moved(seen) & names == under(names, "waffleiron.")
    assert not under(moved(seen), "encoder", "head")
    assert 1 < lines(out)[-1]["loss"] < 1.6


def test_2d_head_in_stage2_learns_with_the_image_encoder_from_a_frozen_waffleiron(head1, head2):
    _, seen = head2
    names = seen["parameters"]
    assert not under(names, "waffleiron.head")
    assert seen["trained"] == moved(seen) & names == under(names, "encoder.", "head.")
    assert not under(moved(seen), "waffleiron")  # its BatchNorm's statistics included
    # the same head and the same WaffleIron as stage 1 left them
    first, begins = checkpoint_of(head1[0]), seen["before"]
    assert all(torch.equal(begins[f"head.{name}"], value) for name, value in first["head"].items())
    assert all(torch.equal(begins[f"waffleiron.{name}"], value) for name, value in first["model"].items())


def test_2d_head_may_learn_in_stage1_too(world, tmp_path):
    seen = run(command("2d-head", world, tmp_path / "out", "--steps", "2", "--train-head"))
    assert seen["trained"] == moved(seen) & seen["parameters"] == under(seen["parameters"], "waffleiron.", "head.")


def test_joint_training_moves_both_encoders_and_the_3d_head_and_there_is_no_other(joint):
    _, seen = joint
    names = seen["parameters"]
    assert not under(names, "head") and seen["after"]["waffleiron.head.weight"].shape == (96, 16)
    assert seen["trained"] == moved(seen) & names == names
    assert under(moved(seen), "waffleiron.embed.norm.running_mean")


def test_joint_training_has_stage2_s_data_and_each_side_s_own_rate(world, tmp_path):
    out = tmp_path / "out"
    argv = command("joint", world, out)
    del argv[argv.index("--batch"):argv.index("--batch") + 2]
    ablations.main([*argv, "--batch", "4"])  # 8 frames of one camera: an epoch of two steps
    args = checkpoint_of(out)["args"]
    assert checkpoint_of(out)["step"] == 2 and args["conditions"] == list(CONDITIONS)
    groups = checkpoint_of(out)["optimizer"]["param_groups"]
    assert [group["peak"] for group in groups] == [2e-5, 2e-3] == [stage2.LR["ViT"], args["lr"]]
    theirs = stage2.parse(["--data", "x", "--stage1", "y", "--out", "z"])
    assert (args["epochs"], args["cameras"]) == (theirs.epochs, theirs.cameras)


@pytest.mark.slow
def test_the_rates_follow_the_stages_schedules(world, head1, tmp_path, monkeypatch):
    """Learning rates of all steps, as stage1.py and stage2.py have them for the same flags."""
    def rates(main, argv):
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", lambda self: found.append(self.param_groups[0]["lr"]))
            main(argv)
        return found
    more = ["--steps", "10", "--limit", "2"]
    for name in ("no-stage1", "2d-head"):
        theirs = rates(stage1.main, stage1_args(world, tmp_path / f"{name}-1", *more))
        assert len(theirs) == 10 and theirs[0] == 0 < theirs[1]
        assert rates(ablations.main, command(name, world, tmp_path / name, *more)) == theirs
    theirs = rates(stage2.main, stage2_args(world, tmp_path / "2d-head-1", tmp_path / "s2", *more, "--warmup", "0.4"))
    assert theirs[3] < theirs[4]
    assert rates(ablations.main, command("2d-head", world, tmp_path / "h2", *more, "--warmup", "0.4", first=head1[0])) == theirs


# ---- what reads the results -----------------------------------------------------------------------------------------------

def test_stage2_reads_no_stage1_s_result(world, labels, tmp_path):
    waffleiron, content = load_waffleiron(labels[0])
    assert content["encoder"]["name_or_path"] == "vit_mini8" and content["image_size"] == (80, 160) and content["cloud"]["cell"] == 1
    stage2.main(stage2_args(world, labels[0], tmp_path / "s2", "--steps", "2"))
    before = load_image_encoder("vit_mini8", weights="random").backbone.state_dict()
    assert largest_difference(load_image_encoder(str(tmp_path / "s2")).backbone.state_dict(), before) > 0
    # its checkpoint has what stage 1's has, the image encoder's side left as it is
    stage1.main(stage1_args(world, tmp_path / "s1", "--steps", "1"))
    assert checkpoint_of(tmp_path / "s1").keys() == checkpoint_of(labels[0]).keys() - {"classifier"}


def test_probes_read_the_image_encoders(world, head2, joint, tmp_path):
    for out, seen in (head2, joint):
        encoder = load_image_encoder(str(out))
        assert encoder.spec["image_size"] == (80, 160)
        assert all(torch.equal(value, seen["after"][f"encoder.backbone.{name}"]) for name, value in encoder.backbone.state_dict().items())
    probe.main(probe_args(world, "depth", joint[0], tmp_path / "2d", "--steps", "1"))
    probe.main(probe_args(world, "seg3d", joint[0] / "waffleiron.pth", tmp_path / "3d", "--steps", "1", "--cameras", "all"))
    waffleiron, _ = load_waffleiron(joint[0] / "waffleiron.pth")
    assert all(torch.equal(value, joint[1]["after"][f"waffleiron.{name}"]) for name, value in waffleiron.state_dict().items())


def test_epochs_and_conditions_are_only_other_flags(monkeypatch):
    calls = []
    monkeypatch.setattr(stage1, "main", lambda argv: calls.append(stage1.parse(argv)))
    monkeypatch.setattr(stage2, "main", lambda argv: calls.append(stage2.parse(argv)))
    common = ["--data", "d", "--out", "o"]
    ablations.main(["stage2-epochs", *common, "--stage1", "s"])
    assert vars(calls[-1]) == vars(stage2.parse([*common, "--stage1", "s"])) | {"epochs": 25}
    ablations.main(["stage2-epochs", *common, "--stage1", "s", "--epochs", "7", "--lr", "3"])
    assert calls[-1].epochs == 7 and calls[-1].lr == 3
    ablations.main(["stage1-all-conditions", *common, "--depth", "2"])
    assert vars(calls[-1]) == vars(stage1.parse([*common, "--depth", "2"])) | {"conditions": list(CONDITIONS)}


# ---- maths ----------------------------------------------------------------------------------------------------------------

def test_two_way_loss_by_hand():
    g, f = torch.tensor([[2.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 5.0]], requires_grad=True)
    loss = ablations.two_way_loss(g, f)
    loss.backward()
    assert loss.item() == pytest.approx(math.sqrt(2))
    # (g - f) / |g - f| = (1, -1) / sqrt(2), without the part along each, divided by the lengths 2 and 5
    assert g.grad.flatten().tolist() == pytest.approx([0, -math.sqrt(0.5) / 2], abs=1e-6)
    assert f.grad.flatten().tolist() == pytest.approx([-math.sqrt(0.5) / 5, 0], abs=1e-6)


def test_contrastive_loss_by_hand():
    loss, eye = ablations.contrastive_loss, torch.eye(2)
    # two pairs at right angles, temperature 1: each has 1 for its partner and 0 for the other
    assert loss(eye, eye, 1).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert loss(eye, eye.flip(0), 1).item() == pytest.approx(math.log(1 + math.e))
    assert loss(7 * eye, 3 * eye, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)))  # lengths do not matter
    # three pairs; similarities / 0.5 are [[2, 2, 0], [0, 0, 2], [1.2, 1.2, 1.6]]. Rows: log(2e^2 + 1) - 2 = 0.75863,
    # log(2 + e^2) = 2.23955, log(2e^1.2 + e^1.6) - 1.6 = 0.85043; columns: log(e^2 + 1 + e^1.2) = 2.46036 less 2 and less 0,
    # log(1 + e^2 + e^1.6) - 1.6 = 0.99092
    g = torch.tensor([[1, 0], [0, 1], [0.6, 0.8]])
    f = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    expected = (0.75863 + 2.23955 + 0.85043 + 0.46036 + 2.46036 + 0.99092) / 6
    assert loss(g, f, 0.5).item() == loss(f, g, 0.5).item() == pytest.approx(expected, abs=1e-5)


def test_contrastive_loss_of_collapsed_and_of_few_features():
    same = torch.ones(5, 3)
    assert ablations.contrastive_loss(same, same, 0.07).item() == pytest.approx(math.log(5))  # no gain from a constant
    assert ablations.two_way_loss(same, same).item() == 0  # of which the L2 loss is content
    for count in (0, 1):
        g, f = torch.randn(count, 3, requires_grad=True), torch.randn(count, 3, requires_grad=True)
        loss = ablations.contrastive_loss(g, f, 0.07)
        loss.backward()
        assert loss.item() == 0 and not g.grad.any() and not f.grad.any()
    g, f = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    ablations.contrastive_loss(g, f, 0.07).backward()
    assert g.grad.abs().sum() > 0 and f.grad.abs().sum() > 0


def test_some_of_each_image():
    batch = torch.tensor([0] * 5 + [1] * 2 + [3] * 9)  # image 2 has no point
    rows = ablations.some_of_each(batch, 3, torch.Generator().manual_seed(1))
    assert torch.bincount(batch[rows]).tolist() == [3, 2, 0, 3] and len(rows.unique()) == 8
    assert torch.equal(rows, ablations.some_of_each(batch, 3, torch.Generator().manual_seed(1)))
    drawn = torch.cat([ablations.some_of_each(batch, 3, torch.Generator().manual_seed(n)) for n in range(40)])
    assert len(drawn.unique()) == len(batch)  # each point has its turn
    assert len(ablations.some_of_each(batch[:0], 3, torch.Generator())) == 0


# ---- collapse ---------------------------------------------------------------------------------------------------------------

def spread(features):
    """1 - length of the mean of the unit features: 0 if all point one way."""
    return 1 - nn.functional.normalize(features, dim=1).mean(0).norm().item()


@pytest.mark.slow
def test_joint_l2_collapses_and_stage1_does_not(world, tmp_path):
    """Forty steps each: without a stop-gradient the loss falls further, and the features of all points become one."""
    more = ["--steps", "40", "--conditions", *CONDITIONS, "--cameras", "all"]
    stage1.main(stage1_args(world, tmp_path / "s1", *more))
    ablations.main(command("joint", world, tmp_path / "joint", *more, "--lr-2d", "2e-3"))
    item = Frames(index := load_index(world), index.select("val")[:2], "all", (80, 160), checkpoint_of(tmp_path / "s1")["cloud"])
    batch = training.to_device(collate([item[0, 0], item[0, 1]]), torch.device("cpu"))
    found = {}
    for name, file in (("s1", "last.pth"), ("joint", "waffleiron.pth")):
        waffleiron, _ = load_waffleiron(tmp_path / name / file)
        with torch.no_grad():
            found[name] = spread(waffleiron.eval()(batch["feats"], batch["cells"], batch["neighbors"], batch["batch"]))
    losses = {name: lines(tmp_path / name)[-1]["loss"] for name in found}
    print(losses, found)
    assert losses["joint"] < losses["s1"] / 2
    assert found["joint"] < found["s1"] / 2


# ---- stopped and resumed, two processes -------------------------------------------------------------------------------------

KINDS = {"no-stage1": [], "2d-head": [], "2d-head after stage 1": [], "joint": ["--loss", "contrastive", "--pairs", "8"]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_ablation_goes_on_as_if_it_had_not(world, head1, tmp_path, kind, monkeypatch):
    def start(out):
        first = head1[0] if "after" in kind else None
        ablations.main(command(kind.split()[0], world, out, "--steps", "4", "--save-every", "0", *KINDS[kind], first=first))
    start(tmp_path / "through")
    save = run_folder.save

    def save_and_stop(path, content):
        save(path, content)
        if content["step"] == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "stopped")
    start(tmp_path / "stopped")
    through, stopped = checkpoint_of(tmp_path / "through"), checkpoint_of(tmp_path / "stopped")
    parts = [name for name in ("model", "head", "classifier", "point_model") if name in through]
    assert len(parts) == 2 and through["step"] == stopped["step"] == 4
    assert all(largest_difference(through[name], stopped[name]) == 0 for name in parts)
    before = (tmp_path / "stopped" / "log.jsonl").read_text()
    start(tmp_path / "stopped")  # finished: nothing is done again
    assert (tmp_path / "stopped" / "log.jsonl").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["2d-head", "joint"])  # one loop trains them all
def test_two_processes_are_one_with_the_same_global_batch(world, head1, tmp_path, kind):
    first, more = (head1[0] if "after" in kind else None), ["--steps", "3", "--batch", "4", *KINDS[kind]]
    argv = {out: command(kind.split()[0], world, tmp_path / out, *more, first=first) for out in ("one", "two")}
    ablations.main(argv["one"])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
                           "experiments.ablations", *argv["two"]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [lines(tmp_path / out)[-1]["loss"] for out in ("one", "two")]
    if kind.startswith("2d-head"):  # Lovász and InfoNCE are computed within each process
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        one, two = (checkpoint_of(tmp_path / out)["model"] for out in ("one", "two"))
        mean = torch.cat([(one[k].double() - two[k].double()).abs().flatten() for k in one if "num_batches" not in k]).mean()
        assert mean < 2e-5


# ---- bad input ----------------------------------------------------------------------------------------------------------------

def test_bad_input_is_one_line_and_exit_code_2(world, labels, head1, joint, tmp_path, capsys):
    def error(*argv, **options):
        return fails_with_one_line(capsys, ablations.main, command(argv[0], world, tmp_path / "out", *argv[1:], **options))

    assert "--temperature 0: must be above 0" in error("joint", "--temperature", "0")
    assert "--pairs 1: must be at least 2" in error("joint", "--pairs", "1")
    assert "--steps 0" in error("no-stage1", "--steps", "0")
    assert "--batch 99" in error("2d-head", "--batch", "99")
    assert "--train-head is for stage 1" in error("2d-head", "--train-head", first=head1[0])
    assert "--feature: leave it out" in error("2d-head", "--feature", "keys", first=head1[0])
    assert "not a checkpoint of stage 1 with a 2D head" in error("2d-head", first=labels[0])
    assert "no such file" in error("2d-head", first=tmp_path / "none")
    assert not (tmp_path / "out").exists()
    # stage 2 as it is cannot go on from a stage 1 with a 2D head, nor one ablation from another's folder
    assert "point_encoder is needed" in fails_with_one_line(capsys, stage2.main, stage2_args(world, head1[0], tmp_path / "out"))
    for name, out in (("no-stage1", head1[0]), ("joint", labels[0])):
        assert "--ablation" in fails_with_one_line(capsys, ablations.main, command(name, world, out, "--steps", "2"))
    assert "--ablation" in fails_with_one_line(capsys, stage1.main, stage1_args(world, labels[0], "--steps", "2"))


@pytest.mark.parametrize("argv, said", [([], "required: name"), (["two-heads"], "invalid choice"), (["joint", "--loss", "l3"], "invalid choice"),
                                        (["stage2-epochs", "--data", "x"], "--stage1"), (["no-stage1", "--data", "x"], "--out")])
def test_wrong_words_are_argparse_s_errors(argv, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        ablations.main(argv)
    assert exit_.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("argv, said", [(["-h"], "no-stage1"), (["joint", "-h"], "--temperature"), (["2d-head", "-h"], "--train-head"),
                                        (["no-stage1", "-h"], "--channels"), (["stage2-epochs", "-h"], "--stage1")])
def test_help(argv, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        ablations.main(argv)
    assert exit_.value.code == 0 and said in capsys.readouterr().out

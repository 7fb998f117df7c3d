"""finetune.py: encoder and head learn together, and both are in what it writes."""
import json

import pytest
import torch
from runs import (checkpoint_of, eval_args, fails_with_one_line, largest_difference, lines,
                  probe_args)

import eval as evaluation
import finetune
import probe
from models import load_image_encoder

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["seg", "depth"])
def test_finetuning_and_its_evaluation(world, second, tmp_path, task):
    # of 8 images, 2 a batch: the third epoch ends with the run
    out = tmp_path / "p"
    finetune.main(probe_args(world, task, second, out, "--lr", "1e-3", "--steps", "9"))
    last, best = checkpoint_of(out), checkpoint_of(out, "best")

    # the encoder learns
    name = "blocks.0.attn.qkv.weight"
    before = load_image_encoder(str(second)).backbone.state_dict()
    assert not torch.equal(last["encoder_weights"][name], before[name])
    trained = [*last["encoder_weights"].values(), *last["model"].values()]
    assert lines(out)[-1]["trainable_parameters"] == sum(v.numel() for v in trained)

    # best.pth is of the lowest validation loss
    losses = [line["validation_loss"] for line in lines(out)]
    assert len(losses) == 3 and last["best"] == best["best"] == min(losses)
    assert best["step"] == (4, 8, 9)[losses.index(min(losses))]

    # both are evaluated
    (tmp_path / "s2").symlink_to(second)
    evaluation.main(eval_args(out, out / "best.pth", out=tmp_path / "table"))
    results = json.loads((tmp_path / "table.json").read_text())
    assert [result["step"] for result in results] == [9, best["step"]]
    assert (out / "results.json").is_file() and (out / "results-best.json").is_file()

    # what eval.py loads is what was trained
    _, encoder, head = evaluation.load_probe(out, CPU)
    assert all(torch.equal(value, last["encoder_weights"][name])
               for name, value in encoder.backbone.state_dict().items())
    assert torch.equal(head[1].weight, last["model"]["1.weight"])


def test_the_head_may_have_a_learning_rate_of_its_own(world, second, tmp_path):
    """A step of Adam is about as long as the learning rate, whatever the gradient.

    The head begins at zero, so the encoder's first gradient is zero, and its first step too.
    """
    out = tmp_path / "p"
    rates = ["--lr", "1e-4", "--head-lr", "1e-2"]
    finetune.main(probe_args(world, "depth", second, out, *rates, "--steps", "2"))
    last = checkpoint_of(out)
    before = load_image_encoder(str(second)).backbone.state_dict()
    assert 1e-2 < last["model"]["1.bias"].abs().item() < 2e-2
    assert 2e-5 < largest_difference(last["encoder_weights"], before) < 1e-4



# ---- flags ---------------------------------------------------------------------------------------

NEEDED = ["--data", "x", "--encoder", "runs/s2", "--task"]


def test_its_rates_are_its_own_and_all_else_is_a_probe_s():
    for data, task, lr in (("x", "seg", 1e-5), ("nuimages=x", "seg", 2e-5), ("x", "depth", 2e-5)):
        needed = ["--data", data, "--encoder", "runs/s2", "--task", task]
        own, probed = vars(finetune.parse(needed)), vars(probe.parse(needed))
        assert own.pop("lr") == {"ViT": lr} != probed.pop("lr")
        assert own.pop("head_lr") is None and probed.pop("cache") is False
        assert own.pop("out").startswith("runs/finetune-s2") and probed.pop("out")
        assert own == probed


def test_flags_are_for_it_that_were_given():
    args = finetune.parse([*NEEDED, "depth", "--lr", "3e-4", "--head-lr", "1e-2", "--epochs", "3",
                           "--head", "batchnorm", "--warmup-epochs", "0.5", "--out", "y"])
    assert (args.lr, args.head_lr, args.epochs, args.head) == (3e-4, 1e-2, 3, "batchnorm")
    assert (args.warmup_epochs, args.out) == (0.5, "y")
    assert (args.batch, args.cameras) == (16, "CAM_FRONT")  # the paper's


def test_what_it_is_not_for_is_one_line(world, second, tmp_path, capsys):
    out = tmp_path / "out"

    def refusal(task, encoder, *more):
        return fails_with_one_line(
            capsys, finetune.main, probe_args(world, task, encoder, out, *more))
    assert "--task invalid choice: 'seg3d'" in refusal("seg3d", second)
    assert "--cameras scan: a scan has no image" in refusal("seg", second, "--cameras", "scan")
    assert "unrecognized arguments: --cache" in refusal("seg", second, "--cache")
    assert "--head invalid choice: 'whitened'" in refusal("seg", second, "--head", "whitened")
    assert "--cameras CAM_BACK: choose one of random, all, scan, CAM_FRONT" in refusal(
        "seg", second, "--cameras", "CAM_BACK")
    resnet = ["--weights", "random", "--image-size", "64", "128"]
    assert "--lr: the paper has none here for a ResNet-50" in refusal(
        "seg", "dino_resnet50", *resnet)
    assert not out.exists()


@pytest.mark.slow
def test_other_frames_of_validation_are_another_run(copy, second, tmp_path, capsys):
    """best.pth is chosen by them."""
    args = probe_args(copy, "seg", second, tmp_path / "p", "--steps", "1")
    finetune.main(args)
    assert checkpoint_of(tmp_path / "p")["made_from"]["validation"]["frames"] == 6
    scenes = json.loads((copy / "v1.0-trainval/scene.json").read_text())
    scenes[-1]["description"] = "Rain at night"
    scenes[-2]["description"] = "Rain at night"
    (copy / "v1.0-trainval/scene.json").write_text(json.dumps(scenes))
    capsys.readouterr()
    message = fails_with_one_line(capsys, finetune.main, args)
    assert "holds a run made from other validation: frames 6" in message

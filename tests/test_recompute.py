"""--recompute: layers computed again instead of kept give the same result from less memory."""
import pytest
import torch
from runs import fails_with_one_line, largest_difference, lines, model_of, stage1_args, stage2_args

import stage1
import stage2
from experiments import ablations
from models import load_image_encoder
from plumbing import run_folder
from waffleiron import WaffleIron


def kept_bytes(forward):
    """(bytes, output) of forward(): what its graph keeps for the backward pass, each tensor once,
    and what forward() gives.
    """
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    return sum(kept.values()), out


def both_ways(module, switch, forward):
    """(bytes kept, output, gradients) without and with recomputation."""
    found = []
    for switch.recompute in (False, True):
        module.zero_grad()
        torch.manual_seed(3)
        size, out = kept_bytes(forward)
        out.square().mean().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()
                     if parameter.grad is not None}
        found.append((size, out.detach(), gradients))
    return found


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_waffleiron_is_the_same_and_keeps_less(drop_path):
    torch.manual_seed(0)
    model = WaffleIron(channels=32, depth=12, out_channels=8, norm="layernorm",
                       grids=((24, 20), (24, 8), (20, 8)), drop_path=drop_path)
    cells = [torch.randint(rows * cols, (300,)) for rows, cols in model.spec["grids"]]
    inputs = {"points": torch.randn(300, 5), "cells": torch.stack(cells, 1),
              "neighbors": torch.randint(300, (300, 4))}
    batch = {"inputs": inputs, "view": torch.arange(300) // 150}
    plain, recomputed = both_ways(model, model, lambda: model(batch))
    much, out, gradients = plain
    little, same, again = recomputed
    assert torch.equal(out, same)
    assert gradients.keys() == again.keys()
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)
    assert little < 0.5 * much
    with torch.no_grad():
        assert torch.allclose(model.eval()(batch), model(batch))


@pytest.mark.parametrize("name", ["vit_mini8", "dinov3_vits16"])
def test_a_vision_transformer_is_the_same_and_keeps_less(name):
    encoder = load_image_encoder(name, "random")
    images = torch.rand(1, 3, 64, 96)
    plain, recomputed = both_ways(encoder, encoder.backbone, lambda: encoder(images))
    much, out, gradients = plain
    little, same, again = recomputed
    assert torch.equal(out, same)
    assert gradients.keys() == again.keys()
    assert all(torch.equal(gradients[key], again[key]) for key in gradients)
    assert little < 0.6 * much


@pytest.mark.slow
def test_the_flag_changes_nothing_but_memory(world, tmp_path):
    """Stages 1 and 2, and the ablations, which take the same flags, end with the same weights."""
    norm = ["--norm", "layernorm", "--steps", "3"]
    steps = ["--steps", "3"]
    s1, s2 = tmp_path / "s1-kept", tmp_path / "s2-kept"
    for name, more in (("kept", []), ("again", ["--recompute"])):
        stage1.main(stage1_args(world, tmp_path / f"s1-{name}", *norm, *more))
        stage2.main(stage2_args(world, s1, tmp_path / f"s2-{name}", *steps, *more))
    for stage in ("s1", "s2"):
        kept, again = tmp_path / f"{stage}-kept", tmp_path / f"{stage}-again"
        assert largest_difference(model_of(kept), model_of(again)) == 0
        assert lines(kept)[-1]["loss"] == lines(again)[-1]["loss"]

    h1 = tmp_path / "h1-kept"
    for name, more in (("kept", []), ("again", ["--recompute"])):
        first = stage1_args(world, tmp_path / f"h1-{name}", *norm, *more)
        ablations.main(["2d-head", *first])
        second = stage2_args(world, h1, tmp_path / f"h2-{name}", *steps, *more)
        ablations.main(["2d-head", *second])
    for stage in ("h1", "h2"):
        kept, again = tmp_path / f"{stage}-kept", tmp_path / f"{stage}-again"
        assert largest_difference(model_of(kept), model_of(again)) == 0

    # A run that goes on may change the flag.
    assert "recompute" in run_folder.MAY_CHANGE
    stage2.main(stage2_args(world, s1, s2, *steps, "--recompute"))


@pytest.mark.slow
def test_what_cannot_be_computed_again_is_refused(world, tmp_path, capsys):
    argv = stage1_args(world, tmp_path / "x", "--recompute")
    message = fails_with_one_line(capsys, stage1.main, argv)
    assert "--recompute: not with BatchNorm" in message
    resnet = ["--encoder", "dino_resnet50", "--image-size", "64", "128", "--steps", "1"]
    stage1.main(stage1_args(world, tmp_path / "resnet", *resnet))
    capsys.readouterr()
    argv = stage2_args(world, tmp_path / "resnet", tmp_path / "x", "--recompute")
    message = fails_with_one_line(capsys, stage2.main, argv)
    assert "--recompute: not with dino_resnet50; for vision transformers" in message

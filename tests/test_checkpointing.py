"""--checkpoint: layers that are computed again instead of kept give the same result from less memory."""
import pytest
import torch

import run_folder
import stage1
import stage2
from experiments import ablations
from models import load_image_encoder
from test_scripts import fails_with_one_line, largest_difference, lines, model_of, stage1_args, stage2_args
from waffleiron import WaffleIron


def kept_bytes(forward):
    """Bytes that the graph of forward() keeps for its backward pass, each tensor once; and what forward() gives."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    return sum(kept.values()), out


def both_ways(module, switch, forward):
    """(bytes kept, gradients) without and with checkpointing."""
    found = []
    for switch.checkpoint in (False, True):
        module.zero_grad()
        torch.manual_seed(3)
        size, out = kept_bytes(forward)
        out.square().mean().backward()
        found.append((size, out.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}))
    return found


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_waffleiron_is_the_same_and_keeps_less(drop_path):
    torch.manual_seed(0)
    model = WaffleIron(channels=32, depth=12, out_channels=8, norm="layernorm", grids=((24, 20), (24, 8), (20, 8)), drop_path=drop_path)
    cells = torch.stack([torch.randint(rows * cols, (300,)) for rows, cols in model.spec["grids"]])
    arguments = torch.randn(300, 5), cells, torch.randint(300, (300, 4)), torch.arange(300) // 150
    (much, out, gradients), (little, same, again) = both_ways(model, model, lambda: model(*arguments))
    assert torch.equal(out, same) and gradients.keys() == again.keys()
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)
    assert little < 0.5 * much
    with torch.no_grad():
        assert torch.allclose(model.eval()(*arguments), model(*arguments))


@pytest.mark.parametrize("name", ["vit_mini8", "dinov3_vits16"])
def test_a_vision_transformer_is_the_same_and_keeps_less(name):
    encoder = load_image_encoder(name, "random")
    images = torch.rand(1, 3, 64, 96)
    (much, out, gradients), (little, same, again) = both_ways(encoder, encoder.backbone, lambda: encoder(images))
    assert torch.equal(out, same) and gradients.keys() == again.keys()
    assert all(torch.equal(gradients[key], again[key]) for key in gradients)
    assert little < 0.6 * much


@pytest.mark.slow
def test_the_flag_changes_nothing_but_memory(world, tmp_path, capsys):
    norm = ["--norm", "layernorm", "--steps", "3"]
    for name, more in (("kept", []), ("again", ["--checkpoint"])):
        stage1.main(stage1_args(world, tmp_path / f"s1-{name}", *norm, *more))
        stage2.main(stage2_args(world, tmp_path / "s1-kept", tmp_path / f"s2-{name}", "--steps", "3", *more))
    for stage in ("s1", "s2"):
        assert largest_difference(model_of(tmp_path / f"{stage}-kept"), model_of(tmp_path / f"{stage}-again")) == 0
        assert lines(tmp_path / f"{stage}-kept")[-1]["loss"] == lines(tmp_path / f"{stage}-again")[-1]["loss"]
    for name, more in (("kept", []), ("again", ["--checkpoint"])):  # ablations have stage 1's and stage 2's flags
        ablations.main(["2d-head", *stage1_args(world, tmp_path / f"h1-{name}", *norm, *more)])
        ablations.main(["2d-head", *stage2_args(world, tmp_path / "h1-kept", tmp_path / f"h2-{name}", "--steps", "3", *more)])
    for stage in ("h1", "h2"):
        assert largest_difference(model_of(tmp_path / f"{stage}-kept"), model_of(tmp_path / f"{stage}-again")) == 0
    assert "checkpoint" in run_folder.MAY_CHANGE
    stage2.main(stage2_args(world, tmp_path / "s1-kept", tmp_path / "s2-kept", "--steps", "3", "--checkpoint"))  # the same run
    assert "--checkpoint: not with BatchNorm" in fails_with_one_line(capsys, stage1.main, stage1_args(world, tmp_path / "x", "--checkpoint"))
    resnet = ["--encoder", "dino_resnet50", "--image-size", "64", "128", "--steps", "1"]
    stage1.main(stage1_args(world, tmp_path / "resnet", *resnet))
    capsys.readouterr()
    assert "--checkpoint: for vision transformers only" in fails_with_one_line(
        capsys, stage2.main, stage2_args(world, tmp_path / "resnet", tmp_path / "x", "--checkpoint"))

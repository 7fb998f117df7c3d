"""What the tests of exports share: small encoders as stage 2 writes them, runs of export.py."""
import pytest
import torch

import export
from models import ENCODERS, load_image_encoder
from vit import ViT

NARROW = {"dim": 384, "heads": 6, "hidden": 1024}  # SwiGLU's width as the giants derive it


def write_stage2(monkeypatch, folder, name, size, feature="norm"):
    """Write a small encoder's checkpoint into a new folder; returns the encoder.

    A ViT is cut to two blocks and the giants in width too, a ResNet-50 to one block a stage. All
    weights are noise, so that nothing is tested at 0 or 1.
    """
    row = ENCODERS[name]
    if issubclass(row.network, ViT):
        narrow = NARROW if "swiglu" in row.arguments.get("mlp", "") else {}
        small = row._replace(arguments=row.arguments | narrow | {"depth": 2})
        monkeypatch.setitem(ENCODERS, name, small)
    else:
        resnet = pytest.importorskip("torchvision.models.resnet")
        monkeypatch.setattr("torchvision.models.resnet50",
                            lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1]))
        feature = None
    encoder = load_image_encoder(name, weights="random", feature=feature)
    encoder.eval().requires_grad_(False)
    add_noise(encoder)
    folder.mkdir()
    torch.save({"kind": "image_encoder", "encoder": encoder.spec | {"image_size": size}, "step": 2,
                "model": encoder.backbone.state_dict(), "optimizer": {},
                "args": {"lr": 2e-5, "data": "x"}}, folder / "last.pth")
    return encoder


def add_noise(encoder):
    """Noise on all weights, in which the encoder still tells images apart."""
    noise = torch.Generator().manual_seed(1)

    def normal(value):
        return torch.randn(value.shape, generator=noise)

    for key, value in encoder.backbone.state_dict().items():
        if "running_var" in key:
            value.copy_(0.5 + torch.rand(value.shape, generator=noise))
        elif not issubclass(encoder.row.network, ViT) and value.ndim == 1:
            value.copy_(0.3 + 0.2 * normal(value))
        elif issubclass(encoder.row.network, ViT) and not key.endswith(("bias_mask", "periods")):
            is_large = value.ndim == 1 or "token" in key or key in ("pos_embed", "proj")
            value.add_((0.3 if is_large else 0.06) * normal(value))


def run(folder, out, *more):
    export.main([str(folder), "--out", str(out), *more])


def normalised(encoder, images):
    return (images - encoder.mean) / encoder.std


def as_map(tokens, like):
    """Patch tokens [B, h w, D] as a map [B, D, h, w] of the shape of `like`."""
    return tokens.transpose(1, 2).reshape(like.shape)

"""The stand-in encoder's pre-training and the overview picture."""
from pathlib import Path

import matplotlib.pyplot
import numpy as np
import pytest
import torch
from PIL import Image

import probe
from miniature import colours, overview, pretrain
from models import ViT, load_image_encoder

SHIPPED = Path(pretrain.__file__).parent / "encoder.pth"


def test_patches_lie_row_by_row():
    image = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    patches = pretrain.patches_of(image, 2)
    assert patches.shape == (2, 6, 12)
    second_row_and_column = image[1, :, 2:4, 2:4]
    assert torch.equal(patches[1, 4].view(3, 2, 2), second_row_and_column)


def test_the_loss_sees_masked_patches_only():
    torch.manual_seed(0)
    vit = ViT(8, 24, 1, 2, grid=(2, 4))
    model = pretrain.MaskedAutoencoder(vit, 8, masked=0.75, raw=0.3, decorrelate=0.0)
    image = torch.randn(1, 3, 16, 32)
    torch.manual_seed(1)
    order = torch.rand(1, 8).argsort(1)[0]
    seen, hidden = order[:2], order[2:]

    def loss(image):
        torch.manual_seed(1)  # the same patches are hidden
        return model(image)

    def tripled(patch):
        row, col = divmod(patch.item(), 4)
        other = image.clone()
        other[:, :, 8 * row:8 * row + 8, 8 * col:8 * col + 8] *= 3
        return other
    assert loss(tripled(seen[0])) != loss(image)  # a seen patch is an input
    with torch.no_grad():
        model.predict[1].weight.zero_()
        model.predict[1].bias.zero_()
    assert loss(tripled(seen[0])) == loss(image)  # but not a target
    assert loss(tripled(hidden[0])) != loss(image)  # a hidden one is


def test_standardised_tokens():
    torch.manual_seed(0)
    vit = ViT(8, 24, 1, 2, grid=(2, 4))
    images = torch.randn(80, 3, 16, 32)
    pretrain.standardise(vit, images)
    tokens = vit.feature_map(images, "norm").flatten(2).transpose(1, 2).flatten(0, 1)
    assert tokens.mean(0).abs().max() < 1e-4 and (tokens.std(0) - 1).abs().max() < 1e-3


def test_decorrelation_is_zero_for_independent_features_and_large_for_equal_ones():
    torch.manual_seed(0)
    independent = torch.randn(20000, 8)
    assert pretrain.correlation(independent) < 0.01
    assert pretrain.correlation(independent[:, :1].repeat(1, 8)) == pytest.approx(7, rel=0.01)


def test_pretraining_writes_an_encoder(world, tmp_path, capsys):
    out = tmp_path / "encoder.pth"
    pretrain.main(["--data", str(world), "--out", str(out), "--epochs", "2", "--batch", "2"])
    encoder = load_image_encoder(str(out))
    assert encoder.spec["image_size"] == (80, 160)
    assert encoder(torch.rand(1, 3, 80, 160)).shape == (1, 96, 10, 20)
    assert "4 images, 4 steps" in capsys.readouterr().out


def test_the_shipped_encoder_is_small_and_loads():
    assert SHIPPED.stat().st_size < 4e6
    encoder = load_image_encoder(str(SHIPPED))
    assert torch.isfinite(encoder(torch.rand(1, 3, 80, 160))).all()


def test_pca_colours_are_joint():
    maps = [torch.randn(5, 2, 3), torch.randn(5, 2, 3)]
    maps[1][:, 0, 0] = maps[0][:, 1, 2]  # equal features in two maps get the same colour
    a, b = colours.pca_colours(maps)
    assert a.shape == (2, 3, 3) and 0 <= a.min() and a.max() <= 1
    np.testing.assert_allclose(b[0, 0], a[1, 2])


@pytest.mark.slow
def test_overview_has_a_row_per_condition_and_six_panels(world, tmp_path, monkeypatch):
    drawn = []
    subplots = matplotlib.pyplot.subplots

    def recorded(*args, **more):
        drawn.append(args)
        return subplots(*args, **more)
    monkeypatch.setattr(matplotlib.pyplot, "subplots", recorded)
    folder, out = str(tmp_path / "p"), str(tmp_path / "overview.png")
    probe.main(["--data", str(world), "--task", "seg", "--encoder", str(SHIPPED), "--out", folder,
                "--steps", "2", "--workers", "0", "--device", "cpu"])
    overview.main([folder, folder, "--out", out])
    assert drawn == [(3, 6)]
    picture = np.asarray(Image.open(out))
    assert picture.shape[1] > 1500 and picture[..., :3].std() > 30

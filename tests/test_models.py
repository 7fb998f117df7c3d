import textwrap
from urllib.error import URLError

import pytest
import torch

from errors import InputError
from models import ENCODERS, ImageEncoder, ViT, Whitening, linear_head, load_checkpoint, load_image_encoder


@pytest.fixture
def hub(tmp_path):
    """A stand-in for a clone of DINOv2's repository: the entry point's name and signature, a tiny network inside."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(textwrap.dedent("""
        dependencies = ["torch"]
        import torch
        from models import ViT

        def dinov2_vits14(pretrained=True):
            model = ViT(14, 384, depth=1, heads=6, mlp_ratio=1, grid=(4, 4))
            if pretrained:
                torch.nn.init.constant_(model.cls_token, 7.0)
            return model
        """))
    return str(tmp_path / "hub")


def test_every_name_has_what_the_scripts_need():
    assert {f"dinov2_vit{s}14{r}" for s in "sblg" for r in ("", "_reg")} <= set(ENCODERS)
    assert [ENCODERS[f"dinov2_vit{s}14"]["dim"] for s in "sblg"] == [384, 768, 1024, 1536]


@pytest.mark.parametrize("name, size", [("vit_mini8", (80, 160)), ("vit_small14", (28, 56))])
def test_built_in_shapes(name, size):
    encoder = load_image_encoder(name, weights="random")
    out = encoder(torch.rand(2, 3, *size))
    assert out.shape == (2, encoder.dim, size[0] // encoder.patch_size, size[1] // encoder.patch_size)


def test_the_map_is_laid_out_as_the_image():
    """Changing one patch of the image changes its own cell of the map the most."""
    encoder = load_image_encoder("vit_mini8", weights="random", feature="prenorm")
    image = torch.rand(1, 3, 80, 160)
    other = image.clone()
    other[:, :, 24:32, 120:128] = 1 - other[:, :, 24:32, 120:128]
    change = (encoder(other) - encoder(image)).norm(dim=1)[0]
    assert divmod(change.argmax().item(), 20) == (3, 15)


def test_normalisation_happens_inside():
    class Echo(torch.nn.Module):
        def get_intermediate_layers(self, x, **_):
            return [x]
    encoder = ImageEncoder(Echo(), {"name": "vit_mini8", "feature": "norm"})
    gray = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert encoder(gray).abs().max() < 1e-6
    assert encoder(gray + torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)).sub(1).abs().max() < 1e-5


def test_feature_before_and_after_the_norm():
    before = load_image_encoder("vit_mini8", weights="random", feature="prenorm")
    after = load_image_encoder("vit_mini8", weights="random", feature="norm")
    x = torch.rand(1, 3, 80, 160)
    normalised = before.backbone.norm(before(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(after(x), normalised)


def test_positions_are_interpolated_to_other_sizes():
    vit = ViT(8, 12, 1, 2, 2, grid=(4, 6))
    assert torch.equal(vit.positions(4, 6), vit.pos_embed)
    assert vit.positions(8, 12).shape == (1, 97, 12)
    torch.nn.init.constant_(vit.pos_embed, 0.5)
    assert (vit.positions(5, 9) - 0.5).abs().max() < 1e-5


def test_random_weights_are_always_the_same_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = load_image_encoder("vit_mini8", weights="random").state_dict()
    assert torch.rand(1) == expected
    two = load_image_encoder("vit_mini8", weights="random").state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_local_clone_with_and_without_weights(hub, tmp_path):
    assert (load_image_encoder("dinov2_vits14", hub=hub).backbone.cls_token == 7).all()
    plain = load_image_encoder("dinov2_vits14", weights="random", hub=hub)
    assert (plain.backbone.cls_token != 7).any() and plain.spec["feature"] == "prenorm"
    state = plain.backbone.state_dict()
    state["cls_token"] = torch.full_like(state["cls_token"], 3.0)
    torch.save(state, tmp_path / "weights.pth")
    loaded = load_image_encoder("dinov2_vits14", weights=str(tmp_path / "weights.pth"), hub=hub)
    assert (loaded.backbone.cls_token == 3).all()
    assert loaded(torch.rand(1, 3, 28, 56)).shape == (1, 384, 2, 4)


def test_a_hub_that_cannot_be_reached_names_the_offline_way(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise URLError("no route to host")
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(InputError, match="torch.hub cannot load it.*--hub DIR.*--weights FILE"):
        load_image_encoder("dinov2_vitl14_reg")


def test_checkpoint_goes_in_and_out(tmp_path):
    encoder = load_image_encoder("vit_mini8", weights="random", feature="prenorm")
    torch.nn.init.constant_(encoder.backbone.cls_token, 2.0)
    torch.save({"kind": "image_encoder", "encoder": encoder.spec | {"image_size": (80, 160)},
                "model": encoder.backbone.state_dict()}, tmp_path / "last.pth")
    again = load_image_encoder(str(tmp_path))
    x = torch.rand(1, 3, 80, 160)
    assert torch.equal(again(x), encoder(x)) and again.spec["image_size"] == (80, 160)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(InputError, match="did you mean dinov2_vits14"):
        load_image_encoder("dinov2_vits41")
    with pytest.raises(InputError, match="no released weights"):
        load_image_encoder("vit_mini8")
    with pytest.raises(InputError, match="no hubconf.py"):
        load_image_encoder("dinov2_vits14", hub=str(tmp_path))
    with pytest.raises(InputError, match="no such file"):
        load_image_encoder("vit_mini8", weights=str(tmp_path / "none.pth"))
    torch.save(load_image_encoder("vit_small8", weights="random").backbone.state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match="keys do not fit: .*blocks.*"):
        load_image_encoder("vit_mini8", weights=str(tmp_path / "other.pth"))
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(InputError, match="cannot read"):
        load_image_encoder(str(tmp_path / "text.pth"))
    torch.save({"kind": "probe"}, tmp_path / "probe.pth")
    with pytest.raises(InputError, match="kind probe, but image_encoder is needed"):
        load_checkpoint(tmp_path / "probe.pth", "image_encoder")


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"kind": "image_encoder", "model": print}, tmp_path / "code.pth")
    with pytest.raises(InputError, match="weights_only"):
        load_image_encoder(str(tmp_path / "code.pth"))


def test_image_sizes_that_the_patch_does_not_divide():
    encoder = load_image_encoder("vit_small14", weights="random")
    assert encoder.check_size([224, 448]) == (224, 448)
    with pytest.raises(InputError, match="230.*224 and 238"):
        encoder.check_size((230, 448))


def test_whitened_features_have_unit_covariance_and_the_head_stays_linear():
    torch.manual_seed(0)
    features = torch.randn(5000, 6) @ (torch.eye(6) + 0.1 * torch.randn(6, 6)) + 3
    head = linear_head("whitened", 6, 4)
    head[0].fit(features)
    torch.testing.assert_close(torch.cov(head[0](features).T), torch.eye(6), atol=0.02, rtol=0)
    torch.nn.init.normal_(head[1].weight)
    a, b = torch.randn(2, 1, 6)
    torch.testing.assert_close(head(0.3 * a + 0.7 * b), 0.3 * head(a) + 0.7 * head(b), atol=1e-4, rtol=1e-4)


def test_a_direction_without_variance_is_not_blown_up():
    features = torch.randn(1000, 3) * torch.tensor([1.0, 1.0, 0.0])
    whitening = Whitening(3)
    whitening.fit(features)
    assert whitening(features + 1e-3).abs().max() < 10

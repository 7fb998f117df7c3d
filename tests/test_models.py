"""The table of image encoders, the map that each gives, the checks at its door, and linear heads.
`test_released_weights.py` has the weights of releases."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from runs import eval_args, probe_args, stage1_args, stage2_args

import eval as evaluation
import models
import probe
import stage1
import stage2
from heads import Whitening, linear_head
from models import ENCODERS, ImageEncoder, load_image_encoder
from plumbing.errors import InputError
from plumbing.weights import load_checkpoint

# ---- the table -----------------------------------------------------------------------------------

def test_the_table_has_the_encoders_of_the_paper_s_tables():
    names = {f"dinov2_vit{size}14" for size in "sblg"}
    names |= {f"{name}_reg" for name in names}
    names |= {"dino_vits8", "dino_vits16", "dino_vitb8", "dino_vitb16"}
    names |= {"dino_resnet50", "mocov2_resnet50", "ibot_vitl16", "clip_vitb16", "dinov3_vith16plus"}
    names |= {f"depth_anything_v2_vit{size}" for size in "sbl"}
    names |= {f"dinov3_vit{size}16" for size in "sbl"}
    assert names <= set(ENCODERS)
    assert [ENCODERS[f"dinov2_vit{size}14"].dim for size in "sblg"] == [384, 768, 1024, 1536]
    assert ENCODERS["dino_resnet50"].dim == 2048
    assert ENCODERS["dinov3_vith16plus"].dim == 1280


@pytest.mark.slow
def test_models_py_prints_the_table():
    done = subprocess.run([sys.executable, "models.py"], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert set(ENCODERS) <= set(lines)
    clip = lines["clip_vitb16"].split()
    assert clip == ["clip_vitb16", "openai/CLIP", "16", "768", "ViT", "norm", "CLIP", "MIT"]
    assert lines["maskclip_vitb16"].split()[3:7] == ["512", "ViT", "projected", "CLIP"]
    assert "CC-BY-NC-4.0" in lines["depth_anything_v2_vitb"]
    assert "0.48145466" in lines["CLIP:"]


# ---- the map -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, size", [("vit_mini8", (80, 160)), ("vit_small14", (28, 56))])
def test_built_in_shapes(name, size):
    encoder = load_image_encoder(name, weights="random")
    h, w = size
    p = encoder.patch_size
    out = encoder(torch.rand(2, 3, h, w))
    assert out.shape == (2, encoder.dim, h // p, w // p)


def test_maskclip_s_width_is_its_feature_s():
    assert ENCODERS["maskclip_vitb16"].dim == 512 and ENCODERS["clip_vitb16"].dim == 768
    for feature, width in (("projected", 512), ("values", 768)):
        spec = {"name": "maskclip_vitb16", "feature": feature}
        assert ImageEncoder(torch.nn.Identity(), spec).dim == width
    with pytest.raises(InputError, match="--feature norm: maskclip_vitb16 has projected, values"):
        load_image_encoder("maskclip_vitb16", "random", feature="norm")
    for name in ("clip_vitb16", "vit_mini8"):
        with pytest.raises(InputError, match=f"--feature values: {name} has prenorm, norm, keys"):
            load_image_encoder(name, "random", feature="values")


def test_the_map_is_laid_out_as_the_image():
    """Changing one patch of the image changes its own cell of the map the most."""
    encoder = load_image_encoder("vit_mini8", weights="random", feature="prenorm")
    image = torch.rand(1, 3, 80, 160)
    other = image.clone()
    other[:, :, 24:32, 120:128] = 1 - other[:, :, 24:32, 120:128]
    change = (encoder(other) - encoder(image)).norm(dim=1)[0]
    assert divmod(change.argmax().item(), 20) == (3, 15)


@pytest.mark.parametrize("name, mean, std", [
    ("vit_mini8", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ("clip_vitb16", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))])
def test_normalisation_happens_inside(name, mean, std):
    class Echo(torch.nn.Module):
        def feature_map(self, x, feature):
            return x
    encoder = ImageEncoder(Echo(), {"name": name, "feature": "norm"})
    gray = torch.tensor(mean).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert encoder(gray).abs().max() < 1e-6
    assert encoder(gray + torch.tensor(std).view(3, 1, 1)).sub(1).abs().max() < 1e-5


def test_feature_before_and_after_the_norm():
    before = load_image_encoder("vit_mini8", weights="random", feature="prenorm")
    after = load_image_encoder("vit_mini8", weights="random", feature="norm")
    x = torch.rand(1, 3, 80, 160)
    normalised = before.backbone.norm(before(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(after(x), normalised)


def test_random_weights_are_always_the_same_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = load_image_encoder("vit_mini8", weights="random").state_dict()
    assert torch.rand(1) == expected
    two = load_image_encoder("vit_mini8", weights="random").state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_resnet50_map_is_the_last_stage_at_stride_32():
    encoder = load_image_encoder("dino_resnet50", weights="random").eval()
    images = torch.rand(1, 3, 64, 96)

    # torchvision's own network, with the same weights under the same names
    theirs = pytest.importorskip("torchvision.models").resnet50().eval()
    without = theirs.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert without == (["fc.weight", "fc.bias"], [])
    kept = []
    theirs.layer4.register_forward_hook(lambda module, args, output: kept.append(output))
    theirs((images - encoder.mean) / encoder.std)
    assert torch.equal(encoder(images), kept[0])
    assert kept[0].shape == (1, 2048, 2, 3)
    with pytest.raises(InputError, match="--feature keys: dino_resnet50 has layer4"):
        load_image_encoder("dino_resnet50", weights="random", feature="keys")
    with pytest.raises(InputError, match="--image-size 80 160.*64 and 96"):
        encoder.check_size((80, 160))


def test_checkpoint_goes_in_and_out(tmp_path):
    encoder = load_image_encoder("vit_mini8", weights="random", feature="prenorm")
    torch.nn.init.constant_(encoder.backbone.cls_token, 2.0)
    torch.save({"kind": "image_encoder", "encoder": encoder.spec | {"image_size": (80, 160)},
                "model": encoder.backbone.state_dict()}, tmp_path / "last.pth")
    again = load_image_encoder(str(tmp_path))
    x = torch.rand(1, 3, 80, 160)
    assert torch.equal(again(x), encoder(x))
    assert again.spec["image_size"] == (80, 160)


# ---- checks --------------------------------------------------------------------------------------

def test_the_library_s_door_is_as_careful_as_the_scripts():
    encoder = load_image_encoder("vit_mini8", "random")
    good = torch.rand(1, 3, 80, 160)
    assert encoder(good).shape == (1, 96, 10, 20)
    assert encoder(good[:0]).shape == (0, 96, 10, 20)
    layout = r"are to be \[B, 3, H, W\]"
    for images, message in (
            ((255 * good).byte(), "images of type uint8 and shape .*: are to be in .0, 1., "
                                  "not bytes; divide them by 255"),
            (255 * good, "hold values from .* to 25.* and are to be in .0, 1."),
            (good - 0.5, "hold values from -0.5"),
            (good * torch.nan, "hold values from nan"),
            (good[:, :, :79], "images 79 160: vit_mini8 has patches of 8 pixels"),
            (good[0], layout),
            (good[:, :1], layout),
            (good.permute(0, 2, 3, 1), layout),
            (good.half(), "the encoder's weights are float32; convert one"),
            (good.numpy(), "are a ndarray, not a tensor"),
            (good.double(), "the encoder's weights are float32"),
            (good.to("meta"), "are on meta, the encoder is on cpu; move one")):
        with pytest.raises(InputError, match=message):
            encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(good.bfloat16())

    # As the scripts load it, it checks nothing.
    loop = load_image_encoder("vit_mini8", "random", careful=False)
    assert torch.equal(loop(good), encoder(good))
    assert loop(255 * good).isfinite().all()


def test_the_scripts_loops_do_without_the_checks(world, first, tmp_path, monkeypatch):
    """Each script's encoder is one that checks nothing; its images are made from bytes."""
    def check_images(*_):
        pytest.fail("a pass over the images")
    monkeypatch.setattr(models, "check_images", check_images)
    stage1.main(stage1_args(world, tmp_path / "s1", "--steps", "1"))
    stage2.main(stage2_args(world, first, tmp_path / "s2", "--steps", "1"))
    probe.main(probe_args(world, "seg", tmp_path / "s2", tmp_path / "p", "--steps", "1"))
    evaluation.main(eval_args(tmp_path / "p", out=tmp_path / "table"))
    assert (tmp_path / "p/results.json").is_file()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(InputError, match="did you mean dinov2_vits14"):
        load_image_encoder("dinov2_vits41")
    with pytest.raises(InputError, match="no released weights"):
        load_image_encoder("vit_mini8")
    with pytest.raises(InputError, match="no hubconf.py"):
        load_image_encoder("dinov2_vits14", hub=str(tmp_path))
    with pytest.raises(InputError, match="no such file"):
        load_image_encoder("vit_mini8", weights=str(tmp_path / "none.pth"))
    other = load_image_encoder("vit_small8", weights="random")
    torch.save(other.backbone.state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match="than vit_mini8: .*blocks.*"):
        load_image_encoder("vit_mini8", weights=str(tmp_path / "other.pth"))
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(InputError, match="cannot read"):
        load_image_encoder(str(tmp_path / "text.pth"))
    torch.save({"kind": "probe"}, tmp_path / "probe.pth")
    with pytest.raises(InputError, match="kind probe, but image_encoder is needed"):
        load_checkpoint(tmp_path / "probe.pth", "image_encoder")


def test_image_sizes_that_the_patch_does_not_divide():
    encoder = load_image_encoder("vit_small14", weights="random")
    assert encoder.check_size([224, 448]) == (224, 448)
    for size in ((0, 56), (-14, 56)):
        with pytest.raises(InputError, match="the nearest that they do are 14"):
            encoder.check_size(size)
    with pytest.raises(InputError, match="230.*224 and 238"):
        encoder.check_size((230, 448))


# ---- heads ---------------------------------------------------------------------------------------

def test_whitened_features_have_unit_covariance_and_the_head_stays_linear():
    torch.manual_seed(0)
    features = torch.randn(5000, 6) @ (torch.eye(6) + 0.1 * torch.randn(6, 6)) + 3
    head = linear_head("whitened", 6, 4)
    head[0].fit(features)
    torch.testing.assert_close(torch.cov(head[0](features).T), torch.eye(6), atol=0.02, rtol=0)
    torch.nn.init.normal_(head[1].weight)
    a, b = torch.randn(2, 1, 6)
    torch.testing.assert_close(head(0.3 * a + 0.7 * b), 0.3 * head(a) + 0.7 * head(b),
                               atol=1e-4, rtol=1e-4)


def test_a_direction_without_variance_is_not_blown_up():
    features = torch.randn(1000, 3) * torch.tensor([1.0, 1.0, 0.0])
    whitening = Whitening(3)
    whitening.fit(features)
    assert whitening(features + 1e-3).abs().max() < 10

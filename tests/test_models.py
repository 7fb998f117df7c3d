import subprocess
import sys
from urllib.error import URLError

import pytest
import torch

from checkpoints import load_checkpoint
from conftest import ROOT
from errors import InputError
from models import ENCODERS, ImageEncoder, Whitening, linear_head, load_image_encoder
from releases import Upstream, released_file, released_state, write_hub
from vit import interpolate_positions


@pytest.fixture
def small(monkeypatch):
    """dinov2_vits14 with two blocks, and what its release gives for it."""
    row = ENCODERS["dinov2_vits14"]
    monkeypatch.setitem(ENCODERS, "dinov2_vits14", row._replace(vit=row.vit | {"depth": 2}))
    return released_state("dinov2_vits14")


def test_the_table_has_the_encoders_of_the_paper_s_tables():
    names = {f"dinov2_vit{s}14{r}" for s in "sblg" for r in ("", "_reg")} | {f"dino_vit{s}{p}" for s in "sb" for p in (8, 16)}
    names |= {"dino_resnet50", "mocov2_resnet50", "ibot_vitl16", "clip_vitb16", "dinov3_vith16plus"}
    names |= {f"depth_anything_v2_vit{s}" for s in "sbl"} | {f"dinov3_vit{s}16" for s in "sbl"}
    assert names <= set(ENCODERS)
    assert [ENCODERS[f"dinov2_vit{s}14"].dim for s in "sblg"] == [384, 768, 1024, 1536]
    assert ENCODERS["dino_resnet50"].dim == 2048 and ENCODERS["dinov3_vith16plus"].dim == 1280


def test_models_py_prints_the_table():
    printed = subprocess.run([sys.executable, "models.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = {line.split()[0]: line for line in printed.splitlines()}
    assert set(ENCODERS) <= set(lines)
    clip = lines["clip_vitb16"].split()
    assert clip == ["clip_vitb16", "openai/CLIP", "16", "768", "patch", "tokens,", "norm", "CLIP", "MIT"]
    assert "CC-BY-NC-4.0" in lines["depth_anything_v2_vitb"] and "0.48145466" in lines["CLIP:"]


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


def test_local_clone_or_weights_file(small, tmp_path):
    clone = write_hub(tmp_path / "clone", "dinov2_vits14", "dinov2_vits14", small)
    torch.save({key: -value for key, value in small.items()}, tmp_path / "weights.pth")
    from_hub = load_image_encoder("dinov2_vits14", hub=str(clone))
    from_file = load_image_encoder("dinov2_vits14", weights=str(tmp_path / "weights.pth"))
    assert torch.equal(from_hub.backbone.cls_token, small["cls_token"]) and from_hub.spec["feature"] == "prenorm"
    assert torch.equal(from_file.backbone.cls_token, -small["cls_token"])
    both = load_image_encoder("dinov2_vits14", weights=str(tmp_path / "weights.pth"), hub=str(clone))  # the file decides
    assert torch.equal(both.backbone.cls_token, -small["cls_token"])
    assert from_hub(torch.rand(1, 3, 28, 56)).shape == (1, 384, 2, 4)


def test_a_release_s_file_is_downloaded_once(monkeypatch, tmp_path):
    row = ENCODERS["depth_anything_v2_vits"]
    monkeypatch.setitem(ENCODERS, row.name, row._replace(vit=row.vit | {"depth": 2}))
    state, asked = released_state(row.name), []

    def download(url, path):
        asked.append(url)
        torch.save(released_file(row.name, state), path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for _ in range(2):
        assert torch.equal(load_image_encoder(row.name).backbone.norm.weight, state["norm.weight"])
    assert asked == [row.url] and row.url.endswith("Depth-Anything-V2-Small/resolve/main/depth_anything_v2_vits.pth")


def test_torch_hub_is_asked_for_the_release_s_entry(monkeypatch):
    row = ENCODERS["clip_vitb16"]
    monkeypatch.setitem(ENCODERS, row.name, row._replace(vit=row.vit | {"depth": 2}))
    state, asked = released_state(row.name), []

    def load(repository, entry, source, **_):
        asked.append((repository, entry, source))
        return Upstream(released_file(row.name, state)), "a transform"
    monkeypatch.setattr(torch.hub, "load", load)
    encoder = load_image_encoder(row.name)
    assert asked == [("openai/CLIP", "ViT_B_16", "github")]
    assert torch.equal(encoder.backbone.proj, state["proj"].half().float())


def test_what_cannot_be_reached_names_the_offline_way(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise URLError("no route to host")
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(InputError, match="cannot be loaded from facebookresearch/dinov2.*--weights FILE.*clone .*--hub DIR"):
        load_image_encoder("dinov2_vitl14_reg")
    with pytest.raises(InputError, match="cannot be loaded from facebookresearch/moco.*--weights FILE from https://dl.fbai.*pth.tar$"):
        load_image_encoder("mocov2_resnet50")


def test_a_training_checkpoint_of_dino_with_its_arguments(monkeypatch, tmp_path):
    row = ENCODERS["dino_vits16"]
    monkeypatch.setitem(ENCODERS, row.name, row._replace(vit=row.vit | {"depth": 2}))
    state = released_state(row.name)
    torch.save(released_file(row.name, state), tmp_path / "checkpoint.pth")  # with an argparse.Namespace
    found = load_image_encoder(row.name, weights=str(tmp_path / "checkpoint.pth")).backbone.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())  # the teacher's


def test_what_a_hub_or_an_installation_lacks_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "hubconf.py").write_text("def dinov2_vits14():\n    return None\n")
    with pytest.raises(InputError, match="cannot be loaded from .*AttributeError"):
        load_image_encoder("dinov2_vits14", hub=str(tmp_path))
    with pytest.raises(InputError, match="no entry for torch.hub; download https.*and pass --weights FILE"):
        load_image_encoder("ibot_vitl16", hub=str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(InputError, match="pip install torchvision"):
        load_image_encoder("dino_resnet50", weights="random")
    torch.save({"norm.weight": torch.ones(2)}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="--encoder NAME --weights"):
        load_image_encoder(str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("wrap", [
    lambda state: {f"module.{k}": v for k, v in state.items()},
    lambda state: {"student": state},
    lambda state: {"teacher": {f"module.backbone.{k}": v for k, v in state.items()} | {"module.head.mlp.0.weight": torch.ones(1)},
                   "student": {k: v + 1 for k, v in state.items()}},
    lambda state: {"model": {f"teacher.backbone.{k}": v for k, v in state.items()} | {"student.backbone.norm.bias": torch.ones(1)}},
    lambda state: {"teacher": {"backbone." + k.replace("blocks.1.", "blocks.3.1.").replace("blocks.0.", "blocks.0.0."): v
                               for k, v in state.items()}},
    lambda state: state | {"head.weight": torch.ones(2, 2)},
    lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    lambda state: {"state_dict": {f"_forward_module.model.{k}": v for k, v in state.items()}},
    lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    lambda state: {"teacher": {"backbone._fsdp_wrapped_module." + k.replace("blocks.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module."): v
                               for k, v in state.items()}},
], ids=["DataParallel", "student", "teacher before student", "names of both", "blocks in chunks", "a head", "compiled",
        "Lightning",
        "compiled and DDP", "FSDP and checkpointed"])
def test_wrapped_weights_are_recognised(small, tmp_path, wrap):
    torch.save(wrap(small), tmp_path / "weights.pth")
    found = load_image_encoder("dinov2_vits14", weights=str(tmp_path / "weights.pth")).backbone.state_dict()
    assert all(torch.equal(found[key], value) for key, value in small.items())


@pytest.mark.parametrize("grid", [(16, 16), (74, 74), (8, 4)])
def test_positions_of_another_grid_are_interpolated_once_and_said(small, tmp_path, capsys, grid):
    """DINOv2 trains at 224 pixels, on 16 x 16 patches; what is neither square nor of the release's shape is refused."""
    count = grid[0] * grid[1]
    other = small | {"pos_embed": torch.randn(1, 1 + count, 384)}
    torch.save({"teacher": {f"backbone.{name}": value for name, value in other.items()}}, tmp_path / "w.pth")
    if grid == (8, 4):
        with pytest.raises(InputError, match=r"pos_embed has shape \(1, 33, 384\) instead of \(1, 1370, 384\)"):
            load_image_encoder("dinov2_vits14", weights=str(tmp_path / "w.pth"))
        return
    encoder = load_image_encoder("dinov2_vits14", weights=str(tmp_path / "w.pth"))
    assert f"w.pth: positions of {grid[0]} x {grid[1]} patches, interpolated once to 37 x 37" in capsys.readouterr().out
    torch.testing.assert_close(encoder.backbone.pos_embed.data, interpolate_positions(other["pos_embed"], grid, 37, 37, False),
                               atol=1e-4, rtol=0)
    assert torch.equal(encoder.backbone.cls_token, small["cls_token"])


def test_weights_that_are_no_numbers_or_twice_are_refused(small, tmp_path):
    path = str(tmp_path / "w.pth")
    for change, message in (({"norm.weight": small["norm.weight"].clone().fill_(torch.nan)}, "norm.weight holds numbers that are not finite"),
                            ({"norm.bias": torch.ones(384, dtype=torch.int8)}, "norm.bias is of type torch.int8, no weights"),
                            ({"module.norm.bias": small["norm.bias"] + 1}, "holds some weights twice, wrapped and not")):
        torch.save(small | change, path)
        with pytest.raises(InputError, match=f"w.pth: .*{message}"):
            load_image_encoder("dinov2_vits14", weights=path)


def test_the_library_s_door_is_as_careful_as_the_scripts():
    encoder = load_image_encoder("vit_mini8", "random")
    good = torch.rand(1, 3, 80, 160)
    assert encoder(good).shape == (1, 96, 10, 20) and encoder(good[:0]).shape == (0, 96, 10, 20)
    for images, message in (
            ((255 * good).byte(), "images of type uint8 and shape .*: are to be in .0, 1., not bytes; divide them by 255"),
            (255 * good, "hold values from .* to 25.* and are to be in .0, 1."), (good - 0.5, "hold values from -0.5"),
            (good * torch.nan, "hold values from nan"), (good[:, :, :79], "images 79 160: vit_mini8 has patches of 8 pixels"),
            (good[0], r"are to be \[B, 3, H, W\]"), (good[:, :1], r"are to be \[B, 3, H, W\]"),
            (good.permute(0, 2, 3, 1), r"are to be \[B, 3, H, W\]"), (good.half(), "the encoder's weights are float32; convert one"),
            (good.numpy(), "are a ndarray, not a tensor"), (good.double(), "the encoder's weights are float32"), (good.to("meta"), "are on meta, the encoder is on cpu; move one")):
        with pytest.raises(InputError, match=message):
            encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(good.bfloat16())
    loop = load_image_encoder("vit_mini8", "random", careful=False)  # as the scripts load it: nothing is looked at
    assert torch.equal(loop(good), encoder(good)) and loop(255 * good).isfinite().all()


def test_the_scripts_loops_do_without_the_checks(world, first, tmp_path, monkeypatch):
    """Each script's encoder is one that checks nothing; its images are made from bytes."""
    import eval as evaluation
    import probe
    import stage1
    import stage2
    from test_scripts import probe_args, stage1_args, stage2_args
    monkeypatch.setattr(ImageEncoder, "check_images", lambda *_: pytest.fail("a pass over the images"))
    stage1.main(stage1_args(world, tmp_path / "s1", "--steps", "1"))
    stage2.main(stage2_args(world, first, tmp_path / "s2", "--steps", "1"))
    probe.main(probe_args(world, "seg", tmp_path / "s2", tmp_path / "p", "--steps", "1"))
    evaluation.main([str(tmp_path / "p"), "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "table")])
    assert (tmp_path / "p/results.json").is_file()


def test_after_unwrapping_the_load_is_strict(small, tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save({k: v for k, v in small.items() if not k.startswith("blocks.1.attn")} | {"extra": torch.ones(1)}, path)
    with pytest.raises(InputError, match="weights of another encoder than dinov2_vits14: missing blocks.1.attn.qkv.weight; "
                                         "missing .*; missing .*; unexpected extra; missing .*proj.bias$"):
        load_image_encoder("dinov2_vits14", weights=path)
    torch.save(released_state("dino_vitb16"), path)
    with pytest.raises(InputError, match="weights of another .*and .* more$"):
        load_image_encoder("dinov2_vits14", weights=path)
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds a list and no state dict"):
        load_image_encoder("dinov2_vits14", weights=path)


def test_resnet50_map_is_the_last_stage_at_stride_32():
    encoder = load_image_encoder("dino_resnet50", weights="random").eval()
    images = torch.rand(1, 3, 64, 96)
    kept = []
    encoder.backbone.layer4.register_forward_hook(lambda module, args, output: kept.append(output))
    encoder.backbone((images - encoder.mean) / encoder.std)  # torchvision's own forward
    assert torch.equal(encoder(images), kept[0]) and kept[0].shape == (1, 2048, 2, 3)
    with pytest.raises(InputError, match="--feature keys: dino_resnet50 has one feature, its last stage; leave it out"):
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
    with pytest.raises(InputError, match="than vit_mini8: .*blocks.*"):
        load_image_encoder("vit_mini8", weights=str(tmp_path / "other.pth"))
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(InputError, match="cannot read"):
        load_image_encoder(str(tmp_path / "text.pth"))
    torch.save({"kind": "probe"}, tmp_path / "probe.pth")
    with pytest.raises(InputError, match="kind probe, but image_encoder is needed"):
        load_checkpoint(tmp_path / "probe.pth", "image_encoder")


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"kind": "image_encoder", "model": print}, tmp_path / "code.pth")
    with pytest.raises(InputError, match=r"the file asks for \S*print"):
        load_image_encoder(str(tmp_path / "code.pth"))
    with pytest.raises(InputError, match=r"the file asks for \S*print"):
        load_image_encoder("vit_mini8", weights=str(tmp_path / "code.pth"))


def test_image_sizes_that_the_patch_does_not_divide():
    encoder = load_image_encoder("vit_small14", weights="random")
    assert encoder.check_size([224, 448]) == (224, 448)
    for size in ((0, 56), (-14, 56)):
        with pytest.raises(InputError, match="the nearest that they do are 14"):
            encoder.check_size(size)
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

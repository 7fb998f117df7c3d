"""Exported encoders: names, JSON, the same features from ONNX Runtime, transformers and timm, mistakes.

Encoders are cut to two blocks (a ResNet-50: one a stage), the giants' in width too; all weights are noise, so that nothing is
tested at 0 or 1.
"""
import hashlib
import json

import pytest
import torch

import export
from models import ENCODERS, load_image_encoder

NARROW = {"dim": 384, "heads": 6, "hidden": 1024}  # SwiGLU's width as the giants derive it


@pytest.fixture
def stage2(monkeypatch, tmp_path):
    """A function: name and image size to a small encoder and the folder of its checkpoint, as stage 2 writes it."""
    def make(name, size, feature="norm"):
        row = ENCODERS[name]
        if row.vit:
            narrow = NARROW if "swiglu" in row.vit.get("mlp", "") else {}
            monkeypatch.setitem(ENCODERS, name, row._replace(vit=row.vit | narrow | {"depth": 2}))
        else:
            resnet = pytest.importorskip("torchvision.models.resnet")
            monkeypatch.setattr("torchvision.models.resnet50", lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1]))
        encoder = load_image_encoder(name, weights="random", feature=feature if row.vit else None)
        encoder.eval().requires_grad_(False)
        noise = torch.Generator().manual_seed(1)
        for key, value in encoder.backbone.state_dict().items():
            if "running_var" in key:
                value.copy_(0.5 + torch.rand(value.shape, generator=noise))
            elif row.vit is None and value.ndim == 1:
                value.copy_(0.3 + 0.2 * torch.randn(value.shape, generator=noise))
            elif row.vit and not key.endswith(("bias_mask", "periods")):
                std = 0.3 if value.ndim == 1 or "token" in key or key in ("pos_embed", "proj") else 0.06
                value.add_(std * torch.randn(value.shape, generator=noise))
        folder = tmp_path / "s2"
        folder.mkdir()
        torch.save({"kind": "image_encoder", "encoder": encoder.spec | {"image_size": size}, "step": 2, "optimizer": {},
                    "model": encoder.backbone.state_dict(), "args": {"lr": 2e-5, "data": "x"}}, folder / "last.pth")
        return encoder, folder
    return make


def run(folder, out, *more):
    export.main([str(folder), "--out", str(out), *more])


def normalised(encoder, images):
    return (images - encoder.mean) / encoder.std


def as_map(tokens, like):
    """Patch tokens [B, h w, D] as a map [B, D, h, w] of the shape of `like`."""
    return tokens.transpose(1, 2).reshape(like.shape)


# ---- plain --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size", [
    ("dinov2_vits14", (28, 56)), ("dinov2_vitg14_reg", (28, 56)), ("dinov3_vith16plus", (32, 48)), ("dino_vits8", (16, 24)),
    ("clip_vitb16", (32, 48)), ("depth_anything_v2_vits", (28, 56)), ("dino_resnet50", (64, 96)),
    ("vit_mini8", (16, 24))])
def test_plain_weights_give_the_same_encoder_again(stage2, tmp_path, name, size):
    encoder, folder = stage2(name, size)
    run(folder, tmp_path / "encoder.pth")
    state = torch.load(tmp_path / "encoder.pth", weights_only=True)
    assert type(state) is dict and all(value.is_contiguous() for value in state.values())
    assert (tmp_path / "encoder.pth").stat().st_size < 1.1 * sum(v.numel() * v.element_size() for v in state.values()) + 2e5
    images = torch.rand(2, 3, *size)
    again = load_image_encoder(name, weights=str(tmp_path / "encoder.pth"), feature=encoder.spec["feature"]).eval()
    assert torch.equal(again(images), encoder(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.pth", "encoder.pth.json", "s2"]


def shapes(out):
    return {name: tuple(value.shape) for name, value in torch.load(out, weights_only=True).items()}


def test_clip_has_openai_s_names_and_shapes_and_the_json_says_what_it_is(stage2, tmp_path):
    _, folder = stage2("clip_vitb16", (32, 48), "prenorm")
    run(folder / "last.pth", tmp_path / "new" / "encoder.pth")
    about = json.loads((tmp_path / "new" / "encoder.pth.json").read_text())
    digest = hashlib.sha256((tmp_path / "new" / "encoder.pth").read_bytes()).hexdigest()
    assert about == {
        "encoder": "clip_vitb16", "source": "openai/CLIP", "license": "MIT", "format": "plain", "image_size": [32, 48],
        "feature": "prenorm", "patch_size": 16, "width": 768, "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711], "sha256": {"encoder.pth": digest}, "step": 2, "total": None,
        "fingerprint": load_image_encoder(str(folder)).fingerprint(), "made_from": None,
        "args": {"lr": 2e-5, "data": "x"}}
    block = {"ln_1.weight": (768,), "ln_1.bias": (768,), "attn.in_proj_weight": (2304, 768), "attn.in_proj_bias": (2304,),
             "attn.out_proj.weight": (768, 768), "attn.out_proj.bias": (768,), "ln_2.weight": (768,), "ln_2.bias": (768,),
             "mlp.c_fc.weight": (3072, 768), "mlp.c_fc.bias": (3072,), "mlp.c_proj.weight": (768, 3072), "mlp.c_proj.bias": (768,)}
    assert shapes(tmp_path / "new" / "encoder.pth") == {
        "class_embedding": (768,), "positional_embedding": (197, 768), "proj": (768, 512), "conv1.weight": (768, 3, 16, 16),
        "ln_pre.weight": (768,), "ln_pre.bias": (768,), "ln_post.weight": (768,), "ln_post.bias": (768,),
        **{f"transformer.resblocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}}


def test_dinov2_and_dinov3_have_meta_s_names_and_shapes(stage2, tmp_path):
    block = {"norm1.weight": (384,), "norm1.bias": (384,), "attn.qkv.weight": (1152, 384), "attn.qkv.bias": (1152,),
             "attn.proj.weight": (384, 384), "attn.proj.bias": (384,), "ls1.gamma": (384,), "norm2.weight": (384,),
             "norm2.bias": (384,), "ls2.gamma": (384,), "mlp.fc1.weight": (1536, 384), "mlp.fc1.bias": (1536,),
             "mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,)}
    for name, patch, more, in_block in (
            ("dinov2_vits14_reg", 14, {"pos_embed": (1, 1370, 384), "register_tokens": (1, 4, 384)}, {}),
            ("dinov3_vits16", 16, {"storage_tokens": (1, 4, 384), "rope_embed.periods": (16,)}, {"attn.qkv.bias_mask": (1152,)})):
        out = tmp_path / name
        out.mkdir()
        _, folder = stage2(name, (2 * patch, 3 * patch))
        folder = folder.rename(out / "s2")
        run(folder, out / "encoder.pth")
        assert shapes(out / "encoder.pth") == {
            "cls_token": (1, 1, 384), "mask_token": (1, 384), "patch_embed.proj.weight": (384, 3, patch, patch),
            "patch_embed.proj.bias": (384,), "norm.weight": (384,), "norm.bias": (384,), **more,
            **{f"blocks.{i}.{key}": shape for i in range(2) for key, shape in (block | in_block).items()}}


# ---- ONNX ---------------------------------------------------------------------------------------------------------------

def session(path):
    return pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name, size, feature", [
    pytest.param("dinov2_vitg14_reg", (28, 56), "prenorm", marks=pytest.mark.slow), ("dinov2_vits14", (42, 28), "norm"),
    pytest.param("dinov3_vith16plus", (32, 48), "norm", marks=pytest.mark.slow),
    ("dino_resnet50", (64, 96), "layer4")])
def test_onnx_gives_the_same_features_for_any_batch(stage2, tmp_path, name, size, feature, capsys):
    pytest.importorskip("onnxscript")
    encoder, folder = stage2(name, size, feature)
    run(folder, tmp_path / "encoder.onnx", "--format", "onnx")
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.onnx", "encoder.onnx.json", "s2"]
    graph = session(tmp_path / "encoder.onnx")
    (images,), (features,) = graph.get_inputs(), graph.get_outputs()
    assert (images.name, images.shape[1:]) == ("images", [3, *size]) and features.name == "features"
    for batch in (1, 3):
        x = torch.rand(batch, 3, *size)
        expected = encoder(x)
        found = torch.from_numpy(graph.run(None, {"images": x.numpy()})[0])
        assert found.shape == expected.shape and expected.std() > 0.1
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max().clamp(min=1)


def test_onnx_for_one_batch_and_another_size(stage2, tmp_path):
    onnx = pytest.importorskip("onnx")
    encoder, folder = stage2("clip_vitb16", (32, 48))
    run(folder, tmp_path / "encoder.onnx", "--format", "onnx", "--batch", "2", "--image-size", "48", "64")
    assert json.loads((tmp_path / "encoder.onnx.json").read_text())["image_size"] == [48, 64]
    graph = session(tmp_path / "encoder.onnx")
    x = torch.rand(2, 3, 48, 64)
    found = torch.from_numpy(graph.run(None, {"images": x.numpy()})[0])
    assert (found - encoder(x)).abs().max() < 2e-5 * encoder(x).abs().max()
    with pytest.raises(Exception, match="invalid dimensions"):
        graph.run(None, {"images": x[:1].numpy()})
    assert not {"Resize", "If", "Loop"} & {node.op_type for node in onnx.load(tmp_path / "encoder.onnx").graph.node}


def test_onnx_of_more_than_one_file_holds(stage2, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    encoder, folder = stage2("vit_mini8", (16, 24), "keys")
    monkeypatch.setattr(export, "PROTOBUF_LIMIT", 0)
    run(folder, tmp_path / "encoder.onnx", "--format", "onnx")
    assert set(json.loads((tmp_path / "encoder.onnx.json").read_text())["sha256"]) == {"encoder.onnx", "encoder.onnx.data"}
    x = torch.rand(1, 3, 16, 24)
    found = torch.from_numpy(session(tmp_path / "encoder.onnx").run(None, {"images": x.numpy()})[0])
    assert (found - encoder(x)).abs().max() < 2e-5 * encoder(x).abs().max()


# ---- transformers -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size", [
    ("dinov2_vits14", (518, 518)), ("dinov2_vitg14", (518, 518)), ("dinov2_vits14_reg", (518, 518)),
    ("dinov3_vits16", (32, 48)), ("dinov3_vith16plus", (32, 48)), ("dino_vits16", (224, 224)), ("vit_mini8", (80, 160)),
    ("clip_vitb16", (224, 224))])
def test_transformers_gives_the_same_features(stage2, tmp_path, name, size):
    transformers = pytest.importorskip("transformers")
    encoder, folder = stage2(name, size)
    run(folder, tmp_path / "hf", "--format", "transformers")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    more = {"add_pooling_layer": False} if kind.__name__ == "ViTModel" else {}
    model, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True, **more)
    assert not any(info.values()), info
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        found = model(normalised(encoder, x))
        tokens = found.last_hidden_state
        if name.startswith("clip"):  # its model leaves the patches before the norm
            tokens = model.vision_model.post_layernorm(tokens)
            vit = encoder.backbone
            cls = vit.norm(vit.blocks[1](vit.blocks[0](vit.embed(normalised(encoder, x)))))[:, 0]
            assert (found.image_embeds - cls @ vit.proj).abs().max() < 1e-4
        expected = encoder(x)
        tokens = tokens[:, 1 + config.get("num_register_tokens", 0):]
    assert expected.std() > 0.1 and (as_map(tokens, expected) - expected).abs().max() < 1e-4


def test_depth_anything_s_backbone_goes_into_transformers(stage2, tmp_path):
    transformers = pytest.importorskip("transformers")
    encoder, folder = stage2("depth_anything_v2_vits", (518, 518))
    run(folder, tmp_path / "hf", "--format", "transformers")
    backbone = transformers.Dinov2Config(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, image_size=518,
                                         patch_size=14, out_indices=[1, 2], reshape_hidden_states=False)
    model = transformers.DepthAnythingForDepthEstimation(transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=384, reassemble_factors=[1, 0.5], neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8)).eval()
    model.backbone, info = transformers.Dinov2Backbone.from_pretrained(
        tmp_path / "hf", config=model.config.backbone_config, output_loading_info=True)
    assert not any(info.values()), info
    x = torch.rand(1, 3, 518, 518)
    with torch.no_grad():
        found = model.backbone(normalised(encoder, x)).feature_maps[-1][:, 1:]
        assert model(normalised(encoder, x)).predicted_depth.shape == (1, 518, 518)
    assert (as_map(found, encoder(x)) - encoder(x)).abs().max() < 1e-4


# ---- timm ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size, theirs, more", [
    ("dino_vits16", (224, 224), "vit_small_patch16_224.dino", {}),
    ("dinov2_vits14", (518, 518), "vit_small_patch14_dinov2.lvd142m", {}),
    ("dinov2_vitg14_reg", (518, 518), "vit_giant_patch14_reg4_dinov2.lvd142m", {"embed_dim": 384, "num_heads": 6}),
    ("dinov3_vits16", (64, 96), "vit_small_patch16_dinov3_qkvb.lvd1689m", {}),
    ("clip_vitb16", (224, 224), "vit_base_patch16_clip_quickgelu_224.openai", {}),
    ("dino_resnet50", (64, 96), "resnet50", {})])
def test_timm_gives_the_same_features(stage2, tmp_path, name, size, theirs, more):
    timm = pytest.importorskip("timm")
    encoder, folder = stage2(name, size)
    run(folder, tmp_path / "encoder.pth")
    more = more | ({"depth": 2} if encoder.row.vit else {"layers": (1, 1, 1, 1)})
    if name.startswith("dino_"):  # timm's names
        model = timm.create_model(theirs, num_classes=0, **more)
        model.load_state_dict(torch.load(tmp_path / "encoder.pth"))
    else:
        state = torch.load(tmp_path / "encoder.pth")
        if name.startswith("clip"):
            state = {f"visual.{key}": value for key, value in state.items()}
        model = timm.create_model(theirs, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, num_classes=0, **more)
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        found = model.eval().forward_features(normalised(encoder, x))
    expected = encoder(x)
    if encoder.row.vit:
        found = as_map(found[:, model.num_prefix_tokens:], expected)
    assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-4


# ---- mistakes -----------------------------------------------------------------------------------------------------------

def test_mistakes_are_one_line_and_exit_code_2(stage2, tmp_path, capsys, monkeypatch):
    def fails(*argv):
        with pytest.raises(SystemExit) as exit_:
            export.main([str(argument) for argument in argv])
        error = capsys.readouterr().err.splitlines()
        assert exit_.value.code == 2 and len(error) == 1, error
        return error[0]

    _, folder = stage2("vit_mini8", (16, 24))
    out, hf, graph = tmp_path / "encoder.pth", ("--format", "transformers"), ("--format", "onnx")
    torch.save({"kind": "probe"}, tmp_path / "probe.pth")
    assert "no such file" in fails(tmp_path / "none", "--out", out)
    assert "no such file" in fails("dinov2_vits14", "--out", out)  # a name is not a checkpoint
    assert "image_encoder is needed" in fails(tmp_path / "probe.pth", "--out", out)
    assert "is to be a file such as encoder.pth" in fails(folder, "--out", tmp_path / "encoder")
    assert "is to be a file such as encoder.onnx" in fails(folder, "--out", tmp_path, *graph)
    assert "is to be a file" in fails(folder, "--out", tmp_path / "encoder.json")
    assert "writes a folder" in fails(folder, "--out", out, *hf)
    assert "the checkpoint itself" in fails(folder, "--out", folder / "last.pth")
    assert "the checkpoint itself" in fails(folder / "last.pth", "--out", folder / "last.pth")
    assert "--batch: has a meaning for --format onnx only" in fails(folder, "--out", out, "--batch", "2")
    assert "--image-size: has a meaning" in fails(folder, "--out", tmp_path / "hf", *hf, "--image-size", "16", "16")
    assert "--batch 0" in fails(folder, "--out", tmp_path / "encoder.onnx", *graph, "--batch", "0")
    monkeypatch.setitem(export.NEEDED, "onnx", ("torch", "nowhere"))
    assert "a package that is missing; pip install torch nowhere" in fails(folder, "--out", "x.onnx", *graph)
    monkeypatch.setitem(export.NEEDED, "onnx", ())
    assert "8 pixels, which do not divide 17" in fails(folder, "--out", "x.onnx", *graph, "--image-size", "17", "16")
    assert "cannot write to" in fails(folder, "--out", tmp_path / "probe.pth" / "encoder.pth")
    monkeypatch.setitem(export.NEEDED, "transformers", ())
    (tmp_path / "s2").rename(tmp_path / "mini")
    _, resnet = stage2("dino_resnet50", (64, 96))
    assert "there is no map for dino_resnet50" in fails(resnet, "--out", tmp_path / "hf", *hf)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mini", "probe.pth", "s2"]

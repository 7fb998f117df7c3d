"""Exported encoders: the releases' names, the JSON, the same features here and in timm."""
import hashlib
import json

import pytest
import torch
from exported import as_map, normalised, run, write_stage2

import export
from models import load_image_encoder
from vit import ViT

# ---- plain --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size", [
    ("dinov2_vits14", (28, 56)), ("dinov2_vitg14_reg", (28, 56)), ("dinov3_vith16plus", (32, 48)),
    ("dino_vits8", (16, 24)), ("clip_vitb16", (32, 48)), ("depth_anything_v2_vits", (28, 56)),
    ("dino_resnet50", (64, 96)), ("vit_mini8", (16, 24))])
def test_plain_weights_give_the_same_encoder_again(monkeypatch, tmp_path, name, size):
    encoder = write_stage2(monkeypatch, tmp_path / "s2", name, size)
    out = tmp_path / "encoder.pth"
    run(tmp_path / "s2", out)
    state = torch.load(out, weights_only=True)
    assert type(state) is dict
    assert all(value.is_contiguous() for value in state.values())
    size_of_weights = sum(value.numel() * value.element_size() for value in state.values())
    assert out.stat().st_size < 1.1 * size_of_weights + 2e5
    images = torch.rand(2, 3, *size)
    again = load_image_encoder(name, weights=str(out), feature=encoder.spec["feature"]).eval()
    assert torch.equal(again(images), encoder(images))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["encoder.pth", "encoder.pth.json", "s2"]


@pytest.mark.slow
def test_the_json_says_what_it_is(monkeypatch, tmp_path):
    folder = tmp_path / "s2"
    write_stage2(monkeypatch, folder, "clip_vitb16", (32, 48), "prenorm")
    out = tmp_path / "new" / "encoder.pth"
    run(folder / "last.pth", out)
    assert json.loads((tmp_path / "new" / "encoder.pth.json").read_text()) == {
        "encoder": "clip_vitb16", "source": "openai/CLIP", "license": "MIT", "format": "plain",
        "image_size": [32, 48], "feature": "prenorm", "patch_size": 16, "width": 768,
        "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711],
        "sha256": {"encoder.pth": hashlib.sha256(out.read_bytes()).hexdigest()},
        "step": 2, "total": None, "made_from": None, "args": {"lr": 2e-5, "data": "x"},
        "fingerprint": load_image_encoder(str(folder)).fingerprint()}


def exported_shapes(monkeypatch, folder, name, size):
    """{name: shape} of what is exported of an encoder of two blocks."""
    write_stage2(monkeypatch, folder, name, size)
    run(folder, folder / "encoder.pth")
    state = torch.load(folder / "encoder.pth", weights_only=True)
    return {name: tuple(value.shape) for name, value in state.items()}


def two_blocks(prefix, block):
    """{name: shape} of two blocks from that of one."""
    return {f"{prefix}.{i}.{name}": shape for i in range(2) for name, shape in block.items()}


def test_clip_has_openai_s_names_and_shapes(monkeypatch, tmp_path):
    block = {
        "ln_1.weight": (768,), "ln_1.bias": (768,), "ln_2.weight": (768,), "ln_2.bias": (768,),
        "attn.in_proj_weight": (2304, 768), "attn.in_proj_bias": (2304,),
        "attn.out_proj.weight": (768, 768), "attn.out_proj.bias": (768,),
        "mlp.c_fc.weight": (3072, 768), "mlp.c_fc.bias": (3072,),
        "mlp.c_proj.weight": (768, 3072), "mlp.c_proj.bias": (768,)}
    assert exported_shapes(monkeypatch, tmp_path / "s2", "clip_vitb16", (32, 48)) == {
        "class_embedding": (768,), "positional_embedding": (197, 768), "proj": (768, 512),
        "conv1.weight": (768, 3, 16, 16), "ln_pre.weight": (768,), "ln_pre.bias": (768,),
        "ln_post.weight": (768,), "ln_post.bias": (768,),
        **two_blocks("transformer.resblocks", block)}


META = {
    "cls_token": (1, 1, 384), "mask_token": (1, 384), "patch_embed.proj.bias": (384,),
    "norm.weight": (384,), "norm.bias": (384,)}
META_BLOCK = {
    "norm1.weight": (384,), "norm1.bias": (384,), "norm2.weight": (384,), "norm2.bias": (384,),
    "attn.qkv.weight": (1152, 384), "attn.qkv.bias": (1152,),
    "attn.proj.weight": (384, 384), "attn.proj.bias": (384,),
    "ls1.gamma": (384,), "ls2.gamma": (384,),
    "mlp.fc1.weight": (1536, 384), "mlp.fc1.bias": (1536,),
    "mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,)}


def test_dinov2_has_meta_s_names_and_shapes(monkeypatch, tmp_path):
    found = exported_shapes(monkeypatch, tmp_path / "s2", "dinov2_vits14_reg", (28, 42))
    assert found == META | two_blocks("blocks", META_BLOCK) | {
        "patch_embed.proj.weight": (384, 3, 14, 14),
        "pos_embed": (1, 1370, 384), "register_tokens": (1, 4, 384)}


def test_dinov3_has_meta_s_names_and_shapes(monkeypatch, tmp_path):
    block = META_BLOCK | {"attn.qkv.bias_mask": (1152,)}
    found = exported_shapes(monkeypatch, tmp_path / "s2", "dinov3_vits16", (32, 48))
    assert found == META | two_blocks("blocks", block) | {
        "patch_embed.proj.weight": (384, 3, 16, 16),
        "storage_tokens": (1, 4, 384), "rope_embed.periods": (16,)}


# ---- timm ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size, theirs, more", [
    ("dino_vits16", (224, 224), "vit_small_patch16_224.dino", {}),
    ("dinov2_vits14", (518, 518), "vit_small_patch14_dinov2.lvd142m", {}),
    ("dinov2_vitg14_reg", (518, 518), "vit_giant_patch14_reg4_dinov2.lvd142m",
     {"embed_dim": 384, "num_heads": 6}),
    ("dinov3_vits16", (64, 96), "vit_small_patch16_dinov3_qkvb.lvd1689m", {}),
    ("clip_vitb16", (224, 224), "vit_base_patch16_clip_quickgelu_224.openai", {}),
    ("dino_resnet50", (64, 96), "resnet50", {})])
def test_timm_gives_the_same_features(monkeypatch, tmp_path, name, size, theirs, more):
    timm = pytest.importorskip("timm")
    encoder = write_stage2(monkeypatch, tmp_path / "s2", name, size)
    run(tmp_path / "s2", tmp_path / "encoder.pth")
    state = torch.load(tmp_path / "encoder.pth")
    small = {"depth": 2} if issubclass(encoder.row.network, ViT) else {"layers": (1, 1, 1, 1)}
    options = {"num_classes": 0, **more, **small}
    if name.startswith("dino_"):  # its names are timm's
        model = timm.create_model(theirs, **options)
        model.load_state_dict(state)
    else:
        if name.startswith("clip"):
            state = {f"visual.{key}": value for key, value in state.items()}
        model = timm.create_model(theirs, pretrained=True,
                                  pretrained_cfg_overlay={"state_dict": state}, **options)
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        found = model.eval().forward_features(normalised(encoder, x))
    expected = encoder(x)
    if issubclass(encoder.row.network, ViT):
        found = as_map(found[:, model.num_prefix_tokens:], expected)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4


# ---- mistakes -----------------------------------------------------------------------------------

def test_mistakes_are_one_line_and_exit_code_2(monkeypatch, tmp_path, capsys):
    def fails(*argv):
        with pytest.raises(SystemExit) as exit_:
            export.main([str(argument) for argument in argv])
        error = capsys.readouterr().err.splitlines()
        assert exit_.value.code == 2 and len(error) == 1, error
        return error[0]

    folder = tmp_path / "mini"
    write_stage2(monkeypatch, folder, "vit_mini8", (16, 24))
    out = tmp_path / "encoder.pth"
    hf = ("--out", tmp_path / "hf", "--format", "transformers")
    graph = ("--out", tmp_path / "encoder.onnx", "--format", "onnx")

    # checkpoints
    torch.save({"kind": "probe"}, tmp_path / "probe.pth")
    assert "no such file" in fails(tmp_path / "none", "--out", out)
    assert "no such file" in fails("dinov2_vits14", "--out", out)  # a name is not a checkpoint
    assert "image_encoder is needed" in fails(tmp_path / "probe.pth", "--out", out)

    # --out
    assert "is to be a file such as encoder.pth" in fails(folder, "--out", tmp_path / "encoder")
    assert "is to be a file such as encoder.onnx" in fails(
        folder, "--out", tmp_path, "--format", "onnx")
    assert "is to be a file" in fails(folder, "--out", tmp_path / "encoder.json")
    assert "writes a folder" in fails(folder, "--out", out, "--format", "transformers")
    last = folder / "last.pth"
    assert "the checkpoint itself" in fails(folder, "--out", last)
    assert "the checkpoint itself" in fails(last, "--out", last)
    assert "cannot write to" in fails(folder, "--out", tmp_path / "probe.pth" / "encoder.pth")

    # other flags
    assert "--batch: has a meaning for --format onnx only" in fails(
        folder, "--out", out, "--batch", "2")
    assert "--image-size: has a meaning" in fails(folder, *hf, "--image-size", "16", "16")
    assert "--batch 0" in fails(folder, *graph, "--batch", "0")

    # what formats need
    monkeypatch.setitem(export.NEEDED, "onnx", ("torch", "nowhere"))
    assert "a package that is missing; pip install torch nowhere" in fails(folder, *graph)
    monkeypatch.setitem(export.NEEDED, "onnx", ())
    assert "8 pixels, which do not divide 17" in fails(folder, *graph, "--image-size", "17", "16")
    monkeypatch.setitem(export.NEEDED, "transformers", ())
    write_stage2(monkeypatch, tmp_path / "resnet", "dino_resnet50", (64, 96))
    assert "there is no map for dino_resnet50" in fails(tmp_path / "resnet", *hf)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mini", "probe.pth", "resnet"]

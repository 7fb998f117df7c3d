"""Hugging Face transformers gives the same features as the encoder that was exported."""
import json

import pytest
import torch
from exported import as_map, normalised, run, write_stage2


@pytest.mark.parametrize("name, size", [
    ("dinov2_vits14", (518, 518)), ("dinov2_vitg14", (518, 518)), ("dinov2_vits14_reg", (518, 518)),
    ("dinov3_vits16", (32, 48)), ("dinov3_vith16plus", (32, 48)), ("dino_vits16", (224, 224)),
    ("vit_mini8", (80, 160)), ("clip_vitb16", (224, 224))])
def test_transformers_gives_the_same_features(monkeypatch, tmp_path, name, size):
    transformers = pytest.importorskip("transformers")
    encoder = write_stage2(monkeypatch, tmp_path / "s2", name, size)
    run(tmp_path / "s2", tmp_path / "hf", "--format", "transformers")
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
            assert (found.image_embeds - image_embeds(encoder, x)).abs().max() < 1e-4
        expected = encoder(x)
    tokens = tokens[:, 1 + config.get("num_register_tokens", 0):]
    assert expected.std() > 0.1
    assert (as_map(tokens, expected) - expected).abs().max() < 1e-4


def image_embeds(encoder, images):
    """CLIP's embeddings of images [B, 512], by our weights."""
    vit = encoder.backbone
    tokens = vit.embed(normalised(encoder, images))
    for block in vit.blocks:
        tokens = block(tokens)
    return vit.norm(tokens)[:, 0] @ vit.proj


def test_depth_anything_s_backbone_goes_into_transformers(monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")
    encoder = write_stage2(monkeypatch, tmp_path / "s2", "depth_anything_v2_vits", (518, 518))
    run(tmp_path / "s2", tmp_path / "hf", "--format", "transformers")
    backbone = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=6, image_size=518, patch_size=14,
        out_indices=[1, 2], reshape_hidden_states=False)
    model = transformers.DepthAnythingForDepthEstimation(transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=384, reassemble_factors=[1, 0.5],
        neck_hidden_sizes=[8, 8], fusion_hidden_size=8)).eval()
    model.backbone, info = transformers.Dinov2Backbone.from_pretrained(
        tmp_path / "hf", config=model.config.backbone_config, output_loading_info=True)
    assert not any(info.values()), info
    x = torch.rand(1, 3, 518, 518)
    with torch.no_grad():
        found = model.backbone(normalised(encoder, x)).feature_maps[-1][:, 1:]
        depth = model(normalised(encoder, x)).predicted_depth
        expected = encoder(x)
    assert depth.shape == (1, 518, 518)
    assert (as_map(found, expected) - expected).abs().max() < 1e-4

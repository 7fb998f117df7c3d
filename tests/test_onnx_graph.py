"""ONNX Runtime gives the same features as the encoder that was exported."""
import json

import pytest
import torch
from exported import run, write_stage2

from releases import onnx_graph


def session(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def check_features(graph, encoder, images):
    """Assert that the graph computes what the encoder does."""
    found = torch.from_numpy(graph.run(None, {"images": images.numpy()})[0])
    expected = encoder(images)
    assert found.shape == expected.shape
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("name, size, feature", [
    pytest.param("dinov2_vitg14_reg", (28, 56), "prenorm", marks=pytest.mark.slow),
    ("dinov2_vits14", (42, 28), "norm"),
    pytest.param("dinov3_vith16plus", (32, 48), "norm", marks=pytest.mark.slow),
    ("dino_resnet50", (64, 96), "layer4")])
def test_onnx_gives_the_same_features_for_any_batch(
        monkeypatch, tmp_path, name, size, feature, capsys):
    pytest.importorskip("onnxscript")
    encoder = write_stage2(monkeypatch, tmp_path / "s2", name, size, feature)
    run(tmp_path / "s2", tmp_path / "encoder.onnx", "--format", "onnx")
    assert len(capsys.readouterr().out.splitlines()) == 1
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["encoder.onnx", "encoder.onnx.json", "s2"]
    graph = session(tmp_path / "encoder.onnx")
    [images] = graph.get_inputs()
    [features] = graph.get_outputs()
    assert (images.name, images.shape[1:]) == ("images", [3, *size])
    assert features.name == "features"
    for batch in (1, 3):
        check_features(graph, encoder, torch.rand(batch, 3, *size))


def test_onnx_for_one_batch_and_another_size(monkeypatch, tmp_path):
    onnx = pytest.importorskip("onnx")
    encoder = write_stage2(monkeypatch, tmp_path / "s2", "clip_vitb16", (32, 48))
    out = tmp_path / "encoder.onnx"
    run(tmp_path / "s2", out, "--format", "onnx", "--batch", "2", "--image-size", "48", "64")
    about = json.loads((tmp_path / "encoder.onnx.json").read_text())
    assert about["image_size"] == [48, 64]
    graph = session(out)
    x = torch.rand(2, 3, 48, 64)
    check_features(graph, encoder, x)
    with pytest.raises(Exception, match="invalid dimensions"):
        graph.run(None, {"images": x[:1].numpy()})
    used = {node.op_type for node in onnx.load(out).graph.node}
    assert not used & {"Resize", "If", "Loop"}


def test_onnx_of_more_than_one_file_holds(monkeypatch, tmp_path):
    pytest.importorskip("onnxscript")
    encoder = write_stage2(monkeypatch, tmp_path / "s2", "vit_mini8", (16, 24), "keys")
    monkeypatch.setattr(onnx_graph, "PROTOBUF_LIMIT", 0)
    run(tmp_path / "s2", tmp_path / "encoder.onnx", "--format", "onnx")
    about = json.loads((tmp_path / "encoder.onnx.json").read_text())
    assert set(about["sha256"]) == {"encoder.onnx", "encoder.onnx.data"}
    check_features(session(tmp_path / "encoder.onnx"), encoder, torch.rand(1, 3, 16, 24))

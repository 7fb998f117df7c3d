"""Each encoder of the table: the release's weights in, stage 2 for two steps, and out again for the release's own code."""
import pytest
import torch

import export
import models
import probe
import stage2
from conftest import ROOT
from data import CLOUD, plane_sizes
from models import ENCODERS, load_image_encoder
from releases import Upstream, released_file, released_shapes, released_state, write_hub
from waffleiron import WaffleIron, to_released

RELEASED = [name for name, row in ENCODERS.items() if row.source != "built-in"]
QUICK = [name for name in RELEASED if "_vits" in name or "clip" in name]
ROWS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RELEASED]


def image_size(row):
    return {14: (56, 112), 32: (64, 128)}.get(row.patch_size, (48, 96))


def shrink(monkeypatch, name, depth=2):
    """The row with fewer blocks; widths, names and everything else stay."""
    row = ENCODERS[name]
    row = row._replace(vit=row.vit | {"depth": depth}) if row.vit else row
    monkeypatch.setitem(models.ENCODERS, name, row)
    return row


NOT_SAID = {"name_or_path": "none", "weights": None, "hub": None, "feature": None}


def stage1_checkpoint(path, dim, size, encoder=NOT_SAID):
    """What stage 1 writes, untrained, for features of `dim` channels."""
    torch.manual_seed(0)
    cloud = CLOUD | {"fov": (48, 48, 8), "cell": 1, "neighbors": 4}
    model = WaffleIron(channels=16, depth=2, out_channels=dim, norm="batchnorm", grids=plane_sizes(cloud["fov"], cloud["cell"]))
    torch.save({"kind": "point_encoder", "waffleiron": model.spec, "model": model.state_dict(), "cloud": cloud, "image_size": size,
                "encoder": encoder, "step": 2, "total": 2}, path)
    return path


def released_source(name, row, state, folder):
    """Arguments of load_image_encoder for the release as it is published: a torch.hub repository, or a file."""
    if row.entry is None:
        torch.save(released_file(name, state), folder / "released.pth")
        return {"weights": str(folder / "released.pth")}
    return {"hub": str(write_hub(folder / "clone", name, row.entry or name, state))}


@pytest.mark.parametrize("name", [row for row in ROWS if row.values[0] != "dinov2_vitg14_reg"])  # so wide a one once will do
def test_in_stage2_out(name, world, tmp_path, monkeypatch):
    row, state = shrink(monkeypatch, name), released_state(name)
    size = image_size(row)
    source = released_source(name, row, state, tmp_path)
    before = load_image_encoder(name, **source)
    assert before.dim == row.dim and before(torch.rand(1, 3, *size)).shape == (1, row.dim, size[0] // row.patch_size, size[1] // row.patch_size)
    same = {key: value.half().float() if "clip" in name else value for key, value in state.items()}
    assert all(torch.equal(value, same[key]) for key, value in before.released_weights().items())

    stage1 = stage1_checkpoint(tmp_path / "s1.pth", row.dim, size)
    flags = [part for flag, value in source.items() for part in (f"--{flag}", value)]
    stage2.main(["--data", str(world), "--stage1", str(stage1), "--out", str(tmp_path / "s2"), "--encoder", name, *flags, "--batch", "2",
                 "--steps", "2", "--warmup", "0", "--workers", "0", "--device", "cpu"])
    trained = load_image_encoder(str(tmp_path / "s2"))

    export.main([str(tmp_path / "s2"), "--out", str(tmp_path / "encoder.pth")])
    exported = torch.load(tmp_path / "encoder.pth", weights_only=True)
    assert {key: tuple(value.shape) for key, value in exported.items()} == released_shapes(name)
    Upstream(state).load_state_dict(exported, strict=True)
    changed = {key for key in exported if not torch.equal(exported[key], same[key])}
    assert len(changed) >= 0.5 * len(exported)
    assert not any(key.endswith(("running_mean", "running_var", "bias_mask", "periods")) for key in changed)

    again = load_image_encoder(name, weights=str(tmp_path / "encoder.pth"))
    images = torch.rand(2, 3, *size)
    outputs = [encoder(images) for encoder in (before, trained, again)]
    assert torch.equal(outputs[1], outputs[2]) and not torch.allclose(outputs[0], outputs[1], atol=1e-4)


@pytest.mark.parametrize("name", RELEASED)
def test_positions_are_interpolated_as_the_release_does(name):
    """test_vit.py has what the two ways are; here who has which."""
    vit = ENCODERS[name].vit
    if vit is None or name.startswith("dinov3"):
        assert vit is None or vit["grid"] is None  # no embeddings to interpolate
    else:
        assert vit.get("antialias", False) == (name.endswith("_reg") or name == "clip_vitb16")


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_of_the_full_size(name):
    row = ENCODERS[name]
    with torch.device("meta"):
        backbone = models.ViT(row.patch_size, **row.vit) if row.vit else models._architecture(row)
    names = dict(row.released_name(key, value.shape) for key, value in backbone.state_dict().items())
    assert names == released_shapes(name, row.vit and row.vit["depth"])


def test_numbers_of_parameters():
    """The paper's Table L says what stage 2 trains for DINOv2, in millions; the model cards of DINOv3 say theirs."""
    for name, millions in {"dinov2_vits14": 22.1, "dinov2_vitb14": 86.6, "dinov2_vitl14": 304.4, "dinov2_vitg14": 1136.5,
                           "dinov3_vits16": 21.6, "dinov3_vitb16": 85.7, "dinov3_vitl16": 303, "dinov3_vith16plus": 840}.items():
        shapes = released_shapes(name, ENCODERS[name].vit["depth"])
        count = sum(torch.Size(shape).numel() for key, shape in shapes.items() if not key.endswith(("periods", "bias_mask")))
        assert count / 1e6 == pytest.approx(millions, abs=0.05 if "dinov2" in name else 1), name


# ---- stage 2's choices --------------------------------------------------------------------------------------------------

def run_stage2(world, out, *more):
    stage2.main(["--data", str(world), "--out", str(out), "--batch", "2", "--steps", "2", "--warmup", "0", "--workers", "0", "--device", "cpu",
                 *map(str, more)])
    return torch.load(out / "last.pth", weights_only=True)


def error_of(world, tmp_path, capsys, *more):
    with pytest.raises(SystemExit) as stop:
        run_stage2(world, tmp_path / "none", *more)
    assert stop.value.code == 2 and not (tmp_path / "none").exists()
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("entry, prefix", [("model_point", "module."), ("model_points", "")])
def test_stage2_on_released_scalr(world, tmp_path, monkeypatch, capsys, entry, prefix):
    """The paper's Table D, second row: no stage 1 of one's own."""
    shrink(monkeypatch, "dinov2_vits14")
    released = to_released(WaffleIron(channels=16, depth=2, out_channels=384))
    torch.save({entry: {prefix + name: value for name, value in released.items()}}, tmp_path / "model.pth")
    encoder = ["--encoder", "dinov2_vits14", "--weights", "random"]
    result = run_stage2(world, tmp_path / "s2", "--stage1", tmp_path / "model.pth", "--image-size", "56", "112", *encoder)
    assert result["encoder"] == {"name": "dinov2_vits14", "feature": "prenorm", "image_size": (56, 112)}
    assert result["args"]["lr"] == 2e-5
    assert "add --encoder (ScaLR: dinov2_vitl14)" in error_of(world, tmp_path, capsys, "--stage1", tmp_path / "model.pth")
    error = error_of(world, tmp_path, capsys, "--stage1", tmp_path / "model.pth", "--encoder", "vit_mini8", "--weights", "random")
    assert "features have 96 channels" in error and "gives 384" in error


def test_a_checkpoint_brings_its_image_size_to_released_scalr(world, tmp_path):
    torch.save({"model_point": to_released(WaffleIron(channels=16, depth=2, out_channels=96))}, tmp_path / "model.pth")
    result = run_stage2(world, tmp_path / "s2", "--stage1", tmp_path / "model.pth", "--encoder", ROOT / "miniature" / "encoder.pth")
    assert result["encoder"] == {"name": "vit_mini8", "feature": "norm", "image_size": (80, 160)}


def test_another_feature_or_file_than_stage_1_s(world, tmp_path):
    encoder = load_image_encoder("vit_mini8", weights="random")
    stage1 = stage1_checkpoint(tmp_path / "s1.pth", 96, (80, 160), {"name_or_path": "vit_mini8", "weights": "gone.pth", "hub": None,
                                                                    "feature": "prenorm"})
    moved = {name: value + 0.01 for name, value in encoder.backbone.state_dict().items()}
    torch.save(moved, tmp_path / "moved.pth")
    result = run_stage2(world, tmp_path / "s2", "--stage1", stage1, "--weights", tmp_path / "moved.pth", "--lr", "1e-9", "--end-lr", "0")
    assert result["encoder"]["feature"] == "prenorm"  # stage 1's
    assert (result["model"]["cls_token"] - moved["cls_token"]).abs().max() < 1e-6
    result = run_stage2(world, tmp_path / "keys", "--stage1", stage1, "--weights", tmp_path / "moved.pth", "--feature", "keys")
    assert result["encoder"]["feature"] == "keys"
    result = run_stage2(world, tmp_path / "named", "--stage1", stage1, "--encoder", "vit_mini8", "--weights", tmp_path / "moved.pth")
    assert result["encoder"]["feature"] == "prenorm"  # what the head gives, not what this encoder's default is
    result = torch.load(tmp_path / "keys" / "last.pth", weights_only=True)
    assert torch.equal(result["model"]["blocks.3.mlp.fc1.weight"], moved["blocks.3.mlp.fc1.weight"])  # behind the keys: no gradient
    assert not torch.equal(result["model"]["blocks.3.attn.qkv.weight"], moved["blocks.3.attn.qkv.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("flags, moves", [([], False), (["--train-batchnorm"], True)])
def test_batchnorm_statistics_of_a_resnet50(world, tmp_path, capsys, flags, moves):
    stage1 = stage1_checkpoint(tmp_path / "s1.pth", 2048, (64, 128))
    before = load_image_encoder("dino_resnet50", weights="random").backbone.state_dict()
    result = run_stage2(world, tmp_path / "s2", "--stage1", stage1, "--encoder", "dino_resnet50", "--weights", "random", *flags)
    assert result["args"]["lr"] == 5e-3
    assert not torch.equal(result["model"]["layer1.0.bn1.weight"], before["layer1.0.bn1.weight"])  # its affine part is trained
    for name in ("bn1.running_mean", "layer4.2.bn3.running_var"):
        assert torch.equal(result["model"][name], before[name]) != moves
    if moves:
        stage1 = stage1_checkpoint(tmp_path / "s1.pth", 96, (80, 160))
        assert "--train-batchnorm: vit_mini8 has no BatchNorm" in error_of(world, tmp_path, capsys, "--stage1", stage1, "--encoder",
                                                                           "vit_mini8", "--weights", "random", *flags)


@pytest.mark.parametrize("task, lr", [("seg", 1e-2), ("depth", 1e-1)])
def test_learning_rates_of_probes_of_a_resnet50(world, tmp_path, task, lr):
    probe.main(["--data", str(world), "--task", task, "--encoder", "dino_resnet50", "--weights", "random", "--image-size", "64", "128",
                "--out", str(tmp_path / "p"), "--batch", "2", "--steps", "1", "--workers", "0", "--device", "cpu"])
    assert torch.load(tmp_path / "p" / "last.pth", weights_only=True)["args"]["lr"] == lr

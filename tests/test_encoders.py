"""Each encoder of the table: the release's weights in, stage 2 for two steps, and out again for the
release's own code."""
import pytest
import torch
from conftest import ROOT
from upstream import Upstream, released_file, released_shapes, released_state, write_hub

import export
import models
import probe
import stage2
from models import ENCODERS, load_image_encoder
from readers.nuscenes import SAMPLING
from releases.scalr import to_released
from vit import ViT
from waffleiron import WaffleIron, plane_sizes

RELEASED = [name for name, row in ENCODERS.items() if row.source != "built-in"]
QUICK = [name for name in RELEASED if "_vits" in name or "clip" in name]
ROWS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RELEASED]
NOT_SAID = {"name_or_path": "none", "weights": None, "hub": None, "feature": None}
RUN = ["--batch", "2", "--workers", "0", "--device", "cpu"]


# ---- helpers -------------------------------------------------------------------------------------

def image_size(row):
    return {14: (56, 112), 32: (64, 128)}.get(row.patch_size, (48, 96))


def shrink(monkeypatch, name, depth=2):
    """The row with fewer blocks; widths, names and everything else stay."""
    row = ENCODERS[name]
    if issubclass(row.network, ViT):
        row = row._replace(arguments=row.arguments | {"depth": depth})
    monkeypatch.setitem(models.ENCODERS, name, row)
    return row


def stage1_checkpoint(path, dim, size, encoder=NOT_SAID):
    """What stage 1 writes, untrained, for features of `dim` channels."""
    torch.manual_seed(0)
    sampling = SAMPLING | {"fov": (48, 48, 8), "cell": 1, "neighbors": 4}
    model = WaffleIron(channels=16, depth=2, out_channels=dim, norm="batchnorm",
                       grids=plane_sizes(sampling["fov"], sampling["cell"]))
    content = {"kind": "point_encoder", "backbone": "waffleiron", "spec": model.spec,
               "model": model.state_dict(), "samplings": {"nuscenes": sampling},
               "image_size": size, "encoder": encoder, "step": 2, "total": 2}
    torch.save(content, path)
    return path


def released_source(name, row, state, folder):
    """Arguments of load_image_encoder for the release as it is published: a torch.hub repository,
    or a file."""
    if row.entry is None:
        torch.save(released_file(name, state), folder / "released.pth")
        return {"weights": str(folder / "released.pth")}
    return {"hub": str(write_hub(folder / "clone", name, row.entry or name, state))}


def run_stage2(world, out, *more):
    """Run stage 2 for two steps; returns its checkpoint."""
    stage2.main(["--data", str(world), "--out", str(out), "--steps", "2", "--warmup-part", "0",
                 *RUN, *map(str, more)])
    return torch.load(out / "last.pth", weights_only=True)


def error_of(world, tmp_path, capsys, *more):
    """The last line on stderr of a stage 2 that stops before it writes anything."""
    with pytest.raises(SystemExit) as stop:
        run_stage2(world, tmp_path / "none", *more)
    assert stop.value.code == 2
    assert not (tmp_path / "none").exists()
    return capsys.readouterr().err.strip().splitlines()[-1]


# ---- each row of the table -----------------------------------------------------------------------

# One encoder as wide as ViT-g will do: the one without registers.
@pytest.mark.slow
@pytest.mark.parametrize("name", [row for row in ROWS if row.values[0] != "dinov2_vitg14_reg"])
def test_in_stage2_out(name, world, tmp_path, monkeypatch):
    row = shrink(monkeypatch, name)
    state = released_state(name)
    size = h, w = image_size(row)

    # The release's weights in.
    source = released_source(name, row, state, tmp_path)
    before = load_image_encoder(name, **source)
    feature_map = before(torch.rand(1, 3, h, w))
    assert before.dim == row.dim
    assert feature_map.shape == (1, row.dim, h // row.patch_size, w // row.patch_size)
    same = {key: value.half().float() if "clip" in name else value for key, value in state.items()}
    assert all(torch.equal(value, same[key]) for key, value in before.released_weights().items())

    # Stage 2 for two steps.
    stage1 = stage1_checkpoint(tmp_path / "s1.pth", row.dim, size)
    (flag, value), = source.items()
    lr = () if row.network.FAMILY in stage2.LR else ("--lr", "1e-3")
    run_stage2(world, tmp_path / "s2", "--stage1", stage1, "--encoder", name, f"--{flag}", value,
               *lr)
    trained = load_image_encoder(str(tmp_path / "s2"))

    # Out again: the release's names and shapes, with other values where something was trained.
    export.main([str(tmp_path / "s2"), "--out", str(tmp_path / "encoder.pth")])
    exported = torch.load(tmp_path / "encoder.pth", weights_only=True)
    assert {key: tuple(value.shape) for key, value in exported.items()} == released_shapes(name)
    Upstream(state).load_state_dict(exported, strict=True)
    changed = {key for key in exported if not torch.equal(exported[key], same[key])}
    # Of EfficientNet-Lite0's 16 blocks five lie behind the feature
    assert len(changed) >= (0.3 if name == "efficientnet_lite0" else 0.5) * len(exported)
    fixed = ("running_mean", "running_var", "bias_mask", "periods")
    assert not any(key.endswith(fixed) for key in changed)

    # And in once more: the trained encoder.
    again = load_image_encoder(name, weights=str(tmp_path / "encoder.pth"))
    images = torch.rand(2, 3, h, w)
    output = trained(images)
    assert torch.equal(again(images), output)
    assert not torch.allclose(before(images), output, atol=1e-4)


@pytest.mark.parametrize("name", RELEASED)
def test_positions_are_interpolated_as_the_release_does(name):
    """Which encoder interpolates in which of the two ways; `test_vit.py` tests the ways."""
    row = ENCODERS[name]
    if not issubclass(row.network, ViT) or name.startswith("dinov3"):
        # no embeddings to interpolate
        assert not issubclass(row.network, ViT) or row.arguments["grid"] is None
    else:
        antialias = row.arguments.get("antialias", False)
        assert antialias == (name.endswith("_reg") or "clip" in name)


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_of_the_full_size(name):
    row = ENCODERS[name]
    with torch.device("meta"):
        backbone = row.network(row.patch_size, **row.arguments)
    state = backbone.state_dict()
    names = dict(row.released_name(key, value.shape) for key, value in state.items())
    assert names == released_shapes(name, row.arguments.get("depth"))


def test_numbers_of_parameters():
    """The paper's Table L says what stage 2 trains for DINOv2, in millions; the model cards of
    DINOv3 say theirs."""
    for name, millions in {"dinov2_vits14": 22.1, "dinov2_vitb14": 86.6,
                           "dinov2_vitl14": 304.4, "dinov2_vitg14": 1136.5,
                           "dinov3_vits16": 21.6, "dinov3_vitb16": 85.7,
                           "dinov3_vitl16": 303, "dinov3_vith16plus": 840}.items():
        shapes = released_shapes(name, ENCODERS[name].arguments["depth"])
        count = sum(torch.Size(shape).numel() for key, shape in shapes.items()
                    if not key.endswith(("periods", "bias_mask")))
        assert count / 1e6 == pytest.approx(millions, abs=0.05 if "dinov2" in name else 1), name


# ---- stage 2's choices ---------------------------------------------------------------------------

@pytest.mark.parametrize("entry, prefix", [("model_point", "module."), ("model_points", "")])
def test_stage2_on_released_scalr(world, tmp_path, monkeypatch, capsys, entry, prefix):
    """The paper's Table D, second row: no stage 1 of one's own."""
    shrink(monkeypatch, "dinov2_vits14")
    released = to_released(WaffleIron(channels=16, depth=2, out_channels=384))
    released = {prefix + name: value for name, value in released.items()}
    torch.save({entry: released}, tmp_path / "model.pth")
    stage1 = ["--stage1", tmp_path / "model.pth"]
    encoder = ["--encoder", "dinov2_vits14", "--weights", "random", "--image-size", "56", "112"]
    result = run_stage2(world, tmp_path / "s2", *stage1, *encoder)
    assert result["encoder"] == {"name": "dinov2_vits14", "feature": "prenorm",
                                 "image_size": (56, 112)}
    assert result["args"]["lr"] == 2e-5

    error = error_of(world, tmp_path, capsys, *stage1)
    assert "add --encoder (ScaLR: dinov2_vitl14)" in error
    narrow = ["--encoder", "vit_mini8", "--weights", "random"]
    error = error_of(world, tmp_path, capsys, *stage1, *narrow)
    assert "features have 96 channels" in error and "gives 384" in error


def test_a_checkpoint_brings_its_image_size_to_released_scalr(world, tmp_path):
    released = to_released(WaffleIron(channels=16, depth=2, out_channels=96))
    torch.save({"model_point": released}, tmp_path / "model.pth")
    encoder = ["--encoder", ROOT / "miniature" / "encoder.pth"]
    result = run_stage2(world, tmp_path / "s2", "--stage1", tmp_path / "model.pth", *encoder)
    assert result["encoder"] == {"name": "vit_mini8", "feature": "norm", "image_size": (80, 160)}


def test_another_feature_or_file_than_stage_1_s(world, tmp_path):
    encoder = load_image_encoder("vit_mini8", weights="random")
    used = {"name_or_path": "vit_mini8", "weights": "gone.pth", "hub": None, "feature": "prenorm"}
    stage1 = stage1_checkpoint(tmp_path / "s1.pth", 96, (80, 160), used)
    moved = {name: value + 0.01 for name, value in encoder.backbone.state_dict().items()}
    torch.save(moved, tmp_path / "moved.pth")
    flags = ["--stage1", stage1, "--weights", tmp_path / "moved.pth"]

    # Another file: its weights, and stage 1's feature.
    result = run_stage2(world, tmp_path / "s2", *flags, "--lr", "1e-9", "--end-lr", "0")
    assert result["encoder"]["feature"] == "prenorm"
    assert (result["model"]["cls_token"] - moved["cls_token"]).abs().max() < 1e-6

    # Another feature: what lies behind the keys has no gradient.
    result = run_stage2(world, tmp_path / "keys", *flags, "--feature", "keys")
    assert result["encoder"]["feature"] == "keys"
    mlp, qkv = "blocks.3.mlp.fc1.weight", "blocks.3.attn.qkv.weight"
    assert torch.equal(result["model"][mlp], moved[mlp])
    assert not torch.equal(result["model"][qkv], moved[qkv])

    # A named encoder: the feature is what the head gives, not the default of this encoder.
    result = run_stage2(world, tmp_path / "named", *flags, "--encoder", "vit_mini8")
    assert result["encoder"]["feature"] == "prenorm"


@pytest.mark.slow
@pytest.mark.parametrize("flags, moves", [([], False), (["--train-batchnorm"], True)])
def test_batchnorm_statistics_of_a_resnet50(world, tmp_path, capsys, flags, moves):
    stage1 = stage1_checkpoint(tmp_path / "s1.pth", 2048, (64, 128))
    before = load_image_encoder("dino_resnet50", weights="random").backbone.state_dict()
    encoder = ["--encoder", "dino_resnet50", "--weights", "random"]
    result = run_stage2(world, tmp_path / "s2", "--stage1", stage1, *encoder, *flags)
    assert result["args"]["lr"] == 5e-3
    affine = "layer1.0.bn1.weight"  # is trained in any case
    assert not torch.equal(result["model"][affine], before[affine])
    for name in ("bn1.running_mean", "layer4.2.bn3.running_var"):
        assert torch.equal(result["model"][name], before[name]) != moves
    if moves:
        stage1 = stage1_checkpoint(tmp_path / "s1.pth", 96, (80, 160))
        encoder = ["--encoder", "vit_mini8", "--weights", "random"]
        error = error_of(world, tmp_path, capsys, "--stage1", stage1, *encoder, *flags)
        assert "--train-batchnorm: vit_mini8 has no BatchNorm" in error


@pytest.mark.slow
@pytest.mark.parametrize("task, lr", [("seg", 1e-2), ("depth", 1e-1)])
def test_learning_rates_of_probes_of_a_resnet50(world, tmp_path, task, lr):
    encoder = ["--encoder", "dino_resnet50", "--weights", "random", "--image-size", "64", "128"]
    probe.main(["--data", str(world), "--task", task, *encoder, "--out", str(tmp_path / "p"),
                "--steps", "1", *RUN])
    assert torch.load(tmp_path / "p" / "last.pth", weights_only=True)["args"]["lr"] == lr

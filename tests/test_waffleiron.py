"""The 3D encoder against the published one's outputs, and the invariants that make it fast."""
import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from errors import InputError
from waffleiron import BatchNorm, WaffleIron, from_released, load_waffleiron, plan_window, published, to_released

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("CD_SHARED", HERE.parent.parent / "shared")) / "golden"
GOLDEN = [HERE / "golden" / "portable_layernorm.pt", HERE / "golden" / "portable_batchnorm.pt",
          SHARED / "waffleiron_layernorm.pt", SHARED / "waffleiron_batchnorm.pt"]
GRIDS = ((24, 20), (24, 8), (20, 8))
SMALL = dict(channels=8, depth=3, out_channels=6, grids=GRIDS)


def load_golden(path):
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return torch.load(path, weights_only=True)


def golden_clouds(golden):
    """The padded golden clouds as ragged ones: a list of (feats, cells, neighbors, batch)."""
    return [(golden["feats"][b, :, :n].T, golden["cell_ind"][b, :, :n], golden["neighbors"][b, 1:, :n].T,
             torch.zeros(n, dtype=torch.int64)) for b, n in enumerate(golden["num_points"])]


def collate(clouds):
    """Clouds one after the other; neighbours then index rows of the whole batch."""
    starts = [sum(len(cloud[0]) for cloud in clouds[:b]) for b in range(len(clouds))]
    return (torch.cat([feats for feats, _, _, _ in clouds]), torch.cat([cells for _, cells, _, _ in clouds], 1),
            torch.cat([neighbors + start for (_, _, neighbors, _), start in zip(clouds, starts)]),
            torch.cat([batch + b for b, (_, _, _, batch) in enumerate(clouds)]))


def random_cloud(n, low=(0.0, 0.0), high=(1.0, 1.0), grids=GRIDS):
    """A cloud inside a box (a share of each grid's rows and columns) that touches the box's sides."""
    cells = []
    for height, width in grids:
        first = torch.tensor([int(low[0] * height), int(low[1] * width)])
        last = torch.tensor([max(int(high[0] * height) - 1, 0), max(int(high[1] * width) - 1, 0)]).maximum(first)
        place = first + (torch.rand(n, 2) * (last - first + 1)).long()
        place[0], place[1] = first, last
        cells.append(place[:, 0] * width + place[:, 1])
    neighbors = (torch.arange(n)[:, None] + torch.randint(1, n, (n, 4))) % n
    return torch.randn(n, 5), torch.stack(cells), neighbors, torch.zeros(n, dtype=torch.int64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- parity with the published code ---------------------------------------------------------------------------------

@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_outputs_are_the_published_ones(path):
    golden = load_golden(path)
    model = from_released(golden["state_dict"], golden["grids"]).eval()
    assert {key: model.spec[key] for key in ("channels", "depth", "out_channels", "norm")} == {
        key: golden[key] for key in ("channels", "depth", "out_channels", "norm")}
    output = model(*collate(golden_clouds(golden)))
    expected = torch.cat([golden["output"][b, :, :n].T for b, n in enumerate(golden["num_points"])])
    assert expected.abs().max() > 1
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_gradient_norms_are_the_published_ones(path):
    golden = load_golden(path)
    model = from_released(golden["state_dict"], golden["grids"]).eval()
    model(*golden_clouds(golden)[0]).square().mean().backward()
    norms = {published(name, value.shape)[0]: value.grad.norm().item() for name, value in model.named_parameters()}
    # The order of float32 sums over some hundred points and six layers leaves 2e-6; a wrong term costs per cents.
    assert norms == pytest.approx(golden["grad_norms_sample0"], rel=5e-5)


# ---- released weights -----------------------------------------------------------------------------------------------

VARIANTS = {"ScaLR": ("layernorm", "linear"), "WaffleIron": ("batchnorm", "linear"),
            "ScaLR downstream": ("layernorm", "batchnorm"), "ScaLR+": ("layernorm", "mlp")}
every_variant = pytest.mark.parametrize("norm, head", VARIANTS.values(), ids=VARIANTS)


def released_shapes(norm, head, channels=8, depth=3, out=6, hidden=10):
    """{name: shape} of a released state dict, written out from the releases."""
    def normalisation(name, size, batchnorm):
        statistics = {"running_mean": (size,), "running_var": (size,), "num_batches_tracked": ()} if batchnorm else {}
        return {f"{name}.{part}": shape for part, shape in ({"weight": (size,), "bias": (size,)} | statistics).items()}

    def layer(name, *shape):
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes = {**normalisation("embed.norm", 5, True), **layer("embed.conv1", channels, 5, 1),
              **normalisation("embed.conv2.0", 5, True), "embed.conv2.1.weight": (channels, 5, 1, 1),
              **normalisation("embed.conv2.2", channels, True), "embed.conv2.4.weight": (channels, channels, 1, 1),
              **layer("embed.final", channels, 2 * channels, 1)}
    for i in range(depth):
        for mix, convolution in ((f"waffleiron.channel_mix.{i}", "mlp"), (f"waffleiron.spatial_mix.{i}", "ffn")):
            kernel = (channels, channels, 1) if convolution == "mlp" else (channels, 1, 3, 3)
            shapes |= {**normalisation(f"{mix}.norm", channels, norm == "batchnorm"), f"{mix}.scale.weight": (channels, 1, 1),
                       **layer(f"{mix}.{convolution}.0", *kernel), **layer(f"{mix}.{convolution}.2", *kernel)}
    return shapes | {"linear": layer("classif", out, channels, 1),
                     "batchnorm": {**normalisation("classif.0", channels, True), **layer("classif.1", out, channels, 1)},
                     "mlp": {**layer("classif.0", hidden, channels, 1), **layer("classif.2", out, hidden, 1)}}[head]


def released_weights(norm, head, **sizes):
    """Random weights and statistics of these names and shapes."""
    weights = {name: torch.randn(shape) for name, shape in released_shapes(norm, head, **sizes).items()}
    return weights | {name: value.exp() for name, value in weights.items() if name.endswith("running_var")} | {
        name: torch.tensor(1234) for name in weights if name.endswith("num_batches_tracked")}


def by_hand(weights, activation, cloud):
    """Features [C, N] and outputs [Cout, N] of one cloud: the paper's layers from the released tensors, on whole planes."""
    feats, cells, neighbors, _ = cloud

    def normalise(x, name):     # [1, C, ...]
        weight, bias = weights[name + ".weight"], weights[name + ".bias"]
        if name + ".running_mean" in weights:
            return F.batch_norm(x, weights[name + ".running_mean"], weights[name + ".running_var"], weight, bias)
        return F.layer_norm(x.transpose(1, 2), weight.shape, weight, bias).transpose(1, 2)

    def convolve(function, x, name, **options):
        return function(x, weights[name + ".weight"], weights.get(name + ".bias"), **options)
    x = normalise(feats.T[None], "embed.norm")                                          # [1, 5, N]
    edges = normalise(x[:, :, neighbors] - x[..., None], "embed.conv2.0")               # [1, 5, N, K]
    edges = F.relu(normalise(convolve(F.conv2d, edges, "embed.conv2.1"), "embed.conv2.2"))
    nearby = convolve(F.conv2d, edges, "embed.conv2.4").amax(3)                         # [1, C, N]
    x = convolve(F.conv1d, torch.cat([convolve(F.conv1d, x, "embed.conv1"), nearby], 1), "embed.final")
    for i in range(sum(name.endswith("ffn.0.weight") for name in weights)):
        mix, (height, width), place = f"waffleiron.spatial_mix.{i}", GRIDS[i % 3], cells[i % 3]
        y = normalise(x, f"{mix}.norm")
        plane = x.new_zeros(1, x.shape[1], height * width)
        for cell in place.unique():
            plane[..., cell] = y[..., place == cell].mean(2)
        plane, options = plane.unflatten(2, (height, width)), dict(padding=1, groups=x.shape[1])
        plane = activation(convolve(F.conv2d, plane, f"{mix}.ffn.0", **options))
        plane = convolve(F.conv2d, plane, f"{mix}.ffn.2", **options)
        x = x + weights[f"{mix}.scale.weight"].squeeze(2) * plane.flatten(2)[..., place]
        mix = f"waffleiron.channel_mix.{i}"
        y = activation(convolve(F.conv1d, normalise(x, f"{mix}.norm"), f"{mix}.mlp.0"))
        x = x + weights[f"{mix}.scale.weight"].squeeze(2) * convolve(F.conv1d, y, f"{mix}.mlp.2")
    if "classif.2.weight" in weights:
        output = convolve(F.conv1d, F.relu(convolve(F.conv1d, x, "classif.0")), "classif.2")
    elif "classif.1.weight" in weights:
        output = convolve(F.conv1d, normalise(x, "classif.0"), "classif.1")
    else:
        output = convolve(F.conv1d, x, "classif")
    return x[0], output[0]


@every_variant
def test_features_and_outputs_are_those_computed_by_hand(norm, head):
    weights, cloud = released_weights(norm, head), random_cloud(40)
    model = from_released(weights, GRIDS).double().eval()
    weights = {name: value.double() for name, value in weights.items()}
    cloud = (cloud[0].double(), *cloud[1:])
    activations = {"relu": F.relu, "gelu": F.gelu, "tanh": functools.partial(F.gelu, approximate="tanh")}
    features, output = by_hand(weights, activations.pop("gelu" if head == "mlp" else "relu"), cloud)
    exact = dict(rtol=1e-6, atol=1e-6)              # a point's share of its cell's mean is in float32
    torch.testing.assert_close(model.features(*cloud), features.T, **exact)
    torch.testing.assert_close(model(*cloud), output.T, **exact)
    for other in activations.values():              # the comparison tells them apart
        assert not torch.allclose(by_hand(weights, other, cloud)[0], features, rtol=1e-4, atol=1e-4)


@every_variant
@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_weights_go_in_and_out_unchanged(norm, head, prefix):
    weights = released_weights(norm, head)
    model = from_released({prefix + name: value for name, value in weights.items()}, GRIDS)
    assert model.spec == SMALL | dict(in_channels=5, norm=norm, head=head, hidden=10 if head == "mlp" else 2048,
                                      activation="gelu" if head == "mlp" else "relu", drop_path=0.2 if head == "mlp" else 0.0)
    for loaded in (model, WaffleIron(**model.spec)):
        assert {name: tuple(value.shape) for name, value in to_released(loaded).items()} == released_shapes(norm, head)
    back = to_released(model)
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in weights.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_float32(dtype):
    weights = {name: value.to(dtype) if value.is_floating_point() else value
               for name, value in released_weights("layernorm", "batchnorm").items()}
    back = to_released(from_released(weights))
    assert all(value.dtype in (torch.float32, torch.int64) for value in back.values())
    assert all(torch.equal(back[name], value.to(back[name].dtype)) for name, value in weights.items())


@every_variant
@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_files_are_loaded(norm, head, prefix, tmp_path):
    weights = released_weights(norm, head)
    state = {prefix + name: value for name, value in weights.items()}
    beside = {"optim": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "scheduler": {"last_epoch": 3},
              "scaler": {"scale": 65536.0}, "epoch": 44, "best_miou": np.float64(0.776)}
    torch.save({"model_point": state, "epoch": 48}, tmp_path / "model.pth")
    torch.save({"model_points": state}, tmp_path / "other.pth")
    (tmp_path / "folder").mkdir()
    torch.save({"net": state} | beside, tmp_path / "folder" / "ckpt_last.pth")
    for path in ("model.pth", "", "other.pth", "folder", "folder/ckpt_last.pth"):
        model, checkpoint = load_waffleiron(tmp_path / path)
        assert checkpoint == {} and (model.spec["norm"], model.spec["head"]) == (norm, head)
        assert model.spec["grids"] == ((256, 256), (256, 32), (256, 32))
        back = to_released(model)
        assert back.keys() == weights.keys() and all(torch.equal(back[name], value) for name, value in weights.items())


class Malicious:
    """Pickled, it is a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_wrong_released_files_are_named(tmp_path):
    weights = released_weights("layernorm", "mlp")
    torch.save({"net": weights, "best_miou": Malicious(str(tmp_path / "pwned"))}, tmp_path / "malicious.pth")
    with pytest.raises(InputError, match=r"malicious.pth: .*mkdir.*could run code"):
        load_waffleiron(tmp_path / "malicious.pth")
    assert not (tmp_path / "pwned").exists()
    short = {name: value for name, value in weights.items() if "channel_mix.1." not in name}
    torch.save({"net": short}, tmp_path / "short.pth")
    with pytest.raises(InputError) as error:
        load_waffleiron(tmp_path / "short.pth")
    assert str(error.value).startswith(f"{tmp_path / 'short.pth'}: not the weights of a published WaffleIron")
    assert str(error.value).count("missing waffleiron.channel_mix.1.") == 5 and str(error.value).endswith(" and 2 more")
    for net in ([], {}, {7: torch.zeros(1)}, {"fc.weight": torch.zeros(10, 3)}, weights | {"extra": torch.zeros(1)},
                weights | {"classif.1.weight": torch.zeros(6, 8, 1)}, weights | {"classif.2.weight": torch.zeros(6, 10)},
                weights | {"classif.0.weight": torch.zeros(9, 8, 1)}):
        torch.save({"net": net}, tmp_path / "other.pth")
        with pytest.raises(InputError, match="other.pth: not the weights of a published WaffleIron"):
            load_waffleiron(tmp_path / "other.pth")


# ---- weights and checkpoints ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_weights_go_in_and_out_unchanged(norm, prefix):
    state = load_golden(HERE / "golden" / f"portable_{norm}.pt")["state_dict"]
    back = to_released(from_released({prefix + name: value for name, value in state.items()}))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_names_and_shapes_of_the_released_scalr_model():
    path = SHARED / "scalr_wi768_vitl14_state_dict.txt"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    lines = (line.split(" ", 1) for line in path.read_text().splitlines())
    expected = {name: tuple(map(int, shape.strip("()").replace(",", " ").split())) for name, shape in lines}
    assert len(expected) == 695
    assert expected == released_shapes("layernorm", "linear", channels=768, depth=48, out=1024)
    with torch.device("meta"):
        model = WaffleIron(out_channels=1024)
    assert {name: tuple(value.shape) for name, value in to_released(model).items()} == expected
    loaded = from_released({name: torch.zeros(()).expand(shape) for name, shape in expected.items()})
    assert loaded.spec == model.spec


@pytest.mark.parametrize("channels, norm, out_channels, parameters", [
    (768, "layernorm", 384, 59_730_836), (768, "layernorm", 768, 60_026_132), (768, "layernorm", 1024, 60_222_996),
    (768, "layernorm", 1536, 60_616_724), (96, "batchnorm", 384, 1_080_020), (256, "batchnorm", 384, 6_934_420),
    (384, "batchnorm", 384, 15_267_476)])
def test_number_of_parameters(channels, norm, out_channels, parameters):
    with torch.device("meta"):
        model = WaffleIron(channels=channels, norm=norm, out_channels=out_channels)
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == parameters


def test_defaults_are_the_papers():
    with torch.device("meta"):
        assert WaffleIron().spec == dict(in_channels=5, channels=768, depth=48, out_channels=384, norm="layernorm",
                                         grids=((256, 256), (256, 32), (256, 32)), drop_path=0.0, activation="relu",
                                         head="linear", hidden=2048)


def test_weights_that_do_not_fit_are_named():
    state = to_released(WaffleIron(**SMALL))
    wrong = {name: value for name, value in state.items() if "spatial_mix.1.norm" not in name}
    wrong |= {"extra.weight": torch.zeros(1), "classif.bias": torch.zeros(7), "embed.final.bias": "text"}
    with pytest.raises(InputError) as error:
        from_released(wrong, GRIDS)
    for part in ("missing waffleiron.spatial_mix.1.norm.weight", "missing waffleiron.spatial_mix.1.norm.bias",
                 "unexpected extra.weight", "classif.bias has shape (7,) instead of (6,)", "embed.final.bias"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"unexpected b; .* and 2 more$"):
        from_released(state | dict.fromkeys("abcdefg", torch.zeros(1)), GRIDS)
    half_a_head = {name.replace("classif", "classif.0"): value for name, value in state.items()}
    for other in (half_a_head, {}, [], {"model_point": state}, state | {"embed.conv1.weight": torch.zeros(8, 5)}):
        with pytest.raises(InputError, match="^state_dict: not the weights .*(there are|this is a list)"):
            from_released(other, GRIDS)


def test_checkpoint_loads_from_file_and_folder(tmp_path):
    model = WaffleIron(**SMALL, norm="batchnorm", drop_path=0.1, activation="gelu", head="mlp", hidden=9)
    ours = {"kind": "point_encoder", "waffleiron": model.spec, "model": model.state_dict(), "step": 7}
    torch.save(ours, tmp_path / "last.pth")
    torch.save({"model_point": released_weights("layernorm", "linear")}, tmp_path / "model.pth")
    for path in (tmp_path, str(tmp_path / "last.pth")):     # the run's own checkpoint goes before a released one
        loaded, checkpoint = load_waffleiron(path)
        assert loaded.spec == model.spec and checkpoint["step"] == 7
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    spec = json.loads(json.dumps(model.spec))       # a log or another program gives lists for tuples
    assert WaffleIron(**spec).spec == model.spec


def test_checkpoints_from_before_activation_and_head_load(tmp_path):
    both, batchnorm = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    parts = {"embed.norm": batchnorm, "embed.point": both, "embed.edges.0": batchnorm, "embed.edges.1": ("weight",),
             "embed.edges.2": batchnorm, "embed.edges.4": ("weight",), "embed.final": both, "head": both,
             "spatial_mix.0": ("scale",), "spatial_mix.0.norm": both, "spatial_mix.0.ffn.0": both, "spatial_mix.0.ffn.2": both,
             "channel_mix.0": ("scale",), "channel_mix.0.norm": both, "channel_mix.0.mlp.0": both, "channel_mix.0.mlp.2": both}
    names = {f"{module}.{part}" for module, of_module in parts.items() for part in of_module}
    spec = dict(in_channels=5, channels=8, depth=1, out_channels=6, norm="layernorm", grids=GRIDS, drop_path=0.0)
    state = WaffleIron(**spec).state_dict()
    assert state.keys() == names and state["head.weight"].shape == (6, 8)
    torch.save({"kind": "point_encoder", "waffleiron": spec, "model": state}, tmp_path / "last.pth")
    model, _ = load_waffleiron(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    cloud = random_cloud(9)
    torch.testing.assert_close(model.eval()(*cloud), by_hand(to_released(model), F.relu, cloud)[1].T)


def test_wrong_checkpoints_are_named(tmp_path):
    model = WaffleIron(**SMALL)
    ours = {"kind": "point_encoder", "waffleiron": model.spec, "model": model.state_dict()}
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    for file, content, message in (
            ("plain", model.state_dict(), "not a stage-1 checkpoint, nor released.*'embed.norm.weight'.*stage1.py"),
            ("tensor", torch.zeros(3), "not a stage-1 checkpoint, nor released.*holds a Tensor.*stage1.py"),
            ("nothing", {}, "not a stage-1 checkpoint, nor released.*holds a dict.*stage1.py"),
            ("image", ours | {"kind": "image_encoder"}, "kind image_encoder, but point_encoder is needed.*stage1.py"),
            ("probe", ours | {"kind": "probe"}, "kind probe, but point_encoder is needed.*stage1.py"),
            ("stranger", ours | {"kind": 7}, "not a checkpoint of this project.*stage1.py"),
            ("no_arguments", {"kind": "point_encoder", "model": ours["model"]}, "KeyError: 'waffleiron'.*stage1.py"),
            ("norm", ours | {"waffleiron": model.spec | {"norm": "none"}}, "norm is 'none'.*stage1.py"),
            ("argument", ours | {"waffleiron": model.spec | {"color": 1}}, "color.*stage1.py"),
            ("number", ours | {"model": 7}, "TypeError.*stage1.py"),
            ("depth", ours | {"waffleiron": model.spec | {"depth": 2}}, "stage1.py: unexpected spatial_mix.2.scale.* 9 more$"),
            ("head", ours | {"waffleiron": model.spec | {"head": "batchnorm"}}, "stage1.py: missing head.0.weight"),
            ("text", None, "torch.load cannot read it"), ("missing", None, "no such file")):
        path = tmp_path / f"{file}.pth"
        if content is not None:
            torch.save(content, path)
        with pytest.raises(InputError, match=f"^{path}: .*{message}") as error:
            load_waffleiron(path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="empty/last.pth: no such file"):
        load_waffleiron(tmp_path / "empty")


@pytest.mark.parametrize("wrong", [{"norm": "groupnorm"}, {"activation": "swish"}, {"head": "conv"}])
def test_another_norm_activation_or_head_is_refused(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is '{value}', not one of "):
        WaffleIron(**wrong)


# ---- ragged batches and cropped planes ------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_a_cloud_in_a_batch_is_as_alone(norm):
    clouds = [random_cloud(30), random_cloud(7, (0.0, 0.5), (0.3, 1.0)), random_cloud(50, (0.5, 0.0))]
    model = WaffleIron(**SMALL, norm=norm).double().eval()
    clouds = [(feats.double(), *rest) for feats, *rest in clouds]
    together, alone = model(*collate(clouds)), torch.cat([model(*cloud) for cloud in clouds])
    torch.testing.assert_close(together, alone)
    assert (together - together.mean(0)).abs().max() > 0.1


def test_the_order_of_the_rows_does_not_matter():
    feats, cells, neighbors, batch = collate([random_cloud(30), random_cloud(20, (0.0, 0.5), (0.3, 1.0))])
    model = WaffleIron(**SMALL).double().eval()
    order = torch.randperm(len(feats))
    shuffled = model(feats[order].double(), cells[:, order], order.argsort()[neighbors[order]], batch[order])
    torch.testing.assert_close(shuffled, model(feats.double(), cells, neighbors, batch)[order])


BOXES = {"corners": [((0, 0), (.3, .3)), ((0, .7), (.3, 1)), ((.7, 0), (1, .3)), ((.7, .7), (1, 1))],
         "borders": [((0, .3), (.3, .6)), ((.4, 0), (.6, .5)), ((.7, .4), (1, .7)), ((.4, .7), (.6, 1))],
         "next to the border": [((.06, .15), (.9, .8)), ((.3, .3), (.95, .9))],
         "different extents": [((0, 0), (1, .3)), ((.9, .9), (1, 1)), ((.4, .4), (.6, .6)), ((0, .5), (.2, 1))],
         "one cell": [((0, 0), (.01, .01)), ((.99, .99), (1, 1)), ((.5, .5), (.5, .5))],
         "the whole grid": [((0, 0), (1, 1)), ((.5, .5), (.7, .7))]}


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
def test_cropped_planes_give_the_same_as_whole_ones(boxes):
    feats, *rest = collate([random_cloud(25, low, high) for low, high in boxes])
    model = WaffleIron(**SMALL).double().eval()
    results = []
    for crop in (True, False):
        model.crop = crop
        x = feats.double().requires_grad_()
        output = model(x, *rest)
        results.append((output, *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


def test_windows_are_no_larger_than_needed():
    # On a grid of 100 x 40: cloud 0 has rows 10 to 14 and columns 0 to 3, cloud 1 row 99 and columns 38 and 39.
    cells = torch.tensor([10 * 40 + 0, 14 * 40 + 3, 14 * 40 + 3, 99 * 40 + 38, 99 * 40 + 39])
    batch = torch.tensor([0, 0, 0, 1, 1])
    window = plan_window(cells, batch, 2, (100, 40))
    assert window.shape == (2, 7, 6)        # 5 rows and 4 columns, and one more on each side
    assert window.weight.flatten().tolist() == [1, 0.5, 0.5, 1, 1]
    assert plan_window(cells, batch, 2, (100, 40), crop=False).shape == (2, 100, 40)


@pytest.mark.parametrize("cell", [-1, 24 * 20])
def test_cells_outside_the_grid_are_refused(cell):
    feats, cells, neighbors, batch = random_cloud(10)
    cells[0, 3] = cell
    with pytest.raises(ValueError, match="axis of 24 cells"):
        WaffleIron(**SMALL)(feats, cells, neighbors, batch)


# ---- training -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("head", ["linear", "batchnorm", "mlp"])
def test_features_are_what_the_head_reads(head):
    model, cloud = WaffleIron(**SMALL, head=head).eval(), random_cloud(10)
    assert model.features(*cloud).shape == (10, 8)
    torch.testing.assert_close(model.head(model.features(*cloud)), model(*cloud))


def test_bfloat16_autocast_keeps_the_residual_stream_in_float32():
    model, cloud = WaffleIron(**SMALL).eval(), random_cloud(200)
    expected, streams = model(*cloud), []
    for block in (*model.spatial_mix, *model.channel_mix):
        block.register_forward_pre_hook(lambda block, arguments: streams.append(arguments[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(*cloud)
        assert model.features(*cloud).dtype == torch.float32
    assert output.dtype == torch.bfloat16
    assert set(streams) == {torch.float32}
    assert (output.float() - expected).norm() < 0.02 * expected.norm()      # bfloat16 rounds to 0.4 %


class SumDtypes(TorchDispatchMode):
    """Notes in which dtype rows are summed by index, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.index_add, torch.ops.aten.index_add_):
            self.seen.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_bfloat16_autocast_sums_cells_in_float32():
    # Not seen in numbers on the CPU, whose bfloat16 index_add may sum in float32 inside; on a GPU such a sum stops
    # growing after some hundred points.
    block, (_, cells, _, batch) = WaffleIron(**SMALL).spatial_mix[0], random_cloud(20)
    window = plan_window(cells[0], batch, 1, GRIDS[0])
    with SumDtypes() as sums:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = block(torch.randn(20, 8), window)
        output.sum().backward()
    assert sums.seen == [torch.float32, torch.float32]      # points to plane, and the gradient of plane to points


@pytest.mark.parametrize("silenced", ["spatial_mix", "channel_mix"])
def test_drop_path_drops_whole_clouds(silenced):
    size, clouds = 6, 200
    inputs = collate([random_cloud(size) for _ in range(clouds)])
    model = WaffleIron(**SMALL | {"depth": 1}, drop_path=0.25)
    with torch.no_grad():
        getattr(model, silenced)[0].scale.zero_()       # the other branch alone is left
        model.eval()
        whole = model.features(*inputs)
        stem = model.embed(inputs[0], inputs[2])
        model.train()
        model.embed.eval()                              # BatchNorm as before
        factor = ((model.features(*inputs) - stem) / (whole - stem)).view(clouds, size, -1)
    for cloud in factor:
        assert torch.allclose(cloud, cloud[0, 0].round(decimals=2), atol=0.02)
    kept = factor[:, 0, 0] > 0.5
    assert factor[:, 0, 0][kept].mean().item() == pytest.approx(1 / 0.75, abs=0.01)
    assert 130 <= kept.sum() <= 170                     # of 200; 150 expected, standard deviation 6


def test_deep_random_model_is_alive_and_trains():
    model = WaffleIron(channels=16, depth=48, out_channels=4, grids=GRIDS)
    cloud = random_cloud(60)
    features = model.features(*cloud)
    assert features.isfinite().all()
    assert 0.1 < features.std(0).mean() < 10            # the points are still told apart
    assert (features - model.embed(cloud[0], cloud[2])).std() > 0.1      # and the blocks do something
    target = torch.randn(60, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(30):
        loss = (model(*cloud) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert step or all(value.grad.isfinite().all() and value.grad.any() for value in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- several processes ----------------------------------------------------------------------------------------------

def test_batchnorm_is_torchs_own_with_one_process():
    ours, theirs = BatchNorm(4), torch.nn.BatchNorm1d(4)
    for _ in range(3):
        x = 5 + torch.randn(20, 4)
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def run_model(inputs):
    """Two training steps' worth of statistics, then outputs and gradients; the same model in every process."""
    torch.manual_seed(1)
    model = WaffleIron(**SMALL, norm="batchnorm")
    feats, *rest = inputs
    model(feats + 1, *rest)
    feats = feats.clone().requires_grad_()
    output = model(feats, *rest)
    (output ** 3).sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    return output.detach(), feats.grad, gradients, dict(model.named_buffers()), model.eval()(*inputs).detach()


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(run_model(torch.load(f"{folder}/{rank}.pt")), f"{folder}/result{rank}.pt")
    dist.destroy_process_group()


def test_batchnorm_of_two_processes_is_that_of_one(tmp_path):
    clouds = [random_cloud(30), random_cloud(18)]       # unequal: a mean of the processes' means would be wrong
    for rank, (feats, *_) in enumerate(clouds):
        feats += 1000 + rank                            # far from 0: E[x²] - E[x]² in float32 would be wrong
        torch.save(clouds[rank], tmp_path / f"{rank}.pt")
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"result{rank}.pt") for rank in range(2)]
    output, feats_grad, gradients, buffers, output_eval = run_model(collate(clouds))

    def same(ours, expected):
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3 * expected.abs().max().item() + 1e-5)
    same(torch.cat([rank[0] for rank in ranks]), output)
    same(torch.cat([rank[1] for rank in ranks]), feats_grad)
    for name, gradient in gradients.items():
        same(ranks[0][2][name] + ranks[1][2][name], gradient)
    for rank in ranks:
        assert rank[3].keys() == buffers.keys()
        for name, buffer in buffers.items():
            same(rank[3][name].double(), buffer.double())
    same(torch.cat([rank[4] for rank in ranks]), output_eval)

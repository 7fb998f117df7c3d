"""WaffleIron's weights in and out: the releases' names, files and heads, and stage 1's checkpoints."""
import functools
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from errors import InputError
from test_waffleiron import GRIDS, HERE, SHARED, SMALL, load_golden, random_cloud, seed  # noqa: F401 (seed: a fixture)
from waffleiron import WaffleIron, from_released, load_waffleiron, to_released


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

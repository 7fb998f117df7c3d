"""WaffleIron's weights in and out: the releases' names, files and heads, stage 1's checkpoints."""
import functools
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED
from waffleirons import seed  # noqa: F401 (a fixture)
from waffleirons import (GRIDS, SMALL, by_hand, in_double, load_golden, random_cloud,
                         released_shapes, released_weights, same_values, shapes_of)

from models import load_point_encoder
from plumbing.errors import InputError
from plumbing.weights import LAYOUT
from releases.scalr import from_released, to_released
from waffleiron import WaffleIron

# ---- released weights ----------------------------------------------------------------------------

# name: (norm, head)
VARIANTS = {"ScaLR": ("layernorm", "linear"), "WaffleIron": ("batchnorm", "linear"),
            "ScaLR downstream": ("layernorm", "batchnorm"), "ScaLR+": ("layernorm", "mlp"),
            "several teachers": ("layernorm", "mlp2")}
every_variant = pytest.mark.parametrize("norm, head", VARIANTS.values(), ids=VARIANTS)


@every_variant
def test_features_and_outputs_are_those_computed_by_hand(norm, head):
    weights = released_weights(norm, head)
    cloud = in_double(random_cloud(40))
    model = from_released(weights, GRIDS).double().eval()
    weights = {name: value.double() for name, value in weights.items()}

    activations = {"relu": F.relu, "gelu": F.gelu,
                   "tanh": functools.partial(F.gelu, approximate="tanh")}
    activation = activations.pop("gelu" if head == "mlp" else "relu")
    features, output = by_hand(weights, activation, cloud)
    exact = dict(rtol=1e-6, atol=1e-6)  # a point's share of its cell's mean is in float32
    torch.testing.assert_close(model.features(cloud), features.T, **exact)
    torch.testing.assert_close(model(cloud), output.T, **exact)

    # the comparison tells the activations apart
    for other in activations.values():
        wrong, _ = by_hand(weights, other, cloud)
        assert not torch.allclose(wrong, features, rtol=1e-4, atol=1e-4)


@every_variant
@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_weights_go_in_and_out_unchanged(norm, head, prefix):
    weights = released_weights(norm, head)
    model = from_released({prefix + name: value for name, value in weights.items()}, GRIDS)
    if head == "mlp":
        by_head = dict(hidden=10, activation="gelu", drop_path=0.2)
    else:
        by_head = dict(hidden=2048, activation="relu", drop_path=0.0)
    assert model.spec == SMALL | dict(in_channels=5, norm=norm, head=head) | by_head
    for loaded in (model, WaffleIron(**model.spec)):
        assert shapes_of(to_released(loaded)) == released_shapes(norm, head)
    back = to_released(model)
    assert same_values(back, weights)
    assert all(back[name].dtype == value.dtype for name, value in weights.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_float32(dtype):
    weights = released_weights("layernorm", "batchnorm")
    for name, value in weights.items():
        if value.is_floating_point():
            weights[name] = value.to(dtype)
    back = to_released(from_released(weights))
    assert all(value.dtype in (torch.float32, torch.int64) for value in back.values())
    for name, value in weights.items():
        assert torch.equal(back[name], value.to(back[name].dtype))


@every_variant
@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_files_are_loaded(norm, head, prefix, tmp_path):
    weights = released_weights(norm, head)
    state = {prefix + name: value for name, value in weights.items()}

    # the releases' file names and keys, and what else stands in the files
    torch.save({"model_point": state, "epoch": 48}, tmp_path / "model.pth")
    torch.save({"model_points": state}, tmp_path / "other.pth")
    beside = {"optim": {"state": {}, "param_groups": [{"lr": 1e-3}]},
              "scheduler": {"last_epoch": 3}, "scaler": {"scale": 65536.0},
              "epoch": 44, "best_miou": np.float64(0.776)}
    (tmp_path / "folder").mkdir()
    torch.save({"net": state} | beside, tmp_path / "folder" / "ckpt_last.pth")

    for path in ("model.pth", "", "other.pth", "folder", "folder/ckpt_last.pth"):
        model, checkpoint = load_point_encoder(tmp_path / path)
        assert checkpoint == {} and (model.spec["norm"], model.spec["head"]) == (norm, head)
        assert model.spec["grids"] == ((256, 256), (256, 32), (256, 32))
        back = to_released(model)
        assert back.keys() == weights.keys() and same_values(back, weights)


class Malicious:
    """Pickled, it is a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_wrong_released_files_are_named(tmp_path):
    weights = released_weights("layernorm", "mlp")

    # a pickle that would run code
    malicious = Malicious(str(tmp_path / "pwned"))
    torch.save({"net": weights, "best_miou": malicious}, tmp_path / "malicious.pth")
    with pytest.raises(InputError, match=r"malicious.pth: .*mkdir.*could run code"):
        load_point_encoder(tmp_path / "malicious.pth")
    assert not (tmp_path / "pwned").exists()

    # a layer is missing
    path = tmp_path / "short.pth"
    short = {name: value for name, value in weights.items() if "channel_mix.1." not in name}
    torch.save({"net": short}, path)
    with pytest.raises(InputError) as error:
        load_point_encoder(path)
    message = str(error.value)
    assert message.startswith(f"{path}: not the weights of a published WaffleIron")
    assert message.count("missing waffleiron.channel_mix.1.") == 5
    assert message.endswith(" and 2 more")

    # other things than these weights
    for net in ([], {}, {7: torch.zeros(1)}, {"fc.weight": torch.zeros(10, 3)},
                weights | {"extra": torch.zeros(1)},
                weights | {"classif.1.weight": torch.zeros(6, 8, 1)},
                weights | {"classif.2.weight": torch.zeros(6, 10)},
                weights | {"classif.0.weight": torch.zeros(9, 8, 1)}):
        torch.save({"net": net}, tmp_path / "other.pth")
        message = "other.pth: not the weights of a published WaffleIron"
        with pytest.raises(InputError, match=message):
            load_point_encoder(tmp_path / "other.pth")


# ---- weights and checkpoints ---------------------------------------------------------------------

@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_weights_go_in_and_out_unchanged(norm, prefix):
    state = load_golden(ROOT / f"tests/golden/portable_{norm}.pt")["state_dict"]
    back = to_released(from_released({prefix + name: value for name, value in state.items()}))
    assert back.keys() == state.keys() and same_values(back, state)


def test_names_and_shapes_of_the_released_scalr_model():
    path = SHARED / "golden/scalr_wi768_vitl14_state_dict.txt"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    expected = {}
    for line in path.read_text().splitlines():
        name, shape = line.split(" ", 1)  # such as "embed.norm.weight (5,)"
        expected[name] = tuple(map(int, shape.strip("()").replace(",", " ").split()))
    assert len(expected) == 695
    assert expected == released_shapes("layernorm", "linear", channels=768, depth=48, out=1024)
    with torch.device("meta"):
        model = WaffleIron(out_channels=1024)
    assert shapes_of(to_released(model)) == expected
    zeros = {name: torch.zeros(()).expand(shape) for name, shape in expected.items()}
    loaded = from_released(zeros)
    assert loaded.spec == model.spec


def test_names_and_shapes_of_the_released_scalr_plus_model():
    """768 wide and 48 deep, LayerNorm in all blocks, a head 768 -> 2048 -> 1024."""
    expected = released_shapes("layernorm", "mlp", channels=768, depth=48, hidden=2048, out=1024)
    assert len(expected) == 697 and expected["classif.2.weight"] == (1024, 2048, 1)
    loaded = from_released({name: torch.zeros(()).expand(shape)
                            for name, shape in expected.items()})
    with torch.device("meta"):
        model = WaffleIron(out_channels=1024, activation="gelu", drop_path=0.2, head="mlp")
    assert loaded.spec == model.spec and shapes_of(to_released(model)) == expected


@pytest.mark.parametrize("channels, norm, out_channels, parameters", [
    (768, "layernorm", 384, 59_730_836), (768, "layernorm", 768, 60_026_132),
    (768, "layernorm", 1024, 60_222_996), (768, "layernorm", 1536, 60_616_724),
    (96, "batchnorm", 384, 1_080_020), (256, "batchnorm", 384, 6_934_420),
    (384, "batchnorm", 384, 15_267_476)])
def test_number_of_parameters(channels, norm, out_channels, parameters):
    with torch.device("meta"):
        model = WaffleIron(channels=channels, norm=norm, out_channels=out_channels)
    trained = [value.numel() for value in model.parameters() if value.requires_grad]
    assert sum(trained) == parameters


def test_defaults_are_the_papers():
    with torch.device("meta"):
        model = WaffleIron()
    assert model.spec == dict(
        in_channels=5, channels=768, depth=48, out_channels=384, norm="layernorm",
        grids=((256, 256), (256, 32), (256, 32)), drop_path=0.0, activation="relu",
        head="linear", hidden=2048)


def test_weights_that_do_not_fit_are_named():
    state = to_released(WaffleIron(**SMALL))

    # each thing that is wrong is named, in one line
    wrong = {name: value for name, value in state.items() if "spatial_mix.1.norm" not in name}
    wrong["extra.weight"] = torch.zeros(1)
    wrong["classif.bias"] = torch.zeros(7)
    wrong["embed.final.bias"] = "text"
    with pytest.raises(InputError) as error:
        from_released(wrong, GRIDS)
    for part in ("missing waffleiron.spatial_mix.1.norm.weight",
                 "missing waffleiron.spatial_mix.1.norm.bias", "unexpected extra.weight",
                 "classif.bias has shape (7,) instead of (6,)", "embed.final.bias"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)

    # but not more than five things
    with pytest.raises(InputError, match=r"unexpected b; .* and 2 more$"):
        from_released(state | dict.fromkeys("abcdefg", torch.zeros(1)), GRIDS)

    # no WaffleIron at all
    half_a_head = {name.replace("classif", "classif.0"): value for name, value in state.items()}
    flat = state | {"embed.conv1.weight": torch.zeros(8, 5)}
    message = "^state_dict: not the weights .*(there are|this is a list)"
    for other in (half_a_head, {}, [], {"model_point": state}, flat):
        with pytest.raises(InputError, match=message):
            from_released(other, GRIDS)


def test_checkpoint_loads_from_file_and_folder(tmp_path):
    model = WaffleIron(**SMALL, norm="batchnorm", drop_path=0.1, activation="gelu", head="mlp",
                       hidden=9)
    ours = {"kind": "point_encoder", "backbone": "waffleiron", "spec": model.spec,
            "model": model.state_dict(), "step": 7}
    torch.save(ours, tmp_path / "last.pth")
    torch.save({"model_point": released_weights("layernorm", "linear")}, tmp_path / "model.pth")
    for path in (tmp_path, str(tmp_path / "last.pth")):
        # the run's own checkpoint goes before a released one
        loaded, checkpoint = load_point_encoder(path)
        assert loaded.spec == model.spec and checkpoint["step"] == 7
        assert same_values(loaded.state_dict(), model.state_dict())

    # a log or another program gives lists for tuples
    spec = json.loads(json.dumps(model.spec))
    assert WaffleIron(**spec).spec == model.spec


def test_a_spec_without_activation_and_head_loads(tmp_path):
    # the names of the parameters when there were neither, which are those of now
    both = ("weight", "bias")
    batchnorm = (*both, "running_mean", "running_var", "num_batches_tracked")
    parts = {"embed.norm": batchnorm, "embed.point": both, "embed.edges.0": batchnorm,
             "embed.edges.1": ("weight",), "embed.edges.2": batchnorm, "embed.edges.4": ("weight",),
             "embed.final": both, "head": both,
             "spatial_mix.0": ("scale",), "spatial_mix.0.norm": both,
             "spatial_mix.0.ffn.0": both, "spatial_mix.0.ffn.2": both,
             "channel_mix.0": ("scale",), "channel_mix.0.norm": both,
             "channel_mix.0.mlp.0": both, "channel_mix.0.mlp.2": both}
    names = set()
    for module, of_module in parts.items():
        names |= {f"{module}.{part}" for part in of_module}
    spec = dict(in_channels=5, channels=8, depth=1, out_channels=6, norm="layernorm", grids=GRIDS,
                drop_path=0.0)
    state = WaffleIron(**spec).state_dict()
    assert state.keys() == names and state["head.weight"].shape == (6, 8)
    checkpoint = {"kind": "point_encoder", "backbone": "waffleiron", "spec": spec, "model": state}
    torch.save(checkpoint, tmp_path / "last.pth")
    model, _ = load_point_encoder(tmp_path)
    assert same_values(model.state_dict(), state)

    # what it computes is what it computed then
    cloud = random_cloud(9)
    _, output = by_hand(to_released(model), F.relu, cloud)
    torch.testing.assert_close(model.eval()(cloud), output.T)


def test_wrong_checkpoints_are_named(tmp_path):
    model = WaffleIron(**SMALL)
    ours = {"kind": "point_encoder", "backbone": "waffleiron", "spec": model.spec,
            "model": model.state_dict(), "layout": LAYOUT}
    of_run = {"args": {"precision": None}}
    earlier = {"kind": "point_encoder", "waffleiron": model.spec, "model": model.state_dict()}
    neither = "not a stage-1 checkpoint, nor released"

    def with_spec(**changes):
        return ours | {"spec": model.spec | changes}
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    for file, content, message in (
            ("plain", model.state_dict(), f"{neither}.*'embed.norm.weight'.*stage1.py"),
            ("tensor", torch.zeros(3), f"{neither}.*holds a Tensor.*stage1.py"),
            ("nothing", {}, f"{neither}.*holds a dict.*stage1.py"),
            ("image", ours | {"kind": "image_encoder"},
             "kind image_encoder, but point_encoder is needed.*stage1.py"),
            ("probe", ours | {"kind": "probe"},
             "kind probe, but point_encoder is needed.*stage1.py"),
            ("stranger", ours | {"kind": 7}, "not a checkpoint of this project.*stage1.py"),
            ("no_backbone", {"kind": "point_encoder", "model": ours["model"]},
             "KeyError: 'backbone'.*stage1.py"),
            ("other_backbone", ours | {"backbone": "no_such"}, "no no_such.py.*stage1.py"),
            ("no_arguments", {name: ours[name] for name in ("kind", "backbone", "model")},
             "KeyError: 'spec'.*stage1.py"),
            ("earlier", earlier | of_run, "written by an earlier version.*stage1.py"),
            ("layout", ours | of_run | {"layout": 1}, "written by an earlier version.*stage1.py"),
            ("norm", with_spec(norm="none"), "norm is 'none'.*stage1.py"),
            ("argument", with_spec(color=1), "color.*stage1.py"),
            ("number", ours | {"model": 7}, "TypeError.*stage1.py"),
            ("depth", with_spec(depth=2), "stage1.py: unexpected spatial_mix.2.scale.* 9 more$"),
            ("head", with_spec(head="batchnorm"), "stage1.py: missing head.0.weight"),
            ("text", None, "torch.load cannot read it"), ("missing", None, "no such file")):
        path = tmp_path / f"{file}.pth"
        if content is not None:
            torch.save(content, path)
        with pytest.raises(InputError, match=f"^{path}: .*{message}") as error:
            load_point_encoder(path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="empty/last.pth: no such file"):
        load_point_encoder(tmp_path / "empty")


@pytest.mark.parametrize("name, value", [("norm", "groupnorm"), ("activation", "swish"),
                                         ("head", "conv")])
def test_another_norm_activation_or_head_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is '{value}', not one of "):
        WaffleIron(**{name: value})

"""What WaffleIron's tests share: small clouds, random released weights, and the layers by hand."""
import pytest
import torch
import torch.nn.functional as F

GRIDS = ((24, 20), (24, 8), (20, 8))
SMALL = dict(channels=8, depth=3, out_channels=6, grids=GRIDS)


def load_golden(path):
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return torch.load(path, weights_only=True)


def random_cloud(n, low=(0.0, 0.0), high=(1.0, 1.0)):
    """A batch of one cloud, which fills a box.

    The box's corners are shares of each grid's rows and columns.
    """
    cells = []
    for height, width in GRIDS:
        first = torch.tensor([int(low[0] * height), int(low[1] * width)])
        last = torch.tensor([int(high[0] * height) - 1, int(high[1] * width) - 1]).maximum(first)
        place = first + (torch.rand(n, 2) * (last - first + 1)).long()  # [N, (row, col)]
        place[0], place[1] = first, last
        cells.append(place[:, 0] * width + place[:, 1])
    neighbors = (torch.arange(n)[:, None] + torch.randint(1, n, (n, 4))) % n
    inputs = {"points": torch.randn(n, 5), "cells": torch.stack(cells, 1), "neighbors": neighbors}
    return {"inputs": inputs, "view": torch.zeros(n, dtype=torch.int64)}


def with_points(batch, points):
    """The same batch with other `points` [N, Cin]."""
    return batch | {"inputs": batch["inputs"] | {"points": points}}


def in_double(batch):
    """The same batch with its points in float64."""
    return with_points(batch, batch["inputs"]["points"].double())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- released weights ----------------------------------------------------------------------------

def released_shapes(norm, head, channels=8, depth=3, out=6, hidden=10):
    """{name: shape} of a released state dict, written out from the releases."""
    shapes = {}

    def layer(name, *shape):
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    def layernorm(name, size):
        layer(name, size)

    def batchnorm(name, size):
        layer(name, size)
        shapes[f"{name}.running_mean"] = shapes[f"{name}.running_var"] = (size,)
        shapes[f"{name}.num_batches_tracked"] = ()

    # embedding
    batchnorm("embed.norm", 5)
    layer("embed.conv1", channels, 5, 1)
    batchnorm("embed.conv2.0", 5)
    shapes["embed.conv2.1.weight"] = (channels, 5, 1, 1)
    batchnorm("embed.conv2.2", channels)
    shapes["embed.conv2.4.weight"] = (channels, channels, 1, 1)
    layer("embed.final", channels, 2 * channels, 1)

    # backbone
    block_norm = batchnorm if norm == "batchnorm" else layernorm
    for i in range(depth):
        mix = f"waffleiron.channel_mix.{i}"
        block_norm(f"{mix}.norm", channels)
        shapes[f"{mix}.scale.weight"] = (channels, 1, 1)
        layer(f"{mix}.mlp.0", channels, channels, 1)
        layer(f"{mix}.mlp.2", channels, channels, 1)
        mix = f"waffleiron.spatial_mix.{i}"
        block_norm(f"{mix}.norm", channels)
        shapes[f"{mix}.scale.weight"] = (channels, 1, 1)
        layer(f"{mix}.ffn.0", channels, 1, 3, 3)
        layer(f"{mix}.ffn.2", channels, 1, 3, 3)

    if head == "linear":
        layer("classif", out, channels, 1)
    elif head == "batchnorm":
        batchnorm("classif.0", channels)
        layer("classif.1", out, channels, 1)
    elif head == "mlp2":
        layer("classif.0", 2 * channels, channels, 1)
        layernorm("classif.1", 2 * channels)
        layer("classif.3", out, 2 * channels, 1)
    else:
        layer("classif.0", hidden, channels, 1)
        layer("classif.2", out, hidden, 1)
    return shapes


def released_weights(norm, head, **sizes):
    """Random weights and statistics of these names and shapes."""
    weights = {}
    for name, shape in released_shapes(norm, head, **sizes).items():
        value = torch.randn(shape)
        if name.endswith("running_var"):
            value = value.exp()
        if name.endswith("num_batches_tracked"):
            value = torch.tensor(1234)
        weights[name] = value
    return weights


def by_hand(weights, activation, cloud):
    """Features [C, N] and outputs [Cout, N] of one cloud.

    The paper's layers are computed from the released tensors, on whole planes.
    """
    points, cells, neighbors = (cloud["inputs"][n] for n in ("points", "cells", "neighbors"))

    def normalise(x, name):  # [1, C, ...]
        weight, bias = weights[name + ".weight"], weights[name + ".bias"]
        if name + ".running_mean" in weights:
            mean, variance = weights[name + ".running_mean"], weights[name + ".running_var"]
            return F.batch_norm(x, mean, variance, weight, bias)
        return F.layer_norm(x.transpose(1, 2), weight.shape, weight, bias).transpose(1, 2)

    def convolve(function, x, name, **options):
        return function(x, weights[name + ".weight"], weights.get(name + ".bias"), **options)

    # embedding: the point itself, and its edges to the neighbours
    x = normalise(points.T[None], "embed.norm")  # [1, 5, N]
    edges = normalise(x[:, :, neighbors] - x[..., None], "embed.conv2.0")  # [1, 5, N, K]
    edges = convolve(F.conv2d, edges, "embed.conv2.1")
    edges = F.relu(normalise(edges, "embed.conv2.2"))
    nearby = convolve(F.conv2d, edges, "embed.conv2.4").amax(3)  # [1, C, N]
    point = convolve(F.conv1d, x, "embed.conv1")  # [1, C, N]
    x = convolve(F.conv1d, torch.cat([point, nearby], 1), "embed.final")

    for i in range(sum(name.endswith("ffn.0.weight") for name in weights)):
        # spatial mixing: the mean of each cell's points, two convolutions, back to the points
        mix = f"waffleiron.spatial_mix.{i}"
        height, width = GRIDS[i % 3]
        place = cells[:, i % 3]
        y = normalise(x, f"{mix}.norm")
        plane = x.new_zeros(1, x.shape[1], height * width)
        for cell in place.unique():
            plane[..., cell] = y[..., place == cell].mean(2)
        plane = plane.unflatten(2, (height, width))
        options = dict(padding=1, groups=x.shape[1])
        plane = activation(convolve(F.conv2d, plane, f"{mix}.ffn.0", **options))
        plane = convolve(F.conv2d, plane, f"{mix}.ffn.2", **options)
        x = x + weights[f"{mix}.scale.weight"].squeeze(2) * plane.flatten(2)[..., place]

        # channel mixing
        mix = f"waffleiron.channel_mix.{i}"
        y = activation(convolve(F.conv1d, normalise(x, f"{mix}.norm"), f"{mix}.mlp.0"))
        x = x + weights[f"{mix}.scale.weight"].squeeze(2) * convolve(F.conv1d, y, f"{mix}.mlp.2")

    # head
    if "classif.3.weight" in weights:
        output = F.relu(normalise(convolve(F.conv1d, x, "classif.0"), "classif.1"))
        output = convolve(F.conv1d, output, "classif.3")
    elif "classif.2.weight" in weights:
        output = F.relu(convolve(F.conv1d, x, "classif.0"))
        output = convolve(F.conv1d, output, "classif.2")
    elif "classif.1.weight" in weights:
        output = convolve(F.conv1d, normalise(x, "classif.0"), "classif.1")
    else:
        output = convolve(F.conv1d, x, "classif")
    return x[0], output[0]


# ---- state dicts ---------------------------------------------------------------------------------

def same_values(found, expected):
    """Whether `found` has each tensor of `expected`, bit for bit."""
    return all(torch.equal(found[name], value) for name, value in expected.items())


def shapes_of(state):
    return {name: tuple(value.shape) for name, value in state.items()}

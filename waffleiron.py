"""WaffleIron, the 3D encoder: a deep stack of 2D convolutions on planes and MLPs on points.

Puy, Boulch, Marlet, "Using a Waffle Iron for Automotive Point Cloud Semantic Segmentation", ICCV
2023, Sec. 3; at width 768 with LayerNorm in the blocks as in ScaLR, Sec. 4.1. releases/scalr.py
takes published weights of WaffleIron, ScaLR and ScaLR+.

`prepare` makes the network's inputs of a cloud, and the network takes a batch of them. Points are
points-first and ragged: the clouds of a batch lie one after the other in `[N, C]`, and `view [N]`
says which one a point is from. Then normalisation and channel mixing are plain layers
on rows, flattening points to a plane is `index_add`, inflating the plane to points is row indexing,
and nothing is padded. experiments/plain.py is the same network in the obvious, slow way.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import thin
from heads import HEADS
from plumbing.batchnorm import BatchNorm
from plumbing.errors import InputError
from plumbing.fingerprint import of_weights

GRIDS = ((256, 256), (256, 32), (256, 32))  # cells (H, W) of the planes with normal axis z, y, x


# ---- from a cloud to inputs ----------------------------------------------------------------------

def prepare(xyz, intensity, rng, sampling):
    """WaffleIron's inputs of a cloud.

    Args:
        xyz: [A, 3] in metres. intensity: [A].
        rng: of the points that are drawn.
        sampling: as SAMPLING of readers/nuscenes.py; for "keep" see `data.thin`.
    Returns: rows [N] of the points kept, and inputs {"points": [N, 5], "cells": [N, 3] on the
    planes z, y, x, "neighbors": [N, K]}; no inputs where no point is in reach.
    """
    rows = np.flatnonzero(inside_fov(xyz, sampling["fov"]))
    rows = thin(xyz, rows, rng, sampling)
    if len(rows) == 0:
        return rows, {}
    xyz = xyz[rows]
    return rows, {"points": point_features(xyz, intensity[rows], *sampling["intensity"]),
                  "cells": plane_cells(xyz, sampling["fov"], sampling["cell"]),
                  "neighbors": nearest_neighbors(xyz, sampling["neighbors"])}


def inside_fov(xyz, fov):
    """Mask of the points inside the open box of half extents `fov`, with 1e-4 m to spare."""
    return (np.abs(xyz) < np.asarray(fov) - 1e-4).all(1)


def plane_sizes(fov, cell):
    """Cells (H, W) of the planes z, y, x: x-y, x-z and y-z of the box of half extents `fov`."""
    x, y, z = (round(2 * side / cell) for side in fov)
    return (x, y), (x, z), (y, z)


def plane_cells(xyz, fov, cell):
    """Flat cell numbers row * W + col of points [N, 3] on the planes z, y, x: int64 [N, 3]."""
    x, y, z = np.floor((xyz + np.asarray(fov)) / cell).astype(np.int64).T
    (_, width_xy), (_, width_z), _ = plane_sizes(fov, cell)
    return np.column_stack([x * width_xy + y, x * width_z + z, y * width_z + z])


def nearest_neighbors(xyz, count):
    """The `count` nearest other points of each point: int64 [N, count].

    Small clouds repeat the ones that they have; a single point is its own neighbour.
    """
    available = min(count, len(xyz) - 1)
    if available < 1:
        return np.zeros((len(xyz), count), np.int64)
    # The first found is the point itself, unless another has the same place. Then the point is
    # among the others, where the first found takes its place.
    ranks = [1, *(np.arange(count) % available + 2)]
    found = cKDTree(xyz).query(xyz, k=ranks)[1]  # [N, 1 + count]
    first, others = found[:, :1], found[:, 1:]
    itself = np.arange(len(xyz))[:, None]
    return np.where(others == itself, first, others)


def point_features(xyz, intensity, mean, std):
    """[N, 5]: standardised intensity, x, y, z, radius (ScaLR, supplement B.2)."""
    radius = np.linalg.norm(xyz, axis=1)
    return np.column_stack([(intensity - mean) / std, xyz, radius]).astype(np.float32)


# ---- from points to planes and back --------------------------------------------------------------

class Window(NamedTuple):
    """Where each point lies on the cropped planes of a batch. All layers of a plane share it."""
    cell: torch.Tensor    # [N] int64, row of the flattened planes [B * h * w, C]
    weight: torch.Tensor  # [N, 1] 1 / number of points in the point's cell
    shape: tuple          # B, h, w


def crop_axis(position, view, clouds, size, crop):
    """Crop one axis of a grid of `size` cells to what the clouds occupy, plus a margin of one cell.

    position: [N]. view: [N]. Returns start [B] of each cloud's window, and the length of all
    windows. Raises ValueError for a position outside the grid.

    A margin of one is exact for two 3x3 convolutions. Only occupied cells are read; there the
    second convolution sees the first one's output up to one cell further, all inside the window.
    That output sees input up to two cells further, where the plane is empty, hence equal to the
    first convolution's own zero padding. The second one's padding is seen only where the window
    ends at an occupied cell, and the clamp below allows that only at the grid's border, where the
    whole plane would be padded too.
    """
    low = view.new_full((clouds,), size).scatter_reduce(0, view, position, "amin")  # [B]
    high = view.new_full((clouds,), -1).scatter_reduce(0, view, position, "amax")   # [B]
    first, last, extent = torch.stack([low.min(), high.max(), (high - low).max()]).tolist()
    if first < 0 or last >= size:
        raise ValueError(f"cells reach from {first} to {last} on an axis of {size} cells")
    if not crop:
        return torch.zeros_like(low), size
    length = min(size, extent + 3)
    return (low - 1).clamp(0, size - length), length


def plan_window(cells, view, clouds, grid, crop=True):
    """The Window of one plane: cells [N] = row * W + col on the grid (H, W), view [N]."""
    row, col = cells // grid[1], cells % grid[1]
    top, h = crop_axis(row, view, clouds, grid[0], crop)
    left, w = crop_axis(col, view, clouds, grid[1], crop)
    cell = (view * h + row - top[view]) * w + col - left[view]
    count = cell.new_zeros(clouds * h * w).index_add(0, cell, torch.ones_like(cell))
    return Window(cell, 1 / count[cell].unsqueeze(1), (clouds, h, w))


# ---- layers --------------------------------------------------------------------------------------

class Embedding(nn.Module):
    """A point's own features and its differences to its neighbours, max-pooled: [N, Cin] -> [N, C].

    Sec. 3 of the paper.
    """

    def __init__(self, in_channels, channels):
        super().__init__()
        self.norm = BatchNorm(in_channels)
        self.point = nn.Linear(in_channels, channels)
        self.edges = nn.Sequential(
            BatchNorm(in_channels), nn.Linear(in_channels, channels, bias=False),
            BatchNorm(channels), nn.ReLU(inplace=True), nn.Linear(channels, channels, bias=False))
        self.final = nn.Linear(2 * channels, channels)

    def forward(self, points, neighbors):
        """points [N, Cin], neighbors [N, K] -> [N, C]."""
        x = self.norm(points)
        edges = x[neighbors] - x.unsqueeze(1)              # [N, K, Cin]
        nearby = self.max_over_neighbors(edges)            # [N, C]
        return self.final(torch.cat([self.point(x), nearby], dim=1))

    def max_over_neighbors(self, edges):
        """[N, K, Cin] -> [N, C]: the maximum over a point's edges of `self.edges`.

        The second BatchNorm's statistics come from its input's covariance, so that the layer
        before it is computed once, with the BatchNorm folded in.
        """
        norm_in, first, norm, relu, second = self.edges
        rows = norm_in(edges.flatten(0, 1))                # [N * K, Cin]
        weight, bias = norm.after(first, rows)             # of norm(first(rows))
        edges = rows.view(edges.shape)
        # A CPU is faster, and needs less memory, where a few points' edges stay in its cache
        piece = 256 if edges.device.type == "cpu" else len(edges)
        pooled = []
        for some in edges.split(piece):
            pooled.append(second(relu(F.linear(some, weight, bias))).max(1).values)
        return torch.cat(pooled)


class SpatialMix(nn.Module):
    """Depthwise 3x3 convolutions on a plane: [N, C] -> [N, C], what is added to the points."""

    def __init__(self, channels, norm, activation):
        super().__init__()
        self.norm = norm(channels)
        self.ffn = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels), activation(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
        self.scale = initial_scale(channels)

    def forward(self, x, window):
        b, h, w = window.shape
        first, activation, second = self.ffn

        # Flatten: a cell of the plane holds the mean of its points
        x = self.norm(x) * window.weight
        plane = x.new_zeros(b * h * w, x.shape[1]).index_add(0, window.cell, x)

        # plane = scale * second(activation(first(plane))). The permuted view is what PyTorch calls
        # channels_last: the convolutions take it, and give it back, uncopied. The scale multiplies
        # weights, not points: there is less to compute, and to keep for the backward pass.
        plane = activation(first(plane.view(b, h, w, -1).permute(0, 3, 1, 2)))  # [B, C, h, w]
        weight = self.scale.view(-1, 1, 1, 1) * second.weight
        bias = self.scale * second.bias
        plane = F.conv2d(plane, weight, bias, padding=1, groups=x.shape[1])

        # Inflate: each point reads its cell. Back to float32 before that, so that the gradients of
        # a cell's points are summed in float32.
        plane = plane.permute(0, 2, 3, 1).reshape(b * h * w, -1).to(x.dtype)
        return plane.index_select(0, window.cell)


class ChannelMix(nn.Module):
    """An MLP on each point: [N, C] -> [N, C], what is added to the points."""

    def __init__(self, channels, norm, activation):
        super().__init__()
        self.norm = norm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, channels), activation(),
                                 nn.Linear(channels, channels))
        self.scale = initial_scale(channels)

    def forward(self, x):
        # scale * mlp(norm(x)), with the scale on the weights as in SpatialMix
        first, activation, second = self.mlp
        weight = self.scale.unsqueeze(1) * second.weight
        bias = self.scale * second.bias
        return F.linear(activation(first(self.norm(x))), weight, bias)


def initial_scale(channels):
    """A residual's learned scale per channel, U(-1, 1) as in the release.

    48 layers need no smaller one: the default weights of the two layers before it shrink a
    normalised input enough.
    """
    return nn.Parameter(torch.empty(channels).uniform_(-1, 1))


# ---- the network ---------------------------------------------------------------------------------

NORMS = {"layernorm": nn.LayerNorm, "batchnorm": BatchNorm}
# ReLU in place: a plane less to keep for the backward pass
ACTIVATIONS = {"relu": lambda: nn.ReLU(inplace=True), "gelu": nn.GELU}
OPTIONS = dict(drop_path=0.0, activation="relu", head="linear", hidden=2048)


class WaffleIron(nn.Module):
    """The 3D encoder. The defaults are WI-48-768 as in ScaLR, with an output for a ViT-S/14.

    Args:
        in_channels, channels, depth, out_channels: widths, and the number of layers.
        norm: "layernorm" or "batchnorm", inside the blocks; the embedding keeps BatchNorm.
        grids: (H, W) of each plane; layer i works on plane i mod P.
        options: what ScaLR's fine-tuning and ScaLR+ change, by default OPTIONS:
            drop_path: probability, in training, that a cloud skips a residual branch (both: 0.2).
            activation: "relu" or "gelu" (ScaLR+), inside the blocks; the embedding keeps ReLU.
            head: "linear", "batchnorm" (before a linear layer, ScaLR downstream), "mlp" (`hidden`
            wide, with a ReLU; ScaLR+) or "mlp2" (twice the width; ScaLR's for several teachers).
    Raises ValueError for another norm, activation or head, TypeError for another option.

    `spec` holds these arguments: `WaffleIron(**model.spec)` builds the same. `crop = False` turns
    cropping off: the same result, slower. `recompute = True` keeps a layer's input only and
    computes it again in the backward pass: the same result, a fraction of the memory, a third more
    time; not with "batchnorm", whose running statistics would count each batch twice.
    """

    prepare = staticmethod(prepare)

    def __init__(self, in_channels=5, channels=768, depth=48, out_channels=384, norm="layernorm",
                 grids=GRIDS, **options):
        super().__init__()
        unknown = options.keys() - OPTIONS.keys()
        if unknown:
            raise TypeError(f"WaffleIron has no option {', '.join(sorted(unknown))}")
        spec = dict(in_channels=in_channels, channels=channels, depth=depth,
                    out_channels=out_channels, norm=norm, grids=tuple(map(tuple, grids)))
        self.spec = spec | OPTIONS | options
        activation, head, hidden = (self.spec[name] for name in ("activation", "head", "hidden"))
        check_choice("norm", norm, NORMS)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("head", head, HEADS)
        self.crop = True
        self.recompute = False
        self.embed = Embedding(in_channels, channels)
        block = channels, NORMS[norm], ACTIVATIONS[activation]
        self.spatial_mix = nn.ModuleList(SpatialMix(*block) for _ in range(depth))
        self.channel_mix = nn.ModuleList(ChannelMix(*block) for _ in range(depth))
        self.head = HEADS[head](channels, hidden, out_channels)

    def forward(self, batch):
        """A batch -> [N, Cout].

        view: int64 [N], the cloud that each point is from.
        inputs: points [N, Cin]; cells int64 [N, P], cells[:, p] is row * W + col on plane p of the
            cloud's own grid; neighbors int64 [N, K], rows of the batch without the point itself.
        draws: optional, [2 depth, B] in [0, 1), for drop path in training.
        Raises ValueError for a cell outside its grid.
        """
        return self.head(self.features(batch))

    def features(self, batch):
        """What the head is put on: [N, channels], in float32 under autocast too."""
        points, cells, neighbors = (batch["inputs"][n] for n in ("points", "cells", "neighbors"))
        view = batch["view"]
        clouds = int(view.max()) + 1
        windows = [plan_window(plane, view, clouds, grid, self.crop)
                   for plane, grid in zip(cells.unbind(1), self.spec["grids"], strict=True)]
        # Under autocast the layers give bfloat16, but the residual stream stays in float32: 96 sums
        # pass through it.
        x = self.embed(points, neighbors).to(points.dtype)
        factors = self.branch_factors(batch, clouds)
        for i in range(self.spec["depth"]):
            arguments = i, x, windows[i % len(windows)], view, factors
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(self.layer, *arguments, use_reentrant=False)
            else:
                x = self.layer(*arguments)
        return x

    def layer(self, i, x, window, view, factors):
        """Layer i: [N, C] -> [N, C]. factors: see `branch_factors`."""
        branch = self.spatial_mix[i](x, window)
        x = x + (branch if factors is None else branch * factors[2 * i, view, None])
        branch = self.channel_mix[i](x)
        return x + (branch if factors is None else branch * factors[2 * i + 1, view, None])

    def branch_factors(self, batch, clouds):
        """Stochastic depth (Huang et al., 2016): each cloud's factors, [2 depth, B] or None."""
        keep = 1 - self.spec["drop_path"]
        if not self.training or keep == 1:
            return None
        own = torch.rand(2 * self.spec["depth"], clouds, device=batch["view"].device)
        return (batch.get("draws", own) < keep) / keep

    def use(self, samplings):
        """Take the planes of clouds of {dataset: sampling}; no weight depends on them.

        Raises InputError where the datasets' differ, or their numbers of neighbours.
        """
        of_each = {plane_sizes(sampling["fov"], sampling["cell"])
                   for sampling in samplings.values()}
        if len(of_each) > 1:
            raise InputError(f"--data: {' and '.join(samplings)} have planes of other sizes; give "
                             "one --fov and --cell for all")
        neighbors = [str(sampling["neighbors"]) for sampling in samplings.values()]
        if len(set(neighbors)) > 1:
            raise InputError(f"--data: {' and '.join(samplings)} have {' and '.join(neighbors)} "
                             "neighbours; give one --neighbors for all")
        self.spec["grids"] = of_each.pop()

    def fingerprint(self):
        """What this encoder is, wherever its weights came from: see plumbing/fingerprint.py."""
        name = f"WI-{self.spec['depth']}-{self.spec['channels']}"
        return {"name": name, "weights": of_weights(self)}


def check_choice(name, value, known):
    if value not in known:
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(known)}")


# ---- what stage 1 and a checkpoint need ----------------------------------------------------------

NETWORK = WaffleIron  # NETWORK(**spec) is the network of a checkpoint


def build(args, samplings, out_channels):
    """The 3D encoder of stage1.py's flags, for {dataset: sampling}.

    Raises InputError for --recompute with BatchNorm, and for planes that do not fit.
    """
    norm = args.norm or ("layernorm" if args.channels == 768 else "batchnorm")
    if args.recompute and norm == "batchnorm":
        raise InputError("--recompute: not with BatchNorm in the layers, which would count each "
                         "batch twice; --norm layernorm has none")
    for sampling in samplings.values():
        check_sampling(sampling)
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    waffleiron = WaffleIron(channels=args.channels, depth=args.depth, out_channels=out_channels,
                            norm=norm, **given)
    waffleiron.use(samplings)
    waffleiron.recompute = args.recompute
    return waffleiron


def check_sampling(sampling):
    """Raise InputError for a field of view that cells or voxels do not fit."""
    cell = sampling["cell"]
    voxel = sampling["voxel"]
    for side in sampling["fov"]:
        cells = 2 * side / cell
        if cells > 1e5:
            raise InputError(f"--cell {cell:g}: twice --fov {side:g} has more than 100,000 of "
                             "them; take larger ones")
        if round(cells) < 1 or abs(cells - round(cells)) > 1e-6 * cells:
            raise InputError(f"--cell {cell:g}: twice --fov {side:g} is not a whole number of "
                             "cells")
        if side / voxel >= 2**20:
            raise InputError(f"--voxel {voxel:g}: --fov {side:g} has more than a million of "
                             "them; take larger ones")

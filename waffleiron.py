"""WaffleIron, the 3D encoder: a deep stack of 2D convolutions on planes and MLPs on points.

Puy, Boulch, Marlet, "Using a Waffle Iron for Automotive Point Cloud Semantic Segmentation", ICCV
2023, Sec. 3; at width 768 with LayerNorm in the blocks as in ScaLR, Sec. 4.1. `from_released` takes
published weights of WaffleIron, ScaLR and ScaLR+.

Points are points-first and ragged: the clouds of a batch lie one after the other in `[N, C]`, and
`batch [N]` says which cloud a point is from. Then normalisation and channel mixing are plain layers
on rows, flattening points to a plane is `index_add`, inflating the plane to points is row indexing,
and nothing is padded. experiments/plain.py is the same network in the obvious, slow way.
"""
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from plumbing.batchnorm import BatchNorm
from plumbing.errors import InputError
from plumbing.fingerprint import of_weights
from plumbing.weights import (check_fit, check_kind, load_strictly, read, say_if_unfinished,
                              unwrapped)
from releases.scalr import RELEASED, arguments_of, published, to_released  # noqa: F401

GRIDS = ((256, 256), (256, 32), (256, 32))  # cells (H, W) of the planes with normal axis z, y, x


# ---- from points to planes and back --------------------------------------------------------------

class Window(NamedTuple):
    """Where each point lies on the cropped planes of a batch. All layers of a plane share it."""
    cell: torch.Tensor    # [N] int64, row of the flattened planes [B * h * w, C]
    weight: torch.Tensor  # [N, 1] 1 / number of points in the point's cell
    shape: tuple          # B, h, w


def crop_axis(position, batch, clouds, size, crop):
    """Crop one axis of a grid of `size` cells to what the clouds occupy, plus a margin of one cell.

    position: [N]. batch: [N]. Returns start [B] of each cloud's window, and the length of all
    windows. Raises ValueError for a position outside the grid.

    A margin of one is exact for two 3x3 convolutions. Only occupied cells are read; there the
    second convolution sees the first one's output up to one cell further, all inside the window.
    That output sees input up to two cells further, where the plane is empty, hence equal to the
    first convolution's own zero padding. The second one's padding is seen only where the window
    ends at an occupied cell, and the clamp below allows that only at the grid's border, where the
    whole plane would be padded too.
    """
    low = batch.new_full((clouds,), size).scatter_reduce(0, batch, position, "amin")  # [B]
    high = batch.new_full((clouds,), -1).scatter_reduce(0, batch, position, "amax")   # [B]
    first, last, extent = torch.stack([low.min(), high.max(), (high - low).max()]).tolist()
    if first < 0 or last >= size:
        raise ValueError(f"cells reach from {first} to {last} on an axis of {size} cells")
    if not crop:
        return torch.zeros_like(low), size
    length = min(size, extent + 3)
    return (low - 1).clamp(0, size - length), length


def plan_window(cells, batch, clouds, grid, crop=True):
    """The Window of one plane: cells [N] = row * W + col on the grid (H, W), batch [N]."""
    row, col = cells // grid[1], cells % grid[1]
    top, h = crop_axis(row, batch, clouds, grid[0], crop)
    left, w = crop_axis(col, batch, clouds, grid[1], crop)
    cell = (batch * h + row - top[batch]) * w + col - left[batch]
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

    def forward(self, feats, neighbors):
        """feats [N, Cin], neighbors [N, K] -> [N, C]."""
        x = self.norm(feats)
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


def linear_layer(channels, hidden, out):
    return nn.Linear(channels, out)


def batchnorm_and_linear(channels, hidden, out):
    return nn.Sequential(BatchNorm(channels), nn.Linear(channels, out))


def mlp(channels, hidden, out):
    return nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, out))


HEADS = {"linear": linear_layer, "batchnorm": batchnorm_and_linear, "mlp": mlp}


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
            head: "linear", "batchnorm" (before a linear layer, ScaLR downstream) or "mlp"
            (`hidden` wide, with a ReLU; ScaLR+).
    Raises ValueError for another norm, activation or head, TypeError for another option.

    `spec` holds these arguments: `WaffleIron(**model.spec)` builds the same. `crop = False` turns
    cropping off: the same result, slower. `checkpoint = True` keeps a layer's input only and
    computes it again in the backward pass: the same result, a fraction of the memory, a third more
    time; not with "batchnorm", whose running statistics would count each batch twice.
    """

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
        self.checkpoint = False
        self.embed = Embedding(in_channels, channels)
        block = channels, NORMS[norm], ACTIVATIONS[activation]
        self.spatial_mix = nn.ModuleList(SpatialMix(*block) for _ in range(depth))
        self.channel_mix = nn.ModuleList(ChannelMix(*block) for _ in range(depth))
        self.head = HEADS[head](channels, hidden, out_channels)

    def forward(self, feats, cells, neighbors, batch):
        """feats [N, Cin], cells [P, N], neighbors [N, K], batch [N] -> [N, Cout].

        cells[p] is row * W + col on plane p of the cloud's own grid; neighbors index rows of the
        whole batch and do not contain the point itself; all int64. Raises ValueError for a cell
        outside its grid.
        """
        return self.head(self.features(feats, cells, neighbors, batch))

    def features(self, feats, cells, neighbors, batch):
        """What the head is put on: [N, channels], in float32 under autocast too."""
        clouds = int(batch.max()) + 1
        windows = [plan_window(plane, batch, clouds, grid, self.crop)
                   for plane, grid in zip(cells, self.spec["grids"], strict=True)]
        # Under autocast the layers give bfloat16, but the residual stream stays in float32: 96 sums
        # pass through it.
        x = self.embed(feats, neighbors).to(feats.dtype)
        for i in range(self.spec["depth"]):
            arguments = i, x, windows[i % len(windows)], batch, clouds
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(self.layer, *arguments, use_reentrant=False)
            else:
                x = self.layer(*arguments)
        return x

    def layer(self, i, x, window, batch, clouds):
        """Layer i: [N, C] -> [N, C]."""
        x = x + self.drop_path(self.spatial_mix[i](x, window), batch, clouds)
        return x + self.drop_path(self.channel_mix[i](x), batch, clouds)

    def drop_path(self, branch, batch, clouds):
        """Stochastic depth (Huang et al., 2016), one draw a cloud, as elsewhere one an image."""
        keep = 1 - self.spec["drop_path"]
        if not self.training or keep == 1:
            return branch
        kept = torch.rand(clouds, device=branch.device) < keep
        return branch * (kept / keep)[batch].unsqueeze(1)

    def fingerprint(self):
        """What this encoder is, wherever its weights came from: see plumbing/fingerprint.py."""
        name = f"WI-{self.spec['depth']}-{self.spec['channels']}"
        return {"name": name, "weights": of_weights(self)}


def check_choice(name, value, known):
    if value not in known:
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(known)}")


# ---- weights -------------------------------------------------------------------------------------

def from_released(state_dict, grids=GRIDS, subject="state_dict"):
    """A WaffleIron with published weights, in float32.

    Args:
        state_dict: {published name: tensor}, as `unwrapped` takes it, with one of three heads: a
            linear layer (`classif`: WaffleIron, ScaLR), BatchNorm and a linear layer (`classif.0`,
            `.1`: ScaLR downstream) or an MLP (`classif.0`, `.2`: ScaLR+).
        grids: as for WaffleIron; they are not in the weights.
        subject: what an error message begins with.
    Raises InputError, naming the first five differences, for missing or unexpected names and wrong
    shapes.

    Sizes, norm and head are inferred from names and shapes. With an MLP it is ScaLR+, which has
    GELU in the blocks and was trained with a drop path of 0.2. GELU is not in the weights: under
    another head, as after fine-tuning, ScaLR+ would be taken for ScaLR.
    """
    subject = (f'{subject}: not the weights of a published WaffleIron, as "model_point" in '
               'ScaLR\'s model.pth and "net" in ckpt_last.pth are')
    if not isinstance(state_dict, dict):
        raise InputError(f"{subject}: this is a {type(state_dict).__name__}")
    state = unwrapped(state_dict, subject)
    with torch.device("meta"):  # costs nothing until names and shapes are known to fit
        model = WaffleIron(**arguments_of(state, subject), grids=grids)
    names = {name: published(name, value.shape) for name, value in model.state_dict().items()}
    check_fit(state, dict(names.values()), subject)
    ours = {name: state[names[name][0]].reshape(value.shape)
            for name, value in model.state_dict().items()}
    model.to_empty(device="cpu").load_state_dict(ours)
    return model


def load_waffleiron(path):
    """A file of weights, or its folder -> (WaffleIron on the CPU, the checkpoint it is from).

    Either a checkpoint of stage1.py (last.pth), returned whole beside the model; or a released file
    of ScaLR, ScaLR+ or WaffleIron (model.pth, ckpt_last.pth), known by its entry "model_point",
    "model_points" or "net". The latter holds nothing but weights: the dict beside the model is
    empty, the planes are `GRIDS`, and the callers take ScaLR's settings. (The original WaffleIron
    for nuScenes had others, ±50 m in cells of 60 cm: `from_released` takes its grids.)

    Raises InputError, naming the file and the way out, where it is missing, would run code, holds
    something else, or its weights do not fit.
    """
    files = [Path(path) / name for name in ("last.pth", "model.pth", "ckpt_last.pth")]
    path = next((file for file in files if file.is_file()), path)
    content = read(path)
    keys = list(content) if isinstance(content, dict) else []
    for entry in RELEASED:
        if entry in keys:
            return from_released(content[entry], subject=path), {}
    if "kind" not in keys:
        held = f"the keys {keys[:5]}" if keys else f"a {type(content).__name__}"
        raise InputError(f"{path}: not a stage-1 checkpoint, nor released weights under "
                         f"{', '.join(RELEASED)}: it holds {held}; give what stage1.py wrote, or "
                         "ScaLR's model.pth")
    check_kind(content, path, "point_encoder")
    say_if_unfinished(content, path)
    try:
        with torch.device("meta"):
            model = WaffleIron(**content["waffleiron"])
        state = dict(content["model"])
    except Exception as error:  # whatever the lookups or the constructor make of another version
        reason = (str(error).splitlines() or [""])[0][:200]
        raise InputError(f"{path}: no WaffleIron can be built from it ({type(error).__name__}: "
                         f"{reason}); is it of another version? Write it anew with "
                         "stage1.py") from error
    load_strictly(model.to_empty(device="cpu"), state,
                  f'{path}: its weights do not fit its "waffleiron" arguments; write it anew with '
                  "stage1.py")
    return model, content

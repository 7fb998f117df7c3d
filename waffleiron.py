"""WaffleIron, the 3D encoder: a deep stack of 2D convolutions on planes and MLPs on points.

Puy, Boulch, Marlet, "Using a Waffle Iron for Automotive Point Cloud Semantic Segmentation", ICCV 2023, Sec. 3; at width
768 with LayerNorm in the blocks as in ScaLR, Sec. 4.1. Weights go from and to the published names, those of WaffleIron,
ScaLR and ScaLR+: `from_released`, `to_released`.

Points are points-first and ragged: the clouds of a batch lie one after the other in `[N, C]` and `batch [N]` says which
cloud a point is from. Then normalisation and channel mixing are plain layers on rows, flattening points to a plane is
`index_add`, inflating the plane to points is row indexing, and nothing is padded.
"""
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.checkpoint import checkpoint

from checkpoints import check_fit, check_kind, load_strictly, read, say_if_unfinished, unwrapped
from errors import InputError
from plumbing.fingerprint import of_weights

GRIDS = ((256, 256), (256, 32), (256, 32))   # cells (H, W) of the planes with normal axis z, y, x


# ---- normalisation --------------------------------------------------------------------------------------------------

def over_processes(x):
    """The sum of x over all processes; x where there is one. Gradients are summed likewise, so all must call it in step."""
    return all_reduce(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d on rows [N, C] whose training statistics are those of all processes' rows.

    With one process, and in eval(), it is nn.BatchNorm1d. With several (an initialised torch.distributed) it normalises
    as one process with the whole batch would, on the CPU too, where nn.SyncBatchNorm refuses. All processes must then
    call it in step, in forward and backward.
    """

    def forward(self, x):
        """[N, C] -> [N, C], in x's dtype."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        rows = x.to(self.weight.dtype)
        count, mean, centred = moments(rows)
        var = over_processes(centred.square().sum(0)) / count
        self.track(count, mean, var)
        return (centred * torch.rsqrt(var + self.eps) * self.weight + self.bias).to(x.dtype)

    def after(self, linear, x):
        """Weight [C, Cin] and bias [C] of the one linear layer that `linear` (without bias) and then this BatchNorm are on x [N, Cin], N > 1.

        What a linear layer makes of rows has W mean for a mean and the diagonal of W cov W' for a variance: its output
        [N, C] is not needed for its statistics.
        """
        mean, var = self.running_mean, self.running_var
        if self.training:
            count, x_mean, centred = moments(x.to(self.weight.dtype))
            # Sums of products, not matrix products, which autocast would round.
            cov = over_processes((centred.unsqueeze(2) * centred.unsqueeze(1)).sum(0)) / count           # [Cin, Cin]
            mean = (linear.weight * x_mean).sum(1)                                                       # [C]
            var = (linear.weight.unsqueeze(2) * linear.weight.unsqueeze(1) * cov).sum((1, 2)).clamp(min=0)   # [C]
            self.track(count, mean, var)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return scale.unsqueeze(1) * linear.weight, self.bias - scale * mean

    @torch.no_grad()
    def track(self, count, mean, var):
        """Moves the running statistics towards those of a batch of `count` rows; its variance with count in the denominator."""
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)


def moments(rows):
    """Number and mean [C] of all processes' rows, and this process' rows minus that mean [N, C]."""
    # First the mean, then what is around it: E[x²] - E[x]² loses everything where the mean is large (metres).
    # Each process counts its own rows: shards need not be equal.
    total = over_processes(torch.cat([rows.sum(0), rows.new_full((1,), len(rows))]))
    count = total[-1].detach()
    mean = total[:-1] / count
    return count, mean, rows - mean


# ---- from points to planes and back ---------------------------------------------------------------------------------

class Window(NamedTuple):
    """Where each point lies on the cropped planes of a batch. It depends on the cells only: all layers share it."""
    cell: torch.Tensor      # [N] int64, row of the flattened planes [B * h * w, C]
    weight: torch.Tensor    # [N, 1] 1 / number of points in the point's cell
    shape: tuple            # B, h, w


def crop_axis(position, batch, clouds, size, crop):
    """Crop one axis of a grid of `size` cells to what the clouds occupy, plus a margin of one cell.

    position [N], batch [N] -> start [B] of each cloud's window, and the length of all windows. Raises ValueError for a
    position outside the grid.

    A margin of one is exact for two 3x3 convolutions. Only occupied cells are read; there the second convolution sees
    the first one's output up to one cell further, all inside the window. That output sees input up to two cells
    further, where the plane is empty, hence equal to the first convolution's own zero padding. The second one's padding
    is seen only where the window ends at an occupied cell, and the clamp below allows that only at the grid's border,
    where the whole plane would be padded too.
    """
    low = batch.new_full((clouds,), size).scatter_reduce(0, batch, position, "amin")       # [B]
    high = batch.new_full((clouds,), -1).scatter_reduce(0, batch, position, "amax")        # [B]
    first, last, extent = torch.stack([low.min(), high.max(), (high - low).max()]).tolist()
    if first < 0 or last >= size:
        raise ValueError(f"cells reach from {first} to {last} on an axis of {size} cells")
    if not crop:
        return torch.zeros_like(low), size
    length = min(size, extent + 3)
    return (low - 1).clamp(0, size - length), length


def plan_window(cells, batch, clouds, grid, crop=True):
    """The window of one plane: cells [N] = row * W + col on the grid (H, W), batch [N] -> Window."""
    row, col = cells // grid[1], cells % grid[1]
    top, h = crop_axis(row, batch, clouds, grid[0], crop)
    left, w = crop_axis(col, batch, clouds, grid[1], crop)
    cell = (batch * h + row - top[batch]) * w + col - left[batch]
    count = cell.new_zeros(clouds * h * w).index_add(0, cell, torch.ones_like(cell))
    return Window(cell, 1 / count[cell].unsqueeze(1), (clouds, h, w))


# ---- layers ---------------------------------------------------------------------------------------------------------

class Embedding(nn.Module):
    """A point's own features and its differences to its neighbours, max-pooled: [N, Cin] -> [N, C] (Sec. 3)."""

    def __init__(self, in_channels, channels):
        super().__init__()
        self.norm = BatchNorm(in_channels)
        self.point = nn.Linear(in_channels, channels)
        self.edges = nn.Sequential(BatchNorm(in_channels), nn.Linear(in_channels, channels, bias=False),
                                   BatchNorm(channels), nn.ReLU(inplace=True), nn.Linear(channels, channels, bias=False))
        self.final = nn.Linear(2 * channels, channels)

    def forward(self, feats, neighbors):
        x = self.norm(feats)
        norm_in, first, norm, relu, second = self.edges
        edges = norm_in((x[neighbors] - x.unsqueeze(1)).flatten(0, 1))      # [N * K, Cin]
        weight, bias = norm.after(first, edges)
        edges = edges.view(*neighbors.shape, -1)                            # [N, K, Cin]
        # A CPU is faster, and needs less memory, where the edges of a few points at a time stay in its cache.
        piece = 256 if feats.device.type == "cpu" else len(edges)
        nearby = torch.cat([second(relu(F.linear(some, weight, bias))).max(1).values for some in edges.split(piece)])
        return self.final(torch.cat([self.point(x), nearby], dim=1))        # [N, C]


class SpatialMix(nn.Module):
    """Depthwise 3x3 convolutions on a plane: [N, C] -> [N, C], what is added to the points."""

    def __init__(self, channels, norm, activation):
        super().__init__()
        self.norm = norm(channels)
        self.ffn = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels), activation(),
                                 nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
        self.scale = initial_scale(channels)

    def forward(self, x, window):
        x = self.norm(x) * window.weight
        b, h, w = window.shape
        plane = x.new_zeros(b * h * w, x.shape[1]).index_add(0, window.cell, x)     # a cell holds its points' mean
        # The permuted view is what PyTorch calls channels_last: the convolutions take it, and give it back, uncopied.
        first, activation, second = self.ffn
        plane = activation(first(plane.view(b, h, w, -1).permute(0, 3, 1, 2)))      # [B, C, h, w]
        # The residual's scale multiplies weights, not points: less to compute, and to keep for the backward pass.
        weight, bias = self.scale.view(-1, 1, 1, 1) * second.weight, self.scale * second.bias
        plane = F.conv2d(plane, weight, bias, padding=1, groups=x.shape[1])
        # Back to float32 before the points read it, so that the gradients of a cell's points are summed in float32.
        plane = plane.permute(0, 2, 3, 1).reshape(b * h * w, -1).to(x.dtype)
        return plane.index_select(0, window.cell)


class ChannelMix(nn.Module):
    """An MLP on each point: [N, C] -> [N, C], what is added to the points."""

    def __init__(self, channels, norm, activation):
        super().__init__()
        self.norm = norm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, channels), activation(), nn.Linear(channels, channels))
        self.scale = initial_scale(channels)

    def forward(self, x):
        first, activation, second = self.mlp
        weight, bias = self.scale.unsqueeze(1) * second.weight, self.scale * second.bias     # as in SpatialMix
        return F.linear(activation(first(self.norm(x))), weight, bias)


def initial_scale(channels):
    """A residual's learned scale per channel, U(-1, 1) as in the release (a grouped convolution's default)."""
    # 48 layers need no smaller one: the default weights of the two layers before it shrink a normalised input enough.
    return nn.Parameter(torch.empty(channels).uniform_(-1, 1))


NORMS = {"layernorm": nn.LayerNorm, "batchnorm": BatchNorm}
ACTIVATIONS = {"relu": lambda: nn.ReLU(inplace=True), "gelu": nn.GELU}  # in place: a plane less to keep for the backward pass
HEADS = {"linear": lambda channels, hidden, out: nn.Linear(channels, out),
         "batchnorm": lambda channels, hidden, out: nn.Sequential(BatchNorm(channels), nn.Linear(channels, out)),
         "mlp": lambda channels, hidden, out: nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, out))}


class WaffleIron(nn.Module):
    """The 3D encoder; the defaults are WI-48-768 as in ScaLR, with an output for a ViT-S/14.

    in_channels, channels, depth, out_channels: widths and number of layers. norm: "layernorm" or "batchnorm", inside
    the blocks; the embedding keeps BatchNorm. grids: (H, W) of each plane; layer i works on plane i mod P. drop_path:
    probability, in training, that a cloud skips a residual branch (ScaLR's fine-tuning and ScaLR+: 0.2). activation:
    "relu" or "gelu", inside the blocks; the embedding keeps ReLU. head: "linear", "batchnorm" (before a linear layer,
    ScaLR downstream) or "mlp" (`hidden` wide, with a ReLU); ScaLR+ has "gelu" and "mlp". `spec` holds these arguments,
    so that `WaffleIron(**model.spec)` builds the same. `crop = False` turns cropping off: the same result, slower.
    `checkpoint = True` keeps a layer's input only and computes it again in the backward pass: the same result, a fraction of
    the memory, a third more time; not with "batchnorm", whose running statistics would count each batch twice.
    Raises ValueError for another norm, activation or head.
    """

    def __init__(self, in_channels=5, channels=768, depth=48, out_channels=384, norm="layernorm", grids=GRIDS,
                 drop_path=0.0, activation="relu", head="linear", hidden=2048):
        super().__init__()
        for name, value, known in (("norm", norm, NORMS), ("activation", activation, ACTIVATIONS), ("head", head, HEADS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, not one of {', '.join(known)}")
        self.spec = dict(in_channels=in_channels, channels=channels, depth=depth, out_channels=out_channels, norm=norm,
                         grids=tuple(map(tuple, grids)), drop_path=drop_path, activation=activation, head=head,
                         hidden=hidden)
        self.crop, self.checkpoint = True, False
        self.embed = Embedding(in_channels, channels)
        block = channels, NORMS[norm], ACTIVATIONS[activation]
        self.spatial_mix = nn.ModuleList(SpatialMix(*block) for _ in range(depth))
        self.channel_mix = nn.ModuleList(ChannelMix(*block) for _ in range(depth))
        self.head = HEADS[head](channels, hidden, out_channels)

    def forward(self, feats, cells, neighbors, batch):
        """feats [N, Cin], cells [P, N], neighbors [N, K], batch [N] -> [N, Cout].

        cells[p] is row * W + col on plane p of the cloud's own grid; neighbors index rows of the whole batch and do not
        contain the point itself; all int64. Raises ValueError for a cell outside its grid.
        """
        return self.head(self.features(feats, cells, neighbors, batch))

    def features(self, feats, cells, neighbors, batch):
        """What the head is put on; arguments as for forward -> [N, channels], float32 under autocast too."""
        clouds = int(batch.max()) + 1
        windows = [plan_window(plane, batch, clouds, grid, self.crop)
                   for plane, grid in zip(cells, self.spec["grids"], strict=True)]
        # Under autocast the layers give bfloat16, but the residual stream stays in float32: 96 sums pass through it.
        x = self.embed(feats, neighbors).to(feats.dtype)
        for i in range(self.spec["depth"]):
            arguments = i, x, windows[i % len(windows)], batch, clouds
            keep_less = self.checkpoint and torch.is_grad_enabled()
            x = checkpoint(self.layer, *arguments, use_reentrant=False) if keep_less else self.layer(*arguments)
        return x

    def layer(self, i, x, window, batch, clouds):
        """Layer i: [N, C] -> [N, C]."""
        x = x + self.drop_path(self.spatial_mix[i](x, window), batch, clouds)
        return x + self.drop_path(self.channel_mix[i](x), batch, clouds)

    def fingerprint(self):
        """What this encoder is, wherever its weights came from: see plumbing/fingerprint.py."""
        return {"name": f"WI-{self.spec['depth']}-{self.spec['channels']}", "weights": of_weights(self)}

    def drop_path(self, branch, batch, clouds):
        """Stochastic depth (Huang et al., 2016): one draw per cloud, as a cloud is what one image is elsewhere."""
        keep = 1 - self.spec["drop_path"]
        if not self.training or keep == 1:
            return branch
        kept = torch.rand(clouds, device=branch.device) < keep
        return branch * (kept / keep)[batch].unsqueeze(1)


# ---- weights --------------------------------------------------------------------------------------------------------

RELEASED = ("model_point", "model_points", "net")      # where released files hold the weights
RENAMED = {"embed.point.": "embed.conv1.", "embed.edges.": "embed.conv2.", "spatial_mix.": "waffleiron.spatial_mix.",
           "channel_mix.": "waffleiron.channel_mix.", "head.": "classif."}   # ours: published; other names are equal


def published(name, shape):
    """Name and shape of one of our tensors as the releases of WaffleIron and ScaLR have it."""
    for ours, theirs in RENAMED.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    if name.endswith(".scale"):
        return name + ".weight", (*shape, 1, 1)
    if len(shape) == 2:      # our linear layers are convolutions there: over points, or over neighbours and points
        return name, (*shape, 1, 1) if name.startswith("embed.conv2.") else (*shape, 1)
    return name, tuple(shape)


def to_released(model):
    """The weights and statistics of a WaffleIron in the published names and shapes: a state dict, sharing memory."""
    state = {}
    for ours, value in model.state_dict().items():
        name, shape = published(ours, value.shape)
        state[name] = value.reshape(shape)
    return state


def from_released(state_dict, grids=GRIDS, subject="state_dict"):
    """A WaffleIron with published weights, in float32; sizes, norm, activation and head are inferred from names and shapes.

    state_dict: {published name: tensor}, as `unwrapped` takes it, with one of three heads: a linear layer (`classif`:
    WaffleIron, ScaLR), BatchNorm and a linear layer (`classif.0`, `.1`: ScaLR downstream) or an MLP (`classif.0`, `.2`:
    ScaLR+, which also has GELU in the blocks and was trained with a drop path of 0.2). GELU is not in the weights: under
    another head, as after fine-tuning, ScaLR+ would be taken for ScaLR. grids: as for WaffleIron; they are not in the
    weights either. subject: what an error message begins with. Raises InputError, naming the first five differences, for
    missing or unexpected names and wrong shapes.
    """
    subject = (f'{subject}: not the weights of a published WaffleIron, as "model_point" in ScaLR\'s model.pth and "net" in '
               "ckpt_last.pth are")
    if not isinstance(state_dict, dict):
        raise InputError(f"{subject}: this is a {type(state_dict).__name__}")
    state = unwrapped(state_dict, subject)
    heads = {"classif.2.weight": "mlp", "classif.1.weight": "batchnorm", "classif.weight": "linear"}    # by the last layer
    last = next((name for name in heads if name in state), "classif.weight")
    sizes = [tuple(getattr(state.get(name), "shape", ())) for name in ("embed.conv1.weight", last)]
    if [len(size) for size in sizes] != [3, 3]:
        raise InputError(f"{subject}: embed.conv1.weight and {last} must have three dimensions, "
                         f"there are {sizes[0]} and {sizes[1]}")
    (channels, in_channels, _), (out_channels, hidden, _) = sizes
    layers = {name.split(".")[2] for name in state if name.startswith("waffleiron.spatial_mix.")}
    norm = "batchnorm" if "waffleiron.spatial_mix.0.norm.running_mean" in state else "layernorm"
    plus = dict(activation="gelu", drop_path=0.2, hidden=hidden) if heads[last] == "mlp" else {}
    # On the meta device the model costs nothing until the names and shapes are known to fit.
    with torch.device("meta"):
        model = WaffleIron(in_channels, channels, len(layers), out_channels, norm, grids, head=heads[last], **plus)
    ours = model.state_dict()
    check_fit(state, dict(published(name, value.shape) for name, value in ours.items()), subject)
    model.to_empty(device="cpu").load_state_dict({name: state[published(name, value.shape)[0]].reshape(value.shape)
                                                  for name, value in ours.items()})
    return model


def load_waffleiron(path):
    """A file of weights, or the folder it is in -> (WaffleIron on the CPU, the checkpoint it is from).

    Either a checkpoint of stage1.py (last.pth), returned whole beside the model that its "waffleiron" and "model" make; or
    a released file of ScaLR, ScaLR+ or WaffleIron (model.pth, ckpt_last.pth), known by its entry "model_point",
    "model_points" or "net". Nothing but weights is in the latter: the dict beside the model is empty, the planes are
    `GRIDS`, and the callers take ScaLR's settings. (The original WaffleIron for nuScenes had others, ±50 m in cells of
    60 cm: `from_released` takes its grids.) Raises InputError, naming the file and the way out, where it is missing, would
    run code, holds something else, or its weights do not fit.
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
        raise InputError(f"{path}: not a stage-1 checkpoint, nor released weights under {', '.join(RELEASED)}: it holds "
                         f"{held}; give what stage1.py wrote, or ScaLR's model.pth")
    check_kind(content, path, "point_encoder")
    say_if_unfinished(content, path)
    try:
        with torch.device("meta"):
            model = WaffleIron(**content["waffleiron"])
        state = dict(content["model"])
    except Exception as error:      # whatever the lookups or the constructor make of another version's file
        reason = (str(error).splitlines() or [""])[0][:200]
        raise InputError(f"{path}: no WaffleIron can be built from it ({type(error).__name__}: {reason}); is it of another "
                         "version? Write it anew with stage1.py") from error
    load_strictly(model.to_empty(device="cpu"), state,
                  f'{path}: its weights do not fit its "waffleiron" arguments; write it anew with stage1.py')
    return model, content

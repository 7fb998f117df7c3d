"""How fast the implementation is, against the straightforward formulation of the same thing, written out below.

    python -m experiments.bench                                                                 # on a keyframe that it makes
    python -m experiments.bench --data /data/nuscenes --version v1.0-mini --out runs/bench.md   # on a real one

Straightforward is what the papers say, word for word: clouds zero-padded to [B, C, N], whole planes, scatter and gather with an
expanded index, the feature map up-sampled to the image before pixels are read; the image decoded in full, voxels by np.unique of
rows, pixels of all points. Both work on the same tensors and weights and take turns; a ratio is of two neighbours in time, the
table has their median and range. Memory is the peak above what was resident (on a GPU: allocated) before. Differences are
relative to their tensor's largest entry, in float32 and eval(), as padding enters BatchNorm in train(). They are rounding, as
tests/test_bench.py shows in float64; now and then it puts an input of a ReLU on the other side of 0, and one point's part of one
hidden unit's gradient is missing, some 1e-2. Forward is timed as in stage 2, backward as in stage 1; the learning rate is 0.

On a CPU the bare command takes one view and 6 of the 48 layers. The embedding costs the same at any depth: --depth 48 has all
layers, in 17 GB at width 768. Getting tensors of more than 32 MB anew from the system is most of the straightforward time there;
with MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184 in the environment both formulations keep their memory.
"""
import ctypes
import functools
import gc
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median
from typing import Callable, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.spatial import cKDTree
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from readers import files
import models
import training
from plumbing.arguments import COUNT, Distinct, Parser, whole
from data import CLOUD, Frames, collate, plane_sizes
from distill import DIRECTIONS, distillation_loss, sample_features
from errors import one_line_errors
from index import load_index
from miniature.world import make_world
from waffleiron import WaffleIron

FEW = 6   # layers, two on each plane: what a CPU is measured with, where all 48 take minutes
# What stages 1 and 2 learn from, in views and in words. 49 epochs and one: the paper, Sec. 4.1; frames: nuScenes (`python index.py` counts them).
RUNS = ((49 * 20_000, "49 epochs of about 20,000 clear frames, one camera each"), (6 * 28_130, "one epoch of 28,130 frames, six cameras each"))

# ---- the straightforward formulation -------------------------------------------------------------------------------------

def pad(feats, cells, neighbors, batch):
    """A ragged batch zero-padded to its largest cloud: feats [B, Cin, N], cells [B, P, N], neighbors [B, K, N], occupied [B, N]."""
    counts = torch.bincount(batch).tolist()
    neighbors = torch.cat([rows - sum(counts[:b]) for b, rows in enumerate(neighbors.split(counts))])
    rows = (pad_sequence(rows.split(counts), batch_first=True).transpose(1, 2).contiguous() for rows in (feats, cells.T, neighbors))
    return *rows, pad_sequence(torch.ones_like(batch, dtype=torch.bool).split(counts), batch_first=True)


def on_columns(layer, x):
    """A layer of WaffleIron that works on points, on [B, C, N] instead of rows; a linear one as a convolution over one point."""
    if isinstance(layer, nn.Sequential):
        return functools.reduce(lambda x, part: on_columns(part, x), layer, x)
    if isinstance(layer, nn.Linear):
        return F.conv1d(x, layer.weight.unsqueeze(2), layer.bias)
    return layer(x.transpose(1, 2)).transpose(1, 2) if isinstance(layer, nn.LayerNorm) else layer(x)


def plain_embedding(embed, feats, neighbors):
    """feats [B, Cin, N], neighbors [B, K, N] -> [B, C, N]."""
    (b, c, n), k = feats.shape, neighbors.shape[1]
    x = on_columns(embed.norm, feats)
    index = neighbors.flatten(1).unsqueeze(1).expand(-1, c, -1)                                  # [B, Cin, K N]
    edges = (x.gather(2, index).view(b, c, k, n) - x.unsqueeze(2)).flatten(2)                    # [B, Cin, K N]
    nearby = on_columns(embed.edges, edges).view(b, -1, k, n).max(2).values                      # [B, C, N]
    return on_columns(embed.final, torch.cat([on_columns(embed.point, x), nearby], dim=1))


def plain_waffleiron(model, feats, cells, neighbors, occupied):
    """What a WaffleIron without drop path computes, on a padded batch; padding is left out of what is returned: [M, Cout]."""
    grids, weights = model.spec["grids"], []
    for cell, (height, width) in zip(cells.unbind(1), grids):   # once for all layers: 1 / number of points in the point's cell
        count = feats.new_zeros(len(cell), height * width).scatter_add_(1, cell, occupied.to(feats.dtype))
        weights.append((occupied / count.gather(1, cell).clamp(min=1)).unsqueeze(1))             # [B, 1, N], 0 for padding
    x = plain_embedding(model.embed, feats, neighbors).to(feats.dtype)                           # [B, C, N]
    for i, (spatial, channel) in enumerate(zip(model.spatial_mix, model.channel_mix)):
        p, (height, width) = i % len(grids), grids[i % len(grids)]
        index = cells[:, p].unsqueeze(1).expand(-1, x.shape[1], -1)                              # [B, C, N]
        y = on_columns(spatial.norm, x) * weights[p]
        plane = y.new_zeros(*x.shape[:2], height * width).scatter_add_(2, index, y)              # [B, C, H W]
        plane = spatial.ffn(plane.view(*x.shape[:2], height, width)).flatten(2)                  # [B, C, H W]
        x = x + spatial.scale.unsqueeze(1) * plane.gather(2, index)
        x = x + channel.scale.unsqueeze(1) * on_columns(channel.mlp, on_columns(channel.norm, x))
    return on_columns(model.head, x).transpose(1, 2)[occupied]


def plain_pixel_features(maps, pixels, batch, image_size):
    """Feature maps [B, D, h, w] up-sampled to the image, then read at whole pixels [M, 2] -> [M, D]."""
    row, col = pixels.long().unbind(1)
    return F.interpolate(maps, size=tuple(image_size), mode="bilinear", align_corners=True)[batch, :, row, col]


def plain_item(frames, key, whole=False):
    """The item frames[key], of all cameras and training=False. whole: voxels of the whole scan, then what the camera sees of them."""
    index, options, fov = frames.index, frames.cloud, np.asarray(frames.cloud["fov"])
    number, camera = divmod(key[1], len(index.cameras))
    row, (mean, std) = frames.rows[number], options["intensity"]
    with Image.open(os.path.join(index.root, index.image[row, camera].decode())) as image:
        image = np.array(image.convert("RGB").resize(frames.image_size[::-1], Image.Resampling.BILINEAR))
    points = frames.scan(row)                                                                    # [A, 4]
    seen = np.column_stack([points[:, :3], np.ones(len(points))]) @ index.cam_from_lidar[row, camera].T     # [A, 4]
    pixels = seen[:, :3] @ index.intrinsics[row, camera].T
    pixels, size = pixels[:, 1::-1] / pixels[:, 2:], index.image_size[row, camera]               # [A, 2] row, col
    near = (np.abs(points[:, :3]) < fov - 1e-4).all(1)
    keep = near & (seen[:, 2] > 1) & (pixels > 0).all(1) & (pixels < size - 1).all(1)
    voxels = np.floor(points[near if whole else keep, :3] / options["voxel"]).astype(np.int64)
    first = np.flatnonzero(near if whole else keep)[np.sort(np.unique(voxels, axis=0, return_index=True)[1])]
    keep = first[keep[first]]                                                                    # [N]
    xyz = points[keep, :3]
    x, y, z = np.floor((xyz + fov) / options["cell"]).astype(np.int64).T
    (_, columns_xy), (_, columns_z), _ = plane_sizes(fov, options["cell"])
    arrays = {"image": image.transpose(2, 0, 1), "cells": np.stack([x * columns_xy + y, x * columns_z + z, y * columns_z + z]),
              "feats": np.column_stack([(points[keep, 3] - mean) / std, xyz, np.linalg.norm(xyz, axis=1)]).astype(np.float32),
              "pixels": (pixels[keep] * (np.asarray(frames.image_size) / size)).astype(np.float32),
              "depths": seen[keep, 2].astype(np.float32),
              "neighbors": cKDTree(xyz).query(xyz, k=options["neighbors"] + 1)[1][:, 1:]}
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}


# ---- measuring -----------------------------------------------------------------------------------------------------------

class Case(NamedTuple):
    """Something that both formulations do. `learner`: whose parameters get gradients; in train() while it is timed if `train`."""
    name: str
    run: Callable            # run(plain, precision) -> what must be equal: a list of tensors
    device: torch.device = torch.device("cpu")
    learner: nn.Module = nn.Identity()
    train: bool = False


def seconds(function, device):
    """Time of `function`; with one thread on a CPU the processor's, which is the same but for other jobs on the machine."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def peak_bytes(function, device):
    """Bytes at most while `function` runs, above those before it; None where that cannot be had: on a CPU without Linux' /proc."""
    def peak():
        return torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * next(
            int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))

    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        ctypes.CDLL(None).malloc_trim(0)                # else memory that was freed but kept counts as resident
        Path("/proc/self/clear_refs").write_text("5")   # the peak is what is resident now
    else:
        return None
    before = peak()
    function()
    return peak() - before


def difference(plain, ours):
    """Largest difference of two lists of tensors, each relative to its largest entry; None for empty lists."""
    return max(((a.double() - b.double()).abs().max().item() / max(a.abs().max().item(), 1e-30)
                for a, b in zip(plain, ours, strict=True)), default=None)


def repeat(runs, device, repeats):
    """Times [s] of the functions `runs` in turn: a list of lists, of at least so many repetitions that take at least as many seconds."""
    times = []
    while len(times) < repeats or np.sum(times) < repeats:
        times.append([seconds(run, device) for run in runs])
    return times


def measure(case, precision, repeats):
    """A row of the table, a dict: differences of outputs and gradients; times [s] and peaks [bytes] of (straightforward, ours)."""
    found = []
    for plain in (True, False):   # the comparison is the warm-up
        case.learner.eval().zero_grad()
        outputs = [out.detach().clone() for out in case.run(plain, "fp32")]
        found.append((outputs, [p.grad for p in case.learner.parameters() if p.grad is not None]))
    differ = [difference(*pair) for pair in zip(*found)]
    del found, outputs
    case.learner.train(case.train).zero_grad()
    runs = [functools.partial(case.run, plain, precision) for plain in (True, False)]
    times = repeat(runs, case.device, repeats)
    peaks = [peak_bytes(run, case.device) for run in runs]
    case.learner.eval().zero_grad()
    return {"name": case.name, "differ": differ, "times": times, "peaks": peaks}


def faster(times):
    """Median and range of the ratios of times, a list of (straightforward, ours)."""
    ratios = [plain / ours for plain, ours in times]
    return f"{median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})"


def table(rows):
    """Markdown of the rows of `measure`; "plain" is the straightforward formulation."""
    lines = ["| | time, plain | here | times faster (range) | memory, plain | here | part | outputs differ | gradients differ |",
             "|---|" + "---:|" * 8]
    for row in rows:
        cells, (plain, ours) = [f"{median(times) * 1e3:,.0f} ms" for times in zip(*row["times"])], row["peaks"]
        cells += [faster(row["times"]), *(["not run"] * 3 if plain is None else
                                          [f"{plain / 2**20:,.0f} MB", f"{ours / 2**20:,.0f} MB", f"{ours / max(plain, 1):.2f}"])]
        cells += ["-" if value is None else f"{value:.0e}" for value in row["differ"]]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- what is measured ----------------------------------------------------------------------------------------------------

def item_cases(frames):
    """The data items of all views of the first frame, straightforward in two ways; and what they do not have in common, in words."""
    keys, names = [(0, number) for number in range(len(frames.index.cameras))], ("pixels", "depths", "feats", "cells", "neighbors")

    def run(plain, precision, whole):
        items = [plain_item(frames, key, whole) if plain else frames[key] for key in keys]
        return [] if whole else [item[name] for item in items for name in names]

    levels = torch.cat([(frames[key]["image"].float() - plain_item(frames, key)["image"].float()).abs() for key in keys])
    points, others = ({tuple(row) for key in keys for row in item(key)["feats"].tolist()}
                      for item in (frames.view, functools.partial(plain_item, frames, whole=True)))
    note = (f"Images, decoded here at a part of their resolution, differ by {levels.max():.0f} of 255 levels at most, {levels.mean():.2f} in the "
            f"mean. Voxels of the whole scan: {len(points - others)} of {len(points)} different points are others, as the first in one may be "
            "out of view.")
    return [Case(f"{len(keys)} data items{name}", functools.partial(run, whole=whole))
            for name, whole in ((", voxels of the whole scan", True), (", voxels of a camera's points", False))], note


def check_cost(frames, repeats):
    """What checking its files costs a data item, in words; timed within items of the first frame."""
    spent, device = [], torch.device("cpu")

    def timed(check):
        def run(*arguments):
            found = []
            spent.append(seconds(lambda: found.append(check(*arguments)), device))
            return found[0]
        return run

    views = range(len(frames.index.cameras))
    both = {"plausible": timed(files.plausible), "stretches": timed(files.stretches)}
    with mock.patch.multiple(files, **both):
        times = repeat([lambda: [frames[0, view] for view in views]], device, repeats)
    checks, items = (median(np.reshape(t, (len(times), -1)).sum(1)) / len(views) * 1e3
                     for t in (spent, times))
    return (f"Checks of the scan and the image of a data item: {checks:.2f} of {items:.1f} ms, "
            f"{checks / items:.1%}.")


def distill_case(name, stage, device, learner, pixel_features, point_features, optimizer=None):
    """What stage 1 or 2 does with two sides, functions of `plain` that give [M, D] each. stage None: they are computed, that is all."""
    def run(plain, precision):
        with training.autocast(device, precision):
            with torch.set_grad_enabled(stage == 2):
                pixels = pixel_features(plain)
            with torch.set_grad_enabled(stage == 1):
                points = point_features(plain)
        learner.zero_grad()
        if stage:
            distillation_loss(pixels, points, DIRECTIONS[stage - 1]).backward()
        if optimizer:
            optimizer.step()
        return [pixels, points]

    return Case(name, run, device, learner, stage == 1)


def both_forms(batch):
    """forward(model, plain) -> [M, Cout]: a WaffleIron on this batch."""
    ours = [batch[name] for name in ("feats", "cells", "neighbors", "batch")]
    padded = pad(*ours)
    return lambda model, plain: plain_waffleiron(model, *padded) if plain else model(*ours)


def waffleiron_cases(channels, depth, out_channels, batch, device):
    """Of one width, forward; forward and backward. And the model."""
    norm = "layernorm" if channels == 768 else "batchnorm"   # ScaLR, Sec. 4.1
    model = WaffleIron(channels=channels, depth=depth, out_channels=out_channels, norm=norm).to(device)
    target, points = torch.randn(len(batch["feats"]), out_channels, device=device), functools.partial(both_forms(batch), model)
    return [distill_case(f"WI-{depth}-{channels}, forward{more}", stage, device, model, lambda plain: target, points)
            for more, stage in (("", None), (" + backward", 1))], model


def step_cases(encoder, model, batch, image_size, device, wide=1024):
    """A training step of stage 1; of stage 2; of stage 2 from feature maps to their gradient, as wide as a ViT-L's."""
    def read(maps, plain):
        return (plain_pixel_features if plain else sample_features)(maps, batch["pixels"], batch["batch"], image_size)

    views, points = len(batch["image"]), functools.partial(both_forms(batch), model)
    name = f"step, {encoder.spec['name']}, WI-{model.spec['depth']}-{model.spec['channels']}, batch {views}"
    maps = nn.ParameterList([torch.randn(views, wide, *(side // 14 for side in image_size), device=device)])
    target = torch.randn(len(batch["pixels"]), wide, device=device)
    return [*(distill_case(f"stage-{stage} {name}", stage, device, learner, lambda plain: read(encoder(batch["image"]), plain), points,
                           torch.optim.AdamW(learner.parameters(), lr=0.0)) for stage, learner in ((1, model), (2, encoder))),
            distill_case(f"stage-2 image side, {wide} channels, batch {views}", 2, device, maps, lambda plain: read(maps[0], plain),
                         lambda plain: target)]


def linear_cost(items, channels, args, device):
    """Markdown: our forward and backward of so many points, which come in whole views but for the last one, cut to fit."""
    # A few layers do: all cost the same, and 30,000 points through 48 of width 768 would need some 60 GB.
    lines = [f"| WI-{FEW}-{channels}, forward + backward, here | views | time | a point (range) |", "|---|---:|---:|---:|"]
    views = collate(items * (1 + max(args.points) // sum(len(item["feats"]) for item in items)))
    for count in args.points:   # a neighbour beyond the cut becomes the last point: it costs the same
        batch = {"feats": views["feats"][:count], "cells": views["cells"][:, :count], "batch": views["batch"][:count],
                 "neighbors": views["neighbors"][:count].clamp(max=count - 1)}
        case = waffleiron_cases(channels, FEW, channels, training.to_device(batch, device), device)[0][1]
        run = functools.partial(case.run, False, args.precision)
        run()   # warm-up: the first run of a size takes up to twice as long
        times = np.concatenate(repeat([run], device, 1))
        low, middle, high = np.quantile(times, (0, 0.5, 1)) / count * 1e6
        time_ms, views_in = median(times) * 1e3, batch["batch"][-1] + 1
        lines.append(f"| {count:,} points | {views_in} | {time_ms:,.0f} ms | {middle:,.0f} ({low:,.0f}–{high:,.0f}) µs |")
    return "\n".join(lines)


def whole_run(row, batch, views, words):
    """A row of `measure` in words: what a view takes, and how long a run of so many views would be, the steps alone."""
    view_s = median(ours for _, ours in row["times"]) / batch
    return f"{row['name']}, here: {view_s * 1e3:,.1f} ms a view, so {view_s * views / 3600:,.1f} hours of steps for {words}."


def loader_rate(frames, batch, workers):
    """Views/s of a DataLoader with so many processes, its first batches aside; the files are in the system's memory by then."""
    batches = [[(i, (i * batch + n) % len(frames)) for n in range(batch)] for i in range(20 * workers)]
    loader, begin = training.load(frames, batches, collate, workers, torch.device("cpu")), None
    for number, _ in enumerate(loader, 1):
        begin = time.perf_counter() if number == workers else begin
    return 19 * workers * batch / (time.perf_counter() - begin)


def hardware(device):
    """One line: GPU, processor, PyTorch, threads."""
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")] or [platform.machine()]
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    return f"{gpu}{names[0]}, {os.cpu_count()} cores; PyTorch {torch.__version__}, threads: {torch.get_num_threads()}."


def parse(argv=None):
    parser = Parser(__doc__, prog="python -m experiments.bench")
    add = parser.add_argument
    add("--data", help="nuScenes root (default: a keyframe of nuScenes' size is made in runs/bench-world)")
    add("--version", default="v1.0-trainval", help="version folder of the root (default: %(default)s)")
    add("--widths", type=COUNT, nargs="+", action=Distinct, default=[256, 768], help="of WaffleIron; the steps take the last one (default: 256 768)")
    add("--depth", type=COUNT, help=f"layers of WaffleIron (default: 48 on a GPU, else {FEW})")
    add("--batch", type=COUNT, help="camera views in a step (default: 8 on a GPU, else 1)")
    add("--encoder", help="image encoder, with random weights (default: dinov2_vitl14 on a GPU, else vit_small14)")
    add("--points", type=COUNT, nargs="+", action=Distinct, default=[1000, 3000, 10000, 30000], help="of the linear cost (default: 1000 3000 10000 30000)")
    add("--repeats", type=COUNT, default=3, help="of each row at least, more where they take fewer seconds than that (default: %(default)s)")
    add("--workers", type=whole(1, 1024), help="processes of the loader (default: all cores beside a GPU; else it is not run)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--out", help="the tables go to this file too")
    parser.set_defaults(seed=0)
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args, start, image_size = parse(argv), time.time(), models.IMAGE_SIZE
    device = training.start(args)
    for name, *choice in (("depth", FEW, 48), ("batch", 1, 8), ("encoder", "vit_small14", "dinov2_vitl14"), ("precision", "fp32", "bf16"),
                          ("workers", None, os.cpu_count())):
        if getattr(args, name) is None:
            setattr(args, name, choice[device.type == "cuda"])
    torch.backends.cudnn.allow_tf32 = False   # differences are to be those of float32

    # ---- data ----
    args.data = args.data or make_world("runs/bench-world", seed=0, train=(1, 0, 0), val=0, frames=1, image_size=(900, 1600),
                                        azimuths=1080, lidar_fov=360, cameras=6, workers=1)
    index = load_index(args.data, args.version)
    encoder = models.load_image_encoder(args.encoder, "random").to(device)
    encoder.check_size(image_size)
    frames = Frames(index, np.arange(len(index.lidar)), "all", image_size, CLOUD)
    items = [frames[0, number] for number in range(len(index.cameras))]
    one, batch = (training.to_device(collate([items[n % len(items)] for n in range(count)]), device) for count in (1, args.batch))
    batch["pixels"] = batch["pixels"].floor()   # an up-sampled map has whole pixels

    # ---- measurements ----
    cases, note = item_cases(frames)
    checks = check_cost(frames, args.repeats)
    for channels in args.widths:
        more, model = waffleiron_cases(channels, args.depth, encoder.dim, one, device)
        cases += more
    rows = []
    for case in cases + step_cases(encoder, model, batch, image_size, device):
        print(f"{time.time() - start:4.0f} s: {case.name}", file=sys.stderr, flush=True)
        rows.append(measure(case, args.precision, args.repeats))
    linear = linear_cost(items, args.widths[0], args, device)
    loader = f"{loader_rate(frames, args.batch, args.workers):.0f} views/s, {args.workers} processes" if args.workers else "not run"

    # ---- tables ----
    steps = rows[-3:-1]   # of the three rows of step_cases
    text = "\n\n".join([hardware(device), table(rows), note, checks, linear,
                        *(whole_run(row, args.batch, *run) for row, run in zip(steps, RUNS)),
                        f"Precision: {args.precision}. Loader: {loader}. At least {args.repeats} repetitions and {args.repeats} s of each row; "
                        f"{time.time() - start:.0f} s in all."])
    print(text)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()

"""How fast the implementation is, against the straightforward formulation of the same thing, written out below.

    python -m experiments.bench                                                                 # on a keyframe that it makes
    python -m experiments.bench --data /data/nuscenes --version v1.0-mini --out runs/bench.md   # on a real one

Straightforward is what the papers say, word for word: clouds zero-padded to [B, C, N], whole planes, scatter and gather with an
expanded index, the feature map up-sampled to the image before pixels are read; the image decoded in full, all points projected,
voxels by np.unique of rows. Both work on the same tensors and weights and take turns; a ratio is of two neighbours in time, and
the table has the ratios' median and range. Memory is the peak above what was resident (on a GPU: allocated) before. Differences
are relative to the largest entry of their tensor, in float32 and eval(): in train() the straightforward formulation's padding
enters BatchNorm. Forward is timed as in stage 2, backward as in stage 1, in train(); steps with a learning rate of 0.

On a CPU the bare command takes one view and 3 of the 48 layers, one on each plane. The embedding costs the same at any depth, so
these ratios are too low; those of 48 layers are computed below the table, from the row and 15 times the row "layers only".
"""
import argparse
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

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.spatial import cKDTree
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import models
import training
from data import CLOUD, Frames, collate, nearest_neighbors, plane_sizes
from distill import DIRECTIONS, distillation_loss, sample_features
from errors import InputError, one_line_errors
from index import load_index
from miniature.world import make_world
from waffleiron import GRIDS, WaffleIron


# ---- the straightforward formulation: WaffleIron -------------------------------------------------------------------------

def pad(batch):
    """A ragged batch zero-padded to its largest cloud: feats [B, Cin, N], cells [B, P, N], neighbors [B, K, N], occupied [B, N]."""
    counts = torch.bincount(batch["batch"]).tolist()
    starts = np.cumsum(counts) - counts
    rows = (batch["feats"].split(counts), batch["cells"].T.split(counts),
            [rows - int(start) for rows, start in zip(batch["neighbors"].split(counts), starts)])
    occupied = pad_sequence([torch.ones(n, dtype=torch.bool, device=batch["feats"].device) for n in counts], batch_first=True)
    return *(pad_sequence(r, batch_first=True).transpose(1, 2).contiguous() for r in rows), occupied


def plain_norm(norm, x):
    """LayerNorm or BatchNorm over C of [B, C, N]."""
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x.transpose(1, 2), norm.normalized_shape, norm.weight, norm.bias, norm.eps).transpose(1, 2)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)


def plain_linear(linear, x):
    """A linear layer as a convolution with a kernel of one point: [B, C, N] -> [B, D, N]."""
    return F.conv1d(x, linear.weight.unsqueeze(2), linear.bias)


def plain_embedding(embed, feats, neighbors):
    """feats [B, Cin, N], neighbors [B, K, N] -> [B, C, N]."""
    (b, c, n), k = feats.shape, neighbors.shape[1]
    x = plain_norm(embed.norm, feats)
    index = neighbors.flatten(1).unsqueeze(1).expand(-1, c, -1)                                  # [B, Cin, K N]
    edges = (x.gather(2, index).view(b, c, k, n) - x.unsqueeze(2)).flatten(2)                    # [B, Cin, K N]
    first_norm, first, second_norm, activation, second = embed.edges
    edges = activation(plain_norm(second_norm, plain_linear(first, plain_norm(first_norm, edges))))
    nearby = plain_linear(second, edges).view(b, -1, k, n).max(2).values                         # [B, C, N]
    return plain_linear(embed.final, torch.cat([plain_linear(embed.point, x), nearby], dim=1))   # [B, C, N]


def plain_layers(model, x, cells, occupied):
    """All residual layers of a WaffleIron without drop path: x [B, C, N], cells [B, P, N], occupied [B, N] -> [B, C, N]."""
    grids, weights = model.spec["grids"], []
    for cell, (height, width) in zip(cells.unbind(1), grids):   # once for all layers: 1 / number of points in the point's cell
        count = x.new_zeros(len(cell), height * width).scatter_add_(1, cell, occupied.to(x.dtype))
        weights.append((occupied / count.gather(1, cell).clamp(min=1)).unsqueeze(1))             # [B, 1, N], 0 for padding
    for i, (spatial, channel) in enumerate(zip(model.spatial_mix, model.channel_mix)):
        p, (height, width) = i % len(grids), grids[i % len(grids)]
        index = cells[:, p].unsqueeze(1).expand(-1, x.shape[1], -1)                              # [B, C, N]
        y = plain_norm(spatial.norm, x) * weights[p]
        plane = y.new_zeros(*x.shape[:2], height * width).scatter_add_(2, index, y)              # [B, C, H W]
        plane = spatial.ffn(plane.view(*x.shape[:2], height, width)).flatten(2)                  # [B, C, H W]
        x = x + spatial.scale.unsqueeze(1) * plane.gather(2, index)
        first, activation, second = channel.mlp
        x = x + channel.scale.unsqueeze(1) * plain_linear(second, activation(plain_linear(first, plain_norm(channel.norm, x))))
    return x


def plain_waffleiron(model, feats, cells, neighbors, occupied):
    """What `model`, a WaffleIron with a linear head, computes, on a padded batch (`pad`); only its points are returned: [M, Cout]."""
    x = plain_embedding(model.embed, feats, neighbors).to(feats.dtype)                           # [B, C, N]
    x = plain_layers(model, x, cells, occupied)
    return plain_linear(model.head, x).transpose(1, 2)[occupied]                                 # [M, Cout]


# ---- the straightforward formulation: pixel features, a data item --------------------------------------------------------

def plain_pixel_features(maps, pixels, batch, image_size):
    """Feature maps [B, D, h, w] up-sampled to the image, then read at whole pixels [M, 2] -> [M, D]."""
    row, col = pixels.long().unbind(1)
    return F.interpolate(maps, size=tuple(image_size), mode="bilinear", align_corners=True)[batch, :, row, col]


def plain_item(frames, key):
    """The item frames[key], of views of all cameras with a cloud and an image and training=False."""
    index, options, fov = frames.index, frames.cloud, np.asarray(frames.cloud["fov"])
    number, camera = divmod(key[1], len(index.cameras))
    row = frames.rows[number]
    with Image.open(os.path.join(index.root, index.image[row, camera].decode())) as image:
        image = image.convert("RGB").resize(frames.image_size[::-1], Image.Resampling.BILINEAR)
    points = frames.scan(row)                                                                    # [A, 4]
    seen = np.column_stack([points[:, :3], np.ones(len(points))]) @ index.cam_from_lidar[row, camera].T     # [A, 4]
    pixels = seen[:, :3] @ index.intrinsics[row, camera].T
    pixels, size = pixels[:, 1::-1] / pixels[:, 2:], index.image_size[row, camera]               # [A, 2] row, col
    visible = (seen[:, 2] > 1) & (pixels > 0).all(1) & (pixels < size - 1).all(1) & (np.abs(points[:, :3]) < fov - 1e-4).all(1)
    points, pixels, depths = points[visible], pixels[visible] * (np.asarray(frames.image_size) / size), seen[visible, 2]
    # Voxels of the whole scan would cost more, and their first points that the camera sees are not those of what it sees.
    voxels = np.floor(points[:, :3] / options["voxel"]).astype(np.int64)
    first = np.sort(np.unique(voxels, axis=0, return_index=True)[1])
    xyz, intensity = points[first, :3], points[first, 3]                                         # [N, 3], [N]
    mean, std = options["intensity"]
    cells = np.floor((xyz + fov) / options["cell"]).astype(np.int64)
    sizes = plane_sizes(fov, options["cell"])
    arrays = {"image": np.array(image).transpose(2, 0, 1),
              "pixels": pixels[first].astype(np.float32), "depths": depths[first].astype(np.float32),
              "feats": np.column_stack([(intensity - mean) / std, xyz, np.linalg.norm(xyz, axis=1)]).astype(np.float32),
              "cells": np.stack([cells[:, a] * sizes[p][1] + cells[:, b] for p, (a, b) in enumerate(((0, 1), (0, 2), (1, 2)))]),
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
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - begin


def peak_bytes(function, device):
    """Bytes at most while `function` runs, above those before it; None where that cannot be had: on a CPU without Linux' /proc."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def high_water_mark():
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)

    try:
        ctypes.CDLL(None).malloc_trim(0)                # else memory that was freed but kept is resident already
        Path("/proc/self/clear_refs").write_text("5")   # the mark is what is resident now
        before = high_water_mark()
    except (OSError, AttributeError, StopIteration):
        return None
    function()
    return high_water_mark() - before


def difference(plain, ours):
    """Largest difference of two lists of tensors, each relative to its largest entry; None for empty lists."""
    return max(((a.double() - b.double()).abs().max().item() / max(a.abs().max().item(), 1e-30)
                for a, b in zip(plain, ours, strict=True)), default=None)


def measure(case, precision, repeats):
    """A row of the table, a dict: differences of outputs and gradients; times [s] and peaks [bytes] of (straightforward, ours)."""
    case.learner.eval()
    found = []
    for plain in (True, False):   # the comparison is the warm-up
        case.learner.zero_grad()
        outputs = [out.detach().clone() for out in case.run(plain, "fp32")]
        found.append((outputs, [p.grad for p in case.learner.parameters() if p.grad is not None]))
    differ = [difference(*pair) for pair in zip(*found)]
    case.learner.train(case.train).zero_grad()
    del found, outputs
    runs = [functools.partial(case.run, plain, precision) for plain in (True, False)]
    times = [[seconds(run, case.device) for run in runs] for _ in range(repeats)]
    row = {"name": case.name, "differ": differ, "times": times, "peaks": [peak_bytes(run, case.device) for run in runs]}
    case.learner.zero_grad()
    return row


def faster(times):
    """Median and range of the ratios of times, a list of (straightforward, ours)."""
    ratios = [plain / ours for plain, ours in times]
    return f"{median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})"


def table(rows):
    """Markdown of the rows of `measure`; "plain" is the straightforward formulation."""
    lines = ["| | time, plain | here | times faster (range) | memory, plain | here | part | outputs differ | gradients differ |",
             "|---|" + "---:|" * 8]
    for row in rows:
        cells = [f"{median(times) * 1e3:,.0f} ms" for times in zip(*row["times"])] + [faster(row["times"])]
        plain, ours = row["peaks"]
        cells += ["not run"] * 3 if plain is None else [f"{plain / 2**20:,.0f} MB", f"{ours / 2**20:,.0f} MB", f"{ours / max(plain, 1):.2f}"]
        cells += ["-" if value is None else f"{value:.0e}" for value in row["differ"]]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- what is measured ----------------------------------------------------------------------------------------------------

def item_case(frames):
    """The data items of all views of the first frame, and a sentence about their images."""
    keys = [(0, number) for number in range(len(frames.index.cameras))]

    def run(plain, precision):
        items = [plain_item(frames, key) if plain else frames[key] for key in keys]
        return [item[name] for item in items for name in ("pixels", "depths", "feats", "cells", "neighbors")]

    levels = torch.stack([(frames[key]["image"].float() - plain_item(frames, key)["image"].float()).abs() for key in keys])
    return Case(f"{len(keys)} data items", run), (
        "Not among the differences: images, which are decoded here at a part of their resolution, differ by "
        f"{levels.max():.0f} of 255 levels at most, {levels.mean():.2f} in the mean.")


def build(channels, depth, out_channels, device):
    """A WaffleIron with ScaLR's normalisation for this width."""
    return WaffleIron(channels=channels, depth=depth, out_channels=out_channels,
                      norm="layernorm" if channels == 768 else "batchnorm").to(device)


def ragged(batch):
    return [batch[name] for name in ("feats", "cells", "neighbors", "batch")]


class Given(nn.Module):
    """In place of an embedding: the points [N, C] are there."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x)

    def forward(self, feats, neighbors):
        return self.x


def waffleiron_cases(channels, depth, batch, device):
    """Of one width: forward; forward and backward; the same of three layers only, for one view."""
    ours, padded = ragged(batch), pad(batch)
    model, layers = build(channels, depth, channels, device), build(channels, len(GRIDS), 1, device)
    layers.embed, layers.head = Given(torch.randn(len(ours[0]), channels, device=device)), nn.Identity()
    target = torch.randn(len(ours[0]), channels, device=device)

    def run(plain, precision, learner=model, backward=True):
        with torch.set_grad_enabled(backward), training.autocast(device, precision):
            if not plain:
                out = learner(*ours)
            elif learner is model:
                out = plain_waffleiron(model, *padded)
            else:
                out = plain_layers(layers, layers.embed.x.T[None], padded[1], padded[3])[0].T
        if backward:
            learner.zero_grad()
            distillation_loss(target, out, DIRECTIONS[0]).backward()
        return [out]

    return [Case(f"WI-{depth}-{channels}, forward", functools.partial(run, backward=False), device, model),
            Case(f"WI-{depth}-{channels}, forward + backward", run, device, model, True),
            Case(f"WI-3-{channels}, layers only", functools.partial(run, learner=layers), device, layers, True)]


def step_case(stage, encoder, model, batch, args, device):
    """A training step of stage 1 or 2, in the order of their loops."""
    learner, frozen = (model, encoder) if stage == 1 else (encoder, model)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=0.0)
    ours, padded, read = ragged(batch), pad(batch), (batch["pixels"], batch["batch"], args.image_size)

    def run(plain, precision):
        frozen.eval().requires_grad_(False)
        learner.requires_grad_(True)
        with training.autocast(device, precision):
            with torch.set_grad_enabled(stage == 2):
                maps = encoder(batch["image"])
                pixel_features = plain_pixel_features(maps, *read) if plain else sample_features(maps, *read)
            with torch.set_grad_enabled(stage == 1):
                point_features = plain_waffleiron(model, *padded) if plain else model(*ours)
        loss = distillation_loss(pixel_features, point_features, DIRECTIONS[stage - 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return [loss, pixel_features, point_features]

    name = f"stage-{stage} step, {encoder.spec['name']}, WI-{args.depth}-{model.spec['channels']}, batch {args.batch}"
    return Case(name, run, device, learner, stage == 1)


def image_side_case(batch, args, device, channels=1024):
    """Stage 2 from feature maps to their gradient, as wide as a ViT-L's."""
    maps = Given(torch.randn(args.batch, channels, *(side // 14 for side in args.image_size), device=device))
    points = torch.randn(len(batch["pixels"]), channels, device=device)

    def run(plain, precision):
        maps.zero_grad()
        features = (plain_pixel_features if plain else sample_features)(maps.x, batch["pixels"], batch["batch"], args.image_size)
        distillation_loss(features, points, DIRECTIONS[1]).backward()
        return [features]

    return Case(f"stage-2 image side, {channels} channels, batch {args.batch}", run, device, maps)


def linear_cost(items, channels, args, device):
    """Markdown: our forward and backward of so many points, which come in whole views but for the last one, thinned out to fit."""
    lines = [f"| WI-{args.depth}-{channels}, forward + backward, here | views | time | a point |", "|---|---:|---:|---:|"]
    for count in args.points:
        views, missing = [], count
        while missing > 0:
            item = items[len(views) % len(items)]
            keep = torch.linspace(0, len(item["feats"]) - 1, min(missing, len(item["feats"]))).round().long()
            near = torch.from_numpy(nearest_neighbors(item["feats"][keep, 1:4].numpy(), CLOUD["neighbors"]))
            views.append({"feats": item["feats"][keep], "cells": item["cells"][:, keep], "neighbors": near})
            missing -= len(keep)
        case = waffleiron_cases(channels, args.depth, training.to_device(collate(views), device), device)[1]
        times = [seconds(lambda: case.run(False, args.precision), device) for _ in range(1 + args.repeats)][1:]
        lines.append(f"| {count:,} points | {len(views)} | {median(times) * 1e3:,.0f} ms | {median(times) / count * 1e6:,.0f} µs |")
    return "\n".join(lines)


def loader_rate(frames, args):
    """Frames/s of the DataLoader with args.workers processes once it runs; the files are in the system's memory by then."""
    batches = [[(i, (i * args.batch + n) % len(frames)) for n in range(args.batch)] for i in range(20 * args.workers)]
    loader = iter(training.load(frames, batches, collate, args.workers, torch.device("cpu")))
    for _ in range(args.workers):
        next(loader)
    begin = time.perf_counter()
    return sum(len(batch["image"]) for batch in loader) / (time.perf_counter() - begin)


def hardware(device):
    """One line: GPU, processor, threads, PyTorch."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor() or platform.machine())
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    return f"{gpu}{cpu}, {os.cpu_count()} cores, PyTorch {torch.__version__} on {torch.get_num_threads()} of them."


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="nuScenes root (default: a keyframe of nuScenes' size is made in runs/bench-world)")
    add("--version", default="v1.0-trainval", help="version folder of the root (default: %(default)s)")
    add("--widths", type=int, nargs="+", default=[256, 768], help="of WaffleIron; the steps take the last one (default: 256 768)")
    add("--depth", type=int, help="layers of WaffleIron (default: 48 on a GPU, else 3)")
    add("--batch", type=int, help="camera views in a step (default: 8 on a GPU, else 1)")
    add("--encoder", help="image encoder, with random weights (default: dinov2_vitl14 on a GPU, else vit_small14)")
    add("--image-size", type=int, nargs=2, default=models.IMAGE_SIZE, metavar=("H", "W"), help="(default: 224 448)")
    add("--points", type=int, nargs="+", default=[1000, 3000, 10000, 30000], help="of the linear cost (default: 1000 3000 10000 30000)")
    add("--repeats", type=int, default=3, help="of each measurement (default: %(default)s)")
    add("--workers", type=int, help="processes of the loader (default: all cores beside a GPU; else it is not run)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    add("--out", help="the tables go to this file too")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args, start = parse(argv), time.time()
    for name in ("widths", "depth", "points", "repeats", "workers"):
        if (value := getattr(args, name)) is not None and np.min(value) < 1:
            raise InputError(f"--{name} {value}: must be at least 1")
    device = training.start(args)
    gpu = device.type == "cuda"
    for name, *choice in (("depth", 3, 48), ("batch", 1, 8), ("encoder", "vit_small14", "dinov2_vitl14"), ("workers", None, os.cpu_count())):
        if getattr(args, name) is None:
            setattr(args, name, choice[gpu])
    torch.backends.cudnn.allow_tf32 = False   # differences are to be those of float32

    # ---- data ----
    if args.data is None:
        args.data = make_world("runs/bench-world", seed=0, train=(1, 0, 0), val=0, frames=1, image_size=(900, 1600), azimuths=1080,
                               lidar_fov=360, cameras=6, workers=1)
    index = load_index(args.data, args.version)
    encoder = models.load_image_encoder(args.encoder, "random").to(device)
    args.image_size = encoder.check_size(args.image_size)
    frames = Frames(index, np.arange(len(index.lidar)), "all", args.image_size, CLOUD)
    items = [frames[0, number] for number in range(len(index.cameras))]
    one, batch = (training.to_device(collate([items[n % len(items)] for n in range(count)]), device) for count in (1, args.batch))
    batch["pixels"] = batch["pixels"].floor()   # an up-sampled map has whole pixels

    # ---- measurements ----
    item, note = item_case(frames)
    model = build(args.widths[-1], args.depth, encoder.dim, device)
    cases = [item, *(case for channels in args.widths for case in waffleiron_cases(channels, args.depth, one, device)),
             *(step_case(stage, encoder, model, batch, args, device) for stage in (1, 2)), image_side_case(batch, args, device)]
    rows = []
    try:
        for number, case in enumerate(cases, 1):
            print(f"{time.time() - start:4.0f} s: {number} of {len(cases)}, {case.name}", file=sys.stderr, flush=True)
            rows.append(measure(case, args.precision, args.repeats))
        linear = linear_cost(items, args.widths[0], args, device)
    except torch.cuda.OutOfMemoryError:
        raise InputError(f"--batch {args.batch} --depth {args.depth}: out of the GPU's memory; lower one of them") from None
    loader = f"{loader_rate(frames, args):.0f} frames/s, {args.workers} processes" if args.workers else "not run"

    # ---- tables ----
    stage1, deep = rows[-3], []
    frame = median(ours for _, ours in stage1["times"]) / args.batch
    for row, part in [*zip(rows[2:-3:3], rows[3:-3:3]), *([(stage1, rows[-4])] if args.batch == 1 else [])]:
        more = (48 - args.depth) / len(GRIDS)
        times = [[a + more * b for a, b in zip(*pairs)] for pairs in zip(row["times"], part["times"])]
        deep.append(f"{row['name'].replace(f'WI-{args.depth}-', 'WI-48-')} {faster(times)}")
    text = [hardware(device), table(rows), note, f"Times faster with 48 layers, computed: {'; '.join(deep)}." if args.depth < 48 else "", linear,
            "| stage 1, WI-48-768, ViT-L, bf16, batch 8 | a frame | step | loader |\n|---|---:|---:|---:|\n| here | "
            + (f"{frame * 1e3:.1f} ms | {1 / frame:.0f} frames/s" if gpu else "not run | not run") + f" | {loader} |",
            f"{args.repeats} repetitions; {time.time() - start:.0f} s in all."]
    text = "\n\n".join(filter(None, text))
    print(text)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()

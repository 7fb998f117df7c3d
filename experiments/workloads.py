"""What bench.py measures: data items, WaffleIron, and steps of stage 1 and 2, in both formulations.

The plain formulation is that of plain.py.
"""
import functools
from typing import Callable, NamedTuple

import torch
from torch import nn

from data import Frames
from distill import DIRECTIONS, distillation_loss, sample_features
from experiments.plain import (pad, plain_image_item, plain_item, plain_pixel_features,
                               plain_waffleiron)
from plumbing import training
from waffleiron import WaffleIron


class Case(NamedTuple):
    """Something that both formulations do.

    The learner's parameters get gradients. It is in train() while it is timed if `train`.
    """
    name: str
    run: Callable            # run(plain, precision) -> what must be equal: a list of tensors
    device: torch.device = torch.device("cpu")
    learner: nn.Module = nn.Identity()
    train: bool = False


# ---- data items ---------------------------------------------------------------------------------

def item_cases(frames):
    """The data items of all views of the first frame, with plain voxels in two ways; images alone.

    Returns: the cases; in words, what the two formulations' items do not have in common.
    """
    keys = [(0, number) for number in range(len(frames.tables[0].cameras))]
    images = Frames(frames.tables, frames.cameras, frames.image_size)

    def run(plain, precision, whole):
        items = [plain_item(frames, key, whole) if plain else frames[key] for key in keys]
        outputs = []
        if not whole:   # else the points are others: nothing to compare
            for item in items:
                outputs += [item["pixels"], item["depths"], *item["inputs"].values()]
        return outputs

    def run_images(plain, precision):
        items = [plain_image_item(images, key) if plain else images[key] for key in keys]
        return [item["image"] for item in items]

    # What differs: images, by how they are decoded; points, by which of a voxel's is kept.
    levels = []
    points, others = set(), set()
    for key in keys:
        ours = frames[key]
        plain = plain_item(frames, key)
        levels.append((ours["image"].float() - plain["image"].float()).abs())
        points.update(map(tuple, ours["inputs"]["points"].tolist()))
        of_scan = plain_item(frames, key, whole=True)
        others.update(map(tuple, of_scan["inputs"]["points"].tolist()))
    levels = torch.cat(levels)
    note = ("Images, decoded here at a part of their resolution, differ by "
            f"{levels.max():.0f} of 255 levels at most, {levels.mean():.2f} in the mean. "
            f"Voxels of the whole scan: {len(points - others)} of {len(points)} different points "
            "are others, as the first in one may be out of view.")

    ways = ((", voxels of the whole scan", True), (", voxels of a camera's points", False))
    cases = [Case(f"{len(keys)} data items{way}", functools.partial(run, whole=whole))
             for way, whole in ways]
    cases.append(Case(f"{len(keys)} images alone, scans read all the same", run_images))
    return cases, note


# ---- networks and steps -------------------------------------------------------------------------

def distill_case(name, stage, device, learner, pixel_features, point_features, optimizer=None):
    """What stage 1 or 2 does with its two sides, functions of `plain` that give [M, D] each.

    Where `stage` is None, the two sides are computed, and that is all.
    """
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

    return Case(name, run, device, learner, train=stage == 1)


def both_forms(batch):
    """A function (model, plain) -> [M, Cout]: a WaffleIron's output on a batch, in either form."""
    padded = pad(batch)

    def forward(model, plain):
        return plain_waffleiron(model, *padded) if plain else model(batch)

    return forward


def waffleiron_cases(channels, depth, out_channels, batch, samplings, device):
    """A WaffleIron's forward, and its forward and backward; planes as of {dataset: sampling}.

    Returns: the two cases; the model.
    """
    norm = "layernorm" if channels == 768 else "batchnorm"   # ScaLR, Sec. 4.1
    model = WaffleIron(channels=channels, depth=depth, out_channels=out_channels, norm=norm)
    model.use(samplings)
    model = model.to(device)
    target = torch.randn(len(batch["view"]), out_channels, device=device)
    points = functools.partial(both_forms(batch), model)

    cases = []
    for more, stage in (("", None), (" + backward", 1)):
        name = f"WI-{depth}-{channels}, forward{more}"
        cases.append(distill_case(name, stage, device, model, lambda plain: target, points))
    return cases, model


def step_cases(encoder, model, batch, image_size, device, wide=1024):
    """A training step of stage 1, one of stage 2, and the image side of stage 2 alone.

    The image side goes from feature maps, as wide as a ViT-L's, to their gradient.
    """
    def read(maps, plain):
        sample = plain_pixel_features if plain else sample_features
        return sample(maps, batch["pixels"], batch["view"], image_size)

    def pixels(plain):
        return read(encoder(batch["image"]), plain)

    points = functools.partial(both_forms(batch), model)
    views = len(batch["image"])
    names = f"{encoder.spec['name']}, WI-{model.spec['depth']}-{model.spec['channels']}"
    cases = []
    for stage, learner in ((1, model), (2, encoder)):
        name = f"stage-{stage} step, {names}, batch {views}"
        optimizer = torch.optim.AdamW(learner.parameters(), lr=0.0)
        cases.append(distill_case(name, stage, device, learner, pixels, points, optimizer))

    name = f"stage-2 image side, {wide} channels, batch {views}"
    sides = [side // 14 for side in image_size]
    maps = nn.ParameterList([torch.randn(views, wide, *sides, device=device)])
    target = torch.randn(len(batch["pixels"]), wide, device=device)
    cases.append(distill_case(name, 2, device, maps, lambda plain: read(maps[0], plain),
                              lambda plain: target))
    return cases

"""How far apart an image encoder's features are by night and by day, without labels or LiDAR.

    python -m experiments.distance --data pictures=/data/pictures --conditions day night \
        --encoders dinov2_vits14 runs/s2

The Fréchet distance of two Gaussians (Dowson and Landau, 1982), fitted to the features of all
cells of all images of either condition, divided by the total variance of the first condition's. It
is 0 where both are alike, and does not depend on the features' scale. The streets of the two
conditions differ too, so compare only the distances of two encoders on the same pictures.
"""
import numpy as np
import torch
from scipy.linalg import sqrtm

import models
from data import Frames, collate, select
from plumbing import training
from plumbing.arguments import COUNT, WORKERS, Parser
from plumbing.atomic import write_json
from plumbing.errors import InputError, one_line_errors
from readers.table import open_tables


def frechet(a, b):
    """The distance of two sets of features [N, D] and [M, D] in parts of a's total variance.

    Raises InputError where N or M is not larger than D.
    """
    for x in (a, b):
        if len(x) <= x.shape[1]:
            raise InputError(f"{len(x)} cells of {x.shape[1]} channels have no covariance; take "
                             "more pictures, or a larger --image-size")
    spread_a, spread_b = (np.cov(x, rowvar=False) for x in (a, b))
    of_means = np.sum((a.mean(0) - b.mean(0)) ** 2)
    # A product of covariances has real roots; what is imaginary is rounding
    root = np.real(sqrtm(spread_a @ spread_b))
    return (of_means + np.trace(spread_a + spread_b - 2 * root)) / np.trace(spread_a)


@torch.no_grad()
def features_by_condition(encoder, frames, args, device):
    """{condition: features [cells, D] of all its images}."""
    found = {name: [] for name in frames.conditions}
    order = training.in_batches(range(len(frames)))
    for batch in training.load(frames, order, collate, args.workers, device):
        batch = training.to_device(batch, device)
        with training.autocast(device, args.precision):
            maps = encoder(batch["image"]).float()        # [B, D, h, w]
        for condition, features in zip(batch["condition"].tolist(), maps.flatten(2)):
            if condition < 0:  # of a dataset that states none
                continue
            found[frames.conditions[condition]].append(features.T.double().cpu().numpy())
    return {name: np.concatenate(each) for name, each in found.items() if each}


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="NAME=PATH; all of its training frames are taken")
    add("--version", help="of --data, where it has versions (default: the dataset's)")
    add("--encoders", nargs="+", required=True, help="names, or stage 2's folders")
    add("--feature", help="of all of them (default: each one's own)")
    add("--image-size", type=COUNT, nargs=2, metavar=("H", "W"), help="(default: each one's own)")
    add("--conditions", nargs=2, default=["day", "night"],
        help="the first one's variance is the measure (default: day night)")
    add("--out", help="file of the numbers, a JSON list (default: none)")
    add("--workers", type=WORKERS, default=0, help="data-loading processes (default: 0)")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.set_defaults(precision="fp32", seed=0)
    args = parser.parse_args(argv)
    device = training.start(args)
    tables = select(open_tables(args.data, args.version), "train")
    # Of which there are frames
    stated = [table.conditions[number] for table in tables if table.conditions
              for number in np.unique(table["condition"][table.rows])]
    for condition in args.conditions:
        if condition not in stated:
            raise InputError(f"--conditions {condition}: --data {args.data} has "
                             f"{', '.join(stated) or 'none'}")

    result = []
    for name in args.encoders:
        encoder = models.load_image_encoder(name, feature=args.feature, careful=False).to(device)
        size = args.image_size or encoder.spec.get("image_size", models.IMAGE_SIZE)
        frames = Frames(tables, "all", encoder.check_size(size))
        found = features_by_condition(encoder, frames, args, device)
        result.append(frechet(*(found[condition] for condition in args.conditions)))
        print(f"{name}: {result[-1]:.3f}", flush=True)
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()

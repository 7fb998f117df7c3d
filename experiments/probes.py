"""Four linear probes of one image encoder whose feature maps are computed once.

    copies="pandaset64=data/fog,pandaset64=data/low_light"
    python -m experiments.probes --data pandaset64=/data/pandaset,$copies --val-scenes 902 \
        --encoder runs/s2 --conditions clear fog --out runs/probes.json

Segmentation and depth, each with a head trained on every condition and one trained on the first
condition alone. Losses, heads and metrics are those of probe.py (--head whitened) and eval.py. Only
the order of the work differs. probe.py computes features once a probe; the frames of a dataset and
of its corrupted copies share scans, cameras and labels, and all four heads share the maps. A head
sees --points of a view in a step, and is judged on all of them. OUT is read by experiments/real.py.
"""
import os
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import models
from data import Frames, collate, select
from distill import sample_features
from heads import linear_head
from metrics import Confusion, DepthSums
from plumbing import training
from plumbing.arguments import COUNT, SEED, WORKERS, Parser
from plumbing.atomic import write_json
from plumbing.errors import InputError, one_line_errors
from plumbing.fingerprint import of_frames
from probe import TASKS, classes_of
from readers.table import hold_out, open_tables

LR = {"seg": 1e-2, "depth": 1e-1}  # peak rates of the heads


class Views(NamedTuple):
    """All camera views of a split: feature maps, and the points that are to be classified.

    Views of several copies of a scan share its points.
    """
    maps: torch.Tensor        # [V, D, h, w], half precision
    conditions: torch.Tensor  # [V], index into the names
    points: list              # V times {task: {"pixels": [N, 2], "labels" or "depths": [N]}}
    image_size: tuple         # (H, W)

    def batch(self, task, numbers, most=None, rng=None):
        """Features [N, D] of some views, and the batch that losses and metrics take.

        most: of a view's points, drawn by `rng` (default: all of them).
        """
        items = []
        for number in numbers:
            item = self.points[number][task]
            if most and len(item["pixels"]) > most:
                rows = torch.from_numpy(rng.choice(len(item["pixels"]), most, replace=False))
                item = {name: values[rows] for name, values in item.items()}
            items.append(item | {"condition": int(self.conditions[number])})
        batch = collate(items)
        maps = self.maps[numbers].float()
        return sample_features(maps, batch["pixels"], batch["view"], self.image_size), batch


# ---- views ---------------------------------------------------------------------------------------

@torch.no_grad()
def feature_maps(encoder, frames, args, device):
    """The encoder's maps [V, D, h, w] of all images, in half precision, on the CPU."""
    maps = []
    loader = training.load(frames, training.in_batches(range(len(frames))), collate, args.workers,
                           device)
    for batch in tqdm(loader, "feature maps", mininterval=2):
        batch = training.to_device(batch, device)
        with training.autocast(device, args.precision):
            maps.append(encoder(batch["image"]).half().cpu())
    return torch.cat(maps)


def views_of(tables, split, encoder, image_size, args, device):
    """(the Views of a split, its tables, the names of the conditions)."""
    chosen = select(tables, split)
    images = Frames(chosen, "all", image_size)
    points, known = [], {}
    for table in chosen:
        targets = {"seg": Frames([table], "all", image_size, target="labels"),
                   "depth": Frames([table], "all", image_size, target="depths")}
        for number in range(len(targets["seg"])):
            _, frame, camera, _ = targets["seg"].locate((0, number))
            scan = os.path.realpath(table.path("scan", frame)), camera
            if scan not in known:
                known[scan] = points_of(targets, number)
            points.append(known[scan])
    keys = [(0, number) for number in range(len(images))]
    located = [images.locate(key) for key in keys]
    conditions = [images.condition_of(chosen[which], frame) for which, frame, *_ in located]
    maps = feature_maps(encoder, images, args, device)
    views = Views(maps, torch.tensor(conditions), points, tuple(image_size))
    return views, chosen, images.conditions


def points_of(targets, number):
    """What each task learns of a view: pixels, and their labels or depths."""
    found = {}
    for task, frames in targets.items():
        item = frames[0, number]
        found[task] = {name: item[name] for name in ("pixels", TASKS[task].target)}
    return found


# ---- a probe -------------------------------------------------------------------------------------

def train_head(task, views, numbers, outputs, args):
    """A head on the features of these views, by the loss of probe.py. Returns it in eval()."""
    rng = np.random.default_rng(args.seed)
    head = linear_head("whitened", views.maps.shape[1], outputs)
    # Whitened by a part of each view's points
    some = [views.batch(task, [number], max(1, args.points // 8), rng)[0] for number in numbers]
    head[0].fit(torch.cat(some))
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR[task], weight_decay=1e-4)
    order = training.Batches(len(numbers), args.batch, 0, args.steps, args.seed)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.cosine(step, args.steps, LR[task])
        chosen = [numbers[number] for _, number in order.of(step)]
        features, batch = views.batch(task, chosen, args.points, rng)
        loss, _ = TASKS[task].loss(head(features), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


@torch.no_grad()
def judge(task, head, views, conditions, classes, left_out):
    """The metrics of a head by condition, on all points of all views, as eval.py gives them.

    left_out: of the dataset, {condition: classes left out of its mean}.
    """
    device = torch.device("cpu")
    if task == "depth":
        sums = DepthSums(len(views.maps), conditions, device)
    else:
        sums = Confusion(classes, conditions, left_out, device)
    for number in range(len(views.maps)):
        features, batch = views.batch(task, [number])
        sums.add(head(features), batch, [number])
    there = set(views.conditions.tolist())
    return sums.metrics([number for number in range(len(conditions)) if number in there])


def check_conditions(tables, names):
    """Raise InputError unless validation has these conditions and training the first of them."""
    for split, needed in (("val", names), ("train", names[:1])):
        chosen = select(tables, split)
        # A reader may know conditions of which there is no frame
        known = dict.fromkeys(name for table in chosen for name in table.conditions)
        there = {table.conditions[number] for table in chosen if table.conditions
                 for number in table["condition"][table.rows]}
        there = [name for name in known if name in there]
        if needed != (there if split == "val" else there[:1]):
            raise InputError(f"--conditions {' '.join(names)}: the frames of split {split!r} in "
                             f"--data have {' '.join(there) or 'none'}")


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True,
        help="NAME=PATH of a dataset and of its corrupted copies, with commas between")
    add("--version", help="of --data, where it has versions (default: the dataset's)")
    add("--val-scenes", nargs="+", metavar="NAME",
        help="these scenes validate, all others train (default: the dataset's own split)")
    models.add_arguments(parser, required=True, help="an encoder's name or stage 2's folder")
    add("--conditions", nargs="+", required=True,
        help="of the columns, in order; the first is what the second head of a task learns from")
    add("--points", type=COUNT, default=3000,
        help="of a view in a step, drawn anew each time (default: %(default)s)")
    add("--batch", type=COUNT, default=6, help="views in a batch (default: %(default)s)")
    add("--steps", type=COUNT, default=324, help="of a head (default: %(default)s)")
    add("--out", required=True, help="file of the results, JSON")
    add("--seed", type=SEED, default=0, help="of order and points (default: %(default)s)")
    add("--workers", type=WORKERS, default=0, help="data-loading processes (default: 0)")
    add("--device", help="of the encoder: cpu, cuda, ... (default: cuda if there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    args = parser.parse_args(argv)
    device = training.start(args)

    # ---- encoder and views ----
    tables = hold_out(open_tables(args.data, args.version, look=False), args.val_scenes)
    classes = classes_of(tables, "seg")
    encoder = models.load_image_encoder(args.encoder, args.weights, args.hub, args.feature,
                                        careful=False).to(device)
    image_size = encoder.check_size(
        args.image_size or encoder.spec.get("image_size", models.IMAGE_SIZE))
    check_conditions(tables, args.conditions)
    of_train, _, _ = views_of(tables, "train", encoder, image_size, args, device)
    of_val, val, conditions = views_of(tables, "val", encoder, image_size, args, device)

    # ---- heads ----
    result = {"encoder": encoder.fingerprint(), "frames": of_frames(val, True), "seed": args.seed}
    every = range(len(of_train.maps))
    first = conditions.index(args.conditions[0])
    of_first = [number for number in every if of_train.conditions[number] == first]
    left_out = getattr(val[0].reader, "LEFT_OUT", {})
    for name, numbers in (("all", every), ("first", of_first)):
        for task in LR:
            head = train_head(task, of_train, numbers, len(classes) if task == "seg" else 1, args)
            result[f"{task}-{name}"] = judge(task, head, of_val, conditions, classes, left_out)
    write_json(args.out, result)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()

"""Metrics by condition, and the table that sets probes side by side.

    python eval.py runs/probe-a runs/probe-b                                # evaluate what is not yet, print the table
    torchrun --standalone --nproc_per_node 4 eval.py runs/probe-a runs/probe-b           # the same, on 4 GPUs

Each probe is evaluated once on the validation split, into results.json beside its last.pth. The table is printed and written
to OUT.md and OUT.json. Collaborative-distillation paper, Sec. 4.2 and C.3.
"""
import argparse
import json
import os
from pathlib import Path

import torch
from tqdm import tqdm

import training
from checkpoints import load_checkpoint
from data import CLOUD, DEPTHS, Frames, collate
from distill import features_at_points
from errors import InputError, one_line_errors
from index import CONDITIONS, load_index
from models import linear_head, load_image_encoder
from nuimages_data import LabelledImages, load_nuimages
from waffleiron import BatchNorm, load_waffleiron

NOT_AT_NIGHT = ("bus", "trailer", "construction_vehicle")  # left out of night's mean (C.3)
COLUMNS = ("full", *CONDITIONS)


# ---- metrics: pure functions ------------------------------------------------------------------------------------------

def confusion_matrix(prediction, truth, classes):
    """Counts [classes, classes], row = truth, column = prediction, of class numbers 0..classes-1 [N] each."""
    return torch.bincount(truth * classes + prediction, minlength=classes**2).view(classes, classes)


def class_iou(confusion):
    """IoU [C] of each class; NaN for a class that is neither in the truth nor predicted."""
    confusion = confusion.double()
    hits = confusion.diagonal()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


def mean_iou(confusion, left_out=()):
    """Mean IoU over the classes that occur in truth or prediction, without the class numbers `left_out`."""
    iou = class_iou(confusion)
    iou[list(left_out)] = torch.nan
    return iou.nanmean().item()


def depth_sums(prediction, truth, batch, images):
    """What RMSE needs of each image, [images, 2]: sum of squared errors in square metres, and number of points."""
    error = (prediction.clamp(*DEPTHS) - truth).double() ** 2
    sums = torch.zeros(images, 2, dtype=torch.double, device=error.device)
    return sums.index_add_(0, batch, torch.stack([error, torch.ones_like(error)], 1))


def rmse(sums):
    """(mean over images of an image's RMSE, RMSE over all points) in metres, from `depth_sums` of the images [I, 2]."""
    squares, counts = sums[sums[:, 1] > 0].unbind(1)
    return (squares / counts).sqrt().mean().item(), (squares.sum() / counts.sum()).sqrt().item()


# ---- one probe ----------------------------------------------------------------------------------------------------------

def load_probe(path, device):
    """A probe's checkpoint as (checkpoint, encoder, head, cloud options of the 3D encoder or None)."""
    probe = load_checkpoint(path, "probe")
    if probe["step"] < probe["total"] and not str(path).endswith("best.pth"):
        raise InputError(f"{path}: unfinished, step {probe['step']} of {probe['total']}; repeat its command to finish it")
    if probe["task"] == "seg3d":
        encoder, stage1 = load_waffleiron(probe["encoder"]["name_or_path"])
    elif probe.get("backbone"):  # fine-tuned: the encoder's weights are in the probe's checkpoint
        encoder, stage1 = load_image_encoder(probe["spec"]["name"], "random", feature=probe["spec"]["feature"]), None
        encoder.backbone.load_state_dict(probe["backbone"])
    else:
        encoder, stage1 = load_image_encoder(**probe["encoder"]), None
    head = linear_head(probe["head"], probe["dim"], len(probe["classes"]) or 1, BatchNorm)
    head.load_state_dict(probe["model"])
    return probe, encoder.to(device).eval(), head.to(device).eval(), None if stage1 is None else stage1.get("cloud", CLOUD)


@torch.no_grad()
def evaluate(path, device, data=None, workers=2, batch_size=16, dataset=None):
    """Metrics of a probe by condition: {"mIoU": {"full": ..}, "IoU": ..} or {"RMSE": .., "RMSE_points": ..}; nuImages has only "full".

    IoU in percent, RMSE in metres, on the validation split. The frames are dealt out over the processes and the counts summed.
    dataset: a subclass of Frames that changes what a sensor gives, or None. A 3D probe of whole scans is judged on every point,
    each with the prediction of the nearest one that WaffleIron got.
    """
    probe, encoder, head, cloud = load_probe(path, device)
    task, args, image_size = probe["task"], probe["args"], probe["image_size"]
    load, dataset = (load_nuimages, LabelledImages) if task == "nuimages" else (load_index, dataset or Frames)
    with training.first_process_first():
        index = load(data or probe["data"], args["version"])
    frames = dataset(index, index.select("val"), args["cameras"], image_size and tuple(image_size), cloud,
                     labels=task != "depth", max_depth=DEPTHS[1] if task == "depth" else None,
                     every_point=args["cameras"] == "scan")
    mine = range(training.rank(), len(frames), training.world())
    order = [[(0, number) for number in mine[start:start + batch_size]] for start in range(0, len(mine), batch_size)]

    names, classes = probe["classes"], len(probe["classes"])
    confusion = torch.zeros(len(CONDITIONS), classes, classes, dtype=torch.long, device=device)
    sums = torch.zeros(len(frames), 3, dtype=torch.double, device=device)  # squared error, points, condition
    for numbers, batch in zip(order, tqdm(training.load(frames, order, collate, workers, device), f"evaluate {path}",
                                          disable=training.rank() > 0, mininterval=2)):
        batch = training.to_device(batch, device)
        with training.autocast(device, args["precision"]):
            features = features_at_points(encoder, batch, image_size and tuple(image_size))
        outputs = head(features.float())  # in float32, as it was trained
        if task == "depth":
            places = [number for _, number in numbers]
            sums[places, :2] = depth_sums(outputs[:, 0].float(), batch["depths"], batch["batch"], len(numbers))
            sums[places, 2] = batch["condition"].double()
        else:
            of_frame = batch["batch"]
            if "nearest" in batch:
                outputs, of_frame = outputs[batch["nearest"]], of_frame[batch["nearest"]]
            for number in range(len(CONDITIONS)):
                chosen = (batch["labels"] > 0) & (batch["condition"] == number)[of_frame]
                confusion[number] += confusion_matrix(outputs[chosen].argmax(1), batch["labels"][chosen] - 1, classes)

    training.sum_over_processes(sums if task == "depth" else confusion)
    result = {"run": str(path), "task": task, "encoder": args["encoder"], "step": probe["step"], "data": index.root,
              "images": len(frames)}
    here = []  # the conditions; nuImages' tables say nothing of them
    if task != "nuimages":
        here = [n for n in range(len(CONDITIONS)) if (index.condition[frames.rows] == n).any()]
    if task == "depth":
        pairs = {"full": rmse(sums[:, :2])} | {CONDITIONS[n]: rmse(sums[sums[:, 2] == n, :2]) for n in here}
        return result | {"RMSE": {name: pair[0] for name, pair in pairs.items()},
                         "RMSE_points": {name: pair[1] for name, pair in pairs.items()}}
    parts = {"full": confusion.sum(0)} | {CONDITIONS[n]: confusion[n] for n in here}
    night = [names.index(name) for name in NOT_AT_NIGHT]
    return result | {
        "mIoU": {name: 100 * mean_iou(part, night if name == "night" else ()) for name, part in parts.items()},
        "IoU": {name: {c: round(100 * v, 2) for c, v in zip(names, class_iou(part).tolist()) if v == v}
                for name, part in parts.items()}}


# ---- the table ------------------------------------------------------------------------------------------------------------

def table(results):
    """Markdown: a row per probe; in brackets the difference to the first row of the same task."""
    lines = []
    for tasks, metric, unit, digits in ((("seg", "nuimages", "seg3d"), "mIoU", "%", 1), (("depth",), "RMSE", "m", 2)):
        rows = [r for r in results if r["task"] in tasks]
        if not rows:
            continue
        arrow = "higher is better" if metric == "mIoU" else "lower is better"
        lines += ["", f"| {metric} [{unit}], {arrow} | task | " + " | ".join(COLUMNS) + " |",
                  "|---|---|" + "---:|" * len(COLUMNS)]
        for row in rows:
            first = next(r for r in rows if r["task"] == row["task"])
            cells = []
            for column in COLUMNS:
                value, base = row[metric].get(column), first[metric].get(column)
                cell = ("–" if row["task"] == "nuimages" else "not run") if value is None else f"{value:.{digits}f}"
                if row is not first and value is not None and base is not None:
                    cell += f" ({value - base:+.{digits}f})"
                cells.append(cell)
            lines.append(f"| {row['run']} | {row['task']} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def is_current(result, stored, file, data):
    """Whether a stored result is of this data, and not older than the probe's file and its encoder."""
    source = Path(load_checkpoint(file, "probe")["encoder"]["name_or_path"])
    made_from = [file] + [file for file in (source, source / "last.pth") if file.is_file()]
    same_data = data is None or result["data"] == str(Path(data).resolve())
    return same_data and all(file.stat().st_mtime <= stored.stat().st_mtime for file in made_from)


@one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("probes", nargs="+", help="folders that probe.py wrote, or the best.pth in them")
    parser.add_argument("--data", help="nuScenes root (default: the probe's)")
    parser.add_argument("--out", default="runs/table", help="the table goes to OUT.md and OUT.json (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="evaluate even where results.json is there")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args(argv)
    args.seed = 0
    device = training.start(args)
    results = []
    for path in map(Path, args.probes):
        file = path if path.is_file() else path / "last.pth"
        if not file.is_file():
            raise InputError(f"{path}: no last.pth there; it must be a folder that probe.py wrote")
        stored = file.with_name("results.json" if file.name == "last.pth" else f"results-{file.stem}.json")
        result = json.loads(stored.read_text()) if stored.is_file() and not args.again else None
        if result is None or not is_current(result, stored, file, args.data):
            result = evaluate(path, device, args.data, args.workers)
            if training.rank() == 0:
                stored.write_text(json.dumps(result, indent=1))
        results.append(result)
    if training.rank() == 0:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{args.out}.md").write_text(table(results) + "\n")
        Path(f"{args.out}.json").write_text(json.dumps(results, indent=1))
        print(table(results))
        print(f"\nwritten: {args.out}.md, {args.out}.json")


if __name__ == "__main__":
    main()

"""Metrics by condition, and the table that sets probes side by side.

    python eval.py runs/probe-a runs/probe-b                                # evaluate what is not yet, print the table
    torchrun --standalone --nproc_per_node 4 eval.py runs/probe-a runs/probe-b           # the same, on 4 GPUs

Each probe is evaluated once on the validation split, into results.json beside its last.pth, and anew where probe, encoder or
labels are others since. With --data of other frames than the probe's own, or where its own are others now, the result goes
to results-HASH.json. The table is printed and written to OUT.md and OUT.json; a difference stands there only where two rows
can be compared. Collaborative-distillation paper, Sec. 4.2 and C.3.
"""
import math
import os
from pathlib import Path

import torch
from tqdm import tqdm

import training
from plumbing.arguments import WORKERS, Parser
from checkpoints import load_checkpoint, load_strictly, located, say_if_unfinished
from data import CLOUD, DEPTHS, Frames, collate
from distill import features_at_points
from errors import InputError, one_line_errors, say
from plumbing.fingerprint import check, differences, digest, of_weights, with_files
from index import CONDITIONS, load_index
from models import linear_head, load_image_encoder, source_in
from nuimages_data import LabelledImages, load_nuimages
from run_folder import read_json, write_json, write_text
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


def finite(value):
    """A metric for JSON, which has no NaN: None where there was nothing to evaluation."""
    return None if math.isnan(value) else value


# ---- one probe ----------------------------------------------------------------------------------------------------------

def place_of(source):
    """Which of the arguments of `load_image_encoder` says where the weights are."""
    given = [name for name in ("weights", "hub") if source.get(name) not in (None, "random")]
    return given[0] if given else "name_or_path"


def encoder_source(probe, path, moved=None):
    """The arguments of `load_image_encoder` that give a probe's encoder again. Raises InputError where it is not there any more.

    moved: where its folder, or the file of its weights, is now, if it is not where it was.
    """
    source = source_in(probe, path)
    place = place_of(source)
    source[place] = moved or source[place]
    if os.path.isabs(source[place]) and not os.path.exists(source[place]):
        raise InputError(f"{path}: its encoder {source[place]} is not there any more; where it was moved, eval.py --encoder says so")
    return source


def load_probe(path, device, encoder_at=None):
    """A probe's checkpoint as (checkpoint, encoder, head, cloud options of the 3D encoder or None).

    encoder_at: where the encoder is if it was moved. Raises InputError where the probe is unfinished, or its encoder is not the one that its head was trained on.
    """
    probe = load_checkpoint(path, "probe")
    if Path(path).name == "best.pth":
        last = folder_of(path) / "last.pth"
        if last.is_file():
            say_if_unfinished(load_checkpoint(last, "probe"), last)
    elif probe["step"] < probe["total"]:
        raise InputError(f"{path}: unfinished, step {probe['step']} of {probe['total']}; repeat its command to finish it"
                         + (f", or give {folder_of(path)}" if Path(path).is_file() else ""))
    stage1 = None
    if probe.get("backbone"):  # fine-tuned: the encoder's weights are in the probe's checkpoint
        encoder = load_image_encoder(probe["spec"]["name"], "random", feature=probe["spec"]["feature"], careful=False)
        load_strictly(encoder.backbone, probe["backbone"], path)
    else:
        source = encoder_source(probe, path, encoder_at)
        if probe["task"] == "seg3d":
            encoder, stage1 = load_waffleiron(source["name_or_path"])
        else:
            encoder = load_image_encoder(**source, careful=False)
        check(f"{path}: its head", probe.get("made_from", {}), {"encoder": encoder.fingerprint()},
              f"{source['name_or_path']} has changed since; train the probe again (--restart), or give that encoder's place (eval.py --encoder)")
    head = linear_head(probe["head"], probe["dim"], len(probe["classes"]) or 1, BatchNorm)
    load_strictly(head, probe["model"], path)
    return probe, encoder.to(device).eval(), head.to(device).eval(), None if stage1 is None else stage1.get("cloud", CLOUD)


def folder_of(path):
    """The folder of a probe that is given as a folder or as a checkpoint in one."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def result_name(path):
    """Name of the file of a probe's result: results, or results-best of best.pth."""
    path = Path(path)
    return "results" if path.is_dir() or path.name == "last.pth" else f"results-{path.stem}"


def data_of(probe, path):
    """Where the dataset of a probe is whose checkpoint is at `path`."""
    return located(probe["data"], probe["encoder"].get("folder"), folder_of(path))


def protocol_of(probe, cloud=None):
    """What must be equal, beside the frames, for the numbers of two probes to be compared. cloud: of a 3D probe, as data.CLOUD."""
    args = probe["args"]
    protocol = {"classes": list(probe["classes"]), "cameras": args["cameras"], "head": probe["head"], "limit": args.get("limit"),
                "finetune": args.get("finetune", False), "percent": args.get("percent") or 100, "scenes": probe.get("scenes")}
    if cloud and args["cameras"] != "scan":  # judged at the points that the 3D encoder gets
        protocol |= {name: cloud[name] if name != "fov" else list(cloud[name]) for name in ("fov", "voxel", "max_points")}
    if probe["task"] in ("depth", "nuimages"):  # judged at pixels of the resized image
        protocol["image_size"] = list(probe["image_size"])
    return protocol


def say_other_frames(probe, path, frames):
    """Whether frames are those of a probe's own validation split when it was trained; a line where they are not."""
    val = probe.get("val")
    if val and val != frames:
        say(f"{path}: judged on other frames than its own, {differences({'frames': val}, {'frames': frames})}")
    return val == frames


class Evaluation:
    """A probe, and the frames of the validation split that it is to be judged on.

    data: root of the dataset, and encoder_at: place of the encoder (default: the probe's own). dataset: a subclass of Frames
    that changes what a sensor gives, or None. `made_from` is what a result of both is made from; `own` is whether the frames are those of the probe's own dataset.
    Raises InputError as `load_probe`, and where a file of the frames is missing.
    """

    def __init__(self, path, device, data=None, dataset=None, encoder_at=None):
        self.path, self.device = path, device
        self.probe, self.encoder, self.head, cloud = load_probe(path, device, encoder_at)
        self.protocol = protocol_of(self.probe, cloud)
        args, size = self.probe["args"], self.probe["image_size"]
        self.task, self.image_size = self.probe["task"], size and tuple(size)
        labels = self.task != "depth"
        load, dataset = (load_nuimages, LabelledImages) if self.task == "nuimages" else (load_index, dataset or Frames)
        with training.first_process_first():
            index = load(data or data_of(self.probe, path), args["version"], look=None)
        rows = index.select("val")
        self.frames = dataset(index, rows, args["cameras"], self.image_size, cloud, labels=labels,
                              max_depth=None if labels else DEPTHS[1], every_point=args["cameras"] == "scan")

        frames = training.by_first_process(lambda: with_files(index, rows, labels))
        val, same = self.probe.get("val"), say_other_frames(self.probe, path, frames)
        at_home = data is None or os.path.realpath(data) == os.path.realpath(data_of(self.probe, path))
        # Its own dataset with mended files is its own still. Without val the probe is from before fingerprints
        self.own = same or at_home and (val is None or val | {"files": None} == frames | {"files": None})
        self.made_from = {
            "probe": {"step": self.probe["step"], "weights": of_weights(torch.nn.ModuleList([self.encoder, self.head]))},
            "encoder": self.probe.get("made_from", {}).get("encoder", {}),
            "frames": frames}

    def stored_at(self):
        """The file of the result: results.json, results-best.json of best.pth; with a hash, of other frames than its own."""
        name = result_name(self.path)
        if not self.own:
            name += f"-{digest([repr(self.made_from['frames']).encode()])[:8]}"
        return folder_of(self.path) / f"{name}.json"


def evaluate(path, device, data=None, workers=2, batch_size=16, dataset=None):
    """What `measure` gives for a probe, of a folder or checkpoint; the other arguments are those of `Evaluation`."""
    return measure(Evaluation(path, device, data, dataset), workers, batch_size)


@torch.no_grad()
def measure(evaluation, workers=2, batch_size=16):
    """Metrics of a probe by condition: {"mIoU": {"full": ..}, "IoU": ..} or {"RMSE": .., "RMSE_points": ..}; nuImages has only "full".

    IoU in percent, RMSE in metres, on the validation split; None where nothing is labelled. The frames are dealt out over the
    processes and the counts summed. A 3D probe of whole scans is judged on every point, each with the prediction of the nearest
    one that WaffleIron got.
    """
    probe, device, frames, image_size = evaluation.probe, evaluation.device, evaluation.frames, evaluation.image_size
    task, args, index = evaluation.task, evaluation.probe["args"], evaluation.frames.index
    mine = range(training.rank(), len(frames), training.world())
    order = [[(0, number) for number in mine[start:start + batch_size]] for start in range(0, len(mine), batch_size)]

    names, classes = probe["classes"], len(probe["classes"])
    confusion = torch.zeros(len(CONDITIONS), classes, classes, dtype=torch.long, device=device)
    sums = torch.zeros(len(frames), 3, dtype=torch.double, device=device)  # squared error, points, condition
    for numbers, batch in zip(order, tqdm(training.load(frames, order, collate, workers, device), f"evaluate {evaluation.path}",
                                          disable=training.rank() > 0, mininterval=2)):
        batch = training.to_device(batch, device)
        with training.autocast(device, args["precision"]):
            features = features_at_points(evaluation.encoder, batch, image_size)
        outputs = evaluation.head(features.float())  # in float32, as it was trained
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
    result = {"run": str(evaluation.path), "task": task, "encoder": args["encoder"], "step": probe["step"], "data": index.root,
              "images": len(frames), "made_from": evaluation.made_from, "protocol": evaluation.protocol}
    here = []  # the conditions; nuImages' tables say nothing of them
    if task != "nuimages":
        here = [n for n in range(len(CONDITIONS)) if (index.condition[frames.rows] == n).any()]
    if task == "depth":
        pairs = {"full": rmse(sums[:, :2])} | {CONDITIONS[n]: rmse(sums[sums[:, 2] == n, :2]) for n in here}
        return result | {"RMSE": {name: finite(pair[0]) for name, pair in pairs.items()},
                         "RMSE_points": {name: finite(pair[1]) for name, pair in pairs.items()}}
    parts = {"full": confusion.sum(0)} | {CONDITIONS[n]: confusion[n] for n in here}
    night = [names.index(name) for name in NOT_AT_NIGHT]
    return result | {
        "mIoU": {name: finite(100 * mean_iou(part, night if name == "night" else ())) for name, part in parts.items()},
        "IoU": {name: {c: round(100 * v, 2) for c, v in zip(names, class_iou(part).tolist()) if v == v}
                for name, part in parts.items()}}


# ---- the table ------------------------------------------------------------------------------------------------------------

def not_comparable(row, first):
    """Why the difference of two results of one task says nothing, in words; "" if it does."""
    a, b = first.get("protocol", {}), row.get("protocol", {})
    other = [f"{name} {a.get(name)} and {b.get(name)}" if name not in ("classes", "scenes") else f"other {name}"
             for name in a | b if a.get(name) != b.get(name)]
    if any("made_from" not in result for result in (row, first)):  # from before fingerprints: little is known of it
        same = all(row.get(name) == first.get(name) for name in ("data", "images", "made_from"))
        return "; ".join(other + ["one of them is from before fingerprints and of other data; evaluate it with --again"] * (not same))
    frames = differences({"other frames": first["made_from"]["frames"]}, {"other frames": row["made_from"]["frames"]})
    return "; ".join([*other, *([frames] if frames else [])])


def cell(row, metric, column, digits, first=None):
    """A number of a table, or why there is none; in brackets its difference to the one of the result `first`."""
    if column not in row[metric]:
        return "–" if row["task"] == "nuimages" else "not run"
    value, base = row[metric][column], first and first[metric].get(column)
    if value is None:
        return "no labels"
    return f"{value:.{digits}f}" + ("" if base is None else f" ({value - base:+.{digits}f})")


def table(results):
    """Markdown: a row per probe; in brackets the difference to the first row of the same task, where they can be compared."""
    lines, notes = [], []
    for tasks, metric, unit, digits in ((("seg", "nuimages", "seg3d"), "mIoU", "%", 1), (("depth",), "RMSE", "m", 2)):
        rows = [r for r in results if r["task"] in tasks]
        if not rows:
            continue
        arrow = "higher is better" if metric == "mIoU" else "lower is better"
        lines += ["", f"| {metric} [{unit}], {arrow} | task | " + " | ".join(COLUMNS) + " |",
                  "|---|---|" + "---:|" * len(COLUMNS)]
        for row in rows:
            first = next(r for r in rows if r["task"] == row["task"])
            reason = "" if row is first else not_comparable(row, first)
            if reason:
                notes.append(f"{row['run']} is not compared with {first['run']}: {reason}.")
            cells = [cell(row, metric, column, digits, None if reason or row is first else first) for column in COLUMNS]
            lines.append(f"| {row['run']} | {row['task']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines[1:], *([""] if notes else []), *notes])


def unchecked(path):
    """The stored result of a probe whose data or encoder is not there any more, else None.

    What can be known without them is checked: the step, and the encoder and frames of the probe's own checkpoint.
    """
    probe = load_checkpoint(path, "probe")
    source = {} if probe.get("backbone") else source_in(probe, path)
    sources = [data_of(probe, path)] + ([source[place_of(source)]] if source else [])
    gone = [place for place in sources if os.path.isabs(place) and not os.path.exists(place)]
    stored = read_json(folder_of(path) / f"{result_name(path)}.json") if gone else None
    metric = "RMSE" if probe["task"] == "depth" else "mIoU"
    if not isinstance(stored, dict) or not isinstance(stored.get(metric), dict) or stored.get("step") != probe["step"]:
        return None
    of_probe = {"encoder": probe.get("made_from", {}).get("encoder"), "frames": probe.get("val")}
    if any(of_probe[name] != value for name, value in stored.get("made_from", {}).items() if name in of_probe):
        return None
    say(f"{path}: its result is shown as it was stored and not checked, {' and '.join(gone)} is not there any more")
    stored[metric] = {column: None if value is None else finite(value) for column, value in stored[metric].items()}
    return {"protocol": protocol_of(probe)} | stored | {"run": str(path)}


def result_of(path, device, args):
    """The result of a probe: the stored one if it is of the same weights, frames and files, else a new one, which is stored."""
    if not (args.data or args.encoder or args.again):
        stored = training.by_first_process(lambda: unchecked(path))
        if stored:
            return stored
    evaluation = Evaluation(path, device, args.data, encoder_at=args.encoder)

    def current():
        stored = read_json(evaluation.stored_at())
        same = isinstance(stored, dict) and stored.get("made_from") == evaluation.made_from
        return stored | {"run": str(path)} if same and not args.again else None
    # The first process decides: another could find the result that the first has just written
    stored = training.by_first_process(current)
    if stored:
        return stored
    result = measure(evaluation, args.workers)
    if training.rank() == 0:
        write_json(evaluation.stored_at(), result)
    return result


def probes_of(paths):
    """The probes of a command line, each once. Raises InputError for what is none."""
    files = {}
    for path in map(Path, paths):
        file = path if path.is_file() else path / "last.pth"
        if not file.is_file():
            raise InputError(f"{path}: no last.pth there; it must be a folder that probe.py wrote")
        files.setdefault(file.resolve(), path)
    return list(files.values())


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("probes", nargs="+", help="folders that probe.py wrote, or the best.pth in them")
    parser.add_argument("--data", help="nuScenes root (default: the probe's)")
    parser.add_argument("--encoder", help="where the probes' encoder is, if it was moved: its folder, or the file of its weights")
    parser.add_argument("--out", default="runs/table", help="the table goes to OUT.md and OUT.json (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="evaluate even where results.json is there")
    parser.add_argument("--workers", type=WORKERS, default=min(8, os.cpu_count() or 1), help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args(argv)
    args.seed = 0
    device = training.start(args)
    paths = training.by_first_process(lambda: probes_of(args.probes))
    results = [result_of(path, device, args) for path in paths]
    if training.rank() == 0:
        write_text(f"{args.out}.md", table(results) + "\n")
        write_json(f"{args.out}.json", results)
        print(table(results))
        print(f"\nwritten: {args.out}.md, {args.out}.json")


if __name__ == "__main__":
    main()

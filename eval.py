"""Metrics by condition, and the table that sets probes side by side.

    python eval.py runs/probe-a runs/probe-b    # evaluate what is not yet, print the table
    torchrun --standalone --nproc_per_node 4 eval.py runs/probe-a runs/probe-b    # on 4 GPUs

Each probe is evaluated once on the validation split, into results.json beside its last.pth, and
again where the probe, its encoder or the labels have changed since. On other frames than the
probe's own (--data, or where its own have changed) the result goes to results-HASH.json. The
table is printed and written to OUT.md and OUT.json; a difference stands there only where two rows
can be compared. Collaborative-distillation paper, Sec. 4.2 and C.3.
"""
import os
from pathlib import Path

import torch
from tqdm import tqdm

from data import Frames, collate, select, set_sampling
from heads import linear_head
from metrics import Confusion, DepthSums, finite
from models import load_image_encoder, load_point_encoder, source_in
from plumbing import training
from plumbing.arguments import WORKERS, Parser
from plumbing.atomic import read_json, write_json, write_text
from plumbing.errors import InputError, one_line_errors, say
from plumbing.fingerprint import check, differences, digest, of_frames, of_weights
from plumbing.weights import load_checkpoint, load_strictly, located, say_if_unfinished
from probe import TASKS, classes_of
from readers.table import entries, has_versions, hold_out, known_scenes, open_tables
from results import results_table

# ---- one probe -----------------------------------------------------------------------------------

def place_of(source):
    """Which of the arguments of `load_image_encoder` says where the weights are."""
    given = [name for name in ("weights", "hub") if source.get(name) not in (None, "random")]
    return given[0] if given else "name_or_path"


def encoder_source(probe, path, moved=None):
    """The arguments of `load_image_encoder` that give a probe's encoder again.

    moved: where its folder, or the file of its weights, is now, if it is not where it was. Raises
    InputError where it is not there any more.
    """
    source = source_in(probe, path)
    place = place_of(source)
    source[place] = moved or source[place]
    if os.path.isabs(source[place]) and not os.path.exists(source[place]):
        raise InputError(f"{path}: its encoder {source[place]} is not there any more; where it was "
                         "moved, eval.py --encoder says so")
    return source


def load_probe(path, device, encoder_at=None):
    """A probe's checkpoint as (checkpoint, encoder, head).

    encoder_at: where the encoder is if it was moved. Raises InputError where the probe is
    unfinished, or its encoder is not the one that its head was trained on.
    """
    probe = load_checkpoint(path, "probe")
    check_finished(probe, path)
    # A fine-tuned probe's checkpoint has the encoder's weights, another says where they are
    if probe.get("encoder_weights"):
        spec = probe["spec"]
        encoder = load_image_encoder(spec["name"], "random", feature=spec["feature"], careful=False)
        load_strictly(encoder.backbone, probe["encoder_weights"], path)
    else:
        source = encoder_source(probe, path, encoder_at)
        if probe["task"] == "seg3d":
            encoder, _ = load_point_encoder(source["name_or_path"])
            encoder.use(probe["samplings"])
        else:
            encoder = load_image_encoder(**source, careful=False)
        check(f"{path}: its head", probe.get("made_from", {}), {"encoder": encoder.fingerprint()},
              f"{source['name_or_path']} has changed since; train the probe again (--restart), or "
              "give that encoder's place (eval.py --encoder)")
    head = linear_head(probe["head"], probe["dim"], len(probe["classes"]) or 1)
    load_strictly(head, probe["model"], path)
    return probe, encoder.to(device).eval(), head.to(device).eval()


def check_finished(probe, path):
    """Raise InputError for an unfinished probe; a line where best.pth is of one."""
    if Path(path).name == "best.pth":
        last = folder_of(path) / "last.pth"
        if last.is_file():
            say_if_unfinished(load_checkpoint(last, "probe"), last)
    elif probe["step"] < probe["total"]:
        or_folder = f", or give {folder_of(path)}" if Path(path).is_file() else ""
        raise InputError(f"{path}: unfinished, step {probe['step']} of {probe['total']}; repeat "
                         f"its command to finish it{or_folder}")


def folder_of(path):
    """The folder of a probe that is given as a folder or as a checkpoint in one."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def result_name(path):
    """Name of the file of a probe's result: results, or results-best of best.pth."""
    path = Path(path)
    return "results" if path.is_dir() or path.name == "last.pth" else f"results-{path.stem}"


def data_of(probe, path):
    """[(dataset, path)] of a probe whose checkpoint is at `path`: where they are now."""
    was = probe["encoder"].get("folder")
    return [(name, located(root, was, folder_of(path))) for name, root in probe["data"]]


def protocol_of(probe, frames=None):
    """What must be equal, beside the frames, for the numbers of two probes to be compared.

    frames: those that it is judged on (default: what its checkpoint says of its own data). All of
    it is as JSON gives it back, or a stored result would differ from a new one.
    """
    args = probe["args"]
    datasets = [name for name, _ in probe["data"]]
    samplings = probe["samplings"] or {}
    dense = probe["dense"]
    if frames:
        datasets = [table.name for table in frames.tables]
        samplings = samplings and {table.name: table.sampling for table in frames.tables}
        dense = frames.dense

    # How the head was trained, and the classes
    protocol = {"data": " and ".join(dict.fromkeys(datasets)), "classes": list(probe["classes"]),
                "cameras": args["cameras"], "head": probe["head"], "limit": args.get("limit"),
                "finetune": bool(probe.get("encoder_weights")),
                "percent": args.get("percent") or 100, "scenes": probe.get("scenes"),
                "val_scenes": args.get("val_scenes")}
    # At which points it is judged: the 3D encoder's, or pixels of the resized image
    if samplings and args["cameras"] != "scan":
        protocol["fov"] = [list(sampling["fov"]) for sampling in samplings.values()]
        protocol["voxel"] = [sampling["voxel"] for sampling in samplings.values()]
        protocol["max_points"] = [sampling["max_points"] for sampling in samplings.values()]
    if probe["task"] == "depth" or dense:
        protocol["image_size"] = list(probe["image_size"])
    return protocol


def are_own_frames(probe, path, frames):
    """Whether frames are those of the probe's validation split at its training; says so if not."""
    val = probe.get("val")
    if val and val != frames:
        others = differences({"frames": val}, {"frames": frames})
        say(f"{path}: judged on other frames than its own, {others}")
    return val == frames


class Evaluation:
    """A probe, and the frames of the validation split that it is to be judged on.

    data: as --data; a bare path is of the probe's own dataset. encoder_at: place of the encoder
    (default of both: the probe's own). `made_from` is what a result is made from; `own` is whether
    the frames are those of the probe's own data.
    Raises InputError as `load_probe`, and where a file of the frames is missing.
    """

    def __init__(self, path, device, data=None, encoder_at=None):
        self.path = path
        self.device = device
        self.probe, self.encoder, self.head = load_probe(path, device, encoder_at)
        self.task = TASKS[self.probe["task"]]
        image_size = self.probe["image_size"] and tuple(self.probe["image_size"])

        # The frames
        args = self.probe["args"]
        home = data_of(self.probe, path)
        there = data_given(data, home)
        labels = self.task.target == "labels"
        versioned = any(has_versions(name) for name, _ in there)
        with training.first_process_first():
            tables = open_tables(there, args["version"] if versioned else None, look=None)
        held = known_scenes(args.get("val_scenes"), tables)
        if args.get("val_scenes") and not held:
            say(f"{path}: judged on the dataset's own validation split, none of "
                f"{', '.join(args['val_scenes'])} is there")
        hold_out(tables, held)
        check_classes(tables, self.probe)
        tables = select(tables, "val")
        prepare = None
        if self.probe["samplings"]:
            self.encoder.use(set_sampling(tables, self.probe["samplings"], "probe",
                                          self.probe.get("sampling_flags")))
            prepare = self.encoder.prepare
        self.frames = Frames(tables, args["cameras"], image_size, prepare, self.task.target,
                             points="every" if args["cameras"] == "scan" else "first")
        self.protocol = protocol_of(self.probe, self.frames) | {"val_scenes": held}

        # What the result is made from
        frames = training.by_first_process(lambda: of_frames(tables, labels, files=True))
        weights = of_weights(torch.nn.ModuleList([self.encoder, self.head]))
        self.made_from = {
            "probe": {"step": self.probe["step"], "weights": weights},
            "encoder": self.probe.get("made_from", {}).get("encoder", {}),
            "frames": frames}

        # Its own data, where only files have changed, are its own still
        same = are_own_frames(self.probe, path, frames)
        at_home = [os.path.realpath(root) for _, root in there] == [
            os.path.realpath(root) for _, root in home]
        val = self.probe.get("val")  # None: the probe does not say
        same_tables = val is None or val | {"files": None} == frames | {"files": None}
        self.own = same or at_home and same_tables

    def stored_at(self):
        """The file of the result.

        results.json, or results-best.json of best.pth; with a hash of frames that are not its own.
        """
        name = result_name(self.path)
        if not self.own:
            frames = repr(self.made_from["frames"])
            name += f"-{digest([frames.encode()])[:8]}"
        return folder_of(self.path) / f"{name}.json"


def data_given(data, home):
    """[(dataset, path)] of --data, or `home`; a bare path is of the one dataset of `home`."""
    if data is None:
        return home
    given = entries(data)
    if given == [("nuscenes", data)] and len(home) == 1:
        return [(home[0][0], data)]
    return given


def check_classes(tables, probe):
    """Raise InputError for data that the probe's task is not for, or of other classes."""
    if tuple(classes_of(tables, probe["task"])) != tuple(probe["classes"]):
        raise InputError(f"--data {tables[0].root}: {tables[0].name} has other classes than the "
                         "probe's data")


def evaluate(path, device, data=None, workers=2, batch_size=16):
    """What `measure` gives for a probe, of a folder or checkpoint; see `Evaluation`."""
    return measure(Evaluation(path, device, data), workers, batch_size)


@torch.no_grad()
def measure(evaluation, workers=2, batch_size=16):
    """Metrics of a probe by condition, on the validation split.

    Returns {"mIoU": {"full": ..}, "IoU": ..} in percent or {"RMSE": .., "RMSE_points": ..} in
    metres, None where nothing is labelled, beside what the result is of. "columns" are "full" and
    the conditions that the data states; of those that do not occur there is no number.
    The frames are dealt out over the processes and the counts summed. A 3D probe of whole scans is
    judged on every point, each with the prediction of the nearest one that the 3D encoder got.
    """
    # This process's part of the frames
    probe, frames, device = evaluation.probe, evaluation.frames, evaluation.device
    mine = range(training.rank(), len(frames), training.world())
    order = training.in_batches(mine, batch_size)
    loader = training.load(frames, order, collate, workers, device)
    bar = tqdm(loader, f"evaluate {evaluation.path}", disable=training.rank() > 0, mininterval=2)

    # Sums over them
    if evaluation.task.target == "depths":
        sums = DepthSums(len(frames), frames.conditions, device)
    else:
        left_out = {}
        for table in frames.tables:
            left_out |= getattr(table.reader, "LEFT_OUT", {})
        sums = Confusion(probe["classes"], frames.conditions, left_out, device)
    for keys, batch in zip(order, bar):
        batch = training.to_device(batch, device)
        with training.autocast(device, probe["args"]["precision"]):
            features = evaluation.task.features(evaluation.encoder, batch)
        outputs = evaluation.head(features.float())  # in float32, as it was trained
        sums.add(outputs, batch, [number for _, number in keys])

    # Sums over all processes, and the numbers of the conditions that occur
    training.sum_over_processes(sums.counts)
    there = {frames.condition_of(table, row) for table in frames.tables for row in table.rows}
    occurring = [number for number in range(len(frames.conditions)) if number in there]
    roots = [table.root for table in frames.tables]
    return {"run": str(evaluation.path), "task": probe["task"],
            "encoder": probe["args"]["encoder"], "step": probe["step"],
            "data": roots[0] if len(roots) == 1 else roots,
            "columns": ["full", *frames.conditions], "images": len(frames),
            "made_from": evaluation.made_from, "protocol": evaluation.protocol,
            } | sums.metrics(occurring)


# ---- stored results ----------------------------------------------------------------------------

def unchecked(path):
    """The stored result of a probe whose data or encoder is not there any more, else None.

    What can be known without them is checked: the step, and the encoder and frames of the probe's
    own checkpoint.
    """
    # What is gone?
    probe = load_checkpoint(path, "probe")
    sources = [root for _, root in data_of(probe, path)]
    if not probe.get("encoder_weights"):
        source = source_in(probe, path)
        sources.append(source[place_of(source)])
    gone = [place for place in sources if os.path.isabs(place) and not os.path.exists(place)]
    if not gone:
        return None

    # Is there a result of this probe?
    stored = read_json(folder_of(path) / f"{result_name(path)}.json")
    metric = "RMSE" if probe["task"] == "depth" else "mIoU"
    if not isinstance(stored, dict) or not isinstance(stored.get(metric), dict):
        return None
    of_probe = {"encoder": probe.get("made_from", {}).get("encoder"), "frames": probe.get("val")}
    of_result = stored.get("made_from", {})
    others = [name for name in of_probe.keys() & of_result if of_probe[name] != of_result[name]]
    if others or stored.get("step") != probe["step"]:
        return None
    say(f"{path}: its result is shown as it was stored and not checked, {' and '.join(gone)} is "
        "not there any more")
    for column, value in stored[metric].items():
        stored[metric][column] = None if value is None else finite(value)
    return {"protocol": protocol_of(probe)} | stored | {"run": str(path)}


def result_of(path, device, args):
    """The result of a probe.

    The stored one if it is of the same weights, frames and files; else a new one, which is stored.
    """
    if not (args.data or args.encoder or args.again):
        stored = training.by_first_process(lambda: unchecked(path))
        if stored:
            return stored
    evaluation = Evaluation(path, device, args.data, args.encoder)

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
    add = parser.add_argument
    add("probes", nargs="+", help="folders that probe.py wrote, or the best.pth in them")
    add("--data", help="other frames to judge on, as for probe.py (default: the probe's)")
    add("--encoder",
        help="where the probes' encoder is, if it was moved: its folder or its weights' file")
    add("--out", default="runs/table",
        help="the table goes to OUT.md and OUT.json (default: %(default)s)")
    add("--again", action="store_true", help="evaluate even where results.json is there")
    add("--workers", type=WORKERS, default=min(8, os.cpu_count() or 1),
        help="(default: %(default)s)")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args(argv)
    args.seed = 0
    device = training.start(args)
    paths = training.by_first_process(lambda: probes_of(args.probes))
    results = [result_of(path, device, args) for path in paths]
    if training.rank() == 0:
        write_text(f"{args.out}.md", results_table(results) + "\n")
        write_json(f"{args.out}.json", results)
        print(results_table(results))
        print(f"\nwritten: {args.out}.md, {args.out}.json")


if __name__ == "__main__":
    main()

"""Probes: what frozen features say, judged by a head on top of them.

Segmentation and depth at the pixels of projected points or of labelled images, segmentation in 3D.
Collaborative-distillation paper, Sec. 4.2 and C.3; --task seg3d: ScaLR, supplement B.3. The bare
command is the paper's run:

    run="torchrun --standalone --nproc_per_node 4"
    $run probe.py --data /data/nuscenes --encoder runs/s2 --task seg --out runs/probe-cd
    data="--data /data/nuscenes"
    python probe.py $data --encoder dinov2_vits14 --task depth                # without stage 2
    python probe.py $data --encoder runs/s1 --task seg3d                      # stage 1's 3D encoder
    python probe.py --data nuimages=/data/nuimages --encoder runs/s2 --task seg     # all pixels

OUT is runs/probe-ENCODER-TASK (-DATASET unless it is nuScenes, -1 for 1 %) unless given. Writes
OUT/last.pth and OUT/log.jsonl and resumes from there. `python eval.py OUT ...` evaluates and prints
the table. finetune.py trains the encoder too.
"""
import os
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import models
from cached import Cached
from data import Frames, collate, select, set_sampling
from distill import features_at_pixels
from heads import linear_head
from metrics import lovasz_softmax
from plumbing import training
from plumbing.arguments import COUNT, POSITIVE, RATE, Parser
from plumbing.errors import InputError, one_line_errors, say
from plumbing.fingerprint import of_frames
from plumbing.run_folder import Log, Saver, check_finite, find_last
from readers.table import entries, hold_out, open_tables, say_if_held_out

# The papers' hyper-parameters by task, then dataset (C.3; seg3d: ScaLR supplement B.3). What a
# dataset's row does not have is nuScenes'. lr and end_lr are the peak and the end of the cosine.
PAPER = {
    "seg": {
        "nuscenes": dict(
            cameras="all", epochs=10, batch=4, lr={"ViT": 5e-4, "ResNet-50": 1e-2},
            end_lr=0.0, warmup_epochs=0, weight_decay=1e-4, head="linear"),
        "nuimages": dict(
            cameras="all", epochs=10, batch=24, lr={"ViT": 5e-3, "ResNet-50": 1e-2},
            end_lr=0.0, warmup_epochs=0, weight_decay=1e-4, head="linear")},
    "depth": {
        "nuscenes": dict(
            cameras="CAM_FRONT", epochs=10, batch=16, lr={"ViT": 1e-2, "ResNet-50": 1e-1},
            end_lr=0.0, warmup_epochs=0, weight_decay=1e-4, head="linear"),
        "semantickitti": dict(cameras="image_2"),
        "pandaset64": dict(cameras="front_camera"),
        "pandasetgt": dict(cameras="front_camera")},
    "seg3d": {
        "nuscenes": dict(
            cameras="scan", epochs=20, batch=8, lr=1e-3,
            end_lr=1e-5, warmup_epochs=2, weight_decay=3e-3, head="batchnorm"),
        "pandaset64": dict(epochs=50),
        "pandasetgt": dict(epochs=50)},
}


# ---- arguments -----------------------------------------------------------------------------------

def by_task(paper, name=None):
    """A default of each task and dataset, for the help."""
    words = []
    for task, rows in paper.items():
        for dataset, row in rows.items():
            if name and name not in row:
                continue
            value = row[name] if name else row
            if isinstance(value, dict):
                value = ", ".join(f"{family} {number}" for family, number in value.items())
            on = "" if dataset == "nuscenes" else f" on {dataset}"
            words.append(f"{task}{on} {value}")
    return "; ".join(words)


def add_arguments(parser, paper, lr):
    """The flags that probe.py and finetune.py share.

    paper: as PAPER, of the script's tasks. lr: the peak rates, for the help.
    """
    tasks = "seg: the dataset's classes; depth: metres"
    encoders = "an encoder's name or stage 2's folder"
    cameras = "all, or a channel"
    if "seg3d" in paper:
        tasks += "; seg3d: classes on a 3D encoder's features"
        encoders += "; for seg3d stage 1's folder, or released weights"
        cameras += ", or scan: the whole scan, for seg3d"
    add = parser.add_argument
    training.add_arguments(parser, out_required=False)
    add("--task", choices=paper, required=True, help=tasks)
    models.add_arguments(parser, required=True, help=encoders)
    add("--percent", type=int, choices=(1, 10),
        help="of the training scenes: every 100th or 10th in the order of the scene table, as "
             "SLidR's public loader; of SemanticKITTI's scans and nuImages' images in the order of "
             "their names (default: all)")
    add("--cameras", help=f"{cameras} (default: {by_task(paper, 'cameras')})")
    add("--points", type=COUNT,
        help="of a view at most, drawn anew each epoch, with --cache once; for seg and depth "
             "(default: all; nuScenes has some 3 000 of a view, PandaSet 24 000)")
    add("--epochs", type=COUNT, help=f"(default: {by_task(paper, 'epochs')})")
    add("--batch", type=COUNT,
        help=f"camera views in a batch, over all processes (default: {by_task(paper, 'batch')})")
    add("--lr", type=POSITIVE, help=f"peak learning rate (default: {lr})")
    add("--end-lr", type=RATE,
        help=f"learning rate at the end of the cosine (default: {by_task(paper, 'end_lr')})")
    add("--warmup-epochs", type=RATE,
        help=f"epochs from 0 to --lr (default: {by_task(paper, 'warmup_epochs')})")
    add("--weight-decay", type=RATE,
        help=f"of AdamW (default: {by_task(paper, 'weight_decay')})")


def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add_arguments(parser, PAPER, by_task(PAPER, "lr"))
    add("--head", choices=("linear", "batchnorm", "whitened"),
        help="a linear layer, or BatchNorm or whitening before it: the same optimum, reached in "
             f"fewer steps; whitened needs --cache (default: {by_task(PAPER, 'head')})")
    add("--cache", action="store_true",
        help="compute the frozen features once and keep them in memory, in half precision (1 000 "
             "views of 3 000 points and 384 channels: 2.3 GB); turns the augmentation of seg3d off")
    args = parser.parse_args(argv)
    fill_in(args, PAPER, "probe")
    return args


def fill_in(args, paper, script):
    """Set what was not given: to the paper's values, and --out to a folder of its own."""
    datasets = list(dict.fromkeys(name for name, _ in entries(args.data)))
    rows = paper[args.task]
    for name, value in (rows["nuscenes"] | rows.get(datasets[0], {})).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if not args.out:
        parts = [script, Path(args.encoder).name, args.task]
        parts += [] if datasets == ["nuscenes"] else datasets
        parts += [str(args.percent)] if args.percent else []
        args.out = f"runs/{'-'.join(parts)}"


def check_flags(args):
    """Raise InputError for flags that do not go together."""
    if args.cameras == "scan" and args.task != "seg3d":
        raise InputError("--cameras scan: for --task seg3d only, a scan has no image")
    if args.cache and args.on_bad_frame == "skip":
        raise InputError("--on-bad-frame skip: not with --cache, which reads each frame once and "
                         "would keep the one in its place")
    if args.head == "whitened" and not args.cache:
        raise InputError("--head whitened needs all features at once: add --cache")
    ignored = [name for name in ("weights", "hub", "feature", "image_size", "points")
               if getattr(args, name)]
    if args.task == "seg3d" and ignored:
        raise InputError(f"--{ignored[0].replace('_', '-')} has no meaning for --task seg3d: stage "
                         "1's checkpoint says all")


# ---- maths ---------------------------------------------------------------------------------------

def segmentation_loss(outputs, batch):
    """(cross-entropy + Lovász, number of labelled points) of a head's outputs [N, classes]."""
    labelled = batch["labels"] > 0
    outputs = outputs[labelled]
    labels = batch["labels"][labelled] - 1
    cross_entropy = F.cross_entropy(outputs, labels, reduction="sum") / max(1, len(labels))
    return cross_entropy + lovasz_softmax(outputs.softmax(1), labels), len(labels)


def depth_loss(outputs, batch):
    """(mean squared error in square metres, number of points) of a head's outputs [N, 1]."""
    squares = F.mse_loss(outputs[:, 0], batch["depths"], reduction="sum")
    return squares / max(1, len(outputs)), len(outputs)


def features_at_points(encoder, batch):
    """A 3D encoder's features [N, D] at a batch's points."""
    return encoder.features(batch)


class Task(NamedTuple):
    """What a probe learns, of which features, by which loss."""
    target: str         # of the frames: "labels" or "depths"
    features: Callable  # (encoder, batch) -> [N, D]
    loss: Callable      # (outputs, batch) -> (loss, of how many points it is the mean)


TASKS = {
    "seg": Task("labels", features_at_pixels, segmentation_loss),
    "depth": Task("depths", features_at_pixels, depth_loss),
    "seg3d": Task("labels", features_at_points, segmentation_loss)}


# ---- encoder and data ----------------------------------------------------------------------------

def load_encoder(args):
    """(encoder, image size or None, stage 1's checkpoint of a 3D encoder, width) of the flags.

    Sets args.lr to the rate of the encoder's family.
    """
    if args.task == "seg3d":
        encoder, stage1 = models.load_point_encoder(args.encoder)
        if not stage1:
            say(f"{args.encoder}: released weights; points and planes as the dataset's SAMPLING "
                "says")
        return encoder, None, stage1, encoder.spec["channels"]
    encoder = models.load_image_encoder(args.encoder, args.weights, args.hub, args.feature,
                                        careful=False)
    image_size = args.image_size or encoder.spec.get("image_size", models.IMAGE_SIZE)
    args.lr = models.of_family(args.lr, encoder)
    return encoder, encoder.check_size(image_size), {}, encoder.dim


def classes_of(tables, task):
    """The names of the classes that a probe learns; none for depth.

    Raises InputError for datasets whose classes differ, and for one that the task is not for.
    """
    needed = "scan" if task == "depth" else "CLASSES"
    for table in tables:
        if not hasattr(table.reader, needed):
            what = "depths" if task == "depth" else "labels"
            raise InputError(f"--task {task}: {table.name} has no {what}")
    if task == "depth":
        return ()
    each = {table.name: table.reader.CLASSES for table in tables}
    if len(set(each.values())) > 1:
        raise InputError(f"--data: {' and '.join(each)} have other classes; probe them one by one")
    return tables[0].reader.CLASSES[1:]


def validation_of(args, tables):
    """The tables with their validation frames alone; says so where there are none."""
    of_val = [table.only((table["split"] == b"val").nonzero()[0]) for table in tables]
    if not any(map(len, of_val)):
        say(f"--data {args.data}: no frame of split 'val', so eval.py will need --data of other "
            "frames; --val-scenes makes a split of one's own")
    return of_val


class Run(NamedTuple):
    """What a probe trains on, and where it goes on."""
    frames: torch.utils.data.Dataset
    tables: list              # of the data, all splits
    classes: tuple            # names; none for depth
    checkpoint: dict | None   # of the run in --out
    about: dict               # what the run's checkpoints say of it


def set_up(args, encoder, image_size, stage1, points="random", validated=False):
    """The Run of the flags. All processes must call it.

    stage1: the checkpoint of a 3D encoder, else {}. points: see `Frames`. validated: whether the
    run depends on the validation split.
    Raises InputError where --out holds a run of other arguments, encoder or frames.
    """
    # The data, and what a 3D encoder gets of them
    task = TASKS[args.task]
    labelled = task.target == "labels"
    with training.first_process_first():
        tables = open_tables(args.data, args.version, look=False)
    tables = hold_out(tables, args.val_scenes)
    say_if_held_out(args.encoder, stage1, args.val_scenes, tables)
    for table in tables:
        say(table.summary())
    classes = classes_of(tables, args.task)
    prepare, inputs = None, {"image_size": image_size}
    if args.task == "seg3d":
        inputs = set_sampling(tables, stage1.get("samplings"), "probe",
                              stage1.get("sampling_flags"))
        encoder.use(inputs)
        prepare = encoder.prepare

    # The frames to learn from
    skip_bad = args.on_bad_frame == "skip"
    chosen = select(tables, "train", limit=args.limit, percent=args.percent or 100,
                    skip_bad=skip_bad)
    frames = Frames(chosen, args.cameras, image_size, prepare, task.target, points, skip_bad,
                    args.seed)
    frames.most = args.points

    # A run of the same arguments, encoder and frames goes on
    of_val = validation_of(args, tables)
    val = training.by_first_process(lambda: of_frames(of_val, labelled, files=True))
    made_from = {"encoder": encoder.fingerprint(), "frames": of_frames(chosen, labelled),
                 "input": inputs}
    if validated:
        made_from["validation"] = val
    checkpoint = find_last(args, made_from)

    # Which part of the data --percent is
    by_scene = [table for table in chosen if table.share == "scenes"]
    scenes = [scene for table in by_scene for scene in table.scenes()]
    for table in chosen if args.percent else ():
        part = f"scenes: {', '.join(table.scenes())}"
        if table.share == "frames":
            part = f"set: {len(table)} {'frames' if 'scan' in table else 'images'}, by name"
        whose = f"{table.name}'s" if len(chosen) > 1 else "the"
        say(f"{args.percent} % of {whose} training {part}")

    data = [[name, os.path.abspath(path)] for name, path in entries(args.data)]
    about = {"kind": "probe", "task": args.task, "classes": classes, "head": args.head,
             "encoder": models.source_of(args), "spec": encoder.spec, "image_size": image_size,
             "samplings": inputs if prepare else None, "made_from": made_from, "val": val,
             "sampling_flags": stage1.get("sampling_flags"),
             "dense": frames.dense,
             "scenes": scenes if args.percent else None, "data": data}
    return Run(frames, tables, classes, checkpoint, about)


# ---- training ------------------------------------------------------------------------------------

@one_line_errors
def main(argv=None):
    args = parse(argv)
    check_flags(args)
    device = training.start(args)
    if args.cache and training.world() > 1:
        raise InputError("--cache is for a single process: it holds all features; start without "
                         "torchrun")

    # ---- encoder and data ----
    with training.first_process_first():
        encoder, image_size, stage1, dim = load_encoder(args)
    points = "first" if args.cache else "augmented"
    run = set_up(args, encoder, image_size, stage1, points)
    task = TASKS[args.task]
    encoder = encoder.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(batch):
        """Features [N, D] at the points."""
        with training.autocast(device, args.precision):
            return task.features(encoder, batch)

    first = run.checkpoint["step"] if run.checkpoint else 0
    total = args.steps or len(run.frames) // args.batch * args.epochs
    batches = training.Batches(len(run.frames), args.batch, first, total, args.seed)
    source, workers = run.frames, args.workers
    if args.cache and first < total:
        source, workers = Cached(run.frames, features, args.workers, device), 0
    loader = training.load(source, batches, collate, workers, device)

    # ---- head ----
    head = linear_head(args.head, dim, len(run.classes) or 1).to(device)
    if args.head == "whitened" and run.checkpoint is None:
        some = torch.cat([item["features"][::4] for item in source.items])
        head[0].fit(some.float().to(device))
    model = training.distribute(head, device)

    # ---- optimizer ----
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    warmup = min(round(args.warmup_epochs * batches.per_epoch), total // 10)
    if run.checkpoint:
        head.load_state_dict(run.checkpoint["model"])
        optimizer.load_state_dict(run.checkpoint["optimizer"])

    # ---- loop ----
    log = Log(args.out, device, head, run.checkpoint, run.frames.frame_count())
    saver = Saver(args, batches.per_epoch, total)
    bar = tqdm(loader, f"probe {args.task}", initial=first, total=total,
               disable=training.rank() > 0, mininterval=2)
    for step, batch in saver.guard(enumerate(bar, first)):
        lr = training.cosine(step, total, args.lr, args.end_lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = training.to_device(batch, device)
        inputs = batch["features"] if args.cache else features(batch)  # [N, D]
        outputs = model(inputs.float())                                # [N, classes or 1]
        loss, count = task.loss(outputs, batch)
        loss = loss * training.share(count, device)
        optimizer.zero_grad()
        loss.backward()
        check_finite(loss, head, step, args.out, batches, run.frames)
        optimizer.step()

        log.add(loss, batch)
        done = step + 1
        if done % 50 == 0:
            bar.set_postfix(loss=f"{log.mean():.3f}", lr=f"{lr:.1e}", refresh=False)
        if done % batches.per_epoch == 0 or done == total:
            log.write(epoch=step // batches.per_epoch + 1, step=done, lr=lr)
        if saver.due(done):
            saver.save(run.about | {
                "model": head.state_dict(), "dim": dim, "optimizer": optimizer.state_dict(),
                "step": done, "total": total, "log": log.state(), "args": vars(args)})
    log.report()
    if training.rank() == 0:
        print(f"next: python eval.py {args.out}", flush=True)


if __name__ == "__main__":
    main()

"""Probes: what an encoder's features say, judged by a head on top of them.

Segmentation and depth at the pixels of projected points, segmentation in 3D, segmentation of
nuImages. Collaborative-distillation paper, Sec. 4.2 and C.3; --task seg3d: ScaLR, supplement B.3.
The bare command is the paper's run:

    run="torchrun --standalone --nproc_per_node 4"
    $run probe.py --data /data/nuscenes --encoder runs/s2 --task seg --out runs/probe-cd
    data="--data /data/nuscenes"
    python probe.py $data --encoder dinov2_vits14 --task depth                # without stage 2
    python probe.py $data --encoder runs/s1 --task seg3d                      # stage 1's WaffleIron
    python probe.py $data --encoder runs/s2 --task seg --finetune --percent 1       # Table 1, 1% FT
    python probe.py --data /data/nuimages --encoder runs/s2 --task nuimages         # all pixels

OUT is runs/probe-ENCODER-TASK (-finetune, -1 for 1 %) unless given. Writes OUT/last.pth and
OUT/log.jsonl and resumes from there. The encoder is frozen; with --finetune it learns too, see
finetune.py. `python eval.py OUT ...` evaluates and prints the table.
"""
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import models
from data import CLOUD, DEPTHS, Frames, collate
from distill import features_at_points
from heads import linear_head
from plumbing import training
from plumbing.arguments import COUNT, POSITIVE, RATE, Parser
from plumbing.errors import InputError, one_line_errors, say
from plumbing.fingerprint import with_files
from plumbing.run_folder import Log, Saver, check_finite, find_last
from readers.nuimages import CLASSES as NUIMAGES
from readers.nuimages import LabelledImages, load_nuimages
from readers.nuscenes import CLASSES, load_index
from waffleiron import load_waffleiron

# The papers' hyper-parameters by task (C.3; seg3d: ScaLR supplement B.3). lr and end_lr are the
# peak and the end of the cosine.
PAPER = {
    "seg": dict(
        cameras="all", epochs=10, batch=4, lr={"ViT": 5e-4, "ResNet-50": 1e-2},
        finetune_lr={"ViT": 1e-5}, end_lr=0.0, warmup=0, weight_decay=1e-4, head="linear"),
    "depth": dict(
        cameras="CAM_FRONT", epochs=10, batch=16, lr={"ViT": 1e-2, "ResNet-50": 1e-1},
        finetune_lr={"ViT": 2e-5}, end_lr=0.0, warmup=0, weight_decay=1e-4, head="linear"),
    "nuimages": dict(
        cameras="all", epochs=10, batch=24, lr={"ViT": 5e-3, "ResNet-50": 1e-2},
        finetune_lr={"ViT": 2e-5}, end_lr=0.0, warmup=0, weight_decay=1e-4, head="linear"),
    "seg3d": dict(
        cameras="scan", epochs=20, batch=8, lr=1e-3,
        finetune_lr=None, end_lr=1e-5, warmup=2, weight_decay=3e-3, head="batchnorm"),
}


# ---- arguments -----------------------------------------------------------------------------------

def by_task(name):
    """A default of each task, for the help."""
    words = []
    for task, row in PAPER.items():
        value = row[name]
        if isinstance(value, dict):
            value = ", ".join(f"{family} {number}" for family, number in value.items())
        words.append(f"{task} {value}")
    return "; ".join(words)


def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    training.add_arguments(parser, out_required=False)
    add("--task", choices=PAPER, required=True,
        help="seg: 16 classes; depth: metres; nuimages: 11 classes, --data is its root; seg3d: 16 "
             "classes on WaffleIron's features")
    models.add_arguments(parser, required=True,
        help="an encoder's name or stage 2's folder; for seg3d stage 1's folder, or released "
             "weights")
    add("--finetune", action="store_true",
        help="train the image encoder too (Tables 1 and 2), not only the head")
    add("--percent", type=int, choices=(1, 10),
        help="of the training scenes: every 100th or 10th in the order of the scene table, as "
             "SLidR's public loader; of nuImages' images in the order of their names "
             "(default: all)")
    add("--cameras",
        help=f"all, a channel, or scan: the whole scan, for seg3d (default: {by_task('cameras')})")
    add("--epochs", type=COUNT, help=f"(default: {by_task('epochs')})")
    add("--batch", type=COUNT,
        help=f"camera views in a batch, over all processes (default: {by_task('batch')})")
    add("--lr", type=POSITIVE,
        help=f"peak learning rate (default: {by_task('lr')}; with --finetune: "
             f"{by_task('finetune_lr')})")
    add("--head-lr", type=POSITIVE,
        help="with --finetune: peak learning rate of the head (default: --lr, the only one that "
             "the paper gives)")
    add("--end-lr", type=RATE,
        help=f"learning rate at the end of the cosine (default: {by_task('end_lr')})")
    add("--warmup", type=RATE, help=f"epochs from 0 to --lr (default: {by_task('warmup')})")
    add("--weight-decay", type=RATE, help=f"of AdamW (default: {by_task('weight_decay')})")
    add("--head", choices=("linear", "batchnorm", "whitened"),
        help="a linear layer, or BatchNorm or whitening before it: the same optimum, reached in "
             f"fewer steps; whitened needs --cache (default: {by_task('head')})")
    add("--cache", action="store_true",
        help="compute the frozen features once and keep them in memory, in half precision (1 000 "
             "views of 3 000 points and 384 channels: 2.3 GB); turns the augmentation of seg3d off")
    args = parser.parse_args(argv)

    # What was not given is the paper's
    paper = dict(PAPER[args.task])
    finetune_lr = paper.pop("finetune_lr")
    if args.finetune:
        paper["lr"] = finetune_lr
    for name, value in paper.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not args.out:
        args.out = f"runs/probe-{Path(args.encoder).name}-{args.task}"
        args.out += "-finetune" if args.finetune else ""
        args.out += f"-{args.percent}" if args.percent else ""
    return args


def check_flags(args):
    """Raise InputError for flags that do not go together."""
    if args.finetune and (args.cache or args.task == "seg3d"):
        other = "--cache" if args.cache else "--task seg3d"
        raise InputError(f"--finetune: not with {other}; it trains an image encoder")
    if args.head_lr and not args.finetune:
        raise InputError("--head-lr: for --finetune; without it --lr is the head's")
    if args.cameras == "scan" and args.task != "seg3d":
        raise InputError("--cameras scan: for --task seg3d only, a scan has no image")
    if args.cache and args.on_bad_frame == "skip":
        raise InputError("--on-bad-frame skip: not with --cache, which reads each frame once and "
                         "would keep the one in its place")
    if args.head == "whitened" and not args.cache:
        raise InputError("--head whitened needs all features at once: add --cache")
    ignored = [name for name in ("weights", "hub", "feature", "image_size") if getattr(args, name)]
    if args.task == "seg3d" and ignored:
        raise InputError(f"--{ignored[0].replace('_', '-')} has no meaning for --task seg3d: stage "
                         "1's checkpoint says all")


# ---- maths ---------------------------------------------------------------------------------------

def lovasz_softmax(probabilities, labels):
    """Lovász-softmax loss (Berman et al., CVPR 2018): the convex extension of 1 - IoU.

    Args: probabilities [N, C], labels [N] in 0..C-1.
    Returns: a scalar in [0, 1], the mean over the classes present; 0 for N = 0.
    """
    truth = F.one_hot(labels, probabilities.shape[1]).to(probabilities)  # [N, C]
    present = truth.any(0)
    if not present.any():
        return probabilities.sum() * 0
    truth = truth[:, present]
    probabilities = probabilities[:, present]
    errors, order = (truth - probabilities).abs().sort(0, descending=True)
    truth = truth.gather(0, order)
    # Jaccard loss of the set of the k largest errors, for each k; its increment weighs an error
    total = truth.sum(0)
    jaccard = 1 - (total - truth.cumsum(0)) / (total + (1 - truth).cumsum(0))
    weights = torch.cat([jaccard[:1], jaccard.diff(dim=0)])
    return (errors * weights).sum(0).mean()


def probe_loss(task, outputs, batch):
    """(loss, number of points it is the mean of) of a head's outputs [N, classes or 1].

    Cross-entropy + Lovász on the labelled points, or the mean squared error of depth in square
    metres.
    """
    if task == "depth":
        squares = F.mse_loss(outputs[:, 0], batch["depths"], reduction="sum")
        return squares / max(1, len(outputs)), len(outputs)
    labelled = batch["labels"] > 0
    outputs = outputs[labelled]
    labels = batch["labels"][labelled] - 1
    cross_entropy = F.cross_entropy(outputs, labels, reduction="sum") / max(1, len(labels))
    return cross_entropy + lovasz_softmax(outputs.softmax(1), labels), len(labels)


# ---- encoder and data ----------------------------------------------------------------------------

def load_encoder(args):
    """(encoder, image size or None, cloud options of a 3D encoder or None, width) of the flags.

    Sets args.lr to the rate of the encoder's family.
    """
    if args.task == "seg3d":
        encoder, stage1 = load_waffleiron(args.encoder)
        if not stage1:
            say(f"{args.encoder}: released weights; points and planes as ScaLR has them on "
                "nuScenes")
        return encoder, None, stage1.get("cloud", CLOUD), encoder.spec["channels"]
    encoder = models.load_image_encoder(args.encoder, args.weights, args.hub, args.feature,
                                        careful=False)
    image_size = args.image_size or encoder.spec.get("image_size", models.IMAGE_SIZE)
    args.lr = models.of_family(args.lr, encoder)
    return encoder, encoder.check_size(image_size), None, encoder.dim


def load_table(args):
    """(table of the data, class of its items, names of its classes)."""
    with training.first_process_first():
        if args.task == "nuimages":
            found = load_nuimages(args.data, look=False), LabelledImages, NUIMAGES[1:]
        else:
            classes = () if args.task == "depth" else CLASSES[1:]
            found = load_index(args.data, args.version, look=False), Frames, classes
    if training.rank() == 0:
        print(found[0].summary(), flush=True)
    return found


class Run(NamedTuple):
    """What a probe trains on, and where it goes on."""
    frames: torch.utils.data.Dataset
    held_out: torch.utils.data.Dataset  # the validation split, for fine-tuning
    classes: tuple            # names; none for depth
    checkpoint: dict | None   # of the run in --out
    about: dict               # what the run's checkpoints say of it


def prepare(args, encoder, image_size, cloud):
    """The Run of the flags. All processes must call it.

    Raises InputError where --out holds a run of other arguments, encoder or frames.
    """
    index, dataset, classes = load_table(args)
    labelled = args.task != "depth"
    skip_bad = args.on_bad_frame == "skip"
    rows = index.select("train", limit=args.limit, percent=args.percent or 100, skip_bad=skip_bad)
    options = dict(labels=labelled, max_depth=None if labelled else DEPTHS[1], seed=args.seed)
    frames = dataset(index, rows, args.cameras, image_size, cloud, training=not args.cache,
                     augment=cloud is not None and not args.cache, skip_bad=skip_bad, **options)
    held_out = ()
    if args.finetune:
        held_out = dataset(index, index.select("val"), args.cameras, image_size, **options)

    # A run of the same arguments, encoder and frames goes on
    all_val = np.flatnonzero(index.split == b"val")
    val = training.by_first_process(lambda: with_files(index, all_val, labelled))
    made_from = {"encoder": encoder.fingerprint(), "frames": index.fingerprint(rows, labelled),
                 "input": cloud or {"image_size": image_size}}
    if args.finetune:
        made_from["validation"] = val  # best.pth is chosen by it
    checkpoint = find_last(args, made_from)

    # Which part of the data --percent is
    scenes = []
    if dataset is Frames:
        scenes = np.char.decode(np.unique(index.scene[rows])).tolist()
    if args.percent and checkpoint and "scenes" not in checkpoint:
        raise InputError(f"--out {args.out} holds a run from before --percent took SLidR's scenes: "
                         "it saw others; choose another --out")
    if args.percent:
        of_set = "scenes: " + ", ".join(scenes)
        if not scenes:
            of_set = f"set: {len(rows)} images, by file name"
        say(f"{args.percent} % of the training {of_set}")

    about = {"kind": "probe", "task": args.task, "classes": classes, "head": args.head,
             "encoder": models.source_of(args), "spec": encoder.spec, "image_size": image_size,
             "made_from": made_from, "val": val, "scenes": scenes if args.percent else None,
             "data": os.path.abspath(args.data)}
    return Run(frames, held_out, classes, checkpoint, about)


class Cached(torch.utils.data.Dataset):
    """The items of `frames` with the encoder's features [N, D], in fp16, in place of its inputs.

    They are computed once.
    """

    def __init__(self, frames, features, workers, device):
        order = training.in_batches(range(len(frames)))
        loader = training.load(frames, order, collate, workers, device)
        self.items = []
        for batch in tqdm(loader, "features", disable=training.rank() > 0, mininterval=2):
            batch = training.to_device(batch, device)
            batch["features"] = features(batch).half()
            self.add(batch)

    def add(self, batch):
        """Cut a batch into its items."""
        counts = torch.bincount(batch["batch"].cpu(), minlength=len(batch["condition"])).tolist()
        parts = {name: batch[name].cpu().split(counts)
                 for name in ("features", "pixels", "labels", "depths") if name in batch}
        for number, condition in enumerate(batch["condition"].tolist()):
            item = {name: values[number].clone() for name, values in parts.items()}
            self.items.append({"condition": condition} | item)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        return self.items[key[1]]


# ---- training ------------------------------------------------------------------------------------

@one_line_errors
def main(argv=None):
    args = parse(argv)
    check_flags(args)
    if args.finetune:
        import finetune  # here, because it imports this file
        return finetune.main(args)
    device = training.start(args)
    if args.cache and training.world() > 1:
        raise InputError("--cache is for a single process: it holds all features; start without "
                         "torchrun")

    # ---- encoder and data ----
    with training.first_process_first():
        encoder, image_size, cloud, dim = load_encoder(args)
    run = prepare(args, encoder, image_size, cloud)
    encoder = encoder.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(batch):
        """Features [N, D] at the points."""
        with training.autocast(device, args.precision):
            return features_at_points(encoder, batch, image_size)

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
    warmup = min(round(args.warmup * batches.per_epoch), total // 10)
    if run.checkpoint:
        head.load_state_dict(run.checkpoint["model"])
        optimizer.load_state_dict(run.checkpoint["optimizer"])

    # ---- loop ----
    log = Log(args.out, device, head, run.checkpoint, len(run.frames.rows))
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
        loss, count = probe_loss(args.task, outputs, batch)
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

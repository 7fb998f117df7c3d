"""Linear probes and fine-tuning of an encoder: segmentation and depth at the pixels of projected points, segmentation in 3D,
segmentation of nuImages.

Collaborative-distillation paper, Sec. 4.2 and C.3; --task seg3d: ScaLR, supplement B.3. The bare command is the paper's run:

    torchrun --standalone --nproc_per_node 4 probe.py --data /data/nuscenes --encoder runs/s2 --task seg --out runs/probe-cd
    python probe.py --data /data/nuscenes --encoder dinov2_vits14 --task depth --out runs/probe-depth     # without stage 2
    python probe.py --data /data/nuscenes --encoder runs/s1 --task seg3d --out runs/probe-3d              # stage 1's WaffleIron
    python probe.py --data /data/nuscenes --encoder runs/s2 --task seg --finetune --percent 1             # Table 1, 1% FT
    python probe.py --data /data/nuimages --encoder runs/s2 --task nuimages                               # nuImages, all pixels

OUT is runs/probe-ENCODER-TASK (-finetune, -1 for 1 %) unless given. Writes OUT/last.pth and OUT/log.jsonl and resumes from there; with
--finetune also OUT/best.pth, of the lowest loss on the validation split, which is computed ten times a run.
`python eval.py OUT ...` evaluates and prints the table.
"""
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import models
import training
from plumbing.arguments import COUNT, POSITIVE, RATE, Parser
from data import CLOUD, DEPTHS, Frames, collate
from distill import features_at_points
from errors import InputError, one_line_errors, say
from plumbing.fingerprint import with_files
from index import CLASSES, load_index
from nuimages_data import CLASSES as NUIMAGES
from nuimages_data import LabelledImages, load_nuimages
from run_folder import Log, Saver, check_finite, find_last, save
from waffleiron import BatchNorm, load_waffleiron


# The papers' hyper-parameters by task (C.3; seg3d: ScaLR supplement B.3). lr and end_lr: peak and end of the cosine.
PAPER = {
    "seg": dict(cameras="all", epochs=10, batch=4, lr={"ViT": 5e-4, "ResNet-50": 1e-2}, finetune_lr={"ViT": 1e-5}, end_lr=0.0,
                warmup=0, weight_decay=1e-4, head="linear"),
    "depth": dict(cameras="CAM_FRONT", epochs=10, batch=16, lr={"ViT": 1e-2, "ResNet-50": 1e-1}, finetune_lr={"ViT": 2e-5},
                  end_lr=0.0, warmup=0, weight_decay=1e-4, head="linear"),
    "nuimages": dict(cameras="all", epochs=10, batch=24, lr={"ViT": 5e-3, "ResNet-50": 1e-2}, finetune_lr={"ViT": 2e-5}, end_lr=0.0,
                     warmup=0, weight_decay=1e-4, head="linear"),
    "seg3d": dict(cameras="scan", epochs=20, batch=8, lr=1e-3, finetune_lr=None, end_lr=1e-5, warmup=2, weight_decay=3e-3,
                  head="batchnorm"),
}


def parse(argv=None):
    parser = Parser(__doc__)
    training.add_arguments(parser, out_required=False)
    add = parser.add_argument
    add("--task", choices=PAPER, required=True, help="seg: 16 classes; depth: metres; nuimages: 11 classes, --data is "
        "its root; seg3d: 16 classes on WaffleIron's features")
    models.add_arguments(parser, required=True, help="an encoder's name or stage 2's folder; for seg3d stage 1's folder, or released weights")

    def by_task(name):
        values = {task: row[name] for task, row in PAPER.items()}
        return "; ".join(f"{task} " + (", ".join(f"{family} {v}" for family, v in value.items()) if isinstance(value, dict) else str(value))
                         for task, value in values.items())
    add("--finetune", action="store_true", help="train the image encoder too (Tables 1 and 2), not only the head")
    add("--percent", type=int, choices=(1, 10), help="of the training scenes: every 100th or 10th in the order of the scene table, as "
        "SLidR's public loader; of nuImages' images in the order of their names (default: all)")
    add("--cameras", help=f"all, a channel, or scan: the whole scan, for seg3d (default: {by_task('cameras')})")
    add("--epochs", type=COUNT, help=f"(default: {by_task('epochs')})")
    add("--batch", type=COUNT, help=f"camera views in a batch, over all processes (default: {by_task('batch')})")
    add("--lr", type=POSITIVE, help=f"peak learning rate (default: {by_task('lr')}; with --finetune: {by_task('finetune_lr')})")
    add("--head-lr", type=POSITIVE, help="with --finetune: peak learning rate of the head (default: --lr, the only one that the paper gives)")
    add("--end-lr", type=RATE, help=f"learning rate at the end of the cosine (default: {by_task('end_lr')})")
    add("--warmup", type=RATE, help=f"epochs from 0 to --lr (default: {by_task('warmup')})")
    add("--weight-decay", type=RATE, help=f"of AdamW (default: {by_task('weight_decay')})")
    add("--head", choices=("linear", "batchnorm", "whitened"), help="a linear layer, or BatchNorm or whitening before it: the same "
        f"optimum, reached in fewer steps; whitened needs --cache (default: {by_task('head')})")
    add("--cache", action="store_true", help="compute the frozen features once and keep them in memory, in half precision (1 000 views of "
        "3 000 points and 384 channels: 2.3 GB); turns the augmentation of seg3d off")
    args = parser.parse_args(argv)
    paper = dict(PAPER[args.task])
    finetune_lr = paper.pop("finetune_lr")
    for name, value in (paper | {"lr": finetune_lr} if args.finetune else paper).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or (f"runs/probe-{Path(args.encoder).name}-{args.task}" + "-finetune" * args.finetune
                            + (f"-{args.percent}" if args.percent else ""))
    return args


# ---- maths ------------------------------------------------------------------------------------------------------------

def lovasz_softmax(probabilities, labels):
    """Lovász-softmax loss (Berman et al., CVPR 2018): the convex extension of 1 - IoU, mean over the classes present.

    Args: probabilities [N, C], labels [N] in 0..C-1. Returns: a scalar in [0, 1]; 0 for N = 0.
    """
    truth = F.one_hot(labels, probabilities.shape[1]).to(probabilities)  # [N, C]
    present = truth.any(0)
    if not present.any():
        return probabilities.sum() * 0
    truth, probabilities = truth[:, present], probabilities[:, present]
    errors, order = (truth - probabilities).abs().sort(0, descending=True)
    truth = truth.gather(0, order)
    # Jaccard loss of the set of the k largest errors, for each k; the loss weighs each error by the set's increment
    total = truth.sum(0)
    jaccard = 1 - (total - truth.cumsum(0)) / (total + (1 - truth).cumsum(0))
    weights = torch.cat([jaccard[:1], jaccard.diff(dim=0)])
    return (errors * weights).sum(0).mean()


def probe_loss(task, outputs, batch):
    """Cross-entropy + Lovász on the labelled points, or the mean squared error of depth in square metres."""
    if task == "depth":
        return F.mse_loss(outputs[:, 0], batch["depths"], reduction="sum") / max(1, len(outputs)), len(outputs)
    labelled = batch["labels"] > 0
    outputs, labels = outputs[labelled], batch["labels"][labelled] - 1
    cross_entropy = F.cross_entropy(outputs, labels, reduction="sum") / max(1, len(labels))
    return cross_entropy + lovasz_softmax(outputs.softmax(1), labels), len(labels)


# ---- frozen features --------------------------------------------------------------------------------------------------

class Cached(torch.utils.data.Dataset):
    """The items of `frames` with the frozen encoder's features [N, D] in place of the inputs, computed once, in fp16."""

    def __init__(self, frames, features, workers, device):
        order = [[(0, n) for n in range(start, min(start + 16, len(frames)))] for start in range(0, len(frames), 16)]
        self.items = []
        for batch in tqdm(training.load(frames, order, collate, workers, device), "features",
                          disable=training.rank() > 0, mininterval=2):
            batch = training.to_device(batch, device)
            batch["features"] = features(batch).half()
            kept = {name: batch[name].cpu() for name in ("features", "pixels", "labels", "depths") if name in batch}
            counts = torch.bincount(batch["batch"].cpu(), minlength=len(batch["condition"])).tolist()
            parts = {name: values.split(counts) for name, values in kept.items()}
            self.items += [{"condition": condition} | {name: parts[name][n].clone() for name in parts}
                           for n, condition in enumerate(batch["condition"].tolist())]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        return self.items[key[1]]


class Finetuned(torch.nn.Module):
    """An encoder and the head on it as one module, so that the gradients of both are averaged over the processes."""

    def __init__(self, encoder, head, features):
        super().__init__()
        self.encoder, self.head, self.features = encoder, head, features

    def forward(self, batch):
        return self.head(self.features(batch).float())


@torch.no_grad()
def validation_loss(task, outputs_of, loader, device):
    """Mean loss over this loader's batches of all processes, weighted by their points."""
    sums = torch.zeros(2, dtype=torch.double, device=device)
    for batch in loader:
        batch = training.to_device(batch, device)
        loss, count = probe_loss(task, outputs_of(batch), batch)
        sums += torch.tensor([loss * count, count], dtype=torch.double, device=device)
    total, count = training.sum_over_processes(sums).tolist()
    return total / max(1, count)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    if args.finetune and (args.cache or args.task == "seg3d"):
        raise InputError(f"--finetune: not with {'--cache' if args.cache else '--task seg3d'}; it trains an image encoder")
    if args.head_lr and not args.finetune:
        raise InputError("--head-lr: for --finetune; without it --lr is the head's")
    if args.cameras == "scan" and args.task != "seg3d":
        raise InputError("--cameras scan: for --task seg3d only, a scan has no image")
    if args.cache and args.on_bad_frame == "skip":
        raise InputError("--on-bad-frame skip: not with --cache, which reads each frame once and would keep the one in its place")
    if args.head == "whitened" and not args.cache:
        raise InputError("--head whitened needs all features at once: add --cache")
    ignored = [name for name in ("weights", "hub", "feature", "image_size") if getattr(args, name)]
    if args.task == "seg3d" and ignored:
        raise InputError(f"--{ignored[0].replace('_', '-')} has no meaning for --task seg3d: stage 1's checkpoint says all")
    device = training.start(args)
    if args.cache and training.world() > 1:
        raise InputError("--cache is for a single process: it holds all features; start without torchrun")

    # ---- data and frozen encoder ----
    with training.first_process_first():
        if args.task == "seg3d":
            encoder, stage1 = load_waffleiron(args.encoder)
            if not stage1:
                say(f"{args.encoder}: released weights; points and planes as ScaLR has them on nuScenes")
            image_size, cloud, dim = None, stage1.get("cloud", CLOUD), encoder.spec["channels"]
        else:
            encoder = models.load_image_encoder(args.encoder, args.weights, args.hub, args.feature, careful=False)
            image_size, cloud, dim = args.image_size or encoder.spec.get("image_size", models.IMAGE_SIZE), None, encoder.dim
            image_size = encoder.check_size(image_size)
            args.lr = models.of_family(args.lr, encoder)
    load, dataset, classes = (load_nuimages, LabelledImages, NUIMAGES) if args.task == "nuimages" else (load_index, Frames, CLASSES)
    with training.first_process_first():
        index = load(args.data, args.version, look=False)
    if training.rank() == 0:
        print(index.summary(), flush=True)
    made_from = {"encoder": encoder.fingerprint()}
    encoder = encoder.to(device).eval().requires_grad_(args.finetune)  # in eval() also where it is trained, as in stage 2
    skip_bad = args.on_bad_frame == "skip"
    rows = index.select("train", limit=args.limit, percent=args.percent or 100, skip_bad=skip_bad)
    labelled = args.task != "depth"
    made_from["frames"] = index.fingerprint(rows, labelled)
    val = training.by_first_process(lambda: with_files(index, np.flatnonzero(index.split == b"val"), labelled))
    if args.finetune:
        made_from["validation"] = val  # best.pth is chosen by it
    checkpoint = find_last(args, made_from)
    if args.percent and checkpoint and "scenes" not in checkpoint:
        raise InputError(f"--out {args.out} holds a run from before --percent took SLidR's scenes: it saw others; choose another --out")
    scenes = np.char.decode(np.unique(index.scene[rows])).tolist() if load is load_index else []
    if args.percent:
        of_set = "scenes: " + ", ".join(scenes) if scenes else f"set: {len(rows)} images, by file name"
        say(f"{args.percent} % of the training {of_set}")
    options = dict(labels=labelled, max_depth=DEPTHS[1] if args.task == "depth" else None, seed=args.seed)
    frames = dataset(index, rows, args.cameras, image_size, cloud, training=not args.cache,
                    augment=cloud is not None and not args.cache, skip_bad=skip_bad, **options)
    held_out = dataset(index, index.select("val"), args.cameras, image_size, **options) if args.finetune else ()
    mine = range(training.rank(), len(held_out), training.world())
    mine = [[(0, number) for number in mine[start:start + 16]] for start in range(0, len(mine), 16)]

    def features(batch):
        """Features [N, D] at the points."""
        with torch.set_grad_enabled(args.finetune and torch.is_grad_enabled()), training.autocast(device, args.precision):
            return features_at_points(encoder, batch, image_size)

    total = args.steps or len(frames) // args.batch * args.epochs
    first = checkpoint["step"] if checkpoint else 0
    batches = training.Batches(len(frames), args.batch, first, total, args.seed)
    cached = Cached(frames, features, args.workers, device) if args.cache and first < total else None
    loader = training.load(cached or frames, batches, collate, 0 if cached else args.workers, device)

    # ---- head ----
    classes = classes[1:] if args.task != "depth" else ()  # without ignore
    head = models.linear_head(args.head, dim, len(classes) or 1, BatchNorm).to(device)
    if args.head == "whitened" and checkpoint is None:
        head[0].fit(torch.cat([item["features"][::4] for item in cached.items]).float().to(device))
    trained = Finetuned(encoder, head, features) if args.finetune else head
    model = training.distribute(trained, device, find_unused_parameters=args.finetune)
    groups = [{"params": head.parameters(), "factor": (args.head_lr or args.lr) / args.lr}]
    if args.finetune:
        groups.append({"params": encoder.parameters(), "factor": 1.0})
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    warmup = min(round(args.warmup * batches.per_epoch), total // 10)

    # ---- resume ----
    if checkpoint:
        head.load_state_dict(checkpoint["model"])
        if args.finetune:
            encoder.backbone.load_state_dict(checkpoint["backbone"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    # ---- loop ----
    best = checkpoint.get("best", float("inf")) if checkpoint else float("inf")
    validate_every = max(1, total // batches.per_epoch // 10)  # epochs: ten times a run, however short an epoch is
    log, saver = Log(args.out, device, trained, checkpoint, len(frames.rows)), Saver(args, batches.per_epoch, total)
    bar = tqdm(loader, f"probe {args.task}", initial=first, total=total, disable=training.rank() > 0, mininterval=2)
    for step, batch in saver.guard(enumerate(bar, first)):
        lr = training.cosine(step, total, args.lr, args.end_lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)
        batch = training.to_device(batch, device)
        if args.finetune:
            outputs = model(batch)
        else:
            outputs = model((batch["features"] if args.cache else features(batch)).float())  # [N, D] -> [N, classes or 1]
        loss, count = probe_loss(args.task, outputs, batch)
        loss = loss * training.share(count, device)
        optimizer.zero_grad()
        loss.backward()
        check_finite(loss, trained, step, args.out, batches, frames)
        optimizer.step()

        log.add(loss, batch)
        done = step + 1
        if done % 50 == 0:
            bar.set_postfix(loss=f"{log.mean():.3f}", lr=f"{lr:.1e}", refresh=False)
        epoch_ends, values = done % batches.per_epoch == 0 or done == total, {}
        if args.finetune and (done % (batches.per_epoch * validate_every) == 0 or done == total):
            head.eval()
            values["validation_loss"] = validation_loss(args.task, trained, training.load(held_out, mine, collate, args.workers, device),
                                                        device)
            head.train()
        if epoch_ends:
            log.write(epoch=step // batches.per_epoch + 1, step=done, lr=lr, **values)
        if saver.due(done):
            is_best = values.get("validation_loss", float("inf")) < best
            best = values["validation_loss"] if is_best else best
            content = {
                "kind": "probe", "task": args.task, "model": head.state_dict(), "head": args.head, "dim": dim, "classes": classes,
                "backbone": encoder.backbone.state_dict() if args.finetune else None, "best": best,
                "encoder": models.source_of(args), "spec": encoder.spec, "image_size": image_size,
                "made_from": made_from, "val": val, "scenes": scenes if args.percent else None,
                "data": os.path.abspath(args.data), "optimizer": optimizer.state_dict(), "step": done, "total": total,
                "log": log.state(), "args": vars(args)}
            if is_best:
                save(os.path.join(args.out, "best.pth"), content)
            saver.save(content)
    log.report()
    if training.rank() == 0:
        print(f"next: python eval.py {args.out}", flush=True)


if __name__ == "__main__":
    main()

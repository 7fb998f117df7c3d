"""The paper's ablations: each changes one thing of the method, and stage1.py and stage2.py know nothing of them.

Collaborative-distillation paper, Sec. 4.4, B.7, B.10, B.11. Segmentation is mIoU in %, depth RMSE in m, of linear probes on nuScenes;
all numbers are the paper's: ViT-S/14, whose own are 49.2 and 8.37, and after CD 51.9 and 7.64. From the repository's root, or with
`torchrun --standalone --nproc_per_node N -m experiments.ablations`:

    python -m experiments.ablations no-stage1 --data DATA --encoder dinov2_vits14 --out runs/labels     # flags of stage1.py
    python stage2.py --data DATA --stage1 runs/labels --out runs/no-stage1
    python -m experiments.ablations 2d-head --data DATA --encoder dinov2_vits14 --out runs/2d-head-1    # flags of stage1.py
    python -m experiments.ablations 2d-head --data DATA --stage1 runs/2d-head-1 --out runs/2d-head      # flags of stage2.py
    python -m experiments.ablations joint --data DATA --encoder dinov2_vits14 --out runs/joint          # flags of stage1.py
    python -m experiments.ablations stage2-epochs --data DATA --stage1 runs/s1 --out runs/s2-25         # flags of stage2.py
    python -m experiments.ablations stage1-all-conditions --data DATA --encoder dinov2_vits14 --out runs/s1-all    # of stage1.py

`NAME -h` prints them. OUT is probed as stage 1's or stage 2's is, and goes on from last.pth. What each is, and where the paper is silent:

no-stage1 (Table 8: 32.2, depth 9.53). WaffleIron learns lidarseg's 16 classes from stage 1's frames, with its schedule, by probe.py's
    cross-entropy + Lovász; stage2.py then takes it for stage 1's. Silent: what brings its features to the image encoder's width.
    Here its linear head, which stays random: labels teach only what is below, and stage 2 trains nothing of the 3D side.
2d-head (Table J: 45.3, depth 7.94). No 3D head; a linear 2D head brings the pixels' features to WaffleIron's width, in both stages.
    Silent: where the head learns. Here Eq. 1 and 2 are taken at their word, with the head as part of the 2D side: in stage 1 all of
    it is teacher and the head stays random, in stage 2 encoder and head learn. --train-head lets it learn in stage 1 too, from the
    loss without a stop-gradient, where it and WaffleIron can agree on a constant: the trivial solution that B.10 fears of two heads.
    OUT of its stage 2 is the image encoder; the head is dropped.
joint (Table K: 38.5, 30.1, 25.8 after 1, 5, 10 epochs; depth 7.77, 7.95, 8.20). Both encoders and the 3D head learn from the start,
    in one stage, from Eq. 1 without its stop-gradient (--loss l2) or from InfoNCE over the pairs (--loss contrastive). Silent: which
    loss the rows of Table K have, the data, the rates. Here stage 2's data and epochs; each side has its own stage's peak rate; the
    cloud is augmented as in stage 1; InfoNCE goes both ways among the pairs of one process. Writes OUT/waffleiron.pth too.
stage2-epochs (Table G: 25 epochs 52.7, depth 7.44; but on KITTI 3.08 instead of 2.80, NYUd 0.541 instead of 0.434). Only stage2.py
    --epochs 25; give another number.
stage1-all-conditions (Table 5, the 3D encoder's mIoU: rain 60.0 instead of 61.1, night 42.8 instead of 48.0). Only stage1.py with
    all --conditions: as many epochs, so more steps.
"""
import os
import sys

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import models
import stage1
import stage2
import training
from plumbing.arguments import POSITIVE, Parser, whole
from checkpoints import read, say_if_unfinished
from data import Frames, collate
from distill import distillation_loss, features_at_points
from errors import InputError, one_line_errors
from plumbing.fingerprint import check, of_weights
from index import CLASSES, CONDITIONS, load_index
from probe import probe_loss
from run_folder import Log, Saver, check_finite, find_last, save
from waffleiron import WaffleIron


# ---- maths --------------------------------------------------------------------------------------------------------------

def two_way_loss(pixel_features, point_features):
    """Eq. 1 without its stop-gradient: the same value, and the gradient that both of its directions have together."""
    to_3d, to_2d = (distillation_loss(pixel_features, point_features, way) for way in ("2d_to_3d", "3d_to_2d"))
    return to_3d + to_2d - to_2d.detach()


def contrastive_loss(pixel_features, point_features, temperature):
    """InfoNCE both ways: each feature has to tell its partner from all other features of the other side.

    Args: pixel_features, point_features [M, D]: row i of both is a pair. Returns: a float32 scalar, 0 for M < 2.
    """
    g, f = (F.normalize(features.float(), dim=1) for features in (pixel_features, point_features))
    logits = g @ f.T / temperature  # [M, M]
    partner = torch.arange(len(g), device=g.device)
    loss = F.cross_entropy(logits, partner, reduction="sum") + F.cross_entropy(logits.T, partner, reduction="sum")
    return loss / max(1, 2 * len(g))


def some_of_each(batch, count, generator):
    """Rows of at most `count` random points of each image, from batch [N], the image of each point."""
    order = torch.randperm(len(batch), generator=generator).to(batch.device)
    order = order[batch[order].argsort(stable=True)]  # image by image, random within each
    counts = torch.bincount(batch)
    start = (counts.cumsum(0) - counts)[batch[order]]
    return order[torch.arange(len(batch), device=batch.device) - start < count]


# ---- models: one module each, so that the gradients of all that is trained are averaged over the processes ----------------

class Pair(nn.Module):
    """Pixel and point features [M, D] of a batch, by both encoders and a 2D head if there is one."""

    def __init__(self, encoder, waffleiron, image_size, head=None):
        super().__init__()
        self.encoder, self.waffleiron, self.image_size, self.head = encoder, waffleiron, image_size, head or nn.Identity()

    def forward(self, batch):
        pixel_features = self.head(features_at_points(self.encoder, batch, self.image_size))
        return pixel_features, self.waffleiron(batch["feats"], batch["cells"], batch["neighbors"], batch["batch"])


class Segmenter(nn.Module):
    """Classes [N, 16] of a batch's points, by a classifier in the place of WaffleIron's head."""

    def __init__(self, waffleiron, classifier):
        super().__init__()
        self.waffleiron, self.classifier = waffleiron, classifier

    def forward(self, batch):
        return self.classifier(features_at_points(self.waffleiron, batch, None))


# ---- what stage1.py's main builds, and its loop ---------------------------------------------------------------------------

def build(args, device, out_channels=None, labels=False):
    """Image encoder, WaffleIron, frames of stage1.py's flags, and what its checkpoint says of them.

    out_channels: of WaffleIron's head (default: the image encoder's). labels: frames with labels and without images.
    """
    with training.first_process_first():
        index = load_index(args.data, args.version, look=False)
        encoder = models.load_image_encoder(args.encoder, args.weights, args.hub, args.feature, careful=False).to(device)
    if training.rank() == 0:
        print(index.summary(), flush=True)
    image_size = encoder.check_size(args.image_size or encoder.spec.get("image_size", models.IMAGE_SIZE))
    cloud = stage1.cloud_of(args)
    skip_bad = args.on_bad_frame == "skip"
    frames = Frames(index, index.select("train", args.conditions, args.limit, skip_bad=skip_bad), args.cameras,
                    None if labels else image_size, cloud, training=True, augment=True, labels=labels, skip_bad=skip_bad, seed=args.seed)
    waffleiron = stage1.waffleiron_of(args, cloud, out_channels or encoder.dim).to(device)
    made_from = {"encoder": encoder.fingerprint(), "frames": index.fingerprint(frames.rows, labels)}
    return encoder, waffleiron, frames, {"waffleiron": waffleiron.spec, "cloud": cloud, "encoder": models.source_of(args),
                                         "image_size": image_size, "made_from": made_from}


def train(args, device, checkpoint, frames, model, loss_of, peaks, parts, content):
    """The loop of both stages, with another model and another loss.

    Args:
        checkpoint: what to go on from, or None. model: called with a batch; what requires a gradient is trained.
        loss_of: (the model's outputs, batch, step) -> the loss, and of how many pairs or points it is the mean.
        peaks: (module, its peak learning rate), .... parts: {name in the checkpoint: module}; content: what else it holds.
    """
    total = args.steps or len(frames) // args.batch * args.epochs
    first = checkpoint["step"] if checkpoint else 0
    batches = training.Batches(len(frames), args.batch, first, total, args.seed)
    loader = training.load(frames, batches, collate, args.workers, device)
    # --warmup is in steps among stage1.py's flags, a part of the run among stage2.py's
    warmup = round(args.warmup * total) if "stage1" in args else min(args.warmup, total // 10)
    optimizer = torch.optim.AdamW([{"params": [p for p in module.parameters() if p.requires_grad], "peak": peak}
                                   for module, peak in peaks], weight_decay=args.weight_decay)
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        optimizer.load_state_dict(checkpoint["optimizer"])
    log, saver = Log(args.out, device, model, checkpoint, len(frames.rows)), Saver(args, batches.per_epoch, total)
    distributed = training.distribute(model, device, find_unused_parameters=True)  # e.g. the final norm, for "prenorm"

    bar = tqdm(loader, args.ablation, initial=first, total=total, disable=training.rank() > 0, mininterval=2)
    for step, batch in saver.guard(enumerate(bar, first)):
        for group in optimizer.param_groups:
            group["lr"] = training.cosine(step, total, group["peak"], args.end_lr, warmup)
        batch = training.to_device(batch, device)
        with training.autocast(device, args.precision):
            outputs = distributed(batch)  # what is frozen builds no graph: neither it nor its input requires a gradient
        loss, count = loss_of(outputs, batch, step)
        loss = loss * training.share(count, device)
        optimizer.zero_grad()
        loss.backward()
        check_finite(loss, model, step, args.out, batches, frames)
        optimizer.step()

        log.add(loss, batch)
        done = step + 1
        if done % 50 == 0:
            bar.set_postfix(loss=f"{log.mean():.3f}", refresh=False)
        if done % batches.per_epoch == 0 or done == total:
            log.write(epoch=step // batches.per_epoch + 1, step=done, lr=group["lr"])
        if saver.due(done):
            saver.save(content | {name: part.state_dict() for name, part in parts.items()} | {
                "optimizer": optimizer.state_dict(), "step": done, "total": total, "log": log.state(), "args": vars(args)})
    log.report()


# ---- the ablations --------------------------------------------------------------------------------------------------------

def no_stage1(argv):
    """Table 8: labels in place of the image encoder; its random head is what stage2.py finds."""
    args = stage1.parse(argv)
    args.ablation = "no-stage1"
    device = training.start(args)
    _, waffleiron, frames, content = build(args, device, labels=True)
    checkpoint = find_last(args, content["made_from"])
    waffleiron.head.requires_grad_(False)
    classifier = nn.Linear(args.channels, len(CLASSES) - 1).to(device)

    def loss_of(outputs, batch, step):
        return probe_loss("seg3d", outputs.float(), batch)

    model = Segmenter(waffleiron, classifier)
    train(args, device, checkpoint, frames, model, loss_of, [(model, args.lr)], {"model": waffleiron, "classifier": classifier},
          {"kind": "point_encoder"} | content)


def head_2d(argv):
    """Table J (1): stage 1 with a 2D head, or with --stage1 the stage 2 after it."""
    parser = Parser("Table J: a linear 2D head in place of the 3D head. All other flags are stage1.py's (see its -h) or, with --stage1, "
                    "stage2.py's without --encoder, --feature and --image-size.", allow_abbrev=False)
    parser.add_argument("--stage1", help="folder of this ablation's stage 1: do its stage 2 (default: do stage 1)")
    parser.add_argument("--train-head", action="store_true", help="train the head in stage 1 too (default: it stays random there)")
    own, rest = parser.parse_known_args(argv)
    if own.stage1:
        if own.train_head:
            raise InputError("--train-head is for stage 1; stage 2 always trains the head")
        args = stage2.parse(["--stage1", own.stage1, *rest])
    else:
        args = stage1.parse(rest)
        args.train_head = own.train_head
    args.ablation = "2d-head"
    device = training.start(args)
    (head_2d_stage2 if own.stage1 else head_2d_stage1)(args, device)


def head_2d_stage1(args, device):
    """WaffleIron without a head learns the features that the 2D head gives; the image encoder is frozen."""
    encoder, waffleiron, frames, content = build(args, device, out_channels=args.channels)
    checkpoint = find_last(args, content["made_from"])
    encoder.requires_grad_(False)
    waffleiron.head = nn.Identity()
    head = nn.Linear(encoder.dim, args.channels).to(device).requires_grad_(args.train_head)

    def loss_of(features, batch, step):
        loss = two_way_loss(*features) if args.train_head else distillation_loss(*features, "2d_to_3d")
        return loss, len(batch["batch"])

    model = Pair(encoder, waffleiron, content["image_size"], head)
    train(args, device, checkpoint, frames, model, loss_of, [(model, args.lr)], {"model": waffleiron, "head": head},
          {"kind": "2d_head"} | content)


def head_2d_stage2(args, device):
    """The frozen WaffleIron teaches image encoder and 2D head; the image encoder is what is kept."""
    if refused := next((name for name in ("encoder", "feature", "image_size") if getattr(args, name)), None):
        raise InputError(f"--{refused.replace('_', '-')}: leave it out; the 2D head of --stage1 {args.stage1} was made for its own")
    before = read(args.stage1)
    if not isinstance(before, dict) or before.get("kind") != "2d_head":
        raise InputError(f"--stage1 {args.stage1}: not a checkpoint of stage 1 with a 2D head; `2d-head` without --stage1 writes it")
    say_if_unfinished(before, args.stage1)
    with training.first_process_first():
        index = load_index(args.data, args.version, look=False)
        moved = {name: value for name, value in (("weights", args.weights), ("hub", args.hub)) if value}
        encoder = models.load_image_encoder(**models.source_in(before, args.stage1) | moved, careful=False).to(device)
    made_from = {"encoder": encoder.fingerprint()}
    check(f"--stage1 {args.stage1}", before.get("made_from", {}), made_from, "its 2D head was made for that one; do its stage 1 again")
    encoder.keep_less(args.checkpoint)
    args.lr = models.of_family(args.lr, encoder)
    if training.rank() == 0:
        print(index.summary(), flush=True)
    skip_bad = args.on_bad_frame == "skip"
    frames = Frames(index, index.select("train", args.conditions, args.limit, skip_bad=skip_bad), args.cameras, before["image_size"],
                    before["cloud"], training=True, skip_bad=skip_bad, seed=args.seed)
    waffleiron = WaffleIron(**before["waffleiron"])
    waffleiron.head = nn.Identity()
    waffleiron.load_state_dict(before["model"])
    waffleiron.to(device).eval().requires_grad_(False)
    head = nn.Linear(encoder.dim, before["waffleiron"]["channels"]).to(device)
    head.load_state_dict(before["head"])
    made_from["stage1"] = {"name": "2d-head", "weights": of_weights(nn.ModuleList([waffleiron, head]))}
    made_from["frames"] = index.fingerprint(frames.rows)
    checkpoint = find_last(args, made_from)
    encoder.train(args.train_batchnorm)

    def loss_of(features, batch, step):
        return distillation_loss(*features, "3d_to_2d"), len(batch["batch"])

    model = Pair(encoder, waffleiron, before["image_size"], head)
    train(args, device, checkpoint, frames, model, loss_of, [(model, args.lr)], {"model": encoder.backbone, "head": head},
          {"kind": "image_encoder", "encoder": encoder.spec | {"image_size": before["image_size"]}, "made_from": made_from})


def joint(argv):
    """Table K: both encoders trained together from the start, in one stage."""
    parser = Parser("Table K: both encoders trained in one stage. All other flags are stage1.py's (see its -h), with stage2.py's defaults "
                    "of --conditions, --cameras, --epochs and --batch; --lr is WaffleIron's.", allow_abbrev=False)
    add = parser.add_argument
    add("--loss", choices=("l2", "contrastive"), default="l2", help="Eq. 1 without stop-gradient, or InfoNCE (default: %(default)s)")
    add("--lr-2d", type=POSITIVE, default=stage2.LR, help="peak learning rate of the image encoder (default: stage2.py's)")
    add("--temperature", type=POSITIVE, default=0.07, help="of InfoNCE (default: %(default)s, our choice)")
    add("--pairs", type=whole(2), default=128, help="of an image in InfoNCE at most, drawn anew each step (default: %(default)s, our choice: "
        "4096 in a batch of 32)")
    own, rest = parser.parse_known_args(argv)
    theirs = stage2.parse(["--data", "", "--stage1", "", "--out", ""])
    args = stage1.parse(["--conditions", *theirs.conditions, "--cameras", theirs.cameras, "--epochs", str(theirs.epochs),
                         "--batch", str(theirs.batch), *rest])
    vars(args).update(vars(own), ablation="joint")
    device = training.start(args)
    encoder, waffleiron, frames, content = build(args, device)
    args.lr_2d = models.of_family(args.lr_2d, encoder)
    checkpoint = find_last(args, content["made_from"])

    def loss_of(features, batch, step):
        if args.loss == "l2":
            return two_way_loss(*features), len(batch["batch"])
        generator = torch.Generator().manual_seed(((1000003 * args.seed + step) * training.world() + training.rank()) % 2**63)
        rows = some_of_each(batch["batch"], args.pairs, generator)
        return contrastive_loss(*(side[rows] for side in features), args.temperature), len(rows)

    model = Pair(encoder, waffleiron, content["image_size"])
    train(args, device, checkpoint, frames, model, loss_of, [(encoder, args.lr_2d), (waffleiron, args.lr)],
          {"model": encoder.backbone, "point_model": waffleiron},
          {"kind": "image_encoder", "encoder": encoder.spec | {"image_size": content["image_size"]},
           "made_from": content["made_from"]})
    save(os.path.join(args.out, "waffleiron.pth"), {"kind": "point_encoder"} | content | {
        "model": waffleiron.state_dict(), "args": vars(args)})


def stage2_epochs(argv):
    """Table G: stage2.py, longer."""
    stage2.main(["--epochs", "25", *argv])


def stage1_all_conditions(argv):
    """Table 5: stage1.py on frames of every condition."""
    stage1.main([*argv, "--conditions", *CONDITIONS])


ABLATIONS = {"no-stage1": no_stage1, "2d-head": head_2d, "joint": joint, "stage2-epochs": stage2_epochs,
             "stage1-all-conditions": stage1_all_conditions}


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("name", choices=ABLATIONS)
    argv = sys.argv[1:] if argv is None else argv
    ABLATIONS[parser.parse_args(argv[:1]).name](argv[1:])


if __name__ == "__main__":
    main()

"""The paper's ablations. Each changes one thing of the method; the stages know nothing of them.

Collaborative-distillation paper, Sec. 4.4, B.7, B.10 and B.11. The function of each ablation says
what it changes, what the paper measured, and what is chosen here where the paper is silent. The
numbers are of linear probes on nuScenes with ViT-S/14: mIoU in % for segmentation, RMSE in m for
depth. The encoder itself has 49.2 and 8.37, collaborative distillation gives 51.9 and 7.64.

    python -m experiments.ablations no-stage1 --data DATA --out runs/labels                # Table 8
    python stage2.py --data DATA --stage1 runs/labels --out runs/no-stage1
    python -m experiments.ablations 2d-head --data DATA --out runs/2d-head-1               # Table J
    python -m experiments.ablations 2d-head --data DATA --stage1 runs/2d-head-1 --out runs/2d-head
    python -m experiments.ablations joint --data DATA --out runs/joint                     # Table K
    python -m experiments.ablations stage2-epochs --data DATA --stage1 runs/s1 --out runs/s2-25
    python -m experiments.ablations stage1-all-conditions --data DATA --out runs/s1-all    # Table 5

On N GPUs: `torchrun --standalone --nproc_per_node N -m experiments.ablations`. With --stage1 an
ablation takes the flags of stage2.py, else those of stage1.py. `-h` of 2d-head and joint prints
only the flags that they add. OUT is probed like the OUT of a stage. A run that is started again
goes on from OUT/last.pth.
"""
import os
import sys

import torch
import torch.nn.functional as F
from torch import nn

import models
import stage1
import stage2
from data import Frames, select, set_sampling
from distill import distillation_loss, features_at_pixels
from experiments.loop import build, train
from plumbing import training
from plumbing.arguments import POSITIVE, Parser, whole
from plumbing.atomic import save
from plumbing.errors import InputError, one_line_errors, say
from plumbing.fingerprint import check, of_frames, of_weights
from plumbing.weights import check_kind, read, say_if_unfinished
from probe import TASKS, classes_of
from readers.table import hold_out, open_tables

# ---- maths ---------------------------------------------------------------------------------------

def two_way_loss(pixel_features, point_features):
    """Eq. 1 without its stop-gradient: its value, and the sum of both directions' gradients."""
    to_3d = distillation_loss(pixel_features, point_features, "2d_to_3d")
    to_2d = distillation_loss(pixel_features, point_features, "3d_to_2d")
    return to_3d + to_2d - to_2d.detach()


def contrastive_loss(pixel_features, point_features, temperature):
    """InfoNCE both ways: each feature has to tell its partner from all features of the other side.

    Args: pixel_features, point_features [M, D]: row i of both is a pair.
    Returns: a float32 scalar, 0 for M < 2.
    """
    g = F.normalize(pixel_features.float(), dim=1)
    f = F.normalize(point_features.float(), dim=1)
    logits = g @ f.T / temperature  # [M, M]
    partner = torch.arange(len(g), device=g.device)
    # Each row, and each column, is a classification among the other side's features
    of_pixels = F.cross_entropy(logits, partner, reduction="sum")
    of_points = F.cross_entropy(logits.T, partner, reduction="sum")
    return (of_pixels + of_points) / max(1, 2 * len(g))


def some_of_each(view, count, generator):
    """Rows of at most `count` random points of each image. view: [N], the image of each point."""
    order = torch.randperm(len(view), generator=generator).to(view.device)
    order = order[view[order].argsort(stable=True)]  # image by image, random within each
    counts = torch.bincount(view)
    start = (counts.cumsum(0) - counts)[view[order]]
    place = torch.arange(len(view), device=view.device) - start  # of a point among its image's
    return order[place < count]


# ---- models: one module each, so that all gradients are averaged over the processes --------------

class Pair(nn.Module):
    """Both encoders, and a 2D head if there is one: a batch -> pixel and point features [M, D]."""

    def __init__(self, encoder, point_encoder, head=None):
        super().__init__()
        self.encoder = encoder
        self.point_encoder = point_encoder
        self.head = head or nn.Identity()

    def forward(self, batch):
        pixel_features = self.head(features_at_pixels(self.encoder, batch))
        point_features = self.point_encoder(batch)
        return pixel_features, point_features


class Segmenter(nn.Module):
    """A classifier in the place of the 3D encoder's head: a batch -> scores [N, classes]."""

    def __init__(self, point_encoder, classifier):
        super().__init__()
        self.point_encoder = point_encoder
        self.classifier = classifier

    def forward(self, batch):
        return self.classifier(self.point_encoder.features(batch))


# ---- the ablations -------------------------------------------------------------------------------

def no_stage1(argv):
    """Table 8: WaffleIron learns from labels, and stage2.py takes it for stage 1's.

    Paper: 32.2, depth 9.53. WaffleIron learns the 16 classes of lidarseg from stage 1's frames, on
    stage 1's schedule, by the cross-entropy + Lovász loss of probe.py. The paper does not say what
    brings its features to the image encoder's width. Here its linear head does, and stays random:
    labels teach only what is below the head, and stage 2 trains nothing on the 3D side.
    """
    args = stage1.parse(argv)
    args.ablation = "no-stage1"
    device = training.start(args)
    _, point_encoder, frames, content = build(args, device, labels=True)
    point_encoder.head.requires_grad_(False)  # it stays random
    classes = classes_of(frames.tables, "seg3d")
    classifier = nn.Linear(point_encoder.spec["channels"], len(classes)).to(device)

    def loss_of(outputs, batch, step):
        return TASKS["seg3d"].loss(outputs.float(), batch)

    model = Segmenter(point_encoder, classifier)
    train(args, device, frames, model, loss_of, peaks=[(model, args.lr)],
          parts={"model": point_encoder, "classifier": classifier},
          content={"kind": "point_encoder"} | content)


def head_2d(argv):
    """Table J: a linear head on the 2D side takes the place of the 3D head, in both stages.

    Paper: 45.3, depth 7.94. The head brings the pixels' features to WaffleIron's width. This is
    stage 1 or, with --stage1, the stage 2 after it. The paper does not say where the head learns.
    Here Eq. 1 and 2 are taken at their word, with the head as part of the 2D side: in stage 1 that
    side is the teacher and the head stays random, in stage 2 encoder and head learn.

    --train-head lets the head learn in stage 1 too, from the loss without its stop-gradient. There
    it and WaffleIron can agree on a constant, the trivial solution that B.10 fears of two heads.
    """
    parser = Parser("Table J: a linear 2D head in place of the 3D head. All other flags are "
                    "stage1.py's (see its -h) or, with --stage1, stage2.py's without --encoder, "
                    "--feature and --image-size.", allow_abbrev=False)
    add = parser.add_argument
    add("--stage1", help="folder of this ablation's stage 1: do its stage 2 (default: do stage 1)")
    add("--train-head", action="store_true",
        help="train the head in stage 1 too (default: it stays random there)")
    own, rest = parser.parse_known_args(argv)

    # The rest of the flags is a stage's own
    if own.stage1:
        if own.train_head:
            raise InputError("--train-head is for stage 1; stage 2 always trains the head")
        args = stage2.parse(["--stage1", own.stage1, *rest])
    else:
        args = stage1.parse(rest)
        args.train_head = own.train_head
    args.ablation = "2d-head"

    device = training.start(args)
    if own.stage1:
        head_2d_stage2(args, device)
    else:
        head_2d_stage1(args, device)


def head_2d_stage1(args, device):
    """WaffleIron without a head learns what the 2D head gives; the image encoder is frozen."""
    # Without its head WaffleIron gives features of args.channels
    encoder, point_encoder, frames, content = build(args, device, out_channels=args.channels)
    encoder.requires_grad_(False)
    point_encoder.head = nn.Identity()
    head = nn.Linear(encoder.dim, args.channels).to(device).requires_grad_(args.train_head)

    def loss_of(features, batch, step):
        if args.train_head:
            loss = two_way_loss(*features)
        else:
            loss = distillation_loss(*features, "2d_to_3d")
        return loss, len(batch["view"])

    model = Pair(encoder, point_encoder, head)
    train(args, device, frames, model, loss_of, peaks=[(model, args.lr)],
          parts={"model": point_encoder, "head": head}, content={"kind": "2d_head"} | content)


def head_2d_stage2(args, device):
    """The frozen WaffleIron teaches image encoder and 2D head. Readers of OUT get the encoder."""
    before = _read_head_2d(args)
    image_size = before["image_size"]

    # ---- image encoder ----
    with training.first_process_first():
        tables = open_tables(args.data, args.version, look=False)
        source = models.source_in(before, args.stage1)
        for name in ("weights", "hub"):
            if getattr(args, name):  # they were moved
                source[name] = getattr(args, name)
        encoder = models.load_image_encoder(**source, careful=False).to(device)
    made_from = {"encoder": encoder.fingerprint()}
    check(f"--stage1 {args.stage1}", before.get("made_from", {}), made_from,
          "its 2D head was made for that one; do its stage 1 again")
    encoder.recompute(args.recompute)
    args.lr = models.of_family(args.lr, encoder)

    # ---- data ----
    tables = hold_out(tables, args.val_scenes)
    for table in tables:
        say(table.summary())
    skip_bad = args.on_bad_frame == "skip"
    tables = select(tables, "train", args.conditions, args.limit, skip_bad=skip_bad)
    samplings = set_sampling(tables, before["samplings"], flags=before.get("sampling_flags"))
    point_encoder, head = _teachers(before, encoder, samplings)
    frames = Frames(tables, args.cameras, image_size, point_encoder.prepare, points="random",
                    skip_bad=skip_bad, seed=args.seed)
    weights = of_weights(nn.ModuleList([point_encoder, head]))
    made_from["stage1"] = {"name": "2d-head", "weights": weights}
    made_from["frames"] = of_frames(tables)
    made_from["input"] = {"image_size": image_size} | samplings

    # ---- model ----
    point_encoder.to(device).eval().requires_grad_(False)
    encoder.train(args.train_batchnorm)

    def loss_of(features, batch, step):
        return distillation_loss(*features, "3d_to_2d"), len(batch["view"])

    model = Pair(encoder, point_encoder, head.to(device))
    train(args, device, frames, model, loss_of, peaks=[(model, args.lr)],
          parts={"model": encoder.backbone, "head": head},
          content=_image_encoder(encoder, image_size, made_from))


def _teachers(before, encoder, samplings):
    """The 3D encoder and the 2D head of a checkpoint of `head_2d_stage1`, on the CPU."""
    point_encoder = models.backbone(before["backbone"]).NETWORK(**before["spec"])
    point_encoder.head = nn.Identity()
    point_encoder.load_state_dict(before["model"])
    point_encoder.use(samplings)
    head = nn.Linear(encoder.dim, before["spec"]["channels"])
    head.load_state_dict(before["head"])
    return point_encoder, head


def _read_head_2d(args):
    """The checkpoint of --stage1. Raises InputError for another kind or flags that it settles."""
    for name in ("encoder", "feature", "image_size"):
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')}: leave it out; the 2D head of "
                             f"--stage1 {args.stage1} was made for its own")
    before = read(args.stage1)
    if not isinstance(before, dict) or before.get("kind") != "2d_head":
        raise InputError(f"--stage1 {args.stage1}: not a checkpoint of stage 1 with a 2D head; "
                         "`2d-head` without --stage1 writes it")
    check_kind(before, args.stage1, "2d_head")
    say_if_unfinished(before, args.stage1)
    return before


def _image_encoder(encoder, image_size, made_from):
    """A checkpoint's content that makes it one of an image encoder, as stage2.py writes it."""
    return {"kind": "image_encoder", "encoder": encoder.spec | {"image_size": image_size},
            "made_from": made_from}


def joint(argv):
    """Table K: both encoders and the 3D head learn from the start, in one stage.

    Paper: 38.5, 30.1, 25.8 after 1, 5, 10 epochs; depth 7.77, 7.95, 8.20. The loss is Eq. 1 without
    its stop-gradient (--loss l2) or InfoNCE over the pairs (--loss contrastive). The paper does not
    say which loss the rows of Table K have, nor the data and the rates. Here data and epochs are
    stage 2's, and each side has the peak rate of its own stage. The cloud is augmented as in
    stage 1. InfoNCE goes both ways among the pairs of one process. OUT/last.pth is the image
    encoder, OUT/point_encoder.pth the 3D encoder.
    """
    parser = Parser("Table K: both encoders trained in one stage. All other flags are stage1.py's "
                    "(see its -h), with stage2.py's defaults of --conditions, --cameras, --epochs "
                    "and --batch; --lr is WaffleIron's.", allow_abbrev=False)
    add = parser.add_argument
    add("--loss", choices=("l2", "contrastive"), default="l2",
        help="Eq. 1 without stop-gradient, or InfoNCE (default: %(default)s)")
    add("--lr-2d", type=POSITIVE, default=stage2.LR,
        help="peak learning rate of the image encoder (default: stage2.py's)")
    add("--temperature", type=POSITIVE, default=0.07,
        help="of InfoNCE (default: %(default)s, our choice)")
    add("--pairs", type=whole(2), default=128,
        help="of an image in InfoNCE at most, drawn anew each step (default: %(default)s, our "
        "choice: 4096 in a batch of 32)")
    own, rest = parser.parse_known_args(argv)

    # The flags of stage1.py with the defaults of stage2.py, which takes all conditions
    theirs = stage2.parse(["--data", "", "--stage1", "", "--out", ""])
    args = stage1.parse(["--conditions", *theirs.conditions, "--cameras", theirs.cameras,
                         "--epochs", str(theirs.epochs), "--batch", str(theirs.batch), *rest])
    vars(args).update(vars(own), ablation="joint")

    device = training.start(args)
    encoder, point_encoder, frames, content = build(args, device)
    args.lr_2d = models.of_family(args.lr_2d, encoder)

    def loss_of(features, batch, step):
        if args.loss == "l2":
            return two_way_loss(*features), len(batch["view"])
        # The draw is a function of seed, step and process
        draw = (1000003 * args.seed + step) * training.world() + training.rank()
        generator = torch.Generator().manual_seed(draw % 2**63)
        rows = some_of_each(batch["view"], args.pairs, generator)
        pixel_features, point_features = features
        loss = contrastive_loss(pixel_features[rows], point_features[rows], args.temperature)
        return loss, len(rows)

    model = Pair(encoder, point_encoder)
    train(args, device, frames, model, loss_of,
          peaks=[(encoder, args.lr_2d), (point_encoder, args.lr)],
          parts={"model": encoder.backbone, "point_model": point_encoder},
          content=_image_encoder(encoder, content["image_size"], content["made_from"]))

    # last.pth is the image encoder's; the 3D encoder gets a file of its own
    trained = {"model": point_encoder.state_dict(), "args": vars(args)}
    save(os.path.join(args.out, "point_encoder.pth"), {"kind": "point_encoder"} | content | trained)


def stage2_epochs(argv):
    """Table G: stage2.py with 25 epochs, or as many as --epochs says.

    Paper: 52.7, depth 7.44; but 3.08 instead of 2.80 on KITTI, 0.541 instead of 0.434 on NYUd.
    """
    stage2.main(["--epochs", "25", *argv])


def stage1_all_conditions(argv):
    """Table 5: stage1.py on frames of every condition, for as many epochs, so with more steps.

    Paper, the 3D encoder's mIoU: rain 60.0 instead of 61.1, night 42.8 instead of 48.0.
    """
    stage1.main([*argv, "--conditions", "all"])


ABLATIONS = {
    "no-stage1": no_stage1,
    "2d-head": head_2d,
    "joint": joint,
    "stage2-epochs": stage2_epochs,
    "stage1-all-conditions": stage1_all_conditions,
}


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("name", choices=ABLATIONS)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv[:1])
    ABLATIONS[args.name](argv[1:])


if __name__ == "__main__":
    main()

"""Stage 1, pre-alignment: WaffleIron and a head learn an image encoder's clear-day features.

Collaborative-distillation paper, Sec. 3.1; the loss and the recipe are ScaLR's. The bare command is
the paper's run:

    run="torchrun --standalone --nproc_per_node 4"
    $run stage1.py --data /data/nuscenes --encoder dinov2_vits14 --out runs/s1     # 4 GPUs
    python stage1.py --data /data/nuscenes --encoder dinov2_vits14 --out runs/s1   # one GPU
    python stage1.py ... --device cpu --channels 64 --depth 4 --limit 100 --steps 20   # a try

--recipe scalr or scalr+ takes the settings of ScaLR or ScaLR+; --encoder A B has two teachers.

Writes OUT/last.pth and OUT/log.jsonl. Started again with the same arguments, it goes on from
last.pth.
"""
from argparse import BooleanOptionalAction

import torch
from tqdm import tqdm

import models
from data import Frames, collate, select, set_sampling
from distill import before_stage2, distillation_loss, sums_by
from plumbing import training
from plumbing.arguments import COUNT, POSITIVE, RATE, Distinct, Parser, real, whole
from plumbing.errors import InputError, one_line_errors, say
from plumbing.fingerprint import of_frames
from plumbing.run_folder import Log, Saver, check_finite, find_last
from readers.table import check_cameras, entries, hold_out, open_tables
from teachers import load_teachers, settle

# ---- recipes -------------------------------------------------------------------------------------

# Collaborative distillation, Sec. 3.1 and 4.1; the warm-up is of ScaLR's supplement B.2
CD = {"conditions": ["day-clear"], "epochs": 49, "batch": 8, "lr": 2e-3, "end_lr": 1e-5,
      "warmup_steps": 3500, "weight_decay": 0.03, "recompute": False}
RECIPES = {  # what they set of the flags that are not given; None: see `scalr_lengths`
    "cd": CD,
    # ScaLR, Sec. 4.1 and supplement B.2
    "scalr": CD | {"conditions": ["all"], "epochs": None, "batch": None},
    # ScaLR+: what its release adds
    "scalr+": CD | {"conditions": ["all"], "epochs": 65, "schedule": "rsqrt", "drop_path": 0.2,
                    "activation": "gelu", "head": "mlp", "hidden": 2048, "norm": "layernorm",
                    "image_size": [448, 896], "recompute": True}}

FOUR = {"nuscenes", "semantickitti", "pandaset64", "pandasetgt"}
# ScaLR's batch, epochs by datasets, and steps of any other mixture (supplement B.2)
AT_768 = {"batch": 8, "steps": 172_000, "epochs": [({"nuscenes"}, 49), (FOUR, 25)]}
BELOW_768 = {"batch": 16, "steps": 33_400, "epochs": [
    ({"nuscenes"}, 19), (FOUR, 10), ({"semantickitti"}, 28), ({"pandaset64"}, 136),
    ({"pandasetgt"}, 136), ({"nuscenes", "semantickitti"}, 11)]}


def scalr_lengths(channels):
    """ScaLR's batch, epochs and steps for a WaffleIron of this width."""
    return AT_768 if channels >= 768 else BELOW_768


def fill_in(args):
    """Set what was not given to the recipe's values; its epochs may depend on the datasets."""
    for name, value in RECIPES[args.recipe or "cd"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.recipe == "cd":  # the default, so that a run goes on with the flag or without
        args.recipe = None
    if args.batch is None:
        args.batch = scalr_lengths(args.channels)["batch"]
    # Several teachers need more than a linear layer (ScaLR, supplement B.2)
    if isinstance(args.encoder, list) and args.head is None:
        args.head = "mlp2"


def check_flags(args):
    """Raise InputError for flags that would do nothing beside the others. Before `fill_in`."""
    recipe = RECIPES[args.recipe or "cd"]
    if args.hidden and (args.head or recipe.get("head")) != "mlp":
        raise InputError(f"--hidden {args.hidden}: of --head mlp alone")
    if (args.schedule or recipe.get("schedule")) == "rsqrt":
        for name in ("end_lr", "warmup_steps"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name.replace('_', '-')}: of --schedule cosine alone; rsqrt "
                                 "has a warm-up and an end of its own")


def fill_in_epochs(args, frames):
    """Set --epochs by the datasets where the recipe asks for that, and print what it has set."""
    lengths = scalr_lengths(args.channels)
    filled = {"batch": lengths["batch"], "epochs": None}
    if args.epochs is None:
        steps = max(1, len(frames) // args.batch)  # of an epoch
        args.epochs = max(1, round(lengths["steps"] / steps))
        for datasets, epochs in lengths["epochs"]:
            if datasets == set(frames.datasets) and args.batch == lengths["batch"]:
                args.epochs = epochs
        filled["epochs"] = args.epochs
    found = []
    for name, value in RECIPES[args.recipe or "cd"].items():
        now = getattr(args, name)
        if value != CD.get(name) and now == filled.get(name, value):
            words = " ".join(map(str, now)) if isinstance(now, list) else now
            found.append(f"{name.replace('_', ' ')} {words}")
    if found:
        say(f"--recipe {args.recipe}: {', '.join(found)}")


# ---- arguments -----------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    training.add_arguments(parser)
    add("--recipe", choices=RECIPES,
        help="flags that are not given: the paper's, ScaLR's or ScaLR+'s (default: cd; the "
             "defaults below are its)")
    models.add_arguments(parser, several=True, default="dinov2_vits14",
        help="image encoder, or several: names that `python models.py` lists, or checkpoints "
             "(default: %(default)s)")
    # the 3D encoder
    add("--backbone", default="waffleiron", metavar="NAME",
        help="3D encoder: a file NAME.py (default: %(default)s)")
    add("--channels", type=COUNT, default=768,
        help="width of WaffleIron (default: %(default)s, Sec. 4.1)")
    add("--depth", type=COUNT, default=48,
        help="layers of WaffleIron (default: %(default)s, ScaLR Sec. 4.1)")
    add("--norm", choices=("layernorm", "batchnorm"),
        help="in WaffleIron's layers (default: layernorm at width 768, else batchnorm; "
             "ScaLR Sec. 4.1)")
    add("--activation", choices=("relu", "gelu"), help="in WaffleIron's layers (default: relu)")
    add("--drop-path", type=real(0, below=1), metavar="PROBABILITY",
        help="of leaving out a layer's branch for a scan (default: 0)")
    add("--head", choices=("linear", "mlp", "mlp2"),
        help="a linear layer, two with --hidden between, or two with twice the width and LayerNorm "
             "between (default: linear; of several encoders mlp2, ScaLR supplement B.2)")
    add("--hidden", type=COUNT, help="width inside --head mlp (default: 2048)")
    add("--recompute", action=BooleanOptionalAction,
        help="compute WaffleIron's layers again in the backward pass instead of keeping them: the "
             "same result, a fraction of the memory, a third more time")
    # what it gets of a scan; the defaults are the dataset's SAMPLING, here nuScenes'
    add("--fov", type=POSITIVE, nargs=3, metavar=("X", "Y", "Z"),
        help="half extents of WaffleIron's planes in metres (default: the dataset's, 64 64 8, "
             "ScaLR supplement B.2)")
    add("--cell", type=POSITIVE,
        help="their cells' side in metres (default: the dataset's, 0.5, supplement B.2)")
    add("--voxel", type=POSITIVE,
        help="one point per voxel of this side in metres (default: the dataset's, 0.1)")
    add("--max-points", type=COUNT,
        help="points of a view at most (default: the dataset's, 20000)")
    add("--neighbors", type=COUNT,
        help="of a point in the embedding (default: the dataset's, 16, supplement B.2)")
    # the frames
    add("--conditions", nargs="+", action=Distinct,
        help="frames to learn from, of a dataset that tells conditions; all: every one (default: "
             "day-clear, Sec. 3.1, Assumption 1)")
    add("--cameras", default="random",
        help="of a frame: random (one, drawn anew each epoch), all, or a channel "
             "(default: %(default)s, ScaLR Sec. 3.1)")
    # the run
    add("--epochs", type=COUNT, help="(default: 49, Sec. 4.1)")
    add("--batch", type=COUNT,
        help="camera views in a batch, over all processes (default: 8, Sec. 4.1)")
    add("--lr", type=POSITIVE, help="peak learning rate (default: 2e-3, Sec. 4.1)")
    add("--schedule", choices=("cosine", "rsqrt"),
        help="rsqrt: ScaLR+'s, the rate falls as 1 / sqrt(time) (default: cosine)")
    add("--end-lr", type=RATE,
        help="learning rate at the end of the cosine (default: 1e-5, Sec. 4.1)")
    add("--warmup-steps", type=whole(0),
        help="steps from 0 to --lr before the cosine, at most a tenth of the run, of ScaLR's "
             "recipes a ninth (default: 3500, ScaLR supplement B.2)")
    add("--weight-decay", type=RATE, help="of AdamW (default: 0.03, Sec. 4.1)")
    args = parser.parse_args(argv)
    settle(args)
    check_flags(args)
    fill_in(args)
    return args


def sampling_flags(args):
    """What the flags say of how scans become points."""
    given = {}
    for name in ("fov", "cell", "voxel", "max_points", "neighbors"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    if args.fov:
        given["fov"] = tuple(args.fov)
    return given


def samplings_of(args, tables):
    """How each dataset's scans become points, by the flags: {dataset: sampling}. Sets it, too."""
    return set_sampling(tables, flags=sampling_flags(args))


def learning_rate(args, step, total, peak):
    """The rate at a step by --schedule, whose peak is `peak`."""
    if args.schedule == "rsqrt":
        return training.reciprocal_sqrt(step, total, peak)
    # ScaLR's 3 500 steps of 33 402 are more than a tenth
    longest = total // (9 if args.recipe else 10)
    return training.cosine(step, total, peak, args.end_lr, min(args.warmup_steps, longest))


# ---- training ------------------------------------------------------------------------------------

@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = training.start(args)

    # ---- data ----
    check_cameras(entries(args.data))
    with training.first_process_first():
        tables = hold_out(open_tables(args.data, args.version, look=False), args.val_scenes)
        teachers = load_teachers(args, device)
    for table in tables:
        say(table.summary())
    image_size = teachers.image_size(args.image_size)
    samplings = samplings_of(args, tables)
    skip_bad = args.on_bad_frame == "skip"
    tables = select(tables, "train", args.conditions, args.limit, skip_bad=skip_bad)
    backbone = models.backbone(args.backbone)
    frames = Frames(tables, args.cameras, image_size, backbone.prepare, points="augmented",
                    skip_bad=skip_bad, seed=args.seed)
    fill_in_epochs(args, frames)
    mixture = frames.datasets if len(frames.datasets) > 1 else ()

    # ---- model ----
    point_encoder = backbone.build(args, samplings, teachers.dim).to(device)
    model = training.distribute(point_encoder, device)

    # ---- resume: a run of the same arguments, teachers and frames goes on ----
    made_from = {"encoder": teachers.fingerprint(), "frames": of_frames(tables),
                 "input": {"image_size": image_size} | samplings}
    checkpoint = find_last(args, made_from)
    first = checkpoint["step"] if checkpoint else 0
    total = args.steps or len(frames) // args.batch * args.epochs
    batches = training.Batches(len(frames), args.batch, first, total, args.seed)
    loader = training.load(frames, batches, collate, args.workers, device)

    # ---- optimizer ----
    optimizer = torch.optim.AdamW(point_encoder.parameters(), lr=args.lr,
                                  weight_decay=args.weight_decay)
    if checkpoint:
        point_encoder.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    # ---- loop ----
    log = Log(args.out, device, point_encoder, checkpoint, frames.frame_count(), mixture)
    saver = Saver(args, batches.per_epoch, total)
    bar = tqdm(loader, "stage 1", initial=first, total=total, disable=training.rank() > 0,
               mininterval=2)
    for step, batch in saver.guard(enumerate(bar, first)):
        lr = learning_rate(args, step, total, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if args.drop_path:
            batch["draws"] = training.draws(batches.of(step), args.seed, 2 * args.depth)
        batch = training.to_device(batch, device)
        with training.autocast(device, args.precision):
            with torch.no_grad():
                pixel_features = teachers.features_at_pixels(batch)  # [M, D]
            point_features = model(batch)                            # [M, D]
        features = pixel_features, point_features
        loss = distillation_loss(*features, "2d_to_3d", teachers.widths)
        loss = loss * training.share(len(point_features), device)
        optimizer.zero_grad()
        loss.backward()
        check_finite(loss, point_encoder, step, args.out, batches, frames)
        optimizer.step()

        sums = None
        if mixture:
            of_point = batch["dataset"][batch["view"]]  # [M]
            sums = sums_by(of_point, len(mixture), *features, teachers.widths)
        log.add(loss, batch, sums)
        done = step + 1
        if done % 50 == 0:
            bar.set_postfix(loss=f"{log.mean():.3f}", lr=f"{lr:.1e}", refresh=False)
        if done % batches.per_epoch == 0 or done == total:
            log.write(epoch=step // batches.per_epoch + 1, step=done, lr=lr,
                      **before_stage2(*features, teachers.widths))
        if saver.due(done):
            saver.save({
                "kind": "point_encoder", "backbone": args.backbone, "spec": point_encoder.spec,
                "model": point_encoder.state_dict(), "made_from": made_from,
                "samplings": samplings, "sampling_flags": sampling_flags(args),
                "image_size": image_size, "val_scenes": args.val_scenes,
                "optimizer": optimizer.state_dict(), "step": done, "total": total,
                "log": log.state(), "args": vars(args),
                **teachers.about(args)})
    log.report()


if __name__ == "__main__":
    main()

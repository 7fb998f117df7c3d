"""Stage 2, 3D-anchored self-supervision: the frozen 3D encoder pulls image features to clear days.

Collaborative-distillation paper, Sec. 3.2: stage 1's loss and weights with the direction of the
gradient switched, on all conditions. The encoder, its feature, the image size and WaffleIron's
shape come from stage 1's checkpoint. The bare command is the paper's run:

    run="torchrun --standalone --nproc_per_node 4"
    $run stage2.py --data /data/nuscenes --stage1 runs/s1 --out runs/s2      # 4 GPUs
    python stage2.py --data /data/nuscenes --stage1 runs/s1 --out runs/s2    # one GPU
    python stage2.py ... --device cpu --limit 100 --batch 4 --steps 20       # a try on a CPU

ScaLR's released WaffleIron can stand in for stage 1 (Table D, second row):
--stage1 WI_768-.../model.pth --encoder dinov2_vitl14.

Writes OUT/last.pth, which `load_image_encoder("OUT")` and every --encoder flag read, and
OUT/log.jsonl. Started again with the same arguments, it goes on from last.pth.
"""
import torch
from tqdm import tqdm

import models
from data import Frames, collate, select, set_sampling
from distill import distillation_loss, feature_spread, features_at_pixels
from plumbing import training
from plumbing.arguments import COUNT, POSITIVE, RATE, Distinct, Parser, real
from plumbing.errors import InputError, one_line_errors, say
from plumbing.fingerprint import check, of_frames
from plumbing.run_folder import Log, Saver, check_finite, find_last
from readers.table import check_cameras, entries, hold_out, open_tables, say_if_held_out
from teachers import keep_part, source_in

LR = {"ViT": 2e-5, "ResNet-50": 5e-3}  # peak learning rates of the families of encoders

# (floor, share): features count as collapsed when
# `spread - floor < share * (spread before stage 2 - floor)`. The shares are low, because a stage 2
# that helps leaves many directions too: in the demo the effective rank falls to a tenth.
COLLAPSED = {"feature_variance": (0, 0.1), "effective_rank": (1, 0.02)}


# ---- arguments -----------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    training.add_arguments(parser)
    # the encoders
    add("--stage1", required=True,
        help="stage 1's folder or checkpoint, or released weights of ScaLR")
    models.add_arguments(parser,
        help="the image encoder to train, one of stage 1's if it had several (default: stage 1's "
             "own, with its --weights, --hub and --feature)")
    add("--train-batchnorm", action="store_true",
        help="let the encoder's BatchNorm normalise by the batch and update its statistics, each "
             "process its own (default: they stay as released)")
    add("--recompute", action="store_true",
        help="compute the blocks of the image encoder again in the backward pass instead of "
             "keeping them: the same result, a fraction of the memory, a third more time")
    # the frames
    add("--conditions", nargs="+", action=Distinct, default=["all"],
        help="frames to learn from, of a dataset that tells conditions (default: all, Sec. 3.2)")
    add("--cameras", default="all",
        help="of a frame: all (an epoch sees each), random (one), or a channel "
             "(default: %(default)s; the GPU-hours of Table L)")
    # the run
    add("--epochs", type=COUNT, default=1, help="(default: %(default)s, Sec. 4.1)")
    add("--batch", type=COUNT, default=32,
        help="camera views in a batch, over all processes (default: %(default)s, Sec. 4.1)")
    add("--lr", type=POSITIVE, default=LR,
        help="peak learning rate (default: ViT 2e-5, ResNet-50 5e-3, Sec. 4.1)")
    add("--end-lr", type=RATE, default=1e-5,
        help="learning rate at the end of the cosine (default: %(default)s, Sec. 4.1)")
    add("--warmup-part", type=real(0, 1), default=0.1,
        help="part of the run from 0 to --lr (default: %(default)s, our choice)")
    add("--weight-decay", type=RATE, default=0.03,
        help="of AdamW (default: %(default)s, Sec. 4.1)")
    return parser.parse_args(argv)


# ---- the two encoders ----------------------------------------------------------------------------

def both_encoders(args, device):
    """The image encoder to train, the 3D encoder, stage 1's checkpoint, and their fingerprints.

    The checkpoint is empty where released weights stand in for stage 1.
    """
    point_encoder, stage1 = models.load_point_encoder(args.stage1)
    source = encoder_source(args, stage1)
    if not stage1:
        say(f"{args.stage1}: released weights; points and planes as the dataset's SAMPLING says")
    with training.first_process_first():
        encoder = models.load_image_encoder(**source, careful=False).to(device)
    made_from = {"stage1": point_encoder.fingerprint(), "encoder": encoder.fingerprint()}
    if "teachers" in stage1:
        keep_part(point_encoder, stage1, args.stage1, encoder)
    check_pair(args, encoder, point_encoder, stage1, made_from)
    encoder.recompute(args.recompute)
    return encoder, point_encoder, stage1, made_from


def encoder_source(args, stage1):
    """Arguments of `load_image_encoder`: of the flags, else those in stage 1's checkpoint `stage1`.

    Raises InputError where neither says which.
    """
    if not args.encoder and not stage1:
        raise InputError(f"--stage1 {args.stage1}: released weights do not say which image encoder "
                         "they were trained for; add --encoder (ScaLR: dinov2_vitl14)")
    theirs = source_in(stage1, args.stage1, args.encoder)
    if args.encoder and "teachers" not in stage1:
        source = {"name_or_path": args.encoder, "weights": args.weights, "hub": args.hub}
    else:
        own = {"weights": args.weights, "hub": args.hub}
        source = theirs | {name: value for name, value in own.items() if value}
        source.setdefault("name_or_path", args.encoder)
    source["feature"] = args.feature or theirs.get("feature")  # what the head was trained to give
    return source


def check_pair(args, encoder, point_encoder, stage1, made_from):
    """Raise InputError unless the 3D encoder was trained for the image encoder."""
    name = encoder.spec["name"]
    dim = point_encoder.spec["out_channels"]
    if encoder.dim != dim:
        raise InputError(f"--encoder {name}: its features have {encoder.dim} channels, the head of "
                         f"--stage1 {args.stage1} gives {dim}; it was trained for another encoder")
    norms = [layer for layer in encoder.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    if args.train_batchnorm and not norms:
        raise InputError(f"--train-batchnorm: {name} has no BatchNorm")
    if stage1 and "teachers" not in stage1:
        check(f"--stage1 {args.stage1}", stage1.get("made_from", {}),
              {"encoder": made_from["encoder"]},
              "give that one as --encoder, or train stage 1 for this one")


def say_if_collapsed(before, now, done, bar, log):
    """A line on the bar and in the log if the features' spread has fallen from `before` too far."""
    signs = []
    for name, (floor, share) in COLLAPSED.items():
        if now[name] - floor < share * (before[name] - floor):
            signs.append(f"{name} {before[name]:.3g} -> {now[name]:.3g}")
    if signs and training.rank() == 0:
        bar.write(f"step {done}: the image encoder's features collapse, {', '.join(signs)}; "
                  "try a lower --lr")
        log.append(step=done, collapse=signs)


# ---- training ------------------------------------------------------------------------------------

@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = training.start(args)

    # ---- both encoders ----
    check_cameras(entries(args.data))
    encoder, point_encoder, stage1, made_from = both_encoders(args, device)
    known = stage1.get("image_size") or encoder.spec.get("image_size", models.IMAGE_SIZE)
    image_size = encoder.check_size(args.image_size or known)
    args.lr = models.of_family(args.lr, encoder)

    # ---- data ----
    with training.first_process_first():
        tables = open_tables(args.data, args.version, look=False)
    tables = hold_out(tables, args.val_scenes)
    say_if_held_out(args.stage1, stage1, args.val_scenes, tables)
    for table in tables:
        say(table.summary())
    skip_bad = args.on_bad_frame == "skip"
    tables = select(tables, "train", args.conditions, args.limit, skip_bad=skip_bad)
    samplings = set_sampling(tables, stage1.get("samplings"), flags=stage1.get("sampling_flags"))
    point_encoder.use(samplings)
    frames = Frames(tables, args.cameras, image_size, point_encoder.prepare, points="random",
                    skip_bad=skip_bad, seed=args.seed)

    # ---- resume: a run of the same arguments, encoders and frames goes on ----
    made_from["frames"] = of_frames(tables)
    made_from["input"] = {"image_size": image_size} | samplings
    checkpoint = find_last(args, made_from)
    first = checkpoint["step"] if checkpoint else 0
    total = args.steps or len(frames) // args.batch * args.epochs
    batches = training.Batches(len(frames), args.batch, first, total, args.seed)
    loader = training.load(frames, batches, collate, args.workers, device)

    # ---- model ----
    point_encoder = point_encoder.to(device).eval().requires_grad_(False)
    encoder.train(args.train_batchnorm)  # else it is trained in eval(), as it will be used
    # Some parameters have no part in the features, as the final norm in "prenorm"
    model = training.distribute(encoder, device, find_unused_parameters=True)

    # ---- optimizer ----
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    warmup = round(args.warmup_part * total)
    if checkpoint:
        encoder.backbone.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    # ---- loop ----
    spread = before = checkpoint.get("spread") if checkpoint else None  # now; before stage 2
    log = Log(args.out, device, encoder, checkpoint, frames.frame_count())
    saver = Saver(args, batches.per_epoch, total)
    bar = tqdm(loader, "stage 2", initial=first, total=total, disable=training.rank() > 0,
               mininterval=2)
    for step, batch in saver.guard(enumerate(bar, first)):
        lr = training.cosine(step, total, args.lr, args.end_lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = training.to_device(batch, device)
        with training.autocast(device, args.precision):
            with torch.no_grad():
                point_features = point_encoder(batch)          # [M, D]
            pixel_features = features_at_pixels(model, batch)  # [M, D]
        loss = distillation_loss(pixel_features, point_features, "3d_to_2d")
        loss = loss * training.share(len(pixel_features), device)
        optimizer.zero_grad()
        loss.backward()
        check_finite(loss, encoder, step, args.out, batches, frames)
        optimizer.step()

        log.add(loss, batch)
        done = step + 1
        epoch_ends = done % batches.per_epoch == 0 or done == total
        if before is None or done % 50 == 0 or epoch_ends:
            spread = feature_spread(pixel_features)
            before = before or spread
            say_if_collapsed(before, spread, done, bar, log)
        if done % 50 == 0:
            bar.set_postfix(loss=f"{log.mean():.3f}", lr=f"{lr:.1e}", refresh=False)
        if epoch_ends:
            log.write(epoch=step // batches.per_epoch + 1, step=done, lr=lr, **spread)
        if saver.due(done):
            saver.save({
                "kind": "image_encoder", "encoder": encoder.spec | {"image_size": image_size},
                "model": encoder.backbone.state_dict(), "made_from": made_from,
                "optimizer": optimizer.state_dict(), "step": done, "total": total,
                "log": log.state(), "spread": before, "args": vars(args)})
    log.report()


if __name__ == "__main__":
    main()

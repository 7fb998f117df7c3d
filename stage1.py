"""Stage 1, pre-alignment: WaffleIron and a linear head learn an image encoder's clear-day features.

Collaborative-distillation paper, Sec. 3.1; the loss and the recipe are ScaLR's. The bare command is
the paper's run:

    run="torchrun --standalone --nproc_per_node 4"
    $run stage1.py --data /data/nuscenes --encoder dinov2_vits14 --out runs/s1     # 4 GPUs
    python stage1.py --data /data/nuscenes --encoder dinov2_vits14 --out runs/s1   # one GPU
    python stage1.py ... --device cpu --channels 64 --depth 4 --limit 100 --steps 20   # a try

Writes OUT/last.pth and OUT/log.jsonl. Started again with the same arguments, it goes on from
last.pth.
"""
import torch
from tqdm import tqdm

import models
from data import Frames, collate, select, set_sampling
from distill import distillation_loss, features_at_pixels
from plumbing import training
from plumbing.arguments import COUNT, POSITIVE, RATE, Distinct, Parser, whole
from plumbing.errors import one_line_errors, say
from plumbing.fingerprint import of_frames
from plumbing.run_folder import Log, Saver, check_finite, find_last
from readers.table import open_tables

# ---- arguments -----------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    training.add_arguments(parser)
    models.add_arguments(parser, default="dinov2_vits14",
        help="image encoder: a name that `python models.py` lists, or a checkpoint "
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
    add("--recompute", action="store_true",
        help="compute WaffleIron's layers again in the backward pass instead of keeping them: the "
             "same result, a fraction of the memory, a third more time")
    # what it gets of a scan; the defaults are the dataset's SAMPLING, here nuScenes'
    add("--fov", type=POSITIVE, nargs=3, metavar=("X", "Y", "Z"),
        help="half extents of WaffleIron's planes in metres (default: the dataset's, 64 64 8, "
             "ScaLR supplement B.2)")
    add("--cell", type=POSITIVE,
        help="their cells' side in metres (default: the dataset's, 0.5, same)")
    add("--voxel", type=POSITIVE,
        help="one point per voxel of this side in metres (default: the dataset's, 0.1)")
    add("--max-points", type=COUNT,
        help="points of a view at most (default: the dataset's, 20000)")
    add("--neighbors", type=COUNT,
        help="of a point in the embedding (default: the dataset's, 16, same)")
    # the frames
    add("--conditions", nargs="+", action=Distinct, default=["day-clear"],
        help="frames to learn from, of a dataset that tells conditions; all: every one (default: "
             "day-clear, Sec. 3.1, Assumption 1)")
    add("--cameras", default="random",
        help="of a frame: random (one, drawn anew each epoch), all, or a channel "
             "(default: %(default)s, ScaLR Sec. 3.1)")
    # the run
    add("--epochs", type=COUNT, default=49, help="(default: %(default)s, Sec. 4.1)")
    add("--batch", type=COUNT, default=8,
        help="camera views in a batch, over all processes (default: %(default)s, Sec. 4.1)")
    add("--lr", type=POSITIVE, default=2e-3,
        help="peak learning rate (default: %(default)s, Sec. 4.1)")
    add("--end-lr", type=RATE, default=1e-5,
        help="learning rate at the end of the cosine (default: %(default)s, Sec. 4.1)")
    add("--warmup-steps", type=whole(0), default=3500,
        help="steps from 0 to --lr, at most a tenth of the run (default: %(default)s, ScaLR "
             "supplement B.2)")
    add("--weight-decay", type=RATE, default=0.03,
        help="of AdamW (default: %(default)s, Sec. 4.1)")
    return parser.parse_args(argv)


def samplings_of(args, tables):
    """How each dataset's scans become points, by the flags: {dataset: sampling}. Sets it, too."""
    given = {}
    for name in ("fov", "cell", "voxel", "max_points", "neighbors"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    if args.fov:
        given["fov"] = tuple(args.fov)
    for table in tables:
        if table.sampling:
            table.sampling = table.sampling | given
    return set_sampling(tables)


# ---- training ------------------------------------------------------------------------------------

@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = training.start(args)

    # ---- data ----
    with training.first_process_first():
        tables = open_tables(args.data, args.version, look=False)
        encoder = models.load_image_encoder(args.encoder, args.weights, args.hub, args.feature,
                                            careful=False).to(device)
    for table in tables:
        say(table.summary())
    image_size = args.image_size or encoder.spec.get("image_size", models.IMAGE_SIZE)
    image_size = encoder.check_size(image_size)
    samplings = samplings_of(args, tables)
    skip_bad = args.on_bad_frame == "skip"
    tables = select(tables, "train", args.conditions, args.limit, skip_bad=skip_bad)
    backbone = models.backbone(args.backbone)
    frames = Frames(tables, args.cameras, image_size, backbone.prepare, points="augmented",
                    skip_bad=skip_bad, seed=args.seed)

    # ---- model ----
    encoder.requires_grad_(False)
    point_encoder = backbone.build(args, samplings, encoder.dim).to(device)
    model = training.distribute(point_encoder, device)

    # ---- resume: a run of the same arguments, encoder and frames goes on ----
    made_from = {"encoder": encoder.fingerprint(), "frames": of_frames(tables),
                 "input": {"image_size": image_size} | samplings}
    checkpoint = find_last(args, made_from)
    first = checkpoint["step"] if checkpoint else 0
    total = args.steps or len(frames) // args.batch * args.epochs
    batches = training.Batches(len(frames), args.batch, first, total, args.seed)
    loader = training.load(frames, batches, collate, args.workers, device)

    # ---- optimizer ----
    optimizer = torch.optim.AdamW(point_encoder.parameters(), lr=args.lr,
                                  weight_decay=args.weight_decay)
    warmup = min(args.warmup_steps, total // 10)
    if checkpoint:
        point_encoder.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    # ---- loop ----
    log = Log(args.out, device, point_encoder, checkpoint, frames.frame_count())
    saver = Saver(args, batches.per_epoch, total)
    bar = tqdm(loader, "stage 1", initial=first, total=total, disable=training.rank() > 0,
               mininterval=2)
    for step, batch in saver.guard(enumerate(bar, first)):
        lr = training.cosine(step, total, args.lr, args.end_lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = training.to_device(batch, device)
        with training.autocast(device, args.precision):
            with torch.no_grad():
                pixel_features = features_at_pixels(encoder, batch)  # [M, D]
            point_features = model(batch)                            # [M, D]
        loss = distillation_loss(pixel_features, point_features, "2d_to_3d")
        loss = loss * training.share(len(point_features), device)
        optimizer.zero_grad()
        loss.backward()
        check_finite(loss, point_encoder, step, args.out, batches, frames)
        optimizer.step()

        log.add(loss, batch)
        done = step + 1
        if done % 50 == 0:
            bar.set_postfix(loss=f"{log.mean():.3f}", lr=f"{lr:.1e}", refresh=False)
        if done % batches.per_epoch == 0 or done == total:
            log.write(epoch=step // batches.per_epoch + 1, step=done, lr=lr)
        if saver.due(done):
            saver.save({
                "kind": "point_encoder", "backbone": args.backbone, "spec": point_encoder.spec,
                "model": point_encoder.state_dict(), "made_from": made_from,
                "samplings": samplings, "encoder": models.source_of(args),
                "image_size": image_size,
                "optimizer": optimizer.state_dict(), "step": done, "total": total,
                "log": log.state(), "args": vars(args)})
    log.report()


if __name__ == "__main__":
    main()

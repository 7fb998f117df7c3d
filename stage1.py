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
from data import CLOUD, Frames, collate, plane_sizes
from distill import distillation_loss, sample_features
from plumbing import training
from plumbing.arguments import COUNT, POSITIVE, RATE, Distinct, Parser, whole
from plumbing.errors import InputError, one_line_errors
from plumbing.run_folder import Log, Saver, check_finite, find_last
from readers.nuscenes import CONDITIONS, load_index
from waffleiron import WaffleIron

# ---- arguments -----------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    training.add_arguments(parser)
    models.add_arguments(parser, default="dinov2_vits14",
        help="image encoder: a name that `python models.py` lists, or a checkpoint "
             "(default: %(default)s)")
    # the 3D encoder
    add("--channels", type=COUNT, default=768,
        help="width of WaffleIron (default: %(default)s, Sec. 4.1)")
    add("--depth", type=COUNT, default=48,
        help="layers of WaffleIron (default: %(default)s, ScaLR Sec. 4.1)")
    add("--norm", choices=("layernorm", "batchnorm"),
        help="in WaffleIron's layers (default: layernorm at width 768, else batchnorm; "
             "ScaLR Sec. 4.1)")
    add("--checkpoint", action="store_true",
        help="compute WaffleIron's layers again in the backward pass instead of keeping them: the "
             "same result, a fraction of the memory, a third more time")
    # what it gets of a scan
    add("--fov", type=POSITIVE, nargs=3, default=list(CLOUD["fov"]), metavar=("X", "Y", "Z"),
        help="half extents of WaffleIron's planes in metres (default: 64 64 8, ScaLR supplement "
             "B.2)")
    add("--cell", type=POSITIVE, default=CLOUD["cell"],
        help="their cells' side in metres (default: %(default)s, same)")
    add("--voxel", type=POSITIVE, default=CLOUD["voxel"],
        help="one point per voxel of this side in metres (default: %(default)s)")
    add("--max-points", type=COUNT, default=CLOUD["max_points"],
        help="points of a view at most (default: %(default)s)")
    add("--neighbors", type=COUNT, default=CLOUD["neighbors"],
        help="of a point in the embedding (default: %(default)s, same)")
    # the frames
    add("--conditions", nargs="+", action=Distinct, choices=CONDITIONS, default=["day-clear"],
        help="frames to learn from (default: day-clear, Sec. 3.1, Assumption 1)")
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
    add("--warmup", type=whole(0), default=3500,
        help="steps from 0 to --lr, at most a tenth of the run (default: %(default)s, ScaLR "
             "supplement B.2)")
    add("--weight-decay", type=RATE, default=0.03,
        help="of AdamW (default: %(default)s, Sec. 4.1)")
    return parser.parse_args(argv)


def cloud_of(args):
    """How a scan becomes WaffleIron's input, by the flags: see data.CLOUD.

    Raises InputError for a field of view that cells or voxels do not fit.
    """
    for side in args.fov:
        cells = 2 * side / args.cell
        if cells > 1e5:
            raise InputError(f"--cell {args.cell:g}: twice --fov {side:g} has more than 100,000 of "
                             "them; take larger ones")
        if round(cells) < 1 or abs(cells - round(cells)) > 1e-6 * cells:
            raise InputError(f"--cell {args.cell:g}: twice --fov {side:g} is not a whole number of "
                             "cells")
        if side / args.voxel >= 2**20:
            raise InputError(f"--voxel {args.voxel:g}: --fov {side:g} has more than a million of "
                             "them; take larger ones")
    return CLOUD | {"fov": tuple(args.fov), "cell": args.cell, "voxel": args.voxel,
                    "max_points": args.max_points, "neighbors": args.neighbors}


def waffleiron_of(args, cloud, out_channels):
    """The 3D encoder of the flags. Raises InputError for --checkpoint with BatchNorm."""
    norm = args.norm or ("layernorm" if args.channels == 768 else "batchnorm")
    if args.checkpoint and norm == "batchnorm":
        raise InputError("--checkpoint: not with BatchNorm in the layers, which would count each "
                         "batch twice; --norm layernorm has none")
    waffleiron = WaffleIron(channels=args.channels, depth=args.depth, out_channels=out_channels,
                            norm=norm, grids=plane_sizes(cloud["fov"], cloud["cell"]))
    waffleiron.checkpoint = args.checkpoint
    return waffleiron


# ---- training ------------------------------------------------------------------------------------

@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = training.start(args)

    # ---- data ----
    with training.first_process_first():
        index = load_index(args.data, args.version, look=False)
        encoder = models.load_image_encoder(args.encoder, args.weights, args.hub, args.feature,
                                            careful=False).to(device)
    if training.rank() == 0:
        print(index.summary(), flush=True)
    image_size = args.image_size or encoder.spec.get("image_size", models.IMAGE_SIZE)
    image_size = encoder.check_size(image_size)
    cloud = cloud_of(args)
    skip_bad = args.on_bad_frame == "skip"
    rows = index.select("train", args.conditions, args.limit, skip_bad=skip_bad)
    frames = Frames(index, rows, args.cameras, image_size, cloud, training=True, augment=True,
                    skip_bad=skip_bad, seed=args.seed)

    # ---- resume: a run of the same arguments, encoder and frames goes on ----
    made_from = {"encoder": encoder.fingerprint(), "frames": index.fingerprint(rows),
                 "input": {"image_size": image_size}}
    checkpoint = find_last(args, made_from)
    first = checkpoint["step"] if checkpoint else 0
    total = args.steps or len(frames) // args.batch * args.epochs
    batches = training.Batches(len(frames), args.batch, first, total, args.seed)
    loader = training.load(frames, batches, collate, args.workers, device)

    # ---- model ----
    encoder.requires_grad_(False)
    waffleiron = waffleiron_of(args, cloud, encoder.dim).to(device)
    model = training.distribute(waffleiron, device)

    # ---- optimizer ----
    optimizer = torch.optim.AdamW(waffleiron.parameters(), lr=args.lr,
                                  weight_decay=args.weight_decay)
    warmup = min(args.warmup, total // 10)
    if checkpoint:
        waffleiron.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    # ---- loop ----
    log = Log(args.out, device, waffleiron, checkpoint, len(rows))
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
                maps = encoder(batch["image"])  # [B, D, h, w]
                pixel_features = sample_features(
                    maps, batch["pixels"], batch["batch"], image_size)  # [M, D]
            point_features = model(
                batch["feats"], batch["cells"], batch["neighbors"], batch["batch"])  # [M, D]
        loss = distillation_loss(pixel_features, point_features, "2d_to_3d")
        loss = loss * training.share(len(point_features), device)
        optimizer.zero_grad()
        loss.backward()
        check_finite(loss, waffleiron, step, args.out, batches, frames)
        optimizer.step()

        log.add(loss, batch)
        done = step + 1
        if done % 50 == 0:
            bar.set_postfix(loss=f"{log.mean():.3f}", lr=f"{lr:.1e}", refresh=False)
        if done % batches.per_epoch == 0 or done == total:
            log.write(epoch=step // batches.per_epoch + 1, step=done, lr=lr)
        if saver.due(done):
            saver.save({
                "kind": "point_encoder", "waffleiron": waffleiron.spec,
                "model": waffleiron.state_dict(), "made_from": made_from, "cloud": cloud,
                "encoder": models.source_of(args), "image_size": image_size,
                "optimizer": optimizer.state_dict(), "step": done, "total": total,
                "log": log.state(), "args": vars(args)})
    log.report()


if __name__ == "__main__":
    main()

"""Stage 2, 3D-anchored self-supervision: the frozen 3D encoder pulls the image encoder's features to the clear-day ones.

Collaborative-distillation paper, Sec. 3.2: stage 1's loss and weights with the gradient's direction switched, on all
conditions. The encoder, its feature, the image size and WaffleIron's shape come from stage 1's checkpoint.

    torchrun --nproc_per_node 4 stage2.py --data /data/nuscenes --stage1 runs/s1 --out runs/s2     # N GPUs
    python stage2.py --data /data/nuscenes --stage1 runs/s1 --out runs/s2                          # one GPU
    python stage2.py ... --device cpu --limit 100 --batch 4 --steps 20                             # a try on a CPU

Writes OUT/last.pth, which `load_image_encoder("OUT")` and every --encoder flag read, and OUT/log.jsonl; started again with
the same arguments, it goes on from last.pth.
"""
import argparse
import os

import torch
from tqdm import tqdm

import training
from data import CONDITIONS, Frames, collate, load_index
from distill import distillation_loss, sample_features
from errors import one_line_errors
from models import load_image_encoder
from waffleiron import load_waffleiron


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.add_arguments(parser)
    add = parser.add_argument
    add("--stage1", required=True, help="stage 1's folder or checkpoint")
    add("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS),
        help="frames to learn from (default: all, Sec. 3.2)")
    add("--cameras", default="all", help="of a frame: all (an epoch sees each), random (one), or a channel "
        "(default: %(default)s; the GPU-hours of Table L)")
    add("--epochs", type=int, default=1, help="(default: %(default)s, Sec. 4.1)")
    add("--batch", type=int, default=32, help="camera views in a batch, over all processes (default: %(default)s, Sec. 4.1)")
    add("--lr", type=float, default=2e-5, help="peak learning rate (default: %(default)s, Sec. 4.1, for a ViT)")
    add("--end-lr", type=float, default=1e-5, help="learning rate at the end of the cosine (default: %(default)s, Sec. 4.1)")
    add("--warmup", type=float, default=0.1, help="part of the run from 0 to --lr (default: %(default)s, our choice)")
    add("--weight-decay", type=float, default=0.03, help="of AdamW (default: %(default)s, Sec. 4.1)")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = training.start(args)
    checkpoint = training.find_last(args)
    waffleiron, stage1 = load_waffleiron(args.stage1)
    if stage1["step"] < stage1["total"] and training.rank() == 0:
        print(f"{args.stage1}: stage 1 is unfinished, step {stage1['step']} of {stage1['total']}", flush=True)

    # ---- data ----
    with training.first_process_first():
        index = load_index(args.data, args.version)
        encoder = load_image_encoder(**stage1["encoder"]).to(device)
    if training.rank() == 0:
        print(index.summary(), flush=True)
    image_size = tuple(stage1["image_size"])
    frames = Frames(index, index.select("train", args.conditions, args.limit), args.cameras, image_size, stage1["cloud"],
                    training=True, seed=args.seed)
    total = args.steps or len(frames) // args.batch * args.epochs
    first = checkpoint["step"] if checkpoint else 0
    batches = training.Batches(len(frames), args.batch, first, total, args.seed)
    loader = training.load(frames, batches, collate, args.workers, device)

    # ---- model ----
    waffleiron = waffleiron.to(device).eval().requires_grad_(False)
    encoder.eval()  # trained, but without dropping anything: what is distilled is what is used later
    model = training.distribute(encoder, device, find_unused_parameters=True)  # e.g. the final norm, for "prenorm"

    # ---- optimizer ----
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    warmup = round(args.warmup * total)

    # ---- resume ----
    if checkpoint:
        encoder.backbone.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    # ---- loop ----
    log = training.Log(args.out, device)
    bar = tqdm(loader, "stage 2", initial=first, total=total, disable=training.rank() > 0, mininterval=2)
    for step, batch in enumerate(bar, first):
        lr = training.cosine(step, total, args.lr, args.end_lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = training.to_device(batch, device)
        with training.autocast(device, args.precision):
            with torch.no_grad():
                point_features = waffleiron(batch["feats"], batch["cells"], batch["neighbors"], batch["batch"])  # [M, D]
            maps = model(batch["image"])  # [B, D, h, w]
            pixel_features = sample_features(maps, batch["pixels"], batch["batch"], image_size)  # [M, D]
        loss = distillation_loss(pixel_features, point_features, "3d_to_2d")
        loss = loss * training.share(len(pixel_features), device)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        log.add(loss)
        done = step + 1
        if done % 50 == 0:
            bar.set_postfix(loss=f"{log.mean():.3f}", lr=f"{lr:.1e}", refresh=False)
        if done % batches.per_epoch == 0 or done == total:
            log.write(epoch=step // batches.per_epoch + 1, step=done, lr=lr)
        if done % args.save_every == 0 or done % batches.per_epoch == 0 or done == total:
            log.mean()  # raises rather than save what is not finite
            training.save(os.path.join(args.out, "last.pth"), {
                "kind": "image_encoder", "encoder": encoder.spec | {"image_size": image_size},
                "model": encoder.backbone.state_dict(),
                "optimizer": optimizer.state_dict(), "step": done, "args": vars(args)})


if __name__ == "__main__":
    main()

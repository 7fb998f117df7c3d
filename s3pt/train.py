"""S3PT: an image encoder from driving data alone, without labels and from random weights.

The papers' objectives, each of which contains the one before: DINO (crops), CrIBo (and objects
that both crops show), S3PT (and LiDAR's depth, small objects, prototypes that are sure or not). The
bare command is S3PT's run of ViT-S/16, Table 7:

    run="torchrun --standalone --nproc_per_node 8"
    $run -m s3pt.train --data /data/nuscenes --out runs/s3pt               # 8 GPUs
    $run -m s3pt.train --data /data/nuscenes --out runs/cribo --objective cribo --epochs 100
    python -m s3pt.train ... --device cpu --batch 4 --prototypes 1024 --steps 20   # a try

Writes OUT/last.pth and OUT/log.jsonl; `--encoder OUT` of the other scripts reads it. Started again
with the same arguments, it goes on from last.pth.
"""
from copy import deepcopy

import torch
from torch import nn
from tqdm import tqdm

from data import select
from distill import feature_spread
from plumbing import training
from plumbing.errors import InputError, one_line_errors, say
from plumbing.fingerprint import of_frames
from plumbing.run_folder import Log, Saver, check_finite, find_last
from readers.table import open_tables
from s3pt.clustering import Clustering, Queue
from s3pt.crops import Crops, Views, collate
from s3pt.depth import FolderDepth, LidarDepth
from s3pt.networks import neighbors_of, networks_of, taught, view_by_view
from s3pt.objectives import (Center, clip_each, crop_loss, drop_gradients, health, move_teacher,
                             object_loss, parameter_groups)
from s3pt.settings import parse
from vit import survivors

LOSSES = "global_cross_view", "object_cross_view", "object_cross_image"

# ---- data ----------------------------------------------------------------------------------------

def depth_of(args, tables):
    """Where depths come from; None where there are none, or no use is made of them.

    Sets --beta to 0 where nothing has LiDAR. Raises InputError where it was given.
    """
    if not args.beta:
        return None
    if args.depth_maps:
        source = FolderDepth(args.depth_maps)
        source.check(tables)
        return source
    if any("scan" in table for table in tables):
        return LidarDepth(args.depth_fill)
    if args.beta_given:
        raise InputError(f"--beta {args.beta:g}: no frame of --data {args.data} has LiDAR; give "
                         "--depth-maps, or --beta 0")
    say(f"--data {args.data}: no LiDAR, so --beta 0")
    args.beta = 0.0
    return None


def pictures_of(args, row):
    """The pictures as `Crops`, and their tables."""
    with training.first_process_first():
        tables = []
        for version in args.version or [None]:
            tables += open_tables(args.data, version, look=False)
    for table in tables:
        say(table.summary())
    skip_bad = args.on_bad_frame == "skip"
    tables = select(tables, args.split, None, args.limit, args.percent, skip_bad)
    views = Views(args.crop, args.scale, args.local_crops, args.local_crop, args.local_scale,
                  row.patch_size, args.clusters or 0)
    pictures = Crops(tables, views, depth_of(args, tables), skip_bad, args.seed)
    say(f"{len(pictures)} pictures of split {args.split}, {args.percent} % of the scenes")
    return pictures, tables


def clustering_of(args, dim, device):
    """How objects are found, and where those of other pictures are kept; DINO has neither."""
    if args.objective == "dino":
        return None, None
    settings = Clustering(args.rounds, args.sinkhorn_steps, args.sinkhorn_lambda, args.alpha,
                          args.beta, args.marginal)
    return settings, Queue(args.queue, dim, device)


# ---- schedules -----------------------------------------------------------------------------------

def schedules(args, step, total, per_epoch):
    """What changes in training, at a step: {name: number}. All but the temperature are DINO's."""
    warmup = min(args.warmup_epochs * per_epoch, total // 10)
    peak = args.lr * args.batch / 256
    lr = peak * step / max(1, warmup - 1)  # the warm-up's last step has the peak already
    if step >= warmup:
        lr = training.cosine(step - warmup, total - warmup, peak, args.end_lr)
    epoch = step // per_epoch
    part = min(1, epoch / max(1, args.temp_epochs - 1))
    first, last = args.first_teacher_temp, args.teacher_temp
    return {"lr": lr, "teacher_temp": first + part * (last - first),
            "weight_decay": training.cosine(step, total, args.weight_decay, args.end_weight_decay),
            "momentum": training.cosine(step, total, args.momentum, 1.0)}


def stochastic_depth(args, keys, backbone, device):
    """Factors of the student's branches for the global crops and the small ones: see `survivors`.

    keys: of the batch's items, of which the draws are functions.
    """
    if not args.drop_path:
        return None, None
    depth = len(backbone.blocks)
    views = 2 + args.local_crops
    draws = training.draws(keys, args.seed, views * 2 * depth).to(device)
    draws = draws.unflatten(0, (views, depth, 2)).permute(1, 2, 0, 3)  # [depth, 2, V, B]
    return [survivors(part.flatten(2), args.drop_path) for part in (draws[:, :, :2],
                                                                    draws[:, :, 2:])]


# ---- what to look at -----------------------------------------------------------------------------

def condition(seen, mask, batch, teacher, center, temperature):
    """How the teacher does, by the last batch of an epoch: {name: number} for the log."""
    found = health(seen.z, teacher.head.last_layer, center, temperature)
    found |= feature_spread(seen.tokens.flatten(0, 1))
    if seen.assignment is not None:
        in_use = torch.zeros_like(seen.valid).scatter(1, seen.assignment, True)
        found |= {"clusters": in_use.sum(1).float().mean().item(),
                  "objects": seen.valid.sum(1).float().mean().item(),
                  "cycle_consistent": mask.float().mean().item() if mask.numel() else 0.0,
                  "tokens_with_depth": batch["depths"].isfinite().float().mean().item()}
    return found


def say_if_collapsed(found, done, bar, early):
    """Whether `condition` says that the encoder collapses; if so, a line. early: in the warm-up."""
    wrong = {"entropy_of_mean": found["entropy_of_mean"] < 0.1,
             "mean_entropy": found["mean_entropy"] > 0.99,
             "feature_variance": found["feature_variance"] < 0.01,
             "effective_rank": found["effective_rank"] < 2}
    signs = [f"{name} {found[name]:.2g}" for name, is_wrong in wrong.items() if is_wrong]
    if early or not signs:
        return False
    if training.rank() == 0:
        bar.write(f"step {done}: the encoder collapses, {', '.join(signs)}; try a lower --lr or "
                  "--teacher-temp, more --freeze-epochs, or a higher --momentum")
    return True


# ---- training ------------------------------------------------------------------------------------

@one_line_errors
def main(argv=None):
    args = parse(__doc__, argv)
    device = training.start(args)

    # ---- model ----
    encoder, student = networks_of(args, device)
    teacher = deepcopy(student).requires_grad_(False)
    model = training.distribute(student, device)
    centers = nn.ModuleList(Center(args.prototypes, args.center, args.center_momentum)
                            for _ in range(2)).to(device)
    # Prototypes of crops and of objects, the student's and the teacher's
    layers = [(getattr(student.head, name), getattr(teacher.head, name))
              for name in ("last_layer", "last_layer_c")]

    # ---- data ----
    pictures, tables = pictures_of(args, encoder.row)
    settings, queue = clustering_of(args, encoder.row.arguments["dim"], device)

    # ---- resume: a run of the same arguments and frames goes on ----
    made_from = {"frames": of_frames(tables)}
    if args.weights:
        made_from["encoder"] = encoder.fingerprint()
    checkpoint = find_last(args, made_from)
    first = checkpoint["step"] if checkpoint else 0
    total = args.steps or len(pictures) // args.batch * args.epochs
    batches = training.Batches(len(pictures), args.batch, first, total, args.seed)
    loader = training.load(pictures, batches, collate, args.workers, device)
    optimizer = torch.optim.AdamW(parameter_groups(student, args.weight_decay))
    parts = {"model": teacher.backbone, "teacher_head": teacher.head, "student": student,
             "centers": centers, "optimizer": optimizer}
    if queue is not None:
        parts["queue"] = queue
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])

    # ---- loop ----
    names = LOSSES if queue is not None else LOSSES[:1]
    log = Log(args.out, device, student, checkpoint, pictures.frame_count(), names)
    saver = Saver(args, batches.per_epoch, total)
    told, mask = bool(checkpoint and checkpoint["told"]), None
    bar = tqdm(loader, "s3pt", initial=first, total=total, disable=training.rank() > 0,
               mininterval=2)
    for step, batch in saver.guard(enumerate(bar, first)):
        epoch = step // batches.per_epoch
        now = schedules(args, step, total, batches.per_epoch)
        optimizer.param_groups[0]["weight_decay"] = now["weight_decay"]
        for group in optimizer.param_groups:
            group["lr"] = now["lr"]
        temperatures = args.student_temp, now["teacher_temp"]
        batch = training.to_device(batch, device)
        crops = [view_by_view(encoder, batch[name]) for name in ("image", "local") if name in batch]
        keep = stochastic_depth(args, batches.of(step), student.backbone, device)
        with training.autocast(device, args.precision):
            seen = taught(teacher, crops[0], batch, settings)
            z, z_objects = model(crops, keep, seen.assignment, seen.valid)
            if queue is not None:
                neighbors, mask = neighbors_of(seen, teacher, queue, epoch)
        loss, terms = crop_loss(z, seen.z, layers[0], centers[0], temperatures)
        if queue is not None:
            more, others = object_loss(z_objects, seen.z_objects, neighbors, mask, layers[1],
                                       centers[1], temperatures)
            loss, terms = loss + more, torch.cat([terms, others])
        optimizer.zero_grad()
        loss.backward()
        check_finite(loss, student, step, args.out, batches, pictures)
        if args.clip:
            clip_each(student.parameters(), args.clip)
        if epoch < args.freeze_epochs:
            drop_gradients(student, "last_layer")
        optimizer.step()
        for center, points, (_, of_teacher) in zip(centers, (seen.z, seen.z_objects), layers):
            if points is not None:
                center.update(points.flatten(0, -2), of_teacher, temperatures[1])
        move_teacher(teacher, student, now["momentum"])

        log.add(loss, batch, torch.stack([terms, torch.ones_like(terms)], 1))
        done = step + 1
        if done % 50 == 0:
            bar.set_postfix(loss=f"{log.mean():.3f}", lr=f"{now['lr']:.1e}", refresh=False)
        if done % batches.per_epoch == 0 or done == total:
            found = condition(seen, mask, batch, teacher, centers[0], temperatures[1])
            told = told or say_if_collapsed(found, done, bar, epoch < args.warmup_epochs)
            log.write(epoch=epoch + 1, step=done, split=args.split, **now, **found)
        if saver.due(done):
            saver.save({name: part.state_dict() for name, part in parts.items()} | {
                "kind": "image_encoder", "encoder": encoder.spec, "made_from": made_from,
                "told": told, "step": done, "total": total, "log": log.state(),
                "args": vars(args)})
    log.report()


if __name__ == "__main__":
    main()

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
from readers.table import hold_out, open_tables
from s3pt.clustering import Clustering, Queue
from s3pt.crops import Crops, Views, collate
from s3pt.depth import FolderDepth, LidarDepth
from s3pt.networks import neighbors_of, networks_of, stochastic_depth, taught, view_by_view
from s3pt.objectives import (Center, clip_each, crop_loss, drop_gradients, health, move_teacher,
                             object_loss, parameter_groups, set_rates)
from s3pt.settings import parse

LOSSES = "global_cross_view", "object_cross_view", "object_cross_image"

# ---- data ----------------------------------------------------------------------------------------

def depth_of(args, tables):
    """Where depths come from; None where there are none, or no use is made of them.

    Sets --beta to 0 where nothing has LiDAR. Raises InputError where it was given.
    """
    given = vars(args).pop("beta_given")  # no argument of the run
    if not args.beta:
        return None
    if args.depth_maps:
        source = FolderDepth(args.depth_maps)
        training.by_first_process(lambda: source.check(tables))
        return source
    if any("scan" in table for table in tables):
        return LidarDepth(args.depth_fill)
    if given:
        raise InputError(f"--beta {args.beta:g}: no frame of --data {args.data} has LiDAR; give "
                         "--depth-maps, or --beta 0")
    say(f"--data {args.data}: no LiDAR, so --beta 0")
    args.beta = 0.0
    return None


def tables_of(args):
    """The tables of --data in each --version, those without versions once."""
    found = {}
    with training.first_process_first():
        for version in args.version or [None]:
            for table in open_tables(args.data, version, look=False):
                found.setdefault((table.name, table.root, str(table.options)), table)
    tables = hold_out(list(found.values()), args.val_scenes)
    for table in tables:
        say(table.summary())
    return tables


def pictures_of(args, encoder):
    """The pictures as `Crops`, and their tables."""
    skip_bad = args.on_bad_frame == "skip"
    tables = select(tables_of(args), args.split, None, args.limit, args.percent, skip_bad)
    views = Views(args.crop, args.scale, args.local_crops, args.local_crop, args.local_scale,
                  encoder.patch_size, len(encoder.backbone.blocks), args.clusters or 0)
    pictures = Crops(tables, views, depth_of(args, tables), skip_bad, args.seed)
    say(f"{len(pictures)} pictures of split {args.split}, {args.percent} % of the scenes")
    return pictures, tables


def sources_of(args, encoder, pictures, tables):
    """Fingerprints of what a run is made from: {source: fingerprint}."""
    sources = {"frames": of_frames(tables)}
    # Random weights are the seed's, and LiDAR's depths the frames'
    if args.weights:
        sources["encoder"] = encoder.fingerprint()
    if args.depth_maps:
        sources["depth maps"] = training.by_first_process(
            lambda: pictures.depth.fingerprint(tables))
    return sources


def clustering_of(args, dim, device):
    """How objects are found, and where those of other pictures are kept; DINO has neither."""
    if args.objective == "dino":
        return None, None
    settings = Clustering(*(getattr(args, name) for name in Clustering._fields))
    return settings, Queue(args.queue, dim, device)


def centers_of(args):
    """The teacher's centre for crops and, but for DINO, that for objects."""
    count = 1 if args.objective == "dino" else 2
    return nn.ModuleList(Center(args.prototypes, args.center, args.center_momentum)
                         for _ in range(count))


# ---- schedules -----------------------------------------------------------------------------------

def schedules(args, step, total, per_epoch):
    """What changes in training, at a step: {name: number}. All but the temperature are DINO's."""
    warmup = warmup_of(args, total, per_epoch)
    peak = args.lr * args.batch / 256
    lr = peak * step / max(1, warmup - 1)  # the warm-up's last step has the peak already
    if step >= warmup:
        lr = training.cosine(step - warmup, total - warmup, peak, args.end_lr)
    # By epoch, from the first to the last temperature
    epoch = step // per_epoch
    part = 1 if epoch >= args.temp_epochs else epoch / max(1, args.temp_epochs - 1)
    first, last = args.first_teacher_temp, args.teacher_temp
    return {"lr": lr, "teacher_temp": first + part * (last - first),
            "weight_decay": training.cosine(step, total, args.weight_decay, args.end_weight_decay),
            "momentum": training.cosine(step, total, args.momentum, 1.0)}


def warmup_of(args, total, per_epoch):
    """Steps of the learning rate's warm-up."""
    return min(args.warmup_epochs * per_epoch, total // 10)


# ---- what to look at -----------------------------------------------------------------------------

def checkup(seen, mask, batch, teacher, center, temperature):
    """How the teacher does, by the last batch of an epoch: {name: number} for the log.

    All processes must call it. The spread is that of this process's tokens.
    """
    z = training.gather_rows(seen.z)
    found = health(z, teacher.head.last_layer, center, temperature)
    found |= feature_spread(seen.tokens.flatten(0, 1))
    if seen.assignment is None:
        return found
    found["object_prototype_norms"] = teacher.head.last_layer_c.norms()
    in_use = torch.zeros_like(seen.valid).scatter(1, seen.assignment, True)
    depths = batch["depths"].isfinite()
    for name, values in (("clusters", in_use.sum(1)), ("objects", seen.valid.sum(1)),
                         ("cycle_consistent", mask.flatten()), ("tokens_with_depth", depths)):
        everywhere = training.gather_rows(values.float())
        found[name] = everywhere.mean().item() if len(everywhere) else 0.0
    return found


def say_if_collapsed(found, done, bar, early):
    """Whether `checkup` says that the encoder collapses; if so, a line. early: in the warm-up."""
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
    centers = centers_of(args).to(device)
    # Prototypes of crops and of objects, the student's and the teacher's
    layers = [(getattr(student.head, name), getattr(teacher.head, name))
              for name in ("last_layer", "last_layer_c")]

    # ---- data ----
    pictures, tables = pictures_of(args, encoder)
    settings, queue = clustering_of(args, encoder.row.arguments["dim"], device)

    # ---- resume: a run of the same arguments and frames goes on ----
    made_from = sources_of(args, encoder, pictures, tables)
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
    checkpoint = None  # it is as large as all that was made of it
    bar = tqdm(loader, "s3pt", initial=first, total=total, disable=training.rank() > 0,
               mininterval=2)
    for step, batch in saver.guard(enumerate(bar, first)):
        epoch = step // batches.per_epoch
        now = schedules(args, step, total, batches.per_epoch)
        set_rates(optimizer, now["lr"], now["weight_decay"])
        temperatures = args.student_temp, now["teacher_temp"]
        batch = training.to_device(batch, device)
        crops = [view_by_view(encoder, batch[name]) for name in ("image", "local") if name in batch]
        keep = stochastic_depth(batch["draws"], args.drop_path)
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
            found = checkup(seen, mask, batch, teacher, centers[0], temperatures[1])
            early = done <= warmup_of(args, total, batches.per_epoch)
            told = told or say_if_collapsed(found, done, bar, early)
            log.write(epoch=epoch + 1, step=done, split=args.split, **now, **found)
        if saver.due(done):
            saver.save({name: part.state_dict() for name, part in parts.items()} | {
                "kind": "image_encoder", "encoder": encoder.spec, "made_from": made_from,
                "told": told, "step": done, "total": total, "log": log.state(),
                "args": vars(args)})
    log.report()


if __name__ == "__main__":
    main()

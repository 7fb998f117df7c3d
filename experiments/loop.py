"""The set-up of stage 1 and the loop of both stages, with model and loss as arguments.

The ablations and clean_twin.py train by it. stage1.py and stage2.py each write the loop out for one
model and one loss, to be read from top to bottom.
"""
import torch
from tqdm import tqdm

import models
import stage1
from data import Frames, collate, select
from plumbing import training
from plumbing.errors import InputError, say
from plumbing.fingerprint import of_frames
from plumbing.run_folder import Log, Saver, check_finite, find_last
from readers.table import check_cameras, entries, hold_out, open_tables


def build(args, device, out_channels=None, labels=False):
    """What the main of stage1.py builds by its flags, here with another head or with labels.

    Args:
        out_channels: of the 3D encoder's head (default: the image encoder's).
        labels: frames with labels and without images.
    Returns: image encoder, 3D encoder, frames, and what stage 1's checkpoint says of the three.
    """
    if not isinstance(args.encoder, str):
        raise InputError(f"--encoder {' '.join(args.encoder)}: an ablation has one image encoder; "
                         "stage1.py takes several")
    check_cameras(entries(args.data))
    with training.first_process_first():
        tables = open_tables(args.data, args.version, look=False)
        encoder = models.load_image_encoder(args.encoder, args.weights, args.hub, args.feature,
                                            careful=False).to(device)
    tables = hold_out(tables, args.val_scenes)
    for table in tables:
        say(table.summary())

    # Frames
    image_size = args.image_size or encoder.spec.get("image_size", models.IMAGE_SIZE)
    image_size = encoder.check_size(image_size)
    samplings = stage1.samplings_of(args, tables)
    skip_bad = args.on_bad_frame == "skip"
    tables = select(tables, "train", args.conditions, args.limit, skip_bad=skip_bad)
    backbone = models.backbone(args.backbone)
    size, target = (None, "labels") if labels else (image_size, None)
    frames = Frames(tables, args.cameras, size, backbone.prepare, target, "augmented", skip_bad,
                    args.seed)
    stage1.fill_in_epochs(args, frames)

    # The 3D encoder, and what a checkpoint says of all
    point_encoder = backbone.build(args, samplings, out_channels or encoder.dim).to(device)
    made_from = {"encoder": encoder.fingerprint(), "frames": of_frames(tables, labels),
                 "input": {"image_size": image_size} | samplings}
    content = {"backbone": args.backbone, "spec": point_encoder.spec, "samplings": samplings,
               "sampling_flags": stage1.sampling_flags(args), "val_scenes": args.val_scenes,
               "encoder": models.source_of(args), "image_size": image_size, "made_from": made_from}
    return encoder, point_encoder, frames, content


def train(args, device, frames, model, loss_of, peaks, parts, content):
    """The loop of the stages, with another model and another loss. It goes on from OUT/last.pth.

    Args:
        args: flags of stage1.py, or of stage2.py, and `ablation`, the name on the progress bar.
        model: called with a batch; what requires a gradient is trained.
        loss_of: (the model's outputs, batch, step) -> (loss, of how many pairs or points the mean).
        peaks: [(module, its peak learning rate)].
        parts: {name in the checkpoint: module}. content: what else the checkpoint holds.
    """
    # ---- data ----
    checkpoint = find_last(args, content["made_from"])
    total = args.steps or len(frames) // args.batch * args.epochs
    first = checkpoint["step"] if checkpoint else 0
    batches = training.Batches(len(frames), args.batch, first, total, args.seed)
    loader = training.load(frames, batches, collate, args.workers, device)

    # ---- optimizer ----
    optimizer = _optimizer(args, peaks)

    # ---- resume ----
    if checkpoint:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        optimizer.load_state_dict(checkpoint["optimizer"])
    log = Log(args.out, device, model, checkpoint, frames.frame_count())
    saver = Saver(args, batches.per_epoch, total)
    # With "prenorm", for example, the final norm gets no gradient
    distributed = training.distribute(model, device, find_unused_parameters=True)

    # ---- loop ----
    bar = tqdm(loader, args.ablation, initial=first, total=total, disable=training.rank() > 0,
               mininterval=2)
    for step, batch in saver.guard(enumerate(bar, first)):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(args, step, total, group["peak"])
        if vars(args).get("drop_path"):
            batch["draws"] = training.draws(batches.of(step), args.seed, 2 * args.depth)
        batch = training.to_device(batch, device)
        with training.autocast(device, args.precision):
            outputs = distributed(batch)  # what is frozen builds no graph
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
            weights = {name: part.state_dict() for name, part in parts.items()}
            state = {"optimizer": optimizer.state_dict(), "step": done, "total": total,
                     "log": log.state(), "args": vars(args)}
            saver.save(content | weights | state)
    log.report()


def _optimizer(args, peaks):
    """AdamW on all that requires a gradient, one group for each of [(module, peak)]."""
    groups = []
    for module, peak in peaks:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        groups.append({"params": trained, "peak": peak})
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay)


def _learning_rate(args, step, total, peak):
    """The rate at a step: stage2.py's warm-up is a part of the run, stage1.py's are steps."""
    if "warmup_part" not in args:
        return stage1.learning_rate(args, step, total, peak)
    return training.cosine(step, total, peak, args.end_lr, round(args.warmup_part * total))

"""Fine-tuning: the image encoder and a linear head on it learn together.

Collaborative-distillation paper, Tables 1 and 2, C.3. `probe.py --finetune` runs it, with all flags
of probe.py:

    run="torchrun --standalone --nproc_per_node 4"
    $run probe.py --finetune --data /data/nuscenes --encoder runs/s2 --task seg --percent 1
    python probe.py --finetune --data /data/nuscenes --encoder runs/s2 --task depth

Writes what probe.py writes, with the encoder's weights, and OUT/best.pth, of the lowest loss on the
validation split. That loss is computed at ends of epochs, about ten times in a long run.
"""
import os

import torch
from tqdm import tqdm

from data import collate
from distill import features_at_points
from heads import linear_head
from plumbing import training
from plumbing.atomic import save
from plumbing.run_folder import Log, Saver, check_finite
from probe import load_encoder, prepare, probe_loss


class Finetuned(torch.nn.Module):
    """An encoder and the head on it as one module, so that both gradients are averaged at once."""

    def __init__(self, encoder, head, image_size, device, precision):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.image_size = image_size
        self.device = device
        self.precision = precision

    def forward(self, batch):
        with training.autocast(self.device, self.precision):
            features = features_at_points(self.encoder, batch, self.image_size)  # [N, D]
        return self.head(features.float())                                       # [N, classes or 1]


@torch.no_grad()
def validation_loss(task, model, held_out, workers, device):
    """Mean loss of a `Finetuned` over the items of all processes, weighted by their points."""
    mine = training.in_batches(range(training.rank(), len(held_out), training.world()))
    sums = torch.zeros(2, dtype=torch.double, device=device)
    model.head.eval()
    for batch in training.load(held_out, mine, collate, workers, device):
        batch = training.to_device(batch, device)
        loss, count = probe_loss(task, model(batch), batch)
        sums += torch.tensor([loss * count, count], dtype=torch.double, device=device)
    model.head.train()
    total, count = training.sum_over_processes(sums).tolist()
    return total / max(1, count)


def main(args):
    """Train by the flags of probe.py, parsed."""
    device = training.start(args)

    # ---- encoder and data ----
    with training.first_process_first():
        encoder, image_size, cloud, dim = load_encoder(args)
    run = prepare(args, encoder, image_size, cloud)
    first = run.checkpoint["step"] if run.checkpoint else 0
    total = args.steps or len(run.frames) // args.batch * args.epochs
    batches = training.Batches(len(run.frames), args.batch, first, total, args.seed)
    loader = training.load(run.frames, batches, collate, args.workers, device)

    # ---- model ----
    encoder = encoder.to(device).eval().requires_grad_(True)  # trained in eval(), as in stage 2
    head = linear_head(args.head, dim, len(run.classes) or 1).to(device)
    both = Finetuned(encoder, head, image_size, device, args.precision)
    model = training.distribute(both, device, find_unused_parameters=True)

    # ---- optimizer ----
    head_rate = (args.head_lr or args.lr) / args.lr  # times the encoder's
    groups = [{"params": head.parameters(), "factor": head_rate},
              {"params": encoder.parameters(), "factor": 1.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    warmup = min(round(args.warmup * batches.per_epoch), total // 10)
    best = float("inf")  # validation loss
    if run.checkpoint:
        head.load_state_dict(run.checkpoint["model"])
        encoder.backbone.load_state_dict(run.checkpoint["backbone"])
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        best = run.checkpoint["best"]

    # ---- loop ----
    validate_every = max(1, total // batches.per_epoch // 10) * batches.per_epoch  # steps
    log = Log(args.out, device, both, run.checkpoint, len(run.frames.rows))
    saver = Saver(args, batches.per_epoch, total)
    bar = tqdm(loader, f"fine-tune {args.task}", initial=first, total=total,
               disable=training.rank() > 0, mininterval=2)
    for step, batch in saver.guard(enumerate(bar, first)):
        lr = training.cosine(step, total, args.lr, args.end_lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        batch = training.to_device(batch, device)
        loss, count = probe_loss(args.task, model(batch), batch)
        loss = loss * training.share(count, device)
        optimizer.zero_grad()
        loss.backward()
        check_finite(loss, both, step, args.out, batches, run.frames)
        optimizer.step()

        log.add(loss, batch)
        done = step + 1
        if done % 50 == 0:
            bar.set_postfix(loss=f"{log.mean():.3f}", lr=f"{lr:.1e}", refresh=False)
        values = {}
        if done % validate_every == 0 or done == total:
            values["validation_loss"] = validation_loss(
                args.task, both, run.held_out, args.workers, device)
        if done % batches.per_epoch == 0 or done == total:
            log.write(epoch=step // batches.per_epoch + 1, step=done, lr=lr, **values)
        if saver.due(done):
            is_best = values.get("validation_loss", float("inf")) < best
            best = values["validation_loss"] if is_best else best
            content = run.about | {
                "model": head.state_dict(), "dim": dim, "backbone": encoder.backbone.state_dict(),
                "best": best, "optimizer": optimizer.state_dict(), "step": done, "total": total,
                "log": log.state(), "args": vars(args)}
            if is_best:
                save(os.path.join(args.out, "best.pth"), content)
            saver.save(content)
    log.report()
    if training.rank() == 0:
        print(f"next: python eval.py {args.out}", flush=True)

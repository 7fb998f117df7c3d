"""Fine-tuning: the image encoder and a linear head on it learn together.

Collaborative-distillation paper, Tables 1 and 2, C.3. The bare command is the paper's run:

    run="torchrun --standalone --nproc_per_node 4"
    data="--data /data/nuscenes"
    $run finetune.py $data --encoder runs/s2 --task seg --percent 1                # Table 1, 1% FT
    python finetune.py $data --encoder runs/s2 --task depth
    python finetune.py --data nuimages=/data/nuimages --encoder runs/s2 --task seg

OUT is runs/finetune-ENCODER-TASK (-DATASET unless it is nuScenes, -1 for 1 %) unless given. Writes
what probe.py writes, with the encoder's weights, and OUT/best.pth, of the lowest loss on the
validation split. That loss is computed at ends of epochs, about ten times in a long run.
`python eval.py OUT` evaluates last.pth, `python eval.py OUT/best.pth` the other.
"""
import os

import torch
from tqdm import tqdm

from data import Frames, collate, select
from heads import linear_head
from plumbing import training
from plumbing.arguments import POSITIVE, Parser
from plumbing.atomic import save
from plumbing.errors import InputError, one_line_errors
from plumbing.run_folder import Log, Saver, check_finite
from probe import PAPER, TASKS, add_arguments, by_task, fill_in, load_encoder, set_up

# The paper's peak learning rates by task, then dataset (C.3); all else is as for a probe
LR = {"seg": {"nuscenes": {"ViT": 1e-5}, "nuimages": {"ViT": 2e-5}},
      "depth": {"nuscenes": {"ViT": 2e-5}}}


# ---- arguments -----------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add_arguments(parser, {task: PAPER[task] for task in LR}, by_task(LR))
    add("--head-lr", type=POSITIVE,
        help="peak learning rate of the head (default: --lr, the only one that the paper gives)")
    add("--head", choices=("linear", "batchnorm"), default="linear",
        help="a linear layer, or BatchNorm before it (default: %(default)s)")
    args = parser.parse_args(argv)
    paper = {}
    for task, rates in LR.items():
        paper[task] = {name: PAPER[task][name] | {"lr": lr} for name, lr in rates.items()}
    fill_in(args, paper, "finetune")
    return args


# ---- training ------------------------------------------------------------------------------------


class Finetuned(torch.nn.Module):
    """An encoder and the head on it as one module, so that both gradients are averaged at once.

    features: of the task, (encoder, batch) -> [N, D].
    """

    def __init__(self, encoder, head, features, device, precision):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.features = features
        self.device = device
        self.precision = precision

    def forward(self, batch):
        with training.autocast(self.device, self.precision):
            features = self.features(self.encoder, batch)  # [N, D]
        return self.head(features.float())                 # [N, classes or 1]


@torch.no_grad()
def validation_loss(task, model, held_out, workers, device):
    """Mean loss of a `Finetuned` over the items of all processes, weighted by their points."""
    mine = training.in_batches(range(training.rank(), len(held_out), training.world()))
    sums = torch.zeros(2, dtype=torch.double, device=device)
    model.head.eval()
    for batch in training.load(held_out, mine, collate, workers, device):
        batch = training.to_device(batch, device)
        loss, count = task.loss(model(batch), batch)
        sums += torch.tensor([loss * count, count], dtype=torch.double, device=device)
    model.head.train()
    total, count = training.sum_over_processes(sums).tolist()
    return total / max(1, count)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    if args.cameras == "scan":
        raise InputError("--cameras scan: a scan has no image")
    device = training.start(args)
    task = TASKS[args.task]

    # ---- encoder and data ----
    with training.first_process_first():
        encoder, image_size, _, dim = load_encoder(args)
    run = set_up(args, encoder, image_size, {}, validated=True)  # best.pth is chosen by it
    held_out = Frames(select(run.tables, "val"), args.cameras, image_size, target=task.target,
                      seed=args.seed)
    first = run.checkpoint["step"] if run.checkpoint else 0
    total = args.steps or len(run.frames) // args.batch * args.epochs
    batches = training.Batches(len(run.frames), args.batch, first, total, args.seed)
    loader = training.load(run.frames, batches, collate, args.workers, device)

    # ---- model ----
    encoder = encoder.to(device).eval().requires_grad_(True)  # trained in eval(), as in stage 2
    head = linear_head(args.head, dim, len(run.classes) or 1).to(device)
    both = Finetuned(encoder, head, task.features, device, args.precision)
    model = training.distribute(both, device, find_unused_parameters=True)

    # ---- optimizer ----
    head_rate = (args.head_lr or args.lr) / args.lr  # times the encoder's
    groups = [{"params": head.parameters(), "factor": head_rate},
              {"params": encoder.parameters(), "factor": 1.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    warmup = min(round(args.warmup_epochs * batches.per_epoch), total // 10)
    best = float("inf")  # validation loss
    if run.checkpoint:
        head.load_state_dict(run.checkpoint["model"])
        encoder.backbone.load_state_dict(run.checkpoint["encoder_weights"])
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        best = run.checkpoint["best"]

    # ---- loop ----
    validate_every = max(1, total // batches.per_epoch // 10) * batches.per_epoch  # steps
    log = Log(args.out, device, both, run.checkpoint, run.frames.frame_count())
    saver = Saver(args, batches.per_epoch, total)
    bar = tqdm(loader, f"fine-tune {args.task}", initial=first, total=total,
               disable=training.rank() > 0, mininterval=2)
    for step, batch in saver.guard(enumerate(bar, first)):
        lr = training.cosine(step, total, args.lr, args.end_lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        batch = training.to_device(batch, device)
        loss, count = task.loss(model(batch), batch)
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
                task, both, held_out, args.workers, device)
        if done % batches.per_epoch == 0 or done == total:
            log.write(epoch=step // batches.per_epoch + 1, step=done, lr=lr, **values)
        if saver.due(done):
            is_best = values.get("validation_loss", float("inf")) < best
            best = values["validation_loss"] if is_best else best
            content = run.about | {
                "model": head.state_dict(), "dim": dim, "best": best,
                "encoder_weights": encoder.backbone.state_dict(),
                "optimizer": optimizer.state_dict(), "step": done, "total": total,
                "log": log.state(), "args": vars(args)}
            if is_best:
                save(os.path.join(args.out, "best.pth"), content)
            saver.save(content)
    log.report()
    if training.rank() == 0:
        print(f"next: python eval.py {args.out}", flush=True)


if __name__ == "__main__":
    main()

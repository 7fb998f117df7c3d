"""What every script needs and no paper mentions: processes, schedules, batches in order, checkpoints, logs.

There is no hidden state: learning rates, the order of the data and every random draw are functions of (seed, step); a
checkpoint needs no random state and a resumed run is the run that never stopped (on a GPU up to its order of summation).
"""
import atexit
import contextlib
import json
import math
import os
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from checkpoints import read
from errors import InputError

MAY_CHANGE = {"data", "out", "device", "workers", "save_every"}  # arguments that a resumed run may be given anew


def add_arguments(parser, out_required=True):
    """The flags that all training scripts share."""
    add = parser.add_argument
    add("--data", required=True, help="nuScenes root: the folder with samples/ and v1.0-*/")
    add("--version", default="v1.0-trainval", help="version folder of the root (default: %(default)s)")
    add("--out", required=out_required, help="folder for last.pth and log.jsonl; a run found there is resumed")
    add("--limit", type=int, help="use only so many frames, spread evenly (default: all)")
    add("--steps", type=int, help="train for so many steps instead of --epochs, schedule included")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (default: %(default)s)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1),
        help="data-loading processes for each training process (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)")


# ---- processes ----

def start(args):
    """Join the process group if torchrun started us, seed the initial weights; returns the device."""
    for name in ("steps", "limit", "epochs", "batch", "save_every"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    local = int(os.environ.get("LOCAL_RANK", 0))
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{local}" if name == "cuda" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # others wait while the first process builds the index of the data and downloads weights
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
        atexit.register(dist.destroy_process_group)
    torch.manual_seed(args.seed)
    return device


def rank():
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def first_process_first():
    """Run the block in each machine's first process before the others: it builds caches and downloads that they read."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if world() > 1 and not first:
        dist.barrier()
    yield
    if world() > 1 and first:
        dist.barrier()


def sum_over_processes(tensor):
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def share(count, device):
    """What to multiply a process's mean over `count` pairs by, so that averaging over processes is the mean over all."""
    total = sum_over_processes(torch.tensor(float(count), device=device))
    return count * world() / total.clamp(min=1)


def distribute(model, device, **options):
    """`model` with its gradients averaged over the processes; the model itself if there is only one."""
    if world() == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                                     broadcast_buffers=False, **options)


def autocast(device, precision):
    """bf16 on GPUs unless told otherwise. fp16 is not offered: with BatchNorm and small batches it gives NaN."""
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# ---- schedule and batches ----

def cosine(step, total, peak, end=0.0, warmup=0):
    """Learning rate at `step` of `total`: linear from 0 to `peak` in `warmup` steps, then a cosine down to `end`."""
    if step < warmup:
        return peak * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


class Batches:
    """This process's part of the batches of steps `first` .. `last`-1: lists of (epoch, item number).

    Each epoch is a permutation of the items by (seed, epoch), cut into global batches of `batch`; the rest is dropped.
    """

    def __init__(self, items, batch, first, last, seed):
        if batch % world():
            raise InputError(f"--batch {batch}: it is the batch over all {world()} processes, so a multiple of {world()}")
        if items < batch:
            raise InputError(f"--batch {batch}: there are only {items} items to draw from; lower it, or raise --limit")
        self.items, self.batch, self.first, self.last, self.seed = items, batch, first, last, seed
        self.per_epoch = items // batch

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        local, order = self.batch // world(), None
        for step in range(self.first, self.last):
            epoch, place = divmod(step, self.per_epoch)
            if order is None or place == 0:
                generator = torch.Generator().manual_seed(1000003 * self.seed + epoch)
                order = torch.randperm(self.items, generator=generator).tolist()
            begin = place * self.batch + rank() * local
            yield [(epoch, number) for number in order[begin:begin + local]]


def load(dataset, batches, collate, workers, device):
    """A DataLoader over `batches`; `batches` may be any iterable of lists of (epoch, item number)."""
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                      pin_memory=device.type == "cuda")


def to_device(batch, device):
    """Tensors of a batch on the device; images become float in [0, 1] there, so that they travel as bytes."""
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if "image" in batch:
        batch["image"] = batch["image"].float() / 255
    return batch


# ---- checkpoints and logs ----

def save(path, content):
    """Write a checkpoint in the first process, all of it or nothing: to a temporary file, then renamed."""
    if rank() == 0:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)


def find_last(args):
    """The checkpoint of an unfinished or finished run in --out, or None. Raises InputError if it was another run."""
    path = Path(args.out, "last.pth")
    there = [path.is_file()] * world()
    if world() > 1:
        dist.all_gather_object(there, path.is_file())
    if len(set(there)) > 1:
        raise InputError(f"--out {args.out}: some processes see its last.pth and some do not; all nodes must share the folder")
    if not path.is_file():
        return None
    try:
        checkpoint = read(path)
        before = checkpoint["args"]
    except (InputError, KeyError, TypeError):
        raise InputError(f"{path}: not a checkpoint, or damaged; delete it or choose another --out") from None
    now = vars(args)
    # A flag that was not given may be missing: the run may be from before there was such a flag
    changed = sorted(k for k in now.keys() | before.keys()
                     if k not in MAY_CHANGE and (now.get(k) or None) != (before.get(k) or None))
    if changed:
        raise InputError(f"--out {args.out} holds a run with other arguments ("
                         + ", ".join(f"--{k.replace('_', '-')} {before.get(k)}, now {now.get(k)}" for k in changed)
                         + "); repeat them to resume it, or choose another --out")
    if rank() == 0:
        print(f"{args.out}: going on from step {checkpoint['step']}", flush=True)
    return checkpoint


class Log:
    """One JSON line an epoch in log.jsonl (first process only): mean loss, and what the paper's Table L tells of a run."""

    def __init__(self, out, device, model):
        self.path, self.device, self.model = Path(out, "log.jsonl"), device, model
        self.total, self.count, self.time = torch.zeros((), device=device), 0, time.time()

    def add(self, loss):
        self.total += loss.detach().float()
        self.count += 1

    def mean(self):
        """Mean loss of this process since the epoch began. Raises FloatingPointError where it is not finite."""
        mean = self.total.item() / max(1, self.count)
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean}; last.pth in {self.path.parent} is from before. "
                                     "Try --precision fp32 or a lower --lr")
        return mean

    def write(self, **values):
        """Write the line and begin the next epoch."""
        loss = sum_over_processes(torch.tensor(self.mean(), device=self.device)).item() / world()
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        values |= {"loss": loss, "seconds": round(time.time() - self.time, 1), "processes": world(),
                   "trainable_parameters": trained, "memory_gb": round(peak_memory(self.device) / 2**30, 2)}
        if rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")
        self.__init__(self.path.parent, self.device, self.model)

    def report(self):
        """Print the whole run's row of Table L, resumed parts included (first process)."""
        if rank() == 0 and self.path.is_file():
            lines = [json.loads(line) for line in self.path.read_text().splitlines()]
            hours = sum(line["seconds"] * line["processes"] for line in lines) / 3600
            name = "GPU" if self.device.type == "cuda" else "process"
            print(f"{self.path.parent}: {lines[-1]['trainable_parameters'] / 1e6:.1f} M trainable parameters, "
                  f"{max(line['memory_gb'] for line in lines):.1f} GB per {name}, {hours:.2f} {name}-hours", flush=True)


def peak_memory(device):
    """Bytes at most so far: allocated on the GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""What every script needs and no paper mentions: processes, schedules, batches in order.

Checkpoints and logs are in plumbing/run_folder.py. There is no hidden state: learning rates, the
order of the data and every random draw are functions of (seed, step). So a checkpoint needs no
random state, and a resumed run is the run that never stopped (on a GPU up to its order of
summation).
"""
import atexit
import contextlib
import math
import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from plumbing.arguments import COUNT, RATE, SEED, WORKERS
from plumbing.endings import Loader, allow_open_files, obey_second_signal
from plumbing.errors import InputError


def add_arguments(parser, out_required=True, versions=None):
    """The flags that all training scripts share; versions: "+" where several can be given."""
    add = parser.add_argument
    # data and folder
    add("--data", required=True,
        help="NAME=PATH, several with commas between; NAME is a file of readers/ (a bare path: "
             "nuscenes)")
    add("--version", nargs=versions,
        help="version folder of nuScenes or nuImages (default: v1.0-trainval; v1.0-train and "
             "v1.0-val)")
    add("--out", required=out_required,
        help="folder for last.pth and log.jsonl; a run found there is resumed")
    add("--val-scenes", nargs="+", metavar="[DATASET:]NAME",
        help="these scenes validate, all others of their dataset train (default: the dataset's "
             "own split)")
    add("--limit", type=COUNT, help="use only so many frames, spread evenly (default: all)")
    # length, interruptions and faults
    add("--steps", type=COUNT,
        help="train for so many steps instead of --epochs, schedule included")
    add("--restart", action="store_true",
        help="where --out holds a run with other arguments, set its files aside and begin anew")
    add("--save-every", type=RATE, default=10, metavar="MINUTES",
        help="between checkpoints; each epoch's end writes one too (default: %(default)s)")
    add("--on-bad-frame", choices=("stop", "skip"), default="stop",
        help="a damaged scan, image or calibration: stop and name it, or skip it: the next frame "
             "takes its place, log.jsonl names it, more than 1 %% stop the run "
             "(default: %(default)s)")
    # machine
    add("--workers", type=WORKERS, default=min(8, os.cpu_count() or 1),
        help="data-loading processes for each training process (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--seed", type=SEED, default=0,
        help="of weights, order and augmentation (default: %(default)s)")


# ---- processes ----------------------------------------------------------------------------------

def start(args):
    """Join the process group if torchrun started us and seed the initial weights.

    Returns the device. Raises InputError if it cannot be used.
    """
    obey_second_signal()
    allow_open_files()

    # The device, which is tried with one number
    local = int(os.environ.get("LOCAL_RANK", 0))
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{local}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)

    # The group. The first process may index the data and download weights while the others wait
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
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
    """Run the block in each machine's first process before the others.

    It builds the caches and downloads the files that the others read.
    """
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if world() > 1 and not first:
        dist.barrier()
    yield
    if world() > 1 and first:
        dist.barrier()


def by_first_process(function):
    """What `function` gives in the first process, told to all; so is an InputError that it raises.

    For what depends on files, which may change between one process's look and another's.
    """
    if world() == 1:
        return function()
    result, message = None, None
    if rank() == 0:
        try:
            result = function()
        except InputError as error:
            message = str(error)
    told = [result, message]
    dist.broadcast_object_list(told)
    result, message = told
    if message is not None:
        raise InputError(message)
    return result


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, in place. All processes must call it."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows):
    """The rows [n, ...] of all processes, the first one's first; n may differ. All must call it."""
    if world() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    # All send as many rows as the longest has
    padded = rows.new_zeros(max(map(int, counts)), *rows.shape[1:])
    padded[:len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    return torch.cat([part[:int(count)] for part, count in zip(everyone, counts)])


def share(count, device):
    """The factor, a scalar tensor, with which a process's mean over `count` pairs enters DDP.

    DDP averages over the processes, which hold different numbers of pairs. Each one's mean times
    this factor makes that average the mean over all pairs. All processes must call it.
    """
    total = sum_over_processes(torch.tensor(float(count), device=device))
    return count * world() / total.clamp(min=1)


def distribute(model, device, **options):
    """`model` with its gradients averaged over the processes; unchanged if there is only one."""
    if world() == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=devices,
                                                     broadcast_buffers=False, **options)


def autocast(device, precision):
    """Mixed precision in a `with` block. precision: "bf16", "fp32" or None (bf16 on a GPU only).

    fp16 is not offered: with BatchNorm and small batches it gives NaN.
    """
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# ---- schedule and batches -----------------------------------------------------------------------

def cosine(step, total, peak, end=0.0, warmup=0):
    """Learning rate at `step` of `total`.

    Linear from 0 to `peak` in `warmup` steps, then a cosine down to `end`.
    """
    if step < warmup:
        return peak * step / warmup
    # Half a turn of the cosine over the steps after the warm-up
    angle = math.pi * (step - warmup) / max(1, total - warmup)
    return end + (peak - end) * (1 + math.cos(angle)) / 2


def reciprocal_sqrt(step, total, peak):
    """Learning rate at `step` of `total` in ScaLR+'s run of 65 epochs, whatever its length here.

    Linear from 0 to `peak` in 1/65 of the run, then `peak` / sqrt(1 + t / T) after t steps more, T
    being 0.45/65 of the run; over its last 2/65 linear to 0. It has no jump, where ScaLR+'s
    begins to fall from a rate 0.8 % lower.
    """
    epoch = total / 65
    if step < epoch:
        return peak * step / epoch
    fall = total - 2 * epoch
    rate = peak / math.sqrt(1 + (min(step, fall) - epoch) / (0.45 * epoch))
    return rate * min(1, (total - step) / (2 * epoch))


def draws(keys, seed, count):
    """Numbers in [0, 1) [count, B] of a batch's items of these keys (epoch, number).

    They are functions of (seed, epoch, number), in whichever process and after whatever stop.
    """
    columns = [np.random.default_rng((seed, *key, 1)).random(count) for key in keys]
    return torch.from_numpy(np.array(columns, np.float32).T)


class Batches:
    """This process's part of the batches of steps `first` .. `last`-1: lists of (epoch, number).

    Each epoch is a permutation of the item numbers by (seed, epoch), cut into global batches of
    `batch`; the rest is dropped. Raises InputError where no such batch can be cut.
    """

    def __init__(self, items, batch, first, last, seed):
        if batch % world():
            raise InputError(f"--batch {batch}: it is the batch over all {world()} processes, "
                             f"so a multiple of {world()}")
        if items < batch:
            raise InputError(f"--batch {batch}: there are only {items} items to draw from; "
                             "lower it, or take more frames")
        self.items = items
        self.batch = batch
        self.first = first
        self.last = last
        self.seed = seed
        self.per_epoch = items // batch
        self.order = (None, [])  # the epoch that was drawn last, and its permutation

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        return map(self.of, range(self.first, self.last))

    def of(self, step):
        """This process's part of one step's batch."""
        # The epoch's order, drawn when its first step is asked for
        epoch, place = divmod(step, self.per_epoch)
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed((1000003 * self.seed + epoch) % 2**63)
            self.order = epoch, torch.randperm(self.items, generator=generator).tolist()
        # Of the global batch each process has as many, in the order of ranks
        local = self.batch // world()
        begin = place * self.batch + rank() * local
        return [(epoch, number) for number in self.order[1][begin:begin + local]]


def in_batches(numbers, batch=16):
    """Keys of the items of these numbers, in batches: for a pass over a dataset."""
    batches = []
    for start in range(0, len(numbers), batch):
        batches.append([(0, number) for number in numbers[start:start + batch]])
    return batches


def load(dataset, batches, collate, workers, device):
    """A DataLoader over `batches`, any iterable of lists of (epoch, item number)."""
    return Loader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                  pin_memory=device.type == "cuda")


def to_device(batch, device):
    """Move a batch's tensors to the device.

    Images travel as bytes and become floats in [0, 1] there.
    """
    moved = {}
    for name, value in batch.items():
        if isinstance(value, dict):
            value = to_device(value, device)
        moved[name] = value.to(device, non_blocking=True) if torch.is_tensor(value) else value
    for name in moved.keys() & {"image", "local"}:  # local: small crops (s3pt/crops.py)
        moved[name] = moved[name].float() / 255
    return moved

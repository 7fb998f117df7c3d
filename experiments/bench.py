"""Time and memory of the implementation, against its slow, obvious twin in experiments/plain.py.

    # on a keyframe that it makes; on a real one
    python -m experiments.bench
    python -m experiments.bench --data /data/nuscenes --version v1.0-mini --out runs/bench.md

Both formulations work on the same tensors and weights and take turns. "times faster" is the median
and the range of the ratios of two neighbours in time. Memory is the peak above what was resident
before (on a GPU: allocated). Forward is timed as in stage 2, backward as in stage 1; the learning
rate is 0.

Differences are relative to their tensor's largest entry. They are taken in float32 and in eval(),
as padding enters BatchNorm in train(). They are rounding, as tests/test_bench.py shows in float64.
A ReLU's input that is 0 to rounding may fall on either side; that alone changes gradients by up to
1e-2.

Where the plain formulation needs more memory than the GPU has, its cells say so and ours is
measured alone.

On a CPU the bare command takes one view and 6 of the 48 layers. The embedding costs the same at any
depth. --depth 48 has all layers and needs 17 GB at width 768. Most of the plain time on a CPU goes
into getting tensors of more than 32 MB anew from the system. Both formulations keep their memory
with MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184 in the environment.
"""
import contextlib
import ctypes
import functools
import gc
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch

import models
from data import Frames, collate, set_sampling
from experiments.workloads import item_cases, step_cases, waffleiron_cases
from plumbing import training
from plumbing.arguments import COUNT, Distinct, Parser, whole
from plumbing.atomic import write_text
from plumbing.errors import one_line_errors
from readers import files
from readers.table import open_tables
from waffleiron import prepare

FEW = 6   # layers, two on each plane: what a CPU is measured with, where all 48 take minutes
# What stages 1 and 2 learn from, in views and in words. The epochs are the paper's (Sec. 4.1), the
# frames are nuScenes' (`python -m readers.nuscenes` counts them).
RUNS = ((49 * 20_000, "49 epochs of about 20,000 clear frames, one camera each"),
        (6 * 28_130, "one epoch of 28,130 frames, six cameras each"))


# ---- measuring ----------------------------------------------------------------------------------

def seconds(function, device):
    """The time that `function` takes [s]."""
    clock = time.perf_counter
    if device.type == "cpu" and torch.get_num_threads() == 1:
        clock = time.process_time   # the same, but for other jobs on the machine
    begin = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def peak_bytes(function, device):
    """The peak of memory while `function` runs, above what was there before [bytes].

    None where that cannot be had: on a CPU without Linux' /proc.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        ctypes.CDLL(None).malloc_trim(0)                # else freed memory may count as resident
        Path("/proc/self/clear_refs").write_text("5")   # the peak is what is resident now
    else:
        return None
    before = _peak(device)
    function()
    return _peak(device) - before


def _peak(device):
    """The peak so far [bytes]."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line for line in status if line.startswith("VmHWM")).split()[1]
    return 1024 * int(kilobytes)


def difference(plain, ours):
    """Largest difference of two lists of tensors, each relative to its largest entry.

    None for empty lists.
    """
    differences = []
    for a, b in zip(plain, ours, strict=True):
        largest = max(a.abs().max().item(), 1e-30)
        differences.append((a.double() - b.double()).abs().max().item() / largest)
    return max(differences, default=None)


def repeat(runs, device, repeats):
    """Times [s] of the functions `runs`, which take turns: a list of lists, one a repetition.

    There are at least `repeats` repetitions, and they take at least `repeats` seconds.
    """
    times = []
    while len(times) < repeats or np.sum(times) < repeats:
        times.append([seconds(run, device) for run in runs])
    return times


class PlainOutOfMemory(Exception):
    """The plain formulation needs more memory than the GPU has."""


def run_case(case, plain, precision):
    """A `Case` in one formulation. Raises PlainOutOfMemory where the plain one has no memory."""
    try:
        return case.run(plain, precision)
    except torch.cuda.OutOfMemoryError:
        if not plain:
            raise
        raise PlainOutOfMemory from None


def unless_out_of_memory(function):
    """What `function` gives; None where it raises PlainOutOfMemory, with the memory free again."""
    with contextlib.suppress(PlainOutOfMemory):
        return function()
    # Here, and not where the error is caught: until it is gone it holds what the run held
    gc.collect()
    torch.cuda.empty_cache()
    return None


def compare(case):
    """The differences of the outputs and of the gradients of both formulations, in float32."""
    outputs, gradients = [], []
    for plain in (True, False):
        case.learner.eval().zero_grad()
        outputs.append([out.detach().clone() for out in run_case(case, plain, "fp32")])
        gradients.append([p.grad for p in case.learner.parameters() if p.grad is not None])
    return [difference(*outputs), difference(*gradients)]


def measure(case, precision, repeats):
    """Run a `Case` of workloads.py: a row of the table.

    Returns: a dict of name; differ, the differences of outputs and of gradients; times [s] and
    peaks [bytes], in pairs of (plain, ours). None stands for what the plain formulation has no
    memory for.
    """
    differ = unless_out_of_memory(lambda: compare(case))
    cold = differ is None or precision != "fp32"   # else the comparison was the warm-up

    # Measure, in the precision asked for.
    case.learner.train(case.train).zero_grad()
    plain, ours = (functools.partial(run_case, case, plain, precision) for plain in (True, False))

    def measured(runs, warm_up):
        for run in runs if warm_up else ():
            run()
        times = repeat(runs, case.device, repeats)
        return times, [peak_bytes(run, case.device) for run in runs]

    found = unless_out_of_memory(lambda: measured([plain, ours], cold))
    if found is None:
        case.learner.zero_grad()
        times, peaks = measured([ours], warm_up=True)
        found = [(None, *of_ours) for of_ours in times], [None, *peaks]
    case.learner.eval().zero_grad()
    times, peaks = found
    return {"name": case.name, "differ": differ or [None, None], "times": times, "peaks": peaks}


# ---- tables -------------------------------------------------------------------------------------

HEADER = ("| | time, plain | here | times faster (range) | memory, plain | here | part "
          "| outputs differ | gradients differ |")


def faster(times):
    """Median and range of the ratios of times, a list of (plain, ours)."""
    ratios = [plain / ours for plain, ours in times]
    return f"{median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})"


def table(rows):
    """Markdown of the rows of `measure`; "plain" is the formulation of plain.py."""
    lines = [HEADER, "|---|" + "---:|" * 8]
    for row in rows:
        plain, ours = zip(*row["times"])
        fits = None not in plain   # else the plain formulation was out of memory
        cells = [f"{median(plain) * 1e3:,.0f} ms" if fits else "out of memory",
                 f"{median(ours) * 1e3:,.0f} ms", faster(row["times"]) if fits else "-"]
        plain, ours = row["peaks"]
        if ours is None:
            cells += ["not run"] * 3
        else:
            cells += [f"{plain / 2**20:,.0f} MB" if fits else "out of memory",
                      f"{ours / 2**20:,.0f} MB", f"{ours / max(plain, 1):.2f}" if fits else "-"]
        cells += ["-" if value is None else f"{value:.0e}" for value in row["differ"]]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def whole_run(row, batch, views, words):
    """A row of `measure` in words: the time of a view, and of a run of so many, steps alone."""
    view_s = median(ours for _, ours in row["times"]) / batch
    return (f"{row['name']}, here: {view_s * 1e3:,.1f} ms a view, "
            f"so {view_s * views / 3600:,.1f} hours of steps for {words}.")


def hardware(device):
    """One line: GPU, processor, PyTorch, threads."""
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    return (f"{gpu}{processor}, {os.cpu_count()} cores; "
            f"PyTorch {torch.__version__}, threads: {torch.get_num_threads()}.")


# ---- beside the table ---------------------------------------------------------------------------

def check_cost(frames, repeats):
    """What the checks of its files cost a data item, in words: timed within items of frame 0."""
    spent = []
    device = torch.device("cpu")

    def timed(check):
        def run(*arguments):
            found = []   # `seconds` drops what a function returns
            spent.append(seconds(lambda: found.append(check(*arguments)), device))
            return found[0]
        return run

    views = range(len(frames.tables[0].cameras))
    both = {"plausible": timed(files.plausible), "stretches": timed(files.stretches)}
    with mock.patch.multiple(files, **both):
        times = repeat([lambda: [frames[0, view] for view in views]], device, repeats)

    def item_ms(seconds_spent):
        """Median over the repetitions, an item's [ms]."""
        repetitions = np.reshape(seconds_spent, (len(times), -1)).sum(1)
        return median(repetitions) / len(views) * 1e3

    checks, items = item_ms(spent), item_ms(times)
    return (f"Checks of the scan and the image of a data item: {checks:.2f} of {items:.1f} ms, "
            f"{checks / items:.1%}.")


def loader_rate(frames, batch, workers):
    """Views/s of a DataLoader with so many processes, after one batch of each.

    The files are in the system's memory by then.
    """
    batches = []
    for i in range(20 * workers):
        batches.append([(i, (i * batch + n) % len(frames)) for n in range(batch)])
    loader = training.load(frames, batches, collate, workers, torch.device("cpu"))
    for number, _ in enumerate(loader, 1):
        if number == workers:
            begin = time.perf_counter()
    return 19 * workers * batch / (time.perf_counter() - begin)


def linear_cost(items, samplings, args, device):
    """Markdown: what our forward and backward cost, for each number of points in args.points.

    Of the first width. The points come in whole views, but for the last view, which is cut to fit.
    """
    channels = args.widths[0]
    # A few layers do. All cost the same, and 48 of width 768 need some 60 GB for 30,000 points.
    lines = [f"| WI-{FEW}-{channels}, forward + backward, here | views | time | a point (range) |",
             "|---|---:|---:|---:|"]
    points_of_items = sum(len(item["inputs"]["points"]) for item in items)
    views = collate(items * (1 + max(args.points) // points_of_items))
    for count in args.points:
        # A neighbour beyond the cut becomes the last point: it costs the same.
        inputs = {name: values[:count] for name, values in views["inputs"].items()}
        inputs["neighbors"] = inputs["neighbors"].clamp(max=count - 1)
        batch = {"inputs": inputs, "view": views["view"][:count]}
        batch = training.to_device(batch, device)
        cases, _ = waffleiron_cases(channels, FEW, channels, batch, samplings, device)
        run = functools.partial(cases[1].run, False, args.precision)
        run()   # warm-up: the first run of a size takes up to twice as long
        times = np.concatenate(repeat([run], device, 1))
        low, middle, high = np.quantile(times, (0, 0.5, 1)) / count * 1e6
        a_point = f"{middle:,.0f} ({low:,.0f}–{high:,.0f}) µs"
        lines.append(f"| {count:,} points | {batch['view'][-1] + 1} "
                     f"| {median(times) * 1e3:,.0f} ms | {a_point} |")
    return "\n".join(lines)


# ---- command line -------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__, prog="python -m experiments.bench")
    add = parser.add_argument
    add("--data",
        help="NAME=PATH, several with commas between; NAME is a file of readers/ (a bare path: "
             "nuscenes); items and steps are of the first one's first frame (default: a keyframe "
             "of nuScenes' size is made in runs/bench-world)")
    add("--version", help="version folder of nuScenes (default: v1.0-trainval)")
    add("--widths", type=COUNT, nargs="+", action=Distinct, default=[256, 768],
        help="of WaffleIron; the steps take the last one (default: 256 768)")
    add("--depth", type=COUNT, help=f"layers of WaffleIron (default: 48 on a GPU, else {FEW})")
    add("--batch", type=COUNT, help="camera views in a step (default: 8 on a GPU, else 1)")
    add("--encoder", help="image encoder, with random weights "
                          "(default: dinov2_vitl14 on a GPU, else vit_small14)")
    add("--points", type=COUNT, nargs="+", action=Distinct, default=[1000, 3000, 10000, 30000],
        help="of the linear cost (default: 1000 3000 10000 30000)")
    add("--repeats", type=COUNT, default=3,
        help="of each row at least, more where they take fewer seconds (default: %(default)s)")
    add("--workers", type=whole(1, 1024),
        help="processes of the loader (default: all cores beside a GPU; else it is not run)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--out", help="the tables go to this file too")
    parser.set_defaults(seed=0)
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    start = time.time()
    image_size = models.IMAGE_SIZE
    device = training.start(args)
    defaults = {"depth": (FEW, 48), "batch": (1, 8), "encoder": ("vit_small14", "dinov2_vitl14"),
                "precision": ("fp32", "bf16"), "workers": (None, os.cpu_count())}
    for name, values in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, values[device.type == "cuda"])
    torch.backends.cudnn.allow_tf32 = False   # differences are to be those of float32

    # ---- data ----
    if not args.data:
        from miniature.world import make_world
        args.data = make_world("runs/bench-world", seed=0, train=(1, 0, 0), val=0, frames=1,
                               image_size=(900, 1600), azimuths=1080, lidar_fov=360, cameras=6,
                               workers=1)
    tables = open_tables(str(args.data), args.version)
    samplings = set_sampling(tables)
    encoder = models.load_image_encoder(args.encoder, "random").to(device)
    encoder.check_size(image_size)
    frames = Frames(tables, "all", image_size, prepare)
    items = [frames[0, number] for number in range(len(tables[0].cameras))]

    def batch_of(count):
        chosen = [items[n % len(items)] for n in range(count)]
        return training.to_device(collate(chosen), device)

    one, batch = batch_of(1), batch_of(args.batch)
    batch["pixels"] = batch["pixels"].floor()   # an up-sampled map has whole pixels

    # ---- measurements ----
    cases, note = item_cases(frames)
    checks = check_cost(frames, args.repeats)
    for channels in args.widths:
        more, model = waffleiron_cases(channels, args.depth, encoder.dim, one, samplings, device)
        cases += more
    cases += step_cases(encoder, model, batch, image_size, device)
    rows = []
    for case in cases:
        rows.append(measure(case, args.precision, args.repeats))
        print(f"{time.time() - start:4.0f} s:", table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    linear = linear_cost(items, samplings, args, device)
    loader = "not run"
    if args.workers:
        rate = loader_rate(frames, args.batch, args.workers)
        loader = f"{rate:.0f} views/s, {args.workers} processes"

    # ---- tables ----
    parts = [hardware(device), table(rows), note, checks, linear]
    steps = rows[-3:-1]   # of the three rows of step_cases
    for row, (views, words) in zip(steps, RUNS):
        parts.append(whole_run(row, args.batch, views, words))
    parts.append(f"Precision: {args.precision}. Loader: {loader}. "
                 f"At least {args.repeats} repetitions and {args.repeats} s of each row; "
                 f"{time.time() - start:.0f} s in all.")
    text = "\n\n".join(parts)
    print(text)
    if args.out:
        write_text(args.out, text + "\n")


if __name__ == "__main__":
    main()

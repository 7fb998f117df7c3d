"""Collaborative distillation in miniature: all scripts in a row, offline, on a CPU, in minutes.

    python demo.py                  # one world, seed 1
    python demo.py --seeds 1 2 3    # three worlds, mean and spread: the table of docs/results.md
    python demo.py --pretrain       # train the stand-in image encoder instead of taking it

Each command is printed before it runs, so that it can be run by hand. Started again, the demo skips
the steps that have finished. It writes runs/demo/results.json, runs/demo/overview.png and, for each
seed, all its runs under runs/demo/seed-N.
"""
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from plumbing.arguments import SEED, Distinct, Parser
from plumbing.atomic import write_json
from plumbing.errors import one_line_errors

ROOT = Path(__file__).resolve().parent

# The scripts' defaults are the paper's run. These flags are what differs from it, for a world of
# 80 x 160 pixels and some 1 400 frames.
STAGE1 = "--channels 64 --depth 4 --fov 48 48 8 --cell 1 --voxel 0.4 --neighbors 6 --epochs 4"
STAGE2 = "--batch 16 --lr 4e-3 --epochs 4"
PROBE = "--head whitened --cache --limit 400 --batch 8 --warmup-epochs 0 --end-lr 0"
PROBES = {
    "seg": f"{PROBE} --lr 1e-2 --epochs 8",
    "seg3d": f"{PROBE} --cameras all --lr 1e-2 --epochs 8",
    "depth": f"{PROBE} --lr 1e-1 --epochs 10",
}

PROBED = (("seg", "base"), ("seg", "cd"), ("seg3d", "3d"), ("depth", "base"), ("depth", "cd"))
NAMES = {"base": "image encoder as it was", "cd": "image encoder after CD",
         "3d": "3D encoder after stage 1"}
COLUMNS = ("full", "day-clear", "day-rain", "night")


# ---- runs ----------------------------------------------------------------------------------------

def run(command):
    """Print a Python command line and run it in the repository's root.

    If the command fails, this process ends with its exit code. SIGINT and SIGTERM go on to the
    command, which may have something to save, and this process ends after it.
    """
    print(f"\n$ python {command}", flush=True)
    child = subprocess.Popen([sys.executable, *shlex.split(command)], cwd=ROOT)
    passed_on = []

    def pass_on(number, _):
        passed_on.append(number)
        child.send_signal(number)
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if passed_on:
        code = 128 + passed_on[0]
    if code:
        sys.exit(code if code > 0 else 128 - code)


def one_world(seed, encoder, out):
    """All scripts on the world of one seed. Returns {encoder: {metric: {column: value}}}."""
    world = f"data/world-{seed}"
    runs = shlex.quote(f"{out}/seed-{seed}")  # in a command
    common = f"--data {world} --seed {seed} --workers 0"
    encoder = shlex.quote(encoder)
    run(f"miniature/world.py --out {world} --seed {seed}")

    # The two stages
    run(f"stage1.py {common} --encoder {encoder} --out {runs}/stage1 {STAGE1}")
    run(f"stage2.py {common} --stage1 {runs}/stage1 --out {runs}/stage2 {STAGE2}")

    # Linear probes, before and after
    encoders = {"base": encoder, "cd": f"{runs}/stage2", "3d": f"{runs}/stage1"}
    probes = [f"{runs}/{task}-{name}" for task, name in PROBED]
    for (task, name), probe in zip(PROBED, probes):
        run(f"probe.py {common} --encoder {encoders[name]} --task {task} --out {probe} "
            f"{PROBES[task]}")

    # The table and the picture
    run(f"eval.py {' '.join(probes)} --out {runs}/table --workers 0")
    run(f"miniature/overview.py {runs}/seg-base {runs}/seg-cd --out {runs}/overview.png")
    written = json.loads(Path(out, f"seed-{seed}", "table.json").read_text())
    results = {}
    for (task, name), result in zip(PROBED, written):
        metric = "RMSE" if task == "depth" else "mIoU"
        results.setdefault(name, {})[metric] = result[metric]
    return results


# ---- the table -----------------------------------------------------------------------------------

def mean_and_spread(values, digits, sign=""):
    """A table's cell: the mean and, of several values, their standard deviation.

    sign: "+" writes the sign of a positive mean too.
    """
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def summary(results):
    """Markdown table of {seed: results}: means over the seeds, and spreads if there are several."""
    lines = ["| linear probe | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]

    def add(label, rows, digits, sign=""):
        """Add a line, of one {column: value} for each seed."""
        cells = []
        for column in COLUMNS:
            cells.append(mean_and_spread([row[column] for row in rows], digits, sign))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    for metric, unit, digits in (("mIoU", "%", 1), ("RMSE", "m", 2)):
        rows = {}
        for name in NAMES:
            if all(metric in result[name] for result in results.values()):
                rows[name] = [result[name][metric] for result in results.values()]
                add(f"{metric} [{unit}], {NAMES[name]}", rows[name], digits)
        gains = []
        for before, after in zip(rows["base"], rows["cd"]):
            gains.append({column: after[column] - before[column] for column in COLUMNS})
        add(f"{metric}, change by CD", gains, digits, "+")
    return "\n".join(lines)


@one_line_errors
def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=SEED, nargs="+", action=Distinct, default=[1],
        help="worlds and trainings (default: 1)")
    add("--out", default="runs/demo", help="folder of runs and results (default: %(default)s)")
    add("--pretrain", action="store_true",
        help="train the stand-in encoder anew, into OUT/encoder.pth")
    args = parser.parse_args()
    os.chdir(ROOT)
    begin = time.time()

    encoder = "miniature/encoder.pth"
    if args.pretrain:
        encoder = f"{args.out}/encoder.pth"
        if not Path(encoder).exists():
            run("miniature/world.py --out data/pretrain --seed 1000 --train 700 0 0 --val 0 "
                "--frames 3")
            run(f"miniature/pretrain.py --data data/pretrain --out {shlex.quote(encoder)}")

    results = {seed: one_world(seed, encoder, args.out) for seed in args.seeds}
    table = summary(results)
    out = Path(args.out)
    picture = out / f"seed-{args.seeds[0]}" / "overview.png"
    (out / "overview.png").write_bytes(picture.read_bytes())
    write_json(out / "results.json", {"seeds": results, "table": table})
    print(f"\n{table}\n\nwritten: {out}/results.json, {out}/overview.png, "
          f"in {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()

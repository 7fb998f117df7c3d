"""Collaborative distillation in miniature: every script, one after the other, offline, on a CPU, in a few minutes.

    python demo.py                          # one world, seed 1
    python demo.py --seeds 1 2 3            # three worlds, mean and spread: README's table
    python demo.py --pretrain               # train the stand-in image encoder anew instead of taking the shipped one

Each command is printed before it runs, so that it can be run by hand. Started again, finished steps are skipped. Writes
runs/demo/results.json, runs/demo/overview.png and, for each seed, all runs under runs/demo/seed-N.
"""
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from plumbing.arguments import SEED, Distinct, Parser
from errors import one_line_errors
from run_folder import write_json

# What differs from the paper's run, which is the scripts' default: a world of 80 x 160 pixels and some 1 400 frames.
STAGE1 = "--channels 64 --depth 4 --fov 48 48 8 --cell 1 --voxel 0.4 --neighbors 6 --epochs 4"
STAGE2 = "--batch 16 --lr 4e-3 --epochs 4"
PROBE = "--head whitened --cache --limit 400 --batch 8 --warmup 0 --end-lr 0"
PROBES = {"seg": f"{PROBE} --lr 1e-2 --epochs 8", "seg3d": f"{PROBE} --cameras all --lr 1e-2 --epochs 8",
          "depth": f"{PROBE} --lr 1e-1 --epochs 10"}
COLUMNS = ("full", "day-clear", "day-rain", "night")


def run(command):
    """Print a command line and run it; stop the demo with its exit code if it fails."""
    print(f"\n$ python {command}", flush=True)
    code = subprocess.run([sys.executable, *shlex.split(command)]).returncode
    if code:
        sys.exit(code)


def one_world(seed, encoder, out):
    """All scripts on the world of one seed. Returns {row: {metric: {column: value}}}."""
    world, runs = f"data/world-{seed}", f"{out}/seed-{seed}"
    run(f"miniature/world.py --out {world} --seed {seed}")
    common = f"--data {world} --seed {seed} --workers 0"
    run(f"stage1.py {common} --encoder {encoder} --out {runs}/stage1 {STAGE1}")
    run(f"stage2.py {common} --stage1 {runs}/stage1 --out {runs}/stage2 {STAGE2}")
    probes = {"base": encoder, "cd": f"{runs}/stage2", "3d": f"{runs}/stage1"}
    tasks = [("seg", "base"), ("seg", "cd"), ("seg3d", "3d"), ("depth", "base"), ("depth", "cd")]
    for task, name in tasks:
        run(f"probe.py {common} --encoder {probes[name]} --task {task} --out {runs}/{task}-{name} {PROBES[task]}")
    run(f"eval.py {' '.join(f'{runs}/{task}-{name}' for task, name in tasks)} --out {runs}/table --workers 0")
    run(f"miniature/overview.py {runs}/seg-base {runs}/seg-cd --out {runs}/overview.png")
    results = {}
    for (task, name), result in zip(tasks, json.loads(Path(runs, "table.json").read_text())):
        metric = "RMSE" if task == "depth" else "mIoU"
        results.setdefault(name, {})[metric] = result[metric]
    return results


def summary(results):
    """Markdown table of {seed: results}: mean, and with several seeds the standard deviation over them."""
    def cell(values, digits, sign=""):
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{sign}.{digits}f}{spread}"

    names = {"base": "image encoder as it was", "cd": "image encoder after CD", "3d": "3D encoder after stage 1"}
    lines = ["| linear probe | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for metric, unit, digits in (("mIoU", "%", 1), ("RMSE", "m", 2)):
        rows = {name: [r[name][metric] for r in results.values()] for name in names
                if all(metric in r[name] for r in results.values())}
        for name, values in rows.items():
            lines.append(f"| {metric} [{unit}], {names[name]} | "
                         + " | ".join(cell([v[c] for v in values], digits) for c in COLUMNS) + " |")
        gains = [{c: cd[c] - base[c] for c in COLUMNS} for base, cd in zip(rows["base"], rows["cd"])]
        lines.append(f"| {metric}, change by CD | " + " | ".join(cell([g[c] for g in gains], digits, "+") for c in COLUMNS) + " |")
    return "\n".join(lines)


@one_line_errors
def main():
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=SEED, nargs="+", action=Distinct, default=[1], help="worlds and trainings (default: 1)")
    parser.add_argument("--out", default="runs/demo", help="(default: %(default)s)")
    parser.add_argument("--pretrain", action="store_true", help="train the stand-in encoder anew, into OUT/encoder.pth")
    args = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent)
    begin, encoder = time.time(), "miniature/encoder.pth"
    if args.pretrain:
        encoder = f"{args.out}/encoder.pth"
        if not Path(encoder).exists():
            run("miniature/world.py --out data/pretrain --seed 1000 --train 700 0 0 --val 0 --frames 3")
            run(f"miniature/pretrain.py --data data/pretrain --out {encoder}")
    results = {seed: one_world(seed, encoder, args.out) for seed in args.seeds}
    out = Path(args.out)
    (out / "overview.png").write_bytes((out / f"seed-{args.seeds[0]}" / "overview.png").read_bytes())
    write_json(out / "results.json", {"seeds": results, "table": summary(results)})
    print(f"\n{summary(results)}\n\nwritten: {out}/results.json, {out}/overview.png, in {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()

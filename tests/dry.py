"""experiments/real.py whose commands are recorded and not run."""
import json
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import eval as evaluation
import probe
import stage1
import stage2
from experiments import (ablations, clean_twin, corruptions, distance, probes, real, real_figures,
                         runs)
from experiments.real import CONDITIONS
from plumbing import training

SCRIPTS = {"stage1.py": stage1.main, "stage2.py": stage2.main, "probe.py": probe.main,
           "eval.py": evaluation.main, "experiments.ablations": ablations.main,
           "experiments.clean_twin": clean_twin.main, "experiments.probes": probes.main,
           "experiments.distance": distance.main}
PARSERS = {"experiments.corruptions": corruptions.parse,
           "experiments.real_figures": real_figures.parse}
VAL = "003"  # a scene of the miniature
COLUMNS = ("full", *CONDITIONS)


# ---- commands ------------------------------------------------------------------------------------

class Parsed(Exception):
    """A script has read its flags."""


def script_of(command):
    """(name, arguments) of a command."""
    return (command[1], command[2:]) if command[0] == "-m" else (command[0], command[1:])


def parsed(command):
    """The flags of a command, as its own script reads them before it does anything."""
    name, argv = script_of(command)
    if name in PARSERS:
        return PARSERS[name](argv)

    def start(args):
        raise Parsed(args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "start", start)
        with pytest.raises(Parsed) as stop:
            SCRIPTS[name](argv)
    return stop.value.args[0]


def out_of(command):
    return command[command.index("--out") + 1]


# What a script writes, with the same number in each column
SEG = {"mIoU": dict.fromkeys(COLUMNS, 40.0),
       "IoU": {column: {"road": 40.0} for column in COLUMNS}}
DEPTH = {"RMSE": dict.fromkeys(COLUMNS, 8.0)}
OF_PROBES = {"seg-all": SEG, "seg-first": SEG, "depth-all": DEPTH, "depth-first": DEPTH}
RESULTS = {"experiments.probes": OF_PROBES, "experiments.distance": [3.0, 2.0, 1.0],
           "eval.py": [{"mIoU": {"full": 30.0}}]}


class Dry:
    """real.py whose commands are recorded. They leave an empty folder, or a file of RESULTS."""

    def __init__(self, panda, root):
        self.panda = panda
        self.root = root
        self.commands = []

    def run(self, command):
        command = shlex.split(command)
        self.commands.append(command)
        name, _ = script_of(command)
        out = Path(out_of(command))
        if name not in RESULTS:
            out.mkdir(parents=True)
            return
        out = out if out.suffix == ".json" else out.with_name(f"{out.name}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(RESULTS[name]))

    def main(self, *more):
        """The commands of a start."""
        self.commands.clear()
        real.main(["--data", f"pandaset64={self.panda}", "--val-scenes", VAL, "--out",
                   str(self.root / "runs"), "--results", str(self.root / "page"), *more])
        return list(self.commands)

    def kept(self):
        return json.loads((self.root / "page.json").read_text())

    def made(self):
        """The names of what the commands have made, in order."""
        return [Path(out_of(command)).name for command in self.commands]


def recorded(panda, root, patch):
    """A `Dry` of a dataset's root, whose runs go below `root`."""
    patch.chdir(ROOT)  # where the experiment goes to; afterwards back
    found = Dry(panda, root)
    patch.setattr(runs, "run_command", found.run)
    patch.setattr(real, "weights_file", lambda: None)  # its package is no requirement
    return found

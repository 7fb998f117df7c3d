"""What the tests share: short runs of each script, what a run leaves, and a dataset's table."""
import json

import pytest
import torch

from readers.table import open_tables

SMALL = ["--channels", "16", "--depth", "2", "--fov", "48", "48", "8", "--cell", "1",
         "--neighbors", "4"]
RUN = ["--workers", "0", "--device", "cpu", "--precision", "fp32", "--seed", "3"]
SPAWN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def open_one(root, version=None, look=True, here=True, name="nuscenes"):
    """The `FrameTable` of one dataset.

    It is read in this process, which is sooner than in one of its own: see `open_tables`.
    """
    (table,) = open_tables([(name, root)], version, look, here)
    return table


# ---- arguments -----------------------------------------------------------------------------------

def stage1_args(world, out, *more):
    return ["--data", str(world), "--out", str(out), "--encoder", "vit_mini8",
            "--weights", "random", "--image-size", "80", "160", "--batch", "2", *SMALL, *RUN, *more]


def stage2_args(world, first, out, *more):
    return ["--data", str(world), "--stage1", str(first), "--out", str(out), "--batch", "2",
            "--lr", "1e-3", *RUN, *more]


def probe_args(world, task, encoder, out, *more):
    return ["--data", str(world), "--task", task, "--encoder", str(encoder), "--out", str(out),
            "--batch", "2", *RUN, *more]


def eval_args(*runs, out):
    return [*map(str, runs), "--out", str(out), "--workers", "0", "--device", "cpu"]


# ---- what a run leaves ---------------------------------------------------------------------------

def lines(out):
    """The log of a run: a dict for each line."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def checkpoint_of(out, name="last"):
    return torch.load(out / f"{name}.pth", weights_only=True)


def model_of(out):
    return checkpoint_of(out)["model"]


def largest_difference(a, b):
    """The largest absolute difference between two state dicts of the same names."""
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


def fails_with_one_line(capsys, main, argv):
    """Assert that main(argv) exits with code 2 and one line on stderr, bars aside; return it."""
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    err = [line for line in capsys.readouterr().err.splitlines()
           if line and "it/s" not in line and "?" not in line[-12:]]
    assert len(err) == 1, err
    return err[0]

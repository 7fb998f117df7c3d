"""The ablations' loop: the stages' schedules, stopped and resumed, in one process and in two."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from runs import SPAWN, checkpoint_of, largest_difference, lines, stage1_args, stage2_args

import stage1
import stage2
from experiments import ablations
from plumbing import run_folder

KINDS = {
    "no-stage1": [],
    "2d-head": [],
    "2d-head after stage 1": [],
    "joint": ["--loss", "contrastive", "--pairs", "8"],
}


@pytest.fixture(scope="module")
def head1(world, tmp_path_factory):
    """Folder of the stage 1 of 2d-head."""
    out = tmp_path_factory.mktemp("loop") / "head1"
    ablations.main(["2d-head", *stage1_args(world, out, "--steps", "2")])
    return out


def command(kind, world, head1, out, *more):
    """Arguments of an ablation of KINDS."""
    name = kind.split()[0]
    more = [*more, *KINDS[kind]]
    if "after" in kind:
        return [name, *stage2_args(world, head1, out, *more)]
    return [name, *stage1_args(world, out, *more)]


@pytest.mark.slow
def test_the_rates_follow_the_stages_schedules(world, head1, tmp_path, monkeypatch):
    """Learning rates of all steps, as stage1.py and stage2.py have them for the same flags."""
    def rates(main, argv):
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step",
                          lambda self: found.append(self.param_groups[0]["lr"]))
            main(argv)
        return found

    # the warm-up of stage 1 is in steps
    more = ["--steps", "10", "--limit", "2"]
    for kind in ("no-stage1", "2d-head"):
        theirs = rates(stage1.main, stage1_args(world, tmp_path / f"{kind}-1", *more))
        assert len(theirs) == 10 and theirs[0] == 0 < theirs[1]
        argv = command(kind, world, head1, tmp_path / kind, *more)
        assert rates(ablations.main, argv) == theirs

    # that of stage 2 is a part of the run
    more += ["--warmup-part", "0.4"]
    first = tmp_path / "2d-head-1"
    theirs = rates(stage2.main, stage2_args(world, first, tmp_path / "s2", *more))
    assert theirs[3] < theirs[4]
    argv = command("2d-head after stage 1", world, head1, tmp_path / "h2", *more)
    assert rates(ablations.main, argv) == theirs


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_ablation_goes_on_as_if_it_had_not(world, head1, tmp_path, kind, monkeypatch):
    def start(out):
        ablations.main(command(kind, world, head1, out, "--steps", "4", "--save-every", "0"))

    through, stopped = tmp_path / "through", tmp_path / "stopped"
    start(through)
    save = run_folder.save

    def save_and_stop(path, content):
        save(path, content)
        if content["step"] == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            start(stopped)
    start(stopped)

    one, two = checkpoint_of(through), checkpoint_of(stopped)
    assert one["step"] == two["step"] == 4
    parts = [name for name in ("model", "head", "classifier", "point_model") if name in one]
    assert len(parts) == 2
    for name in parts:
        assert largest_difference(one[name], two[name]) == 0

    # finished: nothing is done again
    before = (stopped / "log.jsonl").read_text()
    start(stopped)
    assert (stopped / "log.jsonl").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["2d-head", "joint"])  # one loop trains them all
def test_two_processes_are_one_with_the_same_global_batch(world, head1, tmp_path, kind):
    more = ["--steps", "3", "--batch", "4"]
    ablations.main(command(kind, world, head1, tmp_path / "one", *more))
    argv = command(kind, world, head1, tmp_path / "two", *more)
    done = subprocess.run([sys.executable, *SPAWN, "-m", "experiments.ablations", *argv], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (lines(tmp_path / out)[-1]["loss"] for out in ("one", "two"))
    if kind == "joint":  # InfoNCE is computed within each process
        return
    assert two == pytest.approx(one, rel=1e-4)
    one, two = (checkpoint_of(tmp_path / out)["model"] for out in ("one", "two"))
    differences = []
    for name in one:
        if "num_batches" not in name:
            differences.append((one[name].double() - two[name].double()).abs().flatten())
    assert torch.cat(differences).mean() < 2e-5

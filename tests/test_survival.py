"""Runs that are killed, stopped or left alone for long: nothing is lost, and nothing hangs."""
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import SPAWN, checkpoint_of, largest_difference, lines, model_of, stage1_args, stage2_args

import data
import stage1
import stage2
from plumbing import run_folder

SCRIPTS = {"stage1": stage1, "stage2": stage2}
# A checkpoint after each step, so that many a kill meets one.
STEPS = ["--steps", "30", "--save-every", "0"]
SAVE, REPLACE = torch.save, os.replace


def command_of(script, world, first, out, *more):
    if script == "stage1":
        return stage1_args(world, out, *more)
    return stage2_args(world, first, out, *more)


# ---- killed --------------------------------------------------------------------------------------

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


class DiesAt:
    """`function` until its n-th call; then the process is killed, before or after the call."""

    def __init__(self, function, n, after=False):
        self.function, self.left, self.after = function, n, after

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and not self.after:
            die()
        result = self.function(*args, **kwargs)
        if self.left == 0:
            die()
        return result


def half_written(content, file):
    """torch.save, killed half-way."""
    whole = io.BytesIO()
    SAVE(content, whole)
    half = len(whole.getvalue()) // 2
    file.write(whole.getvalue()[:half])
    file.flush()
    die()


def prepare_kill(script, moment, n):
    """Patch this process so that it is killed at this moment of its n-th step.

    A step reads two images; a save renames two files.
    """
    if moment == "data loading":
        data.read_image = DiesAt(data.read_image, 2 * n)
    elif moment == "step":
        SCRIPTS[script].check_finite = DiesAt(run_folder.check_finite, n)
    elif moment == "saving":
        torch.save = half_written
    elif moment == "before renaming":
        os.replace = DiesAt(REPLACE, 2 * n - 1)
    elif moment == "between the renames":
        os.replace = DiesAt(REPLACE, 2 * n)
    elif moment == "after renaming":
        os.replace = DiesAt(REPLACE, 2 * n, after=True)


# (moment, step of the attempt)
NAMED_KILLS = [("data loading", 1), ("step", 1), ("saving", 1), ("before renaming", 1),
               ("between the renames", 1), ("after renaming", 1), ("data loading", 2),
               ("between the renames", 2)]


def attempt(script, argv, moment, n):
    """A start of the script in a forked process, which has torch loaded already."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if moment:
        prepare_kill(script, moment, n)
    SCRIPTS[script].main(argv)


def step_if_whole(path):
    try:
        return torch.load(path, weights_only=True)["step"]
    except Exception:
        return None


def newest_step(out):
    """The highest step of the whole checkpoints last.pth and previous.pth."""
    found = [step_if_whole(path) for path in out.glob("*s*.pth")]
    return max(step for step in found if step is not None)


def optimizer_of(out):
    return checkpoint_of(out)["optimizer"]["state"]


def log_of(out):
    return [(line["step"], line.get("loss"), line.get("collapse")) for line in lines(out)]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["stage1", "stage2"])
def test_twenty_kills_change_nothing(world, first, tmp_path, script):
    """12 at random moments, 8 at named ones; each attempt goes on from what the killed one left."""
    context = multiprocessing.get_context("fork")
    rng = random.Random(1)
    through, out = tmp_path / "through", tmp_path / "killed"

    # a run that nobody kills, and its time
    begin = time.time()
    SCRIPTS[script].main(command_of(script, world, first, through, *STEPS))
    seconds = time.time() - begin

    plan = NAMED_KILLS + [(None, None)] * 12
    rng.shuffle(plan)
    argv = command_of(script, world, first, out, *STEPS)
    steps = []
    for moment, n in plan:
        process = context.Process(target=attempt, args=(script, argv, moment, n))
        process.start()
        # late enough to have begun, early enough that 20 of them leave something to do
        process.join(None if moment else rng.uniform(0.02, 0.1) * seconds)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it finished before its kill"
        if (out / "last.pth").is_file() or (out / "previous.pth").is_file():
            steps.append(newest_step(out))
    assert steps == sorted(steps) and 0 < steps[-1] < 30, steps  # never back

    # the last attempt ends as the run that nobody killed
    final = context.Process(target=attempt, args=(script, argv, None, None))
    final.start()
    final.join()
    assert final.exitcode == 0
    assert largest_difference(model_of(through), model_of(out)) == 0
    expected, found = optimizer_of(through), optimizer_of(out)
    for key in expected:
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(expected[key][name], found[key][name])
    assert log_of(through) == log_of(out)
    assert not list(out.glob("*.damaged"))


# ---- stopped -------------------------------------------------------------------------------------

def start(*argv, stdout=subprocess.PIPE, **more):
    """python with these arguments, as a process of its own."""
    return subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=stdout,
                            stderr=subprocess.PIPE, text=True, **more)


def wait_for(condition, process, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.time() < end, "waited too long"
        time.sleep(0.05)


def step_of(out):
    return checkpoint_of(out)["step"]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stopped_run_says_how_to_go_on_and_does(world, tmp_path, name):
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    more = ["--steps", "60", "--workers", "1"]
    argv = ["stage1.py", *stage1_args(world, stopped, *more)]
    process = start(*argv, start_new_session=True)
    wait_for(lambda: (stopped / "last.pth").is_file(), process)

    # the loading processes get the signal too, as from a terminal, and keep still
    os.killpg(process.pid, getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name) and "Traceback" not in err, err
    assert out.count("saving after this step") == 1
    assert "stopped by " + name in out
    assert "the command that started it goes on from here" in out
    assert 0 < step_of(stopped) < 60

    # the same command goes on to what a run without a stop gives
    assert subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True).returncode == 0
    stage1.main(stage1_args(world, through, *more))
    assert largest_difference(model_of(through), model_of(stopped)) == 0
    assert [line["loss"] for line in lines(through)] == [line["loss"] for line in lines(stopped)]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["torchrun", "one of the two"])
def test_two_processes_stop_together_and_one_goes_on(world, tmp_path, who):
    """The first time beside another job of two processes on the same machine: it is untouched."""
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    more = ["--steps", "40", "--batch", "4"]
    argv = stage1_args(world, stopped, *more)
    others = []
    if who == "torchrun":
        other = stage1_args(world, tmp_path / "other", "--steps", "3", "--batch", "4")
        others.append(start(*SPAWN, "stage1.py", *other, stdout=subprocess.DEVNULL))
    process = start(*SPAWN, "stage1.py", *argv)
    wait_for(lambda: (stopped / "last.pth").is_file(), process)

    # a scheduler signals all of them, and torchrun passes its own signal on
    told = children(process.pid)[:1]
    if who == "torchrun":
        told = [*children(process.pid), process.pid]
    for pid in told:
        os.kill(pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0, out + err
    assert out.count("stopped by SIGTERM after step") == 1, out + err
    assert 0 < step_of(stopped) < 40
    for other in others:
        assert other.wait(60) == 0, other.stderr.read()

    # one process goes on with the same global batch
    stage1.main(argv)
    stage1.main(stage1_args(world, through, *more))
    assert step_of(stopped) == 40
    assert [line["step"] for line in lines(stopped)] == [line["step"] for line in lines(through)]
    for a, b in zip(lines(stopped), lines(through)):
        # rounding grows over the steps
        assert a["loss"] == pytest.approx(b["loss"], abs=0.05), a["step"]


# ---- the death of one ends all -------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("who", ["rank", "worker"])
def test_the_death_of_one_process_ends_the_run_with_its_cause(world, tmp_path, who):
    out = tmp_path / "out"
    spawn = SPAWN if who == "rank" else []
    workers = ["--workers", "1"] if who == "worker" else []
    argv = stage1_args(world, out, "--steps", "100000", "--batch", "4", *workers)
    process = start(*spawn, "stage1.py", *argv, stdout=subprocess.DEVNULL)
    wait_for(lambda: (out / "last.pth").is_file(), process)

    os.kill(children(process.pid)[-1], signal.SIGKILL)
    begin = time.time()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - begin < 60
    if who == "rank":  # torchrun says it, with a traceback of its own
        assert "SIGKILL" in err
    else:
        assert "killed by signal: Killed. The memory is used up" in err
        assert "Traceback" not in err
    assert step_if_whole(out / "last.pth") or step_if_whole(out / "previous.pth")


# ---- long ----------------------------------------------------------------------------------------

def sample_process(pid, out):
    """(step, resident MB, open files, children's ids) of a running script."""
    step = lines(out)[-1]["step"] if (out / "log.jsonl").is_file() else 0
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return step, megabytes, len(os.listdir(f"/proc/{pid}/fd")), children(pid)


@pytest.mark.slow
def test_two_thousand_steps_leak_nothing(world, tmp_path):
    """Memory, open files and processes stay what they are after the first fifth.

    The workers end with the script.
    """
    cheap = ["--steps", "2000", "--batch", "1", "--image-size", "40", "80", "--max-points", "300",
             "--depth", "1", "--workers", "1"]
    small_caches = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "MALLOC_ARENA_MAX": "1"}
    process = start("stage1.py", *stage1_args(world, tmp_path / "out", *cheap),
                    stdout=subprocess.DEVNULL, env=os.environ | small_caches)
    samples, workers = [], set()
    while process.poll() is None:
        try:
            step, megabytes, files, running = sample_process(process.pid, tmp_path / "out")
            samples.append((step, megabytes, files, len(running)))
            workers |= set(running)
        except (FileNotFoundError, ProcessLookupError, json.JSONDecodeError, IndexError):
            pass  # it begins, ends or writes a line just now
        time.sleep(0.1)
    assert process.returncode == 0, process.stderr.read()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)

    late = np.array([sample for sample in samples if sample[0] >= 400])
    assert len(late) > 20
    _, memory, files, processes = late.T
    # Caches by shape still fill here, up to some step 4,000. The limit is 30 KB a step, and the
    # images of a step have 38.
    quarters = [np.median(part) for part in np.array_split(memory, 4)]  # MB
    assert quarters[-1] - quarters[0] < 0.05 * quarters[0], quarters
    assert np.median(files[-10:]) <= np.median(files[:10]) + 1
    assert processes.max() <= 1

"""Runs that are killed, stopped, cut off from each other or left alone for long: nothing is lost, and nothing hangs."""
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

import data
import run_folder
import stage1
import stage2
import training
from conftest import ROOT
from data import Frames, collate
from distill import distillation_loss
from index import load_index
from test_scripts import largest_difference, lines, model_of, stage1_args, stage2_args
from waffleiron import WaffleIron

STEPS = ["--steps", "30", "--save-every", "0"]  # a checkpoint after each step, so that many a kill meets one
SPAWN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def command_of(script, world, first, out, *more):
    return stage1_args(world, out, *more) if script == "stage1" else stage2_args(world, first, out, *more)


# ---- killed ---------------------------------------------------------------------------------------------------------------

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


class DiesAt:
    """`function` until it is called for the n-th time; then the process is killed before or after the call."""

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
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()
    die()


SAVE, REPLACE = torch.save, os.replace
MOMENTS = {  # of a kill in the n-th step of an attempt: what to patch in the process
    "data loading": lambda n: setattr(data, "read_image", DiesAt(data.read_image, 2 * n)),
    "step": lambda n: setattr(stage1 if n % 2 else stage2, "check_finite", DiesAt(run_folder.check_finite, n)),
    "saving": lambda n: setattr(torch, "save", lambda content, file: half_written(content, file) if n == 1 else SAVE(content, file)),
    "before renaming": lambda n: setattr(os, "replace", DiesAt(REPLACE, 2 * n - 1)),
    "between the renames": lambda n: setattr(os, "replace", DiesAt(REPLACE, 2 * n)),
    "after renaming": lambda n: setattr(os, "replace", DiesAt(REPLACE, 2 * n, after=True)),
}


def attempt(script, argv, moment, n):
    """A start of the script in a process that has torch loaded already."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if moment:
        MOMENTS[moment](n)
    {"stage1": stage1, "stage2": stage2}[script].main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["stage1", "stage2"])
def test_twenty_kills_change_nothing(world, first, tmp_path, script):
    """12 at random moments, 8 at named ones; each attempt goes on from what the killed one left."""
    rng, context = random.Random(1), multiprocessing.get_context("fork")
    begin = time.time()
    getattr(sys.modules[script], "main")(command_of(script, world, first, tmp_path / "through", *STEPS))
    seconds = time.time() - begin
    out = tmp_path / "killed"
    argv = command_of(script, world, first, out, *STEPS)
    kills, named = 0, [(moment, n) for moment, n in (("data loading", 1), ("step", 2 if script == "stage2" else 1), ("saving", 1),
                                                    ("before renaming", 1), ("between the renames", 1), ("after renaming", 1),
                                                    ("data loading", 2), ("between the renames", 2))]
    plan = named + [(None, None)] * 12
    rng.shuffle(plan)
    steps = []
    while kills < 20:
        moment, n = plan[kills]
        process = context.Process(target=attempt, args=(script, argv, moment, n))
        process.start()
        # late enough to have begun, early enough that 20 of them leave something to do
        process.join(None if moment else rng.uniform(0.02, 0.1) * seconds)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it finished before its kill"
        kills += 1
        if any((out / f"{name}.pth").is_file() for name in ("last", "previous")):
            steps.append(max(step for path in out.glob("*s*.pth") if (step := step_if_whole(path)) is not None))
    assert steps == sorted(steps) and 0 < steps[-1] < 30, steps  # never back
    final = context.Process(target=attempt, args=(script, argv, None, None))
    final.start()
    final.join()
    assert final.exitcode == 0
    assert largest_difference(model_of(tmp_path / "through"), model_of(out)) == 0
    a, b = (torch.load(tmp_path / name / "last.pth", weights_only=True)["optimizer"]["state"] for name in ("through", "killed"))
    assert all(torch.equal(a[key][name], b[key][name]) for key in a for name in ("exp_avg", "exp_avg_sq", "step"))
    a, b = ([(line["step"], line.get("loss"), line.get("collapse")) for line in lines(folder)] for folder in (tmp_path / "through", out))
    assert a == b
    assert not list(out.glob("*.damaged"))


def step_if_whole(path):
    try:
        return torch.load(path, weights_only=True)["step"]
    except Exception:
        return None


# ---- stopped --------------------------------------------------------------------------------------------------------------

def wait_for(condition, process, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.time() < end, "waited too long"
        time.sleep(0.05)


def step_of(out):
    return torch.load(out / "last.pth", weights_only=True)["step"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stopped_run_says_how_to_go_on_and_does(world, tmp_path, name):
    more = ["--steps", "60", "--workers", "1"]
    argv = [sys.executable, "stage1.py", *stage1_args(world, tmp_path / "stopped", *more)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: (tmp_path / "stopped/last.pth").is_file(), process)
    os.killpg(process.pid, getattr(signal, name))  # the loading processes get it too, as from a terminal
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name) and "Traceback" not in err, err
    assert out.count("saving after this step") == 1  # the loading processes keep still
    assert "stopped by " + name in out and "the command that started it goes on from here" in out
    assert 0 < step_of(tmp_path / "stopped") < 60
    assert subprocess.run(argv, cwd=ROOT, capture_output=True).returncode == 0
    stage1.main(stage1_args(world, tmp_path / "through", *more))
    assert largest_difference(model_of(tmp_path / "through"), model_of(tmp_path / "stopped")) == 0
    assert [line["loss"] for line in lines(tmp_path / "through")] == [line["loss"] for line in lines(tmp_path / "stopped")]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["torchrun", "one of the two"])
def test_two_processes_stop_together_and_one_goes_on(world, tmp_path, who):
    """The first time beside another job of two processes on the same machine, which does not mind."""
    more = ["--steps", "40", "--batch", "4"]
    argv = stage1_args(world, tmp_path / "stopped", *more)
    jobs = 2 if who == "torchrun" else 1
    others = [subprocess.Popen([sys.executable, *SPAWN, "stage1.py", *stage1_args(world, tmp_path / "other", "--steps", "3", "--batch", "4")],
                               cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(1, jobs)]
    process = subprocess.Popen([sys.executable, *SPAWN, "stage1.py", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "stopped/last.pth").is_file(), process)
    # torchrun passes on the one that a scheduler has sent to all of them
    told = [*children(process.pid), process.pid] if who == "torchrun" else children(process.pid)[:1]
    for pid in told:
        os.kill(pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and out.count("stopped by SIGTERM after step") == 1, out + err
    at = step_of(tmp_path / "stopped")
    assert 0 < at < 40
    for other in others:
        assert other.wait(60) == 0, other.stderr.read()
    stage1.main(argv)  # one process, the same global batch
    stage1.main(stage1_args(world, tmp_path / "through", *more))
    assert [line["step"] for line in lines(tmp_path / "stopped")] == [line["step"] for line in lines(tmp_path / "through")]
    assert step_of(tmp_path / "stopped") == 40
    for a, b in zip(lines(tmp_path / "stopped"), lines(tmp_path / "through")):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.05), a["step"]  # rounding grows over the steps


def test_the_frames_left_in_an_epoch_do_not_depend_on_the_number_of_processes(monkeypatch):
    def rest(processes):
        monkeypatch.setattr(training, "world", lambda: processes)
        drawn = []
        for number in range(processes):
            monkeypatch.setattr(training, "rank", lambda: number)
            drawn.append(list(training.Batches(items=44, batch=4, first=7, last=11, seed=2)))
        return [sorted(sum(parts, [])) for parts in zip(*drawn)]
    assert rest(4) == rest(2) == rest(1)


# ---- two processes are one -------------------------------------------------------------------------------------------------

def gradients(world, items, distributed):
    """Gradients of stage 1's loss of this process's part of the batch, averaged over the processes."""
    frames = Frames(load_index(world), load_index(world).select("train"), image_size=(80, 160), training=True,
                    cloud=data.CLOUD | {"fov": (48, 48, 8), "cell": 1, "neighbors": 4})
    torch.manual_seed(0)
    model = WaffleIron(channels=16, depth=3, out_channels=8, norm="batchnorm", grids=data.plane_sizes((48, 48, 8), 1)).double()
    batch = collate([frames[0, number] for number in items])
    model = training.distribute(model, torch.device("cpu")) if distributed else model
    targets = torch.sin(batch["depths"].double()[:, None] * torch.arange(1, 9))
    loss = distillation_loss(targets, model(batch["feats"].double(), batch["cells"], batch["neighbors"], batch["batch"]), "2d_to_3d")
    loss = loss * training.share(len(targets), torch.device("cpu"))
    loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def one_of_two(rank, world, port, out, cache):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "XDG_CACHE_HOME": cache}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = gradients(world, [0, 1, 2] if rank == 0 else [3], distributed=True)  # of different size, too
    if rank == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(world, tmp_path):
    import socket
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (world, port, tmp_path / "two.pth", os.environ["XDG_CACHE_HOME"]), nprocs=2)
    two, one = torch.load(tmp_path / "two.pth", weights_only=True), gradients(world, [0, 1, 2, 3], distributed=False)
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-6 * one[name].abs().max() + 1e-12, name


# ---- the death of one ends all ----------------------------------------------------------------------------------------------

def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["rank", "worker"])
def test_the_death_of_one_process_ends_the_run_with_its_cause(world, tmp_path, who):
    argv = stage1_args(world, tmp_path / "out", "--steps", "100000", "--batch", "4", *(["--workers", "1"] if who == "worker" else []))
    process = subprocess.Popen([sys.executable, *(SPAWN if who == "rank" else []), "stage1.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "out/last.pth").is_file(), process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    begin = time.time()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - begin < 60
    assert "SIGKILL" in err if who == "rank" else "killed by signal: Killed. The memory is used up" in err
    assert "Traceback" not in err or who == "rank"  # torchrun's own
    assert step_if_whole(tmp_path / "out/last.pth") or step_if_whole(tmp_path / "out/previous.pth")


# ---- what is not finite, and collapse -----------------------------------------------------------------------------------------

def test_nothing_is_saved_of_a_step_that_is_not_finite(world, first, tmp_path, capsys, monkeypatch):
    through = tmp_path / "out"
    real, calls = stage1.distillation_loss, []

    def loss(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 3 else 1)
    monkeypatch.setattr(stage1, "distillation_loss", loss)
    with pytest.raises(SystemExit):
        stage1.main(stage1_args(world, through, "--steps", "8", "--save-every", "0"))
    assert "step 2: the loss is nan" in (err := capsys.readouterr().err) and "no weight was touched" in err
    saved = json.loads((through / "not-finite.json").read_text())
    assert len(saved["frames"]) == 2 and all((world / name).is_file() for name in saved["frames"])
    assert step_of(through) == 2 and all(value.isfinite().all() for value in model_of(through).values())


def test_stage_2_says_when_features_collapse(world, first, tmp_path, monkeypatch, capsys):
    stage2.main(stage2_args(world, first, tmp_path / "good", "--steps", "8"))
    assert all(line["effective_rank"] > 2 and line["feature_variance"] > 0 for line in lines(tmp_path / "good"))
    assert "collapse" not in capsys.readouterr().out
    real, calls = stage2.sample_features, []

    def towards_one(maps, *args):
        calls.append(1)
        features = real(maps, *args)
        return features if len(calls) == 1 else 0.01 * features + features.mean(0).detach()
    monkeypatch.setattr(stage2, "sample_features", towards_one)
    stage2.main(stage2_args(world, first, tmp_path / "bad", "--steps", "8"))
    assert "features collapse, feature_variance" in "".join(capsys.readouterr())
    assert any("feature_variance" in text for line in lines(tmp_path / "bad") for text in line.get("collapse", ()))
    before = torch.load(tmp_path / "bad/last.pth", weights_only=True)["spread"]
    stage2.main(stage2_args(world, first, tmp_path / "bad", "--steps", "8"))  # a resumed run knows what it was at first
    assert torch.load(tmp_path / "bad/last.pth", weights_only=True)["spread"] == before


# ---- long -----------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_two_thousand_steps_leak_nothing(world, tmp_path):
    """Resident memory, open files and processes stay what they are after the first fifth; the workers end with the script."""
    cheap = ["--steps", "2000", "--batch", "1", "--image-size", "40", "80", "--max-points", "300", "--depth", "1"]
    small_caches = os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "MALLOC_ARENA_MAX": "1"}
    process = subprocess.Popen([sys.executable, "stage1.py", *stage1_args(world, tmp_path / "out", *cheap, "--workers", "1")],
                               cwd=ROOT, env=small_caches, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    pid, samples, workers = process.pid, [], set()
    while process.poll() is None:
        try:
            step = lines(tmp_path / "out")[-1]["step"] if (tmp_path / "out/log.jsonl").is_file() else 0
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            samples.append((step, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd")), len(children(pid))))
            workers |= set(children(pid))
        except (FileNotFoundError, ProcessLookupError, json.JSONDecodeError, IndexError):
            pass
        time.sleep(0.1)
    assert process.returncode == 0, process.stderr.read()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    late = np.array([sample for sample in samples if sample[0] >= 400])
    assert len(late) > 20
    # Caches by shape still fill here, some 20 MB in these steps; a run of 6,000 stands still from step 4,000 on.
    # A step that keeps its graph keeps 0.1 MB, its batch 0.03.
    quarters = [np.median(part) for part in np.array_split(late[:, 1], 4)]  # MB
    assert quarters[-1] - quarters[0] < 0.05 * quarters[0], quarters
    assert np.median(late[-10:, 2]) <= np.median(late[:10, 2]) + 1 and late[:, 3].max() <= 1

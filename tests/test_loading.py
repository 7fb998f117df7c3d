"""Runs end whose loading processes die or hand over nothing, and runs that no signal reaches.

Most tests fork, which spares a new process the seconds that it needs to import torch.
"""
import argparse
import ctypes
import faulthandler
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import connection, reduction

import pytest
import torch
from conftest import ROOT
from runs import stage1_args
from test_survival import DiesAt, children, step_of, wait_for

import data
import stage1
from plumbing import endings, training
from plumbing.errors import InputError, line_of, one_line_errors
from plumbing.run_folder import Saver

CPU = torch.device("cpu")
LIMIT = 60  # seconds in which a run must end, whatever happened


class Forked:
    """`function` in a forked process, as a script would run it; its stderr goes to `path`."""

    def __init__(self, path, function, *args):
        self.path = path
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=self._run, args=(function, *args))
        self.process.start()
        self.pid = self.process.pid

    def _run(self, function, *args):
        os.setsid()
        sys.stderr = self.path.open("w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        faulthandler.disable()  # pytest's
        one_line_errors(function)(*args)

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def end(self):
        """Exit code and stderr, once it has ended and its children, who share its sentinel."""
        if not connection.wait([self.process.sentinel], LIMIT):
            os.killpg(self.pid, signal.SIGKILL)
            pytest.fail(f"it does not end: {self.path.read_text()}")
        self.process.join()
        return self.process.exitcode, self.path.read_text()


class Numbers(torch.utils.data.Dataset):
    """Item n is `tensors` tensors of n; `happens` is called before item 5."""

    def __init__(self, happens=lambda: None, tensors=2):
        self.happens, self.tensors = happens, tensors

    def __getitem__(self, key):
        _, number = key
        if number == 5:
            self.happens()
        return [torch.full((1000,), number) for _ in range(self.tensors)]


def load(dataset, workers, items=40):
    batches = [[(0, first), (0, first + 1)] for first in range(0, items, 2)]
    return training.load(dataset, batches, list, workers, CPU)


def consume(dataset, workers=2, seconds=0.0, keep=False):
    """Take all batches, with `seconds` of work on each."""
    kept = []
    for batch in load(dataset, workers):
        if keep:
            kept.append(batch)
        end = time.time() + seconds
        while time.time() < end:
            time.sleep(0.01)


# ---- a loader as any other -----------------------------------------------------------------------

def numbers_of(loader):
    """The numbers of the items of each batch."""
    return [[item[0][0].item() for item in batch] for batch in loader]


def test_loading_processes_change_no_batch_and_none_needs_no_thread():
    loader = load(Numbers(), 0)
    threads = threading.active_count()
    assert numbers_of(loader) == [[first, first + 1] for first in range(0, 40, 2)]
    assert threading.active_count() <= threads
    assert numbers_of(load(Numbers(), 2)) == numbers_of(loader)
    assert len(loader) == len(load(Numbers(), 2)) == 20
    assert not multiprocessing.active_children()


def test_a_loop_that_is_left_early_leaves_no_process_and_no_thread():
    threads = threading.active_count()
    for batch in load(Numbers(), 2):
        break
    del batch
    end = time.time() + 10
    while threading.active_count() > threads and time.time() < end:
        time.sleep(0.05)
    assert threading.active_count() <= threads and not multiprocessing.active_children()


# ---- a loading process dies ----------------------------------------------------------------------

DEATHS = {  # what a loading process does: what the line says of it
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "Killed. The memory is used up"),
    "no room": (lambda: os.kill(os.getpid(), signal.SIGBUS), "Bus error. Shared memory is full"),
    "crashed": (os.abort, "Aborted. A library crashed"),
    "ended": (lambda: os._exit(3), "exit code 3. A library crashed"),
}


@pytest.mark.parametrize("death, seconds", [("killed", 0.5), *[(d, 0.0) for d in DEATHS]])
def test_the_death_of_a_loading_process_is_one_line(tmp_path, death, seconds):
    happens, expected = DEATHS[death]
    code, err = Forked(tmp_path / "err", consume, Numbers(happens), 2, seconds).end()
    lines = [line for line in err.splitlines() if line.strip() and "ERROR: Unexpected" not in line]
    assert code == 2 and len(lines) == 1 and expected in lines[0], err
    assert "fewer --workers" in err


@pytest.mark.slow
def test_a_loading_process_that_dies_in_the_middle_of_a_message(tmp_path, monkeypatch):
    """Others could write the rest of that message, so the main process waits for it in C."""
    real = connection.Connection._send_bytes

    def send(self, message):
        if multiprocessing.current_process().daemon:
            os.write(self._handle, len(message).to_bytes(4, "big") + bytes(message)[:20])
            os._exit(0)
        return real(self, message)
    monkeypatch.setattr(connection.Connection, "_send_bytes", send)
    monkeypatch.setattr(endings, "PATIENCE", 1)
    code, err = Forked(tmp_path / "err", consume, Numbers()).end()
    assert code == 2 and err.count("exited unexpectedly with exit code 0. A library") == 1, err


def test_an_input_error_of_a_loading_process_is_its_message_only(tmp_path):
    def happens():
        raise InputError("the file x is cut short")
    code, err = Forked(tmp_path / "err", consume, Numbers(happens)).end()
    assert code == 2 and err == f"{sys.argv[0]}: error: the file x is cut short\n"


def test_a_bug_in_a_loading_process_keeps_its_traceback(tmp_path):
    code, err = Forked(tmp_path / "err", consume, Numbers(lambda: [][0])).end()
    assert code == 1 and "IndexError" in err and "Traceback" in err


@pytest.mark.slow
def test_the_last_checkpoint_outlives_a_loading_process(world, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "read_image", DiesAt(data.read_image, 9))
    monkeypatch.setattr("test_survival.die", DEATHS["no room"][0])
    more = ["--steps", "30", "--save-every", "0", "--workers", "1"]
    run = Forked(tmp_path / "err", stage1.main, stage1_args(world, tmp_path / "out", *more))
    code, err = run.end()
    assert code == 2 and "Traceback" not in err and "--shm-size 8g or --ipc=host" in err, err
    assert 0 < step_of(tmp_path / "out") < 30


# ---- a batch cannot be handed over ---------------------------------------------------------------

FULL = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"


def test_no_room_in_shared_memory_is_one_line(tmp_path, monkeypatch):
    def no_room(*_):
        raise RuntimeError(FULL)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", no_room)
    code, err = Forked(tmp_path / "err", consume, Numbers()).end()
    assert code == 2 and err.count("\n") == 1 and "--shm-size 8g or --ipc=host" in err, err


def with_small_shared_memory(function, *args):
    """In a /dev/shm of its own of 100 kB; exit code 77 where that is not allowed."""
    new_mounts = 0x00020000  # CLONE_NEWNS
    private = "mount --make-rprivate / && mount -t tmpfs -o size=100k tmpfs /dev/shm"
    failed = ctypes.CDLL(None).unshare(new_mounts) or os.system(f"({private}) 2>/dev/null")
    if failed:
        sys.exit(77)
    function(*args)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts as Linux has them")
def test_a_small_shared_memory_is_one_line(tmp_path):
    run = Forked(tmp_path / "err", with_small_shared_memory, consume, Numbers(tensors=10))
    code, err = run.end()
    if code == 77:
        pytest.skip("mounting is not allowed here")
    assert code == 2 and err.count("\n") == 1 and "--shm-size 8g or --ipc=host" in err, err


def with_few_files(free, function, *args):
    """With a limit that leaves so many files to open."""
    used = {int(number) for number in os.listdir("/dev/fd")}
    unused = [number for number in range(10**4) if number not in used]
    limit = unused[free]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    function(*args)


@pytest.mark.slow
@pytest.mark.parametrize("free, keep", [(15, False), (90, False), (90, True)])
def test_a_low_limit_of_open_files_is_one_line(tmp_path, free, keep):
    """It ends in the loading process or, where batches are kept, in the one that works."""
    run = Forked(tmp_path / "err", with_few_files, free, consume, Numbers(tensors=30), 1, 0.0, keep)
    code, err = run.end()
    assert code == 2 and err.count("error: ") == 1 and "ulimit -n 65536" in err, err


def test_a_tensors_file_that_cannot_be_handed_over_ends_the_run(tmp_path, monkeypatch):
    """A thread of the loading process does that; the main process waits for its answer."""
    def fail(*_):
        raise OSError(24, "Too many open files")
    monkeypatch.setattr(reduction, "send_handle", fail)
    code, err = Forked(tmp_path / "err", consume, Numbers()).end()
    assert code == 2 and err.count("\n") == 1 and "exit code 24. Raise the limit of" in err, err


def test_as_many_files_as_the_system_allows_may_be_open(tmp_path):
    def limits():
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400))
        training.start(argparse.Namespace(device="cpu", seed=0))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (400, 400)
    assert Forked(tmp_path / "err", limits).end() == (0, "")


# ---- the line ------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, expected", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                  "dataloader's workers are out of shared memory."),
     "(pid 7) is killed by signal: Bus error. Shared memory is full: give Docker --shm-size 8g"),
    (RuntimeError("Caught RuntimeError in a loading process.\nOriginal Traceback:\n"
                  f"    raise OSError('Too many open files')\nRuntimeError: {FULL}"),
     "</torch_1_2_3>: No space left on device. Shared memory is full"),
    (RuntimeError("unable to open shared memory object </torch_1_2> in read-write mode: "
                  "Too many open files (24)"), "Too many open files. Raise the limit of"),
    (RuntimeError("received 0 items of ancdata"), "received 0 items of ancdata. Raise the limit"),
    (OSError(12, "Cannot allocate memory"), "Cannot allocate memory. The memory is used up"),
    (MemoryError(), "MemoryError. The memory is used up"),
    (RuntimeError("can't start new thread"), "`ulimit -u`"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
     "CUDA out of memory. Add --recompute"),
    (RuntimeError("[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:39599."),
     "Connection closed by peer. Another process of this run ended first"),
    (KeyError("bug"), None),
    (RuntimeError("size mismatch"), None),
    (ConnectionResetError(104, "Connection reset by peer"), None),
])
def test_faults_of_the_machine_are_told_from_bugs(error, expected):
    line = line_of(error)
    if expected is None:
        assert line is None
    else:
        assert expected in line and line.endswith("; then repeat the command")


# ---- signals -------------------------------------------------------------------------------------

def saver_of(out):
    return Saver(argparse.Namespace(out=out, save_every=10), per_epoch=99, total=99)


def blocked(ready, guarded):
    """A step that never comes back from C, with two loading processes under way."""
    training.start(argparse.Namespace(device="cpu", seed=0))
    loop = load(Numbers(), 2, items=1000)
    if guarded:
        loop = saver_of(ready.parent).guard(loop)
    for _ in loop:
        mutex = ctypes.create_string_buffer(64)
        libc = ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        ready.touch()
        libc.pthread_mutex_lock(mutex)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a mutex as Linux has it")
@pytest.mark.parametrize("name, guarded", [("SIGTERM", True), ("SIGINT", False)])
def test_a_second_signal_ends_a_run_that_is_blocked(tmp_path, name, guarded):
    number = getattr(signal, name)
    ready = tmp_path / "ready"
    run = Forked(tmp_path / "err", blocked, ready, guarded)
    wait_for(ready.exists, run)
    workers = children(run.pid)
    for _ in range(2):  # one that is delivered twice, as torchrun and `timeout` do, is one
        os.kill(run.pid, number)
    time.sleep(1)
    assert run.poll() is None and len(workers) == 2
    os.kill(workers[0], signal.SIGSTOP)  # this one will not notice that its parent is gone
    # Where the machine is busy the first may be noticed late, and this one count as the same
    for _ in range(5):
        os.kill(run.pid, number)
        if connection.wait([run.process.sentinel], 2):
            break
    code, err = run.end()
    assert code == 128 + number and err.strip().endswith(f"ended at once by a second {name}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a mutex as Linux has it")
def test_under_torchrun_a_signal_may_come_again_after_a_second(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    ready = tmp_path / "ready"
    run = Forked(tmp_path / "err", blocked, ready, True)
    wait_for(ready.exists, run)
    for seconds in (0, 1, 1.5):
        time.sleep(seconds)
        assert run.poll() is None
        os.kill(run.pid, signal.SIGTERM)
    assert run.end()[0] == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_signal_of_an_earlier_loop_is_not_the_first_of_this_one(tmp_path):
    def twice():
        endings.obey_second_signal()
        for step in (1, 2):
            saver = saver_of(tmp_path)
            with pytest.raises(SystemExit):
                for _ in saver.guard(range(9)):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.5)
                    assert saver.due(step)
                    saver.save({"step": step})
    code, err = Forked(tmp_path / "err", twice).end()
    assert code == 0 and step_of(tmp_path) == 2, err


@pytest.mark.slow
def test_signals_of_forked_processes_are_their_own(tmp_path):
    def parent():
        endings.obey_second_signal()
        signal.signal(signal.SIGTERM, lambda *_: None)
        pid = os.fork()
        if pid == 0:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    assert Forked(tmp_path / "err", parent).end() == (0, "")


@pytest.mark.slow
def test_a_run_whose_loading_process_stands_still_ends_at_the_second_signal(world, tmp_path):
    more = ["--steps", "100000", "--batch", "4", "--workers", "1"]
    run = Forked(tmp_path / "err", stage1.main, stage1_args(world, tmp_path / "out", *more))
    wait_for(lambda: (tmp_path / "out/last.pth").is_file(), run)
    [worker] = children(run.pid)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1)  # until there is no batch left
    os.kill(run.pid, signal.SIGINT)
    time.sleep(1)
    assert run.poll() is None
    os.kill(run.pid, signal.SIGINT)
    code, err = run.end()
    assert code == 130 and "ended at once by a second SIGINT" in err
    assert step_of(tmp_path / "out") > 0


@pytest.mark.slow
def test_the_end_of_a_script_does_not_wait_for_a_loading_process_that_stands_still():
    program = """
import multiprocessing, os, signal, sys
sys.path.insert(0, "tests")
import test_loading
batches = iter(test_loading.load(test_loading.Numbers(), 2))
next(batches)
worker = multiprocessing.active_children()[0]
os.kill(worker.pid, signal.SIGSTOP)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          timeout=LIMIT)
    assert done.returncode == 0 and done.stderr == "", done.stderr

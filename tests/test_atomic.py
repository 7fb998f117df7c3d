"""Files are whole or not there, whatever happens while they are written."""
import os
import signal
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from conftest import ROOT
from test_run_folder import args_of

from plumbing.atomic import save
from plumbing.errors import InputError
from plumbing.run_folder import find_last


def test_the_checkpoint_before_is_kept(tmp_path):
    args = args_of(tmp_path)
    for step in (1, 2, 3):
        save(tmp_path / "last.pth", {"step": step, "args": vars(args)})
    assert torch.load(tmp_path / "previous.pth")["step"] == 2
    assert find_last(args)["step"] == 3
    (tmp_path / "last.pth").unlink()  # killed between the two renames
    assert find_last(args)["step"] == 2


@pytest.mark.parametrize("crash", [
    KeyboardInterrupt, OSError(28, "No space left on device"),
    RuntimeError("[enforce fail] PytorchStreamWriter failed")])
def test_a_crash_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch, crash):
    args = args_of(tmp_path)
    save(tmp_path / "last.pth", {"step": 3, "args": vars(args)})

    def fail(content, file):
        file.write(b"half")
        raise crash
    monkeypatch.setattr(torch, "save", fail)
    expected = KeyboardInterrupt if crash is KeyboardInterrupt else InputError
    with pytest.raises(expected) as error:
        save(tmp_path / "last.pth", {"step": 4, "weights": [torch.zeros(10**6)]})
    if expected is InputError:
        assert "needs 4 MB" in str(error.value) and "last.pth is as it was" in str(error.value)
        assert not (tmp_path / "last.partial").exists()
    assert find_last(args)["step"] == 3


class Rings:
    """Sends this process a signal while it is being saved; it is loaded as an empty dict."""

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        signal.raise_signal(self.number)
        return OrderedDict, ()


@pytest.mark.parametrize("number", [signal.SIGCHLD, signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_checkpoint_is_written(tmp_path, monkeypatch, number):
    """torch's handler of SIGCHLD raises where a loading process died."""
    def died(*_):
        raise RuntimeError("DataLoader worker is killed")
    before = signal.signal(number, died)
    try:
        with pytest.raises(RuntimeError, match="is killed"):
            save(tmp_path / "last.pth", {"step": Rings(number)})
        assert signal.getsignal(number) is died
    finally:
        signal.signal(number, before)
    assert torch.load(tmp_path / "last.pth")["step"] == {}


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut after the rename must not find the new name on an old or empty content."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("flushed"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(str(b)), replace(a, b)))
    for _ in range(2):
        save(tmp_path / "last.pth", {"step": 3})
    last, previous = str(tmp_path / "last.pth"), str(tmp_path / "previous.pth")
    assert done == ["flushed", last, "flushed", previous, last]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(tmp_path):
    """A limit on the size of files is to a writer what a full disk is."""
    args = args_of(tmp_path)
    path = tmp_path / "last.pth"
    save(path, {"step": 3, "args": vars(args)})
    program = f"""
import resource, signal, torch
from plumbing import atomic
from plumbing.errors import one_line_errors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
one_line_errors(atomic.save)({str(path)!r}, {{'step': 4, 'weights': torch.zeros(10**6)}})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "it needs 4 MB" in done.stderr and "Traceback" not in done.stderr
    assert find_last(args)["step"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pth"]


@pytest.mark.parametrize("before", [None, ValueError("while this was handled")])
def test_other_errors_of_saving_are_not_taken_for_a_full_disk(tmp_path, monkeypatch, before):
    def fail(*_):
        error = RuntimeError("CUDA error")
        error.__context__ = before
        raise error
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        save(tmp_path / "last.pth", {"step": 4})

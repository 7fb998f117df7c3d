"""What a run leaves in its folder, whatever happens to it."""
import argparse
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

import run_folder
import training
from conftest import ROOT
from errors import InputError
from run_folder import Log, Saver, check_finite, find_last, save

CPU = torch.device("cpu")


def args_of(out, **changes):
    return argparse.Namespace(**({"out": str(out), "lr": 1e-3, "workers": 1, "data": "here", "save_every": 10.0, "restart": False} | changes))


# ---- checkpoints --------------------------------------------------------------------------------------------------------

def test_checkpoints_are_found_and_other_arguments_refused(tmp_path):
    args = args_of(tmp_path)
    assert find_last(args) is None
    save(tmp_path / "last.pth", {"step": 3, "args": vars(args)})
    assert find_last(args)["step"] == 3
    assert find_last(args_of(tmp_path, workers=4, data="there", save_every=0.5))["step"] == 3
    with pytest.raises(InputError, match="--lr 0.001, now 0.1"):
        find_last(args_of(tmp_path, lr=0.1))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]  # no temporary file stays


def test_the_checkpoint_before_is_kept(tmp_path):
    args = args_of(tmp_path)
    for step in (1, 2, 3):
        save(tmp_path / "last.pth", {"step": step, "args": vars(args)})
    assert torch.load(tmp_path / "previous.pth")["step"] == 2 and find_last(args)["step"] == 3
    (tmp_path / "last.pth").unlink()  # killed between the two renames
    assert find_last(args)["step"] == 2


@pytest.mark.parametrize("damage", ["torn", "empty", "foreign", "other content", "a tensor"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, capsys, damage):
    args, last = args_of(tmp_path), tmp_path / "last.pth"
    for step in (1, 2):
        save(last, {"step": step, "args": vars(args), "weights": torch.zeros(1000)})
    whole = last.read_bytes()
    if damage == "foreign":
        last.write_text("not a checkpoint")
    elif damage in ("other content", "a tensor"):
        torch.save({"weights": torch.zeros(3)} if damage == "other content" else torch.zeros(3), last)
    else:
        last.write_bytes(whole[:len(whole) // 2] if damage == "torn" else b"")
    assert find_last(args)["step"] == 1
    assert f"{last}: not a checkpoint, or damaged; set aside as last.damaged" in capsys.readouterr().out
    save(last, {"step": 2, "args": vars(args)})
    assert find_last(args)["step"] == 2 and (tmp_path / "last.damaged").is_file() and torch.load(tmp_path / "previous.pth")["step"] == 1


def test_damaged_checkpoints_without_one_before_are_an_error(tmp_path):
    (tmp_path / "last.pth").write_bytes(b"half")
    with pytest.raises(InputError, match="last.pth: not a checkpoint"):
        find_last(args_of(tmp_path))
    assert (tmp_path / "last.pth").read_bytes() == b"half"


def test_a_folder_that_cannot_be_is_named_before_hours_are_spent(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"--out {tmp_path}/file/run: {tmp_path}/file is no folder"):
        find_last(args_of(tmp_path / "file/run"))
    with pytest.raises(InputError, match="last.pth: cannot be written .*; nothing was saved before. Choose another --out"):
        save(tmp_path / "file/run/last.pth", {"step": 1})


def test_processes_that_find_different_checkpoints_stop(tmp_path, monkeypatch):
    save(tmp_path / "last.pth", {"step": 3, "args": vars(args_of(tmp_path))})
    monkeypatch.setattr(run_folder, "world", lambda: 2)
    for other in ([2], [None], [3, str(tmp_path / "last.pth")]):
        monkeypatch.setattr(run_folder.dist, "all_gather_object", lambda into, mine, other=other: into.__setitem__(slice(None), [mine, other]))
        with pytest.raises(InputError, match="the processes do not find the same checkpoint there"):
            find_last(args_of(tmp_path))
    monkeypatch.setattr(run_folder.dist, "all_gather_object", lambda into, mine: into.__setitem__(slice(None), [mine, [3]]))
    assert find_last(args_of(tmp_path))["step"] == 3


def test_restart_sets_another_run_aside_and_only_another(tmp_path, capsys):
    save(tmp_path / "last.pth", {"step": 3, "args": vars(args_of(tmp_path))})
    (tmp_path / "log.jsonl").write_text("{}\n")
    assert find_last(args_of(tmp_path, restart=True))["step"] == 3  # the same run is resumed
    for n in (1, 2):
        assert find_last(args_of(tmp_path, restart=True, lr=float(n))) is None
        assert f"is now in {tmp_path / f'replaced-{n}'}" in capsys.readouterr().out
        save(tmp_path / "last.pth", {"step": n, "args": vars(args_of(tmp_path, lr=float(n)))})
    assert {p.name for p in (tmp_path / "replaced-1").iterdir()} == {"last.pth", "log.jsonl"}
    assert torch.load(tmp_path / "replaced-2/last.pth")["step"] == 1


@pytest.mark.parametrize("crash", [KeyboardInterrupt, OSError(28, "No space left on device"),
                                   RuntimeError("[enforce fail] PytorchStreamWriter failed")])
def test_a_crash_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch, crash):
    args = args_of(tmp_path)
    save(tmp_path / "last.pth", {"step": 3, "args": vars(args)})

    def fail(content, file):
        file.write(b"half")
        raise crash
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt if crash is KeyboardInterrupt else InputError) as error:
        save(tmp_path / "last.pth", {"step": 4, "weights": [torch.zeros(10**6)]})
    if crash is not KeyboardInterrupt:
        assert "needs 4 MB" in str(error.value) and "last.pth is as it was" in str(error.value) and not (tmp_path / "last.partial").exists()
    assert find_last(args)["step"] == 3


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut after the rename must not find the new name on an old or empty content."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("flushed"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(str(b)), replace(a, b)))
    for _ in range(2):
        save(tmp_path / "last.pth", {"step": 3})
    last, previous = str(tmp_path / "last.pth"), str(tmp_path / "previous.pth")
    assert done == ["flushed", last, "flushed", previous, last]


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(tmp_path):
    """A limit on the size of files is to a writer what a full disk is."""
    args = args_of(tmp_path)
    save(tmp_path / "last.pth", {"step": 3, "args": vars(args)})
    program = ("import resource, signal, torch, run_folder; from errors import one_line_errors\n"
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
               f"one_line_errors(run_folder.save)({str(tmp_path / 'last.pth')!r}, {{'step': 4, 'weights': torch.zeros(10**6)}})")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "it needs 4 MB" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert find_last(args)["step"] == 3 and sorted(p.name for p in tmp_path.iterdir()) == ["last.pth"]


def test_other_errors_of_saving_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA error")))
    with pytest.raises(RuntimeError, match="CUDA error"):
        save(tmp_path / "last.pth", {"step": 4})


# ---- when to save ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def saver(tmp_path):
    return Saver(args_of(tmp_path), per_epoch=4, total=10)


def test_due_at_epochs_ends_at_the_end_and_after_minutes(saver):
    assert [done for done in range(1, 11) if saver.due(done)] == [4, 8, 10]
    saver.time -= 601
    assert saver.due(1)
    saver.save({"step": 1})
    assert not saver.due(2)


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_saves_and_ends(saver, tmp_path, capfd, number, name):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit_:
        for step in saver.guard(range(10)):
            if step == 1:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # schedulers send it to torchrun and to its processes
            if saver.due(step + 1):
                saver.save({"step": step + 1})
    assert exit_.value.code == 128 + number and torch.load(tmp_path / "last.pth")["step"] == 2
    printed = capfd.readouterr().out
    assert f"stopped by {name} after step 2 of 10; the command that started it goes on from here" in printed
    assert printed.count("saving after this step") == 1
    exit_.value.__traceback__ = exit_._excinfo = None  # they hold the loop
    del exit_
    assert signal.getsignal(number) == before


def test_after_the_loop_signals_are_as_before(saver):
    before = signal.getsignal(signal.SIGTERM)
    assert list(saver.guard([1, 2])) == [1, 2] and signal.getsignal(signal.SIGTERM) == before
    loop = saver.guard([1, 2])
    next(loop)
    assert signal.getsignal(signal.SIGTERM) != before
    loop.close()
    assert signal.getsignal(signal.SIGTERM) == before and list(saver.guard([])) == []


def two_processes(monkeypatch, during=lambda: None):
    """As if there were two, of which the other one has had no signal; `during` happens while they talk."""
    def all_reduce(flags, op=None):
        during()
    monkeypatch.setattr(run_folder, "world", lambda: 2)
    monkeypatch.setattr(run_folder.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(run_folder.dist, "barrier", lambda: None)


def test_a_signal_while_the_processes_agree_or_save_waits_for_the_next_step(saver, tmp_path, monkeypatch):
    two_processes(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM) if saver.done == 3 else None)
    for step in saver.guard(range(1, 9)):
        if step == 4:
            assert saver.due(4) and not saver.stop  # an epoch's end; the signal came too late for this agreement
            saver.save({"step": 4})                  # so nobody leaves
        elif step == 5:
            assert saver.due(5) and saver.stop == signal.SIGTERM
            with pytest.raises(SystemExit):
                saver.save({"step": 5})
            break
        else:
            assert not saver.due(step)
    assert torch.load(tmp_path / "last.pth")["step"] == 5


def test_a_signal_that_only_another_process_had_ends_this_one_too(saver, tmp_path, monkeypatch):
    two_processes(monkeypatch)
    monkeypatch.setattr(run_folder.dist, "all_reduce", lambda flags, op: flags.copy_(torch.tensor([signal.SIGTERM, 0])))
    assert saver.due(1)
    with pytest.raises(SystemExit):
        saver.save({"step": 1})


# ---- what runs away ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_with_the_frames_names(tmp_path, where):
    class Named(list):
        def name(self, key):
            return f"image-{key[1]}.jpg"
    batches, model = training.Batches(items=6, batch=2, first=0, last=9, seed=1), torch.nn.Linear(2, 1)
    loss = model(torch.ones(1, 2)).sum()
    loss.backward()
    check_finite(loss, model, 4, tmp_path, batches, Named())
    assert not list(tmp_path.iterdir())
    if where == "loss":
        loss = loss * math.nan
    else:
        model.weight.grad[0, 1] = math.inf
    with pytest.raises(InputError, match="step 4: the loss is .* no weight was touched.*--precision fp32"):
        check_finite(loss, model, 4, tmp_path, batches, Named())
    saved = json.loads((tmp_path / "not-finite.json").read_text())
    drawn = list(training.Batches(items=6, batch=2, first=0, last=9, seed=1))[4]
    assert saved["step"] == 4 and saved["frames"] == [f"image-{number}.jpg" for _, number in drawn]


# ---- the log ------------------------------------------------------------------------------------------------------------

def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_log_writes_the_mean_of_an_epoch(tmp_path, capsys):
    model = torch.nn.Linear(999, 1000)
    model.bias.requires_grad_(False)
    log = Log(tmp_path, CPU, model)
    for loss in (1.0, 2.0):
        log.add(torch.tensor(loss))
    log.write(epoch=1)
    log.add(torch.tensor(5.0))
    log.write(epoch=2)
    lines = lines_of(tmp_path)
    assert [line["loss"] for line in lines] == [1.5, 5.0]
    assert [line["trainable_parameters"] for line in lines] == [999000, 999000] and lines[0]["memory_gb"] > 0.1
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line | {"seconds": 1800, "processes": 4}) + "\n" for line in lines))
    log.report()
    assert "1.0 M trainable parameters" in (report := capsys.readouterr().out) and "4.00 process-hours" in report


def test_a_log_goes_on_in_the_middle_of_an_epoch(tmp_path):
    model = torch.nn.Linear(1, 1)
    log = Log(tmp_path, CPU, model)
    for step in range(1, 4):
        log.add(torch.tensor(step / 3))
        if step == 2:
            log.write(epoch=1, step=2)
    checkpoint = {"step": 3, "log": log.state()}
    log.add(torch.tensor(7.0))
    log.write(epoch=2, step=4)  # then it is killed, before it saves, and while it writes the next line
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 3, "lo')
    through = lines_of_whole(tmp_path)
    log = Log(tmp_path, CPU, model, checkpoint)
    assert [line["epoch"] for line in lines_of(tmp_path)] == [1]  # the second one is done again
    log.add(torch.tensor(7.0))
    log.write(epoch=2, step=4)
    assert [line["loss"] for line in lines_of(tmp_path)] == [line["loss"] for line in through]


def lines_of_whole(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if line.endswith("}")]


def test_bad_frames_are_named_and_too_many_stop(tmp_path, monkeypatch):
    log = Log(tmp_path, CPU, torch.nn.Linear(1, 1), frames=200)
    log.add(torch.tensor(1.0), {"bad": [(7, "a: torn"), (7, "a: torn")]})  # two views of one frame
    log.add(torch.tensor(1.0), {"bad": [(7, "a: torn"), (9, "b: empty")]})
    log.write(epoch=1)
    assert lines_of(tmp_path)[0]["bad_frames"] == ["a: torn", "b: empty"]
    log = Log(tmp_path, CPU, torch.nn.Linear(1, 1), {"step": 1, "log": log.state()}, frames=200)  # a resumed run has not forgotten
    with pytest.raises(InputError, match="3 of 200 frames are bad, more than 1%: a: torn; b: empty; c: cut"):
        log.add(torch.tensor(1.0), {"bad": [(1, "c: cut")]})


def test_each_process_knows_of_the_others_bad_frames(tmp_path, monkeypatch):
    def gather(into, mine):
        into[:] = [mine, [(5, "x: cut"), (7, "a: torn")]]
    monkeypatch.setattr(run_folder, "world", lambda: 2)
    monkeypatch.setattr(run_folder, "sum_over_processes", lambda tensor: tensor)
    monkeypatch.setattr(run_folder.dist, "all_gather_object", gather)
    log = Log(tmp_path, CPU, torch.nn.Linear(1, 1), frames=200)
    log.add(torch.tensor(1.0), {"bad": [(7, "a: torn")]})
    assert log.state()["bad"] == {7: "a: torn", 5: "x: cut"}
    log.write(epoch=1)
    assert lines_of(tmp_path)[0]["bad_frames"] == ["a: torn", "x: cut"]


def test_a_log_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    log = Log(tmp_path, CPU, torch.nn.Linear(1, 1))
    log.write(epoch=1, step=1)
    before = (tmp_path / "log.jsonl").read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"log.jsonl: cannot be written \(No space left on device\); it is as it was"):
        log.write(epoch=2, step=2)
    with pytest.raises(InputError, match="log.jsonl: cannot be written"):
        Log(tmp_path, CPU, torch.nn.Linear(1, 1))  # would drop the line: nothing is saved of step 1
    assert (tmp_path / "log.jsonl").read_text() == before and not (tmp_path / "log.partial").exists()
    (tmp_path / "log.jsonl").write_text("")
    log.report()  # of nothing: nothing

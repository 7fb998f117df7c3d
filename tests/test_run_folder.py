"""What a run leaves in its folder, whatever happens to it."""
import argparse
import json
import math
import os
import signal

import pytest
import torch

from plumbing import run_folder, training
from plumbing.errors import InputError
from plumbing.run_folder import Log, Saver, check_finite, find_last, save

CPU = torch.device("cpu")


def args_of(out, **changes):
    args = {"out": str(out), "lr": 1e-3, "workers": 1, "data": "here", "save_every": 10.0,
            "restart": False}
    return argparse.Namespace(**(args | changes))


# ---- checkpoints --------------------------------------------------------------------------------

def test_checkpoints_are_found_and_other_arguments_refused(tmp_path):
    args = args_of(tmp_path)
    assert find_last(args) is None
    save(tmp_path / "last.pth", {"step": 3, "args": vars(args)})
    assert find_last(args)["step"] == 3
    assert find_last(args_of(tmp_path, workers=4, data="there", save_every=0.5))["step"] == 3
    with pytest.raises(InputError, match="--lr 0.001, now 0.1"):
        find_last(args_of(tmp_path, lr=0.1))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]  # no temporary file stays


@pytest.mark.parametrize("damage", ["torn", "empty", "foreign", "other content", "a tensor"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, capsys, damage):
    args = args_of(tmp_path)
    last = tmp_path / "last.pth"
    for step in (1, 2):
        save(last, {"step": step, "args": vars(args), "weights": torch.zeros(1000)})
    whole = last.read_bytes()
    if damage == "torn":
        last.write_bytes(whole[:len(whole) // 2])
    elif damage == "empty":
        last.write_bytes(b"")
    elif damage == "foreign":
        last.write_text("not a checkpoint")
    elif damage == "other content":
        torch.save({"weights": torch.zeros(3)}, last)
    else:
        torch.save(torch.zeros(3), last)
    assert find_last(args)["step"] == 1
    said = f"{last}: not a checkpoint, or damaged; set aside as last.damaged"
    assert said in capsys.readouterr().out
    save(last, {"step": 2, "args": vars(args)})
    assert find_last(args)["step"] == 2
    assert (tmp_path / "last.damaged").is_file()
    assert torch.load(tmp_path / "previous.pth")["step"] == 1


def test_damaged_checkpoints_without_one_before_are_an_error(tmp_path):
    (tmp_path / "last.pth").write_bytes(b"half")
    with pytest.raises(InputError, match="last.pth: not a checkpoint"):
        find_last(args_of(tmp_path))
    assert (tmp_path / "last.pth").read_bytes() == b"half"


def test_a_folder_that_cannot_be_is_named_before_hours_are_spent(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=f"--out {file}/run: {file} is no folder"):
        find_last(args_of(file / "run"))
    with pytest.raises(InputError, match="last.pth: cannot be written .*; nothing was saved "
                                         "before. Choose another --out"):
        save(file / "run/last.pth", {"step": 1})


def test_processes_that_find_different_checkpoints_stop(tmp_path, monkeypatch):
    def other_finds(what):
        def gather(into, mine):
            into[:] = [mine, what]
        monkeypatch.setattr(run_folder.dist, "all_gather_object", gather)

    save(tmp_path / "last.pth", {"step": 3, "args": vars(args_of(tmp_path))})
    monkeypatch.setattr(run_folder, "world", lambda: 2)
    for what in ([2], [None], [3, str(tmp_path / "last.pth")]):
        other_finds(what)
        with pytest.raises(InputError, match="the processes do not find the same checkpoint there"):
            find_last(args_of(tmp_path))
    other_finds([3])
    assert find_last(args_of(tmp_path))["step"] == 3


def test_restart_sets_another_run_aside_and_only_another(tmp_path, capsys):
    last = tmp_path / "last.pth"
    save(last, {"step": 3, "args": vars(args_of(tmp_path))})
    (tmp_path / "log.jsonl").write_text("{}\n")
    assert find_last(args_of(tmp_path, restart=True))["step"] == 3  # the same run is resumed
    for n in (1, 2):
        assert find_last(args_of(tmp_path, restart=True, lr=float(n))) is None
        assert f"is now in {tmp_path / f'replaced-{n}'}" in capsys.readouterr().out
        save(last, {"step": n, "args": vars(args_of(tmp_path, lr=float(n)))})
    assert {p.name for p in (tmp_path / "replaced-1").iterdir()} == {"last.pth", "log.jsonl"}
    assert torch.load(tmp_path / "replaced-2/last.pth")["step"] == 1


# ---- when to save -------------------------------------------------------------------------------

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
    assert exit_.value.code == 128 + number
    assert torch.load(tmp_path / "last.pth")["step"] == 2
    printed = capfd.readouterr().out
    assert (f"stopped by {name} after step 2 of 10; the command that started it goes on from here"
            in printed)
    assert printed.count("saving after this step") == 1
    exit_.value.__traceback__ = exit_._excinfo = None  # they hold the loop
    del exit_
    assert signal.getsignal(number) == before


def test_after_the_loop_signals_are_as_before(saver):
    before = signal.getsignal(signal.SIGTERM)
    assert list(saver.guard([1, 2])) == [1, 2]
    assert signal.getsignal(signal.SIGTERM) == before
    loop = saver.guard([1, 2])
    next(loop)
    assert signal.getsignal(signal.SIGTERM) != before
    loop.close()
    assert signal.getsignal(signal.SIGTERM) == before
    assert list(saver.guard([])) == []


def two_processes(monkeypatch, during=lambda: None):
    """As if there were two, of which the other one has had no signal.

    `during` is called while they talk.
    """
    def all_reduce(flags, op=None):
        during()
    monkeypatch.setattr(run_folder, "world", lambda: 2)
    monkeypatch.setattr(run_folder.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(run_folder.dist, "barrier", lambda: None)


def test_a_signal_while_the_processes_agree_or_save_waits_for_the_next_step(
        saver, tmp_path, monkeypatch):
    def during():
        if saver.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    two_processes(monkeypatch, during)
    for step in saver.guard(range(1, 9)):
        if step == 4:
            # An epoch's end. The signal came too late for this agreement, so nobody leaves
            assert saver.due(4) and not saver.stop
            saver.save({"step": 4})
        elif step == 5:
            assert saver.due(5) and saver.stop == signal.SIGTERM
            with pytest.raises(SystemExit):
                saver.save({"step": 5})
            break
        else:
            assert not saver.due(step)
    assert torch.load(tmp_path / "last.pth")["step"] == 5


def test_a_signal_that_only_another_process_had_ends_this_one_too(saver, monkeypatch):
    def all_reduce(flags, op):
        flags.copy_(torch.tensor([signal.SIGTERM, 0]))
    two_processes(monkeypatch)
    monkeypatch.setattr(run_folder.dist, "all_reduce", all_reduce)
    assert saver.due(1)
    with pytest.raises(SystemExit):
        saver.save({"step": 1})


# ---- what runs away -----------------------------------------------------------------------------

class Named:
    def name(self, key):
        return f"image-{key[1]}.jpg"


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_with_the_frames_names(tmp_path, where):
    batches = training.Batches(items=6, batch=2, first=0, last=9, seed=1)
    model = torch.nn.Linear(2, 1)
    loss = model(torch.ones(1, 2)).sum()
    loss.backward()
    check_finite(loss, model, 4, tmp_path, batches, Named())
    assert not list(tmp_path.iterdir())
    if where == "loss":
        loss = loss * math.nan
    else:
        model.weight.grad[0, 1] = math.inf
    with pytest.raises(InputError, match="step 4: the loss is .* no weight was touched"
                                         ".*--precision fp32"):
        check_finite(loss, model, 4, tmp_path, batches, Named())
    saved = json.loads((tmp_path / "not-finite.json").read_text())
    drawn = list(training.Batches(items=6, batch=2, first=0, last=9, seed=1))[4]
    assert saved["step"] == 4
    assert saved["frames"] == [f"image-{number}.jpg" for _, number in drawn]


# ---- the log ------------------------------------------------------------------------------------

def lines_of(folder):
    """The whole lines of a log."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


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
    assert [line["trainable_parameters"] for line in lines] == [999000, 999000]
    assert lines[0]["memory_gb"] > 0.1
    hours = [json.dumps(line | {"seconds": 1800, "processes": 4}) + "\n" for line in lines]
    (tmp_path / "log.jsonl").write_text("".join(hours))
    log.report()
    report = capsys.readouterr().out
    assert "1.0 M trainable parameters" in report and "4.00 process-hours" in report


def test_a_log_goes_on_in_the_middle_of_an_epoch(tmp_path):
    model = torch.nn.Linear(1, 1)
    log = Log(tmp_path, CPU, model)
    for step in range(1, 4):
        log.add(torch.tensor(step / 3))
        if step == 2:
            log.write(epoch=1, step=2)
    checkpoint = {"step": 3, "log": log.state()}
    log.add(torch.tensor(7.0))
    log.write(epoch=2, step=4)
    through = lines_of(tmp_path)
    # It is killed before it saves, and while it writes the next line
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 3, "lo')
    log = Log(tmp_path, CPU, model, checkpoint)
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 1
    assert [line["epoch"] for line in lines_of(tmp_path)] == [1]  # the second one is done again
    log.add(torch.tensor(7.0))
    log.write(epoch=2, step=4)
    assert [line["loss"] for line in lines_of(tmp_path)] == [line["loss"] for line in through]


def test_bad_frames_are_named_and_too_many_stop(tmp_path):
    model = torch.nn.Linear(1, 1)
    log = Log(tmp_path, CPU, model, frames=200)
    log.add(torch.tensor(1.0), {"bad": [(7, "a: torn"), (7, "a: torn")]})  # two views of one frame
    log.add(torch.tensor(1.0), {"bad": [(7, "a: torn"), (9, "b: empty")]})
    log.write(epoch=1)
    assert lines_of(tmp_path)[0]["bad_frames"] == ["a: torn", "b: empty"]
    # A resumed run has not forgotten them
    log = Log(tmp_path, CPU, model, {"step": 1, "log": log.state()}, frames=200)
    with pytest.raises(InputError, match="3 of 200 frames are bad, more than 1%: "
                                         "a: torn; b: empty; c: cut"):
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
    def no_room(*_):
        raise OSError(28, "No space left on device")
    path = tmp_path / "log.jsonl"
    log = Log(tmp_path, CPU, torch.nn.Linear(1, 1))
    log.write(epoch=1, step=1)
    before = path.read_text()
    monkeypatch.setattr(os, "replace", no_room)
    with pytest.raises(InputError, match=r"log.jsonl: cannot be written \(No space left on "
                                         r"device\); it is as it was"):
        log.write(epoch=2, step=2)
    with pytest.raises(InputError, match="log.jsonl: cannot be written"):
        Log(tmp_path, CPU, torch.nn.Linear(1, 1))  # would drop the line: nothing is saved of step 1
    assert path.read_text() == before
    assert not (tmp_path / "log.jsonl.partial").exists()
    path.write_text("")
    log.report()  # of nothing: nothing

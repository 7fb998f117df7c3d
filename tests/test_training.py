"""Schedules, the order of the data, batches over processes, and errors in one line."""
import argparse

import pytest
import torch

from plumbing import training
from plumbing.errors import InputError, one_line_errors
from plumbing.training import Batches

# ---- schedule and batches -----------------------------------------------------------------------

def test_cosine_schedule_by_hand():
    steps = (0, 5, 10, 60, 110)
    values = [training.cosine(step, 110, peak=2.0, end=1.0, warmup=10) for step in steps]
    assert values == pytest.approx([0.0, 1.0, 2.0, 1.5, 1.0])
    assert training.cosine(0, 10, peak=3.0) == 3.0


def test_an_epoch_draws_each_item_once_and_epochs_differ():
    batches = list(Batches(items=10, batch=3, first=0, last=6, seed=1))
    assert [len(batch) for batch in batches] == [3] * 6
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert {epoch for epoch, _ in first} == {0} and {epoch for epoch, _ in second} == {1}
    numbers = [[number for _, number in epoch] for epoch in (first, second)]
    assert len(set(numbers[0])) == len(set(numbers[1])) == 9
    assert numbers[0] != numbers[1]


def test_batches_go_on_where_they_stopped():
    through = list(Batches(items=10, batch=3, first=0, last=7, seed=1))
    assert list(Batches(items=10, batch=3, first=4, last=7, seed=1)) == through[4:]


def test_processes_share_a_batch(monkeypatch):
    whole = list(Batches(items=10, batch=4, first=0, last=3, seed=1))
    monkeypatch.setattr(training, "world", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(training, "rank", lambda: rank)
        parts.append(list(Batches(items=10, batch=4, first=0, last=3, seed=1)))
    assert [a + b for a, b in zip(*parts)] == whole
    with pytest.raises(InputError, match="--batch 3"):
        Batches(items=10, batch=3, first=0, last=3, seed=1)


def test_too_few_items_for_a_batch():
    with pytest.raises(InputError, match="only 2 items"):
        Batches(items=2, batch=3, first=0, last=3, seed=1)


def test_images_become_floats():
    image = torch.tensor([0, 255], dtype=torch.uint8)
    batch = training.to_device({"image": image}, torch.device("cpu"))
    assert batch["image"].tolist() == [0.0, 1.0]


# ---- processes ----------------------------------------------------------------------------------

def test_wrong_device_is_named():
    with pytest.raises(InputError, match="--device nonsense"):
        training.start(argparse.Namespace(device="nonsense", seed=0))


def test_the_first_process_decides_for_all(monkeypatch):
    told = []

    def broadcast(found):
        if told:
            found[:] = told[-1]
    monkeypatch.setattr(training, "world", lambda: 2)
    monkeypatch.setattr(training.dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(training, "rank", lambda: 0)
    assert training.by_first_process(lambda: 3) == 3
    monkeypatch.setattr(training, "rank", lambda: 1)
    told.append([3, None])
    assert training.by_first_process(lambda: pytest.fail("it looks for itself")) == 3
    told.append([None, "p: no last.pth there"])
    with pytest.raises(InputError, match="no last.pth there"):
        training.by_first_process(lambda: 3)


# ---- errors -------------------------------------------------------------------------------------

def test_input_errors_are_one_line_and_exit_code_2(capsys):
    @one_line_errors
    def main(error):
        raise error
    with pytest.raises(SystemExit) as exit_:
        main(InputError("Caught InputError in worker.\nTraceback ...\n"
                        "plumbing.errors.InputError: the file x is cut short"))
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith("error: the file x is cut short\n")
    with pytest.raises(KeyError):  # bugs keep their traceback
        main(KeyError("bug"))

import argparse

import pytest
import torch

import training
from errors import InputError, one_line_errors


def test_cosine_schedule_by_hand():
    values = [training.cosine(step, 110, peak=2.0, end=1.0, warmup=10) for step in (0, 5, 10, 60, 110)]
    assert values == pytest.approx([0.0, 1.0, 2.0, 1.5, 1.0])
    assert training.cosine(0, 10, peak=3.0) == 3.0


def test_an_epoch_draws_each_item_once_and_epochs_differ():
    batches = list(training.Batches(items=10, batch=3, first=0, last=6, seed=1))
    assert [len(b) for b in batches] == [3] * 6
    epochs = [[number for batch in batches[3 * e:3 * e + 3] for _, number in batch] for e in range(2)]
    assert all(len(set(numbers)) == 9 for numbers in epochs) and epochs[0] != epochs[1]
    assert {epoch for batch in batches[3:] for epoch, _ in batch} == {1}


def test_batches_go_on_where_they_stopped():
    through = list(training.Batches(items=10, batch=3, first=0, last=7, seed=1))
    assert list(training.Batches(items=10, batch=3, first=4, last=7, seed=1)) == through[4:]


def test_processes_share_a_batch(monkeypatch):
    whole = list(training.Batches(items=10, batch=4, first=0, last=3, seed=1))
    monkeypatch.setattr(training, "world", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(training, "rank", lambda: rank)
        parts.append(list(training.Batches(items=10, batch=4, first=0, last=3, seed=1)))
    assert [a + b for a, b in zip(*parts)] == whole
    with pytest.raises(InputError, match="--batch 3"):
        training.Batches(items=10, batch=3, first=0, last=3, seed=1)


def test_too_few_items_for_a_batch():
    with pytest.raises(InputError, match="only 2 items"):
        training.Batches(items=2, batch=3, first=0, last=3, seed=1)


def test_images_become_floats():
    batch = training.to_device({"image": torch.tensor([0, 255], dtype=torch.uint8)}, torch.device("cpu"))
    assert batch["image"].tolist() == [0.0, 1.0]


def test_wrong_device_is_named():
    with pytest.raises(InputError, match="--device nonsense"):
        training.start(argparse.Namespace(device="nonsense", seed=0))


def test_input_errors_are_one_line_and_exit_code_2(capsys):
    @one_line_errors
    def main(error):
        raise error
    with pytest.raises(SystemExit) as exit_:
        main(InputError("Caught InputError in worker.\nTraceback ...\nerrors.InputError: the file x is cut short"))
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith("error: the file x is cut short\n")
    with pytest.raises(KeyError):  # bugs keep their traceback
        main(KeyError("bug"))

"""Files of weights: nothing in them runs, and what they lack is named."""
import argparse
import os
import pathlib

import numpy as np
import pytest
import torch

from plumbing.errors import InputError
from plumbing.weights import check_fit, load_checkpoint, read, strip

# ---- reading ------------------------------------------------------------------------------------

class Harmful:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("old_format", [False, True])
def test_code_is_refused_by_name_and_not_run(tmp_path, old_format):
    path = tmp_path / "x.pth"
    harmful = {"x": Harmful(tmp_path / "made")}
    torch.save(harmful, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(InputError, match=r"x.pth: the file asks for \S*mkdir, "
                                         "and loading that could run code"):
        read(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("value, name", [
    (pathlib.PurePosixPath("a"), "PurePosixPath"),
    (np.ones(2), "_reconstruct"),
    (argparse.Namespace(path=pathlib.PurePosixPath("a")), "PurePosixPath"),
    (torch.nn.Linear(1, 1), "Linear")])
def test_anything_but_data_is_refused_by_name(tmp_path, value, name):
    torch.save({"x": value}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=rf"asks for \S*{name}"):
        read(tmp_path / "x.pth")


def test_a_namespace_and_numbers_of_numpy_are_data(tmp_path):
    torch.save({"args": argparse.Namespace(lr=0.1), "best_miou": np.float64(61.5),
                "t": torch.ones(2)}, tmp_path / "x.pth")
    content = read(tmp_path / "x.pth")
    assert content["args"].lr == 0.1
    assert content["best_miou"] == 61.5
    assert content["t"].tolist() == [1, 1]
    # They were allowed for this one load
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_torchscript_and_damage_are_named(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(InputError, match=r"script.pt: a TorchScript archive.*torch.jit.load"):
        read(tmp_path / "script.pt")
    torch.save(torch.ones(1000), tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:2000])
    (tmp_path / "text.pth").write_text("hello")
    for name in ("half.pth", "text.pth"):
        with pytest.raises(InputError, match=f"{name}: torch.load cannot read it"):
            read(tmp_path / name)
    with pytest.raises(InputError, match="last.pth: no such file"):
        read(tmp_path)


def test_kinds(tmp_path):
    torch.save({"kind": "probe"}, tmp_path / "last.pth")
    assert load_checkpoint(tmp_path, "probe") == {"kind": "probe"}
    with pytest.raises(InputError, match="of kind probe, but point_encoder is needed here; "
                                         "stage1.py writes it"):
        load_checkpoint(tmp_path, "point_encoder")
    torch.save([1], tmp_path / "last.pth")
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        load_checkpoint(tmp_path, "probe")


# ---- state dicts --------------------------------------------------------------------------------

def test_strip_keeps_the_part_under_a_prefix_or_all():
    assert strip({"backbone.a": 1, "head.b": 2}, "backbone.") == {"a": 1}
    assert strip({"a": 1, "b": 2}, "backbone.") == {"a": 1, "b": 2}


def test_check_fit_names_five_of_both_sorts():
    state = {f"their{n}": torch.ones(1) for n in range(9)}
    state["w"] = torch.ones(2, 3)
    expected = {f"our{n}": (1,) for n in range(9)}
    expected["w"] = (3, 2)
    with pytest.raises(InputError, match="^file: missing our0; missing our1; missing our2; "
                                         "unexpected their0; unexpected their1 and 14 more$"):
        check_fit(state, expected, "file")
    with pytest.raises(InputError, match=r"^file: w has shape \(2, 3\) instead of \(3, 2\)$"):
        check_fit({"w": torch.ones(2, 3)}, {"w": (3, 2)}, "file")
    check_fit({"w": torch.ones(3, 2)}, {"w": (3, 2)}, "file")

"""Files of weights, ours and strangers': read as data, unwrapped, loaded strictly.

Nothing here runs code from a file: everything goes through `torch.load(weights_only=True)`, which builds tensors and plain
containers only. Two more things are let through, both plain data: argparse.Namespace, in which DINO's and its descendants'
checkpoints keep their arguments, and numpy's numbers, in which WaffleIron's keep their best mIoU.
"""
import argparse
import os
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from errors import InputError, say
from readers.files import WAYS_OUT, looks_like, unreadable

NUMPY_NUMBER = np.float64(0).__reduce__()[0]  # the function that makes a number of its type and bytes
ALLOWED = [argparse.Namespace, np.dtype, np.dtypes.Float64DType,
           *((NUMPY_NUMBER, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]  # numpy 1 and 2
WHO_WRITES = {"point_encoder": "stage1.py", "image_encoder": "stage2.py", "probe": "probe.py", "2d_head": "experiments.ablations 2d-head"}


def read(path):
    """What torch.save wrote to `path`, or to last.pth in that folder, on the CPU.

    Raises InputError, naming the file, where it is missing, damaged, or would need a class that is not allowed.
    """
    path = Path(path)
    try:
        path = path / "last.pth" if path.is_dir() else path
        with path.open("rb") as file:
            beginning = file.read(1000)
            damaged = damaged_record(file)
    except OSError as error:
        raise unreadable(path, error, "give the path of one that is there") from None
    if damaged:
        raise InputError(f"{path}: damaged: its record {damaged} is not what was written (a hole, or "
                         "bytes of another file); take another copy of it, or an earlier checkpoint")
    try:
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load's own, about TorchScript archives
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        message = str(error)
        if isinstance(error, MemoryError) or "t allocate memory" in message:
            raise
        if getattr(error, "errno", None) in WAYS_OUT:
            raise unreadable(path, error, "give the path of one that is there") from None
    if "TorchScript" in message:
        raise InputError(f"{path}: a TorchScript archive, which is a program; if you trust it, take the weights out once: "
                         f"torch.save(torch.jit.load('{path}', map_location='cpu').state_dict(), 'weights.pth')")
    refused = re.search(r"GLOBAL (\S+)", message)
    if refused:
        raise InputError(f"{path}: the file asks for {refused[1]}, and loading that could run code; only tensors, plain "
                         "containers and argparse.Namespace are read. If you trust the file, load it once with weights_only=False "
                         "and save its tensors again")
    guess = "" if beginning.startswith(b"PK") else looks_like(beginning)  # PK: it is a zip archive
    raise InputError(f"{path}: torch.load cannot read it with weights_only=True; "
                     + (guess or "is it a file of torch.save's, and complete? Take another copy"))


def damaged_record(file):
    """The first record of torch.save's open file that is not what was written; None if all are.

    torch.load does not compare the checksums that torch.save writes: a hole would load as weights.
    None too for files without checksums: no zip archives, or torch.save was told to write none.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            checked = any(record.CRC for record in archive.infolist())
            return archive.testzip() if checked else None
    except (OSError, MemoryError):
        raise
    except Exception:  # no zip archive, or one so damaged that torch.load refuses it
        return None


def load_checkpoint(path, kind):
    """The checkpoint of this kind (a key of WHO_WRITES) at `path`, or in last.pth of that folder, as `run_folder.save` wrote it."""
    content = read(path)
    check_kind(content, path, kind)
    return content


def check_kind(content, path, kind):
    """Raise InputError unless the content of a file is a checkpoint of this kind."""
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind:
        is_kind = f"a checkpoint of kind {found}" if found in WHO_WRITES else "not a checkpoint of this project"
        raise InputError(f"{path}: {is_kind}, but {kind} is needed here; {WHO_WRITES[kind]} writes it")


def say_if_unfinished(content, path):
    """Print, in the first process, that the run has not ended which wrote a checkpoint."""
    step, total = content.get("step"), content.get("total")
    if step is not None and total is not None and step < total:
        say(f"{path}: unfinished, step {step} of {total}; the command that wrote it goes on from there")


def located(source, was, now):
    """Where something is that lay at `source` when what was made from it lay in the folder `was`, which is `now` another one.

    As far from `now` as it was from `was`, for folders that were moved or copied together, or where it was. Whether it is the
    same thing its fingerprint tells. What is no absolute path, as an encoder's name, stays as it is.
    """
    if not was or not source or not os.path.isabs(source):
        return source
    moved = os.path.normpath(os.path.join(os.path.abspath(now), os.path.relpath(source, was)))
    return moved if os.path.exists(moved) else source


WRAPPERS = r"(?:^|(?<=\.))(?:module|_forward_module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


def unwrapped(state, subject):
    """A state dict without what DataParallel, torch.compile, FSDP and its checkpoints put into names, at any place of them.

    Raises InputError where two names would become one.
    """
    named = {re.sub(WRAPPERS, "", str(name)): value for name, value in state.items()}
    if len(named) < len(state):
        raise InputError(f"{subject}: holds some weights twice, wrapped and not; save the state dict of one model")
    return named


def strip(state, prefix):
    """The part of a state dict under `prefix`, without it; all of the state dict if nothing is under it."""
    part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return part or state


def check_fit(state, expected, subject):
    """Raise InputError, naming the first five faults, unless state has finite tensors of these {name: shape} and no others."""
    missing = [f"missing {name}" for name in expected if name not in state]
    unexpected = [f"unexpected {name}" for name in state if name not in expected]
    wrong = missing[:3] + unexpected[:2] + missing[3:] + unexpected[2:]  # some of both among the first
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    wrong += [f"{name} has shape {shapes[name]} instead of {tuple(shape)}" for name, shape in expected.items()
              if name in state and (shapes[name] != tuple(shape) or not torch.is_tensor(state[name]))]
    if not wrong:  # then they are of this network
        subject = str(subject).partition(": ")[0]
    wrong = wrong or [f"{name} holds numbers that are not finite" for name in expected if not torch.isfinite(state[name]).all()]
    wrong = wrong or [f"{name} is of type {state[name].dtype}, no weights" for name in expected
                      if not state[name].is_floating_point() and not name.endswith("num_batches_tracked")]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(f"{subject}: {'; '.join(wrong[:5])}{more}")


def load_strictly(module, state, subject):
    """`module.load_state_dict(state)` after `check_fit`."""
    check_fit(state, {name: value.shape for name, value in module.state_dict().items()}, subject)
    module.load_state_dict(state)

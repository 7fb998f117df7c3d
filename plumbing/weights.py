"""Files of weights, ours and strangers': read as data, unwrapped, loaded strictly.

Nothing here runs code from a file. Everything goes through `torch.load(weights_only=True)`, which
builds tensors and plain containers only. Two more things are let through, both plain data:
argparse.Namespace, in which DINO's and its descendants' checkpoints keep their arguments, and
numpy's numbers, in which WaffleIron's keep their best mIoU.
"""
import argparse
import os
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from plumbing.errors import InputError, say
from plumbing.files import WAYS_OUT, looks_like, unreadable

NUMPY_NUMBER = np.float64(0).__reduce__()[0]  # makes a number of a type and bytes
ALLOWED = [argparse.Namespace, np.dtype, np.dtypes.Float64DType,
           (NUMPY_NUMBER, "numpy.core.multiarray.scalar"),   # its name in numpy 1
           (NUMPY_NUMBER, "numpy._core.multiarray.scalar")]  # and in numpy 2
LAYOUT = 2  # of the checkpoints that plumbing/atomic.py writes: count up when keys change
WHO_WRITES = {  # kind of checkpoint: script
    "point_encoder": "stage1.py", "image_encoder": "stage2.py or s3pt.train",
    "probe": "probe.py or finetune.py", "segmenter": "s3pt.segmenter",
    "2d_head": "experiments.ablations 2d-head"}


# ---- reading ------------------------------------------------------------------------------------

def read(path):
    """What torch.save wrote to `path`, or to last.pth in that folder, on the CPU.

    Raises InputError, naming the file, where it is missing or damaged, or where it would need a
    class that is not allowed.
    """
    path = Path(path)

    # Is it there, and is it what was written?
    try:
        path = path / "last.pth" if path.is_dir() else path
        with path.open("rb") as file:
            beginning = file.read(1000)
            damaged = damaged_record(file)
    except OSError as error:
        raise unreadable(path, error, "give the path of one that is there") from None
    if damaged:
        raise InputError(f"{path}: damaged: its record {damaged} is not what was written (a hole, "
                         "or bytes of another file); take another copy of it, or an earlier "
                         "checkpoint")

    # Read it as data
    try:
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load's own, about TorchScript archives
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        message = str(error)
        if isinstance(error, MemoryError) or "t allocate memory" in message:
            raise  # a fault of the machine, which plumbing/errors.py knows
        if getattr(error, "errno", None) in WAYS_OUT:
            raise unreadable(path, error, "give the path of one that is there") from None
    raise InputError(f"{path}: {_why_refused(path, message, beginning)}")


def _why_refused(path, message, beginning):
    """Why torch.load refused a file, by its message and the file's beginning; and the way out."""
    if "TorchScript" in message:
        return ("a TorchScript archive, which is a program; if you trust it, take the weights out "
                f"once: torch.save(torch.jit.load('{path}', map_location='cpu').state_dict(), "
                "'weights.pth')")
    refused = re.search(r"GLOBAL (\S+)", message)
    if refused:
        return (f"the file asks for {refused[1]}, and loading that could run code; only tensors, "
                "plain containers and argparse.Namespace are read. If you trust the file, load it "
                "once with weights_only=False and save its tensors again")
    is_zip = beginning.startswith(b"PK")  # torch.save's format, so another guess would be wrong
    guess = "" if is_zip else looks_like(beginning)
    return ("torch.load cannot read it with weights_only=True; "
            + (guess or "is it a file of torch.save's, and complete? Take another copy"))


def damaged_record(file):
    """The first record of torch.save's open file that is not what was written; None if all are.

    torch.load does not compare the checksums that torch.save writes: a hole would load as weights.
    Files without checksums give None: other formats than zip, and what torch.save was told to
    write without them.
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
    """A checkpoint that `plumbing.atomic.save` wrote, at `path` or in last.pth of that folder.

    kind: a key of WHO_WRITES. Raises InputError where the checkpoint is of another kind.
    """
    content = read(path)
    check_kind(content, path, kind)
    return content


def check_kind(content, path, kind):
    """Raise InputError unless the content of a file is a checkpoint of this kind."""
    found = content.get("kind") if isinstance(content, dict) else None
    if found in WHO_WRITES and is_outdated(content):
        raise InputError(f"{path}: written by an earlier version of this project, whose "
                         f"checkpoints have other keys; write it anew with {WHO_WRITES[found]}")
    if found == kind:
        return
    is_kind = "not a checkpoint of this project"
    if found in WHO_WRITES:
        is_kind = f"a checkpoint of kind {found}"
    raise InputError(f"{path}: {is_kind}, but {kind} is needed here; {WHO_WRITES[kind]} writes it")


def is_outdated(content):
    """Whether a run's checkpoint is of a version whose flags and keys had other names."""
    of_run = isinstance(content.get("args"), dict) and "precision" in content["args"]
    return of_run and content.get("layout") != LAYOUT


def say_if_unfinished(content, path):
    """Print, in the first process, that the run which wrote a checkpoint has not ended."""
    step = content.get("step")
    total = content.get("total")
    if step is not None and total is not None and step < total:
        say(f"{path}: unfinished, step {step} of {total}; "
            "the command that wrote it goes on from there")


def located(source, was, now):
    """The path of `source`, after what was made from it moved from the folder `was` to `now`.

    Folders may be moved or copied together: the path that is as far from `now` as `source` was
    from `was` is taken if something is there, otherwise `source`. Whether it is the same thing its
    fingerprint tells. What is no absolute path, as an encoder's name, stays as it is.
    """
    if not was or not source or not os.path.isabs(source):
        return source
    moved = os.path.join(os.path.abspath(now), os.path.relpath(source, was))
    moved = os.path.normpath(moved)
    return moved if os.path.exists(moved) else source


# ---- state dicts --------------------------------------------------------------------------------

# What DataParallel, torch.compile, FSDP and its checkpoints put into names, at any place of them
WRAPPERS = (r"(?:^|(?<=\.))(?:module|_forward_module|_orig_mod|_fsdp_wrapped_module"
            r"|_checkpoint_wrapped_module)\.")


def unwrapped(state, subject):
    """A state dict whose names are without WRAPPERS.

    Raises InputError where two names would become one.
    """
    named = {re.sub(WRAPPERS, "", str(name)): value for name, value in state.items()}
    if len(named) < len(state):
        raise InputError(f"{subject}: holds some weights twice, wrapped and not; save the state "
                         "dict of one model")
    return named


def strip(state, prefix):
    """The part of a state dict under `prefix`, without it; all of it if there is no such part."""
    part = {name.removeprefix(prefix): value for name, value in state.items()
            if name.startswith(prefix)}
    return part or state


def check_fit(state, expected, file, otherwise=None, way_out=None):
    """Raise InputError unless `state` has exactly the tensors `expected`, and finite ones.

    expected: {name: shape}. The message names the first five faults.
    file: what it begins with. otherwise: what follows where names or shapes are others, as these
    are the tensors of another network. way_out: what it ends with then.
    """
    faults = _unlike(state, expected)
    if faults:
        file = f"{file}: {otherwise}" if otherwise else file
    else:
        way_out = None
        faults = [f"{name} holds numbers that are not finite" for name in expected
                  if not torch.isfinite(state[name]).all()]
    if not faults:
        faults = [f"{name} is of type {state[name].dtype}, no weights" for name in expected
                  if not state[name].is_floating_point()
                  and not name.endswith("num_batches_tracked")]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        ending = f"; {way_out}" if way_out else ""
        raise InputError(f"{file}: {'; '.join(faults[:5])}{more}{ending}")


def _unlike(state, expected):
    """How a state dict differs from {name: shape}, in words: names first, then shapes."""
    missing = [f"missing {name}" for name in expected if name not in state]
    unexpected = [f"unexpected {name}" for name in state if name not in expected]
    faults = missing[:3] + unexpected[:2] + missing[3:] + unexpected[2:]  # both among the first
    for name, shape in expected.items():
        if name not in state:
            continue
        found = tuple(getattr(state[name], "shape", ()))
        if found != tuple(shape) or not torch.is_tensor(state[name]):
            faults.append(f"{name} has shape {found} instead of {tuple(shape)}")
    return faults


def load_strictly(module, state, file, otherwise=None):
    """`module.load_state_dict(state)` after `check_fit`."""
    expected = {name: value.shape for name, value in module.state_dict().items()}
    check_fit(state, expected, file, otherwise)
    module.load_state_dict(state)

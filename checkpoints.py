"""Files of weights, ours and strangers': read as data, unwrapped, loaded strictly.

Nothing here runs code from a file: everything goes through `torch.load(weights_only=True)`, which builds tensors and plain
containers only. Two more things are let through, both plain data: argparse.Namespace, in which DINO's and its descendants'
checkpoints keep their arguments, and numpy's numbers, in which WaffleIron's keep their best mIoU.
"""
import argparse
import re
import warnings
from pathlib import Path

import numpy as np
import torch

from errors import InputError

NUMPY_NUMBER = np.float64(0).__reduce__()[0]  # the function that makes a number of its type and bytes
ALLOWED = [argparse.Namespace, np.dtype, np.dtypes.Float64DType,
           *((NUMPY_NUMBER, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]  # numpy 1 and 2
WHO_WRITES = {"point_encoder": "stage1.py", "image_encoder": "stage2.py", "probe": "probe.py"}


def read(path):
    """What torch.save wrote to `path`, or to last.pth in that folder, on the CPU.

    Raises InputError, naming the file, where it is missing, damaged, or would need a class that is not allowed.
    """
    path = Path(path)
    path = path / "last.pth" if path.is_dir() else path
    try:
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load's own, about TorchScript archives
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # a damaged file can raise nearly anything
        message = str(error)
    if "TorchScript" in message:
        raise InputError(f"{path}: a TorchScript archive, which is a program; if you trust it, take the weights out once: "
                         f"torch.save(torch.jit.load('{path}', map_location='cpu').state_dict(), 'weights.pth')")
    refused = re.search(r"GLOBAL (\S+)", message)
    if refused:
        raise InputError(f"{path}: the file asks for {refused[1]}, and loading that could run code; only tensors, plain "
                         "containers and argparse.Namespace are read. If you trust the file, load it once with weights_only=False "
                         "and save its tensors again")
    raise InputError(f"{path}: torch.load cannot read it with weights_only=True; is it a file of torch.save's, and complete?")


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


def strip(state, prefix):
    """The part of a state dict under `prefix`, without it; all of the state dict if nothing is under it."""
    part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return part or state


def check_fit(state, expected, subject):
    """Raise InputError, naming the first five differences, unless the tensors in state have these {name: shape}."""
    missing = [f"missing {name}" for name in expected if name not in state]
    unexpected = [f"unexpected {name}" for name in state if name not in expected]
    wrong = missing[:3] + unexpected[:2] + missing[3:] + unexpected[2:]  # some of both among the first
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    wrong += [f"{name} has shape {shapes[name]} instead of {tuple(shape)}" for name, shape in expected.items()
              if name in state and (shapes[name] != tuple(shape) or not torch.is_tensor(state[name]))]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(f"{subject}: {'; '.join(wrong[:5])}{more}")


def load_strictly(module, state, subject):
    """`module.load_state_dict(state)` after `check_fit`."""
    check_fit(state, {name: value.shape for name, value in module.state_dict().items()}, subject)
    module.load_state_dict(state)

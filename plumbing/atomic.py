"""Files that are written whole or not at all, so that a run may be killed at any time.

A file is written under a temporary name and renamed. Where it cannot be written, InputError says
so in one line, and what was there before is still there.
"""
import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import torch

from plumbing.endings import signals_wait
from plumbing.errors import InputError
from plumbing.training import rank
from plumbing.weights import LAYOUT

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk


# ---- checkpoints --------------------------------------------------------------------------------

@signals_wait()
def save(path, content):
    """Write a checkpoint in the first process; the last.pth before it is kept as previous.pth.

    content: a dict; its "model", if it has one, is {name: tensor}.
    Raises InputError where the file cannot be written, and where the model is not finite.
    """
    if rank() > 0:
        return
    path = Path(path)
    broken = [name for name, value in content.get("model", {}).items()
              if not torch.isfinite(value).all()]
    if broken:
        raise InputError(f"{path}: not written, {broken[0]} and {len(broken) - 1} more tensors of "
                         "the model hold numbers that are not finite; what was saved before is "
                         "there. Try a lower learning rate or --precision fp32")

    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(content | {"layout": LAYOUT}, file)
            # What is renamed must be on the disk, or a power cut leaves the new name on nothing
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        cause = _cause(error)
        if cause is None:
            raise
        with contextlib.suppress(OSError):
            partial.unlink()
        raise _not_saved(path, cause, content) from None

    if path.name == "last.pth" and path.is_file():
        os.replace(path, path.with_name("previous.pth"))
    os.replace(partial, path)


def _cause(error):
    """The failed write behind an error of torch.save's; None if it is another error.

    torch.save turns a failed write into a RuntimeError of its own.
    """
    if isinstance(error, OSError) or "PytorchStreamWriter" in str(error):
        return error
    return error.__context__ if isinstance(error.__context__, OSError) else None


def _not_saved(path, cause, content):
    """The InputError that says why a checkpoint cannot be written, and the way out."""
    room = ""
    way_out = "Choose another --out, or mend this one"
    if getattr(cause, "errno", None) in (None, *FULL):
        free = shutil.disk_usage(path.parent).free
        room = f": it needs {_bytes(content) / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        way_out = "Make room"
    there = f"{path.name} is as it was" if path.is_file() else "nothing was saved before"
    return InputError(f"{path}: cannot be written ({str(cause).splitlines()[0]}){room}; {there}. "
                      f"{way_out}, then repeat the command")


def _bytes(content):
    """Size of all tensors in nested containers."""
    if torch.is_tensor(content):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(map(_bytes, content.values()))
    if isinstance(content, (list, tuple)):
        return sum(map(_bytes, content))
    return 0


# ---- text ---------------------------------------------------------------------------------------

def write_text(path, text):
    """Write a file of text. Raises InputError where it cannot be written."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        way_out = "Make room" if error.errno in FULL else "Mend that, or choose another --out"
        raise InputError(f"{path}: cannot be written ({error.strerror}); it is as it was. "
                         f"{way_out}, then repeat the command") from None


def write_json(path, content):
    """Write JSON as `write_text` does. Numbers must be finite, as JSON has no others."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False))


def read_json(path):
    """What is in a file of JSON; None where there is no file, or one that was cut short."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None

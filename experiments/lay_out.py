"""A dataset by links, all of whose scenes are of the condition "clear": for experiments/real.py.

Scans and labels that gzip has packed are stored unpacked in its format, as unpacking is much of an
item's time.
"""
import gzip
import os
from pathlib import Path

from experiments.runs import writing
from plumbing.atomic import read_json, write_json
from plumbing.errors import InputError
from readers.conditions import FILE
from readers.pickles import unpacked

NOTE = "frames.json"  # in the folder of the runs: which frames they are of


def check_same(frames, out):
    """Note which frames the runs in a folder are of. Raises InputError if they are of others."""
    note = Path(out, NOTE)
    before = read_json(note)
    if before is not None and before != frames:
        changed = [name for name in frames if before.get(name) != frames[name]]
        raise InputError(f"--out {out}: its runs are of other frames than those of --data now "
                         f"(other {', '.join(changed)}); choose another folder")
    if before is None:
        write_json(note, frames)


def lay_out(table, out):
    """Fill a folder with the files of a `FrameTable`'s root; what is there stays.

    Raises InputError for a folder in the dataset, and for a packed file that cannot be unpacked.
    """
    root, out = Path(table.root), Path(out)
    if out.resolve().is_relative_to(root.resolve()):
        raise InputError(f"--out {out.parent}: lies in the dataset, of which it is to hold a copy; "
                         "choose a folder outside")
    packed = {path.decode() for name in ("scan", "labels") if name in table
              for path in table[name] if path.endswith(b".gz")}
    with writing(out.parent):
        for path in files_below(root):
            name = path.relative_to(root)
            copy = out / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if str(name) in packed:
                _write_unpacked(path, copy)
            elif name != Path(FILE):
                _link(path, copy)
        write_json(out / FILE, {scene: "clear" for scene in table.scenes()})


def files_below(root):
    """The files in a folder and below it. Links are followed, but not back to a folder above."""
    waiting = [(root, ())]
    while waiting:
        folder, above = waiting.pop()
        real = folder.resolve()
        if real in above:
            continue
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                waiting.append((path, (*above, real)))
            else:
                yield path


def _write_unpacked(path, copy):
    """Store a gzip file unpacked in its format, unless it is there."""
    if copy.exists():
        return
    # Whole or not at all, as it is not written again
    partial = copy.with_name(f"{copy.name}.partial")
    partial.write_bytes(gzip.compress(unpacked(path), 0, mtime=0))
    partial.replace(copy)


def _link(path, copy):
    """Make `copy` a link to a file; one to where it was before is renewed."""
    target = path.resolve()
    if copy.is_symlink():
        if os.readlink(copy) == str(target):
            return
        copy.unlink()
    copy.symlink_to(target)

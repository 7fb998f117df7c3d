"""What every dataset's table needs: its cache, a choice of its rows, files that are there.

A table is a dict of arrays, {column: array}, read once from the dataset's own JSON files. Strings
are bytes arrays (UTF-8), and paths are relative to the dataset's root.
"""
import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from plumbing.errors import InputError
from plumbing.fingerprint import digest

FORMAT = 5  # of the cache: count up when what is stored changes
PROJECT = Path(__file__).resolve().parent.parent
UNKNOWN = 255  # class of a label that is of no category


# ---- the cache ---------------------------------------------------------------------------------

def cached(kind, root, tables, module, arguments, here, build, look):
    """The table of a dataset, {name: array}: the fields of the dataclass `kind` but for `root`.

    It comes from the cache while no JSON file in the folders `tables` has another size or date or,
    with `look`, another content. Else it is made anew: by `build()` if `here`, else by a process
    `python -m MODULE --data ROOT *arguments`, which does the same. Raises InputError as these do, and where
    the cache cannot be written.
    """
    state = state_of(tables)
    folder = cache_folder(cache_key(module, arguments, state))
    names = {field.name for field in dataclasses.fields(kind)} - {"root"} | {"content"}
    for _ in range(2):
        # What the cache holds
        try:
            fields = load_arrays(folder, names)
            content = fields.pop("content").item().decode()
            if not look or content == content_of(tuple(tables), state):
                return fields
        except (OSError, ValueError, EOFError):  # it is not there, or not whole
            pass

        # Make it anew, and read that
        shutil.rmtree(folder, ignore_errors=True)
        if here:
            fields = build()
            fields["content"] = np.bytes_(content_of(tuple(tables), state))
            store_arrays(folder, fields)
        else:
            build_elsewhere(module, root, arguments)
    raise InputError(f"{folder}: the index cannot be kept there; mend that folder, or set "
                     "XDG_CACHE_HOME to another")


def state_of(tables):
    """(path, size, date) of each JSON file in these folders."""
    state = []
    for folder in tables:
        for path in sorted(folder.glob("*.json")):
            status = path.stat()
            state.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(state)


@functools.cache
def content_of(tables, state):
    """A hash of the JSON files in the folders `tables`; `state` is what `state_of` says of them."""
    return digest(path.read_bytes() for folder in tables for path in sorted(folder.glob("*.json")))


def cache_key(module, arguments, state):
    """16 hexadecimal digits: another module, other arguments or another state have another key."""
    parts = FORMAT, module, arguments, state
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def cache_folder(key):
    """The folder of one table in the user's cache."""
    return caches() / "collaborative-distillation" / key


def caches():
    """The folder of the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()


def load_arrays(folder, names):
    """{name: array} from the files NAME.npy of a folder.

    The arrays are mapped from the files, so that all processes of a machine share their memory.
    Raises OSError, ValueError or EOFError for a file that is missing or damaged.
    """
    arrays = {}
    for name in names:
        mapped = np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
        arrays[name] = np.asarray(mapped)
    return arrays


def store_arrays(folder, arrays):
    """Write {name: array} as the files NAME.npy of a new folder, all of them or none.

    Raises InputError where that is not possible.
    """
    # Under another name first: who finds the folder finds it whole
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
        for name, values in arrays.items():
            with (partial / f"{name}.npy").open("wb") as file:
                np.save(file, values, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{folder}: the index cannot be kept there ({error.strerror}); mend that "
                         "folder, or set XDG_CACHE_HOME to another") from None
    with contextlib.suppress(OSError):  # another process was first
        partial.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)


def build_elsewhere(module, root, arguments):
    """Run a reader as a script, which stores the table. Raises its errors as InputError."""
    command = [sys.executable, "-m", module, "--data", str(root), *arguments]
    done = subprocess.run(command, cwd=PROJECT, env=os.environ | {"XDG_CACHE_HOME": str(caches())},
                          capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        last = lines[-1] if lines else "killed, perhaps for memory"
        reason = last.partition("error: ")[2]
        raise InputError(reason or f"--data {root}: reading the tables failed: {last}")


# ---- reading tables ----------------------------------------------------------------------------

@contextlib.contextmanager
def damage_named(root, version):
    """Make an InputError of whatever goes wrong here: damaged tables can raise nearly anything."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except ImportError as error:
        raise InputError(f"nuscenes-devkit cannot be imported ({error}); "
                         "pip install -r requirements.txt") from None
    except Exception as error:
        reason = (f"--data {root}: nuscenes-devkit cannot read {version} "
                  f"({type(error).__name__}: {error}); extract its tables again")
        raise InputError(reason.replace("\n", " ")) from None


def as_bytes(strings):
    """Nested lists of strings, in any language, as an array of UTF-8 bytes."""
    array = np.array(strings, np.str_)
    return np.char.encode(array, "utf-8") if array.size else array.astype(np.bytes_)


def spread(rows, limit):
    """At most `limit` of these rows, evenly spread; all of them if it is None."""
    if limit is None or limit >= len(rows):
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).round().astype(int)]


# ---- the files that a table names --------------------------------------------------------------

def check_files(root, paths, way_out="extract all archives of this version into this folder"):
    """Raise InputError if one of these files, relative to `root`, is missing or lies outside it."""
    outside = [path for path in paths if os.path.isabs(path) or ".." in Path(path).parts]
    if outside:
        raise InputError(f"--data {root}: the tables name {outside[0]}, which is outside of this "
                         "folder; do not trust this dataset")
    missing = [path for path in paths if not os.path.isfile(os.path.join(root, path))]
    if missing:
        raise InputError(f"--data {root}: {len(missing)} of {len(paths)} files that the tables "
                         f"name are missing, the first is {missing[0]}; {way_out}")


def all_there(root, paths):
    """The files of these paths (bytes, relative to `root`). Raises InputError if one is missing."""
    check_files(root, [path.decode() for path in paths])
    return [Path(root, path.decode()) for path in paths]


def ends_of(path, count=4096):
    """The size of a file, its first bytes and its last ones, as bytes."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        begin = file.read(count)
        file.seek(max(0, size - count))
        return size.to_bytes(8, "little") + begin + file.read()

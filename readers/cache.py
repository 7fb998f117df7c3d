"""The cache of datasets' tables: read once from the dataset's own files, then mapped into memory.

It is a folder of .npy files for each table, in $XDG_CACHE_HOME or ~/.cache.
"""
import contextlib
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
from readers.paths import PICTURES

# Columns that have no row a frame
OF_ALL = ("cameras", "conditions", "label_map", "notes", "intensity")
FORMAT = 6  # of the cache: count up when what is stored of the same readers changes
BAD_FRAMES = 3  # exit code of a reader whose table is made and has bad frames
PROJECT = Path(__file__).resolve().parent.parent


def cached(reader, root, options, here, look, given):
    """The columns of a reader's table, from the cache or made anew.

    given: the path that --data gave, of which a reader's `home` made root.
    They are in the cache while the reader is the same, and no source has another size or date or,
    with `look`, another content. Else the reader makes them: in this process if `here`, else in
    one of its own.
    Raises InputError as these do, and where the cache cannot be written.
    """
    sources = tuple(reader.sources(root, **options))
    state = state_of(sources)
    folder = cache_folder(cache_key(reader, root, options, state))
    for _ in range(2):
        # What the cache holds
        try:
            columns = load_arrays(folder)
            content = columns.pop("content").item().decode()
            if not look or content == content_of(sources, state):
                return columns
        except (OSError, ValueError, EOFError, KeyError):  # it is not there, or not whole
            pass

        # Make it anew, and read that
        shutil.rmtree(folder, ignore_errors=True)
        if here:
            columns = with_record(reader.table(root, **options))
            columns = with_damage(reader, root, columns)
            columns["content"] = np.bytes_(content_of(sources, state))
            store_arrays(folder, columns)
        else:
            build_elsewhere(reader.__name__, given, options)
    if not folder.exists():
        raise InputError(f"{reader.__file__}: run as a script it keeps no table; end it with "
                         "`main`, as the other readers")
    raise InputError(f"{folder}: the table cannot be kept there; mend that folder, or set "
                     "XDG_CACHE_HOME to another")


def with_record(columns):
    """The columns and, where the reader gives none, a hash of all that they say of each frame."""
    if "record" in columns:
        return columns
    rows = len(columns["split"])
    of_frames = [values for name, values in columns.items()
                 if name not in OF_ALL and len(values) == rows]
    said = [[values[frame].tolist() for values in of_frames] for frame in range(rows)]
    return columns | {"record": np.array([digest([repr(frame).encode()]) for frame in said],
                                         np.bytes_)}


def with_damage(reader, root, columns):
    """The columns and, where the reader looks for that, what is wrong with each frame's files."""
    if not hasattr(reader, "damage"):
        return columns
    rows = range(len(columns["split"]))
    reasons = [reader.damage(root, columns, frame).encode() for frame in rows]
    return columns | {"bad": np.array(reasons, np.bytes_)}


def state_of(sources):
    """(path, size, date) of each of these files and folders."""
    state = []
    for path in sources:
        if not path.exists():
            raise InputError(f"{path}: no such file; give the dataset's root as --data NAME=PATH")
        status = path.stat()
        state.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(state)


@functools.cache
def content_of(sources, state):
    """A hash of these files, and of the names in these folders.

    `state` is what `state_of` says of them. It will do for pictures, of which a table has no more
    than the size.
    """
    def content(path):
        if path.is_dir():
            return "\n".join(sorted(os.listdir(path))).encode("utf-8", "surrogateescape")
        return b"" if path.suffix.lower() in PICTURES else path.read_bytes()

    return digest(map(content, sources))


def cache_key(reader, root, options, state):
    """16 hexadecimal digits: another reader, other texts of readers, options or state have others.

    The texts of all readers count, because one may take another's classes.
    """
    texts = [file.read_bytes() for file in sorted(Path(reader.__file__).parent.glob("*.py"))]
    parts = FORMAT, reader.__name__, digest(texts), str(root), sorted(options.items()), state
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def cache_folder(key):
    """The folder of one table in the user's cache."""
    return caches() / "collaborative-distillation" / key


def caches():
    """The folder of the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()


def load_arrays(folder):
    """{name: array} that `store_arrays` wrote.

    The arrays are mapped from the files, so that all processes of a machine share their memory.
    Raises OSError, ValueError or EOFError for a file that is missing or damaged.
    """
    arrays = {}
    for name in np.load(folder / "names.npy", allow_pickle=False).tolist():
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
        for name, values in (arrays | {"names": np.array(list(arrays))}).items():
            with (partial / f"{name}.npy").open("wb") as file:
                np.save(file, values, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{folder}: the table cannot be kept there ({error.strerror}); mend that "
                         "folder, or set XDG_CACHE_HOME to another") from None
    with contextlib.suppress(OSError):  # another process was first
        partial.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)


def build_elsewhere(module, root, options):
    """Run a reader as a script, which stores the table. Raises its errors as InputError."""
    command = [sys.executable, "-m", module, "--data", str(root)]
    for name, value in options.items():
        command += [f"--{name}", value]
    done = subprocess.run(command, cwd=PROJECT, env=os.environ | {"XDG_CACHE_HOME": str(caches())},
                          capture_output=True, text=True)
    if done.returncode not in (0, BAD_FRAMES):
        lines = done.stderr.strip().splitlines()
        last = lines[-1] if lines else "killed, perhaps for memory"
        reason = last.partition("error: ")[2]
        raise InputError(reason or f"--data {root}: reading the tables failed: {last}")

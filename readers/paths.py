"""The files that a table names: whether they are there, how large they are, how they end."""
import os
from pathlib import Path

from plumbing.errors import InputError

PICTURES = (".jpg", ".jpeg", ".png")  # how the names of pictures end, in lower case
MODES = ("RGB", "L")                  # of Pillow: 8-bit colours and grey, no others are read


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


def size_of(root, path):
    """The bytes of a file, 0 if there is none."""
    file = os.path.join(root, path)
    return os.path.getsize(file) if os.path.isfile(file) else 0


def ends_of(path, count=4096):
    """The size of a file, its first bytes and its last ones, as bytes."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        begin = file.read(count)
        file.seek(max(0, size - count))
        return size.to_bytes(8, "little") + begin + file.read()


def size_in_header(path, modes=None):
    """Height and width of a picture as its header says, without decoding; 0, 0 if it has none.

    modes: those that it may have, or None for any; 0, 0 of one of another. Raises InputError where
    the system cannot read it.
    """
    from PIL import Image

    from plumbing.files import unreadable
    try:
        with Image.open(path) as picture:
            fits = modes is None or picture.mode in modes
            return picture.size[::-1] if fits else (0, 0)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything; `damage` says so
        if getattr(error, "errno", None):
            raise unreadable(path, error, "extract it again") from None
        return 0, 0

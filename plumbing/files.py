"""Files that cannot be read: what the system says of them, and what they look like.

An InputError says in one line which file it is, what is wrong with it, and the way out.
"""
import errno
from pathlib import Path

from plumbing.errors import FILES, MEMORY, InputError

WAYS_OUT = {
    errno.EMFILE: FILES, errno.ENFILE: FILES, errno.ENOMEM: MEMORY,
    errno.EACCES: "give the user of this run the right to read it",
    errno.EPERM: "give the user of this run the right to read it",
    errno.EISDIR: "a file is needed here",
    errno.EIO: "the disk or the network fails, see `dmesg`; repair that first"}

# How files begin that often stand in place of the right one: what they are, and what to do
BEGINNINGS = {
    b"version https://git-lfs": "a Git-LFS pointer? Get the file itself with `git lfs pull`",
    b"<!doctype html": "a web page? Download the file again, logged in if that is asked for",
    b"<html": "a web page? Download the file again, logged in if that is asked for",
    b"<?xml": "an error message of a server? Download the file again",
    b"\x1f\x8b": "a gzip archive? Unpack it",
    b"pk\3\4": "a zip archive (.npz)? Unpack it",
    b"\x93numpy": "NumPy's format (.npy)? Write the numbers alone: numpy.load(FILE).tofile(...)",
    b"# .pcd": "a PCD file with a header? Convert it"}


def read_bytes(path, missing="extract the dataset again"):
    """The bytes of a file; `missing`: the way out where it is not there."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error, missing) from None


def unreadable(path, error, missing):
    """The InputError for an OSError, which is the system's and seldom the file's fault."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return InputError(f"{path}: no such file; {missing}")
    way = WAYS_OUT.get(error.errno, "the system cannot read it now; repair that first")
    return InputError(f"{path}: {error.strerror or error}; {way}")


def looks_like(content):
    """What bytes that cannot be read look like, and what to do, in words; "" if like nothing."""
    head = content[:1000].lstrip().lower()
    for beginning, meaning in BEGINNINGS.items():
        if head.startswith(beginning):
            return meaning
    if content[8:10] == b'{"':
        return ("a safetensors file? Convert it once: "
                "torch.save(safetensors.torch.load_file(FILE), 'weights.pth')")
    if content and content.count(0) == len(content):
        return "zeros only, of a copy that was broken off? Copy it again"
    if head and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "text? Convert it to binary"
    return ""

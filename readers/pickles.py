"""A pandas DataFrame of numbers out of a gzip-compressed pickle, without running anything in it.

A pickle is a program: it names functions, and Python's own reader imports and calls them. Here the
steps of that program are followed with lists alone. A name is looked up in NAMES and never
imported, and what would have been called is written down as a `Made`. The arrays are then taken out
of these notes, checked against the bytes that are there.

Read are the forms in which pandas 0.25 to 3 writes a frame, in pickle's protocols 2 to 5.
"""
import math
import os
import pickletools
import re
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from plumbing.errors import InputError
from plumbing.files import looks_like, read_bytes

POINTS = ("x", "y", "z", "i", "t", "d")  # columns of a frame of LiDAR points
LABELS = ("class",)                      # and of one of their labels

MAX_BYTES = 2**28  # of an unpacked file; PandaSet's have 8 MB
USUAL = 2**24      # at most: a file that says more of itself is unpacked to see whether it is whole
MAX_STEPS = 5000   # of a pickle; PandaSet's have 220, those of pandas 3 up to 520
AGAIN = "download it again"
DISTRUST = "refused: not what a PandaSet frame holds; download it again from PandaSet itself"

# The names that a frame may use, and what they are. The first nine are all that PandaSet's own
# files use (pandas 1.0); the others are those of files that other versions wrote.
NAMES = {
    "pandas.core.frame.DataFrame": "frame",
    "pandas.core.internals.managers.BlockManager": "manager",
    "pandas.core.indexes.base._new_Index": "index",
    "pandas.core.indexes.base.Index": "kind of index",
    "pandas.core.indexes.range.RangeIndex": "kind of index",
    "numpy.core.multiarray._reconstruct": "array",
    "numpy.ndarray": "kind of array",
    "numpy.dtype": "dtype",
    "builtins.slice": "slice",

    "pandas.DataFrame": "frame",
    "pandas.core.internals.BlockManager": "manager",
    "pandas._libs.internals._unpickle_block": "block",
    "pandas.core.indexes.numeric.Int64Index": "kind of index",
    "pandas.Index": "kind of index",
    "pandas.RangeIndex": "kind of index",
    "pandas._libs.arrays.__pyx_unpickle_NDArrayBacked": "strings",
    "pandas.arrays.StringArray": "kind of array",
    "pandas.StringDtype": "dtype",
    "numpy._core.multiarray._reconstruct": "array",
    "numpy.core.numeric._frombuffer": "buffer",
    "numpy._core.numeric._frombuffer": "buffer",
    "__builtin__.slice": "slice",
    "_codecs.encode": "encoded"}

# The steps that a frame's program may have, as pickletools calls them
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
          "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(eq=False, repr=False)
class Made:
    """A name of NAMES and, where the pickle would have called it, its arguments and its state."""

    what: str
    args: Any = None
    state: Any = None


class Refused(Exception):
    """Why a pickle is none of a frame of numbers."""


def read_frame(path, columns):
    """{name: [N] numbers} of these columns of a frame, floats or whole numbers, read-only.

    path: of a .pkl.gz file. columns: POINTS or LABELS, or some of them.
    Raises InputError for what is no such frame; nothing in it has been executed then.
    """
    content = unpacked(path)
    try:
        return columns_of(follow(content), columns)
    except Refused as error:
        raise InputError(f"{path}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = f"{path}: not a pickled DataFrame ({type(error).__name__}); {AGAIN}"
        raise InputError(reason) from None


# ---- gzip --------------------------------------------------------------------------------------

def unpacked(path):
    """The content of a gzip file. Raises InputError for none, and beyond MAX_BYTES."""
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    if size > MAX_BYTES:
        raise InputError(f"{path}: {too_large()}")
    packed = read_bytes(path, AGAIN)
    wrong = wrong_beginning(packed[:1000])
    if wrong:
        raise InputError(f"{path}: {wrong}")

    # One byte more than allowed would show that there are more; memory is taken for no further one
    unzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        content = unzip.decompress(packed, MAX_BYTES + 1)
    except zlib.error as error:
        raise InputError(f"{path}: damaged ({error}); {AGAIN}") from None
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: {too_large()}")
    if not unzip.eof:
        raise InputError(f"{path}: cut short, the gzip data have no end; {AGAIN}")
    if unzip.unused_data:
        raise InputError(f"{path}: {len(unzip.unused_data)} bytes follow the gzip data; {AGAIN}")
    return content


def wrong_beginning(head):
    """What is wrong with a gzip file by its first bytes, in words, or ""."""
    if not head:
        return f"empty; {AGAIN}"
    if not head.startswith(b"\x1f\x8b"):
        guess = "a pickle that is unpacked? Pack it with gzip" if head[:1] == b"\x80" else ""
        guess = guess or looks_like(head)
        return f"no gzip file; {guess + ', or ' if guess else ''}{AGAIN}"
    return ""


def wrong_file(path):
    """What is wrong with a packed frame, in words, or "". It is unpacked only if its ends are odd.

    The last four bytes are the unpacked size; of a file that is cut short they are any number.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(1000)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4))
            tail = file.read()
    except OSError as error:
        return f"{error.strerror}; {AGAIN}"
    stated = int.from_bytes(tail, "little")
    if head and size <= stated <= USUAL:  # a frame gets smaller when packed
        return wrong_beginning(head)
    try:
        unpacked(path)
    except InputError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def too_large():
    """The words for a file that is too large to be a frame."""
    return f"more than {MAX_BYTES >> 20} MB unpacked; {DISTRUST}"


# ---- the steps of a pickle ---------------------------------------------------------------------

def follow(content):
    """What a pickle would make: numbers, strings, bytes, tuples, lists, dicts, and `Made`.

    Raises Refused for a name outside NAMES and for steps that no frame has. Steps are counted,
    because the smallest ones, a byte each, make things that take a hundred.
    """
    stack = []
    below = []  # the stacks below each mark
    memo = {}
    for number, (step, value, _) in enumerate(pickletools.genops(content)):
        name = step.name
        if number >= MAX_STEPS:
            raise Refused(f"a pickle of more than {MAX_STEPS} steps; {DISTRUST}")
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in VALUES:
            stack.append(value)
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in TUPLES:
            items = [stack.pop() for _ in range(TUPLES[name])]
            stack.append(tuple(items[::-1]))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items = stack
            stack = below.pop()
            if name == "TUPLE":
                stack.append(tuple(items))
            else:
                fill(stack[-1], items)
        elif name == "APPEND":
            fill(stack[-2], [stack.pop()])
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            fill(stack[-1], [key, value])
        elif name == "GLOBAL":
            stack.append(named(value.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            value, module = stack.pop(), stack.pop()
            stack.append(named(f"{module}.{value}"))
        elif name in ("REDUCE", "NEWOBJ"):
            args, callee = stack.pop(), stack.pop()
            stack.append(called(callee, args))
        elif name == "BUILD":
            state = stack.pop()
            made(stack[-1]).state = state
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"a pickle with the step {name}; {DISTRUST}")


def named(name):
    """A name's `Made`, not called yet. Raises Refused outside of NAMES."""
    if name not in NAMES:
        raise Refused(f"{ascii(name[:200])} in a pickle; {DISTRUST}")
    return Made(NAMES[name])


def fill(container, items):
    """Append items to a list, or put keys and values that take turns into a dict."""
    if type(container) is list:
        container += items
    elif type(container) is dict and all(type(key) is str for key in items[::2]):
        # Hashing other keys, tuples of tuples, can take forever
        container.update(zip(items[::2], items[1::2], strict=True))
    else:
        raise Refused(f"a pickle that fills what is no list or table; {DISTRUST}")


def called(callee, args):
    """The `Made` of a name that is called."""
    if type(callee) is not Made or callee.args is not None or type(args) is not tuple:
        raise Refused(f"a pickle that calls what is no name; {DISTRUST}")
    return Made(callee.what, args)


def made(thing, *kinds):
    """This thing, if it is a `Made` that was called, of one of these kinds if any are given."""
    if type(thing) is Made and thing.args is not None and (not kinds or thing.what in kinds):
        return thing
    found = thing.what if type(thing) is Made else type(thing).__name__
    wanted = " or ".join(kinds) or "object"
    raise Refused(f"a pickle with {found} in the place of {wanted}; {DISTRUST}")


# ---- the columns -------------------------------------------------------------------------------

def columns_of(frame, wanted):
    """{name: [N]} of the wanted columns of a DataFrame that `follow` gave."""
    # Where the two forms of a frame keep their blocks and axes
    state = made(frame, "frame").state
    manager = made(state["_mgr"] if "_mgr" in state else state["_data"], "manager")
    if manager.args:  # pandas 1.3 and later
        blocks, (names, _) = manager.args[:2]
        blocks = [made(block, "block").args[:2] for block in blocks]
    else:
        layout = manager.state[3]["0.14.1"]
        names, _ = layout["axes"]
        blocks = [(block["values"], block["mgr_locs"]) for block in layout["blocks"]]

    # Whether the wanted columns are there, once each
    names = names_of(names)
    for name in wanted:
        if names.count(name) != 1:
            how = "twice a" if name in names else "no"
            there = ascii(", ".join(names))[1:-1]
            raise Refused(f"{how} column '{name}', the columns are {there[:300]}; {AGAIN}")

    # A block holds columns of one type, one below the other, and where they stand in the frame
    found = {}
    for values, places in blocks:
        of_block = np.array(names, object)[places_of(places, len(names))].tolist()
        if not set(of_block) & set(wanted):
            continue
        values = numbers_of(values)
        if values.shape[:-1] != (len(of_block),):
            raise Refused(f"a block of shape {values.shape} for {len(of_block)} columns; {AGAIN}")
        for name, column in zip(of_block, values):
            if name in found:
                raise Refused(f"column '{name}' is there twice; {AGAIN}")
            if name in wanted:
                found[name] = column
    check(found)
    return {name: found[name] for name in wanted}


def check(columns):
    """Raise Refused unless these columns are of one length and finite, and not too large.

    The same bytes may stand for several columns of a forged pickle.
    """
    if sum(values.nbytes for values in columns.values()) > MAX_BYTES:
        raise Refused(too_large())
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise Refused(f"columns of different lengths {lengths}; {AGAIN}")
    for name, values in columns.items():
        if not np.isfinite(values).all():
            count = np.count_nonzero(~np.isfinite(values))
            raise Refused(f"{count} of {len(values)} numbers in column '{name}' are not finite; "
                          f"{AGAIN}")


def names_of(index):
    """The names of the columns, strings, from a pickled index."""
    data = made(made(index, "index").args[1]["data"], "array", "strings")
    if data.what == "strings":  # pandas 3: the array stands in the state
        (data,) = [part for part in data.state
                   if type(part) is Made and part.what == "array"]
    names = data.state[4]
    if type(names) is not list or any(type(name) is not str for name in names):
        raise Refused(f"columns whose names are no strings; {DISTRUST}")
    return names


def places_of(places, count):
    """What `mgr_locs` says of a block of a frame of `count` columns: a slice, or their numbers."""
    if made(places, "slice", "array", "buffer").what != "slice":
        numbers = numbers_of(places)
        if numbers.size > count:
            raise Refused(f"a block of {numbers.size} of {count} columns; {DISTRUST}")
        return numbers
    if any(type(bound) not in (int, type(None)) for bound in places.args):
        raise Refused(f"a slice of no numbers; {DISTRUST}")
    return slice(*places.args)


def numbers_of(array):
    """A pickled array as NumPy's, a view of the pickle's bytes.

    Raises Refused where its type is none of numbers, and where type and shape do not say the
    number of bytes that are there.
    """
    # All of these are whatever the pickle says
    content, dtype, shape, order = parts_of(array)
    name = made(dtype, "dtype").args[0]
    byte_order = dtype.state[1]
    if type(name) is not str or not re.fullmatch("f[248]|i[1248]", name):
        raise Refused(f"an array of other than numbers, {ascii(name)[:50]}; {DISTRUST}")
    if byte_order not in ("<", ">", "=", "|") or order not in ("C", "F"):
        raise Refused(f"an array in no known order; {DISTRUST}")
    if type(shape) is not tuple or len(shape) > 2:
        raise Refused(f"an array of no shape; {DISTRUST}")
    if any(type(length) is not int or length < 0 for length in shape):
        raise Refused(f"an array of no shape; {DISTRUST}")

    # NumPy would take the memory first
    needed = math.prod(shape, start=int(name[1:]))
    if type(content) not in (bytes, bytearray) or needed != len(content):
        raise Refused(f"an array whose shape {shape} is not that of its bytes; {DISTRUST}")
    numbers = np.frombuffer(content, byte_order + name)
    numbers.flags.writeable = False
    return numbers.reshape(shape, order=order)


def parts_of(array):
    """What a pickle says of an array: its bytes, type, shape and order, "C" or "F"."""
    if made(array, "array", "buffer").what == "buffer":  # protocol 5
        return array.args

    # It begins as an empty array, and has all else in its state
    kind, shape, _ = array.args
    if kind.what != "kind of array" or shape != (0,):
        raise Refused(f"an array that begins with other than nothing; {DISTRUST}")
    _, shape, dtype, by_columns, content = array.state
    if type(content) is Made:  # protocol 2 has no bytes, and a string that becomes some
        text, encoding = made(content, "encoded").args
        if type(text) is not str or encoding != "latin1":
            raise Refused(f"text in another encoding than latin1; {DISTRUST}")
        content = text.encode("latin1")
    return content, dtype, shape, "F" if by_columns else "C"

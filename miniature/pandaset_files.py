"""PandaSet's frames, *.pkl.gz, as pandas 1.0 wrote them: byte by byte, and without pandas.

A frame is a DataFrame in a pickle of protocol 3. What pandas' own classes are called in it, and
what they hold, is written down here; `pickle` itself would have to import them.
"""
import gzip
import pickle
from typing import Any, NamedTuple

import numpy as np


class Name(NamedTuple):
    """A class or function, which whoever reads the pickle imports."""
    module: str
    name: str


class Made(NamedTuple):
    """An object: `call` applied to `args`, where `new` by its __new__; then its state is set."""
    call: Name
    args: tuple
    state: Any = None
    new: bool = False


FRAME = Name("pandas.core.frame", "DataFrame")
MANAGER = Name("pandas.core.internals.managers", "BlockManager")
NEW_INDEX = Name("pandas.core.indexes.base", "_new_Index")
INDEX = Name("pandas.core.indexes.base", "Index")
RANGE = Name("pandas.core.indexes.range", "RangeIndex")
RECONSTRUCT = Name("numpy.core.multiarray", "_reconstruct")
ARRAY = Name("numpy", "ndarray")
DTYPE = Name("numpy", "dtype")
SLICE = Name("builtins", "slice")
KIND = b"b"  # of an array that is made empty


def write_frame(path, columns, index=None):
    """Write a DataFrame as gzip pickle; the same columns give the same bytes.

    columns: {name: array [N]}, float64 ones before int64 ones. index: the row index's name, which
    is "index" in PandaSet's LiDAR frames and none in its labels.
    """
    content = pickled(frame_of(columns, index))
    with open(path, "wb") as file:
        # with the pickle's file name, as pandas has it, and no time
        with gzip.GzipFile(path.name, "wb", 6, file, mtime=0) as packed:
            packed.write(content)


# ---- what a DataFrame consists of ----------------------------------------------------------------
def frame_of(columns, index):
    """The DataFrame of columns as a `Made`."""
    names = list(columns)
    rows = len(columns[names[0]])
    objects = Made(DTYPE, ("O8", 0, 1), (3, "|", None, None, None, -1, -1, 63))

    def labels(some):
        array = array_of((len(some),), objects, some)
        return Made(NEW_INDEX, (INDEX, {"data": array, "name": None}))

    # a block is the columns of one type, a row each
    blocks, values, items = [], [], []
    first = 0
    for dtype in ("f8", "i8"):
        some = [name for name in names if columns[name].dtype == dtype]
        if not some:
            continue
        if names[first:first + len(some)] != some:
            raise ValueError(f"float64 columns, then int64 ones, not {names}")
        block = np.stack([columns[name] for name in some]).astype(f"<{dtype}")
        number = Made(DTYPE, (dtype, 0, 1), (3, "<", None, None, None, -1, -1, 0))
        values.append(array_of(block.shape, number, block.tobytes()))
        items.append(labels(some))
        place = Made(SLICE, (first, first + len(some), 1))
        blocks.append({"values": values[-1], "mgr_locs": place})
        first += len(some)
    if first != len(names):
        raise ValueError("columns that are neither float64 nor int64")
    numbered = Made(NEW_INDEX, (RANGE, {"name": index, "start": 0, "stop": rows, "step": 1}))
    axes = [labels(names), numbered]
    state = (axes, values, items, {"0.14.1": {"axes": axes, "blocks": blocks}})
    return Made(FRAME, (), new=True, state={
        "_data": Made(MANAGER, (), new=True, state=state),
        "_typ": "dataframe", "_metadata": [], "attrs": {}})


def array_of(shape, dtype, content):
    """A NumPy array; content: its bytes or, of an array of objects, the list of them."""
    return Made(RECONSTRUCT, (ARRAY, (0,), KIND), (1, shape, dtype, False, content))


# ---- pickle --------------------------------------------------------------------------------------
def pickled(value):
    """The bytes of a pickle of what `Pickle.write` knows."""
    pickler = Pickle()
    pickler.write(value)
    return b"".join(pickler.parts + [pickle.STOP])


class Pickle:
    """A pickle of protocol 3, in parts. Its opcodes are those that Python's own pickler chooses.

    memo: where an object that may come again was put. Texts and names are the same where they are
    equal, others where they are one object; no tuple comes twice in a DataFrame.
    """

    def __init__(self):
        self.parts = [pickle.PROTO + b"\x03"]
        self.memo, self.count = {}, 0

    def write(self, value):
        key = value if isinstance(value, (str, Name)) else id(value)
        if key in self.memo:
            self.parts.append(pickle.BINGET + bytes([self.memo[key]]))
            return
        if value is None or value is False:
            self.parts.append(pickle.NONE if value is None else pickle.NEWFALSE)
        elif isinstance(value, int):
            self.write_whole(value)
        elif isinstance(value, str):
            content = value.encode()
            self.parts += [pickle.BINUNICODE, len(content).to_bytes(4, "little"), content]
            self.put(key)
        elif isinstance(value, bytes):
            opcode, size = (pickle.SHORT_BINBYTES, 1) if len(value) < 256 else (pickle.BINBYTES, 4)
            self.parts += [opcode, len(value).to_bytes(size, "little"), value]
            self.put(key)
        elif isinstance(value, Name):
            self.parts.append(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
            self.put(key)
        elif isinstance(value, Made):
            self.write_made(value, key)
        elif isinstance(value, tuple):
            self.write_tuple(value)
        elif isinstance(value, list):
            self.parts.append(pickle.EMPTY_LIST)
            self.put(key)
            self.write_items([(item,) for item in value], pickle.APPEND, pickle.APPENDS)
        else:
            self.parts.append(pickle.EMPTY_DICT)
            self.put(key)
            self.write_items(list(value.items()), pickle.SETITEM, pickle.SETITEMS)

    def put(self, key=None):
        """Number the object that was written last; `key` finds it again."""
        self.parts.append(pickle.BINPUT + bytes([self.count]))
        if key is not None:
            self.memo[key] = self.count
        self.count += 1

    def write_whole(self, value):
        for opcode, size in ((pickle.BININT1, 1), (pickle.BININT2, 2)):
            if 0 <= value < 256 ** size:
                self.parts.append(opcode + value.to_bytes(size, "little"))
                return
        self.parts.append(pickle.BININT + value.to_bytes(4, "little", signed=True))

    def write_made(self, value, key):
        self.write(value.call)
        self.write(value.args)
        self.parts.append(pickle.NEWOBJ if value.new else pickle.REDUCE)
        self.put(key)
        if value.state is not None:
            self.write(value.state)
            self.parts.append(pickle.BUILD)

    def write_tuple(self, value):
        if not value:
            self.parts.append(pickle.EMPTY_TUPLE)
            return
        short = (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
        if len(value) > len(short):
            self.parts.append(pickle.MARK)
        for item in value:
            self.write(item)
        self.parts.append(short[len(value) - 1] if len(value) <= len(short) else pickle.TUPLE)
        self.put()

    def write_items(self, items, one, many):
        """What a list or dict consists of; items: tuples of one value, or of key and value."""
        if len(items) > 1:
            self.parts.append(pickle.MARK)
        for item in items:
            for value in item:
                self.write(value)
        if items:
            self.parts.append(one if len(items) == 1 else many)

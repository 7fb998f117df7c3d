"""Forged pickles in the place of frames: refused without running anything, without much memory and
without much time. And nothing in the project runs pickles."""
import gzip
import os
import pickle
import re
import time
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT
from pandasets import FLOATS, OBJECTS, layout_of, refusal, some_columns, with_array, write_pickle

from miniature.pandaset_files import (ARRAY, FRAME, INDEX, NEW_INDEX, RECONSTRUCT, SLICE, Made,
                                      Name, array_of, frame_of, pickled)
from plumbing.errors import InputError
from readers import pickles
from readers.pickles import POINTS, read_frame

GOLDEN = np.load(ROOT / "tests/golden/pandas_frames.npz")  # what three versions of pandas wrote
MEGABYTE = 1 << 20


# ---- forged ones -------------------------------------------------------------------------------



def with_state(**state):
    """A frame's pickle with other entries in its state."""
    return pickled(Made(FRAME, (), frame_of(some_columns(), None).state | state, True))


def floats(shape, content=bytes(800), dtype=FLOATS, begin=(0,), kind=ARRAY):
    return with_array(Made(RECONSTRUCT, (kind, begin, b"b"), (1, shape, dtype, False, content)))


def steps(*parts):
    """A pickle of these steps, in protocol 5."""
    return b"\x80\x05" + b"".join(parts) + b"."


def harm(command="system"):
    """What would make the file `made` in the current folder."""
    return Made(Name("os", command), ("touch made",))


SYSTEM = b"cos\nsystem\n"
TOUCH = b"(X\x0a\x00\x00\x00touch madet"
INT = Name("pandas.core.indexes.base", "Index")
FORGED = {  # name: (pickle, what the message says)
    "a call": (steps(SYSTEM, TOUCH, b"R"), "os.system"),
    "a call of what is on the stack": (steps(b"\x8c\x02os\x8c\x06system\x93", TOUCH, b"R"),
                                       "os.system"),
    "INST": (steps(b"(X\x0a\x00\x00\x00touch madeios\nsystem\n"), "step INST"),
    "OBJ": (steps(b"(", SYSTEM, b"X\x0a\x00\x00\x00touch madeo"), "os.system"),
    "OBJ of a good name": (steps(b"(cnumpy\ndtype\no"), "step OBJ"),
    "NEWOBJ": (steps(SYSTEM, TOUCH, b"\x81"), "os.system"),
    "NEWOBJ_EX": (steps(b"cnumpy\ndtype\n)}\x92"), "step NEWOBJ_EX"),
    "an extension": (steps(b"\x82\x01"), "step EXT1"),
    "a persistent id": (steps(b"Pos\n"), "step PERSID"),
    "a binary persistent id": (steps(b"NQ"), "step BINPERSID"),
    "an external buffer": (steps(b"\x97"), "step NEXT_BUFFER"),
    "a set of tuples": (steps(b"\x8f(K\1K\2\x90"), "step EMPTY_SET"),
    "in the state": (with_state(attrs=harm()), "os.system"),
    "in the state of the state": (with_state(attrs={"a": [({"b": harm("popen")},)]}), "os.popen"),
    "as the manager": (with_state(_data=harm()), "os.system"),
    "as an array": (with_array(harm()), "os.system"),
    "as the content of an array": (floats((5, 20), harm()), "os.system"),
    "as the type of an array": (floats((5, 20), dtype=harm()), "os.system"),
    "as a place": (with_array(array_of((5, 20), FLOATS, bytes(800)), harm()), "os.system"),
    "builtins.eval": (steps(b"cbuiltins\neval\n(X\x01\x00\x00\x001tR"), "builtins.eval"),
    "builtins.getattr": (steps(b"cbuiltins\ngetattr\n"), "builtins.getattr"),
    "numpy.load": (steps(b"cnumpy\nload\n"), "numpy.load"),
    "pandas.eval": (steps(b"cpandas\neval\n"), "pandas.eval"),
    "a subclass": (floats((5, 20), kind=Name("numpy", "memmap")), "numpy.memmap"),
    "a method of a good name": (steps(b"\x8c\x05numpy\x8c\x0edtype.__init__\x93"),
                                "numpy.dtype.__init__"),
    "a name in two lines": (steps(b"\x8c\x05numpy\x8c\x03a\nb\x93"), r"numpy.a\nb"),
    "a name of no text": (steps(b"K\1K\2\x93"), "1.2"),
    "a class of another kind": (floats((5, 20), kind=INDEX), "begins with other than nothing"),
    "a call of text": (steps(b"X\x02\x00\x00\x00os)R"), "calls what is no name"),
    "a call of what was made": (steps(b"cnumpy\ndtype\n)R)R"), "calls what is no name"),
    "a call with a list": (steps(b"cnumpy\ndtype\n]R"), "calls what is no name"),
    "a state of a name": (steps(b"cnumpy\ndtype\n}b"), "in the place of object"),
    "a state of a list": (steps(b"]}b"), "list in the place of object"),
    "no frame": (steps(b"K\1"), "int in the place of frame"),
    "a name alone": (steps(b"cpandas.core.frame\nDataFrame\n"), "in the place of frame"),
    "an array of objects": (floats((5, 20), [1] * 100, OBJECTS), "other than numbers, 'O8'"),
    "objects by another name": (floats((5, 20), dtype=FLOATS._replace(args=("|O", 0, 1))),
                                "other than numbers"),
    "complex numbers": (floats((5, 10), dtype=FLOATS._replace(args=("c16", 0, 1))), "'c16'"),
    "a type of types": (floats((5, 20), dtype=FLOATS._replace(args=([("a", "f8")], 0, 1))),
                        "other than numbers"),
    "a shape that begins large": (floats((5, 20), begin=(1 << 30,)), "other than nothing"),
    "a large shape": (floats((5, 1 << 30)), "is not that of its bytes"),
    "an overflowing shape": (floats((1 << 30, 1 << 30)), "is not that of its bytes"),
    "a negative shape": (floats((-5, -20)), "no shape"),
    "a shape of three": (floats((5, 4, 5)), "no shape"),
    "a shape of floats": (floats((5, b"20")), "no shape"),
    "a shape for fewer columns": (floats((4, 25)), "a block of shape (4, 25) for 5 columns"),
    "an array of one dimension": (floats((100,)), "a block of shape (100,) for 5 columns"),
    "a buffer of a large shape": (
        with_array(Made(Name("numpy.core.numeric", "_frombuffer"),
                        (bytes(800), FLOATS, (5, 1 << 30), "C"))), "is not that of its bytes"),
    "another order": (
        with_array(Made(Name("numpy.core.numeric", "_frombuffer"),
                        (bytes(800), FLOATS, (5, 20), "K"))), "no known order"),
    "another encoding": (
        floats((5, 20), Made(Name("_codecs", "encode"), ("a" * 800, "utf-16"))), "latin1"),
    "an encoding that packs": (
        floats((5, 20), Made(Name("_codecs", "encode"), (b"a" * 800, "zlib_codec"))), "latin1"),
    "a block of too many": (
        with_array(array_of((5, 20), FLOATS, bytes(800)),
                   array_of((100,), FLOATS, bytes(800))), "a block of 100 of 6 columns"),
    "a place in words": (with_array(array_of((5, 20), FLOATS, bytes(800)),
                                    Made(SLICE, ("a", "b", "c"))), "a slice of no numbers"),
    "a place outside": (with_array(array_of((5, 20), FLOATS, bytes(800)),
                                   Made(SLICE, (3, 90, 1))), "for 3 columns"),
    "a column twice": (with_array(array_of((6, 20), FLOATS, bytes(960)), Made(SLICE, (0, 6, 1))),
                       "column 'd' is there twice"),
    "columns without texts": (
        with_state(_data=Made(Name("pandas.core.internals.managers", "BlockManager"), (
            (), [Made(NEW_INDEX, (INDEX, {"data": array_of((1,), OBJECTS, [7])})), None]))),
        "whose names are no strings")}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_pickles_are_refused_and_nothing_runs(tmp_path, monkeypatch, kind):
    content, reason = FORGED[kind]
    monkeypatch.chdir(tmp_path)
    path = write_pickle(tmp_path / "00.pkl.gz", content)

    def called(*_):
        raise AssertionError("it was called")

    for module, name in ((os, "system"), (os, "popen"), (np, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, called)
    tracemalloc.start()
    try:
        message = refusal(path)
        assert tracemalloc.get_traced_memory()[1] < MEGABYTE
    finally:
        tracemalloc.stop()
    assert reason in message
    assert sorted(os.listdir(tmp_path)) == ["00.pkl.gz"]


def test_python_itself_would_run_them(tmp_path, monkeypatch):
    """What is refused above is harmful indeed."""
    monkeypatch.chdir(tmp_path)
    for kind in ("a call", "INST"):
        pickle.loads(FORGED[kind][0])
        assert (tmp_path / "made").exists()
        (tmp_path / "made").unlink()


def doubled(depth, key):
    """Tuples of the same tuple twice, `depth` times: 2 ** depth parts. Perhaps as a dict's key."""
    tuples = b"".join(b"q%ch%c\x86" % (n, n) for n in range(depth))
    return steps(b"}" if key else b"", b"K\1", tuples, b"Ns" if key else b"")


BOMBS = {
    "a memo of 64 GB": steps(b"K\1r\xff\xff\xff\xff"),
    "text of 4 GB": steps(b"X\xff\xff\xff\xff" + b"short"),
    "bytes of 2 ** 62": steps(b"\x8e" + (1 << 62).to_bytes(8, "little") + b"short"),
    "a bytearray of 2 ** 40": steps(b"\x96" + (1 << 40).to_bytes(8, "little") + b"short"),
    "a frame of 2 ** 62": steps(b"\x95" + (1 << 62).to_bytes(8, "little") + b"K\1"),
    "an int of 2 GB": steps(b"\x8b\xff\xff\xff\x7f" + b"short"),
    "a million lists": steps(b"]" * 1_000_000),
    "a million marks": steps(b"(" * 1_000_000),
    "a deep tuple": steps(b"K\1" + b"\x85" * 200_000),
    "a tree that doubles": doubled(100, key=False),
    "a key that doubles": doubled(100, key=True),
    "digits for an int": steps(b"L" + b"9" * 100_000 + b"L\n")}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_take_neither_memory_nor_time(tmp_path, kind):
    path = write_pickle(tmp_path / "00.pkl.gz", BOMBS[kind])
    began = time.perf_counter()
    tracemalloc.start()
    try:
        refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 12 * MEGABYTE
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 5


def test_text_that_becomes_bytes_is_not_made_again_and_again(tmp_path, monkeypatch):
    """Six columns of the same text: the bytes of all count."""
    monkeypatch.setattr(pickles, "MAX_BYTES", 40_000)
    text = "a" * 8_000
    encoded = Made(Name("_codecs", "encode"), (text, "latin1"))
    array = Made(RECONSTRUCT, (ARRAY, (0,), b"b"), (1, (1, 1000), FLOATS, False, encoded))
    frame = frame_of(some_columns(), None)
    layout_of(frame)["blocks"][:] = [{"values": array, "mgr_locs": Made(SLICE, (n, n + 1, 1))}
                                     for n in range(6)]
    assert len(pickled(frame)) < 20_000
    path = write_pickle(tmp_path / "x.pkl.gz", pickled(frame))
    assert "MB unpacked" in refusal(path)


def test_any_change_of_a_pickle_is_read_or_refused(tmp_path):
    """Bytes changed, cut out, doubled: numbers come out, or one line."""
    good = pickled(frame_of(some_columns(6), "index"))
    starts = [good, *(gzip.decompress(GOLDEN[name].tobytes()) for name in GOLDEN.files[::5]
                      if not name.startswith("labels"))]
    path = tmp_path / "x.pkl.gz"
    refused = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        content = bytearray(starts[seed % len(starts)])
        for _ in range(rng.integers(1, 4)):
            at, length = rng.integers(0, len(content)), rng.integers(1, 30)
            kind = rng.integers(3)
            if kind == 0:
                content[at] = rng.integers(256)
            elif kind == 1:
                del content[at:at + length]
            else:
                content[at:at] = content[at:at + length]
        write_pickle(path, bytes(content))
        try:
            found = read_frame(path, POINTS)
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
            continue
        assert list(found) == list(POINTS)
        for values in found.values():
            assert values.ndim == 1 and values.dtype.kind in "fi" and np.isfinite(values).all()
        assert len({len(values) for values in found.values()}) == 1
    assert 150 < refused < 300


# ---- the whole project -------------------------------------------------------------------------

def test_nothing_in_the_project_runs_pickles():
    """No plain pickle, in no form that torch, NumPy or pandas give it."""
    forms = re.compile(r"weights_only\s*=\s*(?!True)|allow_pickle\s*=\s*(?!False)|"
                       r"\b(pickle|cPickle|dill|joblib|shelve|marshal)\.(load|loads|open)\b|"
                       r"\bUnpickler\b|\bfrom pickle import")
    told = "once with weights_only=False and save its tensors again"  # a user, in words
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT)
        if name.parts[0] == "tests" or any(part.startswith(".") for part in name.parts):
            continue
        text = path.read_text()
        found += [f"{name}: {line.strip()}" for line in text.splitlines()
                  if forms.search(line) and told not in line]
        found += [f"{name}: {call}" for call in re.findall(r"torch\.load\([^\n]*", text)
                  if "weights_only=True" not in call]
        if name.parts[0] != "experiments":  # a benchmark reads its own files so, beside ours
            assert "read_pickle" not in text, name
    assert found == []

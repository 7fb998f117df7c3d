"""How experiments/real.py lays a dataset out: links, unpacked scans, one condition."""
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from runs import open_one

from experiments.real import lay_out
from readers import pandaset64


def test_frames_are_laid_out_by_links_and_unpacked_files(panda, tmp_path):
    out = tmp_path / "clean"
    table = lay_out("pandaset64", panda, out)
    assert table.root == str(panda)
    originals = sorted(path for path in panda.rglob("*") if path.is_file())
    packed = 0
    for path in originals:
        copy = out / path.relative_to(panda)
        if path.name.endswith(".gz"):
            packed += 1
            content = gzip.decompress(path.read_bytes())
            assert not copy.is_symlink() and gzip.decompress(copy.read_bytes()) == content
            assert content[1000:2000] in copy.read_bytes()  # as it is
        else:
            assert copy.is_symlink() and copy.resolve() == path
    assert packed == 3 * 2 * 2 + 2  # points and labels of two frames; a scene has no labels
    copies = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert copies == {path.relative_to(panda) for path in originals} | {Path("conditions.json")}
    assert json.loads((out / "conditions.json").read_text()) == dict.fromkeys(
        ("001", "002", "003"), "clear")

    # The reader gives the same frames and points, under their condition
    laid_out = open_one(out, name="pandaset64")
    assert laid_out.conditions == ("clear",) and not laid_out["condition"].any()
    for name in ("scan", "labels", "image", "split", "scene"):
        assert np.array_equal(laid_out[name], table[name])
    for row in table.rows:
        for name in ("scan", "labels"):
            read = getattr(pandaset64, name)
            assert np.array_equal(read(laid_out.path(name, row)), read(table.path(name, row)))


def test_a_stopped_copy_is_finished_and_what_is_whole_is_not_written_again(panda, tmp_path,
                                                                           monkeypatch):
    out = tmp_path / "runs/clean"
    write = Path.write_bytes
    written = []

    def stops(path, content):
        written.append(path)
        if len(written) == 3:
            write(path, content[:99])
            raise KeyboardInterrupt
        return write(path, content)
    monkeypatch.setattr(Path, "write_bytes", stops)
    with pytest.raises(KeyboardInterrupt):
        lay_out("pandaset64", panda, out)
    lay_out("pandaset64", panda, out)
    packed = sorted(panda.rglob("*.gz"))
    assert len(written) == len(packed) + 1  # the third one once more
    lay_out("pandaset64", panda, out)
    assert len(written) == len(packed) + 1
    for path in packed:
        copy = out / path.relative_to(panda)
        assert gzip.decompress(copy.read_bytes()) == gzip.decompress(path.read_bytes())
    assert not list(out.rglob("*.partial"))

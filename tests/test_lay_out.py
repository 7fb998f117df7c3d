"""How experiments/real.py lays a dataset out: links, unpacked scans, one condition."""
import gzip
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from runs import open_one

from experiments.lay_out import lay_out
from experiments.runs import alone
from plumbing.errors import InputError
from readers import pandaset64


def test_frames_are_laid_out_by_links_and_unpacked_files(panda, tmp_path):
    out = tmp_path / "clean"
    table = open_one(panda, name="pandaset64")
    lay_out(table, out)
    originals = sorted(path for path in panda.rglob("*") if path.is_file())
    packed = 0
    for path in originals:
        copy = out / path.relative_to(panda)
        if path.name.endswith(".gz") and "005" not in path.parts:  # which has no labels
            packed += 1
            content = gzip.decompress(path.read_bytes())
            assert not copy.is_symlink() and gzip.decompress(copy.read_bytes()) == content
            assert content[1000:2000] in copy.read_bytes()  # as it is
        else:
            assert copy.is_symlink() and copy.resolve() == path
    assert packed == 3 * 2 * 2  # points and labels of two frames
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
    table = open_one(panda, name="pandaset64")
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
        lay_out(table, out)
    lay_out(table, out)
    packed = sorted(path for path in panda.rglob("*.gz") if "005" not in path.parts)
    assert len(written) == len(packed) + 1  # the third one once more
    lay_out(table, out)
    assert len(written) == len(packed) + 1
    for path in packed:
        copy = out / path.relative_to(panda)
        assert gzip.decompress(copy.read_bytes()) == gzip.decompress(path.read_bytes())
    assert not list(out.rglob("*.partial"))


def test_links_back_end_and_a_damaged_scan_is_named(panda, tmp_path):
    root = shutil.copytree(panda, tmp_path / "panda")
    (root / "001/again").symlink_to(root)
    (root / "002/001").symlink_to(root / "001")
    table = open_one(root, name="pandaset64")
    lay_out(table, tmp_path / "a/clean")
    there = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert 20 < len(there) < 500
    scan = root / "001/lidar/00.pkl.gz"
    scan.write_bytes(scan.read_bytes()[:-500])
    with pytest.raises(InputError, match=f"{scan}: cut short"):
        lay_out(table, tmp_path / "b/clean")
    with pytest.raises(InputError, match="/file: cannot be written .*; make room, or"):
        (tmp_path / "file").write_text("")
        lay_out(table, tmp_path / "file/clean")


def test_one_process_at_a_time(tmp_path, capsys):
    """The second one waits until the first has ended."""
    seen = []

    def second():
        with alone(tmp_path):
            seen.append("second")
    with alone(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        seen.append("first")
    thread.join()
    assert seen == ["first", "second"]
    assert "another process writes there; this one waits" in capsys.readouterr().out

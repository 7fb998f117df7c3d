"""The bench of ScaLR's parts: neighbours do the same work, nothing cached is timed, its tables."""
import gzip
import pickle
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import models
from data import project, set_sampling
from experiments import bench_scalr
from experiments.bench_scalr import Row
from plumbing.errors import InputError
from readers import pickles
from readers.table import open_tables
from runs import fails_with_one_line

PICTURES = (80, 160)  # of these worlds


@pytest.fixture(scope="module")
def roots(world, kitti, panda, poss):
    """{dataset: root} of small worlds."""
    return {"nuscenes": world, "semantickitti": kitti, "pandaset64": panda, "semanticposs": poss}


@pytest.fixture(scope="module")
def of_all(roots):
    found = open_tables([(name, str(root)) for name, root in roots.items()], here=True)
    set_sampling(found)
    return found


@pytest.fixture
def tables(of_all):
    """The tables of these worlds, nuScenes' first."""
    return list(of_all)


@pytest.fixture
def once(monkeypatch):
    """Each function is timed once; the others' own time is 1 s."""
    def repeat(runs, device, repeats):
        for run in runs:
            run()
        return [[1.0] * len(runs)]
    monkeypatch.setattr(bench_scalr, "repeat", repeat)


def cells_of(text):
    """{first cell: the others} of the tables of a markdown text."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in rows}


# ---- measuring ----------------------------------------------------------------------------------

def test_beside_counts_as_a_sum(monkeypatch):
    monkeypatch.setattr(bench_scalr, "repeat", lambda runs, device, repeats: [[3, 1, 2], [4, 1, 1]])
    called = []
    row = bench_scalr.in_turns("a", lambda: called.append("here"),
                               [lambda: called.append("one"), lambda: called.append("two")], 1)
    assert called == ["here", "one", "two"] and row.times == [(3, 3), (4, 2)]
    assert bench_scalr.ratio(row) == "1.50 (1.00–2.00)"


def test_a_table_of_rows():
    rows = [Row("a", [(0.5, 1.0), (0.5, 0.25), (0.5, 0.5)], "≤ 1.5", ("more",))]
    text = bench_scalr.markdown(rows, "what", "here", "there", more=("column",))
    assert text.splitlines()[0] == "| what | here | there | ratio (range) | wanted | column |"
    assert text.splitlines()[2] == "| a | 500.0 ms | 500.0 ms | 1.00 (0.50–2.00) | ≤ 1.5 | more |"


# ---- data ---------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_moved_cloud_is_seen_alike(tables):
    beside = tables[0].only([0])
    cloud = beside.reader.scan(beside.path("scan", 0))

    def seen(table, points):
        """{number of a visible point: its place in the picture, in parts of it, and its depth}."""
        height, width = size = table["image_size"][0, 0]
        rows, pixels, depths = project(points[:, :3].astype(float), table["cam_from_lidar"][0, 0],
                                       table["intrinsics"][0, 0], size, margin=0)
        return dict(zip(rows.tolist(), np.column_stack([pixels / (height, width), depths])))

    for table in tables[1:3]:
        alike, points = bench_scalr.moved(cloud, table.only([0]), beside)
        assert points.dtype == table.reader.scan(table.path("scan", 0)).dtype
        assert (points[:, 3] == cloud[:, 3]).all()
        assert abs(points[:, :3] - cloud[:, :3]).max() > 0.1  # its LiDAR sits elsewhere
        here, there = seen(alike, points), seen(beside, cloud)
        assert len(there) > 100 and len(here.keys() ^ there.keys()) <= 2  # on the border
        both = sorted(here.keys() & there.keys())
        np.testing.assert_allclose(np.array([here[row] for row in both]),
                                   np.array([there[row] for row in both]), atol=1e-3)
    assert not np.shares_memory(alike["intrinsics"], table["intrinsics"])


@pytest.mark.slow
def test_items_open_no_scan(tables, once, monkeypatch):
    opened = []
    for table in tables:
        def scan(path, read=table.reader.scan):
            opened.append(path)
            return read(path)
        monkeypatch.setattr(table.reader, "scan", scan)
    rows = cells_of(bench_scalr.item_table(tables, PICTURES, 1))
    assert len(opened) == len(tables)  # the cloud, and one of each for its type
    for name in ("semantickitti", "pandaset64", "semanticposs"):
        here, there = rows[name][5].split(" and ")
        assert int(there.replace(",", "")) > 100
        assert int(here.replace(",", "")) == pytest.approx(int(there.replace(",", "")), rel=0.1)
    assert rows["semantickitti"][6] == ".png, 80 × 160" and "whole scan" in rows["semanticposs"][6]


@pytest.mark.slow
def test_a_scan_is_read_each_time(tables, once, monkeypatch):
    """PandaSet's reader keeps the frame that it read last."""
    pandaset = tables[2]
    unpacked, count = pickles.unpacked, []

    def counted(path):
        count.append(path)
        return unpacked(path)

    monkeypatch.setattr(pickles, "unpacked", counted)
    bench_scalr.reading_table([pandaset], PICTURES, 1)
    # Both scans, in warm-up and timing of reading and of items
    assert [path.rpartition("/")[2] for path in count[-8:]] == ["00.pkl.gz", "01.pkl.gz"] * 4


@pytest.mark.slow
def test_indexing_decodes_no_pixels(tables, once, monkeypatch):
    decoded = []
    monkeypatch.setattr(bench_scalr, "decode", lambda paths: decoded.append(len(paths)))
    rows = cells_of(bench_scalr.index_table(tables[1:3], 1))
    sizes = [table["image"].size for table in tables[1:3]]
    assert decoded == [sizes[0]] * 4 + [sizes[1]] * 4
    assert [rows[name][-1] for name in ("semantickitti", "pandaset64")] == [str(n) for n in sizes]


# ---- pandas -------------------------------------------------------------------------------------

@pytest.fixture
def pandas(monkeypatch):
    """A stand-in for pandas that notes which files it is given."""
    given = []
    monkeypatch.setattr(bench_scalr.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "pandas",
                        SimpleNamespace(read_pickle=given.append, __version__="0"))
    return given


@pytest.mark.slow
def test_pandas_reads_points_and_labels(tables, once, pandas):
    rows = cells_of(bench_scalr.pickle_table(tables[2], 1))
    assert {path.split("/")[-2] for path in pandas} == {"lidar", "semseg"}
    assert rows["scan"][3] == rows["labels"][3] == "≤ 1.2"


@pytest.mark.slow
def test_pandas_never_gets_what_is_refused(tables, once, pandas, tmp_path, monkeypatch):
    path = tmp_path / "00.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps(SimpleNamespace)))
    monkeypatch.setattr(type(tables[2]), "path", lambda *place: path)
    with pytest.raises(InputError, match="SimpleNamespace"):
        bench_scalr.pickle_table(tables[2], 1)
    assert pandas == []


@pytest.mark.slow
def test_without_pandas_it_says_so(tables, monkeypatch):
    monkeypatch.setattr(bench_scalr.importlib.util, "find_spec", lambda name: None)
    assert "not run: pandas is not installed" in bench_scalr.pickle_table(tables[2], 1)


# ---- the whole ----------------------------------------------------------------------------------

SMALL = ["--device", "cpu", "--channels", "8", "--depth", "3", "--repeats", "1",
         "--encoder", "vit_mini8", "vit_mini8"]


@pytest.mark.slow
def test_a_small_run_writes_all_tables(roots, once, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "IMAGE_SIZE", PICTURES)
    out = tmp_path / "sub" / "bench.md"
    data = ",".join(f"{name}={root}" for name, root in roots.items())
    bench_scalr.main(["--data", data, *SMALL, "--out", str(out)])
    text = out.read_text()
    assert text == capsys.readouterr().out and torch.__version__ in text
    rows = cells_of(text)
    for name in ("nuscenes and semantickitti", "nuscenes and pandaset64", "vit_mini8 and vit_mini8",
                 "nuscenes, 2", "semanticposs", "two stage-1 steps, batch 2"):
        assert name in rows, name
    assert rows["semanticposs"][2] == "1.00 (1.00–1.00)"
    assert rows["two batches of 2 data items"][2] == "0.50 (0.50–0.50)"  # of 1 s against two
    for kind in ("features", "stage-1 step"):
        both, larger, part, wanted = rows[f"{kind}, batch 2"][4:]
        assert all(re.fullmatch(r"[\d,]+ MB|not run", cell) for cell in (both, larger))
        assert wanted == "≤ 1.15" and (part == "not run" or float(part) > 0)
    assert "WI-3-8; precision: fp32" in text


@pytest.mark.parametrize("flags, named", [
    (["--repeats", "0"], "--repeats"), (["--encoder", "vit_mini8", "no_such"], "no_such"),
    ([], "vit_mini8"), (["--batch", "0"], "--batch")])
def test_bad_flags_are_one_line(tmp_path, capsys, monkeypatch, flags, named):
    monkeypatch.setattr(models, "IMAGE_SIZE", (42, 84))  # no multiple of its patches
    assert named in fails_with_one_line(capsys, bench_scalr.main,
                                        ["--data", str(tmp_path), *SMALL, *flags])

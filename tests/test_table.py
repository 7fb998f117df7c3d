"""--data: which datasets it names, how they are opened, and a reader run as a script."""
import json
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import ROOT
from runs import open_one

import readers.cache
from data import select
from plumbing.errors import InputError
from plumbing.fingerprint import of_frames
from readers.table import datasets, entries, main, open_tables

# ---- what --data says ----------------------------------------------------------------------------

def test_the_datasets_are_the_files_that_have_a_table():
    assert {"nuimages", "nuscenes"} <= set(datasets())
    assert not {"cache", "files", "jpeg", "table", "__init__"} & set(datasets())


@pytest.mark.parametrize("data, expected", [
    ("nuscenes=/a", [("nuscenes", "/a")]),
    ("nuscenes=/a,nuimages=/b", [("nuscenes", "/a"), ("nuimages", "/b")]),
    ("nuscenes=/a,nuscenes=/b,nuscenes=c", [("nuscenes", path) for path in ("/a", "/b", "c")]),
    # a path may have = and , in it, after a name too
    ("nuscenes=/a=1,b", [("nuscenes", "/a=1,b")]),
    ("nuimages=/a,b=c,nuscenes=/d,e", [("nuimages", "/a,b=c"), ("nuscenes", "/d,e")]),
    # a bare path is a nuScenes root as a whole
    ("/data/nuscenes", [("nuscenes", "/data/nuscenes")]),
    ("nuscenes", [("nuscenes", "nuscenes")]),
    ("/a=1,b", [("nuscenes", "/a=1,b")]),
    ("/a,nuscenes=/b", [("nuscenes", "/a,nuscenes=/b")]),
    # and so is what begins with a name that no reader has
    ("unheard=/a", [("nuscenes", "unheard=/a")]),
    ("table=/a", [("nuscenes", "table=/a")]),
    ("nuscenes=/a,unheard=/b", [("nuscenes", "/a,unheard=/b")])])
def test_entries(data, expected):
    assert entries(data) == expected


def test_roots_with_any_name_are_opened(world, tmp_path):
    root = shutil.copytree(world, tmp_path / "a=1,b")
    for data in (str(root), f"nuscenes={root}", f"nuscenes={world},nuscenes={root}"):
        tables = open_tables(data, here=True)
        assert tables[-1].root == str(root) and tables[-1].name == "nuscenes"
    assert [table.root for table in tables] == [str(world), str(root)]
    assert tables[0].fingerprint() == tables[1].fingerprint()


def test_unknown_names_and_wrong_roots_are_one_line(world, tmp_path):
    hint = ": no such folder; {} is no dataset that is known: "
    both = f"nuscenes={world},nusenes=/a"
    for data, message in (
            ("nuimage=/a", f"nuimage=/a{hint.format('nuimage')}nuimages, nuscenes"),
            (both, f"/a{hint.format('nusenes')}nuscenes, nuimages"),
            ("/nowhere", "/nowhere: no such folder$"),
            (f"nuscenes={world},", "data,: no such folder; each dataset begins with .*nuscenes="),
            (f"nuscenes={world},nuscenes={world}/../data", "data: given twice"),
            (f"nuscenes={tmp_path}", f"{tmp_path}: not a nuScenes root")):
        with pytest.raises(InputError, match=message) as error:
            open_tables(data, here=True)
        assert "\n" not in str(error.value)


# ---- a dataset of few words ----------------------------------------------------------------------

@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A dataset without versions, conditions, scenes, scans or files to check: (name, root).

    The text of its reader, whose file is a stand-in, is in root/toy.py.
    """
    def sources(root):
        return [root / "list.json"]

    def table(root):
        names = json.loads((root / "list.json").read_text())
        return {"split": np.array([b"train"] * len(names)), "image": np.array([names], "S9").T,
                "image_size": np.full((len(names), 1, 2), 8)}
    reader = types.ModuleType("readers.toy", "A toy.")
    reader.sources, reader.table, reader.__file__ = sources, table, str(tmp_path / "toy.py")
    monkeypatch.setitem(sys.modules, "readers.toy", reader)
    for name in ("a.png", "b.png", "list.json", "toy.py"):
        (tmp_path / name).write_text('["a.png", "b.png"]')
    return "toy", tmp_path


def test_a_reader_has_what_its_data_has_and_nothing_else(toy, capsys):
    (table,) = open_tables([toy], here=True)
    assert table.name == "toy" and table.sampling is None
    assert table.cameras == table.scenes() == [] and table.conditions == ()
    assert len(table.select("train", ["night"], percent=10)) == 1
    assert table.fingerprint(labels=True)["frames"] == 2 and len(table.files(labels=True)) == 16
    main("toy", ["--data", str(toy[1])])
    assert capsys.readouterr().out.splitlines() == [
        f"toy={toy[1]}: 2 frames, 1 cameras", "  split  condition  scenes  frames  images",
        "  train  full            -       2       2"]
    with pytest.raises(SystemExit):
        main("toy", ["--data", str(toy[1]), "--version", "v1"])
    assert "unrecognized arguments: --version v1" in capsys.readouterr().err

    # What is wrong with a frame is asked where the reader can tell
    toys = sys.modules["readers.toy"]
    toys.damage = lambda root, columns, row: "torn" if columns["image"][row] == b"b.png" else ""
    assert "bad" not in table and len(table.select("train")) == 2
    (toy[1] / "toy.py").write_text("def damage")
    for look in (True, None, False):
        (table,) = open_tables([toy], look=look, here=True)
        assert table["bad"].tolist() == [b"", b"torn"]
    (toy[1] / "b.png").unlink()
    with pytest.raises(InputError, match="1 of 2 files .* missing, the first is b.png"):
        open_tables([toy], here=True)


def test_a_version_is_of_those_that_have_versions(toy, world):
    with pytest.raises(InputError, match="--version v1: toy has no versions; leave it out"):
        open_tables([toy], "v1", here=True)
    tables = open_tables([toy, ("nuscenes", world)], "v1.0-trainval", here=True)
    assert [table.name for table in tables] == ["toy", "nuscenes"]
    with pytest.raises(InputError, match="no --version v1.0-mini; there is v1.0-trainval"):
        open_tables([toy, ("nuscenes", world)], "v1.0-mini", here=True)


def test_readers_options_and_roots_have_caches_of_their_own(toy, world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copied = shutil.copytree(world, tmp_path / "copied")
    for _ in range(2):
        open_tables([toy, ("nuscenes", world), ("nuscenes", copied)], here=True)
        open_one(world, "v1.0-trainval")
    assert len(list((tmp_path / "cache/collaborative-distillation").iterdir())) == 4
    # a reader may take another's classes, so the text of each counts
    (tmp_path / "another.py").write_text("CLASSES = ()")
    open_tables([toy, ("nuscenes", world)], here=True)
    assert len(list((tmp_path / "cache/collaborative-distillation").iterdir())) == 5
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert readers.cache.caches() == tmp_path / "home/.cache"


def test_a_reader_that_keeps_no_table_is_named(toy, monkeypatch):
    monkeypatch.setattr(readers.cache, "build_elsewhere", lambda *_: None)
    with pytest.raises(InputError, match="toy.py: run as a script it keeps no table; end it with"):
        open_tables([toy])


# ---- fingerprints --------------------------------------------------------------------------------

def test_several_tables_are_known_by_all_of_them_in_order(world, copy):
    one, other = open_one(world).select("train"), open_one(copy).select("val")
    for labels, files in ((False, False), (True, True)):
        alone = of_frames([one], labels, files)
        assert alone == one.fingerprint(labels) | ({"files": one.files(labels)} if files else {})
        both = of_frames([one, other], labels, files)
        assert both["frames"] == 8 + 6 and both["scenes"] == 8 + 6
        assert both.keys() == alone.keys() and len(both["tables"]) == 16
        assert both == of_frames([one, other], labels, files)
        assert both != of_frames([other, one], labels, files)


def test_conditions_of_one_s_own_count(copy):
    """Scenes that conditions.json moves to another condition make other frames, and only those."""
    before = open_one(copy)
    scene = before["scene"][before.select("val", ["night"]).rows[0]].decode()
    (copy / "conditions.json").write_text(json.dumps({scene: "day-clear"}))
    after = open_one(copy)
    assert after.conditions == before.conditions
    assert len(after.select("val", ["night"])) == len(before.select("val", ["night"])) - 1
    assert after.select("val").fingerprint() != before.select("val").fingerprint()
    assert after.select("train").fingerprint() == before.select("train").fingerprint()
    (copy / "conditions.json").write_text(json.dumps({scene: "night"}))  # as the dataset says
    assert open_one(copy).select("val").fingerprint() == before.select("val").fingerprint()


# ---- the choice of frames ------------------------------------------------------------------------

def test_only_frames_that_are_taken_have_to_be_good(copy):
    table = open_one(copy)
    rows = table.select("train").rows
    scan = copy / table["scan"][rows[1]].decode()
    scan.write_bytes(scan.read_bytes()[:-7])
    table = open_one(copy)
    with pytest.raises(InputError, match="1 of 8 frames are bad, the first: .*not 20 a point"):
        select([table], "train")
    assert select([table], "train", limit=2)[0].rows.tolist() == [rows[0], rows[7]]
    assert len(select([table], "train", skip_bad=True)[0]) == 8
    with pytest.raises(InputError, match="1 of 8 frames are bad"):
        table.select("train")


def test_too_few_scenes_for_a_percentage(world):
    message = "--percent 1: every 100th scene is taken, and --data .* has only 8 of split 'train'"
    with pytest.raises(InputError, match=message):
        open_one(world).select("train", percent=1)
    message = "--conditions fog: --data .* has day-clear, day-rain, night$"
    with pytest.raises(InputError, match=message):
        select([open_one(world)], "train", ["fog"])


# ---- as a script ---------------------------------------------------------------------------------

def run(name, *arguments):
    """`python -m readers.NAME`, with a line on stderr for each module that it imports."""
    return subprocess.run([sys.executable, "-X", "importtime", "-m", f"readers.{name}", *arguments],
                          cwd=ROOT, capture_output=True, text=True)


def imported(done):
    """The packages that a process imported."""
    return set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.M))


@pytest.mark.parametrize("name", ["nuscenes", "nuimages"])
def test_help_is_there_at_once(name):
    done = run(name, "--help")
    assert done.returncode == 0 and f"usage: python -m readers.{name}" in done.stdout
    assert "--version" in done.stdout and "None" not in done.stdout
    assert "numpy" in imported(done)  # the list of modules is one
    assert not {"torch", "scipy", "PIL", "matplotlib"} & imported(done)
    assert not {"NuScenes", "pyquaternion", "pycocotools"} & imported(done)


@pytest.mark.slow
def test_the_counts_are_printed_without_torch(copy):
    for _ in range(2):  # as it is read, and from the cache
        done = run("nuscenes", "--data", str(copy))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            f"nuscenes={copy}: 14 frames, 1 cameras, labels: yes, "
            "train: 8 frames, 28130 in the papers",
            "  split  condition  scenes  frames  images",
            "  train  day-clear       4       4       4",
            "  train  day-rain        2       2       2",
            "  train  night           2       2       2",
            "  val    day-clear       2       2       2",
            "  val    day-rain        2       2       2",
            "  val    night           2       2       2"]
        assert "torch" not in imported(done)


@pytest.mark.parametrize("name, datasets", [
    ("kitti", ("semantickitti", "semanticposs")), ("pandaset", ("pandaset64", "pandasetgt"))])
def test_what_datasets_share_says_which_reader_to_run(name, datasets):
    done = subprocess.run([sys.executable, "-m", f"readers.{name}", "--data", "x"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    for dataset in datasets:
        assert f"python -m readers.{dataset}" in done.stderr


def test_a_wrong_root_is_one_line_and_exit_code_2(tmp_path):
    done = run("nuimages", "--data", str(tmp_path))
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(lines) == 1
    assert f"error: --data {tmp_path}: not a nuImages root" in lines[0]

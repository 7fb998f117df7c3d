"""Splits of one's own, and what a dataset may be: without pictures, with statistics of its own."""
import json
import re
import sys
import types

import numpy as np
import pytest
from runs import (checkpoint_of, eval_args, fails_with_one_line, model_of, open_one, probe_args,
                  stage1_args)

import eval as evaluation
import probe
import stage1
from data import Frames, collate, project, select, set_sampling
from plumbing.errors import InputError
from plumbing.fingerprint import of_frames
from readers.table import hold_out, open_tables
from waffleiron import prepare

# ---- a split of one's own ------------------------------------------------------------------------

def scenes(table, split):
    return table.only(np.flatnonzero(table["split"] == split)).scenes()


def test_held_out_scenes_validate_and_the_rest_trains(world):
    before = open_one(world)
    train, val = scenes(before, b"train"), scenes(before, b"val")
    for names in ([train[2], val[0]], [f"nuscenes:{train[2]}", val[0]]):
        (table,) = hold_out([open_one(world)], names)
        assert scenes(table, b"val") == sorted([train[2], val[0]])
        assert scenes(table, b"train") == sorted({*train, *val} - {train[2], val[0]})
    assert scenes(before, b"train") == train  # of that table alone
    assert hold_out([before], None) == [before]


def test_a_test_split_stays_and_all_roots_are_split_alike(world, copy):
    one, other = open_one(world), open_one(copy)
    split = one["split"].copy()
    split[split == b"val"] = b"test"
    one.columns = one.columns | {"split": split.astype("S5")}
    scene = scenes(one, b"train")[0]
    hold_out([one, other], [scene])
    assert scenes(one, b"val") == scenes(other, b"val") == [scene]
    assert len(scenes(one, b"test")) == 6 and not scenes(other, b"test")


def test_names_that_cannot_be_held_out_are_one_line(world):
    table = open_one(world)
    everything = table.scenes()
    with pytest.raises(InputError, match="--val-scenes 999: no such scene; nuscenes has scene-"):
        hold_out([table], ["999"])
    with pytest.raises(InputError, match=f"--val-scenes nuimages:{everything[0]}: no such scene"):
        hold_out([table], [f"nuimages:{everything[0]}"])
    with pytest.raises(InputError, match="no scene of nuscenes is left to train on; name fewer"):
        hold_out([table], everything)
    # A scene's name may have a colon in it
    timed = open_one(world)
    timed.columns = timed.columns | {"scene": np.char.add(timed["scene"], b" at 19:48")}
    for names in ([f"{everything[0]} at 19:48"], [f"nuscenes:{everything[0]} at 19:48"]):
        assert scenes(hold_out([timed], names)[0], b"val") == [f"{everything[0]} at 19:48"]
    twin = open_one(world)
    twin.name = "twin"
    first = everything[0]
    with pytest.raises(InputError, match=f"--val-scenes {first}: nuscenes and twin have that scene"
                                         f"; give nuscenes:{first} or twin:{first}, or all"):
        hold_out([table, twin], [first])
    twin.columns = {name: values for name, values in twin.columns.items() if name != "scene"}
    with pytest.raises(InputError, match="twin has no scenes"):
        hold_out([table, twin], ["999"])


@pytest.mark.slow
def test_runs_and_tables_tell_the_split(world, first, tmp_path, capsys):
    train = scenes(open_one(world), b"train")
    held = ["--val-scenes", train[0], train[1]]
    out, own = tmp_path / "held", tmp_path / "own"
    more = ["--steps", "2", "--head", "linear"]
    probe.main(probe_args(world, "seg3d", first, out, *more, *held))
    probe.main(probe_args(world, "seg3d", first, own, *more))
    assert checkpoint_of(out)["args"]["val_scenes"] == held[1:]
    assert not np.array_equal(model_of(out)["1.weight"], model_of(own)["1.weight"])
    evaluation.main(eval_args(own, out, out=tmp_path / "table"))
    text = (tmp_path / "table.md").read_text()
    assert f"{out} is judged on scenes of its own split: {train[0]}, {train[1]}." in text
    assert re.search(f"{out} is not compared with {own}: .*val_scenes", text)
    results = json.loads((out / "results.json").read_text())
    assert results["images"] == 2  # scenes of one frame

    line = fails_with_one_line(capsys, probe.main, probe_args(world, "seg3d", first, out, *more))
    assert "--val-scenes" in line and "--restart" in line
    line = fails_with_one_line(capsys, stage1.main,
                               stage1_args(world, tmp_path / "s1", "--val-scenes", "nowhere"))
    assert "--val-scenes nowhere: no such scene" in line and not (tmp_path / "s1").exists()


# ---- a dataset without pictures ------------------------------------------------------------------

@pytest.fixture
def bare(tmp_path, monkeypatch):
    """(name, path) of a dataset of scans alone, at two levels, with statistics of its own."""
    root = tmp_path / "bare"
    (root / "inside/scans").mkdir(parents=True)
    rng = np.random.default_rng(3)
    reader = types.ModuleType("readers.bare")
    reader.__file__ = str(tmp_path / "bare.py")
    (tmp_path / "bare.py").write_text("")
    for number in range(30):
        cloud = rng.uniform(-20, 20, (200, 4))
        cloud[:, 3] = number
        np.save(root / f"inside/scans/{number:02}.npy", cloud)

    def home(root):
        return root / "inside" if (root / "inside").is_dir() else root

    def table(root):
        names = sorted(path.name for path in (root / "scans").iterdir())
        paths = np.array([f"scans/{name}" for name in names], np.bytes_)
        split = np.where(np.arange(len(names)) < 20, b"train", b"val")
        return {"split": split, "scene": np.repeat([b"a", b"b", b"c"], 10)[:len(names)],
                "scan": paths, "labels": paths, "intensity": np.array([7.0, 3.0])}

    for name, value in {"home": home, "table": table, "scan": np.load, "CAMERAS": (),
                        "sources": lambda root: [root / "scans"], "SHARE": "frames",
                        "CLASSES": ("ignore", "even", "odd"), "PAPER_FRAMES": {"train": 20},
                        "labels": lambda path, count=None: np.full(200, 1, np.uint8),
                        "SAMPLING": {"fov": (48.0, 48.0, 8.0), "cell": 1.0, "voxel": 0.4,
                                     "max_points": None, "neighbors": 4, "intensity": (0.0, 1.0)},
                        }.items():
        setattr(reader, name, value)
    monkeypatch.setitem(sys.modules, "readers.bare", reader)
    return "bare", root


def test_scans_alone_are_a_dataset(bare):
    (table,) = open_tables([bare], here=True)
    assert table.cameras == [] and table.sampling["intensity"] == (7.0, 3.0)
    assert "train: 20 frames, as in the papers" in table.summary()
    assert "unstated" in table.summary() and len(table.files(labels=True)) == 16
    chosen = select([table], "train", conditions=["all"])
    set_sampling(chosen)
    frames = Frames(chosen, "scan", prepare=prepare, target="labels", points="every")
    assert frames.name((0, 3)) == "scans/03.npy"
    batch = collate([frames[0, 3], frames[0, 5]])
    assert "image" not in batch and len(batch["labels"]) == 400
    points = batch["inputs"]["points"]  # intensity first
    assert set(points[:, 0].tolist()) == {(3 - 7.0) / 3, (5 - 7.0) / 3} or np.allclose(
        sorted(set(points[:, 0].tolist())), [(3 - 7) / 3, (5 - 7) / 3])
    with pytest.raises(InputError, match="--cameras random: choose one of scan; bare has no pict"):
        Frames(chosen, "random")


def test_a_probe_says_that_there_is_nothing_to_judge_it_on(bare, capsys):
    (table,) = open_tables([bare], here=True)
    args = types.SimpleNamespace(data="bare=x")
    assert len(probe.validation_of(args, [table])[0]) == 10
    assert not capsys.readouterr().out
    table.columns["split"][:] = b"train"
    assert len(probe.validation_of(args, [table])[0]) == 0
    assert "no frame of split 'val', so eval.py will need --data" in capsys.readouterr().out


def test_a_mistyped_condition_is_none_where_none_is_stated(bare):
    """Another dataset's is a script's default and leaves out nothing."""
    (table,) = open_tables([bare], here=True)
    for conditions in (None, ["all"], ["day-clear"], ["night", "day-rain"]):
        assert len(select([table], "train", conditions)[0]) == 20
    for conditions in (["nigth"], ["night", "nigth"]):
        with pytest.raises(InputError, match=f"--conditions nigth: --data {table.root} states no "
                                             "conditions; leave the flag out, or name them in con"):
            select([table], "train", conditions)


def test_a_share_of_frames_begins_with_the_first(bare):
    (table,) = open_tables([bare], here=True)
    assert table.select("train", percent=10).rows.tolist() == [0, 10]
    assert table.share == "frames"


def test_all_levels_of_a_root_are_one_dataset_and_its_listing_counts(bare, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name, root = bare
    (outer,) = open_tables([bare], here=True)
    (inner,) = open_tables([(name, root / "inside")], here=True)
    assert outer.root == inner.root and of_frames([outer]) == of_frames([inner])
    assert len(list((tmp_path / "cache/collaborative-distillation").iterdir())) == 1
    (root / "inside/scans/29.npy").unlink()
    assert len(open_tables([bare], here=True)[0]) == 29
    # conditions of one's own are found at either level
    for place in (root, root / "inside"):
        (place / "conditions.json").write_text(json.dumps(dict.fromkeys("abc", "fog")))
        assert open_tables([bare], here=True)[0].conditions == ("fog",)
        (place / "conditions.json").unlink()


# ---- sampling, visibility ------------------------------------------------------------------------

def test_flags_given_by_hand_hold_for_other_datasets_and_tasks(bare):
    (table,) = open_tables([bare], here=True)
    own = table.sampling | {"probe": {"fov": (96.0, 96.0, 8.0), "voxel": 0.2}}
    for stored in (None, {"another": {}}):
        table.sampling = own
        known = set_sampling([table], stored, "probe", {"fov": (24.0, 24.0, 8.0)})["bare"]
        assert known["fov"] == (24.0, 24.0, 8.0) and known["voxel"] == 0.2
        assert known["intensity"] == (7.0, 3.0)


def test_the_margin_and_the_least_depth_of_visibility():
    xyz = np.array([[0.5, 0, 0.8], [0, 0, 2.0], [0.99, 0, 2.0], [1.0, 0, 2.0]])
    intrinsics = np.array([[10.0, 0, 5], [0, 10, 5], [0, 0, 1]])

    def visible(**rule):
        return project(xyz, np.eye(4), intrinsics, (10, 10), **rule)[0].tolist()

    assert visible() == [1]                                    # col 9.95 is in the margin
    assert visible(margin=0) == [1, 2]                         # col 10 is outside
    assert visible(min_depth=0, margin=0) == [1, 2]            # col 11.25
    assert visible(min_depth=0.5) == [1]


# ---- what was seen only when it was tried --------------------------------------------------------

def test_a_table_of_validation_frames_alone_can_be_split(world):
    table = open_one(world)
    table = table.only(table.rows)
    rows = np.flatnonzero(table["split"] == b"val")
    table.columns = {name: values[rows] if len(values) == len(table["split"]) else values
                     for name, values in table.columns.items()}
    table.columns["split"] = table.columns["split"].astype("S3")
    table.rows = np.arange(len(rows))
    first = table.scenes()[0]
    hold_out([table], [first])
    assert scenes(table, b"val") == [first] and len(scenes(table, b"train")) == 5


def test_two_levels_of_a_root_are_given_twice(bare):
    name, root = bare
    with pytest.raises(InputError, match="inside: given twice"):
        open_tables([bare, (name, root / "inside")], here=True)
    with pytest.raises(InputError, match="--data bare=: no path; give bare=PATH"):
        open_tables([(name, "")], here=True)


def test_roots_of_other_statistics_are_refused(bare):
    (table,) = open_tables([bare], here=True)
    other = table.only(table.rows)
    other.sampling = table.sampling | {"intensity": (8.0, 3.0)}
    with pytest.raises(InputError, match="the roots of bare have intensities of other statistics"):
        set_sampling([table, other])


@pytest.mark.slow
def test_a_probe_says_that_stage_1_held_scenes_out(world, copy, tmp_path, capsys):
    train = scenes(open_one(world), b"train")
    s1, out = tmp_path / "s1", tmp_path / "p"
    stage1.main(stage1_args(world, s1, "--steps", "1", "--val-scenes", train[0]))
    capsys.readouterr()
    probe.main(probe_args(world, "seg3d", s1, out, "--steps", "1", "--val-scenes", train[1]))
    assert "stage 1 had --val-scenes" not in capsys.readouterr().out
    probe.main(probe_args(world, "seg3d", s1, tmp_path / "q", "--steps", "1"))
    assert f"stage 1 had --val-scenes {train[0]}; here the split" in capsys.readouterr().out

    # another root of which none of its scenes is
    split = (copy / "v1.0-trainval/scene.json")
    split.write_text(split.read_text().replace(train[1], "scene-9999"))
    evaluation.main([*eval_args(out, out=tmp_path / "t"), "--data", str(copy)])
    assert "judged on the dataset's own validation split" in capsys.readouterr().out
    assert "of its own split" not in (tmp_path / "t.md").read_text()

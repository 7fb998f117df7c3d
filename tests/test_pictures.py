"""A folder of pictures: which files count, their conditions, what is no picture, and the lines of
docs/run.md that make features of them."""
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from runs import fails_with_one_line, open_one, probe_args, stage1_args, stage2_args

import finetune
import probe
import stage1
import stage2
from data import Frames, collate, select, set_sampling
from experiments import corruptions
from models import load_image_encoder
from plumbing.errors import InputError
from readers.table import datasets, main, open_tables

# Path of a picture: its width and height
PICTURES = {
    "day/a b.jpg": (60, 40), "day/x=1,y.JPG": (61, 41), "day/monday/1.jpeg": (40, 60),
    "night/夜 é.png": (62, 42), "night/Y.PNG": (63, 43), "night/y.png": (64, 44)}
NOT_COUNTED = ("day/.a.jpg", ".thumbnails/a.jpg", "night/._y.png", "day/read me.txt", "day/jpg",
               "day/clip.mp4")


def draw(path, size=(60, 40), mode="RGB", **options):
    """Write a picture of one grey, which is its width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, size[0]).convert(mode).save(path, **options)


def opened(root, **options):
    return open_one(root, name="pictures", **options)


@pytest.fixture
def root(tmp_path):
    """The PICTURES, and files beside them that are none."""
    for name, size in PICTURES.items():
        draw(tmp_path / "a=1,b" / name, size)
    for name in NOT_COUNTED:
        (tmp_path / "a=1,b" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a=1,b" / name).write_text("no picture")
    return tmp_path / "a=1,b"


def paths(table):
    return [path.decode() for path in table["image"][:, 0]]


def conditions(table):
    return [table.conditions[number] for number in table["condition"]]


# ---- frames --------------------------------------------------------------------------------------

def test_every_picture_is_a_frame_whatever_its_name_and_size(root):
    assert "pictures" in datasets()
    (table,) = open_tables(f"pictures={root}", here=True)
    assert paths(table) == sorted(PICTURES)
    assert [tuple(size[::-1]) for size in table["image_size"][:, 0].tolist()] == [
        PICTURES[name] for name in paths(table)]
    assert set(table["split"]) == {b"train"} and table.scenes() == ["day", "day/monday", "night"]
    assert table.conditions == ("day", "night")
    assert conditions(table) == [name.partition("/")[0] for name in paths(table)]
    assert not (table["bad"] != b"").any() and table.sampling is None

    # Each is read, and no other one in its place
    frames = Frames(select([table], "train", ["night", "day"]), image_size=(16, 32))
    batch = collate([frames[0, number] for number in range(len(frames))])
    assert batch["image"].shape == (6, 3, 16, 32)
    greys = batch["image"].float().mean((1, 2, 3)).tolist()
    assert greys == pytest.approx([PICTURES[name][0] for name in paths(table)], abs=1)
    assert [frames.conditions[number] for number in batch["condition"]] == conditions(table)
    assert len(select([table], "train", ["night"])[0]) == 3
    with pytest.raises(InputError, match="--conditions nigth: --data .* has day, night"):
        select([table], "train", ["nigth"])


@pytest.mark.slow
def test_the_lines_of_the_page_give_features_by_condition(root, monkeypatch):
    page = (ROOT / "docs/run.md").read_text().partition("## A folder of pictures")[2]
    text = re.search(r"```python\n(.*?)```", page, re.S).group(1)
    encoder = load_image_encoder(str(ROOT / "miniature/encoder.pth"))
    lines = text.replace("/data/pictures", str(root)).replace(
        "runs/s2", str(ROOT / "miniature/encoder.pth"))
    names = {}
    exec(lines, names)
    found = names["features"]
    assert {name: len(features) for name, features in found.items()} == {"day": 3, "night": 3}

    # The last one of the night by hand
    grey = torch.full((1, 3, *encoder.spec["image_size"]), PICTURES["night/夜 é.png"][0] / 255)
    with torch.no_grad():
        torch.testing.assert_close(found["night"][-1], encoder(grey).mean((2, 3))[0])


def test_conditions_are_the_first_folders_or_none(root):
    draw(root / "cover.jpg")
    table = opened(root)
    assert table.conditions == () and "condition" not in table
    assert table.scenes() == [".", "day", "day/monday", "night"]
    assert table.summary().splitlines()[-1] == (
        "  conditions unstated: cover.jpg is in no folder whose name can be a condition's; "
        "conditions.json can tell them")
    (root / "cover.jpg").unlink()
    for wrong in ("full", "a.b", "x,y"):
        (root / "night").rename(root / wrong)
        assert f"unstated: {wrong}/Y.PNG is in no folder whose name" in opened(root).summary()
        (root / wrong).rename(root / "night")
    for number in range(18):
        draw(root / f"drive-{number:02}/1.jpg")
    assert len(opened(root).conditions) == 20
    draw(root / "drive-18/1.jpg")
    assert "unstated: 21 folders are more than 20; cond" in opened(root).summary()


def test_conditions_json_names_scenes(root):
    (root / "conditions.json").write_text(json.dumps({"day/monday": "fog"}))
    table = opened(root)
    assert table.conditions == ("day", "night", "fog")
    assert conditions(table) == ["day", "fog", "day", "night", "night", "night"]
    draw(root / "cover.jpg")
    with pytest.raises(InputError, match="conditions.json: says nothing of .; the dataset states"):
        opened(root)
    (root / "conditions.json").write_text(json.dumps(dict.fromkeys(
        (".", "day", "day/monday", "night"), "dusk")))
    assert set(conditions(opened(root))) == {"dusk"}


@pytest.mark.slow
def test_a_copy_in_fog_is_a_folder_of_pictures(root, tmp_path):
    corruptions.main(["make", "--data", f"pictures={root}", "--out", str(tmp_path / "fog"),
                      "--corruption", "fog", "--image-size", "16", "32", "--workers", "0"])
    copy, table = opened(tmp_path / "fog"), opened(root)
    assert paths(copy) == paths(table) and (copy["image_size"] == table["image_size"]).all()
    assert set(conditions(copy)) == {"fog"} and copy.scenes() == table.scenes()


# ---- changes -------------------------------------------------------------------------------------

@pytest.mark.parametrize("look", (True, False))
def test_what_is_new_gone_or_changed_is_noticed(root, look):
    before = opened(root)
    draw(root / "night/new.jpg")
    assert len(opened(root, look=look)) == 7
    (root / "night/new.jpg").unlink()
    draw(root / "dusk/2/new.jpg")
    assert opened(root, look=look).conditions == ("day", "dusk", "night")
    (root / "dusk/2/new.jpg").rename(root / "dusk/2/.new.jpg")
    assert opened(root, look=look).fingerprint() == before.fingerprint()

    # In place: the folder has the same names and date
    draw(root / "day/a b.jpg", (90, 80))
    after = opened(root, look=look)
    assert after["image_size"][0, 0].tolist() == [80, 90]
    assert after.fingerprint() != before.fingerprint()
    assert after.only(np.arange(1, 6)).fingerprint() == before.only(np.arange(1, 6)).fingerprint()
    assert Frames([after], image_size=(8, 8))[0, 0]["image"].float().mean() == 90


def test_of_the_pictures_headers_alone_are_read(root, monkeypatch):
    read_bytes = Path.read_bytes

    def but_no_picture(path):
        assert path.suffix.lower() not in (".jpg", ".jpeg", ".png")
        return read_bytes(path)
    monkeypatch.setattr(Path, "read_bytes", but_no_picture)
    assert len(opened(root)) == len(opened(root)) == 6


# ---- what is no picture --------------------------------------------------------------------------

def test_bad_pictures_are_named(root, capsys):
    (root / "day/a b.jpg").write_bytes(b"")
    (root / "day/x=1,y.JPG").write_text("<!doctype html>")
    draw(root / "night/Y.PNG", mode="RGBA")
    draw(root / "night/y.png", mode="P")
    draw(root / "night/cmyk.jpg", mode="CMYK")
    with pytest.raises(SystemExit, match="3"):
        main("pictures", ["--data", str(root)])
    assert capsys.readouterr().out.splitlines() == [
        f"pictures={root}: 7 frames, 1 cameras", "  split  condition  scenes  frames  images",
        "  train  day             2       3       3", "  train  night           1       4       4",
        "bad: day/a b.jpg is empty; copy it again",
        "bad: day/x=1,y.JPG: not a readable image (of no known format); a web page? Download the "
        "file again, logged in if that is asked for, or extract it again",
        *(f"bad: night/{name}: an image of mode {mode}, not 8-bit RGB; its colours would be "
          "guessed. Convert it, or extract it again"
          for name, mode in (("Y.PNG", "RGBA"), ("cmyk.jpg", "CMYK"), ("y.png", "P")))]
    table = opened(root)
    with pytest.raises(InputError, match="5 of 7 frames are bad, the first: day/a b.jpg is empty"):
        select([table], "train")
    frames = Frames(select([table], "train", skip_bad=True), image_size=(8, 8), skip_bad=True)
    item = frames[0, 0]
    assert item["image"].float().mean() == pytest.approx(40, abs=1)
    assert item["bad"] == [(0, f"{root}: day/a b.jpg is empty; copy it again")]

    # A mended one is good at once
    draw(root / "day/a b.jpg")
    draw(root / "night/y.png", mode="L")
    assert (opened(root, look=False)["bad"] != b"").sum() == 3


def test_a_picture_cut_short_is_found_when_it_is_read(root):
    path = root / "day/a b.jpg"
    Image.effect_noise((300, 200), 99).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    table = opened(root)
    assert not (table["bad"] != b"").any()
    with pytest.raises(InputError, match=r"a b.jpg: not a readable image \(cut short"):
        Frames([table], image_size=(64, 64))[0, 0]


def refusal(root):
    with pytest.raises(InputError) as error:
        opened(root)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_roots_are_one_line(tmp_path):
    for name in (".hidden.jpg", "drawing.bmp", ".hidden/a.jpg"):
        draw(tmp_path / "empty" / name)
    assert refusal(tmp_path / "empty") == (
        f"--data {tmp_path}/empty: no picture in it or below it (.jpg, .jpeg or .png, in folders "
        "and files that do not begin with a dot)")
    assert refusal(tmp_path / "empty/drawing.bmp").endswith("is a file; give the folder that it is "
                                                            "in")
    assert refusal(tmp_path / "nowhere") == f"--data {tmp_path}/nowhere: no such folder"


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"a\nb.png", b"tab\t.jpg"])
def test_names_that_no_table_keeps_are_one_line(root, name):
    draw(root / "x.jpg")
    try:
        os.rename(root / "x.jpg", os.fsencode(root / "day") + b"/" + name)
    except OSError:
        pytest.skip("this file system has no such names")
    shown = ascii(f"day/{os.fsdecode(name)}")
    assert refusal(root) == (f"--data {root}: {shown}: a name that is no UTF-8, or that has a "
                             "control character; rename it")


def test_links_are_followed_but_not_back(root, tmp_path):
    draw(tmp_path / "elsewhere/1.jpg")
    (root / "dusk").symlink_to(tmp_path / "elsewhere")
    (root / "day/linked.png").symlink_to(root / "night/y.png")
    (root / "night/back").symlink_to(root)
    (root / "night/self").symlink_to("self")
    table = opened(root)
    assert set(paths(table)) == {*PICTURES, "dusk/1.jpg", "day/linked.png"}
    (root / "day/nothing.jpg").symlink_to(tmp_path / "nothing.jpg")
    assert refusal(root) == (f"--data {root}: day/nothing.jpg is no file (a link to nothing?); "
                             "mend or remove it")
    (root / "day/nothing.jpg").unlink()
    os.mkfifo(root / "day/nothing.jpg")
    assert "day/nothing.jpg is no file" in refusal(root)


# ---- scripts that it is not for ------------------------------------------------------------------

def test_what_needs_lidar_or_labels_says_so(root, tmp_path, capsys):
    out, data = tmp_path / "out", f"pictures={root}"
    no_scans = (f"error: --data {root}: pictures has no LiDAR scans, which both stages and seg3d "
                "need; it is for features of images (docs/run.md)")
    encoder = ["--weights", "random", "--image-size", "80", "160"]

    def refused(script, argv):
        return fails_with_one_line(capsys, script.main, argv)
    assert refused(stage1, stage1_args(data, out)).endswith(no_scans)
    assert refused(stage1, stage1_args(f"nuscenes={root},{data}", out)).endswith(no_scans)
    assert refused(stage2, stage2_args(data, "nowhere", out)).endswith(no_scans)
    for script, task, what in ((probe, "seg", "labels"), (probe, "depth", "depths"),
                               (finetune, "seg", "labels")):
        argv = probe_args(data, task, "vit_mini8", out, *encoder)
        assert refused(script, argv).endswith(f"--task {task}: pictures has no {what}")
    assert not out.exists()
    table = opened(root)
    with pytest.raises(InputError, match="--task seg3d: pictures has no labels"):
        probe.classes_of([table], "seg3d")
    with pytest.raises(InputError, match=re.escape(no_scans.removeprefix("error: "))):
        set_sampling([table])
    with pytest.raises(InputError, match=f"--data {root}: pictures has no labels"):
        Frames([table], target="labels")
    with pytest.raises(InputError, match="--cameras scan: choose one of random, all; pictures has"):
        Frames([table], "scan")

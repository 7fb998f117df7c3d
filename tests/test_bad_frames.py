"""Damaged and hostile datasets and checkpoints: a clear error that names the file, or the frame is
skipped and named; never anything else. `test_fuzz.py` does the same with any bytes at all."""
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from runs import fails_with_one_line, lines, open_one, probe_args, stage1_args, stage2_args
from test_weights import Harmful

import eval as evaluation
import export
import finetune
import models
import probe
import stage1
import stage2
from data import Frames, collate
from experiments import ablations
from plumbing.errors import InputError
from plumbing.run_folder import Log
from plumbing.weights import LAYOUT
from readers.files import read_image
from waffleiron import prepare

BAD_FOR_THE_INDEX = ("cut scan", "empty scan", "empty image", "labels of another length",
                     "zero quaternion", "nan in a pose")
BAD_WHEN_READ = {"nan": "points are not finite", "infinite": "points are not finite",
                 "broken image": "not a readable image", "cut image": "not a readable image",
                 "cmyk": "mode CMYK", "16 bit": "mode I;16",
                 "another size": "40x80 pixels, the tables say 80x160",
                 "no point in view": "no LiDAR point",
                 "class out of range": "label 200 is of no category"}
BAD_IMAGES = ("empty image", "broken image", "cut image", "cmyk", "16 bit", "another size")


# ---- the harms -----------------------------------------------------------------------------------

def rewrite(path, change):
    """Apply `change` to the rows of a table."""
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


def damage_image(image, kind):
    """Do one harm to an image."""
    if kind == "empty image":
        image.write_bytes(b"")
    elif kind == "broken image":
        image.write_bytes(b"\xff\xd8 no image")
    elif kind == "cut image":
        image.write_bytes(image.read_bytes()[:1000])
    elif kind == "cmyk":
        Image.open(image).convert("CMYK").save(image)
    elif kind == "16 bit":
        Image.fromarray(np.zeros((80, 160), np.uint16)).save(image, format="PNG")
    elif kind == "another size":
        Image.new("RGB", (80, 40)).save(image)


def damage_pose(tables, scan, kind):
    """Do one harm to the car's pose at the time of a scan; `scan` is its name in the tables."""
    views = json.loads((tables / "sample_data.json").read_text())
    token = next(row["token"] for row in views if row["filename"] == scan)
    if kind == "zero quaternion":
        change = {"rotation": [0, 0, 0, 0]}
    else:
        change = {"translation": [float("nan"), 0, 0]}

    def harm(rows):
        next(row for row in rows if row["token"] == token).update(change)
    rewrite(tables / "ego_pose.json", harm)


def damage(root, kind):
    """Do one harm to the first training frame of a nuScenes root.
    Returns the name of the file that an error should name."""
    found = open_one(root)
    row = found.select("train").rows[0]
    scan = root / found["scan"][row].decode()
    image = root / found["image"][row, 0].decode()
    labels = root / found["labels"][row].decode()
    points = np.fromfile(scan, np.float32).reshape(-1, 5).copy()
    if kind in BAD_IMAGES:
        damage_image(image, kind)
        return image.name
    if kind == "cut scan":
        scan.write_bytes(scan.read_bytes()[:-7])
    elif kind == "empty scan":
        scan.write_bytes(b"")
    elif kind == "labels of another length":
        labels.write_bytes(labels.read_bytes()[:-1])
    elif kind in ("zero quaternion", "nan in a pose"):
        damage_pose(root / "v1.0-trainval", found["scan"][row].decode(), kind)
    elif kind in ("nan", "infinite"):
        points[3, 1] = np.nan if kind == "nan" else np.inf
        points.tofile(scan)
    elif kind == "no point in view":
        points[:, 1] = -np.abs(points[:, 1]) - 5  # behind the car
        points.tofile(scan)
    elif kind == "class out of range":
        content = bytearray(labels.read_bytes())
        content[5] = 200
        labels.write_bytes(content)
        return labels.name
    return scan.name


# ---- one bad frame -------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [*BAD_FOR_THE_INDEX, *BAD_WHEN_READ])
def test_every_harm_is_named_or_skipped(copy, kind):
    name = damage(copy, kind)
    os.utime(copy / "v1.0-trainval/log.json")  # so that it is indexed anew
    found = open_one(copy)

    # The index names it when its split is asked for, and only then.
    if kind in BAD_FOR_THE_INDEX:
        message = rf"--data {copy}: 1 of 8 frames are bad, the first: .*{re.escape(name)}"
        with pytest.raises(InputError, match=message):
            found.select("train")
    found.select("val")  # is not concerned

    # Reading the frame names it too.
    options = dict(image_size=(80, 160), prepare=prepare, target="labels")
    tables = [found.select("train", skip_bad=True)]
    with pytest.raises(InputError, match=BAD_WHEN_READ.get(kind, "extract")) as error:
        Frames(tables, **options)[0, 0]
    assert name in str(error.value)
    assert "\n" not in str(error.value)

    # Skipping puts another frame in its place, and names it.
    skipping = Frames(tables, **options, skip_bad=True)
    intact = Frames(tables, **options)
    batch = collate([skipping[0, number] for number in (7, 0)])
    assert [row for row, _ in batch["bad"]] == [tables[0].rows[0]]
    assert name in batch["bad"][0][1]
    assert torch.equal(batch["image"][1], intact[0, 1]["image"])
    assert torch.equal(batch["image"][0], intact[0, 7]["image"])


def test_a_repaired_frame_is_good_again(copy, world):
    scan = copy / open_one(copy)["scan"][0].decode()
    content = scan.read_bytes()
    scan.write_bytes(content[:-7])
    os.utime(copy / "v1.0-trainval/log.json")  # so that it is indexed anew
    assert (open_one(copy)["bad"] != b"").sum() == 1
    scan.write_bytes(content)
    assert (open_one(copy)["bad"] == b"").all()


def test_a_grey_image_is_an_image(tmp_path):
    Image.linear_gradient("L").resize((48, 24)).save(tmp_path / "grey.jpg")
    image = read_image(tmp_path / "grey.jpg", (24, 48), (24, 48)).float()
    assert image.shape == (3, 24, 48) and (image[0] == image[1]).all() and image.std() > 50


def test_all_bad_is_an_error_even_when_skipping(copy):
    tables = [open_one(copy).select("train")]
    for path in (copy / "samples/CAM_FRONT").iterdir():
        path.write_bytes(path.read_bytes()[:500])
    message = "8 items in a row cannot be read, the last: .*not a readable image"
    with pytest.raises(InputError, match=message):
        Frames(tables, image_size=(80, 160), skip_bad=True)[0, 0]


# ---- the scripts ---------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("script", ["stage1", "stage2", "probe"])
def test_scripts_stop_or_skip(copy, world, tmp_path, capsys, script, monkeypatch):
    """One bad frame stops a script. --on-bad-frame skip goes on, unless too many are bad."""
    stage1.main(stage1_args(world, tmp_path / "s1", "--steps", "1"))
    name = damage(copy, "cut image")
    out = tmp_path / "out"
    more = ["--steps", "4"]

    def start(*skip):
        if script == "stage1":
            conditions = ["--conditions", "day-clear", "day-rain", "night"]
            stage1.main(stage1_args(copy, out, *conditions, *more, *skip))
        elif script == "stage2":
            stage2.main(stage2_args(copy, tmp_path / "s1", out, *more, *skip))
        else:
            probe.main(probe_args(copy, "seg", tmp_path / "s2", out, *more, *skip))
    if script == "probe":
        stage2.main(stage2_args(world, tmp_path / "s1", tmp_path / "s2", "--steps", "1"))

    with pytest.raises(SystemExit):
        start()
    error = capsys.readouterr().err
    assert name in error and "error: " in error
    with pytest.raises(SystemExit):  # 1 of 8 is more than 1 %
        start("--on-bad-frame", "skip")
    error = capsys.readouterr().err
    assert "1 of 8 frames are bad, more than 1%" in error and name in error

    monkeypatch.setattr("plumbing.run_folder.BAD_FRAMES", 0.2)
    start("--on-bad-frame", "skip")
    assert name in lines(out)[-1]["bad_frames"][0]
    assert "1 bad frames were left out" in capsys.readouterr().out
    assert torch.load(out / "last.pth", weights_only=True)["step"] == 4


def test_skipping_needs_no_cache(world, tmp_path, capsys):
    flags = ["--cache", "--on-bad-frame", "skip"]
    argv = probe_args(world, "seg", "vit_mini8", tmp_path / "p", *flags)
    message = fails_with_one_line(capsys, probe.main, argv)
    assert "--on-bad-frame skip: not with --cache" in message


# ---- strangers' files ----------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "samples/../../x"])
def test_tables_cannot_name_files_outside_of_the_root(copy, path):
    rewrite(copy / "v1.0-trainval/sample_data.json", lambda rows: rows[0].update(filename=path))
    message = f"the tables name {path}, which is outside of this folder"
    with pytest.raises(InputError, match=message):
        open_one(copy)


def test_every_loader_refuses_code(world, tmp_path, capsys):
    made, evil, out = tmp_path / "made", tmp_path / "evil", tmp_path / "out"
    evil.mkdir()
    content = {"kind": "point_encoder", "layout": LAYOUT, "args": {}, "step": 1,
               "model": Harmful(made)}
    torch.save(content, evil / "last.pth")
    weights = ["--weights", str(evil / "last.pth")]
    for main, argv in (
            (stage2.main, stage2_args(world, evil, out)),  # --stage1
            (stage1.main, stage1_args(world, evil)),  # a run to resume
            (probe.main, probe_args(world, "seg", evil, out)),  # --encoder
            (finetune.main, probe_args(world, "seg", evil, out)),
            (probe.main, probe_args(world, "seg3d", evil, out)),  # WaffleIron
            (probe.main, probe_args(world, "seg", "dino_vits16", out, *weights)),
            (evaluation.main, [str(evil), "--out", str(out)]),
            (export.main, [str(evil), "--out", str(out)]),
            (ablations.main, ["2d-head", "--stage1", str(evil), "--data", str(world),
                              "--out", str(out)])):
        fails_with_one_line(capsys, main, argv)
        assert not made.exists()
    with pytest.raises(InputError, match="loading that could run code"):
        models.load_point_encoder(evil)


def test_the_index_cache_holds_no_pickle(world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_one(world)
    file = next((tmp_path / "cache").rglob("scene.npy"))
    np.save(file, np.array([Harmful(tmp_path / "made")], object), allow_pickle=True)
    open_one(world)  # made anew
    assert not (tmp_path / "made").exists() and os.path.isfile(file)


def test_a_log_and_side_files_are_data(tmp_path):
    line = {"step": 1, "seconds": 1, "processes": 1, "trainable_parameters": 1, "memory_gb": 1}
    code = '__import__("os").mkdir("made")'
    (tmp_path / "log.jsonl").write_text(f"{code}\n{json.dumps(line)}\n")
    log = Log(tmp_path, torch.device("cpu"), torch.nn.Linear(1, 1), {"step": 1, "log": {}})
    log.report()
    assert lines(tmp_path) == [line]

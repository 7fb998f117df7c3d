"""Damaged and hostile datasets and checkpoints: a clear error that names the file, or the frame is skipped and named; never anything else."""
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import eval as evaluation
import export
import index
import probe
import stage1
import stage2
from checkpoints import read
from data import CLOUD, Frames, collate
from errors import InputError
from experiments import ablations
from run_folder import Log
from test_checkpoints import Harmful
from test_scripts import fails_with_one_line, lines, probe_args, stage1_args, stage2_args
from waffleiron import load_waffleiron

BAD_FOR_THE_INDEX = ("cut scan", "empty scan", "empty image", "labels of another length", "zero quaternion", "nan in a pose")
BAD_WHEN_READ = {"nan": "points are not finite", "infinite": "points are not finite", "broken image": "not a readable image",
                 "cut image": "not a readable image", "cmyk": "mode CMYK", "16 bit": "mode I;16",
                 "another size": "40x80 pixels, the tables say 80x160", "no point in view": "no LiDAR point", "class out of range": "label 200 is of no category"}


def rewrite(path, change):
    """Apply `change` to the rows of a table."""
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


def damage(root, kind):
    """Do one harm to the first training frame of a nuScenes root; returns the name of what an error should name."""
    frame = index.load_index(root, here=True)
    row = frame.select("train")[0]
    scan, image, labels = (root / path.decode() for path in (frame.lidar[row], frame.image[row, 0], frame.lidarseg[row]))
    points = np.fromfile(scan, np.float32).reshape(-1, 5).copy()
    if kind == "cut scan":
        scan.write_bytes(scan.read_bytes()[:-7])
    elif kind == "empty scan":
        scan.write_bytes(b"")
    elif kind == "empty image":
        image.write_bytes(b"")
        return image.name
    elif kind == "labels of another length":
        labels.write_bytes(labels.read_bytes()[:-1])
    elif kind in ("zero quaternion", "nan in a pose"):
        views = json.loads((root / "v1.0-trainval/sample_data.json").read_text())
        token = next(r["token"] for r in views if r["filename"] == frame.lidar[row].decode())
        change = {"rotation": [0, 0, 0, 0]} if kind == "zero quaternion" else {"translation": [float("nan"), 0, 0]}
        rewrite(root / "v1.0-trainval/ego_pose.json", lambda rows: next(r for r in rows if r["token"] == token).update(change))
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
    else:
        if kind == "broken image":
            image.write_bytes(b"\xff\xd8 no image")
        elif kind == "cut image":
            image.write_bytes(image.read_bytes()[:1000])
        elif kind == "cmyk":
            Image.open(image).convert("CMYK").save(image)
        elif kind == "16 bit":
            Image.fromarray(np.zeros((80, 160), np.uint16)).save(image, format="PNG")
        elif kind == "another size":
            Image.new("RGB", (80, 40)).save(image)
        return image.name
    return scan.name


@pytest.fixture
def copy(world, tmp_path):
    return shutil.copytree(world, tmp_path / "copy")


@pytest.mark.parametrize("kind", [*BAD_FOR_THE_INDEX, *BAD_WHEN_READ])
def test_every_harm_is_named_or_skipped(copy, kind):
    name = damage(copy, kind)
    os.utime(copy / "v1.0-trainval/log.json")  # so that it is indexed anew
    found = index.load_index(copy, here=True)
    if kind in BAD_FOR_THE_INDEX:
        with pytest.raises(InputError, match=rf"--data {copy}: 1 of 8 frames are bad, the first: .*{re.escape(name)}"):
            found.select("train")
    found.select("val")  # is not concerned
    options = dict(image_size=(80, 160), cloud=CLOUD, labels=True)
    rows = found.select("train", skip_bad=True)
    with pytest.raises(InputError, match=BAD_WHEN_READ.get(kind, "extract")) as error:
        Frames(found, rows, **options)[0, 0]
    assert name in str(error.value) and "\n" not in str(error.value)
    skipping, intact = Frames(found, rows, **options, skip_bad=True), Frames(found, rows, **options)
    batch = collate([skipping[0, number] for number in (7, 0)])
    assert [row for row, _ in batch["bad"]] == [rows[0]] and name in batch["bad"][0][1]
    assert torch.equal(batch["image"][1], intact[0, 1]["image"]) and torch.equal(batch["image"][0], intact[0, 7]["image"])


def test_a_repaired_frame_is_good_again(copy, world):
    found = index.load_index(copy, here=True)
    scan = copy / found.lidar[0].decode()
    content = scan.read_bytes()
    scan.write_bytes(content[:-7])
    os.utime(copy / "v1.0-trainval/log.json")  # so that it is indexed anew
    assert (index.load_index(copy, here=True).bad != b"").sum() == 1
    scan.write_bytes(content)
    assert (index.load_index(copy, here=True).bad == b"").all()


def test_a_grey_image_is_an_image(tmp_path):
    Image.linear_gradient("L").resize((48, 24)).save(tmp_path / "grey.jpg")
    image = data.read_image(tmp_path / "grey.jpg", (24, 48), (24, 48))
    assert image.shape == (3, 24, 48) and (image[0] == image[1]).all() and image.std() > 50


def test_all_bad_is_an_error_even_when_skipping(copy):
    found = index.load_index(copy, here=True)
    for path in (copy / "samples/CAM_FRONT").iterdir():
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="8 items in a row cannot be read, the last: .*not a readable image"):
        Frames(found, found.select("train"), image_size=(80, 160), skip_bad=True)[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["stage1", "stage2", "probe"])
def test_scripts_stop_or_skip(copy, world, tmp_path, capsys, script, monkeypatch):
    stage1.main(stage1_args(world, tmp_path / "s1", "--steps", "1"))
    name = damage(copy, "cut image")

    def start(*more):
        if script == "stage1":
            stage1.main(stage1_args(copy, tmp_path / "out", "--conditions", "day-clear", "day-rain", "night", "--steps", "4", *more))
        elif script == "stage2":
            stage2.main(stage2_args(copy, tmp_path / "s1", tmp_path / "out", "--steps", "4", *more))
        else:
            probe.main(probe_args(copy, "seg", tmp_path / "s2", tmp_path / "out", "--steps", "4", *more))
    if script == "probe":
        stage2.main(stage2_args(world, tmp_path / "s1", tmp_path / "s2", "--steps", "1"))
    with pytest.raises(SystemExit):
        start()
    assert name in (error := capsys.readouterr().err) and "error: " in error
    with pytest.raises(SystemExit):  # 1 of 8 is more than 1 %
        start("--on-bad-frame", "skip")
    assert "1 of 8 frames are bad, more than 1%" in (error := capsys.readouterr().err) and name in error
    monkeypatch.setattr("run_folder.BAD_FRAMES", 0.2)
    start("--on-bad-frame", "skip")
    assert name in lines(tmp_path / "out")[-1]["bad_frames"][0] and "1 bad frames were left out" in capsys.readouterr().out
    assert torch.load(tmp_path / "out/last.pth", weights_only=True)["step"] == 4


def test_skipping_needs_no_cache(world, tmp_path, capsys):
    assert "--on-bad-frame skip: not with --cache" in fails_with_one_line(
        capsys, probe.main, probe_args(world, "seg", "vit_mini8", tmp_path / "p", "--cache", "--on-bad-frame", "skip"))


# ---- fuzz: any bytes at all -----------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


def bytes_or_damaged(valid):
    """Any bytes, or the valid ones with a part cut off or overwritten."""
    length = len(valid)
    cut = st.integers(0, length - 1).map(lambda at: valid[:at])
    hit = st.tuples(st.integers(0, length - 1), st.binary(min_size=1, max_size=8)).map(lambda x: valid[:x[0]] + x[1] + valid[x[0] + len(x[1]):])
    return st.one_of(st.binary(max_size=200), cut, hit)


def outcome(read, path):
    """What read() gives, or None after an error that names the file in one line."""
    try:
        return read()
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None


@pytest.mark.parametrize("column", range(5))
def test_no_column_of_a_scan_may_hold_what_is_no_number(tmp_path, column):
    points = np.arange(50, dtype=np.float32).reshape(10, 5)
    points[3, column] = np.nan
    points.tofile(tmp_path / "scan.bin")
    assert outcome(lambda: data.read_scan(tmp_path / "scan.bin"), tmp_path / "scan.bin") is None


@FUZZ
@given(content=bytes_or_damaged(np.arange(50, dtype=np.float32).tobytes()))
def test_any_scan(tmp_path, content):
    path = tmp_path / "scan.bin"
    path.write_bytes(content)
    scan = outcome(lambda: data.read_scan(path), path)
    whole = len(content) > 0 and len(content) % 20 == 0
    x, y, z, intensity, ring = points = np.frombuffer(content if whole else bytes(20), np.float32).reshape(-1, 5).T
    with np.errstate(invalid="ignore"):
        good = (whole and np.abs([x, y, z]).max() <= 500 and intensity.min() >= 0 and intensity.max() <= 255
                and set(ring.tolist()) <= set(range(128)) and (~points[:3].any(0)).sum() < 16
                and (intensity.max() > 1 or set(intensity.tolist()) <= {0, 1}))
    assert (scan is not None) == good and (not good or np.array_equal(scan, points[:4].T))  # then it is what the bytes say


@FUZZ
@given(content=st.binary(max_size=40), count=st.integers(0, 40))
def test_any_labels(tmp_path, content, count):
    path, coarse = tmp_path / "labels.bin", np.full(256, index.UNKNOWN, np.uint8)
    coarse[:32] = np.arange(32) % 17
    path.write_bytes(content)
    classes = outcome(lambda: data.read_labels(path, coarse, count), path)
    good = len(content) == count and all(fine < 32 for fine in content)
    assert (classes is not None) == good and (not good or classes.tolist() == [fine % 17 for fine in content])


def valid_image(path, **options):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (24, 48, 3), dtype=np.uint8)).save(path, **options)
    return path.read_bytes()


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_any_image(tmp_path, ending):
    valid = valid_image(tmp_path / f"valid.{ending}")

    @FUZZ
    @given(content=bytes_or_damaged(valid))
    def check(content):
        path = tmp_path / f"image.{ending}"
        path.write_bytes(content)
        image = outcome(lambda: data.read_image(path, (12, 24), (24, 48)), path)
        assert image is None or image.shape == (3, 12, 24) and image.dtype == np.uint8
    check()


def is_data(value):
    """Whether it is made of tensors and plain containers only."""
    parts = [*value, *value.values()] if isinstance(value, dict) else value if type(value) in (list, tuple) else []
    return type(value) in (torch.Tensor, dict, list, tuple, str, bytes, int, float, bool, type(None)) and all(map(is_data, parts))


def test_any_checkpoint(tmp_path):
    torch.save({"kind": "probe", "step": 3, "weights": torch.arange(6.0)}, tmp_path / "valid.pth")
    valid, path = (tmp_path / "valid.pth").read_bytes(), tmp_path / "last.pth"

    @FUZZ
    @given(content=bytes_or_damaged(valid))
    def check(content):
        path.write_bytes(content)
        found = outcome(lambda: read(path), path)
        assert found is None or is_data(found)
        assert found is None or content == valid or not valid.startswith(content)  # one that is cut is never taken for whole
    check()


@pytest.mark.parametrize("table", ["sample_data", "ego_pose", "calibrated_sensor", "scene", "sample", "lidarseg", "category"])
def test_any_table(copy, table):
    path = copy / "v1.0-trainval" / f"{table}.json"
    valid = path.read_bytes()

    @settings(parent=FUZZ, max_examples=8)
    @given(content=bytes_or_damaged(valid))
    def check(content):
        path.write_bytes(content)
        found = outcome(lambda: index.load_index(copy, here=True), copy)
        assert found is None or len(found.scene) == len(found.lidar)
    check()


JSON = st.one_of(st.none(), st.integers(-2**40, 2**40), st.floats(), st.text(max_size=5), st.lists(st.floats(-1, 1), max_size=4), st.just({}))


@pytest.mark.slow
@pytest.mark.parametrize("table", ["sample_data", "ego_pose", "calibrated_sensor", "scene", "sample", "lidarseg", "category"])
def test_any_value_in_a_table(copy, table):
    path = copy / "v1.0-trainval" / f"{table}.json"
    valid, intact = path.read_bytes(), index.load_index(copy, here=True)
    rows = json.loads(valid)

    @settings(parent=FUZZ, max_examples=25)
    @given(row=st.integers(0, len(rows) - 1), field=st.sampled_from(sorted(rows[0])), value=JSON)
    def check(row, field, value):
        changed = json.loads(valid)
        changed[row][field] = value
        path.write_text(json.dumps(changed))
        found = outcome(lambda: index.load_index(copy, here=True), copy)
        if found is not None:  # then it is as it was but for the frames that are bad, or that the value is about
            assert found.cam_from_lidar.shape[1:] == intact.cam_from_lidar.shape[1:] and found.image_size.dtype.kind == "i"
            assert (np.isfinite(found.cam_from_lidar).all((1, 2, 3)) | (found.bad != b"")).all()
    check()


def test_a_damaged_cache_is_made_anew(world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scenes = index.load_index(world, here=True).scene.tolist()
    for harm in (lambda file: file.write_bytes(b""), lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:40])):
        harm(next((tmp_path / "cache").rglob("scene.npy")))
        assert index.load_index(world, here=True).scene.tolist() == scenes
    assert len(list((tmp_path / "cache/collaborative-distillation").iterdir())) == 1  # and no rest of it stays


# ---- strangers' files ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "samples/../../x"])
def test_tables_cannot_name_files_outside_of_the_root(copy, path):
    rewrite(copy / "v1.0-trainval/sample_data.json", lambda rows: rows[0].update(filename=path))
    with pytest.raises(InputError, match=f"the tables name {path}, which is outside of this folder"):
        index.load_index(copy, here=True)


def test_every_loader_refuses_code(world, tmp_path, capsys):
    made, evil = tmp_path / "made", tmp_path / "evil"
    evil.mkdir()
    torch.save({"kind": "point_encoder", "args": {}, "step": 1, "model": Harmful(made)}, evil / "last.pth")
    out = tmp_path / "out"
    for main, argv in ((stage2.main, stage2_args(world, evil, out)),                                         # --stage1
                       (stage1.main, stage1_args(world, evil)),                                               # a run to resume
                       (probe.main, probe_args(world, "seg", evil, out)),                                     # --encoder
                       (probe.main, probe_args(world, "seg3d", evil, out)),                                   # WaffleIron
                       (probe.main, probe_args(world, "seg", "dino_vits16", out, "--weights", str(evil / "last.pth"))),
                       (evaluation.main, [str(evil), "--out", str(out)]),
                       (export.main, [str(evil), "--out", str(out)]),
                       (ablations.main, ["2d-head", "--stage1", str(evil), "--data", str(world), "--out", str(out)])):
        fails_with_one_line(capsys, main, argv)
        assert not made.exists()
    with pytest.raises(InputError, match="loading that could run code"):
        load_waffleiron(evil)


def test_the_index_cache_holds_no_pickle(world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index.load_index(world, here=True)
    file = next((tmp_path / "cache").rglob("scene.npy"))
    np.save(file, np.array([Harmful(tmp_path / "made")], object), allow_pickle=True)
    index.load_index(world, here=True)  # made anew
    assert not (tmp_path / "made").exists() and os.path.isfile(file)


def test_a_log_and_side_files_are_data(tmp_path):
    line = {"step": 1, "seconds": 1, "processes": 1, "trainable_parameters": 1, "memory_gb": 1}
    (tmp_path / "log.jsonl").write_text(f'__import__("os").mkdir("made")\n{json.dumps(line)}\n')
    log = Log(tmp_path, torch.device("cpu"), torch.nn.Linear(1, 1), {"step": 1, "log": {}})
    log.report()
    assert lines(tmp_path) == [line]

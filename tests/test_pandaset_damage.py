"""PandaSet: what is missing or damaged, of roots, JSON files and frames, is named in one line."""
import gzip
import json
import shutil

import numpy as np
import pytest
from pandasets import write_dataset, write_json, write_scene
from runs import open_one

from data import Frames
from miniature.pandaset_files import write_frame
from plumbing.errors import InputError
from readers import pandaset, pandaset64, pandasetgt


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Root of a dataset."""
    root = tmp_path_factory.mktemp("pandaset") / "data"
    write_dataset(root)
    return root


@pytest.fixture
def root(made, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "data")


def refusal(root, name="pandaset64"):
    with pytest.raises(InputError) as error:
        open_one(root, name=name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_root_of_another_layout(root, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal(tmp_path / "empty")
    assert "no folder SSS/lidar in it" in message and "download PandaSet" in message
    assert f"this is one scene: give the folder of scenes, {root}" in refusal(root / "003")
    assert f"there are scenes in {root}: give that" in refusal(tmp_path)
    for scene in ("003", "017"):
        shutil.rmtree(root / scene / "annotations")
    assert "none of its 3 scenes has the folder annotations/semseg" in refusal(root)
    assert "annotations/semseg" in refusal(root, "pandasetgt")


@pytest.mark.parametrize("file, content, reason", [
    ("meta/gps.json", None, "gps.json: no such file"),
    ("meta/gps.json", "[]", "no latitude"),
    ("meta/gps.json", '[{"long": 3}]', "no latitude"),
    ("meta/gps.json", '[{"lat": NaN}]', "no latitude"),
    ("meta/gps.json", "{", "no readable JSON"),
    ("lidar/poses.json", None, "no such file"),
    ("lidar/poses.json", "[" * 100_000, "no readable JSON"),
    ("lidar/poses.json", '{"a": 1}', "no list of positions"),
    ("lidar/poses.json", '[{"position": {"x": 0, "y": 0, "z": 0}}]', "no list of positions"),
    ("camera/front_camera/poses.json", "7", "no list of positions"),
    ("camera/front_camera/poses.json", None, "no such file"),
    ("camera/front_camera/intrinsics.json", None, "no such file"),
    ("camera/front_camera/intrinsics.json", '{"fx": 1, "fy": 1, "cx": 0}', "fx, fy, cx, cy"),
    ("camera/front_camera/intrinsics.json", '{"fx": 0, "fy": 1, "cx": 0, "cy": 0}', "fx, fy"),
    ("camera/front_camera/intrinsics.json", '["fx", "fy"]', "fx, fy, cx, cy"),
    ("camera/front_camera/intrinsics.json", b"\xff\xfe\xfd", "no readable JSON"),
    ("camera/front_camera/02.jpg", None, "1 of 30 files that the tables name are missing"),
    ("annotations/semseg/02.pkl.gz", None, "1 of 5 files that the tables name are missing")])
def test_files_beside_the_frames_that_are_missing_or_damaged(root, file, content, reason):
    path = root / "003" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    message = refusal(root)
    assert reason in message and file in message
    assert "again" in message


def test_a_scene_without_a_camera_that_is_asked_for(root):
    shutil.rmtree(root / "017/camera/left_camera")
    assert refusal(root) == (
        f"--data {root}: scene 017 has no folder camera/left_camera; download the scene again, or "
        "take it away (of the cameras, --data pandasetgt=PATH needs the front one alone)")
    table = open_one(root, name="pandasetgt")
    assert len(table) == 5
    with pytest.raises(InputError, match="--cameras left_camera: choose one of random, all, scan, "
                                         "front_camera; pandasetgt has no other"):
        Frames([table], "left_camera")


def cut(path):
    path.write_bytes(path.read_bytes()[:-500])


def pose_with(part, name, value):
    """A harm to the pose of frame 02."""
    def harm(path):
        poses = json.loads(path.read_text())
        poses[2][part][name] = value
        write_json(path, poses)
    return harm


BAD_FRAMES = {  # name: (file of 003, what is done to it, what the reason says)
    "an empty scan": ("lidar/02.pkl.gz", lambda path: path.write_bytes(b""), "empty"),
    "a scan cut short": ("lidar/02.pkl.gz", cut, "cut short"),
    "no gzip": ("lidar/02.pkl.gz", lambda path: path.write_text("<html>"), "a web page?"),
    "unpacked": ("lidar/02.pkl.gz", lambda path: path.write_bytes(
        gzip.decompress(path.read_bytes())), "Pack it with gzip"),
    "empty labels": ("annotations/semseg/02.pkl.gz", lambda path: path.write_bytes(b""), "empty"),
    "an empty picture": ("camera/back_camera/02.jpg", lambda path: path.write_bytes(b""), "empty"),
    "no picture": ("camera/back_camera/02.jpg", lambda path: path.write_bytes(b"\xff\xd8 none"),
                   "no picture"),
    "fewer poses": ("lidar/poses.json", lambda path: write_json(
        path, json.loads(path.read_text())[:2]), "fewer than there are frames"),
    "fewer poses of a camera": ("camera/left_camera/poses.json", lambda path: write_json(
        path, json.loads(path.read_text())[:1]), "fewer than there are frames"),
    "no rotation": ("camera/left_camera/poses.json", pose_with("heading", "w", 9), "no rotation"),
    "no place": ("lidar/poses.json", pose_with("position", "x", np.nan), "is none")}


@pytest.mark.parametrize("kind", BAD_FRAMES)
def test_bad_frames_are_named_and_can_be_skipped(root, kind):
    file, harm, reason = BAD_FRAMES[kind]
    harm(root / "003" / file)
    table = open_one(root, name="pandaset64")
    bad = np.char.decode(table["bad"]).tolist()
    assert [reason != "" for reason in bad] == [False, True, False, False, False]
    assert reason in bad[1] and "003/" in bad[1] and "02" in bad[1]
    with pytest.raises(InputError, match="1 of 2 frames are bad"):
        table.select("train")
    assert len(table.select("train", skip_bad=True)) == 2
    if file == "lidar/poses.json":
        with pytest.raises(InputError, match="its pose or that of one of its images is none"):
            pandaset64.scan(root / "003/lidar/02.pkl.gz")


def test_a_mended_file_is_read_again(root):
    path = root / "003/lidar/02.pkl.gz"
    whole = path.read_bytes()
    path.write_bytes(b"")
    assert open_one(root, name="pandaset64")["bad"][1] != b""
    path.write_bytes(whole)
    assert open_one(root, name="pandaset64")["bad"][1] == b""


def test_what_is_there_anew_is_seen(root):
    """A frame, and labels of a scene that had none."""
    assert len(open_one(root, name="pandaset64")) == 5
    write_scene(root, "003", 37.77, ("00", "02", "03"), seed=1)
    assert len(open_one(root, name="pandaset64")) == 6
    write_scene(root, "040", 37.77, seed=3)
    assert len(open_one(root, name="pandaset64")) == 8


def test_labels_of_another_length_and_other_columns(root):
    scan, labels = root / "003/lidar/00.pkl.gz", root / "003/annotations/semseg/00.pkl.gz"
    write_frame(labels, {"class": np.full(299, 7)})
    with pytest.raises(InputError, match=f"{labels}: 299 labels for 300 points in {scan}"):
        pandaset64.labels(labels)
    write_frame(labels, {"klass": np.full(300, 7)})
    with pytest.raises(InputError, match="no column 'class', the columns are klass"):
        pandaset64.labels(labels)
    write_frame(labels, {"class": np.full(300, 7.5)})
    with pytest.raises(InputError, match="class 7.5 is of no table"):
        pandaset64.labels(labels)
    points = np.ones((300, 5))
    write_frame(scan, dict(zip("xyzit", points.T)) | {"d": np.zeros(300, int)})
    with pytest.raises(InputError, match=f"{scan}: no point of the LiDAR d = 1"):
        pandasetgt.scan(scan)
    assert len(pandaset64.scan(scan)) == 300


def test_a_frame_is_unpacked_once_for_points_and_labels(root, monkeypatch):
    read = []
    read_frame = pandaset.read_frame

    def counted(path, columns):
        read.append(path)
        return read_frame(path, columns)

    monkeypatch.setattr(pandaset, "read_frame", counted)
    scan, labels = root / "003/lidar/00.pkl.gz", root / "003/annotations/semseg/00.pkl.gz"
    for reader in (pandaset64, pandasetgt):
        reader.scan(scan)
        reader.labels(labels)
    assert read == [str(scan), labels, labels]
    # Another file at this path is another frame
    shutil.copy(root / "003/lidar/02.pkl.gz", scan)
    pandaset64.scan(scan)
    assert read[3:] == [str(scan)]


@pytest.mark.parametrize("seed", range(8))
def test_any_bytes_for_a_frame_are_read_or_refused_in_a_line(root, seed):
    rng = np.random.default_rng(seed)
    scan, labels = root / "003/lidar/00.pkl.gz", root / "003/annotations/semseg/00.pkl.gz"
    for path, read in ((scan, pandaset64.scan), (labels, pandaset64.labels)):
        whole = path.read_bytes()
        for _ in range(20):
            content = bytearray(gzip.decompress(whole))
            for at in rng.integers(0, len(content), 3):
                content[at] = rng.integers(256)
            path.write_bytes(gzip.compress(bytes(content), 1))
            try:
                found = read(path)
                assert found.dtype in (np.float64, np.uint8) and np.isfinite(found).all()
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error)
        path.write_bytes(whole)

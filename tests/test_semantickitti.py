"""SemanticKITTI: class table from semantic-kitti.yaml, a point projected by hand, real scans, roots
at three levels, calibrations in two places, pictures for all scans or none."""
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image
from runs import fails_with_one_line, open_one, probe_args

import eval as evaluation
import probe
from data import Frames, collate, project, select
from plumbing.errors import InputError
from readers import semantickitti
from readers.table import UNKNOWN, main, open_tables
from waffleiron import prepare

# Fine label: learnt class, a second time and in the yaml's own numbers
LEARNING_MAP = {
    0: 0, 1: 0, 10: 1, 11: 2, 13: 5, 15: 3, 16: 5, 18: 4, 20: 5, 30: 6, 31: 7, 32: 8, 40: 9, 44: 10,
    48: 11, 49: 12, 50: 13, 51: 14, 52: 0, 60: 9, 70: 15, 71: 16, 72: 17, 80: 18, 81: 19, 99: 0,
    252: 1, 253: 7, 254: 6, 255: 8, 256: 5, 257: 5, 258: 4, 259: 5}
NAMES = """car bicycle motorcycle truck other-vehicle person bicyclist motorcyclist road parking
    sidewalk other-ground building fence vegetation trunk terrain pole traffic-sign""".split()
RAW = (10, 40, 48, 50, 70, 72, 252, 0)

# A camera that looks along the LiDAR's x, 10 cm below it and 30 cm ahead; its picture's offset
P2 = "100 0 50 -6  0 100 20 2  0 0 1 0.3"
TR = "0 -1 0 0  0 0 -1 -0.1  1 0 0 -0.3"
CALIB = f"P0: {P2}\nP1: {P2}\nP2: {P2}\nP3: {P2}\nTr: {TR}\n"
DETECTION = f"P2: {P2}\nR0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: {TR}\n"


# ---- a small dataset -----------------------------------------------------------------------------

def some_scan(seed=3, count=400, brightest=0.99):
    """Points in a box of 100 x 80 x 5 m about the sensor, float32 [count, 4]."""
    rng = np.random.default_rng(seed)
    points = rng.uniform((-50, -40, -2, 0), (50, 40, 3, brightest), (count, 4))
    return points.astype(np.float32)


def write_scan(folder, name, points, raw):
    """A scan and its labels, whose upper bits number objects."""
    for kind in ("velodyne", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    points.astype("<f4").tofile(folder / f"velodyne/{name}.bin")
    rng = np.random.default_rng(len(points))
    labels = rng.choice(raw, len(points)) | rng.integers(0, 500, len(points)) << 16
    labels.astype("<u4").tofile(folder / f"labels/{name}.label")


def write(root, sequences=("00", "08"), frames=3, pictures=True):
    """Sequences in root/dataset/sequences, of pictures of 40x100 pixels; returns that folder."""
    home = root / "dataset/sequences"
    for sequence in sequences:
        for number in range(frames):
            name = f"{number:06}"
            write_scan(home / sequence, name, some_scan(number), RAW)
            if pictures:
                (home / sequence / "image_2").mkdir(exist_ok=True)
                Image.new("RGB", (100, 40)).save(home / sequence / f"image_2/{name}.png")
        if pictures:
            (home / sequence / "calib.txt").write_text(CALIB)
    return home


def opened(root, **options):
    """The `FrameTable` of a SemanticKITTI root."""
    return open_one(root, name="semantickitti", **options)


@pytest.fixture
def home(tmp_path):
    """The folder of the sequences 00 and 08, of three frames each."""
    return write(tmp_path)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A root without pictures: 00 and 08."""
    root = tmp_path_factory.mktemp("kitti")
    write(root, pictures=False)
    return root


@pytest.fixture(scope="module")
def real_scans():
    """Root of two real scans, which are not part of the repository."""
    root = SHARED / "real/semantickitti"
    if not root.is_dir():
        pytest.skip("no real SemanticKITTI here")
    return root


# ---- classes and calibration ---------------------------------------------------------------------

def test_every_raw_label_is_a_class_or_an_error(tmp_path):
    assert semantickitti.CLASSES == ("ignore", *NAMES)
    path = tmp_path / "000000.label"
    for raw in (*LEARNING_MAP, 2, 9, 21, 42, 251, 260, 65535):
        np.array([(7 << 16) + raw], "<u4").tofile(path)
        if raw in LEARNING_MAP:
            assert semantickitti.labels(path, 1).tolist() == [LEARNING_MAP[raw]]
        else:
            with pytest.raises(InputError, match=f"{path}: label {raw} is of no class of this"):
                semantickitti.labels(path, 1)
    table = semantickitti.CLASS_TABLE
    assert len(table) == 65536
    assert {raw: int(table[raw]) for raw in np.flatnonzero(table != UNKNOWN)} == LEARNING_MAP


def test_a_point_is_where_the_hand_computes_it(home):
    found = opened(home)
    # (10, -2, 0.5) is (2, -0.6, 9.7) before camera 0; times P2 (200 + 485 - 6, -60 + 194 + 2, 10)
    points = np.array([[10, -2, 0.5], [-10, -2, 0.5], [1.2, 0, 0], [10, 40, 0]])
    visible, pixels, depths = project(points, found["cam_from_lidar"][0, 0],
                                      found["intrinsics"][0, 0], found["image_size"][0, 0])
    assert visible.tolist() == [0, 2]
    assert pixels[0] == pytest.approx([13.6, 67.9]) and depths[0] == pytest.approx(10)
    assert depths[1] == pytest.approx(1.2)


def calibration(folder, text):
    """What the reader makes of a calib.txt of this text."""
    (folder / "00").mkdir(exist_ok=True)
    (folder / "00/calib.txt").write_text(text)
    return semantickitti.calibration(folder, "00")


def test_pixels_are_those_of_the_whole_matrices(tmp_path):
    rng = np.random.default_rng(1)
    # KITTI's own size of numbers: an offset in all three rows
    p2 = np.array([[721.5, 0, 609.6, 44.86], [0, 721.5, 172.9, 0.2164], [0, 0, 1, 0.002746]])
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotation *= np.linalg.det(rotation)
    tr = np.column_stack([rotation, [-0.012, -0.054, -0.292]])
    cam_from_lidar, intrinsics = calibration(tmp_path, "".join(
        f"{name}: {' '.join(map(repr, matrix.ravel().tolist()))}\n"
        for name, matrix in (("P2", p2), ("Tr", tr))))
    points = np.column_stack([rng.uniform(-60, 60, (100, 3)), np.ones(100)])
    expected = p2 @ np.vstack([tr, [0, 0, 0, 1]]) @ points.T
    assert intrinsics @ (cam_from_lidar @ points.T)[:3] == pytest.approx(expected, abs=1e-9)


BAD_CALIBRATIONS = {
    "": r"no line P2: with 12 numbers \(there is nothing\); extract data_odometry_calib.zip",
    f"P0: {P2}\nTr: {TR}": r"no line P2: with 12 numbers \(there is P0, Tr\)",
    f"P2: {P2}\nTr:\n": r"no line Tr: with 12 numbers \(there is P2, Tr\)",
    f"P2: {P2}\nTr: {TR} 1": "no line Tr: with 12 numbers",
    f"P2: {P2}\nTr: {TR[:-4]} west": "no line Tr: with 12 numbers",
    f"P2: {P2[:-3]} nan\nTr: {TR}": "no line P2: with 12 numbers",
    f"P2: {P2}\nTr: {P2}": "Tr does not begin with a rotation; extract it again",
    f"P2: {P2}\nTr: -1 0 0 0  0 1 0 0  0 0 1 0": "Tr does not begin with a rotation",
    f"P2: {'0 ' * 12}\nTr: {TR}": "P2 is no camera's",
    DETECTION: r"of KITTI detection \(Tr_velo_to_cam, R0_rect\); extract data_odometry_calib.zip"}


@pytest.mark.parametrize("text", BAD_CALIBRATIONS)
def test_bad_calibrations_are_named(tmp_path, text):
    with pytest.raises(InputError, match=f"00/calib.txt: {BAD_CALIBRATIONS[text]}") as error:
        calibration(tmp_path, text)
    assert "\n" not in str(error.value)


# ---- folders -------------------------------------------------------------------------------------

def test_the_root_may_be_given_at_three_levels(home):
    tables = [opened(root) for root in (home, home.parent, home.parent.parent)]
    assert {table.root for table in tables} == {str(home)}
    assert tables[0]["scan"].tolist() == [
        f"{sequence}/velodyne/{number:06}.bin".encode()
        for sequence in ("00", "08") for number in range(3)]
    assert tables[0]["labels"][4] == b"08/labels/000001.label"
    assert tables[0]["image"][4, 0] == b"08/image_2/000001.png"
    prints = {str(table.fingerprint(labels=True)) for table in tables}
    assert len(prints) == 1


def test_a_root_without_sequences_says_where_they_were_looked_for(tmp_path, home):
    with pytest.raises(InputError, match=f"no folder 00/velodyne, .* in {tmp_path}/x/dataset/"
                                         f"sequences, {tmp_path}/x/sequences, {tmp_path}/x; give"):
        (tmp_path / "x").mkdir()
        opened(tmp_path / "x")
    with pytest.raises(InputError, match="a single sequence: give the folder that it is in"):
        opened(home / "00")
    for path in home.glob("*/velodyne/*"):
        path.rename(path.with_name(f".{path.name}"))  # as archives of a Mac have them
    with pytest.raises(InputError, match="no .bin in the folders velodyne of the sequences 00 to"):
        opened(home)


@pytest.mark.parametrize("levels", (0, 1))
def test_kitti_detection_is_recognised(tmp_path, levels):
    folder = tmp_path / "training"
    for kind in ("velodyne", "label_2", "calib", "image_2"):
        (folder / kind).mkdir(parents=True)
    (folder / "calib/000000.txt").write_text(DETECTION)
    with pytest.raises(InputError, match="this is KITTI detection, which labels boxes and has no "
                                         "sequences: extract data_odometry_velodyne.zip"):
        opened([folder, tmp_path][levels])


def test_real_kitti_detection_is_recognised(tmp_path):
    root = SHARED / "real/kitti_object"
    if not root.is_dir():
        pytest.skip("no real KITTI detection here")
    for folder in (root, root / "training"):
        with pytest.raises(InputError, match="this is KITTI detection"):
            opened(folder)
    with pytest.raises(InputError, match="of KITTI detection"):
        calibration(tmp_path, (root / "training/calib/000002.txt").read_text())


def test_calibrations_may_stand_in_a_tree_of_their_own(home):
    expected = opened(home)["cam_from_lidar"]
    apart = home.parent.parent / "calib/dataset/sequences/08"
    apart.mkdir(parents=True)
    (home / "08/calib.txt").rename(apart / "calib.txt")
    found = opened(home.parent.parent)
    assert np.array_equal(found["cam_from_lidar"], expected)
    assert apart / "calib.txt" in semantickitti.sources(home)

    # The one beside the scans comes first; a changed one is read again
    (home / "08/calib.txt").write_text(CALIB.replace("-0.3\n", "-0.4\n"))
    assert opened(home)["cam_from_lidar"][3, 0, 2, 3] == pytest.approx(-0.1)
    assert opened(home)["cam_from_lidar"][0, 0, 2, 3] == pytest.approx(0)
    (home / "08/calib.txt").unlink()
    (apart / "calib.txt").unlink()
    with pytest.raises(InputError, match=f"no calibration of sequence 08: looked for {home}/08/"
                                         f"calib.txt and {apart}/calib.txt; extract data_odometry"):
        opened(home)


@pytest.mark.slow
def test_the_folder_of_the_sequences_may_be_a_link(home, tmp_path, monkeypatch):
    """Then it is indexed by another process as by this one, and ROOT/calib is found."""
    root = tmp_path / "linked"
    for sequence in ("00", "08"):
        apart = root / "calib/dataset/sequences" / sequence
        apart.mkdir(parents=True)
        (home / sequence / "calib.txt").rename(apart / "calib.txt")
    (root / "dataset").symlink_to(home.parent)
    for here in (False, True):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache {here}"))
        found = opened(root, here=here)
        assert found.root == str(root / "dataset/sequences") and len(found) == 6


def test_the_word_velodyne_in_the_root_is_no_harm(tmp_path):
    root = tmp_path / "velodyne" / "image_2"
    write(root)
    found = opened(root)
    assert found.labels(0, 400).shape == (400,)
    assert len(Frames([found], "image_2", (20, 50), target="labels")[0, 0]["labels"])


def test_splits_and_shares_are_the_papers(tmp_path):
    numbers = [f"{number:02}" for number in range(22)]
    home = write(tmp_path, (*numbers, "22"), frames=1, pictures=False)
    for number in range(11, 22):
        shutil.rmtree(home / f"{number}/labels")
    found = opened(tmp_path)
    scenes = {split: found.select(split).scenes() for split in ("train", "val", "test")}
    assert scenes["train"] == [*numbers[:8], "09", "10"]
    assert scenes["val"] == ["08"]
    assert scenes["test"] == numbers[11:]
    labels = found["labels"].tolist()
    assert [b"" == path for path in labels] == [False] * 11 + [True] * 11
    chosen = found.select("train", percent=50)  # each second frame from the first on, not scene
    assert found["scan"][chosen.rows].tolist() == [
        f"{scene}/velodyne/000000.bin".encode() for scene in ("00", "02", "04", "06", "09")]
    with pytest.raises(InputError, match="11 of 11 frames have no labels"):
        Frames([found.select("test")], "scan", None, target="labels")


# ---- pictures ------------------------------------------------------------------------------------

def test_sizes_are_those_of_the_headers(home):
    Image.new("RGB", (122, 37)).save(home / "08/image_2/000001.png")
    sizes = opened(home)["image_size"]
    assert sizes[:, 0].tolist() == [[40, 100]] * 4 + [[37, 122], [40, 100]]
    picture = home / "00/image_2/000000.png"
    picture.unlink()
    picture.symlink_to(picture)  # what the system refuses is no fault of the picture
    with pytest.raises(InputError, match=f"{picture}: Too many levels of symbolic links; the sys"):
        opened(home)


def test_what_a_camera_sees_has_the_labels_of_the_scan(home):
    (table,) = select([opened(home)], "train")
    item = Frames([table], "image_2", (20, 50), prepare, target="labels", points="first")[0, 1]
    points = np.fromfile(home / "00/velodyne/000001.bin", "<f4").reshape(-1, 4).astype(float)
    raw = np.fromfile(home / "00/labels/000001.label", "<u4") % 2**16
    expected = []
    for (x, y, z, _), label in zip(points, raw):
        depth = x  # P2 and TR by hand: -0.3 m of TR and 0.3 m of P2
        row, col = (-100 * z - 10 + 20 * (x - 0.3) + 2) / depth, (-100 * y + 50 * x - 21) / depth
        if depth > 1 and 0 < row < 39 and 0 < col < 99:
            expected.append((row / 2, col / 2, LEARNING_MAP[label]))
    found = np.column_stack([item["pixels"], item["labels"]])
    assert 5 < len(expected)
    assert found[found[:, 0].argsort()] == pytest.approx(np.array(sorted(expected)), abs=1e-4)
    assert item["image"].shape == (3, 20, 50)


def test_without_pictures_it_is_for_scans_alone(without, home, capsys):
    main("semantickitti", ["--data", str(without)])
    printed = capsys.readouterr().out
    assert "no image_2 in any sequence: for --task seg3d and evaluation, not for the sta" in printed
    assert "19130" in printed
    found = opened(without)
    assert "image" not in found and "intrinsics" not in found
    frames = Frames([found], "scan", None, prepare, target="labels", points="every")
    batch = collate([frames[0, number] for number in range(2)])
    assert len(batch["labels"]) == len(batch["nearest"]) == 800

    # Some pictures are not none
    (home / "00/image_2/000001.png").unlink()
    message = "1 of 6 scans have no picture, the first is 00/image_2/000001.png; extract data_odom"
    with pytest.raises(InputError, match=message):
        opened(home)
    shutil.rmtree(home / "08/image_2")
    with pytest.raises(InputError, match="4 of 6 scans have no picture, the first is 00/image_2/"):
        opened(home)


# ---- real scans, and a probe ---------------------------------------------------------------------

def test_real_scans(real_scans):
    found = opened(real_scans)
    assert found["scan"].tolist() == [b"00/velodyne/000000.bin", b"00/velodyne/000001.bin"]
    assert len(found.select("train")) == 2
    for frame, count in enumerate((124668, 124605)):
        scan = semantickitti.scan(found.path("scan", frame))
        assert scan.shape == (count, 4) and 0 <= scan[:, 3].min() and scan[:, 3].max() <= 1
        near = np.linalg.norm(scan[:, :2], axis=1) < 20
        # By another route: the raw labels' lower bytes, counted, then added up by the table
        raw = np.fromfile(found.path("labels", frame), "<u2").reshape(-1, 2)[:, 0]
        expected = np.zeros(20, int)
        for fine, times in zip(*np.unique(raw, return_counts=True)):
            expected[LEARNING_MAP[fine]] += times
        classes = found.labels(frame, count)
        assert np.bincount(classes, minlength=20).tolist() == expected.tolist()
        assert classes[0] == LEARNING_MAP[raw[0]]
        road = scan[near & (classes == semantickitti.CLASSES.index("road")), 2]
        assert -2 < np.median(road) < -1.6  # 1.73 m below the sensor
    frames = Frames(select([found], "train"), "scan", None, prepare, "labels", points="every")
    assert len(frames[0, 0]["labels"]) == 124668


@pytest.mark.slow
def test_probe_and_table(without, first, tmp_path, capsys):
    out = tmp_path / "probe"
    probe.main([*probe_args(f"semantickitti={without}", "seg3d", first, out), "--steps", "2"])
    assert "for --task seg3d and evaluation" in capsys.readouterr().out
    result = evaluation.evaluate(out, torch.device("cpu"), workers=0)
    assert set(result["mIoU"]) == {"full"}
    assert set(result["IoU"]["full"]) <= set(NAMES)
    line = fails_with_one_line(capsys, probe.main, [
        *probe_args(f"semantickitti={without}", "seg", first, tmp_path / "seg"), "--steps", "2"])
    assert re.search("semantickitti|picture|image", line)


def test_open_tables_takes_the_name(without):
    (table,) = open_tables(f"semantickitti={without}", here=True)
    assert table.name == "semantickitti" and table.sampling["intensity"][0] == 0.28613698

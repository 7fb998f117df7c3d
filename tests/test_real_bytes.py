"""The readers on real files, against a second route to each number: pandas, the bytes themselves,
the boxes of KITTI's annotators, what else is known. None of the files is in the repository."""
import json
import os

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image
from runs import open_one
from test_pandaset import ID_OF, READERS, from_the_world, integers_in

from data import Frames, project, select
from plumbing.errors import InputError
from readers import semantickitti
from readers.pickles import POINTS, read_frame
from readers.table import hold_out


def real(name):
    """The folder of a dataset's real files."""
    root = SHARED / "real" / name
    if not root.is_dir():
        pytest.skip(f"no real {name} here")
    return root


@pytest.fixture(scope="module")
def pandaset():
    """Root of two scenes of 18 and 7 frames."""
    return real("pandaset")


# ---- PandaSet ------------------------------------------------------------------------------------

def test_the_frames_of_pandaset(pandaset):
    for name in READERS:
        table = open_one(pandaset, name=name)
        assert [np.count_nonzero(table["scene"] == scene) for scene in (b"002", b"902")] == [18, 7]
        assert (table["image_size"] == (1080, 1920)).all() and not (table["bad"] != b"").any()
        # Scripts' defaults of --conditions leave out none, and a mistyped one is no default
        assert len(select([table], "train", ["day-clear"])[0]) == 25
        with pytest.raises(InputError, match="--conditions nigth: --data .*pandaset states no c"):
            select([table], "train", ["nigth"])


def test_splits_and_scenes_that_cannot_be(pandaset, tmp_path):
    (table,) = hold_out([open_one(pandaset, name="pandaset64")], ["902"])
    assert len(table.select("train")) == 18 and len(table.select("val")) == 7
    with pytest.raises(InputError, match="--val-scenes: no scene of pandaset64 is left to train on;"
                                         " name fewer of 002, 902"):
        hold_out([open_one(pandaset, name="pandaset64")], ["902", "002"])

    # A scene of which a camera is missing
    (tmp_path / "002").symlink_to(pandaset / "002")
    (tmp_path / "902/camera").mkdir(parents=True)
    for part in ("lidar", "annotations", "meta", "camera/front_camera", "camera/back_camera"):
        (tmp_path / "902" / part).symlink_to(pandaset / "902" / part)
    with pytest.raises(InputError, match="scene 902 has no folder camera/front_left_camera; down"):
        open_one(tmp_path, name="pandaset64")
    table = open_one(tmp_path, name="pandasetgt")
    assert len(table) == 25
    with pytest.raises(InputError, match="--cameras back_camera: choose one of random, all, scan, "
                                         "front_camera; pandasetgt has no other"):
        Frames([table], "back_camera")


def by_pandas(scan, labels):
    """World points [N, 3], sensors [N] and raw classes [N] of a frame's two files."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_pickle(scan)
    found = read_frame(scan, POINTS)
    assert all((found[name] == frame[name].to_numpy()).all() for name in POINTS)
    world = frame[["x", "y", "z"]].to_numpy()
    return world, frame["d"].to_numpy(), pandas.read_pickle(labels)["class"].to_numpy()


def by_bytes(scan, labels):
    """The same, by the whole numbers that stand in the bytes."""
    found = read_frame(scan, POINTS)
    world = np.column_stack([found[axis] for axis in "xyz"])
    return world, integers_in(scan), integers_in(labels)


@pytest.mark.slow
@pytest.mark.parametrize("route", (by_pandas, by_bytes))
def test_all_frames_of_pandaset(pandaset, route):
    """Counts, classes and what each camera sees; and the numbers of README and FACTS_REAL there."""
    tables = {name: open_one(pandaset, name=name) for name in READERS}
    names = json.loads((pandaset / "002/annotations/semseg/classes.json").read_text())
    reflection = int({name: raw for raw, name in names.items()}["Reflection"])
    counts, reflections, seen = [], 0, {}
    for frame in range(25):
        first = tables["pandaset64"]
        paths = [pandaset / first[column][frame].decode() for column in ("scan", "labels")]
        world, sensors, raw = route(*paths)
        counts.append(np.bincount(sensors))
        reflections += np.count_nonzero((raw == reflection) & (sensors == 0) & (frame < 18))
        for sensor, table in enumerate(tables.values()):
            scan = table.reader.scan(table.path("scan", frame))
            own = raw[sensors == sensor]
            expected = np.zeros(18, int)
            for label, count in zip(*np.unique(own, return_counts=True)):
                expected[ID_OF[label]] += count
            assert len(scan) == len(own)
            labels = table.labels(frame, len(scan))
            assert np.bincount(labels, minlength=18).tolist() == expected.tolist()
            for camera, name in enumerate(table.cameras):
                size = table["image_size"][frame, camera]
                rows, *_ = project(scan[:, :3], table["cam_from_lidar"][frame, camera],
                                   table["intrinsics"][frame, camera], size)
                at = from_the_world(pandaset, table, frame, camera, world[sensors == sensor])
                inside = (at[2] > 1) & (at[:2] > 0).all(0) & (at[:2].T < size[::-1] - 1).all(1)
                assert rows.tolist() == np.flatnonzero(inside).tolist()
                seen.setdefault((sensor, name), []).append(len(rows))
    # 165 000 points a frame, 106 000 of Pandar64
    assert np.sum(counts, 1).mean() == pytest.approx(165_000, rel=0.02)
    assert np.mean(counts, 0)[0] == pytest.approx(106_000, rel=0.01)
    assert reflections == 12_465
    assert np.mean(seen.pop((0, "front_camera"))) == pytest.approx(14_000, rel=0.01)
    assert np.mean(seen.pop((1, "front_camera"))) == pytest.approx(54_000, rel=0.01)
    assert all(22_000 < count < 27_500 for of_camera in seen.values() for count in of_camera)


def test_a_truncated_frame_is_cut_short_and_not_forged(pandaset, tmp_path):
    """Wherever the cut is: the last four bytes are any number then."""
    whole = (pandaset / "002/lidar/00.pkl.gz").read_bytes()
    for length in (20, 1000, 500_000, 1_000_000, len(whole) - 1):
        path = tmp_path / "00.pkl.gz"
        path.write_bytes(whole[:length])
        with pytest.raises(InputError) as error:
            read_frame(path, POINTS)
        assert str(error.value) == (f"{path}: cut short, the gzip data have no end; download it "
                                    "again")


# ---- KITTI detection -----------------------------------------------------------------------------

def rows_of(path):
    """{name: numbers} of a calibration."""
    lines = [line.split(":") for line in path.read_text().splitlines() if ":" in line]
    return {name: np.array(numbers.split(), float) for name, numbers in lines}


def test_points_of_kittis_boxes_are_in_its_rectangles(tmp_path):
    """A detection frame, laid out as SemanticKITTI: 3D boxes and rectangles are the annotators'."""
    training = real("kitti_object") / "training"
    calib = rows_of(training / "calib/000002.txt")
    turned = calib["R0_rect"].reshape(3, 3) @ calib["Tr_velo_to_cam"].reshape(3, 4)
    sequence = tmp_path / "00"
    for kind, ending in (("velodyne", "bin"), ("image_2", "png")):
        (sequence / kind).mkdir(parents=True)
        (sequence / kind / f"000000.{ending}").symlink_to(training / kind / f"000002.{ending}")
    with (sequence / "calib.txt").open("w") as file:
        for name, matrix in (("P2", calib["P2"]), ("Tr", turned)):
            print(f"{name}:", *matrix.ravel().tolist(), file=file)
    table = open_one(tmp_path, name="semantickitti")
    assert table["image_size"].tolist() == [[[375, 1242]]] and not table["bad"][0]
    scan = table.reader.scan(table.path("scan", 0))
    rows, pixels, _ = project(scan[:, :3], table["cam_from_lidar"][0, 0],
                              table["intrinsics"][0, 0], (375, 1242))
    assert 0.1 < len(rows) / len(scan) < 0.2  # 82 of 360 degrees, and what is below the picture

    for line, least in zip((training / "label_2/000002.txt").read_text().splitlines(), (1000, 50)):
        left, top, right, bottom, high, wide, long, *place, turn = map(float, line.split()[4:])
        at = scan[rows, :3].astype(float) @ turned[:, :3].T + turned[:, 3] - place
        ahead = at[:, 0] * np.cos(turn) - at[:, 2] * np.sin(turn)
        beside = at[:, 0] * np.sin(turn) + at[:, 2] * np.cos(turn)
        inside = (abs(ahead) < long / 2) & (abs(beside) < wide / 2)
        inside &= (at[:, 1] < -0.1) & (at[:, 1] > -high)  # y is down, and the road is at 0
        assert inside.sum() > least
        found = pixels[inside]
        assert (found > (top - 2, left - 2)).all() and (found < (bottom + 2, right + 2)).all()


# ---- SemanticKITTI -------------------------------------------------------------------------------

def test_a_real_scan_that_is_cut_is_named(tmp_path):
    """The labels tell it where whole points are left."""
    source = real("semantickitti") / "dataset/sequences/00"
    for length, words in ((124_668 * 16 - 7, "are not whole points of 4 floats"),
                          (124_605 * 16, "498672 bytes are not 4 for each of 124605 points")):
        home = tmp_path / str(length) / "00"
        (home / "velodyne").mkdir(parents=True)
        (home / "labels").symlink_to(source / "labels")
        os.symlink(source / "velodyne/000001.bin", home / "velodyne/000001.bin")
        content = (source / "velodyne/000000.bin").read_bytes()
        (home / "velodyne/000000.bin").write_bytes(content[:length])
        bad = open_one(home.parent, name="semantickitti")["bad"].tolist()
        assert words in bad[0].decode() and bad[1] == b""
    assert semantickitti.scan(source / "velodyne/000000.bin").shape == (124_668, 4)


# ---- pictures ------------------------------------------------------------------------------------

def test_real_pictures_by_day_and_night():
    table = open_one(real("pictures"), name="pictures")
    assert not (table["bad"] != b"").any() and (table["image_size"] == (900, 1600)).all()
    light = {}
    for condition, count in (("day", 20), ("night", 16)):
        frames = Frames(select([table], "train", [condition]), image_size=(90, 160))
        images = [frames[0, number]["image"] for number in range(len(frames))]
        assert len(images) == count
        luminance = [np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"))
                     for image in images]
        light[condition] = np.mean(luminance)
    assert light["night"] == pytest.approx(33, abs=2) and light["day"] > 90


def test_any_folder_is_one_of_pictures():
    """All the real data at once: all is read but a map of instances, of 16 bits."""
    root = real("")
    if not (root / "cityscapes").is_dir():
        pytest.skip("no real cityscapes here")
    table = open_one(root, name="pictures")
    assert {"cityscapes", "nuscenes", "pandaset", "pictures"} <= set(table.conditions)
    (reason,) = [reason.decode() for reason in table["bad"] if reason]
    assert "instanceIds.png: an image of mode I;16, not 8-bit RGB" in reason

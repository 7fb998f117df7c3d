"""PandaSet: ScaLR's own reader on four views of real frames, the class table from ScaLR's ids, a
small dataset whose points are known in the vehicle's frame, and the real frames."""
import gzip
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import SHARED
from pandasets import SIZES, write_dataset, write_json, write_scene
from scipy.spatial.transform import Rotation

from data import Frames, collate, project, set_sampling
from miniature.pandaset_files import write_frame
from plumbing.errors import InputError
from readers import pandaset, pandaset64, pandasetgt
from readers.pandaset import CAMERAS, CLASSES
from readers.table import datasets, main
from runs import open_one
from waffleiron import prepare

READERS = {"pandaset64": pandaset64, "pandasetgt": pandasetgt}
# Raw label: ScaLR's id, a second time
ID_OF = {
    0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 5, 6: 16, 7: 1, 8: 6, 9: 6, 10: 6, 11: 7, 12: 17, 13: 10,
    14: 12, 15: 12, 16: 12, 17: 15, 18: 11, 19: 15, 20: 15, 21: 15, 22: 0, 23: 13, 24: 0, 25: 0,
    26: 14, 27: 15, 28: 15, 29: 15, 30: 4, 31: 4, 32: 0, 33: 0, 34: 9, 35: 3, 36: 2, 37: 9, 38: 2,
    39: 3, 40: 0, 41: 8, 42: 8}
NAMES = """ignore road traffic_sign barrier pedestrian vegetation road_marking sidewalk manmade
    traffic_cone car motorcycle truck bus bicycle other_vehicle ground driveway""".split()


# ---- a small dataset -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Root of a dataset and {scene: what `write_scene` gave}."""
    root = tmp_path_factory.mktemp("pandaset") / "data"
    return root, write_dataset(root)


@pytest.fixture
def root(made, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(made[0], tmp_path / "data")


@pytest.fixture(scope="session")
def frames():
    """Root of the real frames."""
    if not (SHARED / "real/pandaset").is_dir():
        pytest.skip("no real frames here")
    return SHARED / "real/pandaset"


# ---- classes -------------------------------------------------------------------------------------

def test_both_are_datasets_and_what_they_share_is_none():
    assert {"pandaset64", "pandasetgt"} <= set(datasets())
    assert not {"pandaset", "pandaset_poses", "pickles"} & set(datasets())
    assert list(pandaset64.CLASSES) == list(pandasetgt.CLASSES) == NAMES


def test_every_raw_label_has_its_class_or_is_refused(root):
    path = root / "003/annotations/semseg/00.pkl.gz"
    for raw in range(256):
        write_frame(path, {"class": np.full(300, raw)})
        if raw in ID_OF:
            assert set(pandaset64.labels(path).tolist()) == {ID_OF[raw]}
        else:
            with pytest.raises(InputError, match=f"{path}: class {raw} is of no table of Panda"):
                pandasetgt.labels(path)


@pytest.mark.parametrize("raw", [-1, 256 + 7, 1 << 40])
def test_labels_beyond_a_byte_are_no_others(root, raw):
    path = root / "003/annotations/semseg/00.pkl.gz"
    write_frame(path, {"class": np.full(300, raw)})
    with pytest.raises(InputError, match=f"class {raw} is of no table"):
        pandaset64.labels(path)


def test_sampling_is_that_of_the_releases():
    for reader, fov, mean, std in ((pandaset64, 128, 18.23640649, 25.86983417),
                                   (pandasetgt, 96, 23.06113565, 16.76273235)):
        sampling = reader.SAMPLING
        assert sampling["fov"] == (64, 64, 8) and sampling["cell"] == 0.5
        assert sampling["voxel"] == 0.1 and sampling["max_points"] == 20000
        assert sampling["neighbors"] == 16 and sampling["intensity"] == (mean, std)
        assert sampling["probe"]["fov"] == (128, 128, 8)
        assert sampling["finetune"]["fov"] == (fov, fov, 8)
        assert reader.PAPER_FRAMES == {"train": 49 * 80}


# ---- points, labels, projection ------------------------------------------------------------------

@pytest.mark.parametrize("sensor, name", enumerate(READERS))
def test_points_and_labels_are_the_sensors_own(made, sensor, name):
    root, scenes = made
    for scene in ("003", "017"):
        for frame, (points, of_sensor, raw) in scenes[scene].items():
            rows = of_sensor == sensor
            scan = READERS[name].scan(f"{root}/{scene}/lidar/{frame}.pkl.gz")
            assert scan.dtype == np.float64
            np.testing.assert_allclose(scan, points[rows] - [0, 0, 1.6, 0], atol=1e-9)
            labels = READERS[name].labels(f"{root}/{scene}/annotations/semseg/{frame}.pkl.gz",
                                          len(scan))
            assert labels.dtype == np.uint8
            assert labels.tolist() == [ID_OF[label] for label in raw[rows]]


def test_the_root_may_contain_the_word_lidar(made, tmp_path):
    """Paths are made of parts, not by replacing words."""
    root = shutil.copytree(made[0], tmp_path / "lidar/annotations/semseg")
    table = open_one(root, name="pandasetgt")
    assert len(table.labels(0, len(table.reader.scan(table.path("scan", 0))))) > 0


def test_the_table_is_what_the_files_say(made):
    root, scenes = made
    for name, reader in READERS.items():
        table = open_one(root, name=name)
        assert table["scan"].tolist() == [
            b"003/lidar/00.pkl.gz", b"003/lidar/02.pkl.gz", b"017/lidar/01.pkl.gz",
            b"017/lidar/05.pkl.gz", b"017/lidar/06.pkl.gz"]
        assert table["labels"][2] == b"017/annotations/semseg/01.pkl.gz"
        assert table["split"].tolist() == [b"train"] * 2 + [b"val"] * 3
        assert table["scene"].tolist() == [b"003"] * 2 + [b"017"] * 3
        assert table["bad"].tolist() == [b""] * 5
        cameras = CAMERAS if name == "pandaset64" else CAMERAS[:1]
        assert table.cameras == list(cameras)
        assert table["image"][3].tolist() == [f"017/camera/{camera}/05.jpg".encode()
                                              for camera in cameras]
        assert table["image_size"].tolist() == [list(map(list, SIZES[:len(cameras)]))] * 5
        assert table["intrinsics"][4, 0].tolist() == [[100.5, 0, 50], [0, 101, 40.25], [0, 0, 1]]
        assert "train: 2 frames, 3920 in the papers" in table.summary()
        assert table.share == "scenes"


def matrix_of(record):
    """A pose by SciPy, whose quaternions end in w."""
    turn, place = record["heading"], record["position"]
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_quat([turn[part] for part in "xyzw"]).as_matrix()
    matrix[:3, 3] = [place[axis] for axis in "xyz"]
    return matrix


def from_the_world(root, table, frame, camera, world):
    """(col, row, depth) [3, N] of world points in a camera, without the vehicle's frame."""
    number = int(table["image"][frame, camera].decode()[-6:-4])
    folder = (root / table["image"][frame, camera].decode()).parent
    pose = matrix_of(json.loads((folder / "poses.json").read_text())[number])
    at = np.linalg.inv(pose)[:3] @ np.vstack([world.T, np.ones(len(world))])
    lens = json.loads((folder / "intrinsics.json").read_text())
    return np.array([lens["fx"] * at[0] / at[2] + lens["cx"],
                     lens["fy"] * at[1] / at[2] + lens["cy"], at[2]])


def both_projections(root, table, frame, sensor, world):
    """The largest difference in pixels and metres, over a frame's cameras, and points compared."""
    scan = table.reader.scan(table.path("scan", frame))
    worst, count = 0, 0
    for camera in range(len(table.cameras)):
        size = table["image_size"][frame, camera]
        rows, pixels, depths = project(scan[:, :3], table["cam_from_lidar"][frame, camera],
                                       table["intrinsics"][frame, camera], size)
        col, row, depth = from_the_world(root, table, frame, camera, world)
        with np.errstate(invalid="ignore"):
            seen = ((depth > 1) & (row > 0) & (row < size[0] - 1)
                    & (col > 0) & (col < size[1] - 1))
        assert rows.tolist() == np.flatnonzero(seen).tolist()
        there = np.stack([pixels[:, 1], pixels[:, 0], depths])
        worst = max(worst, abs(there - np.stack([col, row, depth])[:, rows]).max(initial=0))
        count += len(rows)
    return worst, count


@pytest.mark.parametrize("sensor, name", enumerate(READERS))
def test_projection_from_the_vehicle_is_projection_from_the_world(frames, sensor, name):
    table = open_one(frames, name=name)
    for frame in (0, 11, 20):
        columns = pandaset.read_frame(table.path("scan", frame), pandaset.POINTS)
        rows = columns["d"] == sensor
        world = np.column_stack([columns[axis][rows] for axis in "xyz"])
        worst, count = both_projections(frames, table, frame, sensor, world)
        assert worst < 1e-9 and count > 40_000


def test_projection_of_made_points(tmp_path):
    """Cameras that stand about the vehicle, so that they see something; no real frame is needed."""
    write_scene(tmp_path, "001", 38.0, ("00",))
    lidar = json.loads((tmp_path / "001/lidar/poses.json").read_text())
    for camera in CAMERAS:
        path = tmp_path / f"001/camera/{camera}/poses.json"
        poses = json.loads(path.read_text())
        poses[0]["position"] = {axis: value + 0.5 for axis, value in lidar[0]["position"].items()}
        write_json(path, poses)
    table = open_one(tmp_path, name="pandaset64")
    columns = pandaset.read_frame(table.path("scan", 0), pandaset.POINTS)
    rows = columns["d"] == 0
    world = np.column_stack([columns[axis][rows] for axis in "xyz"])
    worst, count = both_projections(tmp_path, table, 0, 0, world)
    assert worst < 1e-9 and count > 20


def test_a_frame_is_an_item(frames):
    """One camera's points, and a whole scan with labels, as every script reads them."""
    table = open_one(frames, name="pandasetgt")
    set_sampling([table], task="probe")
    assert table.sampling["fov"] == (128, 128, 8)
    item = Frames([table], "random", (56, 98), prepare)[0, 0]
    assert item["image"].shape == (3, 56, 98) and len(item["pixels"]) > 5000
    item = Frames([table], "scan", None, prepare, "labels", points="every")[0, 3]
    assert set(item["labels"].tolist()) <= set(range(18))
    assert len(item["nearest"]) == len(item["labels"]) > 50_000
    assert collate([item])["labels"].dtype == torch.int64


# ---- golden --------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", range(4))
def test_four_views_are_those_of_scalr(frames, number):
    """Counts, classes, pixels, depths and vehicle coordinates as ScaLR's public reader has them."""
    path = SHARED / "golden/scalr_pandaset.pt"
    if not path.exists():
        pytest.skip("no golden files here")
    golden = torch.load(path, weights_only=True)[number]
    reader = {"pandar64": pandaset64, "pandargt": pandasetgt}[golden["sensor"]]
    table = open_one(frames, name=reader.__name__[8:])
    scan_path = f"{golden['scene']}/lidar/{golden['frame']:02}.pkl.gz"
    frame = table["scan"].tolist().index(scan_path.encode())
    camera = table.cameras.index(golden["camera"])
    scan = reader.scan(table.path("scan", frame))
    labels = table.labels(frame, len(scan))
    assert len(scan) == golden["points_of_sensor"]
    assert np.bincount(labels, minlength=18).tolist() == golden["class_counts"].tolist()

    seen, pixels, depths = project(
        scan[:, :3], table["cam_from_lidar"][frame, camera], table["intrinsics"][frame, camera],
        table["image_size"][frame, camera], min_depth=0, margin=0)
    assert len(seen) == golden["points_in_view"]
    counts = np.bincount(labels[seen], minlength=18)
    assert counts.tolist() == golden["class_counts_in_view"].tolist()
    sample = golden["sample"].numpy()
    at = np.searchsorted(seen, sample)
    assert seen[at].tolist() == sample.tolist()
    np.testing.assert_allclose(pixels[at], golden["row_col"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(depths[at], golden["depth"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(scan[sample, :3], golden["vehicle_xyz"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(scan[sample, 3], golden["intensity"])


# ---- real frames by a second route ---------------------------------------------------------------

def integers_in(path):
    """The numbers of a frame's whole-number column, found in its bytes without following them."""
    content = gzip.decompress(path.read_bytes())
    stop = re.search(rb"stopq.J(....)", content, re.S).group(1)
    size = 8 * int.from_bytes(stop, "little")
    (begin,) = [found.end() for found in
                re.finditer(rb"B" + re.escape(size.to_bytes(4, "little")), content)]
    return np.frombuffer(content[begin:begin + size], "<i8")


def test_counts_of_real_points_and_classes_by_a_second_route(frames):
    tables = {name: open_one(frames, name=name) for name in READERS}
    assert [len(table) for table in tables.values()] == [25, 25]
    assert set(tables["pandaset64"]["split"]) == {b"train"}  # San Francisco
    for frame in (0, 17, 24):
        path = frames / tables["pandaset64"]["scan"][frame].decode()
        sensors = integers_in(path)
        raw = integers_in(path.parents[1] / "annotations/semseg" / path.name)
        for sensor, table in enumerate(tables.values()):
            scan = table.reader.scan(path)
            assert len(scan) == np.count_nonzero(sensors == sensor)
            ids = [ID_OF[label] for label in raw[sensors == sensor].tolist()]
            np.testing.assert_array_equal(table.labels(frame, len(scan)), ids)


def test_names_of_the_real_raw_labels_are_those_of_the_table(frames):
    """classes.json of the real scene against the classes that the names mean."""
    words = {"Car": "car", "Road": "road", "Lane Line Marking": "road_marking", "Bus": "bus",
             "Stop Line Marking": "road_marking", "Other Road Marking": "road_marking",
             "Driveway": "driveway", "Sidewalk": "sidewalk", "Pickup Truck": "truck",
             "Medium-sized Truck": "truck", "Semi-truck": "truck", "Pedestrian": "pedestrian",
             "Motorcycle": "motorcycle", "Bicycle": "bicycle", "Building": "manmade",
             "Vegetation": "vegetation", "Ground": "ground", "Cones": "traffic_cone",
             "Signs": "traffic_sign", "Road Barriers": "barrier", "Smoke": "ignore",
             "Construction Signs": "traffic_sign", "Pylons": "traffic_cone"}
    names = json.loads((frames / "002/annotations/semseg/classes.json").read_text())
    assert set(map(int, names)) <= set(ID_OF)
    raw_of = {name: int(raw) for raw, name in names.items()}
    for name, expected in words.items():
        assert CLASSES[pandaset.CLASS_TABLE[raw_of[name]]] == expected, name


def test_points_of_real_cars_are_inside_of_their_cuboids(frames):
    """And the road is about as far below the origin as below a LiDAR on a roof."""
    pandas = pytest.importorskip("pandas")
    for scene, frame in (("002", "00"), ("902", "03")):
        scan_path = frames / f"{scene}/lidar/{frame}.pkl.gz"
        path = frames / f"{scene}/annotations/semseg/{frame}.pkl.gz"
        boxes = pandas.read_pickle(frames / f"{scene}/annotations/cuboids/{frame}.pkl.gz")
        pose = matrix_of(json.loads((scan_path.parent / "poses.json").read_text())[int(frame)])
        for reader in READERS.values():
            scan, labels = reader.scan(scan_path), reader.labels(path)
            vehicle = scan[:, :3] + [0, 0, 1.6]
            world = vehicle @ pose[:3, :3].T + pose[:3, 3]
            inside = np.zeros(len(world), bool)
            for _, box in boxes[boxes.label == "Car"].iterrows():
                at = world - [box[f"position.{axis}"] for axis in "xyz"]
                cos, sin = np.cos(box.yaw), np.sin(box.yaw)
                at = np.column_stack([at[:, 0] * cos + at[:, 1] * sin,
                                      at[:, 1] * cos - at[:, 0] * sin, at[:, 2]])
                half = np.array([box[f"dimensions.{axis}"] for axis in "xyz"]) / 2 + 0.1
                inside |= (abs(at) <= half).all(1)
            cars = labels == CLASSES.index("car")
            assert inside[cars].mean() > 0.95
            assert cars[inside].mean() > 0.8
            near = (labels == CLASSES.index("road")) & (np.linalg.norm(scan[:, :2], axis=1) < 20)
            assert -2.1 < np.median(scan[near, 2]) < -1.4


def test_as_a_script_it_prints_the_counts(made, capsys):
    main("pandasetgt", ["--data", str(made[0])])
    printed = capsys.readouterr().out
    assert "5 frames, 1 cameras, labels: yes, train: 2 frames, 3920 in the papers" in printed

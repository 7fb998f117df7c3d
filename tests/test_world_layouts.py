"""The miniature world in the layouts of SemanticKITTI, PandaSet, SemanticPOSS and Cityscapes."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_world import contents

from miniature.cityscapes_files import names_of
from miniature.scenes import picture, plan_scene, pose_of
from miniature.street import (BARRIER, BUS, CAR, CYLINDER, MANMADE, PEDESTRIAN, ROAD, SIDEWALK,
                              TERRAIN, TRUCK, VEGETATION)
from miniature.world import list_jobs, make_world
from plumbing.errors import InputError
from readers.pickles import LABELS, POINTS, read_frame
from readers.table import open_tables

TINY = dict(train=(1, 0, 0), val=1, frames=1, azimuths=60, workers=1)
CASES = [("semantickitti", {}), ("semanticposs", {}), ("pandaset", dict(cameras=2))]
GROUND = {ROAD: "road", SIDEWALK: "sidewalk", VEGETATION: "vegetation"}
KITTI = GROUND | {CAR: "car", BUS: "other-vehicle", TRUCK: "truck", PEDESTRIAN: "person",
                  MANMADE: "building", BARRIER: "fence", TERRAIN: "terrain"}
PANDA = GROUND | {CAR: "car", BUS: "bus", TRUCK: "truck", PEDESTRIAN: "pedestrian",
                  MANMADE: "manmade", BARRIER: "barrier", TERRAIN: "ground"}

TOWN = {0: "sky", ROAD: "road", SIDEWALK: "sidewalk", TERRAIN: "terrain", CAR: "car", BUS: "bus",
        TRUCK: "truck", PEDESTRIAN: "person", VEGETATION: "vegetation", BARRIER: "ignore"}


def plans_of(root):
    """{name of a scene: its plan}, and the options, as world.json has them."""
    options = json.loads((root / "world.json").read_text())
    plans = {}
    for _, _, split, number, condition, name in list_jobs(root, options):
        vehicle = int(name.split("/")[0]) if "/" in name else None
        plans[name] = plan_scene(options, split, number, condition, vehicle)
    return plans, options


def fit(points, labels, columns, frame, camera, kinds, names):
    """Of what a camera sees: which points have its picture's class, and the one 8 columns beside.

    kinds [H, W]: the renderer's fine classes. names {fine class: index of the reader's class}.
    """
    matrix = np.asarray(columns["cam_from_lidar"][frame, camera], float)
    seen = points[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]
    u, v, depth = (seen @ np.asarray(columns["intrinsics"][frame, camera], float).T).T
    height, width = kinds.shape
    ahead = depth > 1
    u, v = u[ahead] / depth[ahead], v[ahead] / depth[ahead]
    inside = (u > 0) & (u < width - 1) & (v > 0) & (v < height - 1)
    col, row = (np.round(value[inside]).astype(int) for value in (u, v))
    truth = labels[ahead][inside]
    table = np.zeros(256, int)
    table[list(names)] = list(names.values())
    return table[kinds[row, col]] == truth, table[kinds[row, (col + 8) % width]] == truth


def fits_of(table, names, plan_of):
    """Means of `fit` over all frames and cameras. plan_of(scan's path): plan, frame, options."""
    numbers = {kind: table.reader.CLASSES.index(name) for kind, name in names.items()}
    here, beside = [], []
    for row in range(len(table["scan"])):
        plan, frame, options, cameras = plan_of(table["scan"][row].decode())
        points = table.reader.scan(table.path("scan", row))
        labels = table.labels(row, len(points))
        for camera, channel in enumerate(cameras):
            kinds = picture(options, plan, frame, channel)[1]
            both = fit(points, labels, table, row, camera, kinds, numbers)
            here.append(both[0])
            beside.append(both[1])
    assert sum(map(len, here)) > 200 * len(here)
    return np.concatenate(here).mean(), np.concatenate(beside).mean()


def scans_of(root, ending="bin"):
    folder = {"bin": "velodyne", "label": "labels", "tag": "tag"}[ending]
    return sorted(root.glob(f"dataset/sequences/*/{folder}/*.{ending}"))


def points_and_labels(root):
    """Points [N, 4] and raw labels uint32 [N] of all frames, which come in the same order."""
    points = np.concatenate([np.fromfile(path, "<f4").reshape(-1, 4) for path in scans_of(root)])
    labels = np.concatenate([np.fromfile(path, "<u4") for path in scans_of(root, "label")])
    assert len(points) == len(labels)
    return points, labels


# ---- all layouts ---------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("dataset, more", CASES)
def test_the_seed_decides(tmp_path, dataset, more):
    one, two, other = (make_world(tmp_path / name, dataset=dataset, seed=seed, **TINY, **more)
                       for name, seed in (("one", 5), ("two", 5), ("other", 6)))
    assert contents(one) == contents(two)
    scan = next(path for path in sorted(one.rglob("*")) if path.suffix in (".bin", ".gz"))
    assert scan.read_bytes() != (other / scan.relative_to(one)).read_bytes()
    # as if it had been stopped in the middle, with more in it
    (two / "world.json").rename(two / "world.unfinished.json")
    (two / scan.relative_to(one)).with_name("99.stale").write_bytes(b"1")
    (two / ("999" if dataset == "pandaset" else "dataset/old")).mkdir()
    make_world(two, dataset=dataset, seed=5, **TINY, **more)
    assert contents(one) == contents(two) and not (two / "999").exists()


@pytest.mark.parametrize("dataset, wrong, message", [
    ("semantickitti", dict(cameras=2), "--cameras: .* it has one camera"),
    ("semanticposs", dict(image_size=(40, 80)), "--image-size: .* no pictures"),
    ("semanticposs", dict(cameras=1), "--cameras: .* no pictures"),
    ("pandaset", dict(cameras=7), "--cameras: 7 is out of range"),
    ("cityscapes", {}, "--azimuths: .* it has no LiDAR"),
    ("pandaset", dict(train=(800, 0, 0)), "pandaset has .* ask for fewer"),
    ("pandaset", dict(train=(0, 0, 0), val=0), "no scene")])
def test_refusals(tmp_path, dataset, wrong, message):
    with pytest.raises(InputError, match=message):
        make_world(tmp_path / "world", dataset=dataset, **{**TINY, **wrong})
    assert not (tmp_path / "world").exists()


def test_streets_by_day_are_counted_together(tmp_path, capsys):
    root = make_world(tmp_path / "world", dataset="semanticposs", **{**TINY, "train": (1, 1, 1)})
    assert json.loads((root / "world.json").read_text())["train"] == [3, 0, 0]
    assert "semanticposs states no weather, so all 3 have clear days" in capsys.readouterr().out


@pytest.mark.slow
def test_the_datasets_streets_differ(kitti, panda, poss):
    shares = {}
    for root, names in ((kitti, ("car", "person", "truck")), (poss, ("car", "person")),
                        (panda, ("car", "pedestrian", "truck"))):
        name = {kitti: "semantickitti", poss: "semanticposs", panda: "pandaset64"}[root]
        (table,) = open_tables(f"{name}={root}", here=True)
        counts = sum(np.bincount(table.labels(row), minlength=32) for row in range(len(table)))
        shares[name] = [counts[table.reader.CLASSES.index(each)] / counts.sum() for each in names]
    car, person, truck = shares["semantickitti"]
    assert car > 2 * shares["semanticposs"][0] and truck < .5 * shares["pandaset64"][2]
    assert shares["semanticposs"][1] > 3 * max(person, shares["pandaset64"][1])


# ---- SemanticKITTI -------------------------------------------------------------------------------
def test_kitti_has_the_files_of_its_sequences(kitti):
    sequences = sorted(path.name for path in (kitti / "dataset/sequences").iterdir())
    assert sequences == [f"{number:02d}" for number in range(11)]
    for sequence, frames in zip(sequences, (4, 4, 2, 2, 2, 2, 2, 2, 4, 2, 2)):
        folder = kitti / "dataset/sequences" / sequence
        for name, ending in (("velodyne", "bin"), ("labels", "label"), ("image_2", "png")):
            files = sorted(path.name for path in (folder / name).iterdir())
            assert files == [f"{number:06d}.{ending}" for number in range(frames)]
        times = np.loadtxt(folder / "times.txt")
        assert times.shape == (frames,) and times[0] == 0 and (np.diff(times) > .5).all()
        poses = np.loadtxt(folder / "poses.txt")
        assert poses.shape == (frames, 12) and np.allclose(poses[0], np.eye(3, 4).ravel())


def test_kitti_scans_are_64_rings_of_remission(kitti):
    for path in scans_of(kitti):
        points = np.fromfile(path, "<f4").reshape(-1, 4)
        azimuth = np.degrees(np.arctan2(points[:, 1], points[:, 0])) % 360
        rings = np.split(points, np.flatnonzero(np.diff(azimuth) < -180) + 1)
        assert len(rings) == 64 and azimuth[0] < 20
        lift = [np.degrees(np.arctan2(ring[:, 2], np.hypot(*ring[:, :2].T))) for ring in rings]
        assert max(np.ptp(each) for each in lift) < .1
        assert abs(lift[0].mean() - 2) < .1 and abs(lift[-1].mean() + 24.8) < .1
    points, labels = points_and_labels(kitti)
    remission = points[:, 3]
    assert 0 <= remission.min() and remission.max() < .9901
    assert np.abs(remission * 100 - np.round(remission * 100)).max() < 1e-4
    road = (labels & 0xFFFF == 40) & (np.hypot(points[:, 0], points[:, 1]) < 10)
    assert abs(np.median(points[road, 2]) + 1.73) < .02


def test_kitti_labels_have_instances_and_moving_classes(kitti):
    _, labels = points_and_labels(kitti)
    kind, instance = labels & 0xFFFF, labels >> 16
    assert set(np.unique(kind)) <= {10, 13, 18, 30, 40, 48, 50, 51, 70, 72, 252, 254, 257, 258}
    assert {10, 252, 254} <= set(np.unique(kind))
    objects = np.isin(kind, (10, 13, 18, 30, 252, 254, 257, 258))
    assert (instance[objects] > 0).all() and (instance[~objects] == 0).all()
    # in a scan, an instance has one class and hardly more points around it than a bus is long
    path = scans_of(kitti)[0]
    points = np.fromfile(path, "<f4").reshape(-1, 4)
    labels = np.fromfile(scans_of(kitti, "label")[0], "<u4")
    for number in set(np.unique(labels >> 16)) - {0}:
        mine = labels >> 16 == number
        assert len(set(labels[mine])) == 1
        assert np.linalg.norm(np.ptp(points[mine, :2], axis=0)) < 14


def test_kitti_calibration_is_where_the_camera_is(kitti):
    plans, _ = plans_of(kitti)
    seen = {}
    for name, plan in plans.items():
        sequence, first = name.split("/")
        folder = kitti / "dataset/sequences" / sequence
        rows = dict(line.split(": ") for line in (folder / "calib.txt").read_text().splitlines())
        assert list(rows) == ["P0", "P1", "P2", "P3", "Tr"]
        matrix = {key: np.array(text.split(), float).reshape(3, 4) for key, text in rows.items()}
        seen[sequence] = rows["Tr"]
        assert (np.abs(matrix["P2"][:, 3]) > .01).all() and not matrix["P0"][:, 3].any()
        # a point of the LiDAR's frame, x forward and y left, by the street and by the files
        forward, left, up = point = np.array([9., 1.5, -.7])
        views = plan["frames"][1]
        lidar, camera = views["velodyne"], views["image_2"]
        place = lidar["eye"] + lidar["turn"] @ [-left, forward, up]
        x, y, z = camera["turn"].T @ (place - camera["eye"])
        focal = 80 / .86
        want = [focal * x / z + 79.5, focal * y / z + 39.5, z]
        found = matrix["P2"] @ np.append(matrix["Tr"] @ np.append(point, 1), 1)
        assert np.allclose([found[0] / found[2], found[1] / found[2], found[2]], want, atol=1e-6)
        # camera 0's poses: two frames of a street see a standing point at one place
        poses = np.loadtxt(folder / "poses.txt").reshape(-1, 3, 4)[int(first):]
        places = []
        for frame, pose in zip((0, 1), poses):
            turn, eye = pose_of(plan, frame, "velodyne")
            standing = turn.T @ ([700., 800., 1.] - eye)  # x right, y forward
            local = matrix["Tr"] @ [standing[1], -standing[0], standing[2], 1]
            places.append(pose @ np.append(local, 1))
        assert np.allclose(*places, atol=1e-5)
    assert len(set(seen.values())) == 11  # each sequence has its vehicle


@pytest.mark.slow
def test_kitti_points_meet_their_class_in_the_picture(kitti):
    plans, options = plans_of(kitti)
    (table,) = open_tables(f"semantickitti={kitti}", here=True)
    assert len(table) == 28 and (table["split"] == b"val").sum() == 4

    def plan_of(path):
        *_, sequence, _, file = Path(path).parts
        frame = int(file[:6])
        return plans[f"{sequence}/{frame // 2 * 2:06d}"], frame % 2, options, ["image_2"]
    here, beside = fits_of(table, KITTI, plan_of)
    assert here > .93 and beside < here - .1
    # without the offset of camera 2 they fit less
    shifted = dict(table.columns)
    shifted["cam_from_lidar"] = table["cam_from_lidar"].copy()
    shifted["cam_from_lidar"][..., :3, 3] -= (.3, -.02, .05)
    table.columns = shifted
    assert fits_of(table, KITTI, plan_of)[0] < here - .02


# ---- SemanticPOSS --------------------------------------------------------------------------------
def test_poss_tags_are_its_range_images(poss):
    sequences = sorted(path.name for path in (poss / "dataset/sequences").iterdir())
    assert sequences == ["00", "01", "02", "03", "04", "05"]
    assert not list(poss.rglob("*.png")) and not list(poss.rglob("calib.txt"))
    for path, tag in zip(scans_of(poss), scans_of(poss, "tag"), strict=True):
        points = np.fromfile(path, "<f4").reshape(-1, 4)
        image = np.fromfile(tag, bool).reshape(40, 1800)
        assert tag.stat().st_size == 72_000 and image.sum() == len(points)
        lift = np.full(image.shape, np.nan)
        lift[image] = np.degrees(np.arctan2(points[:, 2], np.hypot(*points[:, :2].T)))
        assert (np.nanmax(lift, 1) - np.nanmin(lift, 1)).max() < .1
        assert (np.diff(np.nanmean(lift, 1)) < -.1).all()
    points, labels = points_and_labels(poss)
    assert set(np.unique(labels & 0xFFFF)) == {4, 7, 9, 15, 17, 22}
    assert 5 < points[:, 3].mean() < 40 and 100 < points[:, 3].max() <= 255


def test_poss_tags_of_other_sizes(tmp_path):
    root = make_world(tmp_path / "data", dataset="semanticposs", train=(1, 0, 0), val=0, frames=1,
                      beams=10, azimuths=70, lidar_fov=200, workers=1)
    (path,), (tag,) = scans_of(root), scans_of(root, "tag")
    assert tag.stat().st_size == 700
    assert np.fromfile(tag, bool).sum() == path.stat().st_size // 16


def test_poss_is_read(poss):
    (table,) = open_tables(f"semanticposs={poss}", here=True)
    assert len(table) == 16 and (table["split"] == b"val").sum() == 4
    assert "image" not in table


# ---- PandaSet ------------------------------------------------------------------------------------
def test_pandaset_has_the_files_of_its_scenes(panda):
    scenes = sorted(path for path in panda.iterdir() if path.is_dir())
    assert [path.name for path in scenes] == ["001", "002", "003", "005"]
    latitudes = []
    for scene in scenes:
        files = sorted(path.name for path in (scene / "lidar").iterdir())
        assert files == ["00.pkl.gz", "01.pkl.gz", "poses.json", "timestamps.json"]
        assert len(list((scene / "camera").iterdir())) == 6
        for file in ("lidar/poses", "lidar/timestamps", "camera/back_camera/poses",
                     "camera/left_camera/timestamps", "meta/gps", "meta/timestamps"):
            assert len(json.loads((scene / f"{file}.json").read_text())) == 2
        latitudes.append(json.loads((scene / "meta/gps.json").read_text())[0]["lat"])
        first = json.loads((scene / "lidar/poses.json").read_text())[0]["position"]
        assert first == dict(x=0, y=0, z=0)
    latitudes = np.array(latitudes)
    assert (np.abs(latitudes - 37.6) > .1).all() and (latitudes < 37.6).sum() == 1
    labelled = [scene for scene in scenes if (scene / "annotations/semseg").is_dir()]
    (bare,) = set(scenes) - set(labelled)
    assert latitudes[scenes.index(bare)] > 37.6
    classes = json.loads((labelled[0] / "annotations/semseg/classes.json").read_text())
    assert list(classes) == [str(number) for number in range(1, 43)]
    assert classes["35"] == "Road Barriers" and classes["42"] == "Other Static Object"


def test_pandaset_frames_have_two_lidars(panda):
    for path in sorted(panda.glob("*/lidar/*.pkl.gz")):
        frame = read_frame(path, POINTS)
        device = frame["d"]
        assert device.dtype == np.int64 and (np.diff(device) >= 0).all()
        assert frame["x"].dtype == frame["t"].dtype == np.float64
        assert 0 <= frame["i"].min() and frame["i"].max() <= 255
        times = json.loads(path.with_name("timestamps.json").read_text())
        late = times[int(path.name[:2])] - frame["t"]
        assert 0 < late.min() and late.max() < .11
        place = (np.column_stack([frame[name] for name in "xyz"]) - pose_of_file(path)[1])
        place = place @ pose_of_file(path)[0]
        both = [place[device == number] for number in (0, 1)]
        azimuth = [np.degrees(np.arctan2(part[:, 0], part[:, 1])) for part in both]
        assert azimuth[0].min() < -170 and azimuth[0].max() > 170
        assert both[1][:, 1].min() > 2
        # the one that looks ahead has more points to a degree there
        ahead = [(np.abs(each) < 20).sum() for each in azimuth]
        assert ahead[1] > 1.2 * ahead[0]
        labels = path.parent.parent / "annotations/semseg" / path.name
        if labels.exists():
            road = read_frame(labels, LABELS)["class"] == 7
            near = np.hypot(place[:, 0], place[:, 1]) < 20
            for number in (0, 1):
                heights = place[road & near & (device == number), 2]
                assert abs(np.median(heights)) < .2


def pose_of_file(path):
    """A frame's pose by its file: rotation [3, 3] and place [3]."""
    from pyquaternion import Quaternion
    pose = json.loads(path.with_name("poses.json").read_text())[int(path.name[:2])]
    turn = Quaternion(*(pose["heading"][key] for key in "wxyz")).rotation_matrix
    return turn, np.array([pose["position"][key] for key in "xyz"])


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["pandaset64", "pandasetgt"])
def test_pandaset_points_meet_their_class_in_the_picture(panda, dataset):
    plans, options = plans_of(panda)
    (table,) = open_tables(f"{dataset}={panda}", here=True)
    assert len(table) == 6 and (table["split"] == b"val").sum() == 2
    cameras = table.reader.CAMERAS

    def plan_of(path):
        scene, _, file = Path(path).parts
        return plans[scene], int(file[:2]), options, cameras
    here, beside = fits_of(table, PANDA, plan_of)
    assert here > .9 and beside < here - .05


# ---- Cityscapes ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def towns(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("towns") / "data", seed=4, dataset="cityscapes",
                      train=(2, 0, 0), val=1, workers=1)


def test_towns_have_the_files_of_cityscapes(towns):
    places = ("train/aachen/aachen", "train/bochum/bochum", "val/frankfurt/frankfurt")
    files = [f"gtFine/{place}_000000_000019_gtFine_labelIds.png" for place in places]
    files += [f"leftImg8bit/{place}_000000_000019_leftImg8bit.png" for place in places]
    assert list(contents(towns)) == [*files, "world.json"]
    names = names_of(dict(train=[20, 0, 0], val=4, frames=2))
    assert names["train"][:3] == ["aachen_000000", "aachen_000002", "bochum_000000"]
    assert [len({name.split("_")[0] for name in names[split]}) for split in names] == [18, 3]


def test_towns_are_the_same_when_written_again(towns, tmp_path):
    again = tmp_path / "again"
    for folder in ("gtFine/val/stale", "leftImg8bit"):  # as if it had been stopped in the middle
        (again / folder).mkdir(parents=True)
    (again / "world.unfinished.json").write_text("{}")
    make_world(again, seed=4, dataset="cityscapes", train=(2, 0, 0), val=1, workers=1)
    assert contents(again) == contents(towns) and not (again / "gtFine/val/stale").exists()


def test_towns_labels_are_what_is_in_the_picture(towns):
    plans, options = plans_of(towns)
    (table,) = open_tables(f"cityscapes={towns}", here=True)
    found = {"pole": [], "traffic_sign": []}
    for row, plan in enumerate(plans.values()):
        image, kinds, near = picture(options, plan, 0, "left")
        assert (np.array(Image.open(table.path("image", row, 0))) == image).all()
        names = np.array(table.reader.CLASSES)[table.labels(row)]
        for kind in np.unique(kinds):
            wanted = {TOWN[kind]} if kind in TOWN else {"building", *found}
            assert set(names[kinds == kind]) <= wanted
        # posts, and plates above them across the street, where nothing stands before them
        view, things = plan["frames"][0]["left"], plan["street"].things
        made = things["kind"] == MANMADE
        for name, chosen, lift in (("pole", things["shape"] == CYLINDER, 0),
                                   ("traffic_sign", things["half"][:, 0] < .05, .2)):
            x, y, z = ((things["at"] + (0, 0, lift) - view["eye"]) @ view["turn"])[made & chosen].T
            col, down = 80 / .4526 * x / z + 79.5, 80 / .4526 * y / z + 39.5
            shown = (z > 2) & (col > 0) & (col < 159) & (down > 0) & (down < 79)
            at = np.round(down[shown]).astype(int), np.round(col[shown]).astype(int)
            found[name] += names[at][np.abs(near[at] - z[shown]) < .3].tolist()
    for name, labels in found.items():
        assert len(labels) > 5 and labels.count(name) > .9 * len(labels)

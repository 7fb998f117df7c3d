"""The miniature world is a genuine nuScenes dataset; its conditions change light, not streets."""
import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from nuscenes import NuScenes
from nuscenes.eval.lidarseg.utils import LidarsegClassMapper
from nuscenes.utils import splits
from PIL import Image

from miniature.nuscenes_tables import points_of
from miniature.scenes import CONDITIONS, picture, plan_scene
from miniature.world import each_written, make_world
from plumbing.errors import InputError

TINY = dict(train=(2, 1, 1), val=1, image_size=(40, 80), beams=16, azimuths=60, workers=1)
OPTIONS = dict(seed=3, frames=1, image_size=(80, 160), beams=32, azimuths=180, lidar_fov=100.,
               cameras=1)


def contents(root):
    """Relative path and bytes of every file."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def condition_of(scene):
    text = scene["description"].lower()
    if "night" in text:
        return "night"
    return "day-rain" if "rain" in text else "day-clear"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """6 training scenes and 2 validation layouts of two keyframes; front and two side cameras."""
    return make_world(tmp_path_factory.mktemp("made") / "world", seed=3, train=(3, 2, 1), val=2,
                      cameras=3, lidar_fov=220, azimuths=400, workers=1)


@pytest.fixture(scope="module")
def nusc(root):
    return NuScenes("v1.0-trainval", str(root), verbose=False)


@pytest.fixture(scope="module")
def layouts():
    """Per layout and condition: plan, picture [H, W, 3], fine class and depth per pixel."""
    found = []
    for layout in range(6):
        seen = {}
        for k, condition in enumerate(CONDITIONS):
            plan = plan_scene(OPTIONS, "val", 3 * layout + k, condition)
            seen[condition] = (plan, *picture(OPTIONS, plan, 0, "CAM_FRONT"))
        found.append(seen)
    return found


@pytest.mark.slow
def test_devkit_reads_the_categories(nusc, capsys):
    nusc.list_lidarseg_categories()
    assert "flat.driveable_surface" in capsys.readouterr().out
    names = {0: "noise", 9: "movable_object.barrier", 17: "vehicle.car",
             24: "flat.driveable_surface", 30: "static.vegetation", 31: "vehicle.ego"}
    for k, name in names.items():
        assert nusc.lidarseg_idx2name_mapping[k] == name


def test_devkit_follows_the_links_of_a_scene(nusc):
    assert len(nusc.scene) == 12 and len(nusc.sample) == 24 and len(nusc.sample_data) == 24 * 4
    for scene in nusc.scene:
        # forwards along `next`, and `prev` leads back
        token, seen = scene["first_sample_token"], [""]
        while token:
            sample = nusc.get("sample", token)
            assert sample["scene_token"] == scene["token"] and sample["prev"] == seen[-1]
            seen.append(token)
            token = sample["next"]
        seen = seen[1:]
        assert seen[-1] == scene["last_sample_token"] and len(seen) == scene["nbr_samples"] == 2
        for channel in ("LIDAR_TOP", "CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"):
            first, last = (data_of(nusc, token, channel) for token in seen)
            assert first["prev"] == last["next"] == ""
            assert first["next"] == last["token"] and last["prev"] == first["token"]


def data_of(nusc, sample, channel):
    return nusc.get("sample_data", nusc.get("sample", sample)["data"][channel])


def between(nusc, one, two):
    """Distance, m, and time, s, between the ego poses of two records of sample_data."""
    one, two = (nusc.get("ego_pose", record["ego_pose_token"]) for record in (one, two))
    way = np.linalg.norm(np.subtract(two["translation"], one["translation"]))
    return way, (two["timestamp"] - one["timestamp"]) / 1e6


def test_the_ego_moves_at_a_plausible_speed(nusc):
    for scene in nusc.scene:
        ends = scene["first_sample_token"], scene["last_sample_token"]
        for channel in ("LIDAR_TOP", "CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"):
            way, seconds = between(nusc, *(data_of(nusc, sample, channel) for sample in ends))
            assert 7 < way < 23 and 3 < way / seconds < 13
        camera, lidar = (data_of(nusc, ends[0], channel) for channel in ("CAM_FRONT", "LIDAR_TOP"))
        assert .05 < between(nusc, camera, lidar)[0] < .6  # in 35 ms


def test_points_projected_by_the_devkit_meet_their_class_and_depth(nusc):
    same_class, same_depth, moved = [], [], []
    options = dict(OPTIONS, frames=2, cameras=3)
    palette = np.array([nusc.colormap[nusc.lidarseg_idx2name_mapping[k]] for k in range(32)]) / 255
    val = [scene for scene in nusc.scene if scene["name"] in splits.val]
    for number, scene in enumerate(val):
        plan = plan_scene(options, "val", number, condition_of(scene))
        for frame, key in enumerate(("first_sample_token", "last_sample_token")):
            for channel in ("CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"):
                data = nusc.get("sample", scene[key])["data"]
                tokens = data["LIDAR_TOP"], data[channel]
                project = nusc.explorer.map_pointcloud_to_image
                pixels, depth, image = project(*tokens)
                _, colors, _ = project(*tokens, show_lidarseg=True)
                colors = colors[:, :3]
                assert len(depth) > 1000
                drawn, kind, true_depth = picture(options, plan, frame, channel)
                assert np.abs(np.asarray(image, int) - drawn).mean() < 6  # the file is this picture
                col, row = np.round(pixels[:2]).astype(int)
                beside = (col + 8) % 160
                same_class.append(np.abs(palette[kind[row, col]] - colors).max(1) < 1e-3)
                moved.append(np.abs(palette[kind[row, beside]] - colors).max(1) < 1e-3)
                same_depth.append(np.abs(true_depth[row, col] - depth) < .1 + .08 * depth)
    same_class = np.concatenate(same_class).mean()
    assert same_class > .9 and np.concatenate(same_depth).mean() > .88
    assert np.concatenate(moved).mean() < same_class - .1  # eight columns beside it they do not fit


def test_scene_names_and_descriptions(nusc, root):
    train = [scene for scene in nusc.scene if scene["name"] in splits.train]
    val = [scene for scene in nusc.scene if scene["name"] in splits.val]
    assert len(train) == 6 and len(val) == 6
    assert len({scene["name"] for scene in nusc.scene}) == 12
    assert sorted(map(condition_of, train)) == ["day-clear"] * 3 + ["day-rain"] * 2 + ["night"]
    assert [condition_of(scene) for scene in val] == list(CONDITIONS) * 2
    stamps = [nusc.get("sample", scene["first_sample_token"])["timestamp"] for scene in val]
    hours = [(stamp // 3_600_000_000 + 8) % 24 for stamp in stamps]  # in Singapore
    assert [hour >= 18 for hour in hours] == [False, False, True] * 2


def test_ten_classes_and_plausible_points(nusc, root):
    mapper = LidarsegClassMapper(nusc)
    share, intensity = np.zeros(17), []
    for record in nusc.lidarseg:
        labels = np.fromfile(root / record["filename"], np.uint8)
        file = nusc.get("sample_data", record["sample_data_token"])["filename"]
        points = np.fromfile(root / file, np.float32).reshape(-1, 5)
        assert len(labels) == len(points) > 2000
        assert np.abs(points[:, :2]).max() < 80
        assert -3.5 < points[:, 2].min() and points[:, 2].max() < 16
        assert points[:, 3].min() >= 0 and points[:, 3].max() <= 255
        assert set(np.unique(points[:, 4])) <= set(range(32))
        share += np.bincount(mapper.convert_label(labels), minlength=17)
        intensity.append(points[:, 3])
    share /= share.sum()
    assert set(np.flatnonzero(share > .003)) == {1, 3, 4, 7, 10, 11, 13, 14, 15, 16}
    assert share[0] == 0
    assert 10 < np.concatenate(intensity).mean() < 40


def test_night_is_darker_and_rain_is_paler_far_away(layouts):
    for layout in layouts:
        tone = {condition: seen[1].mean(-1) / 255 for condition, seen in layout.items()}
        assert .08 < tone["night"].mean() < .75 * tone["day-clear"].mean()  # dark, but not black
        assert tone["night"].std() > .04

    contrast = {condition: [] for condition in CONDITIONS}
    colour = {condition: [] for condition in CONDITIONS}
    for layout in layouts:
        _, _, kind, depth = layout["day-clear"]
        there = (kind > 0) & (depth > 30) & (depth < 70)
        for condition, (_, image, _, _) in layout.items():
            far = image[there].astype(int)
            contrast[condition].append(far.mean(-1).std())
            colour[condition].append(np.ptp(far, axis=-1).mean())
    assert np.mean(contrast["day-rain"]) < .75 * np.mean(contrast["day-clear"])
    assert np.mean(colour["day-rain"]) < .7 * np.mean(colour["day-clear"])


def returns_of(plan):
    """{(azimuth, ring): (range, m, intensity, fine class)} of a sweep."""
    points, labels = points_of(OPTIONS, plan, 0)
    degrees = np.degrees(np.arctan2(points[:, 0], points[:, 1]))
    column = np.round(degrees * 1.8 + 89.5).astype(int)  # 180 columns over 100 degrees
    found = {}
    for a, point, label in zip(column, points, labels):
        found[a, int(point[4])] = np.linalg.norm(point[:3]), point[3], label
    assert len(found) == len(points)  # one return per ray
    return found


def test_conditions_share_the_street_and_lidar_hardly_notices(layouts):
    for layout in layouts[:3]:
        rays = {condition: returns_of(seen[0]) for condition, seen in layout.items()}
        clear = rays["day-clear"]
        for condition in CONDITIONS[1:]:
            assert (layout[condition][2] == layout["day-clear"][2]).all()  # the pictures' classes
            other = rays[condition]
            shared = [ray for ray in clear if ray in other]
            assert len(shared) > .8 * len(clear)
            far, echo, kind = np.array([clear[ray] for ray in shared]).T
            other_far, other_echo, other_kind = np.array([other[ray] for ray in shared]).T
            assert np.median(np.abs(far - other_far)) < .05 and (kind == other_kind).all()
            assert not np.array_equal(far, other_far)  # its noise is another
            assert np.corrcoef(echo, other_echo)[0, 1] > .8
        assert len(rays["day-rain"]) < .97 * len(rays["night"])


def test_lidar_intensity_tells_the_grounds_apart(layouts):
    values = {}
    for layout in layouts:
        points, labels = points_of(OPTIONS, layout["night"][0], 0)
        for name, kind in (("road", 24), ("sidewalk", 26), ("terrain", 27)):
            values.setdefault(name, []).extend(points[labels == kind, 3])
    road, sidewalk, terrain = (np.array(values[name]) for name in ("road", "sidewalk", "terrain"))
    # the area under the ROC curve of a threshold on intensity alone
    for low, high in ((road[::20], sidewalk[::5]), (sidewalk[::5], terrain[::5])):
        assert (low[:, None] < high[None]).mean() > .9


@pytest.mark.slow
def test_the_seed_decides_and_the_workers_do_not(tmp_path):
    one = make_world(tmp_path / "one", **dict(TINY, seed=5))
    two = make_world(tmp_path / "two", **dict(TINY, seed=5, workers=2))
    other = make_world(tmp_path / "other", **dict(TINY, seed=6))
    assert contents(one) == contents(two)
    images, others = images_of(one), images_of(other)
    assert len(images) == len(others) == 14
    for image in images:  # another seed: no street in common
        assert min(np.abs(image - b).mean() for b in others) > 4
    scenes = json.loads((one / "v1.0-trainval/scene.json").read_text())
    assert sum(scene["name"] in splits.val for scene in scenes) == 3
    assert np.abs(images[0] - images[8]).mean() > 4  # and train's streets are not val's


def images_of(root):
    return [np.asarray(Image.open(path), float) for path in sorted(root.rglob("*.jpg"))]


def stamps_of(root):
    return [path.stat().st_mtime_ns for path in sorted(root.rglob("*"))]


@pytest.mark.slow
def test_finished_is_kept_unfinished_is_written_again_and_others_are_refused(tmp_path, capsys):
    root = make_world(tmp_path / "world", **dict(TINY, seed=5))
    before, stamps = contents(root), stamps_of(root)
    make_world(root, **dict(TINY, seed=5, workers=2))
    assert "finished already" in capsys.readouterr().out
    assert stamps_of(root) == stamps
    with pytest.raises(InputError, match="seed 5 there, 6 now"):
        make_world(root, **dict(TINY, seed=6))
    assert contents(root) == before
    # as if it had been stopped in the middle, with a file too many and one too few
    (root / "world.json").rename(root / "world.unfinished.json")
    next(root.rglob("*.jpg")).unlink()
    (root / "lidarseg/v1.0-trainval/stale_lidarseg.bin").write_bytes(b"1")
    make_world(root, **dict(TINY, seed=5))
    assert contents(root) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(InputError, match="no world"):
        make_world(tmp_path / "mine", **TINY)
    assert contents(tmp_path / "mine") == {"notes.txt": b"precious"}


@pytest.mark.parametrize("wrong, flag", [
    (dict(train=(500, 150, 51)), "--train"), (dict(val=51), "--val"),
    (dict(frames=0), "--frames"), (dict(cameras=7), "--cameras"),
    (dict(lidar_fov=361), "--lidar-fov"), (dict(train=(0, 0, 0), val=0), "no scene")])
def test_refusals(tmp_path, wrong, flag):
    with pytest.raises(InputError, match=flag):
        make_world(tmp_path / "world", **{**TINY, **wrong})
    assert not (tmp_path / "world").exists()


@pytest.mark.slow
def test_command_line_refuses_in_one_line(tmp_path):
    script = Path(__file__).resolve().parent.parent / "miniature/world.py"
    command = [sys.executable, str(script), "--out", str(tmp_path / "world"), "--val", "60"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "ask for fewer" in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_process_that_dies_ends_the_making(tmp_path):
    """It was waited for: a Pool starts another in its place, which dies too."""
    with pytest.raises(BrokenProcessPool):
        list(each_written(os._exit, [1, 1], 2))

"""The miniature world is a genuine nuScenes dataset, and what its conditions change is the light, not the street."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nuscenes import NuScenes
from nuscenes.eval.lidarseg.utils import LidarsegClassMapper
from nuscenes.utils import splits
from PIL import Image

from errors import InputError
from miniature.world import CONDITIONS, make_world, picture, plan_scene, sweep

TINY = dict(train=(2, 1, 1), val=1, image_size=(40, 80), beams=16, azimuths=60, workers=1)
OPTIONS = dict(seed=3, frames=1, image_size=(80, 160), beams=32, azimuths=180, lidar_fov=100., cameras=1)


def contents(root):
    """Relative path and bytes of every file."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def condition_of(scene):
    text = scene["description"].lower()
    return "night" if "night" in text else "day-rain" if "rain" in text else "day-clear"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """6 training scenes and 2 validation layouts, two keyframes each, front and two side cameras."""
    return make_world(tmp_path_factory.mktemp("made") / "world", seed=3, train=(3, 2, 1), val=2, cameras=3, lidar_fov=220,
                      azimuths=400, workers=1)


@pytest.fixture(scope="module")
def nusc(root):
    return NuScenes("v1.0-trainval", str(root), verbose=False)


@pytest.fixture(scope="module")
def layouts():
    """Per layout and condition: plan, picture [H, W, 3] in 0..1, fine class and depth per pixel."""
    found = []
    for layout in range(6):
        plans = [plan_scene(OPTIONS, "val", 3 * layout + k, condition) for k, condition in enumerate(CONDITIONS)]
        found.append({plan["condition"]: (plan, *picture(OPTIONS, plan, 0, "CAM_FRONT")) for plan in plans})
    return found


def test_devkit_reads_the_tables(nusc, capsys):
    nusc.list_lidarseg_categories()
    assert "flat.driveable_surface" in capsys.readouterr().out
    assert [nusc.lidarseg_idx2name_mapping[k] for k in (0, 9, 17, 24, 30, 31)] == [
        "noise", "movable_object.barrier", "vehicle.car", "flat.driveable_surface", "static.vegetation", "vehicle.ego"]
    assert len(nusc.scene) == 12 and len(nusc.sample) == 24 and len(nusc.sample_data) == 24 * 4
    for scene in nusc.scene:
        token, seen = scene["first_sample_token"], []
        while token:  # forwards along `next`, and `prev` leads back
            sample = nusc.get("sample", token)
            assert sample["scene_token"] == scene["token"] and sample["prev"] == (seen[-1] if seen else "")
            seen.append(token)
            token = sample["next"]
        assert seen[-1] == scene["last_sample_token"] and len(seen) == scene["nbr_samples"] == 2
        for channel in ("LIDAR_TOP", "CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"):
            first, last = (nusc.get("sample_data", nusc.get("sample", token)["data"][channel]) for token in seen)
            assert (first["prev"], first["next"], last["prev"], last["next"]) == ("", last["token"], first["token"], "")
            poses = [nusc.get("ego_pose", record["ego_pose_token"]) for record in (first, last)]
            moved = np.linalg.norm(np.subtract(poses[1]["translation"], poses[0]["translation"]))
            seconds = (poses[1]["timestamp"] - poses[0]["timestamp"]) / 1e6
            assert 7 < moved < 23 and 3 < moved / seconds < 13
        data = nusc.get("sample", seen[0])["data"]
        camera, lidar = (nusc.get("ego_pose", nusc.get("sample_data", data[channel])["ego_pose_token"])
                         for channel in ("CAM_FRONT", "LIDAR_TOP"))
        assert .05 < np.linalg.norm(np.subtract(camera["translation"], lidar["translation"])) < .6  # in 35 ms


def test_points_projected_by_the_devkit_meet_their_class_and_depth(nusc):
    same_class, same_depth, moved = [], [], []
    options = dict(OPTIONS, frames=2, cameras=3)
    for number, scene in enumerate(s for s in nusc.scene if s["name"] in splits.val):
        plan = plan_scene(options, "val", number, condition_of(scene))
        for frame, key in enumerate(("first_sample_token", "last_sample_token")):
            for channel in ("CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"):
                data = nusc.get("sample", scene[key])["data"]
                tokens = data["LIDAR_TOP"], data[channel]
                pixels, depth, image = nusc.explorer.map_pointcloud_to_image(*tokens)
                colors = nusc.explorer.map_pointcloud_to_image(*tokens, show_lidarseg=True)[1]
                assert len(depth) > 1000
                drawn, kind, true_depth = picture(options, plan, frame, channel)
                assert np.abs(np.asarray(image, int) - drawn).mean() < 6  # the file is this picture
                palette = np.array([nusc.colormap[nusc.lidarseg_idx2name_mapping[k]] for k in range(32)]) / 255
                col, row = np.round(pixels[:2]).astype(int)
                same_class.append(np.abs(palette[kind[row, col]] - colors[:, :3]).max(1) < 1e-3)
                moved.append(np.abs(palette[kind[row, (col + 8) % 160]] - colors[:, :3]).max(1) < 1e-3)
                same_depth.append(np.abs(true_depth[row, col] - depth) < .1 + .08 * depth)
    same_class, same_depth, moved = (np.concatenate(parts).mean() for parts in (same_class, same_depth, moved))
    assert same_class > .9 and same_depth > .88
    assert moved < same_class - .1  # eight columns beside it the classes do not fit


def test_scene_names_and_descriptions(nusc, root):
    train = [scene for scene in nusc.scene if scene["name"] in splits.train]
    val = [scene for scene in nusc.scene if scene["name"] in splits.val]
    assert len(train) == 6 and len(val) == 6 and len({scene["name"] for scene in nusc.scene}) == 12
    assert sorted(map(condition_of, train)) == ["day-clear"] * 3 + ["day-rain"] * 2 + ["night"]
    assert [condition_of(scene) for scene in val] == list(CONDITIONS) * 2
    night = [nusc.get("sample", scene["first_sample_token"])["timestamp"] for scene in val]
    assert [(stamp // 3_600_000_000 + 8) % 24 >= 18 for stamp in night] == [False, False, True] * 2  # o'clock in Singapore


def test_ten_classes_and_plausible_points(nusc, root):
    mapper = LidarsegClassMapper(nusc)
    share, intensity = np.zeros(17), []
    for record in nusc.lidarseg:
        labels = np.fromfile(root / record["filename"], np.uint8)
        file = nusc.get("sample_data", record["sample_data_token"])["filename"]
        points = np.fromfile(root / file, np.float32).reshape(-1, 5)
        assert len(labels) == len(points) > 2000
        assert points[:, 3].min() >= 0 and points[:, 3].max() <= 255 and set(np.unique(points[:, 4])) <= set(range(32))
        assert np.abs(points[:, :2]).max() < 80 and -3.5 < points[:, 2].min() and points[:, 2].max() < 16
        share += np.bincount(mapper.convert_label(labels), minlength=17)
        intensity.append(points[:, 3])
    share /= share.sum()
    assert set(np.flatnonzero(share > .003)) == {1, 3, 4, 7, 10, 11, 13, 14, 15, 16} and share[0] == 0
    assert 10 < np.concatenate(intensity).mean() < 40


def test_night_is_darker_and_rain_is_paler_far_away(layouts):
    for layout in layouts:
        tone = {condition: image.mean(-1) / 255 for condition, (_, image, _, _) in layout.items()}
        assert .08 < tone["night"].mean() < .75 * tone["day-clear"].mean()  # dark, but not black
        assert tone["night"].std() > .04
    far = {condition: [] for condition in CONDITIONS}
    for layout in layouts:
        depth, kind = layout["day-clear"][3], layout["day-clear"][2]
        there = (kind > 0) & (depth > 30) & (depth < 70)
        for condition, (_, image, _, _) in layout.items():
            far[condition].append((image[there].mean(-1).std(), np.ptp(image[there].astype(int), axis=-1).mean()))
    contrast, colour = ({condition: np.mean(value, 0)[k] for condition, value in far.items()} for k in (0, 1))
    assert contrast["day-rain"] < .75 * contrast["day-clear"] and colour["day-rain"] < .7 * colour["day-clear"]


def test_conditions_share_the_street_and_lidar_hardly_notices(layouts):
    for layout in layouts[:3]:
        kinds, rays = {}, {}
        for condition, (plan, _, kind, _) in layout.items():
            points, labels = sweep(OPTIONS, plan, 0)
            column = np.round(np.degrees(np.arctan2(points[:, 0], points[:, 1])) * 1.8 + 89.5).astype(int)
            rays[condition] = {(a, b): (np.linalg.norm(p[:3]), p[3], c)
                               for a, b, p, c in zip(column, points[:, 4].astype(int), points, labels)}
            assert len(rays[condition]) == len(points)  # one return per ray
            kinds[condition] = kind
        for condition in CONDITIONS[1:]:
            assert (kinds[condition] == kinds["day-clear"]).all()
            clear = rays["day-clear"]
            both = np.array([(*clear[ray], *rays[condition][ray]) for ray in clear if ray in rays[condition]])
            assert len(both) > .8 * len(rays["day-clear"])
            assert np.median(np.abs(both[:, 0] - both[:, 3])) < .05 and (both[:, 2] == both[:, 5]).all()
            assert not np.array_equal(both[:, 0], both[:, 3])  # its noise is another
            assert np.corrcoef(both[:, 1], both[:, 4])[0, 1] > .8
        assert len(rays["day-rain"]) < .97 * len(rays["night"])


def test_lidar_intensity_tells_the_grounds_apart(layouts):
    values = {}
    for layout in layouts:
        points, labels = sweep(OPTIONS, layout["night"][0], 0)
        for name, kind in (("road", 24), ("sidewalk", 26), ("terrain", 27)):
            values.setdefault(name, []).extend(points[labels == kind, 3])
    road, sidewalk, terrain = (np.array(values[name]) for name in ("road", "sidewalk", "terrain"))
    # the area under the ROC curve of a threshold on intensity alone
    above = [(low[:, None] < high[None]).mean() for low, high in ((road[::20], sidewalk[::5]), (sidewalk[::5], terrain[::5]))]
    assert min(above) > .9


def test_the_seed_decides_and_the_workers_do_not(tmp_path):
    one, two, other = (make_world(tmp_path / name, **dict(TINY, seed=seed, workers=workers))
                       for name, seed, workers in (("one", 5, 1), ("two", 5, 2), ("other", 6, 1)))
    assert contents(one) == contents(two)
    images = [[np.asarray(Image.open(path), float) for path in sorted(root.rglob("*.jpg"))] for root in (one, other)]
    assert len(images[0]) == len(images[1]) == 14
    pairs = [np.abs(a - b).mean() for a in images[0] for b in images[1]]
    assert min(pairs) > 4  # another seed: no street in common
    val = [scene["name"] in splits.val for scene in json.loads((one / "v1.0-trainval/scene.json").read_text())]
    assert sum(val) == 3 and np.abs(images[0][0] - images[0][8]).mean() > 4  # and train's streets are not val's


def test_finished_is_kept_unfinished_is_written_again_and_others_are_refused(tmp_path, capsys):
    root = make_world(tmp_path / "world", **dict(TINY, seed=5))
    before, stamps = contents(root), [path.stat().st_mtime_ns for path in sorted(root.rglob("*"))]
    make_world(root, **dict(TINY, seed=5, workers=2))
    assert "finished already" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in sorted(root.rglob("*"))] == stamps
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
    (dict(train=(500, 150, 51)), "--train"), (dict(val=51), "--val"), (dict(frames=0), "--frames"),
    (dict(cameras=7), "--cameras"), (dict(lidar_fov=361), "--lidar-fov"), (dict(train=(0, 0, 0), val=0), "no scene")])
def test_refusals(tmp_path, wrong, flag):
    with pytest.raises(InputError, match=flag):
        make_world(tmp_path / "world", **{**TINY, **wrong})
    assert not (tmp_path / "world").exists()


def test_command_line_refuses_in_one_line(tmp_path):
    script = Path(__file__).resolve().parent.parent / "miniature/world.py"
    command = [sys.executable, str(script), "--out", str(tmp_path / "world"), "--val", "60"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "ask for fewer" in run.stderr

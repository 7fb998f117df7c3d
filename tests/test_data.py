"""One view: reading, augmenting, projecting, and what a ragged batch is made of."""
import shutil

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image
from runs import open_one

import data
import waffleiron
from plumbing.errors import InputError
from readers import nuscenes
from readers.files import read_image, read_scan
from readers.nuscenes import CAMERAS, SAMPLING
from waffleiron import prepare


def frames_of(root, sampling=SAMPLING, **options):
    """The training frames of a nuScenes root."""
    table = open_one(root).select("train")
    table.sampling = sampling
    defaults = dict(image_size=(80, 160), prepare=prepare, target="labels")
    return data.Frames([table], **(defaults | options))


# ---- frames of a dataset -------------------------------------------------------------------------

def test_real_projection_equals_the_devkit(real):
    from nuscenes.nuscenes import NuScenes
    nusc = NuScenes("v1.0-mini", str(real), verbose=False)
    table = open_one(real, "v1.0-mini")
    assert table.cameras == list(CAMERAS)
    scan = read_scan(table.path("scan", 0))
    for number, camera in enumerate(table.cameras):
        tokens = nusc.sample[0]["data"]
        devkit, devkit_depth, _ = nusc.explorer.map_pointcloud_to_image(tokens["LIDAR_TOP"],
                                                                        tokens[camera])
        visible, pixels, depths = data.project(scan[:, :3], table["cam_from_lidar"][0, number],
                                               table["intrinsics"][0, number],
                                               table["image_size"][0, number])
        inner = (pixels > 1).all(1)  # the devkit leaves a margin of one pixel at the top and left
        assert inner.sum() == devkit.shape[1] > 3000
        # The devkit computes in float32 on global coordinates of some 1000 m.
        np.testing.assert_allclose(pixels[inner][:, ::-1], devkit[:2].T, atol=0.05)
        np.testing.assert_allclose(depths[inner], devkit_depth, atol=1e-3)
        assert (np.diff(visible) > 0).all()


def test_damage_after_the_index_was_built_is_named(tmp_path, world):
    root = tmp_path / "copy"
    shutil.copytree(world, root)
    frames = frames_of(root)
    (table,) = frames.tables
    image = table.path("image", table.rows[0], 0)
    with open(image, "r+b") as file:
        file.truncate(500)
    with pytest.raises(InputError, match="not a readable image"):
        frames[0, 0]
    scan = table.path("scan", table.rows[1])
    with open(scan, "r+b") as file:
        file.truncate(1003)
    with pytest.raises(InputError, match="cut short"):
        frames[0, 1]


def test_labels_without_lidarseg_are_refused(tmp_path, world):
    root = tmp_path / "copy"
    shutil.copytree(world, root)
    shutil.rmtree(root / "lidarseg")
    (root / "v1.0-trainval" / "lidarseg.json").unlink()
    with pytest.raises(InputError, match="8 of 8 frames have no labels; .*lidarseg"):
        frames_of(root)
    assert "labels" not in frames_of(root, target=None)[0, 0]


# ---- one frame -----------------------------------------------------------------------------------

def test_project_by_hand():
    intrinsics = np.array([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]])
    looking_along_x = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    xyz = np.array([[10, 0, 0],      # in the middle
                    [10, -2, 1],     # 2 m to the right, 1 m up: 20 columns right, 10 rows up
                    [0.9, 0, 0],     # nearer than 1 m
                    [-10, 0, 0],     # behind
                    [10, -5, 0]])    # column 100, outside of 100 columns
    visible, pixels, depths = data.project(xyz, looking_along_x, intrinsics, (80, 100))
    assert visible.tolist() == [0, 1]
    np.testing.assert_allclose(pixels, [[40, 50], [30, 70]])
    np.testing.assert_allclose(depths, [10, 10])


def test_cells_of_the_published_release():
    path = SHARED / "golden" / "waffleiron_layernorm.pt"
    if not path.is_file():
        pytest.skip("no golden files here")
    golden = torch.load(path, weights_only=True)
    for cloud, points in enumerate(golden["points"]):
        points = np.asarray(points)
        cells = waffleiron.plane_cells(points[:, :3], SAMPLING["fov"], SAMPLING["cell"])
        np.testing.assert_array_equal(cells.T, golden["cell_ind"][cloud, :, :len(points)])
        features = waffleiron.point_features(points[:, :3], points[:, 3], *SAMPLING["intensity"])
        np.testing.assert_allclose(features.T, golden["feats"][cloud, :, :len(points)], atol=1e-5)
        found = np.sort(waffleiron.nearest_neighbors(points[:, :3], 16))
        expected = np.sort(golden["neighbors"][cloud, 1:, :len(points)].numpy().T)
        same = (found == expected).all(1)
        assert same.mean() > 0.99  # but for ties


def test_plane_sizes():
    assert waffleiron.plane_sizes((64, 64, 8), 0.5) == ((256, 256), (256, 32), (256, 32))


def test_nearest_neighbors_are_others_and_nearest():
    rng = np.random.default_rng(0)
    xyz = rng.normal(size=(200, 3))
    # Coinciding points, so many at one place that not all are found.
    xyz[50:60] = xyz[40:50]
    xyz[100:120] = xyz[100]
    found = waffleiron.nearest_neighbors(xyz, 5)
    distance = np.linalg.norm(xyz[:, None] - xyz[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert not (found == np.arange(200)[:, None]).any()
    nearest = np.sort(distance, 1)[:, :5]
    np.testing.assert_allclose(nearest, np.take_along_axis(distance, found, 1))


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_small_clouds_have_neighbors(count):
    found = waffleiron.nearest_neighbors(np.random.default_rng(0).normal(size=(count, 3)), 16)
    assert found.shape == (count, 16)
    for point, row in enumerate(found):
        others = row[:max(count - 1, 1)]
        expected = [other for other in range(count) if other != point]
        assert sorted(others) == (expected or [0])
        assert (row == np.resize(others, 16)).all()  # the ones that there are, again and again


def test_one_point_per_voxel():
    xyz = np.array([[0.01, 0, 0], [0.09, 0, 0], [0.11, 0, 0], [-0.01, 0, 0]])
    assert data.one_per_voxel(xyz, 0.1).tolist() == [0, 2, 3]  # the first of each voxel
    drawn = set()
    for seed in range(20):
        kept = data.one_per_voxel(xyz, 0.1, np.random.default_rng(seed))
        drawn.add(tuple(kept.tolist()))
    assert drawn == {(0, 2, 3), (1, 2, 3)}


def test_nearest_to_a_point():
    xyz = np.array([[5.0, 0, 0], [1, 0, 0], [2, 0, 0], [9, 0, 0]])
    assert data.nearest_to(xyz, np.zeros(3), 2).tolist() == [1, 2]


def test_nearest_point_wins_on_a_pixel():
    pixels = np.array([[3.2, 4.9], [3.7, 4.1], [3.2, 5.0]])
    assert data.nearest_per_pixel(pixels, np.array([9.0, 7.0, 8.0])).tolist() == [1, 2]


def test_rotation_and_flips_keep_geometry():
    xyz = np.random.default_rng(1).normal(size=(50, 3))
    determinants = set()
    for seed in range(30):
        moved = data.rotate_and_flip(xyz, np.random.default_rng(seed))
        np.testing.assert_allclose(np.linalg.norm(moved - moved[0], axis=1),
                                   np.linalg.norm(xyz - xyz[0], axis=1))
        np.testing.assert_allclose(moved[:, 2], xyz[:, 2])
        matrix = np.linalg.lstsq(xyz, moved, rcond=None)[0]
        determinants.add(int(np.sign(np.linalg.det(matrix))))
    assert determinants == {1, -1}  # with and without a flip


def test_a_rotated_scan_with_a_rotated_camera_gives_the_same_pixels(world):
    """Turning the LiDAR's frame of reference, and telling the calibration so, changes nothing."""
    table = open_one(world)
    scan = read_scan(table.path("scan", 0))[:, :3].astype(float)
    angle = 0.7
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    camera = table["intrinsics"][0, 0], table["image_size"][0, 0]
    cam_from_lidar = table["cam_from_lidar"][0, 0]
    before = data.project(scan, cam_from_lidar, *camera)
    after = data.project(scan @ turn[:3, :3].T, cam_from_lidar @ np.linalg.inv(turn), *camera)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_allclose(before[1], after[1], atol=1e-6)


@pytest.mark.parametrize("factor, exact", [(1, True), (2, True), (4, False), (9, False)])
def test_jpegs_decoded_at_a_part_of_their_resolution_look_the_same(tmp_path, factor, exact):
    rng = np.random.default_rng(0)
    h, w = 40 * factor, 80 * factor
    coarse = Image.fromarray(rng.integers(0, 256, (12, 24, 3), dtype=np.uint8))
    smooth = np.array(coarse.resize((w, h), Image.Resampling.BICUBIC))
    noisy = np.clip(smooth + rng.normal(0, 6, (h, w, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(tmp_path / "image.jpg", quality=92)

    with Image.open(tmp_path / "image.jpg") as image:
        small = image.convert("RGB").resize((80, 40), Image.Resampling.BILINEAR)
    whole = np.array(small).transpose(2, 0, 1).astype(int)
    difference = np.abs(read_image(tmp_path / "image.jpg", (40, 80)).numpy() - whole)
    if exact:
        assert difference.max() <= 1
    else:
        assert difference.mean() < 1.5
        assert difference.max() < 16


@pytest.mark.parametrize("raw", [(50, 90), (113, 97), (450, 800), (30, 60), (17, 31)])
def test_resizing_is_pils_to_one_level(tmp_path, raw):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*raw, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    expected = np.array(image.resize((60, 30), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    found = read_image(tmp_path / "image.png", (30, 60)).numpy()
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.25


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((80, 160, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = read_image(tmp_path / "stripes.png", (20, 40)).numpy()
    assert small.shape == (3, 20, 40)
    assert abs(small[:, :, 2:-2].astype(int) - 127).max() < 16


# ---- dataset and batch ---------------------------------------------------------------------------

def same(a, b):
    """Whether two items, or their parts, are equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_an_item_is_a_function_of_seed_epoch_and_number(world):
    frames = frames_of(world, points="augmented", seed=3)
    again = frames_of(world, points="augmented", seed=3)
    other = frames_of(world, points="augmented", seed=4)
    assert same(frames[2, 1], again[2, 1])
    assert not same(frames[2, 1], frames[3, 1])
    assert not same(frames[2, 1], other[2, 1])
    plain = frames_of(world)
    assert same(plain[0, 1], plain[5, 1])  # nothing random in evaluation


def test_item_shapes_and_values(world):
    item = frames_of(world)[0, 0]
    n = len(item["pixels"])
    assert n > 500
    assert item["image"].shape == (3, 80, 160)
    assert item["image"].dtype == torch.uint8
    inputs = item["inputs"]
    assert inputs["points"].shape == (n, 5)
    assert inputs["cells"].shape == (n, 3)
    assert inputs["neighbors"].shape == (n, 16)
    assert item["labels"].shape == item["depths"].shape == (n,)
    assert item["labels"].max() <= 16
    assert (item["depths"] > 1).all()
    assert (item["pixels"] >= 0).all()
    assert (item["pixels"] < torch.tensor([80, 160])).all()
    planes = waffleiron.plane_sizes(SAMPLING["fov"], SAMPLING["cell"])
    for cells, (h, w) in zip(inputs["cells"].T, planes):
        assert cells.min() >= 0
        assert cells.max() < h * w


def test_point_limit_keeps_a_ball(world):
    frames = frames_of(world, SAMPLING | {"max_points": 100})
    xyz = frames[0, 0]["inputs"]["points"][:, 1:4]
    assert len(xyz) == 100
    everything = frames_of(world)[0, 0]["inputs"]["points"][:, 1:4]
    radius = (xyz - xyz.mean(0)).norm(dim=1).max()
    assert radius < 0.5 * (everything - everything.mean(0)).norm(dim=1).max()


def test_depth_items_have_one_point_a_pixel(world, monkeypatch):
    monkeypatch.setattr(data, "DEPTHS", (0.1, 30.0))
    frames = frames_of(world, prepare=None, target="depths")
    item = frames[0, 0]
    whole = item["pixels"].floor()
    assert len(torch.unique(whole, dim=0)) == len(whole)
    assert item["depths"].max() <= 30


def test_a_whole_scan(world):
    # In training: the points that are kept, and no camera.
    frames = frames_of(world, SAMPLING | {"max_points": 300}, cameras="scan", points="random")
    item = frames[0, 0]
    (table,) = frames.tables
    scan = read_scan(table.path("scan", table.rows[0]))
    assert len(frames) == 8
    assert not {"pixels", "depths", "image"} & set(item)
    assert len(item["inputs"]["points"]) == len(item["labels"]) == 300

    # In evaluation: a label for every point, and the nearest kept one, without a limit.
    sampling = SAMPLING | {"voxel": 2.0, "max_points": 10}
    item = frames_of(world, sampling, cameras="scan", points="every")[0, 0]
    kept = item["inputs"]["points"][:, 1:4]
    assert len(kept) > 10
    assert len(item["labels"]) == len(item["nearest"]) == len(scan) > 1.5 * len(kept)
    every = torch.from_numpy(scan[:, :3].copy())
    distances = torch.cdist(every.double(), kept.double())  # [every point, kept point]
    to_nearest = distances.gather(1, item["nearest"][:, None])[:, 0]
    torch.testing.assert_close(to_nearest, distances.min(1).values)


def test_a_batch_of_whole_scans(world):
    frames = frames_of(world, SAMPLING | {"voxel": 2.0}, cameras="scan", points="every")
    items = [frames[0, 0], frames[0, 3]]
    batch = data.collate(items)
    kept = len(items[0]["inputs"]["points"])  # rows before the second scan's
    labels = [len(item["labels"]) for item in items]
    assert torch.equal(batch["nearest"][labels[0]:], items[1]["nearest"] + kept)
    assert torch.equal(batch["view"][batch["nearest"]].bincount(), torch.tensor(labels))


def test_what_a_sensor_gives_is_the_reader_s_and_the_file_s(copy, monkeypatch):
    plain = frames_of(copy, target=None)[0, 0]
    frames = frames_of(copy, target=None)
    (table,) = frames.tables
    image = table.path("image", table.rows[0], 0)
    Image.fromarray(np.array(Image.open(image)) // 2).save(image, "PNG")
    monkeypatch.setattr(nuscenes, "scan", lambda path: read_scan(path)[::2])
    dark = frames[0, 0]
    difference = dark["image"].int() - plain["image"].int() // 2
    assert difference.abs().float().mean() < 2
    assert len(dark["pixels"]) < 0.6 * len(plain["pixels"])


def test_all_cameras_of_the_real_frame(real):
    tables = [open_one(real, "v1.0-mini").select("train")]
    frames = data.Frames(tables, "all", (224, 448), prepare)
    assert len(frames) == 6
    assert len({len(frames[0, n]["pixels"]) for n in range(6)}) == 6
    one = data.Frames(tables, "random", (224, 448), prepare)
    drawn = {one[epoch, 0]["pixels"].shape[0] for epoch in range(40)}
    assert len(one) == 1
    assert len(drawn) == 6
    with pytest.raises(InputError, match="CAM_FRNT"):
        data.Frames(tables, "CAM_FRNT")


def test_collate_keeps_neighbors_within_their_cloud(world):
    frames = frames_of(world)
    items = [frames[0, n] for n in range(3)]
    batch = data.collate(items)
    assert batch["image"].shape == (3, 3, 80, 160)
    inputs = batch["inputs"]
    own_cloud = batch["view"][:, None].expand(-1, 16)
    assert torch.equal(batch["view"][inputs["neighbors"]], own_cloud)
    for number, item in enumerate(items):
        rows = batch["view"] == number
        alone = item["inputs"]
        assert torch.equal(inputs["points"][rows], alone["points"])
        assert torch.equal(inputs["cells"][rows], alone["cells"])
        own = inputs["points"][inputs["neighbors"][rows]]
        assert torch.equal(own, alone["points"][alone["neighbors"]])

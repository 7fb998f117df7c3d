"""Crops that carry where their tokens are: pictures whose pixels are their own coordinates."""
import shutil

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image

import s3pt.crops
from plumbing.errors import InputError
from readers.table import open_tables
from s3pt.crops import (Crops, Views, collate, cut, distorted, draw_box, token_depths,
                        token_positions)
from s3pt.depth import LidarDepth

VIEWS = Views(crop=64, local_crops=3, local_crop=32, patch=8, clusters=16)


def patch_means(values, grid):
    """Means [P, C] over the patches of an array [S, S, C]."""
    side = len(values) // grid
    blocks = values.reshape(grid, side, grid, side, -1)
    return blocks.mean((1, 3)).reshape(grid * grid, -1)


# ---- boxes ---------------------------------------------------------------------------------------

def test_boxes_have_the_scale_and_ratio_that_are_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array([draw_box(rng, (400, 500), (0.25, 0.6)) for _ in range(500)])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= 400).all() and (left + w <= 500).all()
    area = h * w / (400 * 500)
    assert 0.245 < area.min() < 0.27 and 0.57 < area.max() < 0.605
    assert 0.745 < (w / h).min() < 0.8 and 1.25 < (w / h).max() < 1.34
    assert len(set(top)) > 50 and len(set(left)) > 50


def test_a_wide_picture_has_a_centre_crop_in_place_of_a_large_one():
    assert draw_box(np.random.default_rng(0), (900, 1600), (0.99, 1.0)) == (0, 200, 900, 1200)
    assert draw_box(np.random.default_rng(0), (1600, 900), (0.99, 1.0)) == (200, 0, 1200, 900)


# ---- positions and depths ------------------------------------------------------------------------

BOXES = [(10, 30, 128, 128), (3, 100, 97, 120), (0, 0, 200, 200), (60, 20, 64, 71)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("flipped", [False, True])
def test_positions_are_those_that_the_pixels_say(box, flipped):
    x, y = np.meshgrid(np.arange(250.0), np.arange(220.0))
    maps = [Image.fromarray(values.astype(np.float32)) for values in (x, y)]
    crops = np.stack([np.array(cut(image, (220, 250), box, 64)) for image in maps], -1)
    crops = crops[:, ::-1] if flipped else crops
    found = token_positions(box, flipped, (8, 8))
    assert np.abs(found - patch_means(crops, 8)).max() < 0.5


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("flipped", [False, True])
def test_depths_are_those_of_the_positions(box, flipped):
    """Of a picture whose depth is a function of its coordinates, at a quarter of its size."""
    def depth_at(x, y):
        return 5 + 0.1 * x + 0.2 * y
    x, y = np.meshgrid(np.arange(62) * 4 + 1.5, np.arange(55) * 4 + 1.5)
    depths = depth_at(x, y).astype(np.float32)
    found = token_depths(depths, np.array([220, 248]), box, flipped, (8, 8))
    x, y = token_positions(box, flipped, (8, 8)).T
    # Half a pixel of the map, which is 4 pixels wide, in each direction
    assert np.abs(found - depth_at(x, y)).max() < (0.1 + 0.2) * 2 + 1e-5


def test_a_tokens_depth_is_the_mean_of_what_is_known():
    depths = np.zeros((4, 6), np.float32)
    depths[0, 0], depths[1, 1] = 4, 8
    depths[2:, 2:4] = 30
    found = token_depths(depths, np.array([4, 6]), (0, 0, 4, 6), False, (2, 3))
    assert found[0] == 6 and found[4] == 30
    assert np.isnan(found[[1, 2, 3, 5]]).all()
    flipped = token_depths(depths, np.array([4, 6]), (0, 0, 4, 6), True, (2, 3))
    assert flipped[2] == 6 and flipped[4] == 30


def test_tokens_finer_than_the_map_take_the_pixel_that_they_are_in():
    depths = np.array([[1, 2], [3, 4]], np.float32)
    found = token_depths(depths, np.array([8, 8]), (0, 0, 8, 8), False, (8, 8)).reshape(8, 8)
    assert (found[:4, :4] == 1).all() and (found[4:, 4:] == 4).all()


# ---- colours -------------------------------------------------------------------------------------

def test_colours_change_and_places_stay():
    rng = np.random.default_rng(0)
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, 20:] = (200, 120, 40)
    image = Image.fromarray(pixels)
    changed = [np.array(distorted(image, rng, 0, 0)) for _ in range(30)]
    assert len({result.tobytes() for result in changed}) > 15
    for result in changed:
        assert result.shape == (40, 40, 3)
        left, right = result[:, :20].reshape(-1, 3), result[:, 20:].reshape(-1, 3)
        assert (left == left[0]).all() and (right == right[0]).all()
    grey = [result for result in changed if (np.ptp(result[0, -1]) <= 1)]
    assert 1 <= len(grey) <= 15  # one in five


def test_each_kind_of_crop_has_its_probabilities_of_blur_and_solarisation(tables, monkeypatch):
    """DINO's: the first crop, the second, the small ones."""
    asked = []

    def noted(image, rng, blur, solarise):
        asked.append((blur, solarise))
        return image
    monkeypatch.setattr(s3pt.crops, "distorted", noted)
    Crops(tables, VIEWS)[0, 0]
    assert asked == [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0), (0.5, 0.0), (0.5, 0.0)]


def test_blur_mixes_neighbours_and_solarisation_turns_the_light():
    edge = np.zeros((40, 40, 3), np.uint8)
    edge[:, 20:] = 255
    image = Image.fromarray(edge)
    rng = np.random.default_rng(0)
    between = np.array(distorted(image, rng, 1, 0))[20, 20].astype(int)
    assert 0 < between.min() < 255
    solarised = np.array(distorted(image, np.random.default_rng(3), 0, 1))
    assert solarised[:, 30].max() < 128  # 255 becomes 0, if it was not darkened below 128


# ---- items ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tables(world):
    return [table.select("all") for table in open_tables(str(world))]


def everywhere(table, frame, camera):
    """A map whose depth is 10 m on the left half, unknown on the right."""
    depths = np.zeros((80, 160), np.float32)
    depths[:, :80] = 10
    return depths


def test_an_items_crops_are_where_its_positions_say(tmp_path, monkeypatch):
    """Of a picture whose red is its column and whose green is its row; and whose depth is 10 m more
    than both."""
    y, x = np.mgrid[:200, :240].astype(np.uint8)
    Image.fromarray(np.stack([x, y, 0 * x], -1)).save(tmp_path / "places.png")
    monkeypatch.setattr(s3pt.crops, "distorted", lambda image, *_: image)
    depths = 10 + x.astype(np.float32) + y
    crops = Crops(open_tables(f"pictures={tmp_path}"), VIEWS, lambda *_: depths)
    turned = set()
    for epoch in range(8):
        item = crops[epoch, 0]
        for image, positions, metres in zip(item["image"], item["positions"].split(64),
                                            item["depths"].split(64)):
            pixels = image[:2].permute(1, 2, 0).double().numpy()  # [64, 64, 2]
            found = patch_means(pixels, 8)
            assert np.abs(found - positions.numpy()).max() < 0.5
            # Half a pixel in each direction
            assert np.abs(10 + positions.sum(1) - metres).max() <= 1
            turned.add(bool(positions[0, 0] > positions[7, 0]))
    assert turned == {False, True}


def test_an_item_has_two_large_crops_small_ones_and_their_tokens(tables):
    crops = Crops(tables, VIEWS, everywhere)
    item = crops[0, 3]
    assert item["image"].shape == (2, 3, 64, 64) and item["image"].dtype == torch.uint8
    assert item["local"].shape == (3, 3, 32, 32)
    assert item["positions"].shape == (128, 2) and item["depths"].shape == (128,)
    assert len(set(item["start"].tolist())) == 16 and 0 <= min(item["start"])
    assert max(item["start"]) < 128
    # A token has a depth where the picture has one
    known = item["depths"].isfinite()
    assert (item["depths"][known] == 10).all()
    assert (item["positions"][known, 0] < 84).all() and (item["positions"][~known, 0] > 75).all()
    assert 0 < known.sum() < 128


def test_without_a_source_of_depths_all_are_missing_and_without_clusters_there_are_none(tables):
    assert Crops(tables, VIEWS)[0, 0]["depths"].isnan().all()
    item = Crops(tables, VIEWS._replace(clusters=0, local_crops=0))[0, 0]
    assert list(item) == ["image", "draws"]


def test_items_are_functions_of_seed_epoch_and_number(tables):
    def same(first, second):
        return all(torch.equal(a.nan_to_num(), b.nan_to_num())
                   for a, b in zip(first.values(), second.values()))
    crops = Crops(tables, VIEWS, everywhere)
    assert same(crops[1, 5], Crops(tables, VIEWS, everywhere)[1, 5])
    assert not same(crops[1, 5], crops[2, 5])
    assert not same(crops[1, 5], Crops(tables, VIEWS, everywhere, seed=1)[1, 5])
    batch = collate([crops[0, 1], crops[0, 2]])
    assert batch["image"].shape == (2, 2, 3, 64, 64) and batch["start"].shape == (2, 16)
    assert same(crops[0, 2], {name: values[1] for name, values in batch.items()})


def test_every_picture_of_every_split_is_an_item(tables):
    crops = Crops(tables, VIEWS)
    assert len(crops) == len(tables[0]) == 14  # 8 scenes to train on, 2 layouts in 3 conditions
    assert len({crops.name((0, number)) for number in range(14)}) == 14


def test_a_picture_that_cannot_be_read_is_named_or_replaced(world, tmp_path):
    for path in (world / "samples/CAM_FRONT").glob("*.jpg"):
        shutil.copy(path, tmp_path)
    tables = open_tables(f"pictures={tmp_path}")
    crops = Crops(tables, VIEWS)
    path = tmp_path / crops.name((0, 2))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError) as error:
        crops[0, 2]
    assert path.name in str(error.value)
    item = Crops(tables, VIEWS, skip_bad=True)[0, 2]
    assert torch.equal(item["image"], crops[0, 3]["image"])
    assert path.name in collate([item])["bad"][0][1]


def test_a_picture_without_depths_is_replaced_where_bad_frames_are_skipped(tables):
    """As where no point of its scan is in view."""
    def depth(table, frame, camera):
        if frame == tables[0].rows[2]:
            raise InputError("no LiDAR point of its scan is in view")
        return everywhere(table, frame, camera)
    with pytest.raises(InputError, match="no LiDAR point"):
        Crops(tables, VIEWS, depth)[0, 2]
    item = Crops(tables, VIEWS, depth, skip_bad=True)[0, 2]
    assert torch.equal(item["image"], Crops(tables, VIEWS, depth)[0, 3]["image"])
    assert "no LiDAR point" in item["bad"][0][1]


def test_a_large_jpeg_is_decoded_no_larger_than_its_crops_need(tmp_path, monkeypatch):
    """And gives nearly the crop of the whole."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (45, 80, 3), dtype=np.uint8))
    (tmp_path / "pictures").mkdir()
    small.resize((1600, 900), Image.Resampling.BICUBIC).save(tmp_path / "pictures/a.jpg")
    tables = open_tables(f"pictures={tmp_path}/pictures")
    sizes = []
    decoded = s3pt.crops.decoded

    def noted(path, least, raw_size):
        image = decoded(path, least if fast else raw_size, raw_size)
        sizes.append(image.size)
        return image
    monkeypatch.setattr(s3pt.crops, "decoded", noted)
    monkeypatch.setattr(s3pt.crops, "distorted", lambda image, *_: image)
    crops = Crops(tables, Views(clusters=0))
    fast = True
    found = [crops[epoch, 0]["image"].float() for epoch in range(4)]
    fast = False
    whole = [crops[epoch, 0]["image"].float() for epoch in range(4)]
    assert all(width <= 800 for width, _ in sizes[:4]) and set(sizes[4:]) == {(1600, 900)}
    assert max((a - b).abs().mean().item() for a, b in zip(found, whole)) < 1.5


def test_crops_of_real_pictures_carry_their_places_and_depths(tmp_path):
    root = SHARED / "real" / "pandaset"
    if not root.is_dir():
        pytest.skip("no real frames here")
    crops = Crops(open_tables(f"pandaset64={root}"), Views(), LidarDepth(folder=tmp_path))
    item = crops[0, 0]
    height, width = crops.tables[0]["image_size"][0, 0]
    x, y = item["positions"].T
    assert 0 <= x.min() and x.max() < width and 0 <= y.min() and y.max() < height
    assert item["image"].float().std() > 5
    # On a street what is lower in the picture is nearer
    known = item["depths"].isfinite()
    assert known.float().mean() > 0.3
    depths = item["depths"][known]
    assert 0.5 < depths.min() and depths.max() < 100
    assert torch.corrcoef(torch.stack([y[known], depths]))[0, 1] < -0.3

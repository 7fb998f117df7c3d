"""Dense labels: sizes, crops, colours, items, sliding windows, losses, what is made of counts."""
import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import dense
from dense import (Pictures, classes_of, collate, cross_entropies, distort, fitted, on_common,
                   padded, percents, place_of_crop, slide, starts, table_of)
from plumbing.errors import InputError
from readers import nuimages
from readers.frame_table import FrameTable

COLOUR = torch.tensor([0.5, 0.4, 0.3])


# ---- sizes and windows ---------------------------------------------------------------------------

def test_sizes_by_hand():
    assert fitted((900, 1600), (2048, 512)) == (512, 910)      # 1600 * 512 / 900 = 910.2
    assert fitted((1600, 900), (2048, 512)) == (910, 512)
    assert fitted((1024, 2048), (2049, 1025)) == (1025, 2049)  # 2049 / 2048 is the smaller factor
    assert fitted((100, 1000), (500, 400)) == (50, 500)        # by the longer side
    assert fitted((900, 1600), (2048, 512), 0.5) == (256, 455)
    assert fitted((80, 160), None) == (80, 160)
    assert fitted((80, 161), None, 1.5) == (120, 242)


def test_windows_of_the_papers_images():
    assert starts(910, 512, 480) == [0, 398]
    assert starts(512, 512, 480) == [0]
    assert starts(300, 512, 480) == [0]
    assert starts(2049, 768, 512) == [0, 512, 1024, 1281]


def test_windows_cover_everything_and_lie_inside():
    for length in range(1, 40):
        for crop in range(1, 12):
            for stride in range(1, crop + 1):
                seen = np.zeros(max(length, crop), int)
                for start in starts(length, crop, stride):
                    assert 0 <= start <= max(length - crop, 0)
                    seen[start:start + crop] += 1
                assert seen.min() >= 1


def test_overlapping_windows_of_a_constant_prediction_are_constant():
    def predict(windows):
        return torch.tensor([3.0, -1.0]).view(1, 2, 1, 1).expand(len(windows), 2, 2, 2)
    logits = slide(torch.rand(3, 13, 29), 8, 5, COLOUR, predict, at_once=3)
    assert logits.shape == (2, 13, 29)
    torch.testing.assert_close(logits, torch.tensor([3.0, -1.0]).view(2, 1, 1).expand(2, 13, 29))


def test_logits_of_overlapping_windows_are_averaged():
    def predict(windows):  # 0 in the first window, 1 in the second
        return torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    logits = slide(torch.rand(3, 4, 6), 4, 2, COLOUR, predict)
    assert logits.tolist() == [[[0, 0, 0.5, 0.5, 1, 1]] * 4]


def test_one_window_where_the_image_fits_in_whole_patches_of_the_mean_colour():
    calls = []

    def predict(windows):
        calls.append(windows)
        return windows
    image = torch.rand(3, 5, 8)
    assert torch.equal(slide(image, 8, 3, COLOUR, predict), image)
    assert torch.equal(slide(image, 12, 3, COLOUR, predict, patch=3), image)
    ((as_it_is,), (window,)) = calls
    assert torch.equal(as_it_is, image)
    assert window.shape == (3, 6, 9)
    assert torch.equal(window[:, :5, :8], image)
    beside = torch.ones(6, 9, dtype=torch.bool)
    beside[:5, :8] = False
    assert torch.equal(window[:, beside], COLOUR.view(3, 1).expand(3, 6 + 8))


def test_nothing_is_padded_that_is_large_enough():
    image = torch.randint(0, 256, (3, 6, 9), dtype=torch.uint8)
    assert torch.equal(padded(image, (6, 9), torch.zeros(3)), image)
    assert padded(image, (8, 9), torch.full((3,), 7))[:, 6:, :].unique().tolist() == [7]


# ---- crops and colours ---------------------------------------------------------------------------

def test_a_crop_has_no_class_too_often():
    labels = np.ones((40, 200), np.uint8)
    labels[:, 150:] = 2
    found = []
    for seed in range(50):
        top, left = place_of_crop(labels, 40, np.random.default_rng(seed))
        assert top == 0 and 0 <= left <= 160
        found.append((labels[:, left:left + 40] == 1).mean())
    # Of 161 places 20 have at most 3/4 of either class: ten tries find one in three of four cases
    assert 0.5 < np.mean([0.25 <= share <= 0.75 for share in found]) < 1


def test_pixels_without_a_class_do_not_count_in_a_crop():
    labels = np.zeros((10, 100), np.uint8)
    labels[:, :2] = 1
    labels[:, 2:4] = 2
    places = [place_of_crop(labels, 50, np.random.default_rng(seed))[1] for seed in range(40)]
    # At 0 and 1 alone, of 51 places, there are enough of two classes: ten tries find one of them
    # in a third of the cases, one try in 1/25
    assert 0.15 < np.mean(np.array(places) <= 1) < 0.6


class Scripted:
    """A generator whose uniform draws are these; `applied`: whether each of them is."""

    def __init__(self, values, applied, contrast_first=True):
        self.values = list(values)
        self.coins = [0.0 if used else 0.9 for used in applied]
        self.coins.append(0.0 if contrast_first else 0.9)

    def uniform(self, least, most):
        return self.values.pop(0)

    def random(self):
        return self.coins.pop(0)


def distorted(colour, values, applied, **options):
    image = Image.new("RGB", (2, 1), colour)
    return distort(image, Scripted(values, applied, **options)).getpixel((0, 0))


def test_each_distortion_by_hand():
    values = 20, 0.5, 0.5, 30  # brightness, contrast, saturation, hue: a sixth of the circle
    none = [False] * 4
    assert distorted((200, 100, 0), values, none) == (200, 100, 0)
    assert distorted((250, 100, 0), values, [True, False, False, False]) == (255, 120, 20)
    assert distorted((200, 100, 0), values, [False, True, False, False]) == (100, 50, 0)
    grey = distorted((200, 100, 0), values, [False, False, True, False])
    assert np.allclose(grey, (200, 150, 100), atol=2)
    yellow = distorted((255, 0, 0), values, [False, False, False, True])
    assert np.allclose(yellow, (255, 255, 0), atol=4)


def test_contrast_comes_before_or_after_the_colours():
    values = 0, 1.5, 0.0, 0  # contrast, and no saturation: the largest channel in all three
    both = [False, True, True, False]
    assert distorted((200, 100, 100), values, both) == (255, 255, 255)
    assert distorted((200, 100, 100), values, both, contrast_first=False) == (255, 255, 255)
    # With half the saturation, clipping before and after is not the same
    values = 0, 1.5, 0.5, 0
    first = distorted((200, 100, 100), values, both)
    last = distorted((200, 100, 100), values, both, contrast_first=False)
    assert np.allclose(first, (255, 202, 202), atol=2)  # of (255, 150, 150)
    assert np.allclose(last, (255, 225, 225), atol=2)   # of (200, 150, 150)


def test_distortions_are_of_the_protocol_s_size():
    image = Image.new("RGB", (1, 1), (128, 128, 128))
    found = [distort(image, np.random.default_rng(seed)).getpixel((0, 0))[0]
             for seed in range(200)]
    assert min(found) >= (128 - 32) // 2 and max(found) <= (128 + 32) * 3 // 2
    assert min(found) < 70 and max(found) > 200
    assert 0.15 < np.mean(np.array(found) == 128) < 0.35  # neither brightness nor contrast


# ---- items ---------------------------------------------------------------------------------------

COLOURS = np.array([[120, 120, 120], [250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]])


@pytest.fixture
def flat(tmp_path, monkeypatch):
    """Three pictures of 60 x 100 whose colours say their labels, as a dataset `flat`."""
    reader = types.ModuleType("readers.flat")
    reader.CLASSES = ("ignore", "a", "b", "c", "d")
    reader.labels = lambda path, count=None: np.load(path)
    monkeypatch.setitem(sys.modules, "readers.flat", reader)
    rng = np.random.default_rng(0)
    for number in range(3):
        blocks = rng.integers(1, 5, (3, 5))
        labels = blocks.repeat(20, 0).repeat(20, 1).astype(np.uint8)
        np.save(tmp_path / f"{number}.npy", labels)
        Image.fromarray(COLOURS[labels].astype(np.uint8)).save(tmp_path / f"{number}.png")
    columns = {"split": np.full(3, b"train"),
               "image": np.array([[b"0.png"], [b"1.png"], [b"2.png"]]),
               "labels": np.array([b"0.npy", b"1.npy", b"2.npy"]),
               "image_size": np.full((3, 1, 2), (60, 100))}
    return FrameTable(reader, tmp_path, columns)


def mismatches(image, labels):
    """Share of pixels, further than two from a border or the edge, of another colour than their
    label's."""
    colours = torch.tensor(COLOURS)[labels.long()].permute(2, 0, 1)  # [3, H, W]
    off = (image.int() - colours).abs().amax(0) > 4
    around = torch.nn.functional.max_pool2d(labels[None].float(), 5, 1, 2)
    least = -torch.nn.functional.max_pool2d(-labels[None].float(), 5, 1, 2)
    inside = (around == least)[0]
    inside[:2] = inside[-2:] = inside[:, :2] = inside[:, -2:] = False
    assert inside.float().mean() > 0.2
    return off[inside].float().mean().item()


def test_a_crop_s_labels_stay_with_its_colours(flat, monkeypatch):
    monkeypatch.setattr(dense, "distort", lambda image, rng: image)
    colour = torch.tensor(COLOURS[0]) / 255  # what is padded is of label 0, too
    pictures = Pictures([flat], (100, 60), colour, crop=48, seed=3)
    assert len(pictures) == pictures.frame_count() == 3
    padded_items = 0
    for epoch in range(8):
        for number in range(3):
            item = pictures[epoch, number]
            assert item["image"].shape == (3, 48, 48) and item["image"].dtype == torch.uint8
            assert item["labels"].shape == (48, 48)
            assert mismatches(item["image"], item["labels"]) == 0
            padded_items += bool((item["labels"][-8:] == 0).all())
    assert 2 < padded_items < 20  # where the picture has become smaller than the crop


def test_pictures_are_made_half_to_twice_as_large(flat, monkeypatch):
    factors = []

    def fitted_and_noted(size, scale, factor):
        factors.append(factor)
        return fitted(size, scale, factor)
    monkeypatch.setattr(dense, "fitted", fitted_and_noted)
    pictures = Pictures([flat], (100, 60), COLOUR, crop=8)
    for epoch in range(30):
        pictures[epoch, 0]
    assert 0.5 <= min(factors) < 0.7 and 1.8 < max(factors) <= 2
    factors.clear()
    whole = Pictures([flat], (100, 60), COLOUR)
    assert whole[0, 0]["image"].shape == (3, 60, 100) and factors == [1.0]


def test_an_item_is_a_function_of_seed_epoch_and_number(flat):
    def item(key, seed=3):
        return Pictures([flat], None, COLOUR, crop=32, seed=seed)[key]["image"]
    assert torch.equal(item((1, 2)), item((1, 2)))
    for other in (item((2, 2)), item((1, 0)), item((1, 2), seed=4)):
        assert not torch.equal(other, item((1, 2)))


def test_about_half_of_the_crops_are_flipped(flat, monkeypatch):
    monkeypatch.setattr(dense, "distort", lambda image, rng: image)
    monkeypatch.setattr(dense, "FACTORS", (1.0, 1.0))
    rows = np.arange(100, dtype=np.uint8)[None].repeat(60, 0)
    monkeypatch.setattr(flat.reader, "labels", lambda path, count=None: rows)
    pictures = Pictures([flat], None, COLOUR, crop=50)
    steps = [pictures[epoch, 0]["labels"].int().diff(dim=1).unique().tolist()
             for epoch in range(60)]
    assert all(step in ([1], [255 - 256]) for step in steps)
    assert 18 <= steps.count([-1]) <= 42


def test_a_whole_picture_keeps_its_labels(flat):
    item = Pictures([flat], (80, 70), COLOUR)[0, 1]
    assert item["image"].shape == (3, 48, 80)
    assert np.array_equal(item["labels"], np.load(flat.path("labels", 1)))
    assert item["condition"] == -1
    small = torch.from_numpy(dense.resized_labels(item["labels"].numpy(), (48, 80)))
    assert mismatches(item["image"], small) == 0


def test_labels_of_another_size_are_named_and_skipped_if_asked(flat):
    np.save(flat.path("labels", 1), np.zeros((60, 99), np.uint8))
    with pytest.raises(InputError, match="1.png: 60x100 pixels, and labels of 60x99"):
        Pictures([flat], None, COLOUR)[0, 1]
    pictures = Pictures([flat], None, COLOUR, crop=32, skip_bad=True)
    batch = collate([pictures[0, 0], pictures[0, 1]])
    assert batch["image"].shape == (2, 3, 32, 32) and batch["labels"].shape == (2, 32, 32)
    ((frame, reason),) = batch["bad"]
    assert frame == 1 and "labels of 60x99" in reason
    assert pictures.name((0, 1)) == "1.png"


def test_data_without_labels_of_pixels_are_refused(flat):
    columns = {"split": np.array([b"train"]), "image": np.array([[b"a.jpg"]])}
    drawn = FrameTable(nuimages, "there", columns)
    assert classes_of([flat]) == flat.reader.CLASSES
    assert classes_of([drawn])[-2:] == ("ego_vehicle", "background")
    with pytest.raises(InputError, match="flat and nuimages have other classes"):
        classes_of([flat, drawn])
    drawn.columns = columns | {"scan": np.array([b"a.bin"])}
    with pytest.raises(InputError, match="--data there: nuimages has no labels of pixels"):
        classes_of([drawn])
    del flat.reader.CLASSES
    with pytest.raises(InputError, match="flat has no labels of pixels"):
        classes_of([flat])


# ---- losses and counts ---------------------------------------------------------------------------

def test_loss_of_undecided_heads_and_of_ignored_pixels():
    logits = torch.zeros(2, 2, 5, 3, 4, requires_grad=True)  # [B, K, C, h, w]
    labels = torch.zeros(2, 6, 8, dtype=torch.uint8)
    sums, count = cross_entropies(logits, labels)
    assert count == 0 and sums.tolist() == [0, 0]
    labels[0, :2, :3] = torch.tensor([1, 5, 2])
    sums, count = cross_entropies(logits, labels)
    assert count == 6
    assert sums.tolist() == pytest.approx([6 * math.log(5)] * 2)
    sums[1].backward()
    assert logits.grad[:, 0].abs().max() == 0
    assert logits.grad[0, 1].abs().max() > 0 and logits.grad[1].abs().max() == 0


def test_logits_are_up_sampled_without_moving_the_corners_together():
    logits = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    found = dense.up_sampled(logits, (1, 4)).flatten().tolist()
    assert found == pytest.approx([0, 0.25, 0.75, 1])  # centres at 1/4 and 3/4 of the width


def test_common_classes_by_hand():
    """Here: road, tree, car. There: car, road, rider. A tree is no class there, a rider none here:
    as truth they are left out, as a prediction they are errors."""
    counts = torch.tensor([[5, 2, 9],    # car, as road, tree and car
                           [8, 1, 1],    # road
                           [3, 3, 3]])   # rider
    truth, predicted = ["car", "way", None], ["way", None, "car"]
    merged = on_common(counts, truth, predicted, ["car", "way"])
    assert merged.tolist() == [[9, 5, 2], [1, 8, 1], [0, 0, 0]]
    found = percents(merged, ["car", "way", "other"], ["car", "way"])
    assert found == pytest.approx({"mean over 2 classes": 100 * (9 / 17 + 8 / 15) / 2,
                                   "car": 100 * 9 / 17, "way": 100 * 8 / 15})
    # Of classes that are more on one side, the others are empty
    larger = torch.zeros(5, 5, dtype=torch.long)
    larger[:3, :3] = counts
    assert torch.equal(on_common(larger, truth, predicted, ["car", "way"]), merged)
    # Classes of one name count together
    assert on_common(counts, ["a", "a", "a"], ["a", None, "a"], ["a"]).tolist() == [[29, 6], [0, 0]]


def test_means_over_fewer_classes_and_what_does_not_occur():
    counts = torch.zeros(4, 4, dtype=torch.long)
    counts[0, 0] = 6
    counts[1, 0] = 2  # truth b, as a
    found = percents(counts, ("a", "b", "c", "d"), ("a", "c"), ("a", "b", "c"))
    assert found == {"mean over 2 classes": 75, "mean over 3 classes": 37.5,
                     "a": 75, "b": 0, "c": None}
    assert table_of({"one": found, "two": {"a": 1.26}}).splitlines() == [
        "| IoU [%] | one | two |", "|---|---:|---:|",
        "| mean over 2 classes | 75.0 | – |", "| mean over 3 classes | 37.5 | – |",
        "| a | 75.0 | 1.3 |", "| b | 0.0 | – |", "| c | – | – |"]

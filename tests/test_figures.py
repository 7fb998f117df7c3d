"""The figures: their panels, legends, units, colours and numbers."""
import re
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import CPU, SIZE, scans, texts
from runs import open_one

import eval as evaluation
from data import DEPTHS, set_sampling
from eval import load_probe
from experiments import figures, visualize
from heads import linear_head
from miniature.colours import palette
from miniature.world import make_world
from models import load_image_encoder, load_point_encoder
from plumbing.errors import InputError
from readers import nuscenes
from readers.nuscenes import CLASSES, CONDITIONS
from readers.table import FrameTable


@pytest.fixture(scope="module")
def table(world):
    return open_one(world)


def colour_bar(figure, panels):
    """The figure's axes beyond the panels: one, the colour bar's."""
    bar, = figure.axes[panels:]
    return bar


def not_one_colour(axis):
    return np.asarray(axis.images[0].get_array(), float).std() > 0


# ---- PCA -----------------------------------------------------------------------------------------

@pytest.mark.slow
def test_pca_has_a_row_per_view_and_a_column_per_encoder(table):
    encoder = load_image_encoder("vit_mini8", weights="random")
    items = visualize.views(table, SIZE, 2)
    assert [item["condition"] for item in items] == [0, 0, 1, 1, 2, 2]
    figure = figures.figure_pca(items, [encoder, encoder], ["before", "after"], table)
    axes = np.array(figure.axes).reshape(6, 3)
    assert axes[0, 0].get_title() == "image"
    assert all(axis.get_title() == "" for axis in axes[1:].flat)
    for axis, name in zip(axes[0, 1:], ("before", "after")):
        assert re.fullmatch(rf"{name}\n\d+ % of its variance shown", axis.get_title())
    assert [axis.get_ylabel() for axis in axes[:, 0]] == [CONDITIONS[n] for n in (0, 0, 1, 1, 2, 2)]
    assert all(not_one_colour(axis) for axis in axes.flat)
    for row, item in zip(axes, items):
        image, before, after = (axis.images[0].get_array() for axis in row)
        np.testing.assert_array_equal(image, item["image"].permute(1, 2, 0))
        assert before.shape == (10, 20, 3)
        np.testing.assert_array_equal(before, after)  # the same encoder twice


def test_pca_colours_are_the_components_that_were_put_in():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(16, 16))[0]
    weights = torch.rand(3, 300) * torch.tensor([0.3, 0.2, 0.1])[:, None]
    planted = axes[:, 3:4] + axes[:, :3] @ weights  # about 1 long: normalising bends it little
    planted = planted.view(16, 15, 20)
    turned = planted.flip(1, 2)  # another encoder that has the same features elsewhere
    (own, shuffled), (share, again) = figures.pca_of_encoders([[planted], [turned]])
    assert share > 0.97 and again == pytest.approx(share)
    found = own[0].reshape(-1, 3)
    for number in range(3):  # either sign is right
        assert abs(np.corrcoef(found[:, number], weights[number])[0, 1]) > 0.95
    assert found.min() == 0 and found.max() == 1
    np.testing.assert_allclose(shuffled[0][::-1, ::-1], own[0], atol=1e-6)


def test_pca_shows_an_encoder_that_moved_as_a_whole():
    torch.manual_seed(0)
    maps = torch.randn(8, 5, 6) + torch.tensor([4.0] + [0] * 7)[:, None, None]
    moved = maps + torch.tensor([0, 4.0] + [0] * 6)[:, None, None]
    (before, after), _ = figures.pca_of_encoders([[maps], [moved]])
    assert np.abs(before[0].mean((0, 1)) - after[0].mean((0, 1))).max() > 0.4


def test_pca_refuses_features_of_different_widths(table):
    encoders = [load_image_encoder(name, weights="random") for name in ("vit_mini8", "vit_small16")]
    with pytest.raises(InputError, match="not 96, 384"):
        figures.figure_pca(visualize.views(table, SIZE), encoders, ["a", "b"], table)


# ---- t-SNE ---------------------------------------------------------------------------------------

@pytest.mark.slow
def test_tsne_says_how_far_apart_the_conditions_are():
    torch.manual_seed(0)
    apart = {"day-clear": torch.randn(12, 6) * 0.01 + torch.eye(6)[0],
             "night": torch.randn(9, 6) * 0.01 + torch.eye(6)[1]}
    mixed = {"day-clear": torch.randn(12, 6), "night": torch.randn(9, 6)}
    figure = figures.figure_tsne([apart, mixed], ["before", "after"], seed=1)
    before, after = figure.axes
    assert before.get_title() == "before\nsilhouette score 0.98"
    name, score = after.get_title().split("\nsilhouette score ")
    assert name == "after" and abs(float(score)) < 0.2
    for axis in (before, after):
        assert [len(dots.get_offsets()) for dots in axis.collections] == [12, 9]
    assert texts(figure.legends[0]) == ["day-clear, 12 images", "night, 9 images"]
    again = figures.figure_tsne([apart, mixed], ["before", "after"], seed=1).axes[1]
    for one, other in zip(after.collections, again.collections):
        np.testing.assert_array_equal(one.get_offsets(), other.get_offsets())


def test_tsne_of_other_conditions():
    torch.manual_seed(0)
    features = {name: torch.randn(5, 6) for name in ("fog", "night", "snow")}
    figure = figures.figure_tsne([features], ["encoder"])
    assert texts(figure.legends[0]) == [f"{name}, 5 images" for name in features]
    colours = {tuple(dots.get_facecolor()[0]) for dots in figure.axes[0].collections}
    assert len(colours) == 3


# ---- probes --------------------------------------------------------------------------------------

def test_segmentation_panels(table, probes):
    parts = load_probe(probes / "seg", CPU)[1:3]
    items = visualize.views(table, SIZE, target="labels")
    figure = figures.figure_probes("seg", items, [parts, parts], ["before", "after"], table)
    axes = np.array(figure.axes).reshape(3, 4)
    assert [axis.get_title() for axis in axes[0, :2]] == ["image", "LiDAR points"]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == list(CONDITIONS)
    assert re.fullmatch(r"before\nmIoU \d+\.\d %", axes[0, 2].get_title())
    assert re.fullmatch(r"mIoU \d+\.\d %", axes[2, 3].get_title())
    shown = set()
    for row, item in zip(axes, items):
        assert not_one_colour(row[0]) and not_one_colour(row[1])
        dots, = row[1].collections
        labels = item["labels"][item["labels"] > 0]
        np.testing.assert_array_equal(dots.get_array(), labels)
        columns = item["pixels"][item["labels"] > 0, 1]
        np.testing.assert_array_equal(dots.get_offsets()[:, 0], columns)  # x is the column
        dense = row[2].images[0].get_array()
        assert dense.shape == SIZE and dense.min() >= 1
        shown |= set(labels.tolist()) | set(np.unique(dense).tolist())
    assert texts(figure.legends[0]) == [CLASSES[n].replace("_", " ") for n in sorted(shown)]

    # The legend's colours are the picture's.
    patches = [patch.get_facecolor()[:3] for patch in figure.legends[0].get_patches()]
    picture = axes[0, 2].images[0]
    of_classes = [picture.cmap(picture.norm(n))[:3] for n in sorted(shown)]
    np.testing.assert_allclose(patches, of_classes)


def test_sixteen_colours_differ():
    rgb = palette(CLASSES)(range(len(CLASSES)))[:, :3]
    distance = np.linalg.norm(rgb[:, None] - rgb[None], axis=2) + 9 * np.eye(len(rgb))
    assert len(rgb) == len(CLASSES) and distance.min() > 0.25


def test_colours_are_by_name_and_those_of_other_classes_tab20():
    of_nuscenes = palette(CLASSES)
    some = palette(("ignore", "car", "barrier"))
    assert some.N == 3 and some(1) == of_nuscenes(CLASSES.index("car"))
    assert some(2) == of_nuscenes(CLASSES.index("barrier"))
    others = palette(("ignore", "car", *(f"plant {n}" for n in range(29))))
    assert others.N == 31 and others(0) == (0, 0, 0, 1)
    tab20 = [others(number) for number in range(1, 21)]
    assert tab20 == [matplotlib.colormaps["tab20"](number) for number in range(20)]
    assert others(21) == others(1)


def test_a_dataset_of_labelled_pixels_without_conditions(probes, tmp_path):
    root = make_world(tmp_path / "nuimages", seed=7, train=(1, 0, 0), val=2, frames=1, workers=1,
                      dataset="nuimages")
    table = open_one(root, name="nuimages")
    items = visualize.views(table, SIZE, 2, "labels")
    assert len(items) == 2 and [item["condition"] for item in items] == [-1, -1]
    names = table.reader.CLASSES
    encoder, _ = load_probe(probes / "seg", CPU)[1:]
    head = linear_head("linear", 96, len(names) - 1)
    figure = figures.figure_probes("seg", items, [(encoder, head)], ["probe"], table)
    axes = np.array(figure.axes).reshape(2, 3)
    assert axes[0, 1].get_title() == "labelled pixels"
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["", ""]
    words = [name.replace("_", " ") for name in names]
    legend = figure.legends[0]
    assert set(texts(legend)) <= set(words) and "driveable surface" in texts(legend)
    of_nuscenes = palette(CLASSES)
    for text, patch in zip(texts(legend), legend.get_patches()):  # the same names, so colours
        assert patch.get_facecolor() == of_nuscenes(words.index(text))


def test_depth_panels(table, probes):
    parts = load_probe(probes / "depth", CPU)[1:3]
    items = visualize.views(table, SIZE, target="depths")
    figure = figures.figure_probes("depth", items, [parts], ["probe"], table)
    axes = np.array(figure.axes[:9]).reshape(3, 3)
    assert re.fullmatch(r"probe\nRMSE \d+\.\d\d m", axes[0, 2].get_title())
    assert re.fullmatch(r"RMSE \d+\.\d\d m", axes[1, 2].get_title())
    assert colour_bar(figure, 9).get_ylabel() == "depth [m]"
    for row, item in zip(axes, items):
        np.testing.assert_array_equal(row[1].collections[0].get_array(), item["depths"])
        dense = row[2].images[0].get_array()
        assert dense.shape == SIZE
        assert dense.min() >= np.float32(DEPTHS[0]) and dense.max() <= DEPTHS[1]


def test_rmse_of_the_panels_is_eval_s(table, probes):
    """eval.py has the mean of the images' RMSE, by sampled features and batches of frames."""
    expected = evaluation.evaluate(probes / "depth", CPU, workers=0)
    _, encoder, head = load_probe(probes / "depth", CPU)
    items = visualize.views(table, SIZE, 2, target="depths")
    figure = figures.figure_probes("depth", items, [(encoder, head)], ["p"], table)
    titles = [axis.get_title() for axis in figure.axes[2:18:3]]
    found = [float(re.search(r"RMSE (.*) m", title)[1]) for title in titles]
    assert len(found) == expected["images"] == 6
    assert np.mean(found) == pytest.approx(expected["RMSE"]["full"], abs=0.01)


def test_miou_of_an_image_by_hand(table):
    """A map of 2 x 2 cells: car, car, bus, truck. Points on its corners, and one without label."""
    car, bus, truck = (CLASSES.index(name) for name in ("car", "bus", "truck"))
    classes = torch.tensor([[car, car], [bus, truck]])
    outputs = F.one_hot(classes - 1, 16).permute(2, 0, 1)[None].float()
    corners = torch.tensor([[0, 0], [0, 7], [3, 0], [3, 7], [0, 0]]).float()
    labels = torch.tensor([car, truck, bus, truck, 0])
    item = {"pixels": corners, "condition": 0, "labels": labels}
    found = figures.judge("seg", outputs, item, (4, 8), table)
    assert found == "mIoU 66.7 %"  # car 1/2, bus 1, truck 1/2
    night = item | {"condition": 2}
    found = figures.judge("seg", outputs, night, (4, 8), table)
    assert found == "mIoU 50.0 %"  # the bus does not count


def test_rmse_of_an_image_by_hand(table):
    item = {"pixels": torch.tensor([[0.0, 0], [0, 7]]), "depths": torch.tensor([3.0, 1]),
            "condition": 0}
    outputs = torch.tensor([[[[6.0, 5.0], [0, 0]]]])
    found = figures.judge("depth", outputs, item, (4, 8), table)
    assert found == "RMSE 3.54 m"  # sqrt((9 + 16) / 2)


# ---- point clouds --------------------------------------------------------------------------------

@pytest.mark.parametrize("one_point", [True, False])
def test_similarity_panels(table, first, one_point):
    """With labels as features a class is as similar as can be, and the others not at all."""
    road = CLASSES.index("driveable_surface")
    columns = []
    for item in scans(table, first, ["driveable_surface"]):
        features = F.one_hot(item["labels"], 17).float()
        reference = F.one_hot(torch.tensor(road), 17).float()
        of_road = item["part"] & (item["labels"] == road)
        point = int(of_road.nonzero()[0]) if one_point else None
        columns.append((item, features, reference, road, point))
    figure = figures.figure_similarity(columns, table)

    # titles, labels, scales
    above, below = np.array(figure.axes[:6]).reshape(2, 3)
    named = [f"{condition}\ndriveable surface" for condition in CONDITIONS]
    assert [axis.get_title() for axis in above] == named
    assert [axis.get_title() for axis in below] == ["AUC 1.00"] * 3
    assert [axis.get_xlabel() for axis in below] == ["x [m]"] * 3
    assert above[0].get_ylabel() == "labels\ny [m]"
    assert below[0].get_ylabel() == "similarity\ny [m]"
    bar = colour_bar(figure, 6)
    reference = "chosen point" if one_point else "prototype"
    assert bar.get_ylabel() == f"cosine similarity to {reference}"
    assert bar.get_ylim() == (-1, 1)
    legend = texts(figure.legends[0])
    assert len(legend) == 1 + one_point and legend[0].startswith("points of the class")

    # points
    for top, bottom, (item, _, _, _, point) in zip(above, below, columns):
        dots = bottom.collections[0]
        labels = item["labels"][item["part"]]
        assert len(dots.get_offsets()) == len(labels)
        assert dots.get_array().sum() == (labels == road).sum()
        yellow = (top.collections[0].get_facecolors()[:, :3] == figures.YELLOW).all(1)
        np.testing.assert_array_equal(yellow, dots.get_array() == 1)
        if one_point:
            ring = bottom.collections[1].get_offsets()[0]
            np.testing.assert_allclose(ring, item["xyz"][point, :2])


def test_a_dataset_of_other_classes_without_conditions(table, first):
    reader = SimpleNamespace(
        __name__="readers.mine", CLASSES=("ignore", "else", "road"), scan=nuscenes.scan,
        SAMPLING=nuscenes.SAMPLING,
        labels=lambda *file: 1 + (nuscenes.labels(*file) == CLASSES.index("driveable_surface")))
    mine = FrameTable(reader, table.root, table.columns)
    encoder, stage1 = load_point_encoder(first)
    set_sampling([mine], {"mine": stage1["samplings"]["nuscenes"]})
    assert visualize.class_numbers(mine, "--classes", None, ("road", "car")) == [2]
    with pytest.raises(InputError, match="--class is needed: mine has else, road"):
        visualize.class_numbers(mine, "--class", None, ("car",))
    items = visualize.random_scans(mine, encoder, [2], 2, 40, np.random.default_rng(0))
    assert [item["condition"] for item in items] == [-1, -1]
    assert set(items[0]["labels"].tolist()) == {1, 2}
    columns = [(item, F.one_hot(item["labels"], 3).float(), torch.tensor([0.0, 0, 1]), 2, None)
               for item in items]
    figure = figures.figure_similarity(columns, mine)
    assert [axis.get_title() for axis in figure.axes[:4]] == ["road"] * 2 + ["AUC 1.00"] * 2
    with pytest.raises(InputError, match="t-SNE is of several conditions, and mine has none"):
        visualize.features_of_random_images(mine, SIZE, [], 2, 0, CPU)

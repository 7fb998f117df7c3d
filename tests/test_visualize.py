"""The pictures: their panels, legends, units and numbers; the same picture twice; bad input."""
import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import fails_with_one_line, probe_args

import eval as evaluation
import probe
from data import DEPTHS
from eval import load_probe
from experiments import figures, visualize
from models import load_image_encoder
from plumbing.errors import InputError
from readers.nuscenes import CLASSES, CONDITIONS, load_index
from vit import ViT
from waffleiron import load_waffleiron

SIZE = (80, 160)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def index(world):
    return load_index(world)


@pytest.fixture(scope="module")
def probes(world, tmp_path_factory):
    """A probe of two steps for each task in 2D, on the miniature's encoder with random weights."""
    out = tmp_path_factory.mktemp("probes")
    for task in ("seg", "depth"):
        more = ["--weights", "random", "--image-size", "80", "160", "--steps", "2"]
        probe.main(probe_args(world, task, "vit_mini8", out / task, *more))
    return out


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def colour_bar(figure, panels):
    """The figure's axes beyond the panels: one, the colour bar's."""
    bar, = figure.axes[panels:]
    return bar


def not_one_colour(axis):
    return np.asarray(axis.images[0].get_array(), float).std() > 0


# ---- PCA -----------------------------------------------------------------------------------------

def test_pca_has_a_row_per_view_and_a_column_per_encoder(index):
    encoder = load_image_encoder("vit_mini8", weights="random")
    items = visualize.views(index, SIZE, 2)
    assert [item["condition"] for item in items] == [0, 0, 1, 1, 2, 2]
    figure = figures.figure_pca(items, [encoder, encoder], ["before", "after"])
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


def test_pca_refuses_features_of_different_widths(index):
    encoders = [load_image_encoder(name, weights="random") for name in ("vit_mini8", "vit_small16")]
    with pytest.raises(InputError, match="not 96, 384"):
        figures.figure_pca(visualize.views(index, SIZE), encoders, ["a", "b"])


# ---- t-SNE ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("grid", [(5, 10), None])
def test_image_feature_is_the_cls_token_after_the_last_norm(grid):
    """Caught where the ViT itself normalises its tokens, with learned and with rotary positions."""
    torch.manual_seed(0)
    vit = ViT(16, 64, 2, 2, grid=grid)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    seen = []
    vit.norm.register_forward_hook(lambda module, args, tokens: seen.append(tokens))
    encoder = SimpleNamespace(backbone=vit, row=SimpleNamespace(vit=True), mean=0.3, std=2)
    images = torch.rand(2, 3, *SIZE)
    vit.feature_map((images - 0.3) / 2, "norm")
    feature = visualize.image_features(encoder, images)
    torch.testing.assert_close(feature, seen[0][:, 0])
    assert feature.shape == (2, 64) and (feature[0] - feature[1]).abs().max() > 1e-3


def test_image_feature_of_a_resnet_is_the_pooled_map():
    class Encoder:
        row = SimpleNamespace(vit=None)

        def __call__(self, images):
            return torch.tensor([[[[1.0, 2], [3, 6]], [[0, 0], [0, -4]]]])
    assert visualize.image_features(Encoder(), None).tolist() == [[3, -1]]


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


# ---- probes --------------------------------------------------------------------------------------

def test_segmentation_panels(index, probes):
    parts = load_probe(probes / "seg", CPU)[1:3]
    items = visualize.views(index, SIZE, labels=True)
    figure = figures.figure_probes("seg", items, [parts, parts], ["before", "after"])
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
    rgb = figures.COLORS(range(len(CLASSES)))[:, :3]
    distance = np.linalg.norm(rgb[:, None] - rgb[None], axis=2) + 9 * np.eye(len(rgb))
    assert len(rgb) == len(CLASSES) and distance.min() > 0.25


def test_depth_panels(index, probes):
    parts = load_probe(probes / "depth", CPU)[1:3]
    items = visualize.views(index, SIZE, max_depth=DEPTHS[1])
    figure = figures.figure_probes("depth", items, [parts], ["probe"])
    axes = np.array(figure.axes[:9]).reshape(3, 3)
    assert re.fullmatch(r"probe\nRMSE \d+\.\d\d m", axes[0, 2].get_title())
    assert re.fullmatch(r"RMSE \d+\.\d\d m", axes[1, 2].get_title())
    assert colour_bar(figure, 9).get_ylabel() == "depth [m]"
    for row, item in zip(axes, items):
        np.testing.assert_array_equal(row[1].collections[0].get_array(), item["depths"])
        dense = row[2].images[0].get_array()
        assert dense.shape == SIZE
        assert dense.min() >= np.float32(DEPTHS[0]) and dense.max() <= DEPTHS[1]


def test_rmse_of_the_panels_is_eval_s(index, probes):
    """eval.py has the mean of the images' RMSE, by sampled features and batches of frames."""
    expected = evaluation.evaluate(probes / "depth", CPU, workers=0)
    _, encoder, head, _ = load_probe(probes / "depth", CPU)
    items = visualize.views(index, SIZE, 2, max_depth=DEPTHS[1])
    figure = figures.figure_probes("depth", items, [(encoder, head)], ["p"])
    titles = [axis.get_title() for axis in figure.axes[2:18:3]]
    found = [float(re.search(r"RMSE (.*) m", title)[1]) for title in titles]
    assert len(found) == expected["images"] == 6
    assert np.mean(found) == pytest.approx(expected["RMSE"]["full"], abs=0.01)


def test_miou_of_an_image_by_hand():
    """A map of 2 x 2 cells: car, car, bus, truck. Points on its corners, and one without label."""
    car, bus, truck = (CLASSES.index(name) for name in ("car", "bus", "truck"))
    classes = torch.tensor([[car, car], [bus, truck]])
    outputs = F.one_hot(classes - 1, 16).permute(2, 0, 1)[None].float()
    corners = torch.tensor([[0, 0], [0, 7], [3, 0], [3, 7], [0, 0]]).float()
    labels = torch.tensor([car, truck, bus, truck, 0])
    item = {"pixels": corners, "condition": 0, "labels": labels}
    assert figures.judge("seg", outputs, item, (4, 8)) == "mIoU 66.7 %"  # car 1/2, bus 1, truck 1/2
    night = item | {"condition": 2}
    assert figures.judge("seg", outputs, night, (4, 8)) == "mIoU 50.0 %"  # the bus does not count


def test_rmse_of_an_image_by_hand():
    item = {"pixels": torch.tensor([[0.0, 0], [0, 7]]), "depths": torch.tensor([3.0, 1]),
            "condition": 0}
    outputs = torch.tensor([[[[6.0, 5.0], [0, 0]]]])
    assert figures.judge("depth", outputs, item, (4, 8)) == "RMSE 3.54 m"  # sqrt((9 + 16) / 2)


# ---- point clouds --------------------------------------------------------------------------------

def scans(index, first, wanted, count=3, radius=40):
    _, checkpoint = load_waffleiron(first)
    cloud = checkpoint["cloud"] | {"max_points": 10**9}
    numbers = [CLASSES.index(name) for name in wanted]
    rng = np.random.default_rng(0)
    return visualize.random_scans(index, cloud, numbers, count, radius, rng)


def test_scans_hold_the_class_and_take_the_conditions_by_turns(index, first):
    items = scans(index, first, ["driveable_surface"])
    assert [item["condition"] for item in items] == [0, 1, 2]
    road = CLASSES.index("driveable_surface")
    for item in items:
        assert item["feats"][item["part"], 1:3].abs().max() < 40
        assert (item["labels"][item["part"]] == road).sum() >= visualize.ENOUGH
    with pytest.raises(InputError, match="no scan of 6 has trailer"):
        scans(index, first, ["trailer"])


def test_features_before_and_after_the_head(index, first):
    item, = scans(index, first, [], 1)
    assert "labels" not in item
    encoder = load_waffleiron(first)[0].eval()
    for layer, width in (("backbone", 16), ("head", 96)):
        features = visualize.point_features(encoder, item, layer, CPU)
        assert features.shape == (len(item["feats"]), width)


def test_prototypes_by_hand():
    one = {"labels": torch.tensor([1, 1, 2])}, torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    two = {"labels": torch.tensor([2])}, torch.tensor([[0.6, 0.8]])
    found = visualize.class_prototypes([one, two])
    torch.testing.assert_close(found[1], torch.tensor([0.5, 0.5]).sqrt())
    torch.testing.assert_close(found[2], F.normalize(torch.tensor([0.6, 1.8]), dim=0))
    assert found.shape == (17, 2) and not found[3:].any()


@pytest.mark.parametrize("one_point", [True, False])
def test_similarity_panels(index, first, one_point):
    """With labels as features a class is as similar as can be, and the others not at all."""
    road = CLASSES.index("driveable_surface")
    columns = []
    for item in scans(index, first, ["driveable_surface"]):
        features = F.one_hot(item["labels"], 17).float()
        reference = F.one_hot(torch.tensor(road), 17).float()
        of_road = item["part"] & (item["labels"] == road)
        point = int(of_road.nonzero()[0]) if one_point else None
        columns.append((item, features, reference, road, point))
    figure = figures.figure_similarity(columns)

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
            np.testing.assert_allclose(ring, item["feats"][point, 1:3])


# ---- command line --------------------------------------------------------------------------------

def arguments(figure, world, first, probes):
    data = ["--data", str(world)]
    encoder = ["--encoder", str(first), *data]
    return {
        "pca": ["--encoders", "vit_mini8", "vit_mini8", "--weights", "random",
                "--titles", "a", "b", *data],
        "tsne": ["--encoders", "vit_mini8", "--weights", "random", "--images", "2", *data],
        "segmentation": [str(probes / "seg")],
        "depth": [str(probes / "depth"), "--frames", "2"],
        "correlation": [*encoder, "--class", "driveable_surface", "--scans", "2"],
        "prototypes": [*encoder, "--classes", "driveable_surface", "manmade",
                       "--training-scans", "2"]}[figure]


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["pca", "tsne", "segmentation", "depth", "correlation",
                                    "prototypes"])
def test_a_command_writes_a_png_of_a_page_s_width_and_the_same_again(
        world, first, probes, tmp_path, figure, monkeypatch, capsys):
    # The default size for encoders by name would take seconds, and so would 300 dots an inch.
    monkeypatch.setattr(visualize, "IMAGE_SIZE", SIZE)
    monkeypatch.setitem(visualize.STYLE, "savefig.dpi", 100)
    command = [figure, *arguments(figure, world, first, probes), "--device", "cpu", "--out"]
    one, two = tmp_path / "new" / "one.png", tmp_path / "new" / "two.png"
    for path in (one, two):
        visualize.main([*command, str(path)])
    assert f"written: {two}" in capsys.readouterr().out
    assert one.read_bytes() == two.read_bytes()
    picture = np.asarray(Image.open(one).convert("RGB"))
    assert 300 < picture.shape[1] <= 710 and picture.std() > 20


def test_a_point_by_place_needs_no_labels(world, index, first, monkeypatch):
    without = dataclasses.replace(index, lidarseg=np.full_like(index.lidarseg, b""))
    monkeypatch.setattr(visualize, "load_index", lambda *args: without)
    args = ["correlation", "--encoder", str(first), "--data", str(world),
            "--point", "2", "8", "-1", "--scans", "1"]
    figure = visualize.draw_scans(visualize.parse(args), CPU)
    above, below = figure.axes[:2]
    assert above.get_title() in CONDITIONS and below.get_title() == ""
    np.testing.assert_allclose(below.collections[1].get_offsets()[0], (2, 8), atol=3)
    assert below.collections[0].get_array().max() == pytest.approx(1, abs=1e-5)
    assert texts(figure.legends[0]) == ["chosen point"]


@pytest.mark.parametrize("argv, part", [
    ("pca --encoders vit_mini9 --data WORLD", "did you mean vit_mini8"),
    ("pca --encoders vit_mini8 vit_small16 --weights random --data WORLD",
     "one width, not 96, 384"),
    ("tsne --encoders vit_mini8 vit_small16 --weights random --titles a --data WORLD",
     "--titles: 1 for 2 columns"),
    ("tsne --encoders vit_mini8 --images 1 --data WORLD", "--images 1: must be at least 2"),
    ("segmentation PROBES/seg PROBES/depth", "of --task seg, not"),
    ("segmentation PROBES/depth", "depth of --task depth"),
    ("depth PROBES/none", "no such file"),
    ("prototypes --encoder FIRST --classes trailer --data WORLD",
     "no scan of 6 has trailer within it"),
    ("correlation --encoder PROBES/seg --data WORLD", "point_encoder is needed"),
    ("correlation --encoder FIRST --radius 0.5 --data WORLD", "--radius 0.5: must be at least 1")])
def test_bad_input_is_one_line_and_exit_code_2(argv, part, world, first, probes, tmp_path, capsys):
    for name, path in (("WORLD", world), ("FIRST", first), ("PROBES", probes)):
        argv = argv.replace(name, str(path))
    command = [*argv.split(), "--out", str(tmp_path / "x.png"), "--device", "cpu"]
    assert part in fails_with_one_line(capsys, visualize.main, command)
    assert not (tmp_path / "x.png").exists()


def test_tsne_needs_images_of_the_night(world, index, tmp_path, monkeypatch, capsys):
    split = np.where(index.condition == 2, b"train", index.split)
    clear = dataclasses.replace(index, split=split)
    monkeypatch.setattr(visualize, "load_index", lambda *args: clear)
    command = ["tsne", "--encoders", "vit_mini8", "--weights", "random", "--data", str(world),
               "--out", str(tmp_path / "x.png"), "--device", "cpu"]
    message = fails_with_one_line(capsys, visualize.main, command)
    assert "no frame of split 'val' under night" in message
    assert not (tmp_path / "x.png").exists()

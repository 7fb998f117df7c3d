"""Pictures of a street, of nights and of numbers: panels, points, colours, places, refusals."""
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.colors import to_rgba
from pictures import SIZE, texts
from PIL import Image
from runs import fails_with_one_line, open_one

from data import Frames
from experiments import real_figures
from experiments.figures import pca_of_encoders
from experiments.lay_out import lay_out
from experiments.real import CONDITIONS, ROWS
from heads import linear_head
from miniature.colours import palette
from models import load_image_encoder
from plumbing.errors import InputError
from readers.pandaset import CLASSES

pytestmark = pytest.mark.slow
ENCODER = str(ROOT / "miniature/encoder.pth")
ROAD = CLASSES.index("road")


@pytest.fixture(scope="module")
def roots(panda, tmp_path_factory):
    """Roots of one miniature PandaSet under two conditions."""
    out = tmp_path_factory.mktemp("conditions")
    for name in ("clear", "low_light"):
        table = open_one(panda, name="pandaset64")
        lay_out(table, out / name)
        of_scenes = dict.fromkeys(table.scenes(), name)
        (out / name / "conditions.json").write_text(json.dumps(of_scenes))
    return [out / "clear", out / "low_light"]


@pytest.fixture(scope="module")
def data(roots):
    return ",".join(f"pandaset64={root}" for root in roots)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of pictures by day and by night, of several brightnesses."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for condition, brightness in (("day", 250), ("night", 40)):
        (root / condition).mkdir()
        for number in range(5):
            pixels = rng.integers(0, brightness - 8 * number, (60, 100, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / condition / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """Files of encoders: with other weights, and trained on another image size."""
    folder = tmp_path_factory.mktemp("encoders")
    content = torch.load(ENCODER, weights_only=True)
    other = load_image_encoder("vit_mini8", weights="random").backbone.state_dict()
    spec = content["encoder"] | {"image_size": [160, 320]}
    torch.save(content | {"model": other}, folder / "after.pth")
    torch.save(content | {"encoder": spec}, folder / "large.pth")
    return folder


@pytest.fixture
def coarse(monkeypatch):
    """PNGs of few pixels, which are written sooner."""
    monkeypatch.setitem(real_figures.STYLE, "savefig.dpi", 60)


@pytest.fixture(scope="module")
def views(roots):
    tables = [open_one(root, name="pandaset64") for root in roots]
    return real_figures.street_views(tables, ["low_light", "clear"], SIZE)


@pytest.fixture(scope="module")
def encoders():
    return [load_image_encoder(ENCODER), load_image_encoder("vit_mini8", weights="random")]


def all_road():
    """A head that calls everything road."""
    head = linear_head("whitened", 96, len(CLASSES) - 1)
    head[1].bias.data[ROAD - 1] = 1
    return head


@pytest.fixture(scope="module")
def street(views, encoders):
    """The figure of two views and two encoders."""
    return real_figures.figure_street(views, encoders, [all_road()] * 2, ["before", "after"])


# ---- the street ----------------------------------------------------------------------------------

def test_the_views_are_of_the_middle_frame_s_front_camera(roots, views):
    assert len(views) == 2
    for (item, table), root in zip(views, roots[::-1]):
        assert table.root == str(root)
        front = Frames([open_one(root, name="pandaset64").select("val")], "front_camera", SIZE,
                       target="labels")
        assert len(front) == 2
        middle = front[0, 1]
        for name in ("image", "pixels", "depths", "labels"):
            assert torch.equal(item[name], middle[name])
    (first, _), = real_figures.street_views([views[0][1]], ["low_light"], SIZE, 0)
    assert torch.equal(first["image"], front[0, 0]["image"])


def test_the_street_s_panels(street, views):
    panels = np.array(street.axes).reshape(4, 4)
    shown = [[axis.axison for axis in line] for line in panels]
    assert shown == 2 * [[True] * 4, [True] * 3 + [False]]
    assert [axis.get_ylabel() for axis in panels[:, 0]] == ["low light", "", "clear", ""]
    scale, = panels[1, 3].child_axes
    assert scale.get_xlabel() == "depth [m]" and not panels[3, 3].child_axes

    of_classes = palette(CLASSES)
    for number, (item, _) in enumerate(views):
        (image, before, classes, labels), (points, after, again, _) = panels[2 * number:][:2]
        np.testing.assert_array_equal(image.images[0].get_array(), item["image"].permute(1, 2, 0))

        # Points where they are, by their depths and their classes
        dots, = points.collections
        np.testing.assert_array_equal(dots.get_offsets(), item["pixels"].flip(1))
        np.testing.assert_array_equal(dots.get_array(), item["depths"])
        known = item["labels"] > 0
        dots, = labels.collections
        np.testing.assert_array_equal(dots.get_offsets(), item["pixels"][known].flip(1))
        dots.update_scalarmappable()
        expected = of_classes(item["labels"][known].numpy())
        np.testing.assert_allclose(dots.get_facecolors(), expected)

        # Everything is road: its part of the points, divided by the number of classes
        for axis, title in ((classes, "before"), (again, "after")):
            drawn = axis.images[0]
            assert drawn.get_array().shape == SIZE
            assert (drawn.get_array() == ROAD).all()
            assert drawn.cmap(drawn.norm(ROAD)) == of_classes(ROAD)
            there = item["labels"][known].numpy()
            miou = 100 * (there == ROAD).mean() / len(np.unique(there))
            assert axis.get_title() == f"classes, mIoU {miou:.1f} %\n{title}"
        assert before.get_title() == "features\nbefore" and after.get_title() == "features\nafter"
        assert before.images[0].get_array().shape == (10, 20, 3)

    names = texts(street.legends[0])
    assert "road" in names and "ignore" not in names
    for name, patch in zip(names, street.legends[0].get_patches()):
        number = CLASSES.index(name.replace(" ", "_"))
        assert patch.get_facecolor() == of_classes(number)


def test_each_encoder_has_a_pca_of_its_own_of_all_views(street, views, encoders):
    for line, encoder in enumerate(encoders):
        with torch.no_grad():
            maps = [encoder(item["image"][None] / 255)[0] for item, _ in views]
        (expected,), _ = pca_of_encoders([maps])
        for number, colours in enumerate(expected):
            drawn = street.axes[8 * number + 4 * line + 1].images[0].get_array()
            np.testing.assert_allclose(drawn, colours, atol=1e-6)


def test_one_encoder_alone(views, encoders):
    figure = real_figures.figure_street(views[:1], encoders[:1], [all_road()], ["it"])
    assert [axis.axison for axis in figure.axes] == [True] * 5 + [False] * 3


def test_the_street_with_trained_heads_the_same_again(data, another, coarse, tmp_path):
    command = ["street", "--data", data, "--encoders", ENCODER, str(another / "after.pth"),
               "--titles", "before", "after", "--steps", "3", "--device", "cpu", "--out"]
    for name in ("one", "two"):
        real_figures.main([*command, str(tmp_path / "new" / f"{name}.png")])
    one, two = ((tmp_path / "new" / f"{name}.png").read_bytes() for name in ("one", "two"))
    assert one == two
    picture = np.asarray(Image.open(tmp_path / "new" / "one.png").convert("RGB"))
    assert 360 < picture.shape[1] <= 422 and picture.std() > 20


# ---- the nights ----------------------------------------------------------------------------------

def test_nights_are_spread_over_each_condition(folder, another, encoders, coarse, tmp_path,
                                               monkeypatch):
    figures = []
    figure_nights = real_figures.figure_nights
    monkeypatch.setattr(real_figures, "figure_nights",
                        lambda *args: figures.append(figure_nights(*args)) or figures[0])
    out = tmp_path / "nights.png"
    real_figures.main(["nights", "--data", f"pictures={folder}", "--encoders", ENCODER,
                       str(another / "after.pth"), "--titles", "before", "after", "--pictures", "2",
                       "--device", "cpu", "--out", str(out)])
    panels = np.array(figures[0].axes).reshape(4, 3)
    assert [axis.get_ylabel() for axis in panels[:, 0]] == ["day", "day", "night", "night"]
    # The first and the last of five
    frames = Frames([open_one(folder, name="pictures")], "all", SIZE)
    items = [frames[0, number] for number in (0, 4, 5, 9)]
    for axis, item in zip(panels[:, 0], items):
        np.testing.assert_array_equal(axis.images[0].get_array(), item["image"].permute(1, 2, 0))
    # Day and night in the same colours
    with torch.no_grad():
        maps = [encoders[0](item["image"][None] / 255)[0] for item in items]
    (expected,), (share,) = pca_of_encoders([maps])
    for axis, colours in zip(panels[:, 1], expected):
        np.testing.assert_allclose(axis.images[0].get_array(), colours, atol=1e-6)
    assert panels[0, 1].get_title() == (f"features before\n{100 * share:.0f} % of their variance "
                                        "shown")
    assert panels[0, 2].get_title().startswith("features after\n")
    assert 360 < Image.open(out).width <= 422


# ---- the numbers ---------------------------------------------------------------------------------

def results(rows, seeds=(1, 2, 3)):
    """{row: {seed: result}}, where each number tells its row, probe, column and seed."""
    kept = {}
    for place, name in enumerate(rows):
        kept[name] = {}
        for seed in seeds:
            values = {column: 10 * place + number + seed / 10
                      for number, column in enumerate(("full", *CONDITIONS))}
            kept[name][str(seed)] = {"seg-all": {"mIoU": values}, "seg-first": {"mIoU": {}},
                                     "depth-all": {"RMSE": {c: v / 4 for c, v in values.items()}}}
    return kept


def test_numbers_stand_where_they_are():
    kept = results(["imagenet", "twin", "cd"]) | {"random": {}, "3d": {"1": {"mIoU": {}}}}
    figure = real_figures.figure_numbers(kept)
    assert len(figure.axes) == 12
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["imagenet", "cd", "twin"]  # as in ROWS; what was not run is left out
    low, high = figure.axes[0].get_ylim()
    assert low > high  # the first row on top
    for number, axis in enumerate(figure.axes):
        column, scale = number % 6, 1 if number < 6 else 1 / 4
        assert axis.get_xlabel() == ("mIoU [%]" if number < 6 else "RMSE [m]")
        assert axis.get_title() == ("full", *CONDITIONS)[column].replace("_", " ")
        assert len(axis.containers) == 3
        for place, (name, bar) in enumerate(zip(names, axis.containers)):
            dot, _, (spread,) = bar
            mean = scale * (10 * ["imagenet", "twin", "cd"].index(name) + column + 0.2)
            assert dot.get_xdata() == pytest.approx([mean]) and dot.get_ydata() == [place]
            (left, _), (right, _) = spread.get_segments()[0]
            assert (left, right) == pytest.approx((mean - 0.1 * scale, mean + 0.1 * scale))
            filled = to_rgba("black" if name == "cd" else "white")
            assert to_rgba(dot.get_markerfacecolor()) == filled
        dashed, = (line for line in axis.lines if line.get_linestyle() == "--")
        assert dashed.get_xdata()[0] == pytest.approx(scale * (column + 0.2))


def test_all_rows_have_their_names_and_one_seed_has_no_spread():
    rows = [name for name, row in ROWS.items() if row.script == "probes"]
    figure = real_figures.figure_numbers(results(rows, [1]))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == rows
    assert not any(bar.has_xerr for axis in figure.axes for bar in axis.containers)


def test_the_picture_of_numbers_is_black_and_white(coarse, tmp_path):
    file, out = tmp_path / "real.json", tmp_path / "numbers.png"
    file.write_text(json.dumps({"frames": {}, "rows": results(["imagenet", "cd"])}))
    real_figures.main(["numbers", "--results", str(file), "--out", str(out)])
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
    assert picture.min() < 20 and np.ptp(picture, axis=2).max() <= 2


# ---- refusals ------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, part", [
    ("street --data DATA --encoders ENCODER --conditions clear snow",
     "--conditions snow: the validation frames of --data have clear, low_light"),
    ("street --data DATA --encoders ENCODER --titles before after",
     "--titles: 2 for 1 columns"),
    ("street --data DATA --encoders ENCODER LARGE",
     "trained on different image sizes, (80, 160) and (160, 320)"),
    ("street --data pictures=PICTURES --encoders ENCODER", "no frame of split 'val'"),
    ("nights --data pictures=PICTURES --encoders ENCODER --conditions day dusk",
     "--conditions dusk: --data PICTURES has day, night"),
    ("nights --data pictures=PICTURES --encoders ENCODER --pictures 0", "--pictures 0: must be"),
    ("numbers --results NOWHERE", "NOWHERE: cannot be read, or is not what experiments/real.py"),
    ("numbers --results EMPTY", "--results: has no row of an image encoder"),
    ("numbers --out DATA/x.xyz", "x.xyz: ends in no kind of picture; give one of .eps"),
    ("numbers --out LARGE/x.png", "LARGE/x.png: its folder cannot be made"),
    ("nights --data pictures=FLAT --encoders ENCODER", "FLAT: states no conditions; put its")])
def test_bad_input_is_one_line_and_exit_code_2(argv, part, data, folder, another, tmp_path, capsys):
    for word, value in (("DATA", data), ("PICTURES", folder), ("ENCODER", ENCODER),
                        ("LARGE", another / "large.pth"), ("NOWHERE", tmp_path / "none.json"),
                        ("EMPTY", tmp_path / "empty.json"), ("FLAT", folder / "day")):
        argv, part = argv.replace(word, str(value)), part.replace(word, str(value))
    (tmp_path / "empty.json").write_text('{"frames": {}, "rows": {}}')
    # The last --out counts
    figure, *more = argv.split()
    command = [figure, "--out", str(tmp_path / "x.png"), *more]
    assert part in fails_with_one_line(capsys, real_figures.main, command)
    assert not (tmp_path / "x.png").exists()


def test_a_street_needs_a_lidar(views):
    columns = {name: values for name, values in views[0][1].columns.items() if name != "scan"}
    blind = type(views[0][1])(views[0][1].reader, "/mine", columns, ["low_light"])
    with pytest.raises(InputError, match="pandaset64 has no depths"):
        real_figures.street_views([blind], ["low_light"], SIZE)

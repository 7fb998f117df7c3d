"""Pictures of several datasets: the scans, colours and numbers; other datasets than nuScenes."""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from pictures import CPU, texts
from PIL import Image

from experiments import scalr_figures, visualize
from miniature.world import make_world
from plumbing.errors import InputError
from readers import nuscenes, pandaset, semantickitti, semanticposs
from readers.frame_table import FrameTable
from runs import fails_with_one_line, open_one

READERS = (nuscenes, semantickitti, pandaset, semanticposs)
OTHERS = ("semantickitti", "pandaset64", "semanticposs")


@pytest.fixture(scope="module")
def table(world):
    return open_one(world)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """{dataset: root} of miniature worlds of one training street or a few, and one to validate."""
    roots = {}
    for name in OTHERS:
        root = tmp_path_factory.mktemp(name) / "data"
        roots[name] = make_world(root, seed=1, dataset=name.removesuffix("64"), train=(1, 0, 0),
                                 val=1, frames=1, azimuths=150, workers=1)
    return roots


# ---- classes -------------------------------------------------------------------------------------

def test_the_classes_shown_have_each_dataset_s_own_names():
    names = [list(visualize.shown_classes(reader.CLASSES).values()) for reader in READERS]
    assert names == [["car", "pedestrian", "driveable_surface", "sidewalk"],
                     ["car", "person", "road", "sidewalk"],
                     ["car", "pedestrian", "road", "sidewalk"],
                     ["car", "person", "ground"]]
    assert list(scalr_figures.OF_KIND) == list(visualize.SHOWN)


@pytest.mark.parametrize("reader", READERS)
def test_a_dataset_s_classes_have_colours_that_can_be_told_apart(reader):
    colours = {name: np.array(to_rgb(scalr_figures.colour_of(name))) for name in reader.CLASSES[1:]}
    for one, other in itertools.combinations(colours, 2):
        assert np.abs(colours[one] - colours[other]).max() > 0.1, (one, other)


def test_like_classes_have_one_colour_in_all_datasets():
    for one, other in (("pedestrian", "person"), ("driveable_surface", "road"),
                       ("vegetation", "plants"), ("traffic-sign", "traffic_sign")):
        assert scalr_figures.colour_of(one) == scalr_figures.colour_of(other)


# ---- scans and points ----------------------------------------------------------------------------

def test_the_scan_that_shows_the_most_classes_by_clear_day(table):
    def shows(row):
        scan, labels = table.reader.scan(table.path("scan", row)), table.labels(row)
        counts = np.bincount(labels[(np.abs(scan[:, :2]) < 40).all(1)], minlength=17)
        kinds = counts[[4, 7, 11, 13]]  # car, pedestrian, driveable_surface, sidewalk
        return (kinds >= 5).sum(), (counts[1:] >= 5).sum()
    row, points = scalr_figures.busiest(table, "val", 40, 20)
    clear = [n for n in table.select("val").rows if table["condition"][n] == 0]
    assert row in clear and shows(row) == max(map(shows, clear))
    assert len(points["xyz"]) == len(points["labels"]) == len(table.reader.scan(
        table.path("scan", row)))
    np.testing.assert_array_equal(points["part"], (np.abs(points["xyz"][:, :2]) < 40).all(1))


def test_the_car_s_point_is_the_middle_one_by_distance():
    reader = SimpleNamespace(CLASSES=("ignore", "road", "car"))
    item = {"xyz": torch.tensor([[9.0, 0, 0], [1, 0, 0], [0, 5, 0], [2, 0, 0], [3, 0, 0]]),
            "labels": torch.tensor([2, 2, 2, 1, 2]), "part": torch.tensor([0, 1, 1, 1, 1]).bool()}
    mine = SimpleNamespace(reader=reader, root="/mine", name="mine")
    assert scalr_figures.point_of_car(mine, item) == (2, 4)  # at 1, 3 and 5 m
    with pytest.raises(InputError, match="no scan that was looked at has a car nearby"):
        scalr_figures.point_of_car(mine, item | {"labels": torch.ones(5).long()})


def test_prototypes_by_hand():
    """Of two classes; the others have no point here."""
    mine = SimpleNamespace(reader=SimpleNamespace(CLASSES=("ignore", "sidewalk", "person", "car")))
    features = F.normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1], [3, 4], [4, 3]]), dim=1)
    item = {"labels": torch.tensor([3, 3, 1, 0, 0])}
    truth, nearest, similarity = scalr_figures.nearest_prototype(mine, item, features)
    assert truth.tolist() == [0, 0, 3, -1, -1]
    assert nearest.tolist() == [0, 0, 3, 3, 0]
    np.testing.assert_allclose(similarity, [1, 1, 1, 0.8, 0.8], rtol=1e-6)


# ---- figures -------------------------------------------------------------------------------------

def test_a_row_a_dataset_and_no_picture_where_there_is_none(table):
    camera = ("cameras", "image", "image_size", "cam_from_lidar", "intrinsics")
    columns = {name: values for name, values in table.columns.items() if name not in camera}
    blind = FrameTable(table.reader, table.root, columns, table.conditions)
    row, points = scalr_figures.busiest(table, "val", 40, 20)
    figure = scalr_figures.figure_datasets([(table, row, points), (blind, row, points)], 40)
    (picture, scan, legend), (empty, *_) = np.array(figure.axes).reshape(2, 3)
    assert picture.get_ylabel() == empty.get_ylabel() == "nuscenes"
    assert not empty.images and empty.texts[0].get_text() == "no pictures"
    dots, = picture.collections
    height, width = picture.images[0].get_array().shape[:2]
    assert (height, width) == (80, 160)
    assert (dots.get_offsets() > 0).all() and (dots.get_offsets() < (width, height)).all()
    labelled = points["part"] & (points["labels"] > 0)
    assert len(scan.collections[0].get_offsets()) == labelled.sum()
    present = np.unique(points["labels"][labelled])
    names = [nuscenes.CLASSES[number].replace("_", " ") for number in present]
    assert set(names) <= set(texts(legend.get_legend()))


def test_columns_of_the_backbone(table):
    """With labels as features a class is as similar as can be, and each prototype its own."""
    row, points = scalr_figures.busiest(table, "val", 40, 20)
    item = {name: torch.as_tensor(points[name]) for name in ("xyz", "part", "labels")}
    features = F.one_hot(item["labels"], 17).float()
    number, point = scalr_figures.point_of_car(table, item)
    figure = scalr_figures.figure_backbone([(table, item, features, number, point)], 40)
    titles = [axis.get_title() for axis in figure.axes[:4]]
    assert titles == ["labels", "similarity to a car's point\nAUC 1.00", "principal components",
                      "most similar prototype\n100 % right"]
    assert len(texts(figure.legends[0])) == 6
    labels, similarity, *_ = figure.axes
    of_cars = (labels.collections[0].get_facecolors()[:, :3]
               == to_rgb(scalr_figures.OF_KIND["car"])).all(1)
    np.testing.assert_array_equal(of_cars, similarity.collections[0].get_array() == 1)
    np.testing.assert_allclose(similarity.collections[1].get_offsets()[0], item["xyz"][point, :2])


# ---- command lines -------------------------------------------------------------------------------

@pytest.mark.slow
def test_pictures_of_four_datasets_and_the_same_again(world, others, first, tmp_path):
    data = ",".join(f"{name}={root}" for name, root in ({"nuscenes": world} | others).items())
    command = ["--data", data, "--device", "cpu", "--radius", "60", "--out"]
    one, two, backbone = (tmp_path / "new" / name for name in ("one.png", "two.png", "three.png"))
    scalr_figures.main(["datasets", *command, str(one)])
    scalr_figures.main(["datasets", *command, str(two)])
    scalr_figures.main(["backbone", *command, str(backbone), "--encoder", str(first)])
    assert one.read_bytes() == two.read_bytes()
    for path in (one, backbone):
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert 900 < picture.shape[1] <= 1060 and picture.std() > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_visualize_draws_other_datasets(others, first, name):
    """By their own name of the class; SemanticPOSS has no pictures."""
    command = ["--data", f"{name}={others[name]}", "--encoder", str(first), "--radius", "60"]
    args = visualize.parse(["correlation", *command, "--scans", "1"])
    above, below = visualize.draw_scans(args, CPU).axes[:2]
    assert above.get_title() == "car" and below.get_title().startswith("AUC 0.")
    road = visualize.shown_classes(open_one(others[name], name=name).reader.CLASSES)["road"]
    args = visualize.parse(["prototypes", *command, "--classes", road, "--training-scans", "1"])
    above, below = visualize.draw_scans(args, CPU).axes[:2]
    assert above.get_title() == road and below.get_title().startswith("AUC 0.")


@pytest.mark.parametrize("argv, part", [
    ("datasets --data semantickitty=WORLD", "semantickitty is no dataset that is known"),
    ("backbone --data WORLD", "the following arguments are required: --encoder"),
    ("backbone --data WORLD --encoder FIRST --radius 1", "has a car nearby"),
    ("datasets --data WORLD --look-at 0", "--look-at 0: must be at least 1")])
def test_bad_input_is_one_line_and_exit_code_2(argv, part, world, first, tmp_path, capsys):
    argv = argv.replace("WORLD", str(world)).replace("FIRST", str(first))
    command = [*argv.split(), "--out", str(tmp_path / "x.png")]
    assert part in fails_with_one_line(capsys, scalr_figures.main, command)
    assert not (tmp_path / "x.png").exists()


def test_a_dataset_without_scans_is_said(table):
    columns = {name: values for name, values in table.columns.items() if name != "scan"}
    with pytest.raises(InputError, match="nuscenes has no LiDAR scans"):
        scalr_figures.busiest(FrameTable(table.reader, table.root, columns), "val", 40, 20)


def test_visualize_takes_one_dataset(table, monkeypatch):
    monkeypatch.setattr(visualize, "open_tables", lambda *args: [table, table])
    with pytest.raises(InputError, match="of one dataset, not of nuscenes and nuscenes; give one"):
        visualize.open_one("nuscenes=/a,nuscenes=/b", None)

"""S3PT's pictures: clusters without and with depth, runs' losses and entropies, bad input."""
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from pictures import CPU
from PIL import Image
from runs import fails_with_one_line, open_one

from experiments import s3pt_figures, visualize
from models import load_image_encoder
from plumbing.errors import InputError
from readers.frame_table import FrameTable
from s3pt.clustering import Clustering

SHIPPED = str(ROOT / "miniature/encoder.pth")  # of pictures of 80 x 160, in patches of 8


@pytest.fixture(scope="module")
def table(world):
    return open_one(world)


@pytest.fixture(scope="module")
def seen(table):
    """A picture in 16 clusters."""
    encoder = s3pt_figures.load_vit(SHIPPED, None)
    return s3pt_figures.clustered(encoder, table, table.rows[0], 16, Clustering(), 0)


def by_hand(without, aware, depths):
    """A black picture of 40 x 60 pixels in these clusters; all of its map is unknown but a row."""
    image = np.zeros((40, 60, 3), np.uint8)
    of_picture = np.zeros((10, 15))
    of_picture[-1] = 4
    clusters = np.array(without), np.array(aware)
    return s3pt_figures.Clustered(image, of_picture, np.array(depths), *clusters)


# ---- clusters ------------------------------------------------------------------------------------

def test_a_picture_its_depth_and_two_different_maps_of_clusters(seen):
    assert seen.image.shape == (80, 160, 3) and seen.depths.shape == (80, 160)
    for clusters in (seen.without, seen.aware):
        assert clusters.shape == (10, 20)
        assert 2 <= len(np.unique(clusters)) <= 16 and clusters.min() >= 0 and clusters.max() < 16
    assert (seen.without != seen.aware).mean() > 0.1


def test_depths_lie_where_the_picture_shows_them(seen):
    """Far above and near below; a token's is within those of its own 8 x 8 pixels."""
    metres = seen.tokens.reshape(10, 20)
    assert np.nanmean(metres[-1]) < 8 and np.nanmean(metres[4]) > 15
    pixels = np.where(seen.depths > 0, seen.depths, np.nan).reshape(10, 8, 20, 8)
    pixels = pixels.transpose(0, 2, 1, 3).reshape(10, 20, 64)
    for own, token in zip(pixels.reshape(200, 64), metres.ravel()):
        if np.isnan(own).all():
            assert np.isnan(token)
        else:
            assert np.nanmin(own) - 1e-4 <= token <= np.nanmax(own) + 1e-4


def test_with_depth_a_cluster_s_depths_are_nearer_to_each_other(seen):
    spreads = [s3pt_figures.spread_of(seen.tokens, clusters)
               for clusters in (seen.without, seen.aware)]
    assert spreads[1] < 0.7 * spreads[0]


def test_spread_and_the_widest_cluster_by_hand():
    """Means 2 and 10: squares 1, 1, 4, 4. The tokens that are unknown count for nothing."""
    depths = np.array([1, 3, 8, 12, np.nan, np.nan])
    clusters = np.array([[0, 0, 2], [2, 2, 5]])
    assert s3pt_figures.spread_of(depths, clusters) == pytest.approx(np.sqrt(10 / 4))
    np.testing.assert_array_equal(s3pt_figures.widest(depths, clusters), clusters == 2)
    assert s3pt_figures.spread_of(np.full(6, np.nan), clusters) == 0


def test_neighbouring_numbers_have_colours_that_can_be_told_apart():
    colours = s3pt_figures.colours_of(128)
    assert np.abs(np.diff(colours, axis=0)).max(1).min() > 0.4
    assert len(np.unique(colours.round(2), axis=0)) == 128


def test_a_row_has_picture_depth_lines_between_clusters_and_dots():
    picture = by_hand([[0, 0, 1], [0, 0, 1]], [[0, 0, 0], [2, 2, 2]], [5, 5, 9, 7, 7, 9])
    figure = s3pt_figures.figure_clusters([picture, picture], 4, "caption")
    *panels, bar = figure.axes
    assert len(panels) == 8 and bar.get_ylabel() == "depth [m]"
    assert [axis.get_title() for axis in panels[:4]] == [
        "image", "completed LiDAR depth\n(grey: unknown)", "clusters without depth\n± 0.8 m",
        "with depth (β = 4)\n± 1.5 m"]
    _, depth, without, aware = panels[4:]
    drawn = depth.images[0]
    assert drawn.get_array().mask.sum() == 135
    assert tuple(drawn.get_extent()) == (-0.5, 59.5, 39.5, -0.5)
    # One line of two tokens' heights; one of three tokens' widths
    lines, dots = without.collections
    assert {tuple(end) for line in lines.get_segments() for end in line} == {
        (39.5, -0.5), (39.5, 19.5), (39.5, 39.5)}
    centres = [(9.5, 9.5), (29.5, 9.5), (9.5, 29.5), (29.5, 29.5)]
    np.testing.assert_allclose(dots.get_offsets(), centres)
    lines, dots = aware.collections
    assert {tuple(end) for line in lines.get_segments() for end in line} == {
        (-0.5, 19.5), (19.5, 19.5), (39.5, 19.5), (59.5, 19.5)}
    np.testing.assert_allclose(dots.get_offsets(), centres)


def test_a_single_cluster_has_no_lines():
    picture = by_hand([[0, 0]], [[0, 0]], [5, np.nan])
    _, _, without, *_ = s3pt_figures.figure_clusters([picture], 4, "").axes
    assert without.collections[0].get_segments() == []


@pytest.mark.parametrize("split", ["train", "val"])
def test_pictures_are_of_the_split(table, split, monkeypatch):
    drawn = []
    monkeypatch.setattr(s3pt_figures, "open_tables", lambda *args: [table])
    monkeypatch.setattr(s3pt_figures, "clustered", lambda _, table, frame, *more:
                        drawn.append(table["split"][frame].decode()))
    monkeypatch.setattr(s3pt_figures, "figure_clusters", lambda *args: None)
    args = visualize.parse(["clusters", "--encoder", SHIPPED, "--data", "x", "--split", split])
    s3pt_figures.draw_clusters(args, CPU)
    assert drawn == [split] * 3


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    encoder = load_image_encoder("efficientnet_lite0", "random")
    torch.save({"kind": "image_encoder", "encoder": encoder.spec | {"image_size": (224, 448)},
                "step": 1, "total": 1, "model": encoder.backbone.state_dict()},
               tmp_path / "last.pth")
    with pytest.raises(InputError, match="efficientnet_lite0 has no tokens after a last norm"):
        s3pt_figures.load_vit(str(tmp_path), None)


# ---- losses --------------------------------------------------------------------------------------

def line(epoch, entropy, **losses):
    return {"epoch": epoch, "step": 7 * epoch, "loss": 1.0, "entropy_of_mean": entropy,
            "mean_entropy": entropy / 2, "loss_of": losses}


def write_log(run, *lines):
    run.mkdir()
    (run / "log.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    return run


@pytest.fixture
def logs(tmp_path):
    """Of a run with objects, killed while it wrote its third line, and of one without."""
    objects = [line(n, 0.8, global_cross_view=5 - n, object_cross_view=3, object_cross_image=n - 1)
               for n in (1, 2)]
    runs = {"s3pt": write_log(tmp_path / "s3pt", *objects),
            "dino": write_log(tmp_path / "dino", line(1, 0.6, global_cross_view=2.5))}
    with open(runs["s3pt"] / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "los')
    return {name: s3pt_figures.log_of(run) for name, run in runs.items()}


def test_a_panel_for_each_loss_and_a_line_for_each_run(logs):
    figure = s3pt_figures.figure_losses(logs)
    assert [axis.get_title() for axis in figure.axes] == [
        "global cross view loss", "object cross view loss", "object cross image loss",
        "teacher's entropy / log K"]
    crops, _, neighbours, entropies = figure.axes
    assert [one.get_ydata().tolist() for one in crops.lines] == [[4, 3], [2.5]]
    # In the first epoch there are no neighbours
    np.testing.assert_array_equal(neighbours.lines[0].get_ydata(), [np.nan, 1])
    assert neighbours.lines[0].get_xdata().tolist() == [1, 2]
    assert [one.get_ydata()[0] for one in entropies.lines] == [0.8, 0.4, 0.6, 0.3]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "s3pt", "dino", "entropy of the mean answer", "entropy of single answers"]


def test_runs_without_objects_have_no_panel_of_them(logs):
    assert len(s3pt_figures.figure_losses({"dino": logs["dino"]}).axes) == 2


# ---- command lines -------------------------------------------------------------------------------

@pytest.mark.slow
def test_commands_write_the_same_picture_again(world, tmp_path, monkeypatch):
    monkeypatch.setitem(visualize.STYLE, "savefig.dpi", 100)
    run = write_log(tmp_path / "run", line(1, 0.9, global_cross_view=2.0))
    for name, command in {
            "clusters": ["--data", str(world), "--encoder", SHIPPED, "--clusters", "16"],
            "losses": [str(run)]}.items():
        one, two = tmp_path / "new" / "one.png", tmp_path / "new" / "two.png"
        for path in (one, two):
            visualize.main([name, *command, "--device", "cpu", "--out", str(path)])
        assert one.read_bytes() == two.read_bytes()
        picture = np.asarray(Image.open(one).convert("RGB"))
        assert 300 < picture.shape[1] <= 710 and picture.std() > 20


@pytest.mark.parametrize("argv, part", [
    ("clusters --encoder dino_resnet50 --data WORLD", "dino_resnet50 has no tokens"),
    ("clusters --encoder maskclip_vitb16 --data WORLD", "take a vision transformer"),
    ("clusters --encoder SHIPPED --data WORLD",
     "--clusters 201: a picture of 80 x 160 pixels has only 200 tokens; lower it"),
    ("clusters --encoder SHIPPED --clusters 16 --data BLIND", "nuscenes has no LiDAR"),
    ("clusters --encoder SHIPPED --beta 0 --data WORLD", "--beta 0: must be above 0"),
    ("losses NONE", "log.jsonl: no such file; give the folder of a run of s3pt/train.py"),
    ("losses OTHER", "no line with the losses of s3pt/train.py"),
    ("losses", "the following arguments are required: runs")])
def test_bad_input_is_one_line_and_exit_code_2(argv, part, table, tmp_path, monkeypatch, capsys):
    other = write_log(tmp_path / "other", {"epoch": 1, "loss": 0.7})
    without = {name: values for name, values in table.columns.items() if name != "scan"}
    blind = FrameTable(table.reader, table.root, without, table.conditions)
    monkeypatch.setattr(s3pt_figures, "open_tables",
                        lambda data, version: [blind if data == "BLIND" else table])
    monkeypatch.setitem(s3pt_figures.S3PT, "clusters", 201)
    for name, path in (("SHIPPED", SHIPPED), ("NONE", tmp_path / "none"), ("OTHER", other)):
        argv = argv.replace(name, str(path))
    command = [*argv.split(), "--out", str(tmp_path / "x.png"), "--device", "cpu"]
    assert part in fails_with_one_line(capsys, visualize.main, command)
    assert not (tmp_path / "x.png").exists()

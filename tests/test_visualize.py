"""The pictures' data and commands: features, scans, the same picture twice, bad input."""
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from pictures import CPU, SIZE, scans, texts
from PIL import Image
from runs import fails_with_one_line, open_one, probe_args

import probe
from experiments import visualize
from models import load_point_encoder
from plumbing.errors import InputError
from readers.nuscenes import CLASSES, CONDITIONS
from readers.table import FrameTable
from resnet import ResNet50
from vit import ViT


@pytest.fixture(scope="module")
def table(world):
    return open_one(world)


def changed(table, **columns):
    """The table with other values in some columns."""
    return FrameTable(table.reader, table.root, table.columns | columns, table.conditions)


# ---- images --------------------------------------------------------------------------------------

@pytest.mark.parametrize("grid", [(5, 10), None])
def test_image_feature_is_the_cls_token_after_the_last_norm(grid):
    """Caught where the ViT itself normalises its tokens, with learned and with rotary positions."""
    torch.manual_seed(0)
    vit = ViT(16, 64, 2, 2, grid=grid)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    seen = []
    vit.norm.register_forward_hook(lambda module, args, tokens: seen.append(tokens))
    encoder = SimpleNamespace(backbone=vit, mean=0.3, std=2)
    images = torch.rand(2, 3, *SIZE)
    vit.feature_map((images - 0.3) / 2, "norm")
    feature = visualize.image_features(encoder, images)
    torch.testing.assert_close(feature, seen[0][:, 0])
    assert feature.shape == (2, 64) and (feature[0] - feature[1]).abs().max() > 1e-3


def test_image_feature_of_a_resnet_is_the_pooled_map():
    class Encoder:
        backbone = ResNet50

        def __call__(self, images):
            return torch.tensor([[[[1.0, 2], [3, 6]], [[0, 0], [0, -4]]]])
    assert visualize.image_features(Encoder(), None).tolist() == [[3, -1]]


# ---- point clouds --------------------------------------------------------------------------------

def test_scans_hold_the_class_and_take_the_conditions_by_turns(table, first):
    items = scans(table, first, ["driveable_surface"])
    assert [item["condition"] for item in items] == [0, 1, 2]
    road = CLASSES.index("driveable_surface")
    for item in items:
        assert item["xyz"][item["part"], :2].abs().max() < 40
        torch.testing.assert_close(item["xyz"], item["inputs"]["points"][:, 1:4], atol=0, rtol=0)
        assert (item["labels"][item["part"]] == road).sum() >= visualize.ENOUGH
    with pytest.raises(InputError, match="no scan of 6 has trailer"):
        scans(table, first, ["trailer"])


def test_features_before_and_after_the_head(table, first):
    item, = scans(table, first, [], 1)
    assert "labels" not in item
    encoder = load_point_encoder(first)[0].eval()
    for layer, width in (("backbone", 16), ("head", 96)):
        features = visualize.point_features(encoder, item, layer, CPU)
        assert features.shape == (len(item["xyz"]), width)


def test_prototypes_by_hand():
    one = {"labels": torch.tensor([1, 1, 2])}, torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    two = {"labels": torch.tensor([2])}, torch.tensor([[0.6, 0.8]])
    found = visualize.class_prototypes([one, two], 17)
    torch.testing.assert_close(found[1], torch.tensor([0.5, 0.5]).sqrt())
    torch.testing.assert_close(found[2], F.normalize(torch.tensor([0.6, 1.8]), dim=0))
    assert found.shape == (17, 2) and not found[3:].any()


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
    monkeypatch.setattr(visualize.models, "IMAGE_SIZE", SIZE)
    monkeypatch.setitem(visualize.STYLE, "savefig.dpi", 100)
    command = [figure, *arguments(figure, world, first, probes), "--device", "cpu", "--out"]
    one, two = tmp_path / "new" / "one.png", tmp_path / "new" / "two.png"
    for path in (one, two):
        visualize.main([*command, str(path)])
    assert f"written: {two}" in capsys.readouterr().out
    assert one.read_bytes() == two.read_bytes()
    picture = np.asarray(Image.open(one).convert("RGB"))
    assert 300 < picture.shape[1] <= 710 and picture.std() > 20


def test_a_point_by_place_needs_no_labels(world, table, first, monkeypatch):
    without = changed(table, labels=np.full_like(table["labels"], b""))
    monkeypatch.setattr(visualize, "open_tables", lambda *args: [without])
    args = ["correlation", "--encoder", str(first), "--data", str(world),
            "--point", "2", "8", "-1", "--scans", "1"]
    figure = visualize.draw_scans(visualize.parse(args), CPU)
    above, below = figure.axes[:2]
    assert above.get_title() in CONDITIONS and below.get_title() == ""
    np.testing.assert_allclose(below.collections[1].get_offsets()[0], (2, 8), atol=3)
    assert below.collections[0].get_array().max() == pytest.approx(1, abs=1e-5)
    assert texts(figure.legends[0]) == ["chosen point"]


@pytest.mark.parametrize("figure", ["pca", "tsne", "correlation", "segmentation"])
def test_the_scenes_held_out_are_drawn(figure, world, table, first, tmp_path, monkeypatch):
    """Those that the flag names, or those of the first probe's own training."""
    scenes = table.select("train").scenes()[:2]
    flags = ["--val-scenes", *scenes]
    argv = [figure, *arguments(figure, world, first, tmp_path)]
    if figure == "segmentation":
        small = ["--weights", "random", "--image-size", "40", "80", "--steps", "1"]
        probe.main(probe_args(world, "seg", "vit_mini8", tmp_path / "seg", *small, *flags))
    else:
        argv += flags
    # What would draw the figure gives back the table instead
    for name in ("figure_pca", "figure_similarity", "figure_probes"):
        monkeypatch.setattr(visualize, name, lambda *given: given[-1])
    monkeypatch.setattr(visualize, "features_of_random_images", lambda table, *_: table)
    monkeypatch.setattr(visualize, "figure_tsne", lambda table, *_: table)
    monkeypatch.setattr(visualize.models, "IMAGE_SIZE", SIZE)
    draw = {"correlation": visualize.draw_scans, "segmentation": visualize.draw_probes}
    drawn = draw.get(figure, visualize.draw_images)(visualize.parse(argv), CPU)
    assert sorted(drawn.select("val").scenes()) == sorted(scenes)


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
    ("prototypes --encoder FIRST --classes car dog --data WORLD",
     "--classes dog: nuscenes has barrier, bicycle"),
    ("correlation --encoder FIRST --class ignore --data WORLD", "--class ignore: nuscenes has"),
    ("pca --encoders vit_mini8 --data nuscenes=WORLD,nuscenes=WORLD --weights random",
     "given twice; its frames would count double"),
    ("correlation --encoder PROBES/seg --data WORLD", "point_encoder is needed"),
    ("correlation --encoder FIRST --radius 0.5 --data WORLD", "--radius 0.5: must be at least 1")])
def test_bad_input_is_one_line_and_exit_code_2(argv, part, world, first, probes, tmp_path, capsys):
    for name, path in (("WORLD", world), ("FIRST", first), ("PROBES", probes)):
        argv = argv.replace(name, str(path))
    command = [*argv.split(), "--out", str(tmp_path / "x.png"), "--device", "cpu"]
    assert part in fails_with_one_line(capsys, visualize.main, command)
    assert not (tmp_path / "x.png").exists()


def test_tsne_needs_images_of_the_night(world, table, tmp_path, monkeypatch, capsys):
    split = np.where(table["condition"] == 2, b"train", table["split"])
    clear = changed(table, split=split)
    monkeypatch.setattr(visualize, "open_tables", lambda *args: [clear])
    command = ["tsne", "--encoders", "vit_mini8", "--weights", "random", "--data", str(world),
               "--out", str(tmp_path / "x.png"), "--device", "cpu"]
    message = fails_with_one_line(capsys, visualize.main, command)
    assert "no frame of split 'val' under night" in message
    assert not (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_what_takes_long_to_import_waits_until_it_is_used():
    slow = "{'matplotlib', 'sklearn', 'torchvision', 'nuscenes', 'transformers', 'onnx'}"
    scripts = "experiments.visualize, export, miniature.overview"
    done = subprocess.run([sys.executable, "-c", f"import sys, {scripts}\n"
                           f"print({slow} & sys.modules.keys())"],
                          cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""nuImages: masks against polygons drawn by hand and against the devkit, and the probe on them."""
import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as run_lengths
from runs import open_one

import eval as evaluation
import finetune
import probe
from data import Frames, select
from plumbing.errors import InputError
from readers import nuimages
from readers.nuimages import CLASSES
from readers.table import FrameTable, main
from results import results_table

SIZE = (90, 160)
CAR = CLASSES.index("car")
ROAD = CLASSES.index("driveable_surface")
PERSON = CLASSES.index("pedestrian")
NAMES = ("vehicle.car", "flat.driveable_surface", "human.pedestrian.child", "vehicle.ego")


def polygon(*corners):
    """nuImages' mask of a polygon of (x, y) corners."""
    (runs,) = run_lengths.frPyObjects([np.ravel(corners).astype(float).tolist()], *SIZE)
    return {"size": list(SIZE), "counts": base64.b64encode(runs["counts"]).decode()}


def rectangle(left, top, right, bottom):
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def marks_of(image, marks):
    """Records of masks, given as (category, mask), whose tokens are in the reverse order."""
    return [{"token": f"{9 - number}", "sample_data_token": image, "category_token": category,
             "mask": mask} for number, (category, mask) in enumerate(marks)]


def write(root, split, samples):
    """A nuImages version of pictures of SIZE. samples: {name: (surfaces, objects)}, of which each
    is a list of (category, mask)."""
    (root / "samples/CAM_FRONT").mkdir(parents=True, exist_ok=True)
    names = ("attribute", "calibrated_sensor", "ego_pose", "log", "sensor", "sample",
             "sample_data", "surface_ann", "object_ann")
    tables = {name: [] for name in names}
    tables["category"] = [{"token": name, "name": name} for name in NAMES]
    for number, (name, (surfaces, objects)) in enumerate(samples.items()):
        file = f"samples/CAM_FRONT/{name}.jpg"
        Image.new("RGB", SIZE[::-1], (number, 0, 0)).save(root / file)
        tables["sample"].append({"token": f"s-{name}", "key_camera_token": name,
                                 "timestamp": number, "log_token": ""})
        tables["sample_data"].append({"token": name, "sample_token": f"s-{name}", "filename": file,
                                      "height": SIZE[0], "width": SIZE[1], "is_key_frame": True})
        tables["surface_ann"] += marks_of(name, surfaces)
        tables["object_ann"] += marks_of(name, objects)
    (root / f"v1.0-{split}").mkdir()
    for table, rows in tables.items():
        (root / f"v1.0-{split}" / f"{table}.json").write_text(json.dumps(rows))


def opened(root, **options):
    """The `FrameTable` of a nuImages root."""
    return open_one(root, name="nuimages", **options)


def item_of(table, row, size=(30, 40)):
    """The labelled image of a row."""
    return Frames([table.only(np.array([row]))], image_size=size, target="labels")[0, 0]


@pytest.fixture
def drawn(tmp_path):
    """Two training pictures and one for validation. "b" shows a road, the own car on it, a car, and
    a child before the car."""
    road = polygon((0, 90), (160, 90), (100, 40), (60, 40))
    surfaces = [("flat.driveable_surface", road), ("vehicle.ego", rectangle(0, 80, 160, 90))]
    objects = [("human.pedestrian.child", rectangle(80, 20, 100, 50)), ("vehicle.car", None),
               ("vehicle.car", rectangle(60, 30, 90, 60))]
    write(tmp_path, "train", {"b": (surfaces, objects), "a": ([], [])})
    write(tmp_path, "val", {"c": ([], [("human.pedestrian.child", rectangle(0, 0, 160, 45))])})
    return tmp_path


def test_masks_are_the_polygons(drawn):
    found = opened(drawn)
    assert found["image"][:, 0].tolist() == [
        b"samples/CAM_FRONT/a.jpg", b"samples/CAM_FRONT/b.jpg", b"samples/CAM_FRONT/c.jpg"]
    labels = found.labels(1)
    expected = np.zeros(SIZE, int)
    y, x = np.mgrid[:SIZE[0], :SIZE[1]] + 0.5  # the pixels' centres
    left, right = 40 + (60 - x) * 50 / 60, 40 + (x - 100) * 50 / 60
    expected[(y > 40) & (y > left) & (y > right)] = ROAD
    expected[80:] = 0  # the own car: drawn over the road, not a class
    expected[30:60, 60:90] = CAR
    expected[20:50, 80:100] = PERSON  # over the car: its token is the later one
    wrong = labels != expected
    assert wrong.mean() < 0.006  # at slanted borders a raster may round either way
    assert not wrong[:, 62:98].any()
    assert not found.labels(0).any()


def test_all_classes_have_the_own_car_and_what_is_left(drawn):
    found = opened(drawn)
    own, background = nuimages.ALL_CLASSES.index("ego_vehicle"), len(nuimages.ALL_CLASSES) - 1
    assert nuimages.ALL_CLASSES[background] == "background" and background == 13
    labels = found.labels(1)
    every = nuimages.all_labels_of(found.root, found.columns, 1)
    assert (every[80:] == own).all() and not labels[80:].any()
    known = labels > 0
    assert known.any() and (every[known] == labels[known]).all()
    assert (every[:80][~known[:80]] == background).all()
    assert (nuimages.all_labels_of(found.root, found.columns, 0) == background).all()


def test_labels_stay_with_their_pixels_when_the_image_shrinks(drawn):
    found = opened(drawn)
    item = item_of(found, 2)
    assert item["image"].shape == (3, 30, 40)
    upper_half = [list(pixel) for pixel in np.ndindex(15, 40)]
    assert item["pixels"].tolist() == upper_half
    assert (item["labels"] == PERSON).all()
    assert item["condition"] == -1  # nuImages states none
    assert len(item_of(found, 0)["labels"]) == 0


def test_percent_and_limit(drawn):
    found = opened(drawn)
    assert found.select("train").rows.tolist() == [0, 1]
    assert found.select("val").rows.tolist() == [2]
    assert select([found], "train", limit=1)[0].rows.tolist() == [0]
    with pytest.raises(InputError, match="no frame of split 'test'; `python -m readers.nuimages"):
        found.select("test")
    images = np.full((300, 1), b"a.jpg")
    columns = {"split": np.array([b"train"] * 250 + [b"val"] * 50), "image": images}
    found = FrameTable(nuimages, "root", columns)
    assert found.select("train", percent=1).rows.tolist() == [0, 100, 200]
    assert found.select("val", percent=10).rows.tolist() == [250, 260, 270, 280, 290]
    assert found.select("train", ["night"]).rows.tolist() == [*range(250)]  # it states none
    printed = found.summary().splitlines()
    assert printed[-2:] == ["  train  full            -     250     250",
                            "  val    full            -      50      50"]


def test_images_and_masks_are_known_by_what_they_are(drawn, tmp_path):
    def of(table, *rows):
        return table.only(np.array(rows)).fingerprint()
    found = opened(drawn)
    before = of(found, 0, 1)
    files = found.select("train").files()
    assert before["frames"] == 2 and "scenes" not in before
    assert before == of(opened(drawn), 0, 1)
    assert before != of(found, 1, 0)

    # Another mask, and another name of the folder
    table = drawn / "v1.0-train/object_ann.json"
    marks = json.loads(table.read_text())
    marks[2]["mask"] = rectangle(60, 30, 91, 60)
    table.write_text(json.dumps(marks))
    (drawn / "samples/CAM_FRONT").rename(drawn / "samples/カメラ")
    for path in drawn.glob("v1.0-*/sample_data.json"):
        path.write_text(path.read_text().replace("CAM_FRONT", "カメラ"), "utf-8")
    mended = opened(drawn)
    assert of(mended, 0) != of(found, 0)
    assert of(mended, 0, 1) != before
    assert mended.select("train").files() == files
    assert item_of(mended, 0)["image"].shape == (3, 30, 40)
    (drawn / "samples/カメラ/a.jpg").unlink()
    with pytest.raises(InputError, match="the first is samples/カメラ/a.jpg"):
        opened(drawn)
    assert len(opened(drawn, look=False)["image"]) == 3


def test_one_version_may_stand_alone(drawn):
    found = opened(drawn, version="v1.0-train")
    assert found["split"].tolist() == [b"train", b"train"]
    assert found.select("train").fingerprint() == opened(drawn).select("train").fingerprint()
    with pytest.raises(InputError, match="no frame of split 'val'"):
        found.select("val")
    with pytest.raises(InputError, match="not a nuImages root: no v1.0-mini with an object_ann.js"):
        opened(drawn, version="v1.0-mini")
    shutil.rmtree(drawn / "v1.0-val")
    assert opened(drawn)["image"].tolist() == found["image"].tolist()


def test_counts_and_empty_images_are_printed(drawn, capsys):
    (drawn / "samples/CAM_FRONT/c.jpg").write_bytes(b"")
    with pytest.raises(SystemExit, match="3"):
        main("nuimages", ["--data", str(drawn)])
    assert capsys.readouterr().out.splitlines() == [
        f"nuimages={drawn}: 3 frames, 1 cameras", "  split  condition  scenes  frames  images",
        "  train  full            -       2       2", "  val    full            -       1       1",
        "bad: samples/CAM_FRONT/c.jpg is empty; extract it again"]
    with pytest.raises(InputError, match="1 of 1 frames are bad, the first: .*c.jpg is empty"):
        opened(drawn).select("val")
    assert len(opened(drawn).select("train")) == 2


def test_classes_are_the_ten_of_detection_and_the_road():
    assert len(CLASSES) == 12
    assert CLASSES[0] == "ignore" and CLASSES[-1] == "driveable_surface"


def test_wrong_roots_are_named(tmp_path, drawn):
    with pytest.raises(InputError, match="not a nuImages root: .*world.py --dataset nuimages"):
        opened(tmp_path / "samples")
    with pytest.raises(InputError, match="--cameras CAM_FRONT: choose one of random, all; nu"):
        Frames([opened(drawn)], "CAM_FRONT", SIZE, target="labels")
    (drawn / "samples/CAM_FRONT/c.jpg").unlink()
    message = "1 of 3 files .* missing, the first is samples/CAM_FRONT/c.jpg"
    with pytest.raises(InputError, match=message):
        opened(drawn)
    table = drawn / "v1.0-val/object_ann.json"
    rows = json.loads(table.read_text())
    rows[0]["mask"]["size"] = [1, 1]
    table.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"v1.0-val: a mask of size \[1, 1\]"):
        opened(drawn)
    table.write_text("[")
    with pytest.raises(InputError, match="cannot read v1.0-val"):
        opened(drawn)
    for folder in drawn.glob("v1.0-*"):
        for name in ("sample", "sample_data", "object_ann", "surface_ann"):
            (folder / f"{name}.json").write_text("[]")
    with pytest.raises(InputError, match="its tables have no sample; extract them again"):
        opened(drawn)


# ---- the miniature -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """10 training and 6 validation scenes of one frame and two cameras."""
    from miniature.world import make_world
    root = tmp_path_factory.mktemp("nuimages") / "data"
    return make_world(root, seed=3, train=(6, 2, 2), val=2, frames=1, cameras=2, workers=1,
                      dataset="nuimages")


@pytest.mark.slow
def test_the_devkit_draws_the_same_masks(miniature):
    from nuimages import NuImages
    from nuimages.utils.utils import name_to_index_mapping
    found = opened(miniature)
    assert len(found.select("train")) == 20 and len(found.select("val")) == 12
    devkit = NuImages("v1.0-val", str(miniature), verbose=False)
    names = {number: name for name, number in name_to_index_mapping(devkit.category).items()}
    tokens = {record["filename"]: record["token"] for record in devkit.sample_data}
    seen = set()
    for row in found.select("val").rows:
        semantic, _ = devkit.get_segmentation(tokens[found["image"][row, 0].decode()])
        labels = found.labels(row)
        for number in np.unique(semantic[semantic > 0]):
            (kind,) = np.unique(labels[semantic == number])
            seen.add((names[number], CLASSES[kind]))
        assert ((labels > 0) <= (semantic > 0)).all()
    assert {("vehicle.car", "car"), ("flat.driveable_surface", "driveable_surface"),
            ("human.pedestrian.adult", "pedestrian"), ("vehicle.truck", "truck")} <= seen


def test_miniature_masks_are_what_the_renderer_hit(miniature):
    from miniature.scenes import picture, plan_scene
    from miniature.street import CATEGORIES
    from miniature.world import list_jobs
    options = json.loads((miniature / "world.json").read_text())
    found = opened(miniature)
    _, _, split, number, condition, name = list_jobs(miniature, options)[-1]
    plan = plan_scene(options, split, number, condition)
    kinds = picture(options, plan, 0, "CAM_FRONT_LEFT")[1]
    time = str(plan["frames"][0]["CAM_FRONT_LEFT"]["time"])
    (row,) = [row for row in found.select("val").rows if time in found["image"][row, 0].decode()]
    labels = found.labels(row)
    assert (labels == CAR).any()
    assert ((labels == CAR) == (kinds == CATEGORIES.index("vehicle.car"))).all()
    assert ((labels == ROAD) == (kinds == CATEGORIES.index("flat.driveable_surface"))).all()


@pytest.mark.parametrize("script, extra", [
    (probe, []), (finetune, ["--percent", "10", "--lr", "1e-4"])])
def test_probe_and_table(miniature, tmp_path, script, extra, capsys):
    out = tmp_path / "probe"
    script.main(["--data", f"nuimages={miniature}", "--task", "seg", "--encoder",
                 "miniature/encoder.pth", "--batch", "2", "--epochs", "2", "--workers", "0",
                 "--out", str(out), "--device", "cpu", *extra])
    printed = capsys.readouterr().out
    assert re.search(r"train +full +- +20 +20\n", printed)
    assert ("10 % of the training set: 2 images" in printed) == bool(extra)
    result = evaluation.evaluate(out, torch.device("cpu"), workers=0)
    assert result["images"] == 12
    assert set(result["mIoU"]) == {"full"} and 0 < result["mIoU"]["full"] < 100
    assert set(result["IoU"]["full"]) <= set(CLASSES[1:])
    assert "driveable_surface" in result["IoU"]["full"]
    number = result["mIoU"]["full"]
    assert results_table([result]).endswith(f"| {out} | seg on nuimages | {number:.1f} |")


def test_the_miniature_is_not_taken_for_nuscenes_nor_the_other_way(miniature, world, tmp_path):
    message = "no --version v1.0-trainval; there is v1.0-train, v1.0-val"
    with pytest.raises(InputError, match=message):
        open_one(miniature)
    with pytest.raises(InputError, match="not a nuImages root: .*there is v1.0-trainval"):
        opened(world)
    from miniature.world import make_world
    with pytest.raises(InputError, match="dataset nuimages there, None now"):
        make_world(miniature, seed=3, train=(6, 2, 2), val=2, frames=1, cameras=2, workers=1)


@pytest.mark.slow
def test_the_index_is_built_by_another_process(miniature, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nuimages, "_read_version", None)  # not here
    assert len(opened(miniature, here=False)["image"]) == 32


# ---- damaged masks -----------------------------------------------------------------------------

def test_runs_cover_what_they_cover():
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.3, 0.5, 1):
        for shape in ((1, 1), (7, 5), (90, 160), (900, 1600)):
            mask = np.asfortranarray(rng.random(shape) < density, np.uint8)
            runs = np.frombuffer(run_lengths.encode(mask)["counts"], np.uint8)
            assert nuimages.covered(runs) == mask.size
            if len(runs) > 1:
                assert nuimages.covered(runs[:-1]) != mask.size
    assert nuimages.covered(np.zeros(0, np.uint8)) == -1


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), content=st.binary(max_size=4))
def test_any_mask(drawn, place, content):
    """A mask is drawn only if all its runs are there: then pycocotools gives zeros and ones."""
    found = opened(drawn)
    start = found["start"].copy()
    place %= int(start[1])  # in the first mask
    runs = found["runs"].tobytes()
    runs = runs[:place] + content + runs[place + 1:]
    found.columns["runs"] = np.frombuffer(runs, np.uint8)
    found.columns["start"] = np.append(0, start[1:] + len(content) - 1)
    try:
        labels = found.labels(1)
    except InputError as error:
        assert "a mask of samples/CAM_FRONT/b.jpg is damaged" in str(error)
    else:
        assert set(np.unique(labels)) <= {0, CAR, ROAD, PERSON}

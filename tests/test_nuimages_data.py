"""nuImages: masks against polygons drawn by hand and against the devkit, and the probe on them."""
import base64
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as run_lengths

import eval as evaluation
import nuimages_data
import probe
from errors import InputError
from nuimages_data import CLASSES, LabelledImages, load_nuimages

SIZE = (90, 160)
CAR, ROAD, PERSON = CLASSES.index("car"), CLASSES.index("driveable_surface"), CLASSES.index("pedestrian")
NAMES = ("vehicle.car", "flat.driveable_surface", "human.pedestrian.child", "vehicle.ego")


def polygon(*corners):
    """nuImages' mask of a polygon of (x, y) corners."""
    (runs,) = run_lengths.frPyObjects([[float(value) for corner in corners for value in corner]], *SIZE)
    return {"size": list(SIZE), "counts": base64.b64encode(runs["counts"]).decode()}


def rectangle(left, top, right, bottom):
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def write(root, split, samples):
    """A nuImages version of SIZE pictures. samples: name -> (surfaces, objects), each a list of (category, mask)."""
    (root / "samples/CAM_FRONT").mkdir(parents=True, exist_ok=True)
    tables = {name: [] for name in "attribute calibrated_sensor ego_pose log sensor sample sample_data surface_ann object_ann".split()}
    tables["category"] = [{"token": name, "name": name} for name in NAMES]
    for number, (name, (surfaces, objects)) in enumerate(samples.items()):
        file = f"samples/CAM_FRONT/{name}.jpg"
        Image.new("RGB", SIZE[::-1], (number, 0, 0)).save(root / file)
        tables["sample"].append({"token": f"s-{name}", "key_camera_token": name, "timestamp": number, "log_token": ""})
        tables["sample_data"].append({"token": name, "sample_token": f"s-{name}", "filename": file, "height": SIZE[0], "width": SIZE[1],
                                      "is_key_frame": True})
        for table, marks in (("surface_ann", surfaces), ("object_ann", objects)):
            tables[table] += [{"token": f"{9 - k}", "sample_data_token": name, "category_token": category, "mask": mask}
                              for k, (category, mask) in enumerate(marks)]
    (root / f"v1.0-{split}").mkdir()
    for table, rows in tables.items():
        (root / f"v1.0-{split}" / f"{table}.json").write_text(json.dumps(rows))


@pytest.fixture
def drawn(tmp_path):
    """Two training pictures; in "b" a road, the own car on it, a car, and a child before the car. One for validation."""
    road = polygon((0, 90), (160, 90), (100, 40), (60, 40))
    write(tmp_path, "train", {
        "b": ([("flat.driveable_surface", road), ("vehicle.ego", rectangle(0, 80, 160, 90))],
              [("human.pedestrian.child", rectangle(80, 20, 100, 50)), ("vehicle.car", None), ("vehicle.car", rectangle(60, 30, 90, 60))]),
        "a": ([], [])})
    write(tmp_path, "val", {"c": ([], [("human.pedestrian.child", rectangle(0, 0, 160, 45))])})
    return tmp_path


def test_masks_are_the_polygons(drawn):
    found = load_nuimages(drawn, here=True)
    assert found.image.tolist() == [b"samples/CAM_FRONT/a.jpg", b"samples/CAM_FRONT/b.jpg", b"samples/CAM_FRONT/c.jpg"]
    labels = found.labels(1)
    expected = np.zeros(SIZE, int)
    y, x = np.mgrid[:SIZE[0], :SIZE[1]] + 0.5  # the pixels' centres
    edge = 40 + (60 - x) * 50 / 60, 40 + (x - 100) * 50 / 60
    expected[(y > 40) & (y > edge[0]) & (y > edge[1])] = ROAD
    expected[80:] = 0  # the own car: drawn over the road, not a class
    expected[30:60, 60:90] = CAR
    expected[20:50, 80:100] = PERSON  # over the car: its token is the later one
    wrong = labels != expected
    assert wrong.mean() < 0.006 and not wrong[:, 62:98].any()  # but for the slanted borders, where a raster may round either way
    assert not found.labels(0).any()


def test_labels_stay_with_their_pixels_when_the_image_shrinks(drawn):
    item = LabelledImages(load_nuimages(drawn, here=True), [2], "all", (30, 40))[0, 0]
    assert item["image"].shape == (3, 30, 40)
    assert item["pixels"].tolist() == [[row, col] for row in range(15) for col in range(40)]  # the upper half
    assert (item["labels"] == PERSON).all()
    assert len(LabelledImages(load_nuimages(drawn, here=True), [0], "all", (30, 40))[0, 0]["labels"]) == 0


def test_percent_and_limit(drawn):
    found = load_nuimages(drawn, here=True)
    assert found.select("train").tolist() == [0, 1] and found.select("val").tolist() == [2] and found.select("train", limit=1).tolist() == [0]
    found.split = np.array([b"train"] * 250 + [b"val"] * 50)
    assert found.select("train", percent=1).tolist() == [0, 100, 200] and found.select("val", percent=10).tolist() == [250, 260, 270, 280, 290]
    assert "250 images of train, 50 images of val" in found.summary()
    with pytest.raises(InputError, match="no image of split 'test'"):
        found.select("test")


def test_images_and_masks_are_known_by_what_they_are(drawn, tmp_path):
    found = load_nuimages(drawn, here=True)
    before, files = found.fingerprint([0, 1]), found.files([0, 1])
    assert before["images"] == 2 and before == load_nuimages(drawn, here=True).fingerprint([0, 1]) != found.fingerprint([1, 0])
    table = drawn / "v1.0-train/object_ann.json"
    marks = json.loads(table.read_text())
    marks[2]["mask"] = rectangle(60, 30, 91, 60)
    table.write_text(json.dumps(marks))
    (drawn / "samples/CAM_FRONT").rename(drawn / "samples/カメラ")
    for path in drawn.glob("v1.0-*/sample_data.json"):
        path.write_text(path.read_text().replace("CAM_FRONT", "カメラ"), "utf-8")
    mended = load_nuimages(drawn, here=True)
    assert mended.fingerprint([0]) != found.fingerprint([0]) and mended.fingerprint([0, 1]) != before and mended.files([0, 1]) == files
    assert LabelledImages(mended, [0], "all", (30, 40))[0, 0]["image"].shape == (3, 30, 40)
    (drawn / "samples/カメラ/a.jpg").unlink()
    with pytest.raises(InputError, match="the first is samples/カメラ/a.jpg"):
        load_nuimages(drawn, here=True)
    assert len(load_nuimages(drawn, here=True, look=False).image) == 3


def test_classes_are_the_ten_of_detection_and_the_road():
    assert len(CLASSES) == 12 and CLASSES[0] == "ignore" and CLASSES[-1] == "driveable_surface"


def test_wrong_roots_are_named(tmp_path, drawn):
    with pytest.raises(InputError, match="not a nuImages root: .*world.py --dataset nuimages"):
        load_nuimages(tmp_path / "samples")
    with pytest.raises(InputError, match="--cameras CAM_FRONT: nuImages has one image a sample"):
        LabelledImages(None, [0], "CAM_FRONT", SIZE)
    (drawn / "samples/CAM_FRONT/c.jpg").unlink()
    with pytest.raises(InputError, match="1 of 3 files .* missing, the first is samples/CAM_FRONT/c.jpg"):
        load_nuimages(drawn, here=True)
    table = drawn / "v1.0-val/object_ann.json"
    rows = json.loads(table.read_text())
    rows[0]["mask"]["size"] = [1, 1]
    table.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"v1.0-val: a mask of size \[1, 1\]"):
        load_nuimages(drawn, here=True)
    table.write_text("[")
    with pytest.raises(InputError, match="cannot read v1.0-val"):
        load_nuimages(drawn, here=True)


# ---- the miniature ----

@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """10 training and 6 validation scenes of one frame and two cameras."""
    from miniature.world import make_world
    return make_world(tmp_path_factory.mktemp("nuimages") / "data", seed=3, train=(6, 2, 2), val=2, frames=1, cameras=2, workers=1,
                      dataset="nuimages")


@pytest.mark.slow
def test_the_devkit_draws_the_same_masks(miniature):
    from nuimages import NuImages
    from nuimages.utils.utils import name_to_index_mapping
    found = load_nuimages(miniature)
    assert len(found.select("train")) == 20 and len(found.select("val")) == 12
    devkit = NuImages("v1.0-val", str(miniature), verbose=False)
    names = {number: name for name, number in name_to_index_mapping(devkit.category).items()}
    tokens = {record["filename"]: record["token"] for record in devkit.sample_data}
    seen = set()
    for row in found.select("val"):
        semantic, _ = devkit.get_segmentation(tokens[found.image[row].decode()])
        labels = found.labels(row)
        for number in np.unique(semantic[semantic > 0]):
            (kind,) = np.unique(labels[semantic == number])
            seen.add((names[number], CLASSES[kind]))
        assert ((labels > 0) <= (semantic > 0)).all()
    assert {("vehicle.car", "car"), ("flat.driveable_surface", "driveable_surface"), ("human.pedestrian.adult", "pedestrian"),
            ("vehicle.truck", "truck")} <= seen


def test_miniature_masks_are_what_the_renderer_hit(miniature):
    from miniature.street import CATEGORIES
    from miniature.world import list_jobs, picture, plan_scene
    options = json.loads((miniature / "world.json").read_text())
    found = load_nuimages(miniature)
    _, _, split, number, condition, name = list_jobs(miniature, options)[-1]
    plan = plan_scene(options, split, number, condition)
    kinds = picture(options, plan, 0, "CAM_FRONT_LEFT")[1]
    (row,) = [row for row in found.select("val") if str(plan["frames"][0]["CAM_FRONT_LEFT"]["time"]) in found.image[row].decode()]
    labels = found.labels(row)
    assert ((labels == CAR) == (kinds == CATEGORIES.index("vehicle.car"))).all() and (labels == CAR).any()
    assert ((labels == ROAD) == (kinds == CATEGORIES.index("flat.driveable_surface"))).all()


@pytest.mark.parametrize("extra", [[], ["--percent", "10", "--finetune", "--lr", "1e-4"]])
def test_probe_and_table(miniature, tmp_path, extra, capsys):
    out = tmp_path / "probe"
    command = ["--data", str(miniature), "--task", "nuimages", "--encoder", "miniature/encoder.pth", "--batch", "2", "--epochs", "2",
               "--workers", "0", "--out", str(out), "--device", "cpu", *extra]
    probe.main(command)
    printed = capsys.readouterr().out
    assert "20 images of train" in printed and ("10 % of the training set: 2 images" in printed) == bool(extra)
    result = evaluation.evaluate(out, torch.device("cpu"), workers=0)
    assert result["images"] == 12 and set(result["mIoU"]) == {"full"} and 0 < result["mIoU"]["full"] < 100
    assert set(result["IoU"]["full"]) <= set(CLASSES[1:]) and "driveable_surface" in result["IoU"]["full"]
    assert "| – | – | – |" in evaluation.table([result])


def test_the_miniature_is_not_taken_for_nuscenes_nor_the_other_way(miniature, world, tmp_path):
    from index import load_index
    with pytest.raises(InputError, match="no --version v1.0-trainval; there is v1.0-train, v1.0-val"):
        load_index(miniature)
    with pytest.raises(InputError, match="not a nuImages root: .*there is v1.0-trainval"):
        load_nuimages(world)
    from miniature.world import make_world
    with pytest.raises(InputError, match="dataset nuimages there, None now"):
        make_world(miniature, seed=3, train=(6, 2, 2), val=2, frames=1, cameras=2, workers=1)


@pytest.mark.slow
def test_the_index_is_built_by_another_process(miniature, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nuimages_data, "_read_tables", None)  # not here
    assert len(load_nuimages(miniature).image) == 32


# ---- damaged masks ----

def test_runs_cover_what_they_cover():
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.3, 0.5, 1):
        for shape in ((1, 1), (7, 5), (90, 160), (900, 1600)):
            mask = np.asfortranarray(rng.random(shape) < density, np.uint8)
            runs = np.frombuffer(run_lengths.encode(mask)["counts"], np.uint8)
            assert nuimages_data.covered(runs) == mask.size
            if len(runs) > 1:
                assert nuimages_data.covered(runs[:-1]) != mask.size
    assert nuimages_data.covered(np.zeros(0, np.uint8)) == -1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(place=st.integers(0, 10**6), content=st.binary(max_size=4))
def test_any_mask(drawn, place, content):
    """A mask is drawn only if all its runs are there: then it is what pycocotools says, of zeros and ones."""
    found = load_nuimages(drawn, here=True)
    runs, start = found.runs.tobytes(), found.start.copy()
    place %= int(start[1])
    runs = runs[:place] + content + runs[place + 1:]  # in the first mask
    found.start, found.runs = np.append(0, start[1:] + len(content) - 1), np.frombuffer(runs, np.uint8)
    try:
        labels = found.labels(1)
    except InputError as error:
        assert "a mask of samples/CAM_FRONT/b.jpg is damaged" in str(error)
    else:
        assert set(np.unique(labels)) <= {0, CAR, ROAD, PERSON}

"""`Frames` of several datasets, of images alone, of whole scans; how scans become points."""
import json
import pickle
import types

import numpy as np
import pytest
import torch
from runs import open_one

from data import Frames, collate, select, set_sampling
from miniature.world import make_world
from plumbing.errors import InputError
from probe import classes_of
from readers import nuimages, nuscenes
from readers.files import read_scan
from readers.nuscenes import CONDITIONS, SAMPLING
from readers.table import FrameTable
from waffleiron import prepare

SIZE = (80, 160)
EIGHT, THREE, CAMERAS = 8, 3, 2  # frames of `one` with one camera; of `other`, and its cameras


@pytest.fixture(scope="module")
def one(world):
    """The 8 training frames of one world, of one camera."""
    return open_one(world).select("train")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The 3 training frames of another world, of two cameras."""
    root = tmp_path_factory.mktemp("other") / "data"
    make_world(root, seed=8, train=(2, 0, 1), val=0, frames=1, cameras=CAMERAS, workers=1)
    return open_one(root).select("train")


def assert_same(a, b):
    """Assert that two items, or parts of them, are equal bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


# ---- several tables ------------------------------------------------------------------------------

def test_items_are_numbered_through_the_tables(one, other):
    frames = Frames([one, other], "all", SIZE, prepare)
    assert len(frames) == EIGHT + THREE * CAMERAS and frames.frame_count() == EIGHT + THREE
    expected = [(table["image"][row, camera].decode())
                for table, cameras in ((one, 1), (other, CAMERAS))
                for row in table.rows for camera in range(cameras)]
    assert [frames.name((0, number)) for number in range(len(frames))] == expected
    # a frame's number is that of its row, after all rows of the tables before
    rows = [frames.number_of_frame((0, number)) for number in range(len(frames))]
    after = len(one["split"])
    assert rows == [*one.rows, *(after + np.repeat(other.rows, CAMERAS))]
    for cameras in ("random", "CAM_FRONT", "scan"):
        assert len(Frames([one, other], cameras, SIZE, prepare)) == EIGHT + THREE
    with pytest.raises(InputError, match="--cameras CAM_BACK: choose one of random, all, scan"):
        Frames([one, other], "CAM_BACK")


@pytest.mark.parametrize("options", [
    dict(cameras="all", target="labels"), dict(cameras="scan", target="labels", points="every"),
    dict(cameras="CAM_FRONT", target="depths", prepare=None)])
def test_a_part_of_a_mixture_is_as_the_table_alone(one, other, options):
    """Where nothing is random. Which table an item is from changes nothing of it."""
    options = dict(image_size=SIZE, prepare=prepare) | options
    mixture = Frames([one, other], **options)
    alone = [Frames([table], **options) for table in (one, other)]
    numbers = [(part, number) for part in alone for number in range(len(part))]
    assert len(numbers) == len(mixture)
    for place in (0, EIGHT - 1, EIGHT, len(mixture) - 1):
        part, number = numbers[place]
        assert_same(mixture[0, place], part[0, number])


@pytest.mark.parametrize("points", ["random", "augmented"])
def test_a_random_item_of_a_mixture_is_up_to_its_number_as_alone(one, other, points, monkeypatch):
    """The generator is numbered through the mixture; all else is as for the table alone."""
    options = dict(cameras="random", image_size=SIZE, prepare=prepare, points=points, seed=3)
    mixture = Frames([one, other], **options)
    first = Frames([one], **options)
    for key in ((0, 0), (5, EIGHT - 1)):
        assert_same(mixture[key], first[key])

    found = [mixture[epoch, EIGHT + 2] for epoch in range(4)]
    make = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng",
                        lambda key: make((key[0], key[1], key[2] + EIGHT)))
    second = Frames([other], **options)
    for epoch, item in enumerate(found):
        assert_same(item, second[epoch, 2])
    assert len({len(item["pixels"]) for item in found}) > 1  # of both cameras


def test_conditions_are_all_that_the_tables_state(one, other):
    renamed = dict(other.columns, condition=np.where(other["condition"] == 2, 0, 1))
    foggy = FrameTable(nuscenes, other.root, renamed, ("night", "fog"), other.rows)
    unknown = FrameTable(nuscenes, other.root, other.columns, (), other.rows)
    frames = Frames([one, foggy, unknown], "CAM_FRONT", SIZE)
    assert frames.conditions == (*CONDITIONS, "fog")
    found = [frames[0, number]["condition"] for number in range(len(frames))]
    expected = [*one["condition"][one.rows], *np.where(other["condition"][other.rows] == 2, 2, 3)]
    assert found == [*expected, -1, -1, -1]
    assert collate([frames[0, 0], frames[0, len(frames) - 1]])["condition"].tolist() == [0, -1]


def test_a_limit_is_spread_over_all_tables(one, other):
    names = [(table.root, row) for table in (one, other) for row in table.rows]
    for limit in (1, 2, 5, 10, 11, 99, None):
        chosen = select([one, other], "train", limit=limit)
        found = [(table.root, row) for table in chosen for row in table.rows]
        count = min(limit or 11, 11)
        places = np.linspace(0, 10, count).round().astype(int)  # evenly spread
        assert found == [names[place] for place in places]
        assert len(chosen) == (1 if limit == 1 else 2)
    chosen = select([one, other], "train", ["day-clear"], limit=3)
    assert [len(table) for table in chosen] == [2, 1]
    assert all((table["condition"][table.rows] == 0).all() for table in chosen)
    message = f"--data {other.root}: no frame of split 'train' under day-rain"
    with pytest.raises(InputError, match=message):
        select([one, other], "train", ["day-rain"])


def test_a_batch_of_two_datasets(one, other):
    frames = Frames([one, other], "all", SIZE, prepare, "labels")
    items = [frames[0, number] for number in (EIGHT, 0, EIGHT + 1)]
    batch = collate(items)
    inputs = batch["inputs"]
    for number, item in enumerate(items):
        rows = batch["view"] == number
        assert torch.equal(batch["labels"][rows], item["labels"])
        assert torch.equal(inputs["points"][rows], item["inputs"]["points"])
        own = inputs["points"][inputs["neighbors"][rows]]
        assert torch.equal(own, item["inputs"]["points"][item["inputs"]["neighbors"]])


def test_a_bad_frame_s_place_is_taken_by_the_next_table_s(one, other):
    reasons = one["bad"].astype("S20")
    reasons[one.rows[-1]] = b"it is torn"
    torn = FrameTable(nuscenes, one.root, one.columns | {"bad": reasons}, CONDITIONS, one.rows)
    frames = Frames([torn, other], "all", SIZE, prepare, skip_bad=True)
    item = frames[0, EIGHT - 1]
    assert item.pop("bad") == [(one.rows[-1], f"{one.root}: it is torn")]
    assert_same(item, frames.view((0, EIGHT)))

    broken = dict(other.columns, bad=np.full(len(other["split"]), b"it is torn"))
    broken = FrameTable(nuscenes, other.root, broken, CONDITIONS, other.rows)
    item = Frames([one, broken], "all", SIZE, prepare, skip_bad=True)[0, EIGHT + 3]
    numbers = [number - len(one["split"]) for number, _ in item["bad"]]
    assert numbers == [other.rows[1], other.rows[2], other.rows[2]]  # then from the front
    assert torch.equal(item["image"], frames[0, 0]["image"])


def test_frames_can_be_sent_to_a_loading_process(one, other):
    frames = Frames([one, other], "all", SIZE, prepare, "labels")
    sent = pickle.loads(pickle.dumps(frames))
    assert sent.tables[1].reader is nuscenes
    for number in (0, len(frames) - 1):
        assert_same(sent[0, number], frames[0, number])


# ---- images alone --------------------------------------------------------------------------------

def test_images_alone_need_no_scan(copy):
    with_scans = open_one(copy).select("train")
    expected = Frames([with_scans], "all", SIZE, prepare)[0, 2]["image"]
    table = open_one(copy)
    for path in (copy / "samples/LIDAR_TOP").iterdir():
        path.write_bytes(b"unreadable")
    frames = Frames([table.select("train")], "all", SIZE)
    item = frames[0, 2]
    assert item.keys() == {"image", "condition"} and torch.equal(item["image"], expected)
    batch = collate([item, frames[0, 0], frames[0, 1]])
    assert batch["image"].shape == (3, 3, *SIZE) and batch["condition"].shape == (3,)
    assert batch["view"].shape == (0,) and batch["view"].dtype == torch.int64
    assert batch.keys() == {"image", "condition", "view"}
    assert Frames([table.select("train")], "all")[0, 0].keys() == {"condition"}
    with pytest.raises(InputError, match="text"):
        Frames([table.select("train")], "all", SIZE, target="depths")[0, 0]


def test_a_batch_refuses_a_field_that_it_does_not_know():
    with pytest.raises(ValueError, match="collate does not know the field 'weather': say in data"):
        collate([{"condition": 0, "weather": 3}])


# ---- which points --------------------------------------------------------------------------------

def test_every_point_has_its_place_and_the_3d_encoder_gets_one_a_voxel(one):
    few = one.only(one.rows)
    few.sampling = few.sampling | {"voxel": 1.0, "max_points": 50}
    options = dict(cameras="scan", prepare=prepare, target="labels")
    scan = read_scan(few.path("scan", few.rows[0]))
    every = Frames([few], points="every", **options)[0, 0]
    kept = every["inputs"]["points"][:, 1:4]
    assert len(every["labels"]) == len(every["nearest"]) == len(scan) > len(kept) > 50
    assert every["labels"].tolist() == few.labels(few.rows[0], len(scan)).tolist()
    # each of the points kept is its own nearest
    own = torch.from_numpy(scan[:, :3].copy())
    place = {tuple(xyz): number for number, xyz in enumerate(own.tolist())}
    rows = torch.tensor([place[tuple(xyz)] for xyz in kept.tolist()])
    assert torch.equal(every["nearest"][rows], torch.arange(len(kept)))
    # the same voxels as "first", which is limited in number
    first = Frames([few], points="first", **options)[0, 0]
    assert len(first["labels"]) == len(first["inputs"]["points"]) == 50
    assert "nearest" not in first
    of_every = set(map(tuple, kept.tolist()))
    assert set(map(tuple, first["inputs"]["points"][:, 1:4].tolist())) <= of_every
    assert few.sampling["max_points"] == 50 and "keep" not in few.sampling


def test_points_are_drawn_anew_where_they_are_random_only(one):
    coarse = one.only(one.rows)
    coarse.sampling = coarse.sampling | {"voxel": 2.0}
    for points, is_random in (("random", True), ("augmented", True), ("first", False)):
        frames = Frames([coarse], "all", SIZE, prepare, points=points)
        a, b = (frames[epoch, 0]["inputs"]["points"] for epoch in (0, 1))
        assert torch.equal(a, b) != is_random


def test_an_augmented_cloud_is_turned_and_its_pixels_stay(one):
    seen = []
    for points in ("first", "augmented"):
        item = Frames([one], "all", SIZE, prepare, points=points)[0, 0]
        values = zip(item["pixels"].tolist(), item["inputs"]["points"].tolist())
        seen.append({tuple(pixel): point for pixel, point in values})
    both = seen[0].keys() & seen[1].keys()
    plain, turned = (np.array([points[pixel] for pixel in both]) for points in seen)
    assert len(both) > 0.5 * len(seen[0])
    # of intensity, x, y, z, radius
    np.testing.assert_allclose(plain[:, [0, 3, 4]], turned[:, [0, 3, 4]], rtol=1e-4, atol=1e-4)
    assert np.abs(plain[:, 1:3] - turned[:, 1:3]).mean() > 1


def without_scans(name="frames"):
    """A table of images alone, as nuImages'."""
    columns = {"split": np.array([b"train"] * 4), "image": np.full((4, 1), b"a.jpg")}
    return FrameTable(nuimages, name, columns)


@pytest.mark.parametrize("task, voxel", [(None, 0.1), ("probe", 0.05), ("finetune", 0.02)])
def test_a_task_may_have_a_sampling_of_its_own(one, task, voxel):
    own = {"probe": {"voxel": 0.05, "cell": 0.2}, "finetune": {"voxel": 0.02}}
    table = one.only(one.rows)
    table.sampling = SAMPLING | own
    known = set_sampling([table], task=task)
    expected = SAMPLING | own.get(task, {})
    assert known == {"nuscenes": expected} and table.sampling == expected
    assert known["nuscenes"]["voxel"] == voxel

    # what a checkpoint says comes before the dataset's, and the task's before both
    table.sampling = SAMPLING | own
    stored = {"nuscenes": SAMPLING | {"voxel": 0.3, "fov": (9, 9, 9)}, "another": {}}
    known = set_sampling([table], stored, task)
    assert known["nuscenes"] == stored["nuscenes"] | own.get(task, {})
    assert stored["nuscenes"]["voxel"] == 0.3  # it is as it was
    assert not {"probe", "finetune"} & known["nuscenes"].keys()

    # again, as an evaluation does with what the probe's checkpoint says
    assert set_sampling([table], known, task) == known
    assert Frames([table.only(table.rows)], "all", SIZE, prepare)[0, 0]["inputs"]
    assert SAMPLING["voxel"] == 0.1


def test_several_datasets_have_a_sampling_each(one, other):
    tables = [one.only(one.rows), other.only(other.rows)]
    tables[1].name = "elsewhere"
    tables[1].sampling = tables[1].sampling | {"max_points": 7}
    known = set_sampling(tables)
    assert known == {"nuscenes": SAMPLING, "elsewhere": SAMPLING | {"max_points": 7}}
    frames = Frames(tables, "CAM_FRONT", SIZE, prepare)
    assert len(frames[0, EIGHT]["pixels"]) == 7 < len(frames[0, 0]["pixels"])
    known = set_sampling(tables, {"elsewhere": SAMPLING | {"voxel": 3.0}})
    assert known["nuscenes"] == SAMPLING and known["elsewhere"]["voxel"] == 3.0


def test_a_dataset_without_scans_has_no_points(one):
    table = without_scans()
    with pytest.raises(InputError, match="--data frames: nuimages has no LiDAR scans"):
        set_sampling([one.only(one.rows), table])
    with pytest.raises(InputError, match="--data frames: nuimages has no depths"):
        Frames([table], target="depths")
    for cameras in ("scan", "CAM_FRONT"):
        with pytest.raises(InputError, match=f"--cameras {cameras}: choose one of random, all; n"):
            Frames([table], cameras)
    assert len(Frames([table], "random")) == len(Frames([one, table], "all")) - EIGHT == 4


def test_the_samplings_of_a_dataset_are_data(one):
    """They go into a checkpoint, and into a fingerprint."""
    known = set_sampling([one.only(one.rows)])
    assert json.loads(json.dumps(known))["nuscenes"].keys() == SAMPLING.keys()


# ---- labelled pixels beside scans ----------------------------------------------------------------

def dense_table(one, classes=nuscenes.CLASSES):
    """A table of images whose pixels are labelled, with these classes; one frame of `one`."""
    reader = types.SimpleNamespace(__name__="readers.dense", CLASSES=classes)
    reader.labels = lambda path, count=None: np.full((900, 1600), 4, np.uint8)
    columns = {name: one[name][one.rows[:1]] for name in ("split", "image", "image_size", "labels")}
    return FrameTable(reader, one.root, columns)


def test_labelled_pixels_and_scans_make_one_batch(one):
    dense = dense_table(one)
    for tables in ([one, dense], [dense, one]):
        frames = Frames(tables, "all", SIZE, target="labels")
        items = [frames[0, 0], frames[0, len(frames) - 1]]
        batch = collate(items)
        assert "depths" not in batch
        assert len(batch["labels"]) == len(batch["pixels"]) == len(batch["view"])
        counts = {len(item["labels"]) for item in items}
        assert SIZE[0] * SIZE[1] in counts and min(counts) < 5000


def test_data_without_labels_is_refused(one):
    unlabelled = dense_table(one)
    del unlabelled.columns["labels"]
    with pytest.raises(InputError, match="dense has no labels"):
        Frames([unlabelled], "all", SIZE, target="labels")
    del unlabelled.reader.CLASSES
    with pytest.raises(InputError, match="--task seg: dense has no labels"):
        classes_of([unlabelled], "seg")


def test_labels_of_another_number_than_points_are_named(one, monkeypatch):
    monkeypatch.setattr(nuscenes, "labels", lambda path, count=None: np.zeros(count - 5, np.uint8))
    with pytest.raises(InputError, match=r"_lidarseg.bin: \d+ labels for \d+ points; write both"):
        Frames([one], "all", SIZE, target="labels")[0, 0]

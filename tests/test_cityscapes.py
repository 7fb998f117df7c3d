"""Cityscapes: the classes of its ids, its folders, pictures without labels, what is damaged; the
one real picture where it is there, and a probe on the miniature's."""
import re
import shutil

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image
from runs import checkpoint_of, eval_args, fails_with_one_line, open_one, probe_args

import eval as evaluation
import probe
from data import Frames, select
from plumbing.atomic import read_json
from plumbing.errors import InputError
from readers.cityscapes import CLASSES, labels
from readers.table import hold_out, main, open_tables

# Cityscapes' names from id 0 on; those with a star are left out of its evaluation
NAMES = """unlabeled* ego_vehicle* rectification_border* out_of_roi* static* dynamic* ground* road
sidewalk parking* rail_track* building wall fence guard_rail* bridge* tunnel* pole polegroup*
traffic_light traffic_sign vegetation terrain sky person rider car truck bus caravan* trailer* train
motorcycle bicycle""".split()
PLACES = ("train/aachen/aachen_000000_000019", "train/aachen/aachen_000001_000019",
          "train/bremen/bremen_000000_000019", "val/lindau/lindau_000000_000019",
          "test/bonn/bonn_000000_000019")


def files_of(root, place):
    """The picture of a place and its labels."""
    return root / f"leftImg8bit/{place}_leftImg8bit.png", (
        root / f"gtFine/{place}_gtFine_labelIds.png")


def write(root, place, ids):
    """A grey picture and its labels, ids [H, W]."""
    picture, path = files_of(root, place)
    for file in (picture, path):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", ids.shape[::-1], "grey").save(picture)
    Image.fromarray(ids.astype(np.uint8)).save(path)


def opened(root, **options):
    return open_one(root, name="cityscapes", **options)


@pytest.fixture
def root(tmp_path):
    """The PLACES, with one id each; of test a placeholder's."""
    for number, place in enumerate(PLACES):
        write(tmp_path / "data", place, np.full((8, 12), 3 if "bonn" in place else 7 + number))
    return tmp_path / "data"


# ---- classes and frames --------------------------------------------------------------------------

def test_each_id_has_its_class(root):
    write(root, PLACES[0], np.arange(34).reshape(2, 17))
    found = [CLASSES[number] for number in labels(files_of(root, PLACES[0])[1]).ravel()]
    assert found == ["ignore" if name.endswith("*") else name for name in NAMES]
    assert CLASSES == ("ignore", *(name for name in NAMES if not name.endswith("*")))
    assert len(CLASSES) == 20


def test_pictures_of_all_splits_and_their_cities(root):
    (root / "leftImg8bit/train/aachen/._aachen_000000_000019_leftImg8bit.png").write_text("macOS")
    (root / "gtFine/val/lindau/lindau_000000_000019_gtFine_color.png").write_text("another file")
    table = opened(root)
    assert [path.decode() for path in table["image"][:, 0]] == [
        f"leftImg8bit/{place}_leftImg8bit.png" for place in PLACES]
    assert [table.path("labels", row) for row in range(5)] == [
        str(files_of(root, place)[1]) for place in PLACES]
    assert table["split"].tolist() == [b"train"] * 3 + [b"val", b"test"]
    assert table.scenes() == ["aachen", "bonn", "bremen", "lindau"]
    assert (table["image_size"] == (8, 12)).all() and not (table["bad"] != b"").any()
    assert "train: 3 frames, 2975 in the papers" in table.summary()
    assert len(table.select("train", percent=50)) == 2  # every second picture

    # All pixels of an item have their class, those of a placeholder none
    item = Frames([table.select("train")], image_size=(8, 16), target="labels")[0, 0]
    assert len(item["pixels"]) == 128 and (item["labels"] == CLASSES.index("road")).all()
    bonn = Frames([table.select("test")], image_size=(8, 16), target="labels")[0, 0]
    assert len(bonn["labels"]) == 0

    # A city can validate
    (held,) = hold_out([table], ["aachen"])
    assert held["split"].tolist() == [b"val"] * 2 + [b"train"] * 2 + [b"test"]


def test_the_root_is_found_from_its_folders(root, tmp_path):
    for inside in ("", "leftImg8bit", "gtFine"):
        assert opened(root / inside).root == str(root)
    with pytest.raises(InputError, match="given twice"):
        open_tables(f"cityscapes={root},cityscapes={root}/leftImg8bit", here=True)
    for wrong, way in ((tmp_path, f"give {root}"),
                       (root / "gtFine/val", "extract leftImg8bit_trainvaltest.zip and gtFine")):
        with pytest.raises(InputError, match=f"--data {wrong}: not a Cityscapes root.*; {way}"):
            opened(wrong)
    shutil.rmtree(root / "leftImg8bit/val/lindau")
    for place in set(PLACES) - {PLACES[3]}:
        files_of(root, place)[0].unlink()
    with pytest.raises(InputError, match="no .*_leftImg8bit.png in any city; extract leftImg8bit"):
        opened(root)


def test_what_is_new_is_noticed(root):
    assert len(opened(root)) == 5
    for place in ("train/aachen/aachen_000002_000019", "train/zurich/zurich_000000_000019"):
        write(root, place, np.full((8, 12), 7))
        assert files_of(root, place)[0].name.encode() in b" ".join(
            opened(root, look=False)["image"][:, 0])


# ---- without labels ------------------------------------------------------------------------------

def test_pictures_without_labels_are_for_what_needs_none(root, tmp_path, capsys):
    (root / "gtFine").rename(tmp_path / "gtFine")
    table = opened(root)
    assert "labels: no" in table.summary() and "extract gtFine_trainvaltest" in table.summary()
    frames = Frames(select([table], "train"), image_size=(8, 16))
    assert frames[0, 2].keys() == {"condition", "image"}

    argv = probe_args(f"cityscapes={root}", "seg", "vit_mini8", tmp_path / "out",
                      "--weights", "random", "--image-size", "8", "16")
    assert f"--data {root}: 3 of 3 frames have no labels" in fails_with_one_line(
        capsys, probe.main, argv)
    assert not (tmp_path / "out").exists()

    # Extracted later, they are there
    (tmp_path / "gtFine").rename(root / "gtFine")
    assert (opened(root, look=False)["labels"] != b"").all()


def test_a_part_of_the_labels_is_refused(root):
    shutil.rmtree(root / "gtFine/test")  # without harm: nothing is learnt from it
    assert opened(root)["labels"].tolist().count(b"") == 1
    files_of(root, PLACES[3])[1].unlink()
    with pytest.raises(InputError, match=f"1 pictures have no file .*{PLACES[3]}_left.*; extract "
                                         "gtFine_trainvaltest.zip again"):
        opened(root)


# ---- damage --------------------------------------------------------------------------------------

def save(**options):
    """A change of a file: the same ids, written in another way."""
    def change(path):
        image = Image.open(path)
        image.load()
        converted = image.convert(options["mode"]) if "mode" in options else image
        converted.resize(options.get("size", image.size), 0).save(path, options.get("format"))
    return change


def with_id(number):
    def change(path):
        ids = np.array(Image.open(path))
        ids[3, 5] = number
        Image.fromarray(ids).save(path)
    return change


def flip(path):
    """Another bit, one that Pillow decodes to other ids without an error."""
    ids = np.random.default_rng(0).integers(0, 3, (8, 12), np.uint8)
    Image.fromarray(ids).save(path)
    content = path.read_bytes()
    for place in range(content.index(b"IDAT") + 4, content.index(b"IEND") - 8):
        other = bytearray(content)
        other[place] ^= 4
        path.write_bytes(other)
        try:
            if (np.array(Image.open(path)) != ids).any():
                return
        except (OSError, SyntaxError):
            continue
    pytest.skip("this Pillow finds each of them")


ONE_CHANNEL = "is no PNG of one 8-bit channel and 8x12 pixels, as its picture; extract gtFine"
DAMAGES = {  # what was done, what the index says of it, what reading says
    "colours": (save(mode="RGB"), ONE_CHANNEL, "of mode RGB, not of one 8-bit channel"),
    "alpha": (save(mode="RGBA"), ONE_CHANNEL, "of mode RGBA, not of one 8-bit channel"),
    "palette": (save(mode="P"), ONE_CHANNEL, "of mode P, not of one 8-bit channel"),
    "16 bits": (save(mode="I;16"), ONE_CHANNEL, "of mode I(;16)?, not of one 8-bit channel"),
    "size": (save(size=(6, 4)), ONE_CHANNEL, "4x6 pixels, its picture has 8x12"),
    "JPEG": (save(format="JPEG"), "", "no PNG, or a damaged one; extract it again"),
    "empty": (lambda path: path.write_bytes(b""), "is empty; extract it again", "no PNG"),
    "zeros": (lambda path: path.write_bytes(bytes(99)), ONE_CHANNEL, "zeros only, of a copy"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "", "a damaged one"),
    "bit": (flip, "", "no PNG, or a damaged one; extract it again"),
    "34": (with_id(34), "", "id 34, Cityscapes has 0 to 33; extract it again"),
    "255": (with_id(255), "", "id 255, .*; train ids. Take the file .*_gtFine_labelIds.png, or"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_labels_are_named(root, name):
    damage, found, read = DAMAGES[name]
    place = PLACES[1]
    path = files_of(root, place)[1]
    damage(path)
    bad = np.char.decode(opened(root)["bad"]).tolist()
    wanted = re.escape(f"gtFine/{place}_gtFine_labelIds.png ") + found if found else "$"
    assert re.match(wanted, bad[1]) and set(bad[:1] + bad[2:]) == {""}
    with pytest.raises(InputError, match=f"^{path}: .*{read}") as error:
        labels(path)
    assert "\n" not in str(error.value)


def test_damaged_pictures_are_named(root, capsys):
    first, second = (files_of(root, place)[0] for place in PLACES[:2])
    first.write_bytes(b"")
    save(mode="RGBA")(second)
    with pytest.raises(SystemExit, match="3"):
        main("cityscapes", ["--data", str(root)])
    assert [line for line in capsys.readouterr().out.splitlines() if "bad" in line] == [
        f"bad: {first.relative_to(root)} is empty; extract it again",
        f"bad: {second.relative_to(root)} is no picture of 8-bit RGB; extract it again, and touch "
        "its folder"]


# ---- the real picture, and a probe ---------------------------------------------------------------

def test_the_real_picture_has_the_classes_of_its_instances():
    root = SHARED / "real/cityscapes"
    if not root.is_dir():
        pytest.skip("no real picture here")
    table = opened(root)
    assert table.scenes() == ["frankfurt"] and table["image_size"].tolist() == [[[1024, 2048]]]
    classes = table.labels(0)
    assert classes.shape == (1024, 2048) and classes.dtype == np.uint8

    # Another of its files numbers the instances: 1000 times the id, plus their number
    path = table.path("labels", 0).replace("labelIds", "instanceIds")
    ids = np.array(Image.open(path)).astype(int)
    ids = np.where(ids < 1000, ids, ids // 1000)
    for number, name in enumerate(NAMES):
        wanted = "ignore" if name.endswith("*") else name
        assert (classes[ids == number] == CLASSES.index(wanted)).all()
    assert ids.max() < 34

    # An item has the pixels in the middle of its cells
    item = Frames([table], image_size=(64, 128), target="labels")[0, 0]
    shown = classes[8::16, 8::16]
    assert item["image"].shape == (3, 64, 128) and (shown == 0).any()
    assert (item["labels"].numpy() == shown[shown > 0]).all()


@pytest.mark.slow
def test_a_probe_on_the_miniature_and_its_evaluation(tmp_path):
    from miniature.world import make_world
    towns = make_world(tmp_path / "towns", seed=3, dataset="cityscapes", train=(3, 0, 0), val=2,
                       image_size=(40, 80), workers=1)
    run, data = tmp_path / "probe", f"cityscapes={towns}"
    small = ("--weights", "random", "--image-size", "40", "80", "--steps", "2")
    probe.main(probe_args(data, "seg", "vit_mini8", run, *small))
    checkpoint = checkpoint_of(run)
    assert tuple(checkpoint["classes"]) == CLASSES[1:] and checkpoint["dense"]
    evaluation.main(eval_args(run, out=tmp_path / "table"))
    (result,) = read_json(tmp_path / "table.json")
    assert result["images"] == 2 and list(result["mIoU"]) == ["full"]
    # Of a city's pictures, as of any scene's, one can make the validation split
    probe.main(probe_args(data, "seg", "vit_mini8", tmp_path / "held", *small,
                          "--val-scenes", "aachen"))
    assert checkpoint_of(tmp_path / "held")["val"]["frames"] == 1

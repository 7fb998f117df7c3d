"""Corrupted copies of a dataset: what is changed in them, and that they are whole or not at all."""
import io
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin
from runs import fails_with_one_line, open_one

from data import Frames
from experiments import copies, corruptions
from experiments.corruptions import How, changed_by
from experiments.degradations import IMAGES, SCANS
from miniature.world import make_world
from plumbing.errors import InputError
from readers.files import read_image

SIZE = (80, 160)  # of the world's images


def make(data, out, *more, corruption="gaussian_noise"):
    """`make` of corruptions, in this process."""
    corruptions.main(["make", "--data", str(data), "--out", str(out), "--corruption", corruption,
                      "--workers", "0", *map(str, more)])
    return out


def refused(capsys, data, out, *more, **options):
    """The line with which `make` ends."""
    return fails_with_one_line(capsys, lambda argv: make(data, out, *argv, **options), more)


def note(copied, name="corrupted.json"):
    return json.loads((copied / name).read_text())


def contents(folder):
    """{path: bytes} of all files below a folder."""
    found = {}
    for place, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = os.path.join(place, name)
            found[os.path.relpath(path, folder)] = Path(path).read_bytes()
    return found


# ---- images of a copy ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def noisy(world, tmp_path_factory):
    """A copy of `world` with noise on all images."""
    return make(world, tmp_path_factory.mktemp("copies") / "noisy", "--image-size", *SIZE,
                "--severity", 2)


def test_images_change_and_all_else_is_linked(world, noisy):
    before, after = contents(world), contents(noisy)
    images = {path for path in before if path.endswith(".jpg")}
    assert after.keys() == before.keys() | {"corrupted.json", "conditions.json"}
    for path in before:
        assert (before[path] == after[path]) != (path in images), path
        assert (noisy / path).resolve() == ((noisy if path in images else world) / path).resolve()
    for folder in ("maps", "lidarseg", "v1.0-trainval", "samples/LIDAR_TOP"):
        assert (noisy / folder).is_symlink()  # as a whole
    for path in images:
        with Image.open(noisy / path) as image:
            quality = JpegImagePlugin.get_sampling(image), image.quantization
            assert image.size == SIZE[::-1] and image.format == "JPEG"
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG", quality=95)
        with Image.open(file) as image:
            assert quality == (0, image.quantization)


def test_images_change_and_points_do_not(world, noisy, tmp_path):
    def frames(root, split="val"):
        return Frames([open_one(root).select(split)], image_size=SIZE, target="labels")

    clean, after = frames(world), frames(noisy)
    for name in ("pixels", "depths", "labels"):
        assert torch.equal(clean[0, 3][name], after[0, 3][name])
    part = frames(make(world, tmp_path / "part", "--image-size", *SIZE, "--severity", 2, "--split",
                       "val"))
    other = frames(make(world, tmp_path / "other", "--image-size", *SIZE, "--severity", 2,
                        "--seed", 1))
    drawn = []
    for n in range(6):
        image = after[0, n]["image"]
        assert not torch.equal(image, clean[0, n]["image"])
        # whatever the other frames, but not the seed
        assert torch.equal(image, part[0, n]["image"])
        assert not torch.equal(image, other[0, n]["image"])
        drawn.append(image.float() - clean[0, n]["image"].float())
    # frames draw each for itself
    apart = torch.corrcoef(torch.stack(drawn).flatten(1)) - torch.eye(6)
    assert apart.abs().max() < 0.15  # JPEG sees to what there is of it
    same = frames(tmp_path / "part", "train")
    assert torch.equal(same[0, 0]["image"], frames(world, "train")[0, 0]["image"])


def test_what_a_copy_s_image_is(world, noisy):
    """It is the corrupted image in the size that the encoder sees, as near as JPEG lets it be."""
    table = open_one(world)
    how = How("camera", "gaussian_noise", 2, SIZE, 0, "noise")
    for row in (0, 5):
        meant = changed_by(how, table).image(row, 0)
        clean = read_image(table.path("image", row, 0), SIZE).numpy()
        rng = np.random.default_rng((0, row, 0))
        assert np.array_equal(meant, IMAGES["gaussian_noise"](clean, 2, rng))
        found = read_image(open_one(noisy).path("image", row, 0), SIZE).numpy()
        assert np.sqrt(np.mean((found.astype(float) - meant) ** 2)) < 5


def test_cameras_draw_each_for_itself(world):
    table = open_one(world)
    how = How("camera", "fog", 5, SIZE, 0, "fog")
    # one camera twice
    for name in ("image", "image_size"):
        table.columns[name] = table.columns[name][:, [0, 0]]
    images = changed_by(how, table.only([0, 3]))
    assert len(images) == 4 and len(images.paths()) == 4
    assert not np.array_equal(images.image(0, 0), images.image(0, 1))
    assert images.files(3) != images.files(2)


def test_images_are_not_corrupted_larger_than_they_are(world):
    images = changed_by(How("camera", "fog", 5, (224, 100), 0, "fog"), open_one(world))
    assert images.image(0, 0).shape == (3, 80, 100)
    with Image.open(io.BytesIO(*images.files(0).values())) as image:
        assert image.size == SIZE[::-1]


def test_loading_processes_write_the_same(world, noisy, tmp_path):
    alike = make(world, tmp_path / "alike", "--image-size", *SIZE, "--severity", 2, "--workers", 2)
    assert contents(alike) == contents(noisy)


# ---- scans of a copy -----------------------------------------------------------------------------

@pytest.mark.parametrize("name", SCANS)
def test_scans_change_and_images_do_not(world, tmp_path, name):
    more = ("--sensor", "lidar", "--severity", 5)
    out = make(world, tmp_path / "out", *more, corruption=name)
    part = make(world, tmp_path / "part", *more, "--split", "train", corruption=name)
    other = make(world, tmp_path / "other", *more, "--seed", 1, corruption=name)
    before, after = contents(world), contents(out)
    drops = name == "density_decrease"
    changed = {path for path in before
               if path.endswith("pcd.bin") or drops and path.endswith("lidarseg.bin")}
    assert after.keys() == before.keys() | {"corrupted.json", "conditions.json"}
    assert {path for path in before if before[path] != after[path]} == changed
    assert (out / "samples/CAM_FRONT").is_symlink()

    # each scan by the seed and its frame alone
    tables = open_one(world), open_one(out)
    rows = tables[0].select("train").rows
    path = tables[0]["scan"][rows[1]].decode()
    assert (part / path).read_bytes() == after[path] != (other / path).read_bytes()
    clean, frames = (Frames([table.only(rows)], image_size=SIZE, target="labels")
                     for table in tables)
    assert torch.equal(clean[0, 1]["image"], frames[0, 1]["image"])
    count, fewer = len(clean[0, 1]["depths"]), len(frames[0, 1]["depths"])
    assert fewer == pytest.approx(count * (0.7 if drops else 1), rel=0.05)

    # each frame draws for itself: two frames of one scan
    table = tables[0].only(rows)
    table.columns["scan"][rows[1]] = table.columns["scan"][rows[0]]
    scans = changed_by(How("lidar", name, 5, SIZE, 0, "x"), table)
    assert list(scans.files(0).values())[0] != list(scans.files(1).values())[0]


@pytest.mark.parametrize("name", SCANS)
def test_labels_stay_with_their_points(world, tmp_path, name):
    out = make(world, tmp_path / "out", "--sensor", "lidar", corruption=name)
    tables = open_one(world), open_one(out)
    for row in (0, 9):
        before, after = (np.fromfile(t.path("scan", row), "<f4").reshape(-1, 5) for t in tables)
        labels, kept = (np.fromfile(t.path("labels", row), np.uint8) for t in tables)
        assert len(kept) == len(after) == (
            len(before) if name == "gaussian_noise" else round(0.82 * len(before)))
        # intensity and ring, the last two columns, go with the point
        if name == "gaussian_noise":
            assert np.array_equal(before[:, 3:], after[:, 3:]) and np.array_equal(labels, kept)
            continue
        label_of = {tuple(point): label for point, label in zip(before.tolist(), labels)}
        assert len(label_of) == len(before)
        assert [label_of[tuple(point)] for point in after.tolist()] == kept.tolist()
        assert np.array_equal(tables[1].labels(row, len(after)),
                              tables[1]["label_map"][kept])
    assert not (tables[1]["bad"] != b"").any()


def test_scans_of_other_datasets_are_refused(world, tmp_path, capsys):
    images = tmp_path / "images"
    make_world(images, seed=3, train=(2, 0, 0), val=1, frames=1, workers=1, dataset="nuimages")
    open_one(images, name="nuimages")
    lidar = ("--sensor", "lidar")
    assert "--sensor lidar: nuimages has no LiDAR scans" in refused(
        capsys, f"nuimages={images}", tmp_path / "out", *lidar)
    assert not (tmp_path / "out").exists()
    table = open_one(world)
    table.name = "another"
    with pytest.raises(InputError, match="--sensor lidar: scans and labels are written as nuScenes "
                                         "has them, and another has them otherwise"):
        changed_by(How("lidar", "gaussian_noise", 1, SIZE, 0, "x"), table)


# ---- conditions ----------------------------------------------------------------------------------

def test_corrupted_frames_have_a_condition_of_their_own(world, noisy, tmp_path):
    table = open_one(world)
    scenes = sorted(set(np.char.decode(table["scene"])))
    assert note(noisy, "conditions.json") == dict.fromkeys(scenes, "gaussian_noise")
    part = make(world, tmp_path / "part", "--split", "val", "--condition", "bad weather",
                corruption="fog")
    after = open_one(part)
    assert after.conditions == (*table.conditions, "bad weather")
    assert len(after.select("val", ["bad weather"])) == len(after.select("val")) == 6
    assert len(after.select("train", ["day-clear", "day-rain", "night"])) == 8

    # a copy of the copy keeps what that says of the others, and has no link to it
    twice = make(part, tmp_path / "twice", "--split", "train", "--sensor", "lidar")
    named = note(twice, "conditions.json")
    assert len(named) == 14 and set(named.values()) == {"bad weather", "gaussian_noise"}
    shutil.rmtree(part / "samples/LIDAR_TOP", ignore_errors=True)
    (part / "maps").unlink()
    assert len(open_one(twice).select("val", ["bad weather"])) == 6


def test_a_dataset_without_conditions_has_clean_ones_then(tmp_path):
    images = tmp_path / "images"
    make_world(images, seed=3, train=(2, 0, 0), val=1, frames=1, workers=1, dataset="nuimages")
    clean = open_one(images, name="nuimages")
    out = make(f"nuimages={images}", tmp_path / "out", "--split", "val", corruption="motion_blur")
    table = open_one(out, name="nuimages")
    assert clean.conditions == () and table.conditions == ("clean", "motion_blur")
    assert len(table.select("train", ["clean"])) == 2
    assert len(table.select("val", ["motion_blur"])) == 3
    assert "motion_blur      -       3       3" in table.summary()
    for row, split in enumerate(table["split"]):
        changed = split == b"val"
        assert np.array_equal(table.labels(row), clean.labels(row))
        same = (out / table.path("image", row, 0)).read_bytes() == (
            images / clean.path("image", row, 0)).read_bytes()
        assert same != changed


def test_a_copy_s_fingerprint_says_how_it_was_made(world, copy, noisy, tmp_path):
    """Its frames are those of no other copy, though the tables say the same of them."""
    open_one(copy)  # which is sooner than in a process of its own
    stronger = make(world, tmp_path / "stronger", "--image-size", *SIZE, "--severity", 3)
    again = make(copy, tmp_path / "again", "--image-size", *SIZE, "--severity", 2)
    prints = [open_one(root).select("train").fingerprint()
              for root in (world, noisy, stronger, again)]
    prints.append(open_one(shutil.move(again, tmp_path / "moved")).select("train").fingerprint())
    assert prints[1] == prints[3] == prints[4]
    assert len({repr(each) for each in prints}) == 3
    (tmp_path / "moved/corrupted.json").write_text("[")
    with pytest.raises(InputError, match="corrupted.json: damaged; make the copy anew"):
        open_one(tmp_path / "moved").fingerprint()


# ---- whole or not at all -------------------------------------------------------------------------

def test_the_same_arguments_take_the_copy_and_others_are_refused(world, copy, tmp_path, capsys):
    open_one(copy)
    out = make(copy, tmp_path / "out", "--split", "val")
    before = contents(out)
    capsys.readouterr()
    make(copy, out, "--split", "val", "--workers", 1, "--condition", "gaussian_noise")
    assert f"{out}: made before with the same arguments" in capsys.readouterr().out
    for more, said in ((("--severity", 2), "severity 3 there, 2 now"), (("--seed", 1), "seed 0"),
                       (("--condition", "x"), "condition gaussian_noise there, x now"),
                       (("--image-size", 40, 80), "image_size"),
                       (("--split", "train"), "split ['val'] there, ['train'] now")):
        assert said in refused(capsys, copy, out, "--split", "val", *more)
    assert f"data {copy} there, {world} now" in refused(capsys, world, out, "--split", "val")
    assert "corruption gaussian_noise there, fog now" in refused(capsys, copy, out, "--split",
                                                                 "val", corruption="fog")
    assert contents(out) == before
    # the dataset is another one now
    Image.new("RGB", SIZE[::-1]).save(open_one(copy).select("val").path("image", 13, 0))
    assert "files " in refused(capsys, copy, out, "--split", "val")
    assert contents(out) == before


def test_nothing_is_left_of_a_copy_that_cannot_be_made(copy, tmp_path, capsys):
    open_one(copy)
    image = sorted(copy.glob("samples/CAM_FRONT/*.jpg"))[3]
    image.write_bytes(image.read_bytes()[:2000])
    before = sorted(tmp_path.iterdir())
    for workers in (0, 1):
        assert image.name in refused(capsys, copy, tmp_path / "out", "--workers", workers)
        assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_one_line(world, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    before = sorted(tmp_path.iterdir())
    for name in ("write_bytes", "symlink_to", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(copies.Path, name, full)
            line = refused(capsys, world, tmp_path / "out")
        assert "cannot be written (No space left on device); there is no copy now" in line
        assert sorted(tmp_path.iterdir()) == before


def test_a_copy_that_was_killed_is_made_anew(world, tmp_path, monkeypatch):
    files = copies.ChangedImages.files

    def killed(self, number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return files(self, number)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(copies.ChangedImages, "files", killed)
        process = multiprocessing.get_context("fork").Process(target=make, args=(world, out))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    partial = tmp_path / "out.partial"
    assert not out.exists() and len(list(partial.glob("samples/CAM_FRONT/*"))) == 4
    make(world, out, corruption="fog")
    assert len(open_one(out).select("val", ["fog"])) == 6 and not partial.exists()


def test_what_is_there_stays(world, tmp_path, capsys):
    for name in ("other", "empty", "way.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "other/file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("other", "empty", "file", "dangling"):
        assert "is there, and no copy that was made here" in refused(capsys, world, tmp_path / name)
    assert "way.partial: is in the way" in refused(capsys, world, tmp_path / "way")
    assert (tmp_path / "other/file").exists() and (tmp_path / "way.partial").is_dir()
    assert "lies in the dataset" in refused(capsys, world, world / "out")
    assert not (world / "out").exists()


def test_bad_frames_are_linked(copy, tmp_path):
    table = open_one(copy)
    row = table.select("val").rows[2]
    image = copy / table.path("image", row, 0)
    image.write_bytes(b"")
    out = make(copy, tmp_path / "out", "--split", "val")
    after = open_one(out)
    assert (after["bad"] != b"").tolist() == [number == row for number in range(14)]
    assert (out / table["image"][row, 0].decode()).is_symlink()
    assert len(after.select("val", ["gaussian_noise"], skip_bad=True)) == 5


def test_bad_input_is_one_line(world, tmp_path, capsys):
    out = tmp_path / "out"
    assert "--corruption density_decrease: --sensor camera has fog" in refused(
        capsys, world, out, corruption="density_decrease")
    assert "--corruption fog: --sensor lidar has gaussian_noise, density_decrease" in refused(
        capsys, world, out, "--sensor", "lidar", corruption="fog")
    for name in ("full", "a/b", " "):
        assert "--condition" in refused(capsys, world, out, "--condition", name)
    assert "no frame of split 'test'" in refused(capsys, world, out, "--split", "test")
    assert "one dataset at a time" in refused(capsys, f"nuscenes={world},nuscenes={world}", out)
    assert "not a nuScenes root" in refused(capsys, tmp_path, out)
    assert "no --version v1.0-mini" in refused(capsys, world, out, "--version", "v1.0-mini")
    assert not out.exists()

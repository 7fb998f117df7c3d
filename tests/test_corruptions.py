"""Corruptions: what each does to an image or a scan, by severity; determinism; applied to a probe and to stage 2."""
import functools
import json
import pickle
import shutil

import numpy as np
import pytest
import torch

import eval as evaluation
import probe
import stage2
import run_folder
from data import Frames
from errors import InputError
from experiments import corruptions
from experiments.corruptions import IMAGES, SCANS, SEVERITIES, CorruptedImages, CorruptedScans
from index import load_index
from test_scripts import fails_with_one_line, lines, model_of, probe_args, stage2_args


def draws(seed=0):
    return np.random.default_rng(seed)


def flat(value, height=112, width=224):
    return np.full((3, height, width), value, np.uint8)


def rises(values):
    return all(a < b for a, b in zip(values, values[1:]))


@pytest.fixture(scope="module")
def picture(world):
    """A frame's image at 112x224."""
    index = load_index(world)
    return Frames(index, [0], index.cameras[0], (112, 224)).image(0, 0)


# ---- images -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", IMAGES)
def test_an_image_stays_an_image_and_is_drawn_by_the_generator_alone(picture, name):
    before = picture.copy()
    for severity in SEVERITIES:
        image = IMAGES[name](picture, severity, draws())
        assert image.shape == picture.shape and image.dtype == np.uint8 and not np.array_equal(image, picture)
        assert np.array_equal(image, IMAGES[name](picture, severity, draws()))
        assert np.array_equal(image, IMAGES[name](picture, severity, draws(1))) == (name == "motion_blur")
    assert np.array_equal(picture, before)


def test_fog_leaves_the_documented_part_of_the_image():
    """The same fog before black and before white differs by what is left of the image, everywhere alike."""
    left = []
    for severity in SEVERITIES:
        difference = IMAGES["fog"](flat(255), severity, draws()).astype(float) - IMAGES["fog"](flat(0), severity, draws())
        assert np.ptp(difference) <= 1  # rounding
        left.append(difference.mean() / 255)
    assert left == pytest.approx([0.36, 0.27, 0.20, 0.17, 0.125], abs=0.005)


def test_fog_takes_contrast_and_colour(picture):
    def contrast_and_colour(image):
        image = image.astype(float)
        return image.std(), np.abs(image - image.mean(0)).mean()
    found = [contrast_and_colour(IMAGES["fog"](picture, severity, draws())) for severity in SEVERITIES]
    for values, clean in zip(zip(*found), contrast_and_colour(picture)):
        assert rises(values[::-1]) and values[0] < clean


@pytest.mark.parametrize("decay", [1.4, 1.7])  # above, means of blocks no longer tell the sizes apart
def test_fog_s_structures_of_half_the_size_are_one_decay_lower(decay):
    ratios = []
    for seed in range(8):
        level, heights = corruptions.fractal_noise(256, 256, decay, draws(seed)), []
        assert level.min() == 0 and level.max() == 1
        for _ in range(5):
            coarse = level.reshape(len(level) // 2, 2, -1, 2).mean((1, 3))
            heights.append((level - coarse.repeat(2, 0).repeat(2, 1)).std())
            level = coarse
        ratios.append(np.array(heights[2:]) / heights[1:-1])
    assert np.mean(ratios, 0) == pytest.approx([decay] * 3, rel=0.1)
    assert corruptions.fractal_noise(50, 91, decay, draws()).shape == (50, 91)


def test_gaussian_noise_has_the_documented_deviation():
    for severity, deviation in ((1, 0.08), (2, 0.12)):  # mid-grey: four deviations before it is cut
        noise = IMAGES["gaussian_noise"](flat(128), severity, draws()).astype(float) - 128
        assert noise.std() / 255 == pytest.approx(deviation, rel=0.02) and abs(noise.mean()) < 0.5
        for other in (noise[[1, 2, 0]], np.roll(noise, 1, 1), np.roll(noise, 1, 2)):
            assert abs((noise * other).mean()) < 0.02 * noise.var()  # each pixel and channel on its own


@pytest.mark.parametrize("name", ["gaussian_noise", "motion_blur"])
def test_a_higher_severity_changes_more(picture, name):
    changes = [np.abs(IMAGES[name](picture, severity, draws()).astype(float) - picture).mean() for severity in SEVERITIES]
    assert rises([0, *changes])


def test_motion_blur_spreads_a_column_and_leaves_it_where_it_was():
    for width in (224, 448):
        image, columns = flat(0, 8, width), np.arange(width)
        image[:, :, 100] = 255
        spreads = []
        for severity in SEVERITIES:
            profile = IMAGES["motion_blur"](image, severity)[0, 0].astype(float)
            center = (profile * columns).sum() / profile.sum()
            assert center == pytest.approx(100, abs=1e-6)
            spreads.append(np.sqrt((profile * (columns - center) ** 2).sum() / profile.sum()) / width)
        # a box of length L has the deviation L / sqrt(12), a path of L pixels that of at most one pixel more
        assert spreads == pytest.approx(np.array([1, 2, 3, 4, 5]) / 100 / np.sqrt(12), abs=0.2 / width)


def test_motion_blur_leaves_edges_in_place_and_rows_apart(picture):
    edge = flat(0)
    edge[:, :, 112:] = 255
    rows = flat(0) + np.arange(112, dtype=np.uint8)[:, None]
    widths = []
    for severity in SEVERITIES:
        profile = IMAGES["motion_blur"](edge, severity)[1, 50].astype(int)
        assert np.abs(profile + profile[::-1] - 255).max() <= 1 and profile[111] < 128 <= profile[112]
        widths.append(((profile > 0) & (profile < 255)).sum())
        assert np.array_equal(IMAGES["motion_blur"](rows, severity), rows)
        blurred = IMAGES["motion_blur"](picture, severity)
        one_row = IMAGES["motion_blur"](np.ascontiguousarray(picture[:, 40:41]), severity)
        assert np.array_equal(blurred[:, 40:41], one_row)
    assert rises(widths)
    fine = [np.diff(IMAGES["motion_blur"](picture, severity).astype(float), axis=2).std() for severity in SEVERITIES]
    assert rises(fine[::-1])


# ---- LiDAR --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scan():
    values = draws(5).uniform(-40, 40, (20000, 4)).astype(np.float32)
    values.flags.writeable = False  # as read_scan's
    return values


def test_lidar_noise_has_the_documented_deviation(scan):
    for severity, deviation in zip(SEVERITIES, (0.02, 0.04, 0.06, 0.08, 0.10)):
        noisy = SCANS["gaussian_noise"](scan, severity, draws())
        assert noisy.shape == scan.shape and noisy.dtype == np.float32 and np.array_equal(noisy[:, 3], scan[:, 3])
        noise = (noisy - scan)[:, :3]
        assert noise.std(0) == pytest.approx([deviation] * 3, rel=0.03) and np.abs(noise.mean(0)).max() < 0.03 * deviation
        assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.03


def test_density_decrease_drops_the_documented_share(scan):
    numbered = np.column_stack([scan[:, :3], np.arange(len(scan))]).astype(np.float32)
    before = set(range(len(scan)))
    for severity, count in zip(SEVERITIES, (18800, 17600, 16400, 15200, 14000)):
        thin = SCANS["density_decrease"](numbered, severity, draws())
        left = thin[:, 3].astype(int)
        assert thin.shape == (count, 4) and thin.dtype == np.float32 and rises(left.tolist())
        assert np.array_equal(thin, numbered[left]) and set(left) < before  # whole points; of the lower severity's
        before = set(left)
    gone = np.setdiff1d(np.arange(len(scan)), left)
    assert np.histogram(gone, 10, (0, len(scan)))[0] == pytest.approx([600] * 10, rel=0.15)  # of all of the scan
    assert len(SCANS["density_decrease"](numbered[:1], 5, draws())) == 1


# ---- applied to frames ----------------------------------------------------------------------------------------------------

def test_images_change_and_points_do_not(world):
    index = load_index(world)
    options = dict(image_size=(80, 160), labels=True)
    clean, noisy, part, other = (
        Frames(index, index.select("val"), **options),
        CorruptedImages(index, index.select("val"), **options, corruption="gaussian_noise", severity=2),
        CorruptedImages(index, index.select("val")[2:], **options, corruption="gaussian_noise", severity=2),
        CorruptedImages(index, index.select("val"), **options, corruption="gaussian_noise", severity=2, noise_seed=1))
    a, b = clean[0, 3], noisy[0, 3]
    assert all(torch.equal(a[name], b[name]) for name in ("pixels", "depths", "labels"))
    assert not torch.equal(a["image"], b["image"])
    assert torch.equal(b["image"], part[7, 1]["image"])  # whatever the epoch and the other frames
    assert not torch.equal(b["image"], other[0, 3]["image"])
    assert torch.equal(b["image"], pickle.loads(pickle.dumps(noisy))[0, 3]["image"])
    noise = [noisy[0, n]["image"].float() - clean[0, n]["image"].float() for n in (0, 1)]
    assert abs(torch.corrcoef(torch.stack(noise).flatten(1))[0, 1]) < 0.05  # frames draw each for itself


def test_cameras_draw_each_for_itself(world):
    index = load_index(world)
    frames = CorruptedImages(index, [0], image_size=(80, 160), corruption="fog", severity=5)
    index.image, index.image_size = index.image[:, [0, 0]], index.image_size[:, [0, 0]]
    assert not np.array_equal(frames.image(0, 0), frames.image(0, 1))


def test_scans_change_and_images_do_not(world):
    index = load_index(world)
    rows, options = index.select("train"), dict(image_size=(80, 160))
    clean = Frames(index, rows, **options)
    for name in SCANS:
        frames = CorruptedScans(index, rows, **options, corruption=name, severity=5)
        assert torch.equal(frames[0, 1]["image"], clean[0, 1]["image"])
        assert torch.equal(frames[0, 1]["pixels"], frames[3, 1]["pixels"])  # in each epoch alike
        assert np.array_equal(pickle.loads(pickle.dumps(frames)).scan(rows[1]), frames.scan(rows[1]))
        count, fewer = len(clean[0, 1]["depths"]), len(frames[0, 1]["depths"])
        assert fewer == pytest.approx(count * (0.7 if name == "density_decrease" else 1), rel=0.05)
        with pytest.raises(InputError, match="no labels"):
            CorruptedScans(index, rows, labels=True, corruption=name, severity=1)[0, 0]
    index.lidar[rows[1]] = index.lidar[rows[0]]
    first, second = (frames.scan(row) for row in rows[:2])
    assert first.shape == second.shape and not np.array_equal(first, second)  # each frame draws for itself


# ---- the commands -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def probes(world, tmp_path_factory):
    """A probe of two steps for each task on a random encoder."""
    root = tmp_path_factory.mktemp("probes")
    for task in ("seg", "depth"):
        probe.main(probe_args(world, task, "vit_mini8", root / task, "--weights", "random", "--image-size", "80", "160",
                              "--steps", "2", "--head", "batchnorm", "--lr", "1"))
    return root


@pytest.mark.slow
def test_probes_on_corrupted_images(world, probes, tmp_path, capsys):
    shutil.copytree(probes / "depth", tmp_path / "again")
    names = [str(probes / "seg"), str(probes / "depth"), str(tmp_path / "again"), f"{probes}/./seg"]  # the last one is the first
    corruptions.main(["images", *names, "--severity", "5", "--out", str(tmp_path / "table"), "--workers", "0", "--device", "cpu"])
    rows = json.loads((tmp_path / "table.json").read_text())
    assert len(rows) == 3
    device = torch.device("cpu")
    for row, metric in zip(rows, ("mIoU", "RMSE", "RMSE")):
        assert list(row["results"]) == ["clean", "fog", "gaussian_noise", "motion_blur"] and row["severity"] == 5
        assert row["results"]["clean"] == evaluation.evaluate(row["run"], device, workers=0)  # as eval.py says
        dataset = functools.partial(CorruptedImages, corruption="fog", severity=5)
        assert row["results"]["fog"] == evaluation.evaluate(row["run"], device, workers=0, dataset=dataset)
        assert len({result[metric]["full"] for result in row["results"].values()}) == 4
    assert [result["RMSE"] for result in rows[1]["results"].values()] == [result["RMSE"] for result in rows[2]["results"].values()]
    text = (tmp_path / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "| RMSE [m], lower is better; severity 5 | clean | fog | gaussian_noise | motion_blur |" in text
    assert text.count("(+0.00)") == 4 and "mIoU [%], higher is better; severity 5" in text and len(text.splitlines()) == 8


def test_loading_processes_draw_the_same(world, probes, tmp_path):
    found = []
    for workers in ("0", "1"):
        corruptions.main(["images", str(probes / "depth"), "--corruptions", "fog", "--out", str(tmp_path / workers),
                          "--workers", workers, "--device", "cpu", "--seed", "4"])
        found.append(json.loads((tmp_path / f"{workers}.json").read_text()))
    assert found[0] == found[1]


@pytest.mark.slow
def test_stage2_on_corrupted_clouds(world, first, tmp_path, capsys):
    def run(out, *more):
        corruptions.main(["lidar", *more, "--", *stage2_args(world, first, out, "--steps", "2")])

    def refused(out, *more):
        return fails_with_one_line(capsys, lambda argv: run(out, *argv), more)

    stage2.main(stage2_args(world, first, tmp_path / "clean", "--steps", "2"))
    losses = {"clean": lines(tmp_path / "clean")[-1]["loss"]}
    for name in SCANS:
        run(tmp_path / name, name, "--severity", "5")
        losses[name] = lines(tmp_path / name)[-1]["loss"]
    assert len(set(losses.values())) == 3 and max(losses.values()) - min(losses.values()) < 0.2

    out, before = tmp_path / "gaussian_noise", (tmp_path / "gaussian_noise" / "log.jsonl").read_text()
    assert "--severity 5, now 4" in refused(out, "gaussian_noise", "--severity", "4")
    assert "--corruption gaussian_noise, now density_decrease" in refused(out, "density_decrease", "--severity", "5")
    assert "--noise-seed 0, now 1" in refused(out, "gaussian_noise", "--severity", "5", "--seed", "1")
    assert "--corruption None, now gaussian_noise" in refused(tmp_path / "clean", "gaussian_noise")
    assert "now None" in fails_with_one_line(capsys, stage2.main, stage2_args(world, first, out, "--steps", "2"))  # and the other way
    run(out, "gaussian_noise", "--severity", "5")  # the same: finished, nothing is done again
    assert (out / "log.jsonl").read_text() == before
    run(tmp_path / "again", "gaussian_noise", "--severity", "5")
    assert all(torch.equal(value, model_of(tmp_path / "again")[name]) for name, value in model_of(out).items())


def test_a_stopped_stage2_goes_on_with_the_same_clouds_only(world, first, tmp_path, capsys, monkeypatch):
    argv = ["lidar", "density_decrease", "--severity", "2", "--", *stage2_args(world, first, tmp_path / "out", "--steps", "3",
                                                                             "--save-every", "0")]
    save = run_folder.save

    def save_and_stop(path, content):
        save(path, content)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            corruptions.main(argv)
    argv[3] = "1"
    assert "--severity 2, now 1" in fails_with_one_line(capsys, corruptions.main, argv)
    argv[3] = "2"
    corruptions.main(argv)
    assert torch.load(tmp_path / "out" / "last.pth", weights_only=True)["step"] == 3


def test_the_picture(world, tmp_path):
    from PIL import Image
    corruptions.main(["show", "--data", str(world), "--image-size", "80", "160", "--out", str(tmp_path / "new" / "show.png")])
    with Image.open(tmp_path / "new" / "show.png") as picture:
        assert picture.width == 1800 and 300 < picture.height < 700 and len(np.unique(np.asarray(picture))) > 100


def test_bad_input_is_one_line_and_exit_code_2(world, first, probes, tmp_path, capsys):
    def error(*argv):
        return fails_with_one_line(capsys, corruptions.main, list(map(str, argv)))
    probe.main(probe_args(world, "seg3d", first, tmp_path / "3d", "--steps", "1"))
    assert "3d of --task seg3d" in error("images", probes / "seg", tmp_path / "3d", "--device", "cpu")
    assert "no last.pth there" in error("images", tmp_path / "none", "--device", "cpu")
    assert "probe is needed" in error("images", first, "--device", "cpu")
    assert "after --" in error("lidar", "gaussian_noise")
    assert "not a nuScenes root" in error("lidar", "gaussian_noise", "--", *stage2_args(tmp_path, first, tmp_path / "out"))
    assert not (tmp_path / "out").exists()  # refused before anything was written
    assert "--camera CAM_X" in error("show", "--data", world, "--camera", "CAM_X")
    assert "--frame 999" in error("show", "--data", world, "--frame", "999")
    for argv in (["images", "x", "--severity", "6"], ["images", "x", "--corruptions", "snow"], ["lidar", "fog", "--"], []):
        with pytest.raises(SystemExit) as exit_:
            corruptions.main(argv)
        assert exit_.value.code == 2

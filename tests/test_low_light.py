"""Low light with a sensor's noise: what it does to cards and pictures, how near it comes to real
nights, and the clean copy that stands beside dark ones."""
import json

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image
from runs import fails_with_one_line, open_one

from data import Frames, select
from experiments import corruptions, likeness
from experiments.degradations import SEVERITIES, low_light
from plumbing.errors import InputError
from readers.files import read_image
from readers.table import hold_out, open_tables

REAL = SHARED / "real"
SIZE = (224, 448)


def draws(seed=0):
    return np.random.default_rng(seed)


def card(value, height=160, width=160):
    return np.full((3, height, width), value, np.uint8)


def dark_card(value, severity):
    return low_light(card(value), severity, draws(3)).astype(float)


def light_of(values):
    """Amounts of light of sRGB's bytes, above its foot of 10 / 255."""
    return ((values / 255 + 0.055) / 1.055) ** 2.4


# ---- cards and pictures --------------------------------------------------------------------------

def test_a_grey_card_becomes_as_dark_as_by_hand():
    """188 is 0.737, to the power of 1.6 is 0.614, which is 0.335 of the light; 0.36 of that is
    0.1205, and sRGB's value of it 0.382, or 97."""
    for severity, value in ((1, 164.4), (2, 126.6), (3, 97.4)):
        assert dark_card(188, severity).mean() == pytest.approx(value, abs=0.5)
    for severity, value in zip(SEVERITIES, (103, 72, 50, 32, 18)):  # as documented
        assert dark_card(128, severity).mean() == pytest.approx(value, abs=0.6)


def test_a_higher_severity_is_darker(world):
    picture = read_image(open_one(world).path("image", 0, 0), (80, 160)).numpy()
    means = [picture.mean()]
    means += [low_light(picture, severity, draws()).mean() for severity in SEVERITIES]
    assert all(after < before for before, after in zip(means, means[1:]))


def test_the_variance_of_shot_noise_is_proportional_to_light():
    light = np.array([light_of(dark_card(value, 3)) for value in (120, 160, 200, 255)])
    per_light = light.var((1, 2, 3)) / light.mean((1, 2, 3))
    # 550 photons; the blur leaves 0.41 of the variance
    assert per_light == pytest.approx([0.41 / 550] * 4, rel=0.06)


def test_black_has_read_noise_alone():
    for severity, deviation in ((3, 2.0), (4, 4.0)):  # 12.92 * 255 * 0.0006 and 0.0012
        noise = dark_card(0, severity)
        # The blur leaves 0.64 of the deviation, and of a Gaussian cut at 0 the mean is 0.4 of that
        assert noise.mean() == pytest.approx(0.4 * 0.64 * deviation, rel=0.1)
    assert dark_card(0, 5).mean() < 4


def test_noise_is_each_channel_s_own_and_a_little_blurred():
    noise = dark_card(200, 3)
    noise -= noise.mean((1, 2), keepdims=True)
    for other, correlation in ((noise[[1, 2, 0]], 0), (np.roll(noise, 1, 1), 0.26),
                               (np.roll(noise, 1, 2), 0.26), (np.roll(noise, 3, 2), 0)):
        assert (noise * other).mean() / noise.var() == pytest.approx(correlation, abs=0.02)


def test_it_is_not_in_the_paper_s_table():
    args = corruptions.parse(["images", "x"])
    assert list(args.corruptions) == ["fog", "gaussian_noise", "motion_blur"]
    assert "low_light" in corruptions.parse(["images", "x", "--corruptions", "low_light"]
                                            ).corruptions


# ---- statistics ----------------------------------------------------------------------------------

def test_statistics_of_four_pixels_by_hand():
    image = np.array([[[200, 0], [0, 50]], [[0, 100], [0, 50]], [[0, 0], [0, 50]]], np.uint8)
    # luminance 59.8, 58.7, 0, 50: their mean 42.125; chroma 200, 100, 0, 0
    found = dict(zip(likeness.COLUMNS, likeness.statistics(image)))
    assert found["mean"] == pytest.approx(42.125)
    assert found["deviation"] == pytest.approx(24.6154, abs=1e-3)
    assert found["50 %"] == pytest.approx((58.7 + 50) / 2)
    assert found["chroma"] == 75
    # (59.8 - 58.7 - 0 + 50) / 2 = 25.55
    assert found["noise"] == pytest.approx(25.55 / 0.6745)


def test_noise_is_measured_whatever_edges_and_slopes():
    scene = np.add.outer(np.arange(121), 0.5 * np.arange(201))
    scene[30:80, 51:140] += 90
    for deviation in (0.5, 2, 8):
        noisy = scene + deviation * draws().standard_normal(scene.shape)
        assert likeness.noise(noisy) == pytest.approx(deviation, rel=0.03)


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "pictures/night").is_dir(), reason="no real pictures here")
def test_severity_3_comes_as_near_to_real_nights_as_documented():
    nights = likeness.pictures_of(REAL / "pictures/night", SIZE)
    paths = sorted((REAL / "pandaset/002").glob("camera/*/0[39].jpg"))
    clean = [read_image(path, SIZE).numpy() for path in paths]
    dark = [low_light(image, 3, draws(number)) for number, image in enumerate(clean)]
    found = [np.mean([likeness.statistics(image) for image in images], 0)
             for images in (clean, dark, nights)]
    # 12 of PandaSet's 108 images are near all of them
    assert found[0] == pytest.approx([95, 48, 36, 81, 180, 20, 0.8], rel=0.15)
    assert found[1] == pytest.approx([34, 30, 3.4, 21, 91, 15, 2.2], rel=0.15)
    assert found[2] == pytest.approx([33, 31, 6.4, 21, 93, 15, 2.1], rel=0.03)
    assert (np.abs(found[1] - found[2]) < [3, 2, 4, 3, 6, 1.5, 0.2]).all()

    # Noise at each brightness, which the parts of shot and read noise settle
    levels = (0, 6, 12, 24, 48, 96)
    for low, high in zip(levels, levels[1:]):
        assert noise_between(dark, low, high) == pytest.approx(noise_between(nights, low, high),
                                                               rel=0.3)


def noise_between(images, low, high):
    """The noise of the blocks of 2x2 pixels whose mean luminance is within low..high."""
    values = np.stack([likeness.luminance(image) for image in images])
    (a, b), (c, d) = ((values[:, row::2, col::2] for col in (0, 1)) for row in (0, 1))
    chosen = (a + b + c + d >= 4 * low) & (a + b + c + d < 4 * high)
    return np.median(np.abs(a - b - c + d)[chosen]) / 2 / 0.6745


# ---- the commands --------------------------------------------------------------------------------

@pytest.mark.slow
def test_compare_writes_numbers_and_a_picture(world, tmp_path, capsys):
    nights = tmp_path / "nights"
    nights.mkdir()
    for name, value in (("a.png", 10), ("b.JPG", 30)):
        Image.fromarray(card(value, 60, 90).transpose(1, 2, 0)).save(nights / name)
    (nights / "notes.txt").write_text("no picture")
    argv = ["compare", "--data", str(world), "--corruption", "low_light", "--image-size", "80",
            "160", "--limit", "4", "--out", str(tmp_path / "new/out"), "--like", str(nights)]
    corruptions.main(argv)
    lines = (tmp_path / "new/out.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "nuscenes, clean", *(f"low light {severity}" for severity in SEVERITIES), "nights"]
    assert lines[-1] == ("| nights | 2 | 20.0 ± 10.0 | 0.0 ± 0.0 | 20.0 ± 10.0 | 20.0 ± 10.0 | "
                         "20.0 ± 10.0 | 0.0 ± 0.0 | 0.0 ± 0.0 |")
    means = [float(line.split("|")[3].split()[0]) for line in lines[2:-1]]
    assert sorted(means, reverse=True) == means
    with Image.open(tmp_path / "new/out.png") as picture:
        assert picture.width == 1800

    table = open_one(world)
    del table.columns["image"]
    with pytest.raises(InputError, match="nuscenes has no images"):
        corruptions.changed_by(corruptions.How("camera", "fog", 3, SIZE, 0, "fog"), table)
    for wrong in (tmp_path / "none", world):
        line = fails_with_one_line(capsys, corruptions.main, [*argv[:-1], str(wrong)])
        assert f"--like {wrong}: no " in line


@pytest.mark.slow
def test_clean_and_dark_copies_have_a_column_each(panda, tmp_path, capsys):
    """PandaSet states no conditions: without a clean copy its frames have no column."""
    made = {}
    for name in ("clean", "low_light"):
        made[name] = tmp_path / name
        corruptions.main(["make", "--data", f"pandaset64={panda}", "--out", str(made[name]),
                          "--corruption", name, "--image-size", "80", "160", "--workers", "0"])
    assert {path.name for path in made["clean"].iterdir() if not path.is_symlink()} == {
        "corrupted.json", "conditions.json"}
    assert set(json.loads((made["clean"] / "conditions.json").read_text()).values()) == {"clean"}

    # One scene's name holds it out in both
    tables = open_tables([("pandaset64", path) for path in made.values()], here=True)
    scene = tables[0].scenes()[0]
    for split, scenes in (("val", {scene}), ("train", set(tables[0].scenes()) - {scene})):
        chosen = select(hold_out(tables, [scene]), split)
        frames = Frames(chosen, image_size=(80, 160), target="labels")
        assert frames.conditions == ("clean", "low_light")
        assert [set(table.scenes()) for table in chosen] == [scenes, scenes]
        # The same points under both conditions
        clean, dark = frames[0, 0], frames[0, len(frames) // 2]
        assert [item["condition"] for item in (clean, dark)] == [0, 1]
        assert np.array_equal(clean["pixels"], dark["pixels"])
        assert dark["image"].float().mean() < 0.6 * clean["image"].float().mean()

    # Whatever severity and seed, it is the same copy
    capsys.readouterr()
    corruptions.main(["make", "--data", f"pandaset64={panda}", "--out", str(made["clean"]),
                      "--corruption", "clean", "--severity", "5", "--seed", "2"])
    assert "taken as it is" in capsys.readouterr().out

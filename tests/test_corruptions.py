"""What each corruption does to an image or a scan, by severity, as the paper's sources have it."""
import numpy as np
import pytest
from runs import open_one

from experiments import degradations
from experiments.degradations import IMAGES, SCANS, SEVERITIES
from readers.files import read_image


def draws(seed=0):
    return np.random.default_rng(seed)


def flat(value, height=112, width=224):
    return np.full((3, height, width), value, np.uint8)


def rises(values):
    return all(a < b for a, b in zip(values, values[1:]))


@pytest.fixture(scope="module")
def picture(world):
    """A frame's image at 112x224."""
    return read_image(open_one(world).path("image", 0, 0), (112, 224)).numpy()


# ---- images --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", IMAGES)
def test_an_image_stays_an_image_and_is_drawn_by_the_generator_alone(picture, name):
    corrupt = IMAGES[name]
    before = picture.copy()
    for severity in SEVERITIES:
        image = corrupt(picture, severity, draws())
        assert image.shape == picture.shape and image.dtype == np.uint8
        assert not np.array_equal(image, picture)
        assert np.array_equal(image, corrupt(picture, severity, draws()))
        same = np.array_equal(image, corrupt(picture, severity, draws(1)))
        assert same == (name == "motion_blur")  # which draws nothing
    assert np.array_equal(picture, before)


@pytest.mark.parametrize("name", ["gaussian_noise", "motion_blur"])
def test_a_higher_severity_changes_more(picture, name):
    changes = [0]
    for severity in SEVERITIES:
        image = IMAGES[name](picture, severity, draws()).astype(float)
        changes.append(np.abs(image - picture).mean())
    assert rises(changes)


def test_fog_leaves_the_documented_part_of_the_image():
    """The same fog before black and before white differs by what is left of the image, everywhere
    alike."""
    left = []
    for severity in SEVERITIES:
        white = degradations.fog(flat(255), severity, draws()).astype(float)
        difference = white - degradations.fog(flat(0), severity, draws())
        assert np.ptp(difference) <= 1  # rounding
        left.append(difference.mean() / 255)
    assert left == pytest.approx([0.36, 0.27, 0.20, 0.17, 0.125], abs=0.005)


def test_fog_takes_contrast_and_colour(picture):
    def contrast_and_colour(image):
        image = image.astype(float)
        return image.std(), np.abs(image - image.mean(0)).mean()

    clean = contrast_and_colour(picture)
    foggy = [contrast_and_colour(degradations.fog(picture, severity, draws()))
             for severity in SEVERITIES]
    for of_clean, of_foggy in zip(clean, zip(*foggy)):
        assert rises(of_foggy[::-1]) and of_foggy[0] < of_clean


# above 1.7, means of blocks no longer tell the sizes apart
@pytest.mark.parametrize("decay", [1.4, 1.7])
def test_fog_s_structures_of_half_the_size_are_one_decay_lower(decay):
    ratios = []
    for seed in range(8):
        level = degradations.fractal_noise(256, 256, decay, draws(seed))
        assert level.min() == 0 and level.max() == 1
        heights = []
        for _ in range(5):
            coarse = level.reshape(len(level) // 2, 2, -1, 2).mean((1, 3))
            heights.append((level - coarse.repeat(2, 0).repeat(2, 1)).std())
            level = coarse
        ratios.append(np.array(heights[2:]) / heights[1:-1])
    assert np.mean(ratios, 0) == pytest.approx([decay] * 3, rel=0.1)
    assert degradations.fractal_noise(50, 91, decay, draws()).shape == (50, 91)


def test_gaussian_noise_has_the_documented_deviation():
    for severity, deviation in ((1, 0.08), (2, 0.12)):  # mid-grey: four deviations to black
        noisy = degradations.gaussian_noise(flat(128), severity, draws())
        noise = noisy.astype(float) - 128
        assert noise.std() / 255 == pytest.approx(deviation, rel=0.02)
        assert abs(noise.mean()) < 0.5
        # each pixel and channel on its own
        for other in (noise[[1, 2, 0]], np.roll(noise, 1, 1), np.roll(noise, 1, 2)):
            assert abs((noise * other).mean()) < 0.02 * noise.var()


@pytest.mark.parametrize("width", [224, 448])
def test_motion_blur_spreads_a_column_and_leaves_it_where_it_was(width):
    columns = np.arange(width)
    image = flat(0, 8, width)
    image[:, :, 100] = 255
    spreads = []
    for severity in SEVERITIES:
        profile = degradations.motion_blur(image, severity)[0, 0].astype(float)
        profile /= profile.sum()
        center = (profile * columns).sum()
        assert center == pytest.approx(100, abs=1e-6)
        variance = (profile * (columns - center) ** 2).sum()
        spreads.append(np.sqrt(variance) / width)
    # a box of length L has the deviation L / sqrt(12), a path of L pixels that of at most one more
    expected = np.array([0.01, 0.02, 0.03, 0.04, 0.05]) / np.sqrt(12)
    assert spreads == pytest.approx(expected, abs=0.2 / width)


def test_motion_blur_leaves_edges_in_place():
    edge = flat(0)
    edge[:, :, 112:] = 255
    widths = []
    for severity in SEVERITIES:
        profile = degradations.motion_blur(edge, severity)[1, 50].astype(int)
        assert np.abs(profile + profile[::-1] - 255).max() <= 1
        assert profile[111] < 128 <= profile[112]
        widths.append(((profile > 0) & (profile < 255)).sum())
    assert rises(widths)


def test_motion_blur_leaves_rows_apart(picture):
    rows = flat(0) + np.arange(112, dtype=np.uint8)[:, None]
    fine = []
    for severity in SEVERITIES:
        assert np.array_equal(degradations.motion_blur(rows, severity), rows)
        blurred = degradations.motion_blur(picture, severity)
        one_row = degradations.motion_blur(np.ascontiguousarray(picture[:, 40:41]), severity)
        assert np.array_equal(blurred[:, 40:41], one_row)
        fine.append(np.diff(blurred.astype(float), axis=2).std())
    assert rises(fine[::-1])


# ---- LiDAR ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scan():
    values = draws(5).uniform(-40, 40, (20000, 5)).astype(np.float32)
    values.flags.writeable = False  # as read_scan's
    return values


def test_lidar_noise_has_the_documented_deviation(scan):
    for severity, deviation in zip(SEVERITIES, (0.02, 0.04, 0.06, 0.08, 0.10)):
        noisy = SCANS["gaussian_noise"](scan, severity, draws())
        assert noisy.shape == scan.shape and noisy.dtype == np.float32
        assert np.array_equal(noisy[:, 3:], scan[:, 3:])
        noise = (noisy - scan)[:, :3]
        assert noise.std(0) == pytest.approx([deviation] * 3, rel=0.03)
        assert np.abs(noise.mean(0)).max() < 0.03 * deviation
        assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.03


def test_density_decrease_drops_the_documented_share(scan):
    thin_out = SCANS["density_decrease"]
    numbered = np.column_stack([scan[:, :3], np.arange(len(scan))]).astype(np.float32)
    before = set(range(len(scan)))
    for severity, count in zip(SEVERITIES, (18800, 17600, 16400, 15200, 14000)):
        thin = thin_out(numbered, severity, draws())
        left = thin[:, 3].astype(int)
        assert thin.shape == (count, 4) and thin.dtype == np.float32
        assert np.array_equal(thin_out(np.arange(len(scan)), severity, draws()), left)  # labels
        assert rises(left.tolist()) and np.array_equal(thin, numbered[left])  # whole points
        assert set(left) < before  # of the lower severity's
        before = set(left)

    # those of the highest severity are gone from all of the scan
    gone = np.setdiff1d(np.arange(len(scan)), left)
    assert np.histogram(gone, 10, (0, len(scan)))[0] == pytest.approx([600] * 10, rel=0.15)
    assert len(thin_out(numbered[:1], 5, draws())) == 1

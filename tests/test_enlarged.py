"""Images of a copy are of their own size, and are read as they were meant at the encoder's size."""
import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import open_one

from experiments import copies
from experiments.degradations import IMAGES
from readers.files import read_image


def read_again(image, size):
    """An image [3, h, w] as it is read at a size, after JPEG."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(copies.as_jpeg(image))
        return read_image(file.name, size, image.shape[1:]).numpy().astype(float)


def nearness(small, clean, raw_size):
    """Of an enlarged image, and of Pillow's enlargement with Lanczos, when read again.

    RMS difference to `small`, and the standard deviation of the change against `small`'s.
    """
    pillow = Image.fromarray(small.transpose(1, 2, 0)).resize(raw_size[::-1],
                                                              Image.Resampling.LANCZOS)
    numbers = []
    for image in (copies.enlarged(small, raw_size), np.array(pillow).transpose(2, 0, 1)):
        assert image.shape == (3, *raw_size) and image.dtype == np.uint8
        again = read_again(image, small.shape[1:])
        numbers += [np.sqrt(np.mean((again - small) ** 2)),
                    (again - clean).std() / (small.astype(float) - clean).std()]
    return numbers


# decoded at half the size, where it is odd too, and at its size
@pytest.mark.parametrize("raw_size, size", [((450, 800), (112, 224)), ((227, 401), (56, 112)),
                                            ((300, 500), (112, 224))])
@pytest.mark.parametrize("name, severity, most, least", [
    ("fog", 5, 0.6, 0.99), ("motion_blur", 3, 0.6, 0.99), ("gaussian_noise", 1, 2, 0.96),
    ("gaussian_noise", 3, 7, 0.9)])
def test_a_corrupted_image_is_read_as_it_was_meant(world, raw_size, size, name, severity, most,
                                                   least):
    clean = read_image(open_one(world).path("image", 0, 0), size).numpy()
    small = IMAGES[name](clean, severity, rng=np.random.default_rng(1))
    rms, deviation, of_pillow, its_deviation = nearness(small, clean, raw_size)
    assert rms < most and least < deviation < 1.01
    assert rms < of_pillow * (0.35 if name == "gaussian_noise" else 0.6)
    if name == "gaussian_noise":
        assert its_deviation < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("name, severity, rms, deviation", [
    ("fog", 3, 0.5, 1), ("motion_blur", 3, 0.5, 1), ("low_light", 3, 0.5, 1),
    ("gaussian_noise", 1, 1.3, 0.98), ("gaussian_noise", 3, 5.7, 0.93),
    ("gaussian_noise", 5, 22, 0.79)])
def test_real_images_are_read_as_near_as_documented(real, name, severity, rms, deviation):
    found = []
    for path in sorted(real.glob("samples/CAM_*/*.jpg")):
        clean = read_image(path, (224, 448)).numpy()
        small = IMAGES[name](clean, severity, rng=np.random.default_rng(1))
        found.append(nearness(small, clean, (900, 1600))[:2])
    found_rms, found_deviation = np.mean(found, 0)
    assert found_rms == pytest.approx(rms, rel=0.25)
    assert found_deviation == pytest.approx(deviation, abs=0.02)


@pytest.mark.parametrize("raw_size", [(900, 1600), (450, 900), (1080, 1920), (80, 160), (640, 1000),
                                      (4000, 6000)])
def test_jpegs_are_decoded_as_pillow_does_it(raw_size):
    file = io.BytesIO()
    Image.new("RGB", raw_size[::-1]).save(file, "JPEG")
    with Image.open(file) as image:
        image.draft("RGB", (3 * 448 // 2, 3 * 224 // 2))
        n = copies.decoded_at(raw_size, (224, 448))
        assert image.size == (-(-raw_size[1] // n), -(-raw_size[0] // n))


def test_an_image_of_its_own_size_stays_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8)
    assert np.array_equal(copies.enlarged(image, (40, 60)), image)

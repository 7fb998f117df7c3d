"""Images and scans made worse: fog, noise, motion blur and low light; noise and fewer points.

Severity                     1      2      3      4      5
    fog, weight            1.5    2.0    2.5    2.5    3.0   of the fog; the image's is 1 [H]
    fog, decay             2.0    2.0    1.7    1.5    1.4   height / height at half the size [H]
    fog, grey              0.1    0.2    0.3    0.4    0.5   share of mid-grey mixed in [D]
    (image left in fog)   0.36   0.27   0.20   0.17   0.12   (1 - grey) / (1 + weight)
    gaussian_noise        0.08   0.12   0.18   0.26   0.38   standard deviation; white is 1 [H]
    motion_blur           0.01   0.02   0.03   0.04   0.05   path's length / image's width [D]
    low_light, contrast    1.2    1.4    1.6    1.8    2.0   exponent of the image; white is 1 [N]
    low_light, gain       0.85   0.55   0.36   0.23   0.15   what is left of the light [N]
    low_light, photons    2200   1100    550    275    140   that a pixel of full light counts [N]
    low_light, read noise 0.15    0.3    0.6    1.2    2.4   thousandths of full light [N]
    (mid-grey becomes)     103     72     50     32     18   of 255, its mean; 128 before
  LiDAR
    gaussian_noise        0.02   0.04   0.06   0.08   0.10   deviation of x, y and z in m [D]
    density_decrease      0.06   0.12   0.18   0.24   0.30   share of the points that go [D]

The paper corrupts as Dong et al. (CVPR 2023) [D] do, and does not say how severely images are
corrupted. The numbers are those of their public code, which uses ImageNet-C's (Hendrycks &
Dietterich, ICLR 2019) [H]. The code is ours and differs:
- Images are corrupted in the size that the encoder sees. Theirs are 1600x900 and shrink afterwards,
  which averages noise away: to 224x448 its standard deviation falls to 0.18 of what it was. Noise
  of one severity is that much harder here.
- Fog is fractal noise by FFT, theirs is by diamond-square. It is weighed against white, theirs
  against the image's brightest pixel. Like theirs it hides near and far alike: fog by depth would
  need the depth of every pixel.
- The path of motion blur is not rounded to whole pixels. The intensity of LiDAR gets no noise.

Low light is ours, and not in the paper. A sensor's noise is that of photons counted and of reading
(Foi et al., IEEE TIP 2008); here it falls on pixels of the size that the encoder sees, each the
mean of many of the sensor's. From one severity to the next the sensitivity doubles, and with it the
variance of shot noise and the deviation of read noise. Severity 3 is set [N] so that 25 frames
of PandaSet's scene 002, by day, come near to 16 real nights of nuImages' front camera. Of the first
18, `python -m experiments.corruptions compare --data pandaset64=DATA --corruption low_light
--limit 108 --like DAYS NIGHTS` writes this, means over images ± their standard deviation:

    of 255           mean    deviation      5 %         50 %         95 %       chroma      noise
    PandaSet      95.3 ± 6.0 48.4 ± 5.8 35.7 ± 5.1   81.2 ± 9.9 180.6 ± 16.9 20.3 ± 4.8 0.7 ± 0.2
    severity 3    33.8 ± 4.0 30.0 ± 4.9  3.3 ± 0.7   21.5 ± 5.1  91.5 ± 14.3 15.6 ± 3.2 2.2 ± 0.1
    real nights   32.7 ± 9.0 30.7 ± 5.4  6.4 ± 3.0   21.1 ± 8.8  93.1 ± 17.2 14.8 ± 3.4 2.1 ± 0.3
    real days    108.5 ± 3.9 46.4 ± 7.1 45.9 ± 12.3 102.9 ± 10.2 205.9 ± 30.8 7.9 ± 3.4 1.1 ± 0.3

The means differ by at most a third of the nights' own deviation, except that the darkest pixels are
darker here. Where the light is does not agree: the sky stays the brightest part, no lamp is lit,
and none shines on the road. Severity 5 is as dark as the darkest of the nights. Of other images
other numbers come: nuImages' days have a mean of 41 at severity 3.
"""
import numpy as np
from scipy.ndimage import correlate1d, gaussian_filter

SEVERITIES = (1, 2, 3, 4, 5)


# ---- images: uint8 [3, H, W], severity 1..5, rng -> uint8 [3, H, W] ------------------------------

def fog(image, severity, rng):
    """Fog whose brightness is fractal_noise, with less contrast and paler colours behind it."""
    weight = (1.5, 2.0, 2.5, 2.5, 3.0)[severity - 1]
    decay = (2.0, 2.0, 1.7, 1.5, 1.4)[severity - 1]
    grey = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    _, height, width = image.shape
    haze = fractal_noise(height, width, decay, rng)
    image = (image / 255 + weight * haze) / (1 + weight)
    return _as_bytes((1 - grey) * image + grey * 0.5)


def gaussian_noise(image, severity, rng):
    """Independent noise on each pixel and channel, cut at black and white."""
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return _as_bytes(image / 255 + deviation * rng.standard_normal(image.shape))


def motion_blur(image, severity, rng=None):
    """The mean along a horizontal path centred on each pixel. Nothing is random.

    The border's pixels go on beyond the border.
    """
    length = (0.01, 0.02, 0.03, 0.04, 0.05)[severity - 1] * image.shape[2]  # pixels, fractional
    reach = int(np.ceil(max(0, length - 1) / 2))
    distance = np.abs(np.arange(-reach, reach + 1))
    weights = np.clip(length / 2 + 0.5 - distance, 0, 1)  # the part of each pixel on the path
    return _as_bytes(correlate1d(image / 255, weights / weights.sum(), axis=2, mode="nearest"))


def low_light(image, severity, rng):
    """The scene with little light and higher contrast, by a sensor to which few photons come.

    Each pixel and channel has shot noise, whose variance rises with its light, and read noise, the
    same everywhere. A blur of half a pixel stands for the camera's own noise reduction.
    """
    contrast = (1.2, 1.4, 1.6, 1.8, 2.0)[severity - 1]
    gain = (0.85, 0.55, 0.36, 0.23, 0.15)[severity - 1]
    photons = (2200, 1100, 550, 275, 140)[severity - 1]
    read_noise = (0.00015, 0.0003, 0.0006, 0.0012, 0.0024)[severity - 1]
    light = gain * to_light((image / 255) ** contrast)
    deviation = np.sqrt(light / photons + read_noise ** 2)
    light = light + deviation * rng.standard_normal(image.shape)
    return _as_bytes(gaussian_filter(from_light(light), (0, 0.5, 0.5), mode="nearest"))


def to_light(values):
    """sRGB's values, 0 to 1, as amounts of light, 0 to 1 (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92,
                    ((np.maximum(values, 0.04045) + 0.055) / 1.055) ** 2.4)


def from_light(light):
    """The inverse of `to_light`. Negative light, which noise makes, is on the line through 0."""
    return np.where(light <= 0.0031308, 12.92 * light,
                    1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055)


def fractal_noise(height, width, decay, rng):
    """A random field [height, width] from 0 to 1.

    Structures of half the size are 1 / decay as high.
    """
    side = max(height, width)
    down, right = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
    frequency = side * np.hypot(down, right)  # cycles per side; [side, side // 2 + 1]
    frequency[0, 0] = 1
    # In 2-D, a spectrum of 1 / frequency makes structures of all sizes equally high
    falloff = frequency ** (1 + np.log2(decay))
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) / falloff
    field = np.fft.irfft2(spectrum, (side, side))[:height, :width]
    return (field - field.min()) / np.ptp(field)


def _as_bytes(image):
    return (255 * image).round().clip(0, 255).astype(np.uint8)


# ---- LiDAR: [N, C >= 4] (x, y, z [m], intensity, ...), severity 1..5, rng -> [M, C] --------------

def jitter(scan, severity, rng):
    """Gaussian noise on the coordinates; a point's pixel moves with it. M = N."""
    deviation = (0.02, 0.04, 0.06, 0.08, 0.10)[severity - 1]
    noise = deviation * rng.standard_normal((len(scan), 3))
    return np.column_stack([scan[:, :3] + noise, scan[:, 3:]]).astype(scan.dtype)


def thin_out(scan, severity, rng):
    """Random points of the whole scan go, the others keep their order.

    A higher severity drops the points of a lower one and more. What is drawn depends on the number
    of rows alone, so the same rng drops the labels of the same points.
    """
    share = (0.06, 0.12, 0.18, 0.24, 0.30)[severity - 1]
    kept = rng.permutation(len(scan))[round(share * len(scan)):]
    return scan[np.sort(kept)]


IMAGES = {"fog": fog, "gaussian_noise": gaussian_noise, "motion_blur": motion_blur,
          "low_light": low_light}
SCANS = {"gaussian_noise": jitter, "density_decrease": thin_out}
SENSORS = {"camera": IMAGES, "lidar": SCANS}

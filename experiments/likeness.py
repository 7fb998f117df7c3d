"""How near corrupted images come to real pictures of a condition: in numbers, and side by side.

    run="python -m experiments.corruptions"
    $run compare --data DATA --corruption low_light --like NIGHTS --out runs/low-light

Images are uint8 [3, H, W], in the size that the encoder sees. Of each are taken, in parts of 255:

    mean, deviation, 5 %, 50 %, 95 %    of luminance: ITU-R BT.601's sum of red, green and blue
    chroma                              mean over pixels of largest less smallest of the three
    noise                               standard deviation of luminance's noise in a pixel

The noise is that of Donoho & Johnstone (Biometrika 1994): the median of the sizes of an image's
finest diagonal wavelets, by which edges, which are few, have little weight. Texture counts as noise
where most of an image has some.
"""
from pathlib import Path

import numpy as np

from plumbing.errors import InputError
from readers.files import read_image
from readers.paths import PICTURES

COLUMNS = ("mean", "deviation", "5 %", "50 %", "95 %", "chroma", "noise")
SHOWN = 4  # images of a row of the picture


# ---- one image -----------------------------------------------------------------------------------

def luminance(image):
    """[3, H, W] -> [H, W], 0 to 255."""
    return np.tensordot([0.299, 0.587, 0.114], image.astype(np.float64), 1)


def noise(values):
    """The standard deviation of independent Gaussian noise in [H, W], H and W at least 2."""
    height, width = (side // 2 * 2 for side in values.shape)
    values = values[:height, :width]
    top = values[::2, ::2] - values[::2, 1::2]
    bottom = values[1::2, ::2] - values[1::2, 1::2]
    diagonal = (top - bottom) / 2  # of four pixels' noise: its deviation is that of one
    return np.median(np.abs(diagonal)) / 0.6745  # the median of |z|, z standard normal


def statistics(image):
    """What COLUMNS names: [7] in parts of 255."""
    values = luminance(image)
    chroma = image.max(0).astype(np.float64) - image.min(0)
    return np.array([values.mean(), values.std(), *np.percentile(values, (5, 50, 95)),
                     chroma.mean(), noise(values)])


# ---- groups of images: [(name, [image])] ---------------------------------------------------------

def pictures_of(folder, size):
    """The pictures in a folder at `size` = (H, W): [uint8 [3, H, W]], in the order of their names.

    Raises InputError for a folder that is not there or has none.
    """
    if not Path(folder).is_dir():
        raise InputError(f"--like {folder}: no such folder")
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES)
    if not paths:
        raise InputError(f"--like {folder}: no picture ({', '.join(PICTURES)}) in it")
    return [read_image(path, size).numpy() for path in paths]


def table(groups):
    """Markdown: a row a group; mean ± standard deviation over its images of each statistic."""
    lines = [f"| of 255 | images | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * 8]
    for name, images in groups:
        found = np.array([statistics(image) for image in images])  # [images, 7]
        cells = [f"{mean:.1f} ± {deviation:.1f}"
                 for mean, deviation in zip(found.mean(0), found.std(0))]
        lines.append(f"| {name} | {len(images)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(groups, out):
    """Write the picture: a row a group, SHOWN of its images, evenly spread."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    _, height, width = groups[0][1][0].shape
    row_height = 4.4 * height / width + 0.1
    figure, axes = plt.subplots(len(groups), SHOWN, squeeze=False,
                                figsize=(18, row_height * len(groups)))
    for line, (name, images) in zip(axes, groups):
        line[0].set_ylabel(name, fontsize=15)
        numbers = np.linspace(0, len(images) - 1, SHOWN).round().astype(int)
        for axis, number in zip(line, numbers):
            axis.imshow(images[number].transpose(1, 2, 0))
    plt.setp(axes.flat, xticks=[], yticks=[])
    figure.tight_layout(pad=0.5)
    figure.savefig(out, dpi=100)
    plt.close(figure)

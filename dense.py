"""Dense labels: what all protocols share, from an image's resize to sliding windows.

A training item is a square crop: resize by a random factor, crop, flip, photometric distortion,
padding, in this order and with the constants of mmsegmentation 1.2. An item to evaluate on is the
resized image with its labels as they are. Images are bytes [3, H, W], labels uint8 [H, W], where 0
is "ignore". What is padded has the encoder's mean colour, which its normalisation makes 0, and the
label 0.
"""
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import Frames
from heads import MAP_HEADS, SideBySide
from metrics import Confusion, class_iou, finite, mean_iou
from plumbing import training
from plumbing.errors import InputError
from readers.files import read_image

FACTORS = (0.5, 2.0)  # range of the random factor of a training image's size
MOST_OF_ONE = 0.75    # of a crop's labelled pixels that one class may have
TRIES = 10            # for such a crop


# ---- sizes and places ----------------------------------------------------------------------------

def fitted(size, scale, factor=1.0):
    """The size (H, W) of an image that is made to fit, its ratio kept.

    size: (H, W) of the image. scale: its (longer, shorter) side at most, in pixels; None: as it is.
    factor: on top of that.
    """
    if scale is not None:
        factor *= min(scale[0] / max(size), scale[1] / min(size))
    return tuple(max(1, int(side * factor + 0.5)) for side in size)


def place_of_crop(labels, crop, rng):
    """(top, left) of a random crop of labels [H, W], in which no class has too many pixels.

    After TRIES it is as it is. An axis shorter than the crop starts at 0.
    """
    room = np.maximum(np.array(labels.shape) - crop, 0)
    # A picture of mostly road would else give crops of road alone
    for _ in range(TRIES):
        top, left = rng.integers(room + 1).tolist()
        part = labels[top:top + crop, left:left + crop]
        counts = np.bincount(part.ravel(), minlength=2)[1:]  # without "ignore"
        if counts.max() < MOST_OF_ONE * counts.sum():
            break
    return top, left


def starts(length, crop, stride):
    """Where the windows of an axis start: the last one ends with it. One where it fits."""
    last = max(length - crop, 0)
    return [*range(0, last, stride), last]


# ---- pictures ------------------------------------------------------------------------------------

def resized_labels(labels, size):
    """Labels [H, W] at another size (H, W): each pixel's nearest."""
    return np.array(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))


def padded(image, sides, colour):
    """An image [3, H, W] with what it lacks of `sides` below and on the right in colour [3]."""
    H, W = image.shape[1:]
    canvas = colour.to(image).view(3, 1, 1).repeat(1, max(H, sides[0]), max(W, sides[1]))
    canvas[:, :H, :W] = image
    return canvas


def levels(plus=0, factor=1):
    """What becomes of each of the 256 levels, as a table of Pillow's."""
    return [min(255, max(0, int(factor * level + plus))) for level in range(256)]


def distort(image, rng):
    """Photometric distortion of a Pillow image in RGB: each part with probability 1/2.

    Brightness, contrast, saturation and hue, as SSD (Liu et al., ECCV 2016) and mmsegmentation.
    """
    def drawn(least, most, neutral):
        value = rng.uniform(least, most)
        return value if rng.random() < 0.5 else neutral

    # All draws first, so that none depends on another
    brightness = drawn(-32, 32, 0)
    contrast = drawn(0.5, 1.5, 1)
    saturation = drawn(0.5, 1.5, 1)
    hue = drawn(-18, 18, 0) * 256 / 180  # of a circle of 180 in OpenCV, of 256 in Pillow
    contrast_first = rng.random() < 0.5

    # What each of 256 levels becomes; of hue, saturation and value each has a part of the table
    contrasted = 3 * levels(factor=contrast)
    turned = [(level + round(hue)) % 256 for level in range(256)]
    image = image.point(3 * levels(plus=brightness))
    if contrast_first:
        image = image.point(contrasted)
    # The way to HSV and back is not exact, so it is not taken for nothing
    if saturation != 1 or hue:
        image = image.convert("HSV").point(turned + levels(factor=saturation) + levels())
        image = image.convert("RGB")
    return image if contrast_first else image.point(contrasted)


# ---- items ---------------------------------------------------------------------------------------

def classes_of(tables):
    """The classes of every pixel of these tables, "ignore" first.

    Raises InputError for data without labelled pixels, and for tables whose classes differ.
    """
    each = {}
    for table in tables:
        if "scan" in table or not hasattr(table.reader, "CLASSES"):
            raise InputError(f"--data {table.root}: {table.name} has no labels of pixels; give "
                             "data that has, as nuimages")
        each[table.name] = getattr(table.reader, "ALL_CLASSES", table.reader.CLASSES)
    if len(set(each.values())) > 1:
        raise InputError(f"--data: {' and '.join(each)} have other classes; take them one by one")
    return each[tables[0].name]


class Pictures(Frames):
    """Images and the label of each of their pixels; `pictures[epoch, number]` is one.

    Args:
        scale: (longer, shorter) side that images are made to fit into; None: as they are.
        colour: [3] in [0, 1], of what is padded.
        crop: side of a training item. None: an item is a whole image, to evaluate on.
        skip_bad, seed: as of `Frames`.

    An item is a dict: condition; image uint8 [3, crop, crop] and labels uint8 [crop, crop]; of a
    whole image [3, h, w] as it fits, and [H, W] as the dataset has it. Labels are ALL_CLASSES where
    the dataset has them.
    """

    def __init__(self, tables, scale, colour, crop=None, skip_bad=False, seed=0):
        super().__init__(tables, "all", target="labels", skip_bad=skip_bad, seed=seed)
        self.scale = scale
        self.colour = (255 * colour.cpu().view(3)).round().byte()
        self.crop = crop

    def view(self, key):
        """One item. Raises InputError if it cannot be read."""
        # What the dataset has
        which, frame, camera, rng = self.locate(key)
        table = self.tables[which]
        if "bad" in table and table["bad"][frame]:
            raise InputError(f"{table.root}: {table['bad'][frame].decode()}")
        path = table.path("image", frame, camera)
        raw_size = tuple(table["image_size"][frame, camera].tolist())
        labels = self.labels(table, frame)
        if labels.shape != raw_size:
            raise InputError(f"{path}: {raw_size[0]}x{raw_size[1]} pixels, and labels of "
                             f"{labels.shape[0]}x{labels.shape[1]}; extract both again")

        # Resized, and for training cut out, too
        factor = rng.uniform(*FACTORS) if self.crop else 1.0
        size = fitted(raw_size, self.scale, factor)
        image = read_image(path, size, raw_size)  # [3, h, w]
        if self.crop:
            image, labels = self.cut(image, resized_labels(labels, size), rng)
        return {"condition": self.condition_of(table, frame), "image": image,
                "labels": torch.from_numpy(np.ascontiguousarray(labels))}

    def labels(self, table, frame):
        """The class of each pixel of a frame, uint8 [H, W]."""
        if hasattr(table.reader, "all_labels_of"):
            return table.reader.all_labels_of(table.root, table.columns, frame)
        return table.labels(frame)

    def cut(self, image, labels, rng):
        """A training item's crop of image [3, h, w] and labels [h, w], flipped and distorted."""
        crop = self.crop
        top, left = place_of_crop(labels, crop, rng)
        pixels = image.permute(1, 2, 0).numpy()[top:top + crop, left:left + crop]
        labels = labels[top:top + crop, left:left + crop]
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
            labels = labels[:, ::-1]
        distorted = distort(Image.fromarray(np.ascontiguousarray(pixels)), rng)

        image = torch.from_numpy(np.array(distorted)).permute(2, 0, 1)
        missing = [(0, crop - side) for side in labels.shape]
        return padded(image, (crop, crop), self.colour), np.pad(labels, missing)


def collate(items):
    """A batch of items of one size: image [B, 3, H, W], labels [B, H, W], condition [B], bad."""
    batch = {name: torch.stack([item[name] for item in items]) for name in ("image", "labels")}
    batch["condition"] = torch.tensor([item["condition"] for item in items])
    batch["bad"] = sum((item.get("bad", []) for item in items), [])
    return batch


# ---- encoder and heads ---------------------------------------------------------------------------

class Segmenter(torch.nn.Module):
    """A frozen encoder and K equal heads on it: images [B, 3, H, W] -> logits [B, K, C, h, w].

    head: a key of MAP_HEADS. classes: how many, C. count: of heads, K. precision: of the encoder.
    draws: of the heads' stochastic depth, see heads.py; None: without it.
    """

    def __init__(self, encoder, head, classes, count, device, precision):
        super().__init__()
        head = MAP_HEADS[head](encoder.dim, classes)
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        self.heads = SideBySide(head, count).to(device)
        self.device = device
        self.precision = precision

    def forward(self, images, draws=None):
        with torch.no_grad(), training.autocast(self.device, self.precision):
            maps = self.encoder(images)         # [B, D, h, w]
        return self.heads(maps.float(), draws)  # [B, K, C, h, w]


def up_sampled(logits, size):
    """Logits [B, C, h, w] at each pixel of size (H, W), bilinearly: [B, C, H, W]."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def cross_entropies(logits, labels):
    """Cross-entropy of each head, summed over the labelled pixels [K], and how many these are.

    logits: [B, K, C, h, w], up-sampled to the labels. labels: [B, H, W], 0 where there is none.
    """
    truth = labels.long() - 1
    sums = []
    for of_head in logits.unbind(1):
        outputs = up_sampled(of_head, labels.shape[1:])  # [B, C, H, W]
        sums.append(F.cross_entropy(outputs, truth, ignore_index=-1, reduction="sum"))
    return torch.stack(sums), int((truth >= 0).sum())


def slide(image, crop, stride, colour, predict, patch=1, at_once=8):
    """Logits [C, H, W] of an image [3, H, W]: the mean of those of the windows on each pixel.

    crop, stride: side of a window and the step to the next, in pixels. A window is no longer than
    an image's side; colour: of what makes that whole patches. predict: windows [n, 3, h, w] ->
    logits [n, C, ...], which are up-sampled to the window. at_once: windows in a batch.
    """
    H, W = image.shape[1:]
    high, wide = (min(crop, -(-side // patch) * patch) for side in (H, W))
    canvas = padded(image, (high, wide), colour)
    places = list(product(starts(H, high, stride), starts(W, wide, stride)))
    windows = torch.stack([canvas[:, top:top + high, left:left + wide] for top, left in places])
    logits = torch.cat([predict(some) for some in windows.split(at_once)])  # [n, C, h, w]

    # One window's logits at a time are as large as its pixels
    total = canvas.new_zeros(logits.shape[1], *canvas.shape[1:])
    times = canvas.new_zeros(canvas.shape[1:])  # that a pixel is seen
    for (top, left), of_window in zip(places, logits):
        rows = slice(top, top + high)
        cols = slice(left, left + wide)
        total[:, rows, cols] += up_sampled(of_window[None], (high, wide))[0]
        times[rows, cols] += 1
    return (total / times)[:, :H, :W]


# ---- evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def judge(segmenter, pictures, names, windows, workers):
    """A `Confusion` of each head of a `Segmenter` on whole pictures, summed over all processes.

    names: of the classes: the heads' or the pictures', whichever are more. windows: their side and
    the step to the next, as of `slide`.
    """
    device = segmenter.device
    totals = [Confusion(names, pictures.conditions, {}, device) for _ in segmenter.heads]
    order = training.in_batches(range(training.rank(), len(pictures), training.world()), 1)
    loader = training.load(pictures, order, collate, workers, device)
    for batch in tqdm(loader, "evaluate", disable=training.rank() > 0, mininterval=2):
        # All heads' logits of a picture, at its labels' size
        batch = training.to_device(batch, device)
        labels = batch["labels"]  # [1, H, W]
        logits = slide(batch["image"][0], *windows, pictures.colour / 255,
                       lambda images: segmenter(images).flatten(1, 2),
                       segmenter.encoder.patch_size)
        logits = up_sampled(logits[None], labels.shape[1:])[0].flatten(1)  # [K C, H W]

        # As items of points are counted: each of one view
        points = {"labels": labels.flatten().long(), "condition": batch["condition"]}
        points["view"] = torch.zeros_like(points["labels"])
        for total, of_head in zip(totals, logits.chunk(len(totals))):
            total.add(of_head.T, points, [0])
    for total in totals:
        training.sum_over_processes(total.counts)
    return totals


def on_common(counts, truth, predicted, names):
    """Counts [K + 1, K + 1] over K common classes; the last row and column stand for all others.

    A pixel whose true class is another does not count. Another class predicted is an error.

    Args:
        counts: [C, C], row = truth, column = prediction; at least as many as either has classes.
        truth, predicted: of each class its common name, or None. names: the common names.
    """
    def places(classes):
        return torch.tensor([names.index(name) if name in names else len(names)
                             for name in classes])

    # Classes of one name are added up
    merged = torch.zeros(len(names) + 1, len(names) + 1, dtype=torch.long)
    part = counts[:len(truth), :len(predicted)]
    merged.index_put_((places(truth)[:, None], places(predicted)), part, accumulate=True)
    merged[-1] = 0
    return merged


def percents(counts, names, *means):
    """{row of a table: IoU in percent}: the mean over each of these lists of names, then classes.

    counts: [C, C] of the classes `names`. Those of the last list have a row, None of what occurs
    neither in truth nor in prediction.
    """
    rows = {}
    for kept in means:
        others = [number for number, name in enumerate(names) if name not in kept]
        rows[mean_of(kept)] = finite(100 * mean_iou(counts, others))
    each = dict(zip(names, class_iou(counts).tolist()))
    return rows | {name: finite(100 * each[name]) for name in means[-1]}


def mean_of(names):
    """The row of a table that has the mean over these classes."""
    return f"mean over {len(names)} classes"


def table_of(columns):
    """Markdown of columns {title: {row: percent, or None}}."""
    lines = [f"| IoU [%] | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for row in dict.fromkeys(name for rows in columns.values() for name in rows):
        values = [rows.get(row) for rows in columns.values()]
        cells = ["–" if value is None else f"{value:.1f}" for value in values]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)

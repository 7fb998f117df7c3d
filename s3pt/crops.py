"""A picture as two large crops and some small ones, and where in it their tokens are.

S3PT, Sec. 3 and Tables 5 to 7; the crops and their colours are DINO's, the positions that they
carry are CrIBo's. All randomness of an item is a function of (seed, epoch, number).
"""
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from data import Frames
from plumbing.errors import InputError
from readers.files import decoded

RATIO = 3 / 4, 4 / 3     # of a crop's width and height
JITTER = 0.4, 0.4, 0.2   # of brightness, contrast and colour: a factor from 1 - this to 1 + this
HUE = 0.1                # of the circle of hues, either way
# Probabilities of blur and of solarisation: of the first crop, the second and the small ones
BLUR = 1.0, 0.1, 0.5
SOLARISE = 0.0, 0.2, 0.0


class Views(NamedTuple):
    """Which crops a picture gives. Sizes are sides in pixels, scales parts of the picture's area.

    patch: of the encoder. blocks: of it, for which stochastic depth is drawn. clusters: tokens
    drawn to begin clusters with; 0 for none, where no positions are needed.
    """
    crop: int = 224
    scale: tuple = (0.25, 1.0)
    local_crops: int = 0
    local_crop: int = 96
    local_scale: tuple = (0.05, 0.25)
    patch: int = 16
    blocks: int = 12
    clusters: int = 128


# ---- a crop --------------------------------------------------------------------------------------

def draw_box(rng, size, scale):
    """A random crop (top, left, height, width) of a picture (H, W), by torchvision's rule.

    Its area is a part U(scale) of the picture's, its ratio exp(U(log RATIO)). What does not fit ten
    times is a centre crop of the nearest ratio: a wide picture has no large crop.
    """
    H, W = size
    for _ in range(10):
        area = rng.uniform(*scale) * H * W
        ratio = np.exp(rng.uniform(*np.log(RATIO)))
        h = round(np.sqrt(area / ratio))
        w = round(np.sqrt(area * ratio))
        if 0 < h <= H and 0 < w <= W:
            return rng.integers(H - h + 1), rng.integers(W - w + 1), h, w
    ratio = np.clip(W / H, *RATIO)
    h = min(H, round(W / ratio))
    w = min(W, round(H * ratio))
    return (H - h) // 2, (W - w) // 2, h, w


def cut(image, raw_size, box, side):
    """A crop of Pillow's image, resized to `side` squared by an antialiased cubic.

    box: in pixels of the raw size (H, W), of which the image may be a smaller version.
    """
    top, left, h, w = box
    down = image.height / raw_size[0]
    right = image.width / raw_size[1]
    corners = left * right, top * down, (left + w) * right, (top + h) * down
    return image.resize((side, side), Image.Resampling.BICUBIC, corners)


def token_positions(box, flipped, grid):
    """Where a crop's tokens are in the raw picture: [P, 2], (x, y) in pixels, row by row.

    A token is where the pixels of its patch are in the mean. CrIBo resizes a map of coordinates,
    which bends at the crop's border. This is what it stands for. grid: (rows, columns).
    """
    top, left, h, w = box
    rows, cols = grid
    y = top + (np.arange(rows) + 0.5) * h / rows - 0.5
    x = left + (np.arange(cols) + 0.5) * w / cols - 0.5
    x = x[::-1] if flipped else x
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def token_depths(depths, raw_size, box, flipped, grid):
    """The mean depth of each token of a crop over the known pixels of its patch: [P] metres.

    depths: a map [h, w] of the whole picture, at any resolution, 0 where unknown. A token without
    a known pixel is NaN.
    """
    top, left, h, w = box
    down, right = np.array(depths.shape) / raw_size
    above, below = _pixels_between(top * down, h * down, grid[0], len(depths))
    first, last = _pixels_between(left * right, w * right, grid[1], depths.shape[1])
    inside = depths[above[0]:below[-1], first[0]:last[-1]]
    totals = []
    for values in (inside, inside > 0):
        # sums[r, c]: over all pixels above r and left of c
        sums = np.zeros((len(inside) + 1, inside.shape[1] + 1))
        sums[1:, 1:] = values.cumsum(0, dtype=np.float64).cumsum(1)
        rows = sums[below - above[0]] - sums[above - above[0]]              # [rows, w + 1]
        totals.append(rows[:, last - first[0]] - rows[:, first - first[0]])  # [rows, cols]
    known = totals[1] > 0
    mean = np.where(known, totals[0] / np.maximum(totals[1], 1), np.nan)
    return (mean[:, ::-1] if flipped else mean).ravel()


def _pixels_between(start, length, count, size):
    """The pixels of each of `count` equal pieces of an axis: begin [count] and end [count].

    A pixel belongs to the piece in which its centre is; a piece between two centres takes the pixel
    that its own middle is in. size: pixels of the axis.
    """
    edges = start + length * np.arange(count + 1) / count
    bounds = np.ceil(edges - 0.5).astype(int)
    middle = np.floor((edges[:-1] + edges[1:]) / 2).astype(int)
    narrow = bounds[1:] <= bounds[:-1]
    begin = np.where(narrow, middle, bounds[:-1]).clip(0, size - 1)
    end = np.where(narrow, middle + 1, bounds[1:]).clip(1, size)
    return begin, end


def distorted(image, rng, blur, solarise):
    """DINO's change of a crop's colours. blur, solarise: probabilities of these two."""
    if rng.random() < 0.8:
        image = jittered(image, rng)
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < blur:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2)))
    if rng.random() < solarise:
        image = ImageOps.solarize(image, 128)
    return image


def jittered(image, rng):
    """Brightness, contrast, colour and hue, changed in a random order."""
    kinds = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for number in rng.permutation(4):
        if number < 3:
            reach = JITTER[number]
            image = kinds[number](image).enhance(rng.uniform(1 - reach, 1 + reach))
            continue
        hue, saturation, value = image.convert("HSV").split()
        turn = round(255 * rng.uniform(-HUE, HUE))
        hue = hue.point([(level + turn) % 256 for level in range(256)])
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image


# ---- items ---------------------------------------------------------------------------------------

class Crops(Frames):
    """The pictures of all cameras, an item each, as crops; `crops[epoch, number]` is one.

    Args:
        tables: of datasets with pictures. views: a `Views`. seed, skip_bad: as of `data.Frames`.
        depth: what gives a picture's depth map (s3pt/depth.py): (table, frame, camera) -> [h, w].
            None: no depths.

    An item is a dict: image uint8 [2, 3, S, S], the two global crops; local uint8 [L, 3, s, s];
    draws [2 + L, blocks, 2] in [0, 1), of stochastic depth in each view (`vit.survivors`);
    and where there are clusters positions [2 P, 2] of the global crops' tokens, x and y in pixels
    of the raw picture, the first crop's first; depths [2 P] metres, NaN where unknown; start [M],
    the tokens that clusters begin with.
    """

    def __init__(self, tables, views, depth=None, skip_bad=False, seed=0):
        super().__init__(tables, "all", skip_bad=skip_bad, seed=seed)
        self.sizes = views
        self.depth = depth

    def view(self, key):
        """One item. Raises InputError if the picture or its depths cannot be read."""
        which, frame, camera, rng = self.locate(key)
        table = self.tables[which]
        if "bad" in table and table["bad"][frame]:
            raise InputError(f"{table.root}: {table['bad'][frame].decode()}")
        views = self.sizes
        raw_size = table["image_size"][frame, camera]

        # Where the crops are, before the picture is read: it need not be larger than they ask for
        sides = [views.crop] * 2 + [views.local_crop] * views.local_crops
        scales = [views.scale] * 2 + [views.local_scale] * views.local_crops
        boxes = [draw_box(rng, raw_size, scale) for scale in scales]
        flips = rng.random(len(boxes)) < 0.5
        finest = max(side / min(box[2:]) for side, box in zip(sides, boxes))
        least = np.ceil(raw_size * min(1, finest)).astype(int)
        image = decoded(table.path("image", frame, camera), least, raw_size)

        # The crops
        pixels = []
        for number, (box, side, flip) in enumerate(zip(boxes, sides, flips)):
            crop = cut(image, raw_size, box, side)
            crop = ImageOps.mirror(crop) if flip else crop
            kind = min(number, 2)
            crop = distorted(crop, rng, BLUR[kind], SOLARISE[kind])
            pixels.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
        draws = rng.random((len(boxes), views.blocks, 2), np.float32)
        item = {"image": torch.stack(pixels[:2]), "draws": torch.from_numpy(draws)}
        if views.local_crops:
            item["local"] = torch.stack(pixels[2:])
        if not views.clusters:
            return item

        # Their tokens
        grid = (views.crop // views.patch,) * 2
        of_crops = list(zip(boxes[:2], flips))
        positions = [token_positions(box, flip, grid) for box, flip in of_crops]
        depths = [np.full(grid[0] * grid[1], np.nan)] * 2
        if self.depth:
            of_picture = self.depth(table, frame, camera)
            depths = [token_depths(of_picture, raw_size, box, flip, grid)
                      for box, flip in of_crops]
        start = rng.choice(2 * grid[0] * grid[1], views.clusters, replace=False)
        tokens = {"positions": np.concatenate(positions), "depths": np.concatenate(depths)}
        for name, values in tokens.items():
            item[name] = torch.from_numpy(values.astype(np.float32))
        return item | {"start": torch.from_numpy(start)}


def collate(items):
    """A batch: each field of the items stacked; `bad` as in `data.collate`."""
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        batch[name] = sum(values, []) if name == "bad" else torch.stack(values)
    return batch

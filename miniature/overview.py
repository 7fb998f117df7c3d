"""One picture of what collaborative distillation changed: a row per condition.

    python miniature/overview.py runs/demo/seed-1/seg-base runs/demo/seed-1/seg-cd --out overview.png

Columns: the image, the projected LiDAR points by class, PCA colours of the features before and after (one PCA for all of
them), the segmentation probe's predictions before and after.
"""
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.arguments import Parser, whole
from data import Frames
from index import CLASSES, CONDITIONS, load_index
from errors import InputError, one_line_errors
from eval import data_of, load_probe, say_other_frames
from plumbing.fingerprint import with_files

COLORS = dict(zip(CLASSES, np.array([  # RGB by class; distinct hues for classes that touch
    (0, 0, 0), (112, 128, 144), (220, 20, 60), (0, 170, 200), (255, 158, 0), (233, 150, 70), (255, 61, 99), (0, 0, 230),
    (47, 79, 79), (255, 140, 0), (255, 99, 71), (90, 90, 100), (175, 0, 75), (190, 90, 160), (120, 190, 60), (222, 184, 135),
    (0, 120, 40)]) / 255))


def pca_colours(maps):
    """Maps [D, h, w] as colours [h, w, 3] in [0, 1]: three principal components of all maps' L2-normalised features."""
    rows = F.normalize(torch.cat([m.flatten(1).T for m in maps]), dim=1)  # directions are what the loss compares
    mean = rows.mean(0)
    _, _, directions = torch.pca_lowrank(rows - mean, q=3, niter=8)
    parts = (rows - mean) @ directions
    low, high = torch.quantile(parts, torch.tensor([0.02, 0.98]), dim=0)
    colours = ((parts - low) / (high - low)).clamp(0, 1)
    return [c.view(*m.shape[1:], 3).numpy() for c, m in zip(colours.split([m[0].numel() for m in maps]), maps)]


def class_map(head, features, size):
    """Class numbers [H, W] of a probe's predictions on a feature map [D, h, w]."""
    scores = head(features.flatten(1).T).T.view(1, -1, *features.shape[1:])
    scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=True)
    return scores[0].argmax(0).numpy() + 1


@torch.no_grad()
def draw(before, after, out, number=0):
    """Write the picture of two segmentation probes (folders) for the val scene `number` of each condition."""
    probes = [load_probe(path, torch.device("cpu")) for path in (before, after)]
    for path, (probe, _, _, _) in zip((before, after), probes):
        if probe["task"] != "seg":
            raise InputError(f"{path}: a probe of --task {probe['task']}, not of seg")
    if any(len({probe[name] for probe, _, _, _ in probes}) > 1 for name in ("image_size", "dim")):
        raise InputError(f"{before} and {after}: probes of different image sizes or widths of features")
    args, size = probes[0][0]["args"], tuple(probes[0][0]["image_size"])
    index = load_index(data_of(probes[0][0], before), args["version"])
    frames = with_files(index, index.select("val"), True)
    for path, (probe, _, _, _) in zip((before, after), probes):
        say_other_frames(probe, path, frames)
    conditions = [c for c in CONDITIONS if ((index.split == b"val") & (index.condition == CONDITIONS.index(c))).any()]
    items = []
    for condition in conditions:
        frames = Frames(index, index.select("val", [condition]), index.cameras[0], size, labels=True)
        items.append(frames[0, number % len(frames)])
    features = [[encoder(item["image"][None].float() / 255)[0] for item in items] for _, encoder, _, _ in probes]
    colours = pca_colours(features[0] + features[1])
    colours = [colours[:len(items)], colours[len(items):]]

    titles = ("image", "LiDAR points by class", "features before", "features after CD", "prediction before",
              "prediction after CD")
    figure, axes = plt.subplots(len(items), 6, figsize=(18, 1.75 * len(items) + 0.9), squeeze=False)
    present = set()
    for row, (condition, item) in enumerate(zip(conditions, items)):
        image = item["image"].permute(1, 2, 0).numpy()
        predictions = [class_map(head, features[n][row], size) for n, (_, _, head, _) in enumerate(probes)]
        palette = np.array([COLORS[name] for name in CLASSES])
        panels = (image, image // 3, colours[0][row], colours[1][row], *(palette[p] for p in predictions))
        for axis, title, panel in zip(axes[row], titles, panels):
            axis.imshow(panel, extent=(0, size[1], size[0], 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[], xlim=(0, size[1]), ylim=(size[0], 0))
            if row == 0:
                axis.set_title(title, fontsize=13)
        pixels, labels = item["pixels"].numpy(), item["labels"].numpy()
        axes[row, 1].scatter(pixels[:, 1], pixels[:, 0], s=2, c=[COLORS[CLASSES[n]] for n in labels], linewidths=0)
        axes[row, 0].set_ylabel(condition, fontsize=13)
        present |= {CLASSES[n] for n in np.unique(np.concatenate([labels, *(p.ravel() for p in predictions)])) if n}
    figure.legend(handles=[Patch(color=COLORS[name], label=name.replace("_", " ")) for name in CLASSES if name in present],
                  loc="lower center", ncols=len(present), frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    plt.close(figure)


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("before", help="folder of the segmentation probe on the encoder as it was")
    parser.add_argument("after", help="folder of the segmentation probe on the encoder after stage 2")
    parser.add_argument("--out", default="overview.png", help="(default: %(default)s)")
    parser.add_argument("--number", type=whole(0), default=0, help="which validation frame of each condition (default: %(default)s)")
    args = parser.parse_args(argv)
    draw(args.before, args.after, args.out, args.number)


if __name__ == "__main__":
    main()

"""One picture of what collaborative distillation changed: a row per condition.

    python miniature/overview.py runs/demo/seed-1/seg-base runs/demo/seed-1/seg-cd

Columns: the image, the projected LiDAR points by class, PCA colours of the features before and
after (one PCA for all of them), the segmentation probe's predictions before and after.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Frames, select
from eval import are_own_frames, data_of, load_probe
from miniature.colours import palette, pca_colours
from plumbing.arguments import Parser, whole
from plumbing.errors import InputError, one_line_errors
from plumbing.fingerprint import of_frames
from readers.table import open_tables

TITLES = ("image", "LiDAR points by class", "features before", "features after CD",
          "prediction before", "prediction after CD")


# ---- the picture --------------------------------------------------------------------------------

def class_map(head, features, size):
    """Class numbers [H, W] of a probe's predictions on a feature map [D, h, w]."""
    scores = head(features.flatten(1).T).T.view(1, -1, *features.shape[1:])
    scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=True)
    return scores[0].argmax(0).numpy() + 1


def load_pair(before, after):
    """`load_probe` of two folders, whose segmentation probes must fit one picture."""
    probes = [load_probe(path, torch.device("cpu")) for path in (before, after)]
    for path, (probe, _, _) in zip((before, after), probes):
        if probe["task"] != "seg":
            raise InputError(f"{path}: a probe of --task {probe['task']}, not of seg")
    for name in ("image_size", "dim", "classes"):
        if len({probe[name] for probe, _, _ in probes}) > 1:
            raise InputError(f"{before} and {after}: probes of different image sizes, classes or "
                             "widths of features")
    return probes


def one_per_condition(table, size, number):
    """{condition: item of `Frames`}: the first camera's view of one frame of each.

    "full" stands for the condition where the dataset states none.
    """
    camera = table.cameras[0] if table.cameras else "all"
    items = {}
    for value, condition in enumerate(table.conditions or ("full",)):
        rows = table.rows
        if table.conditions:
            rows = rows[table["condition"][rows] == value]
        if len(rows):
            frames = Frames([table.only(rows)], camera, size, target="labels")
            items[condition] = frames[0, number % len(frames)]
    return items


@torch.no_grad()
def draw(before, after, out, number=0):
    """Write the picture of two segmentation probes (folders).

    Its rows are the validation frame `number` of each condition.
    """
    import matplotlib  # here: it takes long to import
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    probes = load_pair(before, after)
    probe = probes[0][0]
    size = tuple(probe["image_size"])
    tables = select(open_tables(data_of(probe, before), probe["args"]["version"]), "val")
    frames = of_frames(tables, labels=True, files=True)
    for path, (probe, _, _) in zip((before, after), probes):
        are_own_frames(probe, path, frames)
    names = tables[0].reader.CLASSES

    # Feature maps and predictions [encoder][row], colours of all maps in one list
    items = one_per_condition(tables[0], size, number)
    maps, predictions = [], []
    for _, encoder, head in probes:
        own = [encoder(item["image"][None].float() / 255)[0] for item in items.values()]
        maps += own
        predictions.append([class_map(head, features, size) for features in own])
    colours = pca_colours(maps)

    figure, axes = plt.subplots(len(items), 6, figsize=(18, 1.75 * len(items) + 0.9),
                                squeeze=False)
    colour_of = palette(names)(np.arange(len(names)))[:, :3]
    present = set()
    for row, (condition, item) in enumerate(items.items()):
        image = item["image"].permute(1, 2, 0).numpy()
        classes = [of_probe[row] for of_probe in predictions]
        panels = [image, image // 3, colours[row], colours[len(items) + row],
                  *(colour_of[numbers] for numbers in classes)]
        for axis, panel in zip(axes[row], panels):
            axis.imshow(panel, extent=(0, size[1], size[0], 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[], xlim=(0, size[1]), ylim=(size[0], 0))
        pixels, labels = item["pixels"].numpy(), item["labels"].numpy()
        axes[row, 1].scatter(pixels[:, 1], pixels[:, 0], s=2, c=colour_of[labels], linewidths=0)
        axes[row, 0].set_ylabel(condition, fontsize=13)
        for numbers in (labels, *classes):
            present.update(np.unique(numbers[numbers > 0]).tolist())

    for axis, title in zip(axes[0], TITLES):
        axis.set_title(title, fontsize=13)
    handles = [Patch(color=colour_of[n], label=names[n].replace("_", " "))
               for n in sorted(present)]
    figure.legend(handles=handles, loc="lower center", ncols=len(present), frameon=False,
                  fontsize=11)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    plt.close(figure)


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("before", help="folder of the segmentation probe on the encoder as it was")
    add("after", help="folder of the segmentation probe on the encoder after stage 2")
    add("--out", default="overview.png", help="(default: %(default)s)")
    add("--number", type=whole(0), default=0,
        help="which validation frame of each condition (default: %(default)s)")
    args = parser.parse_args(argv)
    draw(args.before, args.after, args.out, args.number)


if __name__ == "__main__":
    main()

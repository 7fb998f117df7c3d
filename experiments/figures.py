"""The figures that visualize.py draws: from items and features to matplotlib's figures.

Each is of one dataset, whose `FrameTable` names conditions and classes. CD is the collaborative-
distillation paper. matplotlib and scikit-learn take long to import, so this stands where they are
used.
"""
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import DEPTHS
from distill import sample_features
from metrics import confusion_matrix, depth_sums, mean_iou, rmse
from miniature.colours import as_colours, palette, principal_components, unit_features
from plumbing.errors import InputError

STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.titlepad": 3, "image.interpolation": "nearest",
         "legend.frameon": False, "legend.handlelength": 1.2, "savefig.dpi": 300,
         "savefig.bbox": "tight", "savefig.pad_inches": 0.03}
LEGEND = dict(loc="outside lower center")
BAR = dict(shrink=0.9, pad=0.01, aspect=30)
NO_TICKS = dict(xticks=[], yticks=[])
MARKERS = {"day-clear": ("#e69f00", "o"), "night": ("#0b2a6f", "^")}  # forms, for prints in grey
OTHER_MARKERS = (("#56b4e9", "s"), ("#009e73", "D"), ("#cc79a7", "v"), ("#d55e00", "P"))
YELLOW = (1, 1, 0)  # the points of a class


def check_out(path):
    """Make the folder of a figure's file. Raises InputError for one that it cannot be saved in."""
    from matplotlib.backend_bases import FigureCanvasBase
    path = Path(path)
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise InputError(f"--out {path}: ends in no kind of picture; give one of "
                         f"{', '.join(f'.{kind}' for kind in kinds)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path}: its folder cannot be made ({error.strerror}); choose "
                         "another") from None


def grid(rows, columns, aspect, **more):
    """A figure, 7 inches wide as a page's text, and its axes [rows, columns].

    Each of the axes is `aspect` times as high as wide.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no list of open figures
    height = 7 / max(2, columns) * aspect + 0.16
    figure = Figure((7, rows * height + 0.55), layout="compressed")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def condition_of(item, table):
    """The name of an item's condition; "" where its dataset states none."""
    return table.conditions[item["condition"]] if table.conditions else ""


def in_words(name):
    """The name of a class as a person writes it."""
    return name.replace("_", " ")


# ---- PCA ----------------------------------------------------------------------------------------

def pca_of_encoders(maps):
    """Feature maps as colours, by one PCA of all encoders and images.

    Args: maps, a list per encoder of [D, h, w], one per image.
    Returns: a list per encoder of colours [h, w, 3] in [0, 1]; for each encoder the share of the
    variance of its features that the colours show.
    """
    components = principal_components(sum(maps, []))
    together = as_colours(components)
    colours, shares = [], []
    begin = 0
    for own in maps:
        end = begin + len(own)
        shown = torch.cat([c.flatten(0, 1) for c in components[begin:end]])
        features = torch.cat([unit_features(m) for m in own])
        shares.append((shown.var(0).sum() / features.var(0).sum()).item())
        colours.append(together[begin:end])
        begin = end
    return colours, shares


@torch.no_grad()
def figure_pca(items, encoders, titles, table):
    """CD Fig. 4. A row per item of `views`: the image, each encoder's feature map in colours."""
    widths = [encoder.dim for encoder in encoders]
    if len(set(widths)) > 1:
        raise InputError("--encoders: one PCA needs features of one width, "
                         f"not {', '.join(map(str, widths))}")
    maps = []
    for encoder in encoders:
        images = [item["image"][None].to(encoder.mean.device) / 255 for item in items]
        maps.append([encoder(image)[0].cpu() for image in images])      # each [D, h, w]
    colours, shares = pca_of_encoders(maps)

    _, height, width = items[0]["image"].shape
    figure, axes = grid(len(items), 1 + len(encoders), height / width, subplot_kw=NO_TICKS)
    for line, item, *pictures in zip(axes, items, *colours):
        line[0].imshow(item["image"].permute(1, 2, 0).numpy())
        line[0].set_ylabel(condition_of(item, table))
        for axis, picture in zip(line[1:], pictures):
            axis.imshow(picture)
    axes[0, 0].set_title("image")
    for axis, title, share in zip(axes[0, 1:], titles, shares):
        axis.set_title(f"{title}\n{100 * share:.0f} % of its variance shown")
    figure.supxlabel("red, green, blue: the three principal components of all feature maps "
                     "together", fontsize="medium")
    return figure


# ---- t-SNE --------------------------------------------------------------------------------------

def figure_tsne(features, titles, seed=0):
    """CD Fig. 3. A panel per encoder: t-SNE of its images' L2-normalised features.

    Args: features, a list per encoder of {condition: [N, D]}.
    A panel's title has the silhouette score of the conditions in the features' own space: 1 for
    tight clusters apart, 0 for one cluster.
    """
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score
    others = itertools.cycle(OTHER_MARKERS)
    markers = {name: MARKERS.get(name) or next(others) for name in features[0]}
    figure, axes = grid(1, len(features), 1, subplot_kw=NO_TICKS | dict(box_aspect=1))
    for axis, parts, title in zip(axes[0], features, titles):
        rows = F.normalize(torch.cat(list(parts.values())).double(), dim=1).numpy()
        names = np.repeat(list(parts), [len(part) for part in parts.values()])
        perplexity = min(30, (len(rows) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, random_state=seed % 2**32)
        places = tsne.fit_transform(rows)                               # [N, 2]
        for name, (color, marker) in markers.items():
            axis.scatter(*places[names == name].T, s=18, c=color, marker=marker, linewidths=0.3,
                         edgecolors="white", label=f"{name}, {len(parts[name])} images")
        score = silhouette_score(rows, names)
        axis.set_title(f"{title}\nsilhouette score {score:.2f}")
    figure.legend(handles=axis.collections, ncols=2, **LEGEND)
    return figure


# ---- probes -------------------------------------------------------------------------------------

def judge(task, outputs, item, size, table):
    """One image's metric, at its points as eval.py has it: "mIoU 50.0 %".

    outputs [1, C, h, w] are a probe's. Its head is affine, so it may come before the sampling.
    """
    image = torch.zeros(len(item["pixels"]), dtype=torch.long)
    points = sample_features(outputs, item["pixels"], image, size)      # [N, C]
    if task == "depth":
        sums = depth_sums(points[:, 0], item["depths"], image, 1)
        return f"RMSE {rmse(sums)[0]:.2f} m"
    classes = table.reader.CLASSES[1:]
    names = getattr(table.reader, "LEFT_OUT", {}).get(condition_of(item, table), ())
    left_out = [classes.index(name) for name in names if name in classes]
    chosen = item["labels"] > 0
    predicted, labels = points[chosen].argmax(1), item["labels"][chosen] - 1
    confusion = confusion_matrix(predicted, labels, len(classes))
    return f"mIoU {100 * mean_iou(confusion, left_out):.1f} %"


@torch.no_grad()
def figure_probes(task, items, probes, titles, table):
    """CD Fig. A (task "depth") and B ("seg"). A row per item of `views`.

    A row has the image, the LiDAR points or labelled pixels, and each probe's prediction
    everywhere. Outputs are up-sampled bilinearly before the class is decided. Above a prediction
    stands the image's own metric: RMSE, or mIoU over the classes that are there or predicted.
    Args: probes, a list of (encoder, head).
    """
    from matplotlib import colors
    _, *size = items[0]["image"].shape
    depth = task == "depth"
    if depth:
        how = dict(cmap="turbo_r", norm=colors.LogNorm(2, DEPTHS[1]))
    else:
        of_classes = palette(table.reader.CLASSES)
        how = dict(cmap=of_classes, norm=colors.Normalize(0, of_classes.N - 1))
    figure, axes = grid(len(items), 2 + len(probes), size[0] / size[1], subplot_kw=NO_TICKS)
    present = set()
    for line, item in zip(axes, items):
        image = item["image"].permute(1, 2, 0).numpy()
        line[0].imshow(image)
        line[0].set_ylabel(condition_of(item, table))

        # The points, on a pale image for them to stand out
        truth = item["depths" if depth else "labels"].numpy()
        known = truth > 0
        x, y = item["pixels"].numpy()[known, ::-1].T
        line[1].imshow(150 + 0.4 * image.mean(2), cmap="gray", vmin=0, vmax=255)
        line[1].autoscale(False)
        line[1].scatter(x, y, s=1.5, linewidths=0, c=truth[known], **how)
        present.update(truth[known].tolist())

        for axis, (encoder, head) in zip(line[2:], probes):
            maps = encoder(item["image"][None].to(encoder.mean.device) / 255)       # [1, D, h, w]
            rows = head(maps[0].flatten(1).T)                                       # [h w, C]
            outputs = rows.T.unflatten(1, maps.shape[2:])[None].cpu()               # [1, C, h, w]
            dense = F.interpolate(outputs, size=size, mode="bilinear", align_corners=True)[0]
            values = dense[0].clamp(*DEPTHS) if depth else dense.argmax(0) + 1      # [H, W]
            drawn = axis.imshow(values.numpy(), **how)
            axis.set_title(judge(task, outputs, item, size, table))
            present.update(values.unique().tolist())

    points = "LiDAR points" if "scan" in table else "labelled pixels"
    for axis, title in zip(axes[0], ["image", points, *titles]):
        axis.set_title(f"{title}\n{axis.get_title()}".strip())
    if depth:
        bar = figure.colorbar(drawn, ax=axes, label="depth [m]", ticks=(2, 5, 10, 20, 40, 80),
                              format="%d", **BAR)
        bar.minorticks_off()
    else:
        add_legend(figure, of_classes, table.reader.CLASSES, sorted(present))
    return figure


def add_legend(figure, of_classes, names, numbers):
    """A legend of the classes of these numbers; of_classes: the `palette` of all."""
    from matplotlib.patches import Patch
    handles = [Patch(color=of_classes(n), label=in_words(names[n])) for n in numbers]
    figure.legend(handles=handles, ncols=6, **LEGEND)


# ---- point clouds -------------------------------------------------------------------------------

def figure_similarity(columns, table):
    """ScaLR Fig. 1 and 3. Two panels a column, seen from above.

    Above are a scan's points, those of a class in yellow. Below is all points' similarity to a
    reference.
    Args: columns, a list of (item of `random_scans`; features [N, D] and reference [D],
    L2-normalised; class number, 0 for none; row of the point whose feature the reference is, None
    where it is a class prototype).
    """
    from matplotlib.patches import Patch
    drawn_points = np.concatenate([item["xyz"][item["part"], :2] for item, *_ in columns])
    width, height = np.ptp(drawn_points, axis=0)
    aspect = 0.9 * height / width  # 0.9: what the scales leave
    # On dark, both ends and the middle of the colours are seen
    figure, axes = grid(2, len(columns), aspect, sharex=True, sharey=True,
                        subplot_kw=dict(aspect="equal", facecolor="#202020"))
    for (above, below), column in zip(axes.T, columns):
        drawn, ring = draw_column(above, below, column, len(columns), table)

    *_, number, point = columns[-1]  # all columns have a class, or none; a point, or none
    axes[0, 0].set_ylabel("labels\ny [m]" if number else "y [m]")
    axes[1, 0].set_ylabel("similarity\ny [m]")
    handles = []
    if number:
        handles.append(Patch(color=YELLOW, label="points of the class; AUC: how often one is more "
                                                 "similar than another point"))
    if ring:
        handles.append(ring)
    figure.legend(handles=handles, ncols=2, **LEGEND)
    reference = "prototype" if point is None else "chosen point"
    figure.colorbar(drawn, ax=axes, label=f"cosine similarity to {reference}", **BAR)
    return figure


def draw_column(above, below, column, count, table):
    """One of `count` columns of `figure_similarity`, on its two axes.

    Returns: the dots below, for the colour bar; the ring around the chosen point above, or None.
    """
    item, features, reference, number, point = column
    similarity = (features @ reference).numpy()
    labels = item["labels"].numpy() if number else np.full(len(similarity), -1)
    draw_points(above, item, np.where((labels == number)[:, None], YELLOW, 0.4), count)
    drawn = draw_points(below, item, similarity, count)
    ring = None
    if point is not None:
        ring = mark(above, item, point)
        mark(below, item, point)

    above.set_title(condition_of(item, table))
    below.set_xlabel("x [m]")
    if number:
        name = in_words(table.reader.CLASSES[number])
        above.set_title(f"{condition_of(item, table)}\n{name}".strip())
        below.set_title(f"AUC {separation(item, similarity, number):.2f}")
    return drawn, ring


def draw_points(axis, item, values, count):
    """The points in a scan's `part` from above, by their colours [N, 3] or cosines [N].

    count: of the panels beside each other. Returns the dots.
    """
    from matplotlib.colors import Normalize

    # The higher points on top of the lower ones
    xyz, part = item["xyz"].numpy(), item["part"].numpy()
    order = np.flatnonzero(part)[xyz[part, 2].argsort()]
    size = np.clip(16000 / len(order) / count, 0.3, 3)
    how = dict(cmap="coolwarm", norm=Normalize(-1, 1)) if values.ndim == 1 else {}
    return axis.scatter(*xyz[order, :2].T, s=size, linewidths=0, c=values[order], **how)


def mark(axis, item, point):
    """A ring around a point."""
    return axis.scatter(*item["xyz"][point, :2].numpy(), s=80, facecolors="none",
                        edgecolors="#30e030", linewidths=1.5, label="chosen point")


def separation(item, similarity, number):
    """AUC: how often a point of the class `number` is more similar than another labelled point."""
    from sklearn.metrics import roc_auc_score
    labelled = (item["part"] & (item["labels"] > 0)).numpy()
    return roc_auc_score(item["labels"].numpy()[labelled] == number, similarity[labelled])

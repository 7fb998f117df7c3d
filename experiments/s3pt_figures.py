"""S3PT's pictures, which visualize.py draws: what depth does to the clusters, and how runs went.

    python -m experiments.visualize clusters --encoder runs/s3pt --data /data/nuscenes
    python -m experiments.visualize losses runs/cribo runs/s3pt

`clusters` has a picture, its LiDAR depth as IP-Basic completes it, and the clusters of its tokens
without and with depth in their cost (S3PT, Sec. 3.3). In training the tokens are those of two
crops; here they are those of the whole picture, as one view. `losses` has each run's losses and
entropies over its epochs. matplotlib takes long to import, so that stands where it is used.
"""
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import models
from data import DEPTHS, select
from experiments.figures import BAR, LEGEND, NO_TICKS, grid
from plumbing.arguments import COUNT, POSITIVE
from plumbing.errors import InputError
from plumbing.files import read_bytes
from readers.files import read_image
from readers.table import open_tables
from s3pt.clustering import Clustering, joint_clusters
from s3pt.crops import token_depths, token_positions
from s3pt.depth import LidarDepth
from s3pt.settings import S3PT, paper
from s3pt.train import LOSSES

UNKNOWN = "0.75"  # grey of what has no depth
ENTROPIES = {"entropy_of_mean": ("of the mean answer", "-"),
             "mean_entropy": ("of single answers", ":")}


# ---- clusters ------------------------------------------------------------------------------------

class Clustered(NamedTuple):
    """A picture and the clusters of its P tokens, which lie in a grid h x w."""
    image: np.ndarray    # uint8 [H, W, 3], as the encoder sees it
    depths: np.ndarray   # [h', w'] metres of the whole picture, 0 where unknown
    tokens: np.ndarray   # [P] metres, NaN where unknown
    without: np.ndarray  # [h, w] numbers of the clusters without depth in their cost
    aware: np.ndarray    # [h, w] and with it


def load_vit(path, weights):
    """An `ImageEncoder` whose tokens S3PT can cluster. Raises InputError for another network."""
    def check(row):
        if "norm" not in row.network.FEATURES:
            raise InputError(f"--encoder {path}: {row.name} has no tokens after a last norm, which "
                             "S3PT clusters; take a vision transformer (`python models.py`)")
    if path in models.ENCODERS:  # before its weights are loaded
        check(models.ENCODERS[path])
    encoder = models.load_image_encoder(path, weights, careful=False)
    check(encoder.row)
    return encoder


@torch.no_grad()
def clustered(encoder, table, frame, count, settings, seed):
    """The first camera's picture of a frame as `Clustered`, into `count` clusters.

    settings: a `Clustering`; without depth, beta is 0. Both begin with the same random tokens.
    """
    size = encoder.spec.get("image_size", models.IMAGE_SIZE)
    raw_size = table["image_size"][frame, 0]
    image = read_image(table.path("image", frame, 0), size, raw_size)  # [3, H, W]
    normalised = (image[None].to(encoder.mean.device) / 255 - encoder.mean) / encoder.std
    features = encoder.backbone.feature_map(normalised, "norm")[0]     # [D, h, w]
    shape = tuple(features.shape[1:])

    # Where the tokens are, as one crop that is the whole picture
    whole = 0, 0, *raw_size
    depths = LidarDepth()(table, frame, 0)
    of_tokens = token_depths(depths, raw_size, whole, False, shape)
    positions = token_positions(whole, False, shape)

    # Clusters are numbered in the order of rows, so that neighbours differ in colour
    rng = np.random.default_rng(seed)
    start = np.sort(rng.choice(len(positions), count, replace=False))
    inputs = positions, start, of_tokens
    positions, start, metres = (torch.from_numpy(values)[None] for values in inputs)
    tokens = features.flatten(1).T[None].cpu()                         # [1, P, D]
    found = [joint_clusters(tokens, positions, start, metres, settings._replace(beta=beta))
             for beta in (0, settings.beta)]
    without, aware = (assignment.numpy().reshape(shape) for assignment in found)
    return Clustered(image.permute(1, 2, 0).numpy(), depths, of_tokens, without, aware)


def squared_deviations(depths, clusters):
    """How far each token is from its cluster's mean depth, squared: [P], 0 where it is unknown.

    depths: [P] metres, NaN where unknown. clusters: [h, w] their numbers.
    """
    numbers = clusters.ravel()
    known = ~np.isnan(depths)
    sizes = np.bincount(numbers, known)
    means = np.bincount(numbers, np.where(known, depths, 0)) / np.maximum(sizes, 1)
    return np.where(known, depths - means[numbers], 0) ** 2


def spread_of(depths, clusters):
    """The root mean square of the known tokens' distances from their cluster's mean, in metres."""
    known = np.count_nonzero(~np.isnan(depths))
    return np.sqrt(squared_deviations(depths, clusters).sum() / max(1, known))


def widest(depths, clusters):
    """The tokens [h, w] bool of the cluster with the largest sum of `squared_deviations`."""
    squares = squared_deviations(depths, clusters)
    return clusters == np.bincount(clusters.ravel(), squares).argmax()


def colours_of(count):
    """A colour for each of `count` clusters; those of neighbouring numbers are far apart."""
    from matplotlib.colors import hsv_to_rgb
    numbers = np.arange(count)
    hues = numbers * 0.618 % 1  # the golden section
    return hsv_to_rgb(np.stack([hues, 1 - 0.25 * (numbers % 3), 1 - 0.3 * (numbers % 2)], 1))


def extent_of(image):
    """Where matplotlib puts an image [H, W, 3], for a map of another size to lie upon it."""
    height, width = image.shape[:2]
    return -0.5, width - 0.5, height - 0.5, -0.5


def draw_clusters_on(axis, image, clusters, dotted):
    """The clusters [h, w] in colours over a grey picture, and dots in the tokens `dotted`."""
    from matplotlib.collections import LineCollection
    height, width = image.shape[:2]
    rows, cols = clusters.shape
    sides = np.array([width / cols, height / rows])
    colours = colours_of(clusters.max() + 1)[clusters]  # [h, w, 3]
    axis.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255)
    axis.imshow(colours, alpha=0.6, extent=extent_of(image))

    # A white line between two tokens of different clusters
    edges = []
    for row, col in np.argwhere(clusters[:, 1:] != clusters[:, :-1]):
        edges.append([(col + 1, row), (col + 1, row + 1)])
    for row, col in np.argwhere(clusters[1:] != clusters[:-1]):
        edges.append([(col, row + 1), (col + 1, row + 1)])
    edges = np.reshape(edges, (-1, 2, 2)) * sides - 0.5  # there may be none
    axis.add_collection(LineCollection(edges, colors="w", linewidths=0.4))
    centres = (np.argwhere(dotted)[:, ::-1] + 0.5) * sides - 0.5
    axis.scatter(*centres.T, s=3, c="w", edgecolors="k", linewidths=0.4)


def figure_clusters(pictures, beta, caption):
    """A row a picture, of `Clustered`: image, completed depth, clusters without and with depth."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    height, width = pictures[0].image.shape[:2]
    figure = Figure((7, len(pictures) * (1.7 * height / width + 0.16) + 1), layout="compressed")
    axes = figure.subplots(len(pictures), 4, squeeze=False, subplot_kw=NO_TICKS)
    colours = colormaps["turbo_r"].with_extremes(bad=UNKNOWN)
    for line, picture in zip(axes, pictures):
        line[0].imshow(picture.image)
        drawn = line[1].imshow(np.ma.masked_equal(picture.depths, 0), cmap=colours,
                               norm=LogNorm(2, DEPTHS[1]), extent=extent_of(picture.image))
        dotted = widest(picture.tokens, picture.without)
        for axis, clusters in zip(line[2:], (picture.without, picture.aware)):
            draw_clusters_on(axis, picture.image, clusters, dotted)
            axis.set_title(f"± {spread_of(picture.tokens, clusters):.1f} m")
    titles = ("image", "completed LiDAR depth\n(grey: unknown)", "clusters without depth",
              f"with depth (β = {beta:g})")
    for axis, title in zip(axes[0], titles):
        axis.set_title(f"{title}\n{axis.get_title()}".strip())
    bar = figure.colorbar(drawn, ax=axes, ticks=(2, 5, 10, 20, 40, 80), format="%d",
                          label="depth [m]", **BAR)
    bar.minorticks_off()
    figure.supxlabel(caption, fontsize="medium")
    return figure


def draw_clusters(args, device):
    """The figure that `clusters` asks for."""
    encoder = load_vit(args.encoder, args.weights).to(device)
    size = encoder.check_size(encoder.spec.get("image_size", models.IMAGE_SIZE))
    count = args.clusters or paper("s3pt", encoder.row)["clusters"]
    tokens = size[0] * size[1] // encoder.patch_size**2
    if count > tokens:
        raise InputError(f"--clusters {count}: a picture of {size[0]} x {size[1]} pixels has only "
                         f"{tokens} tokens; lower it")
    tables = open_tables(args.data, args.version)
    for table in tables:
        if "scan" not in table:
            raise InputError(f"--data {table.root}: {table.name} has no LiDAR, and this figure is "
                             "of what its depth does; leave it out")
    settings = Clustering(rounds=args.rounds, beta=args.beta)
    pictures = []
    for table in select(tables, args.split, limit=args.pictures):
        pictures += [clustered(encoder, table, frame, count, settings, args.seed)
                     for frame in table.rows]
    name = "/".join(Path(args.encoder).parts[-2:])
    caption = (f"{name}: {count} clusters of the whole picture's {tokens} tokens, and how far "
               "depths (±) are from their cluster's mean.\nDots: tokens of one cluster without "
               "depth, the farthest from its mean depth, in both panels.")
    return figure_clusters(pictures, args.beta, caption)


# ---- losses --------------------------------------------------------------------------------------

def log_of(run):
    """The lines of a run's log.jsonl, a list of dicts. Raises InputError where they are not S3PT's.

    A line cut short, as a killed run leaves it, is left out.
    """
    path = Path(run, "log.jsonl")
    lines = []
    for text in read_bytes(path, "give the folder of a run of s3pt/train.py").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"epoch", "loss_of", *ENTROPIES} <= line.keys():
            lines.append(line)
    if not lines:
        raise InputError(f"{path}: no line with the losses of s3pt/train.py; give the folder of "
                         "one of its runs, after its first epoch")
    return lines


def figure_losses(logs):
    """A panel for each loss, then the entropies; a colour a run. logs: {run: `log_of`}."""
    from matplotlib.lines import Line2D
    there = [name for name in LOSSES if any(name in log[0]["loss_of"] for log in logs.values())]
    figure, axes = grid(1, len(there) + 1, 1, sharex=True)
    *of_losses, of_entropies = axes[0]
    for number, log in enumerate(logs.values()):
        epochs = [line["epoch"] for line in log]
        how = dict(color=f"C{number}", marker=".", markersize=3, linewidth=1)
        for axis, name in zip(of_losses, there):
            values = [line["loss_of"].get(name) or np.nan for line in log]  # 0: of no object
            axis.plot(epochs, values, **how)
        for name, (_, style) in ENTROPIES.items():
            of_entropies.plot(epochs, [line[name] for line in log], linestyle=style, **how)
    for axis, name in zip(of_losses, there):
        axis.set_title(f"{name.replace('_', ' ')} loss")
    of_entropies.set(title="teacher's entropy / log K", ylim=(0, 1.03))
    for axis in axes[0]:
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles = [Line2D([], [], color=f"C{number}", label=run) for number, run in enumerate(logs)]
    handles += [Line2D([], [], color="0.3", linestyle=style, label=f"entropy {what}")
                for what, style in ENTROPIES.values()]
    figure.legend(handles=handles, ncols=4, **LEGEND)
    return figure


def draw_losses(args, device):
    """The figure that `losses` asks for."""
    return figure_losses({"/".join(Path(run).parts[-2:]): log_of(run) for run in args.runs})


# ---- command line --------------------------------------------------------------------------------

FIGURES = {"clusters": draw_clusters, "losses": draw_losses}


def add_parsers(figures):
    """{figure: its parser} of FIGURES, with the flags that are theirs alone.

    figures: what `add_subparsers` gives.
    """
    parsers = {name: figures.add_parser(name) for name in FIGURES}
    add = parsers["clusters"].add_argument
    add("--encoder", required=True, help="name of a vision transformer, or folder of s3pt/train.py")
    add("--weights", help="file with the weights of one given by name, or 'random' (default: the "
                          "released ones)")
    add("--data", required=True, help="NAME=PATH of data with LiDAR (a bare path: nuscenes)")
    add("--version", help="version folder of nuScenes (default: v1.0-trainval)")
    add("--split", choices=("all", "train", "val"), default="val",
        help="that the pictures are of (default: %(default)s)")
    add("--pictures", type=COUNT, default=3,
        help="of the first camera, evenly spread over the frames (default: %(default)s)")
    add("--clusters", type=COUNT, help="of a picture's tokens (default: 128, of patches of 32 "
                                       "pixels 32; Table 7)")
    add("--rounds", type=COUNT, default=S3PT["rounds"],
        help="of assigning tokens to clusters (default: %(default)s)")
    add("--beta", type=POSITIVE, default=S3PT["beta"],
        help="weight of the difference in depth (default: %(default)g)")
    parsers["losses"].add_argument("runs", nargs="+", help="folders that s3pt/train.py wrote")
    return parsers

"""The papers' pictures of features, predictions and point clouds, as PNGs.

    python -m experiments.visualize pca --encoders dinov2_vits14_reg runs/s2 --data /data/nuscenes
    python -m experiments.visualize tsne --encoders dinov2_vits14 runs/s2 --data /data/nuscenes
    python -m experiments.visualize depth runs/probe-depth runs/probe-depth-cd
    python -m experiments.visualize segmentation runs/probe-seg runs/probe-seg-cd
    python -m experiments.visualize correlation --encoder runs/s1 --data /data/nuscenes
    python -m experiments.visualize prototypes --encoder runs/s1 --data /data/nuscenes

They are Fig. 4 (pca), 3 and C.2 (tsne), A (depth) and B (segmentation) of the collaborative-
distillation paper, and Fig. 1 (correlation) and 3 (prototypes) of ScaLR, up to 7 inches wide at 300
dots an inch. All are of the validation split. The same arguments give the same picture.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context

from data import CLOUD, DEPTHS, Frames, collate
from eval import are_own_frames, data_of, load_probe
from experiments.figures import (MARKERS, STYLE, figure_pca, figure_probes, figure_similarity,
                                 figure_tsne)
from models import ENCODERS, IMAGE_SIZE, load_image_encoder
from plumbing import training
from plumbing.arguments import COUNT, SEED, Distinct, Parser, real, whole
from plumbing.errors import InputError, one_line_errors
from plumbing.fingerprint import with_files
from readers.nuscenes import CLASSES, CONDITIONS, load_index
from waffleiron import load_waffleiron

ENOUGH = 5  # how many points of a class a scan must have to be drawn for it


# ---- images -------------------------------------------------------------------------------------

def views(index, size, count=1, **options):
    """Items of `Frames`: `count` validation views of each condition that is there.

    They are of the first camera, and spread evenly over the condition's frames.
    """
    items = []
    for condition in np.unique(index.condition[index.select("val")]):
        rows = index.select("val", [CONDITIONS[condition]], count)
        frames = Frames(index, rows, index.cameras[0], size, **options)
        items += [frames[0, number] for number in range(len(frames))]
    return items


@torch.no_grad()
def image_features(encoder, images):
    """A feature per image: images [B, 3, H, W] in [0, 1] -> [B, D].

    It is a ViT's [CLS] token after the final norm, a ResNet's pooled map.
    """
    if not encoder.row.vit:
        return encoder(images).mean((2, 3))
    normalised = (images - encoder.mean) / encoder.std
    return encoder.backbone.tokens(normalised, "norm")[:, 0]


def features_of_random_images(index, size, encoders, count, seed, device):
    """Features of `count` random images of each condition in MARKERS (C.2), here of any camera.

    Returns: a list per encoder of {condition: [N, D]}.
    """
    there = [len(index.select("val", [name])) * len(index.cameras) for name in MARKERS]
    if sum(min(count, images) for images in there) < 4:
        raise InputError(f"--data {index.root}: t-SNE needs at least four images of "
                         f"{' and '.join(MARKERS)}")
    rng = np.random.default_rng(seed)
    features = [{} for _ in encoders]
    for name in MARKERS:
        frames = Frames(index, index.select("val", [name]), "all", size)
        chosen = rng.choice(len(frames), min(count, len(frames)), replace=False).tolist()
        images = torch.stack([frames[0, number]["image"] for number in chosen])
        for encoder, parts in zip(encoders, features):
            found = [image_features(encoder, some.to(device) / 255).cpu()
                     for some in images.split(16)]
            parts[name] = torch.cat(found)
    return features


# ---- point clouds -------------------------------------------------------------------------------

def random_scans(index, cloud, wanted, count, radius, rng):
    """Items of `Frames`: `count` whole validation scans, the conditions by turns.

    Each holds enough points of every class number in `wanted` nearby. An item's mask `part` [N]
    says what is nearby, and drawn: the points in the square of half side `radius` [m].
    """
    # A frame's turn is how many of its condition are before it.
    rows = rng.permutation(index.select("val"))
    conditions = index.condition[rows]
    turn = [(conditions[:n] == condition).sum() for n, condition in enumerate(conditions)]
    rows = rows[np.argsort(turn, kind="stable")[:60]]

    frames = Frames(index, rows, "scan", cloud=cloud, labels=bool(wanted))
    items = []
    for number in range(len(frames)):
        item = frames[0, number]
        item["part"] = (item["feats"][:, 1:3].abs() < radius).all(1)
        if all((item["labels"][item["part"]] == c).sum() >= ENOUGH for c in wanted):
            items.append(item)
        if len(items) == count:
            break
    if not items:
        names = " and ".join(CLASSES[c] for c in wanted)
        raise InputError(f"--radius {radius:g}: no scan of {len(frames)} has {names} within it")
    return sorted(items, key=lambda item: item["condition"])


@torch.no_grad()
def point_features(encoder, item, layer, device):
    """L2-normalised features of a scan, of a WaffleIron's layer.

    "backbone": [N, channels]. "head": what follows it, [N, D of the image encoder].
    """
    scan = {name: item[name] for name in ("feats", "cells", "neighbors")}
    batch = training.to_device(collate([scan]), device)
    inputs = batch["feats"], batch["cells"], batch["neighbors"], batch["batch"]
    network = encoder if layer == "head" else encoder.features
    return F.normalize(network(*inputs).float(), dim=1).cpu()


def class_prototypes(scans):
    """Classes' mean features, L2-normalised: [classes, D]; 0 for a class without points.

    Args: scans, pairs of an item and its points' features [N, D].
    """
    sums = 0
    for item, features in scans:
        zeros = features.new_zeros(len(CLASSES), features.shape[1])
        sums = sums + zeros.index_add(0, item["labels"], features)
    return F.normalize(sums, dim=1)


def training_prototypes(args, index, cloud, encoder, wanted, device):
    """`class_prototypes` of args.training_scans scans; all classes `wanted` must be in them."""
    rows = index.select("train", limit=args.training_scans)
    frames = Frames(index, rows, "scan", cloud=cloud, labels=True)
    items = (frames[0, number] for number in range(len(frames)))
    prototypes = class_prototypes((item, point_features(encoder, item, args.layer, device))
                                  for item in items)
    lacking = [CLASSES[c] for c in wanted if not prototypes[c].any()]
    if lacking:
        raise InputError(f"--classes {' '.join(lacking)}: in none of {len(frames)} training scans; "
                         "raise --training-scans")
    return prototypes


# ---- command line -------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    images, probes = ("pca", "tsne"), ("segmentation", "depth")
    scans = ("correlation", "prototypes")
    parsers = {name: figures.add_parser(name) for name in images + probes + scans}

    def add(names, flag, **options):
        for name in names:
            parsers[name].add_argument(flag, **options)

    # what is drawn
    add(images, "--encoders", nargs="+", required=True,
        help="names of encoders, or folders of stage 2")
    add(images, "--weights", help="file with the weights of those given by name, or 'random' "
                                  "(default: the released ones)")
    add(probes, "probes", nargs="+", help="folders that probe.py wrote")
    add(scans, "--encoder", required=True, help="stage 1's folder, or ScaLR's model.pth")
    for name, layer in (("correlation", "head"), ("prototypes", "backbone")):
        add([name], "--layer", choices=("backbone", "head"), default=layer,
            help="features of the backbone (ScaLR), or after the head that the loss is on "
                 "(default: %(default)s)")

    # the data
    add(images + scans, "--data", required=True, help="nuScenes root")
    add(images + scans, "--version", default="v1.0-trainval",
        help="version folder of the root (default: %(default)s)")
    add(probes, "--data", help="nuScenes root (default: the first probe's)")
    add(probes, "--version", help="version folder of the root (default: the first probe's)")

    # rows and columns
    add(images + probes, "--titles", nargs="+",
        help="of the encoders' or probes' columns (default: the ends of their paths)")
    add(("pca", *probes), "--frames", type=COUNT, default=1,
        help="images of each condition (default: %(default)s)")
    add(["tsne"], "--images", type=whole(2), default=100,
        help="random ones of each condition (default: %(default)s, C.2)")
    add(["correlation"], "--scans", type=COUNT, default=3,
        help="random ones (default: %(default)s)")
    add(scans, "--radius", type=real(1), default=40,
        help="half side of the square that is drawn, in metres (default: %(default)s)")
    add(["correlation"], "--class", dest="classes", nargs=1, choices=CLASSES[1:], default=["car"],
        help="of the point (car)")
    add(["correlation"], "--point", type=real(), nargs=3, metavar=tuple("XYZ"),
        help="take the nearest one [m]; needs no labels")
    add(["prototypes"], "--classes", nargs="+", action=Distinct, choices=CLASSES[1:],
        metavar="CLASS", default=("car", "pedestrian", "driveable_surface", "sidewalk"),
        help="up to 6 (default: %(default)s)")
    add(["prototypes"], "--training-scans", type=whole(0), default=20,
        help="averaged (default: %(default)s); 0: the one shown (ScaLR)")

    # the run
    add(parsers, "--out", help="(default: FIGURE.png)")
    add(parsers, "--seed", type=SEED, default=0,
        help="of what is drawn at random (default: %(default)s)")
    add(parsers, "--device", help="cpu, cuda, ... (default: cuda if there is one)")
    return parser.parse_args(argv)


def column_titles(titles, paths):
    """`titles` if they are given, one a path; else the ends of the paths."""
    if not titles:
        return ["/".join(Path(path).parts[-2:]) for path in paths]
    if len(titles) != len(paths):
        raise InputError(f"--titles: {len(titles)} for {len(paths)} columns, {', '.join(paths)}")
    return titles


def one_size(sizes, paths):
    """The one of `sizes`, a set of (H, W). Raises InputError if there are several."""
    if len(sizes) > 1:
        raise InputError(f"{', '.join(paths)}: trained on different image sizes, "
                         f"{' and '.join(map(str, sorted(sizes)))}")
    size, = sizes
    return size


def draw_images(args, device):
    """The figure of encoders that the arguments ask for: pca or tsne."""
    paths = args.encoders
    titles = column_titles(args.titles, paths)
    encoders = []
    for path in paths:
        weights = args.weights if path in ENCODERS else None
        encoders.append(load_image_encoder(path, weights).to(device))
    trained = {tuple(encoder.spec["image_size"]) for encoder in encoders
               if "image_size" in encoder.spec}
    size = one_size(trained or {IMAGE_SIZE}, paths)
    for encoder in encoders:
        encoder.check_size(size)
    index = load_index(args.data, args.version)
    if args.figure == "pca":
        return figure_pca(views(index, size, args.frames), encoders, titles)
    features = features_of_random_images(index, size, encoders, args.images, args.seed, device)
    return figure_tsne(features, titles, args.seed)


def draw_probes(args, device):
    """The figure of probes that the arguments ask for: segmentation or depth."""
    task = "depth" if args.figure == "depth" else "seg"
    paths = args.probes
    titles = column_titles(args.titles, paths)
    loaded = [load_probe(path, device)[:3] for path in paths]
    probes = [probe for probe, _, _ in loaded]
    wrong = [f"{path} of --task {probe['task']}" for path, probe in zip(paths, probes)
             if probe["task"] != task]
    if wrong:
        raise InputError(f"{args.figure} is of probes of --task {task}, not {', '.join(wrong)}")
    size = one_size({tuple(probe["image_size"]) for probe in probes}, paths)

    index = load_index(args.data or data_of(probes[0], paths[0]),
                       args.version or probes[0]["args"]["version"])
    frames = with_files(index, index.select("val"), task == "seg")
    for path, probe in zip(paths, probes):
        are_own_frames(probe, path, frames)
    if task == "depth":
        items = views(index, size, args.frames, max_depth=DEPTHS[1])
    else:
        items = views(index, size, args.frames, labels=True)
    return figure_probes(task, items, [(encoder, head) for _, encoder, head in loaded], titles)


def draw_scans(args, device):
    """The figure of point clouds that the arguments ask for: correlation or prototypes."""
    encoder, stage1 = load_waffleiron(args.encoder)
    encoder = encoder.to(device).eval()
    cloud = stage1.get("cloud", CLOUD) | {"max_points": 10**9}  # a limit would cut holes
    index = load_index(args.data, args.version)
    rng = np.random.default_rng(args.seed)
    by_place = getattr(args, "point", None)
    wanted = [] if by_place else [CLASSES.index(name) for name in args.classes]
    items = random_scans(index, cloud, wanted, getattr(args, "scans", 1), args.radius, rng)

    if args.figure == "prototypes":
        item, = items
        features = point_features(encoder, item, args.layer, device)
        if args.training_scans:
            prototypes = training_prototypes(args, index, cloud, encoder, wanted, device)
        else:
            prototypes = class_prototypes([(item, features)])
        return figure_similarity([(item, features, prototypes[c], c, None) for c in wanted])

    columns = []
    for item in items:
        features = point_features(encoder, item, args.layer, device)
        if by_place:
            distances = (item["feats"][:, 1:4] - torch.tensor(by_place)).norm(dim=1)
            point, number = int(distances.argmin()), 0
        else:
            number, = wanted
            own = torch.nonzero(item["part"] & (item["labels"] == number))[:, 0]
            point = int(rng.choice(own))
        columns.append((item, features, features[point], number, point))
    return figure_similarity(columns)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = training.start(args)
    out = Path(args.out or f"{args.figure}.png")
    draw = {"pca": draw_images, "tsne": draw_images, "segmentation": draw_probes,
            "depth": draw_probes, "correlation": draw_scans, "prototypes": draw_scans}
    with rc_context(STYLE):
        figure = draw[args.figure](args, device)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()

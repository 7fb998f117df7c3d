"""The papers' pictures of features, predictions and point clouds, as PNGs.

    python -m experiments.visualize pca --encoders dinov2_vits14_reg runs/s2 --data /data/nuscenes
    python -m experiments.visualize tsne --encoders dinov2_vits14 runs/s2 --data /data/nuscenes
    python -m experiments.visualize depth runs/probe-depth runs/probe-depth-cd
    python -m experiments.visualize segmentation runs/probe-seg runs/probe-seg-cd
    python -m experiments.visualize correlation --encoder runs/s1 --data /data/nuscenes
    python -m experiments.visualize prototypes --encoder runs/s1 --data /data/nuscenes
    python -m experiments.visualize clusters --encoder runs/s3pt --data /data/nuscenes
    python -m experiments.visualize losses runs/cribo runs/s3pt

They are Fig. 4 (pca), 3 and C.2 (tsne), A (depth) and B (segmentation) of the collaborative-
distillation paper, Fig. 1 (correlation) and 3 (prototypes) of ScaLR, and s3pt_figures.py's of S3PT;
up to 7 inches wide, 300 dots an inch, of the validation split. Same arguments, same picture.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import models
from data import Frames, as_tensor, collate, select, set_sampling
from eval import are_own_frames, check_classes, data_given, data_of, load_probe
from experiments import s3pt_figures
from experiments.figures import (MARKERS, STYLE, check_out, figure_pca, figure_probes,
                                 figure_similarity, figure_tsne)
from plumbing import training
from plumbing.arguments import COUNT, SEED, Distinct, Parser, real, whole
from plumbing.errors import InputError, one_line_errors
from plumbing.fingerprint import of_frames
from probe import TASKS
from readers.table import hold_out, known_scenes, open_tables

ENOUGH = 5  # how many points of a class a scan must have to be drawn for it
SHOWN = {  # unless --classes says otherwise: what the datasets call each of them
    "car": ("car",), "pedestrian": ("pedestrian", "person"),
    "road": ("driveable_surface", "road", "ground"), "sidewalk": ("sidewalk",)}


# ---- data ---------------------------------------------------------------------------------------

def open_one(data, version, val_scenes=None):
    """The `FrameTable` of --data. Raises InputError for several: a picture is of one dataset."""
    tables = hold_out(open_tables(data, version), val_scenes)
    if len(tables) > 1:
        raise InputError(f"--data: a picture is of one dataset, not of "
                         f"{' and '.join(table.name for table in tables)}; give one")
    return tables[0]


def conditions_there(table):
    """The conditions of the validation frames; (None,) where the dataset states none."""
    if not table.conditions:
        return (None,)
    rows = table.select("val").rows
    return [table.conditions[number] for number in np.unique(table["condition"][rows])]


def shown_classes(classes):
    """{name in SHOWN: the dataset's} of those that are among a dataset's classes."""
    own = {kind: [name for name in names if name in classes] for kind, names in SHOWN.items()}
    return {kind: names[0] for kind, names in own.items() if names}


def class_numbers(table, flag, names, default):
    """The numbers of the classes `names`, which a flag gives, or of those in `default`.

    Raises InputError for a name that is none of the dataset's, and where it has none of `default`.
    """
    classes = table.reader.CLASSES
    names = names or [name for name in default if name in classes]
    unknown = [name for name in names if name not in classes[1:]]
    if unknown or not names:
        given = unknown[0] if unknown else "is needed"
        raise InputError(f"{flag} {given}: {table.name} has {', '.join(classes[1:])}")
    return [classes.index(name) for name in names]


# ---- images -------------------------------------------------------------------------------------

def views(table, size, count=1, target=None):
    """Items of `Frames`: for each condition `count` views of the first camera, evenly spread."""
    items = []
    for name in conditions_there(table):
        chosen = select([table], "val", name and [name], count)
        frames = Frames(chosen, "all", size, target=target)
        items += [frames[0, number] for number in range(0, len(frames), frames.views(table))]
    return items


@torch.no_grad()
def image_features(encoder, images):
    """A feature per image: images [B, 3, H, W] in [0, 1] -> [B, D].

    It is the [CLS] token after the final norm of a network that has tokens, else the pooled map.
    """
    if not hasattr(encoder.backbone, "tokens"):
        return encoder(images).mean((2, 3))
    normalised = (images - encoder.mean) / encoder.std
    return encoder.backbone.tokens(normalised, "norm")[:, 0]


def features_of_random_images(table, size, encoders, count, seed, device):
    """Features of `count` random images of each condition (C.2), here of any camera.

    The conditions are those in MARKERS, or all of a dataset that does not have these.
    Returns: a list per encoder of {condition: [N, D]}.
    """
    names = MARKERS if MARKERS.keys() <= set(table.conditions) else table.conditions
    if len(names) < 2:
        raise InputError(f"--data {table.root}: t-SNE is of several conditions, and {table.name} "
                         f"has {' and '.join(names) or 'none'}; conditions.json there can name "
                         "more")
    chosen = [table.select("val", [name]) for name in names]
    there = [len(of_condition) * table["image"].shape[1] for of_condition in chosen]
    if sum(min(count, images) for images in there) < 4:
        raise InputError(f"--data {table.root}: t-SNE needs at least four images of "
                         f"{' and '.join(names)}")
    rng = np.random.default_rng(seed)
    features = [{} for _ in encoders]
    for name, of_condition in zip(names, chosen):
        frames = Frames([of_condition], "all", size)
        numbers = rng.choice(len(frames), min(count, len(frames)), replace=False).tolist()
        images = torch.stack([frames[0, number]["image"] for number in numbers])
        for encoder, parts in zip(encoders, features):
            parts[name] = torch.cat([image_features(encoder, some.to(device) / 255).cpu()
                                     for some in images.split(16)])
    return features


# ---- point clouds -------------------------------------------------------------------------------

def whole_scan(frames, number):
    """An item of a 3D encoder's `Frames` with the places `xyz` [N, 3] of its points."""
    key = 0, number
    which, row, camera, rng = frames.locate(key)
    table = frames.tables[which]
    points = frames.points_of(table, row, camera)
    points, inputs = frames.encoder_inputs(table, points, rng, key)
    item = {name: as_tensor(values) for name, values in points.items()}
    inputs = {name: as_tensor(values) for name, values in inputs.items()}
    return item | {"condition": frames.condition_of(table, row), "inputs": inputs}


def random_scans(table, encoder, wanted, count, radius, rng):
    """Items of `whole_scan`: `count` validation scans, the conditions by turns.

    Each holds enough points of every class number in `wanted` nearby. An item's mask `part` [N]
    says what is nearby, and drawn: the points in the square of half side `radius` [m].
    """
    # A frame's turn is how many of its condition are before it
    rows = rng.permutation(table.select("val").rows)
    conditions = table["condition"][rows] if table.conditions else np.zeros(len(rows))
    turn = [(conditions[:n] == condition).sum() for n, condition in enumerate(conditions)]
    rows = rows[np.argsort(turn, kind="stable")[:60]]

    frames = scans_of(table.only(rows), encoder, bool(wanted))
    items = []
    for number in range(len(frames)):
        item = whole_scan(frames, number)
        item["part"] = (item["xyz"][:, :2].abs() < radius).all(1)
        if all((item["labels"][item["part"]] == c).sum() >= ENOUGH for c in wanted):
            items.append(item)
        if len(items) == count:
            break
    if not items:
        names = " and ".join(table.reader.CLASSES[c] for c in wanted)
        raise InputError(f"--radius {radius:g}: no scan of {len(frames)} has {names} within it")
    return sorted(items, key=lambda item: item["condition"])


def scans_of(table, encoder, labelled):
    """`Frames` of the whole scans of a table; no limit to their points cuts holes into them."""
    table = table.only(table.rows)
    table.sampling = table.sampling | {"max_points": None}
    target = "labels" if labelled else None
    return Frames([table], "scan", prepare=encoder.prepare, target=target)


@torch.no_grad()
def point_features(encoder, item, layer, device):
    """L2-normalised features of a scan, of a 3D encoder's layer.

    "backbone": [N, channels]. "head": what follows it, [N, D of the image encoder].
    """
    batch = training.to_device(collate([{"inputs": item["inputs"]}]), device)
    network = encoder if layer == "head" else encoder.features
    return F.normalize(network(batch).float(), dim=1).cpu()


def class_prototypes(scans, classes):
    """Classes' mean features, L2-normalised: [classes, D]; 0 for a class without points.

    Args: scans, pairs of an item and its points' features [N, D]. classes: their number.
    """
    sums = 0
    for item, features in scans:
        zeros = features.new_zeros(classes, features.shape[1])
        sums = sums + zeros.index_add(0, item["labels"], features)
    return F.normalize(sums, dim=1)


def training_prototypes(args, table, encoder, wanted, device):
    """`class_prototypes` of args.training_scans scans; all classes `wanted` must be in them."""
    (chosen,) = select([table], "train", limit=args.training_scans)
    frames = scans_of(chosen, encoder, True)
    items = (whole_scan(frames, number) for number in range(len(frames)))
    names = table.reader.CLASSES
    scans = ((item, point_features(encoder, item, args.layer, device)) for item in items)
    prototypes = class_prototypes(scans, len(names))
    lacking = [names[c] for c in wanted if not prototypes[c].any()]
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
    parsers |= s3pt_figures.add_parsers(figures)

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
    data = "NAME=PATH; NAME is a file of readers/"
    add(images + scans, "--data", required=True, help=f"{data} (a bare path: nuscenes)")
    add(images + scans, "--version",
        help="version folder (default: v1.0-trainval; of nuImages v1.0-train and v1.0-val)")
    add(images + scans, "--val-scenes", nargs="+", metavar="NAME",
        help="as of stage1.py (default: the dataset's own split); probes know theirs")
    add(probes, "--data", help=f"{data} (default: the first probe's)")
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
    add(["correlation"], "--class", dest="classes", nargs=1, help="of the point (default: car)")
    add(["correlation"], "--point", type=real(), nargs=3, metavar=tuple("XYZ"),
        help="take the nearest one [m]; needs no labels")
    add(["prototypes"], "--classes", nargs="+", action=Distinct, metavar="CLASS",
        help=f"up to 6 (default: {', '.join(SHOWN)}, where the dataset has them)")
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
    return min(sizes)


def draw_images(args, device):
    """The figure of encoders that the arguments ask for: pca or tsne."""
    paths = args.encoders
    titles = column_titles(args.titles, paths)
    weights = {path: args.weights for path in paths if path in models.ENCODERS}
    encoders = [models.load_image_encoder(path, weights.get(path)).to(device) for path in paths]
    trained = {tuple(encoder.spec["image_size"]) for encoder in encoders
               if "image_size" in encoder.spec}
    size = one_size(trained or {models.IMAGE_SIZE}, paths)
    for encoder in encoders:
        encoder.check_size(size)
    table = open_one(args.data, args.version, args.val_scenes)
    if args.figure == "pca":
        return figure_pca(views(table, size, args.frames), encoders, titles, table)
    features = features_of_random_images(table, size, encoders, args.images, args.seed, device)
    return figure_tsne(features, titles, args.seed)


def draw_probes(args, device):
    """The figure of probes that the arguments ask for: segmentation or depth."""
    task = "depth" if args.figure == "depth" else "seg"
    paths = args.probes
    titles = column_titles(args.titles, paths)
    loaded = [load_probe(path, device) for path in paths]
    probes = [probe for probe, _, _ in loaded]
    wrong = [f"{path} of --task {probe['task']}" for path, probe in zip(paths, probes)
             if probe["task"] != task]
    if wrong:
        raise InputError(f"{args.figure} is of probes of --task {task}, not {', '.join(wrong)}")
    size = one_size({tuple(probe["image_size"]) for probe in probes}, paths)

    # The frames: are they what the probes were to be judged on?
    data = data_given(args.data, data_of(probes[0], paths[0]))
    table = open_one(data, args.version or probes[0]["args"]["version"])
    hold_out([table], known_scenes(probes[0]["args"].get("val_scenes"), [table]))
    for probe in probes:
        check_classes([table], probe)
    target = TASKS[task].target
    frames = of_frames([table.select("val")], target == "labels", files=True)
    for path, probe in zip(paths, probes):
        are_own_frames(probe, path, frames)
    items = views(table, size, args.frames, target)
    networks = [(encoder, head) for _, encoder, head in loaded]
    return figure_probes(task, items, networks, titles, table)


def draw_scans(args, device):
    """The figure of point clouds that the arguments ask for: correlation or prototypes."""
    encoder, stage1 = models.load_point_encoder(args.encoder)
    encoder = encoder.to(device).eval()
    table = open_one(args.data, args.version, args.val_scenes)
    encoder.use(set_sampling([table], stage1.get("samplings"), None, stage1.get("sampling_flags")))
    rng = np.random.default_rng(args.seed)
    by_place = getattr(args, "point", None)
    shown = shown_classes(table.reader.CLASSES).values()
    asked = {"prototypes": ("--classes", args.classes, shown),
             "correlation": ("--class", args.classes, SHOWN["car"])}[args.figure]
    wanted = [] if by_place else class_numbers(table, *asked)
    items = random_scans(table, encoder, wanted, getattr(args, "scans", 1), args.radius, rng)

    if args.figure == "prototypes":
        item, = items
        features = point_features(encoder, item, args.layer, device)
        if args.training_scans:
            prototypes = training_prototypes(args, table, encoder, wanted, device)
        else:
            prototypes = class_prototypes([(item, features)], len(table.reader.CLASSES))
        columns = [(item, features, prototypes[c], c, None) for c in wanted]
        return figure_similarity(columns, table)

    columns = []
    for item in items:
        features = point_features(encoder, item, args.layer, device)
        if by_place:
            distances = (item["xyz"] - torch.tensor(by_place)).norm(dim=1)
            point, number = int(distances.argmin()), 0
        else:
            number, = wanted
            own = torch.nonzero(item["part"] & (item["labels"] == number))[:, 0]
            point = int(rng.choice(own))
        columns.append((item, features, features[point], number, point))
    return figure_similarity(columns, table)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = training.start(args)
    out = Path(args.out or f"{args.figure}.png")
    check_out(out)
    draw = {"pca": draw_images, "tsne": draw_images, "segmentation": draw_probes,
            "depth": draw_probes, "correlation": draw_scans, "prototypes": draw_scans,
            **s3pt_figures.FIGURES}
    from matplotlib import rc_context  # here: it takes long to import
    with rc_context(STYLE):
        draw[args.figure](args, device).savefig(out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()

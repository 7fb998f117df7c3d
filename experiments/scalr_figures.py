"""ScaLR's pictures of several datasets, a row each: PNGs up to 7 inches wide, 150 dots an inch.

    data=nuscenes=/a,semantickitti=/b,pandaset64=/c,semanticposs=/d
    python -m experiments.scalr_figures datasets --data $data --out datasets.png
    python -m experiments.scalr_figures backbone --data $data --encoder runs/s1 --out backbone.png

`datasets` shows what they are: a picture with the LiDAR's points over it, and the whole scan.
`backbone` is Fig. 1 (similarity to a point of a car), 2 (principal components) and 3 (prototypes of
classes) of ScaLR (Puy et al., CVPR 2024), with one 3D encoder for all. Both show the same scans.
The same arguments give the same picture.
"""
from pathlib import Path

import numpy as np
import torch

import models
from data import Frames, set_sampling
from experiments.figures import (LEGEND, NO_TICKS, STYLE, check_out, draw_points, in_words, mark,
                                 separation)
from experiments.visualize import (ENOUGH, class_numbers, class_prototypes, point_features,
                                   scans_of, shown_classes, whole_scan)
from miniature.colours import COLOURS, pca_colours
from plumbing import training
from plumbing.arguments import COUNT, Parser, real
from plumbing.errors import InputError, one_line_errors
from readers.files import read_image
from readers.table import open_tables, spread

HEIGHT = 480  # pixels of a picture, at most
# Classes that nuScenes does not have: which of its classes they are like, or a colour of their own
LIKE = {
    "person": "pedestrian", "road": "driveable_surface", "building": "manmade",
    "plants": "vegetation", "fence": "barrier", "bike": "bicycle", "cone/stone": "traffic_cone",
    "other-vehicle": "construction_vehicle", "other_vehicle": "construction_vehicle",
    "other-ground": "other_flat"}
OWN = {
    "ground": "#b5b5b5", "parking": "#c97b84", "driveway": "#c97b84", "road_marking": "#ffffff",
    "trunk": "#808000", "pole": "#5b7cff", "traffic-sign": "#ffd8b1", "traffic_sign": "#ffd8b1",
    "trashcan": "#008080", "bicyclist": "#ff9be8", "rider": "#ff9be8", "motorcyclist": "#c070ff"}
OF_KIND = {"car": "#ffb000", "pedestrian": "#ff4fd8", "road": "#4da3ff", "sidewalk": "#3fe08f"}
EXPLAINED = ("AUC: how often a point of a car is more similar than another point. Right: points of "
             "the four\nclasses whose most similar prototype is their own. The more similar, the "
             "brighter.")
OTHER = 0.4  # grey of the points that are of none of these


# ---- data ---------------------------------------------------------------------------------------

def busiest(table, split, radius, count):
    """The frame of a split whose scan shows the most, and its points: (row, {name: [N, ...]}).

    It is the one of up to `count` frames, of the first condition that is there, that has the most
    of the classes car, pedestrian, road and sidewalk, and then of all classes, within `radius` m.
    Raises InputError for a dataset without scans or labels.
    """
    if "scan" not in table:
        raise InputError(f"--data {table.root}: {table.name} has no LiDAR scans, and these "
                         "pictures are of scans; leave it out")
    rows = table.select(split).rows
    if table.conditions:
        conditions = table["condition"][rows]
        rows = rows[conditions == conditions.min()]
    frames = Frames([table.only(spread(rows, count))], "scan", target="labels")
    kinds = [table.reader.CLASSES.index(name)
             for name in shown_classes(table.reader.CLASSES).values()]
    best, found = (-1, -1), None
    for row in frames.tables[0].rows:
        points = frames.points_of(table, row, None)
        points["part"] = (np.abs(points["xyz"][:, :2]) < radius).all(1)
        numbers = np.bincount(points["labels"][points["part"]], minlength=256)
        shows = int((numbers[kinds] >= ENOUGH).sum()), int((numbers[1:] >= ENOUGH).sum())
        if shows > best:
            best, found = shows, (row, points)
    return found


def picture_of(table, row):
    """(image uint8 [H, W, 3], pixels [M, 2], labels [M]) of the first camera; None without one."""
    if not table.cameras:
        return None
    size = table["image_size"][row, 0]
    size = np.rint(size * min(1, HEIGHT / size[0])).astype(int).tolist()
    image = read_image(table.path("image", row, 0), size)
    frames = Frames([table], table.cameras[0], size, target="labels")
    points = frames.points_of(table, row, 0)
    return image.permute(1, 2, 0).numpy(), points["pixels"], points["labels"]


def scan_with_features(table, row, encoder, radius, device):
    """An item of `whole_scan` with `part`, what is within `radius` m, and features [N, D]."""
    item = whole_scan(scans_of(table.only(np.array([row])), encoder, True), 0)
    item["part"] = (item["xyz"][:, :2].abs() < radius).all(1)
    return item, point_features(encoder, item, "backbone", device)


def point_of_car(table, item):
    """(class number, row) of the point of a car that is in the middle by its distance.

    Raises InputError where no car is nearby.
    """
    number = class_numbers(table, "a class car", None, ("car",))[0]
    own = torch.nonzero(item["part"] & (item["labels"] == number))[:, 0]
    if len(own) == 0:
        raise InputError(f"--data {table.root}: no scan that was looked at has a car nearby; raise "
                         "--radius or --look-at")
    distances = item["xyz"][own].norm(dim=1)
    return number, int(own[distances.argsort()[len(own) // 2]])


def nearest_prototype(table, item, features):
    """Each point's most similar prototype, of those of this scan's own classes in OF_KIND.

    Returns: [N] numbers into OF_KIND by the truth, -1 for other points; the same by similarity;
    similarity [N] to that prototype.
    """
    classes = table.reader.CLASSES
    prototypes = class_prototypes([(item, features)], len(classes))
    truth = np.full(len(features), -1)
    similarity = np.full((len(features), len(OF_KIND)), -np.inf)
    for kind, name in shown_classes(classes).items():
        place, number = list(OF_KIND).index(kind), classes.index(name)
        own = (item["labels"] == number).numpy()
        truth[own] = place
        if own.any():
            similarity[:, place] = features @ prototypes[number]
    return truth, similarity.argmax(1), similarity.max(1)


# ---- the panels ---------------------------------------------------------------------------------

def square(radius):
    """How a panel of points from above looks: dark, of half side `radius` m."""
    ticks = [-radius, 0, radius]
    return dict(aspect="equal", facecolor="#202020", xlim=(-radius, radius),
                ylim=(-radius, radius), xticks=ticks, yticks=ticks)


# ---- the datasets -------------------------------------------------------------------------------

def colour_of(name):
    """The colour of a class in all datasets."""
    name = LIKE.get(name, name)
    return COLOURS.get(name) or OWN.get(name, "#ffffff")


def figure_datasets(rows, radius):
    """A row a dataset: picture with points, scan from above, legend. rows: (table, row, points)."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    figure = Figure((7, 1.75 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False, width_ratios=(3.3, 1.9, 1.5))
    for line, (table, row, points) in zip(axes, rows):
        classes = table.reader.CLASSES
        colours = np.array([to_rgb(colour_of(name)) for name in classes])
        present = set(np.unique(points["labels"][points["part"]]).tolist())
        line[0].set(**NO_TICKS)
        line[0].set_ylabel(table.name)
        line[1].set(**square(radius))
        line[1].tick_params(labelbottom=table is rows[-1][0])
        picture = picture_of(table, row)
        if picture:
            image, pixels, labels = picture
            known = labels > 0
            line[0].imshow((0.6 * image).astype(np.uint8))
            line[0].autoscale(False)
            line[0].scatter(*pixels[known, ::-1].T, c=colours[labels[known]], linewidths=0,
                            s=np.clip(2000 / max(1, known.sum()), 0.2, 1))
            present |= set(np.unique(labels).tolist())
        else:
            line[0].set(frame_on=False)
            line[0].text(0.5, 0.5, "no pictures", ha="center", va="center", color="0.5",
                         transform=line[0].transAxes)

        item = {name: torch.from_numpy(points[name]) for name in ("xyz", "part", "labels")}
        item["part"] &= item["labels"] > 0
        draw_points(line[1], item, colours[points["labels"]], 3)
        line[2].axis("off")
        handles = [Line2D([], [], marker="o", linestyle="", markersize=5, markeredgecolor="0.3",
                          markeredgewidth=0.4, markerfacecolor=colours[number],
                          label=in_words(classes[number])) for number in sorted(present - {0})]
        line[2].legend(handles=handles, loc="center left", ncols=1 + (len(handles) > 11),
                       borderaxespad=0, handletextpad=0.2, columnspacing=0.8, fontsize=7)
    axes[0, 0].set_title("picture and LiDAR points")
    axes[0, 1].set_title("scan from above [m]")
    return figure


# ---- the backbone -------------------------------------------------------------------------------

def figure_backbone(rows, radius):
    """ScaLR Fig. 1 to 3: a row a dataset; labels, similarity, components, prototypes.

    Args: rows, of (table; item with `part`; features [N, D], L2-normalised; class number and row of
    the chosen point).
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    # The last is of what is of no class in OF_KIND, number -1
    palette = np.array([*map(to_rgb, OF_KIND.values()), (OTHER, OTHER, OTHER)])
    figure = Figure((7, 1.7 * len(rows) + 1.1), layout="compressed")
    axes = figure.subplots(len(rows), 4, squeeze=False, sharex=True, sharey=True,
                           subplot_kw=square(radius))
    for line, (table, item, features, number, point) in zip(axes, rows):
        truth, nearest, similarity = nearest_prototype(table, item, features)
        to_point = (features @ features[point]).numpy()
        components, = pca_colours([features.T[:, :, None]])             # [N, 1, 3]
        bright = 0.3 + 0.7 * similarity.clip(0, 1)[:, None]             # [N, 1]
        draw_points(line[0], item, palette[truth], 4)
        dots = draw_points(line[1], item, to_point, 4)
        draw_points(line[2], item, components[:, 0], 4)
        draw_points(line[3], item, palette[nearest] * bright, 4)
        ring = mark(line[0], item, point)
        mark(line[1], item, point)

        part = item["part"].numpy() & (truth >= 0)
        right = (truth == nearest)[part].mean()
        line[0].set_ylabel(f"{table.name}\ny [m]")
        line[1].set_title(f"AUC {separation(item, to_point, number):.2f}")
        line[3].set_title(f"{100 * right:.0f} % right")
    titles = ("labels", "similarity to a car's point", "principal components",
              "most similar prototype")
    for axis, title in zip(axes[0], titles):
        axis.set_title(f"{title}\n{axis.get_title()}".strip())
    for axis in axes[-1]:
        axis.set_xlabel("x [m]")
    handles = [Patch(color=colour, label=kind) for kind, colour in OF_KIND.items()]
    handles += [Patch(color=palette[-1], label="other"), ring]
    figure.legend(handles=handles, ncols=6, title=EXPLAINED, **LEGEND)
    figure.colorbar(dots, ax=axes, label="cosine similarity to the chosen point",
                    ticks=(-1, -0.5, 0, 0.5, 1), location="bottom", shrink=0.5, pad=0.01, aspect=40)
    return figure


# ---- command line -------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for name in ("datasets", "backbone"):
        add = figures.add_parser(name).add_argument
        add("--data", required=True, help="NAME=PATH,NAME=PATH; a row each")
        add("--version", help="version folder of nuScenes (default: v1.0-trainval)")
        add("--split", choices=("train", "val"), default="val",
            help="that the scans are of (default: %(default)s)")
        add("--look-at", type=COUNT, default=20,
            help="so many scans; the one that shows the most is drawn (default: %(default)s)")
        add("--radius", type=real(1), default=40,
            help="half side of the square that is drawn, in metres (default: %(default)s)")
        if name == "backbone":
            add("--encoder", required=True, help="stage 1's folder, or ScaLR's model.pth")
        add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
        add("--out", help="(default: FIGURE.png)")
    parser.set_defaults(seed=0)  # nothing is drawn at random
    return parser.parse_args(argv)


def draw(args, device):
    """The figure that the arguments ask for."""
    if args.figure == "backbone":
        encoder, stage1 = models.load_point_encoder(args.encoder)
        encoder = encoder.to(device).eval()
    rows = []
    for table in open_tables(args.data, args.version):
        row, points = busiest(table, args.split, args.radius, args.look_at)
        if args.figure == "datasets":
            rows.append((table, row, points))
            continue
        # One encoder, but each dataset's own planes
        encoder.use(set_sampling([table], stage1.get("samplings"), None,
                                 stage1.get("sampling_flags")))
        item, features = scan_with_features(table, row, encoder, args.radius, device)
        rows.append((table, item, features, *point_of_car(table, item)))
    draw_rows = figure_datasets if args.figure == "datasets" else figure_backbone
    return draw_rows(rows, args.radius)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = training.start(args)
    out = Path(args.out or f"{args.figure}.png")
    check_out(out)
    from matplotlib import rc_context  # here: it takes long to import
    with rc_context(STYLE | {"savefig.dpi": 150}):
        figure = draw(args, device)
        # Points without blurred edges: rare classes are seen, and the file is half as large
        for axis in figure.axes:
            for dots in axis.collections:
                dots.set_antialiased(dots.get_linewidths()[0] > 0)
        figure.savefig(out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()

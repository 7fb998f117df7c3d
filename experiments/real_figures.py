"""Pictures of what experiments/real.py measures: a real street, real nights, and the numbers.

    copies="pandaset64=runs/real/clean,pandaset64=runs/real/copies/low_light"
    encoders="efficientnet_lite0 runs/real/seed-1/cd --titles before after"
    python -m experiments.real_figures street --data $copies --val-scenes 902 --encoders $encoders
    python -m experiments.real_figures nights --data pictures=/data/pictures --encoders $encoders
    python -m experiments.real_figures numbers --results results/real.json

`street` is one validation view under each of --conditions: image, LiDAR points by depth, features,
classes predicted by a linear head, labels. The head learns from all training views of --data, as in
experiments/probes.py. `nights` has pictures by day and by night, and their features. `numbers`
plots the rows of experiments/real.py, without frames.
"""

import numpy as np
import torch

import models
from data import DEPTHS, Frames, select
from experiments.figures import (NO_TICKS, STYLE, add_legend, check_out, condition_of, grid,
                                 in_words, judge, pca_of_encoders)
from experiments.probes import train_head, views_of
from experiments.real import CONDITIONS, ROWS
from experiments.real_table import PROBES, of_same_classes, values
from experiments.visualize import column_titles, one_size
from miniature.colours import palette
from miniature.overview import class_map, one_per_condition
from plumbing import training
from plumbing.arguments import COUNT, Distinct, Parser, whole
from plumbing.atomic import read_json
from plumbing.errors import InputError, one_line_errors
from probe import classes_of
from readers.table import hold_out, open_tables

OF_FEATURES = "features: an encoder's principal components of all pictures shown, as colours"
OF_NUMBERS = ("probes for all conditions; dot: mean over the seeds; bar: standard deviation;\n"
              "filled: collaborative distillation; dashed: imagenet; each panel has its own scale")


# ---- data ----------------------------------------------------------------------------------------

def load_encoders(paths, device):
    """(encoders, (H, W) of their images). Raises InputError where they differ in that."""
    encoders = [models.load_image_encoder(path, careful=False).to(device) for path in paths]
    specs = [encoder.spec for encoder in encoders]
    trained = {tuple(spec["image_size"]) for spec in specs if "image_size" in spec}
    size = one_size(trained or {models.IMAGE_SIZE}, paths)
    for encoder in encoders:
        encoder.check_size(size)
    return encoders, size


def street_views(tables, conditions, size, number=None):
    """[(item with depths and labels, its table)]: a validation frame's first camera, by condition.

    number: of the frame (default: the middle one).
    """
    views = {}
    for table in select(tables, "val"):
        table.require("all", "depths")
        place = len(table) // 2 if number is None else number
        for condition, item in one_per_condition(table, size, place).items():
            views[condition] = item, table
    for condition in conditions:
        if condition not in views:
            raise InputError(f"--conditions {condition}: the validation frames of --data have "
                             f"{', '.join(views)}")
    return [views[condition] for condition in conditions]


# ---- figures -------------------------------------------------------------------------------------

@torch.no_grad()
def maps_and_colours(encoder, items):
    """The images' feature maps [D, h, w], the same in colours by one PCA, the share shown."""
    maps = [encoder(item["image"][None].to(encoder.mean.device) / 255)[0].cpu() for item in items]
    (colours,), (share,) = pca_of_encoders([maps])
    return maps, colours, share


def show(axis, picture, title, **how):
    axis.imshow(picture, **how)
    axis.set_title(title)


def show_points(axis, item, name, title, how):
    """The points by their depths or labels, on a pale image for them to stand out."""
    known = item[name].numpy() > 0
    x, y = item["pixels"].numpy()[known, ::-1].T
    show(axis, 150 + 0.4 * item["image"].float().mean(0), title, cmap="gray", vmin=0, vmax=255)
    axis.autoscale(False)
    return axis.scatter(x, y, s=1.2, linewidths=0, c=item[name].numpy()[known], **how)


@torch.no_grad()
def figure_street(views, encoders, heads, titles):
    """A block of panels a view of `street_views`: a line an encoder, and a view's own mIoU."""
    from matplotlib import colors
    size = views[0][0]["image"].shape[1:]
    names = views[0][1].reader.CLASSES
    of_classes = palette(names)
    by_class = dict(cmap=of_classes, norm=colors.Normalize(0, of_classes.N - 1))
    by_depth = dict(cmap="turbo_r", norm=colors.LogNorm(2, DEPTHS[1]))
    lines = max(2, len(encoders))
    figure, axes = grid(lines * len(views), 4, size[0] / size[1], subplot_kw=NO_TICKS)
    figure.set_figheight(figure.get_figheight() + 0.25 * len(axes))  # titles have two lines
    blocks = axes.reshape(len(views), lines, 4)
    present = set()
    for block, (item, table) in zip(blocks, views):
        show(block[0, 0], item["image"].permute(1, 2, 0), "image")
        block[0, 0].set_ylabel(in_words(condition_of(item, table)))
        dots = show_points(block[1, 0], item, "depths", "LiDAR points", by_depth)
        show_points(block[0, 3], item, "labels", "labels", by_class)
        present.update(item["labels"].tolist())
    for line, (encoder, head, title) in enumerate(zip(encoders, heads, titles)):
        maps, colours, _ = maps_and_colours(encoder, [item for item, _ in views])
        for block, (item, table), features, colour in zip(blocks, views, maps, colours):
            scores = head(features.flatten(1).T).T.unflatten(1, features.shape[1:])[None]
            miou = judge("seg", scores, item, size, table)
            predicted = class_map(head, features, size)
            show(block[line, 1], colour, f"features\n{title}")
            show(block[line, 2], predicted, f"classes, {miou}\n{title}", **by_class)
            present.update(np.unique(predicted).tolist())

    # The depths' scale stands where a block has no panel
    for axis in axes.flat:
        axis.axis("on" if axis.images else "off")
        axis.title.set_fontsize("small")
    bar = figure.colorbar(dots, cax=blocks[0, 1, 3].inset_axes((0.05, 0.6, 0.9, 0.12)),
                          orientation="horizontal", label="depth [m]",
                          ticks=(2, 5, 10, 20, 40, 80), format="%d")
    bar.minorticks_off()
    add_legend(figure, of_classes, names, sorted(present - {0}))
    figure.legends[0].set_title(OF_FEATURES)
    return figure


def figure_nights(items, encoders, titles):
    """A row a picture: the picture and each encoder's features. items: {condition: items}."""
    together = sum(items.values(), [])
    conditions = [condition for condition, own in items.items() for _ in own]
    size = together[0]["image"].shape[1:]
    figure, axes = grid(len(together), 1 + len(encoders), size[0] / size[1], subplot_kw=NO_TICKS)
    figure.set_figheight(figure.get_figheight() - 0.08 * len(together))  # rows have no titles
    for axis, item, condition in zip(axes[:, 0], together, conditions):
        show(axis, item["image"].permute(1, 2, 0), "picture" if axis is axes[0, 0] else "")
        axis.set_ylabel(in_words(condition))
    for column, encoder, title in zip(axes.T[1:], encoders, titles):
        _, colours, share = maps_and_colours(encoder, together)
        for axis, colour in zip(column, colours):
            show(axis, colour, "")
        column[0].set_title(f"features {title}\n{100 * share:.0f} % of their variance shown")
    figure.supxlabel(OF_FEATURES, fontsize="medium")
    return figure


def figure_numbers(kept):
    """A panel a metric and condition: the means and spreads of the rows {row: {seed: result}}.

    All is black and white: a dot's place says which row it is.
    """
    from matplotlib.figure import Figure
    names = [name for name, row in ROWS.items() if row.script == "probes" and kept.get(name)]
    if not names:
        raise InputError("--results: has no row of an image encoder")
    probes = [probe for probe in PROBES if probe[0].endswith("-all")]
    panels = [(*probe, column) for probe in probes for column in ("full", *CONDITIONS)]
    lines = len(panels) // 3
    figure = Figure((7, lines * (0.5 + 0.14 * len(names)) + 0.6), layout="constrained")
    axes = figure.subplots(lines, 3, sharey=True)
    for axis, (probe, metric, heading, _, column) in zip(axes.flat, panels):
        axis.set(title=in_words(column), xlabel=heading.partition(",")[0])
        axis.grid(axis="y", color="0.9", linewidth=0.5)
        for place, name in enumerate(names):
            numbers = list(values(kept, name, probe, metric, column).values())
            deviation = np.std(numbers, ddof=1) if len(numbers) > 1 else None
            axis.errorbar(np.mean(numbers), place, xerr=deviation, fmt="o", color="black",
                          markersize=4, linewidth=0.8, capsize=2,
                          markerfacecolor="black" if name in ("cd", "rich-cd") else "white")
            if name == "imagenet":
                axis.axvline(np.mean(numbers), color="0.6", ls="--", linewidth=0.8, zorder=0)
    axes[0, 0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    figure.supxlabel(OF_NUMBERS, fontsize="medium")
    return figure


# ---- command line --------------------------------------------------------------------------------

def draw(args):
    """The figure that the arguments ask for."""
    if args.figure == "numbers":
        kept = read_json(args.results)
        if not (isinstance(kept, dict) and isinstance(kept.get("rows"), dict)):
            raise InputError(f"--results {args.results}: cannot be read, or is not what "
                             "experiments/real.py wrote")
        return figure_numbers(of_same_classes(kept["rows"]))
    titles = column_titles(args.titles, args.encoders)
    device = training.start(args)
    encoders, size = load_encoders(args.encoders, device)
    tables = open_tables(args.data, args.version, look=False)
    if args.figure == "nights":
        for table in tables:
            if not table.conditions:
                raise InputError(f"--data {table.root}: states no conditions; put its pictures "
                                 "into folders of their names")
        items = {}
        for condition in args.conditions:
            chosen = select(tables, "train", [condition], args.pictures)
            frames = Frames(chosen, "all", size)
            first = range(0, len(frames), frames.views(chosen[0]))  # of each frame's cameras
            items[condition] = [frames[0, number] for number in first]
        return figure_nights(items, encoders, titles)

    # The views first: the heads take minutes
    views = street_views(hold_out(tables, args.val_scenes), args.conditions, size, args.frame)
    heads = []
    for encoder in encoders:
        of_train, *_ = views_of(tables, "train", encoder, size, args, device)
        heads.append(train_head("seg", of_train, range(len(of_train.maps)),
                                len(classes_of(tables, "seg")), args))
    return figure_street(views, encoders, heads, titles)


def parse(argv=None):
    parser = Parser(__doc__)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    parsers = {name: figures.add_parser(name) for name in ("street", "nights", "numbers")}
    for name, shown in (("street", "clear low_light"), ("nights", "day night")):
        add = parsers[name].add_argument
        add("--data", required=True, help="NAME=PATH, several with commas between")
        add("--encoders", nargs="+", required=True, help="names, or folders of stage 2")
        add("--version", help="of --data, where it has versions (default: the dataset's)")
        add("--titles", nargs="+", help="of the encoders (default: the ends of their paths)")
        add("--conditions", nargs="+", action=Distinct, default=shown.split(),
            help=f"(default: {shown})")
        add("--device", help="of the encoders: cpu, cuda, ... (default: cuda if there is one)")
    add = parsers["street"].add_argument
    add("--val-scenes", nargs="+", help="as of stage1.py (default: the dataset's own split)")
    add("--frame", type=whole(0), help="validation frame, modulo their number (default: middle)")
    add("--steps", type=COUNT, default=324, help="of a head (default: %(default)s)")
    parsers["nights"].add_argument("--pictures", type=COUNT, default=3,
        help="of each condition, spread evenly (default: %(default)s)")
    parsers["numbers"].add_argument("--results", default="results/real.json",
        help="what experiments/real.py wrote (default: %(default)s)")
    for name, one in parsers.items():
        one.add_argument("--out", default=f"{name}.png", help="(default: %(default)s)")
    # As experiments/probes.py trains
    parser.set_defaults(points=3000, batch=6, workers=0, precision="fp32", seed=0)
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    check_out(args.out)
    from matplotlib import rc_context  # here: it takes long to import
    with rc_context(STYLE):
        draw(args).savefig(args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()

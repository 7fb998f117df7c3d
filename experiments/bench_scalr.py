"""What ScaLR's datasets, mixtures and several teachers cost, each against its neighbour.

    # on small worlds that it makes; on real data, of which nuScenes' is made where it is not given
    python -m experiments.bench_scalr
    python -m experiments.bench_scalr --data nuscenes=/a,pandaset64=/b --out runs/scalr.md

Neighbours do the same work and take turns. A ratio is the median and the range of the ratios of two
neighbours in time; "wanted" is what it should be. Memory is the peak as in experiments/bench.py. On
a CPU it is of what is in use with MALLOC_MMAP_THRESHOLD_=65536 in the environment.

A data item of another dataset gets nuScenes' cloud, moved so that its camera sees of it what
nuScenes' does; the points are equal but for voxels that begin elsewhere. No scan is read then.
pandas.read_pickle runs what a pickle says, and gets only files that readers/pickles.py has read
before, which refuses all names that a frame does not need.
"""
import functools
import importlib.util
import os
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

import models
from data import Frames, collate, set_sampling
from distill import distillation_loss, sums_by
from experiments.bench import FEW, hardware, peak_bytes, repeat
from plumbing import training
from plumbing.arguments import COUNT, Parser
from plumbing.atomic import write_text
from plumbing.errors import one_line_errors
from readers import pickles
from readers.cache import with_damage
from readers.pandaset_poses import read_poses
from readers.table import entries, open_tables
from teachers import Teachers
from waffleiron import WaffleIron, prepare

CPU = torch.device("cpu")
NEW = ("semantickitti", "pandaset64", "pandasetgt", "semanticposs")
PAIRS = (("vit_small14", "vit_small16"), ("dinov2_vitl14", "maskclip_vitb16"))  # on a CPU, a GPU


# ---- measuring ----------------------------------------------------------------------------------

class Row(NamedTuple):
    """Two neighbours' times [s], (here, beside) of each repetition; what is wanted; more cells."""
    name: str
    times: list
    wanted: str = "-"
    more: tuple = ()


def in_turns(name, here, beside, repeats, wanted="-", device=CPU):
    """A `Row` of the function `here` against the functions `beside`, whose times are added."""
    runs = [here, *beside]
    for run in runs:
        run()  # warm-up
    times = repeat(runs, device, repeats)
    return Row(name, [(first, sum(others)) for first, *others in times], wanted)


def ratio(row):
    """The ratios here / beside of a `Row`: median (range)."""
    ratios = [here / beside for here, beside in row.times]
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def milliseconds(times):
    """The median of times [s], in words."""
    return f"{median(times) * 1e3:,.1f} ms"


def markdown(rows, title, here, beside, of="ratio (range)", more=()):
    """A table of `Row`s. The other arguments are its header; more: of the rows' further cells."""
    header = [title, here, beside, of, "wanted", *more]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for row in rows:
        times = map(milliseconds, zip(*row.times))
        cells = [row.name, *times, ratio(row), row.wanted, *row.more]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- data: items, scans, pickles, tables --------------------------------------------------------

def first_of(table, count=1):
    """The table with its first frames that are not bad."""
    good = table.rows[table["bad"][table.rows] == b""]
    return table.only(good[:count])


def moved(cloud, table, beside):
    """A frame whose first camera sees of the cloud what that of the frame `beside` does.

    cloud: [A, 4], of `beside`. Returns: the table with the other's intrinsics, scaled to its own
    pictures; the cloud in its own LiDAR's frame and type.
    """
    frame, other = table.rows[0], beside.rows[0]
    own = table.reader.scan(table.path("scan", frame))
    if "image" not in table:
        return table, cloud.astype(own.dtype)

    # Through the camera's frame, in which the two agree
    own_from_other = (np.linalg.inv(table["cam_from_lidar"][frame, 0])
                      @ beside["cam_from_lidar"][other, 0])
    points = cloud.astype(np.float64)
    points[:, :3] = points[:, :3] @ own_from_other[:3, :3].T + own_from_other[:3, 3]
    height, width = table["image_size"][frame, 0] / beside["image_size"][other, 0]
    intrinsics = table["intrinsics"].copy()
    intrinsics[frame, 0] = np.diag([width, height, 1]) @ beside["intrinsics"][other, 0]
    alike = table.only(table.rows)
    alike.columns = table.columns | {"intrinsics": intrinsics}
    return alike, points.astype(own.dtype)


def item_of(table, image_size, camera=None):
    """A function that makes the item of a table's first frame; camera: its first one, or "scan"."""
    frames = Frames([table], camera or table.cameras[0], image_size, prepare)
    return lambda: frames[0, 0]


def picture_of(table):
    """The kind and size of the first picture of a table's frame."""
    if "image" not in table:
        return "none, whole scan"
    height, width = table["image_size"][table.rows[0], 0]
    return f"{Path(table.path('image', table.rows[0], 0)).suffix}, {height} × {width}"


def item_table(tables, image_size, repeats):
    """Markdown: a data item of each dataset against nuScenes', which is the first of `tables`."""
    beside = first_of(tables[0])
    cloud = beside.reader.scan(beside.path("scan", beside.rows[0]))
    rows = []
    for table in tables[1:]:
        alike, of_table = moved(cloud, first_of(table), beside)
        camera = None if "image" in table else "scan"
        with (mock.patch.object(beside.reader, "scan", lambda path: cloud),
              mock.patch.object(alike.reader, "scan", lambda path: of_table)):
            here, there = (item_of(one, image_size, camera) for one in (alike, beside))
            row = in_turns(table.name, here, [there], repeats, "≤ 1.5")
            bare = [item_of(one, None, camera) for one in (alike, beside)]
            points = [f"{len(item()['inputs']['points']):,}" for item in bare]
            without = ratio(in_turns(table.name, bare[0], bare[1:], repeats))
        rows.append(row._replace(more=(without, " and ".join(points), picture_of(alike))))
    more = ("without the picture", "points", f"picture; nuScenes' {picture_of(beside)}")
    return markdown(rows, "a data item, scan at hand", "time", "nuScenes'", more=more)


def reading_table(tables, image_size, repeats):
    """Markdown: what reading a dataset's own scan costs, and an item of it with that."""
    rows = []
    for table in tables:
        # Of two frames, because PandaSet's reader keeps the one that it read last
        two = first_of(table, 2)
        camera = None if "image" in table else "scan"
        paths = [two.path("scan", frame) for frame in two.rows]
        items = [item_of(two.only([frame]), image_size, camera) for frame in two.rows]
        points = sum(map(len, map(table.reader.scan, paths)))
        row = in_turns(f"{table.name}, {len(paths)}", lambda: list(map(table.reader.scan, paths)),
                       [lambda: [item() for item in items]], repeats)
        rows.append(row._replace(more=(f"{points:,}",)))
    return markdown(rows, "scans of its own", "reading them", "an item of each, with that",
                    "part (range)", ("points",))


def pickle_table(table, repeats):
    """Markdown: a frame's pickles by readers/pickles.py and by pandas; in words where it is not."""
    if importlib.util.find_spec("pandas") is None:
        return "pandas.read_pickle: not run: pandas is not installed."
    import pandas
    table = first_of(table)
    rows = []
    for column, wanted in (("scan", pickles.POINTS), ("labels", pickles.LABELS)):
        path = table.path(column, table.rows[0])
        own = functools.partial(pickles.read_frame, path, wanted)
        own()  # before pandas gets it
        row = in_turns(column, own, [lambda: pandas.read_pickle(path)], repeats, "≤ 1.2")
        unpacking = in_turns(column, lambda: pickles.unpacked(path), [own], repeats)
        rows.append(row._replace(more=(ratio(unpacking),)))
    return markdown(rows, f"a frame of {table.name}", "readers/pickles.py",
                    f"pandas {pandas.__version__}", more=("part of gunzip (range)",))


def index_table(tables, repeats):
    """Markdown: indexing each of these datasets, which have pictures, against decoding these."""
    rows = []
    for table in tables:
        root = Path(table.root)
        paths = [root / os.fsdecode(path) for path in table["image"].flat]

        def index(look):
            read_poses.cache_clear()  # as in a process of its own
            columns = table.reader.table(root)
            if look:
                with_damage(table.reader, root, columns)

        row, looked = (in_turns(table.name, lambda: decode(paths), [lambda: index(look)], repeats,
                                "≥ 20") for look in (False, True))
        rows.append(row._replace(more=(ratio(looked), str(len(paths)))))
    return markdown(rows, "a dataset", "decoding its pictures", "its table",
                    "times faster (range)", ("with a look at each frame's files", "pictures"))


def decode(paths):
    """Decode these pictures, all of their pixels."""
    for path in paths:
        Image.open(path).load()  # which closes it


# ---- steps --------------------------------------------------------------------------------------

def step_of(teachers, samplings, batches, args, device, head="linear"):
    """A function that does stage1.py's step, at a learning rate of 0, on each of these batches.

    samplings: {dataset: sampling}; of several, their losses are told apart.
    """
    size = dict(channels=args.channels, depth=args.depth, out_channels=teachers.dim)
    model = WaffleIron(**size, head=head).to(device).train()
    model.use(samplings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step(batch):
        with training.autocast(device, args.precision):
            with torch.no_grad():
                pixel_features = teachers.features_at_pixels(batch)
            point_features = model(batch)
        features = pixel_features, point_features
        loss = distillation_loss(*features, "2d_to_3d", teachers.widths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if len(samplings) > 1:
            of_point = batch["dataset"][batch["view"]]
            sums_by(of_point, len(samplings), *features, teachers.widths)

    return lambda: [step(batch) for batch in batches]


def items_for_step(table, image_size, count):
    """`count` items of the table's frame as stage 1 gets them; its cameras take turns."""
    frames = Frames([table], "all", image_size, prepare, points="augmented")
    return [frames[divmod(number, len(frames))] for number in range(count)]


def mixture_table(tables, teachers, image_size, args, device):
    """Markdown: a mixture of two datasets against both alone, on the same views."""
    tables = [first_of(table) for table in tables]
    samplings = {table.name: table.sampling for table in tables}

    def mixed(first, second):
        """Two batches, each of a half of both datasets' items."""
        return [first[::2] + second[1::2], first[1::2] + second[::2]]

    # Data items: those of the mixture have other numbers
    alone = [Frames([table], "all", image_size, prepare) for table in tables]
    both = Frames(tables, "all", image_size, prepare)
    keys = [[(0, number % len(frames)) for number in range(args.batch)] for frames in alone]
    of_both = mixed(keys[0], [(0, both.first_item[1] + number) for _, number in keys[1]])

    def read(frames, batches):
        return [collate([frames[key] for key in batch]) for batch in batches]

    items = in_turns(f"two batches of {args.batch} data items", lambda: read(both, of_both),
                     [lambda: read(alone[0], keys[:1]), lambda: read(alone[1], keys[1:])],
                     args.repeats, "≤ 1.05")

    # Steps: the very same items
    views = [items_for_step(table, image_size, args.batch) for table in tables]
    alone = [step_of(teachers, {name: samplings[name]}, on(device, [of_one]), args, device)
             for name, of_one in zip(samplings, views)]
    for number, of_one in enumerate(views):
        for item in of_one:
            item["dataset"] = number
    both = step_of(teachers, samplings, on(device, mixed(*views)), args, device)
    steps = in_turns(f"two stage-1 steps, batch {args.batch}", both, alone, args.repeats,
                     "≤ 1.05", device)
    return markdown([items, steps], " and ".join(samplings), "mixed", "each alone")


def on(device, batches):
    """Batches on the device, of lists of items."""
    return [training.to_device(collate(items), device) for items in batches]


def teacher_table(encoders, table, image_size, args, device):
    """Markdown: two teachers against each alone, their features and a whole step of stage 1."""
    table = first_of(table)
    samplings = {table.name: table.sampling}
    batches = on(device, [items_for_step(table, image_size, args.batch)])
    several = [Teachers(encoders), *(Teachers([encoder]) for encoder in encoders)]

    @torch.no_grad()
    def features_of(teachers):
        with training.autocast(device, args.precision):
            teachers.features_at_pixels(batches[0])

    kinds = {"features": [lambda one=one: features_of(one) for one in several],
             "stage-1 step": [step_of(one, samplings, batches, args, device, head="mlp2")
                              for one in several]}
    rows = []
    for kind, (both, *alone) in kinds.items():
        row = in_turns(f"{kind}, batch {args.batch}", both, alone, args.repeats, "≤ 1.1", device)
        peaks = [peak_bytes(run, device) for run in (both, *alone)]
        memory = ("not run",) * 3
        if None not in peaks:
            pair = peaks[0], max(*peaks[1:], 1)
            memory = (*(f"{peak / 2**20:,.0f} MB" for peak in pair), f"{pair[0] / pair[1]:.2f}")
        rows.append(row._replace(more=(*memory, "≤ 1.15")))
    more = ("memory, both", "the larger alone", "ratio", "wanted")
    return markdown(rows, " and ".join(several[0].names), "both", "sum of each alone", more=more)


# ---- command line -------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__, prog="python -m experiments.bench_scalr")
    add = parser.add_argument
    add("--data",
        help="NAME=PATH, several with commas between (default: a small world of each is made in "
             "runs/bench-scalr; nuScenes' is, too, where it is not given)")
    add("--version", help="version folder of nuScenes (default: v1.0-trainval)")
    add("--encoder", nargs=2, metavar=("A", "B"),
        help="two image encoders, with random weights (default: "
             f"{' and '.join(PAIRS[1])} on a GPU, else {' and '.join(PAIRS[0])})")
    add("--channels", type=COUNT, default=256, help="width of WaffleIron (default: %(default)s)")
    add("--depth", type=COUNT, help=f"layers of WaffleIron (default: 48 on a GPU, else {FEW})")
    add("--batch", type=COUNT, help="camera views in a step (default: 8 on a GPU, else 2)")
    add("--repeats", type=COUNT, default=5,
        help="of each row at least, more where they take fewer seconds (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--out", help="the tables go to this file too")
    parser.set_defaults(seed=0)
    return parser.parse_args(argv)


def made(name):
    """Root of a small world in a dataset's layout: a training scene of two frames."""
    from miniature.world import DOMAINS, make_world
    world = "pandaset" if name.startswith("pandaset") else name
    sensors = dict(image_size=(900, 1600), cameras=6, azimuths=1080, lidar_fov=360)
    for refused in DOMAINS[world]["refused"]:
        sensors.pop(refused)
    return str(make_world(f"runs/bench-scalr/{world}", seed=0, workers=1, dataset=world,
                          train=(1, 0, 0), val=0, frames=2, **sensors))


def tables_of(args):
    """The tables of --data, nuScenes' first; of worlds that are made where they are not given."""
    found = entries(args.data) if args.data else [(name, made(name)) for name in NEW]
    found.sort(key=lambda entry: entry[0] != "nuscenes")
    if found[0][0] != "nuscenes":
        found.insert(0, ("nuscenes", made("nuscenes")))
    tables = open_tables(found, args.version, look=None, here=True)
    set_sampling(tables)
    return tables


@one_line_errors
def main(argv=None):
    args = parse(argv)
    start = time.time()
    device = training.start(args)
    on_gpu = device.type == "cuda"
    args.depth = args.depth or (48 if on_gpu else FEW)
    args.batch = args.batch or (8 if on_gpu else 2)
    args.precision = args.precision or ("bf16" if on_gpu else "fp32")
    args.encoder = args.encoder or PAIRS[on_gpu]
    encoders = [models.load_image_encoder(name, "random", careful=False).to(device)
                for name in args.encoder]
    image_size = Teachers(encoders).image_size(models.IMAGE_SIZE)
    tables = tables_of(args)
    parts = [hardware(device), item_table(tables, image_size, args.repeats),
             reading_table(tables, image_size, args.repeats)]
    pandaset = [table for table in tables if table.name in ("pandaset64", "pandasetgt")]
    parts += [pickle_table(table, args.repeats) for table in pandaset[:1]]
    others = [table for table in tables[1:] if "image" in table]
    parts.append(index_table(others, args.repeats))
    parts += [mixture_table([tables[0], table], Teachers(encoders[:1]), image_size, args, device)
              for table in others]
    parts.append(teacher_table(encoders, tables[0], image_size, args, device))
    parts.append(f"Encoders: {' and '.join(args.encoder)}, in the mixtures' steps the first alone; "
                 f"WI-{args.depth}-{args.channels}; precision: {args.precision}. At least "
                 f"{args.repeats} repetitions and {args.repeats} s of each row; "
                 f"{time.time() - start:.0f} s in all.")
    text = "\n\n".join(parts)
    print(text)
    if args.out:
        write_text(args.out, text + "\n")


if __name__ == "__main__":
    main()

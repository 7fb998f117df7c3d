"""What makes S3PT fast and small, each part against its slow, obvious twin in this file.

    # on a keyframe that it makes; on a real one; some rows alone
    python -m experiments.bench_s3pt
    python -m experiments.bench_s3pt --data /data/nuscenes --version v1.0-mini --out runs/s3pt.md
    python -m experiments.bench_s3pt --rows position-32 search

A twin and the code of s3pt/ work on the same numbers and take turns, in one thread. "times faster"
is the median and the range of the ratios of two neighbours in time. Memory is the peak as in
experiments/bench.py, above what the arguments need. "wanted" is what each should reach. Differences
are relative to their tensor's largest entry.

On a CPU, memory is of what is in use, and not of what the allocator keeps, with
MALLOC_MMAP_THRESHOLD_=65536 in the environment.
"""
import sys
import time
from copy import deepcopy
from typing import Callable, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import models
from experiments.bench import difference, hardware, peak_bytes
from experiments.bench_scalr import CPU, in_turns, made, markdown
from plumbing import training
from plumbing.arguments import COUNT, Distinct, Parser
from plumbing.atomic import write_text
from plumbing.errors import one_line_errors
from readers.files import decoded
from s3pt import crops, settings
from s3pt.clustering import (in_both_views, joint_clusters, members_of, nearest, objects_of,
                             position_cost, up_to_one)
from s3pt.depth import EMPTY, complete, map_size, projected
from s3pt.networks import neighbors_of, networks_of, stochastic_depth, taught, view_by_view
from s3pt.objectives import (Center, Prototypes, Target, crop_loss, move_teacher, object_loss,
                             parameter_groups, prototype_loss)
from s3pt.train import centers_of, clustering_of, pictures_of

# S3PT's sizes (Table 7), the batch of one GPU of 32
STEP = ["--encoder", "vit_small16", "--batch", "8"]
SIZES = {"images": 8, "tokens": 392,                          # N of two crops of 224 pixels
         "queries": 1_000, "stored": 80_000, "dim": 384,      # objects of a step and of the queue
         "rows": 600, "prototypes": 65_536, "bottleneck": 256}
TEMPERATURES = 0.1, 0.04  # of student and teacher


class Twins(NamedTuple):
    """The same work in two ways, and what is wanted of the second: how many times faster, smaller.

    plain and here return lists of tensors, which are compared unless `alike` is "-". in_float64:
    the same two in float64, to be compared in their place.
    """
    name: str
    plain: Callable
    here: Callable
    faster: str
    smaller: str = "-"
    alike: str = "-"
    device: torch.device = CPU
    note: str = ""
    in_float64: tuple = ()


def measure(twins, repeats):
    """The `Row` of the table."""
    differ = "-"
    if twins.alike != "-":
        plain, here = twins.in_float64 or (twins.plain, twins.here)
        differ = f"{difference(plain(), here()):.0e}"
    row = in_turns(twins.name, twins.plain, [twins.here], repeats, twins.faster, twins.device)
    peaks = [peak_bytes(run, twins.device) for run in (twins.plain, twins.here)]
    memory = ("not run",) * 3
    if None not in peaks:
        times = peaks[0] / max(peaks[1], 1)
        memory = (*(f"{peak / 2**20:,.0f} MB" for peak in peaks), f"{times:.1f}")
    return row._replace(more=(*memory, twins.smaller, differ, twins.alike))


def table(rows):
    """Markdown of the rows of `measure`."""
    more = ("memory, plain", "here", "times less", "wanted", "differ", "wanted")
    return markdown(rows, "", "time, plain", "here", "times faster (range)", more)


# ---- clustering ----------------------------------------------------------------------------------

def plain_position_cost(distances, assignment, count):
    """`position_cost` by the distance of each token to each member of each cluster."""
    members = members_of(assignment, count)                            # [B, N, M]
    between = distances.unsqueeze(3) * members.unsqueeze(1)            # [B, N, N, M]
    least = between.masked_fill_(between == 0, torch.inf).amin(2)      # [B, N, M]
    nobody = least.isinf()
    least = least.masked_fill(nobody, 0)
    mean = least.mean((1, 2), keepdim=True)
    return up_to_one(torch.where(nobody, mean, least))


def position_twins(args, clusters, faster, smaller):
    """The position cost of five rounds; before the first one a cluster is one token."""
    batch, joint = SIZES["images"], SIZES["tokens"]
    draw = torch.Generator().manual_seed(0)
    places = torch.rand(batch, joint, 2, generator=draw).to(args.device)
    distances = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    later = torch.randint(clusters, (4, batch, joint), generator=draw)
    first = torch.full_like(later[0], -1)
    first[:, :clusters] = torch.arange(clusters)
    rounds = torch.stack([first, *later]).to(args.device)  # [5, B, N]

    def run(cost):
        return [cost(distances, assignment, clusters) for assignment in rounds]

    return Twins(f"position cost, five rounds, N = {joint}, M = {clusters}, {batch} images",
                 lambda: run(plain_position_cost), lambda: run(position_cost), faster, smaller,
                 "equal", args.device)


def clustering_twins(args):
    """The whole clustering of a batch, and the step of s3pt/train.py that it is a part of.

    It is a step of the first epoch, which has no cross-image loss and no search in the queue: any
    other takes longer. The learning rate is 0.
    """
    given, pictures = setting(args)
    encoder, student = networks_of(given, args.device)
    teacher = deepcopy(student).requires_grad_(False)
    centers = centers_of(given).to(args.device)
    layers = [(getattr(student.head, name), getattr(teacher.head, name))
              for name in ("last_layer", "last_layer_c")]
    optimizer = torch.optim.AdamW(parameter_groups(student, given.weight_decay), lr=0.0)
    options, queue = clustering_of(given, encoder.row.dim, args.device)
    keys = [divmod(number, len(pictures)) for number in range(given.batch)]
    batch = training.to_device(crops.collate([pictures[key] for key in keys]), args.device)
    keep = stochastic_depth(batch["draws"], given.drop_path)
    images = view_by_view(encoder, batch["image"])

    def step():
        with training.autocast(args.device, None):
            seen = taught(teacher, images, batch, options)
            z, z_objects = student([images], keep, seen.assignment, seen.valid)
            neighbors, mask = neighbors_of(seen, teacher, queue, 0)
        loss, _ = crop_loss(z, seen.z, layers[0], centers[0], TEMPERATURES)
        of_objects, _ = object_loss(z_objects, seen.z_objects, neighbors, mask, layers[1],
                                    centers[1], TEMPERATURES)
        optimizer.zero_grad()
        (loss + of_objects).backward()
        optimizer.step()
        centers[0].update(seen.z, layers[0][1], TEMPERATURES[1])
        centers[1].update(seen.z_objects.flatten(0, 1), layers[1][1], TEMPERATURES[1])
        move_teacher(teacher, student, given.momentum)

    with torch.no_grad():
        _, tokens = teacher.look([images])

    def clustering():
        assignment = joint_clusters(tokens, batch["positions"], batch["start"], batch["depths"],
                                    options)
        valid = in_both_views(assignment, given.clusters)
        objects_of(tokens, assignment, given.clusters)[:, valid]
        return valid

    name = f"clustering against its step, {given.encoder}, batch {given.batch} (20 times: 5 %)"
    note = f"The step has {int(clustering().sum())} objects in each view."
    return Twins(name, step, clustering, "≥ 20", device=args.device, note=note)


# ---- the queue and the loss ----------------------------------------------------------------------

def search_twins(args):
    """The nearest stored object of each of a step's, and the same by all similarities at once."""
    draw = torch.Generator().manual_seed(0)
    count, stored, dim = (SIZES[name] for name in ("queries", "stored", "dim"))
    queries = torch.randn(count, dim, generator=draw).to(args.device)
    keys = torch.randn(stored, dim, generator=draw).to(args.device)

    def plain():
        similarities = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T  # [Q, K]
        return [similarities.argmax(1)]

    return Twins(f"neighbour search, {count:,} objects × {stored:,} stored, D = {dim}", plain,
                 lambda: [nearest(queries, keys)], "≥ 1", "≥ 8", "equal", args.device)


def plain_loss(z, points, weights, student, teacher, center):
    """`prototype_loss` of one target by softmax, log-softmax and product of all rows."""
    log_probabilities = F.log_softmax(student(z, TEMPERATURES[0]), dim=1)       # [R, K]
    target = center.targets(teacher(points, TEMPERATURES[1]), TEMPERATURES[1])  # [R, K]
    return -(weights * (target * log_probabilities).sum(1)).sum()


def fast_loss(z, points, weights, student, teacher, center):
    """The same by `prototype_loss`."""
    target = Target(points, weights, teacher, center, TEMPERATURES[1])
    return prototype_loss(z, student, TEMPERATURES[0], [target])[0]


def loss_twins(args):
    """The loss over prototypes, and its gradients for projections and prototypes."""
    count, prototypes, width = (SIZES[name] for name in ("rows", "prototypes", "bottleneck"))
    torch.manual_seed(0)
    points = F.normalize(torch.randn(2, count, width), dim=2).to(args.device)
    weights = torch.full((count,), 1 / count, device=args.device)
    student, teacher = (Prototypes(width, prototypes, vmf=True).to(args.device) for _ in range(2))
    teacher.requires_grad_(False)
    center = Center(prototypes, "probability").to(args.device)
    center.update(points[1], teacher, TEMPERATURES[1])
    given = [*points, weights, student, teacher, center]
    precise = [deepcopy(each).double() for each in given]

    def run(loss_of, z, *others):
        z.requires_grad_()
        loss = loss_of(z, *others)
        gradients = torch.autograd.grad(loss, [z, *others[2].parameters()])
        return [loss.detach(), *gradients]

    exact = run(plain_loss, *precise)
    distances = [difference(exact, run(loss_of, *given)) for loss_of in (plain_loss, fast_loss)]
    note = ("The loss and its gradients are compared in float64. In float32 they differ from those "
            f"by {distances[0]:.0e} (plain) and {distances[1]:.0e} (here), which is rounding.")
    return Twins(f"loss over {prototypes:,} prototypes, {count} rows, forward and backward",
                 lambda: run(plain_loss, *given), lambda: run(fast_loss, *given), "≥ 1", "≥ 3",
                 "≤ 1e-06", args.device, note,
                 (lambda: run(plain_loss, *precise), lambda: run(fast_loss, *precise)))


# ---- data ----------------------------------------------------------------------------------------

def setting(args):
    """The arguments of s3pt/train.py, and the pictures of --data's first frame as `Crops`."""
    data = ["--data", args.data or made("nuscenes")]
    version = ["--version", args.version] if args.version else []
    given = settings.parse(None, [*data, *version, "--limit", "1", "--out", "none", *STEP])
    encoder = models.load_image_encoder(given.encoder, "random", careful=False)
    pictures, _ = pictures_of(given, encoder)
    return given, pictures


def depth_twins(args):
    """IP-Basic on the scan of a keyframe, for all cameras, and the same at the pictures' size."""
    frame_table = setting(args)[1].tables[0]
    frame = frame_table.rows[0]
    scan = frame_table.reader.scan(frame_table.path("scan", frame))
    full, small = [], []
    for camera, raw_size in enumerate(frame_table["image_size"][frame]):
        place = [frame_table[name][frame, camera] for name in ("cam_from_lidar", "intrinsics")]
        full.append(projected(scan[:, :3], *place, raw_size, raw_size))
        small.append(projected(scan[:, :3], *place, raw_size, map_size(raw_size)))

    def run(maps):
        return [complete(sparse) for sparse in maps]

    # The pixels filled, of each camera
    shares = np.array([[(each > EMPTY).mean() for each in run(maps)] for maps in (full, small)])
    times = shares[1] / shares[0]
    note = (f"Pixels filled, of {len(full)} pictures: {shares[0].mean():.1%} at full size, "
            f"{shares[1].mean():.1%} at a quarter, {np.median(times):.1f} ({times.min():.1f}–"
            f"{times.max():.1f}) times as many; wanted ≥ 2.")
    rows, cols = small[0].shape
    return Twins(f"IP-Basic, {len(full)} maps of {rows} × {cols} against full size",
                 lambda: run(full), lambda: run(small), "≥ 6", note=note)


def plain_positions(raw_size, side):
    """`crops.token_positions` by two pictures whose pixels are their x and y, as CrIBo does it.

    They are made once; each crop is cut from them, resized and averaged over its patches. raw_size:
    (H, W) of the picture, or more. side: of a crop.
    """
    coordinates = [Image.fromarray(each.astype(np.float32)) for each in np.indices(raw_size)[::-1]]

    def positions(box, flipped, grid):
        pixels = [np.array(crops.cut(each, raw_size, box, side)) for each in coordinates]
        pixels = np.stack(pixels, -1)                   # [S, S, 2]
        pixels = pixels[:, ::-1] if flipped else pixels
        patches = pixels.reshape(grid[0], side // grid[0], grid[1], side // grid[1], 2)
        return patches.mean((1, 3)).reshape(-1, 2)      # [P, 2]

    return positions


def item_twins(args):
    """The data items of a frame, and the same of pictures that are decoded in full."""
    given, pictures = setting(args)
    frame_table = pictures.tables[0]
    raw_size = frame_table["image_size"][frame_table.rows].reshape(-1, 2).max(0)
    in_full = {"decoded": lambda path, least, size: decoded(path, size, size),
               "token_positions": plain_positions(raw_size, given.crop)}

    def here():
        return [pictures[0, number] for number in range(len(pictures))]

    def plain():
        with mock.patch.multiple(crops, **in_full):
            return here()

    items = list(zip(plain(), here()))
    places = torch.stack([(a["positions"] - b["positions"]).abs().amax(1) for a, b in items])
    levels = torch.stack([(a["image"].float() - b["image"].float()).abs() for a, b in items])
    note = (f"Positions of tokens differ by {places.max():.1g} pixels at most, {places.mean():.1g} "
            f"in the mean; crops by {levels.mean():.1f} of 255 levels in the mean, as they are of "
            "pictures at a part of their resolution.")
    height, width = raw_size
    return Twins(f"{len(items)} data items, two crops of {height} × {width}", plain, here, "≥ 2",
                 note=note)


# ---- command line --------------------------------------------------------------------------------

ROWS = {"position-128": lambda args: position_twins(args, 128, "≥ 50", "≥ 20"),
        "position-32": lambda args: position_twins(args, 32, "≥ 20", "≥ 10"),
        "search": search_twins, "loss": loss_twins, "depth": depth_twins, "item": item_twins,
        "clustering": clustering_twins}  # the last, as the allocator keeps much of its memory


def parse(argv=None):
    parser = Parser(__doc__, prog="python -m experiments.bench_s3pt")
    add = parser.add_argument
    add("--data",
        help="NAME=PATH of a dataset with pictures and scans, of which the first frame is taken (a "
             "bare path: nuscenes; default: a keyframe of its size is made in runs/bench-scalr)")
    add("--version", help="version folder of nuScenes (default: v1.0-trainval)")
    add("--rows", nargs="+", choices=ROWS, action=Distinct, default=list(ROWS), metavar="NAME",
        help=f"of the table (default: {' '.join(ROWS)})")
    add("--repeats", type=COUNT, default=3,
        help="of each row at least, more where they take fewer seconds (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--out", help="the table goes to this file too")
    parser.set_defaults(seed=0)
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    start = time.time()
    torch.set_num_threads(1)
    args.device = training.start(args)
    torch.backends.cudnn.allow_tf32 = False  # differences are to be those of float32
    rows, notes = [], []
    for name in args.rows:
        twins = ROWS[name](args)
        rows.append(measure(twins, args.repeats))
        notes.append(twins.note)
        print(f"{time.time() - start:4.0f} s:", table(rows[-1:]).splitlines()[-1], file=sys.stderr)

    gpu = "" if args.device.type == "cuda" else " On a GPU: not run."
    parts = [hardware(args.device), table(rows), *filter(None, notes),
             f"At least {args.repeats} repetitions and {args.repeats} s of each row; "
             f"{time.time() - start:.0f} s in all.{gpu}"]
    text = "\n\n".join(parts)
    print(text)
    if args.out:
        write_text(args.out, text + "\n")


if __name__ == "__main__":
    main()

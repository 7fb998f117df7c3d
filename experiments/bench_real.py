"""Where the time of a stage-1 step goes: the step of experiments/real.py, part by part.

    python miniature/world.py --dataset pandaset --out data/panda --seed 1
    python -m experiments.bench_real --data pandaset64=/data/pandaset,pandaset64=data/panda

A column for each entry of --data, a row for each part: milliseconds of this process's CPU time, in
one thread, so that programs beside it count little. They are medians over --steps steps of other
frames, at a learning rate of 0; the steps before, which warm up, do not count.
"""
import contextlib
import platform
import time
from collections import Counter
from statistics import median
from unittest import mock

import torch

import data
import models
import stage1
from data import Frames, collate, select
from distill import distillation_loss
from experiments import real
from plumbing import training
from plumbing.arguments import COUNT, Parser
from plumbing.errors import one_line_errors
from readers.table import entries, open_tables
from teachers import load_teachers

WARM_UP = 2  # steps
INSIDE = ("reading scans", "reading pictures")  # of the items' time
CPU = torch.device("cpu")


class Clock:
    """Adds up this process's CPU time by the name of a part: `times` {part: seconds}."""

    def __init__(self):
        self.times = Counter()

    @contextlib.contextmanager
    def part(self, name):
        start = time.process_time()
        yield
        self.times[name] += time.process_time() - start

    def around(self, name, function):
        """`function`, whose time is counted."""
        def timed(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)
        return timed


def step_parts(frames, keys, teachers, model, optimizer):
    """{part: seconds} of a stage-1 step on these items."""
    clock = Clock()
    reader = frames.tables[0].reader
    with mock.patch.object(data, "read_image", clock.around(INSIDE[1], data.read_image)), \
            mock.patch.object(reader, "scan", clock.around(INSIDE[0], reader.scan)), \
            clock.part("items"):
        items = [frames[key] for key in keys]
    with clock.part("batching"):
        batch = training.to_device(collate(items), CPU)
    with clock.part("image encoder, at the pixels"), torch.no_grad():
        pixel_features = teachers.features_at_pixels(batch)
    with clock.part("WaffleIron, forward"):
        point_features = model(batch)
    with clock.part("loss, backward"):
        loss = distillation_loss(pixel_features, point_features, "2d_to_3d", teachers.widths)
        optimizer.zero_grad()
        loss.backward()
    with clock.part("AdamW"):
        optimizer.step()
    times = dict(clock.times)
    # The items' time is taken apart
    own = times.pop("items") - sum(times[name] for name in INSIDE)
    return {name: times.pop(name) for name in INSIDE} | {"points, voxels, neighbours": own} | times


def measure(table, teachers, args):
    """{part: median milliseconds} of steps on a dataset's training frames; args: stage1.py's."""
    samplings = stage1.samplings_of(args, [table])
    backbone = models.backbone(args.backbone)
    frames = Frames(select([table], "train", args.conditions), args.cameras,
                    teachers.image_size(None), backbone.prepare, points="augmented")
    model = backbone.build(args, samplings, teachers.dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    batches = training.Batches(len(frames), args.batch, 0, WARM_UP + args.steps, args.seed)
    steps = [step_parts(frames, keys, teachers, model, optimizer) for keys in batches][WARM_UP:]
    return {part: 1000 * median(step[part] for step in steps) for part in steps[0]}


def markdown(columns, views):
    """The table of {heading: {part: milliseconds}}, with each part's share of the step."""
    lines = [f"| ms, a step of {views} views | {' | '.join(columns)} |",
             "|---|" + "---:|" * len(columns)]
    totals = [sum(parts.values()) for parts in columns.values()]
    for part in next(iter(columns.values())):
        cells = [f"{parts[part]:,.0f} ({parts[part] / total:.0%})"
                 for parts, total in zip(columns.values(), totals)]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    lines.append(f"| together | {' | '.join(f'{total:,.0f}' for total in totals)} |")
    return "\n".join(lines)


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="NAME=PATH of datasets with LiDAR and cameras, with commas")
    add("--encoder", default=real.ENCODER, help="(default: %(default)s)")
    add("--weights", help="file with the encoder's weights, or 'random' (default: the released)")
    add("--steps", type=COUNT, default=20, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    weights = ["--weights", args.weights] if args.weights else []
    step = stage1.parse(["--data", args.data, "--out", "-", "--encoder", args.encoder, *weights,
                         "--conditions", "all", *f"{real.STAGE1} --steps {args.steps}".split()])

    torch.set_num_threads(1)
    teachers = load_teachers(step, CPU)
    columns = {}
    for name, root in entries(args.data):
        (table,) = open_tables([(name, root)])
        columns[f"`{name}={root}`"] = measure(table, teachers, step)
    print(f"{platform.machine()}, one thread, PyTorch {torch.__version__}\n")
    print(markdown(columns, step.batch))


if __name__ == "__main__":
    main()

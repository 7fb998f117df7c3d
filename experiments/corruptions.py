"""Copies of a dataset with corrupted images or scans, and probes judged on them.

Collaborative-distillation paper, Table 6 (images: fog, Gaussian noise, left-right motion blur) and
Table B (LiDAR: Gaussian noise, density decrease, severities 1 and 2). From the repository's root:

    run="python -m experiments.corruptions"
    $run images runs/probe-base runs/probe-cd --severity 3                                # Table 6
    $run make --data DATA --out data/noisy --sensor lidar --corruption gaussian_noise
    python stage2.py --data data/noisy --stage1 runs/s1 --out runs/s2-noisy               # Table B
    $run make --data nuimages=DATA --out data/foggy --corruption fog
    $run show --data DATA --out runs/corruptions.png
    $run compare --data DATA --corruption low_light --like NIGHTS --out runs/low-light

`make` writes a corrupted copy of a dataset: a dataset like any other, whose corrupted frames are of
a condition of their own. experiments/copies.py says what a copy is, and how near its images come to
the corrupted ones. `images` makes copies of the validation split, evaluates each probe as eval.py
does, clean and on them, and writes the table to OUT.md and OUT.json; torchrun works too. `show`
draws one image under all corruptions. `compare` measures how near a corruption comes to folders of
real pictures, and draws both (experiments/likeness.py). experiments/degradations.py has the
corruptions, and says what each severity is.

Beside its corrupted copies a dataset that states no condition has no column of its own. `make
--corruption clean` writes a copy in which nothing is changed and all frames are of the condition
"clean".
"""
import functools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

import eval as evaluation
from experiments import likeness
from experiments.copies import ChangedImages, ChangedScans, Unchanged, write_copy
from experiments.degradations import IMAGES, SCANS, SENSORS, SEVERITIES
from experiments.figures import check_out
from models import IMAGE_SIZE
from plumbing import training
from plumbing.arguments import COUNT, SEED, WORKERS, Distinct, Parser, whole
from plumbing.atomic import write_json, write_text
from plumbing.errors import InputError, one_line_errors
from plumbing.fingerprint import digest
from plumbing.weights import load_checkpoint
from readers.conditions import is_name
from readers.files import read_image
from readers.table import entries, open_tables, spread
from results import cell, not_comparable

FORMAT = 1  # of a copy: count up when the same arguments give other files
TABLE_6 = ("fog", "gaussian_noise", "motion_blur")  # the paper's
CLEAN = "clean"  # of --corruption: nothing is changed


# ---- copies --------------------------------------------------------------------------------------

class How(NamedTuple):
    """How a dataset is corrupted."""
    sensor: str        # a key of SENSORS
    corruption: str    # a key of its corruptions, or CLEAN
    severity: int      # None for CLEAN
    image_size: tuple  # (H, W) in which images are corrupted; None for CLEAN
    seed: int
    condition: str     # of the corrupted frames
    split: tuple = ()  # names; () is all


def changed_by(how, table):
    """The images or scans of a table's frames as they are in a copy."""
    if how.corruption == CLEAN:
        return Unchanged(table)
    change = functools.partial(SENSORS[how.sensor][how.corruption], severity=how.severity)
    if how.sensor == "camera":
        require_images(table)
        return ChangedImages(table, change, how.image_size, how.seed)
    if "scan" not in table:
        raise InputError(f"--sensor lidar: {table.name} has no LiDAR scans")
    if table.name != "nuscenes":
        raise InputError("--sensor lidar: scans and labels are written as nuScenes has them, and "
                         f"{table.name} has them otherwise")
    return ChangedScans(table, change, how.corruption == "density_decrease", how.seed)


def require_images(table):
    """Raise InputError for a dataset without images."""
    if "image" not in table:
        raise InputError(f"--data {table.root}: {table.name} has no images")


def make_copy(table, version, out, how, workers):
    """Write a corrupted copy of a dataset, or take the one that is there."""
    # The frames: of the splits, and good ones; a copy links the others
    split = sorted(how.split or np.char.decode(np.unique(table["split"])).tolist())
    rows = np.concatenate([table.select(name, skip_bad=True).rows for name in split])
    if "bad" in table:
        rows = rows[table["bad"][rows] == b""]
    chosen = table.only(np.sort(rows))
    changed = changed_by(how, chosen)

    # What the copy is made from, and how
    made_by = {"format": FORMAT, "dataset": table.name, "data": table.root, "version": version}
    made_by |= chosen.fingerprint(labels=True) | how._asdict()
    made_by["files"] = chosen.files(labels=how.sensor == "lidar")
    made_by["split"] = split
    in_size = how.image_size if how.sensor == "camera" else None
    made_by["image_size"] = in_size and list(in_size)
    write_copy(changed, out, made_by, workers)


def make(args):
    """The command: one copy."""
    if args.corruption not in (CLEAN, *SENSORS[args.sensor]):
        raise InputError(f"--corruption {args.corruption}: --sensor {args.sensor} has "
                         f"{', '.join(SENSORS[args.sensor])}")
    condition = args.condition or args.corruption
    if not is_name(condition):
        raise InputError(f"--condition {condition}: letters, digits, _, - and spaces can be in a "
                         "name, and full is the column of all frames")
    table = only_table(args.data, args.version)
    how = How(args.sensor, args.corruption, args.severity, args.image_size, args.seed, condition,
              args.split)
    if args.corruption == CLEAN:  # whatever the others are, the copy is the same
        how = How("camera", CLEAN, None, None, None, condition, args.split)
    make_copy(table, args.version, args.out, how, args.workers)


def only_table(data, version):
    """The table of the one dataset that --data says. Raises InputError for several."""
    found = entries(data)
    if len(found) > 1:
        raise InputError(f"--data {data}: one dataset at a time")
    return open_tables(found, version)[0]


# ---- probes on corrupted images ------------------------------------------------------------------

def table(rows):
    """Markdown: a row for each probe, on the full split.

    In brackets stands the difference to the first probe of the same task, if they are comparable.

    rows: [{"run", "task" ("seg" or "depth"), "severity", "results"}], where the results are
    {"clean" or a corruption: what eval.evaluate returned}.
    """
    lines, notes = [], []
    for task, metric, heading, digits in (("seg", "mIoU", "mIoU [%], higher is better", 1),
                                          ("depth", "RMSE", "RMSE [m], lower is better", 2)):
        of_task = [row for row in rows if row["task"] == task]
        if not of_task:
            continue

        first = of_task[0]
        columns = list(first["results"])
        heading += f"; severity {first['severity']}"
        lines += ["", f"| {heading} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]

        for row in of_task:
            results = row["results"]
            reason = ""
            if row is not first:
                reason = not_comparable(results["clean"], first["results"]["clean"])
            if reason:
                notes.append(f"{row['run']} is not compared with {first['run']}: {reason}.")

            # A row has no differences if it is the first or cannot be compared with it
            base = {} if row is first or reason else first["results"]
            cells = []
            for name, result in results.items():
                cells.append(cell(result, metric, "full", digits, base.get(name)))
            lines.append(f"| {row['run']} | {' | '.join(cells)} |")
    if notes:
        lines += ["", *notes]
    return "\n".join(lines[1:])


def copies_for(path, args):
    """{corruption: --data of a probe's validation split under it}; copies go to args.copies."""
    probe = load_checkpoint(path, "probe")
    if probe["args"].get("val_scenes"):
        raise InputError(f"{path}: has --val-scenes; use `make`, then eval.py --data COPY")
    version = probe["args"]["version"]
    tables = open_tables(evaluation.data_given(args.data, evaluation.data_of(probe, path)),
                         version, look=None)
    height, width = probe["image_size"]
    data = {}
    for name in args.corruptions:
        how = How("camera", name, args.severity, (height, width), args.seed, name, ("val",))
        parts = []
        for table in tables:
            source = digest([table.root.encode(), str(version).encode()])[:8]
            out = Path(args.copies, f"{table.name}-{source}-{name}-{args.severity}-"
                                    f"{height}x{width}-seed{args.seed}")
            make_copy(table, version, out, how, args.workers)
            parts.append(f"{table.name}={out}")
        data[name] = ",".join(parts)
    return data


def evaluate_images(args):
    """The command: evaluate the probes clean and under args.corruptions, write the table."""
    device = training.start(args)
    args.probes = training.by_first_process(lambda: evaluation.probes_of(args.probes))
    tasks = [load_checkpoint(path, "probe")["task"] for path in args.probes]
    wrong = [f"{path} of --task {task}" for path, task in zip(args.probes, tasks)
             if task not in ("seg", "depth")]
    if wrong:
        raise InputError(f"images is for probes of --task seg or depth, not {', '.join(wrong)}")

    # Evaluate
    rows = []
    for path, task in zip(args.probes, tasks):
        results = {"clean": evaluation.evaluate(path, device, args.data, args.workers)}
        copies = training.by_first_process(functools.partial(copies_for, path, args))
        for name, data in copies.items():
            results[name] = evaluation.evaluate(path, device, data, args.workers)
        rows.append({"run": str(path), "task": task, "severity": args.severity, "seed": args.seed,
                     "results": results})

    # Write
    if training.rank() == 0:
        write_text(f"{args.out}.md", table(rows) + "\n")
        write_json(f"{args.out}.json", rows)
        print(f"{table(rows)}\n\nwritten: {args.out}.md, {args.out}.json")


# ---- the picture ---------------------------------------------------------------------------------

def draw(args):
    """The command: a row for each corruption; columns are clean and the severities."""
    check_out(args.out)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    table = only_table(args.data, args.version)
    require_images(table)
    if table.cameras and args.camera not in table.cameras:
        raise InputError(f"--camera {args.camera}: choose one of {', '.join(table.cameras)}")
    camera = table.cameras.index(args.camera) if table.cameras else 0
    if not 0 <= args.frame < len(table):
        raise InputError(f"--frame {args.frame}: there are frames 0 to {len(table) - 1}")

    # Draw
    height, width = args.image_size
    row_height = 2.95 * height / width + 0.1
    figure, axes = plt.subplots(len(IMAGES), 1 + len(SEVERITIES),
                                figsize=(18, row_height * len(IMAGES) + 0.4))
    clean = read_image(table.path("image", args.frame, camera), (height, width))
    for line, name in enumerate(IMAGES):
        axes[line, 0].imshow(clean.permute(1, 2, 0))
        axes[line, 0].set_ylabel(name.replace("_", " "), fontsize=15)
        for severity in SEVERITIES:
            how = How("camera", name, severity, (height, width), args.seed, name)
            image = changed_by(how, table).image(args.frame, camera)
            axes[line, severity].imshow(image.transpose(1, 2, 0))
    for column, axis in enumerate(axes[0]):
        axis.set_title(f"severity {column}" if column else "clean", fontsize=15)

    # Write
    plt.setp(axes.flat, xticks=[], yticks=[])
    figure.tight_layout(pad=0.5)
    figure.savefig(args.out, dpi=100)
    print(f"written: {args.out}")


# ---- beside real pictures ------------------------------------------------------------------------

def compare(args):
    """The command: a dataset's images clean, corrupted, and real pictures of the condition."""
    check_out(f"{args.out}.png")
    table = only_table(args.data, args.version)
    require_images(table)
    size = tuple(args.image_size)
    views = []
    for row in table.rows:
        if "bad" not in table or table["bad"][row] == b"":
            views += [(row, camera) for camera in range(table["image"].shape[1])]
    views = [views[n] for n in spread(np.arange(len(views)), args.limit)]

    # Groups of images: (name, images)
    groups = [(f"{table.name}, clean", [read_image(table.path("image", *view), size).numpy()
                                        for view in views])]
    for severity in SEVERITIES:
        changed = changed_by(How("camera", args.corruption, severity, size, args.seed, "x"), table)
        name = f"{args.corruption.replace('_', ' ')} {severity}"
        groups.append((name, [changed.image(*view) for view in views]))
    for folder in args.like:
        groups.append((folder.name, likeness.pictures_of(folder, size)))

    # Write: all of them as numbers, one severity in the picture
    text = likeness.table(groups)
    write_text(f"{args.out}.md", text + "\n")
    shown = [groups[0], groups[args.severity], *groups[1 + len(SEVERITIES):]]
    likeness.draw(shown, f"{args.out}.png")
    print(f"{text}\n\nwritten: {args.out}.md, {args.out}.png")


# ---- arguments -----------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__, prog="python -m experiments.corruptions")
    commands = parser.add_subparsers(dest="command", required=True)

    make_ = commands.add_parser("make", help="write a corrupted copy of a dataset")
    add = make_.add_argument
    add("--data", required=True, help="NAME=PATH of a reader (a bare path: nuscenes)")
    add("--out", required=True, type=Path, help="folder of the copy")
    add("--sensor", choices=SENSORS, default="camera", help="(default: %(default)s)")
    add("--corruption", choices=[*dict.fromkeys([*IMAGES, *SCANS]), CLEAN], required=True,
        help=f"camera: {', '.join(IMAGES)}; lidar, of nuScenes: {', '.join(SCANS)}; {CLEAN}: a "
             "copy in which nothing is changed")
    add("--split", nargs="+", action=Distinct, default=(),
        help="whose frames are corrupted (default: all splits)")
    add("--condition", help="of the corrupted frames (default: the corruption's name)")

    images = commands.add_parser("images", help="evaluate probes on corrupted images (Table 6)")
    add = images.add_argument
    add("probes", nargs="+", type=Path, help="folders that probe.py wrote, for seg or depth")
    add("--corruptions", nargs="+", action=Distinct, choices=IMAGES, default=TABLE_6,
        help=f"(default: the paper's, {' '.join(TABLE_6)})")
    add("--data", help="other frames to judge on, as for eval.py (default: the probe's)")
    add("--copies", default="runs/corrupted",
        help="folder of the corrupted copies, which stay there (default: %(default)s)")
    add("--out", default="runs/corruptions",
        help="the table goes to OUT.md and OUT.json (default: %(default)s)")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")

    show = commands.add_parser("show", help="draw one image under each corruption and severity")
    add = show.add_argument
    add("--data", required=True, help="NAME=PATH of a reader (a bare path: nuscenes)")
    add("--frame", type=whole(0), default=0, help="its number in the table (default: %(default)s)")
    add("--camera", default="CAM_FRONT", help="its channel (default: %(default)s)")
    add("--out", default="runs/corruptions.png", help="file of the picture (default: %(default)s)")

    compare_ = commands.add_parser("compare", help="measure and draw a corruption of images beside "
                                                   "real pictures of the condition")
    add = compare_.add_argument
    add("--data", required=True, help="NAME=PATH of a reader (a bare path: nuscenes)")
    add("--corruption", choices=IMAGES, required=True)
    add("--like", nargs="+", type=Path, action=Distinct, required=True,
        help="folders of real pictures (.jpg, .png)")
    add("--limit", type=COUNT, default=60,
        help="images of the dataset, evenly spread (default: %(default)s)")
    add("--out", default="runs/likeness",
        help="the table goes to OUT.md, the picture to OUT.png (default: %(default)s)")

    for command in (make_, images, show, compare_):
        command.add_argument("--seed", type=SEED, default=0,
                             help="of the corruptions (default: %(default)s)")
    for command in (make_, images, compare_):
        command.add_argument("--severity", type=int, choices=SEVERITIES, default=3,
                             help="(default: %(default)s, our choice); compare: of the picture")
    for command in (make_, images):
        command.add_argument("--workers", type=WORKERS, default=min(8, os.cpu_count() or 1),
                             help="data-loading processes (default: %(default)s)")
    for command in (make_, show, compare_):
        command.add_argument("--version", help="version folder (default: the reader's)")
        command.add_argument("--image-size", nargs=2, type=COUNT, default=IMAGE_SIZE,
                             metavar=("H", "W"),
                             help="that the encoder sees, in which images are corrupted "
                                  "(default: 224 448)")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    {"make": make, "images": evaluate_images, "show": draw, "compare": compare}[args.command](args)


if __name__ == "__main__":
    main()

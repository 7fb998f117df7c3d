"""Copies of a dataset with corrupted images or scans, and probes judged on them.

Collaborative-distillation paper, Table 6 (images: fog, Gaussian noise, left-right motion blur) and
Table B (LiDAR: Gaussian noise, density decrease, severities 1 and 2). From the repository's root:

    run="python -m experiments.corruptions"
    $run images runs/probe-base runs/probe-cd --severity 3                                # Table 6
    $run make --data DATA --out data/noisy --sensor lidar --corruption gaussian_noise
    python stage2.py --data data/noisy --stage1 runs/s1 --out runs/s2-noisy               # Table B
    $run make --data nuimages=DATA --out data/foggy --corruption fog
    $run show --data DATA --out runs/corruptions.png

`make` writes a corrupted copy of a dataset: a dataset like any other, whose corrupted frames are of
a condition of their own. experiments/copies.py says what a copy is, and how near its images come to
the corrupted ones. `images` makes copies of the validation split, evaluates each probe as eval.py
does, clean and on them, and writes the table to OUT.md and OUT.json; torchrun works too. `show`
draws one image under all corruptions.

Severity                     1      2      3      4      5
    fog, weight            1.5    2.0    2.5    2.5    3.0   of the fog; the image's is 1 [H]
    fog, decay             2.0    2.0    1.7    1.5    1.4   height / height at half the size [H]
    fog, grey              0.1    0.2    0.3    0.4    0.5   share of mid-grey mixed in [D]
    (image left in fog)   0.36   0.27   0.20   0.17   0.12   (1 - grey) / (1 + weight)
    gaussian_noise        0.08   0.12   0.18   0.26   0.38   standard deviation; white is 1 [H]
    motion_blur           0.01   0.02   0.03   0.04   0.05   path's length / image's width [D]
  LiDAR
    gaussian_noise        0.02   0.04   0.06   0.08   0.10   deviation of x, y and z in m [D]
    density_decrease      0.06   0.12   0.18   0.24   0.30   share of the points that go [D]

The paper corrupts as Dong et al. (CVPR 2023) [D] do, and does not say how severely images are
corrupted. The numbers are those of their public code, which uses ImageNet-C's (Hendrycks &
Dietterich, ICLR 2019) [H]. The code is ours and differs:
- Images are corrupted in the size that the encoder sees. Theirs are 1600x900 and shrink afterwards,
  which averages noise away: to 224x448 its standard deviation falls to 0.18 of what it was. Noise
  of one severity is that much harder here.
- Fog is fractal noise by FFT, theirs is by diamond-square. It is weighed against white, theirs
  against the image's brightest pixel. Like theirs it hides near and far alike: fog by depth would
  need the depth of every pixel.
- The path of motion blur is not rounded to whole pixels. The intensity of LiDAR gets no noise.
"""
import functools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import correlate1d

import eval as evaluation
from experiments.copies import ChangedImages, ChangedScans, write_copy
from models import IMAGE_SIZE
from plumbing import training
from plumbing.arguments import COUNT, SEED, WORKERS, Distinct, Parser, whole
from plumbing.atomic import write_json, write_text
from plumbing.errors import InputError, one_line_errors
from plumbing.fingerprint import digest
from plumbing.weights import load_checkpoint
from readers.conditions import is_name
from readers.files import read_image
from readers.table import entries, open_tables
from results import cell, not_comparable

FORMAT = 1  # of a copy: count up when the same arguments give other files
SEVERITIES = (1, 2, 3, 4, 5)


# ---- images: uint8 [3, H, W], severity 1..5, rng -> uint8 [3, H, W] ------------------------------

def fog(image, severity, rng):
    """Fog whose brightness is fractal_noise, with less contrast and paler colours behind it."""
    weight = (1.5, 2.0, 2.5, 2.5, 3.0)[severity - 1]
    decay = (2.0, 2.0, 1.7, 1.5, 1.4)[severity - 1]
    grey = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    _, height, width = image.shape
    haze = fractal_noise(height, width, decay, rng)
    image = (image / 255 + weight * haze) / (1 + weight)
    return _as_bytes((1 - grey) * image + grey * 0.5)


def gaussian_noise(image, severity, rng):
    """Independent noise on each pixel and channel, cut at black and white."""
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return _as_bytes(image / 255 + deviation * rng.standard_normal(image.shape))


def motion_blur(image, severity, rng=None):
    """The mean along a horizontal path centred on each pixel. Nothing is random.

    The border's pixels go on beyond the border.
    """
    length = (0.01, 0.02, 0.03, 0.04, 0.05)[severity - 1] * image.shape[2]  # pixels, fractional
    reach = int(np.ceil(max(0, length - 1) / 2))
    distance = np.abs(np.arange(-reach, reach + 1))
    weights = np.clip(length / 2 + 0.5 - distance, 0, 1)  # the part of each pixel on the path
    return _as_bytes(correlate1d(image / 255, weights / weights.sum(), axis=2, mode="nearest"))


def fractal_noise(height, width, decay, rng):
    """A random field [height, width] from 0 to 1.

    Structures of half the size are 1 / decay as high.
    """
    side = max(height, width)
    down, right = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
    frequency = side * np.hypot(down, right)  # cycles per side; [side, side // 2 + 1]
    frequency[0, 0] = 1
    # In 2-D, a spectrum of 1 / frequency makes structures of all sizes equally high
    falloff = frequency ** (1 + np.log2(decay))
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) / falloff
    field = np.fft.irfft2(spectrum, (side, side))[:height, :width]
    return (field - field.min()) / np.ptp(field)


def _as_bytes(image):
    return (255 * image).round().clip(0, 255).astype(np.uint8)


# ---- LiDAR: [N, C >= 4] (x, y, z [m], intensity, ...), severity 1..5, rng -> [M, C] --------------

def jitter(scan, severity, rng):
    """Gaussian noise on the coordinates; a point's pixel moves with it. M = N."""
    deviation = (0.02, 0.04, 0.06, 0.08, 0.10)[severity - 1]
    noise = deviation * rng.standard_normal((len(scan), 3))
    return np.column_stack([scan[:, :3] + noise, scan[:, 3:]]).astype(scan.dtype)


def thin_out(scan, severity, rng):
    """Random points of the whole scan go, the others keep their order.

    A higher severity drops the points of a lower one and more. What is drawn depends on the number
    of rows alone, so the same rng drops the labels of the same points.
    """
    share = (0.06, 0.12, 0.18, 0.24, 0.30)[severity - 1]
    kept = rng.permutation(len(scan))[round(share * len(scan)):]
    return scan[np.sort(kept)]


IMAGES = {"fog": fog, "gaussian_noise": gaussian_noise, "motion_blur": motion_blur}
SCANS = {"gaussian_noise": jitter, "density_decrease": thin_out}
SENSORS = {"camera": IMAGES, "lidar": SCANS}


# ---- copies --------------------------------------------------------------------------------------

class How(NamedTuple):
    """How a dataset is corrupted."""
    sensor: str        # a key of SENSORS
    corruption: str    # a key of its corruptions
    severity: int
    image_size: tuple  # (H, W) in which images are corrupted
    seed: int
    condition: str     # of the corrupted frames
    split: tuple = ()  # names; () is all


def changed_by(how, table):
    """The images or scans of a table's frames as they are in a copy."""
    change = functools.partial(SENSORS[how.sensor][how.corruption], severity=how.severity)
    if how.sensor == "camera":
        return ChangedImages(table, change, how.image_size, how.seed)
    if "scan" not in table:
        raise InputError(f"--sensor lidar: {table.name} has no LiDAR scans")
    if table.name != "nuscenes":
        raise InputError("--sensor lidar: scans and labels are written as nuScenes has them, and "
                         f"{table.name} has them otherwise")
    return ChangedScans(table, change, how.corruption == "density_decrease", how.seed)


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
    made_by["image_size"] = list(how.image_size) if how.sensor == "camera" else None
    write_copy(changed, out, made_by, workers)


def make(args):
    """The command: one copy."""
    if args.corruption not in SENSORS[args.sensor]:
        raise InputError(f"--corruption {args.corruption}: --sensor {args.sensor} has "
                         f"{', '.join(SENSORS[args.sensor])}")
    condition = args.condition or args.corruption
    if not is_name(condition):
        raise InputError(f"--condition {condition}: letters, digits, _, - and spaces can be in a "
                         "name, and full is the column of all frames")
    table = only_table(args.data, args.version)
    how = How(args.sensor, args.corruption, args.severity, args.image_size, args.seed, condition,
              args.split)
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
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    table = only_table(args.data, args.version)
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
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100)
    print(f"written: {args.out}")


# ---- arguments -----------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__, prog="python -m experiments.corruptions")
    commands = parser.add_subparsers(dest="command", required=True)

    make_ = commands.add_parser("make", help="write a corrupted copy of a dataset")
    add = make_.add_argument
    add("--data", required=True, help="NAME=PATH of a reader (a bare path: nuscenes)")
    add("--out", required=True, type=Path, help="folder of the copy")
    add("--sensor", choices=SENSORS, default="camera", help="(default: %(default)s)")
    add("--corruption", choices=[*IMAGES, *(name for name in SCANS if name not in IMAGES)],
        required=True, help=f"camera: {', '.join(IMAGES)}; lidar, of nuScenes: {', '.join(SCANS)}")
    add("--split", nargs="+", action=Distinct, default=(),
        help="whose frames are corrupted (default: all splits)")
    add("--condition", help="of the corrupted frames (default: the corruption's name)")

    images = commands.add_parser("images", help="evaluate probes on corrupted images (Table 6)")
    add = images.add_argument
    add("probes", nargs="+", type=Path, help="folders that probe.py wrote, for seg or depth")
    add("--corruptions", nargs="+", action=Distinct, choices=IMAGES, default=list(IMAGES),
        help="(default: all)")
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

    for command in (make_, images, show):
        command.add_argument("--seed", type=SEED, default=0,
                             help="of the corruptions (default: %(default)s)")
    for command in (make_, images):
        command.add_argument("--severity", type=int, choices=SEVERITIES, default=3,
                             help="(default: %(default)s, our choice)")
        command.add_argument("--workers", type=WORKERS, default=min(8, os.cpu_count() or 1),
                             help="data-loading processes (default: %(default)s)")
    for command in (make_, show):
        command.add_argument("--version", help="version folder (default: the reader's)")
        command.add_argument("--image-size", nargs=2, type=COUNT, default=IMAGE_SIZE,
                             metavar=("H", "W"),
                             help="that the encoder sees, in which images are corrupted "
                                  "(default: 224 448)")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    {"make": make, "images": evaluate_images, "show": draw}[args.command](args)


if __name__ == "__main__":
    main()

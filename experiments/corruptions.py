"""Corrupted images for a probe's evaluation, and corrupted point clouds for stage 2.

Collaborative-distillation paper, Table 6 (images: fog, Gaussian noise, left-right motion blur) and
Table B (LiDAR: Gaussian noise, density decrease, severities 1 and 2). From the repository's root:

    python -m experiments.corruptions images runs/probe-base runs/probe-cd --severity 3
    python -m experiments.corruptions lidar gaussian_noise --severity 1 -- FLAGS-OF-STAGE2
    python -m experiments.corruptions show --data DATA --out runs/corruptions.png

`images` evaluates each probe as eval.py does, clean and under each corruption, and writes the table
to OUT.md and OUT.json; torchrun works too. `lidar` is stage2.py on corrupted clouds, with the flags
that come after `--`; probe.py and eval.py follow as for any encoder. `show` draws one image under
all corruptions.

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
import sys
from pathlib import Path

import numpy as np
from scipy.ndimage import correlate1d

import eval as evaluation
import stage2
from data import Frames
from plumbing import training
from plumbing.arguments import COUNT, SEED, WORKERS, Distinct, Parser, whole
from plumbing.atomic import write_json, write_text
from plumbing.errors import InputError, one_line_errors
from plumbing.weights import load_checkpoint
from readers.nuscenes import load_index

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


# ---- LiDAR: [N, 4] (x, y, z [m], intensity), severity 1..5, rng -> [M, 4] ------------------------

def jitter(scan, severity, rng):
    """Gaussian noise on the coordinates; a point's pixel moves with it. M = N."""
    deviation = (0.02, 0.04, 0.06, 0.08, 0.10)[severity - 1]
    noise = deviation * rng.standard_normal((len(scan), 3))
    return np.column_stack([scan[:, :3] + noise, scan[:, 3]]).astype(scan.dtype)


def thin_out(scan, severity, rng):
    """Random points of the whole scan go, the others keep their order.

    A higher severity drops the points of a lower one and more.
    """
    share = (0.06, 0.12, 0.18, 0.24, 0.30)[severity - 1]
    kept = rng.permutation(len(scan))[round(share * len(scan)):]
    return scan[np.sort(kept)]


# ---- frames --------------------------------------------------------------------------------------

IMAGES = {"fog": fog, "gaussian_noise": gaussian_noise, "motion_blur": motion_blur}
SCANS = {"gaussian_noise": jitter, "density_decrease": thin_out}


class _Corrupted(Frames):
    """Args: those of Frames; corruption, a key of IMAGES or SCANS; severity 1..5; noise_seed."""

    def __init__(self, *args, corruption, severity, noise_seed=0, **options):
        super().__init__(*args, **options)
        self.corruption = corruption
        self.severity = severity
        self.noise_seed = noise_seed


class CorruptedImages(_Corrupted):
    """Frames whose images are corrupted after resizing.

    The corruption of an image is a function of (noise_seed, frame, camera), the same in each epoch.
    """

    def image(self, frame, camera):
        rng = np.random.default_rng((self.noise_seed, frame, camera))
        return IMAGES[self.corruption](super().image(frame, camera), self.severity, rng)


class CorruptedScans(_Corrupted):
    """Frames whose LiDAR scans are corrupted. They have no labels.

    The corruption of a scan is a function of (noise_seed, frame), the same in each epoch.
    """

    def scan(self, frame):
        if self.labels:
            raise InputError("corrupted scans have no labels; LiDAR is corrupted for stage 2 only")
        rng = np.random.default_rng((self.noise_seed, frame))
        return SCANS[self.corruption](super().scan(frame), self.severity, rng)


# ---- the three commands --------------------------------------------------------------------------

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
                reason = evaluation.not_comparable(results["clean"], first["results"]["clean"])
            if reason:
                notes.append(f"{row['run']} is not compared with {first['run']}: {reason}.")

            # A row has no differences if it is the first or cannot be compared with it
            base = {} if row is first or reason else first["results"]
            cells = []
            for name, result in results.items():
                cells.append(evaluation.cell(result, metric, "full", digits, base.get(name)))
            lines.append(f"| {row['run']} | {' | '.join(cells)} |")
    if notes:
        lines += ["", *notes]
    return "\n".join(lines[1:])


def evaluate_images(args):
    """Evaluate the probes clean and under args.corruptions; print and write the table."""
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
        for name in args.corruptions:
            dataset = functools.partial(CorruptedImages, corruption=name, severity=args.severity,
                                        noise_seed=args.seed)
            results[name] = evaluation.evaluate(path, device, args.data, args.workers,
                                                dataset=dataset)
        rows.append({"run": str(path), "task": task, "severity": args.severity, "seed": args.seed,
                     "results": results})

    # Write
    if training.rank() == 0:
        write_text(f"{args.out}.md", table(rows) + "\n")
        write_json(f"{args.out}.json", rows)
        print(f"{table(rows)}\n\nwritten: {args.out}.md, {args.out}.json")


def train_stage2(args):
    """stage2.main(args.stage2) on corrupted clouds.

    The corruption is among the run's arguments, so that a run of another one is not resumed.
    """
    if not args.stage2:
        raise InputError("lidar: the arguments of stage2.py are missing; they come after --")
    chosen = {"corruption": args.corruption, "severity": args.severity, "noise_seed": args.seed}
    stage2.main(args.stage2, dataset=functools.partial(CorruptedScans, **chosen), **chosen)


def draw(args):
    """Write the picture: a row for each corruption; columns are clean and the severities."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    index = load_index(args.data, args.version)
    if args.camera not in index.cameras:
        raise InputError(f"--camera {args.camera}: choose one of {', '.join(index.cameras)}")
    if not 0 <= args.frame < len(index.lidar):
        raise InputError(f"--frame {args.frame}: there are frames 0 to {len(index.lidar) - 1}")

    # The image as it is
    height, width = args.image_size
    place = (index, [args.frame], args.camera, (height, width))
    view = (args.frame, index.cameras.index(args.camera))
    clean = Frames(*place).image(*view)

    # Draw
    row_height = 2.95 * height / width + 0.1
    figure, axes = plt.subplots(len(IMAGES), 1 + len(SEVERITIES),
                                figsize=(18, row_height * len(IMAGES) + 0.4))
    for line, name in enumerate(IMAGES):
        axes[line, 0].imshow(clean.transpose(1, 2, 0))
        axes[line, 0].set_ylabel(name.replace("_", " "), fontsize=15)
        for severity in SEVERITIES:
            frames = CorruptedImages(*place, corruption=name, severity=severity,
                                     noise_seed=args.seed)
            axes[line, severity].imshow(frames.image(*view).transpose(1, 2, 0))
    for column, axis in enumerate(axes[0]):
        axis.set_title(f"severity {column}" if column else "clean", fontsize=15)

    # Write
    plt.setp(axes.flat, xticks=[], yticks=[])
    figure.tight_layout(pad=0.5)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100)
    print(f"written: {args.out}")


# ---- arguments -----------------------------------------------------------------------------------

def parse(argv):
    parser = Parser(__doc__, prog="python -m experiments.corruptions")
    commands = parser.add_subparsers(dest="command", required=True)

    images = commands.add_parser("images", help="evaluate probes on corrupted images (Table 6)")
    add = images.add_argument
    add("probes", nargs="+", type=Path, help="folders that probe.py wrote, for seg or depth")
    add("--corruptions", nargs="+", action=Distinct, choices=IMAGES, default=list(IMAGES),
        help="(default: all)")
    add("--data", help="nuScenes root (default: the probe's)")
    add("--out", default="runs/corruptions",
        help="the table goes to OUT.md and OUT.json (default: %(default)s)")
    add("--workers", type=WORKERS, default=min(8, os.cpu_count() or 1),
        help="data-loading processes (default: %(default)s)")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")

    lidar = commands.add_parser("lidar", help="stage 2 on corrupted clouds (Table B)",
                                epilog="Then --, stage2.py's arguments.")
    lidar.add_argument("corruption", choices=SCANS)

    show = commands.add_parser("show", help="draw one image under each corruption and severity")
    add = show.add_argument
    add("--data", required=True, help="nuScenes root")
    add("--version", default="v1.0-trainval",
        help="version folder of the root (default: %(default)s)")
    add("--frame", type=whole(0), default=0, help="its number in the index (default: %(default)s)")
    add("--camera", default="CAM_FRONT", help="its channel (default: %(default)s)")
    add("--image-size", nargs=2, type=COUNT, default=(224, 448), metavar=("H", "W"),
        help="(default: 224 448)")
    add("--out", default="runs/corruptions.png", help="file of the picture (default: %(default)s)")

    for command in (images, lidar, show):
        command.add_argument("--seed", type=SEED, default=0,
                             help="of the corruptions (default: %(default)s)")
    for command in (images, lidar):
        command.add_argument("--severity", type=int, choices=SEVERITIES, default=3,
                             help="(default: %(default)s, our choice)")

    # What comes after -- is for stage2.py
    end = len(argv)
    if argv[:1] == ["lidar"] and "--" in argv:
        end = argv.index("--")
    args = parser.parse_args(argv[:end])
    args.stage2 = argv[end + 1:]
    return args


@one_line_errors
def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else list(argv))
    commands = {"images": evaluate_images, "lidar": train_stage2, "show": draw}
    commands[args.command](args)


if __name__ == "__main__":
    main()

"""The papers' pictures of features, predictions and point clouds, as PNGs up to 7 inches wide at 300 dots an inch.

    python -m experiments.visualize pca --encoders dinov2_vits14_reg runs/s2 --data /data/nuscenes      # CD Fig. 4
    python -m experiments.visualize tsne --encoders dinov2_vits14 runs/s2 --data /data/nuscenes         # CD Fig. 3 and C.2
    python -m experiments.visualize depth runs/probe-depth runs/probe-depth-cd                          # CD Fig. A
    python -m experiments.visualize segmentation runs/probe-seg runs/probe-seg-cd                       # CD Fig. B
    python -m experiments.visualize correlation --encoder runs/s1 --data /data/nuscenes                 # ScaLR Fig. 1
    python -m experiments.visualize prototypes --encoder runs/s1 --data /data/nuscenes                  # ScaLR Fig. 3

CD is the collaborative-distillation paper. All are of the validation split; the same arguments give the same picture.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colors, patches, rc_context
from matplotlib.figure import Figure  # without pyplot: no window, no list of open figures
from sklearn import manifold, metrics

import training
from plumbing.arguments import COUNT, SEED, Distinct, Parser, real, whole
from data import CLOUD, DEPTHS, Frames, collate
from distill import sample_features
from errors import InputError, one_line_errors
from eval import NOT_AT_NIGHT, confusion_matrix, data_of, depth_sums, load_probe, mean_iou, rmse, say_other_frames
from plumbing.fingerprint import with_files
from index import CLASSES, CONDITIONS, load_index
from models import ENCODERS, IMAGE_SIZE, load_image_encoder
from waffleiron import load_waffleiron

STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.titlepad": 3, "image.interpolation": "nearest", "legend.frameon": False,
         "legend.handlelength": 1.2, "savefig.dpi": 300, "savefig.bbox": "tight", "savefig.pad_inches": 0.03}
LEGEND, BAR = dict(loc="outside lower center"), dict(shrink=0.9, pad=0.01, aspect=30)
COLORS = colors.ListedColormap([f"#{rgb}" for rgb in (  # of CLASSES, to be told apart: nuScenes' own has five oranges
    "000000 42d4f4 b39ddb ffe119 f58231 9a6324 f032e6 e6194b 000075 "
    "fabed4 800000 808080 bfef45 911eb4 aaffc3 c4ac78 2e9e44").split()])
MARKERS = {"day-clear": ("#e69f00", "o"), "night": ("#0b2a6f", "^")}  # of t-SNE; forms, for prints in grey
YELLOW, ENOUGH = (1, 1, 0), 5  # colour of a class's points, and how many of them a scan must have


def grid(rows, columns, aspect, **more):
    """A figure, 7 inches wide as a page's text, and its axes [rows, columns], each `aspect` times as high as wide."""
    figure = Figure((7, rows * (7 / max(2, columns) * aspect + 0.16) + 0.55), layout="compressed")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


# ---- images -------------------------------------------------------------------------------------------------------------

def views(index, size, count=1, **options):
    """Items of `Frames`: `count` validation views of each condition that is there, first camera, spread evenly over its frames."""
    there = [CONDITIONS[n] for n in np.unique(index.condition[index.select("val")])]
    each = [Frames(index, index.select("val", [name], count), index.cameras[0], size, **options) for name in there]
    return [frames[0, number] for frames in each for number in range(len(frames))]


def pca_colours(maps):
    """Feature maps as colours by one PCA over all encoders and images.

    Features are L2-normalised first: directions are what the distillation compares. There is one mean and one scale (percentiles
    2 to 98) for all encoders, so equal features have equal colours, and one whose features moved as a whole is seen to have moved.
    Args: maps, a list per encoder of [D, h, w], one per image.
    Returns: a list per encoder of colours [h, w, 3] in [0, 1]; for each encoder the share of its variance that they show.
    """
    rows = [F.normalize(torch.cat([m.flatten(1).T for m in own]).double(), dim=1) for own in maps]  # each [N, D]
    mean = torch.cat(rows).mean(0)
    directions = torch.linalg.eigh(sum((r - mean).T @ (r - mean) for r in rows))[1][:, -3:].flip(1)  # [D, 3], the largest first
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()  # else the sign is by chance
    parts = [(r - mean) @ directions for r in rows]
    low, high = np.quantile(torch.cat(parts).numpy(), [0.02, 0.98], axis=0)
    coloured = [[((part.view(*m.shape[1:], 3).numpy() - low) / (high - low)).clip(0, 1)
                 for part, m in zip(of_cells.split([m[0].numel() for m in own]), own)] for of_cells, own in zip(parts, maps)]
    return coloured, [(p.var(0).sum() / r.var(0).sum()).item() for p, r in zip(parts, rows)]


@torch.no_grad()
def figure_pca(items, encoders, titles):
    """CD Fig. 4. A row per item of `views`: the image, and the PCA colours of its feature map [D, h, w] in each encoder."""
    if len({encoder.dim for encoder in encoders}) > 1:
        raise InputError(f"--encoders: one PCA needs features of one width, not {', '.join(str(e.dim) for e in encoders)}")
    maps = [[encoder(item["image"][None].to(encoder.mean.device) / 255)[0].cpu() for item in items] for encoder in encoders]
    (_, height, width), (colours, shares) = items[0]["image"].shape, pca_colours(maps)
    figure, axes = grid(len(items), 1 + len(encoders), height / width, subplot_kw=dict(xticks=[], yticks=[]))
    for line, item, *pictures in zip(axes, items, *colours):
        for axis, picture in zip(line, (item["image"].permute(1, 2, 0).numpy(), *pictures)):
            axis.imshow(picture)
        line[0].set_ylabel(CONDITIONS[item["condition"]])
    for axis, head in zip(axes[0], ["image", *(f"{t}\n{100 * s:.0f} % of its variance shown" for t, s in zip(titles, shares))]):
        axis.set_title(head)
    figure.supxlabel("red, green, blue: the three principal components of all feature maps together", fontsize="medium")
    return figure


@torch.no_grad()
def image_features(encoder, images):
    """A feature per image, [B, 3, H, W] in [0, 1] to [B, D]: a ViT's [CLS] token after the final norm, a ResNet's pooled map."""
    if not encoder.row.vit:
        return encoder(images).mean((2, 3))
    vit, x = encoder.backbone, (images - encoder.mean) / encoder.std
    rotation = None if vit.grid else vit.rope_embed(*(side // vit.patch_size for side in images.shape[2:]))
    x = vit.embed(x)
    for block in vit.blocks:
        x = block(x, rotation)
    return vit.norm(x[:, 0])


def figure_tsne(features, titles, seed=0):
    """CD Fig. 3. A panel per encoder: t-SNE of its images' L2-normalised features, a list of {condition in MARKERS: [N, D]}.

    Its title has the silhouette score of the conditions in the features' own space: 1 for tight clusters apart, 0 for one cluster.
    """
    figure, axes = grid(1, len(features), 1, subplot_kw=dict(xticks=[], yticks=[], box_aspect=1))
    for axis, parts, title in zip(axes[0], features, titles):
        rows = F.normalize(torch.cat(list(parts.values())).double(), dim=1).numpy()
        names = np.repeat(list(parts), [len(part) for part in parts.values()])
        places = manifold.TSNE(perplexity=min(30, (len(rows) - 1) / 3), random_state=seed % 2**32).fit_transform(rows)  # [N, 2]
        for name, (color, marker) in MARKERS.items():
            axis.scatter(*places[names == name].T, s=18, c=color, marker=marker, linewidths=0.3, edgecolors="white",
                         label=f"{name}, {len(parts[name])} images")
        axis.set_title(f"{title}\nsilhouette score {metrics.silhouette_score(rows, names):.2f}")
    figure.legend(handles=axis.collections, ncols=2, **LEGEND)
    return figure


# ---- probes -------------------------------------------------------------------------------------------------------------

def judge(task, outputs, item, size):
    """One image's metric as eval.py has it, at the LiDAR points, from a probe's outputs [1, C, h, w]: "mIoU 50.0 %"."""
    image = torch.zeros(len(item["pixels"]), dtype=torch.long)
    points = sample_features(outputs, item["pixels"], image, size)  # [N, C]; the head is affine, so it may come first
    if task == "depth":
        return f"RMSE {rmse(depth_sums(points[:, 0], item['depths'], image, 1))[0]:.2f} m"
    chosen, night = item["labels"] > 0, CONDITIONS[item["condition"]] == "night"
    confusion = confusion_matrix(points[chosen].argmax(1), item["labels"][chosen] - 1, len(CLASSES) - 1)
    return f"mIoU {100 * mean_iou(confusion, [CLASSES.index(name) - 1 for name in NOT_AT_NIGHT] if night else ()):.1f} %"


@torch.no_grad()
def figure_probes(task, items, probes, titles):
    """CD Fig. A (task "depth") and B ("seg"). A row per item of `views`: image, LiDAR points, each probe's prediction everywhere.

    probes: a list of (encoder, head). Outputs are up-sampled bilinearly before the class is decided. Above a prediction stands
    the image's own metric: RMSE, or mIoU over the classes that are there or predicted.
    """
    (_, *size), depth, present = items[0]["image"].shape, task == "depth", set()
    figure, axes = grid(len(items), 2 + len(probes), size[0] / size[1], subplot_kw=dict(xticks=[], yticks=[]))
    norm = colors.LogNorm(2, DEPTHS[1]) if depth else colors.Normalize(0, COLORS.N - 1)
    how = dict(cmap="turbo_r" if depth else COLORS, norm=norm)
    for line, item in zip(axes, items):
        image, truth = item["image"].permute(1, 2, 0).numpy(), item["depths" if depth else "labels"].numpy()
        line[0].imshow(image)
        line[0].set_ylabel(CONDITIONS[item["condition"]])
        line[1].imshow(150 + 0.4 * image.mean(2), cmap="gray", vmin=0, vmax=255)  # pale, for the points to stand out
        line[1].autoscale(False)
        line[1].scatter(*item["pixels"].numpy()[truth > 0, ::-1].T, s=1.5, linewidths=0, c=truth[truth > 0], **how)
        present |= set(truth[truth > 0].tolist())
        for axis, (encoder, head) in zip(line[2:], probes):
            maps = encoder(item["image"][None].to(encoder.mean.device) / 255)  # [1, D, h, w]
            outputs = head(maps[0].flatten(1).T).T.unflatten(1, maps.shape[2:])[None].cpu()  # [1, C, h, w]
            dense = F.interpolate(outputs, size=size, mode="bilinear", align_corners=True)[0]  # [C, H, W]
            values = (dense[0].clamp(*DEPTHS) if depth else dense.argmax(0) + 1).numpy()
            drawn = axis.imshow(values, **how)
            axis.set_title(judge(task, outputs, item, size))
            present |= set(values.ravel().tolist())
    for axis, title in zip(axes[0], ["image", "LiDAR points", *titles]):
        axis.set_title(f"{title}\n{axis.get_title()}".strip())
    if depth:
        figure.colorbar(drawn, ax=axes, label="depth [m]", ticks=(2, 5, 10, 20, 40, 80), format="%d", **BAR).minorticks_off()
    else:
        handles = [patches.Patch(color=COLORS(n), label=CLASSES[n].replace("_", " ")) for n in sorted(present)]
        figure.legend(handles=handles, ncols=6, **LEGEND)
    return figure


# ---- point clouds ---------------------------------------------------------------------------------------------------------

def random_scans(index, cloud, wanted, count, radius, rng):
    """Items of `Frames`: `count` whole validation scans, the conditions by turns, that hold each class number `wanted` nearby.

    What is nearby, and drawn: mask `part` [N] of an item, the points in the square of half side `radius` [m].
    """
    rows, items = rng.permutation(index.select("val")), []
    turn = [(index.condition[rows[:n]] == index.condition[row]).sum() for n, row in enumerate(rows)]
    frames = Frames(index, rows[np.argsort(turn, kind="stable")[:60]], "scan", cloud=cloud, labels=bool(wanted))
    for number in range(len(frames)):
        item = frames[0, number]
        item["part"] = (item["feats"][:, 1:3].abs() < radius).all(1)
        if all((item["labels"][item["part"]] == c).sum() >= ENOUGH for c in wanted):
            items.append(item)
        if len(items) == count:
            break
    if not items:
        raise InputError(f"--radius {radius:g}: no scan of {len(frames)} has {' and '.join(CLASSES[c] for c in wanted)} within it")
    return sorted(items, key=lambda item: item["condition"])


@torch.no_grad()
def point_features(encoder, item, layer, device):
    """L2-normalised features of a scan: of the "backbone", [N, channels], or after the "head", [N, D of the image encoder]."""
    batch = training.to_device(collate([item]), device)
    inputs = (batch[name] for name in ("feats", "cells", "neighbors", "batch"))
    return F.normalize((encoder if layer == "head" else encoder.features)(*inputs).float(), dim=1).cpu()


def class_prototypes(scans):
    """Classes' mean features over `scans`, pairs (item, features [N, D]), normalised again: [classes, D], 0 if there is none."""
    sums = sum(rows.new_zeros(len(CLASSES), rows.shape[1]).index_add(0, item["labels"], rows) for item, rows in scans)
    return F.normalize(sums, dim=1)


def figure_similarity(columns):
    """ScaLR Fig. 1 and 3. Two panels a column, from above: a scan's points of a class; all points' similarity to a reference.

    columns: a list of (item of `random_scans`; features [N, D] and reference [D], L2-normalised; class number, 0 for none; the
    row of the point whose feature the reference is, None where it is a class prototype).
    """
    width, height = np.ptp(np.concatenate([item["feats"][item["part"], 1:3] for item, *_ in columns]), axis=0)
    figure, axes = grid(2, len(columns), 0.9 * height / width, sharex=True, sharey=True,  # 0.9: what the scales leave
                        subplot_kw=dict(aspect="equal", facecolor="#202020"))  # on dark, both ends and the middle are seen
    for (above, below), (item, features, reference, number, point) in zip(axes.T, columns):
        xyz, similarity, part = item["feats"][:, 1:4].numpy(), (features @ reference).numpy(), item["part"].numpy()
        labels = np.where(part, item["labels"].numpy(), 0) if number else np.full(len(xyz), -1)
        order = np.flatnonzero(part)[xyz[part, 2].argsort()]  # the higher ones on top
        dots = dict(s=np.clip(16000 / len(order) / len(columns), 0.3, 3), linewidths=0)
        above.scatter(*xyz[order, :2].T, c=np.where((labels == number)[order, None], YELLOW, 0.4), **dots)
        drawn = below.scatter(*xyz[order, :2].T, c=similarity[order], cmap="coolwarm", norm=colors.Normalize(-1, 1), **dots)
        rings = [axis.scatter(*xyz[point, :2], s=80, facecolors="none", edgecolors="#30e030", linewidths=1.5, label="chosen point")
                 for axis in (above, below) if point is not None]
        above.set_title(CONDITIONS[item["condition"]] + (f"\n{CLASSES[number]}".replace("_", " ") if number else ""))
        score = metrics.roc_auc_score(labels[labels > 0] == number, similarity[labels > 0]) if number else 0
        below.set(xlabel="x [m]", title=f"AUC {score:.2f}" if number else "")
    axes[0, 0].set_ylabel("labels\ny [m]" if number else "y [m]")
    axes[1, 0].set_ylabel("similarity\ny [m]")
    patch = patches.Patch(color=YELLOW, label="points of the class; AUC: how often one is more similar than another point")
    figure.legend(handles=[patch] * (number > 0) + rings[:1], ncols=2, **LEGEND)
    figure.colorbar(drawn, ax=axes, label=f"cosine similarity to {'prototype' if point is None else 'chosen point'}", **BAR)
    return figure


# ---- command line ---------------------------------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    images, probes, scans = ("pca", "tsne"), ("segmentation", "depth"), ("correlation", "prototypes")
    parsers = {name: figures.add_parser(name) for name in images + probes + scans}

    def add(names, flag, **options):
        for name in names:
            parsers[name].add_argument(flag, **options)
    add(images, "--encoders", nargs="+", required=True, help="names of encoders, or folders of stage 2")
    add(images, "--weights", help="file with the weights of those given by name, or 'random' (default: the released ones)")
    add(probes, "probes", nargs="+", help="folders that probe.py wrote")
    add(scans, "--encoder", required=True, help="stage 1's folder, or ScaLR's model.pth")
    add(images + scans, "--data", required=True, help="nuScenes root")
    add(images + scans, "--version", default="v1.0-trainval", help="version folder of the root (default: %(default)s)")
    add(probes, "--data", help="nuScenes root (default: the first probe's)")
    add(probes, "--version", help="version folder of the root (default: the first probe's)")
    add(parsers, "--out", help="(default: FIGURE.png)")
    add(parsers, "--seed", type=SEED, default=0, help="of what is drawn at random (default: %(default)s)")
    add(parsers, "--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add(images + probes, "--titles", nargs="+", help="of the encoders' or probes' columns (default: the ends of their paths)")
    add(("pca", *probes), "--frames", type=COUNT, default=1, help="images of each condition (default: %(default)s)")
    add(["tsne"], "--images", type=whole(2), default=100, help="random ones of each condition (default: %(default)s, C.2)")
    for name, layer in (("correlation", "head"), ("prototypes", "backbone")):
        add([name], "--layer", choices=("backbone", "head"), default=layer,
            help="features of the backbone (ScaLR), or after the head that the loss is on (default: %(default)s)")
    add(["correlation"], "--scans", type=COUNT, default=3, help="random ones (default: %(default)s)")
    add(scans, "--radius", type=real(1), default=40, help="half side of the square that is drawn, in metres (default: %(default)s)")
    add(["correlation"], "--class", dest="classes", nargs=1, choices=CLASSES[1:], default=["car"], help="of the point (car)")
    add(["correlation"], "--point", type=real(), nargs=3, metavar=tuple("XYZ"), help="take the nearest one [m]; needs no labels")
    add(["prototypes"], "--classes", nargs="+", action=Distinct, choices=CLASSES[1:], metavar="CLASS", help="up to 6 (default: %(default)s)",
        default=("car", "pedestrian", "driveable_surface", "sidewalk"))
    add(["prototypes"], "--training-scans", type=whole(0), default=20, help="averaged (default: %(default)s); 0: the one shown (ScaLR)")
    return parser.parse_args(argv)


def draw_images(args, device):
    """The figure of images that the arguments ask for."""
    of_probes, task = "probes" in args, "depth" if args.figure == "depth" else "seg"
    paths = args.probes if of_probes else args.encoders
    titles = args.titles or ["/".join(Path(path).parts[-2:]) for path in paths]
    if len(titles) != len(paths):
        raise InputError(f"--titles: {len(titles)} for {len(paths)} columns, {', '.join(paths)}")
    if of_probes:
        probes = [load_probe(path, device)[:3] for path in paths]
        if wrong := [f"{path} of --task {probe['task']}" for path, (probe, _, _) in zip(paths, probes) if probe["task"] != task]:
            raise InputError(f"{args.figure} is of probes of --task {task}, not {', '.join(wrong)}")
        sizes = {tuple(probe["image_size"]) for probe, _, _ in probes}
    else:
        encoders = [load_image_encoder(path, args.weights if path in ENCODERS else None).to(device) for path in paths]
        sizes = {tuple(encoder.spec["image_size"]) for encoder in encoders if "image_size" in encoder.spec} or {IMAGE_SIZE}
    if len(sizes) > 1:
        raise InputError(f"{', '.join(paths)}: trained on different image sizes, {' and '.join(map(str, sorted(sizes)))}")
    size = sizes.pop()
    for encoder in [] if of_probes else encoders:
        encoder.check_size(size)
    index = load_index(args.data or data_of(probes[0][0], paths[0]), args.version or probes[0][0]["args"]["version"])
    if of_probes:
        frames = with_files(index, index.select("val"), task == "seg")
        for path, (probe, _, _) in zip(paths, probes):
            say_other_frames(probe, path, frames)
        items = views(index, size, args.frames, labels=task == "seg", max_depth=DEPTHS[1] if task == "depth" else None)
        return figure_probes(task, items, [probe[1:] for probe in probes], titles)
    if args.figure == "pca":
        return figure_pca(views(index, size, args.frames), encoders, titles)
    rng, features = np.random.default_rng(args.seed), [{} for _ in encoders]
    if sum(min(args.images, len(index.select("val", [name])) * len(index.cameras)) for name in MARKERS) < 4:
        raise InputError(f"--data {index.root}: t-SNE needs at least four images of {' and '.join(MARKERS)}")
    for name in MARKERS:
        frames = Frames(index, index.select("val", [name]), "all", size)  # C.2: random images, here of any camera
        chosen = rng.choice(len(frames), min(args.images, len(frames)), replace=False).tolist()
        images = torch.stack([frames[0, number]["image"] for number in chosen])
        for encoder, parts in zip(encoders, features):
            parts[name] = torch.cat([image_features(encoder, some.to(device) / 255).cpu() for some in images.split(16)])
    return figure_tsne(features, titles, args.seed)


def draw_scans(args, device):
    """The figure of point clouds that the arguments ask for."""
    encoder, stage1 = load_waffleiron(args.encoder)
    encoder, cloud = encoder.to(device).eval(), stage1.get("cloud", CLOUD) | {"max_points": 10**9}  # a limit would cut holes
    index, rng, columns = load_index(args.data, args.version), np.random.default_rng(args.seed), []
    wanted = [] if getattr(args, "point", None) else [CLASSES.index(name) for name in args.classes]
    items = random_scans(index, cloud, wanted, getattr(args, "scans", 1), args.radius, rng)
    if args.figure == "prototypes" and args.training_scans:
        frames = Frames(index, index.select("train", limit=args.training_scans), "scan", cloud=cloud, labels=True)
        seen = (frames[0, number] for number in range(len(frames)))
        of_training = class_prototypes((item, point_features(encoder, item, args.layer, device)) for item in seen)
        if lacking := [CLASSES[c] for c in wanted if not of_training[c].any()]:
            raise InputError(f"--classes {' '.join(lacking)}: in none of {len(frames)} training scans; raise --training-scans")
    for item in items:
        features, xyz = point_features(encoder, item, args.layer, device), item["feats"][:, 1:4]
        if args.figure == "prototypes":
            prototypes = of_training if args.training_scans else class_prototypes([(item, features)])
            columns += [(item, features, prototypes[c], c, None) for c in wanted]
        else:
            own = torch.nonzero(item["part"] & (item["labels"] == wanted[0]))[:, 0] if wanted else None
            point = int((xyz - torch.tensor(args.point)).norm(dim=1).argmin() if own is None else rng.choice(own))
            columns.append((item, features, features[point], wanted[0] if wanted else 0, point))
    return figure_similarity(columns)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    device, out = training.start(args), Path(args.out or f"{args.figure}.png")
    with rc_context(STYLE):
        figure = (draw_scans if "layer" in args else draw_images)(args, device)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()

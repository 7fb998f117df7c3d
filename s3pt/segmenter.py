"""Segmenter's heads on a frozen image encoder: which class each pixel is of.

S3PT, Sec. 4.2 and A.2.1: a linear layer or a mask transformer on the patch tokens, with
mmsegmentation's data and schedule. The bare command is the paper's run with one learning rate:

    data="--data nuimages=/data/nuimages"
    python -m s3pt.segmenter $data --encoder runs/s3pt --head mask --out runs/seg-s3pt    # Table 2
    python -m s3pt.segmenter --evaluate runs/seg-s3pt --data cityscapes=/data/cityscapes  # Table 3

Several --lr are heads side by side: each is the head that it would be alone, and the encoder runs
once. Writes OUT/last.pth and OUT/log.jsonl, resumes from there, and ends with OUT/results.json, of
the validation split. --evaluate judges a run's heads on other data: over all classes if these are
the same (RUN/results-DATASET.json), or over the common ones, its own data beside it over the same
(RUN/transfer-DATASET.json).
"""
from pathlib import Path

import torch
from tqdm import tqdm

import models
from data import select
from dense import (Pictures, Segmenter, classes_of, collate, cross_entropies, judge, mean_of,
                   on_common, percents, table_of)
from eval import check_finished, encoder_source
from heads import MAP_HEADS
from plumbing import training
from plumbing.arguments import COUNT, POSITIVE, RATE, Distinct, Parser
from plumbing.atomic import read_json, write_json
from plumbing.errors import InputError, one_line_errors, say
from plumbing.fingerprint import check, of_frames, of_weights
from plumbing.run_folder import Log, Saver, check_finite, find_last
from plumbing.weights import load_checkpoint, load_strictly
from readers.table import entries, hold_out, known_scenes, open_tables

# The paper's, and of the optimizer what it leaves open
PAPER = {"head": "mask", "lr": [8e-4], "steps": 160_000, "batch": 8, "weight_decay": 1e-4}
# mmsegmentation's for ADE20k, and cityscapes_768x768 with Segmenter's stride
SIZES = {"nuimages": {"scale": [2048, 512], "crop": 512, "stride": 480},
         "cityscapes": {"scale": [2049, 1025], "crop": 768, "stride": 512}}
# What datasets call the classes that they share: {dataset: {class: common name}}
SAME = {name: name for name in ("car", "truck", "bus", "bicycle", "motorcycle")}
COMMON = {"nuimages": SAME | {"pedestrian": "pedestrian", "driveable_surface": "road"},
          "cityscapes": SAME | {"person": "pedestrian", "road": "road"}}


# ---- arguments -----------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__, conflict_handler="resolve")  # for --steps, which is said anew
    add = parser.add_argument
    training.add_arguments(parser, out_required=False)
    models.add_arguments(parser,
        help="a name, or an encoder's folder; with --evaluate where the run's is now, if moved")
    add("--evaluate", metavar="RUN", help="train nothing: judge this run's heads on --data")
    add("--head", choices=MAP_HEADS, help="linear layer, or mask transformer (default: mask)")
    add("--steps", type=COUNT, help="of the run and its schedule (default: 160000, Sec. 4.1)")
    add("--batch", type=COUNT, help="crops, over all processes (default: 8, mmsegmentation)")
    add("--lr", type=POSITIVE, nargs="+", action=Distinct,
        help="at first, falls to a tenth; several: a head each (default: 8e-4; A.2.1: 3e-4, 8e-5)")
    add("--weight-decay", type=RATE, help="of AdamW (default: 1e-4)")
    add("--scale", type=COUNT, nargs=2, metavar=("LONG", "SHORT"),
        help="sides in pixels that images are made to fit into, for training times 0.5 to 2 "
             "(default: nuimages 2048 512, cityscapes 2049 1025, others as they are)")
    add("--crop", type=COUNT,
        help="side in pixels of what the encoder sees (default: nuimages 512, cityscapes 768)")
    add("--stride", type=COUNT,
        help="pixels from window to window (default: nuimages 480, cityscapes 512, else --crop)")
    args = parser.parse_args(argv)
    check_flags(args)
    if not args.evaluate:
        fill_in(args)
    return args


def check_flags(args):
    """Raise InputError for flags that are missing, or would do nothing."""
    if args.image_size:
        raise InputError("--image-size: has no meaning here; --scale and --crop say the sizes")
    if not args.evaluate and not args.encoder:
        raise InputError("--encoder: give one to train heads on, or --evaluate RUN")
    settled = *PAPER, "crop", "stride", "val_scenes", "out", "weights", "hub", "feature"
    given = [name.replace("_", "-") for name in settled if getattr(args, name) is not None]
    if args.evaluate and given:
        raise InputError(f"--{given[0]}: not with --evaluate, whose run says it")


def fill_in(args):
    """Set what was not given to the paper's values, and --out to a folder."""
    dataset = entries(args.data)[0][0]
    sizes = SIZES.get(dataset, {})
    if args.crop not in (None, sizes.get("crop")):
        sizes = sizes | {"stride": args.crop}
    for name, value in (PAPER | sizes).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.crop is None:
        raise InputError(f"--crop: {dataset} has no default; give the side of a square in pixels")
    if args.stride > args.crop:
        raise InputError(f"--stride {args.stride}: leaves gaps; at most --crop {args.crop}")
    if not args.out:
        args.out = f"runs/segmenter-{Path(args.encoder).name}-{args.head}-{dataset}"


def poly(step, total, peak):
    """Learning rate at `step` of `total`: from `peak` down to a tenth of it, power 0.9."""
    end = peak / 10
    return end + (peak - end) * (1 - step / total) ** 0.9


# ---- results -------------------------------------------------------------------------------------

def result_of(segmenter, pictures, run, workers):
    """A result of a run's heads, whose checkpoint is `run`, on pictures that have its classes."""
    names = list(run["classes"])
    table = pictures.tables[0]
    # Over the classes of probe.py, here with pixels of the others among them, and over all
    means = table.reader.CLASSES[1:], names
    totals = judge(segmenter, pictures, names, run["windows"], workers)
    heads = []
    for lr, total in zip(run["args"]["lr"], totals):
        counts = total.counts.sum(0)
        columns = {table.name: percents(counts, names, *means)}
        for condition, part in zip(pictures.conditions, total.counts):
            columns[f"{table.name}, {condition}"] = percents(part, names, *means)
        heads.append({"lr": lr, "columns": columns, "counts": counts.tolist()})
    # The best has the highest mean over all classes
    scores = [head["columns"][table.name][mean_of(names)] or 0 for head in heads]
    return {"heads": heads, "best": scores.index(max(scores)), "images": len(pictures)}


def transferred(segmenter, pictures, run, inside, names, workers):
    """The same on another dataset's pictures, over the common classes `names`.

    inside: the run's result on its own data, which stands beside it over the same classes.
    """
    home = run["data"]
    there = pictures.tables[0].name
    classes = classes_of(pictures.tables)[1:]
    mine = [COMMON[home].get(name) for name in run["classes"]]
    theirs = [COMMON[there].get(name) for name in classes]

    heads = []
    longer = max(run["classes"], classes, key=len)
    totals = judge(segmenter, pictures, longer, run["windows"], workers)
    for head, total in zip(inside["heads"], totals):
        at_home = on_common(torch.tensor(head["counts"]), mine, mine, names)
        abroad = on_common(total.counts.sum(0).cpu(), theirs, mine, names)
        columns = {home: percents(at_home, [*names, "other"], names),
                   f"{home} to {there}": percents(abroad, [*names, "other"], names)}
        heads.append({"lr": head["lr"], "columns": columns})
    return {"heads": heads, "best": inside["best"], "images": len(pictures)}


def origin(segmenter, pictures):
    """What a result is made from: the weights, and the frames with their files."""
    frames = training.by_first_process(lambda: of_frames(pictures.tables, True, files=True))
    return {"weights": of_weights(segmenter), "frames": frames}


def finish(result, path):
    """Write a result and print its table (first process)."""
    if training.rank() > 0:
        return
    columns = {}
    for number, head in enumerate(result["heads"]):
        picked = number == result["best"] and len(result["heads"]) > 1
        lr = f"lr {head['lr']:g}{', the best on val' * picked}"
        columns |= {f"{name}, {lr}": rows for name, rows in head["columns"].items()}
    write_json(path, result)
    print(f"{table_of(columns)}\nwritten: {path}", flush=True)


def evaluate(args, device):
    """Judge a run's heads on --data: over its classes, or over those that both have."""
    run = load_checkpoint(args.evaluate, "segmenter")
    check_finished(run, args.evaluate)
    with training.first_process_first():
        tables = open_tables(args.data, args.version, look=None)
    hold_out(tables, known_scenes(run["args"]["val_scenes"], tables))
    home = run["data"]
    there = tables[0].name
    same = tuple(classes_of(tables)[1:]) == tuple(run["classes"])
    theirs = COMMON.get(there, {}).values()
    names = [name for name in COMMON.get(home, {}).values() if name in theirs]
    if not same and not names:
        raise InputError(f"--data {tables[0].root}: {there} has no class that is known to be one "
                         f"of {home}'s; give {' or '.join(COMMON)}")
    inside = read_json(Path(args.evaluate, "results.json"))
    if not same and not inside:
        raise InputError(f"{args.evaluate}: has no results.json; repeat its training's command")

    # The heads, on the encoder that they were trained on
    source = encoder_source(run, args.evaluate, args.encoder)
    encoder = models.load_image_encoder(**source, careful=False)
    check(f"{args.evaluate}: its head", run["made_from"], {"encoder": encoder.fingerprint()},
          "train it again (--restart), or say where that encoder is (--encoder)")
    segmenter = Segmenter(encoder, run["head"], len(run["classes"]), len(run["args"]["lr"]), device,
                          args.precision or run["args"]["precision"])
    load_strictly(segmenter.heads, run["model"], args.evaluate)

    # Its pictures as large as in training, another dataset's as that dataset has them
    own = run["args"] if there == home else SIZES.get(there, {})
    scale = args.scale or own.get("scale")
    pictures = Pictures(select(tables, "val", limit=args.limit), scale, encoder.mean)
    if same:
        result = result_of(segmenter, pictures, run, args.workers)
    else:
        result = transferred(segmenter, pictures, run, inside, names, args.workers)
    result["made_from"] = origin(segmenter, pictures)
    finish(result, Path(args.evaluate, f"{'results' if same else 'transfer'}-{there}.json"))


# ---- training ------------------------------------------------------------------------------------

@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = training.start(args)
    if args.evaluate:
        return evaluate(args, device)

    # ---- data and model ----
    with training.first_process_first():
        tables = hold_out(open_tables(args.data, args.version, look=False), args.val_scenes)
        encoder = models.load_image_encoder(args.encoder, args.weights, args.hub, args.feature,
                                            careful=False)
    for table in tables:
        say(table.summary())
    encoder.check_size((args.crop, args.crop), "--crop")
    classes = classes_of(tables)[1:]
    skip_bad = args.on_bad_frame == "skip"
    chosen = select(tables, "train", limit=args.limit, skip_bad=skip_bad)
    frames = Pictures(chosen, args.scale, encoder.mean, args.crop, skip_bad, args.seed)
    held_out = Pictures(select(tables, "val", limit=args.limit), args.scale, encoder.mean)
    segmenter = Segmenter(encoder, args.head, len(classes), len(args.lr), device, args.precision)
    heads = segmenter.heads
    model = training.distribute(segmenter, device)

    # ---- resume: a run of the same arguments, encoder and frames goes on ----
    made_from = {"encoder": encoder.fingerprint(), "frames": of_frames(chosen, labels=True)}
    checkpoint = find_last(args, made_from)
    first = checkpoint["step"] if checkpoint else 0
    batches = training.Batches(len(frames), args.batch, first, args.steps, args.seed)
    loader = training.load(frames, batches, collate, args.workers, device)

    # ---- optimizer: a group for each head ----
    groups = [{"params": head.parameters(), "peak": lr} for head, lr in zip(heads, args.lr)]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    if checkpoint:
        heads.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    # ---- loop ----
    names = [f"lr {lr:g}" for lr in args.lr]
    log = Log(args.out, device, heads, checkpoint, frames.frame_count(), names)
    saver = Saver(args, batches.per_epoch, args.steps)
    bar = tqdm(loader, f"segmenter {args.head}", initial=first, total=args.steps,
               disable=training.rank() > 0, mininterval=2)
    about = {"kind": "segmenter", "head": args.head, "classes": classes, "data": tables[0].name,
             "windows": (args.crop, args.stride), "encoder": models.source_of(args),
             "made_from": made_from, "args": vars(args)}
    for step, batch in saver.guard(enumerate(bar, first)):
        for group in optimizer.param_groups:
            group["lr"] = poly(step, args.steps, group["peak"])
        batch["draws"] = training.draws(batches.of(step), args.seed, heads[0].DRAWS)
        batch = training.to_device(batch, device)
        logits = model(batch["image"], batch["draws"])          # [B, K, C, h, w]
        sums, count = cross_entropies(logits, batch["labels"])  # [K]
        loss = sums.sum() / max(1, count) * training.share(count, device)
        optimizer.zero_grad()
        loss.backward()
        check_finite(loss, heads, step, args.out, batches, frames)
        optimizer.step()

        counts = torch.full_like(sums, count)
        log.add(loss / len(heads), batch, torch.stack([sums.detach(), counts], 1))
        done = step + 1
        if done % 50 == 0:
            bar.set_postfix(loss=f"{log.mean():.3f}", refresh=False)
        if done % batches.per_epoch == 0 or done == args.steps:
            log.write(epoch=step // batches.per_epoch + 1, step=done,
                      lr=[group["lr"] for group in optimizer.param_groups])
        if saver.due(done):
            saver.save(about | {
                "model": heads.state_dict(), "optimizer": optimizer.state_dict(),
                "step": done, "total": args.steps, "log": log.state()})
    log.report()

    # ---- the validation split, unless it has been judged already ----
    path = Path(args.out, "results.json")
    made_from = origin(segmenter, held_out)
    result = training.by_first_process(lambda: read_json(path)) or {}
    if result.get("made_from") != made_from:
        result = result_of(segmenter, held_out, about, args.workers) | {"made_from": made_from}
    finish(result, path)


if __name__ == "__main__":
    main()

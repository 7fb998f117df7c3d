"""results/real.json and .md: what experiments/real.py has measured so far, and its text."""
import copy
import statistics
from pathlib import Path

from demo import mean_and_spread
from experiments.claims import RULE, verdict
from plumbing.atomic import read_json
from plumbing.errors import InputError

CANNOT = """\
**What this cannot show.** {train} frames of {dataset}'s scenes {train_scenes} teach and {val} of
{val_scenes} judge. In docs/real.md these are neighbouring frames of one drive along one street by
day, the second name being a made-up one for its last frames: nothing speaks of other streets. The
bad weather is made, by `experiments/degradations.py`. The encoder is a small convolutional network
with ImageNet weights. The scans are the same under every condition: what rain does to a LiDAR is
not there. Compare the rows with each other; of the paper's only the sign is to be compared. A gain
is the LiDAR's only where `cd` is ahead of `twin`. One on clear pictures may come from the probe for
all conditions: the probe trained on clear pictures alone tells."""

PROBES = (("seg-all", "mIoU", "mIoU [%], a probe for all conditions", 1),
          ("seg-first", "mIoU", "mIoU [%], a probe trained on clear pictures alone", 1),
          ("depth-all", "RMSE", "RMSE [m], a probe for all conditions", 2),
          ("depth-first", "RMSE", "RMSE [m], a probe trained on clear pictures alone", 2))


def kept_in(results, frames):
    """What is in RESULTS.json: {"frames", "rows": {row: {seed: result}}}.

    Raises InputError for rows of other frames, and for files that are none of this experiment.
    """
    file, page = Path(f"{results}.json"), Path(f"{results}.md")
    if not file.exists() and not page.exists():
        return {"frames": frames, "rows": {}}
    kept = read_json(file)
    if not (isinstance(kept, dict) and isinstance(kept.get("rows"), dict) and "frames" in kept):
        raise InputError(f"--results {results}: {file} is missing, damaged or of something else; "
                         "mend it, or choose another name")
    if kept["frames"] != frames:
        raise InputError(f"--results {results}: has rows of {kept['frames']}, and --data has "
                         f"{frames}; choose another name")
    return kept


def of_same_classes(kept):
    """The results, with mIoU [%] over the classes that all rows have an IoU of.

    Else a class that no frame has would count as 0 in the mean of a row that answers it.
    """
    kept = copy.deepcopy(kept)
    groups = {}  # (probe, condition): what is judged by that probe under that condition
    for result in (result for seeds in kept.values() for result in seeds.values()):
        of_probes = result.items() if isinstance(result, dict) else ()  # not of distances
        for probe, part in [("", result), *of_probes]:
            for column in part["IoU"] if isinstance(part, dict) and "IoU" in part else ():
                groups.setdefault((probe, column), []).append(part)
    for (_, column), parts in groups.items():
        parts = [part for part in parts if part["IoU"][column]]
        common = [one for one in parts[0]["IoU"][column]
                  if all(one in part["IoU"][column] for part in parts)] if parts else []
        for part in parts:
            numbers = [part["IoU"][column][one] for one in common]
            part["mIoU"][column] = statistics.mean(numbers) if numbers else None
    return kept


def values(kept, name, probe, metric, column):
    """{seed: number} of a row."""
    return {seed: result[probe][metric][column] for seed, result in kept.get(name, {}).items()}


def cell(numbers, digits):
    """A table's cell of the numbers of the seeds that were run; None: there are no labels."""
    found = [number for number in numbers if number is not None]
    if not found:
        return "–" if numbers else "not run"
    return mean_and_spread(found, digits)


def probes_table(kept, rows, conditions, probe, metric, heading, digits):
    """A row an image encoder, a column a condition."""
    columns = ("full", *conditions)
    lines = [f"| {heading} | seeds | {' | '.join(columns)} |",
             "|---|---:|" + "---:|" * len(columns)]
    for name, row in rows.items():
        if row.script == "probes":
            cells = [cell(values(kept, name, probe, metric, column).values(), digits)
                     for column in columns]
            lines.append(f"| `{name}`: {row.words} | {len(kept.get(name, {}))} | "
                         f"{' | '.join(cells)} |")
    return "\n".join(lines)


def classes_table(kept, rows, condition):
    """A row an image encoder, a column a class."""
    there = [result["seg-all"]["IoU"] for name, row in rows.items() if row.script == "probes"
             for result in kept.get(name, {}).values()]
    classes = list(dict.fromkeys(one for result in there for one in result["full"]))
    lines = [f"| IoU [%], {condition} | {' | '.join(classes)} |",
             "|---|" + "---:|" * len(classes)]
    for name, row in rows.items():
        if row.script == "probes":
            found = [result["seg-all"]["IoU"][condition] for result in kept.get(name, {}).values()]
            cells = [cell([of_seed[one] for of_seed in found if one in of_seed], 1)
                     if not found or any(one in of_seed for of_seed in found) else "–"
                     for one in classes]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def points_table(kept, rows):
    """The 3D encoders' probes."""
    lines = ["| mIoU [%], linear probe of the 3D encoder | seeds | here |", "|---|---:|---:|"]
    for name, row in rows.items():
        if row.script == "seg3d":
            found = [result["mIoU"]["full"] for result in kept.get(name, {}).values()]
            lines.append(f"| `{name}`: {row.words} | {len(found)} | {cell(found, 1)} |")
    return "\n".join(lines)


def distance_table(kept):
    """How far night pictures are from day pictures, to each encoder."""
    lines = ["| Fréchet distance of real day and night pictures' features | here |", "|---|---:|"]
    for place, name in enumerate(("imagenet", "cd", "twin")):
        found = [result[place] for result in kept.get("distance", {}).values()]
        lines.append(f"| `{name}` | {cell(found, 3)} |")
    return "\n".join(lines)


# ---- verdicts ------------------------------------------------------------------------------------

# CD and the encoder as it was, in the paper: its night for low light, Table 6 for the others
PAPER = {"mIoU": {"full": ("1", (51.9, 49.2)), "clear": ("1", (52.7, 50.5)),
                  "low_light": ("1", (33.4, 27.7)), "fog": ("6", (43.9, 43.4)),
                  "motion_blur": ("6", (47.1, 44.6)), "gaussian_noise": ("6", (32.2, 28.4))},
         "RMSE": {"full": ("2", (7.64, 8.37)), "clear": ("2", (7.47, 8.14)),
                  "low_light": ("2", (8.73, 9.40)), "fog": ("6", (8.16, 8.94)),
                  "motion_blur": ("6", (8.69, 9.23)), "gaussian_noise": ("6", (9.35, 10.76))}}


def claims(rows, conditions):
    """[(words, the paper's table, its pair or None, metric, better, worse)].

    Better and worse are (row, probe, column), or two of those whose difference is meant.
    """
    found = []
    for probe, metric, what in (("seg-all", "mIoU", "segmentation"),
                                ("depth-all", "RMSE", "depth")):
        for column in ("full", *conditions):
            table, paper = PAPER[metric].get(column, ("", None))
            found.append((f"CD is better than the encoder as it was: {what}, {column}", table,
                          paper, metric, ("cd", probe, column), ("imagenet", probe, column)))
        for name, row in rows.items():
            if row.rival:
                found.append((f"CD is better than `{name}`, {row.words}: {what}", row.table,
                              row.paper.get(metric), metric, ("cd", probe, "full"),
                              (name, probe, "full")))
        found.append((f"CD of the richer feature is better than the feature: {what}", "", None,
                      metric, ("rich-cd", probe, "full"), ("rich", probe, "full")))
    gains = [[(name, "seg-all", column) for name in ("cd", "imagenet")]
             for column in ("low_light", "clear")]
    found.append(("CD gains more in low light than on clear pictures: segmentation", "1",
                  (5.7, 2.2), "mIoU", *gains))
    words = "stage 1 on clear pictures gives a better 3D encoder than on all (the paper's: in rain)"
    found.append((words, "5", rows["3d-all"].paper["mIoU"], "mIoU", ("3d", None, "full"),
                  ("3d-all", None, "full")))
    return found


def of_seeds(kept, side, metric):
    """{seed: number} of one side of a claim, of the seeds that have one."""
    if isinstance(side, list):
        after, before = (of_seeds(kept, one, metric) for one in side)
        return {seed: after[seed] - before[seed] for seed in after.keys() & before.keys()}
    name, probe, column = side
    numbers = {seed: (result[probe] if probe else result)[metric][column]
               for seed, result in kept.get(name, {}).items()}
    return {seed: number for seed, number in numbers.items() if number is not None}


def verdicts_table(kept, rows, conditions):
    """Each comparison: the paper's pair, the pair here, and the verdict by the rule."""
    lines = ["| claim | table | metric | paper | seeds | here | difference | verdict |",
             "|---|---|---|---:|---:|---:|---:|---|"]
    for words, table, paper, metric, better, worse in claims(rows, conditions):
        digits = 1 if metric == "mIoU" else 2
        a, b = (of_seeds(kept, side, metric) for side in (better, worse))
        seeds = sorted(a.keys() & b.keys())
        pair = " / ".join(f"{number:.{digits}f}" for number in paper or ()) or "–"
        cells = [words, table or "–", metric, pair, str(len(seeds)), "not run", "–", "not run"]
        if seeds:
            differences = [a[seed] - b[seed] for seed in seeds]
            here = [mean_and_spread([side[seed] for seed in seeds], digits) for side in (a, b)]
            cells[5:] = [" / ".join(here), mean_and_spread(differences, digits, "+"),
                         verdict(differences, metric) if len(seeds) > 1 else "one seed"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def regime(kept, dark):
    """A sentence on what a dark condition costs the encoder as it was, beside the paper's night.

    Empty where that was not measured.
    """
    parts = []
    for probe, words in (("seg-all", "the probe for all conditions"),
                         ("seg-first", "the one trained on clear pictures")):
        found = [list(values(kept, "imagenet", probe, "mIoU", column).values())
                 for column in ("clear", dark)]
        if not found[0] or None in sum(found, []):
            return ""
        clear, low = map(statistics.mean, found)
        parts.append(f"{100 * (1 - low / clear):.0f} % under {words}")
    clear, night = (PAPER["mIoU"][column][1][1] for column in ("clear", "low_light"))
    return (f"Of its mIoU on clear pictures, `{dark}` costs `imagenet` {' and '.join(parts)}; "
            f"night costs the paper's encoder {100 * (1 - night / clear):.0f} %.")


def page(measured, rows, conditions):
    """The text of the page. measured: {"frames": of CANNOT, "rows": {row: {seed: result}}}."""
    kept = of_same_classes(measured["rows"])
    parts = ["# Real frames", "`python -m experiments.real` writes this page, row by row.",
             CANNOT.format(**measured["frames"])]
    parts += ["## Image encoders", "`clear` pictures are as they were taken, `"
              f"{conditions[-1]}` is a condition that stage 2 never saw; `full` is all of them. "
              "Mean ± standard deviation over the seeds of the trainings. mIoU is of the classes "
              "that all rows have an IoU of, as one that no frame has would count as 0 where a row "
              "answers it."]
    parts += [text for text in (regime(kept, "low_light"),) if text]
    parts += [probes_table(kept, rows, conditions, *probe) for probe in PROBES]
    parts += ["## Classes", "Under the probe for all conditions. –: no frame has the class, and "
              "the row does not answer it.",
              *(classes_table(kept, rows, column) for column in ("full", *conditions[:2]))]
    parts += ["## 3D encoders", "The scans are the same under every condition.",
              points_table(kept, rows)]
    parts += ["## Real nights", distance_table(kept)]
    parts += ["## The paper's comparisons", "The paper's numbers are of nuScenes and DINOv2 "
              "ViT-S/14: its night stands beside low light. One seed alone gets no verdict.",
              verdicts_table(kept, rows, conditions), RULE, ""]
    return "\n\n".join(parts)

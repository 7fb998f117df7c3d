"""Results of eval.py side by side: the table in Markdown, and when two results can be compared."""
from plumbing.fingerprint import differences

METRICS = (("mIoU", "mIoU [%], higher is better", 1), ("RMSE", "RMSE [m], lower is better", 2))


def not_comparable(row, first):
    """Why the difference of two results of one task says nothing, in words; "" if it does."""
    reasons = []
    a = first.get("protocol", {})
    b = row.get("protocol", {})
    for name in a | b:
        if a.get(name) == b.get(name):
            continue
        too_long = name in ("classes", "scenes")
        reasons.append(f"other {name}" if too_long else f"{name} {a.get(name)} and {b.get(name)}")
    if "made_from" in row and "made_from" in first:
        frames = differences({"other frames": first["made_from"]["frames"]},
                             {"other frames": row["made_from"]["frames"]})
        reasons += [frames] if frames else []
    elif any(row.get(name) != first.get(name) for name in ("data", "images", "made_from")):
        reasons.append("one of them does not say what it was made from, and is of other data; "
                       "evaluate it with --again")
    return "; ".join(reasons)


def kind_of(row):
    """A result's task, with its datasets unless they are nuScenes."""
    data = row.get("protocol", {}).get("data", "nuscenes")
    return row["task"] if data == "nuscenes" else f"{row['task']} on {data}"


def cell(row, metric, column, digits, first=None):
    """A number of a table, or why there is none; in brackets its difference to `first`'s."""
    if column not in row[metric]:
        return "not run" if column in row["columns"] else "–"
    value = row[metric][column]
    if value is None:
        return "no labels"
    base = first and first[metric].get(column)
    difference = "" if base is None else f" ({value - base:+.{digits}f})"
    return f"{value:.{digits}f}{difference}"


def results_table(results):
    """Markdown: a row a probe.

    In brackets stands the difference to the first row of the same task on the same datasets, where
    they can be compared.
    """
    parts = []
    notes = []
    for metric, heading, digits in METRICS:
        rows = [result for result in results if metric in result]
        if not rows:
            continue
        # A column for each condition that one of them states
        columns = list(dict.fromkeys(name for row in rows for name in row["columns"]))
        lines = [f"| {heading} | task | " + " | ".join(columns) + " |",
                 "|---|---|" + "---:|" * len(columns)]
        # The first row of a kind stands for itself, the others beside it
        for row in rows:
            base = first = next(other for other in rows if kind_of(other) == kind_of(row))
            reason = "" if row is first else not_comparable(row, first)
            if reason:
                notes.append(f"{row['run']} is not compared with {first['run']}: {reason}.")
            if reason or row is first:
                base = None
            cells = [cell(row, metric, column, digits, base) for column in columns]
            lines.append(f"| {row['run']} | {kind_of(row)} | " + " | ".join(cells) + " |")
            held = row.get("protocol", {}).get("val_scenes")
            if held:
                notes.append(f"{row['run']} is judged on scenes of its own split: "
                             f"{', '.join(held)}.")
        parts.append("\n".join(lines))
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)

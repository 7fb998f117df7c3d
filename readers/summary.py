"""What a dataset's table holds, as text: what every script prints of its data."""
import numpy as np

MANY = 100  # names that one message lists at most


def some_of(names):
    """Names with commas between, and how many there are where they are too many to list."""
    listed = ", ".join(names[:MANY])
    return listed if len(names) <= MANY else f"{listed}, ... ({len(names)} in all)"


def summary_of(table):
    """The counts of a `FrameTable` per split and condition, and the dataset's notes, as lines."""
    about = [f"{len(table)} frames"]
    if "image" in table:
        about.append(f"{table['image'].shape[1]} cameras")
    if "labels" in table:
        labelled = table["labels"][table.rows] != b""
        how_many = "yes" if labelled.all() else "in part" if labelled.any() else "no"
        about.append(f"labels: {how_many}")
    about += beside_the_papers(table)
    # Without conditions all frames stand in one column of the results, which has this name
    names = table.conditions or ("full",)
    width = max(10, *map(len, names))
    # A line for each split and condition that has frames
    lines = [f"{table.name}={table.root}: {', '.join(about)}",
             f"  {'split':6} {'condition':{width}} scenes  frames  images"]
    for split in np.unique(table["split"][table.rows]):
        of_split = table.rows[table["split"][table.rows] == split]
        for number, name in enumerate(names):
            rows = of_split
            if table.conditions:
                rows = of_split[table["condition"][of_split] == number]
            if len(rows):
                scenes = len(table.only(rows).scenes()) or "-"
                images = table["image"][rows].size if "image" in table else "-"
                lines.append(f"  {split.decode():6} {name:{width}} {scenes:>6}  {len(rows):6}  "
                             f"{images:>6}")
    if "scan" in table and not table.conditions:
        lines.append(f"  {table.name}: conditions unstated, --conditions leaves out none of these")
    notes = np.char.decode(table["notes"]).tolist() if "notes" in table else []
    return "\n".join([*lines, *notes])


def beside_the_papers(table):
    """For each split whose number of frames the papers give: both numbers, in words."""
    words = []
    for split, in_papers in getattr(table.reader, "PAPER_FRAMES", {}).items():
        here = np.count_nonzero(table["split"][table.rows] == split.encode())
        is_same = "as in the papers" if here == in_papers else f"{in_papers} in the papers"
        words.append(f"{split}: {here} frames, {is_same}")
    return words

"""A claim of a paper: two numbers, one of which is claimed to be better; the verdict on it.

And the file in which numbers are kept once they are measured.
"""
import statistics
from pathlib import Path
from typing import NamedTuple

from experiments.runs import alone
from plumbing.atomic import read_json, write_json
from plumbing.errors import InputError

# nuScenes' classes that the miniature has. mIoU counts another one as 0 as soon as a single point
# is taken for it, which would hide what the claims are about
OCCURRING = ("barrier", "bus", "car", "pedestrian", "truck", "driveable_surface", "sidewalk",
             "terrain", "manmade", "vegetation")
# In percent and metres: what a probe's own training can move (miniature/README.md)
NOISE = {"mIoU": 0.5, "RMSE": 0.1}
FEW = 3  # points of mIoU above a claim's floor, within which nothing is judged
RULE = ("*holds*: the mean difference in the claimed direction is larger than the noise, which is "
        "the larger of twice its standard error over the seeds and "
        f"{NOISE['mIoU']} % mIoU or {NOISE['RMSE']} m RMSE; "
        "*does not hold*: it is that large in the other direction; else *within noise*. Where a "
        "run is claimed to be *not worse*, within noise it holds. Where two are claimed to be *the "
        f"same*, it holds up to {NOISE['mIoU']} % mIoU or {NOISE['RMSE']} m RMSE.")


class Number(NamedTuple):
    """A number of an evaluation: an encoder's, on a task, under a column of the table.

    run: the run that made the encoder, or "base". column: or classes, whose mean IoU is meant.
    corruption: of the images.
    """
    run: str
    task: str
    column: str = "full"
    corruption: str = "clean"

    @property
    def metric(self):
        return "RMSE" if self.task.startswith("depth") else "mIoU"


class Claim(NamedTuple):
    """`better` is claimed to be better than `worse`: a higher mIoU or a lower RMSE.

    Each side is a Number, or a pair of them whose difference is meant. table: of the paper. paper:
    the paper's two numbers; None where it has none. says: that `better` is "better",
    "not worse" or "the same". floor: the number of an encoder that has learnt nothing; a claim
    whose two sides are near it gets no verdict.
    """
    name: str
    table: str
    sentence: str
    better: Number | tuple
    worse: Number | tuple
    paper: tuple | None
    says: str = "better"
    floor: Number | None = None

    @property
    def metric(self):
        return numbers_of(self.better)[0].metric


def numbers_of(side):
    """The one or two Numbers of a claim's side."""
    return (side,) if isinstance(side, Number) else side


# ---- verdicts ------------------------------------------------------------------------------------

def verdict(differences, metric, says="better"):
    """The verdict of RULE on the differences better - worse, one for each seed."""
    # A lower RMSE is a gain
    gains = [-d if metric == "RMSE" else d for d in differences]
    mean = statistics.mean(gains)
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0
    noise = max(2 * error, NOISE[metric])
    if says == "the same":
        return "holds" if abs(mean) <= NOISE[metric] else "does not hold"
    if mean > noise:
        return "holds"
    if mean < -noise:
        return "does not hold"
    return "holds" if says == "not worse" else "within noise"


# ---- what was measured ---------------------------------------------------------------------------

class Measured:
    """The numbers of claims that were measured, in a JSON file, so that pieces add up.

    path: of the file; None: nothing is kept. In it, {claim: {seed: piece}}, where a piece is
    {"recipe", "values": [better, worse], "floor", "seconds": {run: its seconds}}. One of another
    recipe than now counts as none.
    """

    def __init__(self, path):
        self.path = path and Path(path)
        self.kept()

    def kept(self):
        """What is in the file. Raises InputError for a file of something else."""
        if not self.path or not self.path.exists():
            return {}
        kept = read_json(self.path)
        try:
            known = all(piece["recipe"] for seeds in kept.values() for piece in seeds.values())
        except (AttributeError, KeyError, TypeError):
            known = False
        if not known:
            raise InputError(f"--numbers {self.path}: damaged, or of something else; mend it, or "
                             "choose another name")
        return kept

    def piece(self, claim, seed, recipe):
        """That of a claim's name and a seed; None where there is none of that recipe."""
        piece = self.kept().get(claim, {}).get(str(seed), {})
        return piece if piece.get("recipe") == recipe else None

    def keep(self, claim, seed, piece):
        """Add a piece. Another process may have added one since."""
        if self.path:
            with alone(self.path.parent):
                kept = self.kept()
                kept.setdefault(claim, {})[str(seed)] = piece
                write_json(self.path, kept)

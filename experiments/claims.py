"""What a claim of a paper is: two numbers, one of which is claimed to be better."""
from typing import NamedTuple

# nuScenes' classes that the miniature has. mIoU counts another one as 0 as soon as a single point
# is taken for it, which would hide what the claims are about
OCCURRING = ("barrier", "bus", "car", "pedestrian", "truck", "driveable_surface", "sidewalk",
             "terrain", "manmade", "vegetation")


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

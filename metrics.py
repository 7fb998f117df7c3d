"""Metrics: pure functions of predictions and truth, and what sums them up over batches.

Collaborative-distillation paper, Sec. 4.2 and C.3.
"""
import math

import torch
import torch.nn.functional as F

from data import DEPTHS

# ---- pure functions ------------------------------------------------------------------------------

def confusion_matrix(prediction, truth, classes):
    """Counts [classes, classes]: row = truth, column = prediction.

    prediction, truth: [N] class numbers 0..classes-1.
    """
    # A pair of classes as one number, so that one count does for all pairs
    return torch.bincount(truth * classes + prediction, minlength=classes**2).view(classes, classes)


def class_iou(confusion):
    """IoU [C] of each class; NaN for a class that is neither in the truth nor predicted."""
    confusion = confusion.double()
    hits = confusion.diagonal()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


def mean_iou(confusion, left_out=()):
    """Mean IoU over the classes that occur in truth or prediction, but for those `left_out`."""
    iou = class_iou(confusion)
    iou[list(left_out)] = torch.nan
    return iou.nanmean().item()


def depth_sums(prediction, truth, view, images):
    """What RMSE needs of each image: sum of squared errors in square metres, number of points.

    prediction [N] and truth [N] in metres, view [N] each point's image -> [images, 2].
    """
    squares = (prediction.clamp(*DEPTHS) - truth).double() ** 2
    sums = torch.zeros(images, 2, dtype=torch.double, device=squares.device)
    return sums.index_add_(0, view, torch.stack([squares, torch.ones_like(squares)], 1))


def rmse(sums):
    """(mean over images of an image's RMSE, RMSE over all points) in metres; NaN without points.

    sums: `depth_sums` of the images, [I, 2].
    """
    squares, counts = sums[sums[:, 1] > 0].unbind(1)
    per_image = (squares / counts).sqrt().mean().item()
    per_point = (squares.sum() / counts.sum()).sqrt().item()
    return per_image, per_point


def finite(value):
    """A metric for JSON, which has no NaN: None where there was nothing to evaluate."""
    return None if math.isnan(value) else value


def lovasz_softmax(probabilities, labels):
    """Lovász-softmax loss (Berman et al., CVPR 2018): the convex extension of 1 - IoU.

    Args: probabilities [N, C], labels [N] in 0..C-1.
    Returns: a scalar in [0, 1], the mean over the classes present; 0 for N = 0.
    """
    truth = F.one_hot(labels, probabilities.shape[1]).to(probabilities)  # [N, C]
    present = truth.any(0)
    if not present.any():
        return probabilities.sum() * 0
    truth = truth[:, present]
    probabilities = probabilities[:, present]
    errors, order = (truth - probabilities).abs().sort(0, descending=True)
    truth = truth.gather(0, order)
    # Jaccard loss of the set of the k largest errors, for each k; its increment weighs an error
    total = truth.sum(0)
    jaccard = 1 - (total - truth.cumsum(0)) / (total + (1 - truth).cumsum(0))
    weights = torch.cat([jaccard[:1], jaccard.diff(dim=0)])
    return (errors * weights).sum(0).mean()


# ---- over batches --------------------------------------------------------------------------------

class Confusion:
    """Confusion matrices of a segmentation, one a condition and one of frames without one.

    names: of the classes. left_out: {condition: names of classes left out of its mean}.
    """

    def __init__(self, names, conditions, left_out, device):
        self.names = names
        self.conditions = conditions
        self.left_out = left_out
        classes = len(names)
        self.counts = torch.zeros(len(conditions) + 1, classes, classes, dtype=torch.long,
                                  device=device)

    def add(self, outputs, batch, numbers):
        """Count a batch: outputs [N, C] of its points; numbers of its items, as DepthSums needs."""
        view = batch["view"]
        if "nearest" in batch:  # of every point
            outputs = outputs[batch["nearest"]]
            view = view[batch["nearest"]]
        for condition in range(-1, len(self.conditions)):
            # Class 0 is "ignore": labels count from 1, outputs from 0
            chosen = (batch["labels"] > 0) & (batch["condition"] == condition)[view]
            prediction = outputs[chosen].argmax(1)
            truth = batch["labels"][chosen] - 1
            self.counts[condition] += confusion_matrix(prediction, truth, len(self.names))

    def metrics(self, occurring):
        """{"mIoU": {column: percent}, "IoU": {column: {class: percent}}}.

        Columns are "full" and the conditions of these numbers. None where there is no label.
        """
        # Frames whose condition nobody states count in "full" alone: they are the last matrix
        parts = {"full": self.counts.sum(0)}
        parts |= {self.conditions[number]: self.counts[number] for number in occurring}
        mean, each = {}, {}
        for name, part in parts.items():
            without = [self.names.index(c) for c in self.left_out.get(name, ()) if c in self.names]
            mean[name] = finite(100 * mean_iou(part, without))
            iou = zip(self.names, class_iou(part).tolist())
            each[name] = {c: round(100 * value, 2) for c, value in iou if not math.isnan(value)}
        return {"mIoU": mean, "IoU": each}


class DepthSums:
    """Squared errors, points and condition of each image."""

    def __init__(self, images, conditions, device):
        self.conditions = conditions
        self.counts = torch.zeros(images, 3, dtype=torch.double, device=device)

    def add(self, outputs, batch, numbers):
        """Sum a batch: outputs [N, 1] of its points in metres; numbers of its items."""
        prediction = outputs[:, 0].float()
        sums = depth_sums(prediction, batch["depths"], batch["view"], len(numbers))
        self.counts[numbers, :2] = sums
        self.counts[numbers, 2] = batch["condition"].double()

    def metrics(self, occurring):
        """{"RMSE": {column: metres}, "RMSE_points": the same over all points}; columns as above."""
        pairs = {"full": rmse(self.counts[:, :2])}
        for number in occurring:
            pairs[self.conditions[number]] = rmse(self.counts[self.counts[:, 2] == number, :2])
        return {"RMSE": {name: finite(pair[0]) for name, pair in pairs.items()},
                "RMSE_points": {name: finite(pair[1]) for name, pair in pairs.items()}}

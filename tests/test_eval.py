import math

import pytest
import torch

import eval as evaluation
import metrics
from readers.nuscenes import CLASSES


def test_confusion_and_iou_by_hand():
    truth = torch.tensor([0, 0, 0, 1, 1, 2])
    prediction = torch.tensor([0, 0, 1, 1, 2, 2])
    confusion = metrics.confusion_matrix(prediction, truth, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    iou = metrics.class_iou(confusion)
    assert iou[:3].tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 2])
    assert math.isnan(iou[3])
    # class 3 is in neither truth nor prediction: left out, not counted as 0 or 1
    assert metrics.mean_iou(confusion) == pytest.approx((2 / 3 + 1 / 3 + 1 / 2) / 3)


def test_a_class_that_is_only_predicted_counts_as_zero():
    confusion = metrics.confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 0]), 3)
    assert metrics.mean_iou(confusion) == pytest.approx((0.5 + 0) / 2)


def test_excluded_classes_leave_the_mean_only():
    prediction, truth = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 2])
    confusion = metrics.confusion_matrix(prediction, truth, 3)
    assert metrics.mean_iou(confusion) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert metrics.mean_iou(confusion, left_out=[2]) == pytest.approx(0.5)
    assert confusion[2, 2] == 1  # the matrix itself is not touched


def test_three_classes_are_excluded_at_night():
    assert [CLASSES.index(name) for name in metrics.NOT_AT_NIGHT] == [3, 9, 5]


def test_rmse_by_hand():
    prediction = torch.tensor([3.0, 6.0, 10.0, -5.0, 200.0])
    truth = torch.tensor([0.1, 2.0, 10.0, 1.1, 75.0])
    batch = torch.tensor([0, 0, 0, 1, 1])
    sums = metrics.depth_sums(prediction, truth, batch, 3)
    # image 0: errors 2.9, 4, 0; image 1: clamped to 0.1 and 80: errors 1, 5; image 2 has no points
    first = math.sqrt((2.9**2 + 16) / 3)
    second = math.sqrt((1 + 25) / 2)
    by_image, by_point = metrics.rmse(sums)
    assert by_image == pytest.approx((first + second) / 2, rel=1e-6)
    assert by_point == pytest.approx(math.sqrt((2.9**2 + 16 + 26) / 5), rel=1e-6)


def test_table():
    values = {"full": 50.0, "day-clear": 55.0, "day-rain": 52.0, "night": 40.0}
    rows = [{"run": "a", "task": "seg", "mIoU": values},
            {"run": "b", "task": "seg", "mIoU": {"full": 51.5}},
            {"run": "c", "task": "depth", "RMSE": values}]
    text = evaluation.table(rows)
    assert "| a | seg | 50.0 | 55.0 | 52.0 | 40.0 |" in text
    assert "| b | seg | 51.5 (+1.5) | not run | not run | not run |" in text
    assert "| c | depth | 50.00 | 55.00 | 52.00 | 40.00 |" in text

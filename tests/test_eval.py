import math

import pytest
import torch

import metrics
from readers.nuscenes import CLASSES, CONDITIONS, LEFT_OUT
from results import results_table

COLUMNS = ["full", *CONDITIONS]


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
    assert [CLASSES.index(name) for name in LEFT_OUT["night"]] == [3, 9, 5]


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
    text = results_table([row | {"columns": COLUMNS} for row in rows])
    assert "| a | seg | 50.0 | 55.0 | 52.0 | 40.0 |" in text
    assert "| b | seg | 51.5 (+1.5) | not run | not run | not run |" in text
    assert "| c | depth | 50.00 | 55.00 | 52.00 | 40.00 |" in text


# ---- tables of several datasets ------------------------------------------------------------------

def result(run, numbers, columns, data="nuscenes"):
    return {"run": run, "task": "seg", "mIoU": dict(zip(columns, numbers)), "columns": columns,
            "protocol": {"data": data}, "made_from": {"frames": {"frames": 1}}}


def cells_of(text):
    """{run: its cells after the task}."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 2}


def test_data_of_other_conditions_stand_side_by_side():
    """"not run": the data states the condition, and no frame has it. "–": it does not state it."""
    rows = [result("a", [50.0, 55.0], COLUMNS), result("b", [40.0], ["full"], "nuimages"),
            result("c", [30.0, 20.0, 10.0], ["full", "fog", "night"], "weather")]
    text = results_table(rows)
    assert text.splitlines()[0] == (
        "| mIoU [%], higher is better | task | full | day-clear | day-rain | night | fog |")
    cells = cells_of(text)
    assert cells["a"] == ["seg", "50.0", "55.0", "not run", "not run", "–"]
    assert cells["b"] == ["seg on nuimages", "40.0", "–", "–", "–", "–"]
    assert cells["c"] == ["seg on weather", "30.0", "–", "–", "10.0", "20.0"]


def test_only_results_of_one_dataset_are_compared():
    """The second one on nuImages is compared with the first one there, and nothing is noted."""
    rows = [result("a", [50.0], COLUMNS), result("b", [40.0], ["full"], "nuimages"),
            result("c", [42.0], ["full"], "nuimages"), result("d", [51.0], COLUMNS)]
    text = results_table(rows)
    cells = cells_of(text)
    assert cells["b"][1] == "40.0" and cells["c"][1] == "42.0 (+2.0)"
    assert cells["d"][1] == "51.0 (+1.0)"
    assert "not compared" not in text


def test_what_has_no_labels_and_what_was_not_compared_have_no_difference():
    rows = [result("a", [None, 55.0], COLUMNS), result("b", [50.0, None], COLUMNS)]
    cells = cells_of(results_table(rows))
    assert cells["a"][1:3] == ["no labels", "55.0"]
    assert cells["b"][1:3] == ["50.0", "no labels"]
    assert results_table([]) == ""


# ---- over batches --------------------------------------------------------------------------------

def outputs_of(classes, count):
    """A head's outputs [N, count] that predict these classes."""
    return torch.nn.functional.one_hot(torch.tensor(classes), count).float()


def confusion_of(left_out, conditions=("day", "night")):
    """Classes car, road and sky; two items, of day and of night, of four points each."""
    sums = metrics.Confusion(("car", "road", "sky"), conditions, left_out, torch.device("cpu"))
    batch = {"labels": torch.tensor([1, 1, 2, 0, 1, 2, 2, 3]),  # 0 is ignored
             "view": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), "condition": torch.tensor([0, 1])}
    sums.add(outputs_of([0, 1, 1, 2, 0, 1, 1, 0], 3), batch, [0, 1])
    return sums


def test_confusions_by_condition():
    found = confusion_of({}).metrics([0, 1])
    assert found["IoU"]["day"] == {"car": 50.0, "road": 50.0}
    assert found["IoU"]["night"] == {"car": 50.0, "road": 100.0, "sky": 0.0}
    assert found["mIoU"] == pytest.approx({"full": 100 * (2 / 4 + 3 / 4 + 0) / 3, "day": 50.0,
                                           "night": 50.0})
    assert list(confusion_of({}).metrics([1])["mIoU"]) == ["full", "night"]  # by day is none


def test_classes_are_left_out_of_their_conditions_mean_only():
    found = confusion_of({"night": ("sky",)}).metrics([0, 1])
    assert found["mIoU"]["night"] == pytest.approx(75)
    assert found["mIoU"]["full"] == pytest.approx(100 * (2 / 4 + 3 / 4) / 3)
    assert found["IoU"]["night"]["sky"] == 0  # its own number is there


def test_left_out_classes_that_the_data_lacks_change_nothing():
    """As nuScenes' at night for data of other classes."""
    with_all = confusion_of({"night": ("sky",)}).metrics([0, 1])
    assert confusion_of({"night": ("bus", "sky", "trailer")}).metrics([0, 1]) == with_all
    assert confusion_of(LEFT_OUT).metrics([0, 1]) == confusion_of({}).metrics([0, 1])


def test_frames_without_a_condition_count_in_full_only():
    sums = metrics.Confusion(("car", "road"), (), {}, torch.device("cpu"))
    batch = {"labels": torch.tensor([1, 2]), "view": torch.tensor([0, 0]),
             "condition": torch.tensor([-1])}
    sums.add(outputs_of([0, 0], 2), batch, [0])
    assert sums.metrics([]) == {"mIoU": {"full": 25.0}, "IoU": {"full": {"car": 50.0, "road": 0}}}

    # beside frames that have one
    sums = metrics.Confusion(("car", "road"), ("day",), {}, torch.device("cpu"))
    sums.add(outputs_of([0, 0], 2), batch, [0])
    sums.add(outputs_of([0, 1], 2), batch | {"condition": torch.tensor([0])}, [1])
    assert sums.metrics([0])["mIoU"] == pytest.approx(
        {"full": 100 * (2 / 3 + 1 / 2) / 2, "day": 100.0})


def test_depths_by_condition():
    sums = metrics.DepthSums(3, ("day", "night"), torch.device("cpu"))
    batch = {"depths": torch.tensor([1.0, 2.0, 10.0]), "view": torch.tensor([0, 0, 1]),
             "condition": torch.tensor([1, -1])}
    sums.add(torch.tensor([[4.0], [6.0], [8.0]]), batch, [2, 0])  # item 1 is another process's
    found = sums.metrics([0, 1])
    night = math.sqrt((9 + 16) / 2)
    assert found["RMSE"] == pytest.approx({"full": (night + 2) / 2, "day": None, "night": night})
    assert found["RMSE_points"]["full"] == pytest.approx(math.sqrt((9 + 16 + 4) / 3))

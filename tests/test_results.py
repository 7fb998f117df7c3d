"""Tables show a difference only between results that can be compared."""
import pytest

from experiments import corruptions
from results import results_table

COLUMNS = ["full", "day-clear", "day-rain", "night"]


def result(run="a", frames=6, **changes):
    protocol = {"classes": ["car", "bus"], "cameras": "all", "head": "linear", "finetune": False,
                "percent": 100}
    return {"run": run, "task": "seg", "mIoU": {"full": 50.0}, "columns": COLUMNS,
            "protocol": protocol | changes, "made_from": {"frames": {"frames": frames}}}


@pytest.mark.parametrize("other, why", [
    (result("b", 18), "other frames: frames 6; now: frames 18"),
    (result("b", cameras="CAM_FRONT"), "cameras all and CAM_FRONT"),
    (result("b", classes=["car"]), "other classes"),
    (result("b", finetune=True), "finetune False and True"),
    (result("b", percent=1), "percent 100 and 1"),
    (result("b", head="batchnorm"), "head linear and batchnorm"),
    ({"run": "b", "task": "seg", "mIoU": {"full": 50.0}, "columns": COLUMNS},
     "does not say what it was made from")])
def test_what_cannot_be_compared_has_no_difference_and_a_line_that_says_why(other, why):
    text = results_table([result(), other])
    assert "b is not compared with a: " in text and why in text
    assert "| b | seg | 50.0 | not run |" in text
    assert "(+0.0)" not in text
    rows = [{"run": row["run"], "task": "seg", "severity": 3, "results": {"clean": row}}
            for row in (result(), other)]
    text = corruptions.table(rows)
    assert why in text
    assert "(+0.0)" not in text


def test_what_can_be_compared_has_its_difference():
    text = results_table([result(), result("b")])
    assert "| b | seg | 50.0 (+0.0) | not run |" in text
    assert "not compared" not in text


def test_a_row_is_compared_with_the_first_of_its_task_on_its_data():
    rows = [result(), result("b"), result("c", 18, data="nuimages"),
            result("d", 18, data="nuimages")]
    for row in rows[2:]:
        row["columns"] = ["full"]
    text = results_table(rows)
    assert "| c | seg on nuimages | 50.0 | – |" in text
    assert "| d | seg on nuimages | 50.0 (+0.0) | – |" in text
    assert "not compared" not in text

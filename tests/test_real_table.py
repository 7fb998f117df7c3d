"""The page of the experiment on real frames, of results that are made by hand."""
import json

from conftest import ROOT

from experiments import claims, real_table
from experiments.real import CONDITIONS, ROWS

COLUMNS = ("full", *CONDITIONS)
FRAMES = {"dataset": "pandaset64", "train": 80, "train_scenes": "002", "val": 70,
          "val_scenes": "902"}


def page(rows):
    return real_table.page({"frames": FRAMES, "rows": rows}, ROWS, CONDITIONS)


def of_probes(miou, rmse):
    """What probes.py writes, with the same number in each column."""
    seg = {"mIoU": dict.fromkeys(COLUMNS, miou),
           "IoU": {column: {"road": miou, "car": miou} if miou else {} for column in COLUMNS}}
    depth = {"RMSE": dict.fromkeys(COLUMNS, rmse)}
    return {"seg-all": seg, "seg-first": seg, "depth-all": depth, "depth-first": depth}


def of_seeds(*pairs):
    """{seed: result} of pairs (mIoU, RMSE)."""
    return {str(seed): of_probes(*pair) for seed, pair in enumerate(pairs, 1)}


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_what_it_cannot_show_stands_above_the_first_table():
    text = page({})
    assert text.startswith("# Real frames\n")
    assert text.index("**What this cannot show.** 80 frames of pandaset64's scenes 002 teach "
                      "and 70 of\n902 judge.") < text.index("\n|")
    assert text.count(claims.RULE) == 1


def test_a_page_without_results_says_not_run_in_every_cell():
    text = page({})
    for name, row in ROWS.items():
        tables = {"probes": 4, "seg3d": 1, "distance": 0}[row.script]
        found = lines_of(text, f"| `{name}`: ")
        assert len(found) == tables
        for line in found:
            assert line.startswith(f"| `{name}`: {row.words} | 0 | not run |")
    verdicts = lines_of(text, "| CD is better than") + lines_of(text, "| stage 1 on clear")
    assert len(verdicts) == 2 * (1 + len(CONDITIONS) + 6) + 1
    assert all(line.endswith("| 0 | not run | – | not run |") for line in verdicts)
    assert "| 5 | mIoU | 61.1 / 60.0 | 0 | not run |" in text


def test_means_and_spreads_over_the_seeds_that_were_run():
    rows = {"cd": of_seeds((50, 7), (52, 7.5)), "imagenet": of_seeds((40, 8.25)),
            "3d": {"1": {"mIoU": {"full": 31.0}}, "2": {"mIoU": {"full": 33.0}}},
            "distance": {"1": [3.0, 2.0, 1.0], "2": [3.0, 2.5, 1.0]}}
    text = page(rows)
    head = "| mIoU [%], a probe for all conditions | seeds | full | clear | low_light | fog | "
    assert f"{head}motion_blur | gaussian_noise |" in text
    words = "| `cd`: + collaborative distillation | 2 |"
    assert lines_of(text, "| `cd`: ") == 2 * [words + 6 * " 51.0 ± 1.4 |"] + 2 * [
        words + 6 * " 7.25 ± 0.35 |"]
    assert lines_of(text, "| `imagenet`: ")[2] == (
        "| `imagenet`: ImageNet weights | 1 |" + 6 * " 8.25 |")
    assert lines_of(text, "| `3d`: ") == ["| `3d`: stage 1 on clear pictures | 2 | 32.0 ± 1.4 |"]
    assert lines_of(text, "| `imagenet` |")[3:] == ["| `imagenet` | 3.000 ± 0.000 |"]
    assert lines_of(text, "| `cd` |")[3:] == ["| `cd` | 2.250 ± 0.354 |"]


def test_a_row_without_a_class_has_no_iou_of_it():
    """Of three tables of classes: all frames, clear ones, and low light."""
    rows = {"cd": of_seeds((50, 7), (52, 7.5)), "imagenet": of_seeds((40, 8.25), (44, 8))}
    for column in COLUMNS:
        rows["imagenet"]["1"]["seg-all"]["IoU"][column]["bus"] = 0.0
    text = page(rows)
    for column in ("full", "clear", "low_light"):
        assert lines_of(text, f"| IoU [%], {column} |") == [
            f"| IoU [%], {column} | road | car | bus |"]
    words = "| `imagenet` | 42.0 ± 2.8 | 42.0 ± 2.8 | 0.0 |"
    assert lines_of(text, "| `imagenet` |")[:3] == 3 * [words]
    assert lines_of(text, "| `cd` |")[:3] == 3 * ["| `cd` | 51.0 ± 1.4 | 51.0 ± 1.4 | – |"]
    # The mean stays one of the classes that both rows have
    assert lines_of(text, "| `imagenet`: ")[0] == (
        "| `imagenet`: ImageNet weights | 2 |" + 6 * " 42.0 ± 2.8 |")
    assert lines_of(text, "| `twin` |")[:3] == 3 * ["| `twin` | not run | not run | not run |"]


def test_verdicts_follow_the_rule_on_the_seeds_that_both_have():
    rows = {"cd": of_seeds((50, 7), (52, 7.5), (90, 1)), "imagenet": of_seeds((40, 6.5), (43, 7)),
            "twin": of_seeds((50.2, 7)), "labels": of_seeds((20, 9)),
            "3d": {"1": {"mIoU": {"full": 30.0}}}, "3d-all": {"1": {"mIoU": {"full": 31.0}}}}
    text = page(rows)
    better = "| CD is better than the encoder as it was: "
    assert lines_of(text, f"{better}segmentation, fog |") == [
        f"{better}segmentation, fog | 6 | mIoU | 43.9 / 43.4 | 2 | 51.0 ± 1.4 / 41.5 ± 2.1 | "
        "+9.5 ± 0.7 | holds |"]
    # A lower RMSE is better
    assert lines_of(text, f"{better}depth, full |") == [
        f"{better}depth, full | 2 | RMSE | 7.64 / 8.37 | 2 | 7.25 ± 0.35 / 6.75 ± 0.35 | "
        "+0.50 ± 0.00 | does not hold |"]
    assert lines_of(text, "| CD is better than `twin`, ")[0].endswith(
        ": segmentation | – | mIoU | – | 1 | 50.0 / 50.2 | -0.2 | one seed |")
    assert [line.rpartition(", stage 2 with a 3D encoder trained on labels: ")[2]
            for line in lines_of(text, "| CD is better than `labels`, ")] == [
        "segmentation | 8 | mIoU | 51.9 / 32.2 | 1 | 50.0 / 20.0 | +30.0 | one seed |",
        "depth | 8 | RMSE | 7.64 / 9.53 | 1 | 7.00 / 9.00 | -2.00 | one seed |"]
    assert lines_of(text, "| stage 1 on clear pictures gives")[0].endswith(
        "| 5 | mIoU | 61.1 / 60.0 | 1 | 30.0 / 31.0 | -1.0 | one seed |")
    assert lines_of(text, "| CD is better than `joint`, ")[0].endswith(
        "| K | mIoU | 51.9 / 38.5 | 0 | not run | – | not run |")
    # Of 51 - 41.5 in all columns nothing is gained more in one
    assert lines_of(text, "| CD gains more in low light than on clear pictures")[0].endswith(
        "| 1 | mIoU | 5.7 / 2.2 | 2 | 9.5 ± 0.7 / 9.5 ± 0.7 | +0.0 ± 0.0 | within noise |")


def test_what_could_not_be_judged_is_no_number():
    """A column without labels has none (null) in the file of a probe."""
    rows = {"cd": of_seeds((50, 7), (None, None)), "imagenet": of_seeds((40, 8), (41, 8))}
    text = page(rows)
    assert lines_of(text, "| `cd`: ")[0] == (
        "| `cd`: + collaborative distillation | 2 |" + 6 * " 50.0 |")
    assert ("segmentation, full | 1 | mIoU | 51.9 / 49.2 | 1 | 50.0 / 40.0 | +10.0 | one seed |"
            in text)


def test_what_low_light_costs_stands_beside_the_papers_night():
    rows = {"imagenet": of_seeds((40, 8), (42, 8))}
    for result, dark in zip(rows["imagenet"].values(), (30, 32)):
        result["seg-all"]["IoU"]["low_light"] = {"road": dark, "car": dark}
    assert ("Of its mIoU on clear pictures, `low_light` costs `imagenet` 24 % under the probe for "
            "all conditions and 24 % under the one trained on clear pictures; night costs the "
            "paper's encoder 45 %.") in page(rows)
    assert "costs" not in page({"cd": of_seeds((50, 7))})


def test_rows_without_a_class_in_common_have_no_mean():
    rows = {"cd": of_seeds((50, 7)), "imagenet": of_seeds((40, 8), (41, 8))}
    for column in COLUMNS:
        rows["cd"]["1"]["seg-all"]["IoU"][column] = {"bus": 50}
    assert lines_of(page(rows), "| `cd`: ")[0] == (
        "| `cd`: + collaborative distillation | 1 |" + 6 * " – |")


def test_the_committed_page_is_of_the_committed_numbers():
    measured = json.loads((ROOT / "results/real.json").read_text())
    text = (ROOT / "results/real.md").read_text()
    assert real_table.page(measured, ROWS, CONDITIONS) == text
    # docs/real.md repeats two tables
    there = lines_of((ROOT / "docs/real.md").read_text(), "|")
    for heading in ("mIoU [%]", "RMSE [m]"):
        table = text[text.index(f"| {heading}, a probe for all conditions"):].partition("\n\n")[0]
        lines = table.splitlines()
        assert there[there.index(lines[0]):][:len(lines)] == lines and len(lines) == 13

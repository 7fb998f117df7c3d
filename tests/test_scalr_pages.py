"""docs/scalr.md and results/scalr.md: numbers written a second time, or following from others."""
import importlib
import re

import pytest
import test_docs
from conftest import ROOT

import probe
import stage1

DOCS = (ROOT / "docs/scalr.md").read_text()
PAGE = ROOT / "results/scalr.md"
RESULTS = PAGE.read_text()
FRAMES = {"nuScenes": 28130, "SemanticKITTI": 19130, "one sensor of PandaSet": 3920,
          "nuScenes and SemanticKITTI": 47260, "all four": 55100}  # ScaLR, supplement B.2
TABLE_4 = """
    78.7 65.1 47.8 40.6
    54.4 28.8 26.9 25.2
    39.5 46.6 25.3 25.7
    39.6 25.6 30.0 24.7
    29.9 26.9 23.5 28.5
    54.4 50.1 29.3 28.9
    54.6 50.6 33.1 32.3
    67.8 43.1 33.9 29.9
    67.8 55.8 37.9 34.5"""
TABLE_5 = """
    35.2 62.2 78.7 49.6 63.4 47.8 40.0
    51.0 70.5 77.9 49.7 63.9 49.4 42.1
    50.7 69.2 78.4 56.8 65.8 48.3 41.1"""
SCALR_PLUS = "70.4 61.0 43.5 40.7", "54.1 70.7 78.4 57.4 65.2 50.7 44.0"


def tables(text):
    """[[cells of a row]] of each table, its head first."""
    found = re.findall(r"^\|.*\n\|[-:|]+\|\n(?:\|.*\n)+", text, re.M)
    lines = [table.splitlines() for table in found]
    return [[[cell.strip() for cell in line[1:-1].split("|")] for line in [head, *rows]]
            for head, _, *rows in lines]


def section(title):
    """The tables under a title of results/scalr.md that begins so."""
    return tables(re.split(r"^## ", RESULTS.partition(f"\n## {title}")[2], flags=re.M)[0])


def numbers(cells):
    """The first number of each cell that has one."""
    found = [re.match(r"\d+\.\d", cell) for cell in cells]
    return [float(number[0]) for number in found if number]


@pytest.mark.parametrize("title, written", [("Table 4:", TABLE_4), ("Table 5:", TABLE_5)])
def test_the_papers_numbers_stand_there(title, written):
    (table,) = section(title)
    rows = [list(map(float, line.split())) for line in written.split("\n") if line]
    assert [numbers(row[1:]) for row in table[1:]] == rows


def test_what_is_quoted_twice_agrees():
    probes, finetuned = section("ScaLR+")
    for table, of_paper, plus in ((probes, TABLE_4, SCALR_PLUS[0]),
                                  (finetuned, TABLE_5, SCALR_PLUS[1])):
        lines = [of_paper.splitlines()[-1], plus]
        assert [numbers(row[1:]) for row in table[1:]] == [
            list(map(float, line.split())) for line in lines]
    (progress,) = section("Table 8:")
    four, finetuned = (numbers(section(title)[0][-1][1:]) for title in ("Table 4:", "Table 5:"))
    assert numbers(progress[-1][3:]) == [four[0], *finetuned[:4]]


def test_gaps_and_means_follow():
    (table,) = section("Table 3:")
    for row in table[1:]:
        for best, at in ((78.7, 2), (65.1, 5)):
            if row[at] != "–":
                assert best - float(row[at]) == pytest.approx(float(row[at + 1]), abs=0.01), row
    (table,) = section("Tables 6 and 9:")
    for row in table[1:]:
        mean, *each = numbers(row[3:])
        assert len(each) == 8 and sum(each) / 8 == pytest.approx(mean, abs=0.1), row


def test_every_table_says_that_nothing_was_measured():
    found = tables(RESULTS)
    assert len(found) == 12  # two of ScaLR+; 6 and 9 are one, 7 is two
    for head, *rows in found:
        here = [at for at, name in enumerate(head) if name == "here"]
        assert here
        for row in rows:
            assert len(row) == len(head), row
            assert {row[at] for at in here} <= {"not run", "needs code", "–"}, row


def test_links_have_targets():
    test_docs.test_links_have_targets(PAGE)


def test_the_scripts_have_the_flags(monkeypatch):
    monkeypatch.setattr(test_docs, "PAGES", [PAGE])
    commands = [argv for _, argv in test_docs.commands()]
    parsers = {"stage1": stage1.parse, "probe": probe.parse}
    known = [argv for argv in commands if argv[0] in parsers]
    assert len(known) >= 30
    for script, *argv in known:
        parsers[script](argv)


def of_datasets():
    """{dataset: {row of the table: its cell}} of docs/scalr.md."""
    head, *rows = tables(DOCS)[0]
    names = [name.strip("`") for name in head[1:]]
    return {name: {row[0]: row[at] for row in rows} for at, name in enumerate(names, 1)}


@pytest.mark.parametrize("name", of_datasets())
def test_the_table_of_datasets_is_the_readers(name):
    said = of_datasets()[name]
    reader = importlib.import_module(f"readers.{name}")
    assert int(said["classes"]) == len(reader.CLASSES) - 1
    for split, count in getattr(reader, "PAPER_FRAMES", {}).items():
        what = {"train": "training", "val": "validation"}[split]
        assert said[f"{what} frames"].replace(",", "") == str(count)
    planes = [float(extent) for extent in said["planes, probe [m]"].replace("±", "").split()]
    sampling = reader.SAMPLING
    assert planes == list(sampling.get("probe", {}).get("fov", sampling["fov"]))
    if said["planes, stage 1 [m]"] != "–":
        planes = said["planes, stage 1 [m]"].replace("±", "").split()
        assert list(map(float, planes)) == list(sampling["fov"])
    assert sampling["cell"] == 0.5
    if said["cameras"].startswith("none"):
        assert reader.CAMERAS == ()
        assert said["intensity, mean and deviation"] == "measured at indexing"
    else:
        statistics = said["intensity, mean and deviation"].split(", ")
        assert tuple(map(float, statistics)) == sampling["intensity"]
    conditions = getattr(reader, "CONDITIONS", ("unstated",))
    assert said["conditions"] == ", ".join(conditions)
    paper = probe.PAPER["seg3d"]
    epochs = (paper["nuscenes"] | paper.get(name, {}))["epochs"]
    assert int(said["epochs of the 3D probe"].split()[0]) == epochs


def test_steps_follow_from_epochs():
    (table,) = [table for table in tables(DOCS) if table[0][0] == "data"]
    checked = 0
    for data, *cells in table[1:]:
        for batch, cell in zip((8, 16), cells):
            found = re.fullmatch(r"(\d+) epochs, ([\d,]+) steps", cell)
            if found:
                steps = FRAMES[data] // batch * int(found[1])
                assert steps == int(found[2].replace(",", ""))
                checked += 1
    assert checked == 7


def test_the_schedule_joins():
    (table,) = [table for table in tables(DOCS) if table[0][0] == "epoch"]
    peak, scale = 2e-3, 0.45
    decayed = peak / (1 + 62 / scale) ** 0.5
    assert [float(row[2]) for row in table[1:]] == [peak, pytest.approx(decayed, abs=5e-7), 0]

"""The bench of S3PT's parts: each twin does the same work, and the table says what is wanted."""
import re
from types import SimpleNamespace

import pytest
import torch
from runs import fails_with_one_line

from experiments import bench_s3pt, bench_scalr

CPU = torch.device("cpu")
STEP = ["--encoder", "vit_mini8", "--batch", "3", "--image-size", "80", "160", "--crop", "32",
        "--hidden", "32", "--bottleneck", "32", "--prototypes", "64", "--clusters", "8", "--queue",
        "8"]
WANTED = {  # of time, of memory, of the difference
    "position-128": ("≥ 50", "≥ 20", "equal"), "position-32": ("≥ 20", "≥ 10", "equal"),
    "search": ("≥ 1", "≥ 8", "equal"), "loss": ("≥ 1", "≥ 3", "≤ 1e-06"),
    "depth": ("≥ 6", "-", "-"), "item": ("≥ 2", "-", "-"), "clustering": ("≥ 20", "-", "-")}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small sizes, and each function timed once."""
    sizes = {"images": 2, "tokens": 130, "queries": 20, "stored": 3_000, "dim": 8, "rows": 9,
             "prototypes": 70, "bottleneck": 32}
    monkeypatch.setattr(bench_s3pt, "SIZES", sizes)
    monkeypatch.setattr(bench_s3pt, "STEP", STEP)
    monkeypatch.setattr(bench_scalr, "repeat", lambda runs, device, repeats: [[2.0] * len(runs)])


@pytest.fixture
def args(world):
    return SimpleNamespace(data=str(world), version=None, device=CPU)


# ---- twins ---------------------------------------------------------------------------------------

def test_the_position_cost_is_equal_bit_by_bit():
    twins = bench_s3pt.position_twins(SimpleNamespace(device=CPU), 40, "≥ 20", "≥ 10")
    plain, here = twins.plain(), twins.here()
    assert len(plain) == 5 and all(map(torch.equal, plain, here))
    assert here[0].shape == (2, 130, 40) and not torch.equal(here[0], here[1])


def test_the_search_finds_the_same():
    twins = bench_s3pt.search_twins(SimpleNamespace(device=CPU))
    (plain,), (here,) = twins.plain(), twins.here()
    assert torch.equal(plain, here)
    assert here.max() >= 2048 and len(here.unique()) > 10  # beyond the first chunk, too


def test_the_loss_has_the_same_value_and_gradients():
    twins = bench_s3pt.loss_twins(SimpleNamespace(device=CPU))
    plain, here = twins.plain(), twins.here()
    assert [each.shape for each in here] == [(), (9, 32), (70, 1), (70, 32)]
    for one, other in zip(plain, here):
        assert one.abs().max() > 0
        assert (one - other).abs().max() < 1e-5 * one.abs().max()
    exact, found = (function() for function in twins.in_float64)
    for one, other, rounded in zip(exact, found, here, strict=True):
        assert one.dtype == torch.float64
        assert (one - other).abs().max() < 1e-12 * one.abs().max()
        assert (one - rounded).abs().max() < 1e-5 * one.abs().max()
    assert all(float(value) < 1e-5 for value in re.findall(r"\de-\d\d", twins.note))


@pytest.mark.slow
def test_a_step_has_the_clustering_in_it_and_moves_no_weight(args, monkeypatch):
    found = {"networks_of": [], "taught": []}
    for name, results in found.items():
        def noted(*given, function=getattr(bench_s3pt, name), results=results):
            results.append(function(*given))
            return results[-1]
        monkeypatch.setattr(bench_s3pt, name, noted)
    twins = bench_s3pt.clustering_twins(args)
    valid = twins.here()
    assert valid.shape == (3, 8) and valid.any(1).all()
    assert f"{int(valid.sum())} objects" in twins.note

    _, student = found["networks_of"][0]
    before = {name: value.clone() for name, value in student.state_dict().items()}
    twins.plain()
    assert torch.equal(found["taught"][0].valid, valid)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad.abs().max() > 0, name


@pytest.mark.slow
def test_maps_are_completed_at_both_sizes(args, monkeypatch):
    monkeypatch.setattr(bench_s3pt, "map_size", lambda raw_size: (20, 40))
    twins = bench_s3pt.depth_twins(args)
    plain, here = twins.plain(), twins.here()
    assert {each.shape for each in plain} == {(80, 160)}
    assert {each.shape for each in here} == {(20, 40)}
    full, small = (sum((each > 0.1).mean() for each in maps) / len(maps) for maps in (plain, here))
    assert f"{full:.1%} at full size, {small:.1%} at a quarter" in twins.note
    assert 0 < full < small


@pytest.mark.slow
def test_items_have_the_same_crops_and_nearly_the_same_positions(args, monkeypatch):
    """Crops of 64 pixels need these pictures in full, so the crops are equal."""
    monkeypatch.setattr(bench_s3pt, "STEP", [*STEP, "--crop", "64"])
    twins = bench_s3pt.item_twins(args)
    plain, here = twins.plain(), twins.here()
    moved = 0
    for one, other in zip(plain, here, strict=True):
        for name in ("image", "depths", "start"):
            assert torch.equal(one[name].nan_to_num(-1), other[name].nan_to_num(-1))
        moved = max(moved, (one["positions"] - other["positions"]).abs().max().item())
    assert 0 < moved < 0.5 and f"differ by {moved:.1g} pixels at most" in twins.note


@pytest.mark.parametrize("flipped", [False, True])
def test_positions_by_pictures_are_those_of_the_pixels(flipped):
    """Of a crop at its own size: a patch's mean is that of its first and its last pixel."""
    positions = bench_s3pt.plain_positions((50, 90), 16)
    x, y = positions((10, 20, 16, 16), flipped, (4, 4)).T.reshape(2, 4, 4)
    columns = [21.5, 25.5, 29.5, 33.5]
    assert x.tolist() == [columns[::-1] if flipped else columns] * 4
    assert y.T.tolist() == [[11.5, 15.5, 19.5, 23.5]] * 4


# ---- the table -----------------------------------------------------------------------------------

def cells_of(text):
    """The cells of each row of a markdown table but its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def twins_of(difference):
    return bench_s3pt.Twins("a", lambda: [torch.ones(2)], lambda: [torch.ones(2) + difference],
                            "≥ 3", "≥ 4", "≤ 1e-06")


def test_a_row_has_what_was_measured_beside_what_is_wanted(monkeypatch):
    twins = twins_of(0.25)

    def repeat(runs, device, repeats):
        return [[seconds if run is twins.plain else 1.0 for run in runs] for seconds in (3, 4, 8)]

    monkeypatch.setattr(bench_scalr, "repeat", repeat)
    monkeypatch.setattr(bench_s3pt, "peak_bytes",
                        lambda run, device: (30 if run is twins.plain else 10) * 2**20)
    (cells,) = cells_of(bench_s3pt.table([bench_s3pt.measure(twins, 1)]))
    assert cells == ["a", "4,000.0 ms", "1,000.0 ms", "4.00 (3.00–8.00)", "≥ 3", "30 MB", "10 MB",
                     "3.0", "≥ 4", "2e-01", "≤ 1e-06"]


def test_where_memory_cannot_be_had_the_row_says_so(monkeypatch):
    monkeypatch.setattr(bench_s3pt, "peak_bytes", lambda run, device: None)
    (cells,) = cells_of(bench_s3pt.table([bench_s3pt.measure(twins_of(0), 1)]))
    assert cells[5:] == ["not run"] * 3 + ["≥ 4", "0e+00", "≤ 1e-06"]


@pytest.mark.slow
def test_the_whole_table(args, tmp_path, capsys):
    out = tmp_path / "sub" / "bench.md"
    bench_s3pt.main(["--data", args.data, "--device", "cpu", "--out", str(out)])
    text = out.read_text()
    assert capsys.readouterr().out.endswith(text) and "On a GPU: not run." in text
    rows = cells_of(text)
    assert [(row[4], row[8], row[10]) for row in rows] == list(WANTED.values())
    assert [row[9] for row in rows if row[10] == "equal"] == ["0e+00"] * 3
    assert {row[3] for row in rows} == {"1.00 (1.00–1.00)"}
    for said in ("M = 128", "objects in each view", "in float64", "Pixels filled", "Positions"):
        assert said in text


@pytest.mark.slow
def test_chosen_rows_come_in_their_order(capsys):
    bench_s3pt.main(["--rows", "search", "position-32", "search", "--device", "cpu"])
    first, second = cells_of(capsys.readouterr().out)
    assert first[0].startswith("neighbour search") and "M = 32" in second[0]


def test_an_unknown_row_is_refused(capsys):
    line = fails_with_one_line(capsys, bench_s3pt.main, ["--rows", "loss", "positions"])
    assert "--rows" in line and "'positions'" in line and "position-32" in line

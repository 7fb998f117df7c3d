"""The parts of a stage-1 step: nothing is counted twice, and each entry of --data has a column."""
import re
import time

import pytest
import torch

from experiments import bench_real


def busy(seconds):
    """Use the CPU for so long."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_clock_adds_up_the_time_of_this_process():
    clock = bench_real.Clock()
    timed = clock.around("one", lambda seconds, more=0: busy(seconds + more) or "given back")
    assert timed(0.02) == timed(0.01, more=0.01) == "given back"
    with clock.part("other"):
        time.sleep(0.05)  # is no work
    assert 0.04 <= clock.times["one"] and clock.times["other"] < 0.04


@pytest.mark.slow
def test_a_column_for_each_dataset(world, panda, capsys, monkeypatch):
    monkeypatch.setattr(bench_real, "WARM_UP", 0)
    threads = torch.get_num_threads()
    try:
        bench_real.main(["--data", f"nuscenes={world},pandaset64={panda}", "--steps", "1",
                         "--encoder", "vit_mini8", "--weights", "random"])
    finally:
        torch.set_num_threads(threads)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0] == f"| ms, a step of 6 views | `nuscenes={world}` | `pandaset64={panda}` |"
    parts = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert parts == ["reading scans", "reading pictures", "points, voxels, neighbours", "batching",
                     "image encoder, at the pixels", "WaffleIron, forward", "loss, backward",
                     "AdamW", "together"]

    # What is inside of an item's time is no second time in it: the shares add up to all
    for column in (1, 2):
        shares = [int(re.search(r"\((\d+)%\)", line.split(" | ")[column])[1])
                  for line in lines[2:-1]]
        assert abs(sum(shares) - 100) <= len(shares) / 2 and min(shares) >= 0
        milliseconds = [int(re.match(r"[\d,]+", line.split(" | ")[column])[0].replace(",", ""))
                        for line in lines[2:]]
        assert abs(sum(milliseconds[:-1]) - milliseconds[-1]) <= len(shares) / 2

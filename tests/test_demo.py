"""The demo: its table, and the commands that it runs."""
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import demo
import probe
import stage1
import stage2


def rows_of(miou, rmse):
    """Results of one probed encoder, the same in every column."""
    return {"mIoU": dict.fromkeys(demo.COLUMNS, miou), "RMSE": dict.fromkeys(demo.COLUMNS, rmse)}


def test_summary_of_the_demo():
    rows = {"base": rows_of(30.0, 6.0), "cd": rows_of(32.0, 5.5),
            "3d": {"mIoU": dict.fromkeys(demo.COLUMNS, 70.0)}}
    text = demo.summary({1: rows})
    assert "| mIoU, change by CD | +2.0 | +2.0 | +2.0 | +2.0 |" in text
    assert "| RMSE, change by CD | -0.50 |" in text

    # a second world: mean ± standard deviation
    other = {**rows, "cd": rows_of(34.0, 5.5)}
    assert "| mIoU, change by CD | +3.0 ± 1.4 |" in demo.summary({1: rows, 2: other})


def results_of(argv):
    """What eval.py would write for the probes named in its arguments."""
    rows = []
    for path in argv:
        if "seed-5/" in path and "table" not in path:
            task = path.rsplit("/", 1)[1].split("-")[0]
            rows.append({"task": task, "mIoU": {}, "RMSE": {}})
    return rows


def test_the_demo_s_commands_are_understood_by_the_scripts(monkeypatch, tmp_path):
    """Each printed command parses; only the scripts' own work is left out."""
    parsers = {"stage1.py": stage1.parse, "stage2.py": stage2.parse, "probe.py": probe.parse}
    seen = []

    def record(command):
        script, *argv = shlex.split(command)
        seen.append(script)
        if script in parsers:
            args = parsers[script](argv)
            assert args.seed == 5 and args.data == "data/world-5"
        if script == "eval.py":
            out = tmp_path / "seed-5" / "table.json"
            out.parent.mkdir()
            out.write_text(json.dumps(results_of(argv)))
    monkeypatch.setattr(demo, "run", record)

    results = demo.one_world(5, "miniature/encoder.pth", str(tmp_path))
    assert seen == ["miniature/world.py", "stage1.py", "stage2.py", *["probe.py"] * 5, "eval.py",
                    "miniature/overview.py"]
    assert {name: set(metrics) for name, metrics in results.items()} == {
        "base": {"mIoU", "RMSE"}, "cd": {"mIoU", "RMSE"}, "3d": {"mIoU"}}


@pytest.mark.slow
def test_a_signal_goes_on_to_the_command_and_ends_the_demo_after_it(tmp_path):
    """The command has something to save first. The demos are processes, as tests count signals."""
    begun = []
    for number in (signal.SIGINT, signal.SIGTERM):
        saved = tmp_path / f"saved-{number}"
        code = ("import signal, sys, time; from pathlib import Path\n"
                "def save(*_): time.sleep(0.5); Path(sys.argv[1]).touch(); sys.exit(0)\n"
                f"signal.signal({int(number)}, save); Path(sys.argv[1] + '.begun').touch()\n"
                "time.sleep(60)")
        command = f"-c {shlex.quote(code)} {saved}"
        demos = [sys.executable, "-c", f"import demo; demo.run({command!r}); print('goes on')"]
        begun.append((number, saved, subprocess.Popen(demos, cwd=ROOT, stdout=subprocess.PIPE)))
    for number, saved, process in begun:
        while not Path(f"{saved}.begun").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert saved.exists() and b"goes on" not in said


def test_a_command_that_fails_ends_the_demo_with_its_code():
    demo.run("-c pass")
    for code, ends_with in (("import sys; sys.exit(3)", 3),
                            ("import os; os.kill(os.getpid(), 9)", 128 + 9)):
        with pytest.raises(SystemExit) as end:
            demo.run(f"-c {shlex.quote(code)}")
        assert end.value.code == ends_with

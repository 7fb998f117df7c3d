"""The scripts' defaults are those of the table in docs/settings.md."""
import re

from conftest import ROOT

import probe
import stage1
import stage2

# | `script` | `--flag` | paper | `default` |
ROW = r"^\| `(stage1|stage2|probe --task [\w -]+)` \| `--([\w-]+)` \| (.+?) \| `(.+?)` \|"


def defaults_of(script):
    """The script's arguments where only what it must be told is given."""
    needed = ["--data", "x", "--out", "y"]
    if script == "stage1":
        return stage1.parse(needed)
    if script == "stage2":
        return stage2.parse([*needed, "--stage1", "z"])
    return probe.parse([*needed, "--encoder", "z", *script.split()[1:]])


def test_defaults_are_those_of_the_table():
    rows = re.findall(ROW, (ROOT / "docs" / "settings.md").read_text(), re.M)
    assert len(rows) >= 30
    for script, flag, _, default in rows:
        value = getattr(defaults_of(script), flag.replace("-", "_"))
        if isinstance(value, dict):  # by family of encoder
            written = ", ".join(f"{family} {v}" for family, v in value.items())
            assert default == written, (script, flag)
            continue
        words = default.split()
        values = value if isinstance(value, (list, tuple)) else [value]
        found = [str(v) for v in values]
        try:  # as numbers: 1e-3 is 0.001
            words, found = list(map(float, words)), list(map(float, found))
        except ValueError:
            pass
        assert words == found, (script, flag)


def test_a_probe_has_a_folder_of_its_own_by_default():
    args = probe.parse(["--data", "x", "--encoder", "runs/s2", "--task", "seg"])
    assert args.out == "runs/probe-s2-seg"

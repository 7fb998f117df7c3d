"""The scripts' defaults are those of the table in docs/settings.md."""
import re

import pytest
from conftest import ROOT

import finetune
import probe
import stage1
import stage2
from readers.nuscenes import SAMPLING
from s3pt import settings

# | `script` | `--flag` | paper | `default` |
SCRIPT = (r"stage1(?: --recipe [\w+]+)?(?: --channels 256)?|stage2|"
          r"s3pt\.train(?: --objective \w+)?(?: --encoder \w+)?|"
          r"(?:probe|finetune) --task \w+(?: --data \w+=x)?")
ROW = rf"^\| `({SCRIPT})` \| `--([\w-]+)` \| (.+?) \| `(.+?)` \|"


def table():
    """Rows (script, flag, the paper's, default)."""
    return re.findall(ROW, (ROOT / "docs" / "settings.md").read_text(), re.M)


def defaults_of(script):
    """The script's arguments where only what it must be told is given."""
    needed = ["--data", "x", "--out", "y"]
    if script.startswith("stage1"):
        return stage1.parse([*needed, *script.split()[1:]])
    if script.startswith("s3pt"):
        return settings.parse("", [*needed, *script.split()[1:]])
    if script == "stage2":
        return stage2.parse([*needed, "--stage1", "z"])
    name, *task = script.split()
    module = {"probe": probe, "finetune": finetune}[name]
    return module.parse([*needed, "--encoder", "z", *task])


def default_of(script, flag):
    """A flag's default; where the dataset's SAMPLING says it, nuScenes'."""
    name = flag.replace("-", "_")
    value = getattr(defaults_of(script), name)
    if value is None and name in SAMPLING:
        return SAMPLING[name]
    return value


def test_defaults_are_those_of_the_table():
    rows = table()
    assert len(rows) >= 30
    for script, flag, _, default in rows:
        value = default_of(script, flag)
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


def test_the_table_has_rows_for_each_task_and_dataset_of_the_papers():
    rows = {(script, flag) for script, flag, *_ in table()}
    for task, datasets in probe.PAPER.items():
        for dataset, row in datasets.items():
            data = "" if dataset == "nuscenes" else f" --data {dataset}=x"
            for flag in ("cameras", "epochs", "batch", "lr", "weight-decay"):
                has = flag.replace("-", "_") in row
                assert not has or (f"probe --task {task}{data}", flag) in rows
            if dataset in finetune.LR.get(task, ()):
                assert (f"finetune --task {task}{data}", "lr") in rows


# ---- what is not given ---------------------------------------------------------------------------

def test_a_probe_has_a_folder_of_its_own_by_default():
    args = probe.parse(["--data", "x", "--encoder", "runs/s2", "--task", "seg"])
    assert args.out == "runs/probe-s2-seg"


@pytest.mark.parametrize("script, argv, out", [
    (probe, "--task depth --percent 1", "runs/probe-s2-depth-1"),
    (probe, "--task seg --data nuscenes=y", "runs/probe-s2-seg"),
    (probe, "--task seg --data nuimages=y", "runs/probe-s2-seg-nuimages"),
    (probe, "--task seg --data nuimages=y --percent 10", "runs/probe-s2-seg-nuimages-10"),
    (probe, "--task seg3d --encoder runs/s1/", "runs/probe-s1-seg3d"),
    (probe, "--task seg --encoder dinov2_vits14", "runs/probe-dinov2_vits14-seg"),
    (finetune, "--task seg", "runs/finetune-s2-seg"),
    (finetune, "--task depth --percent 1", "runs/finetune-s2-depth-1"),
    (finetune, "--task seg --data nuimages=y", "runs/finetune-s2-seg-nuimages"),
    # mixtures
    (probe, "--task seg --data nuscenes=y,nuscenes=z", "runs/probe-s2-seg"),
    (probe, "--task seg --data nuimages=y,nuimages=z", "runs/probe-s2-seg-nuimages"),
    (probe, "--task seg --data nuscenes=y,nuimages=z", "runs/probe-s2-seg-nuscenes-nuimages"),
    (finetune, "--task seg --data nuimages=y,nuscenes=z", "runs/finetune-s2-seg-nuimages-nuscenes"),
    # a root with = and , in it
    (probe, "--task seg --data /data/lr=1,nuimages=2", "runs/probe-s2-seg")])
def test_default_folders_say_what_is_in_them(script, argv, out):
    assert script.parse(["--data", "x", "--encoder", "runs/s2", *argv.split()]).out == out


def parsed(script, argv):
    return script.parse(["--data", "x", "--encoder", "runs/s2", *argv.split()])


def test_the_papers_values_are_by_task_then_dataset():
    assert list(probe.PAPER) == list(probe.TASKS)
    assert all("nuscenes" in rows for rows in probe.PAPER.values())
    for task, rows in finetune.LR.items():
        assert rows.keys() <= probe.PAPER[task].keys() and "nuscenes" in rows
    nuscenes, nuimages = (parsed(probe, f"--task seg --data {data}")
                          for data in ("x", "nuimages=x"))
    assert (nuscenes.batch, nuimages.batch) == (4, 24)
    assert (nuscenes.lr["ViT"], nuimages.lr["ViT"]) == (5e-4, 5e-3)


def test_a_dataset_without_values_of_its_own_takes_nuscenes():
    """No paper has depth on nuImages; that it has no depths is said later."""
    for script in (probe, finetune):
        of = [vars(parsed(script, f"--task depth --data {data}")) for data in ("x", "nuimages=x")]
        for args in of:
            del args["data"], args["out"]
        assert of[0] == of[1] and of[0]["batch"] == 16


def test_a_mixture_takes_the_values_of_its_first_dataset():
    assert parsed(probe, "--task seg --data nuimages=y,nuscenes=z").batch == 24
    assert parsed(probe, "--task seg --data nuscenes=z,nuimages=y").batch == 4
    assert parsed(finetune, "--task seg --data nuimages=y,nuscenes=z").lr == {"ViT": 2e-5}


def test_what_is_given_is_not_replaced():
    args = parsed(probe, "--task seg3d --end-lr 0 --warmup-epochs 0 --head linear --cameras all")
    assert (args.end_lr, args.warmup_epochs, args.head, args.cameras) == (0, 0, "linear", "all")

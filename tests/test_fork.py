"""The recipes of docs/fork.md, each carried out as it stands there: two steps in a copy.

A block of the page is a file, a change of a file, or commands. Paths, encoders and sizes of the
commands are replaced by small ones.
"""
import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import RUN

PAGE = ROOT / "docs/fork.md"
SMALL = ["--steps", "2", "--batch", "2", *RUN]
SIZES = {
    "stage1.py": ["--image-size", "80", "160", "--channels", "16", "--depth", "2",
                  "--fov", "48", "48", "8", "--cell", "1", "--neighbors", "4", *SMALL],
    "stage2.py": SMALL, "probe.py": SMALL, "restore.py": SMALL}
RECIPES = ("A dataset", "An image encoder", "A loss", "A 3D encoder",
           "An objective on images alone", "An evaluation")


def blocks(recipe):
    """[(name of the file or None, language, text)] of a recipe, in the page's order."""
    section = PAGE.read_text().split(f"\n## {recipe}\n")[1].split("\n## ")[0]
    found = []
    for name, language, text in re.findall(r"(?:`(\S+)`:\n\n)?```(\w+)\n(.*?)```", section, re.S):
        found.append((name or None, language, text))
    return found


def change(path, diff):
    """Apply a diff whose hunks, with @@ between them, say nothing of line numbers."""
    text = path.read_text()
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(before) == 1, f"docs/fork.md: {path.name} has not once:\n{before}"
        text = text.replace(before, after)
    path.write_text(text)


@pytest.fixture
def project(tmp_path):
    """A copy of the project, to be changed."""
    copy = tmp_path / "project"
    ignored = shutil.ignore_patterns(".*", "data", "runs", "tests", "docs", "__pycache__", "*.png")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def carry_out(recipe, project, world, prepared=None):
    """Write the files, make the changes and run the commands of a recipe; what they print.

    prepared: {beginning of a path in the commands: what stands there in the test}.
    """
    replaced = {"/data/nuscenes": str(world), "--weights mycnn.pth": "--weights random",
                "--encoder dinov2_vits14": f"--encoder {ROOT}/miniature/encoder.pth",
                "--encoder efficientnet_lite0": "--encoder efficientnet_lite0 --weights random"}
    printed = []
    for name, language, text in blocks(recipe):
        if language == "python":
            (project / name).write_text(text)
        elif language == "diff":
            change(project / name, text)
        elif language == "bash":
            for before, after in (replaced | (prepared or {})).items():
                text = text.replace(before, after)
            for line in text.splitlines():
                _, *words = shlex.split(line)
                command = [sys.executable, *words, *SIZES.get(words[0], ())]
                done = subprocess.run(command, cwd=project, capture_output=True, text=True)
                assert done.returncode == 0, f"{line}\n{done.stderr}"
                printed.append(done.stdout)
    return printed


def test_the_page_has_the_six_recipes():
    table = PAGE.read_text().split("\n## ")[0]
    for recipe in RECIPES:
        assert f"(#{recipe.lower().replace(' ', '-')})" in table
        languages = [language for _, language, _ in blocks(recipe)]
        assert languages[-1] == "bash" and set(languages) & {"python", "diff"}


@pytest.mark.slow
def test_a_dataset(project, world, tmp_path):
    my_drives(world, tmp_path / "mydrive")
    (frame,) = [json.loads(text) for _, kind, text in blocks("A dataset") if kind == "json"]
    written = json.loads((tmp_path / "mydrive/frames.json").read_text())
    assert written[0].keys() == frame.keys()
    printed = carry_out("A dataset", project, world, {"/data/mydrive": str(tmp_path / "mydrive")})
    assert re.search(r"train +full +2 +2 +2", printed[0])
    stage1 = torch.load(project / "runs/s1-mine/last.pth", weights_only=True)
    assert stage1["step"] == 2 and list(stage1["samplings"]) == ["mydrive"]
    probe = torch.load(project / "runs/probe-s1-mine-seg3d-mydrive/last.pth", weights_only=True)
    assert probe["classes"] == ("car", "person", "road", "building", "vegetation")
    # The table has one column: the dataset tells no conditions
    command = ["eval.py", "runs/probe-s1-mine-seg3d-mydrive", "--workers", "0", "--device", "cpu"]
    done = subprocess.run([sys.executable, *command], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| task | full |\n" in done.stdout


def my_drives(world, root):
    """Frames of a miniature world in the layout of the recipe: two to train, one to validate."""
    from readers.table import open_tables
    (table,) = open_tables(str(world), here=True)
    front = table.cameras.index("CAM_FRONT")
    merged = np.array([0, 4, 0, 0, 1, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 5])  # nuScenes' 16 classes
    frames = []
    (root / "files").mkdir(parents=True)
    for split, count in (("train", 2), ("val", 1)):
        for row in table.select(split).rows[:count]:
            scan = table.reader.scan(table.path("scan", row))
            labels = merged[table.labels(row, len(scan))]
            place = f"files/{len(frames)}"
            np.save(root / f"{place}-cloud.npy", scan)
            np.save(root / f"{place}-labels.npy", labels)
            shutil.copy(table.path("image", row, front), root / f"{place}.jpg")
            frames.append({
                "split": split, "drive": f"drive-{len(frames)}", "cloud": f"{place}-cloud.npy",
                "labels": f"{place}-labels.npy", "image": f"{place}.jpg",
                "image_size": table["image_size"][row, front].tolist(),
                "cam_from_lidar": table["cam_from_lidar"][row, front].tolist(),
                "intrinsics": table["intrinsics"][row, front].tolist()})
    (root / "frames.json").write_text(json.dumps(frames))


@pytest.mark.slow
def test_an_image_encoder(project, world):
    carry_out("An image encoder", project, world)
    before = torch.load(project / "runs/s1-cnn/last.pth", weights_only=True)
    after = torch.load(project / "runs/s2-cnn/last.pth", weights_only=True)
    assert before["spec"]["out_channels"] == 64
    assert after["encoder"]["name"] == "mycnn" and len(after["model"]) == 8
    assert (project / "runs/probe-s2-cnn-seg/last.pth").is_file()
    released = torch.load(project / "runs/s2-lite/last.pth", weights_only=True)
    assert released["encoder"]["name"] == "efficientnet_lite0"
    assert (project / "runs/probe-s2-lite-seg/last.pth").is_file()


@pytest.mark.slow
def test_a_loss(project, world):
    carry_out("A loss", project, world)
    cosine = json.loads((project / "runs/s1-cosine/log.jsonl").read_text().splitlines()[-1])
    assert 0 < cosine["loss"] < 1.5  # of unrelated directions it is 1, the other would be 1.4
    weights = torch.load(project / "runs/s1-contrast/last.pth", weights_only=True)
    assert weights["criterion"]["log_scale"] != torch.tensor(2.66)  # it learns


@pytest.mark.slow
def test_a_3d_encoder(project, world):
    carry_out("A 3D encoder", project, world)
    stage1 = torch.load(project / "runs/s1-pn/last.pth", weights_only=True)
    assert stage1["backbone"] == "pointnet" and "head.weight" in stage1["model"]
    assert (project / "runs/s2-pn/last.pth").is_file()
    assert (project / "runs/probe-s1-pn-seg3d/last.pth").is_file()


@pytest.mark.slow
def test_an_objective_on_images_alone(project, world):
    carry_out("An objective on images alone", project, world)
    before = torch.load(ROOT / "miniature/encoder.pth", weights_only=True)["model"]
    after = torch.load(project / "runs/restored/last.pth", weights_only=True)["model"]
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert (project / "runs/probe-restored-seg/last.pth").is_file()


@pytest.mark.slow
def test_an_evaluation(project, world, tmp_path):
    probe = ["probe.py", "--data", str(world), "--task", "depth", "--out", "runs/probe-s2-depth",
             "--encoder", f"{ROOT}/miniature/encoder.pth", *SMALL]
    subprocess.run([sys.executable, *probe], cwd=project, check=True, capture_output=True)
    (printed,) = carry_out("An evaluation", project, world)
    rows = re.findall(r"^ *\d+ to +\d+ m: +(\S+) m, (\d+) points$", printed, re.M)
    assert len(rows) == 4 and all(float(rmse) > 0 for rmse, count in rows if int(count))

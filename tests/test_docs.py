"""The commands of README and docs/ run: with other paths, sizes and numbers of steps.

What runs for hours has tests of its own, or is the demo's: see ELSEWHERE. Fenced blocks are the
recipes of docs/fork.md, which tests/test_fork.py carries out. The links have targets, README's map
has all files, and the functions that docs/read.md names are there.
"""
import re
import runpy
import shlex
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT
from runs import RUN

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "miniature/README.md"]
TWO_STEPS = ["--steps", "2", "--batch", "2", *RUN]
SMALL = {  # what is added to a command of a script
    "stage1": ["--channels", "16", "--depth", "2", "--fov", "48", "48", "8", "--cell", "1",
               "--neighbors", "4", "--image-size", "80", "160", *TWO_STEPS],
    "stage2": TWO_STEPS, "probe": TWO_STEPS, "finetune": TWO_STEPS,
    "eval": ["--workers", "0", "--device", "cpu"],
    "miniature.world": ["--train", "2", "1", "1", "--val", "1", "--frames", "1",
                        "--azimuths", "64", "--workers", "1"],
    "miniature.world --dataset": ["--train", "1", "0", "0", "--val", "1", "--frames", "1",
                                  "--azimuths", "64", "--workers", "1"],
    "experiments.corruptions make": ["--workers", "0"],
    "experiments.corruptions images": ["--workers", "0", "--device", "cpu"],
    "experiments.visualize": ["--device", "cpu"], "experiments.scalr_figures": ["--device", "cpu"]}
SMALL["experiments.ablations"] = SMALL["stage1"]
SMALL["s3pt.train"] = ["--encoder", "vit_mini8", "--image-size", "80", "160", "--crop", "32",
                       "--hidden", "32", "--bottleneck", "32", "--prototypes", "64", "--clusters",
                       "8", "--queue", "8", *TWO_STEPS]
SMALL["s3pt.segmenter"] = ["--scale", "160", "80", "--crop", "64", *TWO_STEPS]
SMALL["s3pt.segmenter --evaluate"] = ["--workers", "0", "--device", "cpu"]
ELSEWHERE = ("pip ", "demo ", "miniature.pretrain ",  # have tests of theirs
             "experiments.bench ", "experiments.bench_scalr ", "experiments.bench_s3pt ",
             "experiments.bench_real ",
             "experiments.reproduce --paper", "experiments.reproduce --claim", "experiments.real ",
             "experiments.real_figures ", "experiments.corruptions compare",
             "stage2 --data /data/nuscenes --stage1 WI_768")  # test_waffleiron_weights.py


def without_fenced_blocks(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def commands():
    """The commands of all pages in their order, as (page, module and arguments)."""
    found = []
    for page in PAGES:
        text = without_fenced_blocks(page.read_text()).replace("\\\n", " ")
        values = {}
        for line in re.findall(r"^    (\$?\w.*)$", text, re.M):
            values |= dict(re.findall(r'(\w+)="(.*?)"', line)) if re.match(r'\w+="', line) else {}
            for name, value in values.items():
                line = line.replace(f"${name} ", f"{value} ")
            words = shlex.split(line, comments=True)
            if not words or words[0] not in ("python", "torchrun", "pip"):
                continue
            rest = [word for word in words[1:] if word not in ("--standalone", "-m")]
            if words[0] == "torchrun":
                rest = rest[2:]  # without --nproc_per_node N
            module = rest[0].removesuffix(".py").replace("/", ".")
            argv = ["pip"] if words[0] == "pip" else [module, *rest[1:]]
            found.append((page.relative_to(ROOT).as_posix(), argv))
    return found


def test_the_commands_are_found():
    names = [argv[0] for _, argv in commands()]
    assert len(names) >= 30
    assert {"pip", "demo", "readers.nuscenes", "readers.nuimages", "readers.semantickitti",
            "s3pt.train", "s3pt.segmenter",
            "stage1", "stage2", "probe", "finetune", "eval", "export", "miniature.world",
            "miniature.pretrain",
            "experiments.scalr_figures", "experiments.ablations", "experiments.bench",
            "experiments.bench_scalr", "experiments.bench_s3pt", "experiments.bench_real",
            "experiments.corruptions", "experiments.reproduce",
            "experiments.visualize", "experiments.real", "experiments.real_figures"
            } == set(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_have_targets(page):
    text = without_fenced_blocks(page.read_text())
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", without_fenced_blocks(file.read_text()), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, (target, anchor)


def test_readme_is_a_landing_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 1500
    first_screen = text.partition("## Run the paper")[0]
    assert len(first_screen.splitlines()) <= 40


def test_readme_has_all_files():
    rows = re.findall(r"^\| (.*?) ?\| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    folder = ""  # of the row; a row without a place is the folder's above
    named = set()
    for place, concern in rows:
        if place.strip():
            folder = place.strip("`") if re.fullmatch(r"`\w+/`", place) else ""
        files = re.findall(r"`([\w.]+\.py)`", concern if folder else place)
        named |= {folder + file for file in files}
    folders = ("", "readers", "plumbing", "releases", "s3pt", "experiments")
    there = {path.relative_to(ROOT).as_posix() for name in folders
             for path in (ROOT / name).glob("*.py") if path.name != "__init__.py"}
    assert named == there


def test_what_the_reading_page_names_is_there():
    table = (ROOT / "docs/read.md").read_text().partition("## The papers' sections")[2]
    where = re.findall(r"^\| .* \| .* \| (.*) \|$", table.partition("\n## ")[0], re.M)
    assert len(where) >= 30
    folders = ("", "plumbing", "readers", "releases", "s3pt", "experiments")
    texts = {path.stem: path.read_text() for name in folders for path in (ROOT / name).glob("*.py")}
    for name in re.findall(r"`([A-Za-z_][\w.]*)[`( ]", " ".join(where)):
        if name.endswith(".py"):
            continue
        *owner, last = name.split(".")
        text = texts.get(owner[0]) if owner else None
        if text is None:  # without a file, or of a class
            text = "\n".join(text for text in texts.values()
                             if not owner or f"class {owner[0]}" in text)
        assert re.search(rf"\b(def|class) {last}\b|\b{last} = ", text), name


@pytest.fixture
def place(world, kitti, panda, tmp_path, monkeypatch):
    """A folder in which the pages' relative paths are."""
    from miniature.world import make_world
    images = tmp_path / "images"
    make_world(images, seed=3, train=(3, 1, 1), val=1, frames=1, workers=1, dataset="nuimages")
    cities = make_world(tmp_path / "cities", dataset="cityscapes", train=(2, 0, 0), val=1,
                        workers=1)
    for picture in (world / "samples/CAM_FRONT").iterdir():
        depths = tmp_path / "data/depth/samples/CAM_FRONT" / f"{picture.stem}.npy"
        depths.parent.mkdir(parents=True, exist_ok=True)
        np.save(depths, np.full((80, 160), 9.0))
    seed = tmp_path / "runs/miniature/seed-1"
    seed.mkdir(parents=True)
    for name, there in (("world", world), ("stage1", tmp_path / "runs/s1"),
                        ("seg-base", tmp_path / "runs/probe-a"),
                        ("seg-cd", tmp_path / "runs/probe-b"),
                        ("depth-base", tmp_path / "runs/probe-depth"),
                        ("depth-cd", tmp_path / "runs/probe-depth")):
        (seed / name).symlink_to(there)
    monkeypatch.chdir(tmp_path)
    shipped = str(ROOT / "miniature/encoder.pth")
    more = shutil.copytree(world, tmp_path / "more")
    return {"/data/nuscenes": str(world), "/data/more": str(more), "/data/nuimages": str(images),
            "/data/kitti": str(kitti), "/data/pandaset": str(panda),
            "/data/cityscapes": str(cities), "/data/pictures": str(world / "samples"),
            "miniature/encoder.pth": shipped, "dinov2_vits14": shipped, "vit_small14": "vit_small8",
            "dinov2_vitl14": shipped, "maskclip_vitb16": "runs/s2"}


@pytest.mark.slow
def test_commands_run(place, monkeypatch, capsys):
    depth = ["probe", "--data", "/data/nuscenes", "--encoder", "runs/s2", "--task", "depth",
             "--cameras", "all", "--out", "runs/probe-depth"]  # that docs/results.md draws
    ran = []
    for page, argv in sorted(commands(), key=lambda command: command[0] == "docs/results.md"):
        if (" ".join(argv) + " ").startswith(ELSEWHERE):
            continue
        if page == "docs/results.md" and depth not in ran:
            run(depth, place, monkeypatch)
            ran.append(depth)
        try:
            run(argv, place, monkeypatch)
        except SystemExit as error:
            message = capsys.readouterr().err
            needs_package = "pip install" in message  # of a format of export.py
            assert error.code in (0, None) or needs_package, (page, argv, message)
        ran.append(argv)
    assert len(ran) >= 25


def run(argv, replaced, monkeypatch):
    """Run one command, made small, in this process."""
    module, *rest = [small_word(word, replaced) for word in argv]
    small = SMALL.get(" ".join([module, *rest[:1]]), SMALL.get(module, []))
    if "--percent" in rest:  # of so few scenes there is no hundredth
        at = rest.index("--percent")
        del rest[at:at + 2]
    monkeypatch.setattr(sys, "argv", [module, *rest, *small])
    runpy.run_module(module, run_name="__main__")


def small_word(word, replaced):
    """A word of a command with its paths replaced; NAME=PATH,NAME=PATH keeps its NAMEs."""
    parts = re.split(r"(=|,)", word)
    return "".join(replaced.get(part, part) for part in parts)

"""Each script for two steps: what it writes, stopping and going on, two processes, bad input, defaults."""
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import demo
import eval as evaluation
import probe
import run_folder
import stage1
import stage2
from conftest import ROOT
from data import Frames, collate, read_labels, read_scan
from index import load_index
from miniature.world import make_world
from models import load_image_encoder

SMALL = ["--channels", "16", "--depth", "2", "--fov", "48", "48", "8", "--cell", "1", "--neighbors", "4"]
RUN = ["--workers", "0", "--device", "cpu", "--precision", "fp32", "--seed", "3"]


def stage1_args(world, out, *more):
    return ["--data", str(world), "--out", str(out), "--encoder", "vit_mini8", "--weights", "random", "--image-size", "80", "160",
            "--batch", "2", *SMALL, *RUN, *more]


def stage2_args(world, first, out, *more):
    return ["--data", str(world), "--stage1", str(first), "--out", str(out), "--batch", "2", "--lr", "1e-3", *RUN, *more]


def probe_args(world, task, encoder, out, *more):
    return ["--data", str(world), "--task", task, "--encoder", str(encoder), "--out", str(out), "--batch", "2", *RUN, *more]


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def model_of(out):
    return torch.load(out / "last.pth", weights_only=True)["model"]


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


@pytest.fixture(scope="module")
def second(world, first, tmp_path_factory):
    """A stage 2 of two steps after it."""
    out = tmp_path_factory.mktemp("runs") / "s2"
    stage2.main(stage2_args(world, first, out, "--steps", "2"))
    return out


# ---- two steps --------------------------------------------------------------------------------------------------------

def test_stage1_writes_what_stage2_needs(first):
    checkpoint = torch.load(first / "last.pth", weights_only=True)
    assert checkpoint["kind"] == "point_encoder" and checkpoint["step"] == 2
    assert checkpoint["waffleiron"]["channels"] == 16 and checkpoint["waffleiron"]["norm"] == "batchnorm"
    assert checkpoint["waffleiron"]["out_channels"] == 96 and tuple(checkpoint["image_size"]) == (80, 160)
    assert checkpoint["cloud"]["cell"] == 1 and checkpoint["encoder"]["name_or_path"] == "vit_mini8"
    assert 1 < lines(first)[-1]["loss"] < 1.6


def test_stage2_moves_the_image_encoder_and_only_it(first, second):
    before = load_image_encoder("vit_mini8", weights="random").backbone.state_dict()
    after = load_image_encoder(str(second))
    assert after.spec["image_size"] == (80, 160)
    moved = {key for key, value in after.backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert {"patch_embed.proj.weight", "blocks.3.mlp.fc2.weight", "norm.weight"} <= moved
    assert 1 < lines(second)[-1]["loss"] < 1.6


@pytest.mark.parametrize("task, cache", [("seg", False), ("seg", True), ("depth", False), ("depth", True), ("seg3d", False),
                                         ("seg3d", True)])
def test_probe_and_evaluation(world, first, second, tmp_path, task, cache, capsys):
    runs = [tmp_path / "a", tmp_path / "b"]
    for out in runs:
        probe.main(probe_args(world, task, first if task == "seg3d" else second, out, "--steps", "2",
                              *(["--head", "whitened", "--cache"] if cache else ["--head", "batchnorm"])))
        assert lines(out)[-1]["loss"] > 0
    evaluation.main([*map(str, runs), "--out", str(tmp_path / "table"), "--workers", "0", "--device", "cpu"])
    results = json.loads((tmp_path / "table.json").read_text())
    metric = "RMSE" if task == "depth" else "mIoU"
    assert set(results[0][metric]) == set(evaluation.COLUMNS) and results[0]["images"] == 6
    assert results[0][metric] == results[1][metric]  # the same seed, twice
    assert 0 < results[0][metric]["full"] < 100
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out
    assert (runs[0] / "results.json").is_file()


@pytest.mark.parametrize("task", ["seg", "depth"])
def test_finetuning_and_its_evaluation(world, second, tmp_path, task):
    more = ["--finetune", "--lr", "1e-3", "--steps", "9"]  # of 8 images, 2 a batch: the third epoch ends with the run
    probe.main(probe_args(world, task, second, tmp_path / "p", *more))
    last, best = (torch.load(tmp_path / "p" / f"{name}.pth", weights_only=True) for name in ("last", "best"))
    before = load_image_encoder(str(second)).backbone.state_dict()
    assert not torch.equal(last["backbone"]["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    losses = [line["validation_loss"] for line in lines(tmp_path / "p")]
    assert len(losses) == 3 and last["best"] == best["best"] == min(losses)
    assert best["step"] == (4, 8, 9)[losses.index(min(losses))]
    trained = sum(v.numel() for v in last["backbone"].values()) + sum(v.numel() for v in last["model"].values())
    assert lines(tmp_path / "p")[-1]["trainable_parameters"] == trained
    (tmp_path / "s2").symlink_to(second)
    evaluation.main([str(tmp_path / "p"), str(tmp_path / "p" / "best.pth"), "--out", str(tmp_path / "table"), "--workers", "0", "--device", "cpu"])
    results = json.loads((tmp_path / "table.json").read_text())
    assert [result["step"] for result in results] == [9, best["step"]]
    assert (tmp_path / "p" / "results.json").is_file() and (tmp_path / "p" / "results-best.json").is_file()
    # what eval.py loads is what was trained
    _, encoder, head, _ = evaluation.load_probe(tmp_path / "p", torch.device("cpu"))
    assert all(torch.equal(value, last["backbone"][name]) for name, value in encoder.backbone.state_dict().items())
    assert torch.equal(head[1].weight, last["model"]["1.weight"])


def test_the_head_may_have_a_learning_rate_of_its_own(world, second, tmp_path):
    """Adam's steps are about as long as the learning rate, whatever the gradient; through a head of zeros the first has none."""
    probe.main(probe_args(world, "depth", second, tmp_path / "p", "--finetune", "--lr", "1e-4", "--head-lr", "1e-2", "--steps", "2"))
    last = torch.load(tmp_path / "p" / "last.pth", weights_only=True)
    assert 1e-2 < last["model"]["1.bias"].abs().item() < 2e-2
    assert 2e-5 < largest_difference(last["backbone"], load_image_encoder(str(second)).backbone.state_dict()) < 1e-4


def test_one_percent_of_the_labels(world, second, tmp_path, capsys):
    percent = ["--percent", "10", "--steps", "1", "--batch", "1"]
    assert "--percent 10: every 10th scene is taken" in fails_with_one_line(
        capsys, probe.main, probe_args(world, "seg", second, tmp_path / "p", *percent))  # of eight
    ten = make_world(tmp_path / "ten", seed=7, train=(11, 0, 0), val=1, frames=1, workers=1)
    probe.main(probe_args(ten, "seg", second, tmp_path / "p", *percent))
    tenth = json.loads((ten / "v1.0-trainval/scene.json").read_text())[9]["name"]
    assert f"10 % of the training scenes: {tenth}\n" in capsys.readouterr().out
    assert torch.load(tmp_path / "p" / "last.pth", weights_only=True)["scenes"] == [tenth]


def test_3d_probe_of_whole_scans_is_judged_on_every_point(world, first, tmp_path):
    probe.main(probe_args(world, "seg3d", first, tmp_path / "p", "--steps", "2"))
    assert torch.load(tmp_path / "p" / "last.pth", weights_only=True)["args"]["cameras"] == "scan"
    evaluation.main([str(tmp_path / "p"), "--out", str(tmp_path / "table"), "--workers", "0", "--device", "cpu"])
    found = json.loads((tmp_path / "p" / "results.json").read_text())["mIoU"]

    index = load_index(world)
    probe_, encoder, head, cloud = evaluation.load_probe(tmp_path / "p", torch.device("cpu"))
    confusion = torch.zeros(16, 16, dtype=torch.long)
    for row in index.select("val"):  # one scan at a time, the nearest point by brute force
        item = Frames(index, [row], "scan", None, cloud | {"max_points": 10**9}, labels=True)[0, 0]
        batch = collate([item])
        with torch.no_grad():
            classes = head(encoder.features(batch["feats"], batch["cells"], batch["neighbors"], batch["batch"])).argmax(1)
        scan = read_scan(world / index.lidar[row].decode())
        nearest = torch.cdist(torch.from_numpy(scan[:, :3].copy()).double(), item["feats"][:, 1:4].double()).argmin(1)
        truth = torch.from_numpy(read_labels(world / index.lidarseg[row].decode(), index.coarse, len(scan)).astype("int64"))
        confusion += evaluation.confusion_matrix(classes[nearest][truth > 0], truth[truth > 0] - 1, 16)
    assert found["full"] == pytest.approx(100 * evaluation.mean_iou(confusion), abs=0.02)


def test_cached_features_give_the_same_probe(world, second, tmp_path):
    for name, more in (("plain", []), ("cached", ["--cache"])):
        probe.main(probe_args(world, "depth", second, tmp_path / name, "--steps", "3", *more))
    plain, cached = model_of(tmp_path / "plain"), model_of(tmp_path / "cached")
    assert 0 < largest_difference(plain, cached) < 1e-3  # half precision


@pytest.mark.slow
def test_bf16_is_near_fp32(world, first, second, tmp_path):
    """The same run in both precisions, from training to the table (where the head stays in fp32)."""
    found = {}
    for precision in ("fp32", "bf16"):
        out, more = tmp_path / precision, ["--precision", precision, "--steps", "3"]
        stage1.main(stage1_args(world, out / "s1", *more))
        stage2.main(stage2_args(world, first, out / "s2", *more))
        probe.main(probe_args(world, "depth", second, out / "probe", "--head", "batchnorm", "--lr", "1", *more))
        evaluation.main([str(out / "probe"), "--out", str(out / "table"), "--workers", "0", "--device", "cpu"])
        found[precision] = [lines(out / "s1")[-1]["loss"], lines(out / "s2")[-1]["loss"],
                            json.loads((out / "table.json").read_text())[0]["RMSE"]["full"]]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02)
    assert found["bf16"] != found["fp32"]


# ---- stopped and resumed ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["stage1", "stage2", "probe", "finetune"])
def test_a_stopped_run_goes_on_as_if_it_had_not(world, first, second, tmp_path, script, monkeypatch):
    def start(out):
        more = ["--steps", "6", "--save-every", "0"]  # a checkpoint after each step
        if script == "stage1":
            stage1.main(stage1_args(world, out, *more))
        elif script == "stage2":
            stage2.main(stage2_args(world, first, out, *more))
        elif script == "finetune":
            probe.main(probe_args(world, "seg", second, out, *more, "--finetune", "--lr", "1e-3"))
        else:
            probe.main(probe_args(world, "seg3d", first, out, *more))

    start(tmp_path / "through")
    save = run_folder.save

    def save_and_stop(path, content):
        save(path, content)
        if content["step"] == 3 and str(path).endswith("last.pth"):
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "stopped")
    assert torch.load(tmp_path / "stopped" / "last.pth", weights_only=True)["step"] == 3
    start(tmp_path / "stopped")
    assert largest_difference(model_of(tmp_path / "through"), model_of(tmp_path / "stopped")) == 0
    assert [line["loss"] for line in lines(tmp_path / "through")] == [line["loss"] for line in lines(tmp_path / "stopped")]
    before = (tmp_path / "stopped" / "log.jsonl").read_text()
    start(tmp_path / "stopped")  # finished: nothing is done again
    assert (tmp_path / "stopped" / "log.jsonl").read_text() == before


# ---- two processes ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("script", ["stage1", "stage2", "finetune"])
def test_two_processes_are_one_with_the_same_global_batch(world, first, second, tmp_path, script):
    def command(out):
        more = ["--steps", "3", "--batch", "4"]
        return {"stage1": stage1_args(world, out, *more), "stage2": stage2_args(world, first, out, *more, "--lr", "1e-4"),
                "finetune": probe_args(world, "depth", second, out, *more, "--finetune", "--lr", "1e-4")}[script]

    module = "probe" if script == "finetune" else script
    getattr(sys.modules[__name__], module).main(command(tmp_path / "one"))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           f"{module}.py", *command(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = model_of(tmp_path / "one"), model_of(tmp_path / "two")
    # Adam divides by the gradient's size: rounding differences of a gradient near zero reach the size of a step
    typical = {"stage1": 2e-3, "stage2": 1e-4, "finetune": 1e-4}[script]
    mean = torch.cat([(one[k].double() - two[k].double()).abs().flatten() for k in one if "num_batches" not in k]).mean()
    assert mean < 0.01 * typical
    assert lines(tmp_path / "two")[-1]["loss"] == pytest.approx(lines(tmp_path / "one")[-1]["loss"], rel=1e-4)


@pytest.mark.slow
def test_evaluation_sums_over_processes(world, second, tmp_path):
    for task in ("seg", "depth"):
        probe.main(probe_args(world, task, second, tmp_path / task, "--steps", "2"))
    evaluate = ["eval.py", str(tmp_path / "seg"), str(tmp_path / "depth"), f"{tmp_path}/./seg", "--workers", "0", "--device", "cpu", "--again", "--out"]
    evaluation.main([*evaluate[1:], str(tmp_path / "one")])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *evaluate,
                           str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert len(one) == len(two) == 2 and one[0]["IoU"] == two[0]["IoU"]  # a folder that is given twice is one
    assert one[1]["RMSE"] == pytest.approx(two[1]["RMSE"])


# ---- bad input ------------------------------------------------------------------------------------------------------------

def fails_with_one_line(capsys, main, argv):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line and "it/s" not in line and "?" not in line[-12:]]
    assert len(err) == 1, err
    return err[0]


def test_bad_input_is_one_line_and_exit_code_2(world, first, second, tmp_path, capsys):
    out = tmp_path / "out"
    assert "not a nuScenes root" in fails_with_one_line(capsys, stage1.main, stage1_args(tmp_path, out))
    args = stage1_args(world, out)
    args[args.index("vit_mini8")] = "vit_mini9"
    assert "did you mean vit_mini8" in fails_with_one_line(capsys, stage1.main, args)
    assert "no such file" in fails_with_one_line(capsys, stage2.main, stage2_args(world, tmp_path / "none", out))
    assert "point_encoder is needed" in fails_with_one_line(capsys, stage2.main, stage2_args(world, second, out))
    assert "image_encoder is needed" in fails_with_one_line(capsys, probe.main, probe_args(world, "seg", first, out))
    assert "choose another --out" in fails_with_one_line(capsys, stage1.main, stage1_args(world, first, "--steps", "3"))
    assert "--image-size 81 160" in fails_with_one_line(capsys, stage1.main, stage1_args(world, out, "--image-size", "81", "160"))
    assert "--batch 99" in fails_with_one_line(capsys, stage1.main, stage1_args(world, out, "--batch", "99"))
    assert "--steps 0" in fails_with_one_line(capsys, stage1.main, stage1_args(world, out, "--steps", "0"))
    finetune = probe_args(world, "seg", second, out, "--finetune")
    assert "--finetune: not with --cache" in fails_with_one_line(capsys, probe.main, [*finetune, "--cache"])
    assert "--head-lr: for --finetune" in fails_with_one_line(capsys, probe.main, probe_args(world, "seg", second, out, "--head-lr", "1"))
    assert "--finetune: not with --task seg3d" in fails_with_one_line(capsys, probe.main, probe_args(world, "seg3d", first, out, "--finetune"))
    assert "for --task seg3d only" in fails_with_one_line(capsys, probe.main, probe_args(world, "seg", second, out, "--cameras", "scan"))
    resnet = probe_args(world, "seg", "dino_resnet50", out, "--weights", "random", "--image-size", "64", "128", "--finetune")
    assert "--lr: the paper has none here for a ResNet-50" in fails_with_one_line(capsys, probe.main, resnet)
    assert "no last.pth" in fails_with_one_line(capsys, evaluation.main, [str(tmp_path)])
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["scan", "image"])
def test_damaged_files_found_by_a_loading_process_are_one_line(world, tmp_path, damage):
    root = tmp_path / "copy"
    shutil.copytree(world, root)
    command = [sys.executable, "stage1.py", *stage1_args(root, tmp_path / "out", "--steps", "2", "--batch", "4", "--workers", "1")]
    load_index(root)
    for path in (root / "samples" / ("LIDAR_TOP" if damage == "scan" else "CAM_FRONT")).iterdir():
        path.write_bytes(path.read_bytes()[:1003])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(error) == 1 and str(root) in error[0] and "Traceback" not in done.stderr, done.stderr


# ---- defaults -----------------------------------------------------------------------------------------------------------

def test_defaults_are_readme_s_table():
    """Rows of README's table: | script | flag | paper | default |."""
    rows = re.findall(r"^\| `(stage1|stage2|probe --task [\w -]+)` \| `--([\w-]+)` \| (.+?) \| `(.+?)` \|", (ROOT / "README.md").read_text(),
                      re.M)
    assert len(rows) >= 30
    parsers = {"stage1": lambda: stage1.parse(["--data", "x", "--out", "y"]),
               "stage2": lambda: stage2.parse(["--data", "x", "--out", "y", "--stage1", "z"])}
    for script, flag, _, default in rows:
        if script.startswith("probe"):
            args = probe.parse(["--data", "x", "--out", "y", "--encoder", "z", *script.split()[1:]])
        else:
            args = parsers[script]()
        value = getattr(args, flag.replace("-", "_"))
        if isinstance(value, dict):  # by family of encoder
            assert default == ", ".join(f"{family} {v}" for family, v in value.items()), (script, flag)
            continue
        words = default.split()
        found = [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
        try:
            assert [float(word) for word in words] == [float(word) for word in found], (script, flag)
        except ValueError:
            assert words == found, (script, flag)


# ---- the real keyframe --------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_paper_s_networks_on_a_real_frame(real, tmp_path):
    """WI-48-768 and a ViT of 384 channels: two steps of each stage on one camera of one frame, the loss falling."""
    common = ["--data", str(real), "--version", "v1.0-mini", "--cameras", "CAM_FRONT", "--batch", "1", "--steps", "2", *RUN]
    stage1.main([*common, "--encoder", "vit_small14", "--weights", "random", "--out", str(tmp_path / "s1")])
    stage2.main([*common, "--stage1", str(tmp_path / "s1"), "--out", str(tmp_path / "s2"), "--warmup", "0"])
    for out in ("s1", "s2"):
        losses = [line["loss"] for line in lines(tmp_path / out)]
        assert len(losses) == 2 and 0 < losses[1] < losses[0] < 2
    checkpoint = torch.load(tmp_path / "s1" / "last.pth", weights_only=True)
    assert sum(v.numel() for k, v in checkpoint["model"].items() if "running" not in k and "num_" not in k) == 59730836


# ---- demo ---------------------------------------------------------------------------------------------------------------

def test_summary_of_the_demo():
    rows = {"base": {"mIoU": dict.fromkeys(demo.COLUMNS, 30.0), "RMSE": dict.fromkeys(demo.COLUMNS, 6.0)},
            "cd": {"mIoU": dict.fromkeys(demo.COLUMNS, 32.0), "RMSE": dict.fromkeys(demo.COLUMNS, 5.5)},
            "3d": {"mIoU": dict.fromkeys(demo.COLUMNS, 70.0)}}
    text = demo.summary({1: rows})
    assert "| mIoU, change by CD | +2.0 | +2.0 | +2.0 | +2.0 |" in text
    assert "| RMSE, change by CD | -0.50 |" in text
    other = {**rows, "cd": {"mIoU": dict.fromkeys(demo.COLUMNS, 34.0), "RMSE": dict.fromkeys(demo.COLUMNS, 5.5)}}
    assert "| mIoU, change by CD | +3.0 ± 1.4 |" in demo.summary({1: rows, 2: other})


def test_the_demo_s_commands_are_understood_by_the_scripts(monkeypatch, tmp_path):
    """Each printed command parses; only the scripts' own work is left out."""
    seen = []

    def record(command):
        script, *argv = shlex.split(command)
        seen.append(script)
        if script in ("stage1.py", "stage2.py", "probe.py"):
            args = {"stage1.py": stage1, "stage2.py": stage2, "probe.py": probe}[script].parse(argv)
            assert args.seed == 5 and args.data == "data/world-5"
        if script == "eval.py":
            rows = [{"task": p.rsplit("/", 1)[1].split("-")[0], "mIoU": {}, "RMSE": {}} for p in argv if "seed-5/" in p and "table" not in p]
            out = tmp_path / "seed-5" / "table.json"
            out.parent.mkdir()
            out.write_text(json.dumps(rows))
    monkeypatch.setattr(demo, "run", record)
    results = demo.one_world(5, "miniature/encoder.pth", str(tmp_path))
    assert seen == ["miniature/world.py", "stage1.py", "stage2.py", *["probe.py"] * 5, "eval.py", "miniature/overview.py"]
    assert {name: set(metrics) for name, metrics in results.items()} == {
        "base": {"mIoU", "RMSE"}, "cd": {"mIoU", "RMSE"}, "3d": {"mIoU"}}


def test_whitened_head_needs_the_cache(world, first, tmp_path, capsys):
    assert "--cache" in fails_with_one_line(capsys, probe.main, probe_args(world, "seg", first, tmp_path, "--head", "whitened"))


def test_a_probe_has_a_folder_of_its_own_by_default():
    assert probe.parse(["--data", "x", "--encoder", "runs/s2", "--task", "seg"]).out == "runs/probe-s2-seg"

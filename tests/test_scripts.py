"""Each script for two steps: what it writes, stopping and going on, two processes, bad input."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from runs import (RUN, SPAWN, checkpoint_of, eval_args, fails_with_one_line, largest_difference,
                  lines, model_of, open_one, probe_args, stage1_args, stage2_args)

import eval as evaluation
import finetune
import probe
import stage1
import stage2
from data import Frames, collate
from metrics import confusion_matrix, mean_iou
from miniature.world import make_world
from models import load_image_encoder
from plumbing import run_folder
from readers.files import read_labels, read_scan
from readers.nuscenes import CONDITIONS, SAMPLING
from readers.table import open_tables

CPU = torch.device("cpu")
COLUMNS = ["full", *CONDITIONS]


# ---- two steps -----------------------------------------------------------------------------------

def test_stage1_writes_what_stage2_needs(first):
    checkpoint = checkpoint_of(first)
    spec = checkpoint["spec"]
    assert checkpoint["kind"] == "point_encoder" and checkpoint["step"] == 2
    assert checkpoint["backbone"] == "waffleiron" and checkpoint["layout"] == 2
    assert spec["channels"] == 16 and spec["norm"] == "batchnorm"
    assert spec["out_channels"] == 96 and tuple(checkpoint["image_size"]) == (80, 160)
    sampling = checkpoint["samplings"]["nuscenes"]
    assert sampling["cell"] == 1 and sampling["fov"] == (48, 48, 8)  # of the flags
    assert sampling == SAMPLING | {"cell": 1, "fov": (48, 48, 8), "neighbors": 4}  # else its own
    assert checkpoint["encoder"]["name_or_path"] == "vit_mini8"
    line = lines(first)[-1]
    assert 1 < line["loss"] < 1.6
    # What to look at before stage 2
    assert 1 < line["effective_rank"] < 96 and 1 < line["teacher_rank"] < 96
    assert 0 < line["constant_loss"] < 2 ** 0.5


def test_stage2_moves_the_image_encoder_and_only_it(first, second):
    before = load_image_encoder("vit_mini8", weights="random").backbone.state_dict()
    after = load_image_encoder(str(second))
    assert after.spec["image_size"] == (80, 160)
    moved = {key for key, value in after.backbone.state_dict().items()
             if not torch.equal(value, before[key])}
    assert {"patch_embed.proj.weight", "blocks.3.mlp.fc2.weight", "norm.weight"} <= moved
    assert 1 < lines(second)[-1]["loss"] < 1.6


def test_a_probe_takes_so_many_points_of_a_view(world, tmp_path, capsys):
    frames = Frames([open_one(world)], image_size=(80, 160), target="labels", seed=5)
    whole = frames[0, 0]
    count = len(whole["labels"])
    places = {tuple(pixel) for pixel in whole["pixels"].tolist()}
    frames.most = 50
    few = frames[0, 0]
    kept = [tuple(pixel) for pixel in few["pixels"].tolist()]
    assert count > 50 == len(few["labels"]) == len(set(kept)) and set(kept) <= places
    assert kept != [tuple(pixel) for pixel in frames[1, 0]["pixels"].tolist()]  # of another epoch
    assert kept == [tuple(pixel) for pixel in frames[0, 0]["pixels"].tolist()]
    of_place = dict(zip(map(tuple, whole["pixels"].tolist()), whole["depths"].tolist()))
    assert few["depths"].tolist() == [of_place[pixel] for pixel in kept]
    frames.most = count
    assert torch.equal(frames[0, 0]["pixels"], whole["pixels"])

    flags = ["--weights", "random", "--points", "50", "--steps", "2"]
    args = probe_args(world, "depth", "vit_mini8", tmp_path / "p", *flags)
    probe.main([*args, "--head", "whitened", "--cache"])
    assert lines(tmp_path / "p")[-1]["loss"] > 0
    with pytest.raises(SystemExit):
        probe.main(probe_args(world, "seg3d", tmp_path, tmp_path / "q", "--points", "50"))
    assert "--points has no meaning for --task seg3d" in capsys.readouterr().err


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("task", ["seg", "depth", "seg3d"])
def test_probe_and_evaluation(world, first, second, tmp_path, task, cache, capsys):
    encoder = first if task == "seg3d" else second
    head = ["--head", "whitened", "--cache"] if cache else ["--head", "batchnorm"]
    runs = [tmp_path / "a", tmp_path / "b"]
    for out in runs:
        probe.main(probe_args(world, task, encoder, out, "--steps", "2", *head))
        assert lines(out)[-1]["loss"] > 0

    evaluation.main(eval_args(*runs, out=tmp_path / "table"))
    results = json.loads((tmp_path / "table.json").read_text())
    metric = "RMSE" if task == "depth" else "mIoU"
    assert list(results[0][metric]) == results[0]["columns"] == COLUMNS
    assert results[0]["images"] == 6
    assert results[0][metric] == results[1][metric]  # the same seed, twice
    assert 0 < results[0][metric]["full"] < 100
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out
    assert (runs[0] / "results.json").is_file()


@pytest.mark.slow
def test_one_percent_of_the_labels(world, second, tmp_path, capsys):
    out = tmp_path / "p"
    percent = ["--percent", "10", "--steps", "1", "--batch", "1"]
    # the world has eight scenes
    assert "--percent 10: every 10th scene is taken" in fails_with_one_line(
        capsys, probe.main, probe_args(world, "seg", second, out, *percent))

    eleven = make_world(tmp_path / "ten", seed=7, train=(11, 0, 0), val=1, frames=1, workers=1)
    probe.main(probe_args(eleven, "seg", second, out, *percent))
    tenth = json.loads((eleven / "v1.0-trainval/scene.json").read_text())[9]["name"]
    assert f"10 % of the training scenes: {tenth}\n" in capsys.readouterr().out
    assert checkpoint_of(out)["scenes"] == [tenth]


@pytest.mark.slow
def test_3d_probe_of_whole_scans_is_judged_on_every_point(world, first, tmp_path):
    """eval.py's mIoU equals that of one scan at a time, the nearest point found by brute force."""
    out = tmp_path / "p"
    probe.main(probe_args(world, "seg3d", first, out, "--steps", "2"))
    assert checkpoint_of(out)["args"]["cameras"] == "scan"
    evaluation.main(eval_args(out, out=tmp_path / "table"))
    found = json.loads((out / "results.json").read_text())["mIoU"]

    (table,) = open_tables(str(world))
    probed, encoder, head = evaluation.load_probe(out, CPU)
    table.sampling = probed["samplings"]["nuscenes"] | {"max_points": 10**9}
    confusion = torch.zeros(16, 16, dtype=torch.long)
    for row in table.select("val").rows:
        # the classes of the points that the encoder sees
        frames = Frames([table.only([row])], "scan", None, encoder.prepare, "labels")
        batch = collate([frames[0, 0]])
        with torch.no_grad():
            classes = head(encoder.features(batch)).argmax(1)

        # each point of the scan gets the class of the nearest of them
        scan = read_scan(world / table["scan"][row].decode())
        xyz = torch.from_numpy(scan[:, :3].copy()).double()
        seen = batch["inputs"]["points"][:, 1:4].double()
        nearest = torch.cdist(xyz, seen).argmin(1)
        labels = read_labels(world / table["labels"][row].decode(), table["label_map"], len(scan))
        truth = torch.from_numpy(labels.astype("int64"))
        labelled = truth > 0
        confusion += confusion_matrix(classes[nearest][labelled], truth[labelled] - 1, 16)
    assert found["full"] == pytest.approx(100 * mean_iou(confusion), abs=0.02)


def test_3d_probe_of_a_camera_is_judged_at_its_points(world, first, tmp_path):
    out = tmp_path / "p"
    probe.main(probe_args(world, "seg3d", first, out, "--steps", "2", "--cameras", "all"))
    assert checkpoint_of(out)["image_size"] is None
    evaluation.main(eval_args(out, out=tmp_path / "table"))
    result = json.loads((out / "results.json").read_text())
    assert 0 < result["mIoU"]["full"] < 100
    protocol = result["protocol"]  # of each dataset
    # a new result is comparable with a stored one
    assert evaluation.Evaluation(out, CPU).protocol == protocol
    assert (protocol["fov"], protocol["voxel"], protocol["max_points"]) == (
        [[48, 48, 8]], [0.1], [20000])


def test_cached_features_give_the_same_probe(world, second, tmp_path):
    for name, more in (("plain", []), ("cached", ["--cache"])):
        probe.main(probe_args(world, "depth", second, tmp_path / name, "--steps", "3", *more))
    plain, cached = model_of(tmp_path / "plain"), model_of(tmp_path / "cached")
    assert 0 < largest_difference(plain, cached) < 1e-3  # half precision


@pytest.mark.slow
def test_bf16_is_near_fp32(world, first, second, tmp_path):
    """The same run in both precisions, from training to the table; a probe's head stays in fp32."""
    found = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        more = ["--precision", precision, "--steps", "3"]
        stage1.main(stage1_args(world, out / "s1", *more))
        stage2.main(stage2_args(world, first, out / "s2", *more))
        probe.main(probe_args(world, "depth", second, out / "probe", "--head", "batchnorm",
                              "--lr", "1", *more))
        evaluation.main(eval_args(out / "probe", out=out / "table"))
        results = json.loads((out / "table.json").read_text())
        found[precision] = [lines(out / "s1")[-1]["loss"], lines(out / "s2")[-1]["loss"],
                            results[0]["RMSE"]["full"]]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02)
    assert found["bf16"] != found["fp32"]


# ---- stopped and resumed -------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("script", ["stage1", "stage2", "probe", "finetune"])
def test_a_stopped_run_goes_on_as_if_it_had_not(
        world, first, second, tmp_path, script, monkeypatch):
    through, stopped = tmp_path / "through", tmp_path / "stopped"

    def start(out):
        more = ["--steps", "6", "--save-every", "0"]  # a checkpoint after each step
        if script == "stage1":
            stage1.main(stage1_args(world, out, *more))
        elif script == "stage2":
            stage2.main(stage2_args(world, first, out, *more))
        elif script == "finetune":
            finetune.main(probe_args(world, "seg", second, out, *more, "--lr", "1e-3"))
        else:
            probe.main(probe_args(world, "seg3d", first, out, *more))

    start(through)

    # the other one is stopped after its third step
    save = run_folder.save

    def save_and_stop(path, content):
        save(path, content)
        if content["step"] == 3 and str(path).endswith("last.pth"):
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            start(stopped)
    assert checkpoint_of(stopped)["step"] == 3

    # the same command goes on
    start(stopped)
    assert largest_difference(model_of(through), model_of(stopped)) == 0
    assert [line["loss"] for line in lines(through)] == [line["loss"] for line in lines(stopped)]

    # finished: nothing is done again
    before = (stopped / "log.jsonl").read_text()
    start(stopped)
    assert (stopped / "log.jsonl").read_text() == before


# ---- two processes -------------------------------------------------------------------------------

def run_two(script, *argv):
    """Run a script in two processes, and wait for its end."""
    done = subprocess.run([sys.executable, *SPAWN, script, *argv], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["stage1", "stage2", "finetune"])
def test_two_processes_are_one_with_the_same_global_batch(world, first, second, tmp_path, script):
    def command(out):
        more = ["--steps", "3", "--batch", "4"]
        if script == "stage1":
            return stage1_args(world, out, *more)
        if script == "stage2":
            return stage2_args(world, first, out, *more, "--lr", "1e-4")
        return probe_args(world, "depth", second, out, *more, "--lr", "1e-4")

    module = {"stage1": stage1, "stage2": stage2, "finetune": finetune}[script]
    module.main(command(tmp_path / "one"))
    run_two(f"{module.__name__}.py", *command(tmp_path / "two"))
    one, two = model_of(tmp_path / "one"), model_of(tmp_path / "two")

    # Adam divides by the gradient's size: where a gradient is near zero, its rounding differences
    # reach the size of a step. The mean over all weights is far below it.
    step = {"stage1": 2e-3, "stage2": 1e-4, "finetune": 1e-4}[script]
    differences = [(one[name].double() - two[name].double()).abs().flatten()
                   for name in one if "num_batches" not in name]
    assert torch.cat(differences).mean() < 0.01 * step
    losses = [lines(tmp_path / name)[-1]["loss"] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_evaluation_sums_over_processes(world, second, tmp_path):
    for task in ("seg", "depth"):
        probe.main(probe_args(world, task, second, tmp_path / task, "--steps", "2"))
    # a folder that is given twice is one
    runs = [tmp_path / "seg", tmp_path / "depth", f"{tmp_path}/./seg"]
    evaluation.main([*eval_args(*runs, out=tmp_path / "one"), "--again"])
    run_two("eval.py", *eval_args(*runs, out=tmp_path / "two"), "--again")
    one = json.loads((tmp_path / "one.json").read_text())
    two = json.loads((tmp_path / "two.json").read_text())
    assert len(one) == len(two) == 2 and one[0]["IoU"] == two[0]["IoU"]
    assert one[1]["RMSE"] == pytest.approx(two[1]["RMSE"])


# ---- bad input -----------------------------------------------------------------------------------

def test_bad_input_is_one_line_and_exit_code_2(world, first, second, tmp_path, capsys):
    out = tmp_path / "out"

    def refusal(script, argv):
        return fails_with_one_line(capsys, script.main, argv)

    # stage 1
    def of_stage1(*more):
        return refusal(stage1, stage1_args(world, out, *more))
    assert "not a nuScenes root" in refusal(stage1, stage1_args(tmp_path, out))
    assert "choose another --out" in refusal(stage1, stage1_args(world, first, "--steps", "3"))
    args = stage1_args(world, out)
    args[args.index("vit_mini8")] = "vit_mini9"
    assert "did you mean vit_mini8" in refusal(stage1, args)
    assert "--image-size 81 160" in of_stage1("--image-size", "81", "160")
    assert "--batch 99" in of_stage1("--batch", "99")
    assert "--steps 0" in of_stage1("--steps", "0")
    assert ("--backbone minkunet: there is no minkunet.py with a function `prepare`; choose one of "
            "waffleiron") in of_stage1("--backbone", "minkunet")
    assert "--recompute: not with BatchNorm" in of_stage1("--recompute")
    assert "--cell 0.7: twice --fov 48 is not a whole number" in of_stage1("--cell", "0.7")
    unknown = f"--conditions fog: --data {world} has day-clear, day-rain, night"
    assert unknown in of_stage1("--conditions", "day-clear", "fog")

    # stage 2
    assert "no such file" in refusal(stage2, stage2_args(world, tmp_path / "none", out))
    assert "point_encoder is needed" in refusal(stage2, stage2_args(world, second, out))
    assert unknown in refusal(stage2, stage2_args(world, first, out, "--conditions", "fog"))

    # probes
    def of_probe(task, encoder, *more):
        return refusal(probe, probe_args(world, task, encoder, out, *more))
    assert "image_encoder is needed" in of_probe("seg", first)
    assert "for --task seg3d only" in of_probe("seg", second, "--cameras", "scan")

    # flags of the other script
    assert "unrecognized arguments: --head-lr 1" in of_probe("seg", second, "--head-lr", "1")
    assert "unrecognized arguments: --finetune" in of_probe("seg", second, "--finetune")

    # evaluation
    assert "no last.pth" in refusal(evaluation, [str(tmp_path)])
    assert not out.exists()


def test_whitened_head_needs_the_cache(world, first, tmp_path, capsys):
    args = probe_args(world, "seg", first, tmp_path, "--head", "whitened")
    assert "--cache" in fails_with_one_line(capsys, probe.main, args)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["scan", "image"])
def test_damaged_files_found_by_a_loading_process_are_one_line(copy, tmp_path, damage):
    open_tables(str(copy))

    # every file is cut short
    folder = "LIDAR_TOP" if damage == "scan" else "CAM_FRONT"
    for path in (copy / "samples" / folder).iterdir():
        path.write_bytes(path.read_bytes()[:1003])

    more = ["--steps", "2", "--batch", "4", "--workers", "1"]
    command = [sys.executable, "stage1.py", *stage1_args(copy, tmp_path / "out", *more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(error) == 1 and str(copy) in error[0], done.stderr
    assert "Traceback" not in done.stderr, done.stderr


# ---- the real keyframe ---------------------------------------------------------------------------

@pytest.mark.slow
def test_the_paper_s_networks_on_a_real_frame(real, tmp_path):
    """WI-48-768 and a ViT of 384 channels: two steps of each stage on one image; losses fall."""
    s1, s2 = tmp_path / "s1", tmp_path / "s2"
    common = ["--data", str(real), "--version", "v1.0-mini", "--cameras", "CAM_FRONT",
              "--batch", "1", "--steps", "2", *RUN]
    stage1.main([*common, "--encoder", "vit_small14", "--weights", "random", "--out", str(s1)])
    stage2.main([*common, "--stage1", str(s1), "--out", str(s2), "--warmup-part", "0"])
    for out in (s1, s2):
        losses = [line["loss"] for line in lines(out)]
        assert len(losses) == 2 and 0 < losses[1] < losses[0] < 2
    weights = [value for name, value in model_of(s1).items()
               if "running" not in name and "num_" not in name]
    assert sum(value.numel() for value in weights) == 59730836

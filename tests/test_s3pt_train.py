"""S3PT's script: each objective for some steps, two processes, kills, and what comes out."""
import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED
from runs import checkpoint_of, fails_with_one_line, largest_difference, lines
from test_processes import free_port
from test_survival import DiesAt, half_written

import s3pt.train as script
from models import load_image_encoder
from plumbing import run_folder
from s3pt import crops

pytestmark = pytest.mark.slow  # each test is a run, or reads those of three
SMALL = ["--encoder", "vit_mini8", "--crop", "32", "--hidden", "32",
         "--bottleneck", "32", "--prototypes", "64", "--image-size", "80", "160", "--batch", "4",
         "--warmup-epochs", "0", "--workers", "0", "--device", "cpu", "--precision", "fp32"]
OBJECTS = ["--clusters", "8", "--queue", "8", "--freeze-epochs", "1"]
OBJECTIVES = {"dino": ["--local-crops", "2", "--local-crop", "16"], "cribo": OBJECTS,
              "s3pt": OBJECTS}
STEPS = 5  # an epoch of the 14 pictures has three


def argv(world, out, objective="s3pt", *more):
    return ["--data", str(world), "--out", str(out), "--objective", objective, *SMALL,
            *OBJECTIVES[objective], "--steps", str(STEPS), *more]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Folder of a run of each objective."""
    folder = tmp_path_factory.mktemp("s3pt")
    for objective in OBJECTIVES:
        script.main(argv(world, folder / objective, objective))
    return folder


# ---- what comes out ------------------------------------------------------------------------------

def test_each_objective_logs_its_losses_and_how_it_does(runs):
    for objective in OBJECTIVES:
        first, last = lines(runs / objective)
        assert (first["step"], last["step"], last["split"]) == (3, STEPS, "all")
        of_objects = {"object_cross_view", "object_cross_image"}
        assert (of_objects <= first["loss_of"].keys()) == (objective != "dino")
        assert first["loss"] == pytest.approx(sum(first["loss_of"].values()), rel=1e-5)
        for name in ("entropy_of_mean", "mean_entropy", "prototypes_used", "prototype_norms",
                     "effective_rank", "feature_variance", "lr", "teacher_temp", "momentum"):
            assert name in last
        if objective != "dino":
            # In the first epoch nothing is learnt from neighbours
            assert first["loss_of"]["object_cross_image"] == 0 == first["cycle_consistent"]
            assert last["loss_of"]["object_cross_image"] > 0 < last["cycle_consistent"]
            assert 0 < last["objects"] <= last["clusters"] <= 8
            least, median, most = last["object_prototype_norms"]
            assert least <= median <= most
        if objective == "s3pt":
            assert 0.2 < last["tokens_with_depth"] < 1


def test_the_encoder_is_the_teachers_and_loads_like_any_other(runs):
    content = checkpoint_of(runs / "s3pt")
    encoder = load_image_encoder(str(runs / "s3pt"))
    assert encoder.spec == {"name": "vit_mini8", "feature": "norm", "image_size": (80, 160)}
    assert largest_difference(encoder.backbone.state_dict(), content["model"]) == 0
    of_student = {name.removeprefix("backbone."): value
                  for name, value in content["student"].items() if name.startswith("backbone.")}
    assert 0 < largest_difference(content["model"], of_student) < 0.1
    assert encoder(torch.rand(1, 3, 80, 160)).shape == (1, 96, 10, 20)


def test_the_queue_holds_the_newest_pictures(runs):
    queue = checkpoint_of(runs / "s3pt")["queue"]
    assert len(queue["counts"]) == 8
    assert queue["objects"].shape == (2, int(queue["counts"].sum()), 96)
    assert "queue" not in checkpoint_of(runs / "dino")


def test_prototypes_stay_in_the_epochs_in_which_they_are_frozen(world, runs, tmp_path):
    """And the rest of the head does not."""
    script.main(argv(world, tmp_path / "frozen", "s3pt", "--freeze-epochs", "9"))
    state = checkpoint_of(tmp_path / "frozen")["student"]
    assert (state["head.last_layer.weight_g"] == 1).all()
    assert (state["head.last_layer_c.weight_g"] == 1).all()
    thawed = checkpoint_of(runs / "s3pt")["student"]
    assert (thawed["head.last_layer.weight_g"] != 1).any()
    assert (state["head.mlp.0.bias"] != 0).any()


def test_a_run_begins_with_given_weights(world, runs, tmp_path):
    """In the names of DINO's and CrIBo's training checkpoints."""
    theirs = {f"module.backbone.{name}": value
              for name, value in checkpoint_of(runs / "s3pt")["model"].items()}
    for name in ("mlp.0.weight", "last_layer.weight_g", "last_layer_c.weight_v"):
        theirs[f"module.head.{name}"] = torch.zeros(3)
    torch.save({"student": {}, "teacher": theirs, "epoch": 3}, tmp_path / "theirs.pth")
    script.main(argv(world, tmp_path / "run", "s3pt", "--weights", str(tmp_path / "theirs.pth"),
                     "--lr", "1e-9", "--end-lr", "0", "--steps", "1"))
    began = checkpoint_of(tmp_path / "run")["model"]
    assert largest_difference(began, checkpoint_of(runs / "s3pt")["model"]) < 1e-6


def test_centres_are_the_mean_answers_of_the_teacher(world, tmp_path):
    """After one step that moves no weight, with a momentum of 0, by the step's own pictures."""
    command = argv(world, tmp_path / "run", "s3pt", "--steps", "1", "--lr", "1e-12", "--end-lr",
                   "0", "--center-momentum", "0", "--drop-path", "0")
    script.main(command)
    content = checkpoint_of(tmp_path / "run")
    args = script.parse("", command)
    encoder, teacher = script.networks_of(args, torch.device("cpu"))
    teacher.backbone.load_state_dict(content["model"])
    teacher.head.load_state_dict(content["teacher_head"])
    pictures, _ = script.pictures_of(args, encoder)
    keys = script.training.Batches(len(pictures), 4, 0, 1, args.seed).of(0)
    batch = script.training.to_device(script.collate([pictures[key] for key in keys]), "cpu")
    images = script.view_by_view(encoder, batch["image"])
    settings, _ = script.clustering_of(args, 96, "cpu")
    seen = script.taught(teacher, images, batch, settings)
    for number, rows, layer in ((0, seen.z, teacher.head.last_layer),
                                (1, seen.z_objects.flatten(0, 1), teacher.head.last_layer_c)):
        mean = layer(rows, 0.04).softmax(1).mean(0)
        found = content["centers"][f"{number}.value"].exp()
        assert torch.allclose(found, mean, rtol=1e-3, atol=1e-6)


def test_a_collapse_is_said_once_and_not_in_the_warm_up(world, tmp_path, monkeypatch):
    asked = []

    def said(found, done, bar, early):
        asked.append((done, early))
        return done == 2
    monkeypatch.setattr(script, "say_if_collapsed", said)
    script.main(argv(world, tmp_path / "run", "dino", "--limit", "4", "--steps", "20",
                     "--warmup-epochs", "1"))
    assert asked == [(1, True), (2, False)]  # then it has been said
    assert checkpoint_of(tmp_path / "run")["told"]


def test_the_signs_of_a_collapse():
    found = {"entropy_of_mean": 0.01, "mean_entropy": 0.5, "feature_variance": 0.5,
             "effective_rank": 9.0}
    said = []
    bar = SimpleNamespace(write=said.append)
    assert script.say_if_collapsed(found, 7, bar, early=False)
    assert said[-1].startswith("step 7: the encoder collapses, entropy_of_mean 0.01; try a lower")
    assert not script.say_if_collapsed(found, 7, bar, early=True)
    assert not script.say_if_collapsed(found | {"entropy_of_mean": 0.9}, 7, bar, early=False)
    for name, value in (("mean_entropy", 0.995), ("feature_variance", 0.001),
                        ("effective_rank", 1.2)):
        assert script.say_if_collapsed(found | {"entropy_of_mean": 0.9, name: value}, 7, bar, False)
        assert name in said[-1]


def test_a_folder_of_night_and_day_is_enough(tmp_path):
    root = SHARED / "real" / "pictures"
    if not root.is_dir():
        pytest.skip("no real pictures here")
    script.main(argv(f"pictures={root}", tmp_path / "run", "s3pt", "--steps", "2"))
    assert lines(tmp_path / "run")[-1]["step"] == 2


def test_pictures_without_lidar_have_no_depth(world, tmp_path, capsys):
    shutil.copytree(world / "samples/CAM_FRONT", tmp_path / "pictures")
    pictures = f"pictures={tmp_path}/pictures"
    script.main(argv(pictures, tmp_path / "run"))
    assert "no LiDAR, so --beta 0" in capsys.readouterr().out
    assert lines(tmp_path / "run")[-1]["tokens_with_depth"] == 0
    line = fails_with_one_line(capsys, script.main, argv(pictures, tmp_path / "x", "s3pt",
                                                         "--beta", "4"))
    assert "--beta 4" in line and "--depth-maps" in line


def test_depth_maps_are_known_by_what_they_hold(world, tmp_path, capsys):
    folder = tmp_path / "maps"

    def write(metres):
        for path in (world / "samples").rglob("*.jpg"):
            file = (folder / path.relative_to(world)).with_suffix(".npy")
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, np.full((80, 160), metres))

    def command():
        return argv(world, tmp_path / "run", "s3pt", "--depth-maps", str(folder), "--steps", "1")
    write(10.0)
    script.main(command())
    assert lines(tmp_path / "run")[-1]["tokens_with_depth"] == 1
    folder = folder.rename(tmp_path / "moved")
    capsys.readouterr()
    script.main(command())
    assert "finished, at step 1" in capsys.readouterr().out
    write(20.0)
    line = fails_with_one_line(capsys, script.main, command())
    assert "made from other depth maps: maps 14, content" in line


def test_other_arguments_are_refused_and_nothing_is_lost(world, runs, capsys):
    before = (runs / "s3pt/last.pth").read_bytes()
    for flags in (["--queue", "12"], ["--beta", "1"], ["--seed", "1"]):
        line = fails_with_one_line(capsys, script.main, argv(world, runs / "s3pt", "s3pt", *flags))
        assert flags[0] in line and "--restart" in line
    assert (runs / "s3pt/last.pth").read_bytes() == before


def test_weights_of_another_network_are_refused(world, tmp_path, capsys):
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 96)}}, tmp_path / "other.pth")
    line = fails_with_one_line(capsys, script.main, argv(
        world, tmp_path / "run", "s3pt", "--weights", str(tmp_path / "other.pth")))
    assert "other.pth" in line and "missing" in line


def test_a_loss_that_is_not_finite_stops_before_weights_are_touched(world, tmp_path, capsys,
                                                                    monkeypatch):
    calls = []
    crop_loss = script.crop_loss

    def broken(*args):
        loss, terms = crop_loss(*args)
        calls.append(1)
        return loss * (float("nan") if len(calls) == 4 else 1), terms
    monkeypatch.setattr(script, "crop_loss", broken)
    line = fails_with_one_line(capsys, script.main, argv(world, tmp_path / "run"))
    assert "step 3" in line and "not-finite.json" in line
    assert len(json.loads((tmp_path / "run/not-finite.json").read_text())["frames"]) == 4
    assert checkpoint_of(tmp_path / "run")["step"] == 3


# ---- schedules -----------------------------------------------------------------------------------

def test_schedules_at_steps_computed_by_hand():
    """Ten epochs of two steps, a warm-up of one epoch, the temperature's of three."""
    args = script.parse("", ["--data", "x", "--out", "y", "--batch", "512", "--lr", "1e-3",
                             "--end-lr", "1e-5", "--warmup-epochs", "1", "--temp-epochs", "3"])
    now = [script.schedules(args, step, 20, 2) for step in range(20)]
    lr = [each["lr"] for each in now]
    assert lr[:3] == pytest.approx([0, 2e-3, 2e-3])  # 512 / 256 = 2
    assert lr[11] == pytest.approx((2e-3 + 1e-5) / 2)
    assert 1e-5 < lr[19] < 3e-5
    temps = [each["teacher_temp"] for each in now]
    assert temps[:7] == pytest.approx([0.04, 0.04, 0.055, 0.055, 0.07, 0.07, 0.07])
    assert [now[0]["weight_decay"], now[0]["momentum"]] == pytest.approx([0.04, 0.996])
    assert now[10]["weight_decay"] == pytest.approx(0.22)
    assert now[10]["momentum"] == pytest.approx(0.998)


# ---- two processes -------------------------------------------------------------------------------

# Two steps of an epoch of their own each, so that the queue is searched
TWO = ["--limit", "4", "--steps", "2", "--freeze-epochs", "0"]


def without_key_bias(state):
    """A state dict without the biases of keys.

    Such a bias moves all scores of a query alike: its gradient is rounding, and AdamW makes a step
    of it.
    """
    state = {name: value.clone() for name, value in state.items()}
    for name, value in state.items():
        if name.endswith("qkv.bias"):
            value[96:192] = 0
    return state


def one_of_two(rank, world, port, out, cache):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank),
                   "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "XDG_CACHE_HOME": cache}
    torch.set_num_threads(1)
    for objective in OBJECTIVES:
        script.main(argv(world, out / objective, objective, *TWO))
    # And a run that is told to stop in its first step
    move = script.move_teacher

    def told_to_stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return move(*arguments)
    script.move_teacher = told_to_stop
    script.main(argv(world, out / "stopped", "s3pt", *TWO))


def test_two_processes_are_one(world, tmp_path):
    for objective in OBJECTIVES:
        script.main(argv(world, tmp_path / "one" / objective, objective, *TWO))
    args = (str(world), free_port(), tmp_path / "two", os.environ["XDG_CACHE_HOME"])
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as stopped:
        torch.multiprocessing.spawn(one_of_two, args, nprocs=2)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    for objective in OBJECTIVES:
        one, two = (checkpoint_of(tmp_path / name / objective) for name in ("one", "two"))
        for part in ("student", "model", "teacher_head", "centers"):
            found = largest_difference(*(without_key_bias(state[part]) for state in (one, two)))
            assert found < 1e-6, (objective, part)
        if objective != "dino":
            assert largest_difference(one["queue"], two["queue"]) < 1e-6
        first, second = (lines(tmp_path / name / objective) for name in ("one", "two"))
        for a, b in zip(first, second, strict=True):
            for name in ("loss", "entropy_of_mean", "mean_entropy"):
                assert a[name] == pytest.approx(b[name], rel=1e-5), name
        if objective != "dino":
            assert first[-1]["cycle_consistent"] == pytest.approx(second[-1]["cycle_consistent"])
            assert first[-1]["loss_of"]["object_cross_image"] > 0
    # What two processes began, one goes on with
    assert checkpoint_of(tmp_path / "two/stopped")["step"] == 1
    script.main(argv(world, tmp_path / "two/stopped", "s3pt", *TWO))
    assert largest_difference(without_key_bias(checkpoint_of(tmp_path / "two/stopped")["student"]),
                              without_key_bias(checkpoint_of(tmp_path / "one/s3pt")["student"])
                              ) < 1e-6


# ---- kills ---------------------------------------------------------------------------------------

def prepare(moment, step):
    """Patch this process so that it is killed, or told to stop, at this moment of its n-th step."""
    if moment == "step":
        script.check_finite = DiesAt(run_folder.check_finite, step)
    elif moment == "data":
        crops.decoded = DiesAt(crops.decoded, 4 * step - 1)
    elif moment == "saving":
        torch.save = half_written
    else:
        move = script.move_teacher

        def told_to_stop(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            return move(*args)
        script.move_teacher = told_to_stop


def attempt(command, moment, step):
    """Run the command in a forked process with `prepare`; the status that it ends with."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        prepare(moment, step)
        try:
            script.main(command)
        except SystemExit as exit_:
            os._exit(exit_.code)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_a_run_that_is_killed_goes_on_bit_by_bit(world, runs, tmp_path):
    """Killed at three moments of random steps, then told to stop: as the run that never was."""
    command = argv(world, tmp_path / "run", "s3pt", "--save-every", "0")
    rng = np.random.default_rng()
    for moment in rng.permutation(["step", "data", "saving"]):
        step = int(rng.integers(1, 3))
        status = attempt(command, moment, step)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, step)
    status = attempt(command, "told", 0)
    if checkpoint_of(tmp_path / "run")["step"] < STEPS:
        assert os.WEXITSTATUS(status) == 128 + signal.SIGTERM
    script.main(command)
    whole, pieces = checkpoint_of(runs / "s3pt"), checkpoint_of(tmp_path / "run")
    for part in ("student", "model", "teacher_head", "centers", "queue"):
        assert largest_difference(whole[part], pieces[part]) == 0, part
    assert [line["loss"] for line in lines(tmp_path / "run")] == pytest.approx(
        [line["loss"] for line in lines(runs / "s3pt")], rel=1e-6)


def test_a_checkpoint_that_is_cut_short_costs_some_steps_only(world, runs, tmp_path, capsys):
    shutil.copytree(runs / "s3pt", tmp_path / "run")
    path = tmp_path / "run/last.pth"
    path.write_bytes(path.read_bytes()[:5000])
    script.main(argv(world, tmp_path / "run"))
    assert "previous.pth is taken" in capsys.readouterr().out
    assert largest_difference(checkpoint_of(tmp_path / "run")["student"],
                              checkpoint_of(runs / "s3pt")["student"]) == 0


def test_a_full_disk_is_one_line_and_the_run_goes_on(world, runs, tmp_path, monkeypatch, capsys):
    command = argv(world, tmp_path / "run", "s3pt", "--save-every", "0")
    save, room = torch.save, [1, 2]  # checkpoints

    def until_full(content, file):
        if not room:
            raise OSError(28, "No space left on device")
        room.pop()
        save(content, file)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", until_full)
        line = fails_with_one_line(capsys, script.main, command)
    assert "last.pth is as it was" in line and "Make room" in line
    assert checkpoint_of(tmp_path / "run")["step"] == 2
    script.main(command)
    assert largest_difference(checkpoint_of(tmp_path / "run")["student"],
                              checkpoint_of(runs / "s3pt")["student"]) == 0

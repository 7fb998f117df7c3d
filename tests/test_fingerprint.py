"""A thing is known by what it is.

Sources that changed are refused wherever they are met, and moved ones go on working.
"""
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT
from PIL import Image
from runs import (RUN, SMALL, eval_args, fails_with_one_line, model_of, open_one, probe_args,
                  stage1_args, stage2_args)

import eval as evaluation
import export
import probe
import stage1
import stage2
from models import load_image_encoder
from plumbing.errors import InputError
from plumbing.fingerprint import differences, digest, of_weights

CPU = torch.device("cpu")
ONE_STEP = ("--steps", "1")


@pytest.fixture(scope="module")
def made(world, first, tmp_path_factory):
    """Folders of a stage 1, of a stage 2 after it, and of a probe of that: s1, s2, p."""
    root = tmp_path_factory.mktemp("made") / "runs"
    shutil.copytree(first, root / "s1")
    stage2.main(stage2_args(world, root / "s1", root / "s2", *ONE_STEP))
    probe.main(probe_args(world, "seg", root / "s2", root / "p", *ONE_STEP))
    evaluate(root / "p")
    return root


@pytest.fixture
def moved(made, tmp_path):
    """A copy of `made` elsewhere, which a test may change."""
    return shutil.copytree(made, tmp_path / "moved")


def table_of(run):
    """Where `evaluate` writes."""
    return run.parent / f"{run.name}-table"


def evaluate(*arguments):
    """The results of eval.py; the first argument is a probe's folder."""
    out = table_of(arguments[0])
    evaluation.main(eval_args(*arguments, out=out))
    return json.loads(out.with_name(f"{out.name}.json").read_text())


def stored(run):
    """The result in a probe's folder, as text."""
    return (run / "results.json").read_text()


def change(folder, edit):
    """Rewrite a folder's checkpoint after edit(content)."""
    content = torch.load(folder / "last.pth", weights_only=True)
    edit(content)
    torch.save(content, folder / "last.pth")


def move_a_weight(content):
    next(iter(content["model"].values())).view(-1)[0] += 1


def encoder_at(path, **more):
    """An edit for `change`: the encoder's path in a checkpoint."""
    return lambda content: content["encoder"].update(name_or_path=str(path), **more)


def other_data(world, folder):
    """A copy of the world in which the car drove elsewhere."""
    root = shutil.copytree(world, folder)
    path = root / "v1.0-trainval/ego_pose.json"
    poses = json.loads(path.read_text())
    for pose in poses:
        pose["translation"][0] += 1
    path.write_text(json.dumps(poses))
    return indexed(root)


def indexed(root):
    """A dataset's root, its table in the cache: sooner than by a process of its own."""
    open_one(root)
    return root


# ---- fingerprints -------------------------------------------------------------------------------

def test_weights_are_known_by_names_types_shapes_and_values():
    layer = torch.nn.Linear(3, 2)
    same = torch.nn.Linear(3, 2)
    same.load_state_dict(layer.state_dict())
    assert of_weights(layer) == of_weights(same) and len(of_weights(layer)) == 16
    with torch.no_grad():
        same.weight[1, 2] = torch.nextafter(same.weight[1, 2], torch.tensor(9.0))
    assert of_weights(layer) != of_weights(same)
    others = [layer, torch.nn.Sequential(layer), torch.nn.Linear(3, 2).half(),
              torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(2)]
    assert len({of_weights(other) for other in others}) == 5
    assert digest([b"ab", b"c"]) != digest([b"a", b"bc"])


def test_differences_name_both_and_only_what_both_have():
    before = {"frames": {"frames": 6}, "encoder": {"name": "a"}}
    now = {"frames": {"frames": 18}, "stage1": {"weights": "b"}}
    assert differences(before, now) == "frames: frames 6; now: frames 18"
    assert differences(before, before) == differences({}, now) == ""


def test_frames_are_known_by_what_the_tables_say_of_them(world, tmp_path):
    table = open_one(world).select("train")
    known = table.fingerprint()
    copied = open_one(shutil.copytree(world, tmp_path / "copied")).select("train")
    other = open_one(other_data(world, tmp_path / "other")).select("train")
    assert known["frames"] == 8
    assert copied.fingerprint() == known != other.fingerprint()
    assert table.only(table.rows[:-1]).fingerprint() != known
    assert table.fingerprint(labels=True) != known
    # The order of the frames counts, since an epoch draws from it
    assert table.only(table.rows[::-1]).fingerprint()["tables"] != known["tables"]

    # Files may change under the same tables
    assert copied.files(labels=True) == table.files(labels=True)
    labels = tmp_path / "copied" / copied["labels"][copied.rows[3]].decode()
    labels.write_bytes(bytes(reversed(labels.read_bytes())))
    assert copied.files() == table.files()
    assert copied.files(labels=True) != table.files(labels=True)
    labels.unlink()
    with pytest.raises(InputError, match="1 of 8 files that the tables name are missing, "
                                         f"the first is .*{labels.name}"):
        copied.files(labels=True)


# ---- resuming -----------------------------------------------------------------------------------

def test_a_run_goes_on_with_moved_sources_and_not_with_others(world, moved, tmp_path, capsys):
    s1, s2, p = moved / "s1", moved / "s2", moved / "p"
    # Data and stage 1 moved; stage 2 is finished already
    indexed(shutil.copytree(world, tmp_path / "data"))
    shutil.copytree(s1, tmp_path / "elsewhere")
    stage2.main(stage2_args(tmp_path / "data", tmp_path / "elsewhere", s2, *ONE_STEP))
    assert "finished, at step 1" in capsys.readouterr().out
    # Other data
    other = other_data(world, tmp_path / "other")
    message = fails_with_one_line(capsys, stage2.main, stage2_args(other, s1, s2, *ONE_STEP))
    assert "holds a run made from other frames: frames 8, scenes 8" in message
    assert "--restart" in message
    # A stage 1 as if it had been trained anew
    change(s1, move_a_weight)
    message = fails_with_one_line(capsys, stage2.main, stage2_args(world, s1, s2, *ONE_STEP))
    assert "made from other stage1: name WI-2-16, weights" in message
    assert "frames" not in message
    # And so a stage 2
    change(s2, move_a_weight)
    again = probe_args(world, "seg", s2, p, *ONE_STEP)
    message = fails_with_one_line(capsys, probe.main, again)
    assert "made from other encoder: name vit_mini8, feature norm, weights" in message
    before = model_of(p)
    probe.main([*again, "--restart"])
    assert (p / "replaced-1/last.pth").is_file() and "replaced-1" in capsys.readouterr().out
    after = model_of(p)
    assert not all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.slow
def test_a_run_does_not_go_on_at_another_image_size(world, tmp_path, capsys):
    """The same weights by another way have another size: a checkpoint says its own."""
    shipped = str(ROOT / "miniature/encoder.pth")
    common = ["--data", str(world), "--out", str(tmp_path / "s1"), "--batch", "2", *SMALL, *RUN]
    stage1.main([*common, "--encoder", shipped, *ONE_STEP])
    by_name = [*common, "--encoder", "vit_mini8", "--weights", shipped, *ONE_STEP]
    said = fails_with_one_line(capsys, stage1.main, by_name)
    assert "input: image_size (80, 160), nuscenes {'fov'" in said
    assert "; now: image_size (224, 448), nuscenes {'fov'" in said
    stage1.main([*by_name, "--image-size", "80", "160", "--restart"])


def test_a_run_does_not_go_on_with_another_sampling(world, moved, capsys):
    """It comes from stage 1's checkpoint, whose weights do not tell it."""
    change(moved / "s1", lambda content: content["samplings"]["nuscenes"].update(voxel=0.3))
    argv = stage2_args(world, moved / "s1", moved / "s2", *ONE_STEP)
    said = fails_with_one_line(capsys, stage2.main, argv)
    assert "made from other input" in said and "'voxel': 0.1" in said and "'voxel': 0.3" in said


def test_runs_from_before_fingerprints_are_taken_with_a_line(world, moved, capsys):
    s1, s2, p = moved / "s1", moved / "s2", moved / "p"

    def make_old(content):
        content.pop("made_from", None)
        content.pop("val", None)
    for folder in (s1, s2, p):
        change(folder, make_old)
    (p / "results.json").unlink()
    change(s2, lambda content: content["args"].update(stage1=str(s1)))
    stage2.main(stage2_args(world, s1, s2, *ONE_STEP))
    printed = capsys.readouterr().out
    assert f"--stage1 {s1} does not say which encoder it was made from" in printed
    assert (f"{s2}: its checkpoint does not say which encoder and frames and input and stage1 it "
            "was made from, so this is not checked") in printed
    evaluate(p)
    assert f"{p}: its head does not say which encoder" in capsys.readouterr().out
    assert (p / "results.json").is_file()
    # Where nothing else is known, a path is an argument like others
    link = moved / "link"
    link.symlink_to(s1)
    message = fails_with_one_line(capsys, stage2.main, stage2_args(world, link, s2, *ONE_STEP))
    assert f"holds a run with other arguments (--stage1 {s1}, now {link})" in message


# ---- stage 1 to 2, encoder to probe, probe to evaluation ----------------------------------------

def test_stage_2_takes_the_encoder_that_stage_1_was_trained_for(world, moved, tmp_path, capsys):
    out = tmp_path / "out"
    args = stage2_args(world, moved / "s1", out, *ONE_STEP, "--encoder", "vit_mini8", "--weights")
    other = load_image_encoder("vit_mini8", "random").backbone
    torch.nn.init.constant_(other.cls_token, 0.5)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    message = fails_with_one_line(capsys, stage2.main, [*args, str(tmp_path / "other.pth")])
    assert "was made from another encoder: name vit_mini8, feature norm, weights" in message
    assert "train stage 1 for this one" in message
    assert not out.exists()
    same = load_image_encoder("vit_mini8", "random").backbone
    torch.save(same.state_dict(), tmp_path / "same.pth")
    stage2.main([*args, str(tmp_path / "same.pth")])
    assert (out / "last.pth").is_file()


def test_a_head_is_never_put_on_another_encoder(moved, made, capsys):
    p = moved / "p"
    assert evaluate(p)[0]["mIoU"] == evaluate(made / "p")[0]["mIoU"]
    before = stored(p)
    change(moved / "s2", move_a_weight)
    change(p, encoder_at(moved / "s2"))
    again = [str(p), "--device", "cpu", "--again"]
    message = fails_with_one_line(capsys, evaluation.main, again)
    assert f"{p}: its head was made from another encoder: " in message
    assert "train the probe again" in message
    assert stored(p) == before


@pytest.mark.slow
def test_what_was_moved_together_is_found(made, moved, capsys):
    """The probe's checkpoint names an encoder by its path, which is not there any more."""
    p, s2 = moved / "p", moved / "s2"
    gone = str(made.parent / "gone")
    change(p, encoder_at(f"{gone}/s2", folder=f"{gone}/p"))
    encoder = evaluation.load_probe(p, CPU)[1]
    assert encoder.fingerprint() == load_image_encoder(str(s2)).fingerprint()

    # Without any encoder the stored result is shown
    shutil.rmtree(s2)
    expected = json.loads(stored(made / "p"))
    assert evaluate(p)[0] == expected | {"run": str(p)}
    said = f"shown as it was stored and not checked, {gone}/s2 is not there any more"
    assert said in capsys.readouterr().out
    again = [*eval_args(p, out=table_of(p)), "--again"]
    message = fails_with_one_line(capsys, evaluation.main, again)
    assert (f"its encoder {gone}/s2 is not there any more; where it was moved, "
            "eval.py --encoder says so") in message

    # One may be named, if it is the same
    evaluation.main([*again, "--encoder", str(made / "s2")])
    assert json.loads((moved / "p-table.json").read_text())[0]["mIoU"] == expected["mIoU"]
    other = [*again, "--encoder", "miniature/encoder.pth"]
    message = fails_with_one_line(capsys, evaluation.main, other)
    assert "its head was made from another encoder" in message


def check_said(capsys, source, step):
    """Assert that a script said that this source is unfinished."""
    said = f"{source}(/last.pth)?: unfinished, step {step} of 100"
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.slow
def test_an_unfinished_stage_2_is_said_wherever_it_is_used(world, moved, tmp_path, capsys):
    source = moved / "s2"
    change(source, lambda content: content.update(total=100))
    change(moved / "p", encoder_at(source))
    args = stage1_args(world, tmp_path / "s1", *ONE_STEP, "--encoder", str(source))
    at = args.index("--weights")
    stage1.main(args[:at] + args[at + 2:])  # the weights are the source's
    check_said(capsys, source, 1)
    probe.main(probe_args(world, "seg", source, tmp_path / "p", *ONE_STEP))
    check_said(capsys, source, 1)
    evaluate(moved / "p")
    check_said(capsys, source, 1)
    export.main([str(source), "--out", str(tmp_path / "encoder.pth")])
    check_said(capsys, source, 1)
    about = json.loads((tmp_path / "encoder.pth.json").read_text())
    assert about["step"] == 1 and about["total"] == 100
    assert about["fingerprint"] == load_image_encoder(str(source)).fingerprint()
    assert set(about["made_from"]) == {"encoder", "frames", "input", "stage1"}


@pytest.mark.slow
def test_an_unfinished_stage_1_is_said_wherever_it_is_used(world, moved, tmp_path, capsys):
    source = moved / "s1"
    change(source, lambda content: content.update(total=100))
    change(source, encoder_at("vit_mini8"))
    stage2.main(stage2_args(world, source, tmp_path / "s2", *ONE_STEP))
    check_said(capsys, source, 2)
    probe.main(probe_args(world, "seg3d", source, tmp_path / "p", *ONE_STEP))
    check_said(capsys, source, 2)


# ---- results ------------------------------------------------------------------------------------

def test_a_result_of_other_data_has_a_file_of_its_own(world, moved, tmp_path, capsys, monkeypatch):
    p = moved / "p"
    before = stored(p)
    other = other_data(world, tmp_path / "other")
    [result] = evaluate(p, "--data", other)
    assert result["data"] == str(other)
    assert "judged on other frames than its own" in capsys.readouterr().out
    [path] = p.glob("results-*.json")
    assert json.loads(path.read_text()) == result
    assert stored(p) == before
    monkeypatch.setattr(evaluation, "measure", None)  # from here on nothing is evaluated
    assert evaluate(p, "--data", other) == [result]

    # Another image under the same tables
    fog = indexed(shutil.copytree(world, tmp_path / "fog"))
    image = max((fog / "samples/CAM_FRONT").iterdir())
    Image.open(image).save(image, quality=20)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "measure", lambda *_: result)
        evaluate(p, "--data", fog)
    assert len(list(p.glob("results*.json"))) == 3
    assert stored(p) == before
    same = indexed(shutil.copytree(world, tmp_path / "same"))
    assert evaluate(p, "--data", same)[0] == json.loads(before) | {"run": str(p)}


@pytest.mark.slow
def test_mended_labels_and_a_cut_result_are_evaluated_anew(world, moved, tmp_path, capsys):
    p = moved / "p"
    data = indexed(shutil.copytree(world, tmp_path / "data"))
    change(p, lambda content: content.update(data=[["nuscenes", str(data)]]))
    [first] = evaluate(p)
    (p / "results.json").write_text(stored(p)[:40])
    assert evaluate(p)[0]["IoU"] == first["IoU"]

    # The night loses its labels
    table = open_one(data)
    for row in table.select("val", ["night"]).rows:
        labels = data / table["labels"][row].decode()
        labels.write_bytes(bytes(labels.stat().st_size))
    capsys.readouterr()
    [second] = evaluate(p)
    printed = capsys.readouterr().out
    assert second["mIoU"]["night"] is None
    assert second["mIoU"]["day-clear"] == first["mIoU"]["day-clear"]
    assert "| no labels |" in printed and "nan" not in printed.lower()
    strict = json.JSONDecoder(parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict.decode(stored(p)) == second
    assert "judged on other frames than its own" in printed
    assert len(list(p.glob("results*.json"))) == 1


def test_a_probe_that_is_named_twice_is_one_row(moved):
    p = moved / "p"
    link = moved / "link"
    link.symlink_to(p)
    assert len(evaluate(p, f"{moved}/./p", link, p / "last.pth")) == 1

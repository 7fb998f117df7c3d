"""A thing is known by what it is: sources that changed are refused wherever they are met, and moved ones go on working."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import export
import probe
import stage1
import stage2
import training
from errors import InputError
from experiments import corruptions
from plumbing.fingerprint import differences, digest, of_weights
from index import load_index
from models import load_image_encoder
from test_scripts import fails_with_one_line, model_of, probe_args, stage1_args, stage2_args

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(world, first, tmp_path_factory):
    """Folders of a stage 2 after `first`, of a probe of it, and of stage 1's own: s1, s2, p."""
    root = tmp_path_factory.mktemp("made") / "runs"
    shutil.copytree(first, root / "s1")
    stage2.main(stage2_args(world, root / "s1", root / "s2", "--steps", "1"))
    probe.main(probe_args(world, "seg", root / "s2", root / "p", "--steps", "1"))
    evaluate(root / "p")
    return root


@pytest.fixture
def copy(runs, tmp_path):
    return shutil.copytree(runs, tmp_path / "moved")


def evaluate(*arguments):
    evaluation.main([*map(str, arguments), "--workers", "0", "--device", "cpu", "--out", str(arguments[0]) + "-table"])
    return json.loads((arguments[0].parent / f"{arguments[0].name}-table.json").read_text())


def change(path, edit):
    """Rewrite a checkpoint after edit(content)."""
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def move_a_weight(content):
    next(iter(content["model"].values())).view(-1)[0] += 1


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
    """A dataset's root, its index made here: sooner than by a process of its own."""
    load_index(root, here=True)
    return root


# ---- fingerprints -----------------------------------------------------------------------------------------------------------

def test_weights_are_known_by_names_types_shapes_and_values():
    layer = torch.nn.Linear(3, 2)
    same = torch.nn.Linear(3, 2)
    same.load_state_dict(layer.state_dict())
    assert of_weights(layer) == of_weights(same) and len(of_weights(layer)) == 16
    with torch.no_grad():
        same.weight[1, 2] = torch.nextafter(same.weight[1, 2], torch.tensor(9.0))
    assert of_weights(layer) != of_weights(same)
    others = [layer, torch.nn.Sequential(layer), torch.nn.Linear(3, 2).half(), torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(2)]
    assert len({of_weights(other) for other in others}) == 5
    assert digest([b"ab", b"c"]) != digest([b"a", b"bc"])


def test_differences_name_both_and_only_what_both_have():
    before, now = {"frames": {"frames": 6}, "encoder": {"name": "a"}}, {"frames": {"frames": 18}, "stage1": {"weights": "b"}}
    assert differences(before, now) == "frames: frames 6; now: frames 18"
    assert differences(before, before) == differences({}, now) == ""


def test_frames_are_known_by_what_the_tables_say_of_them(world, tmp_path):
    index = load_index(world, here=True)
    rows = index.select("train")
    moved = load_index(shutil.copytree(world, tmp_path / "moved"), here=True)
    other = load_index(other_data(world, tmp_path / "other"), here=True)
    assert moved.fingerprint(rows) == index.fingerprint(rows) != other.fingerprint(rows)
    assert index.fingerprint(rows)["frames"] == 8 and index.fingerprint(rows[:-1]) != index.fingerprint(rows)
    assert index.fingerprint(rows[::-1])["tables"] != index.fingerprint(rows)["tables"]  # the order is what an epoch draws from
    assert index.fingerprint(rows, labels=True) != index.fingerprint(rows)
    assert moved.files(rows, labels=True) == index.files(rows, labels=True)
    labels = tmp_path / "moved" / moved.lidarseg[rows[3]].decode()
    labels.write_bytes(bytes(reversed(labels.read_bytes())))
    assert moved.files(rows) == index.files(rows) and moved.files(rows, labels=True) != index.files(rows, labels=True)
    labels.unlink()
    with pytest.raises(InputError, match=f"1 of 8 files that the tables name are missing, the first is .*{labels.name}"):
        moved.files(rows, labels=True)


# ---- resuming ---------------------------------------------------------------------------------------------------------------

def test_a_run_goes_on_with_moved_sources_and_not_with_others(world, copy, tmp_path, capsys):
    indexed(shutil.copytree(world, tmp_path / "data"))
    shutil.copytree(copy / "s1", tmp_path / "elsewhere")
    again = stage2_args(tmp_path / "data", tmp_path / "elsewhere", copy / "s2", "--steps", "1")
    stage2.main(again)  # both moved, and finished already
    assert "going on from step 1" in capsys.readouterr().out
    elsewhere = stage2_args(other_data(world, tmp_path / "other"), copy / "s1", copy / "s2", "--steps", "1")
    message = fails_with_one_line(capsys, stage2.main, elsewhere)
    assert "holds a run made from other frames: frames 8, scenes 8" in message and "--restart" in message
    change(copy / "s1/last.pth", move_a_weight)  # as if it had been trained anew
    message = fails_with_one_line(capsys, stage2.main, stage2_args(world, copy / "s1", copy / "s2", "--steps", "1"))
    assert "made from other stage1: name WI-2-16, weights" in message and "frames" not in message
    change(copy / "s2/last.pth", move_a_weight)
    message = fails_with_one_line(capsys, probe.main, probe_args(world, "seg", copy / "s2", copy / "p", "--steps", "1"))
    assert "made from other encoder: name vit_mini8, feature norm, weights" in message
    before = model_of(copy / "p")
    probe.main(probe_args(world, "seg", copy / "s2", copy / "p", "--steps", "1", "--restart"))
    assert (copy / "p/replaced-1/last.pth").is_file() and "replaced-1" in capsys.readouterr().out
    assert not all(torch.equal(value, before[name]) for name, value in model_of(copy / "p").items())


@pytest.mark.slow
def test_runs_from_before_fingerprints_are_taken_with_a_line(world, copy, capsys):
    for name in ("s1", "s2", "p"):
        change(copy / name / "last.pth", lambda content: [content.pop(key, None) for key in ("made_from", "val")])
    (copy / "p/results.json").unlink()
    change(copy / "s2/last.pth", lambda content: content["args"].update(stage1=str(copy / "s1")))
    stage2.main(stage2_args(world, copy / "s1", copy / "s2", "--steps", "1"))
    printed = capsys.readouterr().out
    assert f"--stage1 {copy}/s1 does not say which encoder it was made from" in printed
    assert f"{copy}/s2: a run from before fingerprints; whether encoder and frames and stage1 are the same is not checked" in printed
    evaluate(copy / "p")
    assert f"{copy}/p: its head does not say which encoder" in capsys.readouterr().out and (copy / "p/results.json").is_file()
    (copy / "link").symlink_to(copy / "s1")  # where nothing else is known, a path is an argument like others
    message = fails_with_one_line(capsys, stage2.main, stage2_args(world, copy / "link", copy / "s2", "--steps", "1"))
    assert f"holds a run with other arguments (--stage1 {copy}/s1, now {copy}/link)" in message


# ---- stage 1 to 2, encoder to probe, probe to evaluation ----------------------------------------------------------------------

def test_stage_2_takes_the_encoder_that_stage_1_was_trained_for(world, copy, tmp_path, capsys):
    out = tmp_path / "out"
    other = load_image_encoder("vit_mini8", "random").backbone
    torch.nn.init.constant_(other.cls_token, 0.5)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    args = stage2_args(world, copy / "s1", out, "--steps", "1", "--encoder", "vit_mini8", "--weights")
    message = fails_with_one_line(capsys, stage2.main, [*args, str(tmp_path / "other.pth")])
    assert "was made from another encoder: name vit_mini8, feature norm, weights" in message and "train stage 1 for this one" in message
    assert not out.exists()
    torch.save(load_image_encoder("vit_mini8", "random").backbone.state_dict(), tmp_path / "same.pth")
    stage2.main([*args, str(tmp_path / "same.pth")])
    assert (out / "last.pth").is_file()


def test_a_head_is_never_put_on_another_encoder(copy, runs, capsys):
    assert evaluate(copy / "p")[0]["mIoU"] == evaluate(runs / "p")[0]["mIoU"]
    change(copy / "s2/last.pth", move_a_weight)
    before = (copy / "p/results.json").read_text()
    change(copy / "p/last.pth", lambda content: content["encoder"].update(name_or_path=str(copy / "s2")))
    message = fails_with_one_line(capsys, evaluation.main, [str(copy / "p"), "--device", "cpu", "--again"])
    assert f"{copy}/p: its head was made from another encoder: " in message and "train the probe again" in message
    assert (copy / "p/results.json").read_text() == before


@pytest.mark.slow
def test_what_was_moved_together_is_found(runs, copy, capsys, monkeypatch):
    """The probe's checkpoint names an encoder by its path, which is not there any more."""
    gone = str(runs.parent / "gone")
    change(copy / "p/last.pth", lambda content: content["encoder"].update(name_or_path=f"{gone}/s2", folder=f"{gone}/p"))
    assert evaluation.load_probe(copy / "p", CPU)[1].fingerprint() == load_image_encoder(str(copy / "s2")).fingerprint()
    shutil.rmtree(copy / "s2")
    assert evaluate(copy / "p")[0] == json.loads((runs / "p/results.json").read_text()) | {"run": str(copy / "p")}
    assert f"shown as it was stored and not checked, {gone}/s2 is not there any more" in capsys.readouterr().out
    again = [str(copy / "p"), "--device", "cpu", "--workers", "0", "--out", str(copy / "table"), "--again"]
    assert f"its encoder {gone}/s2 is not there any more; where it was moved, eval.py --encoder says so" in fails_with_one_line(
        capsys, evaluation.main, again)
    evaluation.main([*again, "--encoder", str(runs / "s2")])
    assert json.loads((copy / "table.json").read_text())[0]["mIoU"] == json.loads((runs / "p/results.json").read_text())["mIoU"]
    assert "its head was made from another encoder" in fails_with_one_line(capsys, evaluation.main, [*again, "--encoder", "miniature/encoder.pth"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image_encoder", "point_encoder"])
def test_unfinished_sources_are_said_wherever_they_are_used(world, copy, tmp_path, capsys, kind):
    source = copy / ("s2" if kind == "image_encoder" else "s1")
    change(source / "last.pth", lambda content: content.update(total=100))
    said = f"unfinished, step {1 if kind == 'image_encoder' else 2} of 100"
    if kind == "image_encoder":
        uses = [lambda out: stage1.main(stage1_args(world, out, "--steps", "1", "--encoder", str(source))[:6]
                                        + stage1_args(world, out, "--steps", "1")[8:] + ["--encoder", str(source)]),
                lambda out: probe.main(probe_args(world, "seg", source, out, "--steps", "1")),
                lambda out: export.main([str(source), "--out", f"{out}.pth"]), lambda out: evaluate(copy / "p")]
    else:
        uses = [lambda out: stage2.main(stage2_args(world, source, out, "--steps", "1")),
                lambda out: probe.main(probe_args(world, "seg3d", source, out, "--steps", "1"))]
        change(source / "last.pth", lambda content: content["encoder"].update(name_or_path="vit_mini8"))
    if kind == "image_encoder":
        change(copy / "p/last.pth", lambda content: content["encoder"].update(name_or_path=str(source)))
    for number, use in enumerate(uses):
        use(tmp_path / f"out-{number}")
        assert re.search(f"{source}(/last.pth)?: {said}", capsys.readouterr().out), number
    if kind == "image_encoder":
        about = json.loads((tmp_path / "out-2.pth.json").read_text())
        assert about["step"] == 1 and about["total"] == 100
        assert about["fingerprint"] == load_image_encoder(str(source)).fingerprint() and set(about["made_from"]) == {"encoder", "frames", "stage1"}


# ---- results ----------------------------------------------------------------------------------------------------------------

def test_a_result_of_other_data_has_a_file_of_its_own(world, copy, tmp_path, capsys, monkeypatch):
    before = (copy / "p/results.json").read_text()
    other = other_data(world, tmp_path / "other")
    result, = evaluate(copy / "p", "--data", other)
    assert result["data"] == str(other) and "judged on other frames than its own" in capsys.readouterr().out
    files = {path.name for path in (copy / "p").glob("results*")}
    assert len(files) == 2 and "results.json" in files and result == json.loads(max((copy / "p").glob("results-*.json")).read_text())
    assert (copy / "p/results.json").read_text() == before
    monkeypatch.setattr(evaluation, "measure", None)  # from here on nothing is evaluated
    assert evaluate(copy / "p", "--data", other) == [result]
    fog = indexed(shutil.copytree(world, tmp_path / "fog"))  # under the same tables
    image = max((fog / "samples/CAM_FRONT").iterdir())
    Image.open(image).save(image, quality=20)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "measure", lambda *_: result)
        evaluate(copy / "p", "--data", fog)
    assert len(list((copy / "p").glob("results*.json"))) == 3 and (copy / "p/results.json").read_text() == before
    assert evaluate(copy / "p", "--data", indexed(shutil.copytree(world, tmp_path / "same")))[0] == json.loads(before) | {"run": str(copy / "p")}


@pytest.mark.slow
def test_mended_labels_and_a_cut_result_are_evaluated_anew(world, copy, tmp_path, capsys):
    data = indexed(shutil.copytree(world, tmp_path / "data"))
    change(copy / "p/last.pth", lambda content: content.update(data=str(data)))
    first, = evaluate(copy / "p")
    (copy / "p/results.json").write_text((copy / "p/results.json").read_text()[:40])
    assert evaluate(copy / "p")[0]["IoU"] == first["IoU"]
    index = load_index(data)
    for row in np.flatnonzero((index.split == b"val") & (index.condition == 2)):  # the night loses its labels
        labels = data / index.lidarseg[row].decode()
        labels.write_bytes(bytes(labels.stat().st_size))
    capsys.readouterr()
    second, = evaluate(copy / "p")
    printed = capsys.readouterr().out
    assert second["mIoU"]["night"] is None and second["mIoU"]["day-clear"] == first["mIoU"]["day-clear"]
    assert "| no labels |" in printed and "nan" not in printed.lower()
    strict = json.JSONDecoder(parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict.decode((copy / "p/results.json").read_text()) == second
    assert "judged on other frames than its own" in printed and len(list((copy / "p").glob("results*.json"))) == 1


def result(run="a", frames=6, **protocol):
    protocol = {"classes": ["car", "bus"], "cameras": "all", "head": "linear", "finetune": False, "percent": 100} | protocol
    return {"run": run, "task": "seg", "mIoU": {"full": 50.0}, "protocol": protocol, "made_from": {"frames": {"frames": frames}}}


@pytest.mark.parametrize("other, why", [
    (result("b", 18), "other frames: frames 6; now: frames 18"), (result("b", cameras="CAM_FRONT"), "cameras all and CAM_FRONT"),
    (result("b", classes=["car"]), "other classes"), (result("b", finetune=True), "finetune False and True"),
    (result("b", percent=1), "percent 100 and 1"), (result("b", head="batchnorm"), "head linear and batchnorm"),
    ({"run": "b", "task": "seg", "mIoU": {"full": 50.0}}, "from before fingerprints")])
def test_what_cannot_be_compared_has_no_difference_and_a_line_that_says_why(other, why):
    text = evaluation.table([result(), other])
    assert "b is not compared with a: " in text and why in text
    assert "| b | seg | 50.0 | not run |" in text and "(+0.0)" not in text
    rows = [{"run": row["run"], "task": "seg", "severity": 3, "results": {"clean": row}} for row in (result(), other)]
    assert why in (text := corruptions.table(rows)) and "(+0.0)" not in text


def test_what_can_be_compared_has_its_difference():
    text = evaluation.table([result(), result("b")])
    assert "| b | seg | 50.0 (+0.0) | not run |" in text and "not compared" not in text


def test_a_probe_that_is_named_twice_is_one_row(copy, runs, capsys):
    (copy / "link").symlink_to(copy / "p")
    assert len(evaluate(copy / "p", f"{copy}/./p", copy / "link", copy / "p/last.pth")) == 1


# ---- several processes ------------------------------------------------------------------------------------------------------

def test_the_first_process_decides_for_all(monkeypatch):
    told = []
    monkeypatch.setattr(training, "world", lambda: 2)
    monkeypatch.setattr(training.dist, "broadcast_object_list", lambda found: found.__setitem__(slice(None), told[-1]) if told else None)
    monkeypatch.setattr(training, "rank", lambda: 0)
    assert training.by_first_process(lambda: 3) == 3
    monkeypatch.setattr(training, "rank", lambda: 1)
    told.append([3, None])
    assert training.by_first_process(lambda: pytest.fail("it looks for itself")) == 3
    told.append([None, "p: no last.pth there"])
    with pytest.raises(InputError, match="no last.pth there"):
        training.by_first_process(lambda: 3)

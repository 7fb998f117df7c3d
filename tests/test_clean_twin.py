"""The control without LiDAR: what a view's twin is, a teacher that stays, what is refused."""
import json
import os
import shutil

import pytest
import torch
from pandasets import laid_out
from runs import (checkpoint_of, fails_with_one_line, largest_difference, lines, open_one,
                  stage1_args, stage2_args)

import stage1
from data import Frames, collate, select
from distill import distillation_loss
from experiments import clean_twin, corruptions
from experiments.clean_twin import Twins, WithTwin
from models import load_image_encoder
from plumbing import run_folder
from plumbing.training import to_device
from readers.table import open_tables

pytestmark = pytest.mark.slow

SIZE = (40, 80)


def image_encoder():
    """The encoder as it was."""
    return load_image_encoder("vit_mini8", "random")


def make(root, name, corruption):
    """A copy of root/clean beside it."""
    corruptions.main(["make", "--data", f"pandaset64={root}/clean", "--out", f"{root}/{name}",
                      "--corruption", corruption, "--severity", "5", "--workers", "0",
                      "--image-size", *map(str, SIZE)])
    open_one(root / name, name="pandaset64")


@pytest.fixture(scope="module")
def street(panda, tmp_path_factory):
    """Folder of the scenes with labels: "clean", a foggy copy, and one in which nothing changed."""
    root = tmp_path_factory.mktemp("street")
    laid_out(panda, root / "clean")
    make(root, "fog", "fog")
    make(root, "same", "clean")
    return root


def data_of(street, *names):
    return ",".join(f"pandaset64={street / name}" for name in names)


def tables_of(street, *names):
    return select(open_tables(data_of(street, *names), look=False), "train")


# ---- twins ---------------------------------------------------------------------------------------

def test_a_view_s_twin_is_the_clean_image_of_its_camera_and_frame(street):
    tables = tables_of(street, "clean", "fog")
    clean, foggy = (Frames([table], "all", SIZE) for table in tables)
    twins = WithTwin(tables, "all", SIZE)
    half = len(clean)
    assert len(twins) == 2 * half == 2 * 4 * 6
    for number in (0, 5, 6, half - 1):
        own = clean[0, number]["image"]
        assert torch.equal(twins[0, number]["image"], torch.stack([own, own]))
        changed = twins[0, half + number]["image"]
        assert torch.equal(changed[0], foggy[0, number]["image"])
        assert torch.equal(changed[1], own) and not torch.equal(changed[0], own)
    # The other way round the foggy ones would teach
    twins = WithTwin(tables[::-1], "all", SIZE)
    assert torch.equal(twins[0, half]["image"][1], foggy[0, 0]["image"])


def batch_of(street, names, numbers):
    """A batch of views of the training frames, with two points each."""
    frames = WithTwin(tables_of(street, *names), "all", SIZE)
    batch = to_device(collate([frames[0, number] for number in numbers]), torch.device("cpu"))
    pixels = torch.tensor([[5.0, 7.5], [30, 60]]).repeat(len(numbers), 1)
    view = torch.arange(len(numbers)).repeat_interleave(2)
    return batch | {"pixels": pixels, "view": view}


def test_clean_views_teach_nothing(street):
    """They are their own twins: the loss is 0, and so is each gradient."""
    model = Twins(image_encoder())
    loss = distillation_loss(*model(batch_of(street, ["clean"], [0, 7])), "3d_to_2d")
    loss.backward()
    assert loss == 0
    gradients = [value.grad for value in model.encoder.parameters() if value.grad is not None]
    assert len(gradients) > 50 and not any(gradient.any() for gradient in gradients)

    # A foggy one has a loss, of which the teacher gets no gradient
    loss = distillation_loss(*model(batch_of(street, ["clean", "fog"], [24, 31])), "3d_to_2d")
    loss.backward()
    assert loss > 0.1 and any(gradient.any() for gradient in gradients)
    assert all(value.grad is None for value in model.teacher.parameters())


def test_the_teacher_keeps_its_statistics_where_the_learner_does_not(street):
    """stage2.py --train-batchnorm lets those of a CNN follow the images."""
    encoder = load_image_encoder("efficientnet_lite0", "random", feature="stride8")
    before = {name: value.clone() for name, value in encoder.backbone.state_dict().items()}
    encoder.train(True)
    model = Twins(encoder)
    batch = batch_of(street, ["fog"], [0, 7])
    _, taught = model(batch)
    assert largest_difference(model.teacher.backbone.state_dict(), before) == 0
    assert largest_difference(encoder.backbone.state_dict(), before) > 0
    assert torch.equal(model(batch)[1], taught)


# ---- runs ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def first(street, tmp_path_factory):
    """Folder of a stage 1 of one step on the clean scenes."""
    out = tmp_path_factory.mktemp("twin") / "s1"
    more = ["--steps", "1", "--conditions", "clear", "--image-size", *map(str, SIZE)]
    stage1.main(stage1_args(data_of(street, "clean"), out, *more))
    return out


def run(street, first, out, names, *more):
    clean_twin.main(stage2_args(data_of(street, *names), first, out, "--steps", "2", *more))
    return out


@pytest.fixture
def built(monkeypatch):
    """The models that runs have built."""
    found, train = [], clean_twin.train

    def remembered(args, device, frames, model, *more, **options):
        found.append(model)
        return train(args, device, frames, model, *more, **options)
    monkeypatch.setattr(clean_twin, "train", remembered)
    return found


def test_two_steps_write_an_encoder_and_leave_the_teacher(street, first, tmp_path, built):
    out = run(street, first, tmp_path / "twin", ["clean", "fog"])
    encoder, trained = image_encoder(), load_image_encoder(str(out))
    assert trained.spec["name"] == "vit_mini8" and tuple(trained.spec["image_size"]) == SIZE
    before = encoder.backbone.state_dict()
    assert largest_difference(trained.backbone.state_dict(), before) > 0
    (model,) = built
    assert largest_difference(model.teacher.backbone.state_dict(), before) == 0
    assert not any(value.requires_grad for value in model.teacher.parameters())

    content = checkpoint_of(out)
    assert content["kind"] == "image_encoder" and content["step"] == content["total"] == 2
    assert content["made_from"]["encoder"] == encoder.fingerprint()
    assert content["made_from"]["frames"]["frames"] == 2 * 4
    assert lines(out)[-1]["loss"] > 0

    # The same command again changes nothing, the same in another place gives the same
    log = (out / "log.jsonl").read_text()
    run(street, first, out, ["clean", "fog"])
    assert (out / "log.jsonl").read_text() == log
    again = run(street, first, tmp_path / "again", ["clean", "fog"])
    assert largest_difference(checkpoint_of(again)["model"], content["model"]) == 0


def test_a_stopped_run_goes_on_with_the_teacher_of_its_beginning(street, first, tmp_path,
                                                                 monkeypatch):
    whole = run(street, first, tmp_path / "whole", ["clean", "fog"])
    save = run_folder.save

    def save_and_stop(path, content):
        save(path, content)
        raise KeyboardInterrupt
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(street, first, parts, ["clean", "fog"], "--save-every", "0")
    assert checkpoint_of(parts)["step"] == 1
    run(street, first, parts, ["clean", "fog"], "--save-every", "0")
    assert largest_difference(checkpoint_of(parts)["model"], checkpoint_of(whole)["model"]) == 0


def test_clean_data_alone_change_nothing(street, first, tmp_path):
    out = run(street, first, tmp_path / "twin", ["clean", "same"], "--weight-decay", "0")
    assert [line["loss"] for line in lines(out) if "loss" in line] == [0]
    before = image_encoder().backbone.state_dict()
    assert largest_difference(checkpoint_of(out)["model"], before) == 0


def test_a_bad_twin_is_named_or_skipped(street, first, tmp_path, capsys, monkeypatch):
    shutil.copytree(street / "clean", street / "torn", copy_function=os.symlink)
    picture = min((street / "torn").glob("*/camera/front_camera/*.jpg"))
    picture.unlink()
    picture.write_bytes(b"torn")
    short = str(picture.relative_to(street / "torn"))

    def start(more):
        each_view_once = ["--cameras", "front_camera", "--steps", "4"]
        run(street, first, tmp_path / "twin", ["torn", "fog"], *each_view_once, *more)
    assert short in fails_with_one_line(capsys, start, [])
    monkeypatch.setattr("plumbing.run_folder.BAD_FRAMES", 1)
    start(["--on-bad-frame", "skip", "--restart"])
    assert short in lines(tmp_path / "twin")[-1]["bad_frames"][0]


def test_other_frames_are_refused_in_one_line(street, panda, first, tmp_path, capsys):
    def error(*names):
        return fails_with_one_line(
            capsys, lambda more: run(street, first, tmp_path / "twin", names, *more), [])

    # One scene fewer, and the scans of another folder
    fewer = shutil.copytree(street / "clean", street / "fewer", symlinks=True)
    shutil.rmtree(fewer / "002")
    named = json.loads((fewer / "conditions.json").read_text())
    (fewer / "conditions.json").unlink()
    del named["002"]
    (fewer / "conditions.json").write_text(json.dumps(named))
    shutil.copytree(street / "clean", street / "moved", symlinks=True)
    for other in ("fewer", "moved"):
        line = error(other, "clean")
        assert f"--data: {street / other}, the first, has not {street}/clean's frame" in line
        assert "experiments.corruptions make" in line
    # A teacher that sees fog would not be clean
    (street / "moved/corrupted.json").write_text('{"corruption": "fog"}')
    assert f"{street}/moved, the first, is a copy with fog; give the dataset" in error("moved")
    assert not (tmp_path / "twin").exists()

"""Several teachers: the loss of their parts, the head, the flags, and what the scripts make of
them."""
import math
import re
import shutil
import sys
import types
import weakref
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from runs import (checkpoint_of, fails_with_one_line, largest_difference, lines, model_of,
                  probe_args, stage1_args, stage2_args)
from torch import nn

import probe
import stage1
import stage2
import teachers
from distill import distillation_loss, features_at_pixels, sums_by
from experiments import ablations
from heads import HEADS, part_of
from miniature.world import make_world
from models import load_image_encoder, load_point_encoder
from plumbing.errors import InputError
from readers import nuscenes, table
from teachers import Teachers, settle

# ---- the loss ------------------------------------------------------------------------------------

def test_two_points_by_hand():
    g = torch.tensor([[3.0, 4.0, 2.0], [1.0, 0.0, 5.0]])
    f = torch.tensor([[8.0, 6.0, -9.0], [0.0, 2.0, 0.1]])
    # Normalised: (.6, .8 | 1) and (.8, .6 | -1); (1, 0 | 1) and (0, 1 | 1)
    expected = (math.sqrt(0.2**2 + 0.2**2 + 2**2) + math.sqrt(1 + 1 + 0)) / 2
    for direction in ("2d_to_3d", "3d_to_2d"):
        assert distillation_loss(g, f, direction, [2, 1]).item() == pytest.approx(expected)
    # It is not the sum of two losses, nor the loss of the whole as one part
    apart = sum(distillation_loss(g[:, part], f[:, part], "2d_to_3d").item()
                for part in (slice(0, 2), slice(2, 3)))
    assert apart == pytest.approx((math.sqrt(0.08) + math.sqrt(2) + 2 + 0) / 2)
    assert abs(distillation_loss(g, f, "2d_to_3d").item() - expected) > 0.1


@pytest.mark.parametrize("count, value", [(1, 2**0.5), (2, 2.0), (3, 6**0.5)])
def test_unrelated_features_are_at_the_root_of_twice_the_teachers(count, value):
    torch.manual_seed(0)
    g, f = torch.randn(2, 2000, 384 * count)
    loss = distillation_loss(g, f, "2d_to_3d", [384] * count)
    assert loss.item() == pytest.approx(value, abs=0.01)
    assert distillation_loss(g, 3 * g, "2d_to_3d", [384] * count).item() < 1e-6


def test_a_teacher_twice_is_root_two_times_once():
    torch.manual_seed(0)
    g, f = torch.randn(2, 50, 12)
    f.requires_grad_()
    once = distillation_loss(g, f, "2d_to_3d")
    of_once, = torch.autograd.grad(once, f)
    both = distillation_loss(torch.cat([g, g], 1), torch.cat([f, f], 1), "2d_to_3d", [12, 12])
    of_both, = torch.autograd.grad(both, f)
    torch.testing.assert_close(both, 2**0.5 * once)
    torch.testing.assert_close(of_both, 2**0.5 * of_once)


def test_other_teachers_gradients_shrink_while_one_is_far_off():
    near = torch.tensor([[1.0, 0.1, 1.0, 0.0]], requires_grad=True)
    far = torch.tensor([[1.0, 0.1, -1.0, 0.0]], requires_grad=True)
    g = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    for f in (near, far):
        distillation_loss(g, f, "2d_to_3d", [2, 2]).backward()
    assert far.grad[:, :2].norm() < 0.1 * near.grad[:, :2].norm()


def test_parts_of_zeros_and_no_points():
    f = torch.zeros(3, 6, requires_grad=True)
    distillation_loss(torch.randn(3, 6), f, "2d_to_3d", [4, 2]).backward()
    assert f.grad.isfinite().all()
    assert distillation_loss(f[:0], f[:0], "2d_to_3d", [4, 2]).item() == 0


@pytest.mark.parametrize("head", ["linear", "mlp", "mlp2"])
def test_permuted_teachers_permute_the_head(head):
    torch.manual_seed(0)
    x, g = torch.randn(40, 8), torch.randn(40, 5)
    ours, theirs = (HEADS[head](8, 12, 5) for _ in range(2))
    order = [3, 4, 0, 1, 2]  # the teacher of width 2 before that of width 3
    state = ours.state_dict()
    last = [name.rpartition(".")[0] for name in state][-1]
    for name in ("weight", "bias"):
        name = f"{last}.{name}" if last else name
        state[name] = state[name][order]
    theirs.load_state_dict(state)
    losses = (distillation_loss(g, ours(x), "2d_to_3d", [3, 2]),
              distillation_loss(g[:, order], theirs(x), "2d_to_3d", [2, 3]))
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters()):
        of_last = name.rpartition(".")[0] == last
        torch.testing.assert_close(other.grad, one.grad[order] if of_last else one.grad)


def test_sums_of_each_dataset():
    torch.manual_seed(0)
    g, f = torch.randn(2, 30, 5)
    numbers = torch.arange(30) % 4  # none of a fifth dataset
    for widths in (None, [3, 2]):
        sums = sums_by(numbers, 5, g, f.requires_grad_(), widths)
        assert sums.shape == (5, 2) and not sums.requires_grad
        assert sums[:, 1].tolist() == [8, 8, 7, 7, 0] and sums[4, 0] == 0
        for number in range(4):
            own = numbers == number
            loss = distillation_loss(g[own], f[own], "2d_to_3d", widths)
            assert (sums[number, 0] / sums[number, 1]).item() == pytest.approx(loss.item())


# ---- the head ------------------------------------------------------------------------------------

def test_the_two_layer_head():
    head = HEADS["mlp2"](8, 99, 5)
    assert [type(layer) for layer in head] == [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear]
    assert [tuple(p.shape) for p in head.parameters()] == [(16, 8), (16,), (16,), (16,), (5, 16),
                                                           (5,)]


@pytest.mark.parametrize("kind", HEADS)
def test_a_part_of_a_head_gives_that_part(kind):
    torch.manual_seed(0)
    head = HEADS[kind](8, 12, 9).eval()
    x = torch.randn(20, 8)
    whole = head(x)
    for number, part in enumerate(whole.split([4, 3, 2], 1)):
        own = part_of(head, [4, 3, 2], number)
        torch.testing.assert_close(own(x), part)
        assert sum(p.numel() for p in own.parameters()) < sum(p.numel() for p in head.parameters())


# ---- features ------------------------------------------------------------------------------------

def batch_of(points=60, images=2):
    torch.manual_seed(1)
    pixels = torch.rand(points, 2) * torch.tensor([79.0, 159.0])
    return {"image": torch.rand(images, 3, 80, 160), "pixels": pixels,
            "view": torch.arange(points) % images}


@pytest.fixture(scope="module")
def mini():
    return load_image_encoder("vit_mini8", "random").requires_grad_(False)


@pytest.fixture(scope="module")
def small():
    return load_image_encoder("vit_small16", "random").requires_grad_(False)


def test_each_teacher_is_sampled_in_its_own_map(mini, small):
    batch = batch_of()
    both = Teachers([mini, small])
    assert (both.dims, both.dim, both.widths) == ([96, 384], 480, [96, 384])
    found = both.features_at_pixels(batch)
    for encoder, part in zip((mini, small), found.split(both.dims, 1)):
        # By torch's own sampler, in the map up-sampled to the image
        upsampled = F.interpolate(encoder(batch["image"]), size=(80, 160), mode="bilinear",
                                  align_corners=True)
        place = batch["pixels"].flip(1) / torch.tensor([159.0, 79.0]) * 2 - 1
        for image in range(2):
            own = batch["view"] == image
            oracle = F.grid_sample(upsampled[image:image + 1], place[own][None, None],
                                   align_corners=True)[0, :, 0].T
            oracle = oracle / oracle.norm(dim=1, keepdim=True)
            # The up-sampled map is linear between pixels only where the map itself is
            assert (part[own] - oracle).norm(dim=1).mean() < 0.05
        torch.testing.assert_close(part.norm(dim=1), torch.ones(60))
        torch.testing.assert_close(part, F.normalize(features_at_pixels(encoder, batch), dim=1))


def test_one_teacher_is_what_it_was(mini):
    batch = batch_of()
    one = Teachers([mini])
    assert one.widths is None and one.fingerprint() == mini.fingerprint()
    assert torch.equal(one.features_at_pixels(batch), features_at_pixels(mini, batch))


def test_a_map_is_gone_before_the_next_is_made(mini, small):
    maps = []

    class Watched(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder, self.spec, self.dim = encoder, encoder.spec, encoder.dim

        def forward(self, images):
            assert all(of_earlier() is None for of_earlier in maps)
            found = self.encoder(images)
            maps.append(weakref.ref(found))
            return found
    Teachers([Watched(mini), Watched(small), Watched(mini)]).features_at_pixels(batch_of())
    assert len(maps) == 3


def test_fingerprints_tell_teachers_and_their_order_apart(mini, small):
    both, turned = Teachers([mini, small]).fingerprint(), Teachers([small, mini]).fingerprint()
    assert both["name"] == "vit_mini8 + vit_small16" and both["feature"] == "norm + prenorm"
    assert len({fp["weights"] for fp in (both, turned, mini.fingerprint(), small.fingerprint())}) \
        == 4


def test_sizes_of_images(mini, small):
    both = Teachers([mini, small])
    assert both.image_size((80, 160)) == (80, 160) and both.image_size() == (224, 448)
    with pytest.raises(InputError, match="--image-size 88 160: vit_small16 has patches of 16 "
                                         "pixels.*multiples of 16 suit all"):
        both.image_size((88, 160))
    with pytest.raises(InputError, match="--image-size 0 160: vit_mini8"):
        both.image_size((0, 160))
    with pytest.raises(InputError, match="--image-size 88 160: vit_small16.*80 and 96"):
        Teachers([small]).image_size((88, 160))

    # Of checkpoints, which say on what they were trained
    def trained(encoder, size):
        return Namespace(spec=encoder.spec | {"image_size": size}, dim=encoder.dim,
                         multiple=encoder.multiple, check_size=encoder.check_size)
    assert Teachers([trained(mini, (80, 160)), small]).image_size() == (80, 160)
    other = Teachers([trained(mini, (80, 160)), trained(small, (64, 96))])
    with pytest.raises(InputError, match="trained on images of 64 96 and 80 160; give one "
                                         "--image-size"):
        other.image_size()
    assert other.image_size((160, 320)) == (160, 320)


# ---- flags ---------------------------------------------------------------------------------------

def flags(*argv):
    args = stage1.parse(["--data", "x", "--out", "y", *argv])
    return args.encoder, args.weights, args.feature, args.head


def test_one_encoder_has_the_arguments_that_it_had():
    assert flags() == ("dinov2_vits14", None, None, None)
    given = ["--encoder", "a", "--weights", "w", "--feature", "keys"]
    assert flags(*given) == ("a", "w", "keys", None)
    assert flags("--encoder", "a", "--weights", "-", "--head", "mlp2") == ("a", None, None, "mlp2")


def test_several_encoders_have_lists():
    assert flags("--encoder", "a", "b") == (["a", "b"], [None, None], [None, None], "mlp2")
    assert flags("--encoder", "a", "a", "--weights", "-", "w", "--feature", "keys", "-", "--head",
                 "linear") == (["a", "a"], [None, "w"], ["keys", None], "linear")
    with pytest.raises(InputError, match="--weights w: 1 for 2 of --encoder; give one for each"):
        flags("--encoder", "a", "b", "--weights", "w")
    with pytest.raises(InputError, match="--feature keys norm: 2 for 1 of --encoder"):
        settle(Namespace(encoder="a", weights=None, feature=["keys", "norm"]))


# ---- runs ----------------------------------------------------------------------------------------

BOTH = ["--encoder", "vit_mini8", "vit_small16", "--weights", "random", "random"]


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """Folder of a stage 1 of four steps with two teachers."""
    out = tmp_path_factory.mktemp("teachers") / "two"
    stage1.main(stage1_args(world, out, *BOTH, "--steps", "4"))
    return out


@pytest.mark.slow
def test_stage_1_with_two_teachers(two, mini, small):
    checkpoint = checkpoint_of(two)
    assert "encoder" not in checkpoint
    assert checkpoint["made_from"]["encoder"] == Teachers([mini, small]).fingerprint()
    assert [(one["name"], one["dim"]) for one in checkpoint["teachers"]] == [
        ("vit_mini8", 96), ("vit_small16", 384)]
    assert checkpoint["teachers"][1]["fingerprint"] == small.fingerprint()
    assert checkpoint["spec"]["head"] == "mlp2" and checkpoint["spec"]["out_channels"] == 480
    assert model_of(two)["head.3.weight"].shape == (480, 32)
    assert 1.7 < lines(two)[-1]["loss"] < 2.2  # 2 for unrelated features


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_mini8", "vit_small16"])
def test_stage_2_takes_the_part_of_its_encoder(name, two, world, tmp_path, monkeypatch):
    given = []
    real = stage2.distillation_loss

    def kept(pixel_features, point_features, direction):
        given.append(point_features)
        return real(pixel_features, point_features, direction)
    monkeypatch.setattr(stage2, "distillation_loss", kept)
    # Its weights are those of stage 1's flags
    out = tmp_path / "s2"
    stage2.main(stage2_args(world, two, out, "--encoder", name, "--steps", "2"))
    assert given[0].shape[1] == {"vit_mini8": 96, "vit_small16": 384}[name]
    assert 1 < lines(out)[-1]["loss"] < 1.6
    checkpoint = checkpoint_of(out)
    assert checkpoint["encoder"]["name"] == name
    point_encoder, _ = load_point_encoder(two)
    assert checkpoint["made_from"]["stage1"] == point_encoder.fingerprint()

    # The rows of the last layer are the right ones
    encoder = load_image_encoder(name, "random")
    start, end = {"vit_mini8": (0, 96), "vit_small16": (96, 480)}[name]
    whole = point_encoder.head(torch.ones(3, 16))
    teachers.keep_part(point_encoder, checkpoint_of(two), two, encoder)
    torch.testing.assert_close(point_encoder.head(torch.ones(3, 16)), whole[:, start:end])
    assert point_encoder.spec["out_channels"] == end - start


def test_a_probe_takes_what_is_below_the_head(two, world, tmp_path):
    probe.main(probe_args(world, "seg3d", two, tmp_path / "p", "--steps", "1"))
    assert checkpoint_of(tmp_path / "p")["dim"] == 16


@pytest.mark.parametrize("more, message", [
    ([], "it had several teachers, vit_mini8 and vit_small16; say with --encoder which"),
    (["--encoder", "vit_small8", "--weights", "random"],
     "--encoder vit_small8: the teachers of --stage1 .* are vit_mini8 and vit_small16; give one"),
    (["--encoder", "vit_mini8", "--feature", "keys"], "feature keys.*the teachers of --stage1"),
    (["--encoder", "vit_mini8", "--image-size", "84", "160"], "--image-size 84 160: vit_mini8")])
def test_stage_2_names_the_teachers(more, message, two, world, tmp_path, capsys):
    argv = stage2_args(world, two, tmp_path / "none", "--steps", "1", *more)
    error = fails_with_one_line(capsys, stage2.main, argv)
    assert re.search(message, error), error
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(two, world, tmp_path):
    out = shutil.copytree(two, tmp_path / "two")
    argv = stage1_args(world, out, *BOTH, "--steps", "4")
    # From the checkpoint of the second step, which the first epoch's end wrote
    (out / "previous.pth").rename(out / "last.pth")
    assert checkpoint_of(out)["step"] == 2
    stage1.main(argv)
    assert largest_difference(model_of(out), model_of(two)) == 0
    assert lines(out)[-1]["loss"] == lines(two)[-1]["loss"]


def test_other_teachers_are_another_run(two, world, tmp_path, capsys):
    out = shutil.copytree(two, tmp_path / "two")
    for more in (["--encoder", "vit_small16", "vit_mini8", "--weights", "random", "random"],
                 ["--encoder", "vit_mini8", "--weights", "random"]):
        argv = stage1_args(world, out, *more, "--steps", "4")
        assert "vit_mini8 + vit_small16" in fails_with_one_line(capsys, stage1.main, argv)


@pytest.mark.parametrize("more, message", [
    (["--encoder", "vit_mini8", "vit_small14", "--weights", "random", "random"],
     "--image-size 80 160: vit_small14 has patches of 14 pixels, which do not divide it; multiples "
     "of 56 suit all teachers"),
    (["--encoder", "vit_mini8", "vit_smal16", "--weights", "random", "random"],
     "--encoder vit_smal16: neither a file nor a known encoder; did you mean vit_small16"),
    ([*BOTH, "--feature", "keys", "projected"],
     "--feature projected: vit_small16 has prenorm, norm, keys")])
def test_mistakes_name_the_teacher(more, message, world, tmp_path, capsys):
    argv = stage1_args(world, tmp_path / "none", *more, "--steps", "1")
    assert message in fails_with_one_line(capsys, stage1.main, argv)
    assert not (tmp_path / "none").exists()


def test_an_ablation_has_one(world, tmp_path, capsys):
    argv = ["joint", *stage1_args(world, tmp_path / "none", *BOTH, "--steps", "1")]
    assert "an ablation has one image encoder" in fails_with_one_line(capsys, ablations.main, argv)


# ---- mixtures ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_loss_of_each_dataset_of_a_mixture(world, tmp_path, monkeypatch):
    """The second dataset is nuScenes under another name."""
    other = make_world(tmp_path / "other", seed=8, train=(2, 0, 0), val=1, frames=1, workers=1)
    twin = types.ModuleType("readers.twin")
    twin.__dict__.update({name: value for name, value in vars(nuscenes).items()
                          if not name.startswith("__")}, __file__=nuscenes.__file__)
    monkeypatch.setitem(sys.modules, "readers.twin", twin)
    monkeypatch.setattr(table, "datasets", lambda: ["nuscenes", "twin"])
    real = stage1.open_tables
    monkeypatch.setattr(stage1, "open_tables", lambda *a, **k: real(*a, **k | {"here": True}))
    out = tmp_path / "s1"
    stage1.main(stage1_args(f"nuscenes={world},twin={other}", out, "--epochs", "1"))
    line = lines(out)[-1]
    assert line["loss_of"].keys() == {"nuscenes", "twin"}
    least, most = sorted(line["loss_of"].values())
    assert 1 < least < line["loss"] < most < 1.6

"""S3PT's maths: against SciPy's Bessel functions, plain formulas, sums by hand, and what must not
change."""
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import ive
from torch import nn

from s3pt import objectives
from s3pt.networks import Network
from s3pt.objectives import (Center, Head, Prototypes, Target, clip_each, crop_loss, crop_partners,
                             drop_gradients, health, move_teacher, object_loss, parameter_groups,
                             prototype_loss, vmf_log_constant)
from vit import ViT


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape, seed=0):
    return F.normalize(seeded(*shape, seed=seed), dim=-1)


# ---- von Mises-Fisher ----------------------------------------------------------------------------

def by_bessel(kappa, dim):
    """log C_p(kappa) - log C_p(0), by SciPy's scaled Bessel function."""
    nu = dim / 2 - 1
    at_zero = nu * math.log(2) + math.lgamma(nu + 1)
    return nu * np.log(kappa) - np.log(ive(nu, kappa)) - kappa - at_zero


@pytest.mark.parametrize("dim, error", [(32, 1e-5), (64, 1e-6), (128, 1e-7), (256, 1e-7)])
def test_the_constant_is_that_of_bessel_functions(dim, error):
    kappa = np.geomspace(1, 5000, 200)
    expected = by_bessel(kappa, dim)
    exact = vmf_log_constant(torch.from_numpy(kappa), dim).numpy()
    assert np.abs(exact - expected).max() < error
    single = vmf_log_constant(torch.from_numpy(kappa).float(), dim).double().numpy()
    assert (np.abs(single - expected) / np.maximum(1, np.abs(expected))).max() < 1e-5


def test_its_gradient_is_a_ratio_of_bessel_functions():
    kappa = torch.from_numpy(np.geomspace(1, 5000, 200)).requires_grad_()
    vmf_log_constant(kappa, 256).sum().backward()
    ratio = -ive(128, kappa.detach().numpy()) / ive(127, kappa.detach().numpy())
    assert np.abs(kappa.grad.numpy() - ratio).max() < 1e-8


def test_at_zero_it_is_flat_and_curves_down():
    kappa = torch.zeros(1, requires_grad=True)
    value = vmf_log_constant(kappa, 256)
    slope, = torch.autograd.grad(value.sum(), kappa, create_graph=True)
    curve, = torch.autograd.grad(slope.sum(), kappa)
    assert value.item() == 0 and slope.item() == 0
    assert curve.item() == pytest.approx(-1 / 256, rel=1e-3)  # -kappa^2 / 2p, to first order


def test_prototypes_of_one_length_have_the_same_probabilities_with_and_without_it():
    plain, vmf = Prototypes(32, 50), Prototypes(32, 50, vmf=True)
    vmf.load_state_dict(plain.state_dict())
    z = unit(7, 32)
    for temperature in (0.04, 0.1):
        expected = plain(z, temperature).softmax(1)
        assert torch.allclose(vmf(z, temperature).softmax(1), expected, atol=1e-6)
    vmf.weight_g.data[3] = 2.0
    assert not torch.allclose(vmf(z, 0.1).softmax(1), plain(z, 0.1).softmax(1), atol=1e-3)


def test_a_surer_prototype_wins_near_itself_and_loses_far_away():
    layer = Prototypes(32, 2, vmf=True)
    layer.weight_v.data[:] = unit(1, 32)
    layer.weight_g.data[:, 0] = torch.tensor([1.0, 3.0])
    near = layer.weight_v.data[:1]
    assert layer(near, 0.1).argmax() == 1
    assert layer(-near, 0.1).argmax() == 0


# ---- the head ------------------------------------------------------------------------------------

def test_the_head_has_dinos_sizes_and_gives_unit_vectors():
    head = Head(384, 2048, 256, 1000)
    count = sum(p.numel() for p in head.mlp.parameters())
    assert count == 384 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    assert [name for name, _ in head.named_parameters()][-4:] == [
        "last_layer.weight_g", "last_layer.weight_v",
        "last_layer_c.weight_g", "last_layer_c.weight_v"]
    assert torch.allclose(head(seeded(5, 384)).norm(dim=1), torch.ones(5))
    assert Head(8, 4, 32, 5, objects=False).last_layer_c is None
    assert not Prototypes(32, 5, unit=True).weight_g.requires_grad


# ---- centring ------------------------------------------------------------------------------------

def test_in_probability_space_each_prototype_gets_the_same_share():
    layer = Prototypes(32, 64, vmf=True)
    layer.weight_g.data.uniform_(0.5, 4)
    center = Center(64, "probability", momentum=0.0)
    z = unit(500, 32)
    center.update(z, layer, 0.07)
    shares = (layer(z, 0.07).softmax(1) / center.value.exp()).mean(0)
    assert torch.allclose(shares, torch.ones(64), atol=1e-4)


def test_many_prototypes_and_few_rows_give_finite_centres():
    layer = Prototypes(32, 65536)
    layer.weight_v.data[0] = 1.0
    layer.weight_g.data[0] = 20.0  # takes everything: others have probabilities that underflow
    center = Center(65536, "probability")
    z = F.normalize(torch.ones(8, 32), dim=1)
    for _ in range(3):
        center.update(z, layer, 0.04)
    assert (layer(z, 0.04).softmax(1) == 0).any()
    assert torch.isfinite(center.value).all()
    assert torch.isfinite(center.targets(layer(z, 0.04), 0.04)).all()


def test_with_logit_centring_a_constant_of_a_prototype_changes_no_target():
    z = unit(20, 32)
    layer = Prototypes(32, 10)
    weight, bias = layer.layer(0.05)
    targets = []
    for constant in (0.0, 5.0):
        moved = weight, bias + constant * (torch.arange(10) == 3)
        layer.layer = lambda temperature, moved=moved: moved
        center = Center(10, "logits", momentum=0.0)
        center.update(z, layer, 0.05)
        targets.append(center.targets(layer(z, 0.05), 0.05))
    assert torch.allclose(*targets, atol=1e-5)


def test_the_centre_of_logits_moves_as_in_dino():
    layer = Prototypes(32, 10)
    center = Center(10, "logits", momentum=0.9)
    z = unit(20, 32)
    raw = z @ (layer.weight_g * F.normalize(layer.weight_v, dim=1)).T
    center.update(z, layer, 0.05)
    assert torch.allclose(center.value, 0.1 * raw.mean(0), atol=1e-6)
    expected = ((raw - center.value) / 0.05).softmax(1)
    assert torch.allclose(center.targets(layer(z, 0.05), 0.05), expected, atol=1e-6)


def test_no_rows_leave_the_centre_where_it_is():
    for kind in ("logits", "probability"):
        center = Center(10, kind)
        center.update(torch.zeros(0, 32), Prototypes(32, 10), 0.05)
        assert (center.value == 0).all()


# ---- losses --------------------------------------------------------------------------------------

def plainly(z, layer, temperature, targets):
    """The terms of `prototype_loss`, each matrix whole."""
    log_probabilities = F.log_softmax(layer(z, temperature), dim=1)
    whole = slice(0, len(z))
    return [-(t.weights * (t.probabilities(whole) * log_probabilities).sum(1)).sum()
            for t in targets]


@pytest.mark.parametrize("at_once", [300, 10**6])
def test_value_and_gradients_are_those_of_the_plain_formula(monkeypatch, at_once):
    monkeypatch.setattr(objectives, "AT_ONCE", {"cpu": at_once})
    student, teacher = (Prototypes(32, 100, vmf=True) for _ in range(2))
    student.weight_g.data.uniform_(0.5, 2)
    center = Center(100, "probability")
    center.value.uniform_(-1, 1)
    with torch.no_grad():
        targets = [Target(unit(11, 32, seed=1), torch.rand(11), teacher, center, 0.05),
                   Target(unit(11, 2, 32, seed=2), torch.rand(11), teacher, center, 0.05)]
    found = []
    for fast in (True, False):
        z = unit(11, 32).requires_grad_()
        if fast:
            loss, terms = prototype_loss(z, student, 0.1, targets)
        else:
            terms = torch.stack(plainly(z, student, 0.1, targets))
            loss = terms.sum()
        wanted = [z, student.weight_g, student.weight_v]
        found.append([loss, terms, *torch.autograd.grad(3 * loss, wanted)])
    for ours, theirs in zip(*found):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert not found[0][1].requires_grad


def test_a_teacher_that_is_the_student_gives_the_entropy():
    layer = Prototypes(32, 40)
    center = Center(40, "logits")
    z = unit(2 * 6, 32)
    z = torch.cat([z[:6], z[:6]])  # both views are one
    loss, _ = crop_loss(z, z, (layer, layer), center, (0.1, 0.1))
    probabilities = layer(z, 0.1).softmax(1)
    assert loss.item() == pytest.approx(torch.special.entr(probabilities).sum(1).mean().item(),
                                        rel=1e-5)


@pytest.mark.parametrize("views", [2, 3, 5])
def test_the_crop_loss_is_the_mean_over_dinos_pairs(views):
    batch = 3
    layers = Prototypes(32, 40), Prototypes(32, 40)
    center = Center(40, "logits")
    z, seen = unit(views * batch, 32), unit(2 * batch, 32, seed=1)
    by_hand = []
    for teacher_view in range(2):
        for student_view in range(views):
            if teacher_view != student_view:
                t = layers[1](seen[teacher_view * batch:][:batch], 0.04).softmax(1)
                s = layers[0](z[student_view * batch:][:batch], 0.1).log_softmax(1)
                by_hand.append(-(t * s).sum(1).mean())
    assert len(by_hand) == 2 * views - 2
    loss, terms = crop_loss(z, seen, layers, center, (0.1, 0.04))
    assert loss.item() == pytest.approx(sum(by_hand).item() / len(by_hand), rel=1e-5)
    assert terms.tolist() == pytest.approx([loss.item()])


def test_weights_of_crops_add_up_to_one():
    for views in (2, 3, 12):
        assert crop_partners(views, 4)[1].sum().item() == pytest.approx(1)


def test_each_term_of_the_object_loss_by_hand():
    layers = Prototypes(32, 40), Prototypes(32, 40)
    center = Center(40, "logits")
    z, seen, near = (unit(2, 5, 32, seed=seed) for seed in range(3))
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)

    def cross_entropy(teacher_z, student_z):
        t = layers[1](teacher_z, 0.04).softmax(1)
        return -(t * layers[0](student_z, 0.1).log_softmax(1)).sum(1)
    _, terms = object_loss(z, seen, near, mask, layers, center, (0.1, 0.04))
    view = (cross_entropy(seen[0], z[1]).mean() + cross_entropy(seen[1], z[0]).mean()) / 2
    # Objects 0 and 2 of the first crop and 4 of the second came back
    image = (cross_entropy(near[0], z[1])[[0, 2]].mean()
             + cross_entropy(near[1], z[0])[4]) / 2
    assert terms.tolist() == pytest.approx([view.item(), image.item()], rel=1e-5)


def test_no_object_and_no_neighbor_give_a_loss_of_zero_with_gradients():
    layers = Prototypes(32, 40), Prototypes(32, 40)
    center = Center(40, "logits")
    for count in (0, 3):
        z = unit(2, count, 32).requires_grad_()
        mask = torch.zeros(2, count, dtype=torch.bool)
        loss, terms = object_loss(z, z.detach(), z.detach(), mask, layers, center, (0.1, 0.04))
        loss.backward()
        assert terms[1] == 0 and torch.isfinite(z.grad).all()
        assert (terms[0] == 0) == (count == 0)
        assert layers[0].weight_v.grad is not None


def test_the_teachers_side_gets_no_gradient():
    student, teacher = Prototypes(32, 40), Prototypes(32, 40)
    z, seen = unit(4, 32).requires_grad_(), unit(4, 32, seed=1).requires_grad_()
    crop_loss(z, seen, (student, teacher), Center(40, "logits"), (0.1, 0.04))[0].backward()
    assert seen.grad is None and teacher.weight_v.grad is None and teacher.weight_g.grad is None
    assert z.grad.abs().sum() > 0 and student.weight_v.grad.abs().sum() > 0

    # Of objects, too
    layers = Prototypes(32, 40), Prototypes(32, 40)
    z, seen, near = (unit(2, 5, 32, seed=seed).requires_grad_() for seed in range(3))
    mask = torch.ones(2, 5, dtype=torch.bool)
    center = Center(40, "probability")
    object_loss(z, seen, near, mask, layers, center, (0.1, 0.04))[0].backward()
    assert seen.grad is None and near.grad is None
    assert all(value.grad is None for value in layers[1].parameters())
    assert z.grad.abs().sum() > 0 and layers[0].weight_v.grad.abs().sum() > 0


# ---- teacher and optimizer -----------------------------------------------------------------------

def test_the_teacher_moves_by_hand():
    teacher, student = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, value in ((teacher, 1.0), (student, 3.0)):
        for parameter in module.parameters():
            parameter.data.fill_(value)
    move_teacher(teacher, student, 0.75)
    assert teacher.weight.item() == teacher.bias.item() == pytest.approx(1.5)
    move_teacher(teacher, student, 1.0)
    assert teacher.weight.item() == pytest.approx(1.5)


def test_what_decays_is_what_has_two_axes_and_is_no_bias():
    model = Network(ViT(8, 16, 1, 2, grid=(2, 2)), Head(16, 8, 32, 10))
    decayed, others = parameter_groups(model, 0.04)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.04, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)] for p in decayed["params"]}
    assert {"backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.proj.weight",
            "backbone.blocks.0.attn.qkv.weight", "head.mlp.0.weight", "head.last_layer.weight_g",
            "head.last_layer.weight_v", "head.last_layer_c.weight_g"} <= decays
    rest = {names[id(p)] for p in others["params"]}
    assert decays | rest == set(names.values()) and not decays & rest
    assert all(name.endswith("bias") or ".norm" in name for name in rest)


def test_frozen_prototypes_neither_move_nor_decay():
    model = Network(ViT(8, 16, 1, 2, grid=(2, 2)), Head(16, 8, 32, 10))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.4), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    drop_gradients(model, "last_layer")
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("last_layer" in name), name


def test_each_gradient_is_clipped_for_itself():
    long, short = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    long.grad, short.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.1, 0.0])
    clip_each([long, short, nn.Parameter(torch.zeros(1))], 0.5)
    assert long.grad.tolist() == pytest.approx([0.3, 0.4], rel=1e-4)
    assert short.grad.tolist() == pytest.approx([0.1, 0.0])


# ---- what to look at -----------------------------------------------------------------------------

def test_health_tells_a_teacher_of_one_answer_and_an_undecided_one():
    layer, center = Prototypes(32, 16), Center(16, "logits")
    layer.weight_v.data = torch.eye(32)[:16]
    z = torch.eye(32)[:16]
    good = health(z, layer, center, 0.01)
    assert good["entropy_of_mean"] == pytest.approx(1, abs=1e-3)
    assert good["mean_entropy"] == pytest.approx(0, abs=1e-3)
    assert good["prototypes_used"] == 16 and good["prototype_norms"] == [1, 1, 1]
    one = health(z[:1].expand(16, -1), layer, center, 0.01)
    assert one["entropy_of_mean"] < 1e-3 and one["prototypes_used"] == 1
    undecided = health(z, layer, center, 100.0)
    assert undecided["mean_entropy"] > 0.99
    layer.weight_v.data[1] = layer.weight_v.data[0] + 0.01  # two that are one
    assert health(z, layer, center, 0.01)["prototypes_used"] <= 15


# ---- all together --------------------------------------------------------------------------------

def pictures_of_kinds(kinds, generator):
    """A noisy picture of each of these kinds [B]: eight patterns, moved, lighter or darker."""
    patterns = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    images = F.interpolate(patterns[kinds], size=(32, 32), mode="bilinear")
    images = images.roll(int(torch.randint(6, (1,), generator=generator)), 3)
    light = 0.7 + 0.6 * torch.rand(len(kinds), 1, 1, 1, generator=generator)
    return images * light + 0.3 * torch.randn(images.shape, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("center, vmf", [("logits", False), ("probability", True)])
def test_kinds_of_pictures_are_told_apart_without_labels(center, vmf):
    torch.manual_seed(0)
    student = Network(ViT(8, 48, 2, 4, grid=(4, 4)), Head(48, 64, 32, 64, False, vmf=vmf))
    teacher = deepcopy(student).requires_grad_(False)
    layers = student.head.last_layer, teacher.head.last_layer
    center = Center(64, center)
    optimizer = torch.optim.AdamW(parameter_groups(student, 0.04), lr=1e-3)
    generator = torch.Generator().manual_seed(2)
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 50)
        kinds = torch.randint(8, (32,), generator=generator)
        images = torch.cat([pictures_of_kinds(kinds, generator) for _ in range(2)])
        with torch.no_grad():
            seen, _ = teacher.look([images])
        z, _ = student([images], (None, None))
        loss, _ = crop_loss(z, seen, layers, center, (0.1, 0.04))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        center.update(seen, layers[1], 0.04)
        move_teacher(teacher, student, 0.99)
    # Of each prototype's pictures most are of one kind, and there are as many prototypes as kinds
    answers = center.targets(layers[1](seen[:32], 0.04), 0.04).argmax(1)
    of_one_kind = [kinds[answers == k].bincount().max() for k in answers.unique()]
    assert sum(of_one_kind) / 32 >= 0.9
    assert len(of_one_kind) >= 7
    assert loss < 0.75 * math.log(64)

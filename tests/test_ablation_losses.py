"""The ablations' losses: values and gradients by hand, which pairs InfoNCE gets, and collapse."""
import math

import pytest
import torch
from runs import checkpoint_of, lines, stage1_args
from torch import nn

import stage1
import waffleiron
from data import Frames, collate, select, set_sampling
from experiments import ablations
from models import load_point_encoder
from plumbing import training
from readers.nuscenes import CONDITIONS
from readers.table import open_tables


def pairs(count):
    """Two sides of random features [count, 3] that gather gradients."""
    return [torch.randn(count, 3, requires_grad=True) for _ in range(2)]


# ---- values and gradients ------------------------------------------------------------------------

def test_two_way_loss_by_hand():
    g = torch.tensor([[2.0, 0.0]], requires_grad=True)
    f = torch.tensor([[0.0, 5.0]], requires_grad=True)
    loss = ablations.two_way_loss(g, f)
    loss.backward()
    assert loss.item() == pytest.approx(math.sqrt(2))
    # (g - f) / |g - f| = (1, -1) / sqrt(2), without the part along each, divided by the lengths
    assert g.grad.flatten().tolist() == pytest.approx([0, -math.sqrt(0.5) / 2], abs=1e-6)
    assert f.grad.flatten().tolist() == pytest.approx([-math.sqrt(0.5) / 5, 0], abs=1e-6)


def test_contrastive_loss_of_two_pairs_by_hand():
    loss = ablations.contrastive_loss
    eye = torch.eye(2)
    # at right angles, temperature 1: each has 1 for its partner and 0 for the other
    assert loss(eye, eye, 1).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert loss(eye, eye.flip(0), 1).item() == pytest.approx(math.log(1 + math.e))
    # lengths do not matter
    assert loss(7 * eye, 3 * eye, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_contrastive_loss_of_three_pairs_by_hand():
    g = torch.tensor([[1, 0], [0, 1], [0.6, 0.8]])
    f = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    # similarities / 0.5: [[2, 2, 0], [0, 0, 2], [1.2, 1.2, 1.6]]
    rows = (0.75863,  # log(2e^2 + 1) - 2
            2.23955,  # log(2 + e^2)
            0.85043)  # log(2e^1.2 + e^1.6) - 1.6
    columns = (0.46036,  # log(e^2 + 1 + e^1.2) - 2
               2.46036,  # log(e^2 + 1 + e^1.2)
               0.99092)  # log(1 + e^2 + e^1.6) - 1.6
    expected = (sum(rows) + sum(columns)) / 6
    loss = ablations.contrastive_loss(g, f, 0.5).item()
    assert loss == pytest.approx(expected, abs=1e-5)
    assert loss == ablations.contrastive_loss(f, g, 0.5).item()


def test_losses_of_collapsed_features():
    same = torch.ones(5, 3)
    loss = ablations.contrastive_loss(same, same, 0.07).item()
    assert loss == pytest.approx(math.log(5))  # no gain from a constant
    assert ablations.two_way_loss(same, same).item() == 0  # the L2 loss is content with it


@pytest.mark.parametrize("count", [0, 1, 4])
def test_contrastive_loss_has_a_gradient_from_two_pairs_on(count):
    g, f = pairs(count)
    loss = ablations.contrastive_loss(g, f, 0.07)
    loss.backward()
    if count < 2:
        assert loss.item() == 0 and not g.grad.any() and not f.grad.any()
    else:
        assert g.grad.abs().sum() > 0 and f.grad.abs().sum() > 0


# ---- which pairs ---------------------------------------------------------------------------------

def test_some_of_each_image():
    view = torch.tensor([0] * 5 + [1] * 2 + [3] * 9)  # image 2 has no point

    def draw(seed):
        return ablations.some_of_each(view, 3, torch.Generator().manual_seed(seed))

    rows = draw(1)
    assert torch.bincount(view[rows]).tolist() == [3, 2, 0, 3] and len(rows.unique()) == 8
    assert torch.equal(rows, draw(1))
    drawn = torch.cat([draw(seed) for seed in range(40)])
    assert len(drawn.unique()) == len(view)  # each point has its turn
    assert len(ablations.some_of_each(view[:0], 3, torch.Generator())) == 0


# ---- collapse ------------------------------------------------------------------------------------

def spread(features):
    """1 - length of the mean of the unit features: 0 if all point one way."""
    return 1 - nn.functional.normalize(features, dim=1).mean(0).norm().item()


@pytest.mark.slow
def test_joint_l2_collapses_and_stage1_does_not(world, tmp_path):
    """Forty steps each: without a stop-gradient the loss falls further, and the features of all
    points become one."""
    more = ["--steps", "40", "--conditions", *CONDITIONS, "--cameras", "all"]
    stage1.main(stage1_args(world, tmp_path / "s1", *more))
    ablations.main(["joint", *stage1_args(world, tmp_path / "joint", *more, "--lr-2d", "2e-3")])

    # two validation frames, by both 3D encoders
    tables = select(open_tables(str(world)), "val")
    set_sampling(tables, checkpoint_of(tmp_path / "s1")["samplings"])
    frames = Frames(tables, "all", (80, 160), waffleiron.prepare)
    batch = collate([frames[0, 0], frames[0, 1]])
    batch = training.to_device(batch, torch.device("cpu"))
    spreads, losses = {}, {}
    for name, file in (("s1", "last.pth"), ("joint", "point_encoder.pth")):
        point_encoder, _ = load_point_encoder(tmp_path / name / file)
        with torch.no_grad():
            features = point_encoder.eval()(batch)
        spreads[name] = spread(features)
        losses[name] = lines(tmp_path / name)[-1]["loss"]
    assert losses["joint"] < losses["s1"] / 2
    assert spreads["joint"] < spreads["s1"] / 2

import math

import pytest
import torch
import torch.nn.functional as F

import distill
from distill import (constant_loss, distances, distillation_loss, feature_spread,
                     sample_features)


def test_samples_equal_the_up_sampled_map():
    torch.manual_seed(0)
    maps = torch.randn(3, 7, 6, 11, dtype=torch.double)
    size = (48, 88)
    upsampled = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
    batch = torch.randint(3, (500,))
    row, col = torch.randint(48, (500,)), torch.randint(88, (500,))
    row[:2], col[:2] = torch.tensor([0, 47]), torch.tensor([0, 87])  # corners
    sampled = sample_features(maps, torch.stack([row, col], 1).double(), batch, size)
    torch.testing.assert_close(sampled, upsampled[batch, :, row, col])


def test_fractional_pixels_equal_grid_sample_and_the_border_is_clamped():
    maps = torch.randn(1, 4, 5, 9)
    pixels = torch.rand(200, 2) * torch.tensor([42.0, 82.0]) - 1  # some outside of 40 x 80
    grid = torch.stack([2 * pixels[:, 1] / 79 - 1, 2 * pixels[:, 0] / 39 - 1], 1)[None, None]
    oracle = F.grid_sample(maps, grid, align_corners=True, padding_mode="border")[0, :, 0].T
    sampled = sample_features(maps, pixels, torch.zeros(200, dtype=torch.long), (40, 80))
    torch.testing.assert_close(sampled, oracle, atol=1e-5, rtol=1e-5)


def test_a_map_of_one_cell():
    maps = torch.randn(2, 4, 1, 1)
    pixels = torch.tensor([[0.0, 3.0], [5.0, 1.0]])
    out = sample_features(maps, pixels, torch.tensor([1, 0]), (8, 8))
    torch.testing.assert_close(out, maps[[1, 0], :, 0, 0])


@pytest.mark.parametrize("direction", ["2d_to_3d", "3d_to_2d"])
def test_gradient_reaches_only_the_student(direction):
    pixels = torch.randn(20, 8, requires_grad=True)
    points = torch.randn(20, 8, requires_grad=True)
    distillation_loss(pixels, points, direction).backward()
    student, teacher = (points, pixels) if direction == "2d_to_3d" else (pixels, points)
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("direction", ["2d_to_3d", "3d_to_2d"])
def test_zero_with_a_finite_gradient_at_equality(direction):
    pixels = torch.randn(20, 8, requires_grad=True)
    points = (3 * pixels).detach().requires_grad_()  # the length does not matter
    loss = distillation_loss(pixels, points, direction)
    assert loss.item() < 1e-6
    points = pixels.detach().clone().requires_grad_()
    loss = distillation_loss(pixels, points, direction)
    assert loss.item() == 0
    loss.backward()
    student = points if direction == "2d_to_3d" else pixels
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_zero_features_give_finite_gradients():
    points = torch.zeros(4, 8, requires_grad=True)
    distillation_loss(torch.randn(4, 8), points, "2d_to_3d").backward()
    assert torch.isfinite(points.grad).all()


def test_values_by_hand():
    g = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    f = torch.tensor([[0.0, 1.0], [-5.0, 0.0], [0.0, 1.0]])  # orthogonal, opposite, equal
    loss = distillation_loss(g, f, "2d_to_3d")
    assert loss.item() == pytest.approx((math.sqrt(2) + 2 + 0) / 3)


def test_unrelated_features_are_at_square_root_of_two():
    torch.manual_seed(0)
    loss = distillation_loss(torch.randn(2000, 384), torch.randn(2000, 384), "3d_to_2d")
    assert loss.item() == pytest.approx(2**0.5, abs=0.01)


def test_no_pairs_and_wrong_direction():
    empty = torch.zeros(0, 8, requires_grad=True)
    loss = distillation_loss(torch.zeros(0, 8), empty, "2d_to_3d")
    loss.backward()
    assert loss.item() == 0
    with pytest.raises(ValueError, match="direction"):
        distillation_loss(torch.zeros(1, 8), torch.zeros(1, 8), "both")


def test_spread_by_hand():
    def close(spread, variance, rank):
        assert spread["feature_variance"] == pytest.approx(variance, abs=1e-5)
        assert spread["effective_rank"] == pytest.approx(rank, rel=1e-3)

    # All the same.
    close(feature_spread(torch.ones(50, 8)), 0, 1)
    # Four corners around their mean: three directions alike.
    close(feature_spread(5 * torch.eye(4).repeat(20, 1)), 3 / 4, 3)
    # Two opposite ones: one direction.
    close(feature_spread(torch.cat([torch.ones(30, 4), -torch.ones(30, 4)])), 1, 1)
    # All directions.
    torch.manual_seed(0)
    assert feature_spread(torch.randn(4000, 16))["effective_rank"] > 15.8


def test_spread_looks_at_2048_at_most(monkeypatch):
    seen = []
    real = distill.F.normalize

    def counted(x, dim):
        seen.append(len(x))
        return real(x, dim=dim)
    monkeypatch.setattr(distill.F, "normalize", counted)
    for count in (1, 2048, 2049, 4095, 9999):
        feature_spread(torch.randn(count, 3))
    assert max(seen) <= 2048
    assert min(seen[1:]) > 1000


def test_constant_loss_by_hand():
    # Two directions at a right angle: their mean lies 45 degrees from both, 2 sin(22.5 degrees)
    right_angle = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    assert constant_loss(right_angle) == pytest.approx(2 * math.sin(math.pi / 8), abs=1e-6)
    assert constant_loss(torch.ones(7, 4)) == pytest.approx(0, abs=1e-6)
    assert constant_loss(torch.zeros(0, 4)) == 0
    # Of two parts alike the distance is that of one, times the square root of 2
    both = torch.cat([right_angle, right_angle], dim=1)
    assert constant_loss(both, [2, 2]) == pytest.approx(math.sqrt(2) * constant_loss(right_angle))


def test_no_constant_is_much_better_than_the_mean():
    torch.manual_seed(0)
    features = torch.randn(500, 8) + 2
    constants = torch.randn(200, 1, 8).expand(-1, 500, -1)
    others = min(distances(features, constant).mean().item() for constant in constants)
    assert constant_loss(features) < others


def test_spread_of_parts():
    # Each part is normalised for itself: its length says nothing
    features = torch.cat([torch.eye(4), 100 * torch.eye(4)], dim=1).repeat(10, 1)
    spread = feature_spread(features, [4, 4])
    assert spread["feature_variance"] == pytest.approx(2 * 3 / 4, abs=1e-5)
    assert spread["effective_rank"] == pytest.approx(3, rel=1e-3)

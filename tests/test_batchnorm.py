"""BatchNorm: torch's own with one process; folded into a linear layer; in float32."""
import pytest
import torch
import torch.nn.functional as F

from plumbing.batchnorm import BatchNorm


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_batchnorm_is_torchs_own_with_one_process():
    ours, theirs = BatchNorm(4), torch.nn.BatchNorm1d(4)
    for _ in range(3):
        x = 5 + torch.randn(20, 4)
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


def test_a_linear_layer_and_a_batchnorm_are_one_linear_layer():
    x = (100 + torch.randn(50, 3).double() @ torch.randn(3, 3).double()).requires_grad_()
    linear = torch.nn.Linear(3, 6, bias=False).double()
    norm, norm_after = BatchNorm(6).double(), BatchNorm(6).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm_after.load_state_dict(norm.state_dict())

    def with_gradients(output, layer):
        inputs = [x, linear.weight, layer.weight, layer.bias]
        return output, *torch.autograd.grad((output ** 3).sum(), inputs)
    for mode in (True, True, False):  # the last one with the statistics of the others
        norm.train(mode)
        norm_after.train(mode)
        two_layers = with_gradients(norm(linear(x)), norm)
        one_layer = with_gradients(F.linear(x, *norm_after.after(linear, x)), norm_after)
        torch.testing.assert_close(two_layers, one_layer)
        torch.testing.assert_close(norm.state_dict(), norm_after.state_dict())


def test_variances_far_from_zero_are_those_of_float64():
    x = 1000 + torch.randn(200, 5)
    linear, norm = torch.nn.Linear(5, 6, bias=False), BatchNorm(6)
    norm.after(linear, x)
    expected = (x.double() @ linear.weight.double().T).var(0)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * expected, rtol=1e-3, atol=0)

    # Where W maps the inputs to zero, rounding must not make a variance below 0.
    flat = 1000 * torch.randn(200, 1) @ torch.randn(1, 5)
    with torch.no_grad():
        linear.weight -= linear.weight @ flat[:1].T @ flat[:1] / flat[0].square().sum()
    assert all(value.isfinite().all() for value in norm.after(linear, flat))


def test_bfloat16_autocast_leaves_batch_statistics_in_float32():
    linear, norm = torch.nn.Linear(5, 6, bias=False), BatchNorm(6)
    x = 10 + torch.randn(100, 5)
    expected = norm.after(linear, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(norm.after(linear, x), expected)

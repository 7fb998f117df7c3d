import itertools

import pytest
import torch

from metrics import lovasz_softmax
from probe import TASKS


def jaccard_loss(wrong, truth):
    """1 - IoU of a binary prediction that errs exactly on `wrong`, from its definition on sets."""
    truth, wrong = set(truth), set(wrong)
    predicted = (truth - wrong) | (wrong - truth)
    return 1 - len(truth & predicted) / len(truth | predicted) if truth | predicted else 0.0


def lovasz_extension(errors, truth):
    """The Lovász extension from its definition: with the errors m_k sorted, the largest first, the
    sum of m_k (J({1..k}) - J({1..k-1}))."""
    order = sorted(range(len(errors)), key=lambda i: -errors[i])
    total = 0
    for k, i in enumerate(order):
        step = jaccard_loss(order[:k + 1], truth) - jaccard_loss(order[:k], truth)
        total += errors[i] * step
    return total


def rows_of(values, wanted):
    return [i for i, value in enumerate(values) if value == wanted]


def test_lovasz_equals_its_definition():
    torch.manual_seed(0)
    for _ in range(20):
        probabilities = torch.randn(7, 4, dtype=torch.double).softmax(1)
        labels = torch.randint(3, (7,))  # class 3 never occurs: left out
        expected = []
        for c in range(4):
            members = rows_of(labels.tolist(), c)
            if members:
                errors = [abs(float(i in members) - probabilities[i, c].item()) for i in range(7)]
                expected.append(lovasz_extension(errors, members))
        loss = lovasz_softmax(probabilities, labels).item()
        assert loss == pytest.approx(sum(expected) / len(expected))


def test_lovasz_of_hard_predictions_is_one_minus_iou():
    labels = [0, 0, 1, 1]
    for prediction in itertools.product(range(2), repeat=4):
        hard = torch.nn.functional.one_hot(torch.tensor(prediction), 2).double()
        by_class = []
        for c in range(2):
            wrong = [i for i in range(4) if (prediction[i] == c) != (labels[i] == c)]
            by_class.append(jaccard_loss(wrong, rows_of(labels, c)))
        loss = lovasz_softmax(hard, torch.tensor(labels)).item()
        assert loss == pytest.approx(sum(by_class) / 2)


def test_no_labelled_points():
    outputs = torch.zeros(5, 16, requires_grad=True)
    loss, count = TASKS["seg"].loss(outputs, {"labels": torch.zeros(5, dtype=torch.long)})
    loss.backward()
    assert loss.item() == 0
    assert count == 0
    assert torch.isfinite(outputs.grad).all()


def test_ignored_points_do_not_matter():
    torch.manual_seed(0)
    outputs, labels = torch.randn(30, 16), torch.randint(0, 17, (30,))
    labelled = labels > 0
    loss, count = TASKS["seg"].loss(outputs, {"labels": labels})
    alone, _ = TASKS["seg"].loss(outputs[labelled], {"labels": labels[labelled]})
    assert loss.item() == pytest.approx(alone.item())
    assert count == labelled.sum()


def test_depth_loss_is_the_mean_squared_error():
    outputs, depths = torch.tensor([[3.0], [5.0]]), torch.tensor([1.0, 2.0])
    loss, count = TASKS["depth"].loss(outputs, {"depths": depths})
    assert loss.item() == pytest.approx((4 + 9) / 2)
    assert count == 2

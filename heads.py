"""Heads: linear ones on frozen features, with what may stand before them; those of 3D encoders."""
import torch
from torch import nn

from plumbing.batchnorm import BatchNorm


class Whitening(nn.Module):
    """A fixed linear map after which the features it was fitted on have mean 0 and covariance 1.

    A linear probe behind it has the same optimum, but needs far fewer steps where a few directions
    carry most of the variance.
    """

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))

    @torch.no_grad()
    def fit(self, features):
        """Set the map from features [N, D].

        Directions of less than 1e-4 of the largest variance are not blown up.
        """
        # Onto the covariance's eigenvectors, each divided by its standard deviation
        self.mean.copy_(features.mean(0))
        variance, directions = torch.linalg.eigh(torch.cov(features.double().T))
        self.matrix.copy_(directions / (variance + 1e-4 * variance.max()).sqrt())

    def forward(self, x):
        return (x - self.mean) @ self.matrix


def linear_head(kind, dim, outputs):
    """A zero-initialised linear layer [N, D] -> [N, outputs].

    kind: "linear"; "batchnorm" or "whitened" puts that before it.
    """
    before = {"linear": nn.Identity, "batchnorm": BatchNorm, "whitened": Whitening}[kind]
    # From 0, so that a probe starts at the same loss whatever the scale of the features
    linear = nn.Linear(dim, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(before(dim), linear)


# ---- what a 3D encoder ends in: [N, channels] -> [N, out] ----------------------------------------

def linear_layer(channels, hidden, out):
    return nn.Linear(channels, out)


def batchnorm_and_linear(channels, hidden, out):
    return nn.Sequential(BatchNorm(channels), nn.Linear(channels, out))


def mlp(channels, hidden, out):
    return nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, out))


def two_layers(channels, hidden, out):
    """ScaLR's head for several teachers (supplement B.2); `hidden` is 2 channels there."""
    return nn.Sequential(nn.Linear(channels, 2 * channels), nn.LayerNorm(2 * channels), nn.ReLU(),
                         nn.Linear(2 * channels, out))


HEADS = {"linear": linear_layer, "batchnorm": batchnorm_and_linear, "mlp": mlp, "mlp2": two_layers}


def part_of(head, widths, number):
    """The head that gives part `number` of what `head` gives, whose parts have these widths.

    What is below the last layer is shared; of that layer the part's own rows are taken.
    """
    layers = [head] if isinstance(head, nn.Linear) else list(head)
    last = layers.pop()
    start = sum(widths[:number])
    rows = slice(start, start + widths[number])
    part = nn.Linear(last.in_features, widths[number])
    with torch.no_grad():
        part.weight.copy_(last.weight[rows])
        part.bias.copy_(last.bias[rows])
    return nn.Sequential(*layers, part) if layers else part

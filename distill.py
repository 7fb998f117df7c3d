"""The maths of collaborative distillation: pairs of pixel and point features, and the loss.

Stage 1 and stage 2 share this module unchanged. Only the side that receives the gradient is
switched (collaborative-distillation paper, Sec. 3.1 and 3.2, Eq. 1 and 2; ScaLR, Sec. 3.2, Eq. 1).
"""
import torch
import torch.nn.functional as F

DIRECTIONS = ("2d_to_3d", "3d_to_2d")


def sample_features(maps, pixels, view, image_size):
    """Pixel features: bilinear samples of feature maps at the pixels of projected points.

    Equal to up-sampling the maps to the image (bilinear, align_corners=True) and reading the
    pixels, without ever making the up-sampled map.

    Args:
        maps: [B, D, h, w] feature maps of the image encoder.
        pixels: [M, 2] (row, col) in the image; may be fractional; clamped to the image.
        view: [M] the image of each pixel.
        image_size: (H, W) of the image.
    Returns: [M, D].
    """
    _, dim, h, w = maps.shape
    last = pixels.new_tensor([h - 1, w - 1])
    # The corners of image and map coincide
    place = pixels / (pixels.new_tensor(image_size) - 1) * last
    place = torch.minimum(place.clamp(min=0), last)  # [M, 2] in the map

    # The four cells around each place, and how far down and right of the first one it lies
    corner = torch.minimum(place.floor(), (last - 1).clamp(min=0))
    down, right = (place - corner).unsqueeze(2).unbind(1)  # [M, 1] each
    row, col = corner.long().unbind(1)                     # [M] each
    row_below = (row + 1).clamp(max=h - 1)
    col_right = (col + 1).clamp(max=w - 1)

    cells = maps.permute(0, 2, 3, 1).reshape(-1, dim)  # [B h w, D]
    start = view * (h * w)
    return ((1 - down) * (1 - right) * cells[start + row * w + col]
            + (1 - down) * right * cells[start + row * w + col_right]
            + down * (1 - right) * cells[start + row_below * w + col]
            + down * right * cells[start + row_below * w + col_right])  # [M, D]


def features_at_pixels(encoder, batch):
    """An image encoder's features [M, D] at a batch's pixels."""
    images = batch["image"]  # [B, 3, H, W]
    return sample_features(encoder(images), batch["pixels"], batch["view"], images.shape[2:])


def unit_parts(features, widths=None):
    """Features [M, D] in float32, each part of them L2-normalised.

    widths: of the parts, D in all; None: the whole is one part.
    """
    features = features.float()
    if widths is None:
        return F.normalize(features, dim=1)
    parts = features.split(widths, dim=1)
    return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)


def distances(pixel_features, point_features, widths=None):
    """How far the L2-normalised features [M, D] of each pair are apart: [M].

    widths: as of `distillation_loss`.
    """
    g = unit_parts(pixel_features, widths)
    f = unit_parts(point_features, widths)
    # vector_norm has the subgradient 0 at 0, where sqrt(sum of squares) gives NaN
    return torch.linalg.vector_norm(g - f, dim=1)


def distillation_loss(pixel_features, point_features, direction, widths=None):
    """Mean distance of L2-normalised pixel and point features (Eq. 1 and 2).

    Args:
        pixel_features: [M, D], g in the paper. point_features: [M, D], f in the paper.
        direction: "2d_to_3d": the pixels teach the points (stage 1).
            "3d_to_2d": the points teach the pixels (stage 2).
        widths: of the parts of several teachers, which are side by side. Each part is normalised
            for itself (ScaLR, supplement B.2).
    Returns: a float32 scalar in [0, 2 sqrt(K)] for K parts: 0 for equal directions (with a zero
    gradient), about sqrt(2 K) for unrelated ones, 0 for M = 0.

    It is one distance of the joined parts, not the sum of K losses: where one part is far off, the
    others' gradients shrink.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}, not one of {DIRECTIONS}")
    # The teacher's side gets no gradient: that is all that tells the stages apart
    if direction == "2d_to_3d":
        pixel_features = pixel_features.detach()
    else:
        point_features = point_features.detach()
    return distances(pixel_features, point_features, widths).sum() / max(1, len(pixel_features))


@torch.no_grad()
def sums_by(numbers, count, pixel_features, point_features, widths=None):
    """The distances of `distillation_loss`, summed for each dataset of a mixture.

    Args:
        numbers: [M] int64, below `count`: the dataset of each pair.
        pixel_features, point_features, widths: as for `distillation_loss`.
    Returns: [count, 2], the sum of each dataset's distances and the number of its pairs.
    """
    each = distances(pixel_features, point_features, widths).double()  # [M]
    both = torch.stack([each, torch.ones_like(each)], dim=1)           # [M, 2]
    return both.new_zeros(count, 2).index_add(0, numbers, both)


@torch.no_grad()
def constant_loss(features, widths=None):
    """The loss of a student that gives the same features everywhere: the teacher's mean direction.

    features: [M, D] of the teacher. widths: as for `distillation_loss`. A student whose loss is not
    well below has learnt the mean and little else.
    """
    mean = unit_parts(features, widths).mean(0, keepdim=True)  # [1, D]
    each = distances(features, mean.expand(features.shape), widths)  # [M]
    return each.sum().item() / max(1, len(each))


@torch.no_grad()
def feature_spread(features, widths=None):
    """How far features are from collapse: {"feature_variance": .., "effective_rank": ..}.

    features: [M, D], of which at most 2 048 rows are used. widths: as for `distillation_loss`.

    The feature variance is that of the L2-normalised features around their mean, in [0, 1]; of K
    parts in [0, K]. It is 0 where all are the same. The effective rank (Roy and Vetterli, 2007) is
    exp of the entropy of the covariance's normalised eigenvalues, in [1, D]: how many directions
    the features use.
    """
    stride = max(1, -(-len(features) // 2048))  # rounded up
    f = unit_parts(features[::stride], widths)
    f = f - f.mean(0)
    eigenvalues = torch.linalg.eigvalsh(f.T @ f / max(1, len(f))).clamp(min=0)  # [D]
    variance = eigenvalues.sum()
    shares = eigenvalues / variance.clamp(min=1e-6)
    effective_rank = torch.special.entr(shares).sum().exp()
    return {"feature_variance": variance.item(), "effective_rank": effective_rank.item()}


def before_stage2(pixel_features, point_features, widths=None):
    """What to look at before spending stage 2, of a batch: {name: number} for stage 1's log.

    How many directions the points' features use beside those that teach them, and the loss of a
    constant. docs/results.md says how to read them. Arguments as for `distillation_loss`.
    """
    return {"effective_rank": feature_spread(point_features, widths)["effective_rank"],
            "teacher_rank": feature_spread(pixel_features, widths)["effective_rank"],
            "constant_loss": constant_loss(pixel_features, widths)}

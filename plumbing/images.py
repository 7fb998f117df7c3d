"""Checks that images have the shape, type, range and device that an encoder expects."""
import torch

from plumbing.errors import InputError


def check_images(images, weight):
    """Raise InputError unless images are [B, 3, H, W] in [0, 1], and as the weights are.

    weight: one of the encoder's.
    """
    if not torch.is_tensor(images):
        raise InputError(f"images are a {type(images).__name__}, not a tensor; torch.from_numpy "
                         "makes one of an array")
    given = f"images of type {_short(images.dtype)} and shape {tuple(images.shape)}"
    if images.ndim != 4 or images.shape[1] != 3 or images.layout != torch.strided:
        raise InputError(f"{given}: are to be [B, 3, H, W], red, green and blue")
    if images.dtype == torch.uint8:
        raise InputError(f"{given}: are to be in [0, 1], not bytes; divide them by 255")
    floats = (torch.float32, torch.bfloat16, torch.float16)
    cast = torch.is_autocast_enabled(weight.device.type) and images.dtype in floats
    if images.dtype != weight.dtype and not cast:
        raise InputError(f"{given}: the encoder's weights are {_short(weight.dtype)}; convert one "
                         "of them")
    if images.device != weight.device:
        raise InputError(f"{given}: are on {images.device}, the encoder is on {weight.device}; "
                         "move one of them")
    rounding = 1e-3  # resizing in floats gives a white sky of 1.0000002
    low, high = map(float, (images.amin(), images.amax())) if images.numel() else (0, 1)
    if not (low >= -rounding and high <= 1 + rounding):  # NaN is neither
        raise InputError(f"{given}: hold values from {low:.4g} to {high:.4g} and are to be in "
                         "[0, 1], finite and not normalised; the encoder normalises them itself")


def check_size(size, multiple, subject, encoder):
    """A size (H, W) of images. Raises InputError unless its sides are multiples of `multiple`.

    subject: what the message begins with. encoder: its name.
    """
    for side in size:
        if side >= 1 and side % multiple == 0:
            continue
        side = max(side, 1)
        below = side - side % multiple
        near = " and ".join(str(n) for n in (below, below + multiple) if n)
        raise InputError(f"{subject} {size[0]} {size[1]}: {encoder} has patches of {multiple} "
                         f"pixels, which do not divide {side}; the nearest that they do are {near}")
    return tuple(size)


def _short(dtype):
    return str(dtype).removeprefix("torch.")

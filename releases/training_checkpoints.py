"""The image encoder inside other people's training checkpoints, in the encoder's own names."""
import re

from plumbing.errors import InputError
from plumbing.weights import strip, unwrapped

HOLDERS = ("teacher", "student", "state_dict", "model")  # DINO, iBOT, DINOv2: the teacher first
PREFIXES = ("model.", "teacher.", "student.", "encoder_q.", "backbone.", "pretrained.", "visual.")
HEADS = ("head.", "fc.", "masked_embed", "_conv_head.", "_bn1.", "_fc.")


def encoder_weights(content, source):
    """The image encoder's state dict out of what a file of weights holds, in its own names.

    A training checkpoint's teacher is taken before its student. What wraps the encoder is taken off
    its names (DataParallel, Lightning, MoCo's query encoder, Depth Anything's and CLIP's models),
    and heads on top of it are left out. Raises InputError, beginning with `source`, where there is
    no state dict.
    """
    for key in HOLDERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise InputError(f"{source}: holds a {type(content).__name__} and no state dict")
    content = unwrapped(content, source)
    for prefix in PREFIXES:
        content = strip(content, prefix)
    weights = {}
    for name, value in content.items():
        if not name.startswith(HEADS):
            # DINOv2's training numbers the blocks inside chunks: blocks.1.7 is block 7
            weights[re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)] = value
    return weights

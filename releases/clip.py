"""CLIP's colours, and its names for the tensors of its image encoder (Radford et al., 2021)."""
import re

# Mean, standard deviation of R, G, B in [0, 1]
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

RENAMED = (  # (pattern in our names, what stands there in CLIP's), applied in this order
    ("cls_token", "class_embedding"),
    ("pos_embed", "positional_embedding"),
    ("norm_pre", "ln_pre"),
    (r"^norm\.", "ln_post."),
    (r"patch_embed\.proj", "conv1"),
    ("^blocks", "transformer.resblocks"),
    (r"norm([12])\.", r"ln_\1."),
    (r"qkv\.", "in_proj_"),
    (r"attn\.proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"))
# Leading axes of length 1 that ours have
LEADING_ONES = {"class_embedding": 2, "positional_embedding": 1}


def clip_name(name, shape):
    """Released name and shape of one of our ViT's tensors."""
    for ours, theirs in RENAMED:
        name = re.sub(ours, theirs, name)
    return name, tuple(shape)[LEADING_ONES.get(name, 0):]

"""What the releases of the image encoders look like: names, shapes, files, torch.hub repositories.
All is written down from their documentation, not from our code. Values are random, blocks few."""
import argparse
import textwrap

import torch
from torch import nn

WIDTHS = {"s": 384, "b": 768, "l": 1024, "h": 1280, "g": 1536}
PATCHES = {"dinov2": 14, "depth_anything_v2": 14, "dinov3": 16, "ibot": 16, "clip": 16}
GRIDS = {"dinov2": 37, "depth_anything_v2": 37, "dinov3": None}  # others: of 224 pixels
META = ("dinov2", "depth_anything_v2", "dinov3")  # Meta's code: a mask token and LayerScale


# ---- names and shapes ----------------------------------------------------------------------------

def vit_shapes(name, depth):
    """{name: shape} of a released ViT with so many blocks."""
    family = name.split("_vit")[0].removeprefix("mask")
    size = name.split("_vit")[1][0]
    if family == "clip":
        return clip_shapes(depth)
    D = WIDTHS[size]
    p = PATCHES.get(family) or int(name[-2:].lstrip("sb"))
    shapes = {"cls_token": (1, 1, D)}
    grid = GRIDS.get(family, 224 // p)
    if grid:
        shapes["pos_embed"] = (1, 1 + grid * grid, D)
    if family in META:
        shapes["mask_token"] = (1, D)
    if name.endswith("_reg"):
        shapes["register_tokens"] = (1, 4, D)
    if family == "dinov3":
        shapes |= {"storage_tokens": (1, 4, D), "rope_embed.periods": (16,)}
    shapes |= {"patch_embed.proj.weight": (D, 3, p, p), "patch_embed.proj.bias": (D,)}
    for i in range(depth):
        shapes |= vit_block_shapes(family, size, f"blocks.{i}.")
    return shapes | {"norm.weight": (D,), "norm.bias": (D,)}


def vit_block_shapes(family, size, b):
    """{name: shape} of one block, whose names start with `b`."""
    D = WIDTHS[size]
    shapes = {b + "norm1.weight": (D,), b + "norm1.bias": (D,),
              b + "attn.qkv.weight": (3 * D, D), b + "attn.qkv.bias": (3 * D,),
              b + "attn.proj.weight": (D, D), b + "attn.proj.bias": (D,),
              b + "norm2.weight": (D,), b + "norm2.bias": (D,)}
    if family in META:
        shapes |= {b + "ls1.gamma": (D,), b + "ls2.gamma": (D,)}
    if family == "dinov3":
        shapes[b + "attn.qkv.bias_mask"] = (3 * D,)
    if size == "g":  # SwiGLU with one matrix for gate and value
        linear = {"w12": (8192, D), "w3": (D, 4096)}
    elif size == "h":  # SwiGLU with two
        linear = {"w1": (5120, D), "w2": (5120, D), "w3": (D, 5120)}
    else:
        linear = {"fc1": (4 * D, D), "fc2": (D, 4 * D)}
    for layer, shape in linear.items():
        shapes |= {f"{b}mlp.{layer}.weight": shape, f"{b}mlp.{layer}.bias": shape[:1]}
    return shapes


def clip_shapes(depth):
    """{name: shape} of CLIP's image encoder (ViT-B/16) with so many blocks."""
    D = 768
    shapes = {"class_embedding": (D,), "positional_embedding": (197, D), "proj": (D, 512),
              "conv1.weight": (D, 3, 16, 16), "ln_pre.weight": (D,), "ln_pre.bias": (D,),
              "ln_post.weight": (D,), "ln_post.bias": (D,)}
    for i in range(depth):
        b = f"transformer.resblocks.{i}."
        shapes |= {b + "attn.in_proj_weight": (3 * D, D), b + "attn.in_proj_bias": (3 * D,),
                   b + "attn.out_proj.weight": (D, D), b + "attn.out_proj.bias": (D,),
                   b + "ln_1.weight": (D,), b + "ln_1.bias": (D,),
                   b + "ln_2.weight": (D,), b + "ln_2.bias": (D,),
                   b + "mlp.c_fc.weight": (4 * D, D), b + "mlp.c_fc.bias": (4 * D,),
                   b + "mlp.c_proj.weight": (D, 4 * D), b + "mlp.c_proj.bias": (D,)}
    return shapes


def batchnorm_shapes(name, channels):
    shapes = {f"{name}.{part}": (channels,)
              for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def resnet50_shapes():
    """{name: shape} of torchvision's ResNet-50 without its classifier."""
    norm = batchnorm_shapes
    shapes = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)
    before = 64
    for layer, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        out = 4 * width
        for block in range(blocks):
            b = f"layer{layer}.{block}."
            shapes |= {b + "conv1.weight": (width, before, 1, 1)} | norm(b + "bn1", width)
            shapes |= {b + "conv2.weight": (width, width, 3, 3)} | norm(b + "bn2", width)
            shapes |= {b + "conv3.weight": (out, width, 1, 1)} | norm(b + "bn3", out)
            if block == 0:
                shapes[b + "downsample.0.weight"] = (out, before, 1, 1)
                shapes |= norm(b + "downsample.1", out)
            before = out
    return shapes


def efficientnet_lite0_shapes():
    """{name: shape} of EfficientNet-Lite0 without its head."""
    norm = batchnorm_shapes
    shapes = {"_conv_stem.weight": (32, 3, 3, 3)} | norm("_bn0", 32)
    channels = [32, 16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320]
    kernels = [3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3]
    for block, (before, out, k) in enumerate(zip(channels, channels[1:], kernels)):
        b = f"_blocks.{block}."
        wide = before
        if block > 0:
            wide = 6 * before
            shapes |= {b + "_expand_conv.weight": (wide, before, 1, 1)} | norm(b + "_bn0", wide)
        shapes |= {b + "_depthwise_conv.weight": (wide, 1, k, k)} | norm(b + "_bn1", wide)
        shapes |= {b + "_project_conv.weight": (out, wide, 1, 1)} | norm(b + "_bn2", out)
    return shapes


def released_shapes(name, depth=2):
    if name == "efficientnet_lite0":
        return efficientnet_lite0_shapes()
    return resnet50_shapes() if name.endswith("resnet50") else vit_shapes(name, depth)


# ---- values --------------------------------------------------------------------------------------

def random_value(key, shape, generator):
    """A random tensor of this name and shape, of a size that keeps activations in range."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(7)
    if key.endswith("periods"):
        return 100 ** (torch.arange(16) / 16)
    if key.endswith("bias_mask"):
        return torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(shape[0] // 3)
    if len(shape) == 1:  # norms, variances, LayerScale: around 1; biases, means: around 0
        center = 0 if "bias" in key or "mean" in key else 1
        return center + 0.1 * torch.randn(shape, generator=generator).clamp(-3, 3)
    fan_in = torch.Size(shape[1:]).numel()
    return torch.randn(shape, generator=generator) / (fan_in ** 0.5)


def released_state(name, depth=2):
    """Random weights of a release: a state dict."""
    generator = torch.Generator().manual_seed(len(name))
    shapes = released_shapes(name, depth)
    return {key: random_value(key, shape, generator) for key, shape in shapes.items()}


class Upstream(nn.Module):
    """A stand-in for a release's own module: nothing but its tensors, under their names."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_buffer(leaf, value.clone())


# ---- files and repositories ----------------------------------------------------------------------

def released_file(name, state):
    """What the release's file holds around these weights."""
    other = torch.zeros(2, 2)  # a weight of something else in the file
    if name.startswith("mocov2"):
        moco = {f"module.encoder_q.{key}": value for key, value in state.items()}
        moco |= {"module.encoder_q.fc.0.weight": other,
                 "module.encoder_k.conv1.weight": state["conv1.weight"] + 1,
                 "module.queue": torch.zeros(128, 4), "module.queue_ptr": torch.zeros(1)}
        return {"epoch": 800, "arch": "resnet50", "state_dict": moco,
                "optimizer": {"param_groups": []}}
    if name == "efficientnet_lite0":
        return state | {"_conv_head.weight": other, "_bn1.bias": other, "_fc.weight": other}
    if name.startswith("ibot"):
        return {"state_dict": state | {"masked_embed": torch.zeros(1, 1024)}}
    if name.startswith("depth_anything"):
        backbone = {f"pretrained.{key}": value for key, value in state.items()}
        return backbone | {"depth_head.projects.0.weight": other}
    if "clip" in name:  # in half precision, beside the text encoder
        visual = {f"visual.{key}": value.half() for key, value in state.items()}
        return visual | {"transformer.resblocks.0.ln_1.weight": torch.ones(512),
                         "text_projection": torch.zeros(512, 512), "logit_scale": torch.ones(())}
    if name.startswith("dino_vit"):  # a training checkpoint; DINO pickles its arguments
        teacher = {f"backbone.{key}": value for key, value in state.items()}
        teacher["head.last_layer.weight"] = other
        student = {f"module.{key}": value + 1 for key, value in teacher.items()}
        return {"teacher": teacher, "student": student,
                "args": argparse.Namespace(arch="vit_small", lr=5e-4), "epoch": 100}
    return state


def write_hub(folder, name, entry, state):
    """A stand-in for a clone of the release's repository, with its weights."""
    folder.mkdir(exist_ok=True)
    is_clip = "clip" in name  # its entry takes no `pretrained`, and gives a transform too
    torch.save(released_file(name, state) if is_clip else state, folder / f"{entry}.pth")
    parameters = "**kwargs" if is_clip else "pretrained=True"
    result = "model, None" if is_clip else "model"
    (folder / "hubconf.py").write_text(textwrap.dedent(f"""
        dependencies = ["torch"]
        from pathlib import Path
        import torch
        from upstream import Upstream

        def {entry}({parameters}):
            model = Upstream(torch.load(Path(__file__).parent / "{entry}.pth", weights_only=True))
            return {result}
        """))
    return folder

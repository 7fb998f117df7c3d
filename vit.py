"""The vision transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021).

DINO, iBOT, DINOv2, Depth Anything V2, CLIP and DINOv3 are this one with different arguments.
Weights have the names of DINO's release, which are timm's, and what later releases added to them.
CLIP's release has others: releases/clip.py.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from plumbing.errors import say

# Arguments of the releases' transformers: sizes, and what each release has
SMALL = dict(dim=384, depth=12, heads=6)
BASE = dict(dim=768, depth=12, heads=12)
LARGE = dict(dim=1024, depth=24, heads=16)
GIANT = dict(dim=1536, depth=40, heads=24, hidden=4096, mlp="swiglu12")
HUGE = dict(dim=1280, depth=32, heads=20, hidden=5120, mlp="swiglu")
DINO8 = dict(grid=(28, 28))
DINO16 = dict(grid=(14, 14))
DINOV2 = dict(grid=(37, 37), layer_scale=True, mask_token=True)
DINOV2_REG = DINOV2 | dict(registers=("register_tokens", 4), antialias=True)
DINOV3 = dict(grid=None, layer_scale=True, mask_token=True, registers=("storage_tokens", 4))
CLIP16 = dict(grid=(14, 14), antialias=True, clip=True, mlp="quick_gelu")
CLIP_WIDTH = 512  # of what CLIP compares with text


# ---- positions -----------------------------------------------------------------------------------

def interpolate_positions(pos_embed, grid, h, w, antialias):
    """Learned position embeddings [1, 1 + H W, D] of a grid (H, W) for another: [1, 1 + h w, D].

    The cls token comes first. Bicubic, as the releases do it. Without `antialias` (DINO, iBOT,
    DINOv2, Depth Anything V2) the scale is that of a grid of (h + 0.1, w + 0.1): it was put there
    against rounding, but it moves every sample, so the features depend on it. With it (DINOv2 with
    registers) the scale is exact and shrinking averages.
    """
    if (h, w) == tuple(grid):
        return pos_embed
    plane = pos_embed[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, H, W]
    if antialias:
        plane = F.interpolate(plane, size=(h, w), mode="bicubic", antialias=True)
    else:
        scale = ((h + 0.1) / grid[0], (w + 0.1) / grid[1])
        plane = F.interpolate(plane, scale_factor=scale, mode="bicubic")
    patches = plane.flatten(2).transpose(1, 2)  # [1, h w, D]
    return torch.cat([pos_embed[:, :1], patches], 1)


def on_the_grid_of(vit, state, name, source):
    """A state dict whose position embeddings, `name`, are on the grid of the ViT.

    Those of another grid are interpolated to it, with a line that says so. Which grid they are of
    is not in the file: it has the shape of the ViT's own, or is a square (DINOv2 trains at 224
    pixels on 16 x 16 patches). What is neither stays as it is.
    """
    value = state.get(name)
    h, w = vit.grid
    is_table = torch.is_tensor(value) and value.layout == torch.strided and value.ndim in (2, 3)
    if not is_table or value.shape[-1] != vit.pos_embed.shape[-1]:
        return state
    count = value.shape[-2] - 1  # without the cls token
    grid = _grid_of(count, h, w)
    if grid is None or count == h * w:
        return state
    say(f"{source}: positions of {grid[0]} x {grid[1]} patches, interpolated once to {h} x {w}, "
        "those of the release")
    # In double precision, so that every machine rounds to the same weights
    positions = value.double().view(1, 1 + count, -1)
    positions = interpolate_positions(positions, grid, h, w, vit.antialias).to(value.dtype)
    return state | {name: positions.view(*value.shape[:-2], 1 + h * w, -1)}


def _grid_of(count, h, w):
    """The grid of `count` patches that has the shape of (h, w), or is a square; None if none is."""
    scale = (count / (h * w)) ** 0.5
    side = round(count**0.5)
    for grid in ((round(h * scale), round(w * scale)), (side, side)):
        if grid[0] * grid[1] == count > 0:
            return grid
    return None


class RotaryPositions(nn.Module):
    """DINOv3's positions (Siméoni et al., 2025, Sec. 3.2).

    Queries and keys are rotated by the patch's place: a quarter of a head's channels per axis and
    per phase. Places are relative to the image, from -1 to 1 on either axis.
    """

    def __init__(self, head_dim):
        super().__init__()
        powers = 4 * torch.arange(head_dim // 4) / head_dim
        self.register_buffer("periods", 100**powers)

    def forward(self, h, w):
        """sin and cos [h w, head_dim]."""
        device = self.periods.device
        rows = (torch.arange(h, device=device) + 0.5) / h * 2 - 1
        cols = (torch.arange(w, device=device) + 0.5) / w * 2 - 1
        places = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).flatten(0, 1)
        angles = 2 * math.pi * places.unsqueeze(-1) / self.periods.float()  # [h w, 2, head_dim / 4]
        angles = angles.flatten(1).repeat(1, 2)
        return angles.sin(), angles.cos()


def rotate(x, rotation):
    """Rotate the patches, the last tokens of [B, heads, T, head_dim]; the others have no place."""
    sin, cos = rotation
    others = x[:, :, :-len(sin)]
    patches = x[:, :, -len(sin):]
    first, second = patches.chunk(2, -1)
    turned = patches * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([others, turned.to(x.dtype)], 2)


# ---- a block -------------------------------------------------------------------------------------

class MaskedKeyBias(nn.Linear):
    """DINOv3's layer for queries, keys and values: the released mask takes the keys' bias out."""

    def __init__(self, dim):
        super().__init__(dim, 3 * dim)
        self.register_buffer("bias_mask", torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(dim))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class Attention(nn.Module):
    def __init__(self, dim, heads, rotary):
        super().__init__()
        self.heads = heads
        self.qkv = MaskedKeyBias(dim) if rotary else nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rotation):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        # One layer makes all three, in this order
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, D / heads] each
        if rotation is not None:
            q = rotate(q, rotation)
            k = rotate(k, rotation)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, dim, hidden, quick_gelu):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.quick_gelu = quick_gelu

    def forward(self, x):
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x)
        return self.fc2(x)


class SwiGLU(nn.Module):
    """Shazeer, "GLU Variants Improve Transformer", 2020.

    Gate and value are one layer in DINOv2 (`fused`), two in DINOv3.
    """

    def __init__(self, dim, hidden, fused):
        super().__init__()
        if fused:
            self.w12 = nn.Linear(dim, 2 * hidden)
        else:
            self.w1 = nn.Linear(dim, hidden)
            self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)
        self.fused = fused

    def forward(self, x):
        if self.fused:
            gate, value = self.w12(x).chunk(2, -1)
        else:
            gate, value = self.w1(x), self.w2(x)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al., ICCV 2021)."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block.

    mlp: "gelu", "quick_gelu" (CLIP), "swiglu12" (DINOv2) or "swiglu" (DINOv3).
    """

    def __init__(self, dim, heads, hidden, mlp="gelu", layer_scale=False, eps=1e-6, rotary=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, rotary)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        if mlp.startswith("swiglu"):
            self.mlp = SwiGLU(dim, hidden, fused=mlp == "swiglu12")
        else:
            self.mlp = Mlp(dim, hidden, quick_gelu=mlp == "quick_gelu")
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x, rotation=None, keep=None):
        """Tokens [B, T, D] to the same; keep [2, B]: factors of the branches, see `survivors`."""
        branch = self.ls1(self.attn(self.norm1(x), rotation))
        x = x + (branch if keep is None else branch * keep[0, :, None, None])
        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + (branch if keep is None else branch * keep[1, :, None, None])


def survivors(draws, rate):
    """Stochastic depth (Huang et al., ECCV 2016): which branches an image keeps, as factors.

    draws: [L, 2, B] in [0, 1), of L blocks, their two branches and B images.
    rate: of leaving out a branch of the last block; it rises linearly from 0 at the first.
    Returns: [L, 2, B], 0 or 1 / (1 - the block's rate), so that the mean over the draws is 1.
    """
    rates = torch.linspace(0, rate, len(draws), device=draws.device)[:, None, None]
    return (draws >= rates) / (1 - rates)


# ---- the transformer -----------------------------------------------------------------------------

OPTIONS = dict(antialias=False, registers=None, layer_scale=False, mask_token=False, clip=False)


class ViT(nn.Module):
    """Vision transformer.

    Args:
        patch_size: in pixels. dim: width. depth: number of blocks. heads: of a block.
        hidden: width inside a block's MLP (default 4 dim). mlp: its kind, see Block.
        grid: (H, W) patches that the position embeddings stand for; None: rotary positions
            (DINOv3).
        options: what releases after DINO added, by default OPTIONS:
            antialias: see `interpolate_positions`.
            registers: (name, number) of tokens beside the cls token (Darcet et al., ICLR 2024).
            layer_scale: a factor on each residual branch.
            mask_token: whether there is one.
            clip: a LayerNorm before the blocks, no bias in the patch embedding, and `proj`.
            Neither the mask token nor `proj` has a part in a feature map. They are kept as
            buffers, so that released weights go in and out whole.

    `recompute = True` keeps only the blocks' inputs for the backward pass, which computes the rest
    again: the same result, a fraction of the memory.
    """

    FAMILY = "ViT"
    FEATURES = ("prenorm", "norm", "keys")  # see `tokens`

    def __init__(self, patch_size, dim, depth, heads, hidden=None, mlp="gelu", grid=(14, 14),
                 **options):
        super().__init__()
        unknown = options.keys() - OPTIONS.keys()
        if unknown:
            raise TypeError(f"ViT has no option {', '.join(sorted(unknown))}")
        options = OPTIONS | options
        registers, clip = options["registers"], options["clip"]
        rotary = grid is None
        eps = 1e-5 if rotary or clip else 1e-6
        self.patch_size = patch_size
        self.grid = grid
        self.antialias = options["antialias"]
        self.registers = registers
        self.recompute = False

        # Tokens and their positions
        if rotary:
            self.rope_embed = RotaryPositions(dim // heads)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if registers:
            self.register_parameter(registers[0], nn.Parameter(torch.zeros(1, registers[1], dim)))
        if options["mask_token"]:
            self.register_buffer("mask_token", torch.zeros(1, dim))
        if clip:
            self.register_buffer("proj", torch.zeros(dim, CLIP_WIDTH))
        patches = nn.Conv2d(3, dim, patch_size, stride=patch_size, bias=not clip)
        self.patch_embed = nn.ModuleDict({"proj": patches})

        # Blocks
        block = dim, heads, hidden or 4 * dim, mlp, options["layer_scale"], eps, rotary
        self.norm_pre = nn.LayerNorm(dim, eps=eps) if clip else nn.Identity()
        self.blocks = nn.ModuleList(Block(*block) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps)

        # Random weights as in DINO's code
        for name, parameter in self.named_parameters():
            if parameter.ndim in (2, 3):  # linear layers and tokens
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.startswith("blocks") and name.endswith("bias"):
                nn.init.zeros_(parameter)

    def embed(self, images):
        """Normalised images [B, 3, H, W] to tokens [B, T, D]: cls, registers, patches by rows."""
        x = self.patch_embed["proj"](images)  # [B, D, h, w]
        count, _, h, w = x.shape
        cls_token = self.cls_token.expand(count, -1, -1)
        x = torch.cat([cls_token, x.flatten(2).transpose(1, 2)], 1)
        if self.grid is not None:
            x = x + interpolate_positions(self.pos_embed, self.grid, h, w, self.antialias)
        # Registers have no positions, so they come in after these
        if self.registers:
            registers = getattr(self, self.registers[0]).expand(count, -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], 1)
        return self.norm_pre(x)

    def before_last(self, images, keep=None):
        """The tokens [B, T, D] that the last block takes, and the patches' rotation if there is."""
        keep = [None] * len(self.blocks) if keep is None else keep
        h, w = (side // self.patch_size for side in images.shape[2:])
        rotation = self.rope_embed(h, w) if self.grid is None else None
        x = self.embed(images)
        for block, factors in zip(self.blocks[:-1], keep):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, factors, use_reentrant=False)
            else:
                x = block(x, rotation, factors)
        return x, rotation

    def tokens(self, images, feature, keep=None):
        """Normalised images [B, 3, H, W] to the last block's tokens [B, T, D], in `embed`'s order.

        feature: "prenorm", its output; "norm", its output after the final LayerNorm; "keys", its
        attention's keys, before any rotation (what ScaLR takes from DINO).
        keep: factors [depth, 2, B] of the blocks' branches, of `survivors`; default: all are 1.
        """
        x, rotation = self.before_last(images, keep)
        # The last block apart: its attention's keys are features too
        last = self.blocks[-1]
        if feature == "keys":
            return last.attn.qkv(last.norm1(x)).chunk(3, -1)[1]
        x = last(x, rotation, None if keep is None else keep[-1])
        return self.norm(x) if feature == "norm" else x

    def feature_map(self, images, feature):
        """Normalised images [B, 3, H, W] to the patches' features [B, D, h, w]; see `tokens`."""
        h, w = (side // self.patch_size for side in images.shape[2:])
        patches = self.tokens(images, feature)[:, -h * w:]
        return patches.transpose(1, 2).unflatten(2, (h, w))


class MaskCLIP(ViT):
    """CLIP's ViT, each token of whose last block attends to itself alone.

    Zhou et al., "Extract Free Dense Labels from CLIP", ECCV 2022, Sec. 3: the attention gives the
    value's output projection; the block's residual branches, its MLP and the final LayerNorm stay.
    Its features are "projected", what CLIP compares with text (512 wide), and "values" before that.
    """

    FEATURES = ("projected", "values")
    WIDTHS = {"projected": CLIP_WIDTH}  # of features that are not `dim` wide

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        nn.init.trunc_normal_(self.proj, std=0.02)

    def tokens(self, images, feature):
        """Normalised images [B, 3, H, W] to the patches' and the cls token's features [B, T, D]."""
        x, _ = self.before_last(images)
        last = self.blocks[-1]
        values = last.attn.qkv(last.norm1(x)).chunk(3, -1)[2]
        x = x + last.attn.proj(values)
        x = self.norm(x + last.mlp(last.norm2(x)))
        return x @ self.proj if feature == "projected" else x

"""The image encoders, linear heads and their checkpoints: DINOv2 from torch.hub, and a built-in ViT.

    python models.py        # print the table of encoders

Every encoder maps images [B, 3, H, W] in [0, 1] to a feature map [B, D, h, w], D = `.dim`, h = H / `.patch_size`.
"""
import difflib
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2 = "facebookresearch/dinov2"

# name: where it comes from, patch size, width D, the feature that is distilled ("prenorm": patch tokens of the last block
# before the final LayerNorm, as ScaLR; "norm": after it), keyword arguments of the built-in ViT
ENCODERS = {
    **{f"dinov2_vit{size}14{reg}": dict(source=DINOV2, patch_size=14, dim=dim, feature="prenorm")
       for size, dim in (("s", 384), ("b", 768), ("l", 1024), ("g", 1536)) for reg in ("", "_reg")},
    "vit_mini8": dict(source="built-in", patch_size=8, dim=96, feature="norm",
                      vit=dict(depth=4, heads=4, mlp_ratio=3, grid=(10, 20))),
    **{f"vit_small{patch}": dict(source="built-in", patch_size=patch, dim=384, feature="prenorm",
                                 vit=dict(depth=12, heads=6, mlp_ratio=4, grid=(224 // patch, 224 // patch)))
       for patch in (8, 14, 16)},
}


# ---- the built-in ViT ------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each [B, heads, T, D/heads]
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim, heads, mlp_ratio):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer in the names of DINO's and timm's. `grid` = (h, w) patches that position embeddings stand for."""

    def __init__(self, patch_size, dim, depth, heads, mlp_ratio, grid):
        super().__init__()
        self.grid = tuple(grid)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, stride=patch_size)})
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def positions(self, h, w):
        """Position embeddings [1, 1 + h w, D], interpolated (bicubic) where the grid is another than the trained one."""
        if (h, w) == self.grid:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def embed(self, x):
        """Normalised images [B, 3, H, W] to tokens [B, 1 + h w, D], the cls token first."""
        x = self.patch_embed["proj"](x)
        h, w = x.shape[2:]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        return x + self.positions(h, w)

    def get_intermediate_layers(self, x, n=1, reshape=False, norm=True):
        """Patch tokens of the last `n` blocks, called as in DINOv2's release: a list of [B, D, h, w] if reshape."""
        h, w = (side // self.patch_embed["proj"].stride[0] for side in x.shape[2:])
        x, outputs = self.embed(x), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number >= len(self.blocks) - n:
                tokens = (self.norm(x) if norm else x)[:, 1:]
                outputs.append(tokens.transpose(1, 2).unflatten(2, (h, w)) if reshape else tokens)
        return outputs


# ---- image encoders ---------------------------------------------------------------------------------------------------

class ImageEncoder(nn.Module):
    """A backbone and how its feature map is read. ImageNet normalisation happens here.

    `spec` is what a checkpoint needs to build it again: name, feature, hub and, where it is known, image_size.
    """

    def __init__(self, backbone, spec):
        super().__init__()
        row = ENCODERS[spec["name"]]
        self.backbone, self.spec = backbone, spec
        self.patch_size, self.dim = row["patch_size"], row["dim"]
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images):
        """Images [B, 3, H, W] in [0, 1], H and W multiples of `.patch_size`, to features [B, D, h, w]."""
        images = (images - self.mean) / self.std
        return self.backbone.get_intermediate_layers(images, n=1, reshape=True, norm=self.spec["feature"] == "norm")[0]

    def check_size(self, size):
        """Raise InputError where the patch size does not divide an image size (H, W)."""
        for side in size:
            if side % self.patch_size:
                below = side - side % self.patch_size
                raise InputError(f"--image-size {size[0]} {size[1]}: {self.spec['name']} has patches of {self.patch_size} "
                                 f"pixels, which do not divide {side}; the nearest that they do are {below} and "
                                 f"{below + self.patch_size}")
        return tuple(size)


def load_image_encoder(name_or_path, weights=None, hub=None, feature=None):
    """An `ImageEncoder` by name, or from a checkpoint that stage 2 (or the miniature's pre-training) wrote.

    Args:
        name_or_path: a name of ENCODERS, or a checkpoint or the folder that holds its last.pth.
        weights: file with a state dict in the encoder's own names, or "random"; default: the released ones, by torch.hub.
        hub: local clone of the encoder's repository, instead of the network.
        feature: "prenorm" or "norm"; default: the encoder's (see ENCODERS), or the checkpoint's.
    Raises InputError for an unknown name, weights that do not fit, or a hub that cannot be reached.
    """
    path = Path(name_or_path)
    if name_or_path not in ENCODERS and path.exists():
        if weights:
            raise InputError(f"--weights {weights}: {name_or_path} is a checkpoint and has weights of its own")
        checkpoint = load_checkpoint(path, "image_encoder")
        spec = dict(checkpoint["encoder"])
        spec.update({key: value for key, value in (("hub", hub), ("feature", feature)) if value})
        encoder = ImageEncoder(_architecture(spec["name"], spec["hub"]), spec)
        _load_strictly(encoder.backbone, checkpoint["model"], path)
        return encoder
    if name_or_path not in ENCODERS:
        near = difflib.get_close_matches(name_or_path, ENCODERS, n=3, cutoff=0.4)
        raise InputError(f"--encoder {name_or_path}: neither a file nor a known encoder; "
                         + (f"did you mean {' or '.join(near)}? " if near else "") + "`python models.py` lists them")
    row = ENCODERS[name_or_path]
    if row["source"] == "built-in" and weights is None:
        raise InputError(f"--encoder {name_or_path}: the built-in ViT has no released weights; pass --weights FILE, or "
                         f"--weights random")
    spec = {"name": name_or_path, "feature": feature or row["feature"], "hub": hub and os.path.abspath(hub)}
    encoder = ImageEncoder(_architecture(name_or_path, hub, pretrained=weights is None), spec)
    if weights not in (None, "random"):
        _load_strictly(encoder.backbone, _read(weights), weights)
    return encoder


def source_of(args):
    """The arguments of `load_image_encoder` that give a run's encoder again from any folder, for its checkpoint."""
    def absolute(path):
        is_name = path is None or path in ENCODERS or path == "random"
        return path if is_name else os.path.abspath(path)
    return {"name_or_path": absolute(args.encoder), "weights": absolute(args.weights), "hub": absolute(args.hub),
            "feature": args.feature}


def _architecture(name, hub=None, pretrained=False):
    """The backbone: random weights (always the same ones), or the release's where `pretrained`."""
    row = ENCODERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if row["source"] == "built-in":
            return ViT(row["patch_size"], row["dim"], **row["vit"])
        if hub is not None and not Path(hub, "hubconf.py").is_file():
            raise InputError(f"--hub {hub}: no hubconf.py there; clone https://github.com/{row['source']}")
        try:
            return torch.hub.load(hub or row["source"], name, source="local" if hub else "github", pretrained=pretrained,
                                  verbose=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: what torch.hub makes of a missing network
            raise InputError(f"--encoder {name}: torch.hub cannot load it ({str(error).splitlines()[0]}); offline, clone https://github.com/"
                             f"{row['source']} and pass --hub DIR, and the weights with --weights FILE") from None


# ---- heads ----------------------------------------------------------------------------------------------------------

class Whitening(nn.Module):
    """A fixed linear map after which the features that it was fitted on have mean 0 and covariance 1.

    A linear probe behind it has the same optimum, but needs far fewer steps where a few directions carry most variance.
    """

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))

    @torch.no_grad()
    def fit(self, features):
        """Set the map from features [N, D]. Directions of less than 1e-4 of the largest variance are not blown up."""
        self.mean.copy_(features.mean(0))
        variance, directions = torch.linalg.eigh(torch.cov(features.double().T))
        self.matrix.copy_(directions / (variance + 1e-4 * variance.max()).sqrt())

    def forward(self, x):
        return (x - self.mean) @ self.matrix


def linear_head(kind, dim, outputs, batchnorm=nn.BatchNorm1d):
    """A zero-initialised linear layer [N, D] -> [N, outputs]; kind "batchnorm" or "whitened" puts that before it."""
    before = {"linear": nn.Identity, "batchnorm": batchnorm, "whitened": Whitening}[kind]
    linear = nn.Linear(dim, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(before(dim), linear)


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def load_checkpoint(path, kind):
    """The checkpoint at `path` (or last.pth in that folder), which must be of this kind: image_encoder, point_encoder, probe."""
    path = Path(path)
    content = _read(path / "last.pth" if path.is_dir() else path)
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind:
        raise InputError(f"{path}: a checkpoint of kind {found}, but {kind} is needed here "
                         f"(stage1.py writes point_encoder, stage2.py image_encoder, probe.py probe)")
    return content


def _read(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; is the run that writes it finished?") from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise InputError(f"{path}: torch.load cannot read it with weights_only=True "
                         f"({str(error).strip().splitlines()[0] if str(error) else type(error).__name__})") from None


def _load_strictly(module, state_dict, source):
    """load_state_dict that names the first five keys that do not fit."""
    own = module.state_dict()
    wrong = [f"{key} missing" for key in own.keys() - state_dict.keys()]
    wrong += [f"{key} unexpected" for key in state_dict.keys() - own.keys()]
    wrong += [f"{key} is {tuple(state_dict[key].shape)}, not {tuple(own[key].shape)}"
              for key in own.keys() & state_dict.keys() if own[key].shape != state_dict[key].shape]
    if wrong:
        raise InputError(f"{source}: weights of another encoder; {len(wrong)} keys do not fit: "
                         + ", ".join(sorted(wrong)[:5]))
    module.load_state_dict(state_dict, strict=True)


if __name__ == "__main__":
    print(f"{'name':20} {'from':24} patch  width  feature")
    for name, row in ENCODERS.items():
        print(f"{name:20} {row['source']:24} {row['patch_size']:5}  {row['dim']:5}  {row['feature']}")

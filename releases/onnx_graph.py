"""An image encoder as an ONNX graph."""
import torch
from torch import nn

from vit import interpolate_positions

PROTOBUF_LIMIT = 2**31  # bytes that one ONNX file can hold


def write(encoder, path, size, batch=None):
    """Write a graph: "images" [B, 3, H, W] in [0, 1] to "features" [B, D, h, w].

    size: (H, W). batch: B, fixed; None for any.
    The weights are inside, or in PATH.data where one file cannot hold them. The encoder is left
    with the positions of that size.
    """
    encoder.eval().requires_grad_(False)
    if hasattr(encoder.backbone, "pos_embed"):
        fix_positions(encoder, size)
    images = torch.rand(batch or 2, 3, *size)
    shapes = None
    if batch is None:
        shapes = ({0: torch.export.Dim("batch", max=2**16)},)  # PyTorch 2.6 fails without a bound
    state = encoder.state_dict().values()
    bytes_ = sum(value.numel() * value.element_size() for value in state)
    torch.onnx.export(encoder, (images,), path, dynamo=True, input_names=["images"],
                      output_names=["features"], dynamic_shapes=shapes,
                      external_data=bytes_ >= PROTOBUF_LIMIT, verbose=False)


def fix_positions(encoder, size):
    """Interpolate a ViT's positions to one image size for good.

    So the graph has no interpolation, in which runtimes differ.
    """
    vit = encoder.backbone
    grid = tuple(side // encoder.patch_size for side in size)
    positions = interpolate_positions(vit.pos_embed, vit.grid, *grid, vit.antialias)
    vit.pos_embed = nn.Parameter(positions, requires_grad=False)
    vit.grid = grid

"""WaffleIron as its paper says it: the slow, obvious twin of waffleiron.py, to be read beside it.

Puy, Boulch, Marlet, "Using a Waffle Iron for Automotive Point Cloud Semantic Segmentation", ICCV
2023, Sec. 3. A cloud is N points with C features each. The embedding looks once at each point's
neighbours. A layer then presses the points onto a plane (flatten: a cell holds the mean of its
points), convolves the plane, lets each point read its cell (inflate), and ends in an MLP on each
point. The layers take the planes x-y, x-z and y-z in turn.

The functions use the weights of a `WaffleIron` from waffleiron.py, and both give the same outputs
and gradients (tests/test_bench.py). experiments/bench.py measures what the other way saves:

    here, the obvious way                        there, the fast way
    clouds zero-padded to [B, C, N]              waffleiron.py: ragged rows [N, C], no padding
    linear layers as convolutions over a point   linear layers on rows
    scatter and gather with an expanded index    index_add and row indexing
    whole planes [B, C, H, W]                    planes cropped to the cells that are occupied
    BatchNorm on all edges of the embedding      folded into the linear layer before it
    feature maps up-sampled to the image         distill.py: maps sampled at the pixels
    images decoded in full                       readers/files.py: at a part of their resolution
    voxels by np.unique of rows                  data.py: of one number a voxel
    pixels of all points                         of the points in front of the camera
    scans read for images alone, too             not read

Compare the two in eval(): in train() the padding enters the statistics of BatchNorm.
"""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.spatial import cKDTree
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from data import as_tensor, project
from readers.files import read_image
from waffleiron import plane_sizes

# ---- a padded batch -----------------------------------------------------------------------------

def pad(batch):
    """A ragged batch, as data.collate makes it, zero-padded to its largest cloud.

    Its inputs are points [M, Cin], cells [M, P] and neighbors [M, K] of the M points of all clouds.
    Returns: points [B, Cin, N]; cells [B, P, N]; neighbors [B, K, N], which number the points of
    their own cloud; occupied [B, N], False for padding.
    """
    points, cells, neighbors = (batch["inputs"][n] for n in ("points", "cells", "neighbors"))
    view = batch["view"]
    counts = torch.bincount(view).tolist()

    def padded(rows):
        """[M, C] -> [B, C, N]."""
        return pad_sequence(rows.split(counts), batch_first=True).transpose(1, 2).contiguous()

    # Neighbours are rows of the batch. A cloud's first point becomes number 0.
    own = [rows - sum(counts[:b]) for b, rows in enumerate(neighbors.split(counts))]
    everywhere = torch.ones_like(view, dtype=torch.bool)
    occupied = pad_sequence(everywhere.split(counts), batch_first=True)
    return padded(points), padded(cells), padded(torch.cat(own)), occupied


def on_columns(layer, x):
    """Apply a layer of WaffleIron that acts on each point, on [B, C, N] instead of rows [N, C]."""
    if isinstance(layer, nn.Sequential):
        for part in layer:
            x = on_columns(part, x)
        return x
    if isinstance(layer, nn.Linear):
        return F.conv1d(x, layer.weight.unsqueeze(2), layer.bias)
    if isinstance(layer, nn.LayerNorm):
        return layer(x.transpose(1, 2)).transpose(1, 2)
    return layer(x)  # BatchNorm and activations take either


# ---- WaffleIron ---------------------------------------------------------------------------------

def plain_embedding(embed, points, neighbors):
    """Embed each point with its neighbours: its own features, beside a maximum over its edges.

    points [B, Cin, N], neighbors [B, K, N] -> [B, C, N].
    """
    b, c, n = points.shape
    k = neighbors.shape[1]
    x = on_columns(embed.norm, points)                                  # [B, Cin, N]

    # An edge is a neighbour's features minus the point's own. An MLP works on each.
    index = neighbors.flatten(1).unsqueeze(1).expand(-1, c, -1)         # [B, Cin, K N]
    edges = x.gather(2, index).view(b, c, k, n) - x.unsqueeze(2)        # [B, Cin, K, N]
    edges = on_columns(embed.edges, edges.flatten(2))                   # [B, C, K N]
    nearby = edges.view(b, -1, k, n).max(2).values                      # [B, C, N]

    own = on_columns(embed.point, x)                                    # [B, C, N]
    return on_columns(embed.final, torch.cat([own, nearby], dim=1))     # [B, C, N]


def share_of_cell(cell, grid, occupied, dtype):
    """1 / number of points in each point's cell; 0 for padding, which lies in cell 0.

    cell [B, N], occupied [B, N] -> [B, 1, N].
    """
    height, width = grid
    points = occupied.to(dtype)
    count = points.new_zeros(len(cell), height * width)
    count.scatter_add_(1, cell, points)                                 # [B, H W]
    share = occupied / count.gather(1, cell).clamp(min=1)
    return share.unsqueeze(1)


def flatten(x, cell, grid):
    """Points to plane: a cell gets the sum of its points.

    x [B, C, N], cell [B, N] -> [B, C, H, W].
    """
    b, c, _ = x.shape
    height, width = grid
    index = cell.unsqueeze(1).expand(-1, c, -1)                         # [B, C, N]
    plane = x.new_zeros(b, c, height * width)
    plane.scatter_add_(2, index, x)
    return plane.view(b, c, height, width)


def inflate(plane, cell):
    """Plane to points: a point gets what its cell holds.

    plane [B, C, H, W], cell [B, N] -> [B, C, N].
    """
    index = cell.unsqueeze(1).expand(-1, plane.shape[1], -1)            # [B, C, N]
    return plane.flatten(2).gather(2, index)


def plain_spatial_mix(mix, x, cell, share, grid):
    """Flatten, two depthwise 3x3 convolutions, inflate: [B, C, N] -> [B, C, N], a residual."""
    plane = flatten(on_columns(mix.norm, x) * share, cell, grid)        # a cell holds a mean
    plane = mix.ffn(plane)                                              # [B, C, H, W]
    return mix.scale.unsqueeze(1) * inflate(plane, cell)


def plain_channel_mix(mix, x):
    """An MLP on each point: [B, C, N] -> [B, C, N], a residual."""
    return mix.scale.unsqueeze(1) * on_columns(mix.mlp, on_columns(mix.norm, x))


def plain_waffleiron(model, points, cells, neighbors, occupied):
    """What a `WaffleIron` without drop path computes, on a batch from `pad`.

    Returns: [M, Cout], the M points of all clouds one after the other, without the padding.
    """
    grids = model.spec["grids"]
    planes = cells.unbind(1)                                            # P times [B, N]
    shares = [share_of_cell(cell, grid, occupied, points.dtype)
              for cell, grid in zip(planes, grids)]                     # once for all layers

    x = plain_embedding(model.embed, points, neighbors)
    x = x.to(points.dtype)                                              # [B, C, N]
    for i, (spatial_mix, channel_mix) in enumerate(zip(model.spatial_mix, model.channel_mix)):
        p = i % len(grids)                                              # the planes take turns
        x = x + plain_spatial_mix(spatial_mix, x, planes[p], shares[p], grids[p])
        x = x + plain_channel_mix(channel_mix, x)
    return on_columns(model.head, x).transpose(1, 2)[occupied]


# ---- pixel features -----------------------------------------------------------------------------

def plain_pixel_features(maps, pixels, view, image_size):
    """Up-sample feature maps [B, D, h, w] to the image and read whole pixels [M, 2] -> [M, D].

    view [M] is the image of each pixel.
    """
    upsampled = F.interpolate(maps, size=tuple(image_size), mode="bilinear", align_corners=True)
    row, col = pixels.long().unbind(1)
    return upsampled[view, :, row, col]


# ---- a data item --------------------------------------------------------------------------------

def plain_image(path, size):
    """uint8 [3, H, W]: an image file, decoded in full and then resized to `size` = (H, W)."""
    height, width = size
    with Image.open(path) as image:
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized).transpose(2, 0, 1)


def first_of_voxels(xyz, voxel):
    """Numbers of the points [N, 3] that are the first in their voxel of side `voxel` [m]."""
    voxels = np.floor(xyz / voxel).astype(np.int64)
    return np.sort(np.unique(voxels, axis=0, return_index=True)[1])


def plain_inputs(xyz, intensity, sampling):
    """What WaffleIron takes of points [N, 3], intensity [N]; `sampling` as a reader's SAMPLING."""
    mean, std = sampling["intensity"]
    radius = np.linalg.norm(xyz, axis=1)
    points = np.column_stack([(intensity - mean) / std, xyz, radius])   # [N, 5]

    # The cell of a point on the planes with normal axis z, y, x.
    fov, cell = np.asarray(sampling["fov"]), sampling["cell"]
    x, y, z = np.floor((xyz + fov) / cell).astype(np.int64).T
    (_, width_xy), (_, width_z), _ = plane_sizes(fov, cell)
    cells = np.stack([x * width_xy + y, x * width_z + z, y * width_z + z], axis=1)

    # A point's nearest one is the point itself.
    _, nearest = cKDTree(xyz).query(xyz, k=sampling["neighbors"] + 1)   # [N, K + 1]
    arrays = {"points": points.astype(np.float32), "cells": cells, "neighbors": nearest[:, 1:]}
    return {name: as_tensor(values) for name, values in arrays.items()}


def plain_item(frames, key, whole=False):
    """The item frames[key] without its condition, of a `Frames` of "first" points.

    The first point in each voxel is kept: of the points that are within reach and in view, or, with
    `whole`, of all points within reach. There a voxel is lost whose first point is out of view.
    """
    which, row, camera, _ = frames.locate(key)
    table = frames.tables[which]
    points = table.reader.scan(table.path("scan", row))                 # [A, 4] x, y, z, intensity

    # Project all points: LiDAR -> camera -> pixels (row, col) of the raw image.
    ones = np.ones(len(points))
    homogeneous = np.column_stack([points[:, :3], ones])
    in_camera = homogeneous @ table["cam_from_lidar"][row, camera].T    # [A, 4]
    pixels = in_camera[:, :3] @ table["intrinsics"][row, camera].T      # [A, 3]
    pixels = pixels[:, 1::-1] / pixels[:, 2:]                           # [A, 2]

    # Keep one point a voxel, the first one.
    sampling = table.sampling
    size = table["image_size"][row, camera]
    reached = (np.abs(points[:, :3]) < np.asarray(sampling["fov"]) - 1e-4).all(1)
    seen = (in_camera[:, 2] > 1) & (pixels > 0).all(1) & (pixels < size - 1).all(1)
    candidates = np.flatnonzero(reached if whole else reached & seen)
    keep = candidates[first_of_voxels(points[candidates, :3], sampling["voxel"])]
    keep = keep[seen[keep]]                                             # [N]

    # What the networks take of the points that are left.
    image = plain_image(table.path("image", row, camera), frames.image_size)
    scale = np.asarray(frames.image_size) / size
    return {"image": as_tensor(image), "pixels": as_tensor(pixels[keep] * scale),
            "depths": as_tensor(in_camera[keep, 2]),
            "inputs": plain_inputs(points[keep, :3], points[keep, 3], sampling)}


def plain_image_item(frames, key):
    """The item frames[key] without its condition, of a `Frames` of images alone.

    A scan is read and projected, although nobody asks for its points. The image is read as there.
    """
    which, row, camera, _ = frames.locate(key)
    table = frames.tables[which]
    points = table.reader.scan(table.path("scan", row))                 # [A, 4]
    size = table["image_size"][row, camera]
    _, pixels, depths = project(points[:, :3], table["cam_from_lidar"][row, camera],
                                table["intrinsics"][row, camera], size)
    pixels = pixels * (np.asarray(frames.image_size) / size)            # [N, 2]
    image = read_image(table.path("image", row, camera), frames.image_size, size)
    return {"image": image, "pixels": as_tensor(pixels), "depths": as_tensor(depths)}

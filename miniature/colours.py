"""The palette of the classes, and features as colours."""
import numpy as np
import torch
import torch.nn.functional as F

# Colours of nuScenes' classes that can be told apart: its own have five oranges
COLOURS = {
    "ignore": "#000000", "barrier": "#42d4f4", "bicycle": "#b39ddb", "bus": "#ffe119",
    "car": "#f58231", "construction_vehicle": "#9a6324", "motorcycle": "#f032e6",
    "pedestrian": "#e6194b", "traffic_cone": "#000075", "trailer": "#fabed4", "truck": "#800000",
    "driveable_surface": "#808080", "other_flat": "#bfef45", "sidewalk": "#911eb4",
    "terrain": "#aaffc3", "manmade": "#c4ac78", "vegetation": "#2e9e44"}


def palette(classes):
    """A colour map whose entry n is the colour of class n of a dataset.

    The colours are COLOURS where all classes are in it, else black and the 20 of "tab20" in turn.
    """
    from matplotlib import colormaps  # here: it takes long to import
    from matplotlib.colors import ListedColormap
    if all(name in COLOURS for name in classes):
        return ListedColormap([COLOURS[name] for name in classes])
    tab20 = colormaps["tab20"].colors
    others = [tab20[number % len(tab20)] for number in range(len(classes) - 1)]
    return ListedColormap(["#000000", *others])


def unit_features(feature_map):
    """L2-normalised features [h w, D] of a map [D, h, w], in float64."""
    return F.normalize(feature_map.flatten(1).T.double(), dim=1)


def principal_components(maps):
    """One PCA of all features of the maps [D, h, w], a list: their components [h, w, 3], a list.

    Features are L2-normalised first: directions are what the distillation compares.
    """
    features = torch.cat([unit_features(m) for m in maps])          # [N, D]
    centred = features - features.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)          # eigenvalues ascend
    directions = directions[:, -3:].flip(1)                         # [D, 3]
    # An eigenvector's sign is by chance: its largest entry shall be positive
    largest = directions.abs().argmax(0, keepdim=True)
    directions = directions * directions.gather(0, largest).sign()
    parts = (centred @ directions).split([m[0].numel() for m in maps])
    return [part.view(*m.shape[1:], 3) for part, m in zip(parts, maps)]


def as_colours(components):
    """Components [h, w, 3] of `principal_components` as colours [h, w, 3] in [0, 1], a list.

    All have one scale, percentiles 2 to 98. So equal features have equal colours, and an encoder
    whose features moved as a whole is seen to have moved.
    """
    rows = torch.cat([component.flatten(0, 1) for component in components])
    low, high = np.quantile(rows.numpy(), [0.02, 0.98], axis=0)
    return [((component.numpy() - low) / (high - low)).clip(0, 1) for component in components]


def pca_colours(maps):
    """Feature maps [D, h, w], a list, as colours [h, w, 3] in [0, 1] by one PCA of them all."""
    return as_colours(principal_components(maps))

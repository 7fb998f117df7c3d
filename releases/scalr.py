"""WaffleIron's, ScaLR's and ScaLR+'s released weights: their names for the tensors, in and out."""
import torch

from plumbing.errors import InputError
from plumbing.weights import check_fit, unwrapped
from waffleiron import GRIDS, WaffleIron

RELEASED = ("model_point", "model_points", "net")  # where released files hold the weights
RENAMED = {  # {beginning of our name: of the published one}; other names are the same
    "embed.point.": "embed.conv1.", "embed.edges.": "embed.conv2.",
    "spatial_mix.": "waffleiron.spatial_mix.", "channel_mix.": "waffleiron.channel_mix.",
    "head.": "classif."}


def published(name, shape):
    """Name and shape of one of our tensors as the releases of WaffleIron and ScaLR have it."""
    for ours, theirs in RENAMED.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    if name.endswith(".scale"):
        return name + ".weight", (*shape, 1, 1)
    if len(shape) == 2:  # our linear layers are convolutions there: over points, or over edges
        return name, (*shape, 1, 1) if name.startswith("embed.conv2.") else (*shape, 1)
    return name, tuple(shape)


def to_released(model):
    """A WaffleIron's weights and statistics in the published names and shapes, sharing memory."""
    state = {}
    for ours, value in model.state_dict().items():
        name, shape = published(ours, value.shape)
        state[name] = value.reshape(shape)
    return state


def arguments_of(state, subject):
    """The arguments of WaffleIron that published names and shapes tell; `grids` they do not tell.

    state: {published name: tensor}. Raises InputError, beginning with `subject`, where they are
    not a WaffleIron's.
    """
    heads = {"classif.3.weight": "mlp2", "classif.2.weight": "mlp",
             "classif.1.weight": "batchnorm", "classif.weight": "linear"}  # by the last layer
    last = next((name for name in heads if name in state), "classif.weight")
    first_shape = tuple(getattr(state.get("embed.conv1.weight"), "shape", ()))
    last_shape = tuple(getattr(state.get(last), "shape", ()))
    if len(first_shape) != 3 or len(last_shape) != 3:
        raise InputError(f"{subject}: embed.conv1.weight and {last} must have three dimensions, "
                         f"there are {first_shape} and {last_shape}")
    channels, in_channels, _ = first_shape
    out_channels, hidden, _ = last_shape
    prefix = "waffleiron.spatial_mix."
    layers = {name.split(".")[2] for name in state if name.startswith(prefix)}
    norm = "batchnorm" if f"{prefix}0.norm.running_mean" in state else "layernorm"
    plus = dict(activation="gelu", drop_path=0.2, hidden=hidden) if heads[last] == "mlp" else {}
    return dict(in_channels=in_channels, channels=channels, depth=len(layers),
                out_channels=out_channels, norm=norm, head=heads[last], **plus)


def from_released(state_dict, grids=GRIDS, subject="state_dict"):
    """A WaffleIron with published weights, in float32.

    Args:
        state_dict: {published name: tensor}, as `unwrapped` takes it, with one of four heads: a
            linear layer (`classif`: WaffleIron, ScaLR), BatchNorm and a linear layer (`classif.0`,
            `.1`: ScaLR downstream), an MLP (`classif.0`, `.2`: ScaLR+) or the layers for several
            teachers (`classif.0`, `.1`, `.3`: of stage1.py, nobody has published any).
        grids: as for WaffleIron; they are not in the weights.
        subject: what an error message begins with.
    Raises InputError, naming the first five differences, for missing or unexpected names and wrong
    shapes.

    Sizes, norm and head are inferred from names and shapes. With an MLP it is ScaLR+, which has
    GELU in the blocks and was trained with a drop path of 0.2. GELU is not in the weights: under
    another head, as after fine-tuning, ScaLR+ would be taken for ScaLR.
    """
    otherwise = ('not the weights of a published WaffleIron, as "model_point" in ScaLR\'s '
                 'model.pth and "net" in ckpt_last.pth are')
    file, subject = subject, f"{subject}: {otherwise}"
    if not isinstance(state_dict, dict):
        raise InputError(f"{subject}: this is a {type(state_dict).__name__}")
    state = unwrapped(state_dict, subject)
    with torch.device("meta"):  # costs nothing until names and shapes are known to fit
        model = WaffleIron(**arguments_of(state, subject), grids=grids)
    names = {name: published(name, value.shape) for name, value in model.state_dict().items()}
    check_fit(state, dict(names.values()), file, otherwise)
    ours = {name: state[names[name][0]].reshape(value.shape)
            for name, value in model.state_dict().items()}
    model.to_empty(device="cpu").load_state_dict(ours)
    return model

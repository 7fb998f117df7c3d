"""Released weights by torch.hub, by the address of their file, or from an installed package."""
from pathlib import Path

import torch

from plumbing.errors import InputError
from plumbing.weights import read

DINOV3_PAGE = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
IBOT_FILE = ("https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/"
             "vitl_16/checkpoint_teacher.pth")
MOCO_FILE = ("https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/"
             "moco_v2_800ep_pretrain.pth.tar")
DEPTH_FILE = ("https://huggingface.co/depth-anything/Depth-Anything-V2-{0}/resolve/main/"
              "depth_anything_v2_vit{1}.pth")


def released(row, hub=None):
    """What the release of a row of models.ENCODERS gives.

    That is its model's state dict by torch.hub, or the content of its file of weights, which is
    downloaded or in an installed package. hub: a local clone of the repository. Raises InputError,
    with the way out, where it cannot be had.
    """
    if row.source == "built-in":
        raise InputError(f"--encoder {row.name}: the built-in ViT has no released weights; pass "
                         "--weights FILE, or --weights random")
    if row.packaged is not None:
        if hub:
            raise InputError(f"--hub {hub}: {row.source} is a package and no repository of "
                             "torch.hub's; leave out --hub, or pass --weights FILE")
        return read(row.packaged())
    if hub and row.entry is None:
        raise InputError(f"--hub {hub}: {row.source} has no entry for torch.hub; download "
                         f"{row.url} and pass --weights FILE")
    if hub and not Path(hub, "hubconf.py").is_file():
        raise InputError(f"--hub {hub}: no hubconf.py there; clone "
                         f"https://github.com/{row.source}")
    try:
        if row.entry is not None:
            return _from_hub(row, hub)
        path = Path(torch.hub.get_dir(), "checkpoints", f"{row.name}.pth")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(row.url, path)
    except Exception as error:  # no network, no such entry, a package that the repository needs
        reason = (str(error).splitlines() or [""])[0][:200]
        way_out = f"pass --weights FILE{f' from {row.url}' if row.url else ''}"
        if row.entry is not None:
            way_out += (f", or a clone of https://github.com/{row.source} as --hub DIR with its "
                        "weights in the cache")
        raise InputError(f"--encoder {row.name}: cannot be loaded from {hub or row.source} "
                         f"({type(error).__name__}: {reason}); {way_out}") from None
    return read(path)


def _from_hub(row, hub):
    # trusted: the user named the repository, or it is in the table
    model = torch.hub.load(hub or row.source, row.entry or row.name,
                           source="local" if hub else "github", trust_repo=True, verbose=False)
    model = model[0] if isinstance(model, tuple) else model  # CLIP's gives (model, transform)
    return model.state_dict()

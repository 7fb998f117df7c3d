"""The student and the teacher: a vision transformer with a head, and what the teacher shows.

The teacher looks first. Of what it sees in the two global crops the clusters are made, so that the
student goes through its network once and answers for the same objects.
"""
from typing import NamedTuple

import torch
from torch import nn

import models
from plumbing import training
from s3pt.clustering import in_both_views, joint_clusters, objects_of
from s3pt.objectives import Head
from vit import survivors


def networks_of(args, device):
    """The `ImageEncoder` that is trained, and the student: its backbone with a head."""
    weights = args.weights or "random"
    encoder = models.load_image_encoder(args.encoder, weights, feature="norm", careful=False)
    if not args.weights:  # others than the one set of random weights that this name has
        row = encoder.row
        encoder.backbone = row.network(row.patch_size, **row.arguments)
    encoder.spec |= {"image_size": encoder.check_size(args.image_size)}
    head = Head(encoder.row.arguments["dim"], args.hidden, args.bottleneck, args.prototypes,
                args.objective != "dino", vmf=args.vmf, unit=args.unit_prototypes)
    encoder.recompute(args.recompute)
    encoder = encoder.to(device).train()
    return encoder, Network(encoder.backbone, head).to(device)


def stochastic_depth(draws, rate):
    """Factors of the student's branches, for the global crops and for the small ones.

    draws: [B, V, L, 2] of a batch's items. rate: of the last block. Returns: two of
    [L, 2, V B], view by view, as `vit.survivors` gives them; None where nothing is left out.
    """
    if not rate:
        return None, None
    draws = draws.permute(2, 3, 1, 0)  # [L, 2, V, B]
    return [survivors(part.flatten(2), rate) for part in (draws[:, :, :2], draws[:, :, 2:])]


def view_by_view(encoder, crops):
    """Crops [B, V, 3, S, S] in [0, 1] to normalised images [V B, 3, S, S]."""
    return (crops.transpose(0, 1).flatten(0, 1) - encoder.mean) / encoder.std


class Network(nn.Module):
    """A vision transformer with DINO's head: the student, and the teacher."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def look(self, crops, keep=(None, None)):
        """Crops of a picture to their projections and their tokens.

        crops: normalised images [V B, 3, S, S] for each size, view by view, the two global views
        first. keep: factors of stochastic depth for each size, see `vit.survivors`.
        Returns: the cls tokens' projections [V B, p] of all V views; the tokens [B, N, D] of the
        two global views, joined, the first view's first.
        """
        of_sizes = [self.backbone.tokens(images, "norm", factors)
                    for images, factors in zip(crops, keep)]
        z = self.head(torch.cat([tokens[:, 0] for tokens in of_sizes]))
        count = (crops[0].shape[2] // self.backbone.patch_size)**2
        patches = of_sizes[0][:, -count:].unflatten(0, (2, -1))  # [2, B, P, D]
        return z, patches.transpose(0, 1).flatten(1, 2)

    def forward(self, crops, keep, assignment=None, valid=None):
        """The student's projections of the crops [V B, p] and of the teacher's objects [2, O, p].

        assignment [B, N], valid [B, M]: as in `Seen`; without them there are no objects.
        """
        z, tokens = self.look(crops, keep)
        if assignment is None:
            return z, None
        objects = objects_of(tokens, assignment, valid.shape[1])
        return z, self.head(objects[:, valid])


# ---- what the teacher sees -----------------------------------------------------------------------

class Seen(NamedTuple):
    """What the teacher makes of the two global crops; all but the first two is of objects."""
    z: torch.Tensor                         # [2 B, p] projections of the crops
    tokens: torch.Tensor                    # [B, N, D] of both crops, joined
    assignment: torch.Tensor | None = None  # [B, N] the cluster of each token
    valid: torch.Tensor | None = None       # [B, M] whether both crops show it: it is an object
    objects: torch.Tensor | None = None     # [2, O, D] features in each crop
    z_objects: torch.Tensor | None = None   # [2, O, p] projections


@torch.no_grad()
def taught(teacher, images, batch, settings):
    """What the teacher sees in the global crops [2 B, 3, S, S] of a batch: `Seen`.

    settings: of the clustering; None: no objects are looked for.
    """
    z, tokens = teacher.look([images])
    if settings is None:
        return Seen(z, tokens)
    assignment = joint_clusters(tokens, batch["positions"], batch["start"], batch["depths"],
                                settings)
    valid = in_both_views(assignment, batch["start"].shape[1])
    objects = objects_of(tokens, assignment, valid.shape[1])[:, valid]
    return Seen(z, tokens, assignment, valid, objects, teacher.head(objects))


@torch.no_grad()
def neighbors_of(seen, teacher, queue, epoch):
    """The nearest stored object of each of the batch's objects, which are stored then themselves.

    Returns: the teacher's projections of the neighbours [2, O, p]; mask [2, O], which objects are
    cycle-consistent and learn from theirs. In the first epoch nothing is searched and the mask is
    empty (CrIBo).
    """
    objects = seen.objects
    everyone = training.gather_rows(objects.transpose(0, 1)).transpose(0, 1)  # [2, A, D]
    counts = training.gather_rows(seen.valid.sum(1))                          # [B of all]
    features, mask = objects, torch.zeros(objects.shape[:2], dtype=torch.bool,
                                          device=objects.device)
    # As features are at first, an object's nearest says nothing
    if epoch > 0 and len(queue):
        before = training.rank() * len(seen.valid)  # pictures of other processes
        found = queue.search(objects)
        features = queue.stored(found)
        mask = queue.cycle(found, everyone, int(counts[:before].sum()))
    queue.add(everyone, counts)
    return teacher.head(features), mask

"""What S3PT and CrIBo compare: objects, found in both views of a picture at once, and their queue.

Both views' tokens are clustered together: by their features, their places and, in S3PT, their depth
(S3PT, Sec. 3.2 and 3.3; CrIBo). A cluster's mean token in each view is one object, seen twice.
"""
import typing

import torch
import torch.nn.functional as F

from plumbing.errors import InputError


class Clustering(typing.NamedTuple):
    """Settings of `joint_clusters`; the defaults are S3PT's (Table 7), `rounds` CrIBo's."""
    rounds: int = 5                # of centroids, cost and transport
    sinkhorn_steps: int = 1        # in each round
    sinkhorn_lambda: float = 20.0  # sharpness of the transport
    alpha: float = 1.0             # weight of the position cost
    beta: float = 4.0              # weight of the depth cost
    marginal: str = "following"    # clusters' shares follow their sizes, or stay equal: "fixed"


def in_float32(tensor):
    """A `with` block on the tensor's device without mixed precision."""
    return torch.autocast(tensor.device.type, enabled=False)


# ---- clustering ----------------------------------------------------------------------------------

@torch.no_grad()
def joint_clusters(tokens, positions, start, depths=None, settings=Clustering()):
    """The cluster of each token of both views (S3PT, Sec. 3.3).

    Args:
        tokens: [B, N, D] the teacher's, view 1's N / 2 first; not normalised.
        positions: [B, N, 2] their centres in pixels of the original picture.
        start: [B, M] int64, M different tokens of each image: the first centroids.
        depths: [B, N] metres, NaN where missing; None: no depth cost.
        settings: a `Clustering`.
    Returns: [B, N] int64 in 0..M-1. A cluster may have no token. No image depends on another.
    """
    batch, joint, _ = tokens.shape
    count = start.shape[1]
    with in_float32(tokens):
        tokens = F.normalize(tokens.float(), dim=2)
        places = positions.float()
        # Not by a matrix product, whose rounding parts tokens at one place
        distances = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
        rows = tokens.new_full((joint,), 1 / joint)

        # At first a cluster is one token, and all others belong to nobody
        names = torch.arange(count, device=start.device).expand(batch, count)
        assignment = start.new_full((batch, joint), -1).scatter(1, start, names)
        for _ in range(settings.rounds):
            cost = matching_cost(tokens, distances, depths, assignment, count, settings)
            columns = shares_of(assignment, count, settings.marginal)
            plan = sinkhorn(cost, rows, columns, settings.sinkhorn_steps, settings.sinkhorn_lambda)
            assignment = plan.argmax(2)
    return assignment


def members_of(assignment, count):
    """1 where a token is of a cluster, else 0: [B, N] -> [B, N, M] float32."""
    names = torch.arange(count, device=assignment.device)
    return (assignment.unsqueeze(2) == names).float()


def matching_cost(tokens, distances, depths, assignment, count, settings):
    """What it costs to give a token to a cluster, T of S3PT, Sec. 3.3: [B, N, M] in [0, 1].

    tokens: [B, N, D], L2-normalised. The rest as in `joint_clusters` and `position_cost`.
    """
    # T_CrIBo: unlike features, far in the picture
    sums = members_of(assignment, count).mT @ tokens  # [B, M, D]
    centroids = F.normalize(sums, dim=2)
    cost = -(tokens @ centroids.mT)                   # [B, N, M]
    if settings.alpha:
        cost = cost + settings.alpha * position_cost(distances, assignment, count)
    # T = T_CrIBo + beta T_depth
    if settings.beta and depths is not None:
        cost = cost + settings.beta * depth_cost(depths.float(), assignment, count)
    return up_to_one(cost - cost.amin((1, 2), keepdim=True))


def shares_of(assignment, count, marginal):
    """What share of the tokens each cluster takes in the next transport (CrIBo): [B, M].

    marginal: "following": as large as it is now, thus equal for the first round's of one token
    each. "fixed": always equal.
    """
    sizes = members_of(assignment, count).sum(1) + 0.01  # or an empty one could take nothing
    if marginal == "fixed":
        sizes = torch.ones_like(sizes)
    return sizes / sizes.sum(1, keepdim=True)


def position_cost(distances, assignment, count):
    """How far each token is from the nearest other member of each cluster (CrIBo).

    Args:
        distances: [B, N, N] between the tokens of an image, in pixels.
        assignment: [B, N] int64 in 0..count-1, or -1 for tokens of no cluster.
        count: M.
    Returns: [B, N, M] in [0, 1] of the image's largest. A member at the token's own place does not
    count. Where there is no other, the cost is the image's mean, with those as 0.
    """
    # The least of each token's row by cluster; [B, N, N, M] is never made. -1 is put in column M
    column = assignment.remainder(count + 1).unsqueeze(1).expand_as(distances)
    others = distances.masked_fill(distances == 0, torch.inf)
    empty = others.new_full((*others.shape[:2], count + 1), torch.inf)
    least = empty.scatter_reduce(2, column, others, "amin")
    least = least[..., :count]  # [B, N, M]
    nobody = least.isinf()
    least = least.masked_fill(nobody, 0)
    mean = least.mean((1, 2), keepdim=True)
    return up_to_one(torch.where(nobody, mean, least))


def depth_cost(depths, assignment, count):
    """|d_i - d_j| of token i and cluster j, T_depth of S3PT, Sec. 3.3.

    d_j is the members' mean. The paper names no scale; it is the image's largest difference here.

    Args:
        depths: [B, N] metres, NaN where missing.
        assignment, count: as for `position_cost`.
    Returns: [B, N, M] in [0, 1]. A token without depth costs 0 everywhere. A cluster without depth
    costs a token as much as the others do on average.
    """
    # Behind the image's nearest token: equal depths are then 0, and their mean has no rounding
    known = ~depths.isnan()
    depths = depths - depths.nan_to_num(torch.inf).amin(1, keepdim=True)  # [B, N]

    members = members_of(assignment, count) * known.unsqueeze(2)          # [B, N, M]
    parts = members * depths.nan_to_num(0).unsqueeze(2)
    sums = parts.sum(1)                                                   # [B, M]
    centroids = sums / members.sum(1)                                     # NaN where missing
    difference = depths.unsqueeze(2) - centroids.unsqueeze(1)             # [B, N, M]
    cost = up_to_one(difference.abs())
    cost = torch.where(cost.isnan(), cost.nanmean(2, keepdim=True), cost)
    return cost.nan_to_num(0)


def up_to_one(cost):
    """Costs [B, N, M], 0 or more, divided by their image's largest; 0 where all are 0."""
    largest = cost.nan_to_num(0).amax((1, 2), keepdim=True)
    return cost / largest.clamp(min=torch.finfo(cost.dtype).tiny)


def sinkhorn(cost, rows, columns, steps, sharpness):
    """Entropic optimal transport (Cuturi, 2013): a soft assignment of tokens to clusters.

    Args:
        cost: [B, N, M].
        rows: [B, N] or [N], what each token has to give. columns: [B, M], what each cluster takes.
        steps: one scales the rows to their sums, then the columns. One or more.
        sharpness: lambda, of exp(-lambda cost).
    Returns: the plan [B, N, M]. Its columns have their sums, its rows nearly so.
    """
    # A row's least cost makes no difference, since rows are scaled first, but keeps exp from 0
    cost = cost - cost.amin(2, keepdim=True)
    plan = torch.exp(-sharpness * cost)
    for _ in range(steps):
        to_rows = rows / plan.sum(2)
        plan = plan * to_rows.unsqueeze(2)
        to_columns = columns / plan.sum(1)
        plan = plan * to_columns.unsqueeze(1)
        plan = plan.nan_to_num(1e-8)  # a column that is 0 everywhere
    return plan


# ---- objects -------------------------------------------------------------------------------------

def objects_of(tokens, assignment, count):
    """Each cluster's mean token in each view (CrIBo): [2, B, M, D] float32, 0 where it has none.

    tokens: [B, N, D], not normalised, the student's or the teacher's; the gradient goes to them.
    assignment: [B, N] int64 of `joint_clusters`. count: M.
    """
    with in_float32(tokens):
        members = members_of(assignment, count).unflatten(1, (2, -1))  # [B, 2, N / 2, M]
        tokens = tokens.float().unflatten(1, (2, -1))                  # [B, 2, N / 2, D]
        sizes = members.sum(2).unsqueeze(3)                            # [B, 2, M, 1]
        objects = members.mT @ tokens / sizes.clamp(min=1)             # [B, 2, M, D]
        return objects.transpose(0, 1)


def in_both_views(assignment, count):
    """Which clusters [B, M] bool have a token in each view; the others are dropped (CrIBo)."""
    members = members_of(assignment, count).unflatten(1, (2, -1))  # [B, 2, N / 2, M]
    return members.any(2).all(1)


# ---- objects of other pictures -------------------------------------------------------------------

@torch.no_grad()
def nearest(queries, keys, chunk=2048, lengths=None):
    """The key of the largest cosine to each query, the first of equals: [Q] int64.

    queries: [Q, D]. keys: [K, D]. Both need not be normalised. -1 without keys.
    lengths: [K] of the keys, where they are known.
    The similarities are made for `chunk` keys at a time.
    """
    lengths = lengths_of(keys) if lengths is None else lengths
    with in_float32(queries):
        queries = queries.float()
        best = queries.new_full((len(queries),), -torch.inf)
        index = torch.full_like(best, -1, dtype=torch.int64)
        for first in range(0, len(keys), chunk):
            some = keys[first:first + chunk].float() / lengths[first:first + chunk, None]
            # A query's own length does not change which key is its nearest
            cosine, place = (queries @ some.T).max(1)  # [Q]
            index = torch.where(cosine > best, first + place, index)
            best = torch.maximum(cosine, best)
    return index


def lengths_of(keys):
    """The lengths [...] of vectors [..., D], and never 0."""
    return keys.float().norm(dim=-1).clamp(min=1e-12)


def nearest_in_views(queries, keys, lengths):
    """`nearest` in each view for itself: [2, Q, D], [2, K, D] and [2, K] -> [2, Q] int64."""
    return torch.stack([nearest(queries[view], keys[view], lengths=lengths[view])
                        for view in (0, 1)])


class Queue:
    """The objects of the last pictures, as both views saw them (CrIBo).

    images: how many pictures it holds at most. dim: D, the features' width.

    A step searches before it adds its own objects, so it never finds these.
    """

    def __init__(self, images, dim, device):
        self.images = images
        # The newest first; T objects in all, and each picture's number of them
        self.objects = torch.zeros(2, 0, dim, device=device)  # [2, T, D]
        self.lengths = lengths_of(self.objects)               # [2, T], known for every search
        self.counts = torch.zeros(0, dtype=torch.int64)

    def __len__(self):
        return len(self.counts)

    def add(self, objects, counts):
        """Put pictures in front; the oldest fall off.

        objects: [2, O, D] float, not normalised, picture after picture, the two views of an object
        at one place. counts: [B] int64, each picture's number of objects; they sum up to O.
        """
        if len(counts) > self.images:
            raise ValueError(f"{len(counts)} pictures for a queue of {self.images}")
        self.counts = torch.cat([counts.cpu(), self.counts])[:self.images]
        kept = int(self.counts.sum()) - objects.shape[1]  # of those that were there
        objects = objects.detach().float()
        self.objects = torch.cat([objects, self.objects[:, :kept]], dim=1)
        self.lengths = torch.cat([lengths_of(objects), self.lengths[:, :kept]], dim=1)

    def search(self, objects):
        """The nearest stored object of each of [2, O, D] in its own view: [2, O] int64.

        They are places in the queue; -1 where it is empty.
        """
        return nearest_in_views(objects, self.objects, self.lengths)

    def stored(self, index, swapped=False):
        """The features at places [2, O] of `search`: [2, O, D]; 0 where it is empty.

        Each is as its own view saw it; swapped: as the other view did.
        """
        _, count, dim = self.objects.shape
        if count == 0:
            return self.objects.new_zeros(*index.shape, dim)
        view = torch.tensor([1, 0] if swapped else [0, 1], device=index.device)
        return self.objects[view.unsqueeze(1), index]

    def cycle(self, index, candidates, first):
        """Which objects are cycle-consistent (CrIBo): [2, O] bool.

        From an object to its nearest stored one, on to what the other view saw there, and back to
        the nearest of the step's objects in that other view: it must be the same object.

        Args:
            index: [2, O] of `search`.
            candidates: [2, A, D] the step's objects, of all processes.
            first: the place of this process's first object among them.
        """
        partners = self.stored(index, swapped=True)  # [2, O, D]
        candidates = candidates.flip(0)
        back = nearest_in_views(partners, candidates, lengths_of(candidates))
        own = first + torch.arange(index.shape[1], device=index.device)
        return (back == own) & (index >= 0)

    def state_dict(self):
        """The queue as tensors, for a checkpoint."""
        return {"images": torch.tensor(self.images), "objects": self.objects,
                "counts": self.counts}

    def load_state_dict(self, state):
        """Go on from a `state_dict`. Raises InputError if it is of another capacity or width."""
        pictures, dim = int(state["images"]), state["objects"].shape[2]
        if (pictures, dim) != (self.images, self.objects.shape[2]):
            raise InputError(
                f"--queue {self.images}: a queue in the checkpoint of another size ({pictures} "
                f"pictures, width {dim}; here width {self.objects.shape[2]}); give --queue "
                f"{pictures} and the same encoder, or choose another --out")
        self.objects = state["objects"].to(self.objects)
        self.lengths = lengths_of(self.objects)
        self.counts = state["counts"].cpu()

"""Student and teacher: what a step asks of the queue, over two processes too, and its draws."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from plumbing import training
from s3pt import networks
from s3pt.clustering import Queue
from s3pt.networks import Network, Seen, neighbors_of, stochastic_depth
from s3pt.objectives import Head
from vit import ViT, survivors

TEACHER = SimpleNamespace(head=nn.Identity())  # projections are the features themselves
# Directions in the plane, some degrees from the first axis
DEGREES = torch.tensor([0.0, 90.0, 180.0, 270.0]).deg2rad()


def at(*degrees):
    """Features [O, 2] in these directions."""
    angles = torch.tensor([float(d) for d in degrees]).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def seen_of(first, second, counts):
    """A `Seen` whose objects have these features in the two crops; counts: of each picture."""
    valid = torch.zeros(len(counts), 4, dtype=torch.bool)
    for row, count in enumerate(counts):
        valid[row, :count] = True
    return Seen(z=None, tokens=None, valid=valid, objects=torch.stack([first, second]))


@pytest.fixture
def queue():
    """One picture: an object at 0 degrees in crop 1 that crop 2 saw at 90, another at 180, 270."""
    queue = Queue(4, 2, "cpu")
    queue.add(torch.stack([at(0, 180), at(90, 270)]), torch.tensor([2]))
    return queue


def test_a_step_searches_before_it_stores(queue):
    seen = seen_of(at(10, 190), at(80, 280), [1, 1])
    found, mask = neighbors_of(seen, TEACHER, queue, epoch=1)
    # Not its own objects, which would be nearer
    assert torch.allclose(found, torch.stack([at(0, 180), at(90, 270)]), atol=1e-6)
    assert mask.all()
    assert len(queue) == 3
    assert torch.allclose(queue.objects[:, :2], seen.objects)


def test_in_the_first_epoch_objects_are_only_stored(queue):
    seen = seen_of(at(10, 190), at(80, 280), [1, 1])
    _, mask = neighbors_of(seen, TEACHER, queue, epoch=0)
    assert not mask.any() and len(queue) == 3


def test_the_way_back_is_among_the_objects_of_all_processes(queue, monkeypatch):
    """Of two processes this is the second; an object of the first is nearer on the way back."""
    mine = seen_of(at(10, 190), at(80, 280), [2])
    others = {2: torch.stack([at(300), at(89)]).transpose(0, 1), 1: torch.tensor([1])}

    def gathered(rows):
        return torch.cat([others[2] if rows.ndim == 3 else others[1], rows])
    monkeypatch.setattr(training, "gather_rows", gathered)
    monkeypatch.setattr(training, "rank", lambda: 1)
    _, mask = neighbors_of(mine, TEACHER, queue, epoch=1)
    # From 10 degrees to the stored one at 0, which crop 2 saw at 90: the other process's 89 is
    # nearer than its own 80. From 190 all goes well. The second crop's objects find their way back
    # to the first crop's at 10 and 190
    assert mask.tolist() == [[False, True], [True, True]]
    assert queue.counts.tolist() == [1, 2, 2]  # the first process's picture, its own, the old one


def test_each_picture_has_its_own_draws_in_each_view():
    draws = torch.rand(3, 4, 5, 2, generator=torch.Generator().manual_seed(0))  # B, V, L, 2
    of_global, of_small = stochastic_depth(draws, 0.5)
    assert of_global.shape == (5, 2, 6) and of_small.shape == (5, 2, 6)
    whole = torch.cat([of_global.unflatten(2, (2, 3)), of_small.unflatten(2, (2, 3))], 2)
    for picture in range(3):
        for view in range(4):
            expected = survivors(draws[picture, view][..., None], 0.5)[..., 0]  # [L, 2]
            assert torch.equal(whole[:, :, view, picture], expected)
    assert stochastic_depth(draws, 0.0) == (None, None)


def test_tokens_of_both_crops_are_joined_picture_by_picture():
    torch.manual_seed(0)
    network = Network(ViT(8, 16, 1, 2, grid=(2, 2)), Head(16, 8, 32, 10))
    crops = torch.randn(2 * 3, 3, 16, 16)  # two views of three pictures
    z, tokens = network.look([crops, torch.randn(3, 3, 8, 8)])
    assert z.shape == (9, 32) and tokens.shape == (3, 8, 16)
    alone = network.backbone.tokens(crops[[1, 4]], "norm")[:, 1:]  # the second picture's views
    assert torch.allclose(tokens[1], alone.flatten(0, 1), atol=1e-6)


def test_random_weights_are_the_seeds(monkeypatch):
    args = SimpleNamespace(weights=None, encoder="vit_mini8", image_size=(80, 160), hidden=8,
                           bottleneck=32, prototypes=4, objective="dino", vmf=True,
                           unit_prototypes=False, recompute=True)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        encoder, student = networks.networks_of(args, torch.device("cpu"))
        found.append(student.backbone.cls_token.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert encoder.backbone is student.backbone and student.backbone.recompute
    assert student.head.last_layer_c is None

"""The queue of other pictures' objects: its order, the search in it, and the cycle test."""
import pytest
import torch

from plumbing.errors import InputError
from s3pt.clustering import Queue, nearest


def objects(*values):
    """Objects [2, O, 1] whose value tells them apart; view 2's is 1000 more."""
    row = torch.tensor(values, dtype=torch.float32).unsqueeze(1)
    return torch.stack([row, row + 1000])


def held(queue):
    """The values that a queue of `objects` holds, in order."""
    assert torch.equal(queue.objects[0] + 1000, queue.objects[1])
    return queue.objects[0, :, 0].tolist()


def add(queue, counts, *values):
    queue.add(objects(*values), torch.tensor(counts))


def test_the_newest_stand_in_front_and_the_oldest_pictures_fall_off():
    queue = Queue(3, 1, "cpu")
    add(queue, [2], 1, 2)
    add(queue, [1, 0], 3)
    assert held(queue) == [3, 1, 2] and len(queue) == 3
    # One picture too many: the oldest goes with both of its objects
    add(queue, [3], 4, 5, 6)
    assert held(queue) == [4, 5, 6, 3] and len(queue) == 3
    # Images of no object hold their place
    add(queue, [0, 0])
    assert held(queue) == [4, 5, 6] and queue.counts.tolist() == [0, 0, 3]
    add(queue, [1, 1, 1], 7, 8, 9)
    assert held(queue) == [7, 8, 9]
    with pytest.raises(ValueError, match="4 pictures for a queue of 3"):
        add(queue, [0, 0, 0, 0])


def test_a_queue_filled_at_once_or_picture_by_picture_is_the_same():
    at_once = Queue(4, 1, "cpu")
    add(at_once, [1, 2, 1], 1, 2, 3, 4)
    one_by_one = Queue(4, 1, "cpu")
    add(one_by_one, [1], 4)
    add(one_by_one, [2], 2, 3)
    add(one_by_one, [1], 1)
    assert held(at_once) == held(one_by_one)
    assert torch.equal(at_once.counts, one_by_one.counts)


def test_the_search_is_by_direction_and_each_view_searches_its_own_half():
    queue = Queue(8, 2, "cpu")
    first = torch.tensor([[1.0, 0.0], [0.0, 9.0], [-1.0, 0.1]])
    queue.add(torch.stack([first, first.flip(0)]), torch.tensor([1, 2]))
    seen = torch.tensor([[50.0, 1.0], [0.1, 0.5], [-3.0, -3.0]])
    index = queue.search(torch.stack([seen, seen]))
    assert index.tolist() == [[0, 1, 2], [2, 1, 0]]
    # Un-normalised, as they were given
    torch.testing.assert_close(queue.stored(index), torch.stack([first, first]), atol=0, rtol=0)
    assert queue.stored(index).dtype == torch.float32
    swapped = queue.stored(index, swapped=True)
    torch.testing.assert_close(swapped[0], first.flip(0), atol=0, rtol=0)


E1, E2, E3 = torch.eye(3)


def one_stored():
    """A queue of one picture with one object: E1 in view 1, E2 in view 2."""
    queue = Queue(8, 3, "cpu")
    queue.add(torch.stack([E1, E2]).unsqueeze(1), torch.tensor([1]))
    return queue


def test_an_object_that_the_way_through_the_queue_leads_back_to_passes():
    queue = one_stored()
    # Both find the one stored object. Its partners are E2 and E1: those of the first alone
    now = torch.stack([torch.stack([E1, E3]), torch.stack([E2, E3])])
    index = queue.search(now)
    assert queue.cycle(index, now, 0).tolist() == [[True, False], [True, False]]


def test_the_two_views_are_tested_each_for_itself():
    queue = one_stored()
    # From view 1 the way leads to E2 in view 2, which is the first; from view 2 to E1, the second
    now = torch.stack([torch.stack([E3, E1]), torch.stack([E2, E3])])
    index = queue.search(now)
    assert queue.cycle(index, now, 0).tolist() == [[True, False], [False, True]]


def test_objects_of_other_processes_are_candidates_too():
    queue = one_stored()
    own = torch.stack([E1 + 0.2 * E3, E2 + 0.2 * E3]).unsqueeze(1)
    index = queue.search(own)
    assert queue.cycle(index, own, 0).tolist() == [[True], [True]]
    # The other process has a nearer one in view 2, but not in view 1
    other = torch.stack([E3, E2]).unsqueeze(1)
    for first, candidates in enumerate([[own, other], [other, own]]):
        assert queue.cycle(index, torch.cat(candidates, 1), first).tolist() == [[False], [True]]


def test_an_empty_queue_gives_no_partners():
    queue = Queue(4, 3, "cpu")
    for _ in range(2):
        now = torch.randn(2, 5, 3)
        index = queue.search(now)
        assert not queue.cycle(index, now, 0).any()
        assert queue.stored(index).shape == (2, 5, 3)
        queue.add(torch.zeros(2, 0, 3), torch.tensor([0]))  # a picture without any object
    # And a step without objects finds nothing in a full one
    queue = one_stored()
    index = queue.search(torch.zeros(2, 0, 3))
    assert queue.cycle(index, torch.zeros(2, 0, 3), 0).shape == (2, 0)


def test_a_queue_goes_on_from_its_state(tmp_path):
    queue = Queue(4, 6, "cpu")
    queue.add(torch.randn(2, 5, 6), torch.tensor([2, 3]))
    torch.save(queue.state_dict(), tmp_path / "queue.pth")
    again = Queue(4, 6, "cpu")
    again.load_state_dict(torch.load(tmp_path / "queue.pth", weights_only=True))
    more = torch.randn(2, 4, 6)
    for each in (queue, again):
        each.add(more, torch.tensor([1, 0, 3]))
    assert torch.equal(queue.objects, again.objects) and queue.objects.dtype == torch.float32
    assert len(again) == 4 and torch.equal(queue.counts, again.counts)
    # Nothing of what has fallen off is written
    assert queue.objects.untyped_storage().nbytes() == 2 * 6 * 6 * 4


def test_a_state_of_another_size_is_refused():
    state = Queue(4, 6, "cpu").state_dict()
    for images, dim in ((5, 6), (4, 7)):
        with pytest.raises(InputError, match=f"--queue {images}: a queue in the checkpoint of anot"
                                             r"her size \(4 pictures, width 6; .*--queue 4 "):
            Queue(images, dim, "cpu").load_state_dict(state)


def test_the_search_in_chunks_finds_what_a_full_matrix_would():
    queries = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    keys = torch.randn(333, 16, generator=torch.Generator().manual_seed(1))
    best = torch.nn.functional.cosine_similarity(queries[:, None], keys[None], dim=2).argmax(1)
    for chunk in (1, 100, 333, 1000):
        assert torch.equal(nearest(queries, keys, chunk), best)
    # The first of equals, in one chunk or in two
    twice = torch.cat([keys, keys])
    for chunk in (333, 1000):
        assert torch.equal(nearest(queries, twice, chunk), best)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(queries, keys), best)

"""Sinkhorn, the costs by hand, joint-view clustering on planted scenes, and the published one."""
import pytest
import torch
from conftest import SHARED
from scipy.optimize import linear_sum_assignment

from s3pt.clustering import (Clustering, depth_cost, in_both_views, joint_clusters, objects_of,
                             position_cost, sinkhorn)

NAN = float("nan")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def close(a, b, within=1e-6):
    torch.testing.assert_close(a, b, atol=within, rtol=0)


# ---- Sinkhorn ------------------------------------------------------------------------------------

def problem(seed=0):
    """A cost [2, 12, 5] and marginals of it that sum up to 1."""
    cost = torch.rand(2, 12, 5, generator=generator(seed))
    rows = torch.rand(2, 12, generator=generator(seed + 1)) + 0.1
    columns = torch.rand(2, 5, generator=generator(seed + 2)) + 0.1
    return cost, rows / rows.sum(1, keepdim=True), columns / columns.sum(1, keepdim=True)


def test_many_steps_give_both_marginals_and_one_gives_the_columns():
    cost, rows, columns = problem()
    plan = sinkhorn(cost, rows, columns, 1, 20.0)
    close(plan.sum(1), columns)
    assert (plan.sum(2) - rows).abs().max() > 1e-3  # which one step does not reach
    plan = sinkhorn(cost, rows, columns, 200, 20.0)
    close(plan.sum(1), columns, 1e-5)
    close(plan.sum(2), rows, 1e-5)


def test_a_constant_added_to_a_row_of_the_cost_changes_nothing():
    cost, rows, columns = problem()
    added = torch.rand(2, 12, 1, generator=generator(9)) * 40 - 20
    for steps in (1, 5):
        close(sinkhorn(cost + added, rows, columns, steps, 20.0),
              sinkhorn(cost, rows, columns, steps, 20.0))


def test_rows_may_be_the_same_for_all_images():
    cost, _, columns = problem()
    equal = torch.full((12,), 1 / 12)
    close(sinkhorn(cost, equal, columns, 3, 20.0),
          sinkhorn(cost, equal.expand(2, 12), columns, 3, 20.0), 0)


def test_a_sharp_plan_is_the_best_assignment():
    cost = torch.rand(1, 7, 7, generator=generator(4), dtype=torch.float64)
    equal = torch.full((1, 7), 1 / 7, dtype=torch.float64)
    plan = sinkhorn(cost, equal, equal, 2000, 200.0)
    _, best = linear_sum_assignment(cost[0].numpy())
    assert plan[0].argmax(1).tolist() == best.tolist()


def test_a_cluster_that_is_too_dear_for_everybody_gives_no_nan():
    cost = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    plan = sinkhorn(cost, torch.full((2,), 0.5), torch.full((1, 2), 0.5), 3, 1000.0)
    assert plan.isfinite().all()
    assert plan.argmax(2).tolist() == [[0, 0]]


# ---- the costs -----------------------------------------------------------------------------------

def test_the_position_cost_by_hand():
    # Four tokens on a line, two of them at one place; cluster 2 is empty
    x = torch.tensor([[0.0, 3.0, 3.0, 10.0]])
    cost = position_cost((x.unsqueeze(2) - x.unsqueeze(1)).abs(), torch.tensor([[0, 0, 1, 1]]), 3)
    mean = 40 / 12  # of 12 distances, of which the four of cluster 2 count as 0
    close(cost, torch.tensor([[[3, 3, mean], [3, 7, mean], [3, 7, mean], [7, 7, mean]]]) / 7)


def naive_position_cost(distances, assignment, count):
    """The same by a tensor [B, N, N, M]."""
    is_member = assignment.unsqueeze(2) == torch.arange(count)                   # [B, N, M]
    counts = is_member.unsqueeze(1) & (distances > 0).unsqueeze(3)               # [B, N, N, M]
    least = distances.unsqueeze(3).where(counts, torch.tensor(torch.inf)).amin(2)
    none = least == torch.inf
    least[none] = 0
    mean = least.mean((1, 2), keepdim=True)
    least = least.where(~none, mean)
    return least / least.amax((1, 2), keepdim=True)


@pytest.mark.parametrize("seed", range(3))
def test_the_position_cost_is_bit_by_bit_the_naive_one(seed):
    places = torch.randint(0, 12, (3, 60, 2), generator=generator(seed)).float()  # some coincide
    distances = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    # Some of nobody, some clusters of one token, some empty
    assignment = torch.randint(-1, 40, (3, 60), generator=generator(seed + 10))
    cost = position_cost(distances, assignment, 45)
    assert torch.equal(cost, naive_position_cost(distances, assignment, 45))
    assert cost.amax((1, 2)).tolist() == [1, 1, 1]


def test_the_depth_cost_by_hand():
    # Two tokens without depth: the fourth alone in cluster 2, the last in cluster 0
    depths = torch.tensor([[2.0, 4.0, 10.0, NAN, 6.0, NAN]])
    cost = depth_cost(depths, torch.tensor([[0, 0, 1, 2, -1, 0]]), 3)
    eighths = torch.tensor([[[1, 8, 4.5], [1, 6, 3.5], [7, 0, 3.5], [0, 0, 0], [3, 4, 3.5],
                             [0, 0, 0]]])  # clusters at 3 m and 10 m
    close(cost, eighths / 8)


@pytest.mark.parametrize("depths", [[NAN, NAN, NAN], [10.1, 10.1, 10.1], [NAN, 7.0, NAN]])
def test_nothing_to_tell_apart_by_depth_costs_nothing(depths):
    cost = depth_cost(torch.tensor([depths]), torch.tensor([[0, 0, 0]]), 2)
    assert (cost == 0).all()


# ---- planted scenes ------------------------------------------------------------------------------

def grid(side, views=2):
    """The places [views side^2, 2] of both views' tokens, each view a little moved."""
    line = torch.arange(side) * 16.0 + 8
    places = torch.cartesian_prod(line, line)
    return torch.cat([places + 3 * view for view in range(views)])


def scene(seed=0, images=1, joint=98, clusters=16):
    """Random smooth features with places, starts and depths, some of these missing."""
    random = generator(seed)
    positions = grid(7).expand(images, joint, 2)
    waves = torch.randn(images, 2, 24, generator=random) / 25
    tokens = (positions @ waves).sin() + 0.1 * torch.randn(images, joint, 24, generator=random)
    start = torch.rand(images, joint, generator=random).argsort(1)[:, :clusters]
    depths = 5 + 40 * torch.rand(images, joint, generator=random)
    depths[torch.rand(images, joint, generator=random) < 0.2] = NAN
    return {"tokens": tokens, "positions": positions, "start": start, "depths": depths}


def same_grouping(a, b):
    """Whether two assignments [B, N] differ in the clusters' names alone."""
    return torch.equal(a.unsqueeze(1) == a.unsqueeze(2), b.unsqueeze(1) == b.unsqueeze(2))


def regions_found(seed, clusters, marginal="following"):
    """Planted regions, of which 2.. have two tokens a view: those that have clusters of their own,
    whether there are clusters of several, and the size of the largest."""
    sizes = [120, 50, *[2] * 13]  # in a view of 14 x 14 tokens; neighbours in a row lie together
    region = torch.arange(15).repeat_interleave(torch.tensor(sizes)).repeat(2)
    random = generator(seed)
    directions = torch.linalg.qr(torch.randn(64, 15, generator=random))[0].T
    tokens = directions[region] + 0.05 * torch.randn(392, 64, generator=random)
    start = torch.randperm(392, generator=random)[:clusters]
    assignment = joint_clusters(tokens[None], grid(14)[None], start[None],
                                settings=Clustering(marginal=marginal))[0]
    inside = [region[assignment == cluster].unique().tolist() for cluster in assignment.unique()]
    alone = {found[0] for found in inside if len(found) == 1}
    return alone, max(map(len, inside)) > 1, assignment.bincount().max()


@pytest.mark.parametrize("seed", range(3))
def test_a_large_region_and_thirteen_tiny_ones_are_found(seed):
    alone, mixed, largest = regions_found(seed, 128)
    assert alone == set(range(15)) and not mixed
    assert largest > 40
    # Equal shares cut the large region up, and few clusters have no seed in the tiny ones
    assert regions_found(seed, 128, "fixed")[2] < 15
    assert len(regions_found(seed, 32)[0]) < 8


def test_look_alikes_are_one_without_depth_and_two_with():
    random = generator(1)
    far = torch.arange(200) % 2
    tokens = torch.ones(1, 200, 32) + 0.3 * torch.randn(1, 200, 32, generator=random)
    positions = 200 * torch.rand(1, 200, 2, generator=random)
    start = torch.randperm(200, generator=random)[None, :8]
    depths = (10 + 30 * far)[None] + torch.rand(1, 200, generator=random)

    def share_of_the_larger(beta):
        assignment = joint_clusters(tokens, positions, start, depths, Clustering(beta=beta))[0]
        pairs = torch.zeros(8, 2).index_put((assignment, far), torch.ones(200), accumulate=True)
        return pairs.amax(1).sum().item() / 200

    assert share_of_the_larger(0.0) < 0.7
    for beta in (0.5, 1.0, 4.0):
        assert share_of_the_larger(beta) == 1


def test_a_token_goes_to_the_seed_of_its_own_depth():
    depths = torch.tensor([10.0, 20.0, 30.0, 40.0]).repeat_interleave(6)[None]
    start = torch.tensor([[0, 6, 12, 18]])
    assignment = joint_clusters(torch.ones(1, 24, 8), torch.zeros(1, 24, 2), start, depths,
                                Clustering(rounds=1))
    assert torch.equal(assignment[0], torch.arange(4).repeat_interleave(6))


def test_permuted_tokens_and_seeds_give_the_same_clusters():
    one = scene(2, images=2)
    order = torch.randperm(98, generator=generator(3))
    place = order.argsort()  # where a token has gone
    other = {name: one[name][:, order] for name in ("tokens", "positions", "depths")}
    seeds = torch.randperm(16, generator=generator(4))
    before = joint_clusters(**one)
    after = joint_clusters(**other, start=place[one["start"]][:, seeds])
    assert same_grouping(before[:, order], after)
    assert torch.equal(before[:, order], seeds[after])


def test_an_image_does_not_depend_on_the_others():
    images = scene(5, images=4)
    # Their costs have unlike ranges: two places alone in one, where nearly all cost the same, one
    # place in another, and other distances and depths in the last
    images["positions"] = images["positions"].clone()
    images["positions"][0] = 100 * (torch.arange(98) % 2).unsqueeze(1)
    images["positions"][1] = 0
    images["positions"][2] *= 30
    images["depths"][3] *= 30
    settings = Clustering(alpha=8.0)
    together = joint_clusters(**images, settings=settings)
    for number in range(4):
        image = {name: value[[number]] for name, value in images.items()}
        assert torch.equal(joint_clusters(**image, settings=settings)[0], together[number])


def test_every_token_has_a_cluster_and_equal_shares_keep_more_of_them():
    images = scene(6, images=3)
    survivors = {}
    for marginal in ("following", "fixed"):
        assignment = joint_clusters(**images, settings=Clustering(marginal=marginal))
        assert assignment.shape == (3, 98) and assignment.dtype == torch.int64
        assert assignment.min() >= 0 and assignment.max() < 16
        survivors[marginal] = sum(len(row.unique()) for row in assignment)
    assert survivors["fixed"] > survivors["following"]


def test_without_any_depth_it_is_as_without_the_depth_cost():
    images = scene(7, images=2)
    missing = torch.full_like(images["depths"], NAN)
    without = joint_clusters(**images | {"depths": missing})
    assert torch.equal(without, joint_clusters(**images, settings=Clustering(beta=0.0)))
    assert torch.equal(without, joint_clusters(**images | {"depths": None}))
    assert not torch.equal(without, joint_clusters(**images))


def test_alpha_0_looks_at_no_places():
    images = scene(8)
    flat = Clustering(alpha=0.0)
    moved = images | {"positions": torch.full((1, 98, 2), NAN)}
    assert torch.equal(joint_clusters(**images, settings=flat),
                       joint_clusters(**moved, settings=flat))


@pytest.mark.parametrize("name", ["tokens", "positions", "depths"])
def test_all_alike_is_finite(name):
    images = scene(9)
    images[name] = images[name][:, :1].expand_as(images[name])
    assignment = joint_clusters(**images)
    assert assignment.min() >= 0
    assert objects_of(images["tokens"], assignment, 16).isfinite().all()
    # All at one place or of one depth: that cost is as if it were left out
    weights = {"tokens": {}, "positions": {"alpha": 0.0}, "depths": {"beta": 0.0}}[name]
    assert torch.equal(assignment, joint_clusters(**images, settings=Clustering(**weights)))


def test_mixed_precision_around_it_changes_nothing():
    images = scene(10)
    assignment = joint_clusters(**images)
    objects = objects_of(images["tokens"], assignment, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(joint_clusters(**images), assignment)
        assert torch.equal(objects_of(images["tokens"], assignment, 16), objects)


# ---- objects -------------------------------------------------------------------------------------

def test_objects_are_the_means_of_each_view_and_the_gradient_is_shared_out():
    tokens = torch.tensor([[[1.0], [3.0], [7.0], [10.0], [20.0], [30.0]]], requires_grad=True)
    assignment = torch.tensor([[0, 0, 2, 0, 3, 0]])
    objects = objects_of(tokens, assignment, 4)  # [2, 1, 4, 1]
    assert objects[:, 0, :, 0].tolist() == [[2, 0, 7, 0], [20, 0, 0, 20]]
    # A cluster of one view alone is not valid, and an empty one neither
    assert in_both_views(assignment, 4).tolist() == [[True, False, False, False]]
    objects[0, 0, 0].backward()
    assert tokens.grad.flatten().tolist() == [0.5, 0.5, 0, 0, 0, 0]


# ---- the published clustering --------------------------------------------------------------------

@pytest.mark.parametrize("number", range(4))
def test_the_published_clustering(number):
    path = SHARED / "golden" / "cribo_clustering.pt"
    if not path.is_file():
        pytest.skip("no outputs of the published clustering here")
    case = torch.load(path, weights_only=True)[number]
    settings = Clustering(case["rounds"], case["sinkhorn_iterations"], case["sinkhorn_lambda"],
                          case["alpha"], beta=0.0, marginal=case["marginal"])
    tokens = case["tokens"][None]
    assignment = joint_clusters(tokens, case["positions"][None], case["start"][None],
                                settings=settings)
    assert torch.equal(assignment[0], case["cluster_of_token"])
    assert torch.equal(in_both_views(assignment, case["clusters"])[0], case["valid"])
    close(objects_of(tokens, assignment, case["clusters"])[:, 0], case["objects"], 1e-5)

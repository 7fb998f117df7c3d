"""The 3D encoder against the published one's outputs, and the invariants that make it fast."""
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, SHARED
from torch.utils._python_dispatch import TorchDispatchMode
from waffleirons import seed  # noqa: F401 (a fixture)
from waffleirons import GRIDS, SMALL, in_double, load_golden, random_cloud, with_points

from plumbing.errors import InputError
from readers.nuscenes import SAMPLING
from releases.scalr import from_released, published
from waffleiron import WaffleIron, plan_window

GOLDEN = [ROOT / "tests/golden/portable_layernorm.pt", ROOT / "tests/golden/portable_batchnorm.pt",
          SHARED / "golden/waffleiron_layernorm.pt", SHARED / "golden/waffleiron_batchnorm.pt"]
golden_files = pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)


def golden_clouds(golden):
    """The padded golden clouds as ragged ones: a list of batches of one cloud."""
    clouds = []
    for b, n in enumerate(golden["num_points"]):
        inputs = {"points": golden["feats"][b, :, :n].T,  # [N, 5]
                  "cells": golden["cell_ind"][b, :, :n].T,  # [N, 3]
                  "neighbors": golden["neighbors"][b, 1:, :n].T}  # [N, K], not the point itself
        clouds.append({"inputs": inputs, "view": torch.zeros(n, dtype=torch.int64)})
    return clouds


def collate(clouds):
    """Clouds one after the other; neighbours then index rows of the whole batch."""
    sizes = [len(cloud["view"]) for cloud in clouds]
    joined = {name: [cloud["inputs"][name] for cloud in clouds] for name in clouds[0]["inputs"]}
    joined["neighbors"] = [of_cloud + sum(sizes[:b])
                           for b, of_cloud in enumerate(joined["neighbors"])]
    view = [cloud["view"] + b for b, cloud in enumerate(clouds)]
    return {"inputs": {name: torch.cat(values) for name, values in joined.items()},
            "view": torch.cat(view)}


# ---- parity with the published code --------------------------------------------------------------

@golden_files
def test_outputs_are_the_published_ones(path):
    golden = load_golden(path)
    model = from_released(golden["state_dict"], golden["grids"]).eval()
    for key in ("channels", "depth", "out_channels", "norm"):
        assert model.spec[key] == golden[key], key
    output = model(collate(golden_clouds(golden)))
    padded = zip(golden["output"], golden["num_points"])
    expected = torch.cat([of_cloud[:, :n].T for of_cloud, n in padded])
    assert expected.abs().max() > 1
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)


@golden_files
def test_gradient_norms_are_the_published_ones(path):
    golden = load_golden(path)
    model = from_released(golden["state_dict"], golden["grids"]).eval()
    model(golden_clouds(golden)[0]).square().mean().backward()
    norms = {}
    for name, value in model.named_parameters():
        their_name, _ = published(name, value.shape)
        norms[their_name] = value.grad.norm().item()
    # The order of float32 sums over some hundred points and six layers leaves 2e-6.
    # A wrong term costs per cents.
    assert norms == pytest.approx(golden["grad_norms_sample0"], rel=5e-5)


# ---- ragged batches and cropped planes -----------------------------------------------------------

@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_a_cloud_in_a_batch_is_as_alone(norm):
    clouds = [random_cloud(30), random_cloud(7, (0.0, 0.5), (0.3, 1.0)),
              random_cloud(50, (0.5, 0.0))]
    model = WaffleIron(**SMALL, norm=norm).double().eval()
    clouds = [in_double(cloud) for cloud in clouds]
    together = model(collate(clouds))
    alone = torch.cat([model(cloud) for cloud in clouds])
    torch.testing.assert_close(together, alone)
    assert (together - together.mean(0)).abs().max() > 0.1


def test_the_order_of_the_rows_does_not_matter():
    clouds = [random_cloud(30), random_cloud(20, (0.0, 0.5), (0.3, 1.0))]
    batch = in_double(collate(clouds))
    model = WaffleIron(**SMALL).double().eval()
    order = torch.randperm(len(batch["view"]))
    shuffled = {name: values[order] for name, values in batch["inputs"].items()}
    shuffled["neighbors"] = order.argsort()[shuffled["neighbors"]]  # the neighbours' new rows
    output = model({"inputs": shuffled, "view": batch["view"][order]})
    torch.testing.assert_close(output, model(batch)[order])


# Each cloud's (low, high), as shares of the rows and columns.
BOXES = {"corners": [((0, 0), (.3, .3)), ((0, .7), (.3, 1)), ((.7, 0), (1, .3)),
                     ((.7, .7), (1, 1))],
         "borders": [((0, .3), (.3, .6)), ((.4, 0), (.6, .5)), ((.7, .4), (1, .7)),
                     ((.4, .7), (.6, 1))],
         "next to the border": [((.06, .15), (.9, .8)), ((.3, .3), (.95, .9))],
         "different extents": [((0, 0), (1, .3)), ((.9, .9), (1, 1)), ((.4, .4), (.6, .6)),
                               ((0, .5), (.2, 1))],
         "one cell": [((0, 0), (.01, .01)), ((.99, .99), (1, 1)), ((.5, .5), (.5, .5))],
         "the whole grid": [((0, 0), (1, 1)), ((.5, .5), (.7, .7))]}


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
def test_cropped_planes_give_the_same_as_whole_ones(boxes):
    batch = collate([random_cloud(25, low, high) for low, high in boxes])
    model = WaffleIron(**SMALL).double().eval()
    results = []
    for crop in (True, False):
        model.crop = crop
        x = batch["inputs"]["points"].double().requires_grad_()
        output = model(with_points(batch, x))
        gradients = torch.autograd.grad(output.square().sum(), [x, *model.parameters()])
        results.append((output, *gradients))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


def test_windows_are_no_larger_than_needed():
    # On a grid of 100 x 40, cloud 0 has rows 10 to 14 and columns 0 to 3,
    # and cloud 1 has row 99 and columns 38 and 39.
    cells = torch.tensor([10 * 40 + 0, 14 * 40 + 3, 14 * 40 + 3, 99 * 40 + 38, 99 * 40 + 39])
    view = torch.tensor([0, 0, 0, 1, 1])
    window = plan_window(cells, view, 2, (100, 40))
    assert window.shape == (2, 7, 6)  # 5 rows and 4 columns, and one more on each side
    assert window.weight.flatten().tolist() == [1, 0.5, 0.5, 1, 1]
    assert plan_window(cells, view, 2, (100, 40), crop=False).shape == (2, 100, 40)


@pytest.mark.parametrize("cell", [-1, 24 * 20])
def test_cells_outside_the_grid_are_refused(cell):
    cloud = random_cloud(10)
    cloud["inputs"]["cells"][3, 0] = cell
    with pytest.raises(ValueError, match="axis of 24 cells"):
        WaffleIron(**SMALL)(cloud)


# ---- training ------------------------------------------------------------------------------------

@pytest.mark.parametrize("head", ["linear", "batchnorm", "mlp"])
def test_features_are_what_the_head_reads(head):
    model = WaffleIron(**SMALL, head=head).eval()
    cloud = random_cloud(10)
    assert model.features(cloud).shape == (10, 8)
    torch.testing.assert_close(model.head(model.features(cloud)), model(cloud))


def test_bfloat16_autocast_keeps_the_residual_stream_in_float32():
    model = WaffleIron(**SMALL).eval()
    cloud = random_cloud(200)
    expected = model(cloud)

    # the dtype that enters each block
    streams = []
    for block in (*model.spatial_mix, *model.channel_mix):
        block.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(cloud)
        assert model.features(cloud).dtype == torch.float32
    assert output.dtype == torch.bfloat16
    assert set(streams) == {torch.float32}
    assert (output.float() - expected).norm() < 0.02 * expected.norm()  # bfloat16 rounds to 0.4 %


class SumDtypes(TorchDispatchMode):
    """Notes the dtype in which rows are summed by index, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.index_add, torch.ops.aten.index_add_):
            self.seen.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_bfloat16_autocast_sums_cells_in_float32():
    # Numbers do not show it on the CPU, whose bfloat16 index_add may sum in float32 inside.
    # On a GPU such a sum stops growing after some hundred points.
    block = WaffleIron(**SMALL).spatial_mix[0]
    cloud = random_cloud(20)
    window = plan_window(cloud["inputs"]["cells"][:, 0], cloud["view"], 1, GRIDS[0])
    with SumDtypes() as sums:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = block(torch.randn(20, 8), window)
        output.sum().backward()
    # points to plane, and the gradient of plane to points
    assert sums.seen == [torch.float32, torch.float32]


@pytest.mark.parametrize("silenced", ["spatial_mix", "channel_mix"])
def test_drop_path_drops_whole_clouds(silenced):
    size, clouds = 6, 200
    batch = collate([random_cloud(size) for _ in range(clouds)])
    model = WaffleIron(**SMALL | {"depth": 1}, drop_path=0.25)
    with torch.no_grad():
        getattr(model, silenced)[0].scale.zero_()  # the other branch alone is left
        model.eval()
        whole = model.features(batch)
        stem = model.embed(batch["inputs"]["points"], batch["inputs"]["neighbors"])
        model.train()
        model.embed.eval()  # BatchNorm as before
        factor = (model.features(batch) - stem) / (whole - stem)
        factor = factor.view(clouds, size, -1)

    # one factor a cloud: 0, or what keeps the mean at 1
    for cloud in factor:
        assert torch.allclose(cloud, cloud[0, 0].round(decimals=2), atol=0.02)
    kept = factor[:, 0, 0] > 0.5
    assert factor[:, 0, 0][kept].mean().item() == pytest.approx(1 / 0.75, abs=0.01)
    assert 130 <= kept.sum() <= 170  # of 200; 150 expected, standard deviation 6


def test_given_draws_decide_which_branches_are_dropped():
    batch = collate([random_cloud(6) for _ in range(3)])
    model = WaffleIron(**SMALL | {"depth": 2}, drop_path=0.25).train()
    model.embed.eval()  # BatchNorm of the cloud alone and of the batch would differ
    stem = model.embed(batch["inputs"]["points"], batch["inputs"]["neighbors"])
    # The first cloud loses all branches, the second none, the third all but its second layer's
    draws = torch.tensor([[0.9, 0.1, 0.9], [0.9, 0.1, 0.9], [0.9, 0.1, 0.1], [0.9, 0.1, 0.74]])
    found = model.features(batch | {"draws": draws})
    assert torch.equal(found[:6], stem[:6])
    model.spec["drop_path"] = 0.0
    for mix in (*model.spatial_mix, *model.channel_mix):
        mix.scale.data /= 0.75
    torch.testing.assert_close(found[6:12], model.features(batch)[6:12])
    for mix in (model.spatial_mix[0], model.channel_mix[0]):
        mix.scale.data.zero_()
    torch.testing.assert_close(found[12:], model.features(batch)[12:])


@pytest.mark.slow
def test_deep_random_model_is_alive_and_trains():
    model = WaffleIron(channels=16, depth=48, out_channels=4, grids=GRIDS)
    cloud = random_cloud(60)
    features = model.features(cloud)
    assert features.isfinite().all()
    assert 0.1 < features.std(0).mean() < 10  # the points are still told apart
    stem = model.embed(cloud["inputs"]["points"], cloud["inputs"]["neighbors"])
    assert (features - stem).std() > 0.1  # and the blocks do something

    target = torch.randn(60, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(30):
        loss = (model(cloud) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for value in model.parameters():
                assert value.grad.isfinite().all() and value.grad.any()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---- several processes ---------------------------------------------------------------------------

def run_model(batch):
    """Outputs, gradients, statistics after two training steps, and outputs in evaluation.

    The model is the same in every process.
    """
    torch.manual_seed(1)
    model = WaffleIron(**SMALL, norm="batchnorm")
    points = batch["inputs"]["points"]
    model(with_points(batch, points + 1))
    points = points.clone().requires_grad_()
    output = model(with_points(batch, points))
    (output ** 3).sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    output_eval = model.eval()(batch).detach()
    return output.detach(), points.grad, gradients, dict(model.named_buffers()), output_eval


def run_rank(rank, folder):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.save(run_model(torch.load(f"{folder}/{rank}.pt")), f"{folder}/result{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_batchnorm_of_two_processes_is_that_of_one(tmp_path):
    # Of unequal size: a mean of the processes' means would be wrong.
    # Far from 0: E[x²] - E[x]² in float32 would be wrong.
    clouds = [random_cloud(30), random_cloud(18)]
    for rank, cloud in enumerate(clouds):
        cloud["inputs"]["points"] += 1000 + rank
        torch.save(cloud, tmp_path / f"{rank}.pt")
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"result{rank}.pt") for rank in range(2)]
    output, points_grad, gradients, buffers, output_eval = run_model(collate(clouds))

    def same(ours, expected):
        atol = 2e-3 * expected.abs().max().item() + 1e-5
        torch.testing.assert_close(ours, expected, rtol=0, atol=atol)
    same(torch.cat([rank[0] for rank in ranks]), output)
    same(torch.cat([rank[1] for rank in ranks]), points_grad)
    for name, gradient in gradients.items():
        same(ranks[0][2][name] + ranks[1][2][name], gradient)
    for rank in ranks:
        assert rank[3].keys() == buffers.keys()
        for name, buffer in buffers.items():
            same(rank[3][name].double(), buffer.double())
    same(torch.cat([rank[4] for rank in ranks]), output_eval)


def test_datasets_have_one_grid_and_one_number_of_neighbors():
    model = WaffleIron(channels=8, depth=1, out_channels=4)
    model.use({"a": SAMPLING | {"cell": 1.0}, "b": SAMPLING | {"cell": 1.0, "voxel": 0.4}})
    assert model.spec["grids"] == ((128, 128), (128, 16), (128, 16))
    with pytest.raises(InputError, match="a and b have planes of other sizes; give one --fov"):
        model.use({"a": SAMPLING, "b": SAMPLING | {"fov": (48, 48, 8)}})
    with pytest.raises(InputError, match="a and b have 16 and 6 neighbours; give one --neighbors"):
        model.use({"a": SAMPLING, "b": SAMPLING | {"neighbors": 6}})

"""The 3D encoder against the published one's outputs, and the invariants that make it fast."""
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import ROOT, SHARED
from torch.utils._python_dispatch import TorchDispatchMode
from waffleirons import seed  # noqa: F401 (a fixture)
from waffleirons import GRIDS, SMALL, load_golden, random_cloud

from waffleiron import BatchNorm, WaffleIron, from_released, plan_window, published

GOLDEN = [ROOT / "tests/golden/portable_layernorm.pt", ROOT / "tests/golden/portable_batchnorm.pt",
          SHARED / "golden/waffleiron_layernorm.pt", SHARED / "golden/waffleiron_batchnorm.pt"]
golden_files = pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)


def golden_clouds(golden):
    """The padded golden clouds as ragged ones: a list of (feats, cells, neighbors, batch)."""
    clouds = []
    for b, n in enumerate(golden["num_points"]):
        feats = golden["feats"][b, :, :n].T  # [N, 5]
        cells = golden["cell_ind"][b, :, :n]  # [3, N]
        neighbors = golden["neighbors"][b, 1:, :n].T  # [N, K], without the point itself
        clouds.append((feats, cells, neighbors, torch.zeros(n, dtype=torch.int64)))
    return clouds


def collate(clouds):
    """Clouds one after the other; neighbours then index rows of the whole batch."""
    feats, cells, neighbors, batch = zip(*clouds)
    sizes = [len(cloud) for cloud in feats]
    neighbors = [of_cloud + sum(sizes[:b]) for b, of_cloud in enumerate(neighbors)]
    batch = [of_cloud + b for b, of_cloud in enumerate(batch)]
    return torch.cat(feats), torch.cat(cells, 1), torch.cat(neighbors), torch.cat(batch)


# ---- parity with the published code --------------------------------------------------------------

@golden_files
def test_outputs_are_the_published_ones(path):
    golden = load_golden(path)
    model = from_released(golden["state_dict"], golden["grids"]).eval()
    for key in ("channels", "depth", "out_channels", "norm"):
        assert model.spec[key] == golden[key], key
    output = model(*collate(golden_clouds(golden)))
    padded = zip(golden["output"], golden["num_points"])
    expected = torch.cat([of_cloud[:, :n].T for of_cloud, n in padded])
    assert expected.abs().max() > 1
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)


@golden_files
def test_gradient_norms_are_the_published_ones(path):
    golden = load_golden(path)
    model = from_released(golden["state_dict"], golden["grids"]).eval()
    model(*golden_clouds(golden)[0]).square().mean().backward()
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
    clouds = [(feats.double(), *rest) for feats, *rest in clouds]
    together = model(*collate(clouds))
    alone = torch.cat([model(*cloud) for cloud in clouds])
    torch.testing.assert_close(together, alone)
    assert (together - together.mean(0)).abs().max() > 0.1


def test_the_order_of_the_rows_does_not_matter():
    clouds = [random_cloud(30), random_cloud(20, (0.0, 0.5), (0.3, 1.0))]
    feats, cells, neighbors, batch = collate(clouds)
    feats = feats.double()
    model = WaffleIron(**SMALL).double().eval()
    order = torch.randperm(len(feats))
    moved = order.argsort()[neighbors[order]]  # the neighbours' new rows
    shuffled = model(feats[order], cells[:, order], moved, batch[order])
    torch.testing.assert_close(shuffled, model(feats, cells, neighbors, batch)[order])


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
    feats, *rest = collate([random_cloud(25, low, high) for low, high in boxes])
    model = WaffleIron(**SMALL).double().eval()
    results = []
    for crop in (True, False):
        model.crop = crop
        x = feats.double().requires_grad_()
        output = model(x, *rest)
        gradients = torch.autograd.grad(output.square().sum(), [x, *model.parameters()])
        results.append((output, *gradients))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


def test_windows_are_no_larger_than_needed():
    # On a grid of 100 x 40, cloud 0 has rows 10 to 14 and columns 0 to 3,
    # and cloud 1 has row 99 and columns 38 and 39.
    cells = torch.tensor([10 * 40 + 0, 14 * 40 + 3, 14 * 40 + 3, 99 * 40 + 38, 99 * 40 + 39])
    batch = torch.tensor([0, 0, 0, 1, 1])
    window = plan_window(cells, batch, 2, (100, 40))
    assert window.shape == (2, 7, 6)  # 5 rows and 4 columns, and one more on each side
    assert window.weight.flatten().tolist() == [1, 0.5, 0.5, 1, 1]
    assert plan_window(cells, batch, 2, (100, 40), crop=False).shape == (2, 100, 40)


@pytest.mark.parametrize("cell", [-1, 24 * 20])
def test_cells_outside_the_grid_are_refused(cell):
    feats, cells, neighbors, batch = random_cloud(10)
    cells[0, 3] = cell
    with pytest.raises(ValueError, match="axis of 24 cells"):
        WaffleIron(**SMALL)(feats, cells, neighbors, batch)


# ---- training ------------------------------------------------------------------------------------

@pytest.mark.parametrize("head", ["linear", "batchnorm", "mlp"])
def test_features_are_what_the_head_reads(head):
    model = WaffleIron(**SMALL, head=head).eval()
    cloud = random_cloud(10)
    assert model.features(*cloud).shape == (10, 8)
    torch.testing.assert_close(model.head(model.features(*cloud)), model(*cloud))


def test_bfloat16_autocast_keeps_the_residual_stream_in_float32():
    model = WaffleIron(**SMALL).eval()
    cloud = random_cloud(200)
    expected = model(*cloud)

    # the dtype that enters each block
    streams = []
    for block in (*model.spatial_mix, *model.channel_mix):
        block.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(*cloud)
        assert model.features(*cloud).dtype == torch.float32
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
    _, cells, _, batch = random_cloud(20)
    window = plan_window(cells[0], batch, 1, GRIDS[0])
    with SumDtypes() as sums:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = block(torch.randn(20, 8), window)
        output.sum().backward()
    # points to plane, and the gradient of plane to points
    assert sums.seen == [torch.float32, torch.float32]


@pytest.mark.parametrize("silenced", ["spatial_mix", "channel_mix"])
def test_drop_path_drops_whole_clouds(silenced):
    size, clouds = 6, 200
    inputs = collate([random_cloud(size) for _ in range(clouds)])
    model = WaffleIron(**SMALL | {"depth": 1}, drop_path=0.25)
    with torch.no_grad():
        getattr(model, silenced)[0].scale.zero_()  # the other branch alone is left
        model.eval()
        whole = model.features(*inputs)
        stem = model.embed(inputs[0], inputs[2])
        model.train()
        model.embed.eval()  # BatchNorm as before
        factor = (model.features(*inputs) - stem) / (whole - stem)
        factor = factor.view(clouds, size, -1)

    # one factor a cloud: 0, or what keeps the mean at 1
    for cloud in factor:
        assert torch.allclose(cloud, cloud[0, 0].round(decimals=2), atol=0.02)
    kept = factor[:, 0, 0] > 0.5
    assert factor[:, 0, 0][kept].mean().item() == pytest.approx(1 / 0.75, abs=0.01)
    assert 130 <= kept.sum() <= 170  # of 200; 150 expected, standard deviation 6


def test_deep_random_model_is_alive_and_trains():
    model = WaffleIron(channels=16, depth=48, out_channels=4, grids=GRIDS)
    cloud = random_cloud(60)
    features = model.features(*cloud)
    assert features.isfinite().all()
    assert 0.1 < features.std(0).mean() < 10  # the points are still told apart
    assert (features - model.embed(cloud[0], cloud[2])).std() > 0.1  # and the blocks do something

    target = torch.randn(60, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(30):
        loss = (model(*cloud) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for value in model.parameters():
                assert value.grad.isfinite().all() and value.grad.any()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_linear_layer_and_a_batchnorm_are_one_linear_layer():
    x = (100 + torch.randn(50, 3).double() @ torch.randn(3, 3).double()).requires_grad_()
    linear = torch.nn.Linear(3, 6, bias=False).double()
    norm, norm_after = BatchNorm(6).double(), BatchNorm(6).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm_after.load_state_dict(norm.state_dict())

    def with_gradients(output, layer):
        inputs = [x, linear.weight, layer.weight, layer.bias]
        return output, *torch.autograd.grad((output ** 3).sum(), inputs)
    for mode in (True, True, False):  # the last one with the statistics of the others
        norm.train(mode)
        norm_after.train(mode)
        two_layers = with_gradients(norm(linear(x)), norm)
        one_layer = with_gradients(F.linear(x, *norm_after.after(linear, x)), norm_after)
        torch.testing.assert_close(two_layers, one_layer)
        torch.testing.assert_close(norm.state_dict(), norm_after.state_dict())


def test_variances_far_from_zero_are_those_of_float64():
    x = 1000 + torch.randn(200, 5)
    linear, norm = torch.nn.Linear(5, 6, bias=False), BatchNorm(6)
    norm.after(linear, x)
    expected = (x.double() @ linear.weight.double().T).var(0)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * expected, rtol=1e-3, atol=0)

    # Where W maps the inputs to zero, rounding must not make a variance below 0.
    flat = 1000 * torch.randn(200, 1) @ torch.randn(1, 5)
    with torch.no_grad():
        linear.weight -= linear.weight @ flat[:1].T @ flat[:1] / flat[0].square().sum()
    assert all(value.isfinite().all() for value in norm.after(linear, flat))


def test_bfloat16_autocast_leaves_batch_statistics_in_float32():
    linear, norm = torch.nn.Linear(5, 6, bias=False), BatchNorm(6)
    x = 10 + torch.randn(100, 5)
    expected = norm.after(linear, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(norm.after(linear, x), expected)


# ---- several processes ---------------------------------------------------------------------------

def test_batchnorm_is_torchs_own_with_one_process():
    ours, theirs = BatchNorm(4), torch.nn.BatchNorm1d(4)
    for _ in range(3):
        x = 5 + torch.randn(20, 4)
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


def run_model(inputs):
    """Outputs, gradients, statistics after two training steps, and outputs in evaluation.

    The model is the same in every process.
    """
    torch.manual_seed(1)
    model = WaffleIron(**SMALL, norm="batchnorm")
    feats, *rest = inputs
    model(feats + 1, *rest)
    feats = feats.clone().requires_grad_()
    output = model(feats, *rest)
    (output ** 3).sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    output_eval = model.eval()(*inputs).detach()
    return output.detach(), feats.grad, gradients, dict(model.named_buffers()), output_eval


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
    for rank, (feats, *_) in enumerate(clouds):
        feats += 1000 + rank
        torch.save(clouds[rank], tmp_path / f"{rank}.pt")
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"result{rank}.pt") for rank in range(2)]
    output, feats_grad, gradients, buffers, output_eval = run_model(collate(clouds))

    def same(ours, expected):
        atol = 2e-3 * expected.abs().max().item() + 1e-5
        torch.testing.assert_close(ours, expected, rtol=0, atol=atol)
    same(torch.cat([rank[0] for rank in ranks]), output)
    same(torch.cat([rank[1] for rank in ranks]), feats_grad)
    for name, gradient in gradients.items():
        same(ranks[0][2][name] + ranks[1][2][name], gradient)
    for rank in ranks:
        assert rank[3].keys() == buffers.keys()
        for name, buffer in buffers.items():
            same(rank[3][name].double(), buffer.double())
    same(torch.cat([rank[4] for rank in ranks]), output_eval)

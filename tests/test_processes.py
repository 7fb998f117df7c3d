"""Two processes are one: the gradients of a batch, and the frames that an epoch has left."""
import os
import socket

import pytest
import torch

from data import Frames, collate
from distill import distillation_loss
from plumbing import training
from readers.table import open_tables
from waffleiron import WaffleIron, plane_sizes, prepare


def gradients(world, items, distributed):
    """Gradients of stage 1's loss of this process's items, averaged over the processes."""
    (table,) = open_tables(str(world))
    table.sampling = table.sampling | {"fov": (48, 48, 8), "cell": 1, "neighbors": 4}
    frames = Frames([table.select("train")], "all", (80, 160), prepare, points="random")
    batch = collate([frames[0, number] for number in items])

    torch.manual_seed(0)
    grids = plane_sizes((48, 48, 8), 1)
    model = WaffleIron(channels=16, depth=3, out_channels=8, norm="batchnorm", grids=grids).double()
    if distributed:
        model = training.distribute(model, torch.device("cpu"))

    # any target that tells the points apart
    targets = torch.sin(batch["depths"].double()[:, None] * torch.arange(1, 9))  # [N, 8]
    batch["inputs"]["points"] = batch["inputs"]["points"].double()
    outputs = model(batch)
    loss = distillation_loss(targets, outputs, "2d_to_3d")
    loss = loss * training.share(len(targets), torch.device("cpu"))
    loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def one_of_two(rank, world, port, out, cache):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "XDG_CACHE_HOME": cache}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    items = [0, 1, 2] if rank == 0 else [3]  # of different size, too
    found = gradients(world, items, distributed=True)
    if rank == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(world, tmp_path):
    args = (world, free_port(), tmp_path / "two.pth", os.environ["XDG_CACHE_HOME"])
    torch.multiprocessing.spawn(one_of_two, args, nprocs=2)
    two = torch.load(tmp_path / "two.pth", weights_only=True)
    one = gradients(world, [0, 1, 2, 3], distributed=False)
    assert one.keys() == two.keys()
    for name in one:
        bound = 1e-6 * one[name].abs().max() + 1e-12
        assert (one[name] - two[name]).abs().max() <= bound, name


def test_the_frames_left_in_an_epoch_do_not_depend_on_the_number_of_processes(monkeypatch):
    def rest(processes):
        """Of each step, the sorted frames that the processes draw together."""
        monkeypatch.setattr(training, "world", lambda: processes)
        drawn = []
        for number in range(processes):
            monkeypatch.setattr(training, "rank", lambda: number)
            drawn.append(list(training.Batches(items=44, batch=4, first=7, last=11, seed=2)))
        return [sorted(sum(parts, [])) for parts in zip(*drawn)]
    assert rest(4) == rest(2) == rest(1)

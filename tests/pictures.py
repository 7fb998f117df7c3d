"""What the tests of pictures share: probes, scans and the texts of a legend."""
import numpy as np
import torch
from runs import probe_args

import probe
from data import set_sampling
from experiments import visualize
from models import load_point_encoder
from readers.nuscenes import CLASSES

SIZE = (80, 160)
CPU = torch.device("cpu")


def two_probes(world, out):
    """A probe of two steps for each task in 2D, on the miniature's encoder with random weights."""
    for task in ("seg", "depth"):
        more = ["--weights", "random", "--image-size", "80", "160", "--steps", "2"]
        probe.main(probe_args(world, task, "vit_mini8", out / task, *more))
    return out


def scans(table, first, wanted, count=3, radius=40):
    encoder, checkpoint = load_point_encoder(first)
    set_sampling([table], checkpoint["samplings"])
    numbers = [CLASSES.index(name) for name in wanted]
    rng = np.random.default_rng(0)
    return visualize.random_scans(table, encoder, numbers, count, radius, rng)


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]

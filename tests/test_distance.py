"""The distance of two conditions' features: by hand, and the command on a folder of pictures."""
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from runs import fails_with_one_line, open_one
from scipy.stats import ortho_group

from data import Frames
from experiments import distance
from experiments.distance import frechet
from models import load_image_encoder
from plumbing.errors import InputError

ENCODER = str(ROOT / "miniature/encoder.pth")
FLAGS = ["--image-size", "80", "160", "--device", "cpu"]


# ---- by hand -------------------------------------------------------------------------------------

def some_features(count=200, dim=5, seed=0):
    """Features whose channels depend on each other."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)


def round_features(spread, dim=4):
    """Features of the same variance in each direction: `spread` forth and back on each axis."""
    return spread * np.concatenate([np.eye(dim), -np.eye(dim)])


def test_equal_sets_have_no_distance():
    features = some_features()
    assert frechet(features, features) == pytest.approx(0, abs=1e-9)
    # The order of the cells is no part of it, nor how often all of them are there
    assert frechet(features, features[::-1]) == pytest.approx(0, abs=1e-9)


def test_a_shift_counts_by_its_square_in_parts_of_the_variance():
    features = some_features()
    shift = np.array([3.0, 0, -4, 0, 12])  # of length 13
    variance = features.var(0, ddof=1).sum()
    assert frechet(features, features + shift) == pytest.approx(169 / variance)


def test_another_spread_counts_by_the_square_of_its_difference():
    """D (a - b)^2 / (D a^2) for sets of the spreads a and b, so it matters which one is first."""
    assert frechet(round_features(2.0), round_features(5.0)) == pytest.approx(9 / 4)
    assert frechet(round_features(5.0), round_features(2.0)) == pytest.approx(9 / 25)
    # Along one axis alone, of four
    squeezed = round_features(2.0) * [0.5, 1, 1, 1]
    assert frechet(round_features(2.0), squeezed) == pytest.approx((2 - 1) ** 2 / (4 * 2**2))


def test_directions_count_even_where_the_variances_are_equal():
    """Spreads 3 and 1 that change places: 2 (3 - 1)^2 in parts of 3^2 + 1^2."""
    narrow = round_features(1.0, dim=2) * [3, 1]
    assert frechet(narrow, narrow[:, ::-1]) == pytest.approx(8 / 10)


def test_rotation_and_scale_of_both_change_nothing():
    day, night = some_features(seed=1), some_features(count=150, seed=2)
    turn = ortho_group.rvs(5, random_state=3)
    before = frechet(day, night)
    assert before > 0.1
    assert frechet(7 * day @ turn, 7 * night @ turn) == pytest.approx(before)


# ---- the command ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures of grain by day, and two darker ones by night."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, count, brightest in (("day", 3, 256), ("night", 2, 80)):
        (root / name).mkdir()
        for number in range(count):
            grain = rng.integers(0, brightest, (90, 170, 3), np.uint8)
            Image.fromarray(grain).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A checkpoint of the miniature's encoder with other weights."""
    content = torch.load(ENCODER, weights_only=True)
    generator = torch.Generator().manual_seed(1)
    for value in content["model"].values():
        value += 0.02 * torch.randn(value.shape, generator=generator)
    path = tmp_path_factory.mktemp("other") / "encoder.pth"
    torch.save(content, path)
    return str(path)


def of_cells(encoder, root, condition):
    """Features [cells, D] of a folder's pictures, each picture for itself."""
    frames = Frames([open_one(root, name="pictures")], image_size=(80, 160))
    found = []
    for number in range(len(frames)):
        item = frames[0, number]
        if frames.conditions[item["condition"]] == condition:
            with torch.no_grad():
                one = encoder(item["image"][None].float() / 255)[0]  # [D, h, w]
            found.append(one.permute(1, 2, 0).reshape(-1, encoder.dim).double().numpy())
    return np.concatenate(found)


@pytest.mark.slow
def test_one_number_an_encoder(pictures, other, tmp_path, capsys):
    out = tmp_path / "new/distance.json"
    distance.main(["--data", f"pictures={pictures}", "--encoders", ENCODER, other, "--out",
                   str(out), *FLAGS])
    found = json.loads(out.read_text())
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{name}: {number:.3f}" for name, number in zip((ENCODER, other), found)]
    for name, number in zip((ENCODER, other), found):
        encoder = load_image_encoder(name)
        day, night = (of_cells(encoder, pictures, condition) for condition in ("day", "night"))
        assert len(day) == 3 * 10 * 20 and len(night) == 2 * 10 * 20
        assert number == pytest.approx(frechet(day, night), rel=1e-3)
    assert len(found) == 2 and found[0] != pytest.approx(found[1], rel=1e-2)


@pytest.mark.slow
def test_the_first_condition_is_the_measure(pictures, tmp_path):
    found = {}
    for pair in (("day", "night"), ("night", "day"), ("night", "night")):
        out = tmp_path / f"{'-'.join(pair)}.json"
        distance.main(["--data", f"pictures={pictures}", "--encoders", ENCODER, "--conditions",
                       *pair, "--out", str(out), *FLAGS])
        (found[pair],) = json.loads(out.read_text())
    encoder = load_image_encoder(ENCODER)
    spreads = [of_cells(encoder, pictures, condition).var(0, ddof=1).sum()
               for condition in ("day", "night")]
    # The distance itself has no order, so its parts of either variance differ by these alone
    ratio = spreads[1] / spreads[0]
    assert found["day", "night"] == pytest.approx(found["night", "day"] * ratio, rel=1e-3)
    assert found["night", "night"] == pytest.approx(0, abs=1e-4)


def test_fewer_cells_than_channels_have_no_distance():
    many = np.random.default_rng(0).normal(size=(40, 8))
    for few in ((many[:8], many), (many, many[:8])):
        with pytest.raises(InputError, match="8 cells of 8 channels have no covariance"):
            frechet(*few)


def test_bad_input_is_one_line(pictures, capsys):
    def error(*argv):
        argv = ["--data", f"pictures={pictures}", "--encoders", ENCODER, *argv, *FLAGS]
        return fails_with_one_line(capsys, distance.main, argv)

    line = error("--conditions", "day", "dusk")
    assert f"--conditions dusk: --data pictures={pictures} has day, night" in line
    assert "has none" in error("--data", f"pictures={pictures}/day")  # it states no conditions
    assert "--conditions" in error("--conditions", "day")
    assert "neither a file nor a known encoder" in error("--encoders", "nothing")
    assert "pictures has no versions" in error("--version", "v1")
    assert "no such folder" in error("--data", f"pictures={pictures}/nowhere")

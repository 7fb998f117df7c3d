"""Any bytes at all in a file that is read: an error that names it in one line, or what they say."""
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import open_one

from plumbing.errors import InputError
from plumbing.weights import read
from readers.files import read_image, read_labels, read_scan
from readers.table import UNKNOWN

FUZZ = settings(max_examples=60, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture])
TABLES = ["sample_data", "ego_pose", "calibrated_sensor", "scene", "sample", "lidarseg", "category"]


def bytes_or_damaged(valid):
    """Any bytes, or the valid ones with a part cut off or overwritten."""
    length = len(valid)

    def overwritten(place):
        at, new = place
        return valid[:at] + new + valid[at + len(new):]
    cut = st.integers(0, length - 1).map(lambda at: valid[:at])
    places = st.tuples(st.integers(0, length - 1), st.binary(min_size=1, max_size=8))
    return st.one_of(st.binary(max_size=200), cut, places.map(overwritten))


def outcome(load, path):
    """What load() gives, or None after an error that names the file in one line."""
    try:
        return load()
    except InputError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return None


# ---- scans, labels, images -----------------------------------------------------------------------

@pytest.mark.parametrize("column", range(5))
def test_no_column_of_a_scan_may_hold_what_is_no_number(tmp_path, column):
    points = np.arange(50, dtype=np.float32).reshape(10, 5)
    points[3, column] = np.nan
    points.tofile(tmp_path / "scan.bin")
    assert outcome(lambda: read_scan(tmp_path / "scan.bin"), tmp_path / "scan.bin") is None


def is_good_scan(points):
    """Whether these points, [N, 5], are what a LiDAR may give."""
    x, y, z, intensity, ring = points.T
    with np.errstate(invalid="ignore"):
        near = np.abs([x, y, z]).max() <= 500
        in_range = intensity.min() >= 0 and intensity.max() <= 255
        rings = set(ring.tolist()) <= set(range(128))
        few_at_the_origin = (~points.T[:3].any(0)).sum() < 16
        scaled = intensity.max() > 1 or set(intensity.tolist()) <= {0, 1}
    return near and in_range and rings and few_at_the_origin and scaled


@FUZZ
@given(content=bytes_or_damaged(np.arange(50, dtype=np.float32).tobytes()))
def test_any_scan(tmp_path, content):
    path = tmp_path / "scan.bin"
    path.write_bytes(content)
    scan = outcome(lambda: read_scan(path), path)
    whole = len(content) > 0 and len(content) % 20 == 0
    points = np.frombuffer(content if whole else bytes(20), np.float32).reshape(-1, 5)
    good = whole and is_good_scan(points)
    assert (scan is not None) == good
    if good:  # then it is what the bytes say
        assert np.array_equal(scan, points[:, :4])


@FUZZ
@given(content=st.binary(max_size=40), count=st.integers(0, 40))
def test_any_labels(tmp_path, content, count):
    path = tmp_path / "labels.bin"
    coarse = np.full(256, UNKNOWN, np.uint8)
    coarse[:32] = np.arange(32) % 17
    path.write_bytes(content)
    classes = outcome(lambda: read_labels(path, coarse, count), path)
    good = len(content) == count and all(fine < 32 for fine in content)
    assert (classes is not None) == good
    if good:
        assert classes.tolist() == [fine % 17 for fine in content]


def valid_image(path, **options):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (24, 48, 3), dtype=np.uint8)).save(path, **options)
    return path.read_bytes()


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_any_image(tmp_path, ending):
    valid = valid_image(tmp_path / f"valid.{ending}")

    @FUZZ
    @given(content=bytes_or_damaged(valid))
    def check(content):
        path = tmp_path / f"image.{ending}"
        path.write_bytes(content)
        image = outcome(lambda: read_image(path, (12, 24), (24, 48)), path)
        assert image is None or image.shape == (3, 12, 24) and image.dtype == torch.uint8
    check()


# ---- checkpoints ---------------------------------------------------------------------------------

def is_data(value):
    """Whether it is made of tensors and plain containers only."""
    plain = (torch.Tensor, dict, list, tuple, str, bytes, int, float, bool, type(None))
    parts = []
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    elif type(value) in (list, tuple):
        parts = value
    return type(value) in plain and all(map(is_data, parts))


def test_any_checkpoint(tmp_path):
    content = {"kind": "probe", "step": 3, "weights": torch.arange(6.0)}
    torch.save(content, tmp_path / "valid.pth")
    valid = (tmp_path / "valid.pth").read_bytes()
    path = tmp_path / "last.pth"

    @FUZZ
    @given(content=bytes_or_damaged(valid))
    def check(content):
        path.write_bytes(content)
        found = outcome(lambda: read(path), path)
        assert found is None or is_data(found)
        # One that is cut is never taken for whole.
        assert found is None or content == valid or not valid.startswith(content)
    check()


# ---- tables and the index ------------------------------------------------------------------------

@pytest.mark.parametrize("table", TABLES)
def test_any_table(copy, table):
    path = copy / "v1.0-trainval" / f"{table}.json"
    valid = path.read_bytes()

    @settings(parent=FUZZ, max_examples=8)
    @given(content=bytes_or_damaged(valid))
    def check(content):
        path.write_bytes(content)
        found = outcome(lambda: open_one(copy), copy)
        assert found is None or len(found["scene"]) == len(found["scan"])
    check()


JSON = st.one_of(st.none(), st.integers(-2**40, 2**40), st.floats(), st.text(max_size=5),
                 st.lists(st.floats(-1, 1), max_size=4), st.just({}))


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_any_value_in_a_table(copy, table):
    path = copy / "v1.0-trainval" / f"{table}.json"
    valid = path.read_bytes()
    intact = open_one(copy)
    rows = json.loads(valid)
    fields = sorted(rows[0])

    @settings(parent=FUZZ, max_examples=25)
    @given(row=st.integers(0, len(rows) - 1), field=st.sampled_from(fields), value=JSON)
    def check(row, field, value):
        changed = json.loads(valid)
        changed[row][field] = value
        path.write_text(json.dumps(changed))
        found = outcome(lambda: open_one(copy), copy)
        # It is as it was but for the frames that are bad, or that the value is about.
        if found is not None:
            poses = found["cam_from_lidar"]
            assert poses.shape[1:] == intact["cam_from_lidar"].shape[1:]
            assert found["image_size"].dtype.kind == "i"
            assert (np.isfinite(poses).all((1, 2, 3)) | (found["bad"] != b"")).all()
    check()


def test_a_damaged_cache_is_made_anew(world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scenes = open_one(world)["scene"].tolist()
    for harm in (lambda file: file.write_bytes(b""), lambda file: file.unlink(),
                 lambda file: file.write_bytes(file.read_bytes()[:40])):
        harm(next((tmp_path / "cache").rglob("scene.npy")))
        assert open_one(world)["scene"].tolist() == scenes
    caches = list((tmp_path / "cache/collaborative-distillation").iterdir())
    assert len(caches) == 1  # and no rest of it stays

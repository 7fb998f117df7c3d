"""Scans and labels of points as KITTI keeps them: damage, other layouts, any bytes at all."""
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_semantickitti import LEARNING_MAP, opened, some_scan, write

from data import Frames
from plumbing.errors import InputError
from readers import kitti, semantickitti
from readers.files import RANGES, implausible
from waffleiron import prepare

FUZZ = settings(max_examples=60, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def home(tmp_path):
    """The folder of the sequences 00 and 08, of three frames each."""
    return write(tmp_path)


# ---- damage --------------------------------------------------------------------------------------

def cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


DAMAGE = {
    "velodyne/000001.bin": {0: "00/velodyne/000001.bin is empty; extract it again",
                            6399: "6399 bytes are not whole points of 4 floats; extract it again",
                            6384: "1600 bytes are not 4 for each of 399 points; extract it again"},
    "labels/000001.label": {0: "000001.label: 0 bytes are not 4 for each of 400 points; extract",
                            400: "8-bit labels. Write 32 bits a point, or extract it again",
                            1599: "1599 bytes are not 4 for each of 400 points; extract it again"},
    "image_2/000001.png": {0: "00/image_2/000001.png is empty; extract it again",
                           20: "00/image_2/000001.png is no picture; extract it again, and touch"}}


@pytest.mark.parametrize("file, size", [(file, size) for file in DAMAGE for size in DAMAGE[file]])
def test_damaged_files_are_bad_frames(home, file, size):
    whole = (home / "00" / file).read_bytes()
    cut(home / "00" / file, size)
    found = opened(home)
    with pytest.raises(InputError, match=f"--data {home}: 1 of 3 frames are bad, the first: .*"
                                         f"{DAMAGE[file][size]}") as error:
        found.select("train")
    assert "\n" not in str(error.value)
    assert str(error.value).count(str(home)) == 1
    assert len(found.select("val")) == 3
    skipping = Frames([found.select("train", skip_bad=True)], "image_2", (20, 50), prepare,
                      target="labels", skip_bad=True)
    assert [row for row, _ in skipping[0, 1]["bad"]] == [1]

    # A whole file is good again
    (home / "00" / file).write_bytes(whole)
    (home / "00" / file).parent.touch()
    assert len(opened(home).select("train")) == 3


def test_missing_labels_are_named(home):
    (home / "00/labels/000002.label").unlink()
    with pytest.raises(InputError, match="00/labels/000002.label is missing; extract the labels"):
        opened(home)
    shutil.rmtree(home / "00/labels")
    assert opened(home)["labels"].tolist()[:3] == [b""] * 3


SCANS = {
    "a good one": (lambda s: s, None),
    "dark": (lambda s: s * (1, 1, 1, 0.1), None),
    "one point": (lambda s: s[:1], None),
    "nothing": (lambda s: s[:0], "cut short: 0 bytes are not whole points of 4 floats; extract it"),
    "a point in part": (lambda s: s.astype("<f4").tobytes()[:-3], "cut short: 6397 bytes"),
    "intensities to 255": (lambda s: s * (1, 1, 1, 255), "intensity of point 0 is .*, not within "
                           r"0..1; SemanticPOSS\? Give --data semanticposs=PATH, or extract it ag"),
    "a negative one": (lambda s: s - (0, 0, 0, 1), "intensity of point 0 is -.*, not within 0..1"),
    "no number": (lambda s: np.where(s == s[5, 1], np.nan, s), "1 of 400 points are not finite"),
    "far away": (lambda s: s * 50, "x of point .*, not within -500..500"),
    "a hole": (lambda s: s * (np.arange(400) > 15)[:, None], "16 of 400 points are at x = y = z"),
    "flat": (lambda s: s * (1, 1, 0, 1), "z of all 400 points is 0"),
    "nuScenes' five": (lambda s: np.column_stack([s * (1, 1, 1, 255), np.arange(400) % 32]),
                       r"five columns \(nuScenes\)\? Write 32-bit little-endian floats x, y, z, i"),
    "64 bits": (lambda s: s.astype("<f8").tobytes(), r"64-bit floats\? Write 32-bit"),
    "big-endian": (lambda s: s.astype(">f4").tobytes(), r"big-endian floats\?"),
    "three columns": (lambda s: s[:, :3], r"three columns\?"),
    "zeros": (lambda s: bytes(6400), "zeros only, of a copy that was broken off"),
    "a pointer": (lambda s: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")}


@pytest.mark.parametrize("harm", SCANS)
def test_scans(tmp_path, harm):
    change, words = SCANS[harm]
    changed = change(some_scan().astype(float))
    content = changed if isinstance(changed, bytes) else changed.astype("<f4").tobytes()
    path = tmp_path / "000000.bin"
    path.write_bytes(content)
    if words is None:
        assert semantickitti.scan(path).tobytes() == content
        return
    with pytest.raises(InputError, match=f"{path}: .*{words}") as error:
        semantickitti.scan(path)
    assert "\n" not in str(error.value) and str(error.value).endswith("extract it again")


def test_what_is_plausible_at_first_sight_is_at_the_second():
    ranges = RANGES | {"intensity": (0, 1)}
    agreed = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        points = some_scan(seed, 150)
        rows = rng.choice(150, rng.integers(1, 150), replace=False)
        values = (0, 1, -0.001, 2, 499, -501, np.nan, np.inf, points[0, 0])
        points[rows[:, None], rng.choice(4, rng.integers(1, 5), replace=False)] = rng.choice(values)
        if kitti.plausible(points, ranges):
            assert implausible(points, ranges) == ""
            agreed += 1
    assert 10 < agreed < 290


# ---- any bytes -----------------------------------------------------------------------------------

@FUZZ
@given(count=st.integers(0, 60), seed=st.integers(0, 2**32), cut_off=st.integers(0, 40),
       wrong=st.sampled_from([None, np.nan, np.inf, -1.0, 1.5, 501.0]))
def test_any_scan_is_read_as_written_or_refused(tmp_path, count, seed, cut_off, wrong):
    points = some_scan(seed, count)
    if wrong is not None and count:
        points[seed % count, 3 if wrong in (-1.0, 1.5) else seed % 4] = wrong
    content = points.astype("<f4").tobytes()
    content = content[:max(0, len(content) - cut_off)]
    path = tmp_path / "scan.bin"
    path.write_bytes(content)
    left = points[:len(content) // 16]
    good = len(content) % 16 == 0 and len(left) > 0
    good = good and (wrong is None or bool(np.isfinite(left).all() and not (left == wrong).any()))
    try:
        scan = semantickitti.scan(path)
    except InputError as error:
        assert not good and str(path) in str(error) and "\n" not in str(error)
    else:
        assert good and np.array_equal(scan, left)


@FUZZ
@given(labels=st.lists(st.tuples(st.sampled_from([*LEARNING_MAP, 5, 300]),
                                 st.integers(0, 65535)), max_size=30),
       more=st.integers(-1, 1), cut_off=st.integers(0, 3))
def test_any_labels_are_masked_and_mapped_or_refused(tmp_path, labels, more, cut_off):
    path = tmp_path / "scan.label"
    content = b"".join(fine.to_bytes(2, "little") + number.to_bytes(2, "little")
                       for fine, number in labels)
    path.write_bytes(content[:max(0, len(content) - cut_off)])
    whole = more == 0 and (cut_off == 0 or not labels)
    good = whole and all(fine in LEARNING_MAP for fine, _ in labels)
    try:
        classes = semantickitti.labels(path, len(labels) + more)
    except InputError as error:
        assert not good and str(path) in str(error) and "\n" not in str(error)
    else:
        assert good and classes.tolist() == [LEARNING_MAP[fine] for fine, _ in labels]
        assert classes.dtype == np.uint8
        assert np.array_equal(classes, semantickitti.labels(path))

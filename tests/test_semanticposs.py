"""SemanticPOSS: class table, statistics of the intensity, tags, the held-out sequence, and that
scans without pictures are for probes alone."""
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import fails_with_one_line, open_one, probe_args, stage1_args
from test_semantickitti import some_scan, write_scan

import eval as evaluation
import probe
import stage1
from data import Frames, select
from plumbing.errors import InputError
from readers import semanticposs
from readers.table import UNKNOWN, main
from waffleiron import prepare

# Raw label: class, a second time
POSS_MAP = {4: 1, 5: 1, 6: 2, 7: 3, 8: 4, 9: 5, 10: 6, 11: 6, 12: 6, 13: 7, 14: 8, 15: 9, 16: 10,
            17: 11, 21: 12, 22: 13} | dict.fromkeys((0, 1, 2, 3, 18, 19, 20), 0)
NAMES = """person rider car trunk plants traffic-sign pole trashcan building cone/stone fence bike
    ground""".split()
RAW = (4, 5, 7, 9, 15, 22, 0)


def write(root, sequences=("00", "03"), frames=2, tags=True):
    """Sequences in root/dataset/sequences, numbered from 1 on; returns that folder."""
    home = root / "dataset/sequences"
    rng = np.random.default_rng(8)
    for sequence in sequences:
        for number in range(frames):
            name = f"{1 + number:06}"
            points = some_scan(number + 10 * int(sequence), 300 + 100 * number, 60)
            write_scan(home / sequence, name, points, RAW)
            if tags:
                tag = np.zeros(40 * 1800, bool)
                tag[rng.choice(len(tag), len(points), replace=False)] = True
                (home / sequence / "tag").mkdir(exist_ok=True)
                tag.tofile(home / sequence / f"tag/{name}.tag")
    return home


def opened(root, **options):
    """The `FrameTable` of a SemanticPOSS root."""
    return open_one(root, name="semanticposs", **options)


@pytest.fixture
def home(tmp_path):
    """The folder of the sequences 00 and 03, of two scans each."""
    return write(tmp_path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The root of such a dataset that no test changes."""
    root = tmp_path_factory.mktemp("poss")
    write(root)
    return root


def intensities(home):
    """Those of all scans, float64, read at once."""
    scans = [np.fromfile(path, "<f4").reshape(-1, 4) for path in home.glob("*/velodyne/*.bin")]
    return np.concatenate(scans)[:, 3].astype(float)


def test_every_raw_label_is_a_class_or_an_error(tmp_path):
    assert semanticposs.CLASSES == ("ignore", *NAMES)
    table = semanticposs.CLASS_TABLE
    assert len(table) == 65536
    assert {raw: int(table[raw]) for raw in np.flatnonzero(table != UNKNOWN)} == POSS_MAP
    path = tmp_path / "000001.label"
    (np.array([*POSS_MAP]) + (300 << 16)).astype("<u4").tofile(path)
    assert semanticposs.labels(path, len(POSS_MAP)).tolist() == [*POSS_MAP.values()]
    np.array([4, 40], "<u4").tofile(path)  # a road of SemanticKITTI
    with pytest.raises(InputError, match=f"{path}: label 40 is of no class of this dataset"):
        semanticposs.labels(path, 2)


def test_files_are_listed_not_counted(home):
    for root in (home, home.parent, home.parent.parent):
        found = opened(root)
        assert found["scan"].tolist() == [
            f"{sequence}/velodyne/00000{number}.bin".encode()
            for sequence in ("00", "03") for number in (1, 2)]
    assert found.select("train").scenes() == ["00"]
    assert found.select("val").scenes() == ["03"]
    write(home.parent.parent, ("06",))  # not of SemanticPOSS
    assert len(opened(home)) == 4


def test_sequences_03_alone_is_held_out():
    assert [name for name, split in semanticposs.SPLIT_OF.items() if split == "val"] == ["03"]
    assert sorted(semanticposs.SPLIT_OF) == ["00", "01", "02", "03", "04", "05"]


# ---- intensity -----------------------------------------------------------------------------------

def test_statistics_are_those_of_all_points_at_once(home, capsys):
    found = opened(home)
    expected = intensities(home)
    assert found["intensity"].tolist() == pytest.approx([expected.mean(), expected.std()])
    assert found.sampling["intensity"] == tuple(found["intensity"])
    main("semanticposs", ["--data", str(home)])
    mean, deviation = expected.mean(), expected.std()
    assert (f"mean {mean:.3f}, standard deviation {deviation:.3f}; no pictures: for --task seg3d"
            in capsys.readouterr().out)

    # Of two frames too, where a column of two rows would look like one of frames
    for path in home.glob("00/*/*"):
        path.unlink()
    few = opened(home)
    assert len(few) == 2 and few["intensity"][0] == pytest.approx(intensities(home).mean())
    ending = few.select("val").fingerprint()
    assert ending["frames"] == 2


def test_standardised_intensities_have_mean_0_and_deviation_1(root):
    found = opened(root)
    inputs = []
    for frame in range(len(found)):
        scan = semanticposs.scan(found.path("scan", frame))
        mean, deviation = found.sampling["intensity"]
        inputs.append((scan[:, 3] - mean) / deviation)
    inputs = np.concatenate(inputs)
    assert inputs.mean() == pytest.approx(0, abs=1e-5) and inputs.std() == pytest.approx(1)


def test_a_dark_sensor_is_not_divided_by_nearly_nothing(tmp_path):
    home = write(tmp_path, ("03",), frames=1)
    points = some_scan(1, 300, 1)
    points[:, 3] = 7
    points[0, 3] = 8
    points.tofile(home / "03/velodyne/000001.bin")
    assert opened(tmp_path)["intensity"][1] == 1


def test_a_damaged_scan_does_not_count_and_is_named(home):
    path = home / "00/velodyne/000001.bin"
    points = np.fromfile(path, "<f4").reshape(-1, 4)
    points[5, 3] = np.nan
    points.tofile(path)
    found = opened(home)
    others = [np.fromfile(other, "<f4").reshape(-1, 4)[:, 3]
              for other in home.glob("*/velodyne/*.bin") if other != path]
    assert found["intensity"][0] == pytest.approx(np.concatenate(others).mean())
    frames = Frames(select([found], "train"), "scan", None, prepare, "labels")
    with pytest.raises(InputError, match=f"{path}: 1 of 300 points are not finite numbers"):
        frames[0, 0]


def test_remissions_of_kitti_are_refused(home):
    for path in home.glob("*/velodyne/*.bin"):
        points = np.fromfile(path, "<f4").reshape(-1, 4)
        points[:, 3] /= 60
        points.tofile(path)
    with pytest.raises(InputError, match=r"000001.bin: intensities of 0..\S+, not 0..255; Semantic"
                                         r"KITTI\? Give --data semantickitti=PATH, or extract it"):
        opened(home)


@settings(max_examples=40, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 40), seed=st.integers(0, 2**32),
       wrong=st.sampled_from([None, np.nan, -1.0, 255.5]))
def test_any_scan_is_read_as_written_or_refused(tmp_path, count, seed, wrong):
    points = some_scan(seed, count, 255)
    points[0, 3] = max(points[0, 3], 2)
    if wrong is not None:
        points[seed % count, 3] = wrong
    points.tofile(tmp_path / "scan.bin")
    try:
        scan = semanticposs.scan(tmp_path / "scan.bin")
    except InputError as error:
        assert wrong is not None and "scan.bin" in str(error)
    else:
        assert wrong is None and np.array_equal(scan, points)


# ---- tags, damage --------------------------------------------------------------------------------

def test_tags_mark_as_many_points_as_there_are(home):
    tag = home / "03/tag/000002.tag"
    content = bytearray(tag.read_bytes())
    content[content.index(1)] = 0
    tag.write_bytes(content)
    found = opened(home)
    message = ("1 of 2 frames are bad, the first: 03/tag/000002.tag marks 399 points, "
               "03/velodyne/000002.bin has 400; extract both again")
    with pytest.raises(InputError, match=message):
        found.select("val")
    tag.unlink()  # they need not be there
    assert len(opened(home).select("val")) == 2


def test_damaged_files_are_bad_frames(home):
    path = home / "03/labels/000001.label"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="03/labels/000001.label: 1196 bytes are not 4 for each of "
                                         "300 points; extract it again"):
        opened(home).select("val")
    (home / "00/velodyne/000001.bin").write_bytes(b"")
    with pytest.raises(InputError, match="bad, the first: 00/velodyne/000001.bin is empty"):
        opened(home).select("train")


def test_wrong_roots_are_named(tmp_path):
    with pytest.raises(InputError, match="give the folder into which you extracted SemanticPOSS"):
        opened(tmp_path)
    (tmp_path / "training/velodyne").mkdir(parents=True)
    with pytest.raises(InputError, match="this is KITTI detection"):
        opened(tmp_path)


# ---- scripts -------------------------------------------------------------------------------------

def test_stage_1_says_that_there_are_no_pictures(root, tmp_path, capsys):
    line = fails_with_one_line(
        capsys, stage1.main, stage1_args(f"semanticposs={root}", tmp_path / "s1", "--steps", "1"))
    assert re.search("semanticposs.*no (pictures|images|cameras?)", line)
    assert not (tmp_path / "s1").exists()


@pytest.mark.slow
def test_probe_and_table(root, first, tmp_path):
    out = tmp_path / "probe"
    probe.main([*probe_args(f"semanticposs={root}", "seg3d", first, out), "--steps", "2"])
    result = evaluation.evaluate(out, torch.device("cpu"), workers=0)
    assert set(result["mIoU"]) == {"full"}
    assert set(result["IoU"]["full"]) <= set(NAMES)

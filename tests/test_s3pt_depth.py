"""Depth maps: IP-Basic by results written out, published outputs and OpenCV; projected scans;
real frames where they are there."""
import numpy as np
import pytest
import torch
from conftest import SHARED
from runs import open_one

from s3pt import depth
from s3pt.depth import BLURS, FILLS, LidarDepth, complete, map_size, projected

VARIANTS = [(fill, blur) for fill in FILLS for blur in BLURS]
GOLDEN = SHARED / "golden/ip_basic.pt"

# One point of 7 m at row 5, column 5. By hand: the diamond of radius 2, grown by 3 on each side,
# then only the pixels with 13 of 25 neighbours, the border's repeated
ONE = """
.777777777..
7777777777..
7777777777..
77777777777.
77777777777.
77777777777.
77777777777.
77777777777.
7777777777..
7777777777..
...77777....
............"""

# The same of one point of 7 m at row 5, column 6, and one of 3 m at row 9, column 2
TWO = """
..777777777.
..7777777777
.77777777777
777777777777
333777777777
333777777777
333377777777
333337777777
333333777777
333333337777
3333333377..
333333337..."""


def sparse(shape=(37, 61), share=0.06, seed=0, top=10):
    """A map of random points between 2 and 70 m, without any in its upper rows."""
    rng = np.random.default_rng(seed)
    depths = np.where(rng.random(shape) < share, rng.uniform(2, 70, shape), 0)
    depths[:top] = 0
    return depths.astype(np.float32)


def drawn(depths):
    """A map as text: whole metres, a dot where there is none."""
    lines = ["".join("." if value == 0 else str(round(value)) for value in row)
             for row in depths.tolist()]
    return "\n" + "\n".join(lines)


# ---- IP-Basic ------------------------------------------------------------------------------------

def test_maps_of_one_and_two_points_are_as_written_out():
    one = np.zeros((12, 12), np.float32)
    one[5, 5] = 7
    assert drawn(complete(one, "fast", "none")) == ONE
    two = np.zeros((12, 12), np.float32)
    two[5, 6] = 7
    two[9, 2] = 3
    assert drawn(complete(two, "fast", "none")) == TWO


def test_the_published_completion_gives_the_same():
    if not GOLDEN.is_file():
        pytest.skip("no published outputs here")
    golden = torch.load(GOLDEN, weights_only=True)
    given = golden.pop("input").numpy()
    fills = {("fast", "False"): "fast", ("fast", "True"): "extended",
             ("multiscale", "False"): "multiscale", ("multiscale", "True"): "multiscale-extended"}
    assert len(golden) == 8
    for name, expected in golden.items():
        variant, extend, blur = (part.rpartition("=")[2] for part in name.rsplit("_", 2))
        result = complete(given, fills[variant, extend], blur)
        np.testing.assert_allclose(result, expected.numpy(), atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.parametrize("fill, blur", VARIANTS)
def test_what_holds_for_every_variant(fill, blur):
    given = sparse()
    before = given.copy()
    result = complete(given, fill, blur)
    assert result.dtype == np.float32 and result.shape == given.shape
    assert (given == before).all() and not np.shares_memory(given, result)
    assert (result > 0).mean() > 2 * (given > 0).mean()
    # Mirrored, and in double precision
    mirrored = complete(given[:, ::-1].astype(np.float64), fill, blur)
    np.testing.assert_allclose(mirrored[:, ::-1], result, atol=2e-5)
    # Nothing where nothing is; as it is where all is there
    assert not complete(np.zeros_like(given), fill, blur).any()
    np.testing.assert_allclose(complete(np.full((9, 14), 42.5), fill, blur), 42.5, rtol=1e-6)
    # What is no distance, or too far, is as if it were not there
    strange = given.copy()
    strange[5:9, 20:24] = [99.8, 250, np.inf, np.nan]
    strange[2, 2:4] = [-3, 0.05]
    np.testing.assert_array_equal(complete(strange, fill, blur), result)
    assert np.isnan(strange).any() and strange[2, 2] == -3
    if blur == "gaussian":  # which is written where there is something
        np.testing.assert_array_equal(result > 0, complete(given, fill, "none") > 0)


@pytest.mark.parametrize("fill", FILLS)
def test_without_a_blur_all_values_are_the_inputs(fill):
    given = sparse(seed=1)
    result = complete(given, fill, "none")
    known = np.unique(given)
    nearest = known[np.abs(result[..., None] - known).argmin(-1)]
    np.testing.assert_allclose(result, nearest, atol=1e-5)
    assert np.isin(result, 0).any() == (not fill.endswith("extended"))


def test_near_wins_over_far_where_both_reach():
    near, far = np.zeros((2, 16, 20), np.float32)
    near[8, 7] = 5
    far[8, 10] = 50
    for row in (5, 11):  # rows that only the second dilation reaches
        assert (complete(near, "fast", "none")[row, 7:11] == 5).all()
        assert (complete(far, "fast", "none")[row, 7:11] == 50).all()
        assert (complete(near + far, "fast", "none")[row, 7:11] == 5).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 3), (4, 33), (40, 8)])
def test_maps_smaller_than_the_windows(shape):
    given = np.zeros(shape, np.float32)
    given[-1, -1] = 8
    for fill, blur in VARIANTS:
        result = complete(given, fill, blur)
        assert result.shape == shape and np.isfinite(result).all()
        if max(shape) == 1:
            assert result[0, 0] == pytest.approx(8)


@pytest.mark.parametrize("fill, metres, up, down", [
    ("fast", 20, 5, 5), ("extended", 20, 30, 20),                             # 2 + 3, then 15
    ("multiscale", 10, 3, 19), ("multiscale", 20, 2, 18), ("multiscale", 40, 1, 17),
    ("multiscale-extended", 40, 30, 17)])                          # 1, 2 or 3, then 4 + 6 * 2
def test_how_many_rows_a_row_of_points_reaches(fill, metres, up, down):
    given = np.zeros((60, 8), np.float32)
    given[30] = metres
    rows = np.flatnonzero(complete(given, fill, "none").any(1))
    assert (rows[0], rows[-1], len(rows)) == (30 - up, 30 + down, up + down + 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 2), (6, 40), (33, 47)])
def test_each_window_is_opencvs(shape):
    cv2 = pytest.importorskip("cv2")
    x = sparse(shape, 0.4, seed=3, top=0)
    ones, plus = np.ones((5, 5), np.uint8), np.zeros((7, 7), np.uint8)
    plus[3] = plus[:, 3] = 1
    diamond = np.array([[0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0],
                        [0, 0, 1, 0, 0]], np.uint8)
    exact = [(depth.cross(x, 7), cv2.dilate(x, plus)),
             (depth.cross(depth.cross(x, 3), 3), cv2.dilate(x, diamond)),
             (depth.closed(x), cv2.morphologyEx(x, cv2.MORPH_CLOSE, ones)),
             (depth.median(x), cv2.medianBlur(x, 5))]
    for ours, theirs in exact:
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(depth.gaussian(x), cv2.GaussianBlur(x, (5, 5), 0), atol=2e-5)
    np.testing.assert_allclose(depth.bilateral(x, 1.5), cv2.bilateralFilter(x, 5, 1.5, 2.0),
                               atol=5e-5)


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="cubic"):
        complete(sparse(), "cubic")
    with pytest.raises(ValueError, match="median"):
        complete(sparse(), "fast", "median")


# ---- projection ----------------------------------------------------------------------------------

def test_projected_points_by_hand():
    # x ahead, y left, z up, as LiDARs have it; the camera looks ahead
    ahead = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    intrinsics = np.array([[100, 0, 80], [0, 100, 40], [0, 0, 1.0]])
    points = np.array([[20, -2, -1], [10, -1, -0.5],    # both at row 45, column 90
                       [10, 5, 0], [-10, 1, 0], [10, 100, 0]])  # behind; out of the picture
    expected = np.zeros((20, 40), np.float32)
    expected[11, 22] = 10
    expected[10, 7] = 10
    for order in (points, points[::-1]):
        result = projected(order, ahead, intrinsics, np.array([80, 160]), (20, 40))
        np.testing.assert_allclose(result, expected)
    assert not projected(points[3:], ahead, intrinsics, (80, 160), (20, 40)).any()


def test_maps_are_a_quarter_of_large_pictures():
    assert map_size(np.array([900, 1600])) == (225, 400)
    assert map_size((1080, 1920)) == (270, 480)
    assert map_size((600, 1000)) == (150, 250)
    assert map_size((599, 1000)) == (599, 1000)
    assert map_size((80, 160)) == (80, 160)


# ---- real frames ---------------------------------------------------------------------------------

def shares(table, frame, camera, scale):
    """(share of pixels with points, of pixels filled, of points within 0.5 m of the result)."""
    scan = table.reader.scan(table.path("scan", frame))
    raw = table["image_size"][frame, camera]
    points = projected(scan[:, :3], table["cam_from_lidar"][frame, camera],
                       table["intrinsics"][frame, camera], raw, tuple(raw // scale))
    result = complete(points)
    there = points > 0
    return there.mean(), (result > 0.1).mean(), (np.abs(result - points)[there] < 0.5).mean()


@pytest.mark.slow
def test_a_real_keyframe(real, tmp_path):
    table = open_one(real, "v1.0-mini")
    cameras = range(len(table.cameras))
    quarter = np.array([shares(table, 0, camera, 4) for camera in cameras])
    assert (quarter[:, 0] < 0.06).all() and (quarter[:, 1] > 0.6).all()
    assert (quarter[:, 2] > 0.85).all()
    full = shares(table, 0, 0, 1)
    assert full[1] < 0.25 and quarter[0, 1] > 2 * full[1]
    # The upper quarter of the front picture is sky, and stays so
    result = LidarDepth(folder=tmp_path)(table, 0, 0)
    assert result.shape == (225, 400) and not result[:40].any() and (result[160:220] > 0).all()


@pytest.mark.slow
def test_a_real_frame_of_64_beams():
    root = SHARED / "real/pandaset"
    if not root.is_dir():
        pytest.skip("no real frames here")
    table = open_one(root, name="pandaset64")
    frame = int(np.flatnonzero(table["scene"] == b"902")[0])
    points, filled, close = shares(table, frame, 0, 4)
    assert points < 0.15 and filled > 0.6 and close > 0.7

"""PandaSet's frames for tests: good ones, ones with another part, and how they are refused; scenes
whose points are known in the vehicle's frame."""
import gzip
import json

import numpy as np
import pytest
from PIL import Image
from runs import open_one
from scipy.spatial.transform import Rotation

from experiments.lay_out import lay_out
from miniature.pandaset_files import DTYPE, SLICE, Made, frame_of, pickled, write_frame
from plumbing.errors import InputError
from readers.pandaset import CAMERAS
from readers.pickles import POINTS, read_frame

FLOATS = Made(DTYPE, ("f8", 0, 1), (3, "<", None, None, None, -1, -1, 0))
OBJECTS = Made(DTYPE, ("O8", 0, 1), (3, "|", None, None, None, -1, -1, 63))
SIZES = [(90, 160), (60, 100), (72, 128), (48, 64), (90, 120), (54, 96)]  # of the six cameras


def laid_out(panda, out):
    """A miniature PandaSet as experiments/real.py lays it out.

    Both tables are cached by this process, which is sooner.
    """
    lay_out(open_one(panda, name="pandaset64"), out)
    open_one(out, name="pandaset64")


# ---- pickles -----------------------------------------------------------------------------------

def some_columns(count=20, seed=0):
    """A frame of points as PandaSet has them, of two sensors in any order."""
    rng = np.random.default_rng(seed)
    columns = dict(zip("xyz", rng.normal(0, 100, (3, count))))
    columns["i"] = rng.integers(0, 256, count).astype(float)
    columns["t"] = 1.557e9 + rng.random(count)
    return columns | {"d": rng.integers(0, 2, count)}


def write_pickle(path, content):
    path.write_bytes(gzip.compress(content, 1))
    return path


def refusal(path, columns=POINTS):
    """The one line with which a file is refused."""
    with pytest.raises(InputError) as error:
        read_frame(path, columns)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "download it again" in message
    return message


def layout_of(frame):
    """The part of a frame's state that is read: its axes and blocks."""
    return frame.state["_data"].state[3]["0.14.1"]


def with_array(array, places=Made(SLICE, (0, 5, 1))):
    """A frame's pickle with another array in the place of its floats."""
    frame = frame_of(some_columns(), None)
    layout_of(frame)["blocks"][0] = {"values": array, "mgr_locs": places}
    return pickled(frame)


# ---- scenes ------------------------------------------------------------------------------------

def pose_of(rng, spread):
    """A random pose, as a matrix and as poses.json has it."""
    turn = Rotation.random(random_state=rng)
    matrix = np.eye(4)
    matrix[:3, :3] = turn.as_matrix()
    matrix[:3, 3] = rng.normal(0, spread, 3)
    x, y, z, w = turn.as_quat()
    record = {"position": dict(zip("xyz", matrix[:3, 3])),
              "heading": {"w": w, "x": x, "y": y, "z": z}}
    return matrix, record


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_scene(root, name, latitude, frames=("00", "02"), labelled=True, seed=0):
    """A scene. Returns {frame: (points in the vehicle's frame [N, 4], of the sensor [N], raw)}.

    The vehicle's frame is the pose's: the shift of 1.6 m is not done. Frames may have gaps.
    """
    rng = np.random.default_rng(seed)
    count = int(max(frames)) + 1
    scene = root / name
    poses = [pose_of(rng, 1000) for _ in range(count)]
    write_json(scene / "lidar/poses.json", [record for _, record in poses])
    write_json(scene / "meta/gps.json", [{"lat": latitude, "long": -122.4}] * count)
    for camera, size in zip(CAMERAS, SIZES):
        folder = scene / "camera" / camera
        write_json(folder / "poses.json", [pose_of(rng, 1000)[1] for _ in range(count)])
        write_json(folder / "intrinsics.json", {"fx": 100.5, "fy": 101, "cx": 50, "cy": 40.25})
        for frame in frames:
            Image.new("RGB", size[::-1], (9, 99, 199)).save(folder / f"{frame}.jpg")

    # Both LiDARs' points in any order
    there = {}
    for frame in frames:
        points = np.column_stack([rng.uniform(-60, 60, (300, 3)), rng.integers(0, 256, 300)])
        sensor = rng.integers(0, 2, 300)
        raw = rng.integers(0, 43, 300)
        matrix = poses[int(frame)][0]
        world = points[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]
        columns = dict(zip("xyz", world.T)) | {"i": points[:, 3], "t": np.arange(300.0)}
        write_frame(scene / f"lidar/{frame}.pkl.gz", columns | {"d": sensor}, "index")
        if labelled:
            (scene / "annotations/semseg").mkdir(parents=True, exist_ok=True)
            write_frame(scene / f"annotations/semseg/{frame}.pkl.gz", {"class": raw})
        there[frame] = points, sensor, raw
    return there


def write_dataset(root):
    """Two scenes with labels, on both sides of the latitude, and one without.

    Returns {scene: what `write_scene` gave}.
    """
    return {"003": write_scene(root, "003", 37.77, seed=1),
            "017": write_scene(root, "017", 37.42, ("01", "05", "06"), seed=2),
            "040": write_scene(root, "040", 37.77, labelled=False, seed=3)}

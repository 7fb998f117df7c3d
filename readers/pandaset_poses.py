"""PandaSet's JSON files: poses, intrinsics, latitudes.

They stand in folders of a scene; see readers/pandaset.py.
"""
import functools
import json
import os

import numpy as np

from plumbing.errors import InputError
from plumbing.files import read_bytes, unreadable
from readers.pickles import AGAIN

NORTH = 37.6  # degrees: the scenes of San Francisco train, those of El Camino Real validate
# What values of another kind or number than expected raise
OTHER_VALUES = (LookupError, TypeError, ValueError, OverflowError)


def dated(path):
    """A file's path, size and date, by which what was read of it is kept."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error, AGAIN) from None
    return str(path), status.st_size, status.st_mtime_ns


def read_json(path):
    """What a JSON file says. Raises InputError if it is not there or damaged."""
    try:
        return json.loads(read_bytes(path, AGAIN))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no readable JSON ({error}); {AGAIN}") from None


@functools.lru_cache(maxsize=None)
def read_poses(path, size, date):
    """The poses of a poses.json, sensor -> world: float64 [P, 4, 4]; NaN where one is none."""
    try:
        records = [(record["position"], record["heading"]) for record in read_json(path)]
        places = [[place[axis] for axis in "xyz"] for place, _ in records]
        turns = [[turn[part] for part in "wxyz"] for _, turn in records]
        places = np.array(places, float).reshape(-1, 3)
        turns = np.array(turns, float).reshape(-1, 4)
    except OTHER_VALUES:
        raise InputError(f"{path}: no list of positions x, y, z and headings w, x, y, z; "
                         f"{AGAIN}") from None

    # What is no rotation makes its frames bad, not the whole scene
    length = np.linalg.norm(turns, axis=1, keepdims=True)
    turns[~(abs(length[:, 0] - 1) < 1e-3)] = np.nan

    # A quaternion (w, v) turns e to e + 2 w (v x e) + 2 v x (v x e)
    turns = turns / length
    cross = np.cross(turns[:, None, 1:], np.eye(3)).transpose(0, 2, 1)  # [P, 3, 3]
    poses = np.tile(np.eye(4), (len(places), 1, 1))
    poses[:, :3, :3] += 2 * turns[:, :1, None] * cross + 2 * cross @ cross
    poses[:, :3, 3] = places
    return poses


def pose_at(poses, path):
    """The pose of a frame by the number in its file's name; NaN where there are fewer poses."""
    number = int(path.name[:2])
    return poses[number] if number < len(poses) else np.full((4, 4), np.nan)


def inverse_of(pose):
    """The inverse of a rotation and shift [4, 4]."""
    turn = pose[:3, :3].T
    inverse = np.eye(4)
    inverse[:3, :3] = turn
    inverse[:3, 3] = -turn @ pose[:3, 3]
    return inverse


def read_intrinsics(path):
    """[3, 3] of an intrinsics.json."""
    record = read_json(path)
    try:
        fx, fy, cx, cy = (float(record[name]) for name in ("fx", "fy", "cx", "cy"))
        good = min(fx, fy) > 0 and np.isfinite([fx, fy, cx, cy]).all()
    except OTHER_VALUES:
        good = False
    if not good:
        raise InputError(f"{path}: no lengths and centre fx, fy, cx, cy; {AGAIN}")
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def split_of(path):
    """"train" or "val", by the first latitude of a scene's gps.json."""
    records = read_json(path)
    try:
        latitude = float(records[0]["lat"])
    except OTHER_VALUES:
        latitude = np.nan
    if not -90 <= latitude <= 90:
        raise InputError(f"{path}: no latitude (lat) in its first entry, which tells training and "
                         f"validation; {AGAIN}")
    return "train" if latitude > NORTH else "val"

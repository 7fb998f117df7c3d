"""Conditions of one's own: ROOT/conditions.json gives scenes of any dataset a condition.

    {"scene-0061": "fog", "scene-0103": "fog", "scene-0553": "day-rain"}
"""
import json
import re
from pathlib import Path

import numpy as np

from plumbing.errors import InputError

FILE = "conditions.json"
COPY = "corrupted.json"  # of a copy that experiments/copies.py made: its arguments


def is_name(name):
    """Whether a condition may have this name: "full" and "all" are all frames."""
    return re.fullmatch(r"[\w-][\w -]*", name) is not None and name not in ("full", "all")


def read_conditions(path):
    """{scene: condition} of a file. Raises InputError for another file."""
    try:
        named = json.loads(path.read_bytes())
        wrong = sorted(name for name in named.values() if not is_name(name))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the user of this run the right to read "
                         "it") from None
    except (ValueError, AttributeError, TypeError, RecursionError):
        named = {}
    if not named:
        raise InputError(f"{path}: not of the form {{scene: condition}}; write it anew, or remove "
                         "it")
    if wrong:
        raise InputError(f"{path}: {wrong[0]!r} cannot be a condition's name; letters, digits, _, "
                         "- and spaces can be in one, and full and all are all frames")
    return named


def named_conditions(reader, roots, columns):
    """(names of the conditions, index of each frame's or None for those of the table).

    roots: as it was given, and where the table's paths begin.
    ROOT/conditions.json, {scene: condition}, replaces what the dataset says. Where there are no
    scenes, images' paths stand for them. Frames that it does not name keep their condition; a
    dataset that states none must name all. Raises InputError for another file, and for a scene that
    is not there.
    """
    names = list(getattr(reader, "CONDITIONS", ()))
    if "conditions" in columns:
        names = np.char.decode(columns["conditions"]).tolist()
    path = next((Path(root, FILE) for root in roots if Path(root, FILE).exists()), None)
    if path is None:
        return names, None
    named = read_conditions(path)
    scenes = scenes_of(columns)
    unknown = named.keys() - set(scenes)
    if unknown:
        raise InputError(f"{path}: {min(unknown)} is no scene of this dataset; it has "
                         f"{', '.join(sorted(set(scenes))[:3])}, ...")
    names += sorted(set(named.values()) - set(names))
    of_frame = columns["condition"].tolist() if "condition" in columns else [None] * len(scenes)
    for frame, scene in enumerate(scenes):
        if scene in named:
            of_frame[frame] = names.index(named[scene])
        elif of_frame[frame] is None:
            raise InputError(f"{path}: says nothing of {scene}; the dataset states no conditions, "
                             "so name all of its scenes")
    return names, np.array(of_frame)


def scenes_of(columns):
    """The name of each frame's scene, or the path of its image where there are no scenes."""
    column = columns["scene"] if "scene" in columns else columns["image"][:, 0]
    return np.char.decode(column).tolist()


def made_by(root):
    """What a copy's files were made by, for its fingerprint: [bytes]; [] of what is no copy.

    The place of what it is a copy of does not count.
    """
    path = Path(root, COPY)
    if not path.is_file():
        return []
    try:
        arguments = json.loads(path.read_bytes())
        return [repr(sorted((arguments | {"data": None}).items())).encode()]
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError(f"{path}: damaged; make the copy anew") from None

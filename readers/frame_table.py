"""The frames of a dataset: its columns, the choice of some frames, what they are."""
import importlib
import os

import numpy as np

from plumbing.errors import InputError
from plumbing.fingerprint import digest
from readers.conditions import made_by
from readers.paths import all_there, ends_of
from readers.summary import summary_of


class FrameTable:
    """The frames `rows` of a dataset. `table["image"]` is a column, of all frames.

    name: of the dataset. reader: its module. conditions: names, to which "condition" has indices.
    sampling: how its scans become points; SAMPLING unless a script sets another. options: of the
    reader, as version.
    """

    def __init__(self, reader, root, columns, conditions=(), rows=None):
        self.reader = reader
        self.name = reader.__name__.rpartition(".")[2]
        self.root = str(root)
        self.columns = columns
        self.conditions = tuple(conditions)
        self.rows = np.arange(len(columns["split"])) if rows is None else rows
        self.sampling = getattr(reader, "SAMPLING", None)
        # Measured statistics stand beside the frames, and count as the dataset's own
        if "intensity" in columns:
            self.sampling = self.sampling | {"intensity": tuple(columns["intensity"].tolist())}
        self.options = {}
        self.cameras = []
        if "cameras" in columns:
            self.cameras = [name.decode() for name in columns["cameras"]]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, column):
        return self.columns[column]

    def __contains__(self, column):
        return column in self.columns

    def __getstate__(self):  # for loading processes: a module cannot be sent, its name can
        return self.__dict__ | {"reader": self.reader.__name__}

    def __setstate__(self, state):
        self.__dict__.update(state, reader=importlib.import_module(state["reader"]))

    def only(self, rows):
        """The same dataset with other rows."""
        other = FrameTable(self.reader, self.root, self.columns, self.conditions, rows)
        other.sampling = self.sampling
        other.options = self.options
        return other

    def path(self, column, *place):
        """The file of a column of paths, at (frame,) or (frame, camera)."""
        return os.path.join(self.root, self.columns[column][place].decode())

    def labels(self, frame, count=None):
        """Classes of a frame's `count` points [A], or of its pixels [H, W]."""
        if hasattr(self.reader, "labels_of"):
            return self.reader.labels_of(self.root, self.columns, frame)
        return self.reader.labels(self.path("labels", frame), count)

    def select(self, split, conditions=None, percent=100, skip_bad=False):
        """The frames of a split, or of "all", under these conditions (default: all).

        percent: only every (100 / percent)-th scene of the split counts, in the order of the
        dataset's own table. This is what SLidR's public loader does: 1 % are the 100th, 200th, ...
        700th of nuScenes' 700 training scenes. Of a dataset without scenes, or whose SHARE is
        "frames", it is every so many-th frame, from the first on. A dataset that states no
        conditions is taken whole; conditions that it does not know are another dataset's.
        Raises InputError if there is no such frame and, unless skip_bad, if one of them is bad.
        """
        of_split = (self["split"][self.rows] == split.encode()) | (split == "all")
        rows = self._share(self.rows[of_split], split, 100 // percent)
        if conditions is not None and self.conditions:
            numbers = [number for number, name in enumerate(self.conditions) if name in conditions]
            rows = rows[np.isin(self["condition"][rows], numbers)]
        if len(rows) == 0:
            under = f" under {', '.join(conditions or self.conditions)}" if self.conditions else ""
            flags = "".join(f" --{name} {value}" for name, value in self.options.items())
            raise InputError(f"--data {self.root}: no frame of split '{split}'{under}; `python -m "
                             f"readers.{self.name} --data {self.root}{flags}` prints what is there")
        chosen = self.only(rows)
        if not skip_bad:
            chosen.refuse_bad()
        return chosen

    def refuse_bad(self):
        """Raise InputError if one of the frames is bad."""
        if "bad" not in self:
            return
        bad = self["bad"][self.rows]
        bad = bad[bad != b""]
        if len(bad):
            raise InputError(f"--data {self.root}: {len(bad)} of {len(self)} frames are bad, the "
                             f"first: {bad[0].decode()}")

    def _share(self, rows, split, every):
        """The rows of every so many-th scene, or frame."""
        if self.share == "frames":
            return rows[::every]
        names, first = np.unique(self["scene"][rows], return_index=True)
        scenes = names[first.argsort()][every - 1::every]
        if len(names) and len(scenes) == 0:
            raise InputError(f"--percent {100 // every}: every {every}th scene is taken, and "
                             f"--data {self.root} has only {len(names)} of split '{split}'; "
                             "leave --percent out")
        return rows[np.isin(self["scene"][rows], scenes)]

    @property
    def share(self):
        """What --percent takes every so many-th of: "scenes" or "frames"."""
        return getattr(self.reader, "SHARE", "scenes" if "scene" in self else "frames")

    def scenes(self):
        """The names of the scenes that the frames are of; none where the dataset has no scenes."""
        if "scene" not in self:
            return []
        return np.char.decode(np.unique(self["scene"][self.rows])).tolist()

    def fingerprint(self, labels=False):
        """What the tables say of these frames (and their labels): see plumbing/fingerprint.py."""
        parts = [b"\n".join(self["record"][self.rows])]
        if labels and "labels" in self:
            parts.append(b"\n".join(self["labels"][self.rows]))
        if labels and "label_map" in self:
            parts.append(self["label_map"].tobytes())
        if "stated" in self and (self["stated"] != self["condition"])[self.rows].any():
            names = [self.conditions[number] for number in self["condition"][self.rows]]
            parts.append(repr(names).encode())
        parts += made_by(self.root)
        counts = {"frames": len(self.rows)}
        if "scene" in self:
            counts["scenes"] = len(self.scenes())
        return counts | {"tables": digest(parts)}

    def files(self, labels=False):
        """A hash of the files of these frames. Raises InputError if one is missing.

        It is of the images' sizes, of the scans' sizes and ends and, with `labels`, of all labels.
        """
        parts = []
        if "image" in self:
            images = all_there(self.root, self["image"][self.rows].flatten())
            parts.append(repr([file.stat().st_size for file in images]).encode())
        if "scan" in self:
            parts += map(ends_of, all_there(self.root, self["scan"][self.rows]))
        if labels and "labels" in self:
            parts += [file.read_bytes() for file in all_there(self.root, self["labels"][self.rows])]
        return digest(parts)

    def require(self, cameras, target):
        """Raise InputError where there is no such camera or target, or frames have no labels.

        cameras, target: as of `data.Frames`.
        """
        # What there is to choose from
        known = [*(["random", "all"] if "image" in self else []),
                 *(["scan"] if "scan" in self else []), *self.cameras]
        if cameras not in known:
            without = f"; {self.name} has no other"
            if "image" not in self:
                without = f"; {self.name} has no pictures there, which both stages need"
            raise InputError(f"--cameras {cameras}: choose one of {', '.join(known)}{without}")
        if target == "depths" and "scan" not in self:
            raise InputError(f"--data {self.root}: {self.name} has no depths")
        if target != "labels" or hasattr(self.reader, "labels_of"):
            return
        # Labels are asked of each frame, because they may be there for a part of them
        if "labels" not in self:
            raise InputError(f"--data {self.root}: {self.name} has no labels")
        paths = self["labels"]
        unlabelled = np.count_nonzero(paths[self.rows] == b"")
        if unlabelled:
            raise InputError(f"--data {self.root}: {unlabelled} of {len(self)} frames have no "
                             "labels; they may be in an archive of their own (nuScenes: "
                             "lidarseg; Cityscapes: gtFine_trainvaltest.zip)")

    def summary(self):
        """The counts per split and condition as a printable table, and the dataset's notes."""
        return summary_of(self)

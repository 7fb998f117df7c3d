"""What every dataset gives: a table of its frames, kept in a cache; and the choice of some of them.

A dataset is a file readers/NAME.py, and `--data NAME=PATH` names it. Of these names a reader has
those that its data has:

    CLASSES     of labels, "ignore" first: class 0 is never learnt
    SAMPLING    how a scan becomes a 3D encoder's input; with entries "probe" and "finetune" that
                replace values for these tasks
    CONDITIONS  columns of the results, in order; without it there is one, "full"
    LEFT_OUT    {condition: classes left out of its mean IoU}
    sources(root, **options)        files that the table is made of; InputError for a wrong root
    table(root, **options)          {column: array}, read once and cached
    check(root, **options)          InputError where files beside the frames' own are wrong
    damage(root, columns, frame)    what is wrong with a frame's files, in words; "" for nothing
    scan(path)                      [A, 4]: x, y, z [m], intensity
    labels(path, count=None)        classes, uint8: [A] of a scan's `count` points, [H, W] of pixels
    labels_of(root, columns, frame) the same where the labels stand in the table itself

It ends in `if __name__ == "__main__": main(NAME)`, with `main` of this file.

The columns of a table have a row a frame (F frames of C cameras). Strings are bytes (UTF-8), paths
are relative to root. The first three are in every table:

    split [F] b"train", b"val" or b"test"; image [F, C] paths; image_size [F, C, 2] height, width
    scene [F]; condition [F] index into CONDITIONS; scan [F] path; labels [F] path, b"" where there
    are none; cam_from_lidar [F, C, 4, 4]; intrinsics [F, C, 3, 3]
    cameras [C] names; label_map, what else the classes depend on; notes, lines to print
    record [F] hash of all that the dataset's tables say of the frame; the cache makes it of the
    columns where the reader does not
    bad [F] b"", or why the frame cannot be used: the cache asks `damage`
"""
import contextlib
import functools
import importlib
import inspect
import os
import re
from pathlib import Path

import numpy as np

from plumbing.arguments import Parser
from plumbing.errors import InputError, one_line_errors
from plumbing.fingerprint import digest
from readers.cache import cached
from readers.conditions import made_by, named_conditions

UNKNOWN = 255  # class of a label that is of no category


# ---- the table ---------------------------------------------------------------------------------

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
        """The frames of a split under these conditions (default: all).

        percent: only every (100 / percent)-th scene of the split counts, in the order of the
        dataset's own table. This is what SLidR's public loader does: 1 % are the 100th, 200th, ...
        700th of nuScenes' 700 training scenes. Of a dataset without scenes it is every so many-th
        frame, from the first on. A dataset that states no conditions is taken whole; conditions
        that it does not know are another dataset's.
        Raises InputError if there is no such frame and, unless skip_bad, if one of them is bad.
        """
        of_split = self["split"][self.rows] == split.encode()
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
        if "scene" not in self:
            return rows[::every]
        names, first = np.unique(self["scene"][rows], return_index=True)
        scenes = names[first.argsort()][every - 1::every]
        if len(names) and len(scenes) == 0:
            raise InputError(f"--percent {100 // every}: every {every}th scene is taken, and "
                             f"--data {self.root} has only {len(names)} of split '{split}'; "
                             "leave --percent out")
        return rows[np.isin(self["scene"][rows], scenes)]

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
        images = all_there(self.root, self["image"][self.rows].flatten())
        sizes = [file.stat().st_size for file in images]
        parts = [repr(sizes).encode()]
        if "scan" in self:
            parts += map(ends_of, all_there(self.root, self["scan"][self.rows]))
        if labels and "labels" in self:
            parts += [file.read_bytes() for file in all_there(self.root, self["labels"][self.rows])]
        return digest(parts)

    def summary(self):
        """The counts per split and condition as a printable table, and the dataset's notes."""
        about = [f"{len(self)} frames", f"{self['image'].shape[1]} cameras"]
        if "labels" in self:
            labelled = self["labels"][self.rows] != b""
            how_many = "yes" if labelled.all() else "in part" if labelled.any() else "no"
            about.append(f"labels: {how_many}")
        width = max(10, *map(len, self.conditions)) if self.conditions else 10
        # A line for each split and condition that has frames
        lines = [f"{self.root}: {', '.join(about)}",
                 f"  {'split':6} {'condition':{width}} scenes  frames  images"]
        for split in np.unique(self["split"][self.rows]):
            of_split = self.rows[self["split"][self.rows] == split]
            for number, name in enumerate(self.conditions or ("full",)):
                rows = of_split
                if self.conditions:
                    rows = of_split[self["condition"][of_split] == number]
                if len(rows):
                    scenes = len(self.only(rows).scenes()) or "-"
                    images = self["image"][rows].size
                    lines.append(f"  {split.decode():6} {name:{width}} {scenes:>6}  {len(rows):6}  "
                                 f"{images:6}")
        notes = np.char.decode(self["notes"]).tolist() if "notes" in self else []
        return "\n".join([*lines, *notes])


def check_conditions(tables, conditions):
    """Raise InputError for a condition that none of these tables knows."""
    known = list(dict.fromkeys(name for table in tables for name in table.conditions))
    unknown = [name for name in conditions or () if name not in known]
    if known and unknown:
        roots = " and ".join(table.root for table in tables)
        raise InputError(f"--conditions {unknown[0]}: --data {roots} has {', '.join(known)}")


# ---- opening -----------------------------------------------------------------------------------

@functools.cache
def datasets():
    """The names that --data takes: of the files in readers/ that have a table."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if re.search(r"^def table\(root", file.read_text(), re.M)]


def entries(data):
    """[(name of a dataset, path)] that --data says: NAME=PATH, with commas between.

    What does not begin with the name of a reader is a nuScenes root as a whole, even with = or , in
    it.
    """
    names = "|".join(datasets())
    if not re.match(rf"({names})=", data):
        return [("nuscenes", data)]
    return [tuple(part.split("=", 1)) for part in re.split(rf",(?=(?:{names})=)", data)]


def open_tables(data, version=None, look=True, here=False):
    """The `FrameTable`s of what --data says, from the cache unless their sources have changed.

    data: as --data, or what `entries` made of it.
    version: of datasets that have versions; the default is the reader's.
    look: True looks at every file anew. None looks at the tables' content only, where the caller
        looks at the files that it needs. False trusts the cache and looks only at the frames that
        were bad; it is for training.
    here: read in this process what is not cached. Else the reader, run as a script, does that, so
        that a training process never holds the dataset's own tables.
    Raises InputError for a wrong root or version and for files that the tables name but that are
    not there.
    """
    found = entries(data) if isinstance(data, str) else data
    for name, path in found:
        if not Path(path).exists():
            names = " or ".join(f"{name}=" for name in datasets())
            hint = f"; each dataset begins with {names}" if set(str(path)) & set("=,") else ""
            raise InputError(f"--data {path}: no such folder{hint}")
    readers = [importlib.import_module(f"readers.{name}") for name, _ in found]
    versioned = [has_versions(reader) for reader in readers]
    if version and not any(versioned):
        raise InputError(f"--version {version}: {found[0][0]} has no versions; leave it out")
    tables = []
    for reader, (_, path), takes_it in zip(readers, found, versioned):
        options = {"version": version} if version and takes_it else {}
        tables.append(_open(reader, Path(path).resolve(), options, look, here))
        tables[-1].options = options
    return tables


def has_versions(reader):
    """Whether a dataset's reader, a module or its name, takes a version."""
    if isinstance(reader, str):
        reader = importlib.import_module(f"readers.{reader}")
    return "version" in inspect.signature(reader.table).parameters


def _open(reader, root, options, look, here):
    """One `FrameTable`; see `open_tables`."""
    columns = cached(reader, root, options, here, look is not False)
    conditions, of_frame = named_conditions(reader, root, columns)
    if of_frame is not None:  # and what the dataset states, for the fingerprint
        columns["stated"] = columns.get("condition", np.full(len(of_frame), -1))
        columns["condition"] = of_frame
    table = FrameTable(reader, root, columns, conditions)
    if look:
        if hasattr(reader, "check"):
            reader.check(root, **options)
        for column in ("scan", "labels", "image"):
            if column in columns:
                all_there(root, [path for path in columns[column].flat if path])

    # Since the cache was written, a file may have been damaged or repaired
    if hasattr(reader, "damage"):
        reasons = columns["bad"].tolist()
        asked = np.flatnonzero(bool(look) | (columns["bad"] != b""))
        for frame in asked:
            reasons[frame] = reader.damage(root, columns, frame).encode()
        columns["bad"] = np.array(reasons, np.bytes_)
    return table


# ---- reading tables ----------------------------------------------------------------------------

@contextlib.contextmanager
def damage_named(root, version):
    """Make an InputError of whatever goes wrong here: damaged tables can raise nearly anything."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except ImportError as error:
        raise InputError(f"nuscenes-devkit cannot be imported ({error}); "
                         "pip install -r requirements.txt") from None
    except Exception as error:
        reason = (f"--data {root}: nuscenes-devkit cannot read {version} "
                  f"({type(error).__name__}: {error}); extract its tables again")
        raise InputError(reason.replace("\n", " ")) from None


def as_bytes(strings):
    """Nested lists of strings, in any language, as an array of UTF-8 bytes."""
    array = np.array(strings, np.str_)
    return np.char.encode(array, "utf-8") if array.size else array.astype(np.bytes_)


def spread(rows, limit):
    """At most `limit` of these rows, evenly spread; all of them if it is None."""
    if limit is None or limit >= len(rows):
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).round().astype(int)]


# ---- the files that a table names --------------------------------------------------------------

def check_files(root, paths, way_out="extract all archives of this version into this folder"):
    """Raise InputError if one of these files, relative to `root`, is missing or lies outside it."""
    outside = [path for path in paths if os.path.isabs(path) or ".." in Path(path).parts]
    if outside:
        raise InputError(f"--data {root}: the tables name {outside[0]}, which is outside of this "
                         "folder; do not trust this dataset")
    missing = [path for path in paths if not os.path.isfile(os.path.join(root, path))]
    if missing:
        raise InputError(f"--data {root}: {len(missing)} of {len(paths)} files that the tables "
                         f"name are missing, the first is {missing[0]}; {way_out}")


def all_there(root, paths):
    """The files of these paths (bytes, relative to `root`). Raises InputError if one is missing."""
    check_files(root, [path.decode() for path in paths])
    return [Path(root, path.decode()) for path in paths]


def size_of(root, path):
    """The bytes of a file, 0 if there is none."""
    file = os.path.join(root, path)
    return os.path.getsize(file) if os.path.isfile(file) else 0


def ends_of(path, count=4096):
    """The size of a file, its first bytes and its last ones, as bytes."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        begin = file.read(count)
        file.seek(max(0, size - count))
        return size.to_bytes(8, "little") + begin + file.read()


# ---- readers as scripts ------------------------------------------------------------------------

@one_line_errors
def main(name, argv=None):
    """`python -m readers.NAME --data ROOT`: look at every file, print the counts."""
    reader = importlib.import_module(f"readers.{name}")
    parser = Parser(reader.__doc__, prog=f"python -m readers.{name}")
    parser.add_argument("--data", required=True, help="root of the dataset")
    version = inspect.signature(reader.table).parameters.get("version")
    if version:
        default = version.default or "all that are there"
        parser.add_argument("--version", help=f"version folder (default: {default})")
    args = parser.parse_args(argv)
    (table,) = open_tables([(name, args.data)], getattr(args, "version", None), here=True)
    print(table.summary())
    if "bad" in table:
        for reason in table["bad"][table["bad"] != b""]:
            print(f"bad: {reason.decode()}")

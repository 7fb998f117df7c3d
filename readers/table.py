"""What every dataset gives: a table of its frames, kept in a cache; and the choice of some of them.

A dataset is a file readers/NAME.py, and `--data NAME=PATH` names it. Of these names a reader has
those that its data has:

    CLASSES       of labels, "ignore" first: class 0 is never learnt
    SAMPLING      how a scan becomes a 3D encoder's input; with entries "probe" and "finetune" that
                  replace values for these tasks
    CONDITIONS    columns of the results, in order; without it the frames' condition is unstated,
                  and there is one column, "full"
    LEFT_OUT      {condition: classes left out of its mean IoU}
    CAMERAS       () where there are never pictures
    SHARE         "frames" where --percent takes every so many-th frame, not scene
    PAPER_FRAMES  {split: number of frames that the papers give}, printed beside what is there
    home(root)                      where the table's paths begin, if not at the root that is given
    sources(root, **options)        files that the table is made of, and folders whose names count;
                                    InputError for a wrong root
    table(root, **options)          {column: array}, read once and cached
    check(root, **options)          InputError where files beside the frames' own are wrong
    damage(root, columns, frame)    what is wrong with a frame's files, in words; "" for nothing
    scan(path)                      [A, 4]: x, y, z [m], intensity
    labels(path, count=None)        classes, uint8: [A] of a scan's `count` points, [H, W] of pixels
    labels_of(root, columns, frame) the same where the labels stand in the table itself
    ALL_CLASSES, all_labels_of      the same with classes that a probe leaves out (dense.py)

It ends in `if __name__ == "__main__": main(NAME)`, with `main` of this file.

The columns of a table have a row a frame (F frames of C cameras). Strings are bytes (UTF-8), paths
are relative to root. The first is in every table, and scan or image:

    split [F] b"train", b"val" or b"test"; image [F, C] paths; image_size [F, C, 2] height, width
    scene [F]; condition [F] index into CONDITIONS; scan [F] path; labels [F] path, b"" where there
    are none; cam_from_lidar [F, C, 4, 4]; intrinsics [F, C, 3, 3]
    cameras [C] names; label_map, what else the classes depend on; notes, lines to print
    conditions [K] names, in the place of CONDITIONS where only the data know them
    intensity [2] mean and standard deviation, where SAMPLING's are to be measured
    record [F] hash of all that the dataset's tables say of the frame; the cache makes it of the
    columns where the reader does not
    bad [F] b"", or why the frame cannot be used: the cache asks `damage`
"""
import contextlib
import difflib
import functools
import importlib
import inspect
import re
import sys
from pathlib import Path

import numpy as np

from plumbing.arguments import Parser
from plumbing.errors import InputError, one_line_errors, say
from readers.cache import BAD_FRAMES, cached
from readers.conditions import named_conditions
from readers.frame_table import FrameTable
from readers.paths import all_there
from readers.summary import some_of

UNKNOWN = 255  # class of a label that is of no category


# ---- which frames --------------------------------------------------------------------------------

def check_conditions(tables, conditions):
    """Raise InputError for a condition that none of these tables knows.

    Where they state none at all, they are taken whole under the names that other datasets have:
    those may be a script's default.
    """
    stated = list(dict.fromkeys(name for table in tables for name in table.conditions))
    known = stated
    if conditions and not stated:
        readers = [importlib.import_module(f"readers.{name}") for name in datasets()]
        known = [name for reader in readers for name in getattr(reader, "CONDITIONS", ())]
    unknown = [name for name in conditions or () if name not in known]
    if not unknown:
        return
    roots = " and ".join(table.root for table in tables)
    if stated:
        raise InputError(f"--conditions {unknown[0]}: --data {roots} has {', '.join(stated)}")
    raise InputError(f"--conditions {unknown[0]}: --data {roots} states no conditions; leave the "
                     "flag out, or name them in conditions.json there")


def hold_out(tables, names):
    """Make these scenes the validation split; all others of their datasets train. Returns tables.

    names: NAME, or DATASET:NAME, of --val-scenes; or None. What a dataset's own split calls test
    stays so, and a dataset of which no scene is named keeps its split. Raises InputError for a
    scene that no dataset has, or more than one, and where no scene is left to train on.
    """
    # Which dataset each scene is of; only one may have it
    held = {}  # dataset: its scenes
    there = {}
    for table in tables:
        there.setdefault(table.name, set()).update(table.scenes())
    for given in names or ():
        owners = [name for name in there if given.removeprefix(f"{name}:") in there[name]]
        if len(owners) > 1:
            both = " or ".join(f"{name}:{given}" for name in owners)
            raise InputError(f"--val-scenes {given}: {' and '.join(owners)} have that scene; give "
                             f"{both}, or all of them")
        if not owners:
            known = "; ".join(f"{name} has {some_of(sorted(there[name])) or 'no scenes'}"
                              for name in there)
            raise InputError(f"--val-scenes {given}: no such scene; {known}")
        scene = given.removeprefix(f"{owners[0]}:")
        held.setdefault(owners[0], []).append(scene.encode())

    # All roots of a dataset are split alike
    for table in tables:
        if table.name in held:
            split = table["split"].astype("S5")  # of "val" alone it would cut "train"
            split[split != b"test"] = b"train"
            split[np.isin(table["scene"], held[table.name])] = b"val"
            table.columns = table.columns | {"split": split}
    # Both sides must have frames; the held out have them by their names
    for name in held:
        if not any((table["split"] == b"train").any() for table in tables if table.name == name):
            raise InputError(f"--val-scenes: no scene of {name} is left to train on; name fewer of "
                             f"{some_of(sorted(there[name]))}")
    return tables


def known_scenes(names, tables):
    """Those of these names of --val-scenes that the tables have; None for none."""
    there = {f"{table.name}:{scene}" for table in tables for scene in table.scenes()}
    there |= {name.partition(":")[2] for name in there}
    return [name for name in names or () if name in there] or None


def say_if_held_out(path, stage1, names, tables):
    """A line where stage 1, whose checkpoint this is, had a split of its own and `names` is none.

    Scenes that validate here may be what it has learnt from.
    """
    held = known_scenes(stage1.get("val_scenes"), tables)
    if held and not names:
        say(f"{path}: stage 1 had --val-scenes {' '.join(held)}; here the split is the dataset's "
            "own, unless the flag is given here too")


def check_cameras(found):
    """Raise InputError for a dataset that never has pictures, or never LiDAR: stages need both.

    found: what `entries` gives.
    """
    for name, path in found:
        reader = importlib.import_module(f"readers.{name}")
        if getattr(reader, "CAMERAS", None) == ():
            raise InputError(f"--data {path}: {name} has no cameras, and both stages need "
                             "pictures; it is for probe.py --task seg3d and for eval.py")
        if not hasattr(reader, "scan"):
            raise InputError(no_scans(path, reader))


def no_scans(path, reader):
    """The words for a dataset without LiDAR where it is needed. reader: its module."""
    use = "it is for features of images (docs/run.md)"
    if hasattr(reader, "CLASSES"):
        use = "probe.py --task seg takes it"
    return (f"--data {path}: {reader.__name__.rpartition('.')[2]} has no LiDAR scans, which both "
            f"stages and seg3d need; {use}")


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
    check_entries(found)
    readers = [importlib.import_module(f"readers.{name}") for name, _ in found]
    versioned = [has_versions(reader) for reader in readers]
    if version and not any(versioned):
        raise InputError(f"--version {version}: {found[0][0]} has no versions; leave it out")
    tables = []
    for reader, (_, path), takes_it in zip(readers, found, versioned):
        options = {"version": version} if version and takes_it else {}
        tables.append(_open(reader, Path(path).resolve(), options, look, here))
        tables[-1].options = options
    # One root at two of its levels is the same dataset
    places = [(table.name, table.root) for table in tables]
    for name, root in places:
        if places.count((name, root)) > 1:
            raise InputError(f"--data {name}={root}: given twice; its frames would count double")
    return tables


def check_entries(found):
    """Raise InputError for a path that is not there, an unknown name, and one root given twice."""
    seen = set()
    for name, path in found:
        if not str(path):
            raise InputError(f"--data {name}=: no path; give {name}=PATH")
        if not Path(path).exists():
            raise InputError(f"--data {path}: no such folder{_hint(str(path))}")
        place = name, Path(path).resolve()
        if place in seen:
            raise InputError(f"--data {name}={path}: given twice; its frames would count double")
        seen.add(place)


def _hint(path):
    """What may be wrong with a path that holds NAME=, in words; "" where it holds none."""
    known = datasets()
    for name in re.findall(r"(?:^|,)(\w+)=", path):
        near = difflib.get_close_matches(name, known, n=len(known), cutoff=0.0)
        if name not in known:
            return f"; {name} is no dataset that is known: {', '.join(near)}"
    if set(path) & set("=,"):
        return f"; each dataset begins with {' or '.join(f'{name}=' for name in known)}"
    return ""


def has_versions(reader):
    """Whether a dataset's reader, a module or its name, takes a version."""
    if isinstance(reader, str):
        reader = importlib.import_module(f"readers.{reader}")
    return "version" in inspect.signature(reader.table).parameters


def _open(reader, root, options, look, here):
    """One `FrameTable`; see `open_tables`."""
    given = root
    if hasattr(reader, "home"):
        root = reader.home(root)
    columns = cached(reader, root, options, here, look is not False, given)
    conditions, of_frame = named_conditions(reader, (given, root), columns)
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


# ---- readers as scripts ------------------------------------------------------------------------

@one_line_errors
def main(name, argv=None):
    """`python -m readers.NAME --data ROOT`: print the counts and the frames that are bad.

    Each file has to be there, and has to have its size. What is in it is looked at when it is
    used. The exit code is BAD_FRAMES where there are some.
    """
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
        reasons = table["bad"][table["bad"] != b""]
        for reason in reasons:
            print(f"bad: {reason.decode()}")
        if len(reasons):
            sys.exit(BAD_FRAMES)


@one_line_errors
def shared(file, names):
    """`python -m readers.FILE` of what the datasets `names` share: refused, because it is none."""
    raise InputError(f"readers/{file}.py is what {' and '.join(names)} share and no dataset; run "
                     f"python -m readers.{names[0]} or python -m readers.{names[1]}")

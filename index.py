"""Which frames there are: nuScenes' tables read once, through nuscenes-devkit, into a small cache of arrays.

    python index.py --data /data/nuscenes       # build the index, look at every file, print the counts
"""
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from plumbing.arguments import Parser
from errors import InputError, one_line_errors
from plumbing.fingerprint import digest

UNKNOWN = 255  # class of a fine label that no category has
FORMAT = 5  # of the cache: count up when what is stored changes
STRINGS = {"scene", "split", "lidar", "lidarseg", "image", "record", "bad"}  # fields of `Index` that are bytes arrays
CONDITIONS = ("day-clear", "day-rain", "night")
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
CLASSES = ("ignore", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian", "traffic_cone",
           "trailer", "truck", "driveable_surface", "other_flat", "sidewalk", "terrain", "manmade", "vegetation")


@dataclasses.dataclass
class Index:
    """F frames (keyframes) of C cameras of one nuScenes version. Strings are bytes arrays; paths are relative to root."""
    root: str
    cameras: list            # C channel names
    scene: np.ndarray        # [F]
    split: np.ndarray        # [F] b"train", b"val", b"test"
    condition: np.ndarray    # [F] index into CONDITIONS
    lidar: np.ndarray        # [F] path
    lidarseg: np.ndarray     # [F] path, b"" where there are no labels
    image: np.ndarray        # [F, C] path
    image_size: np.ndarray   # [F, C, 2] height, width
    cam_from_lidar: np.ndarray   # [F, C, 4, 4] float64: lidar -> ego -> global -> ego at the image's time -> camera
    intrinsics: np.ndarray   # [F, C, 3, 3]
    coarse: np.ndarray       # [256] lidarseg's fine label -> index into CLASSES, or UNKNOWN
    record: np.ndarray       # [F] hash of all that the tables say of the frame and its images
    disputed: np.ndarray     # [D] of scenes whose condition the published rule reads otherwise, a line each
    bad: np.ndarray          # [F] b"", or why the frame cannot be used

    def select(self, split, conditions=CONDITIONS, limit=None, percent=100, skip_bad=False):
        """Frame numbers of a split under these conditions, at most `limit`, spread evenly over the scenes' order.

        percent: keep every (100 / percent)-th of the split's scenes in the order of the scene table, as SLidR's public loader
        does: with 1 the 100th, 200th, ... 700th of nuScenes' 700 training scenes. Raises InputError for none, and, unless
        skip_bad, if one of them is bad.
        """
        wanted = np.isin(self.condition, [CONDITIONS.index(c) for c in conditions])
        of_split = self.split == split.encode()
        names, first = np.unique(self.scene[of_split], return_index=True)
        every = 100 // percent
        scenes = names[first.argsort()][every - 1::every]
        if len(names) and len(scenes) == 0:
            raise InputError(f"--percent {percent}: every {every}th scene is taken, and --data {self.root} has only {len(names)} of "
                             f"split '{split}'; leave --percent out")
        rows = np.flatnonzero(np.isin(self.scene, scenes) & wanted & of_split)
        if limit is not None and limit < len(rows):
            rows = rows[np.linspace(0, len(rows) - 1, limit).round().astype(int)]
        if len(rows) == 0:
            raise InputError(f"--data {self.root}: no frame of split '{split}' under {', '.join(conditions)}; "
                             f"`python index.py --data {self.root}` prints what is there")
        if (bad := self.bad[rows][self.bad[rows] != b""]).size and not skip_bad:
            raise InputError(f"--data {self.root}: {len(bad)} of {len(rows)} frames are bad, the first: {bad[0].decode()}")
        return rows

    def fingerprint(self, rows, labels=False):
        """What these frames, and their labels if asked for, are according to the tables: see plumbing/fingerprint.py."""
        parts = [b"\n".join(self.record[rows])]
        if labels:
            parts += [b"\n".join(self.lidarseg[rows]), self.coarse.tobytes()]
        return {"frames": len(rows), "scenes": len(np.unique(self.scene[rows])), "tables": digest(parts)}

    def files(self, rows, labels=False):
        """A hash of the files of these frames: of the images' sizes, of the scans' sizes and ends and, if asked for, of all labels.

        Raises InputError for one that is missing.
        """
        images = [file.stat().st_size for file in all_there(self.root, self.image[rows].flatten())]
        scans = [ends_of(file) for file in all_there(self.root, self.lidar[rows])]
        of_labels = all_there(self.root, self.lidarseg[rows] if labels else ())
        return digest([repr(images).encode(), *scans, *(file.read_bytes() for file in of_labels)])

    def summary(self):
        """The counts per split and condition as a printable table, and the scenes whose condition is disputed."""
        lidarseg = "yes" if (self.lidarseg != b"").all() else "no" if (self.lidarseg == b"").all() else "in part"
        lines = [f"{self.root}: {len(self.scene)} frames, {len(self.cameras)} cameras, lidarseg: {lidarseg}",
                 f"  {'split':6} {'condition':10} scenes  frames  images"]
        for split in np.unique(self.split):
            for number, name in enumerate(CONDITIONS):
                rows = (self.split == split) & (self.condition == number)
                if rows.any():
                    lines.append(f"  {split.decode():6} {name:10} {len(np.unique(self.scene[rows])):6}  "
                                 f"{rows.sum():6}  {rows.sum() * len(self.cameras):6}")
        return "\n".join([*lines, *np.char.decode(self.disputed)])


def condition_of(description):
    """Condition of a scene from the words of its description: one that begins with night, else one with rain, else clear.

    md4all's published rule for nuScenes looks for night and rain anywhere, and finds rain in "train" and "terrain" too.
    """
    def says(what):
        return re.search(rf"(?<![^\W\d_]){what}", description.lower())  # no letter before it
    return CONDITIONS.index("night" if says("night") else "day-rain" if says("rain") else "day-clear")


def published_condition_of(description):
    """Condition of a nuScenes scene by md4all's rule: see `condition_of`."""
    text = description.lower()
    return CONDITIONS.index("night" if "night" in text else "day-rain" if "rain" in text else "day-clear")


def load_index(root, version="v1.0-trainval", here=False, look=True):
    """The `Index` of a nuScenes root, from the cache if the tables have not changed since it was written.

    It is built by this file run as a script unless `here`, so that a training process never holds the devkit's tables.
    look: look at every file anew; None: at the tables only, where the caller looks at the files that it needs. With False (only
    training does so) the cache is trusted: of its frames only those that were bad are looked at. Raises InputError for a wrong root or version and for files that the tables name but that are not there. A
    frame whose scan is cut short or whose calibration is no pose is `bad`.
    """
    root = Path(root).resolve()
    tables = root / version
    if not (tables / "sample_data.json").is_file():
        there = sorted(p.name for p in root.glob("v1.0-*") if p.is_dir())
        raise InputError(f"--data {root}: " + (
            f"no --version {version}; there is {', '.join(there)}" if there else
            "not a nuScenes root (no folder v1.0-*); download nuScenes, or make the miniature world with demo.py"))
    fields = cached(Index, root, [tables], __file__, ["--version", version], here, lambda: _read_tables(str(root), version), look is not False)
    index = Index(root=str(root), cameras=[c.decode() for c in fields.pop("cameras")], **fields)
    if look:
        with damage_named(root, version):
            check_beside(root, version)
        all_there(root, [path for path in (*index.lidar, *index.lidarseg, *index.image.flat) if path])
    reasons = index.bad.tolist()
    posed = _posed(index.cam_from_lidar, index.intrinsics)
    for row in np.flatnonzero(posed & (bool(look) | (index.bad != b""))):  # a file may be damaged or repaired since
        paths = index.lidar[row].decode(), index.lidarseg[row].decode(), np.char.decode(index.image[row])
        reasons[row] = _damage(root, *paths).encode()
    index.bad = np.array(reasons, np.bytes_)
    return index


@functools.cache
def content_of(tables, state):
    """A hash of the JSON tables in these folders, whose names, sizes and dates are `state`."""
    return digest(path.read_bytes() for folder in tables for path in sorted(folder.glob("*.json")))


def cached(kind, root, tables, script, arguments, here, build, look):
    """What `build` reads from the JSON `tables` (folders) of a dataset: {name: array}, the fields of `kind` but for its root.

    From the cache while no table has another size or date, or, with `look`, another content. The arrays are mapped from its files, so all processes of a machine share their
    memory. Where they are not there, or damaged, `build` runs if `here`, else `script --data ROOT *arguments` does, as a
    process of its own. Raises InputError as they do.
    """
    state = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for folder in tables for p in sorted(folder.glob("*.json")))
    key = hashlib.sha256(repr((FORMAT, Path(script).name, arguments, state)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "collaborative-distillation", key)
    names = {field.name for field in dataclasses.fields(kind)} - {"root"} | {"content"}
    for _ in range(2):
        try:
            fields = {name: np.asarray(np.load(cache / f"{name}.npy", mmap_mode="c", allow_pickle=False)) for name in names}
            content = fields.pop("content").item().decode()
            if not look or content == content_of(tuple(tables), state):
                return fields
        except (OSError, ValueError, EOFError):  # not there, or not whole
            pass
        shutil.rmtree(cache, ignore_errors=True)
        if here:
            fields = build() | {"content": np.bytes_(content_of(tuple(tables), state))}
            try:
                keep(cache, fields)
            except OSError as error:
                raise InputError(f"{cache}: the index cannot be kept there ({error.strerror}); mend that folder, or set XDG_CACHE_HOME "
                                 "to another") from None
            continue
        done = subprocess.run([sys.executable, script, "--data", str(root), *arguments], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["killed, perhaps for memory"])[-1]
            raise InputError(reason.partition("error: ")[2] or f"--data {root}: reading the tables failed: {reason}")
    raise InputError(f"{cache}: the index cannot be kept there; mend that folder, or set XDG_CACHE_HOME to another")


def keep(folder, arrays):
    """Write {name: array} as files of a new folder, all of them or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    for name, values in arrays.items():
        with (partial / f"{name}.npy").open("wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    with contextlib.suppress(OSError):  # another process was first
        partial.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def damage_named(root, version):
    """What goes wrong in reading tables becomes an InputError: a damaged one can raise nearly anything."""
    try:
        yield
    except InputError:
        raise
    except MemoryError:
        raise
    except ImportError as error:
        raise InputError(f"nuscenes-devkit cannot be imported ({error}); pip install -r requirements.txt") from None
    except Exception as error:
        raise InputError(f"--data {root}: nuscenes-devkit cannot read {version} ({type(error).__name__}: {error}); "
                         "extract its tables again".replace("\n", " ")) from None


def _read_tables(root, version):
    """The fields of `Index` from the dataset's own tables, through nuscenes-devkit."""
    with damage_named(root, version):
        check_beside(Path(root), version)
        frames, coarse, cameras, disputed = _read_frames(root, version)
        fields = {name: as_bytes(rows) if name in STRINGS else np.array(rows) for name, rows in frames.items()}
        count, shapes = len(fields["scene"]), {"image_size": (2,), "cam_from_lidar": (4, 4), "intrinsics": (3, 3)}
        for name, shape in shapes.items():
            if fields[name].shape != (count, len(cameras), *shape) or fields[name].dtype.kind not in "iuf":
                raise ValueError(f"{name} of some image is not {' x '.join(map(str, shape))} numbers")
    return fields | {"coarse": coarse, "cameras": as_bytes(cameras), "disputed": as_bytes(disputed)}


def as_bytes(strings):
    """Nested lists of strings, in any language, as an array of UTF-8 bytes."""
    array = np.array(strings, np.str_)
    return np.char.encode(array, "utf-8") if array.size else array.astype(np.bytes_)


def check_beside(root, version):
    """Raise InputError for what nuscenes-devkit needs beside the tables and would blame on them: maps and labels of points."""
    def named(table):
        path = root / version / f"{table}.json"
        return [record["filename"] for record in json.loads(path.read_bytes())] if path.is_file() else []

    check_files(root, named("map"), "they are in the archive of the metadata: extract all of it, maps/ too")
    for table, archive, ending in (("lidarseg", "nuScenes-lidarseg", ".bin"), ("panoptic", "nuScenes-panoptic", ".npz")):
        files = named(table)
        check_files(root, files, f"extract {archive} into this folder, all of it")
        there = sum(file.suffix == ending for file in (root / table / version).glob("*")) if files else 0
        if there > len(files):
            raise InputError(f"--data {root}: {there} files in {table}/{version}, but {table}.json names {len(files)}; "
                             "remove those that are not of this version")


def _read_frames(root, version):
    """Lists by name of `Index`'s fields, one entry a frame; the classes of fine labels; the cameras; disputed scenes."""
    from nuscenes.eval.lidarseg.utils import LidarsegClassMapper
    from nuscenes.nuscenes import NuScenes
    from nuscenes.utils.geometry_utils import transform_matrix
    from nuscenes.utils.splits import create_splits_scenes
    from pyquaternion import Quaternion

    def pose(record, inverse=False):
        if len(record["translation"]) != 3 or len(record["rotation"]) != 4:
            raise ValueError(f"pose {record['token']} has a translation of {len(record['translation'])} numbers and a rotation of "
                             f"{len(record['rotation'])}")
        if not abs(np.linalg.norm(record["rotation"]) - 1) < 1e-3:  # no rotation; the devkit would go on with any other
            return np.full((4, 4), np.nan)
        return transform_matrix(record["translation"], Quaternion(record["rotation"]), inverse)

    nusc = NuScenes(version, root, verbose=False)
    prefix = "mini_" if version == "v1.0-mini" else ""
    splits = create_splits_scenes()
    split_of = {scene: name for name in ("train", "val", "test") for scene in splits.get(prefix + name, ())}
    labels = {record["sample_data_token"]: record["filename"] for record in getattr(nusc, "lidarseg", [])}
    channels = {s["channel"] for s in nusc.sensor if s["modality"] == "camera"}
    cameras = [c for c in CAMERAS if c in channels]

    frames = {name: [] for name in
              "scene split condition lidar lidarseg image image_size cam_from_lidar intrinsics record".split()}
    disputed = []
    for scene in nusc.scene:
        condition, published = condition_of(scene["description"]), published_condition_of(scene["description"])
        if condition != published:
            words = " ".join(scene["description"].split())
            disputed.append(f"  {scene['name']}, \"{words}\": {CONDITIONS[condition]} here, "
                            f"{CONDITIONS[published]} by md4all's rule, which looks inside of words")
        token = scene["first_sample_token"]
        while token:
            sample = nusc.get("sample", token)
            token = sample["next"]
            lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
            views = [nusc.get("sample_data", sample["data"][camera]) for camera in cameras]
            mounts = [nusc.get("calibrated_sensor", view["calibrated_sensor_token"]) for view in (lidar, *views)]
            egos = [nusc.get("ego_pose", view["ego_pose_token"]) for view in (lidar, *views)]
            said = [scene["name"], condition, *(view[name] for view in (lidar, *views) for name in ("filename", "height", "width")),
                    *(record[name] for record in (*mounts, *egos) for name in ("translation", "rotation")),
                    *(mount["camera_intrinsic"] for mount in mounts)]
            frames["record"].append(digest([repr(said).encode("utf-8", "backslashreplace")]))
            lidar_to_global = pose(egos[0]) @ pose(mounts[0])
            frames["scene"].append(scene["name"])
            frames["split"].append(split_of.get(scene["name"], "other"))
            frames["condition"].append(condition)
            frames["lidar"].append(lidar["filename"])
            frames["lidarseg"].append(labels.get(lidar["token"], ""))
            frames["image"].append([view["filename"] for view in views])
            frames["image_size"].append([(view["height"], view["width"]) for view in views])
            frames["intrinsics"].append([mount["camera_intrinsic"] for mount in mounts[1:]])
            frames["cam_from_lidar"].append([pose(mount, inverse=True) @ pose(ego, inverse=True) @ lidar_to_global
                                             for mount, ego in zip(mounts[1:], egos[1:])])
    coarse = np.full(256, UNKNOWN, np.uint8)
    if labels:
        for fine, index in LidarsegClassMapper(nusc).fine_idx_2_coarse_idx_mapping.items():
            coarse[fine] = index
    check_files(root, frames["lidar"] + [p for p in frames["lidarseg"] if p] + [p for views in frames["image"] for p in views])
    posed = _posed(frames["cam_from_lidar"], frames["intrinsics"])
    frames["bad"] = [_damage(root, *paths) if good else f"{paths[0]}: the calibration or ego pose of it or of one of its images is none "
                     "(a rotation of length 0, or numbers that are not finite); extract the tables again"
                     for good, paths in zip(posed, zip(frames["lidar"], frames["lidarseg"], frames["image"]))]
    return frames, coarse, cameras, disputed


def check_files(root, paths, way_out="extract all archives of this version into this folder"):
    """Raise InputError for the first of these files, relative to `root`, that is missing or lies outside of it."""
    if outside := [path for path in paths if os.path.isabs(path) or ".." in Path(path).parts]:
        raise InputError(f"--data {root}: the tables name {outside[0]}, which is outside of this folder; do not trust this dataset")
    if bad := [path for path in paths if not os.path.isfile(os.path.join(root, path))]:
        raise InputError(f"--data {root}: {len(bad)} of {len(paths)} files that the tables name are missing, "
                         f"the first is {bad[0]}; {way_out}")


def ends_of(path, count=4096):
    """The size of a file, its first bytes and its last ones."""
    with path.open("rb") as file:
        size, begin = os.fstat(file.fileno()).st_size, file.read(count)
        file.seek(max(0, size - count))
        return size.to_bytes(8, "little") + begin + file.read()


def all_there(root, paths):
    """Files by their paths, bytes relative to `root`. Raises InputError for one that is missing."""
    check_files(root, [path.decode() for path in paths])
    return [Path(root, path.decode()) for path in paths]


def _size(root, path):
    return os.path.getsize(file) if os.path.isfile(file := os.path.join(root, path)) else 0


def _posed(cam_from_lidar, intrinsics):
    """Which frames have finite calibrations and poses: [F]."""
    return np.isfinite(cam_from_lidar).all((1, 2, 3)) & np.isfinite(intrinsics).all((1, 2, 3))


def _damage(root, scan, labels, images):
    """What is wrong with a frame's files, or "": an empty one, a scan cut short or without one label a point."""
    if empty := [path for path in (scan, *images) if _size(root, path) == 0]:
        return f"{empty[0]} is empty; extract it again"
    size = _size(root, scan)
    if size % 20 == 0 and (not labels or _size(root, labels) * 20 == size):
        return ""
    from readers.files import looks_like, other_layout, way_out, wider_labels  # here: only what is damaged needs it
    content = Path(root, scan).read_bytes()
    guess = looks_like(content) or other_layout(content) or (labels and wider_labels(_size(root, labels), size / 20))
    return f"{scan} has {size} bytes, not 20 a point" + (f" with one label each in {labels}" if labels else "") + f"; {way_out(guess)}"


@one_line_errors
def main():
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="nuScenes root: the folder with samples/ and v1.0-*/")
    parser.add_argument("--version", default="v1.0-trainval", help="version folder (default: %(default)s)")
    args = parser.parse_args()
    index = load_index(args.data, args.version, here=True)
    print(index.summary())
    for reason in index.bad[index.bad != b""]:
        print(f"bad: {reason.decode()}")


if __name__ == "__main__":
    main()

"""Which frames nuScenes has: its tables, read once through nuscenes-devkit and kept in a cache.

    python -m readers.nuscenes --data /data/nuscenes    # look at every file, print counts
"""
import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np

from plumbing.arguments import Parser
from plumbing.errors import InputError, one_line_errors
from plumbing.fingerprint import digest
from readers.table import (UNKNOWN, all_there, as_bytes, cached, check_files, damage_named, ends_of,
                           spread)

CONDITIONS = ("day-clear", "day-rain", "night")
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT",
           "CAM_FRONT_LEFT")
CLASSES = ("ignore", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle",
           "pedestrian", "traffic_cone", "trailer", "truck", "driveable_surface", "other_flat",
           "sidewalk", "terrain", "manmade", "vegetation")
# The fields of `Index` that are strings for each frame, kept as arrays of bytes
STRINGS = {"scene", "split", "lidar", "lidarseg", "image", "record", "bad"}
NO_POSE = ("the calibration or ego pose of it or of one of its images is none (a rotation of "
           "length 0, or numbers that are not finite); extract the tables again")


@dataclasses.dataclass
class Index:
    """F keyframes of C cameras of a nuScenes version. Strings are bytes, paths relative to root."""
    root: str
    cameras: list            # C channel names
    scene: np.ndarray        # [F]
    split: np.ndarray        # [F] b"train", b"val", b"test"
    condition: np.ndarray    # [F] index into CONDITIONS
    lidar: np.ndarray        # [F] path
    lidarseg: np.ndarray     # [F] path, b"" where there are no labels
    image: np.ndarray        # [F, C] path
    image_size: np.ndarray   # [F, C, 2] height, width
    cam_from_lidar: np.ndarray   # [F, C, 4, 4] float64, see `_cam_from_lidar`
    intrinsics: np.ndarray   # [F, C, 3, 3]
    coarse: np.ndarray       # [256] lidarseg's fine label -> index into CLASSES, or UNKNOWN
    record: np.ndarray       # [F] hash of all that the tables say of the frame and its images
    disputed: np.ndarray     # [D] a line for each scene whose published condition is another
    bad: np.ndarray          # [F] b"", or why the frame cannot be used

    def select(self, split, conditions=CONDITIONS, limit=None, percent=100, skip_bad=False):
        """The numbers of a split's frames under these conditions: at most `limit`, evenly spread.

        percent: only every (100 / percent)-th scene of the split counts, in the order of the scene
        table. This is what SLidR's public loader does: 1 % are the 100th, 200th, ... 700th of
        nuScenes' 700 training scenes. Raises InputError if there is no such frame and, unless
        skip_bad, if one of them is bad.
        """
        # The scenes, in the order of the scene table
        of_split = self.split == split.encode()
        names, first = np.unique(self.scene[of_split], return_index=True)
        every = 100 // percent
        scenes = names[first.argsort()][every - 1::every]
        if len(names) and len(scenes) == 0:
            raise InputError(f"--percent {percent}: every {every}th scene is taken, and --data "
                             f"{self.root} has only {len(names)} of split '{split}'; "
                             "leave --percent out")

        # Their frames under these conditions
        wanted = np.isin(self.condition, [CONDITIONS.index(name) for name in conditions])
        rows = np.flatnonzero(np.isin(self.scene, scenes) & wanted & of_split)
        rows = spread(rows, limit)
        if len(rows) == 0:
            raise InputError(f"--data {self.root}: no frame of split '{split}' under "
                             f"{', '.join(conditions)}; `python -m readers.nuscenes --data "
                             f"{self.root}` prints what is there")

        bad = self.bad[rows]
        bad = bad[bad != b""]
        if len(bad) and not skip_bad:
            raise InputError(f"--data {self.root}: {len(bad)} of {len(rows)} frames are bad, the "
                             f"first: {bad[0].decode()}")
        return rows

    def fingerprint(self, rows, labels=False):
        """What the tables say of these frames (and their labels): see plumbing/fingerprint.py."""
        parts = [b"\n".join(self.record[rows])]
        if labels:
            parts += [b"\n".join(self.lidarseg[rows]), self.coarse.tobytes()]
        scenes = np.unique(self.scene[rows])
        return {"frames": len(rows), "scenes": len(scenes), "tables": digest(parts)}

    def files(self, rows, labels=False):
        """A hash of the files of these frames. Raises InputError if one is missing.

        It is of the images' sizes, of the scans' sizes and ends and, with `labels`, of all labels.
        """
        images = all_there(self.root, self.image[rows].flatten())
        scans = all_there(self.root, self.lidar[rows])
        sizes = [file.stat().st_size for file in images]
        parts = [repr(sizes).encode(), *map(ends_of, scans)]
        if labels:
            parts += [file.read_bytes() for file in all_there(self.root, self.lidarseg[rows])]
        return digest(parts)

    def summary(self):
        """The counts per split and condition as a printable table, and the disputed scenes."""
        labelled = self.lidarseg != b""
        lidarseg = "in part"
        if labelled.all():
            lidarseg = "yes"
        elif not labelled.any():
            lidarseg = "no"
        lines = [f"{self.root}: {len(self.scene)} frames, {len(self.cameras)} cameras, "
                 f"lidarseg: {lidarseg}",
                 f"  {'split':6} {'condition':10} scenes  frames  images"]
        for split in np.unique(self.split):
            for number, name in enumerate(CONDITIONS):
                rows = (self.split == split) & (self.condition == number)
                frames = rows.sum()
                if frames:
                    scenes = len(np.unique(self.scene[rows]))
                    images = frames * len(self.cameras)
                    counts = f"{scenes:6}  {frames:6}  {images:6}"
                    lines.append(f"  {split.decode():6} {name:10} {counts}")
        return "\n".join([*lines, *np.char.decode(self.disputed)])


# ---- conditions --------------------------------------------------------------------------------

def condition_of(description):
    """Condition of a scene, an index into CONDITIONS, from the words of its description.

    It is night if a word begins with "night", else rain if a word begins with "rain", else clear.
    md4all's published rule for nuScenes looks for night and rain anywhere, and finds rain in
    "train" and "terrain" too.
    """
    def says(what):
        return re.search(rf"(?<![^\W\d_]){what}", description.lower())  # no letter before it

    if says("night"):
        return CONDITIONS.index("night")
    return CONDITIONS.index("day-rain" if says("rain") else "day-clear")


def published_condition_of(description):
    """Condition of a scene by md4all's rule: see `condition_of`."""
    text = description.lower()
    if "night" in text:
        return CONDITIONS.index("night")
    return CONDITIONS.index("day-rain" if "rain" in text else "day-clear")


# ---- the index ---------------------------------------------------------------------------------

def load_index(root, version="v1.0-trainval", here=False, look=True):
    """The `Index` of a nuScenes root, from the cache unless the tables have changed since.

    here: build it in this process. Else this file does, run as a script, so that a training process
    never holds the devkit's tables.
    look: True looks at every file anew. None looks at the tables' content only, where the caller
    looks at the files that it needs. False trusts the cache and looks only at the frames that were
    bad; it is for training.
    Raises InputError for a wrong root or version and for files that the tables name but that are
    not there. A frame whose scan is cut short or whose calibration is no pose is `bad`.
    """
    root = Path(root).resolve()
    if not (root / version / "sample_data.json").is_file():
        there = sorted(path.name for path in root.glob("v1.0-*") if path.is_dir())
        if there:
            raise InputError(f"--data {root}: no --version {version}; there is {', '.join(there)}")
        raise InputError(f"--data {root}: not a nuScenes root (no folder v1.0-*); download "
                         "nuScenes, or make the miniature world with demo.py")
    fields = cached(Index, root, [root / version], "readers.nuscenes", ["--version", version], here,
                    lambda: _read_tables(str(root), version), look is not False)
    cameras = [name.decode() for name in fields.pop("cameras")]
    index = Index(root=str(root), cameras=cameras, **fields)
    if look:
        with damage_named(root, version):
            check_beside(root, version)
        paths = (*index.lidar, *index.lidarseg, *index.image.flat)
        all_there(root, [path for path in paths if path])

    # Since the cache was written, a file may have been damaged or repaired
    reasons = index.bad.tolist()
    asked = bool(look) | (index.bad != b"")
    for row in np.flatnonzero(asked & _posed(index.cam_from_lidar, index.intrinsics)):
        images = np.char.decode(index.image[row])
        reason = _damage(root, index.lidar[row].decode(), index.lidarseg[row].decode(), images)
        reasons[row] = reason.encode()
    index.bad = np.array(reasons, np.bytes_)
    return index


def check_beside(root, version):
    """Raise InputError if maps or labels of points are wrong: the devkit would blame the tables."""
    def named(table):
        path = root / version / f"{table}.json"
        if not path.is_file():
            return []
        return [record["filename"] for record in json.loads(path.read_bytes())]

    check_files(root, named("map"),
                "they are in the archive of the metadata: extract all of it, maps/ too")
    for table, archive, ending in (("lidarseg", "nuScenes-lidarseg", ".bin"),
                                   ("panoptic", "nuScenes-panoptic", ".npz")):
        files = named(table)
        check_files(root, files, f"extract {archive} into this folder, all of it")
        there = sum(file.suffix == ending for file in (root / table / version).glob("*"))
        if files and there > len(files):
            raise InputError(f"--data {root}: {there} files in {table}/{version}, but {table}.json "
                             f"names {len(files)}; remove those that are not of this version")


def _damage(root, scan, labels, images):
    """What is wrong with a frame's files: one empty, a scan cut short, labels missing; else ""."""
    for path in (scan, *images):
        if _size(root, path) == 0:
            return f"{path} is empty; extract it again"
    size = _size(root, scan)
    if size % 20 == 0 and (not labels or _size(root, labels) * 20 == size):
        return ""

    # readers.files needs torch, and only a damaged frame needs readers.files
    from readers.files import looks_like, other_layout, way_out, wider_labels
    content = Path(root, scan).read_bytes()
    guess = looks_like(content) or other_layout(content)
    if labels and not guess:
        guess = wider_labels(_size(root, labels), size / 20)
    wrong = f"{scan} has {size} bytes, not 20 a point"
    if labels:
        wrong += f" with one label each in {labels}"
    return f"{wrong}; {way_out(guess)}"


def _size(root, path):
    """The bytes of a file, 0 if there is none."""
    file = os.path.join(root, path)
    return os.path.getsize(file) if os.path.isfile(file) else 0


def _posed(cam_from_lidar, intrinsics):
    """Which frames have finite calibrations and poses: [F]."""
    finite = np.isfinite(cam_from_lidar).all((1, 2, 3))
    return finite & np.isfinite(intrinsics).all((1, 2, 3))


# ---- nuScenes' tables --------------------------------------------------------------------------

def _read_tables(root, version):
    """The fields of `Index` from the dataset's own tables, through nuscenes-devkit."""
    with damage_named(root, version):
        check_beside(Path(root), version)
        frames, coarse, cameras, disputed = _read_frames(root, version)
        fields = {}
        for name, values in frames.items():
            fields[name] = as_bytes(values) if name in STRINGS else np.array(values)
        views = len(fields["scene"]), len(cameras)
        shapes = {"image_size": (2,), "cam_from_lidar": (4, 4), "intrinsics": (3, 3)}
        for name, shape in shapes.items():
            if fields[name].shape != (*views, *shape) or fields[name].dtype.kind not in "iuf":
                numbers = " x ".join(map(str, shape))
                raise ValueError(f"{name} of some image is not {numbers} numbers")
    return fields | {"coarse": coarse, "cameras": as_bytes(cameras), "disputed": as_bytes(disputed)}


def _read_frames(root, version):
    """Lists by name of `Index`'s fields, one entry a frame; its `coarse`, `cameras`, `disputed`."""
    from nuscenes.nuscenes import NuScenes
    nusc = NuScenes(version, root, verbose=False)
    split_of = _splits(version)
    lidarseg = getattr(nusc, "lidarseg", [])
    labels = {record["sample_data_token"]: record["filename"] for record in lidarseg}
    channels = {sensor["channel"] for sensor in nusc.sensor if sensor["modality"] == "camera"}
    cameras = [channel for channel in CAMERAS if channel in channels]

    # What the tables say of each frame
    frames = {name: [] for name in ("scene", "split", "condition", "lidar", "lidarseg", "image",
                                    "image_size", "cam_from_lidar", "intrinsics", "record")}
    disputed = []
    for scene in nusc.scene:
        condition = condition_of(scene["description"])
        published = published_condition_of(scene["description"])
        if condition != published:
            words = " ".join(scene["description"].split())
            disputed.append(f"  {scene['name']}, \"{words}\": {CONDITIONS[condition]} here, "
                            f"{CONDITIONS[published]} by md4all's rule, which looks inside of "
                            "words")
        token = scene["first_sample_token"]
        while token:
            sample = nusc.get("sample", token)
            token = sample["next"]
            lidar, views, mounts, egos = _records(nusc, sample, cameras)
            said = _said(scene, condition, (lidar, *views), mounts, egos)
            frames["record"].append(digest([said]))
            frames["scene"].append(scene["name"])
            frames["split"].append(split_of.get(scene["name"], "other"))
            frames["condition"].append(condition)
            frames["lidar"].append(lidar["filename"])
            frames["lidarseg"].append(labels.get(lidar["token"], ""))
            frames["image"].append([view["filename"] for view in views])
            frames["image_size"].append([(view["height"], view["width"]) for view in views])
            frames["intrinsics"].append([mount["camera_intrinsic"] for mount in mounts[1:]])
            frames["cam_from_lidar"].append(_cam_from_lidar(mounts, egos))
    coarse = _coarse(nusc) if labels else np.full(256, UNKNOWN, np.uint8)

    # Whether their files are there and whole
    named = [*frames["lidar"], *filter(None, frames["lidarseg"])]
    for images in frames["image"]:
        named += images
    check_files(root, named)
    frames["bad"] = []
    posed = _posed(frames["cam_from_lidar"], frames["intrinsics"])
    files = zip(frames["lidar"], frames["lidarseg"], frames["image"])
    for good, (scan, label, images) in zip(posed, files):
        reason = _damage(root, scan, label, images) if good else f"{scan}: {NO_POSE}"
        frames["bad"].append(reason)
    return frames, coarse, cameras, disputed


def _splits(version):
    """{name of a scene: its split}, as nuScenes publishes them."""
    from nuscenes.utils.splits import create_splits_scenes
    scenes = create_splits_scenes()
    prefix = "mini_" if version == "v1.0-mini" else ""
    split_of = {}
    for split in ("train", "val", "test"):
        split_of |= dict.fromkeys(scenes.get(prefix + split, ()), split)
    return split_of


def _coarse(nusc):
    """The class of each fine label of lidarseg, uint8 [256]: `Index.coarse`."""
    from nuscenes.eval.lidarseg.utils import LidarsegClassMapper
    coarse = np.full(256, UNKNOWN, np.uint8)
    for fine, number in LidarsegClassMapper(nusc).fine_idx_2_coarse_idx_mapping.items():
        coarse[fine] = number
    return coarse


def _records(nusc, sample, cameras):
    """A frame's records: the scan's; the images'; each one's calibrated sensor; its ego pose."""
    lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    views = [nusc.get("sample_data", sample["data"][camera]) for camera in cameras]
    mounts, egos = [], []
    for record in (lidar, *views):
        mounts.append(nusc.get("calibrated_sensor", record["calibrated_sensor_token"]))
        egos.append(nusc.get("ego_pose", record["ego_pose_token"]))
    return lidar, views, mounts, egos


def _said(scene, condition, files, mounts, egos):
    """All that the tables say of a frame, as bytes; of this `Index.record` is the hash."""
    said = [scene["name"], condition]
    for record in files:
        said += [record["filename"], record["height"], record["width"]]
    for record in (*mounts, *egos):
        said += [record["translation"], record["rotation"]]
    said += [mount["camera_intrinsic"] for mount in mounts]
    return repr(said).encode("utf-8", "backslashreplace")


def _cam_from_lidar(mounts, egos):
    """For each camera [4, 4]: lidar -> ego -> global -> ego at the image's time -> camera."""
    lidar_to_global = _pose(egos[0]) @ _pose(mounts[0])
    return [_pose(mount, inverse=True) @ _pose(ego, inverse=True) @ lidar_to_global
            for mount, ego in zip(mounts[1:], egos[1:])]


def _pose(record, inverse=False):
    """A record's pose, float64 [4, 4]. NaN where its rotation is none; the devkit would go on."""
    from nuscenes.utils.geometry_utils import transform_matrix
    from pyquaternion import Quaternion
    translation = record["translation"]
    rotation = record["rotation"]
    if len(translation) != 3 or len(rotation) != 4:
        raise ValueError(f"pose {record['token']} has a translation of {len(translation)} numbers "
                         f"and a rotation of {len(rotation)}")
    if not abs(np.linalg.norm(rotation) - 1) < 1e-3:
        return np.full((4, 4), np.nan)
    return transform_matrix(translation, Quaternion(rotation), inverse)


@one_line_errors
def main():
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True,
                        help="nuScenes root: the folder with samples/ and v1.0-*/")
    parser.add_argument("--version", default="v1.0-trainval",
                        help="version folder (default: %(default)s)")
    args = parser.parse_args()
    index = load_index(args.data, args.version, here=True)
    print(index.summary())
    for reason in index.bad[index.bad != b""]:
        print(f"bad: {reason.decode()}")


if __name__ == "__main__":
    main()

"""nuImages: labelled images of six cameras, and the class of each pixel, from its own tables.

    python -m readers.nuimages --data /data/nuimages    # look at every file, print counts

nuscenes-devkit reads the tables.
"""
import base64
import dataclasses
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import next_good, read_image
from plumbing.arguments import Parser
from plumbing.errors import InputError, one_line_errors
from plumbing.fingerprint import digest
from readers.nuscenes import CLASSES as NUSCENES_CLASSES
from readers.table import all_there, as_bytes, cached, check_files, damage_named, spread

SPLITS = ("train", "val")
# What nuImages labels of nuScenes' classes: ignore, the 10 classes of objects, the road
CLASSES = NUSCENES_CLASSES[:NUSCENES_CLASSES.index("driveable_surface") + 1]


@dataclasses.dataclass
class ImageIndex:
    """S labelled images and their M masks, in the order in which the masks are drawn.

    Paths are bytes arrays, relative to root.
    """
    root: str
    split: np.ndarray        # [S] b"train" or b"val"
    image: np.ndarray        # [S] path, sorted within a split
    image_size: np.ndarray   # [S, 2] height, width
    first: np.ndarray        # [S + 1]: first[s]:first[s + 1] are the masks of image s
    kind: np.ndarray         # [M] index into CLASSES
    start: np.ndarray        # [M + 1]: start[m]:start[m + 1] are the bytes of mask m
    runs: np.ndarray         # [start[M]] uint8: run lengths, as pycocotools packs them

    def select(self, split, limit=None, percent=100, skip_bad=False):
        """Image numbers of a split: at most `limit`, evenly spread.

        percent: only every (100 / percent)-th image counts, from the first on, in the order of file
        names; no release says which. skip_bad has no meaning here, because damage shows only when
        an image is read. Raises InputError if there is no image.
        """
        rows = np.flatnonzero(self.split == split.encode())[::100 // percent]
        rows = spread(rows, limit)
        if len(rows) == 0:
            raise InputError(f"--data {self.root}: no image of split '{split}'; nuImages keeps it "
                             f"in the folder v1.0-{split}")
        return rows

    def fingerprint(self, rows, labels=True):
        """What the tables say of these images and their masks: see plumbing/fingerprint.py."""
        parts = [b"\n".join(self.image[rows]), self.image_size[rows].astype("<i8").tobytes()]
        for row in rows:
            begin, end = self.first[row], self.first[row + 1]
            runs = self.runs[self.start[begin]:self.start[end]]
            parts.append(self.kind[begin:end].tobytes() + runs.tobytes())
        return {"images": len(rows), "tables": digest(parts)}

    def files(self, rows, labels=True):
        """A hash of the sizes of these images' files. Raises InputError if one is missing."""
        sizes = [os.stat(file).st_size for file in all_there(self.root, self.image[rows])]
        return digest([repr(sizes).encode()])

    def labels(self, row):
        """The class of each pixel of an image, uint8 [H, W], 0 where nothing is labelled.

        Objects are drawn over surfaces. Raises InputError for a damaged mask.
        """
        from pycocotools.mask import decode
        classes = np.zeros(self.image_size[row], np.uint8)
        for m in range(self.first[row], self.first[row + 1]):
            runs = self.runs[self.start[m]:self.start[m + 1]]
            if covered(runs) != classes.size:  # pycocotools would leave the rest to chance
                raise InputError(f"{self.root}: a mask of {self.image[row].decode()} is damaged: "
                                 "its runs do not cover the image; extract the tables again")
            mask = decode({"size": list(classes.shape), "counts": runs.tobytes()})  # [H, W] 0 or 1
            classes[mask == 1] = self.kind[m]
        return classes

    def summary(self):
        """The counts per split as a printable line."""
        counts = {split: (self.split == split.encode()).sum() for split in SPLITS}
        images = ", ".join(f"{count} images of {split}" for split, count in counts.items())
        return f"{self.root}: {images}"


# ---- masks -------------------------------------------------------------------------------------

def covered(runs):
    """How many pixels a mask's runs span, in it or not: uint8 [bytes] -> int; -1 for a damaged one.

    pycocotools packs a number into bytes of 48 + 6 bits: five bits of it, the lowest first, and 32
    unless it is the number's last byte. Bit 16 of the last byte is the sign. From the fourth number
    on, a number is the difference to the one two before.
    """
    bits = runs.astype(np.int64) - 48
    last = bits & 32 == 0
    if len(bits) == 0 or bits.min() < 0 or bits.max() > 63 or not last[-1]:
        return -1

    # Put the bits of each number in their places, and add them up
    begin = np.flatnonzero(np.append(True, last[:-1]))
    lengths = np.diff(np.append(begin, len(bits)))
    place = 5 * (np.arange(len(bits)) - np.repeat(begin, lengths))
    numbers = np.add.reduceat((bits & 31) << place, begin)
    negative = bits[last] & 16
    numbers -= np.where(negative, 1 << (place[last] + 5), 0)

    # Undo the differences: of the odd numbers and of the even ones, the very first left out
    for n in (1, 2):
        numbers[n::2] = np.cumsum(numbers[n::2])
    return int(numbers.sum()) if (numbers >= 0).all() else -1


# ---- data --------------------------------------------------------------------------------------

class LabelledImages(torch.utils.data.Dataset):
    """Images and their labelled pixels, as `Frames` gives images and projected points.

    Keys are (epoch, number). Item: image uint8 [3, H, W], pixels [N, 2] (row, col) in it, labels
    [N] (index into CLASSES), condition 0. The arguments are those of `Frames`: `cameras` must be
    "all", `cloud` None, and what else is about points has no meaning here.
    """

    def __init__(self, index, rows, cameras, image_size, cloud=None, skip_bad=False, **_):
        if cameras != "all" or cloud is not None:
            raise InputError(f"--cameras {cameras}: nuImages has one image a sample, use all")
        self.index = index
        self.rows = rows
        self.image_size = image_size
        self.skip_bad = skip_bad

    def __len__(self):
        return len(self.rows)

    def locate(self, key):
        """(image number,) of (epoch, number)."""
        return (self.rows[key[1]],)

    def name(self, key):
        """The path of an item's image."""
        return self.index.image[self.rows[key[1]]].decode()

    def __getitem__(self, key):
        return next_good(self, key) if self.skip_bad else self.view(key)

    def view(self, key):
        """One item. Raises InputError if it cannot be read."""
        row = self.rows[key[1]]
        path = os.path.join(self.index.root, self.name(key))
        image = read_image(path, self.image_size, self.index.image_size[row])
        labels = Image.fromarray(self.index.labels(row))
        labels = np.array(labels.resize(self.image_size[::-1], Image.Resampling.NEAREST))  # [H, W]
        pixels = np.argwhere(labels > 0)  # [N, 2]
        classes = labels[tuple(pixels.T)].astype(np.int64)
        return {"condition": 0, "image": torch.from_numpy(image),
                "pixels": torch.from_numpy(pixels.astype(np.float32)),
                "labels": torch.from_numpy(classes)}


# ---- the index ---------------------------------------------------------------------------------

def load_nuimages(root, version=None, here=False, look=True):
    """The `ImageIndex` of a nuImages root with v1.0-train, v1.0-val or both.

    `version` has no meaning: the versions are the splits. For `here` and `look` see
    `readers.nuscenes.load_index`. Raises InputError for a wrong root and for images that are not there.
    """
    root = Path(root).resolve()
    tables = [root / f"v1.0-{split}" for split in SPLITS]
    tables = [folder for folder in tables if (folder / "object_ann.json").is_file()]
    if not tables:
        there = ", ".join(sorted(path.name for path in root.glob("v1.0-*") if path.is_dir()))
        there = f"; there is {there}" if there else ""
        raise InputError(f"--data {root}: not a nuImages root: no v1.0-train or v1.0-val with an "
                         f"object_ann.json{there}; download nuImages, or make a miniature one with "
                         "miniature/world.py --dataset nuimages")
    fields = cached(ImageIndex, root, tables, "readers.nuimages", [], here,
                    lambda: _read_tables(root, tables), look is not False)
    if look:
        images = all_there(root, fields["image"])
        empty = [file for file in images if file.stat().st_size == 0]
        if empty:
            raise InputError(f"--data {root}: {len(empty)} images are empty, the first is "
                             f"{empty[0].relative_to(root)}; extract it again")
    return ImageIndex(root=str(root), **fields)


def _read_tables(root, tables):
    """The fields of `ImageIndex`."""
    images, kinds, runs = [], [], []  # images: split, path, size, number of masks
    for folder in tables:
        with damage_named(root, folder.name):
            views, masks = _read_version(root, folder.name)

        # The images in the order of their paths, and the masks of each
        for file, size, token in sorted(views):
            split = folder.name.removeprefix("v1.0-")
            images.append((split, file, size, len(masks[token])))
            for kind, mask_size, counts in masks[token]:
                if mask_size != size:
                    raise InputError(f"--data {root}: {folder.name}: a mask of size {mask_size} "
                                     f"for {file} of {size}; extract it again")
                kinds.append(kind)
                runs.append(counts)

    # One array a column
    if not images:
        raise InputError(f"--data {root}: its tables have no sample; extract them again")
    split, image, size, count = zip(*images)
    check_files(root, image)
    return {"split": as_bytes(split), "image": as_bytes(image), "image_size": np.array(size),
            "first": np.cumsum([0, *count]), "kind": np.array(kinds, np.uint8),
            "start": np.cumsum([0, *map(len, runs)]),
            "runs": np.frombuffer(b"".join(runs), np.uint8)}


def _read_version(root, version):
    """A split's labelled images and {token of an image: its masks, in the order of drawing}.

    An image is (path, [height, width], token), a mask (index into CLASSES, [height, width], runs).
    """
    from nuimages import NuImages
    from nuscenes.eval.detection.utils import category_to_detection_name

    def class_of(category):
        if category == "flat.driveable_surface":
            return CLASSES.index("driveable_surface")
        return CLASSES.index(category_to_detection_name(category) or "ignore")

    nuim = NuImages(version, str(root))
    kinds = {category["token"]: class_of(category["name"]) for category in nuim.category}

    # The masks, drawn in the devkit's order
    masks = defaultdict(list)
    objects = sorted(nuim.object_ann, key=lambda mark: mark["token"])
    for mark in (*nuim.surface_ann, *objects):
        mask = mark["mask"]
        if mask is not None:
            counts = base64.b64decode(mask["counts"], validate=True)
            kind = kinds[mark["category_token"]]
            masks[mark["sample_data_token"]].append((kind, mask["size"], counts))

    views = []
    for sample in nuim.sample:
        view = nuim.get("sample_data", sample["key_camera_token"])
        views.append((view["filename"], [int(view["height"]), int(view["width"])], view["token"]))
    return views, masks


@one_line_errors
def main():
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True,
                        help="nuImages root: the folder with samples/, v1.0-train/ and v1.0-val/")
    args = parser.parse_args()
    print(load_nuimages(args.data, here=True).summary())


if __name__ == "__main__":
    main()

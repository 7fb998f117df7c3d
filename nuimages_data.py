"""nuImages: labelled images of six cameras, and the class of each pixel, from its own tables through nuscenes-devkit.

    python nuimages_data.py --data /data/nuimages       # build the index, look at every file, print the counts

(Not named nuimages.py: that is the devkit's package.)
"""
import base64
import dataclasses
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from plumbing.arguments import Parser
from data import next_good, read_image
from errors import InputError, one_line_errors
from plumbing.fingerprint import digest
from index import CLASSES as NUSCENES_CLASSES
from index import all_there, as_bytes, cached, check_files, damage_named

SPLITS = ("train", "val")
CLASSES = NUSCENES_CLASSES[:NUSCENES_CLASSES.index("driveable_surface") + 1]  # ignore, the 10 classes of objects, the road


@dataclasses.dataclass
class ImageIndex:
    """S labelled images and their M masks, in the order in which they are drawn. Paths are bytes, relative to root."""
    root: str
    split: np.ndarray        # [S] b"train" or b"val"
    image: np.ndarray        # [S] path, sorted within a split
    image_size: np.ndarray   # [S, 2] height, width
    first: np.ndarray        # [S + 1]: first[s]:first[s + 1] are the masks of image s
    kind: np.ndarray         # [M] index into CLASSES
    start: np.ndarray        # [M + 1]: start[m]:start[m + 1] are the bytes of mask m
    runs: np.ndarray         # [start[M]] uint8: run lengths, as pycocotools packs them

    def select(self, split, limit=None, percent=100, skip_bad=False):
        """Image numbers of a split, at most `limit`, spread evenly.

        percent: every (100 / percent)-th, from the first on, in the order of file names; no release says which. skip_bad has no
        meaning here: what is damaged shows when it is read.
        """
        rows = np.flatnonzero(self.split == split.encode())[::100 // percent]
        if limit is not None and limit < len(rows):
            rows = rows[np.linspace(0, len(rows) - 1, limit).round().astype(int)]
        if len(rows) == 0:
            raise InputError(f"--data {self.root}: no image of split '{split}'; nuImages keeps it in the folder v1.0-{split}")
        return rows

    def fingerprint(self, rows, labels=True):
        """What these images and their masks are according to the tables: see plumbing/fingerprint.py."""
        parts = [b"\n".join(self.image[rows]), self.image_size[rows].astype("<i8").tobytes()]
        for row in rows:
            begin, end = self.first[row], self.first[row + 1]
            parts.append(self.kind[begin:end].tobytes() + self.runs[self.start[begin]:self.start[end]].tobytes())
        return {"images": len(rows), "tables": digest(parts)}

    def files(self, rows, labels=True):
        """A hash of the sizes of these images' files. Raises InputError for one that is missing."""
        return digest([repr([os.stat(file).st_size for file in all_there(self.root, self.image[rows])]).encode()])

    def labels(self, row):
        """The classes uint8 [H, W] of an image's pixels: surfaces, then objects over them; 0 where nothing is labelled.

        Raises InputError for a damaged mask.
        """
        from pycocotools.mask import decode
        classes = np.zeros(self.image_size[row], np.uint8)
        for m in range(self.first[row], self.first[row + 1]):
            runs = self.runs[self.start[m]:self.start[m + 1]]
            if covered(runs) != classes.size:  # pycocotools would leave the rest of the mask to chance
                raise InputError(f"{self.root}: a mask of {self.image[row].decode()} is damaged: its runs do not cover the image; "
                                 "extract the tables again")
            classes[decode({"size": list(classes.shape), "counts": runs.tobytes()}) == 1] = self.kind[m]
        return classes

    def summary(self):
        """The counts per split as a printable line."""
        return f"{self.root}: " + ", ".join(f"{(self.split == split.encode()).sum()} images of {split}" for split in SPLITS)


def covered(runs):
    """How many pixels run lengths as pycocotools packs them cover, uint8 [bytes] -> int; -1 where they are none.

    A number takes bytes of 48 + 5 bits, the lowest first, + 32 but for its last one, whose bit 16 is the sign; from the fourth on
    it is the difference to the number two before.
    """
    bits = runs.astype(np.int64) - 48
    last = bits & 32 == 0
    if len(bits) == 0 or bits.min() < 0 or bits.max() > 63 or not last[-1]:
        return -1
    begin = np.flatnonzero(np.append(True, last[:-1]))
    place = 5 * (np.arange(len(bits)) - np.repeat(begin, np.diff(np.append(begin, len(bits)))))
    numbers = np.add.reduceat((bits & 31) << place, begin)
    numbers -= np.where(bits[last] & 16, 1 << (place[last] + 5), 0)  # a negative one
    for n in (1, 2):  # those two apart
        numbers[n::2] = np.cumsum(numbers[n::2])
    return int(numbers.sum()) if (numbers >= 0).all() else -1


class LabelledImages(torch.utils.data.Dataset):
    """Images with the pixels that have a label, as `Frames` gives them for projected points.

    Keys are (epoch, number). Item: image uint8 [3, H, W], pixels [N, 2] (row, col) in it, labels [N] (index into CLASSES), condition 0.
    Takes the arguments of `Frames`; of them `cameras` must be "all", and all that is about points has no meaning here.
    """

    def __init__(self, index, rows, cameras, image_size, cloud=None, skip_bad=False, **_):
        if cameras != "all" or cloud is not None:
            raise InputError(f"--cameras {cameras}: nuImages has one image a sample, use all")
        self.index, self.rows, self.image_size, self.skip_bad = index, rows, image_size, skip_bad

    def __len__(self):
        return len(self.rows)

    def locate(self, key):
        """(image number,) of (epoch, number)."""
        return (self.rows[key[1]],)

    def name(self, key):
        """An item's image."""
        return self.index.image[self.rows[key[1]]].decode()

    def __getitem__(self, key):
        return next_good(self, key) if self.skip_bad else self.view(key)

    def view(self, key):
        """One item; InputError if it cannot be read."""
        row = self.rows[key[1]]
        image = read_image(os.path.join(self.index.root, self.name(key)), self.image_size, self.index.image_size[row])
        labels = Image.fromarray(self.index.labels(row)).resize(self.image_size[::-1], Image.Resampling.NEAREST)
        labels = np.array(labels)  # [H, W]
        pixels = np.argwhere(labels > 0)
        return {"condition": 0, "image": torch.from_numpy(image), "pixels": torch.from_numpy(pixels.astype(np.float32)),
                "labels": torch.from_numpy(labels[tuple(pixels.T)].astype(np.int64))}


def load_nuimages(root, version=None, here=False, look=True):
    """The `ImageIndex` of a nuImages root with v1.0-train and v1.0-val (`version` has no meaning: they are the splits).

    Cached, built and looked at as `index.load_index` does. Raises InputError for a wrong root and for images that are not there.
    """
    root = Path(root).resolve()
    tables = [root / f"v1.0-{split}" for split in SPLITS if (root / f"v1.0-{split}" / "object_ann.json").is_file()]
    if not tables:
        there = ", ".join(sorted(p.name for p in root.glob("v1.0-*") if p.is_dir()))
        raise InputError(f"--data {root}: not a nuImages root: no v1.0-train or v1.0-val with an object_ann.json"
                         + (f"; there is {there}" if there else "") + "; download nuImages, or make a miniature one with "
                         "miniature/world.py --dataset nuimages")
    fields = cached(ImageIndex, root, tables, __file__, [], here, lambda: _read_tables(root, tables), look is not False)
    if look:
        if empty := [file for file in all_there(root, fields["image"]) if file.stat().st_size == 0]:
            raise InputError(f"--data {root}: {len(empty)} images are empty, the first is {empty[0].relative_to(root)}; extract it again")
    return ImageIndex(root=str(root), **fields)


def _read_tables(root, tables):
    """The fields of `ImageIndex`."""
    from nuimages import NuImages
    from nuscenes.eval.detection.utils import category_to_detection_name

    def class_of(category):
        name = "driveable_surface" if category == "flat.driveable_surface" else category_to_detection_name(category)
        return CLASSES.index(name or "ignore")

    images, kinds, runs = [], [], []  # images: split, path, size, number of masks
    for folder in tables:
        with damage_named(root, folder.name):
            nuim = NuImages(folder.name, str(root))
            kind = {category["token"]: class_of(category["name"]) for category in nuim.category}
            masks = defaultdict(list)
            for mark in [*nuim.surface_ann, *sorted(nuim.object_ann, key=lambda mark: mark["token"])]:  # as the devkit draws them
                if mark["mask"] is not None:
                    counts = base64.b64decode(mark["mask"]["counts"], validate=True)
                    masks[mark["sample_data_token"]].append((kind[mark["category_token"]], mark["mask"]["size"], counts))
            views = [nuim.get("sample_data", sample["key_camera_token"]) for sample in nuim.sample]
            views = [(view["filename"], [int(view["height"]), int(view["width"])], view["token"]) for view in views]
        for file, size, token in sorted(views):
            images.append((folder.name.removeprefix("v1.0-"), file, size, len(masks[token])))
            for number, mask_size, counts in masks[token]:
                if mask_size != size:
                    raise InputError(f"--data {root}: {folder.name}: a mask of size {mask_size} for {file} of {size}; extract it again")
                kinds.append(number)
                runs.append(counts)
    split, image, size, count = zip(*images)
    check_files(root, image)
    return {"split": as_bytes(split), "image": as_bytes(image), "image_size": np.array(size),
            "first": np.cumsum([0, *count]), "kind": np.array(kinds, np.uint8), "start": np.cumsum([0, *map(len, runs)]),
            "runs": np.frombuffer(b"".join(runs), np.uint8)}


@one_line_errors
def main():
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="nuImages root: the folder with samples/, v1.0-train/ and v1.0-val/")
    print(load_nuimages(parser.parse_args().data, here=True).summary())


if __name__ == "__main__":
    main()

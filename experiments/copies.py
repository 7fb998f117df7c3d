"""Copies of a dataset in which the images or the scans are changed, and all else is linked.

experiments/corruptions.py makes them; any reader opens them. A copy holds the changed files under
their old names, symbolic links to the others, `conditions.json` (see readers/conditions.py)
and `corrupted.json`, which says how it was made. It is written whole or not at all.

An image is shrunk to the size that an encoder sees, unless it is smaller, changed there, and
written in its own size again. `enlarged` looks for the image that readers.files.read_image shrinks
to the changed one. On 1600x900 pictures of nuScenes and nuImages, changed at 224x448, written as
JPEG and read again at that size, it comes so near. Lanczos is the best of Pillow's ways to enlarge:

                       RMS difference, of 255    standard deviation of the change, 1 is right
                       here     Lanczos          here     Lanczos
    fog, severity 3     0.5         0.7          1.00        1.00
    blur, severity 3    0.5         1.1          1.00        1.01
    low light, 3        0.5         2.1          1.00        1.00
    noise, severity 1   1.3        10.0          0.98        0.62
    noise, severity 2   2.5        14.6          0.97        0.61
    noise, severity 3   5.7        21.1          0.93        0.60
    noise, severity 4    12          29          0.87        0.60
    noise, severity 5    22          38          0.79        0.60

What is missing here cannot be had: shrinking takes means over neighbours, and no pixel is darker
than black or brighter than white to make up for that. Of an image that is not enlarged, as in the
miniature world, JPEG alone takes 2 (fog, blur) to 4 (noise) of 255. An image takes 0.4 s of a core
at most, and of the disk 0.3 MB (fog, blur) to 3 MB (noise); nuScenes' validation split has 36 114.
One of PandaSet, of 1920x1080, takes 0.3 s (fog, blur) or 0.6 s (noise, low light) and of the disk
0.3 MB (fog, blur), 0.9 MB (low light) or 3.5 MB (noise).
"""
import functools
import io
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import sparse
from tqdm import tqdm

from plumbing import training
from plumbing.atomic import read_json, write_json
from plumbing.errors import InputError, say
from plumbing.files import read_bytes
from readers.conditions import COPY, FILE, scenes_of
from readers.files import read_image

STEPS = 20  # of `enlarged`


# ---- images --------------------------------------------------------------------------------------

@functools.cache
def shrinking(length, count):
    """The matrix [count, length] by which read_image shrinks an axis."""
    pixels = torch.eye(length)[None, None]  # one lit pixel a row
    seen = F.interpolate(pixels, (length, count), mode="bilinear", antialias=True)
    return sparse.csr_array(seen[0, 0].T.numpy())


def resampled(image, down, across):
    """[h, w, 3] by matrices [H, h] on its columns and [W, w] on its rows -> [H, W, 3]."""
    height, width, _ = image.shape
    image = down @ image.reshape(height, -1)
    image = image.reshape(-1, width, 3).transpose(1, 0, 2)  # [w, H, 3]
    image = across @ image.reshape(width, -1)
    return image.reshape(across.shape[0], -1, 3).transpose(1, 0, 2)


def decoded_at(raw_size, size):
    """How many times smaller read_image lets a JPEG of raw_size be decoded for this size."""
    fits = min(raw // (3 * side // 2) for raw, side in zip(raw_size, size))
    return max(n for n in (1, 2, 4, 8) if n <= max(1, fits))


def enlarged(small, raw_size):
    """The image uint8 [3, h, w] of a raw size (h, w) which read_image shrinks to `small`.

    small: uint8 [3, H, W]. The image is found by gradient descent on the squared difference, with
    Nesterov's momentum, between black and white.
    """
    # The decoder's means over n x n pixels are undone by repetition, the rest is looked for
    size = small.shape[1:]
    n = decoded_at(raw_size, size)
    height, width = (-(-raw // n) for raw in raw_size)
    down, across = shrinking(height, size[0]), shrinking(width, size[1])
    target = small.transpose(1, 2, 0).astype(np.float32)
    step = np.float32(1 / (down.sum(0).max() * across.sum(0).max()))

    image = ahead = step * resampled(target, down.T, across.T)
    for k in range(STEPS):
        difference = resampled(ahead, down, across) - target
        if np.abs(difference).max() < 0.5:  # of 255: it would be rounded away
            break
        before = image
        image = (ahead - step * resampled(difference, down.T, across.T)).clip(0, 255)
        ahead = image + np.float32(k / (k + 3)) * (image - before)
    pixels = ahead.round().clip(0, 255).astype(np.uint8).transpose(2, 0, 1)
    return pixels.repeat(n, 1).repeat(n, 2)[:, :raw_size[0], :raw_size[1]]


def as_jpeg(image):
    """The bytes of a JPEG of an image uint8 [3, H, W]; its colours are not subsampled."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


# ---- what is changed -----------------------------------------------------------------------------

class ChangedImages:
    """The images of a table's frames, changed.

    change: (image uint8 [3, H, W], rng=) -> the same. What is drawn for an image is a function of
    (seed, frame, camera). image_size: (H, W) that the encoder sees.
    """

    def __init__(self, table, change, image_size, seed=0):
        self.table = table
        self.change = change
        self.image_size = image_size
        self.seed = seed

    def __len__(self):
        return self.table["image"][self.table.rows].size

    def paths(self):
        """All files that are changed."""
        return np.char.decode(self.table["image"][self.table.rows].flatten()).tolist()

    def image(self, row, camera):
        """A changed image, uint8 [3, H, W], in the size that the encoder sees."""
        raw_size = self.table["image_size"][row, camera]
        size = np.minimum(self.image_size, raw_size).tolist()
        clean = read_image(self.table.path("image", row, camera), size, raw_size).numpy()
        return self.change(clean, rng=np.random.default_rng((self.seed, row, camera)))

    def files(self, number):
        """{path: content} of the changed file of this number."""
        frame, camera = divmod(number, self.table["image"].shape[1])
        row = self.table.rows[frame]
        raw_size = self.table["image_size"][row, camera].tolist()
        path = self.table["image"][row, camera].decode()
        return {path: as_jpeg(enlarged(self.image(row, camera), raw_size))}


class ChangedScans:
    """The scans of frames of nuScenes, changed; its labels stay with their points.

    change: (rows of a scan [N, C], rng=) -> rows [M, C]. Where `drops`, it leaves out rows and
    makes nothing else of them. What is drawn for a scan is a function of (seed, frame).
    """

    def __init__(self, table, change, drops, seed=0):
        self.table = table
        self.change = change
        self.drops = drops
        self.seed = seed

    def __len__(self):
        return len(self.table)

    def paths(self):
        """All files that are changed."""
        columns = [self.table["scan"][self.table.rows]]
        if self.drops:
            columns.append(self.table["labels"][self.table.rows])
        return [path.decode() for column in columns for path in column if path]

    def files(self, number):
        """{path: content} of the changed files of this number."""
        row = self.table.rows[number]
        path = self.table.path("scan", row)
        self.table.reader.scan(path)  # raises InputError for what is no scan
        scan = np.frombuffer(read_bytes(path), "<f4").reshape(-1, 5)  # x, y, z, intensity, ring
        changed = {self.table["scan"][row].decode(): self.changed(row, scan)}
        labels = self.table["labels"][row]
        if self.drops and labels:
            # The same draw leaves out the same points
            of_points = np.frombuffer(read_bytes(self.table.path("labels", row)), np.uint8)
            changed[labels.decode()] = self.changed(row, of_points)
        return {name: values.tobytes() for name, values in changed.items()}

    def changed(self, row, values):
        """The rows of a frame's scan, or of its labels, as they are in the copy."""
        return self.change(values, rng=np.random.default_rng((self.seed, int(row))))


class Unchanged:
    """Frames in which nothing is changed: their copy gives them a condition."""

    def __init__(self, table):
        self.table = table

    def __len__(self):
        return 0

    def paths(self):
        """All files that are changed: none."""
        return []


class Written(torch.utils.data.Dataset):
    """Files that loading processes write into a folder, the files of a number at a time."""

    def __init__(self, changed, folder):
        self.changed = changed
        self.folder = folder

    def __getitem__(self, key):
        for name, content in self.changed.files(key[1]).items():
            path = self.folder / name
            try:
                path.write_bytes(content)
            except OSError as error:
                raise not_written(path, error) from None


# ---- the copy ------------------------------------------------------------------------------------

def is_there(out, made_by):
    """Whether there is a copy `out` that was made with these arguments.

    Raises InputError where it was made with others, and where something else is there.
    """
    if not os.path.lexists(out):
        return False
    there = read_json(out / COPY)
    if not isinstance(there, dict):
        raise InputError(f"--out {out}: is there, and no copy that was made here; choose another")
    others = [f"{name} {there.get(name)} there, {made_by.get(name)} now"
              for name in there | made_by if there.get(name) != made_by.get(name)]
    if others:
        raise InputError(f"{out}: a copy made with other arguments ({', '.join(others)}); choose "
                         "another folder, or remove it")
    say(f"{out}: made before with the same arguments, taken as it is")
    return True


def write_copy(changed, out, made_by, workers):
    """Write the copy `out`, unless it is there.

    changed: `ChangedImages`, `ChangedScans` or `Unchanged`. made_by: its arguments, {name: value of
    JSON}, with the "condition" of the changed frames.
    """
    root = Path(changed.table.root)
    out = Path(out).absolute()
    if is_there(out, made_by):
        return
    if out.resolve().is_relative_to(root):
        raise InputError(f"--out {out}: lies in the dataset that it is to be a copy of; choose a "
                         "folder outside")
    partial = out.with_name(f"{out.name}.partial")
    if os.path.lexists(partial) and not (partial / COPY).is_file():
        raise InputError(f"{partial}: is in the way; move it, or choose another --out")
    shutil.rmtree(partial, ignore_errors=True)  # of a copy that was not finished
    try:
        write_json(partial / COPY, made_by)
        own = [Path(path).parts for path in (COPY, FILE, *changed.paths())]
        link_all_but(root, partial, own)
        write_json(partial / FILE, conditions_of(changed.table, made_by["condition"]))
        batches = training.in_batches(range(len(changed)))
        loader = training.load(Written(changed, partial), batches, len, workers,
                               torch.device("cpu"))
        for _ in tqdm(loader, f"write {out.name}", mininterval=2):
            pass
        partial.rename(out)
    except OSError as error:
        raise not_written(out, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"written: {out}")


def conditions_of(table, condition):
    """{scene: condition} of a copy in which the frames of a table are of this condition.

    Where the dataset states none for the others, they are "clean".
    """
    scenes = np.array(scenes_of(table.columns))
    named = read_json(Path(table.root, FILE)) or {}
    if not table.conditions:
        named = dict.fromkeys(scenes.tolist(), "clean")
    return named | dict.fromkeys(scenes[table.rows].tolist(), condition)


def link_all_but(source, target, own):
    """Fill the folder `target` with links to what `source` holds, but for the files `own`.

    own: parts of their paths. A folder with such files in it is made anew, another one is linked.
    """
    below = {}
    for first, *rest in own:
        below.setdefault(first, []).extend([rest] if rest else [])
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.name not in below:
            (target / path.name).symlink_to(path.resolve())
        elif below[path.name]:
            link_all_but(path, target / path.name, below[path.name])


def not_written(path, error):
    """The InputError for an OSError of a copy's writing."""
    return InputError(f"{path}: cannot be written ({error.strerror or error}); there is no copy "
                      "now. Make room, or choose another --out, then repeat the command")

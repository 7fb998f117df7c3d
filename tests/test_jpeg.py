"""JPEGs: good ones are decoded as Pillow does, damaged ones are refused in a line."""
import io
import re

import numpy as np
import pytest
from PIL import Image

import readers.jpeg
from plumbing.errors import InputError
from readers import files
from readers.files import TOO_FEW, read_image

SIZE = (96, 160)
NOISE = np.random.default_rng(0).normal(0, 8, (*SIZE, 3))
COARSE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 10, 3), dtype=np.uint8))
STREET = np.clip(np.asarray(COARSE.resize(SIZE[::-1])) + NOISE, 0, 255).astype(np.uint8)
SLOPE = np.linspace(120, 0, 96).astype(np.uint8)[:, None, None]
PICTURES = {"a street": STREET, "one colour": np.full_like(STREET, 77),
            "half black": np.where(np.arange(160)[:, None] < 80, STREET, np.uint8(0)),
            "half grey": np.where(np.arange(96)[:, None, None] < 48, STREET, np.uint8(128)),
            "a slope below": np.where(np.arange(96)[:, None, None] < 16, STREET, SLOPE)}
KINDS = {"baseline": {}, "fine": {"quality": 100, "subsampling": 0}, "coarse": {"quality": 10},
         "4:2:2": {"subsampling": 1}, "tables of its own": {"optimize": True},
         "coarse, with its own": {"quality": 10, "optimize": True}, "grey": {"mode": "L"},
         "progressive": {"progressive": True}, "rows": {"restart_marker_rows": 1},
         "restarts": {"restart_marker_blocks": 3},
         "restarts, progressive": {"restart_marker_blocks": 7, "progressive": True}}


def refusal(read, path, *arguments):
    """The message with which `read` refuses a file: one line that begins with its name."""
    with pytest.raises(InputError) as error:
        read(path, *arguments)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value)


def jpeg(kind="baseline", picture="a street"):
    """The bytes of a JPEG."""
    options = {"mode": "RGB", "quality": 90, "exif": b"Exif\0\0" + bytes(300)} | KINDS[kind]
    image = Image.fromarray(PICTURES[picture]).convert(options.pop("mode"))
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


# ---- good ones ---------------------------------------------------------------------------------

def test_a_pillow_that_cannot_be_watched_refuses_no_good_picture(tmp_path, monkeypatch, capsys):
    assert files.can_be_watched()
    (tmp_path / "a.jpg").write_bytes(jpeg())
    before = read_image(tmp_path / "a.jpg", (24, 40), SIZE)
    monkeypatch.setattr(files, "decode_jpeg", lambda image, content: image._getdecoder())
    files.can_be_watched.cache_clear()
    try:
        assert not files.can_be_watched()
        assert "damaged JPEGs are not found out" in capsys.readouterr().out
        assert np.array_equal(read_image(tmp_path / "a.jpg", (24, 40), SIZE), before)
    finally:
        files.can_be_watched.cache_clear()


def scan_by_scan():
    """A JPEG of three scans, one a colour, without progression: three grey JPEGs in one."""
    grey = []
    for channel in range(3):
        file = io.BytesIO()
        Image.fromarray(STREET[:, :, channel]).save(file, "JPEG")
        grey.append(file.getvalue())
    frame = grey[0].index(b"\xff\xc0")
    start = grey[0].index(b"\xff\xda")
    parts = b"\3\1\x11\0\2\x11\0\3\x11\0"
    head = grey[0][:frame] + b"\xff\xc0\0\x11" + grey[0][frame + 4:frame + 9] + parts
    head += grey[0][frame + 13:start]
    scans = [grey[n][start:start + 5] + bytes([n + 1]) + grey[n][start + 6:-2] for n in range(3)]
    return head + b"".join(scans) + b"\xff\xd9"


def loaded(content, size, load):
    """The pixels of a JPEG that `load` decodes at `size` (W, H) or more."""
    image = Image.open(io.BytesIO(content))
    image.draft("RGB", size)
    load(image)
    return np.array(image)


def assert_decoded_as_pillow_does(content, *sizes):
    for size in sizes:
        ours = loaded(content, size, lambda image: files.decode_jpeg(image, content))
        assert np.array_equal(ours, loaded(content, size, lambda image: image.load()))


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_good_jpegs_are_decoded_as_pillow_does(kind, picture):
    content = jpeg(kind, picture)
    more_behind = content + b"x\xff\xd9\xff\xd8" + bytes(99)
    filled = content[:-2] + b"\xff" * 4 + b"\xd9"
    for variant in (content, more_behind, filled):
        assert_decoded_as_pillow_does(variant, SIZE[::-1], (40, 24))  # whole, and at a quarter


def test_zeros_are_no_hole_where_they_say_that_nothing_follows():
    content = jpeg("progressive", "one colour")
    tables = jpeg()[jpeg().index(b"\xff\xc4"):jpeg().index(b"\xff\xda")]  # its own follow later on
    content = content.replace(b"\xff\xc4", tables + b"\xff\xc4", 1)
    assert_decoded_as_pillow_does(content, SIZE[::-1])


def test_colours_may_come_one_after_the_other(tmp_path):
    assert_decoded_as_pillow_does(scan_by_scan(), SIZE[::-1])
    (tmp_path / "image.jpg").write_bytes(hole(scan_by_scan(), 4000, 600))
    refusal(read_image, tmp_path / "image.jpg", SIZE)


def test_the_real_images_are_decoded_as_pillow_does(real):
    paths = sorted((real / "samples").glob("CAM_*/*.jpg"))
    for path in paths:
        assert_decoded_as_pillow_does(path.read_bytes(), (672, 336))
    assert len(paths) == 6


# ---- damage ------------------------------------------------------------------------------------

def frame_of(content):
    """Where the segment with a JPEG's height and width begins."""
    return re.search(rb"\xff[\xc0\xc2]\0[\x0b\x11]\x08", content).start()


def taller(content, rows):
    """The same data for a picture with more rows."""
    at = frame_of(content) + 5
    return content[:at] + (SIZE[0] + rows).to_bytes(2, "big") + content[at + 2:]


def wider(content, columns):
    """The same data for a picture of so many columns."""
    at = frame_of(content) + 7
    return content[:at] + columns.to_bytes(2, "big") + content[at + 2:]


def hole(content, begin, length):
    return content[:begin] + bytes(length) + content[begin + length:]


def without_restart(content, number):
    """Without the data between two restarts."""
    marks = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", content)]
    return content[:marks[number - 1]] + content[marks[number]:]


def inside(content, part):
    """A place in the compressed data."""
    begin = content.rindex(b"\xff\xda") + 14
    return begin + int(part * (len(content) - 2 - begin))


def in_the_middle(change):
    """A harm from 30 to 50 % of the compressed data: change(the data there) -> other data."""
    def harm(content):
        begin, end = inside(content, 0.3), inside(content, 0.5)
        return content[:begin] + change(content[begin:end]) + content[end:]
    return harm


def in_the_codes(content):
    """A hole in the rarer half of what the last table has codes for."""
    begin = content.rindex(b"\xff\xc4")
    end = begin + 2 + int.from_bytes(content[begin + 2:begin + 4], "big")
    middle = (begin + 21 + end) // 2
    return hole(content, middle, end - middle)


HARMS = {
    "a hole": (in_the_middle(lambda b: bytes(len(b))), "damaged"),
    "bytes missing": (lambda b: b[:inside(b, 0.2)] + b[inside(b, 0.7):], "damaged"),
    "bytes of another file": (in_the_middle(lambda b: np.random.default_rng(2).bytes(len(b))),
                              "damaged|broken"),
    "an end": (in_the_middle(lambda b: b"\xff\xd9" + b), TOO_FEW),
    "a marker": (in_the_middle(lambda b: b"\xff\x99" + b), "damaged|broken"),
    "too few rows": (lambda b: taller(b, 16), TOO_FEW),
    "too many rows": (lambda b: taller(b, -16), "damaged: its data are for more than the picture"),
    "no end": (lambda b: b[:-2], TOO_FEW),
    "half of it": (lambda b: b[:len(b) // 2], TOO_FEW),
    "a hole between segments": (lambda b: hole(b, b.index(b"\xff\xe0") + 18, 310),
                                "damaged: bytes between its segments"),
    "a hole in the steps": (lambda b: hole(b, b.index(b"\xff\xdb") + 20, 30),
                            "damaged: a hole in its tables"),
    "a hole in the codes": (in_the_codes, "damaged: a hole in its tables"),
    "a hole in the first scan": (lambda b: hole(b, b.index(b"\xff\xda") + 20, 60), "damaged"),
    "a coding unknown": (lambda b: b[:frame_of(b) + 1] + b"\xc5" + b[frame_of(b) + 2:], "broken")}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_jpegs_are_refused(tmp_path, kind, harm):
    change, words = HARMS[harm]
    (tmp_path / "image.jpg").write_bytes(change(jpeg(kind)))
    message = refusal(read_image, tmp_path / "image.jpg", SIZE)
    assert re.search(words if kind == "baseline" else "damaged|broken", message)


@pytest.mark.parametrize("kind, picture, columns", [
    ("grey", "a street", 8), ("baseline", "a street", 16),
    ("coarse, with its own", "one colour", 32)])
def test_a_block_too_few_is_seen(tmp_path, kind, picture, columns):
    """Two of them, where a block can take two bits."""
    path = tmp_path / "image.jpg"
    options = {"mode": "RGB", "quality": 90} | KINDS[kind]
    image = Image.fromarray(PICTURES[picture][:8]).convert(options.pop("mode"))
    image.save(path, **options)
    read_image(path, SIZE)
    path.write_bytes(wider(path.read_bytes(), 160 + columns))
    assert TOO_FEW in refusal(read_image, path, SIZE)


@pytest.mark.parametrize("number", [3, -1])
def test_a_restart_that_is_missing(tmp_path, number):
    (tmp_path / "image.jpg").write_bytes(without_restart(jpeg("restarts"), number))
    assert "damaged: " in refusal(read_image, tmp_path / "image.jpg", SIZE)


@pytest.mark.parametrize("kind", ["baseline", "tables of its own", "grey"])
def test_a_hole_is_seen_where_all_else_is_in_order(tmp_path, monkeypatch, kind):
    content = jpeg(kind)
    path = tmp_path / "image.jpg"
    silent = 0
    for part in np.linspace(0.02, 0.95, 25):
        path.write_bytes(hole(content, inside(content, part), 16))
        with monkeypatch.context() as without:
            without.setattr(readers.jpeg, "HOLE", bytes(10**6))
            try:
                found = read_image(path, SIZE).numpy()
                wrong = np.abs(found - STREET.transpose(2, 0, 1).astype(int))
                silent += wrong.mean() > 10
            except InputError:
                pass
        refusal(read_image, path, SIZE)
    assert silent > 0  # libjpeg would have said nothing

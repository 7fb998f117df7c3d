"""Where a JPEG's compressed data are: its segments, its coding tables, and the holes in them.

`readers.files.decode_jpeg` uses this to see that a JPEG is damaged.
"""
import re

import numpy as np

# Markers: the second of the two bytes that begin a segment
EOI, SOS, DHT, DRI, RESTARTS = 0xD9, 0xDA, 0xC4, 0xDD, range(0xD0, 0xD8)
MARKER = re.compile(rb"\xff[^\0\xff]")              # and not data, nor filling before another
ALONE = {0x01, 0xD8, EOI, *RESTARTS}                # they have no length and no content
FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
BASELINE = {0xC0, 0xC1}                             # frames of which one scan will do
HUFFMAN = {0xC0, 0xC1, 0xC2}                        # frames whose coding is Huffman's
HOLE = bytes(16)  # wherever it begins, eight of its zeros lie at a multiple of eight
ZEROS, ONES = bytes(8), b"\xff\0" * 8              # 64 bits as data


def stretches(content):
    """The stretches of compressed data in a JPEG, and whether all are of a single scan.

    A stretch is (its end, what to fill it up with: bits that are no code, or one of which a block
    takes many). There are none unless the data are Huffman-coded. Raises ValueError for holes in
    them and in the tables, and for restarts out of order. A short hole can leave all else in
    order, and coded data have no long runs of zeros, unless zeros say that nothing follows.
    """
    found, codes = [], {}
    begin, coded, frame = None, False, None  # coded: zeros are the code of a number in this scan
    scans = restarts = 0
    zeros = 0 in np.frombuffer(content, np.uint64, len(content) // 8)  # else there is no hole
    for mark, kind, payload in segments(content):
        # Any marker ends the stretch before it
        if begin is not None:
            end = mark
            while content[end - 1] == 255:  # a marker may have any number of these before it
                end -= 1
            found.append((end, ZEROS if coded else ONES))
            if zeros and coded and content.find(HOLE, begin, end) >= 0:
                raise ValueError("damaged: a hole of zeros in its data")
        begin = None

        if kind in FRAMES:
            frame = kind
        elif kind == DHT:
            codes |= codes_of_zeros(payload)
        elif kind == SOS:
            coded = zeros_are_coded(payload, codes)
            begin = mark + 4 + len(payload)
            restarts = 0
            scans += 1
        elif kind in RESTARTS:
            if kind != RESTARTS[restarts % 8]:
                raise ValueError("damaged: a restart is missing")
            begin = mark + 2
            restarts += 1
    if frame not in HUFFMAN:
        return [], False
    return found, scans == 1 and frame in BASELINE


def segments(content):
    """A JPEG's segments up to its end: (place of the marker, marker, payload)."""
    end = parts = 0
    data = several = False  # several: there are more scans than one, or restarts
    while found := MARKER.search(content, end):
        mark = found.start()
        if not data and content[end:mark].strip(b"\xff"):
            raise ValueError("damaged: bytes between its segments")

        # The marker, and two bytes with the length of what follows it
        kind = content[mark + 1]
        end = mark + 2
        if kind not in ALONE:
            end += int.from_bytes(content[end:end + 2], "big")
        payload = content[mark + 4:end]
        yield mark, kind, payload

        # Where the next one may be. After the data of a single scan only the end can come.
        data = kind == SOS or kind in RESTARTS
        if kind in FRAMES:
            several |= kind not in BASELINE
            parts = payload[5]
        several |= kind == DRI or kind == SOS and payload[0] < parts
        if kind == SOS and not several:
            end = end_of_picture(content, end)
        elif kind == EOI:
            return


def end_of_picture(content, begin):
    """Place of the first end marker, or of the last byte: as MARKER would find, but faster."""
    places = [len(content) - 1]
    for start in (begin, begin + 1):
        pairs = np.frombuffer(content, "<u2", (len(content) - start) // 2, start)
        is_end = pairs == EOI << 8 | 0xFF
        if is_end.any():
            places.append(start + 2 * int(is_end.argmax()))
    return min(places)


def codes_of_zeros(payload):
    """{table: symbol whose code is all zeros} of a DHT segment. ValueError for a hole in it."""
    found = {}
    while payload:
        count = sum(payload[1:17])
        symbols = payload[17:17 + count]
        if symbols.count(0) > 1:  # each is there once
            raise ValueError("damaged: a hole in its tables")
        found[payload[0]] = symbols[0] if symbols else 0
        payload = payload[17 + count:]
    return found


def zeros_are_coded(payload, codes):
    """Whether zeros are the code of a number (and not of an end) in the scan of an SOS segment."""
    *_, last, bits = payload
    # Only first coefficients; or a scan that refines numbers, whose bits are no codes
    if last == 0 or bits >= 16:
        return False
    tables = [16 | table & 15 for table in payload[2:2 * payload[0] + 1:2]]
    return any(codes.get(table, 0) & 15 for table in tables)

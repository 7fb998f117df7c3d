"""Fingerprints of weights and of frames: they say what a thing is, whatever its path and date.

A fingerprint is a small dict that a person can read:
{"name": "dinov2_vits14", "feature": "prenorm", "weights": "3f2a..."}. Its hashes are of content
alone, so what was moved or copied keeps them. Every checkpoint and every result has the
fingerprints of its sources as "made_from": {"encoder": {...}, "frames": {...}, "input": {...}}.
The input is what no weights tell: image size, and how a scan becomes the 3D encoder's input.
Wherever two of them meet, `differences` compares them.
"""
import hashlib

from plumbing.errors import InputError, say


def digest(parts):
    """16 hexadecimal digits of an iterable of bytes. The borders between the parts count too."""
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def of_weights(module):
    """The hash of a module's parameters and buffers: their names, types, shapes and values.

    It is the same on every device.
    """
    import torch  # here, so that reading tables does not need it

    def parts():
        for name, value in module.state_dict().items():
            yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return digest(parts())


def of_frames(tables, labels=False, files=False):
    """What the frames of some `FrameTable`s are, wherever they lie.

    labels: their labels count too. files: so do the files, which may change while the tables stay
    the same.
    """
    each = []
    for table in tables:
        of_table = table.fingerprint(labels)
        each.append(of_table | {"files": table.files(labels)} if files else of_table)
    if len(each) == 1:
        return each[0]
    both = {}
    for one in each:
        for name, value in one.items():
            both.setdefault(name, []).append(value)
    return {name: sum(values) if isinstance(values[0], int) else digest(map(str.encode, values))
            for name, values in both.items()}


def words(fingerprint):
    """A fingerprint as a person reads it."""
    return ", ".join(f"{name} {value}" for name, value in fingerprint.items())


def differences(before, now):
    """What differs of the sources that both have, in words that name both; "" for nothing.

    before, now: {source: fingerprint}.
    """
    changed = [source for source in now if source in before and before[source] != now[source]]
    return "; ".join(f"{source}: {words(before[source])}; now: {words(now[source])}"
                     for source in changed)


def check(subject, before, now, way_out):
    """Raise InputError, naming both, where sources differ from what something was made from.

    subject: what the message begins with.
    before: the thing's "made_from". One line names all sources that are not in it.
    now: {source: fingerprint}.
    way_out: what the message ends with.
    """
    changed = differences(before, now)
    if changed:
        raise InputError(f"{subject} was made from another {changed}; {way_out}")
    unknown = [source for source in now if source not in before]
    if unknown:
        say(f"{subject} does not say which {' and '.join(unknown)} it was made from, so this is "
            "not checked")

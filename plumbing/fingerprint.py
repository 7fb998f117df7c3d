"""What a thing is, whatever its path and date: fingerprints of weights and of frames, and the one comparison of them.

A fingerprint is a small dict that a person can read, {"name": "dinov2_vits14", "feature": "prenorm", "weights": "3f2a..."}. Its
hashes are of content alone, so what was moved or copied keeps them. Every checkpoint and every result has, as "made_from", the
fingerprints of its sources: {"encoder": {...}, "frames": {...}}. Wherever two artefacts meet, `differences` compares them.
"""
import hashlib

from errors import InputError, say


def digest(parts):
    """16 hexadecimal digits of an iterable of bytes. Where one part ends and the next begins counts too."""
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def of_weights(module):
    """The hash of a module's parameters and buffers: of their names, types, shapes and values, on whatever device."""
    import torch  # here, so that reading tables does not need it

    def parts():
        for name, value in module.state_dict().items():
            yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return digest(parts())


def with_files(index, rows, labels):
    """The fingerprint of frames (of an `Index` or `ImageIndex`) and of their files, which may be others under the same tables."""
    return index.fingerprint(rows, labels) | {"files": index.files(rows, labels)}


def words(fingerprint):
    """A fingerprint as a person reads it."""
    return ", ".join(f"{name} {value}" for name, value in fingerprint.items())


def differences(before, now):
    """What differs of the sources that both have, {source: fingerprint} each, in words that name both; "" for nothing."""
    return "; ".join(f"{source}: {words(before[source])}; now: {words(now[source])}"
                     for source in now if source in before and before[source] != now[source])


def check(subject, before, now, way_out):
    """Raise InputError, naming both, where sources differ from what something was made from.

    Args: subject: what the message begins with. before: its "made_from", {} where it is older than fingerprints, which is said
    in a line. now: {source: fingerprint}. way_out: what the message ends with.
    """
    if changed := differences(before, now):
        raise InputError(f"{subject} was made from another {changed}; {way_out}")
    if unknown := [source for source in now if source not in before]:
        say(f"{subject} does not say which {' and '.join(unknown)} it was made from; it is older than fingerprints, so this is not checked")

"""Flags: a parser whose errors are one line, and types for numbers that have to make sense.

The types refuse `nan`, infinities and impossible values before any file is read, in a line that
names the flag.
"""
import argparse
import math

from plumbing.errors import InputError


# What earlier versions called otherwise: part of the message of a refusal, and what it is now
MOVED = {
    "arguments: --warmup": "it is --warmup-steps of stage1.py, --warmup-part of stage2.py, "
                           "--warmup-epochs of probe.py and finetune.py",
    "arguments: --checkpoint": "it is --recompute",
    "arguments: --finetune": "it is finetune.py, with the same flags",
    "invalid choice: 'nuimages'": "it is --task seg --data nuimages=PATH"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows its description as it is written and takes no abbreviations.

    A refused command line is an InputError: one line, exit code 2.
    """

    def __init__(self, description=None, **options):
        options = {"allow_abbrev": False} | options
        super().__init__(description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        if message.startswith("argument "):  # shown as "--lr nan: must be a finite number, above 0"
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        for before, now in MOVED.items():
            if before in message:
                raise InputError(f"{message}; {now}")
        raise InputError(f"{message} (--help says what there is)")


class Distinct(argparse.Action):
    """Stores each of a flag's values once, in the order of their first occurrence."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def whole(least=0, most=2**63 - 1):
    """The type of a flag for whole numbers from `least` to `most`."""
    no_limit = most >= 2**31 - 1  # none that a user would reach
    limits = f"at least {least}" if no_limit else f"from {least} to {most}"

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {limits}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text}: must be at most {most}")
        return value
    return parse


def real(least=-math.inf, most=math.inf, above=-math.inf, below=math.inf):
    """The type of a flag for finite numbers x: least <= x <= most and above < x < below."""
    given = {"at least": least, "above": above, "at most": most, "below": below}
    finite = [f"{name} {limit:g}" for name, limit in given.items() if math.isfinite(limit)]
    limits = " and ".join(finite)

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            more = f", {limits}" if limits else ""
            raise argparse.ArgumentTypeError(f"{text}: must be a finite number{more}")
        if not (least <= value <= most and above < value < below):
            raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
        return value
    return parse


COUNT = whole(1, 2**31 - 1)         # of frames, steps, views, layers, pixels
SEED = whole(0)                     # below 2^63, so that a time in nanoseconds is a seed
WORKERS = whole(0, 1024)            # loading processes; 0: the main process loads
POSITIVE = real(above=0, most=1e6)  # learning rates, metres
RATE = real(least=0, most=1e6)      # learning rates that may be 0, weight decay, minutes

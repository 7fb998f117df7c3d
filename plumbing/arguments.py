"""Flags: a parser whose errors are one line, and types for numbers that have to make sense.

`nan`, infinities and impossible values are refused before anything is read, in a line that names the flag.
"""
import argparse
import math

from errors import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows its description as it is written. What it refuses is an InputError: one line, exit code 2."""

    def __init__(self, description=None, **options):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        if message.startswith("argument "):
            message = message.removeprefix("argument ").replace(": ", " ", 1)  # "--lr nan: must be a finite number, above 0"
        raise InputError(f"{message} (--help says what there is)")


class Distinct(argparse.Action):
    """Of several values of a flag, each once, in the order of their first occurrence."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def whole(least=0, most=2**63 - 1):
    """The type of a flag for whole numbers from `least` to `most`."""
    limits = f"at least {least}" if most >= 2**31 - 1 else f"from {least} to {most}"

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {limits}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be {limits if value < least else f'at most {most}'}")
        return value
    return parse


def real(least=-math.inf, most=math.inf, above=-math.inf, below=math.inf):
    """The type of a flag for finite numbers from `least` to `most` that are above and below two more limits."""
    given = {"at least": least, "above": above, "at most": most, "below": below}
    limits = " and ".join(f"{name} {limit:g}" for name, limit in given.items() if math.isfinite(limit))

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text}: must be a finite number" + (f", {limits}" if limits else ""))
        if not (least <= value <= most and above < value < below):
            raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
        return value
    return parse


COUNT = whole(1, 2**31 - 1)  # of frames, steps, views, layers, pixels
SEED = whole(0)             # below 2^63, so that a time in nanoseconds is one
WORKERS = whole(0, 1024)    # processes; 0: the work is done in this one
POSITIVE = real(above=0, most=1e6)    # learning rates, metres
RATE = real(least=0, most=1e6)        # learning rates that may be 0, weight decay, minutes

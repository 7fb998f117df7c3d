"""The one exception that means "your input, not a bug", and how a script shows it: one line, exit code 2."""
import functools
import sys


class InputError(Exception):
    """A flag, file or folder that the user gave cannot be used. The message names it and the way out, in one line."""


def one_line_errors(main):
    """Decorator of a script's `main`: an InputError becomes one line on stderr and exit code 2.

    Other exceptions keep their traceback: they are bugs. An InputError raised in a data-loading process arrives with
    that process's traceback in front of it; only its last line, the message, is shown.
    """
    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            line = str(error).strip().splitlines()[-1].removeprefix("errors.InputError: ")
            print(f"{sys.argv[0]}: error: {line}", file=sys.stderr, flush=True)
            sys.exit(2)
    return wrapper

"""Errors that are no bugs end a script with one line and exit code 2.

They are of two kinds: an input that cannot be used, and a machine that lacks something.
"""
import functools
import os
import re
import sys


def say(line):
    """Print a line, in the first process only."""
    if os.environ.get("RANK", "0") == "0":  # torchrun's
        print(line, flush=True)


class InputError(Exception):
    """A flag, file or folder that the user gave cannot be used.

    The message names it and the way out, in one line.
    """


SHARED_MEMORY = ("Shared memory is full: give Docker --shm-size 8g or --ipc=host, or use fewer "
                 "--workers")
MEMORY = "The memory is used up: use fewer --workers"
FILES = ("Raise the limit of open files (`ulimit -n 65536`; Docker: --ulimit nofile=65536), or use "
         "fewer --workers")
PROCESSES = ("Raise the limit of processes (`ulimit -u`; Docker: --pids-limit), or use fewer "
             "--workers")
CRASH = ("A library crashed, or memory is used up: use fewer --workers, give Docker --shm-size 8g "
         "or --ipc=host; with --workers 0 a crash shows where it is")
GPU_MEMORY = ("Add --recompute (stages 1 and 2, s3pt.train), use more processes, or a smaller "
              "--batch")
OTHER = "Another process of this run ended first: do what its own message says"

# Faults of the machine, not of the program: (pattern of "TypeName: message", what to do about it).
# The first pattern that fits counts. The line shows what the pattern matched, then what to do.
FAULTS = (
    (r"DataLoader worker .* signal: Bus error", SHARED_MEMORY),
    (r"unable to [^<]*</torch_.*>: No space left on device", SHARED_MEMORY),
    (r"DataLoader worker .* signal: Killed", MEMORY),
    (r"[Cc]an(?:no|')t allocate memory|^MemoryError", MEMORY),
    (r"received 0 items of ancdata|Too many open files|Pin memory thread exited", FILES),
    (r"DataLoader worker .* exit code 24\b", FILES),  # EMFILE, see plumbing/endings.py
    (r"DataLoader worker .* (signal: [\w ]+|exit code \d+|exited unexpectedly)", CRASH),
    (r"BrokenProcessPool", CRASH),
    (r"can't start new thread|Resource temporarily unavailable", PROCESSES),
    (r"CUDA out of memory|CUDA error: out of memory", GPU_MEMORY),
    (r"pair\.cc:\d+\].*Connection (closed|reset) by peer|remote process exited", OTHER),
)


def line_of(error):
    """The line that says what to do about an InputError or a fault of the machine; None for a bug.

    An error of a loading process has that process's traceback in front of it. Only its last line,
    the message, is shown.
    """
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, InputError):
        return f"{sys.argv[0]}: error: {lines[-1].removeprefix('plumbing.errors.InputError: ')}"
    from_worker = lines[0].startswith("Caught ")
    message = lines[-1] if from_worker else lines[0]
    for pattern, advice in FAULTS:
        found = re.search(pattern, f"{type(error).__name__}: {message}")
        if found:
            return f"{sys.argv[0]}: error: {found.group()}. {advice}; then repeat the command"
    return None


def one_line_errors(main):
    """Decorator of a script's `main`: what `line_of` knows becomes one line on stderr, exit code 2.

    Other exceptions are bugs and keep their traceback.
    """
    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal may lack the letters of a file's name
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except Exception as error:
            line = line_of(error)
            if line is None:
                raise
            print(line, file=sys.stderr, flush=True)
            sys.exit(2)
    return wrapper

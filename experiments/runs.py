"""Commands that need each other's folders, each run once: for experiments that are many runs."""
import contextlib
import fcntl
import shlex
import time
from pathlib import Path

from demo import ROOT
from demo import run as run_command
from plumbing.atomic import read_json, write_json
from plumbing.errors import InputError, say
from plumbing.fingerprint import digest


@contextlib.contextmanager
def alone(folder):
    """A `with` block that one process at a time is in, for a folder; another one waits."""
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = Path(folder, ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{folder}: another process writes there; this one waits for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def writing(folder):
    """A `with` block whose OSErrors become an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error}); make room, or choose "
                         "another folder, then repeat the command") from None


class Runs:
    """The runs of one seed, each made once.

    commands: {run: command}. In a command, {name} is the folder of another run, which is made
    first; {here} is the run's own, and {seed} the seed. `base` and `fields` are what a kind of
    experiment says further.

    done.json remembers, of each run that has finished, its command, its seconds and its recipe. The
    recipe is a hash of the command, of the encoder as it was and of the recipes of the runs that it
    needs. Of the runs in `worlds`, it is of the command alone. A run that is gone, or whose recipe
    is another one now, is made again.
    """

    worlds = ()  # runs that do not depend on the encoder as it was

    def __init__(self, folder, seed, commands):
        self.folder = Path(folder)
        self.seed = seed
        self.commands = commands
        self.note = self.folder / "done.json"
        self.done = read_json(self.note) or {}
        if self.note.exists() and not self.done:
            say(f"{self.note}: cannot be read, so that what has finished is made again")
        self.used = set()

    def base(self):
        """The image encoder as it was, a file or a name: "base" among the runs."""
        raise NotImplementedError

    def fields(self):
        """What else stands in braces in a command; a list is several words."""
        return {}

    def read(self, name):
        """What a run wrote into NAME.json. Raises InputError where that cannot be read."""
        content = read_json(f"{self.folder / name}.json")
        if content is None:
            raise InputError(f"{self.folder / name}.json: cannot be read; remove it, and what it "
                             "is of is made again")
        return content

    def make(self, name, command, *needed):
        """Run a command, unless it has finished before by the recipe that it has now.

        needed: names of the runs that it needs. Returns its folder.
        """
        here = self.folder / name
        there = any(Path(f"{here}{end}").exists() for end in ("", ".json", ".md"))
        recipe = self._recipe(name, command, needed)
        if not there or self.done.get(name, {}).get("recipe") != recipe:
            begin = time.time()
            run_command(command)
            seconds = round(time.time() - begin, 1)
            self.done[name] = {"command": command, "recipe": recipe, "seconds": seconds}
            write_json(self.note, self.done)
        self.used.add(name)
        return here

    def _recipe(self, name, command, needed):
        """The recipe of a run: see Runs."""
        parts = [command.encode()]
        if name not in self.worlds:
            file = Path(ROOT, self.base())
            parts.append(file.read_bytes() if file.is_file() else self.base().encode())
        parts += [self.done[other]["recipe"].encode() for other in needed if other in self.done]
        return digest(parts)

    def run(self, name):
        """The folder of a run, or the encoder as it was. Makes first what it needs."""
        return self.base() if name == "base" else self.follow(name, self.commands[name])

    def follow(self, name, command):
        """Make a run by a command as in `commands`, after the runs that it names."""
        named = [other for other in ("base", *self.commands) if f"{{{other}}}" in command]
        places = {other: self.run(other) for other in named}
        places |= {"here": self.folder / name, "seed": self.seed}
        return self.make(name, self.filled(command, places), *named)

    def filled(self, command, places):
        """A command whose braces are filled, by `fields` and {name: word, or list of words}."""
        places = self.fields() | places
        words = {name: place if isinstance(place, list) else [str(place)]
                 for name, place in places.items()}
        return command.format(**{name: shlex.join(each) for name, each in words.items()})

"""A run's folder: checkpoints, the log, and what happens when a run is interrupted or goes astray.

OUT/last.pth is the newest checkpoint, OUT/previous.pth the one before it, OUT/log.jsonl has a line
an epoch. A checkpoint is written whole or not at all (plumbing/atomic.py). Whenever a run is
killed, one of the two checkpoints is whole, and the command that started the run goes on from it
as if nothing had happened.
"""
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from plumbing.atomic import save, write_json, write_text
from plumbing.endings import obey_second_signal
from plumbing.errors import InputError, say
from plumbing.fingerprint import differences
from plumbing.training import rank, sum_over_processes, world
from plumbing.weights import is_outdated, read

# Arguments that may differ when a run is resumed
MAY_CHANGE = {"data", "out", "device", "workers", "save_every", "on_bad_frame", "restart",
              "recompute"}
# Arguments that say where a source is, and the source. Its fingerprint is compared instead
WHERE = {"version": "frames", "encoder": "encoder", "weights": "encoder", "hub": "encoder",
         "feature": "encoder", "stage1": "stage1", "depth_maps": "depth maps"}
BAD_FRAMES = 0.01  # --on-bad-frame skip leaves out this part of the frames at most


# ---- checkpoints --------------------------------------------------------------------------------

def find_last(args, made_from=None):
    """The newest whole checkpoint of the run in --out, finished or not; None if there is no run.

    made_from: {source: fingerprint} of the run that is to go on.

    Raises InputError if --out holds another run: one with other fingerprints or arguments. With
    --restart that run's files are set aside instead, into OUT/replaced-N. A last.pth that cannot be
    read is named and set aside, and previous.pth is taken. All processes must call it.
    """
    # What is there? All processes must have read it before anything is moved
    out = Path(args.out)
    _check_writable(out)
    checkpoint, damaged = _newest_whole(out)
    _check_agreement(args.out, [checkpoint and checkpoint["step"], *map(str, damaged)])
    if checkpoint is None:
        if damaged:
            raise InputError(f"{damaged[0]}: not a checkpoint, or damaged; "
                             "delete it or choose another --out")
        return None

    if is_outdated(checkpoint):
        if not args.restart:
            raise InputError(f"--out {args.out} holds a run of an earlier version of this project, "
                             "whose flags and keys had other names; choose another --out, or add "
                             "--restart to set that run's files aside")
        _set_aside(out)
        return None

    # Is it the same run? A source whose fingerprints are known may have another path
    before = checkpoint.get("made_from", {})
    now = made_from or {}
    known = {name for name, source in WHERE.items() if source in before and source in now}
    reasons = []
    changed = _changed(vars(args), checkpoint["args"], MAY_CHANGE | known)
    if changed:
        reasons.append(f"with other arguments ({changed})")
    others = differences(before, now)
    if others:
        reasons.append(f"made from other {others}")
    if reasons and args.restart:
        _set_aside(out)
        return None
    if reasons:
        raise InputError(f"--out {args.out} holds a run {' and '.join(reasons)}; repeat its "
                         "command with the same to resume it, choose another --out, or add "
                         "--restart to set that run's files aside")

    # It is: go on from it
    unknown = now.keys() - before.keys()
    if unknown:
        say(f"{args.out}: its checkpoint does not say which {' and '.join(sorted(unknown))} it was "
            "made from, so this is not checked")
    if rank() == 0:
        for path in damaged:
            path.rename(path.with_suffix(".damaged"))
            print(f"{path}: not a checkpoint, or damaged; set aside as {path.stem}.damaged, "
                  "previous.pth is taken", flush=True)
        what = "finished, at" if checkpoint["step"] == checkpoint.get("total") else "going on from"
        print(f"{args.out}: {what} step {checkpoint['step']}", flush=True)
    return checkpoint


def _check_writable(out):
    """Raise InputError unless files can be written to `out`, which need not be there yet."""
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir():
        raise InputError(f"--out {out}: {above} is no folder; choose another")
    if not os.access(above, os.W_OK):
        raise InputError(f"--out {out}: {above} is a folder that cannot be written to; "
                         "choose another")


def _newest_whole(out):
    """The newest checkpoint in `out` that can be read, or None; the paths of damaged newer ones."""
    def is_of_a_run(content):
        return (isinstance(content, dict) and isinstance(content.get("args"), dict)
                and isinstance(content.get("step"), int))

    damaged = []
    for path in (out / "last.pth", out / "previous.pth"):
        if not path.is_file():
            continue
        try:
            checkpoint = read(path)
        except InputError:
            checkpoint = None
        if is_of_a_run(checkpoint):
            return checkpoint, damaged
        damaged.append(path)
    return None, damaged


def _check_agreement(out, found):
    """Raise InputError unless all processes have found the same."""
    everyone = [found] * world()
    if world() > 1:
        dist.all_gather_object(everyone, found)
    if any(other != found for other in everyone):
        raise InputError(f"--out {out}: the processes do not find the same checkpoint there; "
                         "all nodes must share the folder")


def _changed(now, before, ignored):
    """The arguments that differ, in words; "" for none.

    A flag that was not given may be missing: the run may be older than the flag.
    """
    changes = []
    for name in sorted((now.keys() | before.keys()) - ignored):
        if (now.get(name) or None) != (before.get(name) or None):
            flag = "--" + name.replace("_", "-")
            changes.append(f"{flag} {before.get(name)}, now {now.get(name)}")
    return ", ".join(changes)


def _set_aside(out):
    """Move a run's files into a new folder OUT/replaced-N (first process)."""
    if rank() > 0:
        return
    candidates = (out / f"replaced-{n}" for n in range(1, 10**6))
    aside = next(path for path in candidates if not path.exists())
    aside.mkdir()
    for path in [*out.glob("*.pth"), *out.glob("*.json*")]:
        path.rename(aside / path.name)
    print(f"--restart: the run in {out} is now in {aside}", flush=True)


class Saver:
    """When to write last.pth: at each epoch's end, every --save-every minutes, and after a signal.

    The signals are SIGTERM and Ctrl-C; the run ends after that checkpoint.
    per_epoch, total: steps of an epoch and of the run.
    """

    def __init__(self, args, per_epoch, total):
        self.out = Path(args.out)
        self.minutes = args.save_every
        self.per_epoch = per_epoch
        self.total = total
        self.time = time.time()  # of the last checkpoint
        self.done = 0            # steps
        self.asked = 0           # the signal that this process had
        self.stop = 0            # the signal that all processes know of, since the last `due`

    def guard(self, loop):
        """Yield from `loop`. While it runs, a first SIGTERM or Ctrl-C is remembered, not obeyed."""
        before = {}  # signal: its handler
        obey_second_signal()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, self._remember)
        try:
            yield from loop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number, _):
        """A handler of signals. It uses no print, which may be interrupted in another print."""
        if not self.asked and rank() == 0:
            name = signal.Signals(number).name
            os.write(1, f"\n{name}: saving after this step; a second one ends the run at once\n"
                        .encode())
        self.asked = number

    def due(self, done):
        """Whether to save after `done` steps. All processes must call it, and agree."""
        flags = torch.tensor([self.asked, time.time() - self.time >= 60 * self.minutes])
        if world() > 1:
            # A signal reaches the processes in different steps, or only one of them
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        self.stop, late = flags.tolist()
        self.done = done
        return bool(self.stop or late or done % self.per_epoch == 0 or done == self.total)

    def save(self, content):
        """Write last.pth. After a signal also end this process, with that signal's exit code."""
        save(self.out / "last.pth", content)
        self.time = time.time()
        if not self.stop or self.done == self.total:
            return
        if world() > 1:
            dist.barrier()  # the others wait until the first one has written
        if rank() == 0:
            print(f"{self.out}: stopped by {signal.Signals(self.stop).name} after step {self.done} "
                  f"of {self.total}; the command that started it goes on from here", flush=True)
        sys.exit(128 + self.stop)


# ---- what runs away -----------------------------------------------------------------------------

def check_finite(loss, model, step, out, batches, frames):
    """Stop the run, before the weights are touched, where the loss or a gradient is not finite.

    The names of this process's frames in this step (`frames.name` of what `batches` drew) are saved
    in OUT/not-finite.json. Raises InputError.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if torch.isfinite(loss) & torch.isfinite(norm):
        return
    name = f"not-finite-{rank()}.json" if world() > 1 else "not-finite.json"
    path = Path(out, name)
    write_json(path, {"step": step, "loss": str(loss.item()), "gradient_norm": str(norm.item()),
                      "frames": [frames.name(key) for key in batches.of(step)]})
    raise InputError(f"step {step}: the loss is {loss.item():.3g} and its gradient's norm "
                     f"{norm.item():.3g}; no weight was touched, the frames of this step are in "
                     f"{path}. Try a lower --lr or --precision fp32, and look at these frames")


# ---- the log ------------------------------------------------------------------------------------

class Log:
    """log.jsonl, one JSON line an epoch, written by the first process.

    A line has the mean loss, the columns of the paper's Table L, and the bad frames.

    checkpoint: what the run goes on from, or None; its "log" is `state()`. Lines of steps that are
    done again are dropped.
    frames: how many there are. More than 1 % of bad ones raise InputError.
    names: of the datasets of a mixture, whose losses are to be told apart.
    """

    def __init__(self, out, device, model, checkpoint=None, frames=0, names=()):
        self.path = Path(out, "log.jsonl")
        self.device = device
        self.model = model
        self.frames = frames
        self.names = names
        # What is known of the run so far
        state = dict((checkpoint or {}).get("log", {}))
        self.bad = state.pop("bad", {})  # frame number -> what is wrong with it; of the whole run
        self._begin(**state)
        if rank() == 0 and self.path.is_file():
            self._drop_after(checkpoint["step"] if checkpoint else 0)

    def _begin(self, total=0.0, count=0, seconds=0.0, sums=None):
        """Begin an epoch, or go on `seconds` after its begin with the sum of `count` losses.

        sums: of each dataset the sum of its pairs' losses, and their number.
        """
        self.total = torch.tensor(total, dtype=torch.float32, device=self.device)
        self.count = count
        self.sums = torch.zeros(len(self.names), 2, dtype=torch.double, device=self.device)
        if sums and rank() == 0:  # of all processes
            self.sums += torch.tensor(sums, dtype=torch.double, device=self.device)
        self.time = time.time() - seconds

    def _drop_after(self, step):
        """Keep the lines up to this step."""
        kept = [json.dumps(line) for line in self._lines() if line.get("step", 0) <= step]
        if kept != self._text().splitlines():
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    def _text(self):
        return self.path.read_text(encoding="utf-8", errors="replace")

    def _lines(self):
        """The lines of the file, as dicts."""
        for text in self._text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut short when the run was killed
                continue
            if isinstance(line, dict):
                yield line

    def append(self, **values):
        """Write one more line at once (first process)."""
        if rank() == 0:
            before = self._text() if self.path.is_file() else ""
            write_text(self.path, before + json.dumps(values, allow_nan=False) + "\n")

    def add(self, loss, batch=None, sums=None):
        """Count a step's loss, and the frames that were left out of its batch.

        sums: [datasets, 2] of a mixture, the sum of each one's losses and their number.
        """
        self.total += loss.detach().float()
        if sums is not None:
            self.sums += sums
        self.count += 1
        self._leave_out((batch or {}).get("bad", ()))

    def _leave_out(self, found):
        """Count bad frames, (number, what is wrong) each. Raises InputError for too many."""
        for frame, reason in found:
            self.bad.setdefault(frame, reason)
        if len(self.bad) > BAD_FRAMES * self.frames:
            reasons = list(self.bad.values())
            more = "; ..." if len(reasons) > 3 else ""
            raise InputError(f"{len(reasons)} of {self.frames} frames are bad, more than "
                             f"{BAD_FRAMES:.0%}: {'; '.join(reasons[:3])}{more}")

    def _share_bad(self):
        """Let all processes know of the bad frames that each has met."""
        everyone = [list(self.bad.items())] * world()
        if world() > 1:
            dist.all_gather_object(everyone, list(self.bad.items()))
        self._leave_out(sum(everyone, []))

    def mean(self):
        """Mean loss of this process since the epoch began."""
        return self.total.item() / max(1, self.count)

    def state(self):
        """What a checkpoint keeps of the epoch that is under way. All processes must call it."""
        self._share_bad()
        total = sum_over_processes(self.total.clone()).item() / world()
        state = {"total": total, "count": self.count, "seconds": time.time() - self.time,
                 "bad": dict(self.bad)}
        if self.names:
            state["sums"] = sum_over_processes(self.sums.clone()).tolist()
        return state

    def write(self, **values):
        """Write the epoch's line and begin the next epoch. All processes must call it."""
        mean = torch.tensor(self.mean(), device=self.device)
        values["loss"] = sum_over_processes(mean).item() / world()
        if self.names:
            sums = sum_over_processes(self.sums.clone()).tolist()
            values["loss_of"] = {name: total / count if count else None
                                 for name, (total, count) in zip(self.names, sums)}
        values["seconds"] = round(time.time() - self.time, 1)
        values["processes"] = world()
        values["trainable_parameters"] = sum(p.numel() for p in self.model.parameters()
                                             if p.requires_grad)
        values["memory_gb"] = round(peak_memory(self.device) / 2**30, 2)
        self._share_bad()
        if self.bad:
            values["bad_frames"] = list(self.bad.values())
        self.append(**values)
        self._begin()

    def report(self):
        """Print the whole run's row of Table L, resumed parts included (first process)."""
        if rank() > 0 or not self.path.is_file():
            return
        lines = [line for line in self._lines() if "seconds" in line]
        if not lines:
            return
        last = lines[-1]
        hours = sum(line["seconds"] * line["processes"] for line in lines) / 3600
        memory = max(line["memory_gb"] for line in lines)
        name = "GPU" if self.device.type == "cuda" else "process"
        print(f"{self.path.parent}: {last['trainable_parameters'] / 1e6:.1f} M trainable "
              f"parameters, {memory:.1f} GB per {name}, {hours:.2f} {name}-hours", flush=True)
        bad = last.get("bad_frames")
        if bad:
            print(f"{len(bad)} bad frames were left out; {self.path} names them", flush=True)


def peak_memory(device):
    """The most bytes so far: allocated on the GPU, or on a CPU resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

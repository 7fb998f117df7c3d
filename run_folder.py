"""A run's folder: checkpoints, the log, and what happens when a run is interrupted or goes astray.

OUT/last.pth is the newest checkpoint, OUT/previous.pth the one before it, OUT/log.jsonl has a line an epoch. A checkpoint is written
to a temporary file, flushed to the disk and renamed: whenever a run is killed, one of the two is whole, and the command that
started the run goes on from it as if nothing had happened.
"""
import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoints import read
from plumbing.endings import obey_second_signal
from errors import InputError, say
from plumbing.fingerprint import differences
from training import rank, sum_over_processes, world

# Arguments that a resumed run may be given anew, and those that say where a source is, which is known by its fingerprint
MAY_CHANGE = {"data", "out", "device", "workers", "save_every", "on_bad_frame", "restart", "checkpoint"}
WHERE = {"version": "frames", "encoder": "encoder", "weights": "encoder", "hub": "encoder", "feature": "encoder", "stage1": "stage1"}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk
BAD_FRAMES = 0.01  # the part of the frames that --on-bad-frame skip leaves out at most


# ---- checkpoints --------------------------------------------------------------------------------------------------------

def save(path, content):
    """Write a checkpoint in the first process, all of it or nothing; the last.pth before it is kept as previous.pth.

    Raises InputError where it cannot be written (a full disk); what was there before is still there then.
    """
    if rank() > 0:
        return
    path = Path(path)
    if broken := [name for name, value in content.get("model", {}).items() if not torch.isfinite(value).all()]:
        raise InputError(f"{path}: not written, {broken[0]} and {len(broken) - 1} more tensors of the model hold numbers that are not finite; "
                         "what was saved before is there. Try a lower learning rate or --precision fp32")
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # torch.save turns a failed write into a RuntimeError of its own
        cause = error if isinstance(error, OSError) or "PytorchStreamWriter" in str(error) else error.__context__
        if cause is None:
            raise
        with contextlib.suppress(OSError):
            partial.unlink()
        room = ""
        if getattr(cause, "errno", None) in (None, *FULL):
            room = f": it needs {_bytes(content) / 1e6:.0f} MB, {shutil.disk_usage(path.parent).free / 1e6:.0f} MB are free"
        there = f"{path.name} is as it was" if path.is_file() else "nothing was saved before"
        raise InputError(f"{path}: cannot be written ({str(cause).splitlines()[0]}){room}; {there}. "
                         f"{'Make room' if room else 'Choose another --out, or mend this one'}, then repeat the command") from None
    if path.name == "last.pth" and path.is_file():
        os.replace(path, path.with_name("previous.pth"))
    os.replace(partial, path)


def _bytes(content):
    """Size of all tensors in nested containers."""
    if torch.is_tensor(content):
        return content.numel() * content.element_size()
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return sum(map(_bytes, parts))


def find_last(args, made_from=None):
    """The newest whole checkpoint of the run in --out, finished or not, or None. Raises InputError if it was another run.

    made_from: {source: fingerprint} of the run that is to go on: another run has other ones, or other arguments.

    A last.pth that cannot be read is named and set aside, and previous.pth is taken. With --restart another run's files are set
    aside too, into OUT/replaced-N.
    """
    out = Path(args.out)
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"--out {out}: {above} is {'no folder' if not above.is_dir() else 'a folder that cannot be written to'}; choose another")
    files = [path for path in (out / "last.pth", out / "previous.pth") if path.is_file()]
    checkpoint, damaged = None, []
    for path in files:
        try:
            found = read(path)
            if not (isinstance(found, dict) and isinstance(found.get("args"), dict) and isinstance(found.get("step"), int)):
                raise InputError(f"{path}: not a checkpoint of a run")
        except InputError:
            damaged.append(path)
            continue
        checkpoint = found
        break
    what = [checkpoint and checkpoint["step"], *map(str, damaged)]
    everyone = [what] * world()
    if world() > 1:
        dist.all_gather_object(everyone, what)  # nothing is moved before all have read
    if any(other != what for other in everyone):
        raise InputError(f"--out {args.out}: the processes do not find the same checkpoint there; all nodes must share the folder")
    if files and checkpoint is None:
        raise InputError(f"{damaged[0]}: not a checkpoint, or damaged; delete it or choose another --out")
    if checkpoint is None:
        return None
    before, now = checkpoint.get("made_from", {}), made_from or {}
    known = {name for name, source in WHERE.items() if source in before and source in now}
    changed = _changed(vars(args), checkpoint["args"], MAY_CHANGE | known)
    others = differences(before, now)
    if (changed or others) and args.restart:
        _set_aside(out)
        return None
    if changed or others:
        reasons = ["with other arguments (" + changed + ")"] * bool(changed) + ["made from other " + others] * bool(others)
        raise InputError(f"--out {args.out} holds a run {' and '.join(reasons)}; repeat its command with the same to resume it, choose "
                         "another --out, or add --restart to set that run's files aside")
    if unknown := now.keys() - before.keys():
        say(f"{args.out}: a run from before fingerprints; whether {' and '.join(sorted(unknown))} are the same is not checked")
    if rank() == 0:
        for path in damaged:
            path.rename(path.with_suffix(".damaged"))
            print(f"{path}: not a checkpoint, or damaged; set aside as {path.stem}.damaged, previous.pth is taken", flush=True)
        print(f"{args.out}: going on from step {checkpoint['step']}", flush=True)
    return checkpoint


def _changed(now, before, ignored):
    """The arguments that differ, in words; "" for none."""
    # A flag that was not given may be missing: the run may be from before there was such a flag
    names = sorted(k for k in now.keys() | before.keys() if k not in ignored and (now.get(k) or None) != (before.get(k) or None))
    return ", ".join(f"--{k.replace('_', '-')} {before.get(k)}, now {now.get(k)}" for k in names)


def _set_aside(out):
    if rank() == 0:
        aside = next(path for path in (out / f"replaced-{n}" for n in range(1, 10**6)) if not path.exists())
        aside.mkdir()
        for path in [*out.glob("*.pth"), *out.glob("*.json*")]:
            path.rename(aside / path.name)
        print(f"--restart: the run in {out} is now in {aside}", flush=True)


class Saver:
    """When to write last.pth: at each epoch's end, every --save-every minutes, and after SIGTERM or Ctrl-C, which end the run there."""

    def __init__(self, args, per_epoch, total):
        self.out, self.minutes, self.per_epoch, self.total = Path(args.out), args.save_every, per_epoch, total
        self.time, self.done = time.time(), 0
        self.asked = 0  # the signal that this process had
        self.stop = 0   # the signal that all processes know of, since the last `due`

    def guard(self, loop):
        """Yield from `loop`; while it runs, a first SIGTERM or Ctrl-C is remembered, not obeyed."""
        before = {}
        obey_second_signal()
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield from loop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number, _):
        if not self.asked and rank() == 0:
            name = signal.Signals(number).name
            os.write(1, f"\n{name}: saving after this step; a second one ends the run at once\n".encode())
        self.asked = number

    def due(self, done):
        """Whether to save after `done` steps. All processes must call it, and agree."""
        flags = torch.tensor([self.asked, time.time() - self.time >= 60 * self.minutes])
        if world() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)  # on the CPU: a signal reaches the processes in different steps, or only one
        self.stop, late = flags.tolist()
        self.done = done
        return bool(self.stop or late or done % self.per_epoch == 0 or done == self.total)

    def save(self, content):
        """Write last.pth; after a signal also end this process, with the exit code of a process that the signal ended."""
        save(self.out / "last.pth", content)
        self.time = time.time()
        if not self.stop or self.done == self.total:
            return
        if world() > 1:
            dist.barrier()  # the others wait until the first one has written
        if rank() == 0:
            print(f"{self.out}: stopped by {signal.Signals(self.stop).name} after step {self.done} of {self.total}; "
                  "the command that started it goes on from here", flush=True)
        sys.exit(128 + self.stop)


# ---- text that is read again ---------------------------------------------------------------------------------------------

def write_text(path, text):
    """Write a file of text, all of it or nothing. Raises InputError where it cannot be written; what was there is there then."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        way_out = "Make room" if error.errno in FULL else "Mend that, or choose another --out"
        raise InputError(f"{path}: cannot be written ({error.strerror}); it is as it was. {way_out}, then repeat the command") from None


def write_json(path, content):
    """Write JSON as `write_text` does; numbers must be finite, as JSON has no others."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False))


def read_json(path):
    """What is in a file of JSON; None where there is none, or one that was cut short."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


# ---- what runs away -----------------------------------------------------------------------------------------------------

def check_finite(loss, model, step, out, batches, frames):
    """Stop the run, before the weights are touched, where the loss or a gradient is not finite.

    The names of this process's frames in this step (`frames.name` of what `batches` drew) are saved in OUT/not-finite.json.
    Raises InputError.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if torch.isfinite(loss) & torch.isfinite(norm):
        return
    path = Path(out, f"not-finite-{rank()}.json" if world() > 1 else "not-finite.json")
    write_json(path, {"step": step, "loss": str(loss.item()), "gradient_norm": str(norm.item()),
                      "frames": [frames.name(key) for key in batches.of(step)]})
    raise InputError(f"step {step}: the loss is {loss.item():.3g} and its gradient's norm {norm.item():.3g}; no weight was touched, the "
                     f"frames of this step are in {path}. Try a lower --lr or --precision fp32, and look at these frames")


# ---- the log ------------------------------------------------------------------------------------------------------------

class Log:
    """One JSON line an epoch in log.jsonl (first process only): mean loss, what the paper's Table L tells of a run, bad frames.

    checkpoint: what the run goes on from, or None; its "log" is `state()`. Lines of steps that are done again are dropped.
    frames: how many there are; more than 1 % of bad ones raise InputError.
    """

    def __init__(self, out, device, model, checkpoint=None, frames=0):
        self.path, self.device, self.model, self.frames = Path(out, "log.jsonl"), device, model, frames
        state = dict((checkpoint or {}).get("log", {}))
        self.bad = state.pop("bad", {})  # frame number -> what is wrong with it; since the run began
        self._begin(**state)
        if rank() == 0 and self.path.is_file():
            step = checkpoint["step"] if checkpoint else 0
            kept = [json.dumps(line) for line in self._lines() if line.get("step", 0) <= step]
            if kept != self._text().splitlines():
                write_text(self.path, "".join(f"{line}\n" for line in kept))

    def _begin(self, total=0.0, count=0, seconds=0.0):
        self.total, self.count, self.time = torch.tensor(total, dtype=torch.float32, device=self.device), count, time.time() - seconds

    def _text(self):
        return self.path.read_text(encoding="utf-8", errors="replace")

    def _lines(self):
        for text in self._text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut short when the run was killed
                line = json.loads(text)
                if isinstance(line, dict):
                    yield line

    def append(self, **values):
        """One more line, at once (first process)."""
        if rank() == 0:
            before = self._text() if self.path.is_file() else ""
            write_text(self.path, before + json.dumps(values, allow_nan=False) + "\n")

    def add(self, loss, batch=None):
        """Count a step's loss, and the frames that were left out of its batch."""
        self.total += loss.detach().float()
        self.count += 1
        self._leave_out((batch or {}).get("bad", ()))

    def _leave_out(self, found):
        for frame, reason in found:
            self.bad.setdefault(frame, reason)
        if len(self.bad) > BAD_FRAMES * self.frames:
            raise InputError(f"{len(self.bad)} of {self.frames} frames are bad, more than {BAD_FRAMES:.0%}: "
                             + "; ".join([*self.bad.values()][:3]) + "; ..." * (len(self.bad) > 3))

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
        return {"total": total, "count": self.count, "seconds": time.time() - self.time, "bad": dict(self.bad)}

    def write(self, **values):
        """Write the line and begin the next epoch. All processes must call it."""
        loss = sum_over_processes(torch.tensor(self.mean(), device=self.device)).item() / world()
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        values |= {"loss": loss, "seconds": round(time.time() - self.time, 1), "processes": world(),
                   "trainable_parameters": trained, "memory_gb": round(peak_memory(self.device) / 2**30, 2)}
        self._share_bad()
        if self.bad:
            values["bad_frames"] = [*self.bad.values()]
        self.append(**values)
        self._begin()

    def report(self):
        """Print the whole run's row of Table L, resumed parts included (first process)."""
        lines = [line for line in self._lines() if "seconds" in line] if rank() == 0 and self.path.is_file() else []
        if lines:
            hours = sum(line["seconds"] * line["processes"] for line in lines) / 3600
            name = "GPU" if self.device.type == "cuda" else "process"
            print(f"{self.path.parent}: {lines[-1]['trainable_parameters'] / 1e6:.1f} M trainable parameters, "
                  f"{max(line['memory_gb'] for line in lines):.1f} GB per {name}, {hours:.2f} {name}-hours", flush=True)
            if bad := lines[-1].get("bad_frames"):
                print(f"{len(bad)} bad frames were left out; {self.path} names them", flush=True)


def peak_memory(device):
    """Bytes at most so far: allocated on the GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Ends runs that would wait for ever.

It does so where a loading process died or cannot hand over its batch, and where the main thread is
blocked and no signal reaches it. Only while a checkpoint is written do signals wait.
"""
import atexit
import contextlib
import multiprocessing.queues
import os
import resource
import select
import signal
import sys
import threading
import time
from multiprocessing.connection import wait

from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from plumbing.errors import line_of

PATIENCE = 30  # seconds in which the main thread may notice by itself that a loading process died


def end_now(code, line):
    """End the loading processes and this one, with a line on stderr; any thread may call it."""
    try:
        _kill_loading_processes()
        _, writable, _ = select.select([], [2], [], 1)
        if writable:  # a pager that does not read must not delay the end
            os.write(2, f"\n{line}\n".encode())
    finally:
        os._exit(code)


def _kill_loading_processes():
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# ---- loading processes ---------------------------------------------------------------------------

class Loader(DataLoader):
    """A DataLoader that raises or ends the run when one of its processes dies or gives nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, worker_init_fn=_begin_loading, **kwargs)

    def __iter__(self):
        batches = super().__iter__()
        return _watched(batches) if self.num_workers else batches


def _begin_loading(_):
    """Prepare a loading process: it outlives signals and tells the main process of its errors."""
    # After a signal the main process still has a step to finish and a checkpoint to save
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error
    sys.excepthook = _exit_with_errno


def _send_error(queue, error, item):
    """Send the reason in place of a batch that cannot be sent.

    multiprocessing would print it, and the main process would wait for the batch.
    """
    if not isinstance(item, tuple) or isinstance(item[1], ExceptionWrapper):
        os._exit(1)  # the pipe itself is broken, or the reason cannot be sent either
    queue.put((item[0], ExceptionWrapper(where="in a loading process")))


def _exit_with_errno(kind, error, traceback):
    """End this loading process when its thread that hands over tensors' files fails.

    multiprocessing would print the error and go on; the main process might wait for that file for
    ever.
    """
    if not isinstance(error, OSError):
        sys.__excepthook__(kind, error, traceback)
    os._exit(getattr(error, "errno", None) or 1)


def _watched(iterator):
    """Yield a DataLoader's batches. Raises RuntimeError, in torch's words, if a process died."""
    ended = threading.Event()
    try:
        threading.Thread(target=_watch, args=(iterator, ended), daemon=True).start()
        yield from iterator
    except (RuntimeError, OSError, EOFError) as error:
        # If a process died while a batch was fetched from it, this error says little
        cause = _cause_of_death(iterator._workers, seconds=1)
        if cause:
            raise RuntimeError(cause) from error
        raise
    finally:
        try:
            iterator._shutdown_workers()
        finally:
            for worker in iterator._workers:
                if worker.is_alive():  # torch's handler of SIGCHLD interrupted the shutdown
                    worker.kill()
            ended.set()


def _cause_of_death(workers, seconds=0):
    """What ended a process that has ended or does so within `seconds`, in torch's words; or ""."""
    ended = wait([worker.sentinel for worker in workers], timeout=seconds)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join()  # a process has its exit code a moment after its sentinel
            code = worker.exitcode
            if code < 0:
                how = f"is killed by signal: {signal.strsignal(-code)}"
            else:
                how = f"exited unexpectedly with exit code {code}"
            return f"DataLoader worker (pid {worker.pid}) {how}"
    return ""


def _watch(iterator, ended):
    """In a thread: once a loading process has died, end the run if the main thread does not.

    The main thread may wait for the rest of a message, or for a thread of torch that does.
    """
    wait([worker.sentinel for worker in iterator._workers])
    if ended.wait(PATIENCE) or _exiting.is_set():
        return
    # Processes that the iterator has shut down have died as they should
    failed = any(worker.exitcode for worker in iterator._workers)
    if failed or not iterator._shutdown:
        end_now(2, line_of(RuntimeError(_cause_of_death(iterator._workers))))


_exiting = threading.Event()


@atexit.register
def _end_loading():
    """At exit: multiprocessing would send SIGTERM, which loading processes ignore, and wait."""
    _exiting.set()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a killed process
    _kill_loading_processes()


def allow_open_files():
    """Raise the limit of open files as far as the system allows, to 65,536 at most.

    Each tensor on its way from a loading process is an open file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


# ---- signals -------------------------------------------------------------------------------------

@contextlib.contextmanager
def signals_wait():
    """Signals whose handlers may raise are handled once this block or function is done.

    torch.save aborts the process if an exception reaches it between its last record and the end of
    the file.
    """
    came, handlers = [], {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)


_listening = False
_first = None  # time.monotonic of the SIGINT or SIGTERM that the run is ending for


def obey_second_signal():
    """From now on a second SIGINT or SIGTERM ends this process at once; exit code 128 + number.

    The first one does what it would do without this call, and each call counts from one again.
    A thread sees to it, since Python's own handlers wait until the main thread comes back from C.
    """
    global _listening, _first
    _first = None
    if _listening or threading.current_thread() is not threading.main_thread():
        return
    receive, send = os.pipe()
    os.set_blocking(send, False)
    signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_stop_listening)
    threading.Thread(target=_listen, args=(receive,), daemon=True).start()
    _listening = True


def _stop_listening():
    """In a forked process, whose signals are not its parent's."""
    global _listening
    signal.set_wakeup_fd(-1)
    _listening = False


def _listen(pipe):
    """In a thread: read the numbers of signals from the pipe, and end the run at a second one."""
    global _first
    # `timeout`, torchrun and schedulers deliver one signal twice: to the process and to its group.
    # What comes within `grace` seconds is the same one.
    grace = 2 if "TORCHELASTIC_RUN_ID" in os.environ else 0.3
    while True:
        for number in os.read(pipe, 64):
            if number in (signal.SIGINT, signal.SIGTERM):
                now = time.monotonic()
                _first = _first or now
                if now - _first > grace:
                    name = signal.Signals(number).name
                    end_now(128 + number, f"{sys.argv[0]}: ended at once by a second {name}")

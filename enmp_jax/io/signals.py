"""SIGTERM and SIGHUP, as sent before a machine is taken away: work that can go on later is saved first.

A handler of Python runs between two of its instructions, and so not while the main thread waits for a device.
A thread therefore ends the process when the work has not ended by itself soon enough.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from enmp_jax.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 8.0
"""From the signal to the end of the process, whatever it is doing."""
GO_ON = "--resume goes on from what is saved"

_state = {"received": 0, "saving": 0}
_programs: list[str] = []


def received() -> int:
    """The number of the signal that told this process to end; 0: none did."""
    return _state["received"]


def stop_if_told() -> None:
    """For work that can go on later, at the places where all of it is saved.

    Raises:
        Stopped: a signal has come.
    """
    if received():
        raise Stopped(received())


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Within, a signal is only noted: the work asks ``received`` and saves itself. Elsewhere it raises."""
    _state["saving"] += 1
    try:
        yield
    finally:
        _state["saving"] -= 1


def _handle(number: int, frame: object) -> None:
    _state["received"] = number
    if not _state["saving"]:
        raise Stopped(number)


@contextlib.contextmanager
def handled(program: str) -> Iterator[None]:
    """Handle the signals while a command runs; does nothing outside the main thread.

    Args:
        program: what the last line begins with, if another thread has to say it.
    """
    _programs[:] = [program]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    # the interpreter writes the number of a signal here at once, whatever its main thread waits for
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    done = threading.Event()
    threading.Thread(target=_watch, args=(read, done), daemon=True).start()
    try:
        yield
    finally:
        if not received():  # else the thread sees to it that the process really ends
            done.set()
        _state["received"] = 0
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(write)


def _watch(read: int, done: threading.Event) -> None:
    with os.fdopen(read, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] in SIGNALS:
                break
        else:
            return
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline:
        if done.wait(0.1):
            return
    if _state["saving"]:
        print(last_line(f"{named(number[0])} in the middle of a step"), file=sys.stderr, flush=True)
    os._exit(128 + number[0])


def last_line(what: str) -> str:
    """What a thread says that ends the process without the main one: what happened, and how to go on."""
    return f"{''.join(_programs) or 'enmp'}: {what}" + (f"; {GO_ON}" if _state["saving"] else "")


def named(number: int) -> str:
    """``ended by SIGTERM``."""
    return f"ended by {signal.Signals(number).name}"

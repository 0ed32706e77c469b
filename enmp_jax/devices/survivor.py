"""The end of a process of several whose peer is gone.

Two things may notice: a collective of the main thread, which raises, or the coordination agent of jaxlib, a
thread of C++ that has no other way than ``abort()``. Whichever is first, the process ends with one line.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time

from enmp_jax.io import signals

LOST = "another process has ended or cannot be reached"
SAY_SECONDS = 1.0
"""The main thread, where it has begun to end the process, has so long for its own line."""

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_ending: list[int] = []


def ends_with(code: int) -> None:
    """The main thread ends this process by itself: an abort from now on says nothing and keeps the code."""
    _ending.append(code)


def _aborted(number: int) -> None:
    """Runs within ``abort()``, on whichever thread called it."""
    if _ending:
        time.sleep(SAY_SECONDS)
        os._exit(_ending[0])
    os.write(2, f"{signals.last_line(f'{LOST} (JAX says more above)')}\n".encode())
    os._exit(1)


_handler = _Handler(_aborted)  # kept: the C library holds its address only


def aborts_with_a_line() -> None:
    """From now on ``abort()`` ends this process with a line and exit code 1.

    A handler of ``signal.signal`` would not do: Python runs it later, on the main thread, and ``abort()``
    does not wait for that.
    """
    register = ctypes.CDLL(None).signal
    register.argtypes, register.restype = (ctypes.c_int, _Handler), ctypes.c_void_p
    register(signal.SIGABRT, _handler)

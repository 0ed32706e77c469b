"""The one place where what goes wrong becomes one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from enmp_jax.devices import survivor
from enmp_jax.errors import Stopped, UserError, one_line, reason
from enmp_jax.io import signals

COORDINATOR_SECONDS = 1.0
"""The first process, which the others report to, stays so long after they may go."""

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "the file system or `ulimit -f` takes no file of that size",
    errno.EACCES: "look at its permissions",
    errno.EPERM: "look at its permissions",
    errno.EROFS: "the file system cannot be written to: choose another directory",
    errno.EIO: "check the disk",
    errno.EMFILE: "raise `ulimit -n`",
}


def guarded(program: str, work: Callable[[], int | None], debug: bool = False) -> int:
    """Run a command; returns its exit code.

    0; 2 for bad input; 1 for a fault of the machine or of this program; 128 + N after signal N.

    Args:
        program: what the line on standard error begins with.
        work: the command; an exit code that it returns is kept (``enmp verify``: 1).
        debug: show the traceback too.
    """
    try:
        with signals.handled(program):
            result = work() or 0
            _end_together(result)
    except BrokenPipeError:
        return 1
    except (Exception, KeyboardInterrupt, Stopped) as error:
        code, line = explained(error)
        if debug:
            traceback.print_exc()
        elif not line:
            line = _unexpected(error)
        line = "; ".join([line, *getattr(error, "__notes__", ())])
        if _several():
            survivor.ends_with(code)
        print(f"{program}: {line}", file=sys.stderr, flush=True)
        _end_together(code)
        return code
    return result


def explained(error: BaseException) -> tuple[int, str]:
    """Exit code and line of an error; the line is empty where only a traceback helps."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, Stopped):
        return 128 + error.signal, signals.named(error.signal)
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        advice = _ADVICE.get(error.errno)
        return 1, one_line(f"{reason(error)}{where}" + (f": {advice}" if advice else ""), 500)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        said = one_line(error) or "no more memory"
        return 1, (
            f"out of memory ({said}): set evaluation.member_chunk: 1 or a smaller evaluation.batch_size, "
            "divide the model with evaluation.mesh, or take fewer examples; --plan shows what takes how much"
        )
    if isinstance(error, RecursionError):
        return 2, "the input is nested too deeply to be read"
    if isinstance(error, OverflowError):
        return 2, f"a number of the input is too large ({one_line(error)})"
    if _several() and _lost(error):
        return 1, f"{survivor.LOST} ({one_line(error, 120)})"
    return 1, ""


def _lost(error: BaseException) -> bool:
    """Whether a collective may have failed; that of a CPU comes as a ValueError that names its transport."""
    is_gloo = isinstance(error, ValueError) and "Gloo" in str(error)
    return is_gloo or type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")


def _unexpected(error: BaseException) -> str:
    """Keep the traceback of a fault of this program in a file, and say where."""
    what = f"{type(error).__name__}: {one_line(error)}"
    root = Path(os.environ.get("ENMP_CACHE") or Path.home() / ".cache" / "enmp-jax").expanduser()
    path = root / "last-error.txt"
    try:
        root.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        traceback.print_exception(error)
        return f"a fault of enmp-jax ({what}): please report the lines above"
    return f"a fault of enmp-jax ({what}): please report it with {path}, or see it with --debug"


def _several() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def _end_together(code: int) -> None:
    """Leave at once where there are several processes.

    JAX would wait for the others, which may be gone, and it aborts a process that takes its leave of a
    coordinator that has gone before.
    """
    if not _several():
        return
    import jax

    from enmp_jax.devices.distributed import barrier

    if code == 0:
        with contextlib.suppress(RuntimeError):  # another has failed meanwhile
            barrier("all is done")
        survivor.ends_with(0)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(COORDINATOR_SECONDS)
    os._exit(code)

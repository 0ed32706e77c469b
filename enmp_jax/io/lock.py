"""One process at a time in a directory: a lock file with host, process and time, which the dead lose."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from enmp_jax.errors import Stopped, UserError, reason
from enmp_jax.io.files import remove_leftovers

NAME = ".lock"
BEAT_SECONDS = 15.0
"""How often the holder touches the file, for hosts that share no locks of the file system."""
STALE_SECONDS = 90.0
"""A file of another host that nobody touched for so long is of a dead process."""


class Lock:
    """Holds ``directory/.lock`` until ``release``, or until the process ends, however it does.

    The file system's own lock (``flock``) decides between processes of one host, and of several where the
    file system is able to. Where it is not, the time of the file does.
    """

    def __init__(self, directory: Path, say: Callable[[str], None] = print):
        """Take the lock.

        Args:
            directory: it must be there.
            say: told when a dead process left its lock.

        Raises:
            UserError: another process works there, or the file cannot be written.
        """
        path, stop = directory / NAME, threading.Event()
        try:
            file = _take(path, say)
            _write(file)
        except OSError as error:
            raise UserError(f"cannot lock {directory}: {reason(error)}") from None
        threading.Thread(target=_beat, args=(path, stop), daemon=True).start()
        self._release = weakref.finalize(self, _give_up, file, path, stop)

    def release(self) -> None:
        """Remove the file; more than once does no harm."""
        self._release()


@contextlib.contextmanager
def occupied(directory: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the lock of a directory, without what dead processes left half written; made if it is not there.

    Raises:
        UserError: another process works there, or it cannot be made.
    """
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {directory}: {reason(error)}") from None
    lock = Lock(directory, say)
    try:
        remove_leftovers(directory)
        yield
    except (KeyboardInterrupt, Stopped) as error:
        error.add_note("the same command goes on from what is saved")
        raise
    finally:
        lock.release()
        if made:
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()


def _take(path: Path, say: Callable[[str], None]) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            raise UserError(
                f"{path.parent} is in use by {_in_words(holder)}: wait for its end, or give another directory"
            ) from None
        except OSError:  # a file system without locks
            pass
        if not _still_there(file, path):
            file.close()  # its holder ended, and took it along
            continue
        holder = _holder(file)
        if holder is not None:
            if holder.get("host") != socket.gethostname():
                _wait_until_stale(path, holder, say)
            say(f"{path.parent} was in use by {_in_words(holder)}, which ended without a word: taking over")
        return file


def _wait_until_stale(path: Path, holder: dict[str, Any], say: Callable[[str], None]) -> None:
    """A process of another host is dead when the time of its file stands still."""
    touched = path.stat().st_mtime
    left = touched + STALE_SECONDS - time.time()
    if left > 0:
        say(f"{path.parent} was in use by {_in_words(holder)}: waiting {left:.0f} s for a sign of life")
    while time.time() < touched + STALE_SECONDS:
        time.sleep(min(1.0, STALE_SECONDS / 10))
        if not path.exists():
            return  # it ended meanwhile
        if path.stat().st_mtime != touched:
            raise UserError(
                f"{path.parent} is in use by {_in_words(holder)}: wait for its end, or give another directory"
            )


def _holder(file: IO[str]) -> dict[str, Any] | None:
    """What the file says; None: it is new."""
    file.seek(0)
    text = file.read(4096)
    try:
        found = json.loads(text)
    except ValueError:
        return {} if text else None
    return found if isinstance(found, dict) else {}


def _in_words(holder: dict[str, Any] | None) -> str:
    known = holder or {}
    pid, host, time = (str(known.get(key, "?"))[:80] for key in ("pid", "host", "time"))
    return f"process {pid} on {host} (since {time})"


def _write(file: IO[str]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    file.seek(0)
    file.truncate()
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "time": now}, file)
    file.flush()


def _still_there(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a network file system may come back
            os.utime(path)


def _give_up(file: IO[str], path: Path, stop: threading.Event) -> None:
    stop.set()
    with contextlib.suppress(OSError):
        if _still_there(file, path):
            path.unlink()  # while the lock is held: nobody else can have it
    file.close()

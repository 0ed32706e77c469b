"""The exceptions for bad input and for being told to end, and the wording that all messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: one line that says what is wrong and what to do. The command line exits with code 2.

    Examples:
        >>> import enmp_jax as enmp
        >>> try:
        ...     enmp.merges.ties(densty=0.4)
        ... except enmp.UserError as error:
        ...     print(error)
        merge method 'ties' has no hyperparameter 'densty': did you mean 'density'?
    """

    def __init__(self, message: object = ""):
        """Takes the line; what a file put into it is cut out of its middle where it is very long."""
        text = str(message)
        super().__init__(text if len(text) <= 1500 else f"{text[:1000]} ... {text[-400:]}")


class Stopped(BaseException):
    """The process was told to end (SIGTERM, SIGHUP), and what it was doing is saved.

    No ``Exception``: code that catches whatever a library raises must not take it for that library's error.
    """

    def __init__(self, signal: int):
        """Takes the number of the signal."""
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def suggestion(name: str, known: Iterable[str], otherwise: str = "known") -> str:
    """The hint for an unknown name: the nearest known one, or else all of them after ``otherwise``."""
    names = list(known)
    # no name is longer, and the comparison takes quadratic time
    near = difflib.get_close_matches(str(name)[:100].replace("-", "_").lower(), names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise}: {', '.join(names)}"


def one_line(error: object, limit: int = 200) -> str:
    """An error's text, or any other, as one printable line."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(str(error).split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown(value: object, limit: int = 60) -> str:
    """Any value as a short printable line."""
    try:
        return one_line(repr(value), limit)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        return f"a value of type {type(value).__name__} too large to show"


def reason(error: BaseException) -> str:
    """What went wrong, in the system's own words where it has them (``No space left on device``)."""
    return one_line(getattr(error, "strerror", None) or error)

"""Regular expressions of adapter configurations, matched within a time limit, as anybody wrote them."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import regex

from enmp_jax.errors import UserError, one_line

MAX_LENGTH = 1000
"""Characters of a pattern, and of a module's path."""
SECONDS = 1.0
"""Of processor time, for all matches of an adapter together."""
_PLAIN = re.compile(r"[\w.\-\\]*")


def check(pattern: str) -> str | None:
    """What is wrong with a pattern, in a few words; None: it is a regular expression."""
    if len(pattern) > MAX_LENGTH:
        return f"it has {len(pattern)} characters, more than {MAX_LENGTH}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
            regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError, ValueError, MemoryError) as error:
        return one_line(error)
    return None


@dataclass
class Clock:
    """The time that an adapter's patterns have left."""

    where: str = ""
    """What error messages start with."""
    left: float = SECONDS

    def matches(self, pattern: str, path: str) -> bool:
        """Whether a pattern matches all of a module's path, as ``re.fullmatch`` says.

        Raises:
            UserError: the path is too long, or the patterns take too long.
        """
        if _PLAIN.fullmatch(pattern):  # nothing to try in two ways; most patterns are names
            return re.fullmatch(pattern, path) is not None
        return self._timed(regex.fullmatch, pattern, path) is not None

    def layer(self, pattern: str, path: str) -> int | None:
        """The group ``idx`` of a pattern that matches the start of a module's path; None: it does not.

        Raises:
            UserError: see ``matches``.
        """
        found = self._timed(regex.match, pattern, path)
        return None if found is None else int(found["idx"])

    def _timed(self, match: Callable[..., Any], pattern: str, path: str) -> Any:
        if len(path) > MAX_LENGTH:
            raise UserError(f"the module path {one_line(path, 60)} has more than {MAX_LENGTH} characters")
        start = time.thread_time()
        try:
            found = match(pattern, path, timeout=SECONDS)
        except TimeoutError:
            found, self.left = None, 0.0
        self.left -= time.thread_time() - start
        if self.left <= 0:
            raise UserError(
                f"{self.where}: regular expressions like {one_line(repr(pattern), 80)} take too long on the "
                "names of its modules: list these by name"
            )
        return found

    def first(self, patterns: Iterable[str], path: str) -> str:
        """PEFT's ``get_pattern_key``: the first pattern that matches the end of the path, else the path."""
        for pattern in patterns:
            if _PLAIN.fullmatch(pattern) and "\\" not in pattern:
                # only a dot of it may stand for another character
                if len(path) >= len(pattern) and _ends(path, pattern):
                    return pattern
            elif self.matches(rf"(.*\.)?({pattern})", path):
                return pattern
        return path


def _ends(path: str, name: str) -> bool:
    end = path[len(path) - len(name) :]
    whole = len(path) == len(name) or path[len(path) - len(name) - 1] == "."
    return whole and (end == name or all(c in (".", d) for c, d in zip(name, end)))

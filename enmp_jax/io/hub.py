"""Where an adapter or model lives: a local directory, or a Hugging Face hub id ``name@revision``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from enmp_jax.errors import UserError, one_line

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


class Located(NamedTuple):
    """Files on this machine and what they came from."""

    directory: Path
    source: str
    """As the user gave it."""
    commit: str | None
    """Commit of the hub repository; None for a local directory."""


def locate(source: str | Path, patterns: Sequence[str]) -> Located:
    """Find a directory, downloading only the files that match ``patterns`` if it is a hub id.

    HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN work as in ``huggingface_hub``.

    Raises:
        UserError: nothing there, no network, no permission, no such revision.
    """
    text = str(source)
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            return Located(path, text, None)
        exists = path.exists() or path.is_symlink()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read {one_line(text)}: {one_line(error)}") from None
    if exists:
        raise UserError(
            f"{one_line(text)} is not a directory: give the directory that holds adapter_config.json"
        )
    match = _HUB_ID.fullmatch(text)
    if match is None or ".." in text:
        raise UserError(
            f"there is no directory {one_line(text)} (and it is no hub id such as name/adapter@main)"
        )
    directory = _download(text, match["repo"], match["revision"], patterns)
    return Located(directory, text, directory.name)


def _download(text: str, repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except errors.LocalEntryNotFoundError:
        reason = (
            "it is not in the cache and the hub cannot be reached (offline?): connect once, or copy it here"
        )
    except errors.GatedRepoError:
        reason = "it is gated: accept its licence on the hub and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"the repository has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        reason = "no such directory here and no such repository on the hub (if it is private, set HF_TOKEN)"
    except Exception as error:  # its HTTP library's errors come through, and that library changes
        reason = one_line(error)
    raise UserError(f"cannot get {text}: {reason}") from None

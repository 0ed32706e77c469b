"""Where an adapter or model lives: a local directory, or a Hugging Face hub id ``name@revision``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from enmp_jax.errors import UserError, one_line, suggestion

_HUB_ID = re.compile(
    r"(?P<repository>(?P<owner>[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_][\w.-]*)(@(?P<revision>[\w./-]+))?"
)


class HubId(NamedTuple):
    """A repository on the hub."""

    repository: str
    """``owner/name``, or ``name`` alone for some old models (``gpt2``)."""
    revision: str | None
    """Branch, tag or commit; None: the default branch."""


class Located(NamedTuple):
    """Files on this machine and what they came from."""

    directory: Path
    source: str
    """As the user gave it."""
    commit: str | None
    """Commit of the hub repository; None for a local directory."""


def hub_id(source: str | None, *, ownerless: bool = False) -> HubId | None:
    """The hub id that ``owner/name`` or ``owner/name@revision`` spells; None if something here has that name.

    Args:
        source: what a user, a run file or an adapter's configuration gives.
        ownerless: whether ``name`` without an owner is a hub id too.
    """
    match = _HUB_ID.fullmatch(source or "")
    if match is None or ".." in match[0] or not (match["owner"] or ownerless):
        return None
    if os.path.lexists(match[0]):
        return None
    return HubId(match["repository"], match["revision"])


def locate(
    source: str | Path, patterns: Sequence[str], what: str = "adapter", *, ownerless: bool = False
) -> Located:
    """Find a directory, downloading only the files that match ``patterns`` if it is a hub id.

    HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN work as in ``huggingface_hub``.

    Args:
        source: a directory, or a hub id such as ``owner/name`` or ``owner/name@revision``.
        patterns: names of the files to download, ``*`` standing for anything.
        what: what is looked for, for messages.
        ownerless: see ``hub_id``.

    Raises:
        UserError: nothing there, no network, no permission, no such revision.
    """
    text = str(source)
    shown = f"{what} {one_line(text)}"
    if not text:
        raise UserError(f"the {what} has no name: give a directory or a hub id")
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            return Located(path, text, None)
        exists = path.exists() or path.is_symlink()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read {shown}: {one_line(error)}") from None
    if exists:
        raise UserError(f"{shown} is not a directory: give the directory that holds its files")
    found = hub_id(text, ownerless=ownerless)
    if found is None:
        hint = _neighbours(path) or "give a directory, or a hub id such as owner/name@main"
        raise UserError(f"{shown}: there is no such directory; {hint}")
    try:
        directory = _download(found, patterns)
    except UserError as error:
        hint = _neighbours(path) if path.parent != Path() else None  # a mistyped relative path, perhaps
        raise UserError(f"cannot get {shown}: {error}" + (f"; {hint}" if hint else "")) from None
    return Located(directory, text, directory.name)


def _neighbours(path: Path) -> str | None:
    """What to say of the directories next to a path that is not there; None without any."""
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    except (OSError, ValueError):
        return None
    parent = one_line(path.parent)
    hint = suggestion(path.name, names, "it holds")
    return one_line(f"{parent} is a directory here without {path.name}: {hint}") if names else None


def _download(found: HubId, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                found.repository, revision=found.revision, allow_patterns=list(patterns)
            )
        )
    except errors.LocalEntryNotFoundError:
        why = (
            "there is no such directory here, it is not in the cache and the hub cannot be reached "
            "(offline?): check the path, or connect once"
        )
    except errors.GatedRepoError:
        why = "it is gated: accept its licence on the hub and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        why = f"the repository has no revision {found.revision!r}"
    except errors.RepositoryNotFoundError:
        why = "no such directory here and no such repository on the hub (if it is private, set HF_TOKEN)"
    except Exception as error:  # its HTTP library's errors come through, and that library changes
        why = one_line(error)
    raise UserError(why) from None

"""``enmp completion``: the script that lets a shell complete commands, options and their values."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro


@dataclass(frozen=True)
class Args:
    """Print a shell's completion script: ``source <(enmp completion bash)``, or the same in ~/.bashrc."""

    shell: Annotated[Literal["bash", "zsh", "tcsh"], tyro.conf.Positional]


def run(args: Args) -> None:
    """Run ``enmp completion``."""
    from enmp_jax.cli.main import COMMANDS

    commands: dict[str, Any] = {
        name: importlib.import_module(f"enmp_jax.cli.{name}").Args for name in COMMANDS
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="enmp", args=["--tyro-print-completion", args.shell],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )  # fmt: skip
    except SystemExit as stopped:  # how tyro ends after printing
        if stopped.code:
            raise

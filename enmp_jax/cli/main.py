"""The command line: parse, call, print. Every command imports only what it needs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from enmp_jax.cli.boundary import guarded
from enmp_jax.errors import one_line, suggestion
from enmp_jax.version import __version__

COMMANDS = {
    "demo": "search on the digits that come with the package",
    "search": "find the negative modules of a run file's adapters",
    "compare": "every merge method in every space at its best, in one table",
    "controls": "is what a search found more than luck: random masks, joint LoRA, ...",
    "evaluate": "score adapters alone, merged, or merged under a mask",
    "merge": "merge adapters; needs no base model and no data",
    "export": "write any format of what a search found",
    "verify": "prove that adapters and exports are what they say",
    "inspect": "show what is in adapters",
    "statistics": "measure what regmean and fisher need to know of the data",
    "init": "write a run file to start from",
    "train": "train LoRA experts (and a small base) from a run file",
    "refine": "train one LoRA from the model that a search found",
    "doctor": "can this machine do the work, and what to fix if not",
    "report": "write the plots and report.html of a run directory again",
    "completion": "print a shell's completion script",
}
"""Each is a module of this room with ``Args`` and ``run(args)``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (see ``boundary.guarded``), errors are one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"enmp-jax {__version__}")
        return 0
    name = arguments.pop(0)
    if name not in COMMANDS:
        hint = suggestion(name, COMMANDS, "commands")
        print(f"enmp: unknown command {one_line(repr(name), 80)}; {hint}", file=sys.stderr)
        return 2
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    return guarded(f"enmp {name}", lambda: run(name, arguments), debug)


def run(name: str, arguments: list[str]) -> int | None:
    """Parse and run one command."""
    import tyro

    # A transformer without torch says so on every import; TensorFlow's logs are nobody's business here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    keep_compiled()
    module = importlib.import_module(f"enmp_jax.cli.{name}")
    args = tyro.cli(
        module.Args, args=arguments, prog=f"enmp {name}",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )  # fmt: skip
    return module.run(args)


def keep_compiled() -> None:
    """Let JAX keep compiled programs in ``$ENMP_CACHE/xla`` (default ``~/.cache/enmp-jax/xla``).

    JAX's own variables win: ``JAX_COMPILATION_CACHE_DIR``, or ``JAX_ENABLE_COMPILATION_CACHE=false``.
    """
    root = os.environ.get("ENMP_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "enmp-jax")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.expanduser(root), "xla"))


def overview() -> str:
    """The text of ``enmp --help``."""
    lines = [
        "enmp: find and prune the negative modules of LoRA adapters before merging them",
        "",
        "usage: enmp COMMAND [OPTIONS]      (enmp COMMAND --help says more)",
        "",
    ]
    lines += [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    lines += ["", "--debug shows the traceback of an error."]
    return "\n".join(lines)

"""``enmp doctor``: can this machine do the work, and what is to be done if not?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from enmp_jax.cli.output import Json, print_result


@dataclass(frozen=True)
class Args(Json):
    """Look at versions, devices, memory, cache, hub and BLAS threads, and search a problem of known answer.

    What is amiss has one line of what to do. The exit code is 1 if anything would make commands fail."""


def run(args: Args) -> int:
    """Run ``enmp doctor``; returns the exit code."""
    from enmp_jax.runs.doctor import examine

    findings = examine()
    ok = all(finding.ok is not False for finding in findings)
    print_result(args, {"ok": ok, "findings": [f._asdict() for f in findings]}, _show)
    return 0 if ok else 1


def _show(result: Mapping[str, Any]) -> None:
    width = max(len(finding["name"]) for finding in result["findings"])
    for finding in result["findings"]:
        sign = {True: "ok  ", None: "note", False: "NOT "}[finding["ok"]]
        print(f"{sign}  {finding['name']:<{width}}  {finding['found']}")
        if finding["fix"]:
            print(f"      {'':<{width}}  -> {finding['fix']}")

"""Class names and prompt templates of the KnOTS vision suite, as published with CLIP."""

from __future__ import annotations

import functools
from typing import NamedTuple

import yaml

from enmp_jax.config.run_file import SUITES
from enmp_jax.errors import UserError


class Prompts(NamedTuple):
    """What a zero-shot head of a data set is made from.

    Attributes:
        class_names: one per class, in the label order of TFDS (GTSRB: of the benchmark).
        templates: sentences with ``{}`` for the class name.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...]


def prompts(dataset: str) -> Prompts:
    """Class names and templates of a data set.

    Args:
        dataset: ``stanford_cars``, ``dtd``, ``eurosat``, ``gtsrb``, ``mnist``, ``resisc45``, ``sun397`` or
            ``svhn``.

    Raises:
        UserError: another data set.
    """
    if dataset not in _all():
        raise UserError(
            f"no prompts are packaged for {dataset!r} (only for {', '.join(_all())}); list class_names and "
            "templates in the run file"
        )
    return _all()[dataset]


@functools.cache
def _all() -> dict[str, Prompts]:
    data = yaml.safe_load((SUITES / "prompts.yaml").read_text(encoding="utf-8"))
    return {name: Prompts(tuple(d["class_names"]), tuple(d["templates"])) for name, d in data.items()}

"""Which module of the base a name in an adapter file means, and whether adapters belong together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from enmp_jax.errors import UserError, one_line
from enmp_jax.lora import LoraStack
from enmp_jax.module_paths import container, join_layer, split_layer

_MAX_TEMPLATES = 2000  # compared in pairs


def check_bases(bases: Mapping[str, str | None], base_name: str | None, allow: bool) -> str | None:
    """The base model that all adapters name (None if none does).

    Raises:
        UserError: they name different ones and ``allow`` is False.
    """
    named = {task: name for task, name in bases.items() if name}
    first = next(iter(named.values()), None)
    for task, name in named.items():
        for other, owner in ((base_name, "the base model in use"), (first, "another adapter's base")):
            if not allow and other is not None and not same_base(name, other):
                raise UserError(
                    f"adapter {task!r} was trained on {one_line(name)}, but {owner} is {one_line(other)}: "
                    "if they are the same weights, pass --allow-base-mismatch (in a run file: set "
                    "base.allow_mismatch: true)"
                )
    return first


def same_base(x: str, y: str) -> bool:
    """Whether two names of a base model are the same name or the same directory on this machine."""
    # a run file that extends a packaged one spells the package's files with a prefix
    plain = [name.removeprefix("package:").rstrip("/") for name in (x, y)]
    if plain[0] == plain[1]:
        return True
    # two local copies: the same directory under two spellings
    return os.path.exists(x) and os.path.exists(y) and os.path.realpath(x) == os.path.realpath(y)


def to_backbone(
    task: str, paths: Sequence[str], canonical: Callable[[str], str | None], modules: Mapping[str, Any] | None
) -> dict[str, str]:
    """Module paths of an adapter file in the backbone's own spelling.

    Args:
        task: whose adapter it is, for messages.
        paths: module paths as in the file.
        canonical: ``Backbone.canonical``.
        modules: ``Backbone.modules``; None: whatever ``canonical`` knows is in the base.

    Raises:
        UserError: modules that the base model does not have.
    """
    found, missed = {}, []
    for path in paths:
        template, layer = split_layer(path)
        name = None if layer is None else canonical(template)
        if name is None or layer is None or (modules is not None and name not in modules):
            missed.append(template)
        else:
            found[path] = join_layer(name, layer)
    if missed:
        raise UserError(
            f"{len(found)} of {len(paths)} LoRA modules of adapter {task!r} are in the base model; "
            f"it has {examples(missed)}, the base has {examples(modules or ())}; enmp merge merges any "
            "modules, a search only those of its backbone"
        )
    return found


def check_shape(task: str, path: str, shape: tuple[int, int], expected: tuple[int, int]) -> None:
    """Refuse a module whose shape (out, in) is not the base model's.

    Raises:
        UserError: the shapes differ.
    """
    if shape != expected:
        raise UserError(
            f"{one_line(path)} is {shape[0]}x{shape[1]} in adapter {task!r} but {expected[0]}x{expected[1]} "
            "in the base model: the adapter was trained on another base"
        )


def check_product(task: str, path: str, a: np.ndarray, b: np.ndarray) -> None:
    """Refuse factors whose product no float32 holds, though each of them is finite.

    Raises:
        UserError: B times A overflows.
    """
    largest = float(np.finfo(np.float32).max)
    a64, b64 = np.abs(a.astype(np.float64)), np.abs(b.astype(np.float64))
    if a64.max(initial=0) * b64.max(initial=0) * a.shape[0] < largest:
        return
    if (b64 @ a64).max(initial=0) > largest:  # by rows' sums of magnitudes, as any order of summation bears
        raise UserError(
            f"{one_line(path)} of adapter {task!r}: B times A overflows float32: the adapter is damaged, or "
            "its scaling is wrong"
        )


def align(modules: Mapping[str, Sequence[str]], one_base: bool = False) -> dict[str, dict[str, str]]:
    """Match the module paths of several adapters when no backbone is known.

    Files may spell one module with and without a prefix (``vision_model.``): a template that is the end of
    another one, after a dot, is taken as the same module, unless one adapter has both.

    Args:
        modules: task -> module paths as in its file.
        one_base: all name the same base model, so they may adapt different parts of it.

    Returns:
        Task -> module path -> its longest spelling.

    Raises:
        UserError: a template that could be the end of several, or adapters without a layer in common.
    """
    paths = {task: {path: split_layer(path) for path in names} for task, names in modules.items()}
    own = [{template for template, _ in found.values()} for found in paths.values()]
    used = sorted({template for templates in own for template in templates})
    if len(used) > _MAX_TEMPLATES:
        raise UserError(f"the adapters have {len(used)} different projections, more than {_MAX_TEMPLATES}")
    full = {}
    for template in used:
        longer = [
            other
            for other in used
            if other.endswith(f".{template}") and not any({other, template} <= both for both in own)
        ]
        roots = [x for x in longer if not any(y.endswith(f".{x}") for y in longer)]
        if len(roots) > 1:
            raise UserError(f"{template} may mean {examples(roots)}: give the base model to decide")
        full[template] = roots[0] if roots else template
    roots_of = {
        task: {full[template].split("{}")[0] for template, _ in found.values()}
        for task, found in paths.items()
    }
    first, *others = roots_of
    for task in others:
        if not one_base and not roots_of[first] & roots_of[task]:
            one, two = (examples([f"{root}*" for root in roots_of[name]]) for name in (first, task))
            raise UserError(
                f"adapters {first!r} ({one}) and {task!r} ({two}) have no layers in common: they "
                "were trained on different bases"
            )
    return {
        task: {path: full[name].replace("{}", str(layer)) for path, (name, layer) in found.items()}
        for task, found in paths.items()
    }


def spellings(stack: LoraStack, paths: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """Name in the stack -> the path of each of its layers as the files spell it.

    That of the adapter with most modules first; layers that no adapter has are spelled like the others.

    Args:
        stack: the adapters.
        paths: task -> module path in the file -> path in the stack.
    """
    exact: dict[str, str] = {}
    templates: dict[str, str] = {}
    for found in sorted(paths.values(), key=len, reverse=True):
        for path, ours in found.items():
            exact.setdefault(ours, path)
            templates.setdefault(split_layer(ours)[0], split_layer(path)[0])
    names = {}
    for name in stack.projections:
        ours = zip(stack.paths(name), stack.groups_of(name), strict=True)
        names[name] = tuple(
            exact.get(path) or join_layer(templates.get(name, path), group) for path, group in ours
        )
    return names


def check_spelling(stack: LoraStack, names: Mapping[str, Sequence[str]]) -> None:
    """Refuse to write one adapter from files that spell module paths differently.

    Args:
        stack: the adapters.
        names: see ``spellings``.

    Raises:
        UserError: two prefixes in use for one stack of layers.
    """
    used: dict[str, set[str]] = {}
    for name, spelled in names.items():
        for path, ours in zip(spelled, stack.paths(name), strict=True):
            if split_layer(ours)[1] is not None:
                used.setdefault(container(ours), set()).add(container(path))
    for prefixes in used.values():
        if len(prefixes) > 1:
            one, two, *_ = sorted(prefixes)
            raise UserError(
                f"the adapters spell module paths in different ways ({one}* and {two}*), so no one model "
                "would take them all: save them again with one version of transformers"
            )


def examples(names: Mapping[str, Any] | Sequence[str]) -> str:
    """The first two names in alphabetical order, for messages; ``none`` without any."""
    unique = sorted(set(names))
    return " and ".join(one_line(name, 80) for name in unique[:2]) or "none"

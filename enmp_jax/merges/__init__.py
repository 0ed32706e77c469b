"""Merge methods: ``ties(space="knots", density=0.2)``, or by name: ``make("ties", "knots", density=0.2)``.

May import ``lora``, ``deltas`` and below; knows no models, no data, and of files only ``statistics``.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, Protocol, cast, overload, runtime_checkable

import jax.numpy as jnp

from enmp_jax.errors import UserError, suggestion
from enmp_jax.lora import LoraStack
from enmp_jax.merges.base import LayerMethod, Merge, lift, merge_population
from enmp_jax.merges.breadcrumbs import breadcrumbs as _breadcrumbs
from enmp_jax.merges.cart import cart as _cart
from enmp_jax.merges.compress import compress as _compress
from enmp_jax.merges.dare import dare as _dare
from enmp_jax.merges.dare import dare_ties as _dare_ties
from enmp_jax.merges.della import della as _della
from enmp_jax.merges.do_merging import do_merging as _do_merging
from enmp_jax.merges.fisher import fisher as _fisher
from enmp_jax.merges.hyperparameters import check, check_seed, hyperparameters
from enmp_jax.merges.iso import iso as _iso
from enmp_jax.merges.iso import isotropized
from enmp_jax.merges.iso_cts import iso_cts as _iso_cts
from enmp_jax.merges.karcher import karcher as _karcher
from enmp_jax.merges.lego import lego as _lego
from enmp_jax.merges.lines import layer_scaled
from enmp_jax.merges.pico import pico as _pico
from enmp_jax.merges.regmean import regmean as _regmean
from enmp_jax.merges.sce import sce as _sce
from enmp_jax.merges.spaces import SPACES
from enmp_jax.merges.sum import mean as _mean
from enmp_jax.merges.sum import sum_ as _sum
from enmp_jax.merges.ties import ties as _ties
from enmp_jax.merges.tsv import tsv as _tsv

METHODS: dict[str, Callable[..., LayerMethod]] = {
    "sum": _sum,
    "mean": _mean,
    "ties": _ties,
    "dare": _dare,
    "dare_ties": _dare_ties,
    "della": _della,
    "breadcrumbs": _breadcrumbs,
    "sce": _sce,
    "tsv": _tsv,
    "cart": _cart,
    "iso": _iso,
    "iso_cts": _iso_cts,
    "lego": _lego,
    "karcher": _karcher,
    "pico": _pico,
    "compress": _compress,
    "do_merging": _do_merging,
}

WITH_STATISTICS: dict[str, Callable[..., LayerMethod]] = {"regmean": _regmean, "fisher": _fisher}
"""Methods that need to know something of the tasks' data: see ``statistics``."""

ALL: Mapping[str, Callable[..., LayerMethod]] = ChainMap(WITH_STATISTICS, METHODS)
"""Both, those of ``METHODS`` first."""

REFUSED: dict[tuple[str, str], str] = {
    ("iso_cts", "knots"): "the singular values of KnOTS undo the isotropy; use full",
    ("lego", "knots"): "it clusters the adapters' own factors; use full",
    ("lego", "core"): "it clusters the adapters' own factors; use full",
    ("della", "core"): "its drop rates would depend on the size of the space; use full or knots",
    ("karcher", "knots"): "it needs the angles between deltas, which KnOTS's coordinates change; use full",
    ("pico", "knots"): "it calibrates the adapters' own B; use full",
    ("compress", "knots"): "it finds bases of its own; use full",
    ("do_merging", "knots"): "it changes the adapters' own factors; use full",
    ("do_merging", "core"): "it looks at columns, which core space turns; use full",
} | {
    (name, space): "its statistics are those of full matrices; use full"
    for name in WITH_STATISTICS
    for space in ("knots", "core")
}
_ISOTROPIC = ("iso", "iso_cts")

__all__ = [
    "ALL", "METHODS", "REFUSED", "SPACES", "WITH_STATISTICS", "Merge", "breadcrumbs", "cart", "compress",
    "dare", "dare_ties", "della", "do_merging", "fisher", "iso", "iso_cts", "karcher", "lego", "make", "mean",
    "merge_population", "pico", "regmean", "sce", "sum", "ties", "tsv",
]  # fmt: skip

_P = ParamSpec("_P")


def make(method: str, space: str = "full", isotropize: bool = False, **given: Any) -> Merge:
    """Build a merge method by name.

    Args:
        method: a key of ``ALL`` (``-`` and ``_`` are the same).
        space: one of ``SPACES``.
        isotropize: make the merged delta isotropic afterwards (Iso-C after any method).
        given: hyperparameters: those of the method (see its factory); ``task_weights`` for all: each task's
            delta is multiplied by its weight before anything else (a weight of 0 is not pruning: the
            task still counts); ``layer_scaling``: factors of the first and the last layer's merged delta
            (LiNeS), or of every layer's (see ``lines``); ``seed`` for random methods; ``statistics``: the
            path of a file that ``enmp statistics`` wrote, for methods that need it.

    Raises:
        UserError: an unknown method, space, pair of them or hyperparameter, or a value out of range.

    Examples:
        >>> import enmp_jax as enmp
        >>> method = enmp.merges.make("ties", space="knots", density=0.4)
    """
    name = method.replace("-", "_")
    if name not in ALL:
        raise UserError(f"unknown merge method {method!r}: {suggestion(name, ALL)}")
    if space not in SPACES:
        raise UserError(f"unknown merge space {space!r}: {suggestion(space, SPACES)}")
    if (name, space) in REFUSED:
        raise UserError(f"{name} makes no sense in {space} space: {REFUSED[name, space]}")
    if isotropize and name in _ISOTROPIC:
        raise UserError(f"{name} is isotropic already: leave out isotropize")
    weights, scaling = given.pop("task_weights", None), given.pop("layer_scaling", None)
    # random methods alone use the seed; others accept it, as run files set it for a whole run
    seed = check_seed(given.pop("seed", 0))
    statistics = given.pop("statistics", None)
    built = ALL[name](space, **check(name, ALL[name], given))
    if built.statistics and statistics is None:
        raise UserError(
            f"{name} needs statistics of the tasks' data: enmp statistics RUN.yaml --kind {built.statistics} "
            "--out FILE, then statistics: FILE"
        )
    if statistics is not None and not built.statistics:
        raise UserError(f"{name} needs no statistics: leave them out")
    merge = lift(isotropized(built) if isotropize else built, seed, statistics)
    merge = merge if scaling is None else layer_scaled(merge, scaling)
    return merge if weights is None else _weighted(merge, weights)


def _weighted(merge: Merge, weights: Sequence[float]) -> Merge:
    """The method on adapters multiplied by their weights."""
    if isinstance(weights, str) or not all(isinstance(w, int | float) and math.isfinite(w) for w in weights):
        raise UserError(f"task_weights must be finite numbers, one a task, not {weights!r}")

    def prepare(stack: LoraStack) -> Any:
        if len(weights) != stack.n_tasks:
            raise UserError(f"task_weights: give one number a task, {stack.n_tasks}, not {len(weights)}")
        pairs = {}
        for name, pair in stack.pairs.items():
            factor = jnp.asarray(weights, pair.b.dtype)[:, None, None]
            pairs[name] = dataclasses.replace(pair, b=pair.b * factor)
        return merge.prepare(dataclasses.replace(stack, pairs=pairs))

    return Merge(prepare, merge.merge)


@runtime_checkable
class Method(Protocol[_P]):
    """A merge method under its own name: the parameters of its factory, and those that all methods take."""

    @overload
    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> Merge: ...
    @overload
    def __call__(
        self,
        space: str = "full",
        *,
        isotropize: bool = False,
        seed: int = 0,
        task_weights: Sequence[float] | None = None,
        layer_scaling: Sequence[float] | None = None,
        statistics: str | None = None,
        **given: float | str,
    ) -> Merge: ...


def public(name: str, factory: Callable[_P, LayerMethod]) -> Method[_P]:
    """The public function of a method: ``make`` with the signature and the docstring of its factory."""

    def method(space: str = "full", *, isotropize: bool = False, **given: Any) -> Merge:
        return make(name, space, isotropize, **given)

    own = hyperparameters(factory).values()
    keyword = [inspect.Parameter(h.name, inspect.Parameter.KEYWORD_ONLY, default=h.default) for h in own]
    general = inspect.signature(method).parameters
    parameters = [general["space"], *keyword, general["isotropize"], general["given"]]
    method.__signature__ = inspect.Signature(parameters, return_annotation=Merge)  # type: ignore[attr-defined]
    arguments = ", ".join(f"{h.name}={h.default!r}" for h in own if h.default is not None)
    method.__name__ = method.__qualname__ = name
    method.__doc__ = (
        f"{inspect.getdoc(factory)}\n\n"
        "Every method also takes isotropize, seed, task_weights and layer_scaling (see ``make``). Returns a "
        "``Merge``.\n\n"
        f"Raises:\n    UserError: as ``make``.\n\n"
        f"Example:\n    >>> import enmp_jax as enmp\n    >>> method = enmp.merges.{name}({arguments})\n"
    )
    return cast(Method[_P], method)


# these names are also those of the modules that the factories live in: the functions win
sum = public("sum", _sum)
mean = public("mean", _mean)
ties = public("ties", _ties)
dare = public("dare", _dare)
dare_ties = public("dare_ties", _dare_ties)
della = public("della", _della)
breadcrumbs = public("breadcrumbs", _breadcrumbs)
sce = public("sce", _sce)
tsv = public("tsv", _tsv)
cart = public("cart", _cart)
iso = public("iso", _iso)
iso_cts = public("iso_cts", _iso_cts)
lego = public("lego", _lego)
karcher = public("karcher", _karcher)
pico = public("pico", _pico)
compress = public("compress", _compress)
do_merging = public("do_merging", _do_merging)
regmean = public("regmean", _regmean)
fisher = public("fisher", _fisher)

"""What ``adapter_config.json`` says about each module, with PEFT's semantics.

``LoraSettings.parse`` refuses, by name and with the reason, everything whose effect is not a plain
low-rank delta on linear weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from enmp_jax.adapters import patterns
from enmp_jax.adapters.patterns import Clock
from enmp_jax.errors import UserError, one_line, shown

# Options that change what the tensors mean: anything but null, false or empty is refused.
_REFUSED = {
    "use_qalora": "QALoRA pools the inputs, which is not a delta of the weight",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "lora_bias": "it trains a bias in LoRA B, which merging would lose",
    "layer_replication": "it duplicates layers of the base model",
    "trainable_token_indices": "it changes the embeddings, which merging would lose: train again without it",
    "alora_invocation_tokens": "activated LoRA applies to some tokens only, so it cannot be merged",
    "arrow_config": "Arrow routes between adapters, so it cannot be merged",
    "kasa_config": "KaSA is not a plain LoRA",
    "monteclora_config": "MonteCLoRA is not a plain LoRA",
    "megatron_config": "Megatron's parallel layers are not supported",
}
# Initialisations that subtract something from the base weights; PEFT stores the adapter relative to
# the changed base unless it is converted on saving.
_CHANGES_BASE = ("pissa_niter", "corda", "loftq", "lora_ga")
# of these, what was subtracted is found again from the base weights alone
_REPEATABLE = ("pissa", "olora")
_PLAIN_INIT = ("gaussian", "eva", "orthogonal", "mica")
_MAX_RANK = 65536
_MAX_PATTERNS = 10_000


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scaling and targets of an adapter."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    fan_in_fan_out: bool
    target_modules: tuple[str, ...] | str | None
    exclude_modules: tuple[str, ...] | str | None
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    task_type: str | None
    base_model: str | None
    dora: bool = False
    target_parameters: tuple[str, ...] = ()
    init: str | None = None
    """``pissa`` or ``olora``: subtracted from the base weights before training."""
    exact: bool = False
    """The patterns are whole module paths."""
    clock: Clock = field(default_factory=Clock, compare=False)

    @classmethod
    def parse(cls, config: Mapping[str, Any], where: str) -> LoraSettings:
        """Read a configuration.

        Args:
            config: the JSON object.
            where: what error messages start with.

        Raises:
            UserError: a value of the wrong type, or an option that cannot be merged.
        """
        read = _Reader(config, where)
        kind = config.get("peft_type")
        if kind is None:
            read.fail("peft_type is missing: this is not a PEFT adapter configuration")
        if kind != "LORA":
            read.fail(f"peft_type is {shown(kind, 80)}: only LORA adapters can be merged")
        for key, reason in _REFUSED.items():
            if config.get(key) not in (None, False, {}, []):
                read.fail(f"{key} is set: {reason}")
        bias = config.get("bias", "none")
        if bias != "none":
            read.fail(f"bias is {shown(bias, 80)}: trained biases would be lost; only 'none' can be merged")
        layers = config.get("layers_to_transform")
        if layers is not None and not isinstance(layers, list):
            layers = [layers]
        if any(isinstance(x, bool) or not isinstance(x, int) for x in layers or ()):
            read.fail(f"layers_to_transform must hold integers, not {shown(layers, 80)}")
        return cls(
            rank=read.rank(config.get("r", 8), "r"),
            alpha=read.number(config.get("lora_alpha", 8), "lora_alpha"),
            rank_pattern={
                k: read.rank(v, f"rank_pattern.{k}") for k, v in read.pattern("rank_pattern").items()
            },
            alpha_pattern={
                k: read.number(v, f"alpha_pattern.{k}") for k, v in read.pattern("alpha_pattern").items()
            },
            rslora=read.flag("use_rslora"),
            fan_in_fan_out=read.flag("fan_in_fan_out"),
            target_modules=read.names_or_regex("target_modules"),
            exclude_modules=read.names_or_regex("exclude_modules"),
            layers=tuple(layers) if layers else None,
            layers_pattern=read.names("layers_pattern"),
            modules_to_save=read.names("modules_to_save"),
            task_type=read.text("task_type"),
            base_model=read.text("base_model_name_or_path") or None,
            dora=read.flag("use_dora"),
            target_parameters=read.names("target_parameters"),
            init=_check_init(config.get("init_lora_weights", True), read),
            clock=Clock(where),
        )

    @property
    def needs_base(self) -> bool:
        """Whether the adapter is a low-rank delta only together with its base model."""
        return self.dora or self.init is not None

    def module_rank(self, path: str) -> int:
        """Rank of a module, ``rank_pattern`` applied."""
        return self.rank_pattern.get(self._key(self.rank_pattern, path), self.rank)

    def scaling(self, path: str) -> float:
        """What PEFT multiplies ``B A`` with: alpha / r, with rsLoRA alpha / sqrt(r)."""
        alpha = self.alpha_pattern.get(self._key(self.alpha_pattern, path), self.alpha)
        rank = self.module_rank(path)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def targets(self, path: str) -> bool:
        """Whether PEFT would put a LoRA on this module (``check_target_module_exists``)."""
        if self.exclude_modules and self._named(self.exclude_modules, path):
            return False
        if self.target_modules is None or self.target_modules == "all-linear":
            return True  # PEFT takes its default list for the architecture, or all linear layers
        if isinstance(self.target_modules, str) or path in self.target_modules:
            return self._named(self.target_modules, path)
        if not self._named(self.target_modules, path):
            return False
        if self.layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            layer = self.clock.layer(pattern, path)
            if layer is not None:
                return layer in self.layers
        return False

    def _key(self, patterns: Mapping[str, Any], path: str) -> str:
        return path if self.exact else self.clock.first(patterns, path)

    def _named(self, names: tuple[str, ...] | str, path: str) -> bool:
        if isinstance(names, str):
            return self.clock.matches(names, path)
        known = self._targets if names is self.target_modules else self._excluded
        parts = path.split(".")
        return any(".".join(parts[i:]) in known for i in range(len(parts)))

    @cached_property
    def _targets(self) -> frozenset[str]:
        return frozenset(self.target_modules or ())

    @cached_property
    def _excluded(self) -> frozenset[str]:
        return frozenset(self.exclude_modules or ())


@dataclass(frozen=True)
class _Reader:
    config: Mapping[str, Any]
    where: str

    def fail(self, message: str) -> None:
        raise UserError(f"{self.where}: {one_line(message, 300)}")

    def number(self, value: Any, key: str) -> float:
        try:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise OverflowError
            result = float(value)
        except OverflowError:
            result = math.nan
        if not math.isfinite(result):
            self.fail(f"{key} must be a finite number, not {shown(value, 80)}")
        return result

    def rank(self, value: Any, key: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_RANK:
            self.fail(f"{key} must be a rank from 1 to {_MAX_RANK}, not {shown(value, 80)}")
        return value

    def flag(self, key: str) -> bool:
        value = self.config.get(key) or False
        if not isinstance(value, bool):
            self.fail(f"{key} must be true or false, not {shown(value, 80)}")
        return value

    def text(self, key: str) -> str | None:
        value = self.config.get(key)
        if value is not None and not isinstance(value, str):
            self.fail(f"{key} must be a string, not {shown(value, 80)}")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self.config.get(key)
        value = [value] if isinstance(value, str) else value or []
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            self.fail(f"{key} must be a list of names, not {shown(value, 80)}")
        if key == "layers_pattern":
            for pattern in value:
                self.regex(pattern, key)
        return tuple(value)

    def names_or_regex(self, key: str) -> tuple[str, ...] | str | None:
        value = self.config.get(key)
        if not isinstance(value, str):
            return None if value is None else self.names(key)
        if value.lower() == "all-linear":
            return "all-linear"
        self.regex(value, key)
        return value

    def pattern(self, key: str) -> Mapping[str, Any]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            self.fail(f"{key} must be an object, not {shown(value, 80)}")
        if len(value) > _MAX_PATTERNS:
            self.fail(f"{key} has {len(value)} entries, more than {_MAX_PATTERNS}")
        for pattern in value:
            self.regex(rf"(.*\.)?({pattern})$", key)
        return value

    def regex(self, pattern: str, key: str) -> None:
        if (wrong := patterns.check(pattern)) is not None:
            self.fail(f"{key} has an invalid regular expression {shown(pattern, 80)}: {wrong}")


def _check_init(value: Any, read: _Reader) -> str | None:
    """``pissa`` or ``olora``, or None for what leaves the base weights as they are."""
    if isinstance(value, bool) or value is None:
        return None
    kind = value.lower() if isinstance(value, str) else ""
    if kind in _PLAIN_INIT:
        return None
    if kind in _REPEATABLE:
        return kind
    if kind.startswith(_CHANGES_BASE):
        read.fail(
            f"init_lora_weights is {shown(value, 80)}, which changes the base weights by what it drew or "
            "measured: save the adapter again with PEFT's path_initial_model_for_weight_conversion to make "
            "it a plain LoRA"
        )
    read.fail(f"init_lora_weights is {shown(value, 80)}, which is not known")
    return None

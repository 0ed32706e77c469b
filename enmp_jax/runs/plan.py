"""What ``enmp search --plan`` says: bytes on a device, FLOPs of a mask and time, before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from enmp_jax.errors import one_line
from enmp_jax.evaluation.budget import (
    backward_bytes,
    delta_bytes,
    device_memory,
    largest_activations,
    mask_flops,
    matmul_rate,
    n_bytes,
)
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.runs.climb import step_cost


@dataclass(frozen=True)
class Plan:
    """What ``enmp search --plan`` prints. Bytes are those of one device; ``masks`` counts forward passes."""

    mesh: dict[str, int]
    member_chunk: int
    memory: int
    base: int
    adapters: int
    batches: int
    deltas: int
    activations: int
    flops_per_mask: int
    masks: int
    matmul_rate: float
    devices: int
    gradient: bool = False
    step_cost: float = 0.0

    @property
    def total(self) -> int:
        """All bytes on a device."""
        return self.base + self.adapters + self.batches + self.deltas + self.activations

    @property
    def seconds(self) -> float:
        """Time of all masks at the measured rate of matrix products: nothing can be faster."""
        return self.masks * self.flops_per_mask / (self.matmul_rate * self.devices)

    def lines(self) -> list[str]:
        """For people."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        of = "one model and its gradient" if self.gradient else f"{self.member_chunk} members"
        parts = {
            "base weights": self.base, "adapters and heads": self.adapters, "batches": self.batches,
            f"deltas of {of}": self.deltas, f"activations of {of}": self.activations, "total": self.total,
        }  # fmt: skip
        work = (
            f"the price of at most {self.masks} masks ({self.step_cost:g} a step of the gradient)"
            if self.gradient
            else f"at most {self.masks} masks (repeated ones cost nothing)"
        )
        wide = max(map(len, parts)) + 2
        return [
            f"mesh: {mesh} ({self.devices} device{'s' * (self.devices > 1)})",
            f"members together on a device: {self.member_chunk}",
            f"bytes on a device, of {_bytes(self.memory)}:",
            *(f"  {name:<{wide}}{_bytes(value):>10}" for name, value in parts.items()),
            *(["  MORE THAN THERE IS: set evaluation.mesh, batch_size or member_chunk"] * self.too_large),
            f"one mask: {self.flops_per_mask / 1e9:,.1f} GFLOP",
            f"the search: {work}",
            f"measured matrix products: {self.matmul_rate / 1e9:,.0f} GFLOP/s a device",
            f"time at that rate: {_seconds(self.seconds)}; no pass is faster, and compiling comes on top",
        ]

    @property
    def too_large(self) -> bool:
        """Whether a device has less memory than that."""
        return self.total > self.memory


def make_plan(evaluator: Evaluator, rate: float | None = None) -> Plan:
    """The plan of a loaded run's search; runs nothing but a matrix product.

    Args:
        evaluator: of a run with its search split.
        rate: FLOP/s of a device; default: measured.
    """
    loaded, inputs = evaluator.loaded, evaluator.inputs("search")
    search, shape, backbone = loaded.run.search, loaded.mask_spec.shape, loaded.backbone
    merge, chunk = evaluator.plan(inputs)
    gradient = search.strategy == "gradient"
    if gradient:  # one merged model, its deltas as the method makes them, and their derivatives
        merge, chunk = evaluator.merge, 1
        activations = backward_bytes(backbone, evaluator.spread(inputs).batches)
        masks = math.ceil(step_cost(search) * search.generations) * search.seeds
    else:
        activations = chunk * largest_activations(backbone, inputs.batches)
        masks = search.population * search.generations * search.seeds
    own, _ = delta_bytes(evaluator.merge, inputs.ingredients, shape, merge)
    return Plan(
        mesh=dict(evaluator.mesh.shape),
        member_chunk=chunk,
        memory=device_memory(),
        base=n_bytes(inputs.params),
        adapters=n_bytes((inputs.ingredients, inputs.heads)),
        batches=n_bytes(inputs.batches),
        deltas=(2 if gradient else chunk) * own,
        activations=activations,
        flops_per_mask=mask_flops(backbone, merge, inputs, shape),
        masks=masks,
        matmul_rate=rate or matmul_rate(backbone.config.block.dtype),
        devices=evaluator.mesh.size,
        gradient=gradient,
        step_cost=step_cost(search) if gradient else 0.0,
    )


def out_of_memory(evaluator: Evaluator, error: BaseException) -> str:
    """What took the memory of a search that ran out of it, and which setting to change."""
    advice = (
        "set a smaller evaluation.batch_size or evaluation.member_chunk, or divide the model over devices "
        "with evaluation.mesh; --resume goes on"
    )
    try:
        plan = make_plan(evaluator, rate=1.0)
    except Exception:  # there is no memory even for that
        return f"out of memory ({one_line(error)}): {advice}"
    parts = {
        "base weights": plan.base, "adapters and heads": plan.adapters, "batches": plan.batches,
        f"deltas of {plan.member_chunk} members": plan.deltas, "their activations": plan.activations,
    }  # fmt: skip
    sizes = ", ".join(f"{name} {_bytes(value)}" for name, value in parts.items())
    return f"out of memory: a device has {_bytes(plan.memory)} for {sizes}; {advice}"


def _bytes(n: int) -> str:
    value, units = float(n), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.1f} {units[0]}"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

"""What a search costs before it runs: bytes on a device, FLOPs of a mask, time; and what follows from it.

The cost model is small on purpose. Per member and batch, the live activations of one layer are about

    rows * (4 bytes or 2 * tokens * (6 width + 2 hidden (3 where gated)) + 8 bytes * heads * tokens^2)

(measured with XLA's ``memory_analysis`` on ViT-B/32 and Llama shapes: within 30 % there in float32; up
to three times too many for tiny models). To that come the member's deltas: the cores of low-rank ones;
of dense ones every full matrix, and while they are merged three arrays per task of the largest.
"""

from __future__ import annotations

import functools
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp

from enmp_jax.data.layout import kind_of
from enmp_jax.deltas import Dense, LowRank
from enmp_jax.devices.flops import count_flops
from enmp_jax.devices.matmul import times_transposed
from enmp_jax.evaluation.delta_format import delta_shapes
from enmp_jax.merges.base import Ingredients, Merge
from enmp_jax.models.base import Backbone
from enmp_jax.models.causal import LOGITS_BYTES, answer_log_probabilities

BASE_SHARE = 0.6
"""Most of a device's memory that base weights may take; above it they are divided over ``model``."""
USABLE = 0.85
"""Share of a device's memory that is planned with; the rest is the compiler's and the allocator's."""
CACHED = 16 * 2**20
"""Bytes of activations of a chunk of members beyond which CPUs slow down (half of 32 MiB of L3 cache: see
benchmarks/results/population_throughput.md)."""
HALVINGS = 3
"""How often fewer members together are tried where memory did not suffice."""


def out_of_memory(error: BaseException) -> bool:
    """Whether a compilation or a run asked for more memory than there is."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def device_memory(device: Any = None) -> int:
    """Bytes of memory of a device; of a CPU, its share of half of the machine's memory."""
    device = device or jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // 2 // jax.local_device_count()


def free_bytes(inputs: Any) -> int:
    """Bytes of a device that are planned with and that the inputs (arrays on it) leave free."""
    return int(USABLE * device_memory()) - n_bytes(inputs)


def n_bytes(tree: Any) -> int:
    """Bytes of a pytree on one device: of sharded arrays, one shard."""

    def one(x: Any) -> int:
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        return math.prod(shape) * _itemsize(x.dtype)

    return sum(map(one, jax.tree.leaves(tree)))


def _itemsize(dtype: Any) -> int:
    return 16 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize


def smallest_model_axis(backbone: Backbone, devices: int, memory: int | None = None) -> int:
    """Over how many devices the base weights must be divided to fit: the smallest divisor that does."""
    base = n_bytes(jax.eval_shape(backbone.init, jax.random.key(0)))
    limit = BASE_SHARE * (memory or device_memory())
    fitting = (m for m in range(1, devices + 1) if devices % m == 0 and base / m <= limit)
    return next(fitting, devices)


def n_tokens(backbone: Backbone, inputs: Any) -> int:
    """Tokens of one example that the layers see."""
    params = jax.eval_shape(backbone.init, jax.random.key(0))
    return jax.eval_shape(backbone.hidden_states, params, inputs).shape[2]


def activation_bytes(backbone: Backbone, inputs: Any, platform: str | None = None) -> int:
    """Activations of one member for one batch (see the module docstring), in bytes.

    Args:
        backbone: the base model.
        inputs: one batch of inputs, arrays or shapes [row, ...]; rows of one device.
        platform: CPUs get bfloat16 products as float32; default: the default backend.
    """
    block, rows = backbone.config.block, jax.tree.leaves(inputs)[0].shape[0]
    tokens = n_tokens(backbone, inputs)
    width = 4 if (platform or jax.default_backend()) == "cpu" else jnp.dtype(block.dtype).itemsize
    per_token = 6 * block.width + (3 if block.gated else 2) * block.hidden
    return rows * (tokens * width * per_token + 8 * block.heads * tokens**2) + _logits_bytes(backbone, inputs)


def _logits_bytes(backbone: Backbone, inputs: Any) -> int:
    """A block of next-token logits, their log-probabilities and what a fitness makes of them, if any."""
    if kind_of(inputs) == "classification" or backbone.logits is None:
        return 0
    params = jax.eval_shape(backbone.init, jax.random.key(0))
    hidden = jax.ShapeDtypeStruct((*inputs["target_ids"].shape, backbone.width), jnp.float32)
    return 3 * min(LOGITS_BYTES, n_bytes(jax.eval_shape(backbone.logits, params, hidden)))


def delta_bytes(
    merge: Merge, ingredients: Ingredients, keep_shape: tuple[int, ...], chosen: Merge | None = None
) -> tuple[int, bool]:
    """Bytes of deltas that each member has of its own, and whether the method makes dense ones.

    Args:
        merge: the method.
        ingredients: arrays or shapes.
        keep_shape: of a mask.
        chosen: the same method with its deltas in other formats (see ``delta_format``), if that is what runs.
    """
    deltas = delta_shapes(chosen or merge, ingredients, keep_shape)
    own = [d.core if isinstance(d, LowRank) else d.weight for d in deltas.values()]
    made = delta_shapes(merge, ingredients, keep_shape).values()
    dense = [d.weight for d in made if isinstance(d, Dense)]
    largest = max((math.prod(w.shape[1:]) for w in dense), default=0)
    return n_bytes(own) + 3 * keep_shape[-1] * 4 * largest, bool(dense)


def choose_member_chunk(
    members: int, deltas: int, activations: int, free: int, platform: str | None = None
) -> int:
    """How many members a device evaluates together.

    As many as fit, but at most a quarter of its members: known masks are left out by the chunk, so large
    chunks would evaluate masks that nobody needs. On a CPU at most 4, and no more than its caches bear.

    Args:
        members: of a generation, on this device.
        deltas: bytes of those of one member.
        activations: bytes of those of one member.
        free: bytes that there are for them.
        platform: of the devices; default: the default backend.
    """
    if (platform or jax.default_backend()) == "cpu":
        most = min(4, CACHED // max(activations, 1))
    else:
        most = math.ceil(members / 4)
    return max(1, min(members, most, free // max(deltas + activations, 1)))


def matmul_rate(dtype: Any, size: int | None = None, repeats: int = 5) -> float:
    """Measured FLOP/s of a square matrix product on one device, as models compute it: their ceiling."""
    size = size or (1024 if jax.default_backend() == "cpu" else 8192)
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: times_transposed(a, a))
    product(x).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def largest_activations(backbone: Backbone, batches: Any) -> int:
    """Activations of one member for the largest batch, in bytes on a device."""
    return max(activation_bytes(backbone, _one_batch(bucket)) for bucket in batches)


def largest_states(backbone: Backbone, batches: Any) -> int:
    """Hidden states of one member after every layer, for the largest batch, in bytes on a device."""
    params = jax.eval_shape(backbone.init, jax.random.key(0))
    return max(
        n_bytes(jax.eval_shape(backbone.hidden_states, params, _one_batch(bucket))) for bucket in batches
    )


def backward_bytes(backbone: Backbone, batches: Any) -> int:
    """Activations of the gradient of one merged model, in bytes on a device.

    Those of every layer are kept for the largest batch (other batches compute theirs again), and their
    derivatives beside them: twice the activations of all layers. Against XLA's ``memory_analysis`` this is
    an upper bound at Llama-3-8B shapes (tests/eight_devices.py).
    """
    return 2 * backbone.n_layers * largest_activations(backbone, batches)


def tokens_and_batches(backbone: Backbone, batches: Any) -> tuple[int, int]:
    """Tokens that one member sees on a device, of all batches together, and the number of batches."""
    tokens = count = 0
    for bucket in batches:
        inputs, n = _one_batch(bucket), bucket.label.shape[0]
        tokens += n * jax.tree.leaves(inputs)[0].shape[0] * n_tokens(backbone, inputs)
        count += n
    return tokens, count


def _one_batch(bucket: Any) -> Any:
    """What a device has of one batch of inputs [batches, row, ...], as shapes."""

    def rows(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        return jax.ShapeDtypeStruct(shape[1:], x.dtype)

    return jax.tree.map(rows, bucket.inputs)


def mask_flops(backbone: Backbone, merge: Merge, fixed: Any, keep_shape: tuple[int, ...]) -> int:
    """FLOPs of the forward passes of one mask over all batches, low-rank deltas included."""
    deltas = delta_shapes(merge, fixed.ingredients, keep_shape)
    total = 0
    for bucket in fixed.batches:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), bucket.inputs)
        run = backbone.features
        if kind_of(one) != "classification":
            run = functools.partial(answer_log_probabilities, backbone)
        total += bucket.label.shape[0] * count_flops(run, fixed.params, one, deltas)
    return total

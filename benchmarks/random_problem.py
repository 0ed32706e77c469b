"""A problem of real shapes with random weights, adapters and data, for benchmarks of the population."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enmp_jax import merges, models
from enmp_jax.data.batches import Batches
from enmp_jax.evaluation import budget, delta_format
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.evaluation.scoring import Heads
from enmp_jax.lora import LoraPair, LoraStack
from enmp_jax.merges.base import Merge
from enmp_jax.models.base import Backbone

CONFIGS: dict[str, dict[str, Any]] = {
    "vit-b-32": {"model_type": "clip_vision_model", "patch_size": 32, "image_size": 224},
    "vit-l-14": {
        "model_type": "clip_vision_model", "patch_size": 14, "image_size": 224, "hidden_size": 1024,
        "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "projection_dim": 768,
    },
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
        "architectures": ["LlamaForSequenceClassification"],
    },
}  # fmt: skip
ADAPTED = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj")


def random_stack(backbone: Backbone, tasks: int, rank: int) -> LoraStack:
    """LoRA on the four attention projections of every layer."""
    random, n = np.random.default_rng(0), backbone.n_layers

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape, np.float32) * 0.02)

    pairs = {
        name: LoraPair(normal(n, tasks, rank, inner), normal(n, tasks, out, rank), ((rank,) * tasks,) * n)
        for name, (out, inner) in backbone.modules.items()
        if name.endswith(ADAPTED)
    }
    return LoraStack(pairs, tuple(f"task-{i}" for i in range(tasks)))


def random_problem(
    model: str,
    merge: Merge | None = None,
    *,
    layers: int | None = None,
    dtype: str = "float32",
    tasks: int = 8,
    rank: int = 16,
    examples: int = 64,
    batch_size: int = 128,
    tokens: int = 128,
    classes: int = 100,
) -> tuple[Backbone, Merge, LoraStack, EvalInputs]:
    """Everything that an evaluation needs.

    Args:
        model: key of ``CONFIGS``.
        merge: method; default: mean.
        layers: fewer layers than the model has.
        dtype: of weights and activations.
        tasks, rank: of the adapters.
        examples: per task.
        batch_size: rows of a batch.
        tokens: length of texts.
        classes: of every head.
    """
    config = CONFIGS[model] | ({"num_hidden_layers": layers} if layers else {})
    backbone, merge = models.build(config, dtype), merge or merges.make("mean")
    stack, random = random_stack(backbone, tasks, rank), np.random.default_rng(1)
    params = jax.jit(backbone.init)(jax.random.key(0))
    count = -(-tasks * examples // batch_size)
    rows = (count, batch_size)
    if "image" in backbone.input_spec:
        inputs = {"image": random.integers(0, 256, (*rows, 224, 224, 3), np.uint8)}
    else:
        ids = random.integers(0, config["vocab_size"], (*rows, tokens), np.int32)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    index = np.arange(count * batch_size).reshape(rows)
    batches = Batches(
        jax.tree.map(jnp.asarray, inputs),
        jnp.asarray(random.integers(0, classes, rows, np.int32)),
        jnp.asarray(np.minimum(index // examples, tasks - 1).astype(np.int32)),
        jnp.asarray(index < tasks * examples),
    )
    weight = random.standard_normal((tasks, classes, backbone.width), np.float32) * 0.02
    heads = Heads(
        jnp.asarray(weight), jnp.zeros((tasks, classes)), jnp.ones((tasks, classes), bool), jnp.ones(tasks)
    )
    return backbone, merge, stack, EvalInputs(params, merge.prepare(stack), heads, (batches,))


def random_keep(members: int, stack: LoraStack, seed: int = 2) -> np.ndarray:
    """Masks that prune a tenth of the modules."""
    return np.random.default_rng(seed).random((members, stack.n_layers, stack.n_tasks)) > 0.1


def searched_chunk(members: int, backbone: Backbone, inputs: EvalInputs) -> int:
    """Members evaluated together, as a search would with memory for all of them."""
    return budget.choose_member_chunk(members, 0, budget.largest_activations(backbone, inputs.batches), 2**60)


def searched_form(backbone: Backbone, merge: Merge, stack: LoraStack, inputs: EvalInputs, room: int) -> Merge:
    """The method with its deltas in the form that a search would choose, ``room`` bytes a member."""
    labels = [bucket.label for bucket in inputs.batches]
    one = jax.tree.map(lambda x: x[0], inputs.batches[0].inputs)
    return delta_format.choose(
        merge, inputs.ingredients, (stack.n_layers, stack.n_tasks), free_bytes=room,
        tokens=budget.n_tokens(backbone, one) * sum(x.size for x in labels), batches=sum(map(len, labels)),
    )  # fmt: skip

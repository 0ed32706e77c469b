"""A tiny problem with every part of a real one, for tests that run in processes of their own."""

import jax
import numpy as np

from enmp_jax import merges, models
from enmp_jax.data import batch
from enmp_jax.data.base import Examples
from enmp_jax.evaluation.population import EvalInputs
from enmp_jax.evaluation.scoring import stack_heads
from enmp_jax.lora import LoraStack, stack_adapters

TASKS = ("a", "b", "c")
VIT = {
    "model_type": "vit", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "num_channels": 1,
}  # fmt: skip
BATCH = 8
ADAPTED = ("q_proj", "query", "fc1", "up_proj", "intermediate.dense")


def random_stack(backbone, tasks=TASKS, rank=2, seed=1) -> LoraStack:
    """LoRA on queries and the MLP of every layer, large enough to change scores."""
    adapted = {name: shape for name, shape in backbone.modules.items() if name.endswith(ADAPTED)}
    random = np.random.default_rng(seed)
    return stack_adapters(
        {
            task: {
                name.format(layer): (
                    random.normal(size=(rank, inner)).astype("f"),
                    random.normal(size=(out, rank)).astype("f"),
                )
                for name, (out, inner) in adapted.items()
                for layer in range(backbone.n_layers)
            }
            for task in tasks
        }
    )


def make_inputs(method="mean", examples=7, config=VIT, dtype="float32", size=8):
    """(backbone, merge, stack, EvalInputs); 7 examples of 3 tasks leave a ragged last batch of 8."""
    backbone = models.build(config, dtype)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0))
    # weights large enough that scores differ between masks; norms stay at 1
    params = jax.tree.map(
        lambda x: random.normal(size=x.shape, scale=0.3).astype("f") if x.ndim > 2 else np.ones(x.shape, "f"),
        shapes,
    )
    params = jax.device_put(params)
    stack, merge = random_stack(backbone), merges.make(method)
    random = np.random.default_rng(2)
    data = [
        Examples(
            {"image": random.integers(0, 256, (examples, size, size, 1)).astype(np.uint8)},
            random.integers(0, 4, examples).astype(np.int32), (), np.zeros(examples, "S32"),
        )
        for _ in TASKS
    ]  # fmt: skip
    heads = stack_heads([(random.normal(size=(4, backbone.width)).astype("f"), None) for _ in TASKS])
    return backbone, merge, stack, EvalInputs(params, merge.prepare(stack), heads, batch(data, BATCH))


def masks(n, seed=3):
    """Random keep masks [n, layer, task] and scales [n]."""
    random = np.random.default_rng(seed)
    return random.random((n, 2, len(TASKS))) > 0.3, random.uniform(0.3, 1.0, n).astype(np.float32)

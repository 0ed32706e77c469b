"""Small adapters and base models on disk, for the tests of exports."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from enmp_jax import merges
from enmp_jax.adapters import load_adapters, save_adapter
from enmp_jax.adapters.recipe import Recipe

TASKS = ("cars", "dtd")
SHAPES = {"self_attn.q_proj": (4, 6), "mlp.up_proj": (9, 6)}
PRUNED = [(0, "cars"), (1, "dtd")]
RECIPE = Recipe(
    merge={"method": "ties", "space": "full", "scale": 0.5, "density": 0.3, "isotropize": True},
    pruned=PRUNED,
    seed=7,
    scores={"split": "test", "reference": {"cars": 0.8, "dtd": 0.5}, "merged": {"cars": 0.6, "dtd": 0.4}},
)


def make(path, seed, rank=2, dtype: Any = np.float32, alpha=None, layers=(0, 1, 2), **options):
    random = np.random.default_rng(seed)
    modules = {
        f"model.layers.{layer}.{name}": (
            random.normal(size=(rank, n)).astype(dtype), random.normal(size=(m, rank)).astype(dtype)
        )
        for layer in layers
        for name, (m, n) in SHAPES.items()
    }  # fmt: skip
    save_adapter(path, modules, rank, alpha or 2 * rank, "org/base", **options)
    return path


@pytest.fixture
def loaded(tmp_path):
    """Two adapters, one of them with a head, in a directory whose name must not be published."""
    head = {"score": {"weight": np.arange(12, dtype=np.float32).reshape(2, 6)}}
    make(tmp_path / "secret-user" / "cars", 0, heads=head, task_type="SEQ_CLS")
    make(tmp_path / "secret-user" / "dtd", 1, rank=3)
    return load_adapters({task: tmp_path / "secret-user" / task for task in TASKS})


@pytest.fixture
def keep():
    """``PRUNED`` as a keep mask [layer, task]."""
    mask = np.ones((3, 2), bool)
    mask[0, 0] = mask[1, 1] = False
    return mask


def merged(loaded, keep, method="sum", scale=0.5):
    merge = merges.make(method)
    return merge.merge(merge.prepare(loaded.stack), jnp.asarray(keep), scale)


def spelled(deltas):
    """The names of deltas as ``LoadedAdapters.names`` has them."""
    return {
        name: [name.replace("{}", str(i)) for i in range(delta.materialise().shape[0])]
        for name, delta in deltas.items()
    }


def make_base(path, dtype=np.float32, shards=1, **config):
    path.mkdir()
    random = np.random.default_rng(9)
    tensors = {"model.embed_tokens.weight": random.normal(size=(11, 6))}
    for layer in range(4):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = random.normal(size=shape)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = np.ones(6)
    tensors: dict[str, np.ndarray] = {key: value.astype(dtype) for key, value in tensors.items()}
    tensors["model.position_ids"] = np.arange(5)
    (path / "config.json").write_text(json.dumps({"model_type": "tiny", "torch_dtype": "float32"} | config))
    (path / "tokenizer.json").write_text("{}")
    (path / "LICENSE").write_text("theirs")
    (path / "pytorch_model.bin").write_bytes(b"x")
    if shards == 1:
        safetensors.numpy.save_file(tensors, path / "model.safetensors", {"format": "pt", "made": "by"})
        return tensors
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for name, part in zip(names, parts):
        safetensors.numpy.save_file(part, path / name, {"format": "pt"})
    weight_map = {key: name for name, part in zip(names, parts) for key in part}
    index = {"metadata": {"total_size": 1, "note": "kept"}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def load_all(path):
    files = sorted(path.glob("*.safetensors"))
    return {key: value for file in files for key, value in safetensors.numpy.load_file(file).items()}


def wanted(tensors, deltas, transposed=False):
    found = {key: value.astype(np.float32) for key, value in tensors.items()}
    for template, delta in deltas.items():
        for layer, dense in enumerate(np.asarray(delta.materialise())):
            found[f"{template.replace('{}', str(layer))}.weight"] += dense.T if transposed else dense
    return found

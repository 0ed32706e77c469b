"""What backbones promise beyond parity: spellings, populations without copies, zero-shot heads, scores."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enmp_jax import models
from enmp_jax.deltas import LowRank
from enmp_jax.errors import UserError
from enmp_jax.models.clip import zero_shot_head
from enmp_jax.models.rope import rope

GOLDEN = Path(__file__).parent / "data" / "models"
VIT = {"model_type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 64, "intermediate_size": 256}
VIT |= {"num_hidden_layers": 3, "num_attention_heads": 4}

PEFT, VIT_LAYER, CLIP_LAYER = "base_model.model.", "vit.layers.{}.", "vision_model.encoder.layers.{}."
TEXT_LAYER, BERT_LAYER = "text_model.encoder.layers.{}.", "bert.encoder.layer.{}."


@pytest.mark.parametrize(
    ("kind", "template", "canonical"),
    [
        ("vit", PEFT + "vit.encoder.layer.{}.attention.attention.query", VIT_LAYER + "attention.q_proj"),
        ("vit", "encoder.layer.{}.attention.output.dense", VIT_LAYER + "attention.o_proj"),
        ("vit", VIT_LAYER + "mlp.fc2", VIT_LAYER + "mlp.fc2"),
        ("vit", "layers.{}.attention.v_proj", VIT_LAYER + "attention.v_proj"),
        ("vit", "vit.encoder.layer.{}.output.dense", VIT_LAYER + "mlp.fc2"),
        ("vit", "vit.encoder.layer.{}.intermediate.dense", VIT_LAYER + "mlp.fc1"),
        ("vit", VIT_LAYER + "layernorm_before", None),
        ("vit", "classifier", None),
        ("clip", PEFT + "encoder.layers.{}.self_attn.q_proj", CLIP_LAYER + "self_attn.q_proj"),
        ("clip", CLIP_LAYER + "mlp.fc1", CLIP_LAYER + "mlp.fc1"),
        (
            "clip",
            PEFT + "vision_model." + CLIP_LAYER + "self_attn.out_proj",
            CLIP_LAYER + "self_attn.out_proj",
        ),
        ("clip", TEXT_LAYER + "self_attn.q_proj", None),
        ("clip_text_model", TEXT_LAYER + "self_attn.q_proj", TEXT_LAYER + "self_attn.q_proj"),
        ("bert", "encoder.layer.{}.attention.self.query", BERT_LAYER + "attention.self.query"),
        ("bert", BERT_LAYER + "output.dense", BERT_LAYER + "output.dense"),
        ("roberta", PEFT + "roberta.encoder.layer.{}.output.dense", "roberta.encoder.layer.{}.output.dense"),
        ("llama", PEFT + "model.layers.{}.self_attn.k_proj", "model.layers.{}.self_attn.k_proj"),
        ("llama", "layers.{}.mlp.gate_proj", "model.layers.{}.mlp.gate_proj"),
        ("llama", "model.layers.{}.block_sparse_moe.gate", None),
    ],
)
def test_spellings_of_module_names(kind, template, canonical):
    backbone = models.build({"model_type": kind, "num_hidden_layers": 2})
    assert backbone.canonical(template) == canonical
    assert canonical is None or canonical in backbone.modules


def random_params(backbone):
    """Not ``backbone.init``: drawn by numpy, nothing to compile."""
    random = np.random.RandomState(0)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(random.normal(size=s.shape, scale=0.1), s.dtype), shapes)


def random_deltas(backbone, seed, rank=4, members=None):
    random = np.random.RandomState(seed)
    deltas = {}
    for name, (out, inner) in sorted(backbone.modules.items()):
        core_shape = (*(() if members is None else (members,)), backbone.n_layers, rank, rank)
        left, core, right = (
            jnp.asarray(random.normal(size=shape, scale=scale), jnp.float32)
            for shape, scale in (
                ((backbone.n_layers, out, rank), out**-0.5),
                (core_shape, 1.0),
                ((backbone.n_layers, rank, inner), inner**-0.5),
            )
        )
        deltas[name] = LowRank(left, core, right)
    return deltas


def core_axes(deltas):
    return {name: LowRank(None, 0, None) for name in deltas}  # pyright: ignore[reportArgumentType]


def test_a_population_shares_the_base_weights():
    backbone = models.build(VIT)
    params = random_params(backbone)
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    image = {"image": jnp.zeros((2, 8, 8, 3), jnp.uint8)}

    def population(members):
        deltas = random_deltas(backbone, 1, members=members)
        run = jax.vmap(lambda d: backbone.features(params, image, d), in_axes=(core_axes(deltas),))
        return jax.jit(run).lower(deltas).compile(), deltas

    compiled, deltas = population(32)
    analysis = compiled.memory_analysis()
    assert analysis is not None
    # activations of 5 tokens, and cores; a copy of the weights each would be 32 x weights
    assert analysis.temp_size_in_bytes < 2 * weights, (analysis.temp_size_in_bytes, weights)
    got, features = compiled(deltas), jax.jit(backbone.features)
    for i in range(2):
        one = {name: d.replace(core=d.core[i]) for name, d in deltas.items()}
        np.testing.assert_allclose(got[i], features(params, image, one), atol=1e-5)


def test_init_gives_hugging_faces_distributions():
    config = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    params = jax.jit(models.build(config | {"num_attention_heads": 2}).init)(jax.random.key(0))
    assert (params["layers"]["norm1"]["weight"] == 1).all() and (params["layers"]["up"]["bias"] == 0).all()
    weight = params["layers"]["up"]["weight"]
    assert weight.shape == (2, 64, 32) and not (weight[0] == weight[1]).any()
    for values in (weight, params["embeddings"]["tokens"]):
        assert 0.015 < values.std() < 0.021 and abs(values.mean()) < 0.002


def test_gradients_reach_deltas_and_weights():
    backbone = models.build(VIT)
    params, image = (
        random_params(backbone),
        {"image": jnp.full((2, 8, 8, 3), 99, jnp.uint8)},
    )
    deltas = random_deltas(backbone, 1)

    @jax.jit
    def loss(p, d):
        return jnp.sum(jnp.sin(backbone.features(p, image, d)))

    for_params, for_deltas = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, deltas)
    # the last layer runs apart from the others: its weights need their gradient too
    for name in ("q", "k", "v", "o", "up", "down"):
        assert (jnp.abs(for_params["layers"][name]["weight"]).max(axis=(1, 2)) > 0).all()
    for delta in for_deltas.values():
        assert (jnp.abs(delta.core).max(axis=(1, 2)) > 0).all()
    step = 1e-3
    direction = jax.tree.map(lambda g: g / jnp.linalg.norm(g), for_deltas)
    moved = [jax.tree.map(lambda a, b, s=s: a + s * b, deltas, direction) for s in (step, -step)]
    slope = (loss(params, moved[0]) - loss(params, moved[1])) / (2 * step)
    expected = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(for_deltas), jax.tree.leaves(direction)))
    np.testing.assert_allclose(slope, expected, rtol=2e-2)


def test_unknown_deltas_are_refused():
    backbone = models.build(VIT)
    params = random_params(backbone)
    deltas = {"nowhere": LowRank(*[jnp.ones((3, 1, 1))] * 3)}
    with pytest.raises(UserError, match="nowhere"):
        backbone.features(params, {"image": jnp.zeros((1, 8, 8, 3), jnp.uint8)}, deltas)


class Words:
    """A tokenizer of one id per word: pads with the end of text, as CLIP's."""

    def __call__(self, prompts, padding, return_tensors):
        ids = [[38, *(5 + sum(map(ord, word)) % 30 for word in prompt.split()), 39] for prompt in prompts]
        width = max(map(len, ids))
        return {"input_ids": np.asarray([row + [39] * (width - len(row)) for row in ids])}


def test_zero_shot_head_is_the_unit_mean_of_unit_embeddings():
    text, params = models.load(GOLDEN / "clip", family="clip_text_model")
    names, templates = ["cat", "dog", "plane"], ["a photo of {}", "see the {} there", "my {} is here"]
    head = zero_shot_head(text, params, names, templates, Words(), batch_size=4)
    scale = float(jnp.exp(params["logit_scale"]))
    np.testing.assert_allclose(np.linalg.norm(head, axis=1), scale, rtol=1e-5)
    embed = jax.jit(text.features)
    for row, name in zip(head, names):
        units = []
        for template in templates:
            ids = Words()([template.format(name)], True, "np")["input_ids"]
            units.append(embed(params, {"input_ids": jnp.asarray(ids)})[0])
        mean = np.mean(units, axis=0)
        np.testing.assert_allclose(row, scale * mean / np.linalg.norm(mean), atol=1e-4)
    vision, weights = models.load(GOLDEN / "clip")
    assert head.shape == (3, vision.width)
    features = jax.jit(vision.features)(weights, {"image": jnp.ones((1, 12, 12, 3), jnp.uint8)})
    assert (np.abs(features @ head.T) <= scale * 1.0001).all()


@pytest.mark.parametrize(
    ("names", "templates", "part"),
    [([], ["{}"], "class names"), (["a"], ["photo"], "photo"), (["a " * 20], ["{}"], "takes 11")],
)
def test_bad_prompts(names, templates, part):
    text, params = models.load(GOLDEN / "clip", family="clip_text_model")
    with pytest.raises(UserError, match=part):
        zero_shot_head(text, params, names, templates, Words())


def test_a_classifier_checkpoint_has_no_language_model():
    backbone, params = models.load(GOLDEN / "llama")
    assert "lm_head" not in params and backbone.log_likelihood is not None
    ids = jnp.ones((1, 3), jnp.int32)
    with pytest.raises(UserError, match="no language-model head"):
        backbone.log_likelihood(params, {"input_ids": ids, "attention_mask": ids})


def test_both_generations_of_rope_settings_are_read():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    old = rope({"rope_theta": 5e5, "rope_scaling": scaling}, 128).frequencies
    new = rope({"rope_parameters": scaling | {"rope_theta": 5e5}}, 128).frequencies
    plain = rope({"rope_theta": 5e5}, 128).frequencies
    assert old == new and old[0] == plain[0] == 1.0
    np.testing.assert_allclose(old[-1], plain[-1] / 8, rtol=1e-6)

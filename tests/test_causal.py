"""Causal models: logits where answers are, continuations that share a prompt, decoding with a cache."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_backbones import core_axes, random_deltas, random_params

from enmp_jax import models
from enmp_jax.data.packing import pack, stack
from enmp_jax.errors import UserError
from enmp_jax.evaluation import decoding
from enmp_jax.models import causal

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 40}
FAMILIES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 3, "sliding_window_pattern": 2},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24, "n_positions": 32},
}
PROMPTS = [[3, 9, 4, 11, 30, 2, 7], [5, 8], [1, 2, 3, 4]]
CHOICES = [[[6, 7, 8], [9], [10, 11]], [[12], [13, 14, 15, 16]], [[2, 2], [2]]]


def build(family):
    backbone = models.build(SIZES | FAMILIES[family])
    params = jax.tree.map(lambda x: 4 * x, random_params(backbone))
    return backbone, params, random_deltas(backbone, 1)


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(request.param)


@pytest.fixture
def llama():
    return build("llama")


def full_logits(backbone, params, deltas):
    """``text -> logits`` of a whole sequence by itself, every position."""

    @jax.jit
    def run(inputs):
        stream = backbone.embed(params, inputs)._replace(token=None)
        return backbone.logits(params, backbone.run(params, stream, deltas))[0]

    def of_text(text):
        ids = np.zeros((1, 16), np.int32)
        ids[0, : len(text)] = text
        real = (np.arange(16) < len(text))[None].astype(np.int32)
        return np.asarray(run({"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(real)}))

    return of_text


def brute(logits, prompt, answer):
    """Log probability of each token of an answer, from the logits of the whole sequence."""
    logs = logits([*prompt, *answer])[len(prompt) - 1 :].astype(np.float64)
    return [logs[i, token] - np.logaddexp.reduce(logs[i]) for i, token in enumerate(answer)]


def packed(answers=CHOICES):
    return jax.tree.map(jnp.asarray, stack([pack(p, c) for p, c in zip(PROMPTS, answers, strict=True)]))


def test_the_layout_of_a_packed_row():
    assert pack([50, 51, 52], [[60, 61, 62], [70, 71]]) == {
        "input_ids": [50, 51, 52, 60, 61, 70],
        "attention_mask": [1] * 6,
        "position": [0, 1, 2, 3, 4, 3],
        "branch": [0, 0, 0, 1, 1, 2],
        "target_ids": [60, 61, 62, 70, 71],
        "target_from": [2, 3, 4, 2, 5],
        "target_branch": [1, 1, 1, 2, 2],
    }


def test_choices_that_share_their_prompt_score_as_each_by_itself(model):
    backbone, params, deltas = model
    inputs = packed()
    got = jax.jit(partial(causal.answer_log_probabilities, backbone))(params, inputs, deltas)
    logits = full_logits(backbone, params, deltas)
    for row, (prompt, choices) in enumerate(zip(PROMPTS, CHOICES, strict=True)):
        expected = np.concatenate([brute(logits, prompt, choice) for choice in choices])
        np.testing.assert_allclose(got[row, : len(expected)], expected, atol=1e-5)


def test_scores_of_choices():
    logs = jnp.asarray([[-1.0, -2.0, -4.0, -9.0], [-1.0, -8.0, -9.0, -9.0]])
    branch, lengths = jnp.asarray([[1, 2, 2, 0], [2, 1, 0, 0]]), jnp.asarray([[1.0, 1, 0], [1, 2, 0]])
    np.testing.assert_allclose(
        causal.choice_scores(logs, branch, lengths), [[-1, -6, -np.inf], [-8, -0.5, -np.inf]]
    )


@pytest.mark.parametrize("limit", [1, 40 * 4 * 5, 10**9])  # one position, five, all at a time
def test_blocks_of_positions_change_no_value_and_no_gradient(llama, limit, monkeypatch):
    backbone, params, _ = llama
    monkeypatch.setattr(causal, "LOGITS_BYTES", limit)
    hidden = jnp.asarray(np.random.RandomState(0).normal(size=(3, 4, 16)), jnp.float32)
    target = jnp.arange(12).reshape(3, 4)

    def ours(hidden):
        return causal.in_blocks(lambda x: backbone.logits(params, x), causal.log_probability, hidden, target)

    def plain(hidden):
        logs = jax.nn.log_softmax(backbone.logits(params, hidden))
        return jnp.take_along_axis(logs, target[..., None], -1)[..., 0]

    np.testing.assert_allclose(jax.jit(ours)(hidden), plain(hidden), atol=1e-5)
    slopes = [jax.jit(jax.grad(lambda x, f=f: jnp.sin(f(x)).sum()))(hidden) for f in (ours, plain)]
    np.testing.assert_allclose(*slopes, atol=1e-5)


def test_only_answer_positions_meet_the_vocabulary(llama, monkeypatch):
    """And only in blocks: no array of the compiled program has more rows of the vocabulary's size."""
    backbone, params, deltas = llama
    monkeypatch.setattr(causal, "LOGITS_BYTES", 40 * 4 * 6)
    score = jax.jit(lambda inputs: causal.answer_log_probabilities(backbone, params, inputs, deltas))
    text = score.lower(packed()).as_text()
    assert "tensor<6x40xf32>" in text
    assert not any(f"tensor<{n}x40xf32>" in text for n in (3, 18, 24)) and "x40xf32>" in text


def test_scores_from_hidden_states_and_of_a_population(llama):
    backbone, params, _ = llama
    deltas, inputs = random_deltas(backbone, 2, members=2), packed()

    def score(own, **start):
        return causal.at_answers(
            backbone, params, inputs, causal.log_probability, inputs["target_ids"], deltas=own, **start
        )

    together = jax.jit(jax.vmap(score, in_axes=(core_axes(deltas),)))(deltas)
    plainly, states = jax.jit(score), jax.jit(backbone.hidden_states)
    resume = jax.jit(lambda own, hidden: score(own, hidden=hidden, first=1))
    for i in range(2):
        one = {name: d.replace(core=d.core[i]) for name, d in deltas.items()}
        np.testing.assert_allclose(together[i], plainly(one), atol=1e-5)
        entering = states(params, inputs, one)[1]
        np.testing.assert_allclose(resume(one, entering), plainly(one), atol=1e-5)


def test_an_encoder_has_no_logits():
    backbone = models.build({"model_type": "bert", "num_hidden_layers": 1} | SIZES)
    inputs = packed()
    with pytest.raises(UserError, match="bert encoder: it has no next-token logits"):
        causal.answer_log_probabilities(backbone, {}, inputs)
    with pytest.raises(UserError, match="bert encoder: it generates no text"):
        decoding.generate(backbone, {}, None, jnp.ones((1, 2), jnp.int32), jnp.ones(1, jnp.int32), 3, (0,))


def greedy(logits, prompt, n, eos):
    """Full forward passes of ever longer sequences."""
    made = []
    while len(made) < n and not (made and made[-1] in eos):
        made.append(int(logits([*prompt, *made])[len(prompt) + len(made) - 1].argmax()))
    return made + [eos[0]] * (n - len(made))


def prompts():
    width = max(map(len, PROMPTS))
    padded = [[*p, *[39] * (width - len(p))] for p in PROMPTS]  # whatever stands in the padding
    return jnp.asarray(padded), jnp.asarray([len(p) for p in PROMPTS])


def decoder(backbone, n, eos):
    return jax.jit(partial(decoding.generate, backbone, max_new_tokens=n, eos=eos))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_decoding_a_population_is_argmax_of_full_passes(family, compilations):
    backbone, params, _ = build(family)
    deltas = random_deltas(backbone, 2, members=2)
    run = decoder(backbone, 8, (39,))
    full = partial(full_logits, backbone, params)
    ones = [{name: d.replace(core=d.core[i]) for name, d in deltas.items()} for i in range(2)]
    free = run(params, deltas, *prompts())
    expected = [[greedy(logits, p, 8, (39,)) for p in PROMPTS] for logits in map(full, ones)]
    np.testing.assert_array_equal(free, expected)
    assert len({tuple(row) for rows in expected for row in rows}) > 2  # members and prompts differ
    run(params, jax.tree.map(lambda x: 0.9 * x, deltas), *prompts())
    assert compilations("generate") == 1


def test_decoding_ends_at_any_end_token(llama):
    backbone, params, deltas = llama
    logits = full_logits(backbone, params, deltas)
    free = greedy(logits, PROMPTS[0], 8, (41,))
    eos = (free[5], free[2])
    run = decoder(backbone, 8, eos)
    got = run(params, decoding.one_member(deltas), *prompts())[0]
    expected = [greedy(logits, p, 8, eos) for p in PROMPTS]
    np.testing.assert_array_equal(got, expected)
    assert expected[0][-1] == eos[0] and len(set(expected[0])) < 8


def test_decoding_in_parts_and_of_the_base(llama):
    backbone, params, _ = llama
    tokens, lengths = prompts()
    begin = jax.jit(lambda: decoding.start(backbone, params, None, tokens, lengths, 6, (41,)))
    step = jax.jit(lambda state, stop: decoding.advance(backbone, params, None, state, stop, (41,)))
    halfway = step(begin(), 3)
    assert int(halfway.made) == 3 and (halfway.tokens[..., 3:] == 41).all()
    logits = full_logits(backbone, params, None)
    expected = [[greedy(logits, p, 6, (41,)) for p in PROMPTS]]
    np.testing.assert_array_equal(step(halfway, 6).tokens, expected)

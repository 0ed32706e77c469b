"""Losses of answers against transformers': 100 prompts for every architecture, and greedy decoding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers as hf  # noqa: E402

from enmp_jax import models  # noqa: E402
from enmp_jax.data.packing import pack, stack  # noqa: E402
from enmp_jax.evaluation import decoding  # noqa: E402
from enmp_jax.models import causal  # noqa: E402

pytestmark = pytest.mark.reference

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 90, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
ARCHITECTURES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {"sliding_window": 12}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {"head_dim": 16}),
}
PROMPTS, CHOICES = 100, 3


@pytest.fixture(params=ARCHITECTURES)
def pair(request, tmp_path):
    """transformers' model and ours, the same random weights."""
    torch.set_num_threads(1)
    model, config, options = ARCHITECTURES[request.param]
    torch.manual_seed(0)
    theirs = model(config(**SIZES, **options)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    theirs.save_pretrained(tmp_path)
    return theirs, *models.load(tmp_path)


def drawn():
    """100 prompts of 1 to 40 tokens, and three answers of 1 to 6 to each."""
    random = np.random.default_rng(0)
    texts = [[random.integers(2, 90, n).tolist() for n in random.integers(1, 41, 1)] for _ in range(PROMPTS)]
    answers = [[random.integers(2, 90, n).tolist() for n in random.integers(1, 7, CHOICES)] for _ in texts]
    return [prompt for (prompt,) in texts], answers


@torch.inference_mode()
def losses_of(theirs, pairs):
    """transformers' loss of every answer alone, nats per token; one batch, padded on the right."""
    longest = max(len(prompt + answer) for prompt, answer in pairs)
    ids, labels = torch.zeros(len(pairs), longest, dtype=torch.long), torch.full((len(pairs), longest), -100)
    for row, (prompt, answer) in enumerate(pairs):
        whole = torch.tensor(prompt + answer)
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    real = (torch.arange(longest) < (labels != -100).cumsum(1).argmax(1, keepdim=True) + 1).long()
    logits = theirs(ids, attention_mask=real).logits
    return [float(theirs.loss_function(x[None], y[None], logits.shape[-1])) for x, y in zip(logits, labels)]


def test_losses_of_answers_that_share_a_prompt(pair):
    theirs, backbone, params = pair
    prompts, answers = drawn()
    inputs = jax.tree.map(jnp.asarray, stack([pack(p, a) for p, a in zip(prompts, answers)]))
    lengths = jnp.asarray([[len(a) for a in own] for own in answers], jnp.float32)

    @jax.jit
    def losses(inputs):
        logs = causal.answer_log_probabilities(backbone, params, inputs)
        return -causal.choice_scores(logs, inputs["target_branch"], lengths)

    pairs = [(p, a) for p, own in zip(prompts, answers) for a in own]
    expected = np.reshape(losses_of(theirs, pairs), (PROMPTS, CHOICES))
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(losses(inputs), expected, atol=1e-4, rtol=0)


def test_greedy_decoding(pair):
    theirs, backbone, params = pair
    prompts, _ = drawn()
    prompts = prompts[:4]
    padded = stack([{"tokens": prompt} for prompt in prompts])["tokens"]
    run = jax.jit(partial(decoding.generate, backbone, max_new_tokens=8, eos=(1,)))
    got = run(params, None, jnp.asarray(padded), jnp.asarray([len(p) for p in prompts], jnp.int32))[0]
    for prompt, ours in zip(prompts, got):
        tokens = torch.tensor([prompt])
        with torch.inference_mode():
            made = theirs.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False
            )
        made = made[0, len(prompt) :].tolist()
        assert ours.tolist() == made + [1] * (8 - len(made))

"""``enmp evaluate --generate``: what merges write, against one prompt and one model at a time."""

from __future__ import annotations

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from generative_files import loaded_run, save_all

from enmp_jax.cli.main import main
from enmp_jax.evaluation.decoding import generate
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.generated import generated_scores, generated_texts
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.merges.base import merge_population


def test_merges_answer_the_prompts_of_completion_tasks(tmp_path, capsys):
    from transformers import AutoTokenizer

    loaded = load(loaded_run(save_all(tmp_path)), ["test"])
    evaluator, tokenizer = Evaluator(loaded), AutoTokenizer.from_pretrained(tmp_path / "base")
    plain = loaded.mask_spec.all_kept()
    keep, scale = jnp.asarray(np.stack([plain, ~plain])), jnp.asarray([0.5, 0.5])
    deltas = jax.jit(partial(merge_population, evaluator.merge))(evaluator.ingredients, keep, scale)
    examples = loaded.examples["test"][0]
    model = (loaded.backbone, loaded.params)
    texts, wanted = generated_texts(*model, deltas, tokenizer, examples, 4)
    answers = [json.loads(line)["answer"] for line in (tmp_path / "say/test.jsonl").read_text().splitlines()]
    assert [text.strip() for text in wanted] == answers
    # the base writes what it writes to each prompt alone
    inputs = examples.inputs
    longest = max((row > 0).sum() for row in inputs["target_branch"])
    width = int(inputs["target_from"][:, 0].max()) + 1
    end = tokenizer.eos_token_id
    alone = jax.jit(partial(generate, *model, None, max_new_tokens=2 * int(longest), eos=(end,)))
    for i, text in enumerate(texts[1]):
        length = inputs["target_from"][i : i + 1, 0] + 1
        row = alone(jnp.asarray(inputs["input_ids"][i : i + 1, :width]), jnp.asarray(length, jnp.int32))
        assert text == tokenizer.decode(np.asarray(row)[0, 0], skip_special_tokens=True)
    assert texts[0] != texts[1] and len(set(texts[1])) > 1

    main(["evaluate", str(tmp_path / "run.yaml"), "--generate", "--json"])
    found = json.loads(capsys.readouterr().out)["generated"]
    scores = generated_scores(*model, deltas, tokenizer, examples, 4)
    assert found == {"merged": {"say": scores[0]}, "base": {"say": scores[1]}}
    assert set(scores[0]) == {"exact_match", "contains", "chrf"} and scores[0]["chrf"] > 0

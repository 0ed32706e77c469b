"""The lm-eval model against lm-eval's own ``hf`` model, item by item, on a local task file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

# ruff: noqa: E402 (skipped first)
import lm_eval
import transformers
from generative_files import loaded_run, save_all
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

simple_evaluate: Any = lm_eval.simple_evaluate  # made on demand: type checkers see a module

from enmp_jax import models
from enmp_jax.cli.main import main
from enmp_jax.errors import UserError
from enmp_jax.integrations.lm_eval import EnmpLM, evaluate_tasks

pytestmark = pytest.mark.reference

SENTENCE = "a the cat dog sat on mat ran to house red blue big small yes no maybe is was it ."
WORDS = SENTENCE.split()
TASKS = {
    "local_choices": {
        "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_answers": {
        "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["red", "mat mat"], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random Llama with a byte-level tokenizer that begins texts with <s>."""
    torch.set_num_threads(1)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    path = tmp_path_factory.mktemp("base")
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    plain.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    plain.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2,
            max_position_embeddings=96,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(base):
    backbone, params = models.load(base)
    return EnmpLM(backbone, params, transformers.AutoTokenizer.from_pretrained(base), batch_size=4)


@pytest.fixture(scope="module")
def theirs(base):
    return HFLM(pretrained=str(base), device="cpu", dtype="float32", batch_size=4)


def text(random, low, high):
    return " ".join(random.choice(WORDS, random.integers(low, high)))


def test_scores_equal_the_hf_backends_to_the_last_item(ours, theirs, tmp_path):
    random = np.random.default_rng(0)
    with open(tmp_path / "test.jsonl", "w", encoding="utf-8") as file:
        for i in range(30):
            # some prompts end in a space, and some are longer than the window of 96 tokens
            prompt = text(random, 40, 120) if i % 7 == 0 else text(random, 2, 12) + " " * (i % 3 == 0)
            choices = [" " * (i % 3 > 0) + text(random, 1, 4) for _ in range(4)]
            item = {"prompt": prompt, "choices": choices, "answer": int(random.integers(4))}
            file.write(json.dumps(item | {"text": text(random, 3, 200)}) + "\n")
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}}}
    tasks = [{"task": name, "test_split": "test", **files, **task} for name, task in TASKS.items()]
    # generate_until goes on from the first end token in neither: both strip what follows
    both = [
        simple_evaluate(
            model=lm, tasks=tasks, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False)
        )
        for lm in (ours, theirs)
    ]
    for name in TASKS:
        samples = [sorted(side["samples"][name], key=lambda s: s["doc_id"]) for side in both]
        assert len(samples[0]) == 30
        for mine, other in zip(*samples, strict=True):
            if name == "local_answers":
                assert mine["filtered_resps"] == other["filtered_resps"]
                continue
            for a, b in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                np.testing.assert_allclose(np.ravel(a).astype(float), np.ravel(b).astype(float), rtol=1e-5)
            for metric in ("acc", "acc_norm"):
                assert mine.get(metric) == other.get(metric)
        for metric, value in both[1]["results"][name].items():
            if isinstance(value, float):
                assert both[0]["results"][name][metric] == pytest.approx(value, rel=1e-5), metric
    answers = {s["filtered_resps"][0] for s in both[0]["samples"]["local_answers"]}
    assert len(answers) > 20 and {len(a) > 30 for a in answers} == {True, False}  # some stopped, some not
    assert 0 < both[0]["results"]["local_choices"]["acc,none"] < 1


def requests(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_greedy_continuations_are_known_as_such(ours, theirs):
    prompt = ours.tok_encode("the cat sat on")
    made = []
    for _ in range(4):
        logits = theirs._model_call(torch.tensor([prompt + made]))
        made.append(int(logits[0, -1].argmax()))
    asked = [(None, prompt, made), (None, prompt, made[:2]), (None, prompt, [*made[:3], 7])]
    found, expected = (lm._loglikelihood_tokens(asked) for lm in (ours, theirs))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] == [True, True, False]
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], rtol=1e-5)


def test_what_is_refused(ours):
    sampled = requests("generate_until", ("a", {"do_sample": True, "temperature": 0.7, "until": ["x"]}))
    with pytest.raises(UserError, match="only greedy"):
        ours.generate_until(sampled)
    with pytest.raises(UserError, match="the window is 96: lower max_gen_toks"):
        ours.generate_until(requests("generate_until", ("a", {"until": ["x"], "max_gen_toks": 96})))
    with pytest.raises(UserError, match="longer than the window of 96"):
        ours.loglikelihood(requests("loglikelihood", ("a", "z" * 200)))
    with pytest.raises(UserError, match="has no tokens"):
        ours.loglikelihood(requests("loglikelihood", ("a", "")))
    backbone = models.build({"model_type": "bert", "num_hidden_layers": 1})
    with pytest.raises(UserError, match="needs a causal language model"):
        EnmpLM(backbone, {}, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two random adapters, and a task file."""
    root = save_all(tmp_path_factory.mktemp("run"))
    loaded_run(root)
    files = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(root / "pick/test.jsonl")}},
    }
    task = {"task": "pick", "test_split": "test", **files, **TASKS["local_choices"]}
    (root / "pick.yaml").write_text(json.dumps(task))
    return root


def test_enmp_evaluate_scores_the_merge_on_a_task_file(run, capsys):
    def command(*more):
        main(["evaluate", str(run / "run.yaml"), "--lm-eval", str(run / "pick.yaml"), *more])
        return json.loads(capsys.readouterr().out)["lm_eval"]["pick"]

    found = command()
    model = EnmpLM.from_run(run / "run.yaml")
    assert model._deltas and found == evaluate_tasks(model, [str(run / "pick.yaml")])["pick"]
    assert set(found) == {"acc", "acc_norm"} and 0 <= found["acc"] <= 1
    prompt = requests("loglikelihood", ("what colour is the sky?", " blue"))
    merged = model.loglikelihood(prompt)[0][0]
    base = EnmpLM.from_run(run / "run.yaml", scale=0.0).loglikelihood(prompt)[0][0]
    alone = EnmpLM(*models.load(run / "base"), model.tokenizer).loglikelihood(prompt)[0][0]
    assert base == pytest.approx(alone, abs=1e-5) and abs(merged - base) > 1e-3


def test_tasks_that_cannot_be_read(run):
    model = EnmpLM.from_run(run / "run.yaml")
    (run / "other.yaml").write_text("a: 1")
    (run / "broken.yaml").write_text("a: [1")
    for name, message in (
        (run / "other.yaml", "it has no key task"),
        (run / "broken.yaml", "not a task file of plain YAML"),
        (run / "nothing.yaml", "cannot read task file"),
        ("no_such_task", "lm-eval has no task 'no_such_task'"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_tasks(model, [str(name)])

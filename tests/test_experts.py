"""Expert accuracies: measured once, remembered for exactly the same thing; dry runs; progress of reading."""

import dataclasses

import numpy as np
import pytest

from enmp_jax.cli import main as cli
from enmp_jax.errors import UserError
from enmp_jax.evaluation import experts
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.io import progress
from enmp_jax.io.progress import SILENT, Reporter
from enmp_jax.models import checkpoint
from enmp_jax.runs.dry_run import dry_run


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "experts"


@pytest.fixture
def computed(monkeypatch):
    """How often the experts were really asked; answers that tell examples apart."""
    calls = []

    def compute(loaded, split):
        calls.append(split)
        answers = [np.log(np.full((len(e.labels), 10), 0.1, np.float32)) for e in loaded.examples[split]]
        answers[0][:, -1] = -np.inf
        return answers

    monkeypatch.setattr(experts, "_compute", compute)
    return calls


def test_computed_once_and_the_same_when_read(cache, demo_loaded, computed):
    first = experts.answers(demo_loaded, "search")
    again = experts.answers(demo_loaded, "search")
    assert computed == ["search"] and len(list(cache.iterdir())) == 1
    for a, b, e in zip(first, again, demo_loaded.examples["search"], strict=True):
        np.testing.assert_array_equal(a, b)
        assert len(a) == len(e.labels)
    assert np.isneginf(again[0][:, -1]).all() and np.isfinite(again[1]).all()
    experts.answers(demo_loaded, "test")
    assert computed == ["search", "test"]


def test_answers_of_all_splits_are_one_program(cache, demo_loaded, compilations):
    """Splits of the same size, of copies of a run."""
    few = [e._replace(labels=e.labels[:8], inputs={k: x[:8] for k, x in e.inputs.items()})
           for e in demo_loaded.examples["test"]]  # fmt: skip
    turned = [e._replace(inputs={"image": 255 - e.inputs["image"]}) for e in few]
    loaded = dataclasses.replace(demo_loaded, examples={"search": few, "test": turned}, programs={})
    experts.answers(loaded, "search")
    experts.answers(dataclasses.replace(loaded), "test")
    assert len(list(cache.iterdir())) == 2
    assert compilations("of_one") == 1


def test_the_key_follows_every_ingredient(demo_loaded, monkeypatch):
    """Adapters, heads, examples, compute type and code each make another key; labels and merge do not."""
    key = experts.key(demo_loaded, "search")
    assert experts.key(dataclasses.replace(demo_loaded), "search") == key
    heads = demo_loaded.heads
    pairs = dict(demo_loaded.stack.pairs)
    name = next(iter(pairs))
    pairs[name] = dataclasses.replace(pairs[name], b=pairs[name].b * 1.0001)
    turned = [e._replace(inputs={"image": 255 - e.inputs["image"]}) for e in demo_loaded.examples["search"]]
    stack = dataclasses.replace(demo_loaded.stack, pairs=pairs)
    base = dataclasses.replace(demo_loaded.run.base, dtype="bfloat16")
    changed = [
        {"adapters": dataclasses.replace(demo_loaded.adapters, stack=stack)},
        {"heads": dataclasses.replace(heads, bias=heads.bias + 1)},
        {"heads": dataclasses.replace(heads, normalise=True)},
        {"examples": {**demo_loaded.examples, "search": turned}},
        {"run": dataclasses.replace(demo_loaded.run, base=base)},
    ]
    keys = [experts.key(dataclasses.replace(demo_loaded, **change), "search") for change in changed]
    assert len({key, *keys}) == len(changed) + 1
    # other code may score differently
    monkeypatch.setattr(experts, "code_digest", lambda: "other")
    assert experts.key(demo_loaded, "search") != key
    monkeypatch.undo()
    # what the adapters alone do not depend on
    other = [e._replace(labels=e.labels[::-1]) for e in demo_loaded.examples["search"]]
    relabelled = dataclasses.replace(demo_loaded, examples={**demo_loaded.examples, "search": other})
    assert experts.key(relabelled, "search") == key
    merge = dataclasses.replace(demo_loaded.run.merge, method="sum", hyperparameters={})
    other = dataclasses.replace(demo_loaded.run, merge=merge)
    assert experts.key(dataclasses.replace(demo_loaded, run=other), "search") == key


def test_the_base_counts_by_its_files(tmp_path, demo_loaded):
    import shutil

    path = tmp_path / "base"
    shutil.copytree(demo_loaded.base, path)
    before = checkpoint.base_identity(str(path))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert checkpoint.base_identity(str(path)) != before


@pytest.mark.parametrize("content", [b"", b"{}", b"damaged"])
def test_damaged_files_are_computed_again(cache, demo_loaded, computed, content):
    experts.answers(demo_loaded, "search")
    (path,) = cache.iterdir()
    path.write_bytes(content)
    experts.answers(demo_loaded, "search")
    assert computed == ["search", "search"] and len(path.read_bytes()) > 1000


def test_dry_run_says_what_would_run_and_writes_nothing(demo_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "\n".join(dry_run(demo_run, SILENT))
    assert "digit: demo/adapters/digit, 10 classes, 10 search, 8 selection, 9 test" in text
    assert "36 modules, at most 20% pruned" in text
    assert "one batch of 30 examples under one mask" in text
    assert "4 x 3 masks, 1 seed: 12 masks x 2 batches of 30" in text
    evaluation = dataclasses.replace(demo_run.evaluation, batch_size=250)
    text = "\n".join(dry_run(dataclasses.replace(demo_run, evaluation=evaluation), SILENT))
    assert "12 masks x 1 batch of 64" in text  # 60 examples
    assert not list(tmp_path.iterdir())


def test_dry_run_refuses_what_a_search_refuses(demo_run, tmp_path):
    search = dataclasses.replace(demo_run.search, strategy="cma")
    with pytest.raises(UserError, match="cma"):
        dry_run(dataclasses.replace(demo_run, search=search), SILENT)
    merge = dataclasses.replace(demo_run.merge, scale=1e30)
    with pytest.raises(UserError, match="not finite"):
        dry_run(dataclasses.replace(demo_run, merge=merge), SILENT)


def test_a_search_needs_out_or_dry_run(capsys):
    assert cli.main(["search", "demo"]) == 2
    assert "--out DIR" in capsys.readouterr().err


def test_only_slow_loads_say_something(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    reporter = Reporter(said.append, SILENT.advance, progress.read_lines(said.append))
    read = reporter.reading("mnist, test")
    for done in range(0, 60, 10):
        read(done, 60)
        now[0] += 2.0
    assert said == ["reading mnist, test: 30 of 60"]
    reporter.reading("quick, test")(5, 5)
    assert len(said) == 1


def test_texts_of_different_lengths_train_together():
    """Tasks differ in examples and tokens; what is added is masked."""
    from enmp_jax.data import Examples
    from enmp_jax.training.experts import stack_examples

    def made(n, length):
        ids = np.arange(1, n * length + 1, dtype=np.int32).reshape(n, length)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        return Examples(inputs, np.ones(n, np.int32), (), np.zeros(n, "S32"))

    inputs, labels, sizes = stack_examples([made(3, 4), made(2, 6)])
    assert inputs["input_ids"].shape == (2, 3, 6) and sizes.tolist() == [3, 2]
    np.testing.assert_array_equal(inputs["input_ids"][0, :, :4], np.arange(1, 13).reshape(3, 4))
    np.testing.assert_array_equal(inputs["attention_mask"].sum(2), [[4, 4, 4], [6, 6, 0]])
    np.testing.assert_array_equal(labels, [[1, 1, 1], [1, 1, 0]])


def test_an_expert_that_gets_nothing_right_is_refused_where_scores_are_divided_by_it(
    demo_run, demo_evaluator, monkeypatch
):
    """Few examples of a hard task may be all wrong; a smooth fitness does not ask for their accuracy."""
    monkeypatch.setattr(Evaluator, "expert_scores", lambda self, split: np.float32([1, 0, 1, 1, 1, 1]))
    margin = dataclasses.replace(demo_run, search=dataclasses.replace(demo_run.search, fitness="margin"))
    smooth = demo_evaluator.under(margin)
    scoring = smooth.scoring("search")
    assert np.isfinite(scoring.expert).all() and scoring.reference[1] == 0
    nothing = "adapter of 'mirrored' alone gets nothing right on"
    with pytest.raises(UserError, match=f"{nothing} test"):
        smooth.scoring("test")
    with pytest.raises(UserError, match=f"{nothing} search"):
        smooth.scoring("search", normalises=True)
    accuracy = dataclasses.replace(demo_run, search=dataclasses.replace(demo_run.search, fitness="accuracy"))
    with pytest.raises(UserError, match=f"{nothing} search"):
        demo_evaluator.under(accuracy).scoring("search")

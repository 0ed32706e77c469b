"""Runs on data without labels: the search asks the experts, and scores are agreement with them."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import yaml

from enmp_jax.cli import main as cli
from enmp_jax.config import run_file, sections
from enmp_jax.errors import UserError
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.evaluation.fitness import FITNESS
from enmp_jax.evaluation.loaded_run import load
from enmp_jax.runs.search import check_search

ASK_FOR_LABELS = [name for name, kind in FITNESS.items() if kind.needs_labels]


def with_search(loaded, **settings: Any):
    run = dataclasses.replace(loaded.run, search=dataclasses.replace(loaded.run.search, **settings))
    return dataclasses.replace(loaded, run=run)


def without_labels(loaded, *splits):
    examples = dict(loaded.examples)
    for split in splits or examples:
        examples[split] = [e._replace(labels=np.full_like(e.labels, -1)) for e in examples[split]]
    return dataclasses.replace(loaded, examples=examples)


def suite(directory, name, label: str | None = "label", **search):
    """A run file of two tasks of the demo."""
    tasks = yaml.safe_load((run_file.SUITES / "demo.yaml").read_text())["tasks"][:2]
    for task in tasks:
        task["adapter"] = f"package:{task['adapter']}"
        task["data"] |= {"source": "npz:package:demo/digits.npz", "label": label}
    made = {
        "base": {"model": "package:demo/base", "allow_mismatch": True},
        "tasks": tasks,
        "merge": {"method": "sum", "scale_grid": [0.4, 0.8]},
        "search": {"population": 4, "generations": 2, "sigma0": 1.0, "fitness": "expert_margin"} | search,
        "evaluation": {"batch_size": 20, "search_examples": 10, "selection_examples": 8, "test_examples": 9},
        "train": {"steps": 1},
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(made))
    return str(path)


def test_the_same_mask_without_labels_and_scores_that_say_agreement(tmp_path, capsys):
    printed, scores = {}, {}
    for name, label in {"with": "label", "without": None}.items():
        run, out = suite(tmp_path, name, label), tmp_path / f"out-{name}"
        assert cli.main(["search", run, "--out", str(out)]) == 0
        printed[name] = capsys.readouterr().out
        scores[name] = json.loads((out / "scores.json").read_text())
    masks = [json.loads((tmp_path / f"out-{name}" / "mask.json").read_text()) for name in scores]
    assert masks[0] == masks[1] and scores["with"]["scale_grid"] == scores["without"]["scale_grid"]
    assert scores["with"]["seeds"][0]["search"] == scores["without"]["seeds"][0]["search"]

    assert (scores["with"]["agreement"], scores["without"]["agreement"]) == (False, True)
    assert scores["without"]["reference"] == {"digit": 1.0, "mirrored": 1.0}
    mean = np.mean([scores["without"]["merged"][task] for task in ("digit", "mirrored")])
    assert scores["without"]["mean_normalised"]["merged"] == pytest.approx(mean) and mean < 1
    for name, (word, other) in {"with": ("ccuracy", "greement"), "without": ("greement", "ccuracy")}.items():
        page = (tmp_path / f"out-{name}" / "report.html").read_text()
        card = (tmp_path / f"out-{name}" / "merged" / "README.md").read_text()
        for text in (printed[name], page, card):
            assert word in text and other not in text

    out, run = tmp_path / "out-without", str(tmp_path / "without.yaml")
    assert cli.main(["evaluate", run, "--mask", str(out / "mask.json"), "--json"]) == 0
    text = capsys.readouterr().out
    result = json.loads(text[text.index("{") :])
    for key in ("agreement", "reference", "base", "merged", "enmp", "mean_normalised"):
        assert result[key] == scores["without"][key], key


def test_what_needs_labels_is_one_line_and_leaves_nothing_behind(tmp_path, capsys):
    run, out = suite(tmp_path, "run", None, fitness="margin"), tmp_path / "out"
    said = "search.fitness margin needs labels, and the search split has none: take expert_margin"
    for command in (["search", run, "--out", str(out)], ["evaluate", run]):  # evaluate: tunes the scale
        assert cli.main(command) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["evaluate", run, "--scale", "0.5"]) == 0
    assert "agreement with the expert on the test split" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["train", run, "--out", str(out)]) == 2
    assert "train: no example has a label, and training needs them" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("split", ["search", "selection"])
@pytest.mark.parametrize("kind", ASK_FOR_LABELS)
def test_a_fitness_that_needs_labels_is_refused(demo_loaded, split, kind):
    evaluator = Evaluator(without_labels(with_search(demo_loaded, fitness=kind), split))
    with pytest.raises(UserError, match=f"fitness {kind} needs labels, and the {split} split has none"):
        check_search(evaluator)


def test_refining_by_a_fitness_that_needs_labels_is_refused(demo_loaded):
    refine = sections.RefineConfig(fitness="probability")
    with pytest.raises(UserError, match=r"search.refine.fitness probability needs labels, and the search"):
        check_search(Evaluator(without_labels(with_search(demo_loaded, fitness="expert_kl", refine=refine))))


@pytest.mark.parametrize("kind", ["expert_kl", "entropy"])
def test_fitness_of_the_experts_is_the_same_without_labels(demo_loaded, kind):
    loaded, fitness = with_search(demo_loaded, fitness=kind), []
    keep = np.stack([loaded.mask_spec.all_kept(), ~loaded.mask_spec.all_kept()])
    for given in (loaded, without_labels(loaded)):
        evaluator = Evaluator(given)
        check_search(evaluator)
        counts = evaluator.score(evaluator.inputs("search"), keep, np.full(2, 0.5, np.float32))
        fitness.append(np.asarray(evaluator.scoring("search").fitness(counts, evaluator.kind)))
    np.testing.assert_array_equal(*fitness)
    assert np.isfinite(fitness).all() and fitness[0][0] != fitness[0][1]


def test_agreement_is_with_the_tasks_own_expert(demo_loaded):
    run = dataclasses.replace(
        demo_loaded.run,
        merge=dataclasses.replace(demo_loaded.run.merge, method="sum", hyperparameters={}),
        # accuracies on labelled data: they say nothing where there are no labels
        tasks=tuple(dataclasses.replace(task, reference=0.5) for task in demo_loaded.run.tasks),
    )
    loaded = dataclasses.replace(demo_loaded, run=run)
    evaluator = Evaluator(without_labels(loaded, "test"))
    layers, n = loaded.mask_spec.shape
    # the sum of one adapter is that adapter
    alone = np.repeat(np.eye(n, dtype=bool)[:, None], layers, axis=1)
    counts = evaluator.score(evaluator.inputs("test"), alone, np.ones(n, np.float32))
    agreement = np.asarray(evaluator.scoring("test").accuracy(counts))
    np.testing.assert_array_equal(np.diag(agreement), 1.0)
    assert agreement[~np.eye(n, dtype=bool)].mean() < 0.9
    np.testing.assert_array_equal(evaluator.scoring("test").reference, 1.0)
    np.testing.assert_array_equal(evaluator.expert_scores("test"), 1.0)
    # splits with labels keep theirs
    np.testing.assert_array_equal(evaluator.scoring("search").reference, 0.5)
    assert evaluator.examples("search") is loaded.examples["search"]


def test_labels_of_some_tasks_only_are_refused(tmp_path):
    run = run_file.load(suite(tmp_path, "run"))
    first, *others = run.tasks
    first = dataclasses.replace(first, data=dataclasses.replace(first.data, label=None))
    with pytest.raises(
        UserError, match="test split has labels for mirrored but none for digit: set data.label"
    ):
        load(dataclasses.replace(run, tasks=(first, *others)), ["test"])

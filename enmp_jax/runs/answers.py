"""``test-answers.json``: which examples of the test split each model answers rightly, and how sure gains are.

Models are compared on the same examples, so the answers of all are kept, one digit an example: a later
model of the run, or another run on the same data, is compared with them without loading anything again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from enmp_jax.evaluation.correctness import Correctness, PerExample
from enmp_jax.evaluation.evaluator import Evaluator
from enmp_jax.io.files import read_json
from enmp_jax.search.statistics import paired_bootstrap

NAME = "test-answers.json"
Answers = Mapping[str, Mapping[str, str]]
"""Task -> model -> "0" or "1" for each example, in the order of the data."""


def compared(evaluator: Evaluator) -> Correctness | None:
    """The test split, example by example; None with completions, whose answers are not right or wrong."""
    return None if "completion" in evaluator.loaded.kinds else Correctness(evaluator, "test")


def content(
    test: Correctness,
    reference: Mapping[str, float],
    models: Mapping[str, PerExample],
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The file's content: the ``answers`` of all models, and the ``gain`` of each over the plain merge.

    Args:
        test: the examples.
        reference: accuracy of every task's own adapter.
        models: name -> scores of single examples; ``merged`` is the plain merge.
        before: content that these models are added to.
    """
    known: Answers = (before or {}).get("answers", {})
    answers = {
        task: {**known.get(task, {}), **{name: _text(row[test.task == i]) for name, row in models.items()}}
        for i, task in enumerate(reference)
    }
    names = [name for name in next(iter(answers.values())) if name != "merged"]
    return {"answers": answers, "gain": {name: gain(answers, reference, name) for name in names}}


def gain(
    answers: Answers, reference: Mapping[str, float], model: str, over: str = "merged"
) -> dict[str, Any]:
    """The difference of two models with its 95 % interval over examples.

    Args:
        answers: of both.
        reference: accuracy of every task's own adapter.
        model: the better one, it is hoped.
        over: the other.

    Returns:
        That of the mean normalised accuracy and, under ``tasks``, that of every task's accuracy.
    """
    changes = {task: _numbers(own[model]) - _numbers(own[over]) for task, own in answers.items()}
    task = np.repeat(np.arange(len(changes)), [len(change) for change in changes.values()])
    weight = np.asarray([1 / (len(changes) * reference[name]) for name in changes])
    mean = paired_bootstrap(np.concatenate(list(changes.values())), task, weight)
    single = {
        name: paired_bootstrap(change, np.zeros(len(change), int), np.ones(1))._asdict()
        for name, change in changes.items()
    }
    return mean._asdict() | {"tasks": single}


def to_first(run_dirs: Sequence[Path]) -> list[dict[str, Any] | None]:
    """What every run found against what the first found, on the same test examples.

    None for the first, and for runs that kept no answers or answered other examples.
    """
    known = [_kept(path) for path in run_dirs]
    found: list[dict[str, Any] | None] = [None]
    for kept in known[1:]:
        if known[0] is None or kept is None or known[0][:2] != kept[:2]:
            found.append(None)
            continue
        both = {
            task: {"enmp": own["enmp"], "first": known[0][2][task]["enmp"]} for task, own in kept[2].items()
        }
        found.append(gain(both, kept[1], "enmp", "first"))
    return found


def _kept(run_dir: Path) -> tuple[dict[str, str], dict[str, float], Answers] | None:
    """Hashes of a run's test data, its reference scores and its answers."""
    if not all((run_dir / name).exists() for name in (NAME, "fingerprints.json", "scores.json")):
        return None
    made_of, scores, kept = (read_json(run_dir / name) for name in ("fingerprints.json", "scores.json", NAME))
    data = {key: value for key, value in made_of.items() if key.startswith("the test data of ")}
    return data, scores["reference"], kept["answers"]


def intervals(content: Mapping[str, Any]) -> dict[str, Any]:
    """Model -> its gain in the mean, for ``scores.json``."""
    return {
        model: {key: value for key, value in found.items() if key != "tasks"}
        for model, found in content["gain"].items()
    }


def _text(correct: Float[np.ndarray, " example"]) -> str:
    return "".join("01"[int(x)] for x in correct)


def _numbers(text: str) -> Float[np.ndarray, " example"]:
    return np.frombuffer(text.encode(), np.uint8).astype(float) - ord("0")

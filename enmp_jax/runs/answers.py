"""``test-answers.json``: how each model does on every example of the test split, and how sure gains are.

Models are compared on the same examples, so what all say is kept, one digit an example or, of a completion,
the log-likelihood of its answer: a later model of the run, or another run on the same data, is compared
with them without loading anything again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from enmp_jax.evaluation.example_scores import ExampleScores, PerExample
from enmp_jax.io.files import read_json
from enmp_jax.search.statistics import Sample, paired_bootstrap

NAME = "test-answers.json"
Answers = Mapping[str, Mapping[str, str | Sequence[float]]]
"""Task -> model -> "0" or "1" for each example, in the order of the data; of a completion task the
log-likelihood of each answer, in nats."""
Tokens = Mapping[str, Sequence[int]]
"""Completion task -> tokens of each answer."""


def content(
    test: ExampleScores,
    reference: Mapping[str, float],
    models: Mapping[str, PerExample],
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The file's content: the ``answers`` of all models, and the ``gain`` of each over the plain merge; with
    completions their ``tokens``.

    Args:
        test: the examples.
        reference: score of every task's own adapter.
        models: name -> scores of single examples; ``merged`` is the plain merge.
        before: content that these models are added to.
    """
    known: Answers = (before or {}).get("answers", {})
    answers: dict[str, dict[str, str | Sequence[float]]] = {}
    tokens: dict[str, list[int]] = {}
    for i, task in enumerate(reference):
        own = test.sample.task == i
        completes = test.sample.is_likelihood(i)
        rows = {name: rounded(row[own]) if completes else _text(row[own]) for name, row in models.items()}
        answers[task] = {**known.get(task, {}), **rows}
        if completes:
            tokens[task] = test.sample.units_of(i).astype(int).tolist()
    names = [name for name in next(iter(answers.values())) if name != "merged"]
    made = {"answers": answers, "gain": {name: gain(answers, reference, tokens, name) for name in names}}
    return made | ({"tokens": tokens} if tokens else {})


def gain(
    answers: Answers, reference: Mapping[str, float], tokens: Tokens, model: str, over: str = "merged"
) -> dict[str, Any]:
    """The difference of two models with its 95 % interval over examples.

    Args:
        answers: of both.
        reference: score of every task's own adapter.
        tokens: of completions.
        model: the better one, it is hoped.
        over: the other.

    Returns:
        That of the mean normalised accuracy (of completions, likelihood) and, under ``tasks``, that of every
        task's.
    """
    sides = [[_numbers(own[name]) for own in answers.values()] for name in (model, over)]
    sizes = [len(row) for row in sides[0]]
    task = np.repeat(np.arange(len(answers)), sizes)
    units = np.concatenate([tokens.get(name, np.ones(n)) for name, n in zip(answers, sizes, strict=True)])
    likelihood = np.asarray([name in tokens for name in answers])
    weight = np.asarray([1 / (len(answers) * reference[name]) for name in answers])
    values, other = (np.concatenate(rows) for rows in sides)
    mean = paired_bootstrap(values, other, Sample(task, weight, units, likelihood))
    single = {
        name: paired_bootstrap(
            values[task == i], other[task == i],
            Sample(np.zeros(sizes[i], int), np.ones(1), units[task == i], likelihood[[i]]),
        )._asdict()
        for i, name in enumerate(answers)
    }  # fmt: skip
    return mean._asdict() | {"tasks": single}


def to_first(run_dirs: Sequence[Path]) -> list[dict[str, Any] | None]:
    """What every run found against what the first found, on the same test examples.

    None for the first, and for runs that kept no answers or answered other examples.
    """
    known = [_kept(path) for path in run_dirs]
    found: list[dict[str, Any] | None] = [None]
    for kept in known[1:]:
        if known[0] is None or kept is None or known[0][:3] != kept[:3]:
            found.append(None)
            continue
        _, reference, tokens, answers = kept
        both = {
            task: {"enmp": own["enmp"], "first": known[0][3][task]["enmp"]} for task, own in answers.items()
        }
        found.append(gain(both, reference, tokens, "enmp", "first"))
    return found


def _kept(run_dir: Path) -> tuple[dict[str, str], dict[str, float], Tokens, Answers] | None:
    """Hashes of a run's test data, its reference scores, the tokens of its completions and its answers."""
    if not all((run_dir / name).exists() for name in (NAME, "fingerprints.json", "scores.json")):
        return None
    made_of, scores, kept = (read_json(run_dir / name) for name in ("fingerprints.json", "scores.json", NAME))
    data = {key: value for key, value in made_of.items() if key.startswith("the test data of ")}
    return data, scores["reference"], kept.get("tokens", {}), kept["answers"]


def intervals(content: Mapping[str, Any]) -> dict[str, Any]:
    """Model -> its gain in the mean, for ``scores.json``."""
    return {
        model: {key: value for key, value in found.items() if key != "tasks"}
        for model, found in content["gain"].items()
    }


def _text(correct: Float[np.ndarray, " example"]) -> str:
    return "".join("01"[int(x)] for x in correct)


def rounded(values: Float[np.ndarray, " example"]) -> list[float]:
    """For JSON: the seven digits that a float32 has."""
    return [float(f"{x:.7g}") for x in values]


def _numbers(kept: str | Sequence[float]) -> Float[np.ndarray, " example"]:
    if isinstance(kept, str):
        return np.frombuffer(kept.encode(), np.uint8).astype(float) - ord("0")
    return np.asarray(kept, float)

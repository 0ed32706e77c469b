"""How well generated texts match the wanted ones: exact match, containment, chrF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence


def exact_match(generated: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of texts that equal the wanted one, spaces at both ends aside; 0..1."""
    return _share(generated, wanted, lambda ours, theirs: ours == theirs)


def contains(generated: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of texts in which the wanted one occurs, spaces at its ends aside; 0..1."""
    return _share(generated, wanted, lambda ours, theirs: theirs in ours)


def chrf(generated: Sequence[str], wanted: Sequence[str], order: int = 6, beta: float = 2.0) -> float:
    """Character n-gram F-score of a corpus (Popovic, WMT 2015), as sacrebleu's default chrF2; 0..1.

    Counts of n-grams are summed over all texts, white space left out. Precision and recall are averaged over
    n = 1 .. order, those left out for which one side has no n-grams, and recall counts ``beta`` times as much
    as precision.
    """
    precisions, recalls = [], []
    pairs = [tuple("".join(text.split()) for text in pair) for pair in zip(generated, wanted, strict=True)]
    for n in range(1, order + 1):
        n_ours = n_theirs = matches = 0
        for ours, theirs in pairs:
            a, b = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (ours, theirs))
            n_ours += a.total() if b else 0  # as sacrebleu: too short an answer counts against nothing
            n_theirs += b.total()
            matches += (a & b).total()
        if n_ours and n_theirs:
            precisions.append(matches / n_ours)
            recalls.append(matches / n_theirs)
    if not sum(precisions) + sum(recalls):
        return 0.0
    precision, recall = (sum(values) / len(values) for values in (precisions, recalls))
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "chrf": chrf,
}


def _share(generated: Sequence[str], wanted: Sequence[str], matches: Callable[[str, str], bool]) -> float:
    found = [matches(a.strip(), b.strip()) for a, b in zip(generated, wanted, strict=True)]
    return sum(found) / len(found)

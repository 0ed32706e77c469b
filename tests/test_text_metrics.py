"""Metrics of generated texts; chrF against numbers of sacrebleu 2.6.0."""

import pytest

from enmp_jax.evaluation.text_metrics import chrf, contains, exact_match

GENERATED = ["das ist ein Haus", " ernten ", "", "ab", "Sie lief schnell nach Hause."]
WANTED = ["das ist ein kleines Haus", "ernten", "zu", "abcdefgh", "Sie rannte rasch heim."]


def test_exact_match_and_contains():
    assert exact_match(GENERATED, WANTED) == 0.2
    assert contains(["ja, ernten!", "nein"], ["ernten ", "ja"]) == 0.5


@pytest.mark.parametrize(
    ("generated", "wanted", "expected"),
    [
        (GENERATED, WANTED, 0.344149),
        (GENERATED[:1], WANTED[:1], 0.492121),
        (GENERATED[3:4], WANTED[3:4], 0.234043),
        (["abcdefgh"], ["ab"], 0.550000),
        (["x"], ["y"], 0.0),
        ([""], ["y"], 0.0),
        (["gleich"], ["gleich"], 1.0),
    ],
)
def test_chrf_equals_sacrebleus(generated, wanted, expected):
    assert chrf(generated, wanted) == pytest.approx(expected, abs=5e-7)

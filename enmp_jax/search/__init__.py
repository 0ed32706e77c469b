"""Search over masks: evolution strategies, the loop, the archive, and the controls to compare with."""

from enmp_jax.search.loop import Result, join, make_step, run
from enmp_jax.search.memo import Candidate, Memo
from enmp_jax.search.strategies import STRATEGIES, Strategy, build

__all__ = ["STRATEGIES", "Candidate", "Memo", "Result", "Strategy", "build", "join", "make_step", "run"]

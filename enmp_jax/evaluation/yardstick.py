"""What merged models are measured by: what the tasks' own adapters, the experts, answer and score alone."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from enmp_jax.data import Examples
from enmp_jax.errors import UserError
from enmp_jax.evaluation import budget, experts, fitness
from enmp_jax.evaluation.kinds import LIKELIEST
from enmp_jax.evaluation.loaded_run import LoadedRun, Split
from enmp_jax.evaluation.scoring import Scoring


class Yardstick:
    """The experts of one loaded run on its splits, and the scores that are relative to theirs."""

    def __init__(self, loaded: LoadedRun):
        self.loaded = loaded
        search = loaded.run.search
        self.kind = fitness.get(search.fitness)
        self.importance = fitness.importances(loaded.tasks, search.importance)
        self._answers: dict[Split, list[experts.Answers]] = {}

    def examples(self, split: Split) -> Sequence[Examples]:
        """The tasks' examples of a split; where it has no labels, the experts' choices stand in for them."""
        found = self.loaded.examples[split]
        if self.loaded.labelled(split):
            return found
        chosen = [
            e.labels if isinstance(a, experts.TokenAnswers) else a.argmax(1).astype(np.int32)
            for e, a in zip(found, self.expert_answers(split), strict=True)
        ]
        return [e._replace(labels=labels) for e, labels in zip(found, chosen, strict=True)]

    def expert_answers(self, split: Split) -> list[experts.Answers]:
        """What every adapter alone answers on its own task's examples.

        Raises:
            UserError: the answers do not fit into the memory of a device, where the fitness needs them.
        """
        if split not in self._answers:
            rows, columns = self._answers_shape(split)
            if self.kind.needs_expert and 4 * rows * columns > budget.USABLE * budget.device_memory():
                raise UserError(
                    f"search.fitness {self.kind.name} keeps {rows} x {columns} answers of the experts on the "
                    f"device, which has no room for them: set evaluation.{split}_examples or another fitness"
                )
            self._answers[split] = experts.answers(self.loaded, split)
        return self._answers[split]

    def _answers_shape(self, split: Split) -> tuple[int, int]:
        """Rows, and the most columns of one, of the experts' answers."""
        loaded = self.loaded
        columns = [loaded.heads.allowed.shape[1]]
        for e, kind in zip(loaded.examples[split], loaded.kinds, strict=True):
            if kind == "choice":
                columns.append(e.inputs["choice_length"].shape[1])
            elif kind == "completion":
                columns.append(2 * LIKELIEST)
        return int(loaded.units(split).sum()), max(columns)

    def expert_scores(self, split: Split) -> Float[np.ndarray, " task"]:
        """Score of every adapter alone (see ``Scoring.scores``); accuracies without labels are 1."""
        return experts.scores(self.expert_answers(split), self.examples(split))

    def expert_losses(self, split: Split) -> Float[np.ndarray, " task"]:
        """Mean negative log-likelihood of every adapter alone, in nats (see ``Scoring.loss``)."""
        found = experts.values(
            self.expert_answers(split), self.examples(split), fitness.get("log_likelihood")
        )
        return -np.asarray(found)

    def scoring(self, split: Split, normalises: bool = False) -> Scoring:
        """What turns counts on a split into scores and fitness.

        Reference scores are those of the run file, else measured here; accuracies without labels are 1.

        Args:
            split: whose counts.
            normalises: scores are divided by the reference scores, as they are on the test split and by the
                fitness accuracy anyway.

        Raises:
            UserError: an adapter that alone gets nothing right, where scores are divided by that.
        """
        loaded = self.loaded
        given = [task.reference if loaded.labelled(split) else None for task in loaded.run.tasks]
        reference = np.asarray([g or 0.0 for g in given], np.float32)
        if not all(given):
            reference = np.where(reference > 0, reference, self.expert_scores(split))
        # few examples of a hard task may have no right answer, and a smooth fitness does not mind
        normalises = normalises or split == "test" or self.kind.name == "accuracy"
        for task, value in zip(loaded.tasks, reference, strict=True):
            if value == 0 and normalises:
                raise UserError(
                    f"the adapter of {task!r} alone gets nothing right on {split}: check its head and labels"
                )
        likelihood = np.asarray([kind == "completion" for kind in loaded.kinds])
        if self.kind.name == "accuracy" and not likelihood.any():
            own = reference
        else:
            own = np.asarray(experts.values(self.expert_answers(split), self.examples(split), self.kind))
            own = np.where(likelihood, own, reference) if self.kind.name == "accuracy" else own
        for task, value in zip(loaded.tasks, own, strict=True):
            if value == 0 and not self.kind.logarithmic:
                raise UserError(
                    f"the adapter of {task!r} alone has {self.kind.name} 0 on {split}: take another fitness"
                )
        parts = loaded.units(split), reference, own, self.importance
        made = Scoring(*(jnp.asarray(x, jnp.float32) for x in parts))
        return made._replace(likelihood=jnp.asarray(likelihood)) if likelihood.any() else made

"""The contract between data sources, preprocessing and everything downstream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

Modality = Literal["image", "text", "question"]
Split = Literal["train", "search", "selection", "test"]
"""What a run uses examples for: the fields of ``DataConfig`` that hold a split expression."""
Progress = Callable[[int, int], None]
"""Called with (examples done, examples in all)."""


class Span(NamedTuple):
    """Rows ``start <= i < stop`` of one split."""

    split: str
    start: int
    stop: int


class Raw(NamedTuple):
    """Examples as a source has them.

    Attributes:
        modality: what ``values`` are.
        values: images as uint8 ``[h, w, c]``, encoded bytes or a file path; texts as tuples of str;
            questions as ``questions.Question``.
        labels: int64 ``[n]``; -1 where the source gives no label.
        names: what to call each example in messages.
    """

    modality: Modality
    values: Sequence[Any]
    labels: np.ndarray
    names: Sequence[str]


@runtime_checkable
class Source(Protocol):
    """A named collection of splits. Opening one is cheap: nothing is read before it is asked for."""

    def identity(self) -> str:
        """Changes when the data change (paths, sizes, times); must not read the data itself."""
        ...

    def splits(self) -> dict[str, int]:
        """Split name -> number of examples."""
        ...

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, or empty when the source has none."""
        ...

    def labelled(self) -> bool:
        """False: the data have no labels, or the run file says to ignore them; all are -1."""
        ...

    def read(self, split: str, rows: Sequence[int]) -> Raw:
        """The given rows of a split, in the given order."""
        ...


@runtime_checkable
class Preprocess(Protocol):
    """Turns raw examples into the arrays a backbone takes."""

    modality: Modality
    identity: str
    """Everything the result depends on, for the cache."""

    @property
    def padding(self) -> Mapping[str, int]:
        """Fill value of every input whose second axis is a sequence; empty for images."""
        ...

    def __call__(self, values: Sequence[Any]) -> tuple[dict[str, np.ndarray], int]:
        """Inputs ``[n, ...]`` of n images (uint8 ``[h, w, c]``) or texts, and how many were truncated."""
        ...


class Examples(NamedTuple):
    """One split of one task, on the host.

    Attributes:
        inputs: name -> array ``[n, ...]``: ``image`` uint8 ``[n, h, w, c]``, or ``input_ids``,
            ``attention_mask`` (and ``token_type_ids``) int32 ``[n, length]``, right-padded. Without a
            preprocess, texts are ``text``, an object array ``[n, parts]`` of str. Those of generative
            tasks are in ``data.layout``.
        labels: int32 ``[n]``, after the label map; all -1 where no example has a label.
        class_names: names of the classes the labels count, or empty.
        keys: ``S32 [n]``, hash of each example's content before transforms.
        source: identity of the source.
        spans: the rows of the source that the split expression means (before limits and left-out ones).
        notes: one line for each thing left out or truncated.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    class_names: tuple[str, ...]
    keys: np.ndarray
    source: str = ""
    spans: tuple[Span, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether there are labels: of every example or of none."""
        return bool((self.labels != -1).all())

    def take(self, rows: np.ndarray) -> Examples:
        """The examples at the given rows (indices or booleans)."""
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        return self._replace(inputs=inputs, labels=self.labels[rows], keys=self.keys[rows])


def file_identity(paths: Sequence[Path], base: Path) -> str:
    """Paths below ``base``, sizes and modification times of files, as one line each."""
    lines = [str(base.resolve())]
    for path in sorted(paths):
        stat = path.stat()
        lines.append(f"{path.relative_to(base)} {stat.st_size} {stat.st_mtime_ns}")
    return "\n".join(lines)

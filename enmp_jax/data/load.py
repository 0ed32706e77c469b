"""From a task's ``DataConfig`` to ``Examples``: read, decode, transform, preprocess, map labels, cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from enmp_jax.config.run_file import resolve_path
from enmp_jax.config.schema import to_dict
from enmp_jax.config.sections import DataConfig, TaskConfig
from enmp_jax.data import cache, images, pretexts, slices, transforms
from enmp_jax.data import labels as label_map
from enmp_jax.data.answer_tokens import AnswerTokens
from enmp_jax.data.base import Examples, Modality, Preprocess, Progress, Raw, Source, Span, Split
from enmp_jax.data.files import FolderSource, JsonlSource, NpzSource
from enmp_jax.data.layout import Kind
from enmp_jax.data.questions import Question, QuestionSource, find_kind
from enmp_jax.errors import UserError, one_line, reason
from enmp_jax.io.cache import key as cache_key

CHUNK = 256
"""Examples read and preprocessed at a time, so that raw images never fill the memory."""


def _tfds(name: str, config: DataConfig, root: Path) -> Source:
    from enmp_jax.data.tfds import TfdsSource

    return TfdsSource(name, config, root)


def _huggingface(name: str, config: DataConfig, root: Path) -> Source:
    from enmp_jax.data.huggingface import HuggingFaceSource

    return HuggingFaceSource(name, config, root)


SOURCES: dict[str, Callable[[str, DataConfig, Path], Source]] = {
    "npz": lambda name, config, root: NpzSource(Path(resolve_path(name, root)), config),
    "folder": lambda name, config, root: FolderSource(Path(resolve_path(name, root)), config),
    "jsonl": lambda name, config, root: JsonlSource(Path(resolve_path(name, root)), config),
    "tfds": _tfds,
    "hf": _huggingface,
}


def open_source(config: DataConfig, root: Path, task_kind: Kind = "classification") -> Source:
    """The source that ``config.source`` names; relative paths start from ``root``.

    Args:
        config: the task's data.
        root: directory that relative paths start from.
        task_kind: what to read from it; that of generative tasks is ``questions.QuestionSource``.

    Raises:
        UserError: unknown kind of source, one that the kind of task does not take, or nothing there.
    """
    kind, colon, name = config.source.partition(":")
    if kind not in SOURCES or not colon or not name:
        raise UserError(
            f"data source {config.source!r}: write KIND:NAME with KIND one of {', '.join(SOURCES)}"
        )
    try:
        if task_kind != "classification":
            return QuestionSource(Path(resolve_path(name, root)), config, task_kind)
        return SOURCES[kind](name, config, root)
    except OSError as error:
        raise UserError(f"{one_line(config.source)}: cannot be read ({reason(error)})") from None


def jsonl_path(config: DataConfig, root: Path) -> Path | None:
    """Where a ``jsonl:`` source lies; None: it is another source."""
    kind, _, name = config.source.partition(":")
    return Path(resolve_path(name, root)) if kind == "jsonl" else None


def task_kind(task: TaskConfig, root: Path) -> Kind:
    """The kind of a task: the run file's, or what its data make of it.

    Raises:
        UserError: a generative kind with a source that has none, or data that cannot be read.
    """
    return find_kind(task.data, task.kind, jsonl_path(task.data, root))


def load_examples(
    config: DataConfig,
    which: Split,
    root: Path,
    preprocess: Preprocess | None = None,
    limit: int | None = None,
    *,
    progress: Progress | None = None,
) -> Examples:
    """Load one split of a task, from the cache when nothing it depends on has changed.

    Examples without a label are left out, unless none has one: then all labels are -1.

    Args:
        config: the task's data.
        which: the field of ``config`` that holds the split expression.
        root: directory that relative paths start from.
        preprocess: see ``preprocess_for``; None leaves images as they are (they must have one size) and
            texts as strings.
        limit: at most so many examples, a fixed random choice (the first of a larger one).
        progress: called with (done, total) while reading.

    Raises:
        UserError: no such split, nothing left in it, labels out of range, no labels to train on, images
            that do not decode (unless ``skip_bad``), or text for an image model and the other way round.
    """
    expression = getattr(config, which)
    if expression is None:
        raise UserError(f"{config.source}: the run file names no {which} split; add `{which}:` to its data")
    if limit is not None and limit <= 0:
        raise UserError(f"{config.source}: the number of {which} examples is {limit}: it must be above 0")
    transform = transforms.parse(config.transforms)
    kind: Kind = preprocess.kind if isinstance(preprocess, AnswerTokens) else "classification"
    source = open_source(config, root, kind)
    identity = source.identity()
    relevant = {k: v for k, v in to_dict(config).items() if k not in get_args(Split)}
    entry = cache_key(identity, relevant, expression, limit, preprocess.identity if preprocess else None)
    examples = cache.read(entry)
    if examples is None:
        spans = slices.resolve(expression, source.splits(), config.source)
        reader = _Reader(config, source, transform, preprocess, f"{config.source} {expression}")
        examples = reader.run(spans, limit, progress)._replace(source=identity, spans=spans)
        if preprocess is not None or reader.modality == "image":
            cache.write(entry, examples)
    if which == "train" and not examples.labelled:
        raise UserError(f"{config.source} {expression}: no example has a label, and training needs them")
    return examples


class _Reader:
    """Reads rows in chunks and keeps what is good of them."""

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        transform: transforms.Transform,
        preprocess: Preprocess | None,
        where: str,
    ) -> None:
        self.config, self.source, self.where = config, source, where
        self.transform, self.preprocess = transform, preprocess
        self.pretext = pretexts.parse(config.pretext, config.source) if config.pretext else None
        if self.pretext and config.labels is not None:
            raise UserError(f"{config.source}: pretext makes the labels, so a label map has nothing to map")
        self.labelled = self.pretext is not None or source.labelled()
        self.class_names = () if self.pretext else label_map.class_names(config, source)
        self.modality: Modality | None = None
        self.bad: list[str] = []
        self.first: tuple[str, tuple[int, ...]] | None = None
        self.unlabelled = self.unmapped = self.truncated = 0

    def run(self, spans: tuple[Span, ...], limit: int | None, progress: Progress | None) -> Examples:
        rows = [(span.split, row) for span in spans for row in range(span.start, span.stop)]
        order = np.arange(len(rows))
        if limit is not None and limit < len(rows):
            order = np.random.default_rng(0).permutation(len(rows))
        total = min(len(rows), limit or len(rows))
        kept: list[np.ndarray] = []
        chunks: list[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]] = []
        count = start = 0
        while start < len(order) and count < total:
            # with a limit, read just enough to replace examples that were left out
            size = CHUNK if limit is None else min(CHUNK, max(total - count, 16))
            positions = np.sort(order[start : start + size])
            good, chunk = self._chunk([rows[i] for i in positions])
            if len(good):
                kept.append(positions[good])
                chunks.append(chunk)
            count, start = count + len(good), start + size
            if progress is not None:
                progress(min(count, total) if limit is not None else min(start, len(rows)), total)
        if not count and self.labelled and self.unlabelled == len(rows):
            # no example has a label: then that is no reason to leave one out
            self.labelled, self.unlabelled = False, 0
            return self.run(spans, limit, progress)
        if not count:
            raise UserError(
                f"{self.where}: no examples are left ({'; '.join(self._notes()) or 'the split is empty'})"
            )
        padding = self.preprocess.padding if self.preprocess else {}
        inputs = {
            name: _concatenate([chunk[0][name] for chunk in chunks], padding.get(name))
            for name in chunks[0][0]
        }
        labels = np.concatenate([chunk[1] for chunk in chunks])
        keys = np.concatenate([chunk[2] for chunk in chunks])
        examples = Examples(inputs, labels, self.class_names, keys, notes=self._notes())
        if limit is None:
            return examples
        return examples.take(np.argsort(np.concatenate(kept)[:total]))

    def _chunk(self, rows: list[tuple[str, int]]) -> tuple[np.ndarray, Any]:
        """Split of the rows are good, and their (inputs, labels, keys)."""
        parts: list[Raw] = []
        for split in dict.fromkeys(split for split, _ in rows):
            parts.append(self.source.read(split, [row for s, row in rows if s == split]))
        self.modality = parts[0].modality
        if self.preprocess is not None and self.preprocess.modality != self.modality:
            takes = self.preprocess.modality
            raise UserError(f"{self.config.source} holds {self.modality}s but the base model takes {takes}s")
        if self.config.transforms and self.modality == "text":
            raise UserError(
                f"{self.config.source} holds texts: transforms ({self.config.transforms[0]}) are for images"
            )
        if self.pretext and self.modality == "text":
            raise UserError(
                f"{self.config.source} holds texts: pretexts ({self.config.pretext}) are for images"
            )
        names = [name for part in parts for name in part.names]
        given = np.concatenate([part.labels for part in parts])
        if self.pretext:
            given = np.zeros_like(given)  # whatever the source says, also that it has no label
        labels = label_map.apply(given, names, self.config.labels, self.class_names, self.where)
        unlabelled = given == -1
        self.unlabelled += int(unlabelled.sum())
        self.unmapped += int(((labels < 0) & ~unlabelled).sum())
        values: list[Any] = []
        good: list[int] = []
        keys: list[bytes] = []
        for i, value in enumerate(value for part in parts for value in part.values):
            if labels[i] < 0 and self.labelled:
                continue
            try:
                value = images.decode(value) if self.modality == "image" else value
            except images.BadImage as error:
                if not self.config.skip_bad:
                    raise UserError(
                        f"{self.where}: {names[i]} does not decode ({error}); repair or remove it, or leave "
                        "such images out with --skip-bad (skip_bad: true in the run file)"
                    ) from None
                self.bad.append(names[i])
                continue
            good.append(i)
            keys.append(content_key(value))
            if self.pretext:
                value, labels[i] = self.pretext(value, keys[-1])
            values.append(self.transform(value) if self.modality == "image" else value)
        index = np.asarray(good, np.int64)
        inputs: dict[str, np.ndarray] = {}
        if values and self.preprocess is not None:
            inputs, truncated = self.preprocess(values)
            self.truncated += truncated
        elif values and self.modality == "image":
            self._one_size(values, [names[i] for i in good])
            inputs = {"image": np.stack(values)}
        elif values:
            inputs = {"text": np.asarray(values, object)}
        return index, (inputs, labels[index].astype(np.int32), np.asarray(keys, "S32"))

    def _one_size(self, values: list[np.ndarray], names: list[str]) -> None:
        for value, name in zip(values, names):
            self.first = self.first or (name, value.shape)
            if value.shape != self.first[1]:
                raise UserError(
                    f"{self.where}: {name} is {_size(value.shape)}, {self.first[0]} {_size(self.first[1])}:"
                    " the base model has no image preprocessing, so all images must have one size"
                )

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self.bad:
            shown = ", ".join(self.bad[:5]) + (" ..." if len(self.bad) > 5 else "")
            notes.append(f"{len(self.bad)} images did not decode and were left out: {shown}")
        if not self.labelled:
            notes.append("no example has a label")
        elif self.unlabelled:
            notes.append(f"{self.unlabelled} examples have no label (-1) and were left out")
        if self.unmapped:
            notes.append(f"{self.unmapped} examples were left out by the label map")
        if self.truncated:
            notes.append(f"{self.truncated} texts were truncated to {self.config.max_length} tokens")
        return tuple(notes)


def content_key(value: Any) -> bytes:
    """Hash of an image's pixels, a text or a prompt with its answers, 32 hexadecimal digits."""
    if isinstance(value, np.ndarray):
        content = str(value.shape).encode() + np.ascontiguousarray(value).tobytes()
    else:
        parts = value.content if isinstance(value, Question) else value
        content = "\x1f".join(parts).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode()


def _concatenate(arrays: list[np.ndarray], fill: int | None) -> np.ndarray:
    """Join chunks; sequences are padded on the right to the longest one."""
    if fill is not None:
        longest = max(a.shape[1] for a in arrays)
        arrays = [
            np.pad(a, ((0, 0), (0, longest - a.shape[1]), *[(0, 0)] * (a.ndim - 2)), constant_values=fill)
            for a in arrays
        ]
    return np.concatenate(arrays)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))

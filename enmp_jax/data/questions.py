"""Records of generative tasks: a prompt or messages, and the answer or choices that belong to it.

Three forms are known: ``{"prompt", "answer"}`` and ``{"messages": [{"role", "content"}, ..]}``, whose last
turn is the answer, for completions; ``{"prompt" or "messages", "choices", "answer"}`` for choices, where
the answer is the number of the right one, from 0, or the choice itself, and may be missing.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from enmp_jax.config.sections import DataConfig
from enmp_jax.data.base import Raw
from enmp_jax.data.files import JsonlSource
from enmp_jax.data.layout import Kind
from enmp_jax.errors import UserError, one_line, suggestion

TEMPLATE = "{prompt} {answer}"
_ANSWER = "{answer}"
_CLASSIFICATION = ("labels", "class_names", "image", "text", "transforms", "pretext")


class Question(NamedTuple):
    """An example of a generative task.

    Attributes:
        prompt: the text before the answer; empty where there are messages.
        messages: (role, content) of the turns before the answer.
        answers: the answer, or all choices.
        name: what to call it in messages to people; no part of its content.
    """

    prompt: str
    messages: tuple[tuple[str, str], ...]
    answers: tuple[str, ...]
    name: str

    @property
    def content(self) -> tuple[str, ...]:
        """What makes two examples the same."""
        return (self.prompt, *(part for turn in self.messages for part in turn), *self.answers)


class QuestionSource(JsonlSource):
    """A ``jsonl:`` source, read as prompts with answers.

    Args:
        path: file or directory.
        config: the run file's data.
        kind: ``choice`` or ``completion``; the latter takes the right one of choices as the answer.

    Raises:
        UserError: nothing there, or a template that cannot be used.
    """

    def __init__(self, path: Path, config: DataConfig, kind: Kind) -> None:
        super().__init__(path, config)
        unfit = [name for name in ("labels", "class_names", "image", "text") if getattr(config, name)]
        if unfit:
            raise UserError(
                f"{config.source}: data.{unfit[0]} is for classification, and this is a {kind} task"
            )
        self._kind = kind
        self._template = prompt_template(config)

    def labelled(self) -> bool:
        """See ``Source``; choices may still all lack the answer."""
        return self._kind == "completion" or self._config.label is not None

    def class_names(self) -> tuple[str, ...]:
        """None: every example has choices of its own."""
        return ()

    def read(self, split: str, rows: Sequence[int]) -> Raw:
        """See ``Source``; values are ``Question``."""
        values, labels = [], []
        for where, record in (self._records[split][i] for i in rows):
            question, label = self._question(record, where)
            values.append(question)
            labels.append(label)
        return Raw("question", values, np.asarray(labels, np.int64), [q.name for q in values])

    def _question(self, record: Mapping[str, Any], where: str) -> tuple[Question, int]:
        messages = _messages(record, where)
        label, choices = 0, ()
        if self._kind == "choice" or "choices" in record:
            choices = _choices(record, where)
            label = _right(record.get("answer") if self._config.label else None, choices, where)
        if self._kind == "choice":
            answers = choices
        elif choices:
            if label < 0:
                raise UserError(f"{where}: no answer, and a completion task needs one")
            answers, label = (choices[label],), 0
        elif messages:
            role, answer = messages[-1]
            if role != "assistant" or len(messages) < 2:
                raise UserError(f"{where}: messages must end with an answer of the role assistant")
            messages, answers = messages[:-1], (answer,)
        else:
            answers = (_text(record, "answer", where),)
        prompt = "" if messages else self._fill(record, where)
        return Question(prompt, messages, answers, where), label

    def _fill(self, record: Mapping[str, Any], where: str) -> str:
        fields = {name for _, name, _, _ in string.Formatter().parse(self._template) if name}
        return self._template.format(**{name: _text(record, name, where) for name in fields})


def prompt_template(config: DataConfig) -> str:
    """The template of the text before the answer, the space or line break between them included.

    Raises:
        UserError: not a template, or one that does not end with the answer.
    """
    template = TEMPLATE if config.template is None else config.template
    where = f"data.template {one_line(template, 80)!r}"
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"{where}: {one_line(error)}") from None
    odd = [name for name in fields if not name.isidentifier()]
    if odd or not set(fields) - {"answer"}:
        what = f"{{{odd[0]}}} is no key of the data" if odd else "it has no {prompt}"
        raise UserError(f"{where}: {what}; write {TEMPLATE!r}, say")
    if "answer" not in fields:
        return template if template[-1].isspace() else template + " "
    if fields.count("answer") > 1 or not template.endswith(_ANSWER):
        raise UserError(f"{where}: {_ANSWER} must stand at its end, once")
    return template.removesuffix(_ANSWER)


def find_kind(config: DataConfig, given: Kind | None, path: Path | None) -> Kind:
    """What kind of task the data make, as far as the run file does not say.

    Args:
        config: the task's data.
        given: ``kind`` of the run file.
        path: of a ``jsonl:`` source, else None.

    Raises:
        UserError: a generative kind with another source, or data that cannot be read.
    """
    if path is None:
        if given in ("choice", "completion"):
            raise UserError(f"{config.source}: a {given} task takes jsonl:FILE or jsonl:DIRECTORY")
        return given or "classification"
    if given is not None:
        return given
    keys = JsonlSource(path, config).keys()
    if "choices" in keys and keys & {"prompt", "messages"}:
        return "choice"
    return "completion" if {"prompt", "answer"} <= keys or "messages" in keys else "classification"


def _messages(record: Mapping[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    given = record.get("messages", [])
    good = isinstance(given, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in given
    )
    if not good or ("messages" in record and not given):
        raise UserError(f'{where}: messages must be a list of {{"role": .., "content": ..}}, both strings')
    return tuple((turn["role"], turn["content"]) for turn in given)


def _choices(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    choices = record.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise UserError(f"{where}: choices must be a list of two or more strings, got {_shown(choices)}")
    repeated = next((c for c in choices if choices.count(c) > 1), None)
    if repeated is not None:
        raise UserError(f"{where}: the choice {_shown(repeated)} is there twice: give every choice once")
    return tuple(choices)


def _right(answer: Any, choices: tuple[str, ...], where: str) -> int:
    """Number of the right choice; -1 where nobody says."""
    if answer is None:
        return -1
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise UserError(f"{where}: the answer {_shown(answer)} is neither a choice nor the number of one")
    if not 0 <= answer < len(choices):
        raise UserError(
            f"{where}: the answer {answer} is out of range: the choices are 0 to {len(choices) - 1}"
        )
    return answer


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    if key not in record:
        known = [name for name, value in record.items() if isinstance(value, str)]
        raise UserError(f"{where}: no key {key!r}; {suggestion(key, known, 'its texts are')}")
    if not isinstance(record[key], str):
        raise UserError(f"{where}: {key!r} must be a string, got {_shown(record[key])}")
    return record[key]


def _shown(value: Any) -> str:
    return one_line(repr(value), 80)

"""From prompts with answers to the arrays of ``data.layout``, through the base model's tokenizer."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.config.sections import DataConfig
from enmp_jax.data.base import Modality
from enmp_jax.data.layout import Kind
from enmp_jax.data.packing import pack, stack
from enmp_jax.data.questions import Question
from enmp_jax.data.tokenizer import load_tokenizer, tokenizer_digest
from enmp_jax.errors import UserError, one_line

Sequences = list[list[int]]


class AnswerTokens:
    """Prompts and answers as tokens (see ``data.layout``).

    Prompt and answer are tokenised together and divided where the prompt alone ends, as lm-eval does:
    spaces between them belong to the answer.

    Args:
        directory: holds the tokenizer's files.
        window: most tokens of a prompt and one answer. Longer completions lose the end of their answer;
            prompts that leave no room for one, and choices that do not fit, are refused.
        vocabulary: number of tokens that the base model knows.
        kind: ``choice`` or ``completion``.
        config: the data: template, chat, choice_norm.
    """

    modality: Modality = "question"

    def __init__(self, directory: Path, window: int, vocabulary: int, kind: Kind, config: DataConfig) -> None:
        self._directory, self._window, self._vocabulary = directory, window, vocabulary
        self._chat, self._norm = config.chat, config.choice_norm
        self.kind: Kind = kind
        packages = ("tokenizers", "transformers", "jinja2")
        versions = [importlib.metadata.version(package) for package in packages]
        digest = tokenizer_digest(directory)
        self.identity = json.dumps(["answers", digest, kind, window, vocabulary, versions])

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self._directory)
        if len(tokenizer) > self._vocabulary:
            raise UserError(
                f"{self._directory}: its tokenizer has {len(tokenizer)} tokens, the model's embeddings only "
                f"{self._vocabulary}: the tokenizer belongs to another model"
            )
        return tokenizer

    @property
    def padding(self) -> Mapping[str, int]:
        """See ``Preprocess``: everything is padded with zeros."""
        names = ["input_ids", "attention_mask", "target_ids", "target_from", "target_branch"]
        return dict.fromkeys(names + ["position", "branch", "choice_length"] * (self.kind == "choice"), 0)

    def __call__(self, values: Sequence[Question]) -> tuple[dict[str, np.ndarray], int]:
        """See ``Preprocess``; the inputs of ``data.layout``."""
        prompts, answers = self._tokens(values)
        rows: list[dict[str, list]] = []
        truncated = 0
        place = 0
        for question, prompt in zip(values, prompts, strict=True):
            own = answers[place : place + len(question.answers)]
            place += len(question.answers)
            room = self._window - len(prompt)
            longest = max(map(len, own))
            if room < 1 or (self.kind == "choice" and longest > room):
                raise self._too_long(question, len(prompt), longest)
            truncated += longest > room
            rows.append(self._row(question, prompt, [answer[:room] for answer in own]))
        return stack(rows), truncated

    def _row(self, question: Question, prompt: list[int], answers: Sequences) -> dict[str, list]:
        """Lists of different lengths: one example."""
        lengths = {
            "none": [1.0] * len(answers),
            "token": [float(len(answer)) for answer in answers],
            "character": [float(len(text)) for text in question.answers],
        }
        row = pack(prompt, answers) | {"choice_length": lengths[self._norm]}
        return {name: row[name] for name in self.padding}

    def _tokens(self, questions: Sequence[Question]) -> tuple[Sequences, Sequences]:
        """Tokens of every prompt, and of all answers one after the other."""
        texts = [self._texts(question) for question in questions]
        encode = functools.partial(self._tokenizer, add_special_tokens=False, verbose=False)
        prompts = encode([prompt for prompt, _ in texts])["input_ids"]
        whole = encode([prompt + answer for prompt, answers in texts for answer in answers])["input_ids"]
        made: Sequences = []
        n = 0
        for i, (question, (_, answers)) in enumerate(zip(questions, texts, strict=True)):
            for text in answers:
                answer = whole[n][len(prompts[i]) :]
                n += 1
                if not answer or not text.strip():
                    raise UserError(f"{question.name}: an answer tokenises to nothing: give it some text")
                if self.kind == "completion" and answer[-1] not in self._tokenizer.all_special_ids:
                    answer = [*answer, *self._end()]
                made.append(answer)
        return [self._begin(q, prompt) for q, prompt in zip(questions, prompts, strict=True)], made

    def _begin(self, question: Question, prompt: list[int]) -> list[int]:
        """The prompt behind the beginning-of-sequence token, where the tokenizer adds one (chat templates
        write theirs), or else behind no token unless it is empty: something must predict the answer."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        plain = not question.messages and not self._chat
        if plain and bos is not None and bos in self._tokenizer("")["input_ids"]:
            return [bos, *prompt]
        begun = prompt or [token for token in (bos, eos) if token is not None][:1]
        if not begun:
            raise UserError(
                f"{question.name}: the prompt is empty, and the tokenizer has no token to begin with"
            )
        return begun

    def _end(self) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return [] if eos is None else [eos]

    def _texts(self, question: Question) -> tuple[str, list[str]]:
        """The text of the prompt, and what follows it for every answer."""
        if not question.messages and not self._chat:
            prompt = question.prompt.rstrip()
            between = question.prompt[len(prompt) :]
            return prompt, [between + answer if answer else "" for answer in question.answers]
        turns = question.messages or (("user", question.prompt.rstrip()),)
        messages = [{"role": role, "content": content} for role, content in turns]
        prompt = self._render(question, messages, add_generation_prompt=True)
        if self.kind == "choice":
            return prompt, list(question.answers)
        answers = []
        for answer in question.answers:
            if not answer.strip():
                raise UserError(f"{question.name}: an answer tokenises to nothing: give it some text")
            whole = self._render(question, [*messages, {"role": "assistant", "content": answer}])
            if not whole.startswith(prompt):
                raise UserError(
                    f"{question.name}: the chat template of {self._directory} does not put the answer behind "
                    "the prompt: set data.template instead of chat"
                )
            answers.append(whole[len(prompt) :].rstrip())
        return prompt, answers

    def _render(self, question: Question, messages: list[dict[str, str]], **options: bool) -> str:
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{question.name}: the tokenizer of {self._directory} has no chat template: leave "
                "data.chat out and write the prompts by data.template, or take an instruction-tuned base"
            )
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # templates raise errors of their own, jinja2 others
            raise UserError(f"{question.name}: the chat template refuses it ({one_line(error)})") from None

    def _too_long(self, question: Question, prompt: int, answer: int) -> UserError:
        what = f"its prompt has {prompt} tokens"
        if self.kind == "choice":
            what += f", its longest choice {answer}"
        return UserError(
            f"{question.name}: {what}, and the window is {self._window}: raise data.max_length as far as the "
            "model bears, or shorten the prompt"
        )

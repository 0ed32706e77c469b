"""The lm-evaluation-harness (lm-eval) on a merged model: scores that everybody quotes, without torch.

    from lm_eval import simple_evaluate
    from enmp_jax.integrations.lm_eval import EnmpLM

    model = EnmpLM.from_run("run.yaml", mask="out/mask.json")
    results = simple_evaluate(model=model, tasks=["arc_easy", "hellaswag"])

Tokens, windows and truncation are those of lm-eval's own ``hf`` model, so that scores are too. Choices that
share their context are scored in one row, so that the context is computed once.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jaxtyping import Array, Bool, Float

from enmp_jax import models
from enmp_jax.config import run_file
from enmp_jax.config.run_file import RunConfig
from enmp_jax.data.packing import Row, pack, stack
from enmp_jax.data.tokenizer import load_tokenizer
from enmp_jax.deltas import Deltas
from enmp_jax.errors import UserError, one_line, reason
from enmp_jax.evaluation import decoding
from enmp_jax.evaluation.generation import end_tokens
from enmp_jax.evaluation.loaded_run import load_run_adapters, make_merge
from enmp_jax.masks import MaskSpec
from enmp_jax.models import causal, checkpoint
from enmp_jax.models.base import Backbone, Inputs, Params
from enmp_jax.runs import mask_file

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(f"lm-eval is not installed: pip install lm-eval ({error})") from None

Request = tuple[Any, list[int], list[int]]  # what it is called in lm-eval's cache, context, continuation
STEPS = 16
"""Tokens that are generated between two looks for stop sequences."""


class EnmpLM(TemplateLM):
    """A model of lm-eval: ``loglikelihood``, ``loglikelihood_rolling`` and greedy ``generate_until``.

    Args:
        backbone: a causal model.
        params: its parameters.
        tokenizer: transformers' tokenizer.
        deltas: what a merge adds to the weights; None: the base model.
        batch_size: rows of a batch.
        max_length: most tokens that the model sees; default: the base's ``max_position_embeddings``.
        max_gen_toks: most tokens that are generated where a task does not say.
        end_tokens: tokens that end a text, besides the tokenizer's end of sequence.

    Raises:
        UserError: the base model has no language-model head.
    """

    def __init__(
        self,
        backbone: Backbone,
        params: Params,
        tokenizer: Any,
        deltas: Deltas | None = None,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        end_tokens: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if backbone.logits is None:
            raise UserError(f"lm-eval needs a causal language model, and the base is a {backbone.family}")
        self.tokenizer, self.batch_size, self.max_gen_toks = tokenizer, batch_size, max_gen_toks
        self.max_length = max_length or int(backbone.config.raw.get("max_position_embeddings", 2048))
        self._params, self._deltas = params, deltas
        self._members = None if deltas is None else decoding.one_member(deltas)
        self._end = tuple(dict.fromkeys([tokenizer.eos_token_id, *end_tokens]))
        self._score = jax.jit(partial(_score, backbone))
        self._start = jax.jit(partial(decoding.start, backbone, eos=self._end), static_argnums=4)
        self._advance = jax.jit(partial(decoding.advance, backbone, eos=self._end))

    @classmethod
    def from_run(
        cls,
        run: RunConfig | str | Path,
        mask: str | Path | None = None,
        scale: float | None = None,
        **options: Any,
    ) -> EnmpLM:
        """The merged model of a run file.

        Args:
            run: a run file, or its content.
            mask: a ``mask.json``; None: nothing is pruned.
            scale: merge coefficient; default: the mask's, else the run file's.
            options: see the class.

        Raises:
            UserError: a bad run file, base, adapter or mask, or no scale anywhere.
        """
        config = run if isinstance(run, RunConfig) else run_file.load(run)
        base = config.path(config.base.model)
        backbone, params = models.load(base, dtype=config.base.dtype, quantization=config.base.quantization)
        loras, method = load_run_adapters(config, backbone).stack, make_merge(config)
        saved = None if mask is None else mask_file.load(mask, loras)
        value = scale if scale is not None else saved.scale if saved else None
        if value is None and config.merge.scale == "auto":
            raise UserError("the run file says merge.scale: auto, and no mask says which: give a scale")
        value = float(config.merge.scale) if value is None else value
        keep = saved.keep if saved else MaskSpec.of(loras, config.search.granularity).all_kept()
        deltas = jax.jit(method.merge)(method.prepare(loras), jnp.asarray(keep), value)
        directory = checkpoint.find(base)
        tokenizer = load_tokenizer(directory)
        options = {"end_tokens": end_tokens(directory, tokenizer), **options}
        return cls(backbone, params, tokenizer, deltas, **options)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of sequence."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; special ones as the tokenizer adds them, never a second one to begin with."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, window by window, each token in one window alone."""
        windows: list[Request] = []
        owner: list[int] = []
        for i, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for context, tokens in map(make_disjoint_window, rolling):
                windows.append((None, context, tokens))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: list[Request], **given: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of every continuation, and whether it is what greedy decoding would give."""
        rows = self._rows(requests)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for chosen in _chunks(sorted(rows, key=lambda row: -len(row[0]["input_ids"])), self.batch_size):
            inputs = _padded([row for row, _ in chosen], self.batch_size)
            logs, likeliest = map(np.asarray, self._score(self._params, inputs, self._deltas))
            for (_, members), branch, log, best in zip(chosen, inputs["target_branch"], logs, likeliest):
                for number, request in enumerate(members, 1):
                    own = branch == number
                    found[request] = float(log[own].sum(dtype=np.float64)), bool(best[own].all())
        for (key, _, _), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def _rows(self, requests: list[Request]) -> list[tuple[Row, list[int]]]:
        """Rows of continuations that share their context, and whose they are."""
        groups: list[tuple[list[int], list[list[int]], list[int]]] = []
        latest: dict[tuple[int, ...], int] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise UserError("lm-eval: an answer has no tokens: give every choice of the task some text")
            if len(continuation) > self.max_length:
                raise UserError(
                    f"lm-eval: a continuation of {len(continuation)} tokens is longer than the window "
                    f"of {self.max_length}: set max_length"
                )
            # too long a context loses its beginning, as much as its own continuation needs
            prompt = context[max(0, len(context) + len(continuation) - self.max_length - 1) :]
            place = latest.get(tuple(prompt))
            if place is not None:
                used = len(prompt) + sum(len(tokens) - 1 for tokens in groups[place][1])
                place = place if used + len(continuation) - 1 <= self.max_length else None
            if place is None:
                place = latest[tuple(prompt)] = len(groups)
                groups.append((prompt, [], []))
            groups[place][1].append(continuation)
            groups[place][2].append(i)
        return [(pack(prompt, answers), members) for prompt, answers, members in groups]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedily continued texts, up to the first stop sequence.

        Raises:
            UserError: a task that samples, or too many tokens for the window.
        """
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for members in groups.values():
            options: Any = normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks)
            if options.get("do_sample") or options.get("temperature"):
                raise UserError("lm-eval: the task samples its answers, and only greedy decoding is known")
            until = handle_stop_sequences(options.get("until"), self.tokenizer.decode(self.eot_token_id))
            room = self.max_length - options["max_gen_toks"]
            if room < 1:
                raise UserError(
                    f"lm-eval: the task generates {options['max_gen_toks']} tokens, and the window is "
                    f"{self.max_length}: lower max_gen_toks by gen_kwargs"
                )
            prompts = {i: self.tok_encode(requests[i].args[0])[-room:] for i in members}
            for chosen in _chunks(sorted(members, key=lambda i: -len(prompts[i])), self.batch_size):
                texts = self._generate([prompts[i] for i in chosen], options["max_gen_toks"], until)
                for i, text in zip(chosen, texts):
                    found[i] = postprocess_generated_text(text, until, None)
                    self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
        return found

    def _generate(self, prompts: list[list[int]], new: int, until: list[str]) -> list[str]:
        """Continuations, longer than up to the first stop sequence perhaps."""
        rows = stack([{"input_ids": p} for p in prompts])["input_ids"]
        tokens = np.zeros((self.batch_size, _length(rows.shape[1])), np.int32)
        tokens[: len(rows), : rows.shape[1]] = rows
        lengths = np.ones(self.batch_size, np.int32)
        lengths[: len(rows)] = [len(p) for p in prompts]
        state = self._start(self._params, self._members, tokens, lengths, new)
        while True:
            made = int(state.made)
            texts = [self._text(row) for row in np.asarray(state.tokens[0, : len(prompts), :made])]
            ended = np.asarray(state.done[0])
            stopped = [any(s and s in text for s in until) for text in texts]
            if made >= new or all(a or b for a, b in zip(ended, stopped)):
                return texts
            state = self._advance(self._params, self._members, state, np.int32(min(made + STEPS, new)))

    def _text(self, tokens: np.ndarray) -> str:
        """Decoded up to the first end token."""
        ends = np.flatnonzero(np.isin(tokens, self._end))
        return self.tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens, skip_special_tokens=True)


def evaluate_tasks(model: EnmpLM, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """lm-eval's metrics on some of its tasks, by task and metric.

    Args:
        model: the merged model.
        tasks: names of tasks, or task files (``.yaml``).

    Raises:
        UserError: an unknown task, one that cannot be read, or what it asks of the model.
    """
    from lm_eval.tasks import TaskManager

    simple_evaluate: Any = importlib.import_module("lm_eval").simple_evaluate  # made on demand: has no type

    chosen = [_task(name) for name in tasks]
    known = TaskManager(include_defaults=any(isinstance(task, str) for task in chosen))
    for task in chosen:
        if isinstance(task, str) and task not in known.all_tasks:
            raise UserError(f"lm-eval has no task {task!r}: lm-eval ls tasks lists them; files end in .yaml")
    try:
        found = simple_evaluate(
            model=model, tasks=chosen, task_manager=known, log_samples=False, bootstrap_iters=0
        )
    except (OSError, ValueError, KeyError) as error:  # data that is not there, a task that contradicts itself
        raise UserError(f"lm-eval: {', '.join(tasks)}: {one_line(error)}") from None
    assert found is not None
    return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """The metrics among what lm-eval says of a task (``acc,none`` is ``acc`` without a filter)."""
    return {
        k.removesuffix(",none"): v for k, v in values.items() if isinstance(v, float) and "_stderr" not in k
    }


def _task(name: str) -> str | dict[str, Any]:
    """A task's name, or the content of its file."""
    if not name.endswith(".yaml"):
        return name
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read task file {name}: {reason(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not a task file of plain YAML: {one_line(error)}") from None
    if not isinstance(content, dict) or "task" not in content:
        raise UserError(f"{name} is no task file: it has no key task")
    return content


def _score(
    backbone: Backbone, params: Params, inputs: Inputs, deltas: Deltas | None
) -> tuple[Float[Array, "batch target"], Bool[Array, "batch target"]]:
    """Log probability of every target token, and whether it is the likeliest."""

    def read(logits: Array, target: Array) -> tuple[Array, Array]:
        return causal.log_probability(logits, target), jnp.argmax(logits, axis=-1) == target

    return causal.at_answers(backbone, params, inputs, read, inputs["target_ids"], deltas=deltas)


def _length(tokens: int) -> int:
    """Few lengths, so that few programs are compiled: multiples of 16 up to 128, then of an eighth more."""
    step = max(16, 1 << max(0, tokens.bit_length() - 3))
    return -(-tokens // step) * step


def _padded(rows: list[Row], batch_size: int) -> dict[str, np.ndarray]:
    """Rows of few possible shapes; the last one is repeated to fill the batch."""
    arrays = stack(rows + [rows[-1]] * (batch_size - len(rows)))
    return {name: np.pad(a, ((0, 0), (0, _length(a.shape[1]) - a.shape[1]))) for name, a in arrays.items()}


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))

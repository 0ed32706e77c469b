"""``enmp train``: from a run file to a base model and PEFT adapters on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax import models
from enmp_jax.adapters.peft_export import save_adapter
from enmp_jax.adapters.peft_files import AdapterHeads
from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.schema import to_dict
from enmp_jax.config.sections import TaskConfig
from enmp_jax.data import Examples, load_examples, preprocess_for
from enmp_jax.data.preprocess import PlainImages
from enmp_jax.errors import UserError
from enmp_jax.evaluation.heads import load_heads
from enmp_jax.evaluation.loaded_run import checked_kind
from enmp_jax.evaluation.scoring import Heads, stack_heads
from enmp_jax.io import signals
from enmp_jax.io.checkpoints import Checkpoints, fingerprint
from enmp_jax.io.files import is_temporary, read_json, write_bytes
from enmp_jax.io.lock import NAME as LOCK
from enmp_jax.io.lock import occupied
from enmp_jax.io.progress import Progress, Reporter, advance_lines, read_lines
from enmp_jax.models import checkpoint
from enmp_jax.models.base import Backbone, Params
from enmp_jax.runs.directory import environment
from enmp_jax.training.experts import Experts, train_experts, training_steps
from enmp_jax.training.pretrain import pretrain
from enmp_jax.training.probe import fit_heads
from enmp_jax.version import __version__

Say = Callable[[str], None]


def train_run(
    run: RunConfig, out: Path, say: Say = print, advance: Callable[[Progress], None] | None = None
) -> None:
    """Train what the run file asks for: ``out/base`` (with ``pretrain``), then ``out/adapters/TASK``.

    A base or adapter that is already in ``out`` is kept, so that an interrupted run goes on. Checkpoints
    go on where nothing that the result depends on has changed; they are deleted when all is there.

    Args:
        run: the run.
        out: directory to make or to go on with.
        say: takes lines of what is done.
        advance: takes every step; default: lines of it.

    Raises:
        UserError: bad data, an unknown module, or ``out`` holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give --out a directory")
    found = list(out.iterdir()) if out.is_dir() else []
    foreign = [p.name for p in found if p.name not in _OWN and not is_temporary(p)]
    if foreign:
        raise UserError(f"{out} holds {foreign[0]!r}, which is not of a training run: choose another --out")
    reporter = Reporter(say, advance or advance_lines(say), read_lines(say))
    with occupied(out, say):
        _train(run, out, reporter)


def _train(run: RunConfig, out: Path, reporter: Reporter) -> None:
    base = run.path(run.base.model)
    if run.pretrain is not None:
        base = str(out / "base")
        if not (out / "base").exists():
            _train_base(run, out, reporter)
    backbone, params = models.load(
        base,
        dtype=run.base.dtype,
        gradient_checkpointing=run.train.gradient_checkpointing,
        quantization=run.base.quantization,
    )
    _train_adapters(run, backbone, params, base, out, reporter)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


_OWN = ("base", "adapters", "checkpoints", "training.json", "tensorboard", LOCK)


def _train_base(run: RunConfig, out: Path, reporter: Reporter) -> None:
    config = run.pretrain
    assert config is not None
    backbone = models.build(dict(config.architecture), run.base.dtype)
    height, width, channels = _image_shape(backbone)
    preprocess = PlainImages((height, width), channels)
    examples = [
        load_examples(
            task.data, "train", run.root, preprocess, progress=reporter.reading(f"{task.name}, train")
        )
        for task in config.tasks
    ]
    out.mkdir(parents=True, exist_ok=True)
    made_of = fingerprint([__version__, to_dict(config), run.base.dtype], _arrays(examples))
    with (
        Checkpoints(out / "checkpoints" / "base", made_of, say=reporter.say) as checkpoints,
        signals.saving(),
    ):
        params, losses = pretrain(
            backbone, examples, config, _stepping(reporter, "base", config.steps), checkpoints
        )
    models.save(out / "base", backbone, params)
    _record(out, "base", {"steps": config.steps, "final_loss": losses[-1] if losses else None})


def _image_shape(backbone: Backbone) -> tuple[int, int, int]:
    spec = backbone.input_spec.get("image")
    if spec is None:
        raise UserError("pretrain: only image models can be trained from random weights here")
    height, width, channels = spec[0]
    assert height is not None and width is not None and channels is not None
    return height, width, channels


def _train_adapters(
    run: RunConfig, backbone: Backbone, params: Params, base: str, out: Path, reporter: Reporter
) -> None:
    todo = [task for task in run.tasks if not (out / "adapters" / task.name).exists()]
    if not todo:
        reporter.say(f"all adapters are in {out / 'adapters'} already")
        return
    kinds = {task.name: checked_kind(task, run.root, backbone, run.base.model) for task in todo}

    def load_train(task: TaskConfig) -> Examples:
        # a choice is learnt as the completion of its right answer
        kind = "classification" if kinds[task.name] == "classification" else "completion"
        preprocess = preprocess_for(base, backbone.family, task.data, kind)
        progress = reporter.reading(f"{task.name}, train")
        found = load_examples(task.data, "train", run.root, preprocess, progress=progress)
        if kind == "completion":
            for note in found.notes:
                reporter.say(f"{task.name}, train: {note}")
        return found

    classified = [task for task in todo if kinds[task.name] == "classification"]
    answered = [task for task in todo if task not in classified]
    loaded = [(tasks, [load_train(task) for task in tasks]) for tasks in (classified, answered) if tasks]
    for tasks, examples in loaded:
        heads = (
            _heads(run, backbone, params, base, tasks, examples, reporter) if tasks is classified else None
        )
        _train_together(run, backbone, params, base, tasks, examples, heads, out, reporter)
    reporter.say(f"saved {len(todo)} adapters in {out / 'adapters'}")


def _heads(
    run: RunConfig,
    backbone: Backbone,
    params: Params,
    base: str,
    tasks: Sequence[TaskConfig],
    examples: list[Examples],
    reporter: Reporter,
) -> Heads:
    if run.train.head == "given":
        names = {task.name: e.class_names for task, e in zip(tasks, examples, strict=True)}
        return load_heads(run, {}, base, backbone, tasks=tasks, class_names=names)
    heads = _fresh_heads(backbone, examples)
    if run.train.head == "probe":
        reporter.say("fitting the heads to the base's features")
        heads = fit_heads(backbone, params, examples, heads)
    return heads


def _train_together(
    run: RunConfig,
    backbone: Backbone,
    params: Params,
    base: str,
    tasks: Sequence[TaskConfig],
    examples: list[Examples],
    heads: Heads | None,
    out: Path,
    reporter: Reporter,
) -> None:
    """Train and save the adapters of tasks whose examples have the same inputs."""
    config, steps = run.train, training_steps(run.train, examples)
    out.mkdir(parents=True, exist_ok=True)
    types = [run.base.dtype, run.base.quantization]
    settings = [__version__, to_dict(config), *types, checkpoint.base_identity(base)]
    made_of = fingerprint(settings, _arrays(examples), heads)
    folder = "adapters" if heads is not None else "completions"
    with (
        Checkpoints(out / "checkpoints" / folder, made_of, say=reporter.say) as checkpoints,
        signals.saving(),
    ):
        experts = train_experts(
            backbone, params, examples, heads, config, _stepping(reporter, "adapters", steps), checkpoints
        )
    for i, task in enumerate(tasks):
        _save_expert(out / "adapters" / task.name, experts, i, run, run.base.model)
        _record(out, task.name, {"steps": steps, "examples": len(examples[i].labels)})


def _save_expert(path: Path, experts: Experts, i: int, run: RunConfig, base: str) -> None:
    modules: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for template, (a, b) in experts.factors.items():
        for layer in range(a.shape[1]):
            modules[template.format(layer)] = (a[i, layer], b[i, layer])
    save_adapter(
        path,
        modules,
        rank=run.train.rank,
        alpha=run.train.alpha,
        base_model_name=base,
        heads=_head(experts.heads, i),  # target modules: full names, which match nothing else in any base
        task_type="CAUSAL_LM" if experts.heads is None else None,
    )


def _head(heads: Heads | None, i: int) -> AdapterHeads | None:
    if heads is None:
        return None
    weight, bias = np.asarray(heads.weight[i]), np.asarray(heads.bias[i])
    # Rows of padding go; a class that is only masked in this run keeps its row.
    n = np.flatnonzero(np.asarray(heads.allowed[i]) | weight.any(axis=1))[-1] + 1
    return {"classifier": {"weight": weight[:n], "bias": bias[:n]}}


def _arrays(examples: list[Examples]) -> list[Any]:
    return [(e.inputs, e.labels) for e in examples]


def _fresh_heads(backbone: Backbone, examples: list[Examples]) -> Heads:
    heads = []
    for e in examples:
        n_classes = len(e.class_names) or int(e.labels.max()) + 1
        heads.append((np.zeros((n_classes, backbone.width), np.float32), np.zeros(n_classes, np.float32)))
    return stack_heads(heads)


def _stepping(reporter: Reporter, what: str, steps: int) -> Callable[[int, float], None]:
    return lambda done, loss: reporter.advance(Progress(done, steps, unit="step", phase=what, loss=loss))


def _record(out: Path, name: str, entry: dict) -> None:
    path = out / "training.json"
    record = read_json(path) if path.exists() else {}
    record[name] = entry | {"environment": environment()}
    write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())

"""Where the classification heads of a run come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from enmp_jax import models
from enmp_jax.config.run_file import RunConfig
from enmp_jax.config.sections import HeadConfig, TaskConfig
from enmp_jax.data import Kind, Prompts, prompts, require_class_names
from enmp_jax.errors import UserError
from enmp_jax.evaluation.scoring import Heads, stack_heads
from enmp_jax.io import cache
from enmp_jax.models import checkpoint
from enmp_jax.models.base import Backbone
from enmp_jax.models.checkpoint import base_identity
from enmp_jax.models.clip import zero_shot_head
from enmp_jax.version import code_digest

LOGIT_SCALE = 100.0
"""Of zero-shot heads: what CLIP's learned temperature was clipped to (Radford et al., section 2.5)."""

Head = tuple[np.ndarray, np.ndarray | None]
AdapterHeads = Mapping[str, Mapping[str, np.ndarray]]  # module path -> {"weight": .., "bias": ..}


def load_heads(
    run: RunConfig,
    saved: Mapping[str, AdapterHeads],
    base: str,
    backbone: Backbone,
    tasks: Sequence[TaskConfig] | None = None,
    class_names: Mapping[str, Sequence[str]] | None = None,
    kinds: Mapping[str, Kind] | None = None,
) -> Heads:
    """The heads of a run's tasks, as their run file says; generative tasks get a row of zeros.

    Args:
        run: the run.
        saved: task -> heads saved with its adapter (``modules_to_save``).
        base: resolved directory or hub id of the base model.
        backbone: the base model.
        tasks: which tasks; default: all of the run.
        class_names: task -> names of its classes in the data, for zero-shot heads.
        kinds: task -> its kind; default: classification.

    Raises:
        UserError: no such head, a head of another width, CLIP and other heads mixed, a zero-shot
            head without text tower, class names or templates, or an adapter of a generative task that
            changes what tasks share.
    """
    tasks = run.tasks if tasks is None else tasks
    generative = [
        task for task in tasks if (kinds or {}).get(task.name, "classification") != "classification"
    ]
    for task in generative:
        _check_generative(task, saved.get(task.name, {}))
    if len(generative) == len(tasks):
        return stack_heads([_nothing(backbone)] * len(tasks))
    zero_shot = [task.head.source == "zero-shot" for task in tasks if task not in generative]
    if any(zero_shot) and not all(zero_shot):
        odd = tasks[zero_shot.index(False)].name
        raise UserError(f"tasks.{odd}.head: zero-shot heads cannot be mixed with others in one run")
    if any(zero_shot):
        found = _zero_shot(tasks, base, class_names or {})
    else:
        found = [
            _nothing(backbone) if task in generative else _load(run, task, saved.get(task.name, {}), base)
            for task in tasks
        ]
    for task, (weight, _) in zip(tasks, found, strict=True):
        if weight.shape[1] != backbone.width:
            raise UserError(
                f"the head of {task.name!r} takes {weight.shape[1]} features, "
                f"the base model gives {backbone.width}"
            )
    masked = [task.head.masked_classes for task in tasks]
    if any(zero_shot):
        return stack_heads(found, masked, normalise=True, logit_scale=LOGIT_SCALE)
    return stack_heads(found, masked)


def _nothing(backbone: Backbone) -> Head:
    return np.zeros((1, backbone.width), np.float32), None


def _check_generative(task: TaskConfig, saved: AdapterHeads) -> None:
    if task.head != HeadConfig():
        raise UserError(f"tasks.{task.name}.head: a generative task has no head; leave it out")
    if saved:
        raise UserError(
            f"the adapter of {task.name!r} saved {next(iter(saved))} of its own, and generative tasks share "
            "the base's: train again without modules_to_save and without added tokens"
        )


def _zero_shot(
    tasks: Sequence[TaskConfig], base: str, class_names: Mapping[str, Sequence[str]]
) -> list[Head]:
    """Heads made of prompts by the text tower of the base's checkpoint, kept in the cache on disk."""
    chosen = [_prompts(task, class_names.get(task.name, ())) for task in tasks]
    directory = checkpoint.find(base)
    if checkpoint.read_json(directory / "config.json").get("model_type") != "clip":
        raise UserError(
            f"tasks.{tasks[0].name}.head: zero-shot heads need the text tower of a whole CLIP, and "
            f"{base} has none"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{base}: its tokenizer cannot be loaded ({reason})") from None
    heads: list[Head] = []
    made: dict[str, np.ndarray] = {}
    tower: tuple[Backbone, models.Params] | None = None
    for names, templates in chosen:
        key = cache.key("zero-shot", code_digest(), base_identity(base), _digest(directory), names, templates)
        if key not in made:
            found = cache.read_array("heads", key)
            if found is None:
                tower = tower or models.load(base, family="clip_text_model")  # float32: done once
                found = zero_shot_head(tower[0], tower[1], names, templates, tokenizer, logit_scale=1.0)
                cache.write_array("heads", key, found)
            made[key] = found
        heads.append((made[key], None))
    return heads


def _digest(directory: Path) -> str:
    """Hash of the tokenizer's files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in (path for kind in ("*.json", "*.txt", "*.model") for path in sorted(directory.glob(kind))):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _prompts(task: TaskConfig, class_names: Sequence[str]) -> Prompts:
    """Class names and templates of a task: packaged ones by name, else the data's and the run file's."""
    where, head = f"tasks.{task.name}.head", task.head
    if head.prompts is not None:
        if head.templates:
            raise UserError(f"{where}: give either prompts or templates")
        packaged = prompts(head.prompts)
        return packaged._replace(class_names=tuple(task.data.class_names) or packaged.class_names)
    if not head.templates:
        raise UserError(
            f"{where}: a zero-shot head needs prompts: NAME (packaged), or templates with {{}} for the "
            "class name"
        )
    return Prompts(require_class_names(class_names, where), head.templates)


def _load(run: RunConfig, task: TaskConfig, saved: AdapterHeads, base: str) -> Head:
    config: HeadConfig = task.head
    if config.source == "adapter":
        return _from_adapter(task, saved)
    if config.source == "base":
        head = models.load_head(base)
        if head is None:
            raise UserError(f"tasks.{task.name}.head: the base model {base} has no head of its own")
        return np.asarray(head[0]), None if head[1] is None else np.asarray(head[1])
    return _from_file(task, run.path(config.source))


def _from_adapter(task: TaskConfig, saved: AdapterHeads) -> Head:
    usable = {name: head for name, head in saved.items() if head.get("weight", np.zeros(0)).ndim == 2}
    if len(usable) != 1:
        found = "no head" if not usable else f"{len(usable)} heads ({', '.join(usable)})"
        raise UserError(
            f"the adapter of {task.name!r} has {found} among its saved modules: "
            f"set tasks.{task.name}.head.source to base, zero-shot or a safetensors file"
        )
    (head,) = usable.values()
    return np.asarray(head["weight"], np.float32), _optional(head.get("bias"))


def _from_file(task: TaskConfig, path: str) -> Head:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"tasks.{task.name}.head: cannot read {path}: {error}") from None
    if "weight" not in tensors or tensors["weight"].ndim != 2:
        raise UserError(f"tasks.{task.name}.head: {path} needs a tensor 'weight' [classes, width]")
    return tensors["weight"].astype(np.float32), _optional(tensors.get("bias"))


def _optional(bias: np.ndarray | None) -> np.ndarray | None:
    return None if bias is None else np.asarray(bias, np.float32)

"""The sections of a run file, as frozen dataclasses: every key, its type, its default and what it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


def _whole(value: str, move: Callable[[str], str]) -> str:
    return move(value)


def _after_kind(value: str, move: Callable[[str], str]) -> str:
    """``KIND:PATH``; names of TFDS are no paths, those of hubs may end in configuration and revision."""
    kind, colon, name = value.partition(":")
    if not colon or kind in ("tfds", "package"):
        return value
    end = min((i for i in map(name.find, "@:") if i >= 0), default=len(name)) if kind == "hf" else len(name)
    return f"{kind}:{move(name[:end])}{name[end:]}"


def _head(value: str, move: Callable[[str], str]) -> str:
    return value if value in ("adapter", "zero-shot", "base") else move(value)


# how a relative path in a field is rewritten where another run file extends its own
_PATH, _SOURCE, _HEAD = ({"path": rewrite} for rewrite in (_whole, _after_kind, _head))


@dataclass(frozen=True)
class BaseConfig:
    """The base model: a directory in Hugging Face layout, a hub id, or a GGUF file of llama.cpp."""

    model: str = field(metadata=_PATH)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the backbone; norms, softmax and logits stay in float32."""
    allow_mismatch: bool = False
    """Accept adapters that name another base model."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Keep the base model's matrices in 8 or 4 bits on the device, to search on what will serve."""


@dataclass(frozen=True)
class DataConfig:
    """Where a task's examples come from. Splits are disjoint; ``train`` is for ``enmp train`` only."""

    source: str = field(metadata=_SOURCE)
    """``npz:FILE``, ``tfds:NAME``, ``hf:NAME``, ``folder:DIR`` or ``jsonl:FILE``."""
    train: str | None = None
    """A split with an optional slice, as in TFDS: ``train[:80%]``, ``validation[100:]``."""
    search: str | None = None
    selection: str | None = None
    test: str | None = None
    data_dir: str | None = field(default=None, metadata=_PATH)
    """TFDS data directory; default: TFDS's own."""
    image: str | None = None
    """Key of the image; default: found from the data."""
    text: tuple[str, ...] = ()
    """Keys of the text and, for pairs, the second text."""
    label: str | None = "label"
    """Key of the label. Data without one are unlabelled, unless another key than the default is named;
    null: ignore the labels that there are. Scores on unlabelled splits are agreement with the experts."""
    pretext: str | None = None
    """Compute the label from the image: ``rotation`` or ``ink:ROW,COLUMN`` (``data.pretexts``)."""
    transforms: tuple[str, ...] = ()
    """Applied to images in this order: rotate90, rotate180, rotate270, mirror, flip, invert, occlude."""
    labels: tuple[int, ...] | None = None
    """Label map: class k of the source becomes ``labels[k]``; -1 leaves its examples out."""
    class_names: tuple[str, ...] = ()
    max_length: int = 128
    """Tokens; longer texts and answers are truncated and counted, longer prompts and choices refused."""
    template: str | None = None
    """choice, completion: the text with ``{prompt}`` (and other keys of the data), and maybe ``{answer}`` at
    its end; default: ``{prompt} {answer}``."""
    chat: bool = False
    """choice, completion: ask by the tokenizer's chat template, as a user; ``messages`` data always do."""
    choice_norm: Literal["none", "token", "character"] = "none"
    """choice: compare log-likelihoods (lm-eval's acc), or those per token or per character (acc_norm)."""
    skip_bad: bool = False
    """Leave out images that do not decode, instead of stopping."""
    duplicates: Literal["refuse", "drop"] = "refuse"
    """What to do when a split repeats the content of one that must be kept clean: stop, or leave the
    repeated examples out of it (out of train before search before selection, never out of test)."""


@dataclass(frozen=True)
class HeadConfig:
    """What turns features into class scores."""

    source: str = field(default="adapter", metadata=_HEAD)
    """``adapter`` (saved by PEFT's modules_to_save), ``zero-shot`` (CLIP prompts), ``base`` (the base
    model's own), or a safetensors file with ``weight`` [classes, width] and, optionally, ``bias``."""
    prompts: str | None = None
    """Packaged class names and templates for ``zero-shot``: ``stanford_cars``, ``dtd``, ..."""
    templates: tuple[str, ...] = ()
    """Prompts with ``{}`` for the class name, for ``zero-shot``; the names are those of the data."""
    masked_classes: tuple[int, ...] = ()
    """Classes never predicted (two-way NLI in a three-way head)."""


@dataclass(frozen=True)
class TaskConfig:
    """One task: an adapter, its data and its head."""

    name: str
    adapter: str = field(metadata=_PATH)
    """PEFT directory or hub id (``name@revision``)."""
    data: DataConfig
    head: HeadConfig = HeadConfig()
    kind: Literal["classification", "choice", "completion"] | None = None
    """classification by a head; choice: which of the given answers is likeliest; completion: how likely the
    answer's tokens are. Default: found from the data (``choices``; ``prompt`` and ``answer``;
    ``messages``)."""
    metrics: tuple[Literal["exact_match", "contains", "chrf"], ...] = ()
    """completion: generate answers of the split that is scored, and compare them with the right ones."""
    reference: float | None = None
    """Score of the unmerged adapter on the test split, 0..1: accuracy, or of a completion task exp(-loss);
    default: measured."""


@dataclass(frozen=True)
class MergeConfig:
    """The merge method. All other keys of the section are hyperparameters of that method, which knows
    their names and ranges (``merges.make`` checks them)."""

    method: str = "ties"
    space: Literal["full", "knots", "core"] = "full"
    scale: float | Literal["auto"] = "auto"
    """Merge coefficient; ``auto``: the best of ``scale_grid`` on the search split, nothing pruned."""
    scale_grid: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0)
    isotropize: bool = False
    seed: int | None = None
    task_weights: tuple[float, ...] | None = None
    statistics: str | None = field(default=None, metadata=_PATH)
    """Of regmean and fisher: a file of ``enmp statistics``."""
    # mappings have no hash; equal configs still have equal hashes
    hyperparameters: Mapping[str, Any] = field(default_factory=dict, hash=False, metadata={"rest": "method"})

    def arguments(self) -> dict[str, Any]:
        """What is given to ``merges.make`` beside method, space and isotropize."""
        given = {"seed": self.seed, "task_weights": self.task_weights, "statistics": self.statistics}
        given |= self.hyperparameters
        return {name: value for name, value in given.items() if value is not None}

    def recipe(self) -> dict[str, Any]:
        """All that makes the merge again but its scale, as ``mask.json`` and cards have it."""
        return {"method": self.method, "space": self.space, "isotropize": self.isotropize, **self.arguments()}


@dataclass(frozen=True)
class RefineConfig:
    """The last rung: one LoRA for all tasks, trained from the merged model on the search split."""

    rank: int = 8
    steps: int = 200
    """At most: with few examples the selection split stops it long before."""
    learning_rate: float = 2e-3
    fitness: str = "expert_kl"
    """What it maximises; any fitness that has a gradient. Those of the experts need no labels."""
    check_every: int = 10
    """Steps between looks at the selection split, whose best point is kept."""
    patience: int = 4
    """Looks without a better value after which it stops."""
    cross_fit: bool = False
    """A second LoRA follows the selection split and is judged by the search split; half of each is added, as
    one of twice the rank. A step costs twice as much."""


@dataclass(frozen=True)
class SearchConfig:
    """The search for modules to prune, or for weights of modules."""

    strategy: str = "cma_es"
    """cma_es (the paper's), sep_cma_es, snes, de, bit_flip, swap, greedy, random; or gradient: weights."""
    population: int = 8
    generations: int = 30
    """With ``gradient``: steps."""
    sigma0: float = 0.5
    """First standard deviation of the genes. An ``x0`` of auto moves along with it, and masks stay the same;
    only a searched scale still depends on it."""
    x0: float | Literal["auto"] = "auto"
    """Start of every gene (the paper: -1); auto: so that about half of ``max_pruned`` are pruned at first."""
    threshold: float = 0.0
    max_pruned: float = 0.2
    """Largest share of modules that may be pruned."""
    granularity: Literal["layer", "projection"] = "layer"
    fitness: str = "margin"
    """What is maximised on the search split: accuracy (the paper's), probability, margin, log_likelihood,
    calibrated; without labels expert_margin, expert_probability, expert_kl, expert_hidden, entropy."""
    objective: Literal["mean", "worst", "pareto"] = "mean"
    """Over tasks: the mean, the worst task, or the front of both."""
    importance: Mapping[str, float] | None = None
    """Weights of tasks in the mean; default: 1 each."""
    fidelity: Literal["none", "racing"] = "none"
    """racing: run a mask on more examples only while it may still be the best of its generation; needs the
    objective ``mean``."""
    rungs: tuple[float, ...] = (0.125, 0.5, 1.0)
    """racing: shares of the search split after which masks that are clearly behind drop out."""
    start: Literal["none", "first_order", "leave_one_out"] = "none"
    """What a search of masks knows beforehand about every module."""
    search_scale: bool = False
    """Let the search choose the merge coefficient too."""
    budget: int | None = None
    """Most example-evaluations of each search (forward passes of one example); default: no limit."""
    patience: int | None = None
    """Generations (with ``gradient``: looks at the selection split) without a better fitness after which a
    search stops; default: none, with ``gradient`` 5."""
    learning_rate: float = 0.08
    """gradient: of Adam."""
    max_weight: float = 3.0
    """gradient: largest weight of a module."""
    penalty: float = 0.0
    """gradient: times the mean squared distance of the weights from 1 is subtracted from the fitness."""
    check_every: int = 2
    """gradient: steps between looks at the selection split."""
    cross_fit: bool = False
    """gradient: a second search follows the selection split and is judged by the search split; the mean of
    both is found. For few examples; a step costs twice as much, and ``refine`` has no split left that was
    not followed, so that it may stop too early."""
    harden: Literal["none", "prune"] = "none"
    """gradient: leave the weights as they are, or make a mask of them (with a short local search)."""
    refine: RefineConfig | None = None
    """Train one LoRA from the merged model afterwards; default: no."""
    finalists: int = 8
    """Best distinct masks of the search that the selection split decides between."""
    seed: int = 0
    seeds: int = 1
    """Searches with the seeds seed, seed + 1, ..; the selection split decides between all finalists."""
    generations_per_dispatch: int = 1
    checkpoint_every: int = 5
    """Generations between checkpoints."""


@dataclass(frozen=True)
class ExportConfig:
    """What a search hands over, and the defaults of ``enmp export``."""

    formats: tuple[Literal["adapters", "peft", "checkpoint", "delta", "gguf"], ...] = ("adapters", "peft")
    """``adapters``: each task's own, pruned or weighted; ``peft``: the merge as one adapter;
    ``checkpoint``: the base model with the merge in it; ``delta``: what the merge adds to the base;
    ``gguf``: as ``peft``, for llama.cpp."""
    rank: int | None = None
    """peft, gguf: largest rank, whatever the error; default: as high as the tolerance needs."""
    tolerance: float = 0.01
    """peft, gguf: relative error (Frobenius norm) that a merge without low rank may have. Low-rank merges are
    exact. Where ``rank`` is too small for it, the exported model is scored too."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """checkpoint: type of the weights; default: the base's."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How examples are batched and devices used."""

    batch_size: int = 128
    search_examples: int | None = None
    """Examples per task of the search split; default: all."""
    selection_examples: int | None = None
    test_examples: int | None = None
    seed: int = 0
    """Of the search and selection splits: 0: as the tasks name them; other numbers draw both anew from what
    they hold together. The test split stays."""
    member_chunk: int | None = None
    """Members merged and scored together on a device; default: what memory, and a CPU's caches, bear."""
    mesh: Mapping[str, int] | None = None
    """Devices along ``population``, ``data`` and ``model``; default: chosen."""


@dataclass(frozen=True)
class TrainConfig:
    """``enmp train``: LoRA experts, or with ``base`` a base model, by AdamW with a cosine schedule."""

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: float = 0.05
    """Share of the steps."""
    weight_decay: float = 0.01
    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ()
    """Last parts of module names; default: the attention projections."""
    epochs: float | None = None
    """Passes over the largest task's examples, instead of ``steps``."""
    gradient_checkpointing: bool = False
    """Keep no activations of a layer for the backward pass but compute them again: slower, in less memory."""
    head: Literal["train", "probe", "given"] = "train"
    """Train the head with the LoRA; fit it to the base's features first and keep it fixed; or keep
    the task's given head."""
    head_learning_rate: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class PretrainConfig:
    """``enmp train``: make the base model itself from random weights, on classification tasks."""

    architecture: Mapping[str, Any]
    """A Hugging Face ``config.json`` (``model_type`` and sizes)."""
    tasks: tuple[PretrainTask, ...] = ()
    steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class PretrainTask:
    """A named classification data set for pretraining."""

    name: str
    data: DataConfig

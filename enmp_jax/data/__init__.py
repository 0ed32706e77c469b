"""Data: sources, preprocessing, disjoint splits and fixed-shape batches.

May import ``models`` and all below it; knows nothing of adapters and masks.
"""

from enmp_jax.data.base import Examples, Preprocess, Raw, Source, Span, Split
from enmp_jax.data.batches import Batches, Order, arrangement, batch, batch_rows
from enmp_jax.data.clip_prompts import Prompts, prompts
from enmp_jax.data.labels import require_class_names
from enmp_jax.data.layout import Kind, kind_of
from enmp_jax.data.load import load_examples, open_source, task_kind
from enmp_jax.data.preprocess import preprocess_for
from enmp_jax.data.splits import check_splits, leaks, redraw

__all__ = [
    "Batches", "Examples", "Kind", "Order", "Preprocess", "Prompts", "Raw", "Source", "Span", "Split",
    "arrangement", "batch", "batch_rows", "check_splits", "kind_of", "leaks", "load_examples",
    "open_source", "preprocess_for", "prompts", "redraw", "require_class_names", "task_kind",
]  # fmt: skip

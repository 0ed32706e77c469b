"""Data: sources, preprocessing, disjoint splits and fixed-shape batches."""

from enmp_jax.data.base import Examples, Preprocess, Raw, Source, Span
from enmp_jax.data.batches import Batches, batch
from enmp_jax.data.load import load_examples, open_source

__all__ = [
    "Batches",
    "Examples",
    "Preprocess",
    "Raw",
    "Source",
    "Span",
    "batch",
    "load_examples",
    "open_source",
]

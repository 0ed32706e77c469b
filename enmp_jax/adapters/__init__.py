"""Adapters in, adapters and models out: PEFT, transformers and vLLM.

May import ``models``, ``lora``, ``deltas``, ``masks`` and all below them.
"""

from enmp_jax.adapters.peft_import import Adapter, LoadedAdapters, load_adapters, read_adapter, save_adapter

__all__ = ["Adapter", "LoadedAdapters", "load_adapters", "read_adapter", "save_adapter"]

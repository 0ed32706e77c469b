"""Merged or pruned LoRA factors -> PEFT adapters that load in PEFT, transformers and vLLM."""

from enmp_jax.adapters.peft_files import save_adapter

__all__ = ["save_adapter"]

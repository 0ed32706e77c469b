"""LoRA experts, small bases and the refinement of a merge, with optax.

May import ``evaluation`` and all below it.
"""

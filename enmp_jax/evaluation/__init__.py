"""Masks to merged deltas to scores in one compiled call; heads, experts, fitness kinds, budgets.

May import ``adapters``, ``data`` and all below them; knows nothing of run directories.
"""

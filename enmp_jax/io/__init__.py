"""Files written whole or not at all, shards, hub, checkpoints, cache, progress.

May import ``errors`` and ``version``.
"""

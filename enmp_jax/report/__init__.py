"""What a run found, for people: data, tables, terminal, plots, page.

May import ``config``, ``io``, ``devices``, ``errors`` and ``version``: it reads files, not runs.
"""

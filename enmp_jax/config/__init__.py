"""Run files: frozen dataclasses, their checks, and how files extend each other.

May import ``io``, ``errors`` and ``version``.
"""

"""Mesh, processes, matrix products and FLOPs.

May import ``io``, ``errors`` and ``version``.
"""

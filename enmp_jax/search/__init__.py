"""Search over masks: evolution strategies, the loop, the archive, and the controls to compare with.

May import ``masks``, ``devices``, ``io`` and ``errors``; knows genomes and fitness, no models.
"""

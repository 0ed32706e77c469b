"""What a command does (search, evaluate, train, refine, plan), and the run directory.

May import ``training``, ``evaluation`` and all below them; knows nothing of the command line.
"""

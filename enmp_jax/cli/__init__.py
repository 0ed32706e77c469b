"""The command line, one file a command: parse, call, print.

May import every room but ``api``.
"""

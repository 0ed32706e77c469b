"""Packaged run files, small bases and experts, and the scripts that made them.

No room may import it: its files are read by path.
"""

"""Other people's tools, given our models: each file needs its own package, none of them installed with us.

May import everything but ``cli`` and ``api``.
"""

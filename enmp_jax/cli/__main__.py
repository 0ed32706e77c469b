"""``python -m enmp_jax.cli``."""

import sys

from enmp_jax.cli.main import main

sys.exit(main())

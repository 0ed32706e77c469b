"""Runs eight_devices.py in a process that pretends to have 8 devices."""

import os
import subprocess
import sys
from pathlib import Path

FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Compiling takes nearly all of the time here."""


def test_on_eight_devices():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "eight_devices.py"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(here), "XLA_FLAGS": FAST}
    ran = subprocess.run(
        command, cwd=here, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout

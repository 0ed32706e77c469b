"""Fixtures that several rooms share; every test process has its own cache."""

import gc
import os
import tempfile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["ENMP_CACHE"] = tempfile.mkdtemp(prefix="enmp-test-cache-")
# Most of the time goes into compiling programs that run once: LLVM need not optimise them. (Benchmarks, the
# wheel's check and the notebook run what users run.) And tracing allocates much that is no garbage.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
gc.set_threshold(10_000, 10, 10)

import dataclasses
import getpass
import logging
from importlib.metadata import version
from pathlib import Path

import jax
import pytest
import type_checks

type_checks.install()

# ruff: noqa: E402 (the checks go first)
from adapter_files import keep, loaded  # noqa: F401 (fixtures of the tests of adapters)

from enmp_jax.config import run_file
from enmp_jax.config.sections import MergeConfig

# Compiled programs are shared by the test processes and kept between runs.
_XLA = Path(tempfile.gettempdir()) / f"enmp-test-xla-{getpass.getuser()}-{version('jaxlib')}"
jax.config.update("jax_compilation_cache_dir", str(_XLA))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def demo_run():
    """The packaged demo, with few examples and a short search of masks."""
    run = run_file.load(run_file.SUITES / "demo.yaml")
    return dataclasses.replace(
        run,
        search=dataclasses.replace(
            run.search,
            strategy="cma_es",
            granularity="layer",
            fitness="log_likelihood",
            x0=-1.0,
            population=4,
            generations=3,
            seeds=1,
            finalists=3,
            sigma0=1.0,
            checkpoint_every=1,
        ),
        evaluation=dataclasses.replace(
            run.evaluation, batch_size=30, search_examples=10, selection_examples=8, test_examples=9
        ),
        merge=MergeConfig("ties", scale_grid=(0.3, 0.6), hyperparameters={"density": 0.4}),
    )


@pytest.fixture(scope="session")
def demo_loaded(demo_run):
    """The demo, loaded."""
    from enmp_jax.evaluation.loaded_run import load

    return load(demo_run)


@pytest.fixture(scope="session")
def demo_evaluator(demo_loaded):
    """The demo, ready to score masks."""
    from enmp_jax.evaluation.evaluator import Evaluator

    return Evaluator(demo_loaded)


@pytest.fixture
def compilations(caplog):
    """How often XLA compiled a function of a name within this test: ``compilations("evaluate")``."""
    with jax.log_compiles(), caplog.at_level(logging.DEBUG):
        yield lambda name: sum(f"Finished XLA compilation of jit({name})" in m for m in caplog.messages)

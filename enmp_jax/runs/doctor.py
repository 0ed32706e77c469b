"""``enmp doctor``: whether this machine can do the work, and one line of what to do for each thing amiss."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import time
import urllib.request
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from enmp_jax import merges
from enmp_jax.errors import one_line
from enmp_jax.evaluation.budget import device_memory
from enmp_jax.io import cache
from enmp_jax.lora import LoraStack, stack_adapters
from enmp_jax.masks import MaskSpec
from enmp_jax.search import loop, strategies
from enmp_jax.version import __version__

GIB = 2**30
LEAST_MEMORY = 2 * GIB
"""The demo and the small suites run in less; a language model of 135 M parameters does not."""
LEAST_DISK = GIB
HUB_SECONDS = 3.0


class Finding(NamedTuple):
    """One thing looked at.

    Attributes:
        name: what.
        ok: False: commands will fail; None: they work, but something is worth knowing.
        found: what is there.
        fix: what to do, where not all is well.
    """

    name: str
    ok: bool | None
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at everything; a look that fails is a finding itself."""
    looks: dict[str, Callable[[], Finding]] = {
        "versions": versions, "devices": devices, "memory": memory, "cache": cache_directory, "hub": hub,
        "BLAS threads": blas_threads, "self-test": self_test,
    }  # fmt: skip
    return [_guarded(name, look) for name, look in looks.items()]


def _guarded(name: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:  # whatever is broken here is what the doctor is asked about
        return Finding(name, False, f"{type(error).__name__}: {one_line(error)}", "see the line before")


def versions() -> Finding:
    """Python and the packages that enmp-jax needs, against what it declares."""
    from packaging.requirements import Requirement

    found = f"enmp-jax {__version__}, Python {platform.python_version()}, jax {jax.__version__}"
    wrong, install = [], []
    for text in metadata.requires("enmp-jax") or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            there = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            there = None
        if there is None or not needed.specifier.contains(there, prereleases=True):
            wrong.append(f"{needed.name} {there or 'is missing'}")
            install.append(f"'{needed.name}{needed.specifier}'")
    if not wrong:
        return Finding("versions", True, found)
    fix = f"pip install --upgrade {' '.join(install)}"
    return Finding("versions", False, f"{found}; {', '.join(wrong)}", fix)


def devices() -> Finding:
    """The devices of JAX, and whether this machine has others that it does not see."""
    kinds = [device.device_kind for device in jax.local_devices()]
    found = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    found = f"{jax.default_backend()}: {found}"
    if jax.default_backend() != "cpu":
        return Finding("devices", True, found)
    for paths, extra in ((("/dev/nvidia0",), "cuda"), (("/dev/accel0", "/dev/vfio/0"), "tpu")):
        if any(map(os.path.exists, paths)):
            fix = f"pip install '.[{extra}]' in the checkout, or unset JAX_PLATFORMS"
            return Finding("devices", None, f"{found}, though this machine has an accelerator", fix)
    return Finding("devices", True, found)


def memory() -> Finding:
    """Memory of a device, and what of the machine's is free."""
    device, free = device_memory(), _available()
    found = f"{device / GIB:.1f} GiB to a device" + (f", {free / GIB:.1f} GiB free here" if free else "")
    if min(device, free or device) < LEAST_MEMORY:
        fix = "end other programs, or set evaluation.batch_size and evaluation.member_chunk low"
        return Finding("memory", None, found, fix)
    return Finding("memory", True, found)


def _available() -> int | None:
    """Free bytes of the machine's memory; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in sizes else None


def cache_directory() -> Finding:
    """Whether the cache can be written to, and has room."""
    path = cache.directory()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not os.access(there, os.W_OK):
        fix = "set ENMP_CACHE to a directory of yours"
        return Finding("cache", False, f"{path} cannot be written to", fix)
    free = shutil.disk_usage(there).free
    found = f"{path}, {free / GIB:.1f} GiB free"
    if free < LEAST_DISK:
        return Finding("cache", None, found, "free some space, or set ENMP_CACHE to another disk")
    return Finding("cache", True, found)


def hub() -> Finding:
    """Whether the Hugging Face hub answers; local files and what was downloaded need none of it."""
    constants = importlib.import_module("huggingface_hub.constants")
    token = importlib.import_module("huggingface_hub").get_token()
    who = "with a token" if token else "without a token (gated models need HF_TOKEN)"
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", True, "HF_HUB_OFFLINE is set: only what is in the hub's cache is used")
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
    except (OSError, ValueError) as error:
        found = f"{constants.ENDPOINT} does not answer ({one_line(error, 80)})"
        fix = "check the network or HF_ENDPOINT; local files, and what the hub's cache holds, work without"
        return Finding("hub", None, found, fix)
    return Finding("hub", True, f"{constants.ENDPOINT} answers, {who}")


def blas_threads() -> Finding:
    """One thread of BLAS is fastest: see ``enmp_jax/__init__.py``."""
    given = os.environ.get("OPENBLAS_NUM_THREADS", "")
    if given == "1" or jax.default_backend() != "cpu":
        return Finding("BLAS threads", True, given or "not set, and no CPU searches here")
    return Finding("BLAS threads", None, f"OPENBLAS_NUM_THREADS={given}", "export OPENBLAS_NUM_THREADS=1")


def self_test() -> Finding:
    """A merge and a search in memory whose answer is known: the modules that a target lacks are found."""
    start = time.perf_counter()
    stack, wrong = _problem()
    spec = MaskSpec.of(stack, max_pruned=0.5)
    method = merges.sum()
    ingredients = method.prepare(stack)
    target = spec.keep_from_pruned(wrong)

    def merged(keep: jax.Array) -> list[jax.Array]:
        return [delta.materialise() for delta in method.merge(ingredients, keep, 1.0).values()]

    wanted = jax.jit(merged)(jnp.asarray(target))

    def score(genomes: jax.Array, memory: tuple) -> tuple[_Distances, tuple]:
        def one(genome: jax.Array) -> jax.Array:
            apart = [jnp.square(a - b).sum() for a, b in zip(merged(spec.decode(genome)), wanted)]
            return jnp.stack(apart).sum()

        return _Distances(-jax.vmap(one)(genomes)), memory

    strategy = strategies.build("greedy", spec.genome_size, spec.n_modules, 0.5, max_count=spec.max_count)
    result = loop.run(loop.make_step(strategy, score), jax.random.key(0), spec.start(-1.0), 4)
    fitness = result.scores.fitness.reshape(-1)
    best = result.genomes.reshape(fitness.size, -1)[int(np.argmax(fitness))]
    seconds = time.perf_counter() - start
    if not np.array_equal(np.asarray(spec.decode(jnp.asarray(best))), target) or fitness.max() < -1e-3:
        found = f"a search with a known answer found another (distance {-fitness.max():.2g})"
        return Finding("self-test", False, found, "try JAX_PLATFORMS=cpu; if that works, report it")
    return Finding("self-test", True, f"a merge and a search found the known answer in {seconds:.1f} s")


class _Distances(NamedTuple):
    fitness: jax.Array


def _problem() -> tuple[LoraStack, list[tuple[int, str]]]:
    """Two adapters of three layers, and the modules that the merge of the target lacks."""
    rng = np.random.default_rng(0)
    adapters = {
        task: {
            f"layers.{layer}.q_proj": (
                rng.normal(size=(2, 8)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)
            )
            for layer in range(3)
        }
        for task in ("a", "b")
    }  # fmt: skip
    return stack_adapters(adapters), [(0, "b"), (2, "a")]

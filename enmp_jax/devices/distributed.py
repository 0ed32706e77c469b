"""Several processes, one program: who joins, who writes, and where they wait for each other.

Every process runs the same command. What they hold is the same; the mesh spans all their devices;
process 0 alone writes files.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

from enmp_jax.devices import survivor
from enmp_jax.errors import Stopped, UserError, one_line
from enmp_jax.io import signals

T = TypeVar("T")
HEARTBEAT_SECONDS = 30
"""A process that was not heard of for so long is dead, and the others end."""


class Job(NamedTuple):
    """How to join: all three given, or all None where JAX finds them by itself."""

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None


def find_job(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Job | None:
    """The job this process belongs to, or None for a process alone.

    From the arguments; else ``ENMP_COORDINATOR``, ``ENMP_PROCESSES`` and ``ENMP_PROCESS_ID``; else, where
    JAX knows the cluster (a SLURM or MPI step of several tasks, a TPU pod, or ``ENMP_DISTRIBUTED=1``), by
    ``jax.distributed.initialize()`` itself.

    Raises:
        UserError: only some of the three are given, or they are no numbers or out of range.
    """
    env = os.environ if environment is None else environment
    given = {
        "coordinator": coordinator or env.get("ENMP_COORDINATOR"),
        "processes": env.get("ENMP_PROCESSES") if processes is None else processes,
        "process-id": env.get("ENMP_PROCESS_ID") if process_id is None else process_id,
    }
    missing = [f"--{name}" for name, value in given.items() if value in (None, "")]
    if len(missing) < 3:
        if missing:
            raise UserError(f"a job of several processes needs {' and '.join(missing)} too")
        return _checked(str(given["coordinator"]), given["processes"], given["process-id"])
    slurm = int(env.get("SLURM_STEP_NUM_TASKS", "1") or 1) > 1 and "SLURM_PROCID" in env
    mpi = int(env.get("OMPI_COMM_WORLD_SIZE", "1") or 1) > 1
    pod = "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env
    return Job() if slurm or mpi or pod or env.get("ENMP_DISTRIBUTED") == "1" else None


def _checked(coordinator: str, processes: Any, process_id: Any) -> Job:
    try:
        count, index = int(processes), int(process_id)
    except ValueError:
        raise UserError(f"processes {processes!r} and process-id {process_id!r} must be numbers") from None
    if not 0 <= index < count:
        raise UserError(f"process-id {index} is not in 0..{count - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"coordinator {coordinator!r} must be HOST:PORT, the same for every process")
    return Job(coordinator, count, index)


def initialize(job: Job | None) -> None:
    """Join the job; must come before anything else asks JAX for its devices.

    Raises:
        UserError: the other processes cannot be reached, or JAX does not know this cluster.
    """
    if job is None:
        return
    import jax

    if jax.distributed.is_initialized():
        return
    survivor.aborts_with_a_line()
    try:
        jax.distributed.initialize(*job, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the other processes ({one_line(error)}): give --coordinator HOST:PORT, "
            "--processes N and --process-id I"
        ) from None


def barrier(name: str) -> None:
    """Wait until every process is here."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def told_to_end(step: int) -> int:
    """The number of the signal that told the job to end, 0 if none did; asked by every process at every step.

    Several processes hear of it at the same step, whichever of them was told.
    """
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return signals.received()
    return int(signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else 0


def all_or_none(work: Callable[[], T]) -> T:
    """Run ``work`` on every process; if any of them fails, all stop with a line instead of waiting for ever.

    Raises:
        UserError: that another process stopped.
        Exception: what this process itself raised, whatever it was.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return work()
    error: Exception | Stopped | None = None
    result: T | None = None
    try:
        result = work()
    except (Exception, Stopped) as caught:
        error = caught
    failed = np.asarray(multihost_utils.process_allgather(np.asarray(error is not None)))
    if error is not None:
        raise error
    if failed.any():
        raise UserError(f"process {int(failed.argmax())} stopped: its own message says why")
    return cast(T, result)


def put(tree: Any, sharding: Any) -> Any:
    """Put arrays that every process holds whole on the mesh; each process copies only its own slices."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x if x.sharding == sharding else jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = one(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree)

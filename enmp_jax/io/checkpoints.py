"""Checkpoints: a pytree of arrays by step, believed only when it is whole and of the same settings."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from enmp_jax.errors import Stopped, UserError, one_line, reason


class Restored(NamedTuple):
    """What a checkpoint holds."""

    step: int
    tree: Any
    """As it was saved; arrays live where those of ``like`` do."""
    meta: dict[str, Any]


class OtherSettings(UserError):
    """The checkpoints there are of another fingerprint."""


def fingerprint(settings: Any, *trees: Any) -> str:
    """Hash of what made a checkpoint: settings that JSON can hold, and pytrees of arrays by content."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=20)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        array = _host(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class Checkpoints:
    """The newest checkpoints in a directory of their own; backed by orbax.

    A context manager: saves go on in the background, and one still on its way would fight with those of
    a run that resumes. Several processes call every method together and hold the same arrays, whole.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        max_to_keep: int = 2,
        say: Callable[[str], None] = print,
    ):
        """Open the directory, or make it.

        Args:
            path: the directory.
            fingerprint: see ``fingerprint``.
            max_to_keep: older checkpoints are deleted, but for the best one.
            say: told of every checkpoint that cannot be used.

        Raises:
            UserError: the directory cannot be made or read.
        """
        import orbax.checkpoint as ocp  # slow to import

        # what goes wrong is raised here; orbax logs the same with tracebacks
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.path, self.fingerprint, self.say, self._ocp = Path(path).resolve(), fingerprint, say, ocp
        managers = ocp.checkpoint_managers
        best = managers.BestN(
            get_metric_fn=lambda metrics: metrics["value"], n=1, keep_checkpoints_without_metrics=False
        )
        policy = managers.AnyPreservationPolicy([managers.LatestN(n=max_to_keep), best])
        options = ocp.CheckpointManagerOptions(preservation_policy=policy)
        try:
            self._manager = ocp.CheckpointManager(self.path, options=options)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot keep checkpoints in {path}: {reason(error)}") from None

    def save(self, step: int, tree: Any, meta: dict[str, Any], value: float = math.nan) -> None:
        """Save in the background; the caller may change its arrays and ``meta`` meanwhile.

        Args:
            step: above those of all checkpoints there.
            tree: pytree of numpy and JAX arrays.
            meta: anything that JSON can hold.
            value: what tells the best checkpoint, higher is better; NaN: nothing does.

        Raises:
            TypeError: a leaf that is no array.
            UserError: this or an earlier save could not be written.
        """
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            # orbax hangs at exit after a text, and saves numpy's scalars so that they do not restore
            if not isinstance(leaf, jax.Array | np.ndarray):
                where = jax.tree_util.keystr(path)
                raise TypeError(f"checkpoint{where} is {type(leaf).__name__}: only arrays can be saved")
        tree = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else x.copy(), tree)
        record = {"fingerprint": self.fingerprint, "meta": json.loads(json.dumps(meta))}
        record["arrays"] = fingerprint(None, tree)
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(tree),
            meta=self._ocp.args.JsonSave({"record": record, "digest": fingerprint(record)}),
        )
        try:
            metrics = {"value": float(value)} if math.isfinite(value) else None
            saved = self._manager.save(step, args=args, metrics=metrics)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._not_written(error) from None
        if not saved:
            raise ValueError(f"step {step} does not follow {self._manager.latest_step()}")

    def latest(self, like: Any) -> Restored | None:
        """The newest checkpoint that is whole; None if there is none.

        Damaged ones are told of and set aside (renamed), so that new ones can take their place.

        Args:
            like: a pytree of the structure, shapes and types that were saved.

        Raises:
            OtherSettings: it was saved with another fingerprint.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            found, trouble = None, ""
            try:
                found = self._read(step, like)
            except OtherSettings:
                raise
            except Exception as error:  # what a damaged file makes orbax raise is not documented
                trouble = one_line(error)
            if _everywhere(found is not None):
                return found
            self.say(f"checkpoint {self.path / str(step)} is damaged and left aside ({trouble})")
            self._set_aside(step)
        if steps:
            self.say(f"no checkpoint in {self.path} is whole: starting anew")
        return None

    def clear(self) -> None:
        """Delete all checkpoints."""
        self._manager.wait_until_finished()
        for step in self._manager.all_steps():
            self._manager.delete(step)

    def _read(self, step: int, like: Any) -> Restored:
        args = self._ocp.args
        # judged before the arrays are read: those of other settings may have other shapes
        saved = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
        record = saved.get("record")
        if record is None:
            raise OtherSettings(f"{self.path} holds checkpoints of an older version")
        if saved["digest"] != fingerprint(record):
            raise ValueError("its header has changed")
        if record["fingerprint"] != self.fingerprint:
            raise OtherSettings(f"{self.path} holds checkpoints of other settings")
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, like)
        restore = args.Composite(state=args.StandardRestore(abstract))
        tree = self._manager.restore(step, args=restore)["state"]
        if fingerprint(None, tree) != record["arrays"]:
            raise ValueError("its arrays have changed")
        return Restored(step, tree, record["meta"])

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self.path / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.path / str(step)).replace(aside)
        _everywhere(True)  # nobody looks before it is done
        self._manager.reload()

    def _not_written(self, error: Exception) -> Exception:
        lost = isinstance(error, jax.errors.JaxRuntimeError) or _LOST.search(str(error))
        if jax.process_count() > 1 and lost and not isinstance(error, OSError):
            return jax.errors.JaxRuntimeError(str(error))  # another process is gone: no fault of the disk
        return UserError(
            f"cannot write a checkpoint to {self.path}: {reason(error)}; make room, then --resume goes on "
            "from the newest whole one"
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Wait for the save that is on its way.

        Raises:
            UserError: it could not be written.
        """
        if kind is not None and not issubclass(kind, Stopped) and jax.process_count() > 1:
            return  # another process may be gone, and closing would wait for it
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            if kind is None:
                raise self._not_written(error) from None
        finally:
            self._manager.close()


_LOST = re.compile(r"gloo|nccl|barrier|unavailable|connection|heartbeat|coordination", re.IGNORECASE)
"""What the errors of collectives say when a process is gone; orbax raises them under other types."""


def _host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _everywhere(holds: bool) -> bool:
    """Whether it holds in every process; they wait for each other here."""
    if jax.process_count() == 1:
        return holds
    return bool(np.asarray(multihost_utils.process_allgather(np.asarray(holds))).all())

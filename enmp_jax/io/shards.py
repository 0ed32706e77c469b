"""Copying a safetensors shard with deltas added to some tensors, a few megabytes of it in memory.

The safetensors library writes from tensors that are all in memory; for a model of many gigabytes
that will not do. So its reader checks the source, and the copy is written here: the same header
with new types and offsets, then the bytes.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from enmp_jax.errors import UserError, one_line
from enmp_jax.io.reading import FLOATS, finite, open_tensors
from enmp_jax.io.writing import write_file

_CHUNK = 2**20  # entries per step of arithmetic; larger ones fall out of the cache
_BLOCK = 2**18  # bytes per comparison: two of them stay in the cache


@dataclass(frozen=True)
class LowRankUpdate:
    """A delta ``left @ right`` to be added to one weight."""

    left: Float[np.ndarray, "out k"]
    right: Float[np.ndarray, "k in"]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the delta."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def T(self) -> LowRankUpdate:
        """The transposed delta (for bases that store weights as [in, out])."""
        return LowRankUpdate(self.right.T, self.left.T)

    def rows(self, start: int, stop: int) -> Float[np.ndarray, "rows in"]:
        """Some rows of the delta."""
        return self.left[start:stop] @ self.right


@dataclass(frozen=True)
class FullUpdate:
    """A delta without factors."""

    weight: Float[np.ndarray, "out in"]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the delta."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def T(self) -> FullUpdate:
        """The transposed delta."""
        return FullUpdate(self.weight.T)

    def rows(self, start: int, stop: int) -> Float[np.ndarray, "rows in"]:
        """Some rows of the delta."""
        return self.weight[start:stop]


@dataclass(frozen=True)
class StackedUpdate:
    """Deltas of the parts of one tensor [part, rows, columns], seen as [part * rows, columns]."""

    parts: Mapping[int, LowRankUpdate | FullUpdate]
    tensor: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the delta, the parts one below the other."""
        return self.tensor[0] * self.tensor[1], self.tensor[2]

    def rows(self, start: int, stop: int) -> Float[np.ndarray, "rows in"]:
        """Some rows of the delta."""
        found = np.zeros((stop - start, self.tensor[2]), np.float32)
        height = self.tensor[1]
        for part, delta in self.parts.items():
            first, last = max(start, part * height), min(stop, (part + 1) * height)
            if first < last:
                found[first - start : last - start] = delta.rows(first - part * height, last - part * height)
        return found


@runtime_checkable
class Change(Protocol):
    """What is added to one tensor, seen as a matrix whose rows are contiguous in it."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        ...

    def rows(self, start: int, stop: int) -> Float[np.ndarray, "rows in"]:
        """Some rows of it, in float32."""
        ...


class Entry(NamedTuple):
    """Where a tensor lies in a file, in bytes from its start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a safetensors file says of itself; entries in the order of their bytes."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]


class _Files(NamedTuple):
    """File descriptors; threads use them at explicit offsets."""

    reader: int
    writer: int


def read_header(path: Path) -> Header:
    """Entries of a safetensors file, checked by the safetensors library.

    Raises:
        UserError: the file is missing or damaged.
    """
    with open_tensors(path):  # offsets, sizes, overlaps and JSON are checked here
        pass
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    metadata = header.pop("__metadata__", None) or {}
    entries = [
        Entry(name, e["dtype"], tuple(e["shape"]), *(8 + size + offset for offset in e["data_offsets"]))
        for name, e in header.items()
    ]
    return Header(tuple(sorted(entries, key=lambda e: (e.start, e.stop))), metadata)


def rewrite(
    source: Path,
    target: Path,
    deltas: Mapping[str, Change],
    dtype: str | None = None,
    omit: Collection[str] = (),
    workers: int = 2,
) -> dict[str, int]:
    """Copy a shard, adding deltas; atomic, and compared with what was meant to be written.

    Args:
        source: safetensors file.
        target: file to write.
        deltas: tensor name -> delta of the tensor's size; sums are formed in float32.
        dtype: safetensors name (``F32``, ``BF16``, ``F16``) that floating point tensors get; None: as is.
        omit: names of tensors to leave out.
        workers: tensors that are changed at a time.

    Returns:
        Tensor name -> bytes, of the tensors written.

    Raises:
        UserError: damaged source, a target that cannot be written, a sum that overflows its type.
    """
    header = read_header(source)
    kept = [entry for entry in header.entries if entry.name not in omit]
    plan, prefix = _plan(kept, header.metadata, dtype)

    def write(path: Path) -> None:
        with open(source, "rb") as reader, open(path, "wb+") as writer:
            writer.write(prefix)
            writer.flush()
            end = plan[-1][1].stop if plan else len(prefix)
            os.ftruncate(writer.fileno(), end)
            changed = [(a, b) for a, b in plan if a.name in deltas or a.dtype != b.dtype]
            same = [(a, b) for a, b in plan if not (a.name in deltas or a.dtype != b.dtype)]
            files = _Files(reader.fileno(), writer.fileno())
            with ThreadPoolExecutor(workers) as pool:
                jobs = [pool.submit(_convert, files, a, b, deltas.get(a.name)) for a, b in changed]
                for a, b in _runs(same):
                    _copy(files, a.start, b.start, a.stop - a.start)
                checks = [job.result() for job in jobs]
            with ThreadPoolExecutor(1) as pool:  # the disk is busy while the copy in memory is checked
                flushed = pool.submit(os.fsync, files.writer)
                _verify(files, same, changed, checks, target)
                flushed.result()
            writer.seek(0)
            if writer.read(len(prefix)) != prefix:
                raise UserError(f"{target} does not read back as written: check the disk")

    write_file(target, write)
    return {b.name: b.stop - b.start for _, b in plan}


def _plan(
    entries: list[Entry], metadata: Mapping[str, str], dtype: str | None
) -> tuple[list[tuple[Entry, Entry]], bytes]:
    """Pairs (entry of the source, entry of the target), and the target's header."""
    moved, offset = [], 0
    for entry in entries:
        kind = dtype if dtype and entry.dtype in FLOATS else entry.dtype
        size = entry.stop - entry.start
        if kind != entry.dtype:
            size = size // np.dtype(FLOATS[entry.dtype]).itemsize * np.dtype(FLOATS[kind]).itemsize
        moved.append((kind, offset, offset + size))
        offset += size
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    for entry, (kind, start, stop) in zip(entries, moved):
        header[entry.name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = struct.pack("<Q", len(text)) + text
    base = len(prefix)
    return [
        (entry, Entry(entry.name, kind, entry.shape, base + start, base + stop))
        for entry, (kind, start, stop) in zip(entries, moved)
    ], prefix


def _runs(pairs: list[tuple[Entry, Entry]]) -> Iterator[tuple[Entry, Entry]]:
    """Join neighbours, so that long stretches are copied by one call."""
    run: tuple[Entry, Entry] | None = None
    for a, b in pairs:
        if run and run[0].stop == a.start and run[1].stop == b.start:
            run = run[0]._replace(stop=a.stop), run[1]._replace(stop=b.stop)
            continue
        if run:
            yield run
        run = a, b
    if run:
        yield run


def _copy(files: _Files, start: int, to: int, count: int) -> None:
    """Copy bytes inside the kernel where it can."""
    while count:
        try:
            done = os.copy_file_range(files.reader, files.writer, count, start, to)
        except (AttributeError, OSError):  # other systems, other file systems
            done = os.pwrite(files.writer, os.pread(files.reader, min(count, _BLOCK), start), to)
        if not done:
            raise OSError("the source file became shorter")
        start, to, count = start + done, to + done, count - done


def _convert(files: _Files, a: Entry, b: Entry, delta: Change | None) -> int:
    """Write one tensor with its delta or in its new type, by rows; returns the checksum of its bytes."""
    source, kind = np.dtype(FLOATS[a.dtype]), np.dtype(FLOATS[b.dtype])
    width = delta.shape[1] if delta is not None else 1
    n_rows = (a.stop - a.start) // source.itemsize // max(width, 1)
    step = max(1, _CHUNK // max(width, 1))
    check = 0
    for row in range(0, n_rows, step):
        stop = min(row + step, n_rows)
        first = row * width * source.itemsize
        raw = os.pread(files.reader, (stop - row) * width * source.itemsize, a.start + first)
        values = np.frombuffer(raw, source).reshape(stop - row, width)
        if delta is not None:
            values = values.astype(np.float32) + delta.rows(row, stop)
        with np.errstate(over="ignore"):
            out = np.ascontiguousarray(values.astype(kind))
        if (delta is not None or kind.itemsize < source.itemsize) and not finite(out):
            raise UserError(f"{one_line(a.name)} overflows {b.dtype}: use --dtype float32 or bfloat16")
        data = out.tobytes()
        check = zlib.crc32(data, check)
        at = b.start + row * width * kind.itemsize
        while data:
            done = os.pwrite(files.writer, data, at)
            data, at = data[done:], at + done
    return check


def _verify(
    files: _Files,
    same: list[tuple[Entry, Entry]],
    changed: list[tuple[Entry, Entry]],
    checks: list[int],
    target: Path,
) -> None:
    """Compare what was written: copied bytes with the source, the others with their checksums."""
    # two for all blocks: making new ones costs as much as comparing them
    meant, found = bytearray(_BLOCK), bytearray(_BLOCK)
    for a, b in _runs(same):
        for offset in range(0, a.stop - a.start, _BLOCK):
            size = min(_BLOCK, a.stop - a.start - offset)
            _read(files.reader, meant, size, a.start + offset)
            _read(files.writer, found, size, b.start + offset)
            if meant != found:
                raise UserError(f"{target} does not read back as written: check the disk")
    for (_, b), check in zip(changed, checks):
        checksum = 0
        for start in range(b.start, b.stop, _BLOCK):
            size = min(_BLOCK, b.stop - start)
            _read(files.writer, found, size, start)
            checksum = zlib.crc32(memoryview(found)[:size], checksum)
        if checksum != check:
            raise UserError(f"{target}: {one_line(b.name)} does not read back as written: check the disk")


def _read(file: int, buffer: bytearray, size: int, start: int) -> None:
    """Fill the first ``size`` bytes of a buffer; the rest keeps what it had (equal in both buffers)."""
    done = 0
    while done < size:
        count = os.preadv(file, [memoryview(buffer)[done:size]], start + done)
        if not count:
            raise OSError("the file became shorter")
        done += count

"""Sources in plain files: ``npz:FILE``, ``folder:DIR`` of images, ``jsonl:FILE``."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.config.sections import DataConfig
from enmp_jax.data.base import Raw, file_identity
from enmp_jax.data.labels import label_key, number_labels
from enmp_jax.errors import UserError, one_line
from enmp_jax.io.files import is_file

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
TEXT_PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"))
"""Looked for when a run file names no text keys."""


def existing(path: Path, what: str) -> Path:
    """The path, if it is there.

    Raises:
        UserError: nothing is there, or what is neither a directory nor a regular file (a pipe would be waited
            for).
    """
    if not path.exists():
        raise UserError(f"{what}: {path} does not exist")
    if not path.is_dir():
        is_file(path)
    return path


def text_keys(config: DataConfig, available: Sequence[str]) -> tuple[str, ...]:
    """The text keys of a run file; without any, a known pair or the only text there is.

    Args:
        config: the run file's data.
        available: keys that hold text.

    Returns:
        One or two keys; none if the data hold no text.

    Raises:
        UserError: a key that is not there, or a choice that the run file has to make.
    """
    if config.text:
        missing = [key for key in config.text if key not in available]
        if missing:
            has = ", ".join(available) or "none"
            raise UserError(f"{config.source}: no text key {missing[0]!r}; available: {has}")
        return config.text
    pair = next((keys for keys in TEXT_PAIRS if all(key in available for key in keys)), ())
    if pair or len(available) <= 1:
        return pair or tuple(available)
    raise UserError(
        f"{config.source}: set text to the text keys, one or two of {', '.join(available)} (premise first)"
    )


class NpzSource:
    """Arrays of an ``.npz`` file: ``image`` uint8 [n, h, w] or [n, h, w, c] (or str arrays, the text keys),
    and optionally ``label`` [n] (numbers or names), ``split`` [n] (names; default: one split ``all``) and
    ``class_names``.
    """  # fmt: skip

    def __init__(self, path: Path, config: DataConfig) -> None:
        self._path = existing(path, config.source)
        self._config = config

    def identity(self) -> str:
        """Path, size and time of the file."""
        return file_identity([self._path], self._path.parent)

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        try:
            _check_sizes(self._path)
            with np.load(self._path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except Exception as error:  # numpy, zipfile and zlib each raise their own for damaged files
            raise UserError(
                f"{self._config.source}: not a readable npz file of plain arrays ({one_line(error)})"
            ) from None
        label, keys = label_key(self._config, arrays), self._value_keys(arrays)
        if label is not None and arrays[label].ndim != 1:
            found = f"{label!r} is {arrays[label].dtype} {list(arrays[label].shape)}"
            raise UserError(f"{self._config.source}: {found}; expected one label an example, [n]")
        first = label or keys[0]
        n = _n_rows(arrays[first])
        for name in {"split", "class_names"} & set(arrays):
            if arrays[name].ndim != 1:
                raise UserError(
                    f"{self._config.source}: {name!r} has the shape {list(arrays[name].shape)}, not [n]"
                )
        for name in sorted({*keys, "split"} & set(arrays)):
            if _n_rows(arrays[name]) != n:
                rows = f"{_n_rows(arrays[name])} rows of {name!r} but {n} of {first!r}"
                raise UserError(f"{self._config.source}: {rows}")
        return arrays

    def _value_keys(self, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
        image = self._config.image or "image"
        if image in arrays and not self._config.text:
            if arrays[image].dtype != np.uint8 or arrays[image].ndim not in (3, 4):
                raise UserError(
                    f"{self._config.source}: {image!r} is {arrays[image].dtype} {list(arrays[image].shape)}; "
                    "expected uint8 [n, h, w] or [n, h, w, c] in 0..255"
                )
            return (image,)
        special = (self._config.label or DataConfig.label, "split", "class_names")
        texts = [name for name, a in arrays.items() if a.dtype.kind == "U" and name not in special]
        keys = text_keys(self._config, texts)
        if self._config.image or not keys:
            raise UserError(f"{self._config.source}: no array {image!r}; the file has {', '.join(arrays)}")
        return keys

    @functools.cached_property
    def _labels(self) -> tuple[np.ndarray, tuple[str, ...]]:
        label = label_key(self._config, self._arrays)
        n = _n_rows(self._arrays[self._value_keys(self._arrays)[0]])
        return number_labels([None] * n if label is None else self._arrays[label].tolist(), self._config)

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        n = len(self._labels[0])
        if "split" not in self._arrays:
            return {"all": np.arange(n)}
        split = self._arrays["split"].astype(str)
        return {str(name): np.flatnonzero(split == name) for name in dict.fromkeys(split.tolist())}

    def splits(self) -> dict[str, int]:
        """The values of the ``split`` array, or ``all``."""
        return {name: len(rows) for name, rows in self._rows.items()}

    def class_names(self) -> tuple[str, ...]:
        """From the ``class_names`` array, or from labels that are names."""
        given = self._arrays.get("class_names")
        return tuple(given.astype(str).tolist()) if given is not None else self._labels[1]

    def labelled(self) -> bool:
        """See ``Source``."""
        return label_key(self._config, self._arrays) is not None

    def read(self, split: str, rows: Sequence[int]) -> Raw:
        """See ``Source``."""
        index = self._rows[split][np.asarray(rows, np.int64)]
        keys = self._value_keys(self._arrays)
        names = [f"{self._path.name}[{i}]" for i in index]
        columns = [self._arrays[key][index] for key in keys]
        if columns[0].dtype == np.uint8:
            return Raw("image", list(columns[0]), self._labels[0][index], names)
        texts = list(zip(*[column.astype(str).tolist() for column in columns]))
        return Raw("text", texts, self._labels[0][index], names)


def _check_sizes(path: Path) -> None:
    """Refuse what would fill the memory, before a byte of it is asked for.

    Raises:
        ValueError: an array claims to be larger than its part of the file, or all are larger than half of the
            machine's memory.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
        if total > machine // 2:
            raise ValueError(f"it unpacks to {total} bytes: more than half of this machine's memory")
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(file)
            if math.prod(shape) * dtype.itemsize > member.file_size:
                raise ValueError(f"{member.filename} is too short for the shape {list(shape)}")


def _n_rows(array: np.ndarray) -> int:
    return len(array) if array.ndim else 0


class FolderSource:
    """A directory of images: ``split/class/file`` or, with the one split ``all``, ``class/file``; without
    labels ``file``.

    Classes are the directory names, sorted (or in the order of ``class_names``). Files are ordered by a
    hash of their names, so that a slice such as ``all[:80%]`` holds every class.
    """

    def __init__(self, path: Path, config: DataConfig) -> None:
        self._path = existing(path, config.source)
        self._config = config

    def identity(self) -> str:
        """Paths, sizes and times of the image files."""
        return file_identity([file for files in self._files.values() for file in files], self._path)

    @functools.cached_property
    def _files(self) -> dict[str, list[Path]]:
        files = [p for p in self._path.glob("**/*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
        depths = {len(p.relative_to(self._path).parts) for p in files}
        if not depths or not depths <= {1, 2, 3} or len(depths) > 1:
            raise UserError(
                f"{self._config.source}: expected image files as class/file or split/class/file, or all "
                "without a directory where there are no labels; "
                + (f"found depths {sorted(depths)}" if depths else "found no images")
            )
        found: dict[str, list[Path]] = {}
        for file in sorted(files, key=self._order):
            parts = file.relative_to(self._path).parts
            found.setdefault(parts[0] if len(parts) == 3 else "all", []).append(file)
        return dict(sorted(found.items()))

    def _order(self, file: Path) -> bytes:
        return hashlib.blake2b(file.relative_to(self._path).as_posix().encode()).digest()

    @functools.cached_property
    def _classes(self) -> tuple[str, ...]:
        if not self.labelled():
            return ()
        files = [file for files in self._files.values() for file in files]
        found = sorted({file.parent.name for file in files})
        return self._config.class_names if set(found) <= set(self._config.class_names) else tuple(found)

    def splits(self) -> dict[str, int]:
        """Top directories, or ``all``."""
        return {split: len(files) for split, files in self._files.items()}

    def class_names(self) -> tuple[str, ...]:
        """Directory names."""
        return self._classes

    def labelled(self) -> bool:
        """See ``Source``."""
        some = next(iter(self._files.values()))[0]
        return self._config.label is not None and some.parent != self._path

    def read(self, split: str, rows: Sequence[int]) -> Raw:
        """See ``Source``."""
        files = [self._files[split][i] for i in rows]
        number = {name: i for i, name in enumerate(self._classes)}
        labels = np.asarray([number.get(file.parent.name, -1) for file in files], np.int64)
        return Raw("image", files, labels, [str(file.relative_to(self._path)) for file in files])


class JsonlSource:
    """One JSON object a line: the text keys (or ``image``, a path relative to the file) and maybe a label.

    Splits are the values of an optional ``split`` key (default: one split ``all``); a directory of
    ``SPLIT.jsonl`` files serves too.
    """

    def __init__(self, path: Path, config: DataConfig) -> None:
        self._path = existing(path, config.source)
        self._config = config
        self._paths = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        self._base = path if path.is_dir() else path.parent
        if not self._paths:
            raise UserError(f"{config.source}: the directory has no .jsonl files")

    def identity(self) -> str:
        """Paths, sizes and times of the files."""
        return file_identity(self._paths, self._base)

    def keys(self) -> set[str]:
        """The keys of the first object."""
        return {key for records in self._records.values() for key in records[0][1]}

    @functools.cached_property
    def _records(self) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for path in self._paths:
            default = path.stem if self._path.is_dir() else "all"
            try:
                lines = path.read_text(encoding="utf-8").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read as UTF-8 text ({one_line(error)})") from None
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path.name}:{number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # also numbers of too many digits
                    raise UserError(f"{where}: not valid JSON ({one_line(error)})") from None
                if not isinstance(record, dict):
                    raise UserError(f"{where}: expected an object, got {type(record).__name__}")
                label_key(self._config, record, where)  # one that the run file names must be in every line
                found.setdefault(str(record.get("split", default)), []).append((where, record))
        return found

    @functools.cached_property
    def _labels(self) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        key = self._config.label
        values = [r.get(key) if key else None for records in self._records.values() for _, r in records]
        labels, names = number_labels(values, self._config)
        ends = np.cumsum([len(records) for records in self._records.values()])[:-1]
        return dict(zip(self._records, np.split(labels, ends))), names

    def splits(self) -> dict[str, int]:
        """The values of ``split``, or the file names."""
        return {split: len(records) for split, records in self._records.items()}

    def class_names(self) -> tuple[str, ...]:
        """The labels, when they are names."""
        return self._labels[1]

    def labelled(self) -> bool:
        """See ``Source``; lines may still all lack the key."""
        return self._config.label is not None

    def read(self, split: str, rows: Sequence[int]) -> Raw:
        """See ``Source``."""
        chosen = [self._records[split][i] for i in rows]
        labels = self._labels[0][split][np.asarray(rows, np.int64)]
        names = [where for where, _ in chosen]
        special = (self._config.label or DataConfig.label, "split")
        first = {k: v for k, v in self._records[split][0][1].items() if k not in special}
        image = self._config.image or ("image" if "image" in first and not self._config.text else "")
        texts = () if image else text_keys(self._config, [k for k, v in first.items() if isinstance(v, str)])
        if not texts and not image:
            raise UserError(f"{self._config.source}: no text or image key found among {', '.join(first)}")
        for where, record in chosen:
            for key in texts or (image,):
                if not isinstance(record.get(key), str):
                    raise UserError(f"{where}: {key!r} must be a string, got {record.get(key)!r}")
        if texts:
            return Raw("text", [tuple(record[key] for key in texts) for _, record in chosen], labels, names)
        return Raw("image", [self._base / record[image] for _, record in chosen], labels, names)

"""``tfds:NAME``: prepared TFDS directories, read from array_record without tensorflow.

Any directory with ``dataset_info.json`` and ``features.json`` serves, whether or not TFDS knows its name.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.config.run_file import resolve_path
from enmp_jax.config.sections import DataConfig
from enmp_jax.data.base import Raw, file_identity
from enmp_jax.data.files import text_keys
from enmp_jax.data.labels import label_key, number_labels
from enmp_jax.errors import UserError, one_line

_VERSION = re.compile(r"\d+\.\d+\.\d+")


class TfdsSource:
    """A TFDS data set: ``NAME``, ``NAME/CONFIG``, each optionally with ``:VERSION`` (default: the newest).

    Args:
        name: see above.
        config: ``data_dir`` is the TFDS data directory; default: ``$TFDS_DATA_DIR`` or
            ``~/tensorflow_datasets``.
        root: directory that a relative ``data_dir`` starts from.

    Raises:
        UserError: not prepared there; the message holds the command that prepares it.
    """

    def __init__(self, name: str, config: DataConfig, root: Path) -> None:
        self._config = config
        default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        data_dir = Path(resolve_path(config.data_dir, root) if config.data_dir else default).expanduser()
        self._directory = _find(name, data_dir)
        self._opened: dict[str, Any] = {}

    def identity(self) -> str:
        """Paths, sizes and times of the files."""
        return file_identity([p for p in self._directory.iterdir() if p.is_file()], self._directory)

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            return tfds.builder_from_directory(self._directory)
        except Exception as error:  # TFDS raises many kinds for broken directories
            raise UserError(f"{self._directory} is not a readable TFDS data set: {one_line(error)}") from None

    @functools.cached_property
    def _features(self) -> dict[str, Any]:
        return dict(sorted(self._builder.info.features.items()))  # their own order is random

    @functools.cached_property
    def _label(self) -> str | None:
        return label_key(self._config, self._features)

    def splits(self) -> dict[str, int]:
        """As TFDS records them."""
        return {name: int(split.num_examples) for name, split in self._builder.info.splits.items()}

    def class_names(self) -> tuple[str, ...]:
        """Names of the label feature; numbers where neither the files nor TFDS's own code name them."""
        if self._label is None:
            return ()
        names = tuple(getattr(self._features[self._label], "names", None) or ())
        if names != tuple(map(str, range(len(names)))) or not _known(self._builder.name):
            return names
        # prepared without a file of label names
        import tensorflow_datasets as tfds

        registered: Any = tfds.builder(self._builder.name, data_dir=self._directory.parent.parent)
        feature = dict(registered.info.features).get(self._label)
        return tuple(getattr(feature, "names", None) or names)

    def labelled(self) -> bool:
        """See ``Source``."""
        return self._label is not None

    @functools.cached_property
    def _columns(self) -> tuple[str, ...]:
        """The image key, or the text keys."""
        names = list(self._features)
        if self._config.image:
            if self._config.image not in names:
                raise UserError(
                    f"{self._config.source}: no image key {self._config.image!r}; it has {', '.join(names)}"
                )
            return (self._config.image,)
        found = [n for n, f in self._features.items() if type(f).__name__ == "Image"]
        texts = [n for n, f in self._features.items() if type(f).__name__ == "Text"]
        keys = () if found and not self._config.text else text_keys(self._config, texts)
        if not keys and not found:
            raise UserError(f"{self._config.source}: found neither images nor texts among {', '.join(names)}")
        return keys or (found[0],)

    def _open(self, split: str) -> Any:
        import tensorflow_datasets as tfds

        if split in self._opened:
            return self._opened[split]
        images = [n for n, f in self._features.items() if type(f).__name__ == "Image"]
        try:
            # decoded here, so that images that do not decode can be named
            self._opened[split] = self._builder.as_data_source(
                split=split, decoders={name: tfds.decode.SkipDecoding() for name in images} or None
            )
        except NotImplementedError:
            again = _command(self._config.source)
            raise UserError(f"{self._directory} is not array_record; prepare it again: {again}") from None
        return self._opened[split]

    def read(self, split: str, rows: Sequence[int]) -> Raw:
        """See ``Source``."""
        try:
            records = self._open(split).__getitems__([int(row) for row in rows])
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{self._directory}: {split} cannot be read ({one_line(error)})") from None
        values = [_plain(r[self._label]) if self._label else None for r in records]
        labels, _ = number_labels(values, self._config)
        names = [f"{split}[{row}]" for row in rows]
        columns = self._columns
        if type(self._features[columns[0]]).__name__ in ("Image", "Tensor"):
            return Raw("image", [_image(r[columns[0]]) for r in records], labels, names)
        texts = [tuple(_text(r[key]) for key in columns) for r in records]
        return Raw("text", texts, labels, names)


def _find(name: str, data_dir: Path) -> Path:
    """Directory of the wanted or newest version."""
    plain, _, version = name.partition(":")
    top = data_dir / plain
    versions = {p.name: p for p in _directories(top) if _VERSION.fullmatch(p.name)}
    if not versions:
        # a data set with configurations, none of them named
        configs = [p for p in _directories(top) if any(_VERSION.fullmatch(q.name) for q in _directories(p))]
        if len(configs) > 1:
            raise UserError(f"tfds:{name} has several configurations: write {_choices(plain, configs)}")
        if configs:
            return _find(f"{plain}/{configs[0].name}" + (f":{version}" if version else ""), data_dir)
        raise UserError(_missing(plain, data_dir))
    if version and version not in versions:
        raise UserError(f"tfds:{name}: {data_dir} has version {', '.join(sorted(versions))} of {plain}")
    newest = max(versions, key=lambda v: tuple(map(int, v.split("."))))
    return versions[version or newest]


def _directories(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []


def _choices(name: str, configs: Sequence[Path]) -> str:
    return " or ".join(f"tfds:{name}/{p.name}" for p in configs[:6])


def _missing(name: str, data_dir: Path) -> str:
    """What to do about a data set that is not there."""
    if _known(name.partition("/")[0]):
        return f"tfds:{name} is not in {data_dir}; prepare it: {_command(name)} --data_dir={data_dir}"
    present = sorted({p.parent.relative_to(data_dir).as_posix() for p in _prepared(data_dir)})
    here = (
        f"{data_dir} holds {', '.join(present[:12])}" if present else f"{data_dir} holds no prepared data set"
    )
    return (
        f"tfds:{name}: TFDS has no data set of this name, and {here}; hf:, folder: and npz: are other sources"
    )


def _known(name: str) -> bool:
    """Whether TFDS has code for a data set of this name."""
    import tensorflow_datasets as tfds

    _ = tfds.text.Glue  # imported on demand: unknown to the registry before
    return name in tfds.list_builders(with_community_datasets=False)


def _prepared(data_dir: Path) -> list[Path]:
    found = [*data_dir.glob("*/*/dataset_info.json"), *data_dir.glob("*/*/*/dataset_info.json")]
    return [p.parent for p in found if _VERSION.fullmatch(p.parent.name)]


def _command(source: str) -> str:
    """The command that downloads and prepares a set; unlike reading, it needs tensorflow."""
    name = source.removeprefix("tfds:").partition(":")[0]
    return f"pip install tensorflow && tfds build {name} --file_format=array_record"


def _plain(label: Any) -> Any:
    return (
        label.decode()
        if isinstance(label, bytes)
        else label.item()
        if isinstance(label, np.generic)
        else label
    )


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _image(value: Any) -> Any:
    return value if isinstance(value, bytes) else np.asarray(value, np.uint8)

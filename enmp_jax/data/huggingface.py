"""``hf:NAME``: data sets of the Hugging Face hub, through the ``datasets`` package (``enmp-jax[hf]``)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enmp_jax.config.run_file import resolve_path
from enmp_jax.config.sections import DataConfig
from enmp_jax.data.base import Raw, file_identity
from enmp_jax.data.files import text_keys
from enmp_jax.data.labels import label_key, number_labels
from enmp_jax.errors import UserError, one_line

_STRING = ("string", "large_string")


class HuggingFaceSource:
    """A hub data set ``NAME[:CONFIG][@REVISION]``, or a directory written by ``save_to_disk``.

    What was read once stays in the cache: without a revision, later changes on the hub are not seen.

    Args:
        name: see above.
        config: which keys are image, text and label.
        root: directory that a relative path starts from.
        load: ``load(path_or_name, configuration, revision) -> mapping of split to dataset``; default:
            the ``datasets`` package.
    """

    def __init__(
        self,
        name: str,
        config: DataConfig,
        root: Path,
        load: Callable[[str, str | None, str | None], Mapping[str, Any]] | None = None,
    ) -> None:
        self._config, self._load = config, load or _load
        plain, _, revision = name.partition("@")
        plain, _, configuration = plain.partition(":")
        self._arguments = (resolve_path(plain, root), configuration or None, revision or None)

    def identity(self) -> str:
        """Name, configuration and revision; of a directory, its files."""
        path = Path(self._arguments[0])
        if path.is_dir():
            return file_identity([p for p in path.glob("**/*") if p.is_file()], path)
        return "hf " + " ".join(str(a) for a in self._arguments)

    @functools.cached_property
    def _splits(self) -> Mapping[str, Any]:
        return self._load(*self._arguments)

    @property
    def _features(self) -> Mapping[str, Any]:
        return next(iter(self._splits.values())).features

    @functools.cached_property
    def _label(self) -> str | None:
        return label_key(self._config, self._features)

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        if self._label is None:
            return ()
        names = getattr(self._features[self._label], "names", None)
        if names:
            return tuple(names)
        if getattr(self._features[self._label], "dtype", None) not in _STRING:
            return ()
        # class names as plain strings: number them over all splits
        return number_labels([v for d in self._splits.values() for v in d[self._label]], self._config)[1]

    def splits(self) -> dict[str, int]:
        """As the data set has them."""
        return {name: len(split) for name, split in self._splits.items()}

    def class_names(self) -> tuple[str, ...]:
        """Names of the label feature, or the labels themselves when they are names."""
        return self._names

    def labelled(self) -> bool:
        """See ``Source``."""
        return self._label is not None

    @functools.cached_property
    def _columns(self) -> tuple[bool, tuple[str, ...]]:
        """Whether the data are images, and the image key or the text keys."""
        features = list(self._features)
        images = [n for n, f in self._features.items() if type(f).__name__ == "Image"]
        if self._config.image and self._config.image not in features:
            raise UserError(
                f"{self._config.source}: no image key {self._config.image!r}; it has {', '.join(features)}"
            )
        if self._config.image or (images and not self._config.text):
            return True, (self._config.image or images[0],)
        strings = [n for n, f in self._features.items() if getattr(f, "dtype", None) in _STRING]
        label = self._config.label or DataConfig.label
        keys = text_keys(self._config, [n for n in strings if n != label])
        if not keys:
            raise UserError(
                f"{self._config.source}: found neither images nor texts among {', '.join(features)}"
            )
        return False, keys

    def read(self, split: str, rows: Sequence[int]) -> Raw:
        """See ``Source``."""
        label, (is_image, keys) = self._label, self._columns
        columns = self._splits[split].select(list(map(int, rows)))[:]
        values = columns[label] if label else [None] * len(rows)
        number = {name: i for i, name in enumerate(self._names)}
        labels, _ = number_labels(
            [number.get(value, value) if isinstance(value, str) else value for value in values], self._config
        )
        names = [f"{split}[{row}]" for row in rows]
        if is_image:
            return Raw("image", [_encoded(value) for value in columns[keys[0]]], labels, names)
        for key in keys:
            for value, name in zip(columns[key], names):
                if not isinstance(value, str):
                    raise UserError(f"{self._config.source}: {key!r} of {name} is {value!r}, not a text")
        return Raw("text", list(zip(*(columns[key] for key in keys))), labels, names)


def _load(name: str, configuration: str | None, revision: str | None) -> Mapping[str, Any]:
    """Load with the ``datasets`` package, images left encoded."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"hf:{name} needs the datasets package: pip install 'enmp-jax[hf]'") from None
    try:
        if any((Path(name) / file).exists() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, configuration, revision=revision)
    except Exception as error:  # the package raises its own, the hub's, httpx's and OS errors
        raise UserError(f"hf:{name} cannot be loaded: {one_line(error)}") from None
    splits: dict[Any, Any] = {"all": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    # images stay encoded, so that those that do not decode can be named
    encoded = datasets.Image(decode=False)
    for split, data in splits.items():
        for key, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                splits[split] = splits[split].cast_column(key, encoded)
    return splits


def _encoded(value: Any) -> Any:
    """Bytes, a path or an array, whatever an image column holds; no bytes where there is no image."""
    if value is None:
        return b""
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        return Path(path) if content is None and path else content or b""
    return value if isinstance(value, bytes) else np.asarray(value)

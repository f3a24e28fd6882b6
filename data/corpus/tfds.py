"""Open data sets that tensorflow-datasets has prepared, without TensorFlow."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import CorpusError
from ..json_files import read_object

TFDS_PREFIX = "tfds:"
_FEATURES = "tensorflow_datasets.core.features."


class Examples:
    """The examples of a split: dictionaries of features, by number."""

    def __init__(self, source: Any, where: str):
        self._source, self._where = source, where

    def __len__(self) -> int:
        return len(self._source)

    def read(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return the examples with these numbers.

        Raises:
            CorpusError: a record is damaged.
        """
        try:
            return list(self._source.__getitems__(list(numbers)))
        except Exception as error:  # of ArrayRecord, Protocol Buffers or the features' decoders
            raise CorpusError(f"{self._where}: an example of {_numbers(numbers)} cannot be read ({error}).") from None

    def windows(self, size: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number, example), reading `size` examples at a time. Errors as in `read`."""
        for first in range(0, len(self), size):
            numbers = range(first, min(first + size, len(self)))
            yield from zip(numbers, self.read(numbers), strict=True)


def is_tfds(folder: Path) -> bool:
    """Tell whether this is the folder of a prepared data set."""
    return (folder / "dataset_info.json").is_file() and (folder / "features.json").is_file()


def open_tfds(folder: Path, split: str, name: str, raw: Sequence[str] = ()) -> Examples:
    """Open a split of a prepared data set.

    Args:
        folder: the data set.
        split: name of the split.
        name: the data set as the user named it, for messages.
        raw: features to leave encoded, such as images.

    Raises:
        CorpusError: there is no such split, a file is damaged or missing, features.json names a class that is none of
            tensorflow-datasets' own, or the examples were not written as ArrayRecord.
    """
    import grain
    import tensorflow_datasets as tfds

    check_features(folder)
    try:
        builder: Any = tfds.builder_from_directory(folder)
        splits = builder.info.splits
        known = {name: (info.num_examples, list(map(str, info.filepaths))) for name, info in splits.items()}
    except Exception as error:  # a damaged file makes the library raise anything
        raise CorpusError(
            f"{name}: not a data set that tensorflow-datasets {tfds.__version__} reads ({error})."
        ) from None
    if split not in known:
        raise CorpusError(f"{name}: no split {split!r} (found: {', '.join(known)}).")
    examples, files = known[split]
    try:
        decoders = {feature: tfds.decode.SkipDecoding() for feature in raw}
        source = builder.as_data_source(split=split, decoders=decoders or None)
        records: Any = grain.sources.ArrayRecordDataSource(files)
        found = len(records)
    except NotImplementedError as error:
        raise CorpusError(
            f"{name}: cannot be read without TensorFlow ({error}). Prepare it with file_format='array_record'."
        ) from error
    except Exception as error:  # as above
        raise CorpusError(f"{name}: the split {split!r} cannot be read ({error}).") from None
    if found != examples:
        raise CorpusError(f"{name}: {found:,} examples of split {split!r}; dataset_info.json says {examples:,}.")
    return Examples(source, f"{name}, split {split!r}")


def glue_config(folder: Path) -> str | None:
    """Return which of GLUE's data sets a folder says that it holds, such as `mrpc`; None if it does not say.

    Raises:
        DataError: dataset_info.json is not a JSON object.
    """
    described = read_object(folder / "dataset_info.json")
    return described.get("configName") if described.get("name") == "glue" else None


def check_features(folder: Path) -> None:
    """Refuse a features.json that names a class other than tensorflow-datasets' own: naming one imports its module.

    Raises:
        CorpusError: it names another class.
        DataError: it is not a JSON object.
    """
    import tensorflow_datasets as tfds

    path = folder / "features.json"
    assert tfds.features is not None  # imports the modules of all features
    waiting: list[Any] = [read_object(path)]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            named = [part[key] for key in ("pythonClassName", "python_class_name") if key in part]
            named += [part["type"]] if "type" in part and "content" in part else []  # the older form
            for name in named:
                module = str(name).rpartition(".")[0]
                if not (module.startswith(_FEATURES) and module in sys.modules):
                    raise CorpusError(f"{path}: {name!r} is not one of tensorflow-datasets' own features.")
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def decoded(value: Any, where: str) -> Any:
    """Return a feature's value; bytes as text.

    Raises:
        CorpusError: bytes are not UTF-8.
    """
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: not UTF-8 (byte 0x{value[error.start]:02x} at offset {error.start}).") from None


@cache
def prepared_folder(name: str) -> Path:
    """Return the folder of a data set by its name, which is downloaded and prepared first if this machine lacks it.

    Raises:
        CorpusError: there is no such data set, or preparing it needs TensorFlow, which is not installed.
    """
    import tensorflow_datasets as tfds

    needs_tensorflow = (
        f"{TFDS_PREFIX}{name}: this machine has no copy prepared as ArrayRecord (searched TFDS_DATA_DIR, or "
        "~/tensorflow_datasets), and preparing one needs TensorFlow, which is not installed. Install `tensorflow` (and "
        "`apache-beam` for large data sets), or name the folder of a copy that was prepared elsewhere."
    )
    has_tensorflow = importlib.util.find_spec("tensorflow") is not None
    try:
        builder = tfds.builder(name, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        if has_tensorflow:
            raise CorpusError(f"{TFDS_PREFIX}{name}: tensorflow-datasets has no data set of this name.") from None
        raise CorpusError(needs_tensorflow) from None
    if not builder.is_prepared():
        if not has_tensorflow:
            raise CorpusError(needs_tensorflow)
        builder.download_and_prepare()
    return Path(builder.data_path)


def _numbers(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

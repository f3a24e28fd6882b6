"""Look up what was measured on chips, for a call: block sizes, the fastest backend, and what is proven to be right.

The tables are under version control. `tuning_table.py`, the block sizes, is written by `bestiary bench attention
--tune`; `chip_table.py`, the rest, by `bench/chip.py`; neither while a call is traced: a call has the same backend and
blocks, and therefore bitwise the same results, until the tables change.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_type_hints

import jax

from .bias import DenseBias, DistanceKeys
from .call import Call
from .chip_table import FASTEST, PROVEN
from .tuning_table import ROWS

SHORTEST, LONGEST = 128, 16384
"""Shortest and longest lengths of the table; lengths beyond them use the nearest one's row."""

_CHIPS = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e"}


@dataclasses.dataclass(frozen=True, order=True)
class Key:
    """Key of the table: the properties of a call that block sizes depend on.

    Attributes:
      chip: name of the chip, as returned by `chip`.
      dtype: dtype of the query.
      size: larger of the head sizes, rounded up to 32, 64, 96, 128, 192 or 256.
      length: larger of the two lengths, rounded up to a power of two.
      mask: "full", or those of "causal", "window" and "segments" that apply, joined by "+".
      bias: "none", "row" (relative, ALiBi), "dense" or "distance" (keys of distances).
      dropout: whether there is dropout.
    """

    chip: str
    dtype: str
    size: int
    length: int
    mask: str
    bias: str
    dropout: bool

    @classmethod
    def of(cls, call: Call, chip: str) -> Key:
        """Return the key of a call."""
        size = max(call.query.shape[3], call.value.shape[3])
        return cls(
            chip=chip,
            dtype=str(call.query.dtype),
            size=size_bucket(size),
            length=length_bucket(max(call.query.shape[1], call.key.shape[1])),
            mask=mask_of(call),
            bias=bias_of(call),
            dropout=call.dropout_rate > 0,
        )


@dataclasses.dataclass(frozen=True, order=True)
class Features:
    """What decides which code of a kernel a call runs: the unit in which kernels are proven on a chip.

    Attributes:
      dtype: dtype of the query.
      size: head size of queries and keys, rounded up as in `Key`.
      value_size: that of values, likewise.
      short: whether both lengths are at most 256, which kernels for short rows take.
      grouped: whether several query heads share a key head.
      mask: as in `Key`.
      bias: as in `Key`.
      softcap: whether there is a softcap.
      dropout: whether there is dropout.
    """

    dtype: str
    size: int
    value_size: int
    short: bool
    grouped: bool
    mask: str
    bias: str
    softcap: bool
    dropout: bool

    @classmethod
    def of(cls, call: Call) -> Features:
        """Return the features of a call."""
        return cls(
            dtype=str(call.query.dtype),
            size=size_bucket(call.query.shape[3]),
            value_size=size_bucket(call.value.shape[3]),
            short=max(call.query.shape[1], call.key.shape[1]) <= 256,
            grouped=call.query.shape[2] != call.key.shape[2],
            mask=mask_of(call),
            bias=bias_of(call),
            softcap=call.softcap is not None,
            dropout=call.dropout_rate > 0,
        )


def mask_of(call: Call) -> str:
    """Return "full", or those of "causal", "window" and "segments" that apply, joined by "+"."""
    left, right = call.window
    parts = {
        "causal": call.causal,
        "window": left is not None or right is not None,
        "segments": call.query_segment_ids is not None,
    }
    return "+".join(name for name, there in parts.items() if there) or "full"


def bias_of(call: Call) -> str:
    """Return the kind of bias, as in `Key`."""
    if isinstance(call.bias, DistanceKeys):
        return "distance"
    return "none" if call.bias is None else "dense" if isinstance(call.bias, DenseBias) else "row"


def size_bucket(size: int) -> int:
    """Round a head size up to 32, 64, 96, 128, 192 or 256."""
    return next((step for step in (32, 64, 96, 128, 192) if size <= step), 256)


def length_bucket(length: int) -> int:
    """Round `length` up to a power of two within the table's range."""
    return min(LONGEST, max(SHORTEST, 1 << (length - 1).bit_length()))


def chip() -> str | None:
    """Return the short name of the default device: "h100", "h200", "v4", "v5e", "v5p", "v6e" ...; None for a CPU."""
    device = jax.devices()[0]
    return None if device.platform == "cpu" else chip_name(device.device_kind)


def chip_name(kind: str) -> str:
    """Shorten a device kind to the table's name: "NVIDIA H100 80GB HBM3" is "h100", "TPU v5 lite" is "v5e"."""
    name = re.sub(r"^(nvidia|tpu)\s+", "", kind.lower())
    return _CHIPS.get(name) or name.split()[0]


def tuned[T](call: Call, kind: type[T]) -> T | None:
    """Return a call's measured block sizes on the default device, as an instance of `kind`; None if there are none."""
    if not ROWS:
        return None
    name = chip()
    row = None if name is None else ROWS.get(dataclasses.astuple(Key.of(call, name)))
    return None if row is None else rebuild(kind, row)


def fastest(call: Call) -> str | None:
    """Return the backend that was fastest for such calls on the default device; None if that was not measured."""
    if not FASTEST:
        return None
    name = chip()
    return None if name is None else FASTEST.get(dataclasses.astuple(Key.of(call, name)))


def proven(backend: str, features: Features) -> bool:
    """Tell whether a backend is on record as right for such calls on this chip, with this version of jax."""
    name = chip()
    return name is not None and dataclasses.astuple(features) in PROVEN.get((backend, name, jax.__version__), {})


def rebuild[T](kind: type[T], row: Mapping[str, Any]) -> T:
    """Build a dataclass from a row of the table, where a nested dataclass is stored as a tuple of its fields.

    Raises:
      ValueError: the row's fields are not those of the class, so it was written for another version of it.
    """
    hints = get_type_hints(kind)
    fields: tuple[dataclasses.Field, ...] = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
    if set(row) != {field.name for field in fields}:
        raise ValueError(
            f"tuning_table.py: expected the fields {', '.join(field.name for field in fields)} of {kind.__name__}, "
            f"found {', '.join(row)}: run the tuning again, or remove the row"
        )
    values = {
        name: hints[name](*value) if dataclasses.is_dataclass(hints[name]) else value for name, value in row.items()
    }
    return kind(**values)


def flatten(blocks: Any) -> dict[str, Any]:
    """Turn a backend's block sizes into a row of the table: the inverse of `rebuild`."""
    values = {field.name: getattr(blocks, field.name) for field in dataclasses.fields(blocks)}
    return {name: value if isinstance(value, int) else dataclasses.astuple(value) for name, value in values.items()}

"""Look up measured block sizes for a call.

The table, `tuning_table.py`, is under version control and written by `bestiary bench attention --tune` (`tune.py`),
never while a call is traced: a call has the same blocks, and therefore bitwise the same results, until the table
changes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_type_hints

import jax

from .bias import DenseBias
from .call import Call
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
      bias: "none", "row" (relative, ALiBi) or "dense".
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
        left, right = call.window
        parts = {
            "causal": call.causal,
            "window": left is not None or right is not None,
            "segments": call.query_segment_ids is not None,
        }
        return cls(
            chip=chip,
            dtype=str(call.query.dtype),
            size=next((step for step in (32, 64, 96, 128, 192) if size <= step), 256),
            length=length_bucket(max(call.query.shape[1], call.key.shape[1])),
            mask="+".join(name for name, there in parts.items() if there) or "full",
            bias="none" if call.bias is None else "dense" if isinstance(call.bias, DenseBias) else "row",
            dropout=call.dropout_rate > 0,
        )


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

"""Block sizes that were measured: which row of the table a call has, if any.

The table, `tuning_table.py`, is checked in, and filled by `bestiary bench attention --tune` (`tune.py`), never while a
call is traced: a call has the same blocks, and so the same bits, whoever runs it, until somebody changes the table.
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
"""The ends of the table's lengths; what is beyond has the last one's row."""

_CHIPS = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e"}


@dataclasses.dataclass(frozen=True, order=True)
class Key:
    """What block sizes depend on.

    Attributes:
      chip: as `chip` names it.
      dtype: of the query.
      size: the larger head size, rounded up to 32, 64, 96, 128, 192 or 256.
      length: the longer side, rounded up to a power of two.
      mask: "full", or what there is of "causal", "window" and "segments", joined by "+".
      bias: "none", "row" (relative, ALiBi) or "dense".
      dropout: whether there is any.
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
        """A call's."""
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
    """The power of two that is at least `length`, within the table's ends."""
    return min(LONGEST, max(SHORTEST, 1 << (length - 1).bit_length()))


def chip() -> str | None:
    """The short name of the default device: "h100", "h200", "v4", "v5e", "v5p", "v6e" ...; None for a CPU."""
    device = jax.devices()[0]
    return None if device.platform == "cpu" else chip_name(device.device_kind)


def chip_name(kind: str) -> str:
    """What the table calls a kind of device: "NVIDIA H100 80GB HBM3" is "h100", "TPU v5 lite" is "v5e"."""
    name = re.sub(r"^(nvidia|tpu)\s+", "", kind.lower())
    return _CHIPS.get(name) or name.split()[0]


def tuned[T](call: Call, kind: type[T]) -> T | None:
    """The measured block sizes of a call on the default device, as a backend's own class; None where there are none."""
    if not ROWS:
        return None
    name = chip()
    row = None if name is None else ROWS.get(dataclasses.astuple(Key.of(call, name)))
    return None if row is None else rebuild(kind, row)


def rebuild[T](kind: type[T], row: Mapping[str, Any]) -> T:
    """A dataclass from a row of the table, in which a dataclass within it is a tuple of its fields.

    Raises:
      ValueError: the row has not just the class's fields, so that it was made for another version of it.
    """
    hints = get_type_hints(kind)
    fields: tuple[dataclasses.Field, ...] = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
    if set(row) != {field.name for field in fields}:
        raise ValueError(
            f"tuning_table.py: expected the fields {', '.join(field.name for field in fields)} of {kind.__name__}, "
            f"found {', '.join(row)}: tune again, or remove the row"
        )
    values = {
        name: hints[name](*value) if dataclasses.is_dataclass(hints[name]) else value for name, value in row.items()
    }
    return kind(**values)


def flatten(blocks: Any) -> dict[str, Any]:
    """A backend's block sizes as a row of the table: the opposite of `rebuild`."""
    values = {field.name: getattr(blocks, field.name) for field in dataclasses.fields(blocks)}
    return {name: value if isinstance(value, int) else dataclasses.astuple(value) for name, value in values.items()}

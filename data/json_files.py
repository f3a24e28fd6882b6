"""Read and write JSON: the one reader of every configuration, index, manifest and line of JSON.

Stricter than Python's own reader, which returns what later computes nonsense or fails far from the file: a number
beyond a float64, NaN, a key that occurs twice, half of a surrogate pair, and nesting that exhausts the stack.
"""

from __future__ import annotations

import json
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .cloud.mirror import in_urls
from .errors import DataError
from .files import write_text

DEEPEST = 100
"""Maximum nesting of objects and lists."""

_MOST_DIGITS = 300  # of an integer; a float64 reaches 1.8e308
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # may be half of a surrogate pair
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_json(path: Path) -> Any:
    """Read a JSON file in UTF-8.

    Raises:
        DataError: it is not JSON; with the line.
        OSError: it cannot be read.
    """
    return parse_json(_text(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Errors as in `read_json`."""
    return expect(read_json(path), dict, str(path))


def read_object_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with a JSON object per line. Errors as in `read_json`."""
    lines = ((line, f"{path}, line {number}") for number, line in enumerate(_text(path).split("\n"), 1))
    return [expect(parse_line(line, where), dict, where) for line, where in lines if line.strip()]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start:,}"
        raise DataError(f"{path}: not JSON in UTF-8 ({found}).") from None


def parse_json(text: str, where: str, remedy: str = "") -> Any:
    """Parse JSON.

    Args:
        text: the text.
        where: its source, for messages: a file, or a file and line.
        remedy: what to do if it is not JSON.

    Raises:
        DataError: it is not JSON (with the line, if there are several), or not JSON that can be worked with: a number
            is NaN, infinite or beyond a float64, a key occurs twice in an object, text has half of a surrogate pair, or
            objects and lists are nested deeper than `DEEPEST`.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f", line {error.lineno}" if "\n" in text.rstrip() else ""
        raise DataError(
            f"{where}{place}: not JSON ({error.msg.removesuffix(' at')} at column {error.colno}).{remedy}"
        ) from None
    except _Refused as error:
        raise DataError(f"{where}: {error}.") from None
    except RecursionError:
        raise DataError(f"{where}: nested deeper than {DEEPEST} objects and lists.") from None
    if text.count("[") + text.count("{") > DEEPEST and _too_deep(value):
        raise DataError(f"{where}: nested deeper than {DEEPEST} objects and lists.")
    if _HALF_PAIR.search(text):
        half = next((found[0] for part in _texts(value) if (found := _SURROGATE.search(part))), None)
        if half is not None:
            raise DataError(f"{where}: \\u{ord(half):04x} is half of a surrogate pair, without the other half.")
    return value


def parse_line(text: str, where: str) -> Any:
    """Parse a line of a file with a JSON value per line. Errors as in `parse_json`."""
    return parse_json(text, where, " Expected one JSON object per line.")


def expect(value: Any, kind: Any, where: str) -> Any:
    """Return a parsed value that must have a type.

    Args:
        value: the value.
        kind: its type, as in an annotation: `int`, `float | None`, `list[str]`, `tuple[str, ...]` (a list too),
            `dict[str, int]`, `Literal["a", "b"]`. An int is a float too; a bool is no number.
        where: its source, for messages.

    Raises:
        DataError: it has another type.
    """
    if not fits(value, kind):
        raise DataError(f"{where}: expected {type_name(kind)}, found {in_words(value)}.")
    return value


def value_of(stored: Mapping[str, Any], key: str, kind: Any, where: str, *default: Any) -> Any:
    """Return the value of a key.

    Args:
        stored: a parsed object.
        key: the key.
        kind: type of the value; see `expect`.
        where: source of the object, for messages.
        default: value of a missing key; without it, the key must be there.

    Raises:
        DataError: the key is missing, or its value has another type.
    """
    if key in stored:
        return expect(stored[key], kind, f"{where}: {key}")
    if not default:
        raise DataError(f"{where}: the key {key!r} is missing.")
    return default[0]


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a parsed value has a type; see `expect`."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(kind))
    outer, inner = typing.get_origin(kind), typing.get_args(kind)
    if outer is typing.Literal:
        return value in inner
    if outer in (list, tuple):
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if outer is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_NAMES |= {list: "a list", dict: "a JSON object"}


def type_name(kind: Any) -> str:
    """Return a type of `value_of` in words, for messages."""
    if isinstance(kind, types.UnionType):
        return " or ".join(type_name(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(in_words, typing.get_args(kind)))
    if typing.get_origin(kind) in (list, tuple):
        return f"a list, each item {type_name(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        return f"a JSON object, each value {type_name(typing.get_args(kind)[1])}"
    return _NAMES[kind]


def in_words(value: Any) -> str:
    """Return a parsed value as short JSON text, for messages."""
    if isinstance(value, int | float | str | bool | None):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else f"{text[:60]}..."
    return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"


def write_json(path: Path, value: Any, *, ensure_ascii: bool = True) -> None:
    """Write a JSON file, completely or not at all. Errors as in `json_text`."""
    write_text(path, json_text(value, str(path), indent=2, ensure_ascii=ensure_ascii) + "\n")


def json_text(value: Any, where: str, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Return a value as JSON text, in which paths of mirrors are those of their stores.

    Args:
        value: JSON values.
        where: what it is, for messages.
        indent: as in `json.dumps`.
        ensure_ascii: as in `json.dumps`.

    Raises:
        DataError: a number is NaN or infinite.
    """
    try:
        return in_urls(json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False))
    except ValueError:
        places = list(_not_finite(value, ""))
        if not places:
            raise
        raise DataError(f"{where}: {'; '.join(places[:5])}. Only finite numbers are written.") from None


def _not_finite(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place or 'the value'} is {value}"
    elif isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in pairs:
            yield from _not_finite(part, f"{place}.{key}" if place else str(key))


class _Refused(ValueError):
    """Raised for JSON that cannot be worked with."""


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise _Refused(f"a number of {len(text):,} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Refused(f"the number {text[:40]} is beyond a 64-bit float")
    return value


def _constant(text: str) -> float:
    raise _Refused(f"not JSON (a number is {text})")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused(f"the key {in_words(repeated)} occurs twice in an object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [part for outer in level for part in _inside(outer) if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def _texts(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        else:
            waiting += part if isinstance(part, dict) else ()
            waiting += _inside(part)

"""The one reader of JSON: what it refuses, and how it says so; nothing that is not finite is written."""

import json
import math
from pathlib import Path

import pytest

from bestiary.data.errors import DataError
from bestiary.data.json_files import (
    DEEPEST,
    expect,
    json_text,
    parse_json,
    read_json,
    read_object,
    read_object_lines,
    value_of,
    write_json,
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON (Expecting value at column 1)"),
        ('{"a": 1,\n"b" 2}', "line 2: not JSON (Expecting ':' delimiter at column 5)"),
        ('{"a": 1} {}', "not JSON (Extra data at column 10)"),
        (f'{{"a": {"9" * 5000}}}', "a number of 5,000 digits"),
        ("1e999", "the number 1e999 is beyond a 64-bit float"),
        ("[NaN]", "not JSON (a number is NaN)"),
        ("[-Infinity]", "not JSON (a number is -Infinity)"),
        ('{"a": 1, "b": 2, "a": 3}', 'the key "a" occurs twice in an object'),
        (r'{"a": ["\ud83d"]}', r"\ud83d is half of a surrogate pair"),
        (r'{"\udc00": 1}', r"\udc00 is half of a surrogate pair"),
        ("[" * 100_000, "nested deeper than 100 objects and lists"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested deeper than 100 objects and lists"),
    ],
)
def test_what_cannot_be_worked_with_is_refused_with_its_place(text: str, said: str):
    with pytest.raises(DataError) as error:
        parse_json(text, "a.json")
    assert str(error.value).startswith("a.json")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_json_is_read(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_bytes("\ufeff".encode() + json.dumps({"a": [1, 2.5, None, "\U0001f600"], "b": 10**30}).encode())
    assert read_object(path) == {"a": [1, 2.5, None, "\U0001f600"], "b": 10**30}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "")


@pytest.mark.parametrize(("text", "found"), [("[]", "a list of 0"), ("null", "null"), ('"a"', '"a"'), ("3", "3")])
def test_something_else_than_an_object_is_refused(tmp_path: Path, text: str, found: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=f"a.json: expected a JSON object, found {found}"):
        read_object(tmp_path / "a.json")


def test_bytes_that_are_no_text_and_lines_are_named(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(DataError, match=r"not JSON in UTF-8 .byte 0xe9 at offset 7"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: not JSON .*Expected one JSON object per line\."):
        read_object_lines(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}')
    assert read_object_lines(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]


def test_values_have_their_types():
    stored = {"n": 3, "x": 2.5, "b": True, "t": "s", "none": None, "l": ["a", 1], "o": {"a": 1, "b": "x"}}
    assert value_of(stored, "n", float, "f") == 3
    assert value_of(stored, "none", int | None, "f") is None
    assert value_of(stored, "absent", int, "f", 7) == 7
    for key, kind, said in (
        ("x", int, "f: x: expected a whole number, found 2.5"),
        ("b", int, "f: b: expected a whole number, found true"),
        ("b", float, "f: b: expected a number, found true"),
        ("n", bool, "f: n: expected true or false, found 3"),
        ("t", float | None, 'f: t: expected a number or null, found "s"'),
        ("l", list[str], "f: l: expected a list, each item text, found a list of 2"),
        ("o", dict[str, int], "f: o: expected a JSON object, each value a whole number, found an object of 2"),
        ("absent", int, "f: the key 'absent' is missing"),
    ):
        with pytest.raises(DataError, match=said):
            value_of(stored, key, kind, "f")
    assert expect([1, 2], list[int], "f") == [1, 2]


def test_only_finite_numbers_are_written(tmp_path: Path):
    path = tmp_path / "results.json"
    write_json(path, {"metrics": {"dev": {"mcc": 0.5}}})
    with pytest.raises(DataError, match=r"results\.json: metrics\.dev\.1 is nan; loss is inf"):
        write_json(path, {"metrics": {"dev": [0.5, math.nan]}, "loss": math.inf})
    assert read_object(path) == {"metrics": {"dev": {"mcc": 0.5}}}, "the old file is whole"
    assert json_text({"a": "é"}, "", ensure_ascii=False) == '{"a": "é"}'

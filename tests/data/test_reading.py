"""Encodings and line ends."""

import pytest

from bestiary.data.errors import DataError
from bestiary.data.reading import read_lines, read_text


@pytest.mark.parametrize(
    "name", ["base64", "hex", "zlib", "rot13", "idna", "punycode", "undefined", "unicode_escape", "a\0b", "", "ü"]
)
def test_what_is_no_encoding_of_text_is_refused(file, name):
    with pytest.raises(DataError, match="is not a text encoding; try utf-8" if name else "^"):
        list(read_lines(file("a.txt", "text"), name or "utf 8 8"))


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        ("a\nb".encode("utf-16-le"), "utf-16", "line 1: not UTF-16 .*BOM"),
        ("\ufeffa\nb".encode("utf-16-le") + b"\x00\xd8", "utf-16", r"line 2: not UTF-16 \(byte 0x00 at column 2\)"),
        ("\ufeffa\nb".encode("utf-16-be") + b"\xd8\x00", "utf-16", r"line 2: not UTF-16 \(byte 0xd8 at column 2\)"),
        ("\ufeffab".encode() + b"\xff", None, r"line 1: not UTF-8 \(byte 0xff at column 3\)"),
        (b"a\nb+2D0-", "utf-7", r"not UTF-7 \(half of a character, U\+D83D\)"),
        ("ab\ncd".encode("utf-16-le"), None, "null characters, as in UTF-16 without a byte order mark"),
        ("ab\ncd".encode("utf-32-be"), "latin-1", "null characters"),
        (b"\xa4\xff", "shift_jis", r"line 1: not SHIFT_JIS \(byte 0xff at column 2\)"),
    ],
)
def test_what_is_not_in_the_encoding_is_told_with_its_place(file, content, encoding, message):
    with pytest.raises(DataError, match=message):
        list(read_lines(file("a.txt", content), encoding))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_byte_order_mark_is_no_text(file, encoding):
    mark = "" if encoding == "utf-16" else "\ufeff"
    assert list(read_lines(file("a.txt", f"{mark}ä\nb\n".encode(encoding)), encoding)) == ["ä", "b"]


def test_a_carriage_return_is_text_within_a_line_and_no_line_end_of_its_own(file):
    assert list(read_lines(file("a.txt", "a\rb\r\nc\r\n"))) == ["a\rb", "c"]
    assert list(read_lines(file("a.txt", "a\r"))) == ["a"]
    with pytest.raises(DataError, match=r"a.txt: its lines end in a carriage return alone"):
        list(read_lines(file("a.txt", "a\rb\r")))
    assert read_text(file("a.txt", "a\rb\r\nc")) == "a\nb\nc"  # a whole document

"""Decompress and decode files to lines of text; every error names its file, line and column."""

from __future__ import annotations

import codecs
import gzip
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import CorpusError

CHUNK_BYTES = 1 << 20
COMPRESSIONS = (".gz", ".zst")
_MARK = "\ufeff"  # the byte order mark, decoded
_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_FILES = {"idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape"}


def decoded_chunks(
    path: Path, encoding: str | None = None, on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[str]:
    """Yield the text of a file in chunks; `.gz` and `.zst` are decompressed, and a byte order mark is dropped.

    Args:
        path: the file.
        encoding: the encoding that the user chose with --encoding; None for formats that are always UTF-8.
        on_bytes: called with the number of (compressed) bytes of the file that each step has read.

    Raises:
        CorpusError: the encoding is unknown, bytes are not in it, text is full of null characters, or compressed data
            is damaged or truncated.
    """
    remedy = "Convert the file to UTF-8." if encoding is None else "Convert the file, or pass --encoding."
    codec = _text_codec(encoding or "utf-8")
    decoder = codec.incrementaldecoder("strict")
    line, column, begun = 1, 1, False
    for data, last in _with_last(_raw_chunks(path, on_bytes)):
        _, state = decoder.getstate()
        try:
            text = decoder.decode(data, last)
            if surrogate := _SURROGATE.search(text):  # UTF-7 can spell one
                raise UnicodeError(f"half of a character, U+{ord(surrogate[0]):04X}")
        except UnicodeDecodeError as error:
            lenient = codec.incrementaldecoder("replace")
            lenient.setstate((b"", state))
            line, column = _advanced(
                line, column, lenient.decode(error.object[: error.start]).lstrip("" if begun else _MARK)
            )
            found = f"byte 0x{error.object[error.start]:02x} at column {column}"
            raise CorpusError(f"{path}, line {line}: not {codec.name.upper()} ({found}). {remedy}") from None
        except UnicodeError as error:  # no byte order mark where one is needed, for instance
            raise CorpusError(f"{path}, line {line}: not {codec.name.upper()} ({error}). {remedy}") from None
        if not begun:
            text = text.lstrip(_MARK)
            begun = bool(text)
            if 4 * text.count("\0", 0, 4096) > len(text[:4096]):
                raise CorpusError(f"{path}: null characters, as in UTF-16 without a byte order mark. {remedy}")
        line, column = _advanced(line, column, text)
        if text:
            yield text


def read_text(path: Path, encoding: str | None = None, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Return the whole text of a file, with `\\n` for `\\r\\n` and `\\r`. Errors as in `decoded_chunks`."""
    return "".join(decoded_chunks(path, encoding, on_bytes)).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(
    path: Path, encoding: str | None = None, on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[str]:
    """Yield the lines of a file without `\\n` or `\\r\\n`, in constant memory.

    A carriage return within a line is part of its text.

    Raises:
        CorpusError: as in `decoded_chunks`; or all lines end in a carriage return alone.
    """
    rest, several = "", False
    for chunk in decoded_chunks(path, encoding, on_bytes):
        *lines, rest = (rest + chunk).split("\n")
        several = several or bool(lines)
        for line in lines:
            yield line.removesuffix("\r")
    rest = rest.removesuffix("\r")
    if "\r" in rest and not several:
        raise CorpusError(f"{path}: its lines end in a carriage return alone. Convert them to end in a line feed.")
    if rest:
        yield rest


def lines_of(path: Path | None) -> Iterator[str]:
    """Yield the lines of a file or of standard input.

    Raises:
        CorpusError: bytes are not UTF-8; the message names the line.
    """
    if path is not None:
        if not path.is_file():
            raise CorpusError(f"{path}: there is no such file.")
        yield from read_lines(path)
        return
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
            raise CorpusError(f"standard input, line {number}: not UTF-8 ({found}).") from None


def _text_codec(name: str) -> codecs.CodecInfo:
    """Return the codec of a character encoding.

    Raises:
        CorpusError: there is none, or it is not one of text files (base64, idna, unicode_escape, ...).
    """
    try:
        "a".encode(name)
        codec = codecs.lookup(name)
    except (LookupError, ValueError):  # ValueError: a null character in the name
        codec = None
    if codec is None or codec.name.replace("-", "_") in _NO_FILES or codec.incrementaldecoder is None:
        raise CorpusError(f"{name!r} is not a text encoding; try utf-8, latin-1 or cp1252.")
    return codec


def _advanced(line: int, column: int, text: str) -> tuple[int, int]:
    """Return the line and column after a text."""
    breaks = text.count("\n")
    return line + breaks, (1 if breaks else column) + len(text) - (text.rfind("\n") + 1)


def _with_last(chunks: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    for chunk in chunks:
        yield chunk, False
    yield b"", True


def _raw_chunks(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    damaged = f"{path}: the compressed data is damaged or truncated. Copy or download the file again."
    try:
        file = path.open("rb")
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}).") from error
    with file:
        if suffix == ".gz":
            seen = 0
            try:
                with gzip.GzipFile(fileobj=file) as stream:
                    while chunk := stream.read(CHUNK_BYTES):
                        on_bytes(file.tell() - seen)
                        seen = file.tell()
                        yield chunk
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise CorpusError(f"{damaged} ({error})") from error
        elif suffix == ".zst":
            yield from _zstd_chunks(file, on_bytes, damaged)
        else:
            while chunk := file.read(CHUNK_BYTES):
                on_bytes(len(chunk))
                yield chunk


def _zstd_chunks(file, on_bytes: Callable[[int], None], damaged: str) -> Iterator[bytes]:
    """Read frame by frame, since the library's reader over several frames does not notice a truncated file."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, begun = decompressor.decompressobj(), False
    try:
        while data := file.read(CHUNK_BYTES // 4):
            on_bytes(len(data))
            while data:
                chunk, begun = frame.decompress(data), True
                if chunk:
                    yield chunk
                if not frame.eof:
                    break
                data = frame.unused_data
                frame, begun = decompressor.decompressobj(), False
    except zstandard.ZstdError as error:
        raise CorpusError(f"{damaged} ({error})") from error
    if begun:
        raise CorpusError(damaged)

"""Decompress and decode files to lines of text; every error names its file, line and column."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import CorpusError

CHUNK_BYTES = 1 << 20
COMPRESSIONS = (".gz", ".zst")


def decoded_chunks(
    path: Path, encoding: str | None = None, on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[str]:
    """Yield the text of a file in chunks; `.gz` and `.zst` are decompressed, and a byte order mark is dropped.

    Args:
        path: the file.
        encoding: the encoding that the user chose with --encoding; None for formats that are always UTF-8.
        on_bytes: called with the number of (compressed) bytes of the file that each step has read.

    Raises:
        CorpusError: the encoding is unknown, bytes are not in it, or compressed data is damaged or truncated.
    """
    remedy = "Convert the file to UTF-8." if encoding is None else "Convert the file, or pass --encoding."
    encoding = encoding or "utf-8"
    try:
        decoder = codecs.getincrementaldecoder(_with_mark_dropped(encoding))("strict")
    except LookupError:
        raise CorpusError(f"{encoding!r} is not a text encoding; try utf-8, latin-1 or cp1252.") from None
    line, column = 1, 1
    for data, last in _with_last(_raw_chunks(path, on_bytes)):
        try:
            text = decoder.decode(data, last)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode(encoding, "replace")
            if "\n" in before:
                line, column = line + before.count("\n"), 1
            column += len(before) - (before.rfind("\n") + 1)
            found = f"byte 0x{error.object[error.start]:02x} at column {column}"
            raise CorpusError(f"{path}, line {line}: not {_display_name(encoding)} ({found}). {remedy}") from None
        breaks = text.count("\n")
        if breaks:
            line, column = line + breaks, 1
        column += len(text) - (text.rfind("\n") + 1)
        if text:
            yield text


def read_text(path: Path, encoding: str | None = None, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Return the whole text of a file, with `\\n` line ends. Errors as in `decoded_chunks`."""
    return "".join(decoded_chunks(path, encoding, on_bytes)).replace("\r\n", "\n")


def read_lines(
    path: Path, encoding: str | None = None, on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[str]:
    """Yield the lines of a file without `\\n` or `\\r\\n`, in constant memory. Errors as in `decoded_chunks`."""
    rest = ""
    for chunk in decoded_chunks(path, encoding, on_bytes):
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            yield line.removesuffix("\r")
    if rest:
        yield rest.removesuffix("\r")


def _display_name(encoding: str) -> str:
    return codecs.lookup(encoding).name.upper()


def _with_mark_dropped(encoding: str) -> str:
    return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding


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

"""Compute vectors of sentences or tokens with a pretrained encoder.

bestiary embed --model FOLDER < sentences.txt > vectors.npy
bestiary embed --model FOLDER --layers -1,-2 --combine concat --pooling mean --normalize --input a.txt.gz --out a.npy
bestiary embed --model FOLDER --pooling token --input sentences.txt --out tokens.npz
"""

import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...data.errors import DataError
from ...data.files import check_output, replacing
from ...data.progress import counted
from ...data.reading import lines_of
from ..progress import Progress
from .config import EmbedConfig
from .elmo import open_extractor
from .extract import windows


class ArrayFile:
    """An array on disk in NumPy's .npy format that grows along its first axis. `file` must be readable and seekable."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._shape: tuple[int, ...] = ()
        self._dtype: Any = None

    def append(self, rows: np.ndarray) -> None:
        """Add rows [n, ...], of one dtype and shape each time."""
        if self._dtype is None:
            self._shape, self._dtype = (0, *rows.shape[1:]), rows.dtype
            self._write_header()
        self._file.write(np.ascontiguousarray(rows).data)
        self._shape = (self._shape[0] + len(rows), *self._shape[1:])

    def _write_header(self) -> None:
        # NumPy leaves room in the header for the first axis to grow, so that writing it again moves nothing.
        description = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": description, "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def finish(self) -> IO[bytes]:
        """Write the final shape; return the file, rewound to its beginning."""
        self._file.seek(0)
        self._write_header()
        self._file.seek(0)
        return self._file


@contextmanager
def _target(path: Path | None) -> Iterator[IO[bytes]]:
    """Open the output; a file is written completely or not at all."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        yield file


def main(config: EmbedConfig) -> int:
    """Run `bestiary embed`; return the exit status."""
    if config.out is not None:
        check_output(config.out)
    progress = Progress()
    lines = lines_of(config.input)
    first = next(lines, None)  # report empty input before loading the model
    if first is None:
        raise DataError(f"{config.input or 'standard input'}: empty. Expected one text per line.")
    extract = open_extractor(config)
    tokens_too = not extract.settings.pooling
    started, done = time.perf_counter(), 0
    with ExitStack() as stack:
        folder = None if config.out is None else config.out.parent
        names = ("vectors", "starts", "input_ids") if tokens_too else ("vectors",)
        arrays = {name: ArrayFile(stack.enter_context(tempfile.TemporaryFile(dir=folder))) for name in names}
        tokens = 0
        for window in windows(_again(first, lines)):
            if done:
                rate = done / (time.perf_counter() - started)
                progress.update(f"{done:,} texts, {tokens:,} tokens, {rate:,.0f} texts/s")
            found = extract(window)
            arrays["vectors"].append(found.vectors)
            if tokens_too:
                arrays["input_ids"].append(found.input_ids)
                arrays["starts"].append(found.starts[1 if done else 0 :] + tokens)
            tokens += int(found.starts[-1])
            done += len(window)
        with _target(config.out) as target:
            if tokens_too or (config.out is not None and config.out.suffix == ".npz"):
                with zipfile.ZipFile(target, "w") as archive:
                    for name, array in arrays.items():
                        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                            shutil.copyfileobj(array.finish(), member, 1 << 20)
            else:
                shutil.copyfileobj(arrays["vectors"].finish(), target, 1 << 20)
    seconds = time.perf_counter() - started
    cut = f", {counted(extract.truncated, 'token')} truncated (--max-length)" if extract.truncated else ""
    progress.line(f"{counted(done, 'text')}, {counted(tokens, 'token')}{cut}, {done / seconds:,.0f} texts/s")
    return 0


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest

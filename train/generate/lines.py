"""Lines of standard input, as they arrive."""

import queue
import threading
from collections.abc import Iterator
from typing import BinaryIO

from ..errors import RunError

WAIT_SECONDS = 0.05  # time to wait for more lines, once there is one


class Lines:
    """Lines of a stream, read by a thread as they arrive; at most `window` lines are buffered."""

    def __init__(self, stream: BinaryIO, window: int):
        self._window = window
        self._waiting: queue.Queue[str | Exception | None] = queue.Queue(window)
        self._stream = stream
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for number, line in enumerate(self._stream, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise RunError(
                        f"standard input, line {number}: not UTF-8 (byte 0x{line[error.start]:02x} at column "
                        f"{error.start + 1}). Convert the text first."
                    ) from None
                self._waiting.put(text.removesuffix("\n").removesuffix("\r"))
            self._waiting.put(None)
        except Exception as error:  # re-raised in the thread that takes the lines
            self._waiting.put(error)

    def __iter__(self) -> Iterator[list[str]]:
        """Yield up to `window` lines at a time: those available, as soon as there is one."""
        some: list[str] = []
        while True:
            try:
                line = self._waiting.get(timeout=WAIT_SECONDS if some else None)
            except queue.Empty:
                yield some
                some = []
                continue
            if isinstance(line, str):
                some.append(line)
            if some and (len(some) == self._window or not isinstance(line, str)):
                yield some
                some = []
            if isinstance(line, Exception):
                raise line
            if line is None:
                return

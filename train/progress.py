"""Progress output of long tasks: progress, a rate, and the time left."""

import os
import sys
import time
from typing import ClassVar

from ..data.cloud.mirror import in_urls


def duration(seconds: float) -> str:
    """Format seconds: `75` -> `1m15s`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


BAR = 16  # width of a bar, in characters


class Progress:
    """One line that is rewritten in place on a terminal; plain lines, at intervals, without a terminal.

    Args:
        shown: False to show nothing, for processes other than the first.
        every: seconds between plain lines, or, on a terminal, ten times the seconds between updates.
    """

    open: ClassVar[bool] = False
    """whether the cursor is at the end of a line that is being rewritten"""

    def __init__(self, *, shown: bool = True, every: float = 5.0):
        self._shown = shown
        self._terminal = shown and sys.stderr.isatty()
        self._every = every
        self._last = -float("inf")

    def update(self, text: str, *, done: float | None = None, force: bool = False) -> None:
        """Show the state of the work, replacing the last update.

        Args:
            text: the state.
            done: fraction of the work that is done, which a terminal shows as a bar; None: no bar.
            force: show it even if the last update was just now.
        """
        now = time.monotonic()
        if not self._shown or not (force or now - self._last >= self._every / (10 if self._terminal else 1)):
            return
        self._last, text = now, in_urls(text)
        if self._terminal:  # one line of the terminal, since a longer one could not be rewritten
            shown = text if done is None else f"{bar(done)} {text}"
            print(f"\r\x1b[K{shown[: _columns() - 1]}", end="", file=sys.stderr, flush=True)
            Progress.open = True
        else:
            print(text, file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self._shown:
            end_line()
            print(in_urls(text), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Print a line that stays, in every process."""
        end_line()
        print(in_urls(text), file=sys.stderr, flush=True)


def bar(done: float) -> str:
    """Draw a fraction as a bar of `BAR` characters, each of eight parts."""
    eighths = round(max(0.0, min(1.0, done)) * BAR * 8)
    whole, rest = divmod(eighths, 8)
    return f"{'█' * whole}{' ▏▎▍▌▋▊▉'[rest] if rest else ''}".ljust(BAR) + "▏"


def end_line() -> None:
    """End the line that is being rewritten, if there is one, before something else is printed."""
    if Progress.open:
        print(file=sys.stderr, flush=True)
        Progress.open = False


def _columns() -> int:
    try:
        return max(20, os.get_terminal_size(sys.stderr.fileno()).columns)
    except (OSError, ValueError):
        return 80


class Work:
    """Progress of work of a known amount: how much is done, at what rate, and the time left.

    Args:
        progress: where to show it.
        task: name of the work.
        total: amount of work.
        unit: what is counted, in the plural.
    """

    def __init__(self, progress: Progress, task: str, total: int, unit: str):
        self._progress, self._task, self._total, self._unit = progress, task, total, unit
        self._started = time.monotonic()

    def update(self, done: int) -> None:
        """Show that this much is done, unless it is all."""
        if 0 < done < self._total:
            rate = done / max(time.monotonic() - self._started, 1e-9)
            of = f"{self._task}: {done:,} of {self._total:,} {self._unit}"
            left = duration((self._total - done) / rate)
            text = f"{of}, {rate:,.0f} {self._unit}/s, {left} left"
            self._progress.update(text, done=done / self._total)

"""Progress output of long tasks: progress, a rate, and the time left."""

import sys
import time


def duration(seconds: float) -> str:
    """Format seconds: `75` -> `1m15s`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Progress:
    """One line that is rewritten in place on a terminal; plain lines, at intervals, without a terminal.

    Args:
        shown: False to show nothing, for processes other than the first.
        every: seconds between plain lines.
    """

    def __init__(self, *, shown: bool = True, every: float = 5.0):
        self._shown = shown
        self._terminal = shown and sys.stderr.isatty()
        self._every = every
        self._last = -float("inf")
        self._open = 0  # width of the line that is being rewritten

    def update(self, text: str, *, force: bool = False) -> None:
        """Show the state of the work, replacing the last update."""
        now = time.monotonic()
        if not self._shown or not (force or self._terminal or now - self._last >= self._every):
            return
        self._last = now
        if self._terminal:
            print(f"\r{text:<{self._open}}", end="", file=sys.stderr, flush=True)
            self._open = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self._shown:
            if self._open:
                print(file=sys.stderr)
                self._open = 0
            print(text, file=sys.stderr, flush=True)

"""Progress: one line that is rewritten on a terminal, plain lines elsewhere."""

import io
import os

import pytest

from bestiary.train.progress import BAR, Progress, Work, bar, end_line


class Terminal(io.StringIO):
    """Standard error as a terminal of 30 columns."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2


def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    found = Terminal()
    monkeypatch.setattr("sys.stderr", found)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((30, 5)))
    return found


def test_a_terminal_has_one_line_of_its_width_until_another_is_printed(monkeypatch):
    terminal = a_terminal(monkeypatch)
    shown = Progress(every=0)
    shown.update("a" * 50)
    shown.update("short")
    assert terminal.getvalue() == f"\r\x1b[K{'a' * 29}\r\x1b[Kshort"
    shown.line("done")
    assert terminal.getvalue().endswith("short\ndone\n")
    shown.update("again")
    end_line()
    end_line()
    assert terminal.getvalue().endswith("again\n"), "an error message begins on a line of its own"


def test_a_terminal_has_a_bar_of_what_is_done(monkeypatch):
    terminal = a_terminal(monkeypatch)
    Progress(every=0).update("step 5/8", done=5 / 8)
    assert terminal.getvalue() == f"\r\x1b[K{'█' * 10}{' ' * 6}▏ step 5/8"
    assert bar(0) == " " * BAR + "▏"
    assert bar(1) == "█" * BAR + "▏"
    assert bar(0.5 + 1 / 32) == "█" * 8 + "▌" + " " * 7 + "▏"
    end_line()


def test_elsewhere_lines_come_at_intervals(capsys):
    shown = Progress(every=3600)
    for number in range(3):
        shown.update(f"step {number}")
    shown.update("the last", done=1.0, force=True)
    Progress(shown=False).line("of another process")
    assert capsys.readouterr().err == "step 0\nthe last\n"


def test_work_says_how_much_at_what_rate_and_what_is_left(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr("bestiary.train.progress.time.monotonic", lambda: next(clock))
    work = Work(Progress(every=1), "predicting", 1000, "windows")
    work.update(200)
    work.update(1000)
    assert capsys.readouterr().err == "predicting: 200 of 1,000 windows, 20 windows/s, 40s left\n"

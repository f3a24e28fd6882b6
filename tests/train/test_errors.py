"""Errors at the command line: one message and exit status 1, whatever was raised; the traceback on request."""

import errno
import os
from pathlib import Path

import pytest

from bestiary.train.cli import main
from bestiary.train.errors import RunError
from bestiary.train.machine import compiled
from bestiary.train.machine.compiled import keep_compiled_programs


class PanicException(BaseException):
    """As pyo3 raises it for a panic in Rust: no Exception."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RunError("a.txt, line 3: no tab."), "bestiary: a.txt, line 3: no tab.\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "bestiary: [Errno 2] No such file: 'x'\n"),
        (
            ZeroDivisionError("division by zero\nand more"),
            "bestiary: unexpected ZeroDivisionError: division by zero. Set BESTIARY_TRACEBACK=1 to see where it was "
            "raised.\n",
        ),
        (PanicException("index out of bounds"), "bestiary: unexpected PanicException: index out of bounds. Set"),
        (RecursionError(), "bestiary: unexpected RecursionError: no message. Set"),
        (MemoryError(), "bestiary: out of memory: Python could not allocate more\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GB\nmore"), "bestiary: out of memory: RESOURCE_EXHAUSTED: 3 GB\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x"),
            "bestiary: [Errno 28] No space left on device: 'x'\n",
        ),
    ],
)
def test_any_error_is_a_message_and_exit_status_1(error: BaseException, said: str, monkeypatch, capsys):
    def raising(_: object) -> None:
        raise error

    monkeypatch.setattr("bestiary.train.commands.zoo.main", raising)
    assert main(["models"]) == 1
    found = capsys.readouterr().err
    assert found.startswith(said)
    assert "Traceback" not in found
    assert "resumes" not in found, "only training does"
    monkeypatch.setenv("BESTIARY_TRACEBACK", "1")
    assert main(["models"]) == 1
    found = capsys.readouterr().err
    assert found.startswith("Traceback")
    assert said in found


def test_an_interrupt_and_an_exit_stay_what_they_are(monkeypatch, capsys):
    def raising(error: BaseException) -> None:
        def run(_: object) -> None:
            raise error

        monkeypatch.setattr("bestiary.train.commands.zoo.main", run)

    raising(KeyboardInterrupt())
    assert main(["models"]) == 130
    raising(SystemExit(0))
    with pytest.raises(SystemExit):
        main(["models"])


CACHE = "JAX_COMPILATION_CACHE_DIR"


def test_compiled_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    for name in (CACHE, *compiled.SETTINGS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    keep_compiled_programs()
    folder = Path(os.environ[CACHE])
    assert folder.parent == tmp_path / "caches" / "bestiary" / "compiled"
    assert folder.is_dir()
    monkeypatch.setenv(CACHE, "elsewhere")
    keep_compiled_programs()
    assert os.environ[CACHE] == "elsewhere", "the user's own folder"


@pytest.mark.parametrize("home", ["a file", "not writable"])
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path, home: str):
    monkeypatch.delenv(CACHE, raising=False)
    if home == "a file":
        (tmp_path / "caches").touch()
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    keep_compiled_programs()
    assert CACHE not in os.environ

"""Files and folders that appear whole or not at all, and where those are kept that later runs can use again."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write a file to, beside `path`; when the block ends it replaces `path`, durably and atomically.

    A kill leaves the old file or the new one, and a block that raises leaves the old one. The file has the permissions
    that the user's umask gives, whatever the library that wrote it had in mind. Its name ends as `path` does.
    """
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    unfinished.touch()
    mode = unfinished.stat().st_mode
    try:
        yield unfinished
        with unfinished.open("rb+") as handle:
            os.fsync(handle.fileno())
        unfinished.chmod(mode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file by `replacing`."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def user_cache_folder() -> Path:
    """`bestiary` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bestiary"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`; where it is missing, it is built first.

    Args:
        folder: the result; a kill leaves nothing under this name.
        build: writes the folder's contents under the path it is given, which does not exist yet. Two processes may
            build at the same time; the first to end wins.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".unfinished-{os.getpid()}-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        build(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process has just built the same
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder

"""Write files and folders that appear complete or not at all, and locate the cache that runs share."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, next to `path`, that replaces `path` durably and atomically when the block ends.

    A kill leaves the old file or the new one, and a block that raises leaves the old one. The file gets the permissions
    of the user's umask, whatever the library that wrote it requested. The temporary name ends as `path` does.
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
    """Return `bestiary` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bestiary"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, after building it if it is missing.

    Args:
        folder: folder to build; a kill leaves nothing under this name.
        build: creates the folder at the given path, which does not exist yet. Two processes may build at the same
            time; the first to finish wins.
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
            if not folder.is_dir():  # otherwise another process has just built the same
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder

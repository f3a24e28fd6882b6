"""Write files that appear complete or not at all, and locate the user's cache."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(path: Path) -> None:
    """Check, before any work, that a file can be written there.

    Raises:
        FileNotFoundError: its folder is missing.
        IsADirectoryError: it is a folder.
        PermissionError: its folder cannot be written.
    """
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {folder} to write to.")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; expected the name of a file to write.")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path}: the folder {folder} cannot be written.")


def check_output_folder(path: Path, *, new: bool = False) -> None:
    """Check, before any work, that a folder can be written there; it is created later.

    Args:
        path: the folder.
        new: whether it must be missing or empty.

    Raises:
        FileExistsError: it is something else, or must be new and is not empty.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: exists and is not a folder.")
    if new and path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{path} exists and is not empty. Choose another --out.")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, next to `path`, that replaces `path` durably and atomically when the block ends.

    A kill leaves the old file or the new one, and a block that raises leaves the old one. The file gets the permissions
    of the user's umask, whatever the library that wrote it requested. The temporary name ends as `path` does.

    Raises:
        OSError: the file cannot be written there; see `check_output`.
    """
    check_output(path)
    unfinished = temporary(path)
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


def temporary(path: Path) -> Path:
    """Return this process's temporary name for a file or folder, next to it; what killed processes left is removed.

    The name says which process uses it, so that another one can tell whether that has ended.
    """
    host = socket.gethostname()
    for left in path.parent.glob(f".unfinished-*@{host}-{path.name}"):
        if not _runs(left.name.removeprefix(".unfinished-").partition("@")[0]):
            remove(left)
    mine = path.with_name(f".unfinished-{os.getpid()}@{host}-{path.name}")
    remove(mine)
    return mine


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    """Tell whether a process of this machine runs, of which the number is given."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):  # no number of ours, or another user's process
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file by `replacing`."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def user_cache_folder() -> Path:
    """Return `bestiary` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bestiary"

"""Caches that runs share: a folder that is built once, on a disk or in a store."""

import shutil
from collections.abc import Callable
from pathlib import Path

from ..files import temporary
from .mirror import fetch, publish


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, after building it if it is missing.

    Args:
        folder: folder to build; a kill leaves nothing under this name. That of a store is fetched from there, and
            published once it is built.
        build: creates the folder at the given path, which does not exist yet. Two processes may build at the same
            time; the first to finish wins.
    """
    if not folder.is_dir():
        fetch(folder, missing=True)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary(folder)
    try:
        build(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has just built the same
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    publish(folder)
    return folder

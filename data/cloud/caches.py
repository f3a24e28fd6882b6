"""Caches that runs share: a folder that is built once, on a disk or in a store."""

import shutil
from collections.abc import Callable
from pathlib import Path

from ..files import remove, temporary
from ..json_files import write_json
from .mirror import COMPLETE, fetch, publish, url_of


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, after building it if it is missing.

    Args:
        folder: folder to build; a kill leaves nothing under this name. That of a store is fetched from there, and
            published once it is built; there, `complete.json`, the last to be copied, tells that it is whole.
        build: creates the folder at the given path, which does not exist yet. Two processes may build at the same
            time; the first to finish wins.
    """
    in_store = url_of(folder) is not None

    def is_built() -> bool:
        return folder.is_dir() and (not in_store or (folder / COMPLETE).is_file())

    if not is_built():
        fetch(folder, missing=True)
    if not is_built():
        remove(folder)  # publishing it was cut short
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = temporary(folder)
        try:
            build(unfinished)
            if in_store:
                write_json(unfinished / COMPLETE, {})
            try:
                unfinished.rename(folder)
            except OSError:
                if not is_built():  # otherwise another process has just built the same
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    publish(folder)  # copies nothing unless it has just been built, or was cut short
    return folder

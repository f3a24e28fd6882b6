"""Paths of object stores (gs://bucket/books, and all that fsspec opens), each with a mirror on this machine's disk.

    gs://bucket/books        is worked on as        CACHE/mirror/gs/bucket/books

Memory maps, safetensors, TensorBoard and file locks need files of the operating system. So what is read is copied here
first (`fetch`), what is written is written here and then copied there (`publish`). Both copy only the files that
differ: an index keeps, for each file that is the same here and there, its size and time here and its version there.

Objects are replaced one by one, and folders cannot be renamed, so the order is what commits: JSON comes after all other
files, that of deeper folders first; `results.json` is last of all. A checkpoint counts with its manifest,
`checkpoints/120.json`, which comes after the lines of metrics up to it; a model or a cache with its JSON, which is
removed before the files beside it are replaced. A process that is killed in between leaves files that do not count; the
index says that they were being copied, so that the next start copies them again, and does not take them for another
machine's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import DataError
from ..files import replacing, user_cache_folder

COPIES = 8
"""Files that are copied at the same time."""
CLAIM = "run.lock"
"""A file that names the process that works in a folder; see `claim`."""
COMPLETE = "complete.json"
"""A file that tells that a folder of a cache is whole; see `build_once`."""
_LAST = ("/results.json", f"/{COMPLETE}")
COPYING = "being copied"
"""Version of a file of which nobody knows whether the store has it: it is being published, or that was cut short."""
OBJECT_STORES = {"gs", "gcs", "s3", "s3a", "az", "abfs", "memory"}
"""Where a whole object replaces another one, and there are no folders to make."""
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "az": "adlfs", "abfs": "adlfs"}
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(\S+)")
_WEB = ("http", "https")
_VERSIONS = ("etag", "ETag", "generation", "md5Hash", "crc32c", "mtime", "last_modified", "LastModified", "created")
_NOT_COPIED = re.compile(rf"(^|/)(\.unfinished-[^/]*(/.*)?|[^/]*\.orbax-checkpoint-tmp[^/]*(/.*)?|{re.escape(CLAIM)})$")
_claims: dict[Path, tuple[str, str]] = {}  # folder -> its CLAIM in the store, and what this process wrote there


def scheme_of(text: str) -> str | None:
    """Return the scheme of a path of a store, such as `gs`; None for other text, and for pages of the web."""
    found = _URL.fullmatch(text)
    return found[1] if found and found[1] not in _WEB else None


def mirror(url: str) -> Path:
    """Return where a path of a store is on this machine's disk; it may be missing.

    Raises:
        DataError: the path has `..` in it.
    """
    scheme, _, rest = url.partition("://")
    parts = PurePosixPath(rest.strip("/")).parts
    if ".." in parts:
        raise DataError(f"{url}: a path of a store has no '..' in it.")
    return _root().joinpath(scheme, *parts)


def url_of(path: Path) -> str | None:
    """Return the path of a store of which this is the mirror, or None."""
    if not path.is_relative_to(_root()):
        return None
    scheme, *parts = path.relative_to(_root()).parts
    return f"{scheme}://{'/' * (scheme == 'file')}{'/'.join(parts)}"


def place_for_all(path: Path) -> str | None:
    """Return where Orbax writes what is mirrored here by itself, from several machines; None if it cannot."""
    url = url_of(path) or ""
    return url if url.startswith("gs://") else url.removeprefix("file://") if url.startswith("file://") else None


def in_urls(text: str) -> str:
    """Return a text for the user in which paths of mirrors are those of their stores."""
    named = re.sub(rf"{re.escape(str(_root()))}/([a-z][a-z0-9+.-]*)/", r"\1://", text)
    return re.sub(r"\bfile://(?!/)", "file:///", named)


def fetch(
    path: Path,
    *,
    missing: bool = False,
    together: bool = False,
    left_out: Callable[[set[str]], str] = lambda _: "",
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Make a mirror equal to its store; a path that is no mirror is left alone.

    Args:
        path: mirror of a file or folder of a store.
        missing: whether the store may have nothing there.
        together: whether its files belong together, as those of a run: if any has changed in the store, what this
            machine has not published is dropped. Otherwise files that have changed here alone stay.
        left_out: names in the folder -> the start of those that are not copied; "" for none.
        report: called with a line for the user when something is copied.

    Raises:
        FileNotFoundError: the store has no such file or folder.
        DataError: the store cannot be read.
    """
    url = url_of(path)
    if url is None:
        return
    with _store(url) as (fs, root), _index(url) as (index, _):
        there = _listing(fs, root)
        if not there and not missing:
            raise FileNotFoundError(f"{url}: there is no such file or folder.")
        start = left_out({_inside(file, root) for file in there})
        there = {file: info for file, info in there.items() if _copied(_inside(file, root), start)}
        known = _known(index, root)
        for file in known:  # what somebody has removed here is not removed there
            if not (path / _inside(file, root)).is_file():
                del index[file]
        known = {file for file in known & index.keys() if _copied(_inside(file, root), start)}
        ours = {file for file in known if index[file].version == COPYING}  # which is newer here
        gone = known - there.keys() - ours
        differs = {file for file in there.keys() & known - ours if index[file].version != _version(there[file])}
        if together and path.exists() and (gone or there.keys() - known or differs):
            report(f"{url} has changed since this machine last worked on it; it is copied anew")
            _remove(path)
            for file in _known(index, root):
                del index[file]
            gone = set()
        for file in gone:
            (path / _inside(file, root)).unlink(missing_ok=True)
            del index[file]
        wanted = sorted(file for file in there if file not in index or file in differs)
        if wanted:
            size = sum(there[file].get("size") or 0 for file in wanted)
            report(f"copying {url} to this machine: {len(wanted):,} files, {size / 2**20:,.1f} MiB")

        def copy(file: str) -> None:
            target = path / _inside(file, root)
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as unfinished:
                fs.get_file(file, str(unfinished))
            index[file] = _Same(*_stat(target), _version(there[file]))

        with ThreadPoolExecutor(COPIES) as threads:
            for last in (False, True):
                list(threads.map(copy, [file for file in wanted if file.endswith(_LAST) is last]))


def publish(path: Path, *, left_out: str = "") -> None:
    """Make a store equal to its mirror; a path that is no mirror, or is missing, is left alone.

    Args:
        path: mirror of a file or folder of a store.
        left_out: start of the names that are not copied; "" for none.

    Raises:
        DataError: the store cannot be written; or another process has claimed the folder since.
    """
    url = url_of(path)
    if url is None or not path.exists():
        return
    with _store(url) as (fs, root), _index(url) as (index, write_index):
        _require_claim(fs, path)
        here = {f"{root}/{name}" if name else root: path / name for name in _names(path, left_out)}
        known = _known(index, root)
        gone = {file for file in known - here.keys() if _copied(_inside(file, root), left_out)}
        changed = [file for file in here if file not in index or index[file][:2] != _stat(here[file])]
        folders = {file.rpartition("/")[0] for file in changed if not file.endswith(".json")}
        if changed:
            index |= dict.fromkeys(changed, _Same(0, 0, COPYING))
            write_index()
        for file in changed:  # a folder whose JSON is away does not count
            if file in known and file.endswith(".json") and file.rpartition("/")[0] in folders - {root}:
                with contextlib.suppress(FileNotFoundError):  # if publishing was cut short before
                    fs.rm_file(file)
        copied: dict[str, tuple[int, int]] = {}
        try:
            for file in sorted(changed, key=_order):
                seen = _stat(here[file])
                try:
                    _put(fs, here[file], file)
                    copied[file] = seen
                except FileNotFoundError:  # removed meanwhile, as an old checkpoint is
                    if here[file].exists():
                        raise
        finally:
            if copied:  # listed as `fetch` will list them: one object alone may be described in another way
                listed = _listing(fs, root)
                index |= {file: _Same(*copied[file], _version(listed[file])) for file in copied if file in listed}
        for file in sorted(gone, key=_order, reverse=True):
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(file)
            del index[file]


def claim(folder: Path) -> None:
    """Take a folder of a store for this process, by its file `run.lock`; a folder that is no mirror is left alone.

    A store has no locks, and one that is killed could not release one. So the last that starts takes the folder:
    from then on, the process before it is refused by `publish`.
    """
    url = url_of(folder)
    if url is not None:
        with _store(url) as (fs, root):
            fs.invalidate_cache()
            _put(fs, folder / CLAIM, f"{root}/{CLAIM}")
            _claims[folder] = f"{root}/{CLAIM}", (folder / CLAIM).read_text()


def claimed(folder: Path) -> bool:
    """Tell whether this process has claimed a folder."""
    return folder in _claims


def require_claim(folder: Path) -> None:
    """Ask the store whether a folder still belongs to this process, if it has claimed it.

    Raises:
        ClaimedError: another process has claimed it since.
        DataError: the store cannot be read.
    """
    url = url_of(folder)
    if url is not None and claimed(folder):
        with _store(url) as (fs, _):
            _require_claim(fs, folder)


def _require_claim(fs: Any, path: Path) -> None:
    """Raise ClaimedError if another process has claimed the folder that this one had claimed, with what is in it."""
    for folder in _claims.keys() & {path, *path.parents}:
        file, mine = _claims[folder]
        found = ""
        with contextlib.suppress(FileNotFoundError):
            found = fs.cat_file(file).decode(errors="replace")
        if found != mine:
            raise ClaimedError(
                f"{url_of(folder)}: this folder now belongs to {found.strip() or 'nobody: it was removed'}. This "
                "process writes nothing more."
            )


class ClaimedError(DataError):
    """Raised if another process works in a folder of a store by now."""


class _Same(NamedTuple):
    """A file that is the same here and in the store."""

    size: int
    time: int  # of its last change here, ns
    version: str  # in the store


def _root() -> Path:
    return user_cache_folder().absolute() / "mirror"


@contextlib.contextmanager
def _store(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the file system of a path and the path in it; errors of the store within name the path."""
    scheme = url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        remedy = f"needs the package {package}: pip install {package}" if package else str(error)
        raise DataError(f"{url}: {remedy}.") from None
    except Exception as error:  # of the store's own library: nobody is signed in, ...
        raise DataError(f"{url}: {str(error) or type(error).__name__}.") from error
    try:
        yield fs, root.rstrip("/")
    except DataError:
        raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        if isinstance(error, OSError) and type(error).__module__ == "builtins":
            if error.filename is not None or error.errno == errno.ENOSPC or in_urls(said).startswith(url):
                raise
            raise type(error)(f"{url}: {said or type(error).__name__}") from error
        raise DataError(f"{url}: the store does not answer as it should ({type(error).__name__}: {said}).") from error


@contextlib.contextmanager
def _index(url: str) -> Iterator[tuple[dict[str, _Same], Callable[[], None]]]:
    """Yield the index of a bucket, written at the end, and what writes it now; one process at a time has it."""
    scheme, _, rest = url.partition("://")
    name = f"{scheme} {rest.strip('/').partition('/')[0]}"
    path = _root() / ".index" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock

    with FileLock(path.with_suffix(".lock")):
        try:
            index = {file: _Same(*entry) for file, entry in json.loads(path.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):  # missing or damaged: everything is copied again
            index = {}
        before = dict(index)

        def write() -> None:
            with replacing(path) as unfinished:
                unfinished.write_text(json.dumps(index))

        try:
            yield index, write
        finally:
            if index != before:
                write()


def _listing(fs: Any, root: str) -> dict[str, Any]:
    """Return path -> information of a file, or of all files in a folder and below it."""
    fs.invalidate_cache()
    if fs.isfile(root):
        return {root: fs.info(root)}
    found = fs.find(root, detail=True)
    unsafe = [file for file in found if ".." in PurePosixPath(file).parts]
    if unsafe:
        raise DataError(f"{unsafe[0]}: a path of a store has no '..' in it.")
    return {file: info for file, info in found.items() if not _NOT_COPIED.search(file)}


def _known(index: dict[str, _Same], root: str) -> set[str]:
    """Return the files of the index that are a path, or in a folder and below it."""
    return {file for file in index if file == root or file.startswith(f"{root}/")}


def _copied(name: str, left_out: str) -> bool:
    """Tell whether a name does not start with what is left out; "" is nothing."""
    return not (left_out and name.startswith(left_out))


def _inside(file: str, root: str) -> str:
    return file[len(root) :].lstrip("/")


def _version(info: dict[str, Any]) -> str:
    return f"{info.get('size')} {next((info[key] for key in _VERSIONS if key in info), '')}"


def _stat(path: Path) -> tuple[int, int]:
    """Return size and time of the last change of a file; zeros if it has been removed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _names(path: Path, left_out: str) -> list[str]:
    """Return the names of the files to publish, relative to a folder; "" for a file itself."""
    if path.is_file():
        return [""]
    names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return [name for name in names if not _NOT_COPIED.search(name) and _copied(name, left_out)]


def _order(file: str) -> tuple[bool, int, bool, str]:
    return file.endswith(".json"), -file.count("/"), file.endswith(_LAST), file


def _put(fs: Any, source: Path, target: str) -> None:
    """Copy a file to a store, where it appears whole."""
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    if protocol in OBJECT_STORES:
        fs.put_file(str(source), target)
        return
    folder, _, name = target.rpartition("/")
    fs.makedirs(folder, exist_ok=True)
    fs.put_file(str(source), f"{folder}/.unfinished-{name}")
    fs.mv(f"{folder}/.unfinished-{name}", target)


def _remove(path: Path) -> None:
    """Remove a mirror, but for the lock file that this machine's processes hold there."""
    if path.is_file():
        path.unlink()
        return
    for inside in path.iterdir():
        if inside.name != CLAIM:
            shutil.rmtree(inside) if inside.is_dir() else inside.unlink()

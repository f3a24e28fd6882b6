"""Checkpoints of a run: one atomic, verified save of everything that the next step depends on (Orbax).

    checkpoints/120/            Orbax: `state` (arrays) and `progress` (JSON: data iterator, metrics window)
    checkpoints/120.json        the manifest, written last: size and CRC-32 of every file of the step; in an object
                                store, which keeps checksums of its own, the size alone

A step without its manifest, or whose files differ from it, is incomplete or damaged: it is reported, moved to
`checkpoints/broken-120`, and the previous one is used. The CRC-32 costs about 0.4 s of CPU time per GB saved, in a
thread beside the training, as the writing is. Sizes alone detect a truncated file, but not a flipped bit: Orbax
silently read 12 of 12 as other numbers.
"""

import errno
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from orbax.checkpoint.options import AtomicityOptions
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..data.errors import DataError
from ..data.files import replacing
from ..data.json_files import expect, fits, json_text, parse_json, write_json
from .errors import RunError

CHUNK = 1 << 22
RENAMED = AtomicityOptions(allow_legacy_atomic_rename=True)
"""On gs://, read also what one process has saved, without Orbax's own mark: our manifest says what is whole."""


class Restored(NamedTuple):
    """A restored checkpoint."""

    state: Any
    step: int
    extra_state: dict[str, Any]  # everything but arrays: the data iterator, the metrics' window


class Checkpoints:
    """Checkpoints of one run folder.

    A save that fails, on a full disk or one that cannot be written any more, is reported; the training goes on, and the
    newest whole checkpoint stays. With several processes it ends the run, since they save together.

    Args:
        folder: folder of the checkpoints, created if missing.
        keep: number of most recent checkpoints to keep; with 1, there is none to go back to if it is damaged.
        keep_best: number of checkpoints of the highest ranks to keep besides.
        report: called with a line for the user.
        before: called before a manifest is written, in its thread.
        saved: called after each save that has ended, and what it replaces is deleted.
    """

    def __init__(
        self,
        folder: Path | epath.Path,
        *,
        keep: int,
        keep_best: int = 0,
        report: Callable[[str], None],
        before: Callable[[], None] = lambda: None,
        saved: Callable[[], None] = lambda: None,
    ):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save
        self.folder = _absolute(folder)
        self._report, self._before, self._saved = report, before, saved
        self._pending: int | None = None
        self._listing: Future[None] | None = None  # of the files of the pending step
        self._thread = ThreadPoolExecutor(1, "manifest")
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._set_broken_aside()
        _barrier("checkpoints_ready")
        self._keep, self._keep_best = keep, keep_best
        self._manager = self._new_manager()

    def _new_manager(self) -> ocp.CheckpointManager:
        def rank(metrics: Any) -> float:
            return metrics["rank"]

        best = BestN(get_metric_fn=rank, n=self._keep_best, keep_checkpoints_without_metrics=False)
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(self._keep), best]),
                best_fn=rank,  # without one, ranks are not saved
                step_format_fixed_length=None,
                enable_async_checkpointing=True,
                atomicity_options=RENAMED,
            ),
        )

    def steps(self) -> list[int]:
        """Return the steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, extra_state: dict[str, Any], rank: float | None = None) -> None:
        """Save a checkpoint: writing continues in the background, once the arrays have been copied to the host.

        Args:
            step: number of updates done.
            state: the arrays.
            extra_state: everything else, as JSON.
            rank: how good it is, if it was evaluated; higher is better.
        """
        self.finish()
        if jax.default_backend() == "cpu":  # where nothing is copied, and the next step reuses the arrays' memory
            state = jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), state)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(extra_state))
        with self._reporting(step):
            self._manager.save(step, args=args, metrics=None if rank is None else {"rank": rank})
            self._pending = step
        self.poll()

    @contextmanager
    def _reporting(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if jax.process_count() > 1:
                raise
            self._pending = self._listing = None
            with suppress(OSError):
                (self.folder / str(step)).rmtree()
            whole = [int(path.stem) for path in self.folder.glob("*.json")]
            last = f"the newest one is of step {max(whole)}" if whole else "there is none yet"
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            self._report(
                f"CHECKPOINT OF STEP {step} NOT SAVED: {said}. The training goes on without it; {last}. "
                f"Free some space on, or make writable, the disk of {self.folder}."
            )
            self._manager = self._new_manager()

    def poll(self) -> None:
        """Go on with a save as far as it does not wait; cheap enough to call at every step."""
        if self._pending is None or self._manager.is_saving_in_progress():
            return
        if jax.process_index() > 0 or (self._listing is not None and self._listing.done()):
            self.finish()
        elif self._listing is None:
            with self._reporting(self._pending):
                self._manager.wait_until_finished()  # does not wait, but raises what went wrong
                self._listing = self._thread.submit(self._write_manifest, self._pending)

    def finish(self) -> None:
        """Wait for a save in progress and write its manifest."""
        if self._pending is None:
            return
        with self._reporting(self._pending):
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                listing = self._listing or self._thread.submit(self._write_manifest, self._pending)
                listing.result()
                kept = {str(step) for step in self._manager.all_steps()}
                for manifest in self.folder.glob("*.json"):
                    if manifest.stem not in kept:
                        manifest.unlink()
        self._pending = self._listing = None
        self._saved()

    def _write_manifest(self, step: int) -> None:
        self._before()
        write_manifest(self.folder, step)

    def restore(self, abstract: Any) -> Restored | None:
        """Restore the newest complete checkpoint, or return None if there is none.

        Args:
            abstract: shapes, dtypes and shardings of the state; the devices may differ from those that saved it.

        Raises:
            RunError: the checkpoint holds the arrays of another model or optimiser; or there are manifests, but no
                checkpoint.
        """
        steps = self.steps()
        if steps:
            return _read(self._manager, steps[-1], abstract)
        manifests = sorted(path.name for path in self.folder.glob("*.json") if is_step(path.stem))
        if manifests:  # a new start would delete them
            raise RunError(
                f"{self.folder}: has {', '.join(manifests)}, but the checkpoints are missing. Put them there again, or "
                "delete the folder to start anew."
            )
        return None

    def close(self) -> None:
        """Finish saving and release the checkpoint manager."""
        self.finish()
        self._manager.close()
        self._thread.shutdown()

    def _set_broken_aside(self) -> None:
        for path in sorted(self.folder.iterdir()):
            if path.is_dir() and is_step(path.name):
                why = damage(self.folder, int(path.name))
                if why:
                    target = self.folder / f"broken-{path.name}"
                    if target.exists():
                        target.rmtree()
                    path.rename(target)
                    (self.folder / f"{path.name}.json").unlink(missing_ok=True)
                    self._report(f"Checkpoint {path} is damaged: {why}. It was moved to {target.name}.")


def restore_from(folder: Path | epath.Path, abstract: Any, report: Callable[[str], None]) -> Restored:
    """Restore a named checkpoint: a run folder, its `checkpoints` folder (newest complete step) or one step's folder.

    Nothing in the folder is changed.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        RunError: it holds the arrays of another model or optimiser.
    """
    folder = _absolute(folder)
    if is_step(folder.name):
        candidates, folder = [int(folder.name)], folder.parent
    else:
        folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        candidates = sorted((int(name) for name in names if is_step(name)), reverse=True)
    for step in candidates:
        why = damage(folder, step)
        if why:
            report(f"Checkpoint {folder / str(step)} is damaged: {why}. Trying the previous one.")
            continue
        with ocp.CheckpointManager(
            folder, options=ocp.CheckpointManagerOptions(read_only=True, atomicity_options=RENAMED)
        ) as manager:
            return _read(manager, step, abstract)
    raise FileNotFoundError(f"{folder}: no complete checkpoint to resume from.")


def is_step(name: str) -> bool:
    """Tell whether a folder has the name of a checkpoint's step."""
    return name.isascii() and name.isdigit()


# Orbax's messages for arrays, or trees of them, that differ from the requested ones.
OTHER_ARRAYS = ("Structure mismatch", "structures do not match", "not compatible with the stored")


def _read(manager: ocp.CheckpointManager, step: int, abstract: Any) -> Restored:
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
    try:
        found: Any = manager.restore(step, args=args)
    except ValueError as error:
        if not any(said in str(error) for said in OTHER_ARRAYS):
            raise
        raise RunError(
            f"{manager.directory}, step {step}: the arrays belong to another model or optimiser. Give the options they "
            f"were saved with, or start a new run from the weights alone.{_differences(manager, step, abstract)}"
        ) from error
    return Restored(found.state, step, found.progress)


SHOWN = 12
"""Number of arrays that differ to list."""


def _differences(manager: ocp.CheckpointManager, step: int, abstract: Any) -> str:
    """Return lines with the arrays that a checkpoint has otherwise than asked for."""
    state: Any = manager.item_metadata(step)
    there, here = _shapes(state.state), _shapes(abstract)
    lines = [
        f"\n  {name}: {there.get(name, 'not there')} there, {here.get(name, 'not there')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "".join(lines[:SHOWN]) + more


def _shapes(tree: Any) -> dict[str, list[int]]:
    """Return name -> shape of all arrays, named alike in a state and in a checkpoint's metadata."""
    leaves = jax.tree_util.tree_leaves_with_path(getattr(tree, "tree", tree), is_leaf=lambda x: hasattr(x, "shape"))
    return {
        "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path): list(
            leaf.shape
        )
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def write_params(path: Path, params: Any) -> None:
    """Save a tree of parameters in a separate file (safetensors): the best so far, or one for averaging."""
    flat = {name: np.ascontiguousarray(leaf) for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    with replacing(path) as unfinished:
        save_file(flat, unfinished, metadata={"crc32": _checksum(flat)})


def read_params(path: Path) -> Any:
    """Read the tree saved by `write_params`.

    Raises:
        RunError: the file is missing or damaged.
    """
    flat: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="np") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            expected = (file.metadata() or {}).get("crc32")  # absent in files of earlier versions
        problem = "" if expected in (None, _checksum(flat)) else "CRC-32 differs"
    except (OSError, SafetensorError, AttributeError, TypeError) as error:  # of a dtype that NumPy does not have
        problem = str(error)
    if problem:
        raise RunError(f"{path}: the weights saved at an evaluation are missing or damaged ({problem}).")
    return traverse_util.unflatten_dict(flat, sep="/")


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name].tobytes(), zlib.crc32(name.encode(), crc))
    return str(crc)


def write_manifest(folder: epath.Path, step: int) -> None:
    """Write size and CRC-32 of every file of a step, atomically."""
    files = {name: _measure(folder / str(step) / name) for name in _files(folder / str(step))}
    manifest = folder / f"{step}.json"
    if _in_store(folder):
        manifest.write_text(json_text(files, str(manifest)))  # an object appears whole
    else:
        write_json(Path(manifest), files)


def damage(folder: epath.Path, step: int) -> str | None:
    """Return why a step is incomplete or damaged, or None."""
    manifest = folder / f"{step}.json"
    try:
        expected = expect(parse_json(manifest.read_text(), str(manifest)), dict, str(manifest))
    except FileNotFoundError:
        return "it has no manifest, so the save was interrupted"
    except (DataError, OSError, UnicodeDecodeError) as error:
        return f"its manifest cannot be read ({error})"
    if not expected or not all(fits(pair, list[int | None]) and len(pair) == 2 for pair in expected.values()):
        return f"its manifest {manifest.name} does not list files with sizes and checksums"
    present = set(_files(folder / str(step)))
    for name, (size, crc) in expected.items():
        if name not in present:
            return f"{name} is missing"
        found = _measure(folder / str(step) / name)
        if found[0] != size:
            return f"{name} has {found[0]} bytes instead of {size}"
        if None not in (crc, found[1]) and found[1] != crc:
            return f"{name} has changed since it was written (CRC-32)"
    return None


def check_space(folder: epath.Path, needed: int) -> None:
    """Raise OSError (ENOSPC) before the work starts if `needed` bytes of checkpoints do not fit on `folder`'s disk."""
    if _in_store(folder):
        return
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 2**20:,.0f} MiB are needed for the checkpoints, {free / 2**20:,.0f} MiB are free. "
            "Free some space, or lower --keep",
            str(folder),
        )


def _in_store(folder: Path | epath.Path) -> bool:
    """Tell whether a folder is in an object store, where Orbax writes by itself."""
    return "://" in str(folder)


def _absolute(folder: Path | epath.Path) -> epath.Path:
    return epath.Path(folder if _in_store(folder) else Path(folder).absolute())


def _files(folder: epath.Path) -> list[str]:
    return sorted(str((place / name).relative_to(folder)) for place, _, names in folder.walk() for name in names)


def _measure(path: epath.Path) -> list[int | None]:
    """Return size and CRC-32 of a file; in a store, which checks what it reads, its size alone."""
    if _in_store(path):
        return [path.stat().length, None]
    size = crc = 0
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)

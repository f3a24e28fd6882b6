"""The run folder: config.json, metrics.jsonl, TensorBoard events, curves.png, results.json, samples.txt, model/.

One process at a time works in a run folder: it holds a lock on `run.lock` (flock), which the kernel releases however
the process ends. The file says who holds it, and a process whose line is no longer there, since the folder was replaced
or the file system lost the lock, writes nothing more.

A line of `metrics.jsonl` has the means over the steps since the line before, and as `total_...` the sums over the run.
It contains only what the seed determines (no speeds, no times), so that the file of a resumed run equals
that of an uninterrupted one. Speeds are on the progress line, in TensorBoard, in results.json, and in
`speeds.jsonl`: seconds per step, tokens per second, the share of the time spent waiting for data, the seconds that the
training stood still for checkpoints and, on a TPU or an H100 or H200, model FLOPs utilisation (with --remat a lower
bound) and memory.

A run folder in an object store is worked on in its mirror, and published at the start, after each checkpoint and at the
end: there is no appending to an object, so the files of lines are copied whole. Several processes have no disk in
common, so Orbax writes their checkpoints to the store itself.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from ..data.cloud.mirror import ClaimedError, fetch, in_urls, place_for_all, publish, require_claim, url_of
from ..data.errors import DataError
from ..data.files import replacing, write_text
from ..data.json_files import expect, json_text, parse_line, read_object, read_object_lines, value_of, write_json
from .errors import RunError
from .lock import Lock
from .machine.stores import CHECKPOINTS, Publisher
from .machine.tracking import Tracker, Tracking
from .sharding import in_any_process

LOCK = "run.lock"


class RunFolder:
    """A run's folder. Only process 0 writes to it, and nothing before `begin`.

    Args:
        folder: folder of an earlier start of the run, or an empty or missing one.
        config: a frozen dataclass, the run's whole configuration.
        free: names of fields (`optim.beta1` for nested ones) that may change when the run is resumed.
        upgrade: converts config.json of earlier versions; None: nothing changed.
        track: where metrics go too; None: nowhere.
        report: called with a line for the user.

    Raises:
        RunError: the folder contains a run with another configuration, or something that is not a run; or another
            process works in it.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        free: frozenset[str],
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        track: Tracker | None = None,
        report: Callable[[str], None] = print,
    ):
        self.folder = folder
        self._track: Tracker | None = track
        self._tracking: Tracking | None = None
        self.main = jax.process_index() == 0
        self._events: Any = None
        self._asked = to_json(config)
        self._defaults = _defaults(config)  # of settings that an earlier version did not have
        self._free, self._upgrade = free, upgrade
        self._lock: Lock | None = None
        self._report = report
        self._shared: str | None = None  # the folder as all processes write to it, if it is not this one
        if url_of(folder) is not None and jax.process_count() > 1:
            self._shared = place_for_all(folder)
            if self._shared is None:
                raise RunError(
                    f"--out {folder}: several processes write checkpoints to a disk that they share, or to gs://."
                )
        self._publisher = Publisher(folder, report, CHECKPOINTS if self._shared else "")
        self._together(self._check_and_take)

    def _check(self) -> None:
        """Raise RunError unless the folder is missing, empty, or that of a run with this configuration."""
        path = self.folder / "config.json"
        if path.exists():
            stored = read_object(path)
            try:
                stored = stored if self._upgrade is None else self._upgrade(stored)
            except (AttributeError, TypeError, KeyError) as error:
                raise RunError(f"{path}: not the settings of a run of this command ({error}).") from None
            self._compare(stored, self._asked, self._free)
        elif self.folder.exists() and not (self.folder.is_dir() and all(p.name == LOCK for p in self.folder.iterdir())):
            raise RunError(f"{self.folder} exists and is not a run folder (no config.json). Choose another --out.")

    def _check_and_take(self) -> None:
        """Check the folder and, if it is that of a run, take its lock in process 0."""
        self._check()
        if self.main and (self.folder / "config.json").exists():
            self._lock = Lock(self.folder / LOCK)

    def _create(self) -> None:
        """Create the folder, which each process may have on a disk of its own, and its config.json in process 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.main:
            self._lock = self._lock or Lock(self.folder / LOCK)
            self._check()  # again: another start may have begun since
            write_json(self.folder / "config.json", self._asked)
            self._publisher.claim()
            self._publisher.soon()

    def _together(self, act: Callable[[], None]) -> None:
        """Act in every process; if one of them is refused, all are."""
        refused: Exception | None = None
        try:
            act()
        except (RunError, DataError, OSError) as error:
            refused = error
        if in_any_process(refused is not None):
            raise refused or RunError(f"{self.folder}: another process of this run was refused, and says why.")

    def require_lock(self) -> None:
        """Raise RunError if the folder belongs to another process by now."""
        if self._lock is not None:
            self._lock.check()

    def before_checkpoint(self) -> None:
        """Check that the folder is still this run's, before a checkpoint replaces old ones; all processes must call it.

        A store that does not say so for the moment is reported.

        Raises:
            RunError: the folder belongs to another process by now.
            ClaimedError: in its store, it does.
        """
        self._together(self._require_ownership)

    def _require_ownership(self) -> None:
        self.require_lock()
        if self.main and self._shared is not None:  # where Orbax writes, and deletes, by itself
            try:
                require_claim(self.folder)
            except ClaimedError:
                raise
            except (DataError, OSError) as error:
                said = str(error).strip().partition("\n")[0]
                self._report(f"{url_of(self.folder)}: whose it is could not be read: {said}. The training goes on.")

    def publish(self) -> None:
        """Copy what is new to the folder's object store, in the background, if it is in one."""
        if self.main:
            self._publisher.soon()

    def publish_lines(self) -> None:
        """Copy metrics and the like to the store, before a checkpoint counts that processes have written there.

        Raises:
            ClaimedError: another process works in the folder by now.
        """
        if self.main and self._shared is not None:
            self._publisher.now()

    @property
    def finished(self) -> bool:
        """Whether an earlier start of this run has finished."""
        return (self.folder / "results.json").is_file() and (self.folder / "model").is_dir()

    def begin(self) -> None:
        """Create the folder, with config.json, once all checks have passed."""
        self._together(self._create)

    def _compare(self, there: dict[str, Any], asked: dict[str, Any], free: frozenset[str]) -> None:
        old, new = {**self._defaults, **flatten(there)}, flatten(asked)
        changed = [key for key in sorted(old.keys() | new.keys()) if key not in free and old.get(key) != new.get(key)]
        if changed:
            lines = "".join(f"\n  {key}: {old.get(key)!r} there, {new.get(key)!r} asked for" for key in changed)
            longer = {key.rpartition(".")[2] for key in changed} <= {"steps", "epochs", "phases"}
            more = f" To train it for longer, give --resume-from {self.folder} and another --out." if longer else ""
            raise RunError(
                f"{self.folder} holds a run with another configuration:{lines}\n"
                "Choose another --out, or give the same settings to resume that run." + more
            )

    @property
    def checkpoints(self) -> epath.Path:
        """The folder of the run's checkpoints: of several processes, in the store itself."""
        return epath.Path(self._shared or self.folder.absolute()) / "checkpoints"

    def fetch_checkpoints(self) -> None:
        """Copy the run's checkpoints to this machine, if they are in a store and are read here."""
        if self._shared is None:
            fetch(self.folder / "checkpoints", missing=True, together=True, report=self._report)

    def share(self, name: str) -> None:
        """Let all processes have a file that process 0 has written; all must call it."""
        self._together(lambda: publish(self.folder / name) if self.main and self._shared is not None else None)
        if self._shared is not None and not self.main:
            fetch(self.folder / name)

    def rewind(self, step: int) -> list[int]:
        """Remove the metrics and speeds after `step`, and damaged lines; return the numbers of those of the metrics.

        A last line without its line end was being written when the run was killed; it does not count as damaged.
        """
        if not self.main:
            return []
        _rewind(self.folder / "speeds.jsonl", step)
        return _rewind(self.folder / "metrics.jsonl", step)

    def write_metrics(self, step: int, values: Mapping[str, float], speeds: Mapping[str, float] | None = None) -> None:
        """Append a line to metrics.jsonl, and the same with the speeds to TensorBoard."""
        if not self.main:
            return
        self.require_lock()
        line = json_text({"step": step, **values}, f"{self.folder}, step {step}")
        with (self.folder / "metrics.jsonl").open("a") as handle:
            handle.write(f"{line}\n")
        if speeds:
            with (self.folder / "speeds.jsonl").open("a") as handle:
                handle.write(f"{json_text({'step': step, **speeds}, f'{self.folder}, step {step}')}\n")
        self._write_events(step, {**values, **(speeds or {})})

    def _write_events(self, step: int, values: Mapping[str, float]) -> None:
        if self._events is None:
            from tensorboard.summary import Writer

            self._events = Writer(str(self.folder / "tensorboard"))
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._track is not None:
            self._tracking = self._tracking or Tracking(self._track, self.folder, self._asked)
            self._tracking.log(step, values)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return read_object_lines(path) if path.exists() else []

    def save_batch(self, step: int, batch: Mapping[str, np.ndarray]) -> Path:
        """Save this process's part of the batch of a failed step."""
        path = self.folder / f"bad-batch-step-{step}-process-{jax.process_index()}.npz"
        np.savez(path, allow_pickle=False, **batch)
        return path

    def write_samples(self, lines: Sequence[str]) -> None:
        """Write what the trained model makes of examples, for reports."""
        if self.main and lines:
            write_text(self.folder / "samples.txt", "".join(f"{line}\n" for line in lines))

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write curves.png and, last of all, results.json."""
        if self.main:
            self.require_lock()
            draw_curves(self.metrics(), self.folder / "curves.png")
            write_json(self.folder / "results.json", results)

    def close(self) -> None:
        """Flush the TensorBoard events, end the tracker's run, publish what is left, and release the lock."""
        if self._events is not None:
            self._events.close()
        if self._tracking is not None:
            self._tracking.close()
        try:
            self._publisher.finish()
        finally:
            if self._lock is not None:
                self._lock.release()


def panels(records: list[dict[str, Any]]) -> list[str]:
    """Return the metrics in lines of metrics.jsonl, without those that have no value or are zero throughout."""
    found = (key for record in records for key, value in record.items() if key != "step" and value)
    return list(dict.fromkeys(key.removeprefix("eval/") for key in found))


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each of `panels` over the steps, held-out values as dots (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = panels(records)
    if not names:
        return
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    width, height = 5 * columns, 3.2 * rows
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    # Margins in inches: a layout by the sizes of texts would draw them all twice.
    figure.subplots_adjust(0.7 / width, 0.45 / height, 1 - 0.15 / width, 1 - 0.3 / height, wspace=0.2, hspace=0.32)
    for number, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, columns, number)
        for key, style, label in ((name, "-", "training"), (f"eval/{name}", "o", "held out")):
            points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def to_json(config: Any) -> Any:
    """Convert a dataclass to JSON values; paths become text, those of mirrors that of their stores."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Path | str):
        return in_urls(str(config))
    if isinstance(config, list | tuple):
        return [to_json(value) for value in config]
    return config


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested JSON objects, their names joined by points: `optim.beta1`."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: leaf
        for name, value in tree.items()
        for key, leaf in flatten(value, f"{prefix}.{name}" if prefix else name).items()
    }


def _defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the defaults of a dataclass's fields that have one, nested ones by `a.b`, as JSON values."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if field.default is not dataclasses.MISSING:
            found |= flatten(to_json(field.default), name)
        elif field.default_factory is not dataclasses.MISSING:
            found |= flatten(to_json(field.default_factory()), name)
        elif dataclasses.is_dataclass(value):
            found |= _defaults(value, f"{name}.")
    return found


def _rewind(path: Path, step: int) -> list[int]:
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    steps = [_step_of(line) for line in lines]
    kept = [line + b"\n" for line, at in zip(lines, steps, strict=True) if at is not None and at <= step]
    with replacing(path) as unfinished:
        unfinished.write_bytes(b"".join(kept))
    return [number for number, at in enumerate(steps, 1) if at is None]


def _step_of(line: bytes) -> int | None:
    """Return the step of a line of metrics.jsonl or speeds.jsonl; None if it is damaged."""
    try:
        return value_of(expect(parse_line(line.decode(), ""), dict, ""), "step", int, "")
    except (DataError, UnicodeDecodeError):
        return None


def model_folder(folder: Path) -> Path:
    """Return the checkpoint folder inside a run folder, or the folder itself if it is not a run folder."""
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder

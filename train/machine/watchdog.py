"""Report a step that hangs: where each thread is, and which process is behind."""

import faulthandler
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import jax

WEEK = 7 * 24 * 3600 * 1000  # ms
STEPS = "bestiary/steps/"  # in the store by which the processes found each other


class Watchdog:
    """A thread that reports when no step has ended for a while. The process goes on: it may only be slow.

    Args:
        seconds: time without a step after which to report; 0: never.
        report: called with the report, in every process.
        folder: folder for the stacks of all threads, one file for each report.
    """

    def __init__(self, seconds: float, report: Callable[[str], None], folder: Path):
        self._seconds, self._report, self._folder = seconds, report, folder
        self._step, self._at = 0, time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def ended(self, step: int) -> None:
        """Note that a step, or what follows one, has ended."""
        self._step, self._at = step, time.monotonic()

    def _watch(self) -> None:
        reported = -1.0
        while not self._end.wait(min(self._seconds / 4, 30.0)):
            self._tell()
            if time.monotonic() - self._at > self._seconds and reported != self._at:
                reported = self._at
                self._report(self._describe())

    def _describe(self) -> str:
        name = f"hang-step-{self._step + 1}-process-{jax.process_index()}.txt"
        stacks = _stacks()
        try:
            (self._folder / name).write_text(stacks)
            where = f"the stacks of its threads are in {self._folder / name}"
        except OSError:
            where = f"the stacks of its threads:\n{stacks}"
        seconds = time.monotonic() - self._at
        return (
            f"step {self._step + 1} has not ended for {seconds:.0f} s in process {jax.process_index()} of "
            f"{jax.process_count()} on {socket.gethostname()}{self._others()}; {where}"
        )

    # --- the other processes ---

    def _tell(self) -> None:
        client = _client()
        if client is not None:
            with suppress(jax.errors.JaxRuntimeError):  # process 0, which has the store, is gone: a step will hang
                client.key_value_set(f"{STEPS}{jax.process_index()}", str(self._step), allow_overwrite=True)

    def _others(self) -> str:
        client = _client()
        if client is None:
            return ""
        try:
            kept = client.key_value_dir_get(STEPS)
        except jax.errors.JaxRuntimeError:
            return "; process 0 does not answer"
        told = {int(name.removeprefix(STEPS)): int(step) for name, step in kept}
        last = max(told.values(), default=0)
        behind = [f"{process} (after step {step})" for process, step in sorted(told.items()) if step < last]
        silent = [str(process) for process in range(jax.process_count()) if process not in told]
        parts = [f"behind: {', '.join(behind)}"] if behind else []
        parts += [f"never heard of: {', '.join(silent)}"] if silent else []
        return f"; processes {'; '.join(parts)}" if parts else "; every process is at this step"


def wait_for_all(name: str) -> None:
    """Wait until all processes have come here, for as long as they live; `name` is used once in a run.

    This asks the store by which they found each other. A collective has a time limit: 30 s for its first, on CPUs.
    """
    client = _client()
    if client is not None:
        client.wait_at_barrier(f"bestiary/{name}", timeout_in_ms=WEEK)


def _client() -> Any:
    if jax.process_count() == 1:
        return None
    from jax._src import distributed

    return distributed.global_state.client


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


class Joining:
    """Ends the process with one line if the others have not joined in time, before JAX ends it with a stack trace."""

    def __init__(self, process: int | None, processes: int | None, coordinator: str | None, seconds: float):
        self._who = "this process" if process is None else f"process {process} of {processes}"
        self._where = f" at {coordinator}" if coordinator else ""
        self._seconds = seconds
        self._timer = threading.Timer(seconds, self._give_up)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _give_up(self) -> None:
        print(
            f"bestiary: {self._who} waited {self._seconds:g} s{self._where}, and not all the others joined. Those that "
            "wait say this too; look at the log of one that does not.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

"""Processes that take one job at a time, so that a hang, a crash or a device error costs one job alone.

`Worker` is the side that asks: it starts a process, gives it a job a line, and kills it if it has not answered in time.
`serve` is the process. Both speak JSON: a job is {"kind": ..., ...}; an answer has "failed", with the reason, if there
is no result. `Results` keeps what was answered on disk, before the next job begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PLANTS = ("hang", "crash", "sticky")
"""Faults that a rehearsal plants in a job: it never answers, its process dies, or the device context is lost."""


class Worker:
    """A process that answers jobs, started when first asked and again after it ended.

    Args:
      command: the process; it must call `serve`.
      environment: variables to add to this process's.
      log: file to append the process's errors and messages to.
      startup: seconds that a new process may take on top of its first job: imports, the driver, first compilations.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        log: Path,
        startup: float = 60.0,
    ) -> None:
        self.command, self.log, self.startup = command, log, startup
        # The process finds the same modules, from wherever this one was started.
        self.environment = (
            os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | dict(environment or {})
        )
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, job: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return the answer to a job, with the "seconds" it took, or {"failed": why} if none comes within `seconds`."""
        process = self.process
        if process is None or process.poll() is not None:
            process = self._start()
            seconds += self.startup
        clock = time.monotonic()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = self.lines.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            self.stop()
            return {"failed": f"no answer within {seconds:.0f} s"}
        except OSError:
            line = None
        if line is None:
            code = process.wait()
            self.stop()
            return {"failed": f"its process ended with {_ending(code)}"}
        answer = json.loads(line)
        if answer.pop("last", False):
            self.stop()
        return answer | {"seconds": round(time.monotonic() - clock, 2)}

    def _start(self) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self.lines = queue.Queue()
        threading.Thread(target=_read, args=(self.process.stdout, self.lines), daemon=True).start()
        return self.process

    def stop(self) -> None:
        """End the process, and those that it has started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self.process = None


def _read(pipe: Any, lines: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError):  # closed while it was read
        for line in pipe:
            lines.put(line)
    lines.put(None)


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def serve(handlers: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Answer the jobs on standard input, by the handler of their kind, until it ends.

    After an error of JAX's runtime the process ends too: a CUDA context that a kernel has broken fails whatever comes
    after it.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers and libraries print must not come between the answers
    for line in sys.stdin:
        job, last = json.loads(line), False
        try:
            _plant(job.get("plant"))
            answer = handlers[job["kind"]](job)
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {first_line(error)}"}
            last = _of_the_runtime(error)
        print(json.dumps(answer | ({"last": True} if last else {})), file=answers, flush=True)
        if last:
            os._exit(3)


def _end_with(parent: int) -> None:
    """End this process when the one that asks is gone, even in the middle of a job."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(4)


def _of_the_runtime(error: Exception) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError)


_lost = False


def _plant(fault: str | None) -> None:
    global _lost
    if fault == "hang":
        time.sleep(10**6)
    elif fault == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    _lost = _lost or fault == "sticky"
    if _lost:
        import jax

        raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS (planted)")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's class if it has none."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


class Results:
    """The jobs and their answers in a file of JSON lines, each on disk when `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()

    def add(self, job: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Append a job with its answer."""
        with self.lock, self.path.open("a") as file:
            file.write(json.dumps({"job": job, "answer": answer}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return all (job, answer) so far. A last line that a kill has cut short is left out."""
        found = []
        lines = self.path.read_text().split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line) if line else None
            except json.JSONDecodeError as error:
                if number == len(lines):
                    break
                raise ValueError(f"{self.path}, line {number}: not JSON: {error}") from error
            if entry is not None:
                found.append((entry["job"], entry["answer"]))
        return found

"""Commands on paths of object stores: what they name is mirrored to this machine, and what they write is published.

    bestiary pretrain --corpus gs://bucket/books --cache gs://bucket/cache --out gs://bucket/runs/mine

works in the mirrors of these paths (data/cloud/mirror.py); messages and settings name the stores' own paths.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...data.cloud.mirror import ClaimedError, claim, claimed, fetch, mirror, publish, scheme_of, url_of
from ..errors import RunError
from ..progress import Progress

OUTPUTS = (
    *("out", "json", "chart", "program", "plot", "attention", "pages", "translations", "outputs"),
    *("record", "table"),
)
"""Flags that name what is written."""
CACHES = ("cache",)
"""Flags that name a folder of which each part is fetched when it is needed, and published when it is made."""
TEXTS: Mapping[str, frozenset[str]] = {
    "predict": frozenset({"text", "text_pair", "question", "context", "endings"}),
    "multitask predict": frozenset({"text", "text_pair", "question"}),
    "generate": frozenset({"prompt", "stop"}),
    "ask": frozenset({"prompt", "answers"}),
    "embed": frozenset({"prompt"}),
    "probe": frozenset({"prompt"}),
    **{f"text2text {command}": frozenset({"prefix"}) for command in ("train", "run", "score")},
    "attention": frozenset({""}),
}
"""Command -> flags whose values are texts, whatever they look like; "" is what follows no flag."""

CHECKPOINTS = "checkpoints/"
"""Folder in a run's that is not copied if only its model is needed; a run that resumes fetches its own."""
RUN = {"config.json", "metrics.jsonl"}
"""Files by which a run's folder is known."""


@contextmanager
def on_mirrors(
    words: Sequence[str], arguments: Sequence[str], check: Callable[[list[str]], object], *, reads: bool = True
) -> Iterator[list[str]]:
    """Yield the arguments with mirrors instead of paths of object stores; publish what was written at the end.

    Args:
        words: the command, such as ("finetune", "squad").
        arguments: its arguments.
        check: parses the arguments; whatever is wrong with them, but for files that are missing, ends the process.
        reads: whether the files that are named are read; not so for a plan.

    Raises:
        RunError: a path cannot be written.
        FileNotFoundError: a store has no such file or folder.
        DataError: a store cannot be read or written.
    """
    local, named = [], []
    texts = TEXTS.get(" ".join(words), frozenset())
    for flag, head, value in _parts(arguments, "" in texts):
        opens = flag not in texts and _opens(value)
        if "://" in value and flag in OUTPUTS + CACHES and not opens:
            raise RunError(
                f"--{flag} {value}: cannot be written: it is no path of a disk or of an object store (gs://, s3:// and "
                "all that fsspec opens)."
            )
        if opens:
            named.append((flag, mirror(value)))
            value = str(mirror(value))
        local.append(head + value)
    if not named:
        yield local
        return
    check(local)
    for flag, path in named:
        if flag in OUTPUTS:
            path.parent.mkdir(parents=True, exist_ok=True)
        if reads and flag not in CACHES:
            fetch(
                path,
                missing=flag in OUTPUTS,
                together=flag in OUTPUTS,
                left_out=lambda names, flag=flag: CHECKPOINTS if flag != "resume_from" and names >= RUN else "",
                report=Progress().line,
            )
            if flag == "resume_from" and path.name.isdigit():  # a step, whose manifest is beside it
                fetch(path.with_name(f"{path.name}.json"), missing=True)
    yield local
    if _main_process():
        for flag, path in named:
            if flag in OUTPUTS:  # the checkpoints of a run are there
                publish(path, left_out=CHECKPOINTS if claimed(path) else "")


def _parts(arguments: Sequence[str], texts: bool) -> Iterator[tuple[str, str, str]]:
    """Yield each argument as (flag that it belongs to, what precedes its value, value).

    A flag may have several values. But what is written has one name; and if texts may follow (`texts`), a flag has one
    value, or several that are no paths.
    """
    flag, complete = "", False
    for argument in arguments:
        head, value = "", argument
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            flag, head = name.removeprefix("--").replace("-", "_"), name + equals
            complete = bool(equals)
        elif complete and (texts or flag in OUTPUTS + CACHES):
            flag = ""
        else:
            complete = True
        yield flag, head, value


def _opens(value: str) -> bool:
    """Tell whether a value is a path of a store: fsspec knows its scheme."""
    scheme = scheme_of(value)
    if scheme is None:
        return False
    from fsspec import available_protocols

    return scheme in available_protocols()


def _main_process() -> bool:
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0


class Publisher:
    """Publishes a run folder while the run goes on, and at its end; does nothing for a folder that is no mirror.

    A copy that fails is reported, and the training goes on: what this machine has is copied at the next time. At the
    end it fails the run; the same command, given again, copies the rest.

    Args:
        folder: the run folder.
        report: called with a line for the user.
        left_out: start of the names that are not published: of what is written there by itself.
    """

    def __init__(self, folder: Path, report: Callable[[str], None], left_out: str = ""):
        self._folder, self._report, self._left_out = folder, report, left_out
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of the two that follow
        self._again = self._working = False
        self._refused: ClaimedError | None = None
        self._active = False

    def claim(self) -> None:
        """Take the folder for this process; from now on it is published."""
        if url_of(self._folder) is not None:
            claim(self._folder)
            self._active = True

    def soon(self) -> None:
        """Publish in the background.

        Raises:
            ClaimedError: another process works in the folder by now.
        """
        if not self._active:
            return
        if self._refused is not None:
            raise self._refused
        with self._lock:
            self._again = True
            if not self._working:
                self._working = True
                self._thread = threading.Thread(target=self._work, name="publisher")
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._working, self._again = self._again, False
                if not self._working:
                    return
            try:
                self.now()
            except ClaimedError as error:
                self._refused = error
                return

    def now(self) -> None:
        """Publish, and wait; a failure is reported.

        Raises:
            ClaimedError: another process works in the folder by now.
        """
        if not self._active:
            return
        try:
            publish(self._folder, left_out=self._left_out)
        except ClaimedError:
            raise
        except Exception as error:
            said = str(error).strip().partition("\n")[0]
            self._report(
                f"{url_of(self._folder)} NOT WRITTEN: {said}. The training goes on; what this machine has is "
                "copied after the next checkpoint."
            )

    def finish(self) -> None:
        """Publish what is left, and wait.

        Raises:
            ClaimedError: another process works in the folder by now.
            DataError: the store cannot be written.
        """
        if self._active:
            self._active = False
            if self._thread is not None:
                self._thread.join()
            publish(self._folder, left_out=self._left_out)

"""The tasks of GLUE (Wang et al. 2018)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ....data.batches import Features
from ....data.errors import DataError
from ....data.tasks.glue import GLUE, has_labels, has_split, read_glue
from ....data.tasks.tables import TextExample
from .scores import metric
from .task import Collected, TaskData
from .text import TextTask, write_submission


@dataclass(frozen=True)
class GlueTextTask(TextTask):
    """A GLUE task; `name` is its name in GLUE."""

    def read(self, path: Path, split: str, *, labelled: bool) -> list[TextExample]:
        """See `Task.read`. For MNLI, "dev" and "test" are the matched sets; "ax" is the diagnostic set."""
        task = GLUE[self.name]
        if split == "ax":
            return read_glue(GLUE["ax"], path, "test", labelled=labelled).examples
        split = {"dev": task.evaluation[0], "test": task.test[0]}.get(split, split)
        return read_glue(task, path, split, labelled=labelled).examples

    def metrics(self, collected: Collected, features: Features, examples: Sequence[TextExample]) -> dict[str, float]:
        values = super().metrics(collected, features, examples)
        if self.name == "mnli":  # the diagnostic set's official metric
            labels = np.array([example.label for example in examples])
            values["matthews"] = metric("matthews", self.predicted(collected), labels)
        return values

    def answers(self, collected: Collected) -> list[str]:
        if self.labels is None:  # ratings go from 0 to 5
            return [f"{value:.3f}" for value in np.clip(self.predicted(collected), 0, 5)]
        return super().answers(collected)

    def write_predictions(
        self, folder: Path, split: str, collected: Collected, features: Features, examples: Sequence[TextExample]
    ) -> None:
        """Write `MRPC.tsv`, `MNLI-m.tsv`, ... for test splits; into `dev/` for splits with labels."""
        stem = GLUE["ax" if split.startswith("ax") else self.name].submission
        stem += {"matched": "-m", "mismatched": "-mm"}.get(split.rpartition("_")[2], "")
        folder = folder if split.startswith(("test", "ax")) else folder / "dev"
        write_submission(folder / f"{stem}.tsv", examples, self.answers(collected))


def glue_task(name: str, max_length: int) -> GlueTextTask:
    """Return a GLUE task."""
    task = GLUE[name]
    return GlueTextTask(name, max_length, task.labels, task.label_names, task.metrics, task.second is not None)


def glue_data(task: GlueTextTask, data: str, diagnostic: str | None = None, no_test: bool = False) -> TaskData:
    """Read the splits of a task: training and development sets, and the test set if there is one and it is wanted.

    Raises:
        DataError: the data is invalid, with file and line; or `data` is one file, which cannot hold several splits.
    """
    source = GLUE[task.name]
    if Path(data).is_file():
        raise DataError(
            f"{data}: a file. Expected {source.folder}'s folder, with train.tsv and {source.evaluation[0]}.tsv."
        )
    train = read_glue(source, data, "train", labelled=True)
    evaluation = {
        split: read_glue(source, data, split, labelled=True).examples
        for split in source.evaluation
        if split == source.evaluation[0] or has_split(source, data, split)
    }
    prediction = {
        split: read_glue(source, data, split, labelled=False).examples
        for split in source.test
        if not no_test and has_split(source, data, split)
    }
    if diagnostic is not None:
        labelled = has_labels(GLUE["ax"], diagnostic, "test")
        some = evaluation if labelled else prediction
        some["ax"] = read_glue(GLUE["ax"], diagnostic, "test", labelled=labelled).examples
    notes = [f"{train.cut_rows} truncated rows of {source.folder} skipped"] if train.cut_rows else []
    return TaskData(train.examples, evaluation, prediction, notes)

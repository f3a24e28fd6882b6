"""The table of a run over several GLUE tasks, whatever model it is of: official metrics by task, and the GLUE score."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....data.files import write_text
from ....data.json_files import write_json
from ....data.tasks.glue import FINETUNED, GLUE, has_split
from ...errors import RunError


def trainable(data: Path) -> list[str]:
    """Return the tasks that have training data in a folder of GLUE's folders.

    Raises:
        RunError: there are none.
    """
    tasks = [name for name in FINETUNED if (data / GLUE[name].folder).is_dir() and has_split(GLUE[name], data, "train")]
    if not tasks:
        raise RunError(f"{data}: none of GLUE's tasks has a training file here.")
    return tasks


def write_table(out: Path, found: Mapping[str, Sequence[Mapping[str, Any]]], seeds: int) -> None:
    """Write table.md and results.json, and print the table.

    Args:
        out: the folder.
        found: task -> the results of each seed's run, whose "metrics" are by development set.
        seeds: number of seeds.
    """
    rows = [row for task, results in found.items() for row in table_rows(task, results)]
    scores = [statistics.fmean(task_score(task, result) for result in results) for task, results in found.items()]
    table = "\n".join([
        f"| task | metric | mean of {seeds} | each |",
        "| --- | --- | --- | --- |",
        *rows,
        f"| all | mean of the tasks' scores | {statistics.fmean(scores):.4f} | |",
        "",
    ])  # fmt: skip
    write_text(out / "table.md", table)
    write_json(out / "results.json", {"score": statistics.fmean(scores), "tasks": found})
    print(table, end="")


def table_rows(task: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one table row per official metric and development set of a task."""
    rows = []
    for split in results[0]["metrics"]:
        names = GLUE["ax" if split == "ax" else task].metrics
        name = task if len(results[0]["metrics"]) == 1 else f"{task} {split}"
        for metric in names:
            values = [result["metrics"][split][metric] for result in results]
            each = " ".join(f"{value:.4f}" for value in values)
            rows.append(f"| {name} | {metric} | {statistics.fmean(values):.4f} | {each} |")
    return rows


def task_score(task: str, result: Mapping[str, Any]) -> float:
    """Return a task's part of the GLUE score: the mean over its development sets, of which MNLI has two."""
    metrics = result["metrics"]
    return statistics.fmean(metrics[split]["score"] for split in GLUE[task].evaluation if split in metrics)

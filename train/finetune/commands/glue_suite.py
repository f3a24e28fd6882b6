"""Fine-tune on several GLUE tasks, with several seeds, and write one table.

    bestiary finetune glue --data glue --tasks cola mrpc stsb rte --seeds 0 1 2 --model FOLDER --out runs/glue

Each run has its own folder, `OUT/TASK/seed-N`. To resume, give the same command again.
"""

import dataclasses
import statistics
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ....data.tasks.glue import FINETUNED, GLUE, GlueName, has_split
from ...errors import RunError
from ..config import FinetuneConfig
from .glue import GlueConfig
from .glue import main as finetune_one

FROM_MNLI = ("rte", "mrpc", "stsb")  # tasks that start from an MNLI model, as in Liu et al. 2019, 5.1


@dataclass(frozen=True, kw_only=True)
class GlueSuiteConfig:
    """Fine-tune on several GLUE tasks and write one table of their official metrics on the development sets."""

    data: Path
    """Folder that contains the folders of the tasks: CoLA, SST-2, MRPC, ..."""
    tasks: tuple[GlueName, ...] = ()
    """Tasks to fine-tune on, in this order. None: all tasks with training data in the folder."""
    from_mnli: bool = False
    """Start rte, mrpc and stsb from this suite's own mnli model, which is trained first."""
    mnli_model: Path | None = None
    """Start rte, mrpc and stsb from this checkpoint folder, a model fine-tuned on MNLI."""
    diagnostic: str | None = None
    """Diagnostic set, for mnli: its file or folder."""
    run: Annotated[FinetuneConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        if self.from_mnli and self.mnli_model is not None:
            raise RunError("--from-mnli and --mnli-model are mutually exclusive.")
        if self.run.distil.teacher is not None:
            raise RunError("--teacher is of one task: give it to `bestiary finetune TASK`.")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of each task's runs."""
        return self.run.seeds or (self.run.seed,)


def planned(config: GlueSuiteConfig) -> list[GlueConfig]:
    """Return the runs, in order.

    Raises:
        RunError: there is no task to train on, or no mnli model to start from.
    """
    tasks = list(config.tasks or (name for name in FINETUNED if _trainable(name, config.data)))
    if not tasks:
        raise RunError(f"{config.data}: none of GLUE's tasks has a training file here.")
    if config.from_mnli and "mnli" not in tasks:
        raise RunError("--from-mnli: mnli is not among the tasks. Add it, or give its model with --mnli-model.")
    tasks.sort(key=lambda name: name != "mnli" if config.from_mnli else 0)
    return [
        GlueConfig(
            task=task,
            data=str(config.data),
            diagnostic=config.diagnostic if task == "mnli" else None,
            run=dataclasses.replace(
                config.run,
                model=_start(config, task, seed),
                seed=seed,
                seeds=(),
                out=config.run.out / task / f"seed-{seed}",
            ),
        )
        for task in tasks
        for seed in config.seeds
    ]


def _trainable(name: str, data: Path) -> bool:
    return (data / GLUE[name].folder).is_dir() and has_split(GLUE[name], data, "train")


def _start(config: GlueSuiteConfig, task: str, seed: int) -> Path:
    if task not in FROM_MNLI:
        return config.run.model
    if config.from_mnli:
        return config.run.out / "mnli" / f"seed-{seed}" / "model"
    return config.mnli_model or config.run.model


def check(runs: Sequence[GlueConfig], to_come: Set[Path]) -> None:
    """Read every task's data and every model's config.json, so that errors show up now and not after hours.

    Args:
        runs: the runs, in order.
        to_come: models that the runs themselves produce.

    Raises:
        DataError: data is invalid; with file and line.
        FileNotFoundError: there is no checkpoint folder.
        ConfigError: a config.json is invalid.
    """
    from ....models.checkpoints.folder import read_config
    from ..tasks.glue import glue_data, glue_task

    for run in {run.task: run for run in runs}.values():
        glue_data(glue_task(run.task, run.run.max_length), run.data, run.diagnostic)
    for model in {run.run.model for run in runs} - to_come:
        read_config(model)


def main(config: GlueSuiteConfig) -> int:
    """Run `bestiary finetune glue`; return the exit status."""
    from ....data.files import write_text
    from ....data.json_files import read_object, write_json

    runs = planned(config)
    check(runs, {run.run.out / "model" for run in runs})
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        print(f"--- {run.task}, seed {run.run.seed}")
        status = finetune_one(run)
        results = run.run.out / "results.json"
        if status or not results.is_file():
            return status
        found.setdefault(run.task, []).append(read_object(results))
    rows = [row for task, results in found.items() for row in table_rows(task, results)]
    scores = [statistics.fmean(task_score(task, result) for result in results) for task, results in found.items()]
    table = "\n".join([
        f"| task | metric | mean of {len(config.seeds)} | each |",
        "| --- | --- | --- | --- |",
        *rows,
        f"| all | mean of the tasks' scores | {statistics.fmean(scores):.4f} | |",
        "",
    ])  # fmt: skip
    write_text(config.run.out / "table.md", table)
    write_json(config.run.out / "results.json", {"score": statistics.fmean(scores), "tasks": found})
    print(table, end="")
    return 0


def table_rows(task: str, results: list[dict[str, Any]]) -> list[str]:
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


def task_score(task: str, result: dict[str, Any]) -> float:
    """Return a task's part of the GLUE score: the mean over its development sets, of which MNLI has two."""
    metrics = result["metrics"]
    return statistics.fmean(metrics[split]["score"] for split in GLUE[task].evaluation if split in metrics)

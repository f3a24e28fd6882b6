"""Fine-tune on several GLUE tasks, with several seeds, and write one table.

    bestiary finetune glue --data glue --tasks cola mrpc stsb rte --seeds 0 1 2 --model FOLDER --out runs/glue

Each run has its own folder, `OUT/TASK/seed-N`. To resume, give the same command again.
"""

import dataclasses
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ....data.tasks.glue import GlueName
from ...errors import RunError
from ..config import FinetuneConfig
from ..tasks.glue_table import trainable, write_table
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
    tasks = list(config.tasks or trainable(config.data))
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
    from ....data.json_files import read_object

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
    write_table(config.run.out, found, len(config.seeds))
    return 0

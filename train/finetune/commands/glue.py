"""Fine-tune on a GLUE task (Wang et al. 2018).

    bestiary finetune mrpc --data glue/MRPC --model FOLDER --epochs 3 --seed 0 --out runs/mrpc

rte, mrpc and stsb improve if they start from an MNLI model, `--model runs/mnli/model` (Liu et al. 2019, 5.1): its
encoder is used, and the classifier is newly initialised.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ....data.tasks.glue import GlueName
from ....models.checkpoints.config import require_checkpoint
from ...errors import RunError
from ..config import FinetuneConfig
from ..seeds import for_each_seed


@dataclass(frozen=True, kw_only=True)
class GlueConfig:
    """Fine-tune an encoder on a GLUE task.

    The official metrics are written to results.json and, if there is a test split, the file for GLUE's server to
    predictions/. Other kinds of tasks have their own commands; `bestiary --help` lists them.
    """

    task: tyro.conf.Positional[GlueName]
    """Name of the task."""
    data: str
    """The task's folder of official TSV files, the folder with all GLUE tasks, a prepared tensorflow-datasets folder,
    or tfds:glue/NAME."""
    diagnostic: str | None = None
    """For mnli: the diagnostic set (its file or folder), predicted at the end, and scored if it has labels."""
    run: Annotated[FinetuneConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        if self.diagnostic is not None and self.task != "mnli":
            raise RunError("--diagnostic is for mnli, whose classes the diagnostic set has.")


def main(config: GlueConfig) -> int:
    """Run `bestiary finetune TASK`; return the exit status."""
    require_checkpoint(config.run.model)
    return for_each_seed(config, _main)


def _main(config: GlueConfig) -> int:
    from ..loop import finetune
    from ..tasks.glue import glue_data, glue_task

    task = glue_task(config.task, config.run.max_length)
    return finetune(
        config, config.run, task, lambda: glue_data(task, config.data, config.diagnostic, config.run.no_test)
    )

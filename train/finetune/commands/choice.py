"""Fine-tune on multiple choice: SWAG and CODAH.

bestiary finetune swag --data swag/ --model FOLDER --out runs/swag
bestiary finetune codah --data codah/full_data.tsv --fold 0 --model FOLDER --out runs/codah
bestiary predict runs/swag --text "She opens the door." --endings "She leaves." "It sings." "He." "They swim."
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ....data.tasks.multiple_choice import FOLDS, split_fold
from ....models.checkpoints.config import require_checkpoint
from ...errors import RunError
from ..config import FinetuneConfig
from ..seeds import for_each_seed

if TYPE_CHECKING:
    from ..tasks.choice import ChoiceTask
    from ..tasks.task import TaskData


@dataclass(frozen=True, kw_only=True)
class SwagConfig:
    """Fine-tune an encoder to choose the continuation of a scene, on SWAG's official CSV files."""

    data: Path
    """Folder with train.csv, val.csv and, to be predicted at the end, test.csv; or the file to train on."""
    eval_data: Path | None = None
    """File to evaluate on, if --data is a file."""
    run: Annotated[FinetuneConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        if self.data.is_file() and self.eval_data is None:
            raise RunError(f"--data {self.data} is a file: give the one to evaluate on with --eval-data.")


@dataclass(frozen=True, kw_only=True)
class CodahConfig:
    """Fine-tune an encoder on CODAH, by one fold of its five-fold cross-validation."""

    data: Path
    """The data set's full_data.tsv, one fold of which is held out; or a folder with train.tsv, dev.tsv and test.tsv."""
    fold: int = 0
    """Fold of full_data.tsv to hold out, one of five."""
    run: Annotated[FinetuneConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        if not 0 <= self.fold < FOLDS:
            raise RunError(f"--fold is {self.fold}; it must be from 0 to {FOLDS - 1}.")


def swag_data(task: "ChoiceTask", config: SwagConfig) -> "TaskData":
    """Read the available splits."""
    from ..tasks.task import TaskData

    train = task.read(config.data, "train", labelled=True)
    dev = task.read(config.eval_data or config.data, "dev", labelled=True)
    test = {}
    if config.data.is_dir() and (config.data / "test.csv").is_file() and not config.run.no_test:
        test = {"test": task.read(config.data, "test", labelled=False)}
    return TaskData(train, {"dev": dev}, test)


def codah_data(task: "ChoiceTask", config: CodahConfig) -> "TaskData":
    """Read one fold, or the splits of a folder."""
    from ..tasks.task import TaskData

    if config.data.is_dir():
        names = ("dev",) if config.run.no_test else ("dev", "test")
        evaluation = {split: task.read(config.data, split, labelled=True) for split in names}
        return TaskData(task.read(config.data, "train", labelled=True), evaluation)
    train, dev = split_fold(task.read(config.data, "full", labelled=True), config.fold)
    return TaskData(train, {"dev": dev})


def main(config: SwagConfig | CodahConfig) -> int:
    """Run `bestiary finetune swag` or `codah`; return the exit status."""
    require_checkpoint(config.run.model)
    return for_each_seed(config, _main)


def _main(config: SwagConfig | CodahConfig) -> int:
    from ..loop import finetune
    from ..tasks.choice import ChoiceTask

    if isinstance(config, SwagConfig):
        swag = ChoiceTask("swag", config.run.max_length)
        return finetune(config, config.run, swag, lambda: swag_data(swag, config))
    codah = ChoiceTask("codah", config.run.max_length)
    return finetune(config, config.run, codah, lambda: codah_data(codah, config))

"""Fine-tune on your own table of texts: TSV, CSV or JSON lines with named columns.

bestiary finetune classification --train reviews.csv --text review --label stars --model FOLDER --out runs/stars
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ....models.checkpoints.config import require_checkpoint
from ...errors import RunError
from ..config import FinetuneConfig
from ..seeds import for_each_seed


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Fine-tune an encoder to classify or score texts of a TSV, CSV or JSON-lines file with named columns.

    The labels are those in the training file; they are saved with the model.
    """

    train: Path
    """Training examples: .tsv (quotes are ordinary characters), .csv or .jsonl, optionally with .gz or .zst."""
    dev: Path | None = None
    """Examples to evaluate on. None: a fraction of the training examples is held out."""
    test: Path | None = None
    """Examples without labels, predicted at the end."""
    dev_fraction: float = 0.1
    """Fraction of the training examples to hold out if there is no --dev."""
    text: str = "sentence"
    """Column of the text, or of the first text of a pair."""
    text_pair: str | None = None
    """Column of the second text of a pair."""
    label: str = "label"
    """Column of the label."""
    labels: tuple[str, ...] = ()
    """The labels, in the order of the class numbers. None: all labels in the training file."""
    positive: str | None = None
    """Of two labels, the one that f1 is of. None: the second of --labels, or in sorted order."""
    regression: bool = False
    """The labels are numbers to predict."""
    run: Annotated[FinetuneConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        if self.regression and self.labels:
            raise RunError("--regression predicts numbers: leave --labels out.")
        if self.test is not None and self.run.no_test:
            raise RunError("--test and --no-test are mutually exclusive.")
        if not 0 < self.dev_fraction < 1:
            raise RunError(f"--dev-fraction is {self.dev_fraction}; it must be between 0 and 1.")


def main(config: TableConfig) -> int:
    """Run `bestiary finetune classification`; return the exit status."""
    require_checkpoint(config.run.model)
    return for_each_seed(config, _main)


def _main(config: TableConfig) -> int:
    from ..loop import finetune
    from ..tasks.table import table_task
    from ..tasks.task import TaskData, hold_out

    task = table_task(
        config.train,
        text=config.text,
        text_pair=config.text_pair,
        label=config.label,
        labels=config.labels,
        regression=config.regression,
        max_length=config.run.max_length,
        positive=config.positive,
    )

    def data() -> TaskData:
        train = task.read(config.train, "train", labelled=True)
        if config.dev is not None:
            dev = task.read(config.dev, "dev", labelled=True)
        else:
            train, dev = hold_out(train, config.dev_fraction, config.run.seed)
        test = {} if config.test is None else {"test": task.read(config.test, "test", labelled=False)}
        return TaskData(train, {"dev": dev}, test)

    return finetune(config, config.run, task, data)

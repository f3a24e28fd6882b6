"""Predict new examples with a fine-tuned model.

bestiary predict runs/mrpc --text "The cat sat." --text-pair "A cat was sitting."
bestiary predict runs/squad --question "Who?" --context "It was him."
bestiary predict runs/mrpc --input glue/MRPC/test.tsv --out predictions
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ...data.files import check_output_folder
from ..config import ParallelConfig
from ..errors import RunError
from .config import finished_run


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Print the predictions of a fine-tuned model, one JSON object per example."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished fine-tuning run."""
    text: tuple[str, ...] = ()
    """Texts to classify, score or tag."""
    text_pair: tuple[str, ...] = ()
    """Second texts of the pairs, one per --text."""
    question: tuple[str, ...] = ()
    """Questions to answer."""
    context: tuple[str, ...] = ()
    """Contexts to find the answers in: one per question, or one for all."""
    endings: tuple[str, ...] = ()
    """Candidate endings of --text."""
    input: Path | None = None
    """Examples in the format of the run's task, instead of texts: a file, or a folder with a file for --split."""
    split: str = "test"
    """Split to predict, if --input is a folder."""
    out: Path | None = None
    """Folder for predictions in the benchmark's format."""
    parallelism: Annotated[ParallelConfig, tyro.conf.arg(name="")] = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if (self.input is None) == (not self.words()):
            raise RunError("Give either texts (--text, or --question and --context) or --input FILE.")

    def words(self) -> dict[str, tuple[str, ...]]:
        """Return the texts on the command line."""
        named = {name: getattr(self, name) for name in ("text", "text_pair", "question", "context", "endings")}
        return {name: texts for name, texts in named.items() if texts}


def main(config: PredictConfig) -> int:
    """Run `bestiary predict`; return the exit status."""
    if config.out is not None:
        check_output_folder(config.out)
    folder = finished_run(config.run)
    # Imported here, since they import JAX, which would delay --help.
    from ...data.json_files import json_text
    from .prediction import open_run, read_examples

    run = open_run(folder, config.parallelism)
    if config.input is None:
        examples = run.task.from_words(config.words())
    else:
        examples = read_examples(run.task, config.input, config.split, labelled=False)
    features, predicted = run.predict(examples)
    if config.out is not None:
        run.task.write_predictions(config.out, config.split, predicted.collected, features, examples)
    for number, said in enumerate(run.task.show(predicted.collected, features, examples), 1):
        print(json_text(said, f"prediction {number}", ensure_ascii=False))
    return 0

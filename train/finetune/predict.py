"""Predict new examples with a fine-tuned model, or masked words with a pretrained one.

bestiary predict runs/ner < texts.txt
bestiary predict runs/mrpc --text "The cat sat." --text-pair "A cat was sitting."
bestiary predict runs/squad --question "Who?" --context "It was him."
bestiary predict runs/mrpc --input glue/MRPC/test.tsv --out predictions
bestiary predict runs/pretrain --text "The [MASK] sat on the mat."
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import batched, chain
from pathlib import Path
from typing import Annotated, Any

import tyro

from ...data.errors import DataError
from ...data.files import check_output_folder
from ...data.reading import lines_of
from ..config import ParallelConfig
from ..errors import RunError, check_text
from .config import finished_run

LINES = 256
"""Lines of standard input that are predicted together."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Print the predictions of a fine-tuned model, or of a pretrained one for masked words, one JSON object per
    example."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished fine-tuning or pretraining run."""
    text: tuple[str, ...] = ()
    """Texts to classify, score or tag, or with masked words, written as the tokenizer's mask token. Without any texts
    or --input, they are the lines of standard input. For tagging, words are split as in the training data: punctuation
    apart, for instance."""
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
        words = self.words()
        for name, texts in words.items():
            check_text(f"--{name.replace('_', '-')}", texts)
        if (words and self.input is not None) or (
            not words and self.input is None and (sys.stdin is None or sys.stdin.isatty())
        ):
            raise RunError(
                "Give either texts (--text, or --question and --context, or standard input) or --input FILE."
            )
        if not words and self.input is None and self.out is not None:
            raise RunError("--out needs --input: the lines of standard input have no benchmark's format.")

    def words(self) -> dict[str, tuple[str, ...]]:
        """Return the texts on the command line."""
        named = {name: getattr(self, name) for name in ("text", "text_pair", "question", "context", "endings")}
        return {name: texts for name, texts in named.items() if texts}


def main(config: PredictConfig) -> int:
    """Run `bestiary predict`; return the exit status."""
    if config.out is not None:
        check_output_folder(config.out)
    pretrained = (config.run / "model" / "config.json").is_file() and not (config.run / "task.json").is_file()
    words = config.words()
    if pretrained and (config.input is not None or set(words) - {"text"}):
        raise RunError(f"{config.run} was pretrained: it predicts masked words, in --text or on standard input.")
    folder = config.run if pretrained else finished_run(config.run)
    # Imported here, since they import JAX, which would delay --help.
    from ...data.json_files import json_text

    lines: Iterator[str] = iter(())
    if config.input is None and not words:
        lines = lines_of(None)
        first = next(lines, None)  # report empty input before loading the model
        if first is None:
            raise DataError("standard input: empty. Expected one text per line.")
        lines = chain([first], lines)
    if pretrained:
        from .fill_masks import MaskFiller

        filler = MaskFiller(folder / "model")
        texts: Iterable[Sequence[str]] = [words["text"]] if words else batched(lines, LINES)
        for number, said in enumerate(chain.from_iterable(map(filler.fill, texts)), 1):
            print(json_text(said, f"prediction {number}", ensure_ascii=False), flush=not words)
        return 0
    from .prediction import open_run, read_examples

    run = open_run(folder, config.parallelism)
    if config.input is not None:
        parts: Iterable[list[Any]] = [read_examples(run.task, config.input, config.split, labelled=False)]
    elif words:
        parts = [run.task.from_words(words)]
    else:
        parts = (run.task.from_words({"text": some}) for some in batched(lines, LINES))
    number = 0
    for examples in parts:
        features, predicted = run.predict(examples)
        if config.out is not None:
            run.task.write_predictions(config.out, config.split, predicted.collected, features, examples)
        for said in run.task.show(predicted.collected, features, examples):
            number += 1
            print(json_text(said, f"prediction {number}", ensure_ascii=False), flush=not (config.input or words))
    return 0

"""Fine-tune on tags of words: entities and parts of speech.

bestiary finetune ner --data wnut17 --model FOLDER --crf --out runs/ner
bestiary finetune pos --data ud_ewt --model FOLDER --out runs/pos
bestiary predict runs/ner --text "Ada Lovelace lived in London ."
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ....data.tasks.tagging import PartOfSpeech, Scheme, tag_set
from ...errors import RunError
from ..config import FinetuneConfig


@dataclass(frozen=True, kw_only=True)
class NerConfig:
    """Fine-tune an encoder to find entities, from CoNLL columns in IOB2 or IOB1.

    results.json holds precision, recall and F1 of whole entities; predictions/ has the words with their tags.
    """

    data: Path
    """Folder with a file for each split: train, dev and, to be evaluated at the end, test; or the file to train on."""
    eval_data: Path | None = None
    """The file to evaluate on, where --data is a file."""
    scheme: Scheme = "iob2"
    """What the files' tags are in. In iob2 every entity begins with B-; in iob1 only one right after another."""
    repair: bool = False
    """Read an I- tag that goes on with nothing as B-, and count it, instead of ending."""
    word_column: int = 0
    """Column of the words, from 0; -1 is the last."""
    tag_column: int = -1
    """Column of the tags."""
    crf: bool = False
    """Score a sentence's tags as a chain, by a conditional random field."""
    crf_rate: float = 100.0
    """Learning rate of the CRF's scores, in times that of the model: they are few, and start from nothing."""
    legal: bool = True
    """With --crf: give no probability to tags that IOB2 does not allow, as I- after O."""
    run: Annotated[FinetuneConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        _check_data(self.data, self.eval_data)
        if self.crf_rate <= 0:
            raise RunError(f"--crf-rate is {self.crf_rate}; it must be above 0.")


@dataclass(frozen=True, kw_only=True)
class PosConfig:
    """Fine-tune an encoder to tell parts of speech, from CoNLL-U files (Universal Dependencies)."""

    data: Path
    """Folder with a file for each split: train, dev and, to be evaluated at the end, test; or the file to train on."""
    eval_data: Path | None = None
    """The file to evaluate on, where --data is a file."""
    column: PartOfSpeech = "upos"
    """upos, the universal tags, or xpos, the language's own."""
    crf: bool = False
    """Score a sentence's tags as a chain, by a conditional random field."""
    crf_rate: float = 100.0
    """Learning rate of the CRF's scores, in times that of the model: they are few, and start from nothing."""
    run: Annotated[FinetuneConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        _check_data(self.data, self.eval_data)
        if self.crf_rate <= 0:
            raise RunError(f"--crf-rate is {self.crf_rate}; it must be above 0.")


def _check_data(data: Path, eval_data: Path | None) -> None:
    if data.is_file() and eval_data is None:
        raise RunError(f"--data {data} is a file: give the one to evaluate on with --eval-data.")


def main(config: NerConfig | PosConfig) -> int:
    """`bestiary finetune ner` and `pos`; returns the exit status."""
    from ..loop import finetune
    from ..tasks.tagging import SUFFIXES, TaggingTask, files_of
    from ..tasks.task import TaskData

    entities = isinstance(config, NerConfig)
    task = TaggingTask(
        "ner" if entities else "pos",
        config.run.max_length,
        (),
        config.crf,
        config.crf_rate,
        entities and config.legal,
        config.scheme if entities else "iob2",
        entities and config.repair,
        config.word_column if entities else 0,
        config.tag_column if entities else -1,
        "upos" if entities else config.column,
    )
    # The tags to tell apart are those of the training file, which is therefore read first.
    train, repaired = task.read_file(config.data, "train", labelled=True)
    labels = tag_set(train, entities=entities)
    if len(labels) < 2:
        raise RunError(f"{config.data}: every word has the tag {' '.join(labels)!r}; there is nothing to tell apart.")
    task = dataclasses.replace(task, labels=labels)

    def data() -> TaskData:
        evaluation = {"dev": task.read(config.eval_data or config.data, "dev", labelled=True)}
        if config.data.is_dir() and files_of(config.data, "test", SUFFIXES[task.name]):
            evaluation["test"] = task.read(config.data, "test", labelled=True)
        return TaskData(train, evaluation, {}, [f"{repaired:,} tags repaired"] if repaired else [])

    return finetune(config, config.run, task, data)

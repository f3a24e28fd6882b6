"""Fine-tune on tagging words: entities and parts of speech.

bestiary finetune ner --data wnut17 --model FOLDER --crf --out runs/ner
bestiary finetune ner --data wnut17 --features ELMO-FOLDER --crf --out runs/lstm
bestiary finetune pos --data ud_ewt --model FOLDER --out runs/pos
bestiary predict runs/ner --text "Ada Lovelace lived in London ."
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ....data.cloud.mirror import url_of
from ....data.progress import counted
from ....data.tasks.tagging import UPOS, PartOfSpeech, Scheme, tag_set
from ....data.tasks.words import learnt_splits
from ....models.checkpoints.config import fingerprint, require_checkpoint
from ...errors import RunError, check_setting
from ..config import TaggingConfig
from ..seeds import for_each_seed


@dataclass(frozen=True, kw_only=True)
class NerConfig:
    """Fine-tune an encoder, or train a new tagger, to find entities, from CoNLL columns in IOB2, IOB1 or BIOES.

    Precision, recall and F1 of whole entities are written to results.json, the words with their tags to predictions/.
    """

    data: Path
    """Folder with one file per split: train, dev and test, which is evaluated at the end, or predicted if it has no
    tags; or the file to train on."""
    eval_data: Path | None = None
    """File to evaluate on, if --data is a file."""
    scheme: Scheme = "iob2"
    """Tagging scheme of the files. In iob2 every entity begins with B-, in iob1 only one that directly follows
    another; in bioes, E- ends an entity of several words, and S- is one of a single word."""
    repair: bool = False
    """Read an I- tag that continues no entity as B-, and count it, instead of stopping with an error."""
    comment: str | None = None
    """Skip lines that begin with this, such as "# id". None: no line is a comment."""
    word_column: int = 0
    """Column of the words, from 0; -1 is the last."""
    tag_column: int = -1
    """Column of the tags, from 0; -1 is the last."""
    crf: bool = False
    """Score the tag sequence of a sentence with a conditional random field."""
    crf_rate: float | None = None
    """Learning rate of the CRF's scores, as a multiple of the model's. None: 100, or 1 for a new tagger."""
    legal: bool = True
    """With --crf: forbid transitions that are invalid in IOB2, such as I- after O."""
    run: Annotated[TaggingConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True)
class PosConfig:
    """Fine-tune an encoder, or train a new tagger, to tag parts of speech, from CoNLL-U files (Universal
    Dependencies)."""

    data: Path
    """Folder with one file per split: train, dev and test, which is evaluated at the end, or predicted if it has no
    tags; or the file to train on."""
    eval_data: Path | None = None
    """File to evaluate on, if --data is a file."""
    column: PartOfSpeech = "upos"
    """Tags to predict: upos (universal) or xpos (language-specific)."""
    crf: bool = False
    """Score the tag sequence of a sentence with a conditional random field."""
    crf_rate: float | None = None
    """Learning rate of the CRF's scores, as a multiple of the model's. None: 100, or 1 for a new tagger."""
    run: Annotated[TaggingConfig, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        _check(self)


def _check(config: NerConfig | PosConfig) -> None:
    if config.data.is_file() and config.eval_data is None:
        raise RunError(f"--data {config.data} is a file: give the file to evaluate on with --eval-data.")
    if config.crf_rate is None:
        object.__setattr__(config, "crf_rate", 1.0 if config.run.new else 100.0)
    check_setting(config, "crf_rate", above=0)


def main(config: NerConfig | PosConfig) -> int:
    """Run `bestiary finetune ner` or `pos`; return the exit status."""
    if not config.run.new:
        require_checkpoint(config.run.model)
    return for_each_seed(config, _main)


def _main(config: NerConfig | PosConfig) -> int:
    from ....models.recurrent.elmo_reader import elmo_files
    from ..loop import finetune
    from ..tasks.tagging import SUFFIXES, TaggingTask, files_of
    from ..tasks.task import TaskData

    entities = isinstance(config, NerConfig)
    features = config.run.features
    if features is not None and url_of(features) is None:  # of a store's, task.json is to have its path there
        features = features.resolve()
    if features is not None:
        elmo_files(features)  # another model is refused before anything is read
    assert config.crf_rate is not None
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
        config.comment if entities else None,
        features=None if features is None else str(features),
        features_fingerprint=None if features is None else fingerprint(features),
    )
    # The tag set is that of the training file, which is therefore read first.
    read = task.read_file(config.data, "train", labelled=True)
    train, repaired = read.sentences, read.repaired
    labels = tag_set(train, entities=entities)
    if len(labels) < 2:
        raise RunError(f"{config.data}: every word has the tag {' '.join(labels)!r}; there is nothing to learn.")
    if not entities and config.column == "upos":
        labels = UPOS
    task = dataclasses.replace(task, labels=labels, splits=learnt_splits(s.words for s in train))

    def data() -> TaskData:
        evaluation = {"dev": task.read(config.eval_data or config.data, "dev", labelled=True)}
        prediction = {}
        if config.data.is_dir() and files_of(config.data, "test", SUFFIXES[task.name]) and not config.run.no_test:
            test = task.read_test(config.data, read.columns)
            (prediction if test[0].tags is None else evaluation)["test"] = test
        return TaskData(train, evaluation, prediction, [f"{counted(repaired, 'tag')} repaired"] if repaired else [])

    return finetune(config, config.run, task, data)

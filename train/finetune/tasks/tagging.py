"""Tagging of words: entities (Devlin et al. 2018, 5.3) and parts of speech.

A word's tag belongs to its first subword; its other subwords have none. With `crf` the tags of a sentence are scored as
a chain (models/heads/crf.py), else independently. Entities are scored by seqeval, as in conlleval.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ....data.batches import Features, pack_features
from ....data.errors import DataError
from ....data.files import write_text
from ....data.progress import counted
from ....data.tasks.tagging import (
    PartOfSpeech,
    Scheme,
    Sentence,
    TaggedFile,
    check_tags,
    read_conll,
    read_conllu,
    tokenise_words,
)
from ....data.tokenizers.tokenizer import Tokenizer
from ....models.heads.crf import CrfWeights, constrained, decode, log_likelihood
from ....models.heads.losses import class_losses
from ...errors import RunError
from ...metrics import Sums
from .task import Arrays, Collected, PlainTask, apply_tokens

SUFFIXES = {"ner": (".conll", ".txt", ".bio", ".iob", ".iob2", ".tsv"), "pos": (".conllu",)}
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "valid", "val", "testa"), "test": ("test", "testb")}


class Tagged(NamedTuple):
    """Outputs of a tagger for a batch."""

    logits: jax.Array  # [B, L, C]
    crf: CrfWeights | None


@dataclass(frozen=True)
class TaggedFeatures(Features):
    """Features made of sentences, or of parts of long sentences; the example of a feature is its sentence."""

    first: np.ndarray = field(default_factory=lambda: np.zeros(0, np.bool_))
    """[T] whether the token is the first of a word"""


@dataclass(frozen=True)
class TaggingTask(PlainTask):
    """Tag words; `name` is ner or pos. The other fields are explained by the flags of the same names."""

    name: str
    max_length: int
    labels: tuple[str, ...]
    crf: bool
    crf_rate: float
    legal: bool
    scheme: Scheme
    repair: bool
    word_column: int
    tag_column: int
    column: PartOfSpeech

    @property
    def unit(self) -> str:
        return "pieces"

    @property
    def head(self) -> str:
        return "crf" if self.crf else "tokens"

    @property
    def best(self) -> str:
        return "f1" if self.name == "ner" else "accuracy"

    @property
    def rates(self) -> Mapping[str, float]:
        return {"crf": self.crf_rate} if self.crf else {}

    def model_changes(self) -> dict[str, Any]:
        return {"num_labels": len(self.labels), "label_names": self.labels}

    def read(self, path: Path, split: str, *, labelled: bool) -> list[Sentence]:
        sentences = self.read_file(path, split, labelled=labelled).sentences
        if self.labels:
            check_tags(sentences, self.labels)
        return sentences

    def read_file(self, path: Path, split: str, *, labelled: bool) -> TaggedFile:
        """Read like `read`, with any tags; also return how many of them were repaired."""
        path = split_file(path, split, SUFFIXES[self.name])
        if self.name == "pos":
            return read_conllu(path, column=self.column, labelled=labelled)
        return read_conll(
            path,
            scheme=self.scheme,
            repair=self.repair,
            word_column=self.word_column,
            tag_column=self.tag_column,
            labelled=labelled,
        )

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Sentence]) -> TaggedFeatures:
        pieces = tokenise_words(tokenizer, examples, max_length=self.max_length)
        number = {label: index for index, label in enumerate(self.labels)}
        first = np.concatenate(pieces.first)
        labels = np.zeros(len(first), np.int32)
        labels[first] = [number[t] for s in examples for t in s.tags or [self.labels[0]] * len(s.words)]
        if self.legal:  # a part of a long sentence may begin inside an entity, but a chain may not
            begins = np.cumsum([0, *map(len, pieces.ids[:-1])]) + len(tokenizer.template.before)
            labels[begins] = [number["B" + self.labels[n][1:]] if n else n for n in labels[begins]]
        packed = pack_features(
            pieces.ids,
            pieces.types,
            example=pieces.sentence,
            truncated=pieces.truncated,
        )
        fields = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed)}
        fields["token_fields"] = {"labels": labels, "label_weights": first.astype(np.float32)}
        if pieces.split:
            fields["note"] = f"{counted(pieces.split, 'sentence')} in several pieces"
        return TaggedFeatures(**fields, first=first)

    def forward(self, model: Any, params: Any, batch: Arrays, **kwargs: Any) -> Tagged:
        weights = None
        if self.crf:
            weights = CrfWeights(**params["crf"])
            weights = constrained(weights, self.labels) if self.legal else weights
        return Tagged(apply_tokens(model, params, batch, **kwargs), weights)

    def weight(self, batch: Arrays) -> jax.Array:
        return batch["label_weights"].sum()

    def loss(self, outputs: Tagged, batch: Arrays) -> Sums:
        """Return the cross-entropy of each word's tag, or of each sentence's tag sequence; averaged over words."""
        if outputs.crf is None:
            return {**class_losses(outputs.logits, batch["labels"], batch["label_weights"])}
        tagged = batch["label_weights"] > 0
        chains = log_likelihood(outputs.crf, outputs.logits, batch["labels"], batch["segment_ids"], tagged)
        return {"loss": (-chains.sum(), batch["label_weights"].sum())}

    def select(self, outputs: Tagged, batch: Arrays) -> Collected:
        if outputs.crf is None:
            tags = outputs.logits.argmax(axis=-1).astype(jnp.int32)
        else:
            tags = decode(outputs.crf, outputs.logits, batch["segment_ids"], batch["label_weights"] > 0)
        return Collected(token={"tags": tags})

    def tags(self, collected: Collected, features: Features, examples: Sequence[Sentence]) -> list[list[str]]:
        """Return the predicted tags of each sentence's words."""
        assert isinstance(features, TaggedFeatures)
        words = iter(collected.token["tags"][features.first].tolist())
        return [[self.labels[next(words)] for _ in sentence.words] for sentence in examples]

    def metrics(self, collected: Collected, features: Features, examples: Sequence[Sentence]) -> dict[str, float]:
        """Return the accuracy over words; for entities also precision, recall and F1, overall and by type."""
        predicted = self.tags(collected, features, examples)
        wanted = [list(sentence.tags or ()) for sentence in examples]
        right = sum(
            a == b for mine, told in zip(predicted, wanted, strict=True) for a, b in zip(mine, told, strict=True)
        )
        accuracy = right / sum(map(len, wanted))
        return (
            {**entity_scores(wanted, predicted), "accuracy": accuracy} if self.name == "ner" else {"accuracy": accuracy}
        )

    def write_predictions(
        self, folder: Path, split: str, collected: Collected, features: Features, examples: Sequence[Sentence]
    ) -> None:
        """Write SPLIT.conll: word, its tag if known, and the predicted tag, tab-separated (`conlleval -d '\\t'`)."""
        folder.mkdir(parents=True, exist_ok=True)
        blocks = []
        for sentence, tags in zip(examples, self.tags(collected, features, examples), strict=True):
            columns = (sentence.words, *([sentence.tags] if sentence.tags else []), tags)
            blocks.append("".join("\t".join(row) + "\n" for row in zip(*columns, strict=True)))
        write_text(folder / f"{split}.conll", "\n".join(blocks))

    def from_words(self, words: Mapping[str, Sequence[str]]) -> list[Sentence]:
        texts = words.get("text", ())
        if not texts or set(words) - {"text"}:
            raise RunError(f"{self.name}: give --text, its words separated by spaces.")
        empty = [number for number, text in enumerate(texts, 1) if not text.split()]
        if empty:
            raise RunError(f"{self.name}: --text number {empty[0]} has no words.")
        split = [tuple(text.split()) for text in texts]
        return [Sentence(some, None, "the command line", tuple(range(1, len(some) + 1))) for some in split]

    def show(self, collected: Collected, features: Features, examples: Sequence[Sentence]) -> list[dict[str, Any]]:
        return [
            {"words": list(sentence.words), "tags": tags}
            for sentence, tags in zip(examples, self.tags(collected, features, examples), strict=True)
        ]


def entity_scores(wanted: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Return precision, recall and F1 of whole entities by seqeval, as in conlleval: overall, and F1 by type."""
    from seqeval.metrics import classification_report

    if all(tag == "O" for tags in (*wanted, *predicted) for tag in tags):  # seqeval would take the mean of nothing
        return {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    nothing: Any = 0  # value if nothing is found or there is nothing to find; annotated as text in seqeval
    report: Any = classification_report(wanted, predicted, output_dict=True, zero_division=nothing)
    together = report["micro avg"]
    scores = {
        name: float(together[f"{name}-score" if name == "f1" else name]) for name in ("precision", "recall", "f1")
    }
    kinds = {kind: values for kind, values in report.items() if not kind.endswith(" avg")}
    return scores | {f"f1_{kind}": float(values["f1-score"]) for kind, values in kinds.items()}


def files_of(folder: Path, split: str, suffixes: Sequence[str]) -> list[Path]:
    """Return the files of a split in a folder.

    A file belongs to a split if a part of its name between dots, hyphens and underscores is the split's name, as in
    train.conll, eng.testa, en_ewt-ud-dev.conllu.
    """
    names = SPLIT_NAMES.get(split, (split,))
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and (file.suffix in suffixes or file.suffix[1:] in names)
        and not set(names).isdisjoint(file.name.replace("-", ".").replace("_", ".").split("."))
    ]


def split_file(path: Path, split: str, suffixes: Sequence[str]) -> Path:
    """Return a split's file: the path itself, or the only matching file of a folder.

    Raises:
        DataError: there is no such file, or there are several.
    """
    if not path.is_dir():
        return path
    found = files_of(path, split, suffixes)
    if len(found) != 1:
        there = ", ".join(file.name for file in found) or "none"
        names = SPLIT_NAMES.get(split, (split,))
        raise DataError(
            f"{path}: expected one file of the split {split!r} ({' or '.join(names)} in its name, ending in "
            f"{', '.join(suffixes)}), found {there}."
        )
    return found[0]

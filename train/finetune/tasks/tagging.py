"""Tagging of words: entities (Devlin et al. 2018, 5.3) and parts of speech.

A word's tag belongs to its first subword; its other subwords have none. With `crf` the tags of a sentence are scored as
a chain (models/heads/crf.py), else independently. Entities are scored by seqeval, as in conlleval.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ....data.batches import Features, pack_features
from ....data.cloud.mirror import fetch, mirror, scheme_of
from ....data.errors import DataError
from ....data.files import write_text
from ....data.progress import counted
from ....data.tasks.tagging import (
    OUTSIDE,
    PartOfSpeech,
    Scheme,
    Sentence,
    TaggedFile,
    check_tags,
    read_conll,
    read_conllu,
    tokenise_words,
)
from ....data.tasks.words import Split, word_spans
from ....data.tokenizers.tokenizer import Tokenizer
from ....models.heads.crf import CrfWeights, constrained, decode, log_likelihood
from ....models.heads.losses import class_losses
from ....models.recurrent.elmo_reader import ElmoReader
from ...errors import RunError
from ...metrics import Sums
from ...progress import Progress, Work
from ...report import Classified
from .task import Arrays, Collected, Imitated, PlainTask, Task, apply_tokens

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


@cache
def elmo(folder: str) -> ElmoReader:
    """Return the ELMo of a folder, which may be one of a store (gs://), as in task.json; it is read once."""
    if scheme_of(folder) is None:
        return ElmoReader(Path(folder))
    fetch(mirror(folder))
    return ElmoReader(mirror(folder))


def features_shape(task: Task) -> tuple[int, int] | tuple[()]:
    """Return (layers, size) of the states that a task's batches have of a frozen encoder; () if there is none."""
    folder = getattr(task, "features", None)
    if folder is None:
        return ()
    c = elmo(folder).config
    return c.layers + 1, 2 * c.width


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
    comment: str | None = None
    splits: tuple[Split, ...] = ("punctuation",)
    """how the training data splits words"""
    features: str | None = None
    """folder of the ELMo whose states the model reads"""
    features_fingerprint: str | None = None
    """of its weights"""

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

    def read_file(self, path: Path, split: str, *, labelled: bool | None, columns: int | None = None) -> TaggedFile:
        """Read like `read`, with any tags; also return how many of them were repaired.

        Args:
            path: the file, or the folder of the split's file.
            split: name of the split.
            labelled: whether to read tags; None: if the file has any.
            columns: number of columns of the training file, by which a CoNLL file is seen to have no tags.
        """
        path = split_file(path, split, SUFFIXES[self.name])
        if self.name == "pos":
            return read_conllu(path, column=self.column, labelled=labelled)
        return read_conll(
            path,
            scheme=self.scheme,
            repair=self.repair,
            word_column=self.word_column,
            tag_column=self.tag_column,
            comment=self.comment,
            labelled=labelled is not False,
            columns=columns,
        )

    def read_test(self, folder: Path, columns: int) -> list[Sentence]:
        """Read the test file of a folder, which may have no tags; the training file has this number of columns."""
        found = self.read_file(folder, "test", labelled=None, columns=columns).sentences
        check_tags(found, self.labels)
        return found

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
        if self.features is not None:
            states = self._states(examples)
            fields["token_fields"]["features"] = np.zeros((len(first), *states.shape[1:]), np.float32)
            fields["token_fields"]["features"][first] = states
            words = hashlib.sha256(json.dumps([s.words for s in examples]).encode()).hexdigest()
            fields["computed"] = {"features": f"{self.features_fingerprint} of {words}"}
        if pieces.split:
            fields["note"] = f"{counted(pieces.split, 'sentence')} in several pieces"
        return TaggedFeatures(**fields, first=first)

    def _states(self, examples: Sequence[Sentence]) -> np.ndarray:
        """Compute the frozen encoder's states of all words, [T, K, F] float32."""
        assert self.features is not None
        try:
            reader = elmo(self.features)
        except FileNotFoundError as error:
            raise RunError(f"{error}: the model reads the states of this ELMo. Put it back.") from None
        if reader.fingerprint != self.features_fingerprint:
            raise RunError(f"{self.features}: another ELMo than the model was trained on. Put that one back.")
        work = Work(Progress(), "reading by ELMo", sum(len(s.words) for s in examples), "words")
        return reader.states([sentence.words for sentence in examples], work.update)

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

    @property
    def inimitable(self) -> str | None:
        return "a CRF predicts whole sequences of tags; leave out --crf" if self.crf else None

    def imitated(self, outputs: Tagged, batch: Arrays) -> Sequence[Imitated]:
        return [Imitated(outputs.logits, batch["label_weights"])]

    def select(self, outputs: Tagged, batch: Arrays) -> Collected:
        """Keep each word's tag and the probability that it has it; with a CRF, given the whole sentence."""
        logits = outputs.logits.astype(jnp.float32)
        if outputs.crf is None:
            tags = logits.argmax(axis=-1).astype(jnp.int32)
            return Collected(token={"tags": tags, "probabilities": jax.nn.softmax(logits).max(axis=-1)})
        crf, segments, tagged = outputs.crf, batch["segment_ids"], batch["label_weights"] > 0
        tags = decode(crf, logits, segments, tagged)
        # The gradient of the tags' log likelihood is 1 - probability at each of them (and minus that at the others).
        slopes = jax.grad(lambda scores: log_likelihood(crf, scores, tags, segments, tagged).sum())(logits)
        return Collected(
            token={"tags": tags, "probabilities": 1 - jnp.take_along_axis(slopes, tags[..., None], axis=-1)[..., 0]}
        )

    @property
    def explained(self) -> Mapping[str, str]:
        if self.name != "ner":
            return {"accuracy": "the fraction of words whose tag is right"}
        return {"f1": "of whole entities of all types together, as conlleval's", "accuracy": "of the tags of words"}

    def classified(self, collected: Collected, features: Features, examples: Sequence[Sentence]) -> Classified:
        number = {label: index for index, label in enumerate(self.labels)}
        wanted = [list(sentence.tags or ()) for sentence in examples]
        predicted = self.tags(collected, features, examples)
        true, found = (
            np.array([number[tag] for tags in some for tag in tags], np.int64) for some in (wanted, predicted)
        )
        return Classified(self.labels, true, found, entity_report(wanted, predicted)[1] if self.name == "ner" else {})

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
        return [self._sentence(text) for text in texts]

    def _sentence(self, text: str) -> Sentence:
        spans = tuple(word_spans(text, self.splits))
        words = tuple(text[start:stop] for start, stop in spans)
        return Sentence(words, None, "the texts", (1,) * len(words), text, spans)

    def show(self, collected: Collected, features: Features, examples: Sequence[Sentence]) -> list[dict[str, Any]]:
        """Return words, tags and probabilities; for ner also entities, by characters of the text if it is known."""
        assert isinstance(features, TaggedFeatures)
        shares = iter(collected.token["probabilities"][features.first].astype(np.float64).round(6).tolist())
        shown = []
        for sentence, tags in zip(examples, self.tags(collected, features, examples), strict=True):
            sure = [min(max(next(shares), 0.0), 1.0) for _ in sentence.words]
            said: dict[str, Any] = {} if sentence.text is None else {"text": sentence.text}
            said |= {"words": list(sentence.words), "tags": tags, "probabilities": sure}
            if self.name == "ner":
                said["entities"] = entities(sentence, tags, sure)
            shown.append(said)
        return shown


def entities(sentence: Sentence, tags: Sequence[str], probabilities: Sequence[float]) -> list[dict[str, Any]]:
    """Return the entities in the tags of a sentence, an I-x that continues none beginning one, as in conlleval.

    `words` is [first, after the last), `start` and `end` are characters of the text if it is known, and `probability`
    is that of the least certain of its words' tags.
    """
    found: list[dict[str, Any]] = []
    for word, tag in enumerate(tags):
        kind = tag[2:]
        if tag == OUTSIDE:
            continue
        last = found[-1] if found else None
        if tag.startswith("I-") and last is not None and last["type"] == kind and last["words"][1] == word:
            last["words"][1] = word + 1
            last["probability"] = min(last["probability"], probabilities[word])
        else:
            found.append({"type": kind, "words": [word, word + 1], "probability": probabilities[word]})
    for entity in found:
        first, after = entity["words"]
        if sentence.text is None:
            entity["text"] = " ".join(sentence.words[first:after])
        else:
            entity["start"], entity["end"] = sentence.spans[first][0], sentence.spans[after - 1][1]
            entity["text"] = sentence.text[entity["start"] : entity["end"]]
    return found


def entity_scores(wanted: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Return precision, recall and F1 of whole entities by seqeval, as in conlleval: overall, and F1 by type."""
    together, kinds = entity_report(wanted, predicted)
    return together | {f"f1_{kind}": values["f1"] for kind, values in kinds.items()}


def entity_report(
    wanted: list[list[str]], predicted: list[list[str]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return (precision, recall and f1 of all entities, the same and the support of each type), by seqeval."""
    from seqeval.metrics import classification_report

    if all(tag == "O" for tags in (*wanted, *predicted) for tag in tags):  # seqeval would take the mean of nothing
        return {"precision": 0.0, "recall": 0.0, "f1": 0.0}, {}
    nothing: Any = 0  # value if nothing is found or there is nothing to find; annotated as text in seqeval
    report: Any = classification_report(wanted, predicted, output_dict=True, zero_division=nothing)

    def named(values: Any) -> dict[str, float]:
        scores = {
            name: float(values[f"{name}-score" if name == "f1" else name]) for name in ("precision", "recall", "f1")
        }
        return scores | {"support": int(values["support"])}

    kinds = {kind: named(values) for kind, values in report.items() if not kind.endswith(" avg")}
    together = named(report["micro avg"])
    del together["support"]
    return together, kinds


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

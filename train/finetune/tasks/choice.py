"""Multiple choice, SWAG and CODAH: one score per ending, from its [CLS] (Devlin et al. 2018, 4.4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from ....data.batches import Features, pack_features
from ....data.errors import DataError
from ....data.files import write_text
from ....data.tasks.multiple_choice import CHOICES, Choice, read_codah, read_swag
from ....data.tokenizers.tokenizer import Tokenizer
from ....models.heads.losses import class_losses
from ...errors import RunError
from ...metrics import Sums
from .task import Arrays, Collected, Imitated, PlainTask, apply_segments

# Files of each split in a folder, under the distributors' names.
SWAG_FILES = {"train": ("train.csv",), "dev": ("val.csv",), "test": ("test.csv",)}
CODAH_FILES = {"train": ("train.tsv",), "dev": ("dev.tsv", "val.tsv"), "test": ("test.tsv",)}


@dataclass(frozen=True)
class ChoiceTask(PlainTask):
    """Choose the right one of four endings; `name` is swag or codah."""

    name: str
    max_length: int

    @property
    def unit(self) -> str:
        return "questions"

    @property
    def head(self) -> str:
        return "choice"

    @property
    def best(self) -> str:
        return "accuracy"

    def model_changes(self) -> dict[str, Any]:
        return {}

    def read(self, path: Path, split: str, *, labelled: bool) -> list[Choice]:
        if path.is_dir():
            path = split_file(path, self.name, split)
        return (read_swag if self.name == "swag" else read_codah)(path, labelled=labelled)

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Choice]) -> Features:
        pairs = [pair for example in examples for pair in example.pairs]
        encoded = tokenizer.encode([a for a, _ in pairs], [b for _, b in pairs], self.max_length)
        labels = np.array([example.label or 0 for example in examples], np.int32)
        return pack_features(
            encoded.ids,
            encoded.types,
            example=np.repeat(np.arange(len(examples)), CHOICES),
            segment_fields={"labels": np.repeat(labels, CHOICES)},
            unit_size=CHOICES,
            truncated=encoded.truncated,
        )

    def forward(self, model: Any, params: Any, batch: Arrays, **kwargs: Any) -> jax.Array:
        """Return scores [B, X], one per segment; the choices of a question are adjacent."""
        return apply_segments(model, params, batch, **kwargs)

    def weight(self, batch: Arrays) -> jax.Array:
        return batch["segment_weights"].sum() / CHOICES

    def loss(self, outputs: jax.Array, batch: Arrays) -> Sums:
        (chosen,) = self.imitated(outputs, batch)
        return {**class_losses(chosen.logits, batch["labels"][:, ::CHOICES], chosen.weights)}

    def imitated(self, outputs: jax.Array, batch: Arrays) -> Sequence[Imitated]:
        scores = outputs.reshape(outputs.shape[0], -1, CHOICES)
        return [Imitated(scores, batch["segment_weights"][:, ::CHOICES])]

    def select(self, outputs: jax.Array, batch: Arrays) -> Collected:
        return Collected(segment={"scores": outputs.astype(jnp.float32)})

    def scores(self, collected: Collected) -> np.ndarray:
        """Return the scores [questions, choices] float32."""
        return collected.segment["scores"].reshape(-1, CHOICES)

    def metrics(self, collected: Collected, features: Features, examples: Sequence[Choice]) -> dict[str, float]:
        labels = np.array([example.label for example in examples])
        return {"accuracy": float((self.scores(collected).argmax(axis=-1) == labels).mean())}

    def write_predictions(
        self, folder: Path, split: str, collected: Collected, features: Features, examples: Sequence[Choice]
    ) -> None:
        """Write SPLIT.csv with a column `pred`, the index of the chosen ending, one row per question in file order."""
        folder.mkdir(parents=True, exist_ok=True)
        chosen = self.scores(collected).argmax(axis=-1)
        write_text(folder / f"{split}.csv", "".join(f"{line}\n" for line in ("pred", *chosen.tolist())))

    def from_words(self, words: Mapping[str, Sequence[str]]) -> list[Choice]:
        texts, endings = words.get("text", ()), words.get("endings", ())
        if not texts or len(endings) != CHOICES * len(texts) or set(words) - {"text", "endings"}:
            raise RunError(
                f"{self.name}: give --text, and {CHOICES} --endings for each; found {len(texts)} texts and "
                f"{len(endings)} endings."
            )
        return [
            Choice(
                str(number),
                tuple((text, ending) for ending in endings[CHOICES * number : CHOICES * (number + 1)]),
                None,
                "the command line",
            )
            for number, text in enumerate(texts)
        ]

    def show(self, collected: Collected, features: Features, examples: Sequence[Choice]) -> list[dict[str, Any]]:
        scores = self.scores(collected).astype(np.float64)
        shares = softmax(scores, axis=-1)
        return [
            {"id": example.key, "choice": int(some.argmax()), "ending": example.pairs[int(some.argmax())][1],
             "probabilities": some.tolist()}
            for example, some in zip(examples, shares, strict=True)
        ]  # fmt: skip


def split_file(folder: Path, name: str, split: str) -> Path:
    """Return the file of a split in a folder.

    Raises:
        DataError: there is no such file.
    """
    names = (SWAG_FILES if name == "swag" else CODAH_FILES).get(split, ())
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise DataError(f"{folder}: no file for the split {split!r} of {name}; expected {' or '.join(names) or 'none'}.")

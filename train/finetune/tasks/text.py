"""Tasks that predict a class or a value for each text or pair of texts: shared by GLUE and users' tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from ....data.batches import Features, pack_features
from ....data.files import write_text
from ....data.tasks.tables import TextExample
from ....data.tokenizers.tokenizer import Tokenizer
from ....models.heads.losses import sequence_losses
from ...errors import RunError
from ...metrics import Sums
from ...report import Classified
from .scores import scored
from .task import Arrays, Collected, Imitated, PlainTask, apply_segments


@dataclass(frozen=True)
class TextTask(PlainTask):
    """Shared by GLUE and users' tables: predict a class or a value for each text or pair of texts."""

    name: str
    max_length: int
    labels: tuple[str, ...] | None
    """class names in the data, in the order of their numbers; None for regression"""
    label_names: tuple[str, ...] | None
    """readable class names, stored in config.json"""
    metric_names: tuple[str, ...]
    """official metrics; their mean is the score"""
    pairs: bool
    """whether an example is a pair of texts"""

    @property
    def head(self) -> str:
        return "classification"

    @property
    def best(self) -> str:
        return "score"

    def model_changes(self) -> dict[str, Any]:
        if self.label_names is None:
            return {"num_labels": 1, "label_names": None, "problem_type": "regression"}
        return {
            "num_labels": len(self.label_names),
            "label_names": self.label_names,
            "problem_type": "single_label_classification",
        }

    def encode(self, tokenizer: Tokenizer, examples: Sequence[TextExample]) -> Features:
        second = [example.second or "" for example in examples] if self.pairs else None
        encoded = tokenizer.encode([example.first for example in examples], second, self.max_length)
        labels = [example.label or 0 for example in examples]
        dtype = np.float32 if self.labels is None else np.int32
        return pack_features(
            encoded.ids,
            encoded.types,
            segment_fields={"labels": np.array(labels, dtype)},
            truncated=encoded.truncated,
        )

    def forward(self, model: Any, params: Any, batch: Arrays, **kwargs: Any) -> jax.Array:
        return apply_segments(model, params, batch, **kwargs)

    def weight(self, batch: Arrays) -> jax.Array:
        return batch["segment_weights"].sum()

    def loss(self, outputs: jax.Array, batch: Arrays) -> Sums:
        problem_type = "regression" if self.labels is None else "single_label_classification"
        return {**sequence_losses(problem_type, outputs, batch["labels"], batch["segment_weights"])}

    def imitated(self, outputs: jax.Array, batch: Arrays) -> Sequence[Imitated]:
        return [Imitated(outputs, batch["segment_weights"], values=self.labels is None)]

    def select(self, outputs: jax.Array, batch: Arrays) -> Collected:
        return Collected(segment={"logits": outputs.astype(jnp.float32)})

    def predicted(self, collected: Collected) -> np.ndarray:
        """Return predicted classes [F] int64, or values [F] float32."""
        logits = collected.segment["logits"]
        return logits[:, 0] if self.labels is None else logits.argmax(axis=-1)

    @property
    def positive_class(self) -> int:
        """Class that f1 is of."""
        return 1

    @property
    def explained(self) -> Mapping[str, str]:
        *first, last = self.metric_names
        said = {"score": f"the mean of {', '.join(first)} and {last}" if first else last}
        if "f1" in self.metric_names and self.label_names is not None:
            said["f1"] = f"of the class {self.label_names[self.positive_class]!r}"
        if "macro_f1" in self.metric_names:
            said["macro_f1"] = "the unweighted mean over the classes"
        return said

    def metrics(self, collected: Collected, features: Features, examples: Sequence[TextExample]) -> dict[str, float]:
        labels = np.array([example.label for example in examples])
        return scored(self.metric_names, self.predicted(collected), labels, self.positive_class)

    def classified(
        self, collected: Collected, features: Features, examples: Sequence[TextExample]
    ) -> Classified | None:
        if self.label_names is None:
            return None
        return Classified(
            self.label_names, np.array([example.label for example in examples]), self.predicted(collected)
        )

    def answers(self, collected: Collected) -> list[str]:
        """Return the prediction for each example, in the data's format."""
        predicted = self.predicted(collected)
        if self.labels is None:
            return [f"{value:.3f}" for value in predicted]
        return [self.labels[number] for number in predicted]

    def write_predictions(
        self, folder: Path, split: str, collected: Collected, features: Features, examples: Sequence[TextExample]
    ) -> None:
        write_submission(folder / f"{split}.tsv", examples, self.answers(collected))

    def from_words(self, words: Mapping[str, Sequence[str]]) -> list[TextExample]:
        first, second = words.get("text", ()), words.get("text_pair", ())
        if not first or len(second) != (len(first) if self.pairs else 0):
            needed = "as many --text-pair as --text" if self.pairs else "--text, and no --text-pair"
            raise RunError(f"{self.name}: give {needed}; found {len(first)} --text and {len(second)} --text-pair.")
        pairs: Sequence[str | None] = second if self.pairs else [None] * len(first)
        return [
            TextExample(text, pair, None, str(number), "the command line")
            for number, (text, pair) in enumerate(zip(first, pairs, strict=True))
        ]

    def show(self, collected: Collected, features: Features, examples: Sequence[TextExample]) -> list[dict[str, Any]]:
        if self.label_names is None:
            return [{"value": float(value)} for value in self.predicted(collected)]
        logits = collected.segment["logits"].astype(np.float64)
        shares = softmax(logits, axis=-1)
        return [
            {
                "label": self.label_names[int(row.argmax())],
                "probabilities": {
                    name: round(float(share), 6) for name, share in zip(self.label_names, row, strict=True)
                },
            }
            for row in shares
        ]


def write_submission(path: Path, examples: Sequence[TextExample], answers: Sequence[str]) -> None:
    """Write GLUE's format: `index` and `prediction`, separated by a tab."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (f"{example.key}\t{answer}\n" for example, answer in zip(examples, answers, strict=True))
    write_text(path, "index\tprediction\n" + "".join(rows))

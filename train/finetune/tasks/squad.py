"""Questions whose answers are spans of a text: SQuAD 1.1 and 2.0 (Devlin et al. 2018, 4.2 and 4.3).

A file with `is_impossible` is version 2.0: its questions may have no answer. The threshold for that is chosen on the
evaluation data and saved with the model.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ....data.batches import Features, pack_features
from ....data.errors import DataError
from ....data.files import write_text
from ....data.json_files import json_text
from ....data.tasks.squad import Question, Windows, make_windows, read_squad
from ....data.tokenizers.tokenizer import Tokenizer
from ....models.heads.losses import NOWHERE, span_sums
from ...errors import RunError
from ...metrics import Sums
from .squad_answers import Answers, find_answers
from .squad_metrics import choose_threshold, metrics_v1, metrics_v2
from .task import Arrays, Collected, Imitated, PlainTask, apply_tokens


@dataclass(frozen=True)
class SquadFeatures(Features):
    """Windows as features; the example of a feature is its question."""

    windows: Windows = field(default_factory=Windows)


@dataclass(frozen=True)
class SquadTask(PlainTask):
    """Answer questions by spans. The fields are explained by the flags of the same names."""

    name: str
    max_length: int
    doc_stride: int
    max_question: int
    max_answer_length: int
    n_best: int
    null_threshold: float | None
    skip_bad_answers: bool

    @property
    def unit(self) -> str:
        return "windows"

    @property
    def head(self) -> str:
        return "span"

    @property
    def best(self) -> str:
        return "f1"

    def model_changes(self) -> dict[str, Any]:
        return {}

    def read(self, path: Path, split: str, *, labelled: bool) -> list[Question]:
        return read_questions(self, path, split, labelled=labelled)[0]

    def encode(self, tokenizer: Tokenizer, examples: Sequence[Question]) -> SquadFeatures:
        windows = make_windows(
            tokenizer,
            examples,
            max_length=self.max_length,
            doc_stride=self.doc_stride,
            max_question=self.max_question,
        )
        packed = pack_features(
            windows.ids,
            windows.types,
            example=windows.question,
            segment_fields={
                "start_positions": np.array(windows.first, np.int32),
                "end_positions": np.array(windows.last, np.int32),
            },
            truncated=windows.cut_tokens,
        )
        fields = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed)}
        if windows.unheld:
            fields["note"] = f"{len(windows.unheld):,} answers that no window holds"
        return SquadFeatures(**fields, windows=windows)

    def check(self, features: Features, examples: Sequence[Question]) -> None:
        """Refuse answers that no window contains, unless bad answers are to be skipped."""
        assert isinstance(features, SquadFeatures)
        unheld = features.windows.unheld
        if not unheld or self.skip_bad_answers:
            return
        question = examples[unheld[0]]
        text = question.answers[0].text
        shown = repr(text if len(text) <= 60 else f"{text[:57]}...")
        raise DataError(
            f"{len(unheld):,} of {len(examples):,} training questions have an answer that no window contains, such as "
            f'question "{question.key}": {shown}, {len(text):,} characters. Raise --max-length (it is '
            f"{self.max_length}), lower --doc-stride (it is {self.doc_stride}), or pass --skip-bad-answers: their "
            "windows are then treated as unanswerable."
        )

    def forward(self, model: Any, params: Any, batch: Arrays, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
        return apply_tokens(model, params, batch, **kwargs)

    def weight(self, batch: Arrays) -> jax.Array:
        return batch["segment_weights"].sum()

    def loss(self, outputs: tuple[jax.Array, jax.Array], batch: Arrays) -> Sums:
        """Return the mean of the cross-entropies of the first and last token, each over the tokens of its window."""
        own = own_tokens(batch)
        starts, ends = (batch["cls_positions"] + batch[f"{side}_positions"] for side in ("start", "end"))
        start, end = span_sums(*outputs, starts, ends, batch["segment_weights"], own)
        return {
            "loss": ((start.loss + end.loss) / 2, start.weight),
            "position_accuracy": ((start.correct + end.correct) / 2, start.weight),
        }

    def imitated(self, outputs: tuple[jax.Array, jax.Array], batch: Arrays) -> Sequence[Imitated]:
        own = own_tokens(batch)
        logits = [jnp.where(own, side.astype(jnp.float32)[:, None, :], NOWHERE) for side in outputs]
        return [Imitated(side, batch["segment_weights"] / 2) for side in logits]

    def select(self, outputs: tuple[jax.Array, jax.Array], batch: Arrays) -> Collected:
        return Collected(token={"start": outputs[0].astype(jnp.float32), "end": outputs[1].astype(jnp.float32)})

    def answers(self, collected: Collected, features: Features, examples: Sequence[Question]) -> list[Answers]:
        """Find the answers to each question."""
        assert isinstance(features, SquadFeatures)
        return find_answers(
            examples,
            features.windows,
            collected.token["start"],
            collected.token["end"],
            features.starts,
            n_best=self.n_best,
            max_answer_length=self.max_answer_length,
        )

    def threshold(self, answers: Sequence[Answers], questions: Sequence[Question]) -> float | None:
        """Return the odds above which a question counts as unanswerable; None if all questions have answers.

        It is chosen on the given questions if they are of version 2.0 and their answers are known, unless it has been
        chosen before.
        """
        if all(question.impossible is None for question in questions):
            told = any(question.answers for question in questions)
            return None if told else self.null_threshold
        if self.null_threshold is not None:
            return self.null_threshold
        texts = {question.key: found.text for question, found in zip(questions, answers, strict=True)}
        odds = {question.key: found.null_odds for question, found in zip(questions, answers, strict=True)}
        return choose_threshold(questions, texts, odds)

    def metrics(self, collected: Collected, features: Features, examples: Sequence[Question]) -> dict[str, float]:
        """Return `exact_match` and `f1` of version 1.1, or the official metrics of 2.0 and the threshold used."""
        answers = self.answers(collected, features, examples)
        texts = {question.key: found.text for question, found in zip(examples, answers, strict=True)}
        threshold = self.threshold(answers, examples)
        if threshold is None:
            return metrics_v1(examples, texts)
        odds = {question.key: found.null_odds for question, found in zip(examples, answers, strict=True)}
        return {**metrics_v2(examples, texts, odds, threshold), "null_threshold": threshold}

    def settled(self, metrics: Mapping[str, float]) -> "SquadTask":
        """Return the task with the chosen threshold."""
        return dataclasses.replace(self, null_threshold=metrics.get("null_threshold", self.null_threshold))

    @property
    def explained(self) -> Mapping[str, str]:
        """See `PlainTask`."""
        return {
            "exact_match": "answers equal to one in the data, after the official normalisation, in per cent",
            "f1": "overlap of the words of an answer with the best one in the data, in per cent",
        }

    def write_predictions(
        self, folder: Path, split: str, collected: Collected, features: Features, examples: Sequence[Question]
    ) -> None:
        """Write `predictions.json`, `nbest_predictions.json` and, for 2.0, `null_odds.json`, by question id."""
        answers = self.answers(collected, features, examples)
        threshold = self.threshold(answers, examples)
        folder = folder / split
        folder.mkdir(parents=True, exist_ok=True)
        by_key = {question.key: found for question, found in zip(examples, answers, strict=True)}
        write_answers(folder / "predictions.json", {k: final_text(found, threshold) for k, found in by_key.items()})
        nbest = {key: found.ranked(null=threshold is not None) for key, found in by_key.items()}
        write_answers(folder / "nbest_predictions.json", nbest)
        if threshold is not None:
            write_answers(folder / "null_odds.json", {key: found.null_odds for key, found in by_key.items()})

    def from_words(self, words: Mapping[str, Sequence[str]]) -> list[Question]:
        questions, contexts = words.get("question", ()), words.get("context", ())
        if not questions or len(contexts) not in (1, len(questions)) or set(words) - {"question", "context"}:
            raise RunError(
                f"squad: give --question, and one --context for all or one each; found {len(questions)} questions "
                f"and {len(contexts)} contexts."
            )
        contexts = list(contexts) * (len(questions) if len(contexts) == 1 else 1)
        return [Question(str(number), *pair) for number, pair in enumerate(zip(questions, contexts, strict=True))]

    def show(self, collected: Collected, features: Features, examples: Sequence[Question]) -> list[dict[str, Any]]:
        answers = self.answers(collected, features, examples)
        threshold = self.threshold(answers, examples)
        shown = []
        for question, found in zip(examples, answers, strict=True):
            text = final_text(found, threshold)
            ranked = found.ranked(null=threshold is not None)
            share = next((option["probability"] for option in ranked if option["text"] == text), None)
            start = found.spans[0].start if text else None
            shown.append({
                "id": question.key, "question": question.question, "answer": text, "probability": share, "start": start
            })  # fmt: skip
        return shown


def own_tokens(batch: Arrays) -> jax.Array:
    """Return which tokens each slot's window consists of: [B, X, L] bool."""
    slots = jnp.arange(1, batch["cls_positions"].shape[1] + 1)
    return batch["segment_ids"][:, None, :] == slots[None, :, None]


def final_text(found: Answers, threshold: float | None) -> str:
    """Return the text of the best span, or "" if the odds for no answer are above the threshold."""
    return "" if threshold is not None and found.null_odds > threshold else found.text


def write_answers(path: Path, value: Any) -> None:
    """Write JSON by id, without escaping non-ASCII text."""
    write_text(path, json_text(value, str(path), indent=4, ensure_ascii=False) + "\n")


def read_questions(task: SquadTask, path: Path, split: str, *, labelled: bool = True) -> tuple[list[Question], int]:
    """Read (the questions of a file or of a folder's split, the number skipped); check the answers of a training split.

    Raises:
        DataError: as `read_squad`, or if a folder does not have exactly one file `SPLIT-v*.json`.
    """
    if path.is_dir():
        files = sorted(path.glob(f"{split}-v*.json"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise DataError(f"{path}: expected one file {split}-v1.1.json or {split}-v2.0.json, found {found}.")
        path = files[0]
    check = labelled and split == "train"
    return read_squad(path, labelled=labelled, check_answers=check, skip_bad_answers=task.skip_bad_answers)

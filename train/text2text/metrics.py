"""Figures of outputs: ROUGE, sacreBLEU, exact matches, and the metrics of a GLUE task."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from ...data.tasks.glue import GLUE
from ...data.tasks.glue_text import answer_of
from ..errors import RunError
from ..finetune.tasks.scores import scored
from ..translate.score import Scores, Scoring
from .config import Metric

if TYPE_CHECKING:
    from ..translate.translator import Translation

ROUGE = ("rouge1", "rouge2", "rougeL")


def text_scores(metric: Metric, outputs: Sequence[str], references: Sequence[str]) -> Scores:
    """Score outputs against one reference each.

    Args:
        metric: rouge: ROUGE-1, 2 and L (Lin 2004), F-measures of stemmed words in per cent, and their mean, `rouge`;
            sacrebleu: BLEU and chrF; exact: the share of outputs that are the reference, in per cent.
        outputs: the outputs.
        references: one for each.

    Raises:
        RunError: the package for ROUGE is not installed.
    """
    exact = 100 * sum(map(str.__eq__, outputs, references)) / max(1, len(references))
    if metric == "exact":
        return Scores({"exact_match": exact}, {}, {})
    if metric == "sacrebleu":
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        bleu, chrf = BLEU(), CHRF()
        lists = list(outputs), [list(references)]
        values = {"bleu": bleu.corpus_score(*lists).score, "chrf": chrf.corpus_score(*lists).score}
        signatures = {"bleu_signature": str(bleu.get_signature()), "chrf_signature": str(chrf.get_signature())}
        return Scores({**values, "exact_match": exact}, signatures, {})
    scorer = rouge_scorer()
    each = [scorer.score(reference, output) for output, reference in zip(outputs, references, strict=True)]
    values = {name: 100 * sum(found[name].fmeasure for found in each) / max(1, len(each)) for name in ROUGE}
    values["rouge"] = sum(values.values()) / len(ROUGE)
    signature = f"rouge-score {version('rouge-score')}, stemmed, F-measure"
    return Scores({**values, "exact_match": exact}, {"rouge_signature": signature}, {})


def rouge_scorer():
    """Return the scorer of ROUGE.

    Raises:
        RunError: its package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise RunError("--metric rouge needs the package rouge-score: pip install 'bestiary[rouge]'.") from None
    return RougeScorer(list(ROUGE), use_stemmer=True)


DECIDING: dict[Metric, str] = {"rouge": "rouge", "sacrebleu": "bleu", "exact": "exact_match"}


@dataclass(frozen=True)
class TextScoring:
    """One of the metrics."""

    metric: Metric

    @property
    def deciding(self) -> str:
        """See `Scoring`."""
        return DECIDING[self.metric]

    def __call__(self, outputs: "Sequence[Translation]", references: Sequence[str]) -> Scores:
        """See `Scoring`."""
        return text_scores(self.metric, [found.text for found in outputs], references)


@dataclass(frozen=True)
class GlueScoring:
    """The official metrics of a GLUE task, of answers in words; one that is none of the task's answers is wrong."""

    name: str
    deciding = "score"

    def __call__(self, outputs: "Sequence[Translation]", references: Sequence[str]) -> Scores:
        """See `Scoring`."""
        task = GLUE[self.name]
        labels = np.array([answer_of(task, text) for text in references])
        given = [answer_of(task, found.text) for found in outputs]
        outside = sum(answer is None for answer in given)
        if task.label_names is None:
            predicted = np.array([-1.0 if answer is None else answer for answer in given])
        else:  # another class than the right one, as the original's metrics count it
            labels, classes = labels.astype(int), len(task.label_names)
            wrong = (labels + 1) % classes
            predicted = np.array(
                [other if answer is None else answer for answer, other in zip(given, wrong, strict=True)]
            )
        values = scored(task.metrics, predicted.astype(labels.dtype), labels)
        return Scores({**values, "outside": outside / max(1, len(given))}, {}, {})


def scoring(metric: Metric) -> Scoring:
    """Return the figures of a run; a missing package is reported before the work."""
    if metric == "rouge":
        rouge_scorer()
    return TextScoring(metric)

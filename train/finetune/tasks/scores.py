"""The benchmarks' official metrics, computed by scikit-learn and SciPy.

A correlation with constant predictions or labels is undefined; it counts as 0, as for a model that has learned nothing,
and so does F1 without any positives. The libraries' warnings about such cases are not shown.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np


def metric(name: str, predictions: np.ndarray, labels: np.ndarray, positive: int = 1) -> float:
    """Compute one metric over n examples.

    Args:
        name: accuracy, f1 (of one of two classes), macro_f1, matthews, pearson, spearman or mean_squared_error.
        predictions: [n], classes (int) or values (float).
        labels: [n], likewise.
        positive: class that f1 is of.
    """
    from scipy import stats
    from sklearn import metrics

    undefined: Any = {"zero_division": 0.0}
    match name:
        case "accuracy":
            return float(metrics.accuracy_score(labels, predictions))
        case "f1":
            return float(metrics.f1_score(labels, predictions, pos_label=positive, **undefined))
        case "macro_f1":
            return float(metrics.f1_score(labels, predictions, average="macro", **undefined))
        case "matthews":
            alone = np.ptp(predictions) == 0 or np.ptp(labels) == 0
            return 0.0 if alone else float(metrics.matthews_corrcoef(labels, predictions))
        case "mean_squared_error":
            return float(metrics.mean_squared_error(labels, predictions))
        case "pearson" | "spearman":
            if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
                return 0.0
            correlation: Any = stats.pearsonr if name == "pearson" else stats.spearmanr
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", stats.NearConstantInputWarning)
                return float(correlation(labels, predictions).statistic)
    raise ValueError(f"no metric {name!r}")


def scored(names: Sequence[str], predictions: np.ndarray, labels: np.ndarray, positive: int = 1) -> dict[str, float]:
    """Compute several metrics, and `score`, their mean, by which GLUE ranks a task with two metrics."""
    values = {name: metric(name, predictions, labels, positive) for name in names}
    return {**values, "score": sum(values.values()) / len(values)}

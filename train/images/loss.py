"""Losses of image classifiers, with smoothed or mixed labels, and the metrics of evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_expit, log_softmax

from ..metrics import Sums

BINS = 15  # of the calibration error


def targets(batch: dict[str, jax.Array], classes: int, smoothing: float) -> jax.Array:
    """Return the probabilities to predict, [B, classes] float32.

    Args:
        batch: labels [B] int; with mixup also other_labels [B] int and shares [B] float32, the share of the first.
        classes: number of classes.
        smoothing: fraction spread evenly over all classes (Szegedy et al. 2015, 7).
    """
    wanted = jax.nn.one_hot(batch["labels"], classes)
    if "shares" in batch:
        share = batch["shares"][:, None]
        wanted = share * wanted + (1 - share) * jax.nn.one_hot(batch["other_labels"], classes)
    return wanted * (1 - smoothing) + smoothing / classes if smoothing else wanted


def class_sums(logits: jax.Array, batch: dict[str, jax.Array], kind: str, smoothing: float) -> Sums:
    """Compute the training loss ("loss") and the accuracy, as sums over images and their number.

    Args:
        logits: [B, classes].
        batch: as for `targets`.
        kind: "softmax", the cross-entropy; or "sigmoid", the sum of the classes' binary ones (Beyer et al. 2020).
        smoothing: as for `targets`.
    """
    logits = logits.astype(jnp.float32)
    wanted = targets(batch, logits.shape[-1], smoothing)
    if kind == "softmax":
        losses = -(wanted * jax.nn.log_softmax(logits)).sum(axis=-1)
    else:
        losses = -(wanted * jax.nn.log_sigmoid(logits) + (1 - wanted) * jax.nn.log_sigmoid(-logits)).sum(axis=-1)
    count = jnp.float32(len(logits))
    hits = (logits.argmax(axis=-1) == batch["labels"]).astype(jnp.float32)
    return {"loss": (losses.sum(), count), "accuracy": (hits.sum(), count)}


def evaluate(logits: np.ndarray, labels: np.ndarray, kind: str = "softmax") -> dict[str, float]:
    """Compute the metrics of labelled examples.

    Args:
        logits: [n, classes] float32.
        labels: [n] int.
        kind: what loss and probabilities are those of; see `class_sums`.

    Returns:
        loss, its mean; accuracy; top5, the fraction of labels among the five most probable classes, if
        there are more classes than that; calibration_error (Guo et al. 2017, ECE with 15 bins).
    """
    wide = logits.astype(np.float64)
    log_probabilities = log_softmax(wide, axis=-1) if kind == "softmax" else log_expit(wide)
    own = np.take_along_axis(log_probabilities, labels[:, None], axis=-1)
    losses = -own[:, 0]
    if kind == "sigmoid":
        against = log_expit(-wide)
        losses = losses - against.sum(axis=-1) + np.take_along_axis(against, labels[:, None], axis=-1)[:, 0]
    predicted = logits.argmax(axis=-1)
    metrics = {"loss": float(losses.mean()), "accuracy": float((predicted == labels).mean())}
    if logits.shape[-1] > 5:
        metrics["top5"] = float(((log_probabilities > own).sum(axis=-1) < 5).mean())
    confidence = np.exp(log_probabilities.max(axis=-1))
    return metrics | {"calibration_error": calibration_error(confidence, predicted == labels)}


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the expected calibration error: the mean gap of accuracy and confidence over bins of equal width.

    Args:
        confidence: [n], probability of the predicted class.
        correct: [n] bool.
    """
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, correct - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))

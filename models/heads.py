"""Task heads on an encoder's hidden states, and their losses.

A loss is a pair of float32 sums, over what is predicted, of the loss and of its weights: sums add up exactly over
devices, accumulation steps and hosts, and their quotient is the mean that the reference implementation reports.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer

from .layers import ACTIVATIONS, Embed, LayerNorm, Linear, add_bias, partitioned

IGNORED_LABEL = -100  # what the reference implementation's data holds where nothing is to be predicted


class WeightedSum(NamedTuple):
    """A sum and the weight that divides it into a mean, both float32 scalars."""

    total: Array
    weight: Array


def gather_positions(hidden: Array, positions: Array) -> Array:
    """hidden [B, L, E] at positions [B, P] int -> [B, P, E]. A position that is not in 0..L-1 gives NaN."""
    return jnp.take_along_axis(hidden, positions[:, :, None], axis=1, mode="fill")


class MaskedLanguageModelHead(nn.Module):
    """Dense, activation, norm, then the products with the word embeddings, and a bias (Devlin et al. 2018, 3.1).

    The dense layer and the norm before the tied decoder are of the released code, not of the paper.
    """

    activation: str
    norm_epsilon: float
    kernel_init: Initializer
    dtype: str = "float32"

    @nn.compact
    def __call__(self, hidden: Array, words: Embed) -> Array:
        """hidden [..., E] -> logits [..., V] in the compute dtype, accumulated in float32."""
        hidden = Linear(
            hidden.shape[-1:], ("embed", "embed_out"), kernel_init=self.kernel_init, dtype=self.dtype, name="transform"
        )(hidden)
        hidden = LayerNorm(self.norm_epsilon, dtype=self.dtype, name="norm")(ACTIVATIONS[self.activation](hidden))
        bias = self.param("bias", partitioned(nn.initializers.zeros_init(), "vocab"), (words.count,), jnp.float32)
        return add_bias(words.attend(hidden), bias).astype(self.dtype)


@jax.custom_vjp
def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """-log softmax(logits)[label], and whether the label is the most probable class.

    The backward pass is written out, (softmax - one-hot)·gradient in one pass over the logits, so that neither the
    probabilities nor a one-hot tensor is kept: the residuals are the logits themselves and two numbers a prediction.

    Args:
        logits: [..., V], any float type; computed in float32.
        labels: [...] int in 0..V-1.

    Returns:
        (losses [...] float32, hits [...] bool; a tie for the most probable class counts as a hit)
    """
    return _cross_entropy_forward(logits, labels)[0]


def _cross_entropy_forward(logits: Array, labels: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    # The largest logit and the logarithm of the sum stay apart: added up, large logits would cost the small one digits.
    top = logits.max(axis=-1).astype(jnp.float32)
    log_sum = jnp.log(jnp.exp(logits.astype(jnp.float32) - top[..., None]).sum(axis=-1))
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0].astype(jnp.float32)
    return (log_sum + (top - chosen), chosen >= top), (logits, labels, top, log_sum)


def _cross_entropy_backward(residuals: tuple[Array, ...], gradients: tuple[Array, Array]) -> tuple[Array, None]:
    logits, labels, top, log_sum = residuals
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    probabilities = jnp.exp(logits.astype(jnp.float32) - top[..., None] - log_sum[..., None])
    difference = probabilities - (classes == labels[..., None]).astype(jnp.float32)
    return (difference * gradients[0][..., None]).astype(logits.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


class PredictionSums(NamedTuple):
    """Float32 sums over weighted predictions: of the loss, of those that are right, and of the weights."""

    loss: Array
    correct: Array
    weight: Array


def prediction_sums(logits: Array, labels: Array, weights: Array | None = None) -> PredictionSums:
    """Cross-entropy and accuracy of classifications, as sums.

    Args:
        logits: [..., V].
        labels: [...] int; where it is `IGNORED_LABEL` the weight is 0.
        weights: [...] float or None for ones; a prediction of weight 0 contributes exactly nothing.
    """
    ignored = labels == IGNORED_LABEL
    weights = jnp.ones(labels.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    weights = jnp.where(ignored, 0.0, weights)
    losses, hits = cross_entropy(logits, jnp.where(ignored, 0, labels))
    return PredictionSums((losses * weights).sum(), (hits * weights).sum(), weights.sum())


def masked_language_model_loss(logits: Array, labels: Array, weights: Array | None = None) -> WeightedSum:
    """Cross-entropy of the masked tokens (Devlin et al. 2018, 3.1).

    Args:
        logits: [B, P, V].
        labels: [B, P] int, the original tokens; `IGNORED_LABEL` has weight 0.
        weights: [B, P], 0 where a slot holds no prediction; None for ones.
    """
    sums = prediction_sums(logits, labels, weights)
    return WeightedSum(sums.loss, sums.weight)


def classification_loss(logits: Array, labels: Array, weights: Array | None = None) -> WeightedSum:
    """Cross-entropy: logits [..., C], labels [...] int, weights [...] or None. Also for tags and multiple choice."""
    sums = prediction_sums(logits, labels, weights)
    return WeightedSum(sums.loss, sums.weight)


def regression_loss(predictions: Array, targets: Array, weights: Array | None = None) -> WeightedSum:
    """Squared error: predictions and targets [..., C], weights [...] or None; the quotient is the mean over all C."""
    errors = jnp.square(predictions.astype(jnp.float32) - targets.astype(jnp.float32))
    weights = jnp.ones(targets.shape[:-1], jnp.float32) if weights is None else weights.astype(jnp.float32)
    return WeightedSum((errors * weights[..., None]).sum(), weights.sum() * targets.shape[-1])


def multi_label_loss(logits: Array, labels: Array, weights: Array | None = None) -> WeightedSum:
    """Cross-entropy of independent yes-or-no classes: logits and labels (0 or 1) [..., C], weights [...] or None.

    The weight counts classes, so that the quotient is the mean over examples and classes.
    """
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    losses = -labels * jax.nn.log_sigmoid(logits) - (1 - labels) * jax.nn.log_sigmoid(-logits)
    weights = jnp.ones(labels.shape[:-1], jnp.float32) if weights is None else weights.astype(jnp.float32)
    return WeightedSum((losses * weights[..., None]).sum(), weights.sum() * labels.shape[-1])


def sequence_loss(problem_type: str | None, logits: Array, labels: Array, weights: Array | None = None) -> WeightedSum:
    """The loss of a sequence classifier: what its `problem_type` says, else told from the labels as the reference does.

    Args:
        problem_type: of the config; None takes one output for regression, integer labels for one class each, and any
            other labels for yes or no of every class.
        logits: [..., C].
        labels: [...] int, or [..., C] yes or no, or [...] (C = 1) or [..., C] numbers.
        weights: [...] or None.
    """
    if problem_type is None:
        single = jnp.issubdtype(labels.dtype, jnp.integer)
        problem_type = "single_label_classification" if single else "multi_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else problem_type
    if problem_type == "single_label_classification":
        return classification_loss(logits, labels, weights)
    if problem_type == "multi_label_classification":
        return multi_label_loss(logits, labels, weights)
    return regression_loss(logits, labels.reshape(logits.shape), weights)


def span_loss(start_logits: Array, end_logits: Array, starts: Array, ends: Array) -> tuple[WeightedSum, WeightedSum]:
    """Cross-entropy of an answer's first and last token, each over the row's tokens (Devlin et al. 2018, 4.2).

    Args:
        start_logits, end_logits: [B, L].
        starts, ends: [B] int; one at L or beyond lies outside of the window and counts for nothing.

    Returns:
        the two sums; the reference's loss is the mean of their two quotients.
    """
    length = start_logits.shape[-1]

    def one(logits: Array, positions: Array) -> WeightedSum:
        positions = jnp.maximum(positions, 0)
        return classification_loss(logits, jnp.where(positions >= length, IGNORED_LABEL, positions))

    return one(start_logits, starts), one(end_logits, ends)

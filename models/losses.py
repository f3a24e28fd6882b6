"""Losses: what training minimises, and what parity with the reference implementation measures.

A loss is a pair of float32 sums, over what is predicted, of the loss and of its weights: sums add up exactly over
devices, accumulation steps and hosts, and their quotient is the mean that the reference implementation reports.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .layers import outer_sum

IGNORED_LABEL = -100  # what the reference implementation's data holds where nothing is to be predicted


class WeightedSum(NamedTuple):
    """A sum and the weight that divides it into a mean, both float32 scalars."""

    total: Array
    weight: Array


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
    labels, weights = _counted(labels, weights)
    losses, hits = cross_entropy(logits, labels)
    return PredictionSums((losses * weights).sum(), jnp.where(hits, weights, 0.0).sum(), weights.sum())


def _counted(labels: Array, weights: Array | None) -> tuple[Array, Array]:
    """Labels that are all classes, and their weights [...] float32: 0 for those that were `IGNORED_LABEL`."""
    ignored = labels == IGNORED_LABEL
    weights = jnp.ones(labels.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    return jnp.where(ignored, 0, labels), jnp.where(ignored, 0.0, weights)


class SmoothedSums(NamedTuple):
    """Float32 sums over weighted predictions of tokens, by one pass or two. Only `loss` has a gradient."""

    loss: Array  # what is minimised: the smoothed losses, and the divergence times its weight
    nll: Array  # of -log p(label), without smoothing; exp(nll / weight) is the perplexity
    correct: Array  # of those that are right
    divergence: Array  # of half the sum of two passes' divergences both ways
    weight: Array  # of the weights, once for each pass


def projected_sums(
    passes: Sequence[Array],
    kernel: Array,
    labels: Array,
    weights: Array | None = None,
    smoothing: float = 0.0,
    bias: Array | None = None,
    r_drop: float = 0.0,
) -> SmoothedSums:
    """The label-smoothed losses of hidden · kernelᵀ + bias, some tokens at a time: all logits are never held at once.

    Cross-entropy against the label with probability 1 - smoothing and any word with smoothing / V (Szegedy et al. 2015,
    7; Vaswani et al. 2017, 5.4). The uniform share goes to all V words, the label among them, as in PyTorch (and
    fairseq before 2020: 1 - smoothing of the label's loss and smoothing / V of the sum of all words'). Of two passes
    with dropout of their own also half the sum of the divergences both ways (Liang et al. 2021, equations 2 to 4).

    The gradient is taken while the logits of a few columns of the rows are at hand, so that they are computed once;
    what is kept for the backward pass is tensors of the hidden states' and the kernel's size.

    Args:
        passes: one or two [B, L, E], of the dtype to compute in; products are accumulated in float32.
        kernel: [V, E] float32, as an embedding table.
        labels: [B, L] int; where it is `IGNORED_LABEL` the weight is 0.
        weights: [B, L] float or None for ones.
        smoothing: in [0, 1).
        bias: [V] float32 or None; it gets no gradient.
        r_drop: weight of the divergence of two passes.
    """
    labels, weights = _counted(labels, weights)
    loss, *rest = _projected(tuple(passes), kernel, bias, labels, weights, smoothing, r_drop)
    nll, correct, divergence = map(jax.lax.stop_gradient, rest)
    return SmoothedSums(loss, nll, correct, divergence, len(passes) * weights.sum())


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _projected(*arguments: Any) -> tuple[Array, ...]:
    """The sums that `_over_chunks` gives, with the gradient that it takes along the way."""
    return _over_chunks(*arguments, with_gradient=False)[0]


def _projected_backward(
    smoothing: float,
    r_drop: float,
    residuals: tuple[tuple[Array, ...], Array],
    gradients: tuple[Array, ...],
) -> tuple[tuple[Array, ...], Array, None, None, None]:
    del smoothing, r_drop  # they are in the residuals
    to_passes, to_kernel = residuals
    scaled = tuple((g.astype(jnp.float32) * gradients[0]).astype(g.dtype) for g in to_passes)
    return scaled, to_kernel * gradients[0], None, None, None


CHUNK_LOGITS = {"cpu": 1 << 22}
"""Logits that `projected_sums` holds at a time, by platform: on a CPU what its caches hold, elsewhere 1 GiB."""


def _over_chunks(
    passes: tuple[Array, ...],
    kernel: Array,
    bias: Array | None,
    labels: Array,
    weights: Array,
    smoothing: float,
    r_drop: float,
    *,
    with_gradient: bool,
) -> tuple[tuple[Array, ...], tuple[tuple[Array, ...], Array]]:
    """((loss, nll, correct, divergence), the loss's gradients to the passes and to the kernel, or nothing and 0)."""
    batch, length = labels.shape
    vocab = kernel.shape[0]
    dtype = passes[0].dtype
    # Columns are cut, not rows: rows may be spread over devices.
    columns = max(1, CHUNK_LOGITS.get(jax.default_backend(), 1 << 28) // (vocab * batch * len(passes)))
    count = -(-length // columns)
    columns = -(-length // count)
    table = kernel.astype(dtype)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * columns - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, count, columns, *x.shape[2:]), 1, 0)

    def step(carry: tuple[Array, ...], xs: tuple[Any, Array, Array]) -> tuple[tuple[Array, ...], list[Array]]:
        loss, nll, correct, divergence, to_kernel = carry
        parts, labels, weights = xs
        predictions: list[tuple[Array, Array]] = []  # probabilities and their logarithms
        for part in parts:
            logits = jnp.einsum("ble,ve->blv", part, table, preferred_element_type=jnp.float32)
            if bias is not None:
                logits = logits + bias[None, None]
            top = logits.max(axis=-1)
            exponentials = jnp.exp(logits - top[..., None])
            total = exponentials.sum(axis=-1)
            log_sum = jnp.log(total)
            chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
            own = log_sum + (top - chosen)
            mean = log_sum + (top - logits.mean(axis=-1))
            loss += (((1 - smoothing) * own + smoothing * mean) * weights).sum()
            nll += (own * weights).sum()
            correct += jnp.where(chosen >= top, weights, 0.0).sum()
            predictions.append((exponentials / total[..., None], logits - (top + log_sum)[..., None]))
        pulls: Sequence[Array | float] = [0.0]  # the divergence's gradients to the logits
        if len(predictions) == 2:
            both_ways, *pulls = _divergence(*predictions)
            apart = (both_ways * weights).sum()
            loss += r_drop * apart
            divergence += apart
        if not with_gradient:
            return (loss, nll, correct, divergence, to_kernel), []
        words = jax.lax.broadcasted_iota(labels.dtype, (*labels.shape, vocab), labels.ndim)
        target = jnp.where(words == labels[..., None], 1 - smoothing + smoothing / vocab, smoothing / vocab)
        to_parts: list[Array] = []
        for part, (probabilities, _), pull in zip(parts, predictions, pulls, strict=True):
            gradient = ((probabilities - target + r_drop * pull) * weights[..., None]).astype(dtype)
            to_kernel += outer_sum(gradient.reshape(-1, vocab), part.reshape(-1, part.shape[-1]))
            to_parts.append(jnp.einsum("blv,ve->ble", gradient, table))
        return (loss, nll, correct, divergence, to_kernel), to_parts

    zero = jnp.zeros((), jnp.float32)
    start = (*(zero,) * 4, jnp.zeros(kernel.shape if with_gradient else (), jnp.float32))
    xs = tuple(map(cut, passes)), cut(labels), cut(weights)
    (*sums, to_kernel), to_parts = jax.lax.scan(step, start, xs)
    to_passes = tuple(
        jnp.moveaxis(part, 0, 1).reshape(batch, -1, part.shape[-1])[:, :length].astype(dtype) for part in to_parts
    )
    return tuple(sums), (to_passes, to_kernel)


_projected.defvjp(partial(_over_chunks, with_gradient=True), _projected_backward)


def _divergence(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Half the sum of the divergences both ways, and its gradients to the logits of each.

    first, second: probabilities [..., V] and their logarithms.
    """
    (p, log_p), (q, log_q) = first, second
    apart, ratio = p - q, log_p - log_q

    def pull(x: Array) -> Array:
        return 0.5 * (apart + x * (ratio - (x * ratio).sum(axis=-1, keepdims=True)))

    return 0.5 * (apart * ratio).sum(axis=-1), pull(p), -pull(q)


def class_losses(logits: Array, labels: Array, weights: Array | None = None) -> dict[str, WeightedSum]:
    """Cross-entropy ("loss") and accuracy of classes: of texts, tokens, masked tokens, or choices.

    Args:
        logits: [..., C].
        labels: [...] int; where it is `IGNORED_LABEL` the weight is 0.
        weights: [...] or None for ones.
    """
    sums = prediction_sums(logits, labels, weights)
    return {"loss": WeightedSum(sums.loss, sums.weight), "accuracy": WeightedSum(sums.correct, sums.weight)}


def sequence_losses(
    problem_type: str | None, logits: Array, labels: Array, weights: Array | None = None
) -> dict[str, WeightedSum]:
    """The "loss" of a sequence classifier, and the "accuracy" where its classes exclude each other.

    Args:
        problem_type: as the config has it: regression (squared error), single_label_classification, or
            multi_label_classification (independent yes-or-no classes). None infers it as the reference implementation
            does: one output is regression; integer labels are one class each, any others yes or no of every class.
        logits: [..., C].
        labels: [...] int, or [..., C] yes or no, or [...] (C = 1) or [..., C] numbers.
        weights: [...] or None for ones. Of regression and of several labels the mean is also over C.
    """
    if problem_type is None:
        single = jnp.issubdtype(labels.dtype, jnp.integer)
        problem_type = "single_label_classification" if single else "multi_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else problem_type
    if problem_type == "single_label_classification":
        return class_losses(logits, labels, weights)
    logits, labels = logits.astype(jnp.float32), labels.reshape(logits.shape).astype(jnp.float32)
    if problem_type == "regression":
        losses = jnp.square(logits - labels)
    else:
        losses = -labels * jax.nn.log_sigmoid(logits) - (1 - labels) * jax.nn.log_sigmoid(-logits)
    weights = jnp.ones(logits.shape[:-1], jnp.float32) if weights is None else weights.astype(jnp.float32)
    return {"loss": WeightedSum((losses * weights[..., None]).sum(), weights.sum() * logits.shape[-1])}


NOWHERE = -1e30
"""Logit of a token that cannot be chosen; its exponential is 0, and unlike infinity it makes no NaN."""


def span_sums(
    start_logits: Array,
    end_logits: Array,
    starts: Array,
    ends: Array,
    weights: Array | None = None,
    windows: Array | None = None,
) -> tuple[PredictionSums, PredictionSums]:
    """Cross-entropy of an answer's first and last token (Devlin et al. 2018, 4.2); the loss is the mean of their means.

    Args:
        start_logits: [B, L].
        end_logits: [B, L].
        starts: [B, X] int, the column of each of X answers' first token; one that is not in 0..L-1 has weight 0.
        ends: [B, X] int, of the last token.
        weights: [B, X] or None for ones.
        windows: [B, X, L] bool, the tokens that each answer may be chosen from; None for all of the row.

    Returns:
        (sums over the first tokens, sums over the last tokens)
    """

    def sums(logits: Array, positions: Array) -> PredictionSums:
        logits = logits.astype(jnp.float32)[:, None, :]
        if windows is not None:
            logits = jnp.where(windows, logits, NOWHERE)
        logits = jnp.broadcast_to(logits, (*positions.shape, logits.shape[-1]))
        outside = (positions < 0) | (positions >= logits.shape[-1])
        return prediction_sums(logits, jnp.where(outside, IGNORED_LABEL, positions), weights)

    return sums(start_logits, starts), sums(end_logits, ends)

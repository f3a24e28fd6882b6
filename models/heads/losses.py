"""Losses, for training and for parity with the reference implementation.

A loss is a pair of float32 sums over predictions, of the losses and of their weights. Sums add up exactly over devices,
accumulation steps and hosts, and their quotient is the mean that the reference implementation reports.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ...kernels.platform import platform
from ..layers.linear import outer_sum

IGNORED_LABEL = -100  # label in the reference implementation's data where nothing is predicted


class WeightedSum(NamedTuple):
    """A weighted sum and the sum of its weights, whose quotient is the mean; both float32 scalars."""

    total: Array
    weight: Array


@jax.custom_vjp
def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Compute -log softmax(logits)[label], and whether the label is the most probable class.

    The backward pass is written out, (softmax - one-hot)·gradient in one pass over the logits, so that neither the
    probabilities nor a one-hot tensor is kept: the residuals are the logits and two numbers per prediction.

    Args:
        logits: [..., V], any float type; computed in float32.
        labels: [...] int in 0..V-1.

    Returns:
        (losses [...] float32, hits [...] bool; a tie for the most probable class counts as a hit)
    """
    return _cross_entropy_forward(logits, labels)[0]


def _cross_entropy_forward(logits: Array, labels: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    # The largest logit and the logarithm of the sum are kept separate: their sum would lose digits if logits are large.
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
    """Float32 sums over weighted predictions: of the losses, of correct predictions, and of the weights."""

    loss: Array
    correct: Array
    weight: Array


class LossSum(NamedTuple):
    """Float32 sums over weighted predictions that are neither right nor wrong: of the losses, and of the weights."""

    loss: Array
    weight: Array


def prediction_sums(logits: Array, labels: Array, weights: Array | None = None) -> PredictionSums:
    """Compute cross-entropy and accuracy of classifications, as sums.

    Args:
        logits: [..., V].
        labels: [...] int; where it is `IGNORED_LABEL` the weight is 0.
        weights: [...] float or None for ones; a prediction of weight 0 contributes exactly nothing.
    """
    labels, weights = _counted(labels, weights)
    losses, hits = cross_entropy(logits, labels)
    return PredictionSums((losses * weights).sum(), jnp.where(hits, weights, 0.0).sum(), weights.sum())


def _counted(labels: Array, weights: Array | None) -> tuple[Array, Array]:
    """Return valid labels and their weights [...] float32, with weight 0 for `IGNORED_LABEL`."""
    ignored = labels == IGNORED_LABEL
    weights = jnp.ones(labels.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    return jnp.where(ignored, 0, labels), jnp.where(ignored, 0.0, weights)


class SmoothedSums(NamedTuple):
    """Float32 sums over weighted predictions of tokens, of one pass or two. Only `loss` has a gradient."""

    loss: Array  # the training loss: the smoothed losses, plus the divergence times its weight
    nll: Array  # of -log p(label), without smoothing; exp(nll / weight) is the perplexity
    correct: Array  # of correct predictions
    divergence: Array  # of half the sum of the two passes' divergences in both directions
    weight: Array  # of the weights, once per pass


def projected_sums(
    passes: Sequence[Array],
    kernel: Array,
    labels: Array,
    weights: Array | None = None,
    smoothing: float = 0.0,
    bias: Array | None = None,
    r_drop: float = 0.0,
    z_loss: float = 0.0,
) -> SmoothedSums:
    """Compute the label-smoothed losses of hidden · kernelᵀ + bias in chunks of tokens, without storing all logits.

    The cross-entropy is against a probability of 1 - smoothing for the label plus smoothing / V for each word (Szegedy
    et al. 2015, 7; Vaswani et al. 2017, 5.4). The uniform part covers all V words including the label, as in PyTorch
    (and fairseq before 2020: 1 - smoothing of the label's loss plus smoothing / V of the sum over all words). For two
    passes with different dropout, half the sum of their divergences in both directions is added (R-Drop; Liang et al.
    2021, equations 2 to 4).

    The gradient is computed together with the loss, chunk by chunk, so that logits are computed once; the backward pass
    keeps only tensors of the sizes of the hidden states and the kernel.

    Args:
        passes: one or two [B, L, E], in the compute dtype; products are accumulated in float32.
        kernel: [V, E] float32, such as an embedding table.
        labels: [B, L] int; where it is `IGNORED_LABEL` the weight is 0.
        weights: [B, L] float or None for ones.
        smoothing: in [0, 1).
        bias: [V] float32 or None; it gets no gradient.
        r_drop: weight of the divergence between two passes.
        z_loss: weight of the z-loss.
    """
    labels, weights = _counted(labels, weights)
    loss, *rest = _projected(tuple(passes), kernel, bias, labels, weights, smoothing, r_drop, z_loss)
    nll, correct, divergence = map(jax.lax.stop_gradient, rest)
    return SmoothedSums(loss, nll, correct, divergence, len(passes) * weights.sum())


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _projected(*arguments: Any) -> tuple[Array, ...]:
    """Compute the sums of `_over_chunks`; the gradient is the one that it computes along the way."""
    return _over_chunks(*arguments, with_gradient=False)[0]


def _projected_backward(
    smoothing: float,
    r_drop: float,
    z_loss: float,
    residuals: tuple[tuple[Array, ...], Array],
    gradients: tuple[Array, ...],
) -> tuple[tuple[Array, ...], Array, None, None, None]:
    del smoothing, r_drop, z_loss  # they are in the residuals
    to_passes, to_kernel = residuals
    scaled = tuple((g.astype(jnp.float32) * gradients[0]).astype(g.dtype) for g in to_passes)
    return scaled, to_kernel * gradients[0], None, None, None


CHUNK_LOGITS = {"cpu": 1 << 22}
"""Logits per chunk of `projected_sums`, by platform: on a CPU they fit its caches, elsewhere they take 1 GiB."""


def _over_chunks(
    passes: tuple[Array, ...],
    kernel: Array,
    bias: Array | None,
    labels: Array,
    weights: Array,
    smoothing: float,
    r_drop: float,
    z_loss: float,
    *,
    with_gradient: bool,
) -> tuple[tuple[Array, ...], tuple[tuple[Array, ...], Array]]:
    """Return ((loss, nll, correct, divergence), gradients of the loss by passes and kernel, or nothing and 0)."""
    batch, length = labels.shape
    vocab = kernel.shape[0]
    dtype = passes[0].dtype
    # Chunks consist of columns, not rows: rows may be sharded over devices.
    columns = max(1, CHUNK_LOGITS.get(platform(), 1 << 28) // (vocab * batch * len(passes)))
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
        normalisers: list[Array] = []  # log Z
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
            smoothed = own
            if smoothing:
                smoothed = (1 - smoothing) * own + smoothing * (log_sum + (top - logits.mean(axis=-1)))
            normalisers.append(log_sum + top)
            if z_loss:
                smoothed = smoothed + z_loss * jnp.square(normalisers[-1])
            loss += (smoothed * weights).sum()
            nll += (own * weights).sum()
            correct += jnp.where(chosen >= top, weights, 0.0).sum()
            predictions.append((exponentials / total[..., None], logits - (top + log_sum)[..., None]))
        pulls: Sequence[Array | float] = [0.0]  # gradients of the divergence by the logits
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
        for part, (probabilities, _), pull, log_z in zip(parts, predictions, pulls, normalisers, strict=True):
            more = 1 + 2 * z_loss * log_z[..., None] if z_loss else 1
            gradient = ((more * probabilities - target + r_drop * pull) * weights[..., None]).astype(dtype)
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
    """Compute half the sum of the divergences in both directions, and its gradients by the logits of each.

    Args:
        first: probabilities [..., V] and their logarithms.
        second: probabilities [..., V] and their logarithms.
    """
    (p, log_p), (q, log_q) = first, second
    apart, ratio = p - q, log_p - log_q

    def pull(x: Array) -> Array:
        return 0.5 * (apart + x * (ratio - (x * ratio).sum(axis=-1, keepdims=True)))

    return 0.5 * (apart * ratio).sum(axis=-1), pull(p), -pull(q)


def class_losses(logits: Array, labels: Array, weights: Array | None = None) -> dict[str, WeightedSum]:
    """Compute cross-entropy ("loss") and accuracy of classes: of texts, tokens, masked tokens, or choices.

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
    """Compute the "loss" of a sequence classifier, and the "accuracy" if its classes are mutually exclusive.

    Args:
        problem_type: as in the config: regression (squared error), single_label_classification, or
            multi_label_classification (independent yes-or-no classes). None infers it as in the reference
            implementation: one output is regression; integer labels are single classes; other labels are yes or no for
            every class.
        logits: [..., C].
        labels: [...] int, or [..., C] yes or no, or [...] (C = 1) or [..., C] numbers.
        weights: [...] or None for ones. For regression and multiple labels the mean is also over C.
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
"""Logit of a token that cannot be chosen; its exponential is 0, and unlike infinity it causes no NaN."""


def span_sums(
    start_logits: Array,
    end_logits: Array,
    starts: Array,
    ends: Array,
    weights: Array | None = None,
    windows: Array | None = None,
) -> tuple[PredictionSums, PredictionSums]:
    """Compute cross-entropies of answers' first and last tokens (Devlin et al. 2018, 4.2).

    The loss is the mean of their means.

    Args:
        start_logits: [B, L].
        end_logits: [B, L].
        starts: [B, X] int, column of the first token of each of X answers; outside 0..L-1 the weight is 0.
        ends: [B, X] int, column of the last token.
        weights: [B, X] or None for ones.
        windows: [B, X, L] bool, the tokens that each answer may consist of; None for the whole row.

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

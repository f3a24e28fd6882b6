"""The auxiliary loss of fine-tuning a decoder: to predict the examples' own tokens (Radford et al. 2018, eq. 5)."""

from typing import Any

import jax
import jax.numpy as jnp

from .tasks.task import Arrays, Task


def forward_with_states(task: Task, model: Any, params: Any, batch: Arrays, **mode: Any) -> tuple[Any, jax.Array]:
    """Run a task's model; return its outputs, and the decoder's states [B, L, E] that they were computed from."""
    outputs, variables = task.forward(model, params, batch, mutable=["intermediates"], **mode)
    return outputs, variables["intermediates"]["states"][0]


def next_token_loss(model: Any, params: Any, states: jax.Array, batch: Arrays) -> jax.Array:
    """Compute the sum over examples of the mean loss of their tokens, all but the first.

    Args:
        model: a model with a head over whole examples.
        params: its parameters.
        states: [B, L, E], by `forward_with_states`.
        batch: packed rows with input_ids, segment_ids and position_ids [B, L].
    """
    segments = batch["segment_ids"]
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    # Each token's weight is one over the number of its example's tokens that are predicted.
    count = (segments[:, :, None] == segments[:, None, :]).sum(axis=2) - 1
    weights = jnp.where(follows, 1.0 / jnp.maximum(count[:, 1:], 1).astype(jnp.float32), 0.0)
    end = jnp.zeros((len(segments), 1))
    labels = jnp.roll(batch["input_ids"], -1, axis=1)
    sums = model.apply(
        {"params": params}, states, labels, jnp.concatenate([weights, end], axis=1), method="next_token_sums"
    )
    return sums.loss

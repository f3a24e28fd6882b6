"""Attention weights of the layers of an encoder.

The fast backends never store them; those of chosen layers, heads and queries are recomputed from lse
(`kernels.attention_weights`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ..kernels import attention, attention_weights
from .checkpoints.tables import Params
from .encoder import StackEncoder
from .heads.with_head import encoder_inputs
from .layers.attention import Attention
from .layers.segments import row_numbers


def attention_maps(
    model: nn.Module,
    params: Params,
    batch: Mapping[str, Any],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
) -> Array:
    """Compute what tokens attend to, without dropout.

        model, params, config, tokenizer = models.load("folder", head="encoder")
        weights = attention_maps(model, params, tokenizer(["The cat sat."]), layers=[-1])

    Args:
        model: an encoder, of tokens or of images.
        params: its parameters.
        batch: its inputs by name: `input_ids` and what else a tokenizer gives, or `pixel_values`. `segment_ids` may
            be a pair, of the queries and of the keys.
        layers: numbers of layers, from 0, or from the last one by -1; None for all of them.
        heads: numbers of heads, from 0; None for all of them.
        queries: positions of tokens to look from; None for all of them.

    Returns:
        [N, B, H, L, S] float32, of the chosen layers, heads and queries. Each row sums to 1, or is zero for a token
        that attends to nothing, such as padding.

    Raises:
        NotImplementedError: the model's layers have attention of another form, as Transformer-XL's.
        IndexError: a layer that is not there.
        ValueError: a head or a position that is not there.
    """
    if not isinstance(model, StackEncoder):
        raise NotImplementedError(
            f"attention_maps: the layers of {type(model).__name__} have attention of another form"
        )
    c = model.config
    variables = {"params": params}
    encoded: Any = model.apply(variables, *encoder_inputs(c, batch), every_layer=True)
    bound = model.bind(variables)
    block, stack = bound.layers.unbind()
    given = (batch.get("segment_ids"), row_numbers(None, encoded.hidden))
    given += bound.layer_inputs(batch.get("position_ids"))
    maps = []
    for i in [range(c.layers)[layer] for layer in (range(c.layers) if layers is None else layers)]:
        row = i if c.sets is None else c.sets[i]
        layer = jax.tree.map(lambda leaf, row=row: leaf[row], stack)
        kind = {} if c.kinds is None else c.kinds[i]
        maps.append(_weights(block, layer, encoded.every_hidden[i], given, kind, heads, queries))
    return jnp.stack(maps)


def _weights(
    block: nn.Module,
    variables: Any,
    hidden: Array,
    given: tuple[Any, ...],
    kind: Mapping[str, Any],
    heads: Sequence[int] | None,
    queries: Sequence[int] | None,
) -> Array:
    """Compute a layer's weights [B, H, L, S] from its input [B, L, E] and its other arguments, see `run_layers`."""
    seen: list[Array] = []

    def see(next_call: Any, args: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
        if not isinstance(context.module, Attention) or context.method_name != "attend":
            return next_call(*args, **options)
        query, key, value = args
        attended, lse = attention(query, key, value, **options, return_lse=True)
        chosen = range(query.shape[2]) if heads is None else heads
        rows = range(query.shape[1]) if queries is None else queries
        seen.append(attention_weights(query, key, heads=list(chosen), queries=list(rows), lse=lse, **options))
        return attended

    with nn.intercept_methods(see):
        block.apply(variables, hidden, *given, **kind, deterministic=True)
    (found,) = seen
    return found

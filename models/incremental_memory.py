"""Incremental decoding of a decoder with a memory, Transformer-XL, for `train.generate`: one token a step.

A prompt is one segment, read with an empty memory. Each token after it attends to as many tokens before it as the
memory has slots, and to itself: what `read` computes of segments of one token, without computing their keys again.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from .checkpoints.tables import Params
from .incremental import IncrementalDecoder, Memory, Slots, Written, positions_after
from .layers.relative_attention import Distances, RelativeAttention, sinusoids
from .layers.segments import row_numbers


class PreparedWithDistances(NamedTuple):
    """Parameters as the steps need them."""

    params: Params  # all but the decoder's layers
    layers: tuple[Params, ...]  # the decoder's layers, unstacked
    distances: tuple[Array, ...]  # each layer's keys of the distances that a step sees, [H, D, M + 1]


@dataclass(frozen=True)
class IncrementalWithMemory(IncrementalDecoder):
    """Transformer-XL as generation uses it (`train.generate.batch.IncrementalModel`): it continues prompts."""

    @property
    def _head_size(self) -> int:
        return self.config.head_size

    @property
    def _reach(self) -> int:
        """The largest distance that a step sees."""
        c = self.config
        return c.memory if c.span is None else c.span - 1

    def prepare(self, params: Params) -> Any:
        """Unstack the layers and compute the keys of all distances, once instead of in every step."""
        c, prepared = self.config, super().prepare(params)
        attention = RelativeAttention(
            c.width, c.heads, c.head_size, 0.0, c.initializer, c.untied_biases, c.span, c.dtype
        )

        @jax.jit
        def keys(layer: Params) -> Array:
            rising = sinusoids(self._reach + 1, c.width, c.clamp, c.dtype)[:, ::-1]
            found: Any = attention.apply({"params": layer["attention"]}, rising, method="distance_keys")
            return found

        return PreparedWithDistances(prepared.params, prepared.layers, tuple(map(keys, prepared.layers)))

    def start(self, prepared: Any, input_ids: Array, segment_ids: Array) -> Memory:
        """Read prompts without their last tokens: input_ids [B, S] int32; segment_ids [B, S] int32, 0 for padding."""
        c = self.config
        if not input_ids.shape[1]:
            return Memory(self.cache(*input_ids.shape).layers, segment_ids != 0)
        hidden: Any = self.model.apply({"params": prepared.params}, input_ids, method="embed")
        positions = sinusoids(input_ids.shape[1], c.width, c.clamp, c.dtype)
        distances = Distances(positions, segment_ids, segment_ids)
        found: list[Slots] = []

        def read(attention: RelativeAttention, hidden: Array, context: Array, *rest: Any) -> None:
            found.append(Slots(*attention.keys_values(context)))

        for layer in prepared.layers:
            hidden = self._block(prepared, layer, hidden, distances, read)
        return Memory(tuple(found), segment_ids != 0)

    def step(
        self,
        prepared: Any,
        memory: Memory,
        cache: Written,
        tokens: Array,
        positions: Array,
        places: Array,
        mask: Array,
    ) -> tuple[Array, Written, tuple[Array, ...]]:
        """Read one more token of each beam; see `IncrementalDecoder.step`."""
        at, written = positions_after(memory, cache, positions, places)
        prompt = jnp.broadcast_to(jnp.arange(memory.mask.shape[1]), memory.mask.shape)
        distances = at[:, None] - jnp.concatenate([prompt, written], axis=1)
        near = (distances <= self._reach)[:, None]
        seen = [
            part & near[:, :, first : first + part.shape[2]]
            for part, first in ((memory.mask[:, None], 0), (mask, prompt.shape[1]))
        ]
        # No distance is larger than what there is to attend to.
        count = min(self._reach + 1, distances.shape[1])
        filled: list[Slots] = []

        def attend(
            before: Slots, slots: Slots, keys: Array, attention: RelativeAttention, hidden: Array, *given: Any
        ) -> Array:
            slots = Slots(*attention.write(hidden, *slots, places))
            filled.append(slots)
            parts = [(one.keys, one.values, where) for one, where in zip((before, slots), seen, strict=True)]
            *_, biases = given
            return attention.step(hidden, biases, keys[:, :, :count], parts, distances)

        hidden: Any = self.model.apply({"params": prepared.params}, tokens, method="embed")
        nothing = Distances(jnp.zeros((1, 1, self.config.width), hidden.dtype), tokens, tokens)
        for layer, keys, before, slots in zip(
            prepared.layers, prepared.distances, memory.layers, cache.layers, strict=True
        ):
            hidden = self._block(prepared, layer, hidden, nothing, partial(attend, before, slots, keys))
        logits: Any = self.model.apply({"params": prepared.params}, hidden, method="log_probabilities")
        return logits, Written(tuple(filled), written), ()

    def _block(self, prepared: Any, layer: Params, hidden: Array, distances: Distances, attend: Any) -> Array:
        """Apply a layer, with attend(attention, ...) before its attention, or in its place if it returns something."""

        def instead(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            if not isinstance(context.module, RelativeAttention) or context.method_name != "__call__":
                return next_call(*args, **kwargs)
            attended = attend(context.module, *args)
            return next_call(*args, **kwargs) if attended is None else attended

        biases: Any = self.model.apply({"params": prepared.params}, method="biases")
        none = jnp.zeros((len(hidden), 0, hidden.shape[2]), hidden.dtype)
        given = (hidden, row_numbers(None, hidden), distances, biases, none)
        with nn.intercept_methods(instead):
            return self.block.apply({"params": layer}, *given, deterministic=True)

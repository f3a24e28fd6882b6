"""Incremental decoding, one token at a time, for `train.generate`: encoder-decoders, and decoders without a source.

What an output is generated from becomes keys and values of every layer once: an encoder's output, or a prompt. Each
step then reads one token of every beam, with a cache of the keys and values of earlier tokens.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from .checkpoints.tables import Params
from .layers.attention import Attention
from .layers.linear import add_bias, turn_kernels
from .layers.segments import row_numbers


class Slots(NamedTuple):
    """Keys and values of one layer."""

    keys: Array  # [B, H, D, slots]
    values: Array  # [B, H, slots, D]


class Written(NamedTuple):
    """Cache of a decoder: what was read after its prompt, or after the start of an output."""

    layers: tuple[Slots, ...]
    positions: Array  # [B, slots] int32, position of the token in each slot


class Memory(NamedTuple):
    """State that is computed once per source."""

    layers: tuple[Slots, ...]  # the encoder's output as each decoder layer's keys and values
    mask: Array  # [B, S] bool, True for tokens


class Prepared(NamedTuple):
    """Parameters as the steps need them."""

    params: Params  # all but the decoder's layers
    layers: tuple[Params, ...]  # the decoder's layers, unstacked
    bias: Array | None  # of the logits, [V]; None if it is zero everywhere: adding it takes a tenth of a step on a CPU


@dataclass(frozen=True)
class WithSource:
    """What generation asks of every model with a source: the facts of its config."""

    model: Any  # an encoder_decoder.EncoderDecoder

    @property
    def config(self) -> Any:
        """Config of the model."""
        return self.model.config

    @property
    def vocabulary(self) -> int:
        """Number of target tokens."""
        return self.config.target_words

    @property
    def positions(self) -> int | None:
        """Maximum length of a source or an output, in tokens; None for no limit."""
        return self.config.max_length

    @property
    def start_id(self) -> int:
        """The token that every output starts from."""
        return self.config.decoder_start_token_id

    @property
    def eos_id(self) -> int:
        """The token that ends an output."""
        return self.config.eos_token_id

    @property
    def forced_bos_id(self) -> int | None:
        """The token that every output must begin with; None for any."""
        return self.config.forced_bos_token_id

    @property
    def forced_eos_id(self) -> int | None:
        """The token that outputs of maximum length must end with; None for any."""
        return self.config.forced_eos_token_id


@dataclass(frozen=True)
class IncrementalEncoderDecoder(WithSource):
    """An encoder-decoder as generation uses it (`train.generate.batch.IncrementalModel`).

    The beams of a sentence share a row of the cache. All methods are pure functions; all but `prepare` can be traced.
    """

    block: Any  # an unbound decoder layer, with the methods keys_values and step

    def prepare(self, params: Params) -> Prepared:
        """Unstack the layers, once instead of in every step. It inspects values, so it cannot be traced."""
        bias = params.get("final_logits_bias")
        return Prepared(
            params={name: part for name, part in params.items() if name != "decoder"},
            layers=unstack(params["decoder"], self.config.decoder_layers),
            bias=None if bias is None or not jnp.any(bias) else bias,
        )

    def start(self, prepared: Prepared, input_ids: Array, segment_ids: Array) -> Memory:
        """Read sources: input_ids [B, S] int32; segment_ids [B, S] int32, 1 for tokens and 0 for padding."""
        variables = {"params": prepared.params}
        encoded: Any = self.model.apply(variables, input_ids, segment_ids, method="encode")
        layers: Any = tuple(
            self.block.apply({"params": layer}, encoded, method="keys_values") for layer in prepared.layers
        )
        return Memory(layers, segment_ids != 0)

    def cache(self, rows: int, slots: int) -> Written:
        """Return empty keys and values for each layer."""
        c = self.config
        keys = jnp.zeros((rows, c.decoder_heads, c.head_size, slots), c.dtype)
        layers = (Slots(keys, jnp.swapaxes(keys, 2, 3)),) * c.decoder_layers
        return Written(layers, jnp.zeros((rows, slots), jnp.int32))

    def step(
        self,
        prepared: Prepared,
        memory: Memory,
        cache: Written,
        tokens: Array,
        positions: Array,
        places: Array,
        mask: Array,
    ) -> tuple[Array, Written, tuple[Array, ...]]:
        """Read one more token of each beam.

        Args:
            memory: state of B sources, by `start`.
            cache: keys and values of the steps so far.
            tokens: [B, K] int32.
            positions: [B] int32, position of each row's tokens.
            places: [B, K] int32, the slot that each token is written to; the number of slots means none.
            mask: bool [B, K, slots], the slots in each beam's history, including its own.

        Returns:
            (logits [B, K, V] float32, the cache, each layer's attention to the source [B, H, K, S] float32)
        """
        variables = {"params": prepared.params}
        rows, own = jnp.arange(len(tokens))[:, None], jnp.broadcast_to(positions[:, None], places.shape)
        at = cache.positions.at[rows, places].set(own, mode="drop")
        hidden: Any = self.model.apply(variables, tokens, positions, method="embed_step")
        more: Any = self.model.apply(variables, positions, at, method="step_inputs")
        filled, attentions = [], []
        for layer, keys_values, slots in zip(prepared.layers, memory.layers, cache.layers, strict=True):
            given = (hidden, keys_values, memory.mask[:, None], slots, places, mask, *more)
            result: Any = self.block.apply({"params": layer}, *given, method="step")
            hidden, slots, attention = result
            filled.append(slots)
            attentions.append(attention)
        logits: Any = self.model.apply(variables, hidden, method="last_scores")
        if prepared.bias is not None:
            logits = add_bias(logits, prepared.bias)
        return logits, Written(tuple(filled), at), tuple(attentions)


@dataclass(frozen=True)
class IncrementalDecoder:
    """A decoder without a source as generation uses it (`train.generate.batch.IncrementalModel`): it continues prompts.

    The memory is all of a prompt but its last token, which is the first that a step reads. A family's layer needs no
    support for this: where its `Attention` is called, the cache takes its place.
    """

    model: Any  # a `heads.causal_lm.CausalLanguageModel`
    block: Any  # an unbound layer, with one self-attention

    @property
    def config(self) -> Any:
        """Config of the model."""
        return self.model.config

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.config.vocab_size

    @property
    def positions(self) -> int | None:
        """Maximum length of a prompt and its continuation together, in tokens."""
        return self.config.max_length

    @property
    def start_id(self) -> None:
        """None: outputs continue their prompts."""
        return

    @property
    def eos_id(self) -> int:
        """The token that ends an output; -1 if there is none."""
        return -1 if self.config.eos_token_id is None else self.config.eos_token_id

    @property
    def forced_bos_id(self) -> None:
        """None: outputs begin with any token."""
        return

    @property
    def forced_eos_id(self) -> None:
        """None: outputs of maximum length end with any token."""
        return

    @property
    def _head_size(self) -> int:
        return self.config.width // self.config.heads

    @property
    def _kinds(self) -> Any:
        c = self.config
        return [{}] * c.layers if c.kinds is None else c.kinds

    def prepare(self, params: Params) -> Prepared:
        """Unstack the layers, once instead of in every step."""
        others = {name: part for name, part in params["encoder"].items() if name != "layers"}
        layers = unstack(params["encoder"]["layers"], self.config.layers)
        return Prepared({**params, "encoder": others}, layers, None)

    def start(self, prepared: Prepared, input_ids: Array, segment_ids: Array) -> Memory:
        """Read prompts without their last tokens: input_ids [B, S] int32; segment_ids [B, S] int32, 0 for padding."""
        if not input_ids.shape[1]:
            return Memory(self.cache(*input_ids.shape).layers, segment_ids != 0)
        hidden: Any = self.model.apply({"params": prepared.params}, input_ids, method="embed")
        found: list[Slots] = []

        def read(attention: Attention, inputs: Array) -> None:
            found.append(Slots(*attention.keys_values(inputs)))

        for layer, kind in zip(prepared.layers, self._kinds, strict=True):
            hidden = self._layer(layer, kind, hidden, segment_ids, read)
        return Memory(tuple(found), segment_ids != 0)

    def cache(self, rows: int, slots: int) -> Written:
        """Return empty keys and values for each layer."""
        c = self.config
        keys = jnp.zeros((rows, c.heads, self._head_size, slots), c.dtype)
        layers = (Slots(keys, jnp.swapaxes(keys, 2, 3)),) * c.layers
        return Written(layers, jnp.zeros((rows, slots), jnp.int32))

    def step(
        self,
        prepared: Prepared,
        memory: Memory,
        cache: Written,
        tokens: Array,
        positions: Array,
        places: Array,
        mask: Array,
    ) -> tuple[Array, Written, tuple[Array, ...]]:
        """Read one more token of each beam.

        Args:
            memory: state of B prompts, by `start`.
            cache: what was read since.
            tokens: [B, K] int32.
            positions: [B] int32, number of tokens of each row read before, without those of the memory.
            places: [B, K] int32, the slot that each token is written to; the number of slots means none.
            mask: bool [B, K, slots], the slots in each beam's history, including its own.

        Returns:
            (logits [B, K, V] float32, the cache, nothing: there is no source to attend to)
        """
        at, written = positions_after(memory, cache, positions, places)
        variables = {"params": prepared.params}
        hidden: Any = self.model.apply(variables, tokens, jnp.broadcast_to(at[:, None], tokens.shape), method="embed")
        filled: list[Slots] = []

        def attend(before: Slots, slots: Slots, attention: Attention, inputs: Array) -> Array:
            seen, prompt = mask, memory.mask[:, None]
            if attention.window is not None and attention.window[0] is not None:
                first = (at - attention.window[0])[:, None, None]
                seen = seen & (written[:, None] >= first)
                prompt = prompt & (jnp.arange(prompt.shape[2])[None, None] >= first)
            slots = Slots(*attention.write(inputs, *slots, places))
            filled.append(slots)
            return attention.step(inputs, *slots, seen, before=(before.keys, before.values, prompt))[0]

        layers = zip(prepared.layers, self._kinds, memory.layers, cache.layers, strict=True)
        for layer, kind, before, slots in layers:
            hidden = self._layer(layer, kind, hidden, None, partial(attend, before, slots))
        logits: Any = self.model.apply(variables, hidden, method="last_scores")
        return logits, Written(tuple(filled), written), ()

    def _layer(self, params: Params, kind: Any, hidden: Array, segment_ids: Array | None, attend: Any) -> Array:
        """Apply a layer, with attend(attention, inputs) before its attention, or in its place if it returns something.

        Raises:
            NotImplementedError: the attention is rotary.
        """

        def instead(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            attention = context.module
            if not isinstance(attention, Attention) or context.method_name != "__call__":
                return next_call(*args, **kwargs)
            if attention.rotary is not None:
                raise NotImplementedError("IncrementalDecoder: rotary attention is not implemented")
            attended = attend(attention, args[0])
            return next_call(*args, **kwargs) if attended is None else attended

        rows = row_numbers(None, hidden)
        with nn.intercept_methods(instead):
            return self.block.apply({"params": params}, hidden, segment_ids, rows, **kind, deterministic=True)


def positions_after(memory: Memory, cache: Written, positions: Array, places: Array) -> tuple[Array, Array]:
    """Return the positions of a step's tokens, [B], and of the token in each slot of the cache, [B, slots].

    The arguments are those of `IncrementalDecoder.step`: a prompt's tokens come before those of the cache.
    """
    at = positions + memory.mask.sum(axis=1, dtype=jnp.int32)
    rows = jnp.arange(len(places))[:, None]
    return at, cache.positions.at[rows, places].set(jnp.broadcast_to(at[:, None], places.shape), mode="drop")


@partial(jax.jit, static_argnums=1)
def unstack(params: Params, count: int) -> tuple[Params, ...]:
    """Split stacked parameters into those of each layer, as products with few rows take them fastest."""
    layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(count))
    return tuple(map(turn_kernels, layers)) if jax.default_backend() == "cpu" else layers


@partial(jax.jit, static_argnums=0)
def cross_attention_maps(
    model: Any, prepared: Prepared, input_ids: Array, decoder_input_ids: Array, segment_ids: Array | None = None
) -> Array:
    """Compute the attention of each token of the decoder's input to the source.

    Args:
        prepared: parameters, by `prepare`.
        input_ids: [B, S] int32.
        decoder_input_ids: [B, T] int32, the start token and then the target.
        segment_ids: [B, S] int32, 1 for tokens and 0 for padding; None for no padding.

    Returns:
        [N, B, H, T, S] float32, probabilities of every layer and head; those at t are for predicting token t + 1.
    """
    steps = model.incremental()
    memory = steps.start(prepared, input_ids, jnp.ones_like(input_ids) if segment_ids is None else segment_ids)
    rows, length = decoder_input_ids.shape

    def read(cache: Written, xs: tuple[Array, Array]) -> tuple[Written, Array]:
        tokens, index = xs
        at = jnp.broadcast_to(index, rows)
        mask = jnp.broadcast_to(jnp.arange(length) <= index, (rows, 1, length))
        _, cache, attentions = steps.step(prepared, memory, cache, tokens[:, None], at, at[:, None], mask)
        return cache, jnp.stack(attentions)[:, :, :, 0]

    _, maps = jax.lax.scan(read, steps.cache(rows, length), (decoder_input_ids.T, jnp.arange(length)))
    return jnp.moveaxis(maps, 0, 3)

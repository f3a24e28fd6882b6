"""The encoder and the decoder of `seq2seq.py`, whose paper's order they have: cells, attention, output."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ..layers.dropout import Dropout
from ..layers.linear import Linear
from ..layers.segments import Rows, gather_positions
from .config import RecurrentConfig
from .recurrence import (
    CellWeights,
    Matrix,
    Product,
    State,
    advance,
    boundaries,
    driven,
    loop,
    multiply,
    read_rows,
    restart,
    state_weights,
)

LOWEST = -1e9
"""The score of what is not attended to."""

# --- encoder ----------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What a decoder needs of a source; the same per row as in a packed row."""

    memory: Array  # [B, S, M] float32, the last layer's hidden states
    states: tuple[State, ...]  # each layer's [B, S, M]; of the forward direction, then of the backward direction


class Encoder(nn.Module):
    """Layers of one or two directions."""

    config: RecurrentConfig

    def setup(self) -> None:
        c = self.config
        sizes = [c.embedding_width] + [c.memory_width] * (c.encoder_layers - 1)
        self.forward = [CellWeights(c.cell, size, c.encoder_width) for size in sizes]
        if c.bidirectional:
            self.backward = [CellWeights(c.cell, size, c.encoder_width) for size in sizes]
        self.drop = Dropout(c.dropout)

    def __call__(self, hidden: Array, segment_ids: Array, rows: Rows, *, deterministic: bool) -> Encoded:
        """Read embeddings [B, S, I] with segments [B, S]."""
        c, states = self.config, []
        for layer, forward in enumerate(self.forward):
            if layer:
                hidden = self.drop(hidden, rows, deterministic=deterministic)
            read = partial(read_rows, c.cell, inputs=hidden, segment_ids=segment_ids, dtype=c.dtype)
            found = read(weights=forward(), reverse=False)
            if c.bidirectional:
                other = read(weights=self.backward[layer](), reverse=True)
                found = tuple(jnp.concatenate(both, axis=-1) for both in zip(found, other, strict=True))
            states.append(found)
            hidden = found[0]
        return Encoded(hidden, tuple(states))


# --- decoder ----------------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """What the decoder knows of sources before its first step."""

    values: Array  # [B, S, M] float32
    keys: Array | None  # what scores are computed with: [B, S, E], or [B, E, S] of dot and general
    mask: Array  # [B, S] int32, segments
    layers: tuple[State, ...]  # each layer's initial state, each [B, ..., E]


class Read(NamedTuple):
    """What a step gives to the output, each [B, ..., size] float32; None for what this config has no use for."""

    hidden: Array  # the last layer's state
    before: Any  # the same before the step
    context: Any  # the mean of the memory that attention takes
    attentional: Any  # the output's state, if it is fed to the next step


@jax.checkpoint
def additive_scores(query: Array, keys: Array, vector: Array) -> Array:
    """Compute vector . tanh(query [B, ..., E] + keys [B, S, E]) -> [B, ..., S]; the sums are not kept."""
    keys = keys.reshape(keys.shape[0], *(1,) * (query.ndim - 2), *keys.shape[1:])
    return jnp.tanh(query[..., None, :] + keys) @ vector


def attend(
    c: RecurrentConfig, product: Product, query: Array, mask: Array, constants: Mapping[str, Any]
) -> tuple[Array, Array]:
    """Attend from states [B, ..., E] where `mask` [B, ..., S] is true; return (context [B, ..., M], probabilities)."""
    if c.attention in ("dot", "general"):
        scores = product("keys", query)
    else:
        scores = additive_scores(product("query", query), constants["keys"], constants["score"])
    probabilities = jax.nn.softmax(jnp.where(mask, scores, LOWEST), axis=-1)
    return product("values", probabilities), probabilities


class Step(NamedTuple):
    """The decoder after a step."""

    states: tuple[State, ...]  # of each layer
    fed: Array  # [B, ..., F] what the next step's cell reads
    read: Read
    attention: Array | None  # [B, ..., S]


def decode(
    c: RecurrentConfig,
    product: Product,
    states: tuple[State, ...],
    fed: Array,
    given: Array,
    mask: Array,
    between: list[Array],
    constants: Mapping[str, Any],
) -> Step:
    """Read one word.

    Args:
        c: the config.
        product: products with `Decoder.weights` and `Decoder.memory`.
        states: each layer's state before.
        fed: [B, ..., F], the step before's; not read by additive attention.
        given: the word's products, by `Decoder.given`.
        mask: [B, ..., S] bool, the source's words to attend to.
        between: factors of dropout on what each layer but the last gives to the next; empty for none.
        constants: by `Decoder.constants`.
    """
    before: Any = states[-1][0]
    context: Any = None
    attentional, attention = None, None
    if c.attention == "additive":
        context, attention = attend(c, product, before, mask, constants)
        fed = context
    if c.fed_width:
        given = given + product("fed", fed)
    found: list[State] = []
    for layer, state in enumerate(states):
        if layer:
            below = found[-1][0] * between[layer - 1] if between else found[-1][0]
            biases = constants["input_bias"][layer], constants["state_bias"][layer]
            given = driven(c.cell, product(f"{layer}.input", below), *biases)
        found.append(advance(c.cell, product, state, given, constants["state_bias"][layer], f"{layer}."))
    hidden = found[-1][0]
    if c.attention not in ("none", "additive"):
        context, attention = attend(c, product, hidden, mask, constants)
    if c.input_feeding:
        fed = attentional = jnp.tanh(product("combine", jnp.concatenate([hidden, context], axis=-1)))
    read = Read(hidden, before if c.output == "maxout" else None, context, attentional)
    return Step(tuple(found), fed, read, attention)


def _decode(c: RecurrentConfig, product: Product, carry: Any, x: Any, constants: Any) -> tuple[Any, Read]:
    """Read one word of each row, in the loop over time."""
    states, fed = restart(x["starts"], (x["layers"], jnp.zeros_like(carry[1])), carry)
    mask = x["segments"][:, None] == constants["segments"]
    step = decode(c, product, states, fed, x["given"], mask, x["between"], constants)
    return (step.states, step.fed), step.read


class Decoder(nn.Module):
    """Cells, attention, and what a step's output is made of."""

    config: RecurrentConfig

    def setup(self) -> None:
        c = self.config
        glorot = nn.initializers.glorot_uniform()
        linear = partial(Linear, axes=("embed", "embed_out"), kernel_init=glorot, dtype="float32")
        sizes = [c.embedding_width + c.fed_width] + [c.width] * (c.decoder_layers - 1)
        self.cells = [CellWeights(c.cell, size, c.width) for size in sizes]
        if c.bridge in ("bridge", "backward"):
            self.bridge = linear((c.width,))
        if c.attention in ("additive", "concat"):
            self.query = Matrix(c.width, c.width, glorot)
            self.key = linear((c.width,), use_bias=False)
            self.score = Matrix(c.width, 1, nn.initializers.normal(c.width**-0.5))
        if c.attention == "general":
            self.key = linear((c.width,), use_bias=False)
        if c.output == "attentional":
            self.combine = Matrix(c.width + c.memory_width, c.embedding_width, glorot)
        elif c.output == "maxout":
            self.maxout = linear((2 * c.embedding_width,))
        elif c.width != c.embedding_width:
            self.project = linear((c.embedding_width,), use_bias=False)
        self.drop = Dropout(c.dropout)

    def start(self, encoded: Encoded, segment_ids: Array, firsts: Array, lasts: Array) -> Start:
        """Prepare for sources.

        Args:
            encoded: the encoder's states.
            segment_ids: [B, S] int32.
            firsts: [B, T] int32, the place of the first source token of each target token's segment.
            lasts: [B, T] int32, the place of its last.
        """
        c, width = self.config, self.config.encoder_width
        keys = None
        if c.attention == "dot":
            keys = jnp.swapaxes(encoded.memory, 1, 2)
        elif c.attention == "general":
            keys = jnp.swapaxes(self.key(encoded.memory), 1, 2)
        elif c.attention != "none":
            keys = self.key(encoded.memory)

        def ends(states: Array) -> Array:
            ahead = gather_positions(states[..., :width], lasts)
            if not c.bidirectional:
                return ahead
            return jnp.concatenate([ahead, gather_positions(states[..., width:], firsts)], axis=-1)

        parts = 2 if c.cell == "lstm" else 1
        if c.bridge == "last":
            layers = tuple(tuple(map(ends, states)) for states in encoded.states)
        elif c.bridge == "zero":
            zeros = jnp.zeros((*lasts.shape, c.width))
            layers = ((zeros,) * parts,) * c.decoder_layers
        else:
            last = ends(encoded.memory)
            first = jnp.tanh(self.bridge(last if c.bridge == "bridge" else last[..., width:]))
            layers = ((first,) * parts,) * c.decoder_layers
        return Start(encoded.memory, keys, segment_ids, layers)

    def weights(self) -> dict[str, Array]:
        """Return the weights of the products within a step, by the names that `step` has for them."""
        c, found = self.config, {}
        for layer, cell in enumerate(self.cells):
            own = cell()
            found |= state_weights(c.cell, own["state_kernel"], f"{layer}.")
            if layer:
                found[f"{layer}.input"] = own["input_kernel"]
            elif c.fed_width:
                found["fed"] = own["input_kernel"][c.embedding_width :]
        if c.attention in ("additive", "concat"):
            found["query"] = self.query()
        if c.input_feeding:
            found["combine"] = self.combine()
        return found

    def memory(self, start: Start) -> dict[str, Array]:
        """Return the products of each row's own within a step."""
        if start.keys is None:
            return {}
        scores = {"keys": start.keys} if self.config.attention in ("dot", "general") else {}
        return {"values": start.values, **scores}

    def constants(self, start: Start) -> dict[str, Any]:
        """Return what else a step reads, but for the segments."""
        biases = [cell()["state_bias"] for cell in self.cells]
        inputs = [cell()["input_bias"] for cell in self.cells]
        found: dict[str, Any] = {"state_bias": biases, "input_bias": inputs}
        if self.config.attention in ("additive", "concat"):
            found |= {"keys": start.keys, "score": self.score()[:, 0]}
        return found

    def given(self, embedded: Array) -> Array:
        """Compute the products of words [..., I] with the first cell's weights, [..., gates * E]."""
        c, own = self.config, self.cells[0]()
        kernel = own["input_kernel"][: c.embedding_width]
        product = multiply({"word": kernel}, c.dtype)("word", embedded)
        return driven(c.cell, product, own["input_bias"], own["state_bias"])

    def output(self, embedded: Array, read: "Read") -> Array:
        """Compute the state that the output embeddings are multiplied by, [..., embedding width]."""
        c = self.config
        if c.output == "state":
            return self.project(read.hidden) if c.width != c.embedding_width else read.hidden
        if c.output == "maxout":
            pairs = self.maxout(jnp.concatenate([read.before, embedded, read.context], axis=-1))
            return pairs.reshape(*pairs.shape[:-1], -1, 2).max(axis=-1)
        if c.input_feeding:
            return read.attentional
        both = jnp.concatenate([read.hidden, read.context], axis=-1)
        return jnp.tanh(multiply({"combine": self.combine()}, c.dtype)("combine", both))

    def __call__(
        self,
        embedded: Array,
        segment_ids: Array,
        start: Start,
        rows: Rows,
        *,
        deterministic: bool,
    ) -> Array:
        """Read embedded target words [B, T, I] -> the states for the output embeddings [B, T, I]."""
        c = self.config
        ahead = partial(jnp.moveaxis, source=1, destination=0)
        between = [
            ahead(self.drop(jnp.ones((*embedded.shape[:2], c.width)), rows, deterministic=deterministic))
            for _ in self.cells[1:]
            if c.dropout and not deterministic
        ]
        xs = {
            "given": self.given(ahead(embedded)),
            "starts": boundaries(segment_ids).T,
            "layers": jax.tree.map(ahead, start.layers),
            "segments": segment_ids.T,
            "between": between,
        }
        fed = jnp.zeros((embedded.shape[0], c.fed_width))
        carry = (jax.tree.map(lambda state: jnp.zeros_like(state[:, 0]), start.layers), fed)
        constants = {**self.constants(start), "segments": start.mask}
        weights = {**self.weights(), **self.memory(start)}
        _, read = loop(partial(_decode, c), weights, carry, xs, constants, False, c.dtype)
        states = self.output(embedded, jax.tree.map(lambda part: jnp.moveaxis(part, 0, 1), read))
        return self.drop(states, rows, deterministic=deterministic)

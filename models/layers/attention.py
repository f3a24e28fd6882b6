"""Multi-head attention with its projections."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from ...kernels import attention
from ...kernels.bias import Bias
from ...kernels.hash import row_seeds
from .dropout import dropout_seed
from .linear import Linear
from .positions import rotate
from .segments import ByExample, Rows, Segments, rows_at, segments_at, split_segments


class Attention(nn.Module):
    """Multi-head attention with its four projections (Vaswani et al. 2017, 3.2.2).

    From a sequence to itself or to a memory (an encoder's output); in decoding, from one token per beam to the cached
    keys and values of earlier tokens, whose layout is that of the products, so that no step transposes them.

    Attributes:
        width: size of the queries' hidden states and of the output, E.
        heads: number of heads, H.
        dropout: dropout rate of the attention probabilities.
        implementation: backend of `kernels.attention`; None for the fastest.
        causal: whether to hide later tokens.
        head_size: D; None for E / H.
        use_bias: whether the projections of queries, keys and values have a bias.
        out_bias: whether the output projection has a bias.
        scale: scale of the scores; None for 1/sqrt(D).
        window: (left, right), number of visible tokens before and after the query's own, inclusive; None for all.
        rotary: base of the frequencies of rotary position embedding; None for no rotation.
        out_init: initialiser of the output projection's kernel; None for `kernel_init`.
        query_init: initialiser of the queries' kernel; None for `kernel_init`.
        shared_dropout: whether all queries of a row drop the same keys, as in T5's own training.
    """

    width: int
    heads: int
    dropout: float
    kernel_init: Initializer
    dtype: str = "float32"
    implementation: str | None = None
    causal: bool = False
    head_size: int | None = None
    use_bias: bool = True
    out_bias: bool = True
    scale: float | None = None
    window: tuple[int | None, int | None] | None = None
    rotary: float | None = None
    out_init: Initializer | None = None
    query_init: Initializer | None = None
    shared_dropout: bool = False

    def setup(self) -> None:
        inner, axes = (self.heads, self._size), ("embed", "heads", "head_dim")
        project = partial(Linear, inner, axes, dtype=self.dtype, use_bias=self.use_bias)
        query_init = self.kernel_init if self.query_init is None else self.query_init
        self.query, self.key, self.value = map(project, (query_init, self.kernel_init, self.kernel_init))
        out_init = self.kernel_init if self.out_init is None else self.out_init
        self.out = Linear((self.width,), ("heads", "head_dim", "embed"), out_init, self.dtype, self.out_bias)

    @property
    def _size(self) -> int:
        return self.width // self.heads if self.head_size is None else self.head_size

    def __call__(
        self,
        hidden: Array,
        segment_ids: Segments,
        rows: Rows,
        *,
        memory: Array | None = None,
        places: Array | None = None,
        memory_places: Array | None = None,
        bias: Bias | None = None,
        position_ids: Array | None = None,
        query_positions: Array | None = None,
        deterministic: bool,
    ) -> Array:
        """Attend from every token.

        Args:
            hidden: [B, L, E].
            segment_ids: [B, L], or a pair (of the queries, of the keys), or None if everything is one segment.
            rows: [B] uint32, row numbers, or `ByExample` of the tokens.
            memory: [B, S, E], what to attend to; None for `hidden` itself.
            places: [B or 1, L, E], added to what queries are projected from, and in self-attention keys too, but not
                values (Carion et al. 2020, A.4); None for nothing.
            memory_places: [B or 1, S, E], the same for the keys of a memory.
            bias: bias added to the scores.
            position_ids: int [B or 1, L], each token's position in its example, for rotary attention; None counts from
                0 along the row.
            query_positions: int [B, L], indices of the tokens of `hidden` in the memory; `segment_ids`, `rows`
                and `position_ids` are then those of all tokens of the memory. None if `hidden` is the whole row, or
                another sequence than the memory.
            deterministic: disable dropout.

        Returns:
            [B, L, E]

        Raises:
            NotImplementedError: rotary attention to another sequence, or dropout by example to one whose examples are
                in other places; `query_positions` with
                causal attention, a window or a bias, all of which depend on a query's place in the row.
        """
        query_segments, key_segments = split_segments(segment_ids)
        if query_positions is not None:
            if self.causal or self.window is not None or bias is not None:
                raise NotImplementedError("Attention: query_positions with causal, window or bias are not implemented")
            query_segments, key_segments = split_segments(segments_at(segment_ids, query_positions))
        elif memory is not None and self.rotary is not None:
            raise NotImplementedError("Attention: rotary attention to another sequence is not implemented")
        elif (
            memory is not None
            and isinstance(rows, ByExample)
            and rows.positions.shape != memory.shape[:2]
            and not deterministic
        ):
            raise NotImplementedError("Attention: dropout by example of another sequence takes the same places of both")
        memory_places = places if memory is None else memory_places
        memory = hidden if memory is None else memory
        own = rows if query_positions is None else rows_at(rows, query_positions)
        query = self.project(self.query, hidden if places is None else hidden + places, own)
        key = self.project(self.key, memory if memory_places is None else memory + memory_places, rows)
        value = self.project(self.value, memory, rows)
        if self.rotary is not None:
            if position_ids is None:
                position_ids = jnp.arange(memory.shape[1])[None]
            at = position_ids
            if query_positions is not None:
                at = jnp.take_along_axis(jnp.broadcast_to(at, memory.shape[:2]), query_positions, axis=1)
            query, key = rotate(query, at, self.rotary), rotate(key, position_ids, self.rotary)
        attended = self.attend(
            query,
            key,
            value,
            bias=bias,
            causal=self.causal,
            window=self.window,
            query_segment_ids=query_segments,
            key_segment_ids=key_segments,
            scale=self.scale,
            **({} if deterministic or self.dropout == 0.0 else self._dropout(own, rows, query, key)),
        )
        return self.project(self.out, attended, own)

    def attend(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        """Compute the attention of projected queries, with the options of `kernels.attention`.

        It is a method so that `attention_maps` sees its arguments.
        """
        return attention(query, key, value, **options, implementation=self.implementation)

    def project(self, linear: Linear, inputs: Array, rows: Rows) -> Array:
        """Apply one of the projections to tokens; `rows` are theirs, which an adapter's dropout finds in this call."""
        del rows
        return linear(inputs)

    def _dropout(self, queries: Rows, keys: Rows, query: Array, key: Array) -> dict[str, Any]:
        """Return the arguments of `kernels.attention` for dropout, from the rows of the queries and of the keys."""
        seed = dropout_seed(self)
        if self.shared_dropout:
            if isinstance(queries, ByExample):
                raise NotImplementedError("Attention: dropout by example and shared by the queries at the same time")
            places = jnp.broadcast_to(jnp.arange(key.shape[1], dtype=jnp.int32), key.shape[:2])
            positions = (jnp.zeros(query.shape[:2], jnp.int32), places)
            seeds = row_seeds(seed, queries)
            return {"dropout_rate": self.dropout, "dropout_seed": seeds, "dropout_positions": positions}
        if isinstance(queries, ByExample):
            assert isinstance(keys, ByExample)
            seeds, positions = row_seeds(seed, queries.examples), (queries.positions, keys.positions)
            return {"dropout_rate": self.dropout, "dropout_seed": seeds, "dropout_positions": positions}
        return {"dropout_rate": self.dropout, "dropout_seed": row_seeds(seed, queries)}

    def keys_values(self, memory: Array) -> tuple[Array, Array]:
        """Compute the keys [B, H, D, S] and the values [B, H, S, D] of a memory [B, S, E]."""
        return jnp.moveaxis(self.key(memory), 1, 3), jnp.swapaxes(self.value(memory), 1, 2)

    def write(
        self, hidden: Array, keys: Array, values: Array, places: Array, position_ids: Array | None = None
    ) -> tuple[Array, Array]:
        """Add the keys and values of one token per beam to those of a row.

        Args:
            hidden: [B, K, E], K beams per row.
            keys: [B, H, D, S], as returned by `keys_values`.
            values: [B, H, S, D], as returned by `keys_values`.
            places: int32 [B, K], the slot of the S that each token is written to; S for none.
            position_ids: int [B, K], position of each token in its text; only rotary attention needs it.
        """
        return write_slots(keys, values, self._turned(self.key(hidden), position_ids), self.value(hidden), places)

    def step(
        self,
        hidden: Array,
        keys: Array,
        values: Array,
        mask: Array,
        position_ids: Array | None = None,
        bias: Array | None = None,
        before: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, Array]:
        """Attend from one token of each of a row's beams, which share the row's keys and values.

        Args:
            hidden: [B, K, E], K beams per row.
            keys: [B, H, D, S], as returned by `keys_values`.
            values: [B, H, S, D], as returned by `keys_values`.
            mask: bool [B, 1 or K, S], what each beam attends to, within the window if there is one. A beam that
                attends to nothing gets zeros.
            position_ids: int [B, K], position of each token in its text; only rotary attention needs it.
            bias: float32 [1 or B, H, 1 or K, S], bias added to the scores.
            before: (keys [B, H, D, P], values [B, H, P, D], mask [B, 1 or K, P]) of P tokens before these, such as a
                prompt's; then S is that of both together in the bias and the probabilities.

        Returns:
            ([B, K, E], the probabilities [B, H, K, S] float32)
        """
        parts = [(keys, values, mask)] if before is None else [before, (keys, values, mask)]
        scale = self._size**-0.5 if self.scale is None else self.scale
        query = self._turned(self.query(hidden), position_ids) * jnp.asarray(scale, self.dtype)
        attended, weights = attend_slots(query, parts, bias)
        return self.out(attended), weights

    def _turned(self, vectors: Array, position_ids: Array | None) -> Array:
        """Rotate a step's queries or keys [B, K, H, D] if this attention is rotary."""
        if self.rotary is None:
            return vectors
        if position_ids is None:
            raise ValueError("Attention: position_ids: expected int [B, K] for rotary attention, found None")
        return rotate(vectors, position_ids, self.rotary)


def write_slots(keys: Array, values: Array, key: Array, value: Array, places: Array) -> tuple[Array, Array]:
    """Write one token's key and value [B, K, H, D] per beam to slots `places` [B, K]; see `Attention.write`."""
    rows = jnp.arange(len(key))[:, None]
    return keys.at[rows, :, :, places].set(key, mode="drop"), values.at[rows, :, places].set(value, mode="drop")


def attend_slots(
    query: Array, parts: list[tuple[Array, Array, Array]], bias: Array | None = None
) -> tuple[Array, Array]:
    """Attend from scaled queries [B, K, H, D] to (keys, values, mask) of several parts; see `Attention.step`.

    Returns:
        ([B, K, H, D], the probabilities [B, H, K, S] float32)
    """
    products = partial(jnp.einsum, "bkhd,bhds->bhks", query, preferred_element_type=jnp.float32)
    scores = _joined([products(keys) for keys, _, _ in parts])
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(_joined([mask for _, _, mask in parts])[:, None], scores, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    # The axes are swapped separately: as part of the product, XLA's CPU compiler makes it five times slower.
    ends = np.cumsum([values.shape[2] for _, values, _ in parts])[:-1]
    shares = jnp.split(weights.astype(query.dtype), ends, axis=-1)
    attended = sum(
        jnp.einsum("bhks,bhsd->bhkd", share, values) for share, (_, values, _) in zip(shares, parts, strict=True)
    )
    return jnp.swapaxes(attended, 1, 2), weights


def _joined(parts: list[Array]) -> Array:
    """Concatenate along the last axis; one part stays as it is."""
    if len(parts) == 1:
        return parts[0]
    rows = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return jnp.concatenate([jnp.broadcast_to(part, (*rows, part.shape[-1])) for part in parts], axis=-1)

"""Layers that the families share: linear maps, embeddings, norms, attention, feed-forward, dropout.

The stack of layers is in stack.py. Parameters are float32 and carry logical axis names, all of them in `LOGICAL_AXES`;
`dtype` is the compute dtype.
Normalisation statistics are always float32.

Letters for shapes: B batch, L length, E model width, H heads, D head size, F feed-forward width, V vocabulary,
N layers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from ..kernels import attention
from ..kernels.bias import Bias, RelativeBias
from ..kernels.hash import hash_dropout, row_seeds

# Every logical axis name that a parameter of this package carries. `train/sharding.py` maps each of them to mesh axes.
LOGICAL_AXES = ("layers", "vocab", "positions", "types", "embed", "embed_out", "heads", "head_dim", "mlp", "labels")

# The segments of a row: one array of both queries and keys, or a pair (of the queries, of the keys) where they differ.
Segments = Array | tuple[Array, Array] | None


def reference_segments(attention_mask: Array) -> tuple[Array, Array]:
    """Return segments with which padding behaves as in the reference implementation: never attended to, but attending.

    Padding of this package (segment 0) attends to nothing, so that attention returns zeros for it. In the reference it
    attends to the row's tokens. These outputs are never used, so that only a comparison of them needs this.

    Args:
        attention_mask: [B, L] int, 1 for tokens and 0 for padding.

    Returns:
        ([B, L] of ones, the mask), for any `segment_ids` argument of this package's models.
    """
    return jnp.ones_like(attention_mask), attention_mask


def split_segments(segment_ids: Segments) -> tuple[Array | None, Array | None]:
    """Return (segments of the queries, segments of the keys)."""
    return segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)


def gather_positions(hidden: Array, positions: Array) -> Array:
    """Gather hidden [B, L, E] at positions [B, P] int -> [B, P, E]. A position outside 0..L-1 gives NaN."""
    return jnp.take_along_axis(hidden, positions[:, :, None], axis=1, mode="fill")


def segments_at(segment_ids: Segments, positions: Array) -> Segments:
    """Return the segments of the queries at positions [B, X] of their rows, and of all keys."""
    queries, keys = split_segments(segment_ids)
    if queries is None:
        return None if keys is None else (jnp.ones(positions.shape, keys.dtype), keys)
    return jnp.take_along_axis(queries, positions, axis=1), queries if keys is None else keys


@jax.custom_jvp
def gelu_exact(x: Array) -> Array:
    """Compute x·Φ(x) by the error function (Hendrycks and Gimpel 2016), in float32."""
    return _gelu_with_slope(x)[0]


def _gelu_with_slope(x: Array) -> tuple[Array, Array]:
    wide = x.astype(jnp.float32)
    below = 0.5 * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))  # Φ(x)
    slope = below + wide * jnp.exp(-0.5 * wide * wide) * math.sqrt(0.5 / math.pi)
    return (wide * below).astype(x.dtype), slope.astype(x.dtype)


@gelu_exact.defjvp
def _gelu_exact_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The backward pass keeps only the slope; automatic differentiation would keep several tensors [B, L, F].
    value, slope = _gelu_with_slope(*primals)
    return value, tangents[0] * slope


def gelu_tanh(x: Array) -> Array:
    """Compute GELU by the tanh approximation (Hendrycks and Gimpel 2016, 2), as in GPT-2."""
    return jax.nn.gelu(x, approximate=True)


def gelu_sigmoid(x: Array) -> Array:
    """Compute GELU by the sigmoid approximation, x·σ(1.702·x) (Hendrycks and Gimpel 2016, 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


# By their names in released config.json files.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu_exact,
    "gelu_python": gelu_exact,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "quick_gelu": gelu_sigmoid,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def partitioned(initializer: Initializer, *axes: str) -> Callable[..., Any]:
    """Wrap `initializer` to give the parameter the logical names `axes`, one per axis, all in `LOGICAL_AXES`."""
    unknown = set(axes) - set(LOGICAL_AXES)
    if unknown:
        raise ValueError(f"unknown logical axes {sorted(unknown)}; known: {', '.join(LOGICAL_AXES)}")
    return nn.with_logical_partitioning(initializer, axes)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(inputs: Array, kernel: Array, axis: int, dtype: str, out_dtype: str) -> Array:
    """Compute inputs [..., I] · kernel -> [..., O] in `dtype`, accumulated in float32, returned as `out_dtype`.

    The kernel is [I, O] (axis 0 is contracted) or [O, I] (axis 1), and float32; its gradient is float32 and never
    rounded to `dtype`. The incoming gradient is rounded to `dtype` once, so that both products of the backward pass run
    at the rate of that type too.
    """
    return _dot(inputs.astype(dtype), kernel.astype(dtype), inputs.ndim - 1, axis, out_dtype)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int, out_dtype: Any) -> Array:
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=out_dtype)


def _matmul_forward(
    inputs: Array, kernel: Array, axis: int, dtype: str, out_dtype: str
) -> tuple[Array, tuple[Array, Array]]:
    return matmul(inputs, kernel, axis, dtype, out_dtype), (inputs, kernel)


def _matmul_backward(
    axis: int, dtype: str, out_dtype: str, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    del out_dtype  # the gradient's own
    inputs, kernel = residuals
    gradient = gradient.astype(dtype)
    to_inputs = _dot(gradient, kernel.astype(dtype), gradient.ndim - 1, 1 - axis, inputs.dtype)
    rows = inputs.astype(dtype).reshape(-1, inputs.shape[-1])
    gradient = gradient.reshape(-1, gradient.shape[-1])
    return to_inputs, outer_sum(*((rows, gradient) if axis == 0 else (gradient, rows)))


HALVED = 1 << 24
"""Minimum number of multiplications in a product for which `_outer_in_halves` pays off."""


def outer_sum(a: Array, b: Array) -> Array:
    """Sum the outer products of a [T, M] and b [T, N], of the same dtype, over T -> [M, N] float32."""
    if a.dtype == jnp.float32 or a.size * b.shape[1] < HALVED or a.shape[0] % 2:
        return _outer(a, b)
    return jax.lax.platform_dependent(a, b, cpu=_outer_in_halves, default=_outer)


def _outer(a: Array, b: Array) -> Array:
    """Compute `outer_sum` by one product."""
    return _dot(a, b, 0, 0, jnp.float32)


def _outer_in_halves(a: Array, b: Array) -> Array:
    """Compute `_outer` with the first operand transposed in two parts, for XLA's CPU backend in bfloat16.

    XLA would fold a plain transpose into the product, and computes a product of that form in float32, at half the rate.
    Not for small products: there is nothing to gain, and if an operand is constant, the compiler splits the two parts
    again into a form that it cannot run.
    """
    half = a.shape[0] // 2
    return _dot(jnp.concatenate([a[:half].T, a[half:].T], axis=1), b, 1, 0, jnp.float32)


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """Add bias [O] float32 to x [..., O], in the dtype of x; the gradient of the bias is summed in float32."""
    return x + jnp.expand_dims(bias.astype(x.dtype), tuple(range(x.ndim - 1)))


def _add_bias_backward(_: None, gradient: Array) -> tuple[Array, Array]:
    return gradient, gradient.reshape(-1, gradient.shape[-1]).sum(axis=0, dtype=jnp.float32)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), _add_bias_backward)


class Linear(nn.Module):
    """inputs · kernel + bias, contracting as many trailing axes of the inputs as the kernel has input axes.

    Attributes:
        features: sizes of the output axes, such as (D,) or (H, D).
        axes: logical names of the kernel's axes, input axes first.
        kernel_init: initialiser of the kernel; the bias is initialised to zero.
        dtype: compute dtype, and dtype of the output.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    kernel_init: Initializer
    dtype: str = "float32"
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        contracted = len(self.axes) - len(self.features)
        lead, given = inputs.shape[:-contracted], inputs.shape[-contracted:]
        kernel = self.param("kernel", partitioned(self.kernel_init, *self.axes), (*given, *self.features), jnp.float32)
        flat = matmul(inputs.reshape(*lead, -1), kernel.reshape(math.prod(given), -1), 0, self.dtype, self.dtype)
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros_init(), *self.axes[contracted:])
            flat = add_bias(flat, self.param("bias", zeros, self.features, jnp.float32).reshape(-1))
        return flat.reshape(*lead, *self.features)


class Embed(nn.Module):
    """A table of vectors: `embed(ids)` looks up, `embed.attend(x)` multiplies with every vector (tied decoder).

    Attributes:
        count: number of vectors.
        width: their size, E.
        axis: logical name of the first axis.
        padding_id: an id whose vector gets no gradient from lookups, as in the reference implementation.
    """

    count: int
    width: int
    axis: str
    embedding_init: Initializer
    dtype: str = "float32"
    padding_id: int | None = None

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding", partitioned(self.embedding_init, self.axis, "embed"), (self.count, self.width), jnp.float32
        )

    def __call__(self, ids: Array) -> Array:
        """Look up ids [...] int -> [..., E] float32. An id outside the table gives NaN, never another id's vector."""
        vectors = jnp.take(self.embedding, ids, axis=0, mode="fill")
        if self.padding_id is None:
            return vectors
        return jnp.where((ids == self.padding_id)[..., None], jax.lax.stop_gradient(vectors), vectors)

    def attend(self, inputs: Array) -> Array:
        """Multiply [..., E] with every vector -> [..., count] float32, in the compute dtype, accumulated in float32."""
        return matmul(inputs, self.embedding, 1, self.dtype, "float32")


class LayerNorm(nn.Module):
    """scale·(x - mean)/sqrt(variance + epsilon) + bias over the last axis (Ba et al. 2016), in float32, as `dtype`."""

    epsilon: float
    dtype: str = "float32"
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        width = inputs.shape[-1]
        scale = self.param("scale", partitioned(nn.initializers.ones_init(), "embed"), (width,), jnp.float32)
        lead = tuple(range(inputs.ndim - 1))
        x = inputs.astype(jnp.float32)
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(variance + self.epsilon) * jnp.expand_dims(scale, lead)
        if self.use_bias:
            bias = self.param("bias", partitioned(nn.initializers.zeros_init(), "embed"), (width,), jnp.float32)
            scaled = scaled + jnp.expand_dims(bias, lead)
        return scaled.astype(self.dtype)


class RMSNorm(nn.Module):
    """scale·x/sqrt(mean(x²) + epsilon) over the last axis (Zhang and Sennrich 2019), in float32, as `dtype`."""

    epsilon: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        width = inputs.shape[-1]
        scale = self.param("scale", partitioned(nn.initializers.ones_init(), "embed"), (width,), jnp.float32)
        x = inputs.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        return (normed * jnp.expand_dims(scale, tuple(range(inputs.ndim - 1)))).astype(self.dtype)


def dropout_seed(module: nn.Module) -> Array:
    """Draw a seed [2] uint32 from the module's "dropout" stream; it differs in each module and layer."""
    return jax.random.bits(module.make_rng("dropout"), (2,), jnp.uint32)


class Dropout(nn.Module):
    """Set a fraction `rate` of the entries to zero and divide the others by 1 - rate (Srivastava et al. 2014).

    What is dropped in a row depends only on the "dropout" stream and the row's number, and so not on how a batch is
    split over devices, hosts or accumulation steps.
    """

    rate: float

    @nn.compact
    def __call__(self, inputs: Array, rows: Array, *, deterministic: bool) -> Array:
        """Drop entries of inputs [B, ...]; rows [B] uint32 are the row numbers."""
        if deterministic or self.rate == 0.0:
            return inputs
        return hash_dropout(inputs, self.rate, row_seeds(dropout_seed(self), rows))


def rotate(vectors: Array, position_ids: Array, theta: float) -> Array:
    """Apply rotary position embedding (Su et al. 2021, 3.4.2): rotate channels i and i + D/2 by position·theta^(-2i/D).

    Args:
        vectors: [B, L, H, D], queries or keys; D is even.
        position_ids: int [B or 1, L].
        theta: base of the frequencies.

    Returns:
        [B, L, H, D] of the same dtype. Angles and products are computed in float32.
    """
    half = vectors.shape[-1] // 2
    frequencies = jnp.asarray(1.0 / theta ** (np.arange(half, dtype=np.float32) / np.float32(half)))
    angles = (position_ids[:, :, None].astype(jnp.float32) * frequencies[None, None])[:, :, None]
    sines, cosines = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(vectors.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return jnp.concatenate(turned, axis=-1).astype(vectors.dtype)


class RelativePositions(nn.Module):
    """T5's relative position biases (Raffel et al. 2020, 2.1), one table for all layers of a stack.

    Attributes:
        heads: number of heads of each layer, H.
        bidirectional: whether keys after the query have their own buckets.
        buckets: number of buckets of distances.
        max_distance: distance in tokens from which on all distances share the last bucket.
    """

    heads: int
    bidirectional: bool
    table_init: Initializer
    buckets: int = 32
    max_distance: int = 128

    @nn.compact
    def __call__(self) -> RelativeBias:
        """Return the bias for each layer's `Attention`."""
        axes = partitioned(self.table_init, "positions", "heads")
        table = self.param("table", axes, (self.buckets, self.heads), jnp.float32)
        return RelativeBias(table, self.bidirectional, self.max_distance)


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

    def setup(self) -> None:
        linear = partial(Linear, kernel_init=self.kernel_init, dtype=self.dtype)
        project = partial(linear, (self.heads, self._size), ("embed", "heads", "head_dim"), use_bias=self.use_bias)
        self.query, self.key, self.value = project(), project(), project()
        self.out = linear((self.width,), ("heads", "head_dim", "embed"), use_bias=self.out_bias)

    @property
    def _size(self) -> int:
        return self.width // self.heads if self.head_size is None else self.head_size

    def __call__(
        self,
        hidden: Array,
        segment_ids: Segments,
        rows: Array,
        *,
        memory: Array | None = None,
        bias: Bias | None = None,
        position_ids: Array | None = None,
        query_positions: Array | None = None,
        deterministic: bool,
    ) -> Array:
        """Attend from every token.

        Args:
            hidden: [B, L, E].
            segment_ids: [B, L], or a pair (of the queries, of the keys), or None if everything is one segment.
            rows: [B] uint32, row numbers.
            memory: [B, S, E], what to attend to; None for `hidden` itself.
            bias: bias added to the scores.
            position_ids: int [B or 1, L], each token's position in its example, for rotary attention; None counts from
                0 along the row.
            query_positions: int [B, L], indices of the tokens of `hidden` in the memory; `segment_ids` and
                `position_ids` are then those of all tokens of the memory. None if `hidden` is the whole row, or
                another sequence than the memory.
            deterministic: disable dropout.

        Returns:
            [B, L, E]

        Raises:
            NotImplementedError: rotary attention to another sequence; `query_positions` with causal attention, a window
                or a bias, all of which depend on a query's place in the row.
        """
        query_segments, key_segments = split_segments(segment_ids)
        if query_positions is not None:
            if self.causal or self.window is not None or bias is not None:
                raise NotImplementedError("Attention: query_positions with causal, window or bias are not implemented")
            query_segments, key_segments = split_segments(segments_at(segment_ids, query_positions))
        elif memory is not None and self.rotary is not None:
            raise NotImplementedError("Attention: rotary attention to another sequence is not implemented")
        memory = hidden if memory is None else memory
        query, key, value = self.query(hidden), self.key(memory), self.value(memory)
        if self.rotary is not None:
            if position_ids is None:
                position_ids = jnp.arange(memory.shape[1])[None]
            at = position_ids
            if query_positions is not None:
                at = jnp.take_along_axis(jnp.broadcast_to(at, memory.shape[:2]), query_positions, axis=1)
            query, key = rotate(query, at, self.rotary), rotate(key, position_ids, self.rotary)
        dropping = not deterministic and self.dropout > 0.0
        attended = attention(
            query,
            key,
            value,
            bias=bias,
            causal=self.causal,
            window=self.window,
            query_segment_ids=query_segments,
            key_segment_ids=key_segments,
            scale=self.scale,
            dropout_rate=self.dropout if dropping else 0.0,
            dropout_seed=row_seeds(dropout_seed(self), rows) if dropping else None,
            implementation=self.implementation,
        )
        return self.out(attended)

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
        rows = jnp.arange(len(hidden))[:, None]
        key = self._turned(self.key(hidden), position_ids)
        return (
            keys.at[rows, :, :, places].set(key, mode="drop"),
            values.at[rows, :, places].set(self.value(hidden), mode="drop"),
        )

    def step(
        self,
        hidden: Array,
        keys: Array,
        values: Array,
        mask: Array,
        position_ids: Array | None = None,
        bias: Array | None = None,
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

        Returns:
            ([B, K, E], the probabilities [B, H, K, S] float32)
        """
        scale = self._size**-0.5 if self.scale is None else self.scale
        query = self._turned(self.query(hidden), position_ids) * jnp.asarray(scale, self.dtype)
        scores = jnp.einsum("bkhd,bhds->bhks", query, keys, preferred_element_type=jnp.float32)
        if bias is not None:
            scores = scores + bias
        scores = jnp.where(mask[:, None], scores, -jnp.inf)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / jnp.where(total == 0.0, 1.0, total)
        # The axes are swapped separately: as part of the product, XLA's CPU compiler makes it five times slower.
        attended = jnp.einsum("bhks,bhsd->bhkd", weights.astype(self.dtype), values)
        return self.out(jnp.swapaxes(attended, 1, 2)), weights

    def _turned(self, vectors: Array, position_ids: Array | None) -> Array:
        """Rotate a step's queries or keys [B, K, H, D] if this attention is rotary."""
        if self.rotary is None:
            return vectors
        if position_ids is None:
            raise ValueError("Attention: position_ids: expected int [B, K] for rotary attention, found None")
        return rotate(vectors, position_ids, self.rotary)


class FeedForward(nn.Module):
    """A position-wise feed-forward network, activation(x·W₁ + b₁)·W₂ + b₂ (Vaswani et al. 2017, 3.3).

    Gated (Shazeer 2020, 2): (activation(x·V + c) ⊙ (x·W₁ + b₁))·W₂ + b₂, GEGLU with a GELU and SwiGLU with "silu". The
    activation is applied to the gate V.

    Attributes:
        width: the inner width, F.
        activation: a name in `ACTIVATIONS`.
        dropout: dropout rate of the inner activations (not in the paper).
        gated: whether there is a gate.
        use_bias: whether the linear maps have a bias.
    """

    width: int
    activation: str
    kernel_init: Initializer
    dtype: str = "float32"
    dropout: float = 0.0
    gated: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, hidden: Array, rows: Array | None = None, *, deterministic: bool = True) -> Array:
        """Transform hidden states [..., E] -> [..., E]; rows [B] uint32 are needed for dropout of inner activations."""
        linear = partial(Linear, kernel_init=self.kernel_init, dtype=self.dtype, use_bias=self.use_bias)
        activation = ACTIVATIONS[self.activation]
        inner = linear((self.width,), ("embed", "mlp"), name="inner")(hidden)
        if self.gated:
            inner = activation(linear((self.width,), ("embed", "mlp"), name="gate")(hidden)) * inner
        else:
            inner = activation(inner)
        if rows is not None:
            inner = Dropout(self.dropout)(inner, rows, deterministic=deterministic)
        return linear((hidden.shape[-1],), ("mlp", "embed"), name="outer")(inner)


def sinusoids(positions: int, width: int, *, interleaved: bool) -> np.ndarray:
    """Return sin and cos of position / 10000^(2i / E), [positions, E] float32 (Vaswani et al. 2017, 3.5).

    Args:
        positions: number of positions.
        width: number of channels, E.
        interleaved: channels 2i and 2i + 1 are the sine and the cosine of one frequency, as the paper writes it; else
            all sines come first and then all cosines, as in the paper's own code and most later code.
    """
    angles = np.arange(positions)[:, None] / np.power(10_000, 2 * np.arange(-(-width // 2)) / width)
    sines, cosines = np.sin(angles), np.cos(angles[:, : width // 2])
    if not interleaved:
        return np.concatenate([sines, cosines], axis=1).astype(np.float32)
    table = np.empty((positions, width), np.float32)
    table[:, 0::2], table[:, 1::2] = sines, cosines
    return table


def row_numbers(rows: Array | None, input_ids: Array) -> Array:
    """Return row numbers [B] uint32, counted from 0 if none are given."""
    return jnp.arange(input_ids.shape[0], dtype=jnp.uint32) if rows is None else rows

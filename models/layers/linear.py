"""Linear maps and embeddings. Parameters are float32 and carry logical axis names, all of them in `LOGICAL_AXES`;
`dtype` is the compute dtype.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer

# Every logical axis name that a parameter of this package carries. `train/sharding.py` maps each of them to mesh axes.
LOGICAL_AXES = (
    "layers",
    "vocab",
    "pixels",
    "positions",
    "types",
    "embed",
    "embed_out",
    "heads",
    "head_dim",
    "mlp",
    "labels",
)


def partitioned(initializer: Initializer, *axes: str) -> Callable[..., Any]:
    """Wrap `initializer` to give the parameter the logical names `axes`, one per axis, all in `LOGICAL_AXES`."""
    unknown = set(axes) - set(LOGICAL_AXES)
    if unknown:
        raise ValueError(f"unknown logical axes {sorted(unknown)}; known: {', '.join(LOGICAL_AXES)}")
    return nn.with_logical_partitioning(initializer, axes)


def xavier(width: int) -> Initializer:
    """Return Xavier's uniform initialiser; a kernel of three axes is a map of `width` from or to all heads together."""

    def draw(key: Array, shape: Any, dtype: Any = None, out_sharding: Any = None) -> Array:
        del out_sharding
        limit = math.sqrt(6 / (2 * width if len(shape) == 3 else sum(shape)))
        return jax.random.uniform(key, shape, jnp.float32 if dtype is None else dtype, -limit, limit)

    return draw


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(inputs: Array, kernel: Array, axis: int, dtype: str, out_dtype: str) -> Array:
    """Compute inputs [..., I] · kernel -> [..., O] in `dtype`, accumulated in float32, returned as `out_dtype`.

    The kernel is [I, O] (axis 0 is contracted) or [O, I] (axis 1), and float32; its gradient is float32 and never
    rounded to `dtype`. The incoming gradient is rounded to `dtype` once, so that both products of the backward pass run
    at the rate of that type too.
    """
    inputs, kernel = inputs.astype(dtype), kernel.astype(dtype)
    product = partial(_dot, axis_a=inputs.ndim - 1, axis_b=axis, out_dtype=out_dtype)
    if axis == 1 and inputs.size <= FEW * inputs.shape[-1]:
        return jax.lax.platform_dependent(
            inputs, kernel, cpu=partial(_kernel_first, out_dtype=out_dtype), default=product
        )
    return product(inputs, kernel)


FEW = 256
"""Maximum number of rows of inputs for which `_kernel_first` pays off."""


def _kernel_first(inputs: Array, kernel: Array, out_dtype: Any) -> Array:
    """Compute inputs [..., I] · kernel [O, I] as the transpose of kernel · inputs, for XLA's CPU backend.

    It rearranges the second factor of a product. That would be the kernel, and with few rows it would take as long as
    the product itself. The barrier keeps the compiler from exchanging the factors again.
    """
    lead = inputs.shape[:-1]
    product = _dot(kernel, inputs.reshape(-1, inputs.shape[-1]), 1, 1, out_dtype)
    return jax.lax.optimization_barrier(product).T.reshape(*lead, kernel.shape[0])


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
        flat = inputs.reshape(*lead, -1)
        if self.has_variable("params", TURNED):
            shape = (*self.features, *given)
            kernel = self.param(TURNED, nn.initializers.zeros_init(), shape)
            flat = matmul(flat, kernel.reshape(-1, flat.shape[-1]), 1, self.dtype, self.dtype)
        else:
            shape = (*given, *self.features)
            kernel = self.param("kernel", partitioned(self.kernel_init, *self.axes), shape, jnp.float32)
            flat = matmul(flat, kernel.reshape(flat.shape[-1], -1), 0, self.dtype, self.dtype)
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros_init(), *self.axes[contracted:])
            flat = add_bias(flat, self.param("bias", zeros, self.features, jnp.float32).reshape(-1))
        return flat.reshape(*lead, *self.features)


TURNED = "turned_kernel"
"""A `Linear`'s parameter instead of its kernel after `turn_kernels`: [..., output axes, input axes]."""


def turn_kernels(params: Any) -> Any:
    """Put the output axes of the kernels of every `Linear` first, for products with few rows, as of decoding steps.

    Each parameter called "kernel" must be a `Linear`'s; that of one called "out" maps from an attention's heads.

    Args:
        params: a layer's parameters, unboxed and not stacked.
    """

    def turn(name: str, part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        turned = {key: turn(key, value) for key, value in part.items() if key != "kernel"}
        if "kernel" in part:
            kernel = part["kernel"]
            # All have one input axis, but for the map from an attention's heads.
            turned[TURNED] = jnp.moveaxis(kernel, -1, 0) if name == "out" else jnp.moveaxis(kernel, 0, -1)
        return turned

    return turn("", params)


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


class Vectors(nn.Module):
    """A parameter [...], named as what it is for the optimiser: a kernel, or a bias."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: Initializer
    kind: str

    def setup(self) -> None:
        setattr(
            self, self.kind, self.param(self.kind, partitioned(self.initializer, *self.axes), self.shape, jnp.float32)
        )

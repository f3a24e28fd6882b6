"""Recurrent cells, and the loop over time.

A cell reads its input's products with the weights, computed for all positions at once, and the state before. Gates are
stored side by side in PyTorch's order, with its two biases:

    lstm                input, forget, candidate, output                              (Hochreiter and Schmidhuber 1997)
    gru-reset-after     reset, update, candidate: tanh(W x + b + r * (U h + b'))      (PyTorch, cuDNN, flax)
    gru-reset-before    reset, update, candidate: tanh(W x + b + U (r * h) + b')      (Cho et al. 2014)

Both GRUs keep the fraction z of their state, h' = (1 - z) n + z h; Cho et al. call 1 - z what is z here.

Rows are packed: a state starts anew where `starts` says so, at the first token that is read of each segment. The
direction from right to left starts at each segment's last token, and so never reads padding first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ..checkpoints.tables import Entry, Transposed, same
from ..layers.linear import add_bias, matmul, outer_sum, partitioned

GATES = {"lstm": 4, "gru-reset-after": 3, "gru-reset-before": 3}
"""Cells, and the number of their gates, candidate included."""

State = tuple[Array, ...]
"""The state of a cell, each [B, ..., E] float32: (hidden,) of a GRU, (hidden, cell) of an LSTM."""
Product = Callable[[str, Array], Array]
"""product(name, x [B, ..., I]) -> [B, ..., O]: x times the weights of that name; see `loop`."""


# --- cells ------------------------------------------------------------------------------------------------------------


def state_weights(cell: str, kernel: Array, name: str = "") -> dict[str, Array]:
    """Return the weights [E, gates * E] of a cell's own state as `advance` names them."""
    if cell != "gru-reset-before":
        return {f"{name}state": kernel}
    width = kernel.shape[0]
    return {f"{name}gates": kernel[:, : 2 * width], f"{name}candidate": kernel[:, 2 * width :]}


def driven(cell: str, inputs: Array, input_bias: Array, state_bias: Array) -> Array:
    """Add to products of inputs [..., gates * E] the biases that need not be added in the loop."""
    if cell == "gru-reset-after":  # the candidate's second bias is multiplied by the reset gate
        state_bias = state_bias.at[2 * state_bias.shape[0] // 3 :].set(0.0)
    return add_bias(inputs, input_bias + state_bias)


def advance(cell: str, product: Product, state: State, given: Array, state_bias: Array, name: str = "") -> State:
    """Compute the next state of a cell.

    Args:
        cell: one of `GATES`.
        product: gives products with `state_weights`.
        state: the state before, each [B, ..., E].
        given: [B, ..., gates * E], by `driven`.
        state_bias: [gates * E].
        name: prefix of the weights' names.
    """
    hidden = state[0]
    width = hidden.shape[-1]
    if cell == "lstm":
        enter, forget, candidate, leave = jnp.split(given + product(f"{name}state", hidden), 4, axis=-1)
        kept = jax.nn.sigmoid(forget) * state[1] + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
        return jax.nn.sigmoid(leave) * jnp.tanh(kept), kept
    if cell == "gru-reset-after":
        own = product(f"{name}state", hidden)
        reset, update = jnp.split(jax.nn.sigmoid(given[..., : 2 * width] + own[..., : 2 * width]), 2, axis=-1)
        recalled = reset * add_bias(own[..., 2 * width :], state_bias[2 * width :])
    else:
        gates = given[..., : 2 * width] + product(f"{name}gates", hidden)
        reset, update = jnp.split(jax.nn.sigmoid(gates), 2, axis=-1)
        recalled = product(f"{name}candidate", reset * hidden)
    candidate = jnp.tanh(given[..., 2 * width :] + recalled)
    return (candidate + update * (hidden - candidate),)


# --- loop -------------------------------------------------------------------------------------------------------------


def multiply(weights: Mapping[str, Array], dtype: str) -> Product:
    """Return the products with weights [I, O], or with each row's own, [B, I, O]; float32, computed in `dtype`."""
    cast = {name: weight.astype(dtype) for name, weight in weights.items()}

    def product(name: str, x: Array) -> Array:
        weight = cast[name]
        what = "...i,io->...o" if weight.ndim == 2 else "b...i,bio->b...o"
        return jnp.einsum(what, x.astype(dtype), weight, preferred_element_type=jnp.float32)

    return product


@partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6))
def loop(
    step: Callable[[Product, Any, Any, Any], tuple[Any, Any]],
    weights: Mapping[str, Array],
    carry: Any,
    xs: Any,
    constants: Any,
    reverse: bool = False,
    dtype: str = "float32",
) -> tuple[Any, Any]:
    """Loop over time, as `jax.lax.scan` does, with the gradients of weights computed after the loop, all steps at once.

    A weight's gradient is a sum over time of outer products. Adding them up step by step would read and write it as
    often as there are steps; here it is a single matrix product per weight.

    Args:
        step: (product, carry, x, constants) -> (carry, y), a function that has no arrays in its closure. It may take
            the product with each of `weights` once.
        weights: [I, O] each, or [B, I, O], float32.
        carry: state before the first step.
        xs: inputs, time first.
        constants: what every step reads and that `step` uses otherwise.
        reverse: go from the last step to the first.
        dtype: data type of the products.

    Returns:
        (state after the last step, outputs with time first)
    """
    return _scan(step, weights, None, carry, xs, constants, reverse, dtype)[0]


def _scan(
    step: Any, weights: Any, probes: Any, carry: Any, xs: Any, constants: Any, reverse: bool, dtype: str
) -> tuple[Any, dict[str, Array]]:
    """Return the results, and what each weight was multiplied with; `probes` are added to the products."""
    plain = multiply(weights, dtype)

    def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
        x, probe = inputs
        seen: dict[str, Array] = {}

        def product(name: str, factor: Array) -> Array:
            seen[name] = factor
            return plain(name, factor) if probe is None else plain(name, factor) + probe[name]

        carry, y = step(product, carry, x, constants)
        return carry, (y, seen)

    carry, (ys, seen) = jax.lax.scan(body, carry, (xs, probes), reverse=reverse)
    return (carry, ys), seen


def _loop_forward(
    step: Any, weights: Any, carry: Any, xs: Any, constants: Any, reverse: bool, dtype: str
) -> tuple[Any, Any]:
    _, shapes = jax.eval_shape(lambda: _scan(step, weights, None, carry, xs, constants, reverse, dtype))
    probes = {name: jnp.zeros((*seen.shape[:-1], weights[name].shape[-1])) for name, seen in shapes.items()}

    def run(probes: Any, carry: Any, xs: Any, constants: Any) -> Any:
        return _scan(step, weights, probes, carry, xs, constants, reverse, dtype)

    results, pull, seen = jax.vjp(run, probes, carry, xs, constants, has_aux=True)
    return results, (pull, seen, weights)


def _loop_backward(step: Any, reverse: bool, dtype: str, residuals: Any, gradients: Any) -> tuple[Any, ...]:
    pull, seen, weights = residuals
    probes, carry, xs, constants = pull(gradients)
    found = {}
    for name, weight in weights.items():
        if name not in seen:
            found[name] = jnp.zeros_like(weight)
            continue
        factor, gradient = seen[name].astype(dtype), probes[name].astype(dtype)
        if weight.ndim == 3:
            found[name] = jnp.einsum("tbi,tbo->bio", factor, gradient, preferred_element_type=jnp.float32)
        else:
            found[name] = outer_sum(factor.reshape(-1, weight.shape[0]), gradient.reshape(-1, weight.shape[1]))
    return found, carry, xs, constants


loop.defvjp(_loop_forward, _loop_backward)


def restart(starts: Array, initial: Any, state: Any) -> Any:
    """Replace the states [B, ..., E] of rows where `starts` [B] is true by the initial ones."""
    return jax.tree.map(lambda new, old: jnp.where(starts[:, None], new, old), initial, state)


# --- layers -----------------------------------------------------------------------------------------------------------


def boundaries(segment_ids: Array, *, reverse: bool = False) -> Array:
    """Return which tokens are the first of their segment, or in reverse the last: [B, L] int -> [B, L] bool."""
    differs = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((segment_ids.shape[0], 1), bool)
    return jnp.concatenate([differs, edge] if reverse else [edge, differs], axis=1)


def uniform(limit: float) -> Any:
    """Return an initialiser that draws uniformly within ±limit."""

    def draw(key: Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit, out_sharding=out_sharding)

    return draw


class Matrix(nn.Module):
    """The weights of a product that is computed elsewhere: `kernel` [I, O], and `bias` [O] if it has one."""

    inputs: int
    outputs: int
    kernel_init: Any
    use_bias: bool = False
    bias_init: Any = None  # None: that of the kernel

    def setup(self) -> None:
        shape, draw = (self.inputs, self.outputs), self.kernel_init
        self.kernel = self.param("kernel", partitioned(draw, "embed", "embed_out"), shape, jnp.float32)
        if self.use_bias:
            bias = partitioned(self.bias_init or draw, "embed_out")
            self.bias = self.param("bias", bias, (self.outputs,), jnp.float32)

    def __call__(self) -> Array:
        """Return the kernel."""
        return self.kernel


class CellWeights(nn.Module):
    """The weights of a cell, drawn within ±1/sqrt(E) as PyTorch does.

    Attributes:
        cell: one of `GATES`.
        inputs: size of its inputs, I.
        width: size of its state, E.
    """

    cell: str
    inputs: int
    width: int

    def setup(self) -> None:
        draw, size = uniform(self.width**-0.5), GATES[self.cell] * self.width
        self.input = Matrix(self.inputs, size, draw, use_bias=True)
        self.state = Matrix(self.width, size, draw, use_bias=True)

    def __call__(self) -> dict[str, Array]:
        """Return the weights by name."""
        return {
            "input_kernel": self.input.kernel,
            "state_kernel": self.state.kernel,
            "input_bias": self.input.bias,
            "state_bias": self.state.bias,
        }


def _cell_step(cell: str, product: Product, state: State, x: Any, state_bias: Array) -> tuple[State, State]:
    given, starts = x
    state = restart(starts, jax.tree.map(jnp.zeros_like, state), state)
    state = advance(cell, product, state, given, state_bias)
    return state, state


_STEPS = {cell: partial(_cell_step, cell) for cell in GATES}


def read_rows(
    cell: str, weights: Mapping[str, Array], inputs: Array, segment_ids: Array, *, reverse: bool, dtype: str
) -> State:
    """Read rows in one direction, from a state of zeros at the start of every segment.

    Args:
        cell: one of `GATES`.
        weights: those of `CellWeights`.
        inputs: [B, L, I].
        segment_ids: [B, L] int32.
        reverse: read every segment from its last token to its first.
        dtype: data type of the products.

    Returns:
        the state after each token, each [B, L, E] float32
    """
    given = matmul(jnp.moveaxis(inputs, 1, 0), weights["input_kernel"], 0, dtype, "float32")
    given = driven(cell, given, weights["input_bias"], weights["state_bias"])
    starts = boundaries(segment_ids, reverse=reverse).T
    kernel = weights["state_kernel"]
    zeros = jnp.zeros((inputs.shape[0], kernel.shape[0]), jnp.float32)
    carry = (zeros, zeros) if cell == "lstm" else (zeros,)
    own = state_weights(cell, kernel)
    _, states = loop(_STEPS[cell], own, carry, (given, starts), weights["state_bias"], reverse, dtype)
    return tuple(jnp.moveaxis(state, 0, 1) for state in states)


def cell_entries(cell: str, name: str, suffix: str, path: tuple[str, ...], inputs: int, width: int) -> Iterator[Entry]:
    """Yield the entries of a `CellWeights` at `path`, as `torch.nn.LSTM` and `torch.nn.GRU` name and store them."""
    size = GATES[cell] * width
    for stored, own, rows in (("ih", "input", inputs), ("hh", "state", width)):
        yield Entry(f"{name}.weight_{stored}_{suffix}", (*path, own, "kernel"), Transposed((rows,), (size,)))
        yield Entry(f"{name}.bias_{stored}_{suffix}", (*path, own, "bias"), same(size))

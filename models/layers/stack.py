"""A Transformer's stack of N layers: all alike, of several alternating kinds, or one layer shared N times.

Parameters of all kinds of layers are stacked along a first axis "layers" of size N, so that sharding, layer-wise
learning rates and checkpoint tables find a layer by its number. Letters for shapes are the folder's.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from .attention import Attention
from .segments import ByExample, gather_positions, rows_at

Kind = Mapping[str, Any]


def run_layers(
    block: nn.Module,
    hidden: Array,
    *broadcast: Any,
    count: int,
    scan: bool,
    remat: bool,
    deterministic: bool,
    kinds: Sequence[Kind] | None = None,
    shared: bool = False,
    every_layer: bool = False,
    last_positions: Array | None = None,
) -> tuple[Array, Array | None]:
    """Apply `count` layers, each to the output of the previous one.

    Args:
        block: one layer, called as `block(hidden, *broadcast, deterministic=deterministic)`.
        hidden: [B, L, E], input of the first layer.
        broadcast: arguments that all layers get.
        count: number of layers, N.
        scan: compile one layer and loop over it, so that compile time does not grow with N; else write out all N, which
            lets the compiler fuse over layers. Parameters, numbers and dropout are the same.
        remat: recompute a layer's inner values in the backward pass instead of keeping them.
        deterministic: disable dropout.
        kinds: for each layer, its own extra arguments, such as `{"window": (64, 64)}`; they must be known when tracing.
            All kinds have the same parameters, which are initialised as for the last layer's kind. The scan covers
            whole periods of kinds; layers before and after them are unrolled. None if all layers are alike.
        shared: whether all layers share one set of parameters, which is not stacked (ALBERT).
        every_layer: also return the output of each layer.
        last_positions: [B, X] int32, the only tokens that the last layer computes; None for all of them. The results
            are the same, except for the dropout mask. The layers must meet the conditions of `_call_at`.

    Returns:
        (the last layer's output [B, L, E] or [B, X, E], all layers' outputs [N, B, L, E] or None)

    Raises:
        ValueError: arguments are mutually exclusive, or the number of kinds is not the number of layers.
    """
    # New parameters are initialised for the whole stack.
    positions = None if block.is_initializing() else last_positions
    if positions is not None and every_layer:
        raise ValueError("run_layers: every_layer and last_positions exclude each other")
    if kinds is not None:
        if shared:
            raise ValueError("run_layers: kinds and shared exclude each other")
        if len(kinds) != count:
            raise ValueError(f"run_layers: expected {count} kinds, one for each layer, found {len(kinds)}")
        if not block.is_initializing():
            mode = {"scan": scan, "remat": remat, "deterministic": deterministic}
            return _run_kinds(block, hidden, broadcast, kinds, every_layer, positions, **mode)
    if shared and block.is_initializing():
        return block(hidden, *broadcast, deterministic=deterministic), None
    drawn = {} if kinds is None else kinds[-1]

    def layer(block: nn.Module, hidden: Array, broadcast: tuple[Any, ...]) -> tuple[Array, Array | None]:
        hidden = block(hidden, *broadcast, **drawn, deterministic=deterministic)
        return hidden, hidden if every_layer else None

    body = nn.remat(layer, prevent_cse=not scan) if remat else layer
    scanned = count if positions is None else count - 1
    stacked = nn.scan(
        body,
        variable_axes={} if shared else {"params": 0},
        variable_broadcast="params" if shared else False,
        split_rngs={"params": not shared, "dropout": True},
        in_axes=nn.broadcast,  # type: ignore[arg-type]  (annotated as int, documented as this)
        length=scanned,
        unroll=1 if scan else max(1, scanned),
        metadata_params={nn.PARTITION_NAME: "layers"},
        check_constancy_invariants=False,  # a second trace would find nothing: no variable changes
    )
    if positions is None:
        return stacked(block, hidden, broadcast)

    def last_layer(block: nn.Module, hidden: Array, broadcast: tuple[Any, ...]) -> Array:
        return _call_at(positions, block, hidden, broadcast, {"deterministic": deterministic})

    def of_layers(chosen: Any) -> Callable[[Any], Any]:
        return lambda stack: stack if shared else jax.tree.map(lambda parameter: parameter[chosen], stack)

    if scanned:
        hidden, _ = nn.map_variables(stacked, "params", of_layers(slice(scanned)))(block, hidden, broadcast)
    return nn.map_variables(last_layer, "params", of_layers(scanned))(block, hidden, broadcast), None


def _run_kinds(
    block: nn.Module,
    hidden: Array,
    broadcast: tuple[Any, ...],
    kinds: Sequence[Kind],
    every_layer: bool,
    last_positions: Array | None,
    *,
    scan: bool,
    remat: bool,
    deterministic: bool,
) -> tuple[Array, Array | None]:
    """Run layers of several kinds with existing parameters.

    Flax's own scan compiles one kind of call, and calls that share a module share its dropout. So each layer is applied
    separately here, with its slice of the parameters and its own key.
    """
    count = len(kinds)
    keys = None
    if not deterministic and block.has_rng("dropout"):
        keys = jax.random.split(block.make_rng("dropout"), count)
    alone = block.clone(parent=None)

    def layer(kind: Kind, positions: Array | None, hidden: Array, params: Any, key: Array | None) -> Array:
        more = {**kind, "deterministic": deterministic}

        def call(block: Any) -> Array:
            if positions is None:
                return block(hidden, *broadcast, **more)
            return _call_at(positions, block, hidden, broadcast, more)

        return nn.apply(call, alone)({"params": params}, rngs={} if key is None else {"dropout": key})

    def checkpointed(kind: Kind, *, in_scan: bool) -> Callable[..., Array]:
        plain = partial(layer, kind, None)
        return jax.checkpoint(plain, prevent_cse=not in_scan) if remat else plain

    def one_round(hidden: Array, of_period: tuple[Any, Array | None]) -> tuple[Array, Array | None]:
        given = []
        for number in range(period):
            hidden = checkpointed(kinds[first + number], in_scan=True)(hidden, *_at(number, of_period))
            given.append(hidden)
        return hidden, jnp.stack(given) if every_layer else None

    end = count if last_positions is None else count - 1
    first, period, rounds = _rounds(kinds[:end]) if scan else (end, 1, 0)
    after = first + period * rounds
    sizes = [*[1] * first, *([after - first] if rounds else []), *[1] * (count - after)]
    number = 0
    outputs: list[Array] = []
    for size, params in zip(sizes, _cut(nn.unbox(block.variables["params"]), sizes), strict=True):
        if rounds and number == first:
            part = params, None if keys is None else keys[first:after]
            in_rounds = jax.tree.map(lambda x: x.reshape(rounds, period, *x.shape[1:]), part)
            hidden, given = jax.lax.scan(one_round, hidden, in_rounds)
            outputs.append(hidden[None] if given is None else given.reshape(size, *hidden.shape))
        else:
            own = _at(0, params), None if keys is None else keys[number]
            if number < end:
                hidden = checkpointed(kinds[number], in_scan=False)(hidden, *own)
            else:
                hidden = layer(kinds[number], last_positions, hidden, *own)
            outputs.append(hidden[None])
        number += size
    return hidden, jnp.concatenate(outputs) if every_layer else None


def _at(number: int, layers: Any) -> Any:
    """Return one layer of a tree of stacks."""
    return jax.tree.map(lambda stack: stack[number], layers)


def _cut(stacks: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut a tree of stacks into trees of fewer layers each.

    Its gradient is one concatenation; that of one index per layer would be a sum of N whole stacks.
    """
    leaves, tree = jax.tree.flatten(stacks)
    return [tree.unflatten(parts) for parts in zip(*(jax.lax.split(leaf, sizes) for leaf in leaves), strict=True)]


def _rounds(kinds: Sequence[Kind]) -> tuple[int, int, int]:
    """Return (first layer, layers per period, rounds) of the scan that leaves the fewest layers to compile."""
    count = len(kinds)
    found = [(count, 1, 0)]
    for first in range(count):
        for period in range(1, count - first):
            length = period
            while first + length < count and kinds[first + length] == kinds[first + length - period]:
                length += 1
            if length >= 2 * period:
                found.append((first, period, length // period))
    return min(found, key=lambda choice: count - choice[1] * max(0, choice[2] - 1))


def _call_at(positions: Array, block: Any, hidden: Array, broadcast: tuple[Any, ...], more: Kind) -> Array:
    """Compute one layer's outputs [B, X, E] only at some positions [B, X] of its input [B, L, E].

    The layer needs no support for this: it is called twice. The first call, with all tokens, records the input of its
    self-attention (the layer's input, or a norm of it); nothing else of that call is used, so the compiler removes the
    rest. The second call, with only the tokens at `positions`, lets self-attention read the recorded input.

    Raises:
        NotImplementedError: the layer does not begin with its only self-attention, or its attention does not support
            `query_positions`.
    """
    shown: list[dict[str, Any]] = []  # arguments of self-attention

    def self_attention(kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> bool:
        called = isinstance(context.module, Attention) and context.method_name == "__call__"
        return called and kwargs.get("memory") is None

    def show(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if self_attention(kwargs, context):
            shown.append(inspect.signature(context.orig_method).bind(*args, **kwargs).arguments)
        return next_call(*args, **kwargs)

    def read(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if not self_attention(kwargs, context):
            return next_call(*args, **kwargs)
        bound = inspect.signature(context.orig_method).bind(*args, **kwargs)
        bound.arguments |= {"memory": shown[0]["hidden"], "rows": shown[0]["rows"], "query_positions": positions}
        return next_call(*bound.args, **bound.kwargs)

    with nn.intercept_methods(show):
        block(hidden, *broadcast, **{**more, "deterministic": True})
    if len(shown) != 1:
        raise NotImplementedError(f"a layer at some positions: expected one self-attention, found {len(shown)}")
    own = jax.tree.map(
        lambda part: rows_at(part, positions) if isinstance(part, ByExample) else part,
        broadcast,
        is_leaf=lambda part: isinstance(part, ByExample),
    )
    with nn.intercept_methods(read):
        return block(gather_positions(hidden, positions), *own, **more)

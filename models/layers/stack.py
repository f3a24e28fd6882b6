"""A Transformer's stack of N layers: all alike, of several alternating kinds, or with shared parameters.

Parameters of all kinds of layers are stacked along a first axis "layers", so that sharding, layer-wise learning rates
and checkpoint tables find a layer by its number. Its size is N, or the number of sets of parameters that the N layers
share. Letters for shapes are the folder's.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ...kernels.split import along_rows
from .attention import Attention
from .segments import ByExample, gather_positions, rows_at

LayerKind = Mapping[str, Any]


def run_layers(
    block: nn.Module,
    hidden: Array,
    *broadcast: Any,
    count: int,
    scan: bool,
    remat: bool,
    deterministic: bool,
    kinds: Sequence[LayerKind] | None = None,
    sets: Sequence[int] | None = None,
    every_layer: bool = False,
    last_positions: Array | None = None,
    each: Any = None,
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
            All kinds have the same parameters, which are initialised as for the last layer's kind. Scans cover whole
            periods of kinds; layers between them are unrolled. None if all layers are alike.
        sets: for each layer, the number of the set of parameters that it uses, from 0 (ALBERT's layers share them). The
            sets are stacked as layers are. None if each layer has its own.
        every_layer: also return the output of each layer.
        last_positions: [B, X] int32, the only tokens that the last layer computes; None for all of them. The results
            are the same, except for the dropout mask. The layers must meet the conditions of `_call_at`.
        each: a tree of arrays [N, ...], of which each layer gets its own part after `broadcast`. Not together with
            `kinds`, `sets` or `last_positions`.

    Returns:
        (the last layer's output [B, L, E] or [B, X, E], all layers' outputs [N, B, L, E] or None)

    Raises:
        ValueError: arguments are mutually exclusive, or the number of kinds or sets is not the number of layers.
    """
    hidden = along_rows(hidden)
    # New parameters are initialised for the whole stack.
    positions = None if block.is_initializing() else last_positions
    if positions is not None and every_layer:
        raise ValueError("run_layers: every_layer and last_positions exclude each other")
    if each is not None and (positions is not None or kinds is not None or sets is not None):
        raise ValueError("run_layers: each excludes kinds, sets and last_positions")
    for name, given in (("kinds", kinds), ("sets", sets)):
        if given is not None and len(given) != count:
            raise ValueError(f"run_layers: expected {count} {name}, one for each layer, found {len(given)}")
    if (kinds is not None or sets is not None) and not block.is_initializing():
        mode = {"scan": scan, "remat": remat, "deterministic": deterministic}
        kinds = [{}] * count if kinds is None else kinds
        return _run_apart(block, hidden, broadcast, kinds, sets, every_layer, positions, **mode)
    drawn = {} if kinds is None else kinds[-1]

    def layer(block: nn.Module, hidden: Array, broadcast: tuple[Any, ...], own: Any) -> tuple[Array, Array | None]:
        hidden = along_rows(block(hidden, *broadcast, *own, **drawn, deterministic=deterministic))
        return hidden, hidden if every_layer else None

    stacked = count if sets is None else max(sets) + 1
    scanned = stacked if positions is None else stacked - 1
    body = nn.remat(layer, prevent_cse=not scan) if remat else layer
    run = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0),  # type: ignore[arg-type]  (annotated as int, documented as this)
        length=scanned,
        unroll=1 if scan else max(1, scanned),
        metadata_params={nn.PARTITION_NAME: "layers"},
        check_constancy_invariants=False,  # a second trace would find nothing: no variable changes
    )
    each = () if each is None else (each,)
    if positions is None:
        return run(block, hidden, broadcast, each)

    def last_layer(block: nn.Module, hidden: Array, broadcast: tuple[Any, ...]) -> Array:
        return _call_at(positions, block, hidden, broadcast, {"deterministic": deterministic})

    def of_layers(chosen: Any) -> Callable[[Any], Any]:
        return lambda stack: jax.tree.map(lambda parameter: parameter[chosen], stack)

    if scanned:
        hidden, _ = nn.map_variables(run, "params", of_layers(slice(scanned)))(block, hidden, broadcast, each)
    return nn.map_variables(last_layer, "params", of_layers(scanned))(block, hidden, broadcast), None


def _run_apart(
    block: nn.Module,
    hidden: Array,
    broadcast: tuple[Any, ...],
    kinds: Sequence[LayerKind],
    sets: Sequence[int] | None,
    every_layer: bool,
    last_positions: Array | None,
    *,
    scan: bool,
    remat: bool,
    deterministic: bool,
) -> tuple[Array, Array | None]:
    """Run layers of several kinds, or with shared parameters, with existing parameters.

    Flax's own scan compiles one kind of call, and calls that share a module share its dropout. So each layer is applied
    separately here, with its set of parameters and its own key.
    """
    count = len(kinds)
    keys = None
    if not deterministic and block.has_rng("dropout"):
        keys = jax.random.split(block.make_rng("dropout"), count)
    alone = block.clone(parent=None)

    def layer(kind: LayerKind, positions: Array | None, hidden: Array, params: Any, key: Array | None) -> Array:
        more = {**kind, "deterministic": deterministic}

        def call(block: Any) -> Array:
            if positions is None:
                return along_rows(block(hidden, *broadcast, **more))
            return _call_at(positions, block, hidden, broadcast, more)

        return nn.apply(call, alone)({"params": params}, rngs={} if key is None else {"dropout": key})

    def checkpointed(kind: LayerKind, *, in_scan: bool) -> Callable[..., Array]:
        plain = partial(layer, kind, None)
        return jax.checkpoint(plain, prevent_cse=not in_scan) if remat else plain

    end = count if last_positions is None else count - 1
    alike = [(kind, None if sets is None else sets[number]) for number, kind in enumerate(kinds[:end])]
    parts = _parts(alike) if scan else [(number, 1, 1) for number in range(end)]
    parts = parts if end == count else [*parts, (end, 1, 1)]
    stacks = nn.unbox(block.variables["params"])
    sizes = [period * rounds for _, period, rounds in parts] if sets is None else [1] * (max(sets) + 1)
    cut = _cut(stacks, sizes)
    outputs: list[Array] = []
    for number, (first, period, rounds) in enumerate(parts):
        chosen = None if keys is None else keys[first : first + period * rounds]
        if rounds == 1:
            params = _at(0, cut[number if sets is None else sets[first]])
            call = checkpointed(kinds[first], in_scan=False)
            if first == end:
                call = partial(layer, kinds[first], last_positions)
            hidden = call(hidden, params, None if chosen is None else chosen[0])
            outputs.append(hidden[None])
            continue

        def one_round(
            hidden: Array, of_round: tuple[Any, Array | None], first: int = first, period: int = period
        ) -> tuple[Array, Array | None]:
            given = []
            for number in range(period):
                stack, keys = of_round
                own = _at(number, stack) if sets is None else _at(0, cut[sets[first + number]])
                call = checkpointed(kinds[first + number], in_scan=True)
                hidden = call(hidden, own, None if keys is None else keys[number])
                given.append(hidden)
            return hidden, jnp.stack(given) if every_layer else None

        scanned = (cut[number] if sets is None else None), chosen
        in_rounds = jax.tree.map(lambda x, shape=(rounds, period): x.reshape(*shape, *x.shape[1:]), scanned)
        hidden, given = jax.lax.scan(one_round, hidden, in_rounds, length=rounds)
        if given is not None:
            outputs.append(given.reshape(period * rounds, *hidden.shape))
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


def _parts(layers: Sequence[Any]) -> list[tuple[int, int, int]]:
    """Divide layers into scans and single layers: (first layer, layers per period, rounds) of each, in order."""
    first, period, rounds = _rounds(layers)
    if rounds == 0:
        return [(number, 1, 1) for number in range(len(layers))]
    after = first + period * rounds
    later = [(after + first, period, rounds) for first, period, rounds in _parts(layers[after:])]
    return [*_parts(layers[:first]), (first, period, rounds), *later]


def _rounds(layers: Sequence[Any]) -> tuple[int, int, int]:
    """Return (first layer, layers per period, rounds) of the scan that leaves the fewest layers to compile."""
    count = len(layers)
    found = [(count, 1, 0)]
    for first in range(count):
        for period in range(1, count - first):
            length = period
            while first + length < count and layers[first + length] == layers[first + length - period]:
                length += 1
            if length >= 2 * period:
                found.append((first, period, length // period))
    return min(found, key=lambda choice: count - choice[1] * max(0, choice[2] - 1))


def _call_at(positions: Array, block: Any, hidden: Array, broadcast: tuple[Any, ...], more: LayerKind) -> Array:
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

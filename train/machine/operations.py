"""Count the operations of a traced step, over all devices: those of its matrix products and convolutions."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core

AGAIN = 2 / 3
"""Share of a recomputed part's operations that it would have anyway: two backward products for each forward one."""


def operations(jaxpr: Any) -> float:
    """Count the operations that the model needs for one step, without those of recomputing (`--remat`).

    Of a step that recomputes, the count is a lower bound: a recomputed part is taken to be its whole forward pass, of
    which a layer's last products may not be needed again. Of T5, 5 % are missing. A plan counts the step without.

    Args:
        jaxpr: the traced step. Loops count as often as they run; of branches, the longest one.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = [operations(part) for part in _inner(params)]
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "cond":
            total += max(inner, default=0.0)
        elif name == "pallas_call":
            total += sum(inner) * math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
        else:
            times = params.get("length", 1) if name == "scan" else 1
            if name == "shard_map":
                axes = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]  # JAX 0.12, 0.11
                times = math.prod(params["mesh"].shape[axis] for axis in axes)
            again = AGAIN if params.get("differentiated") else 1.0
            total += sum(inner) * times * again
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(part, "jaxpr", part)  # of a closed one
            if isinstance(jaxpr, core.Jaxpr):
                yield jaxpr


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs

"""Compiling programs that run once, such as those that draw a model's parameters."""

from collections.abc import Callable
from typing import Any

import jax


def jit_once(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return `jax.jit(function, **options)`, compiled on CPUs without the passes that only repay many runs.

    Drawing the parameters of a small model takes XLA some 20 s of processor time to compile with all of LLVM's passes,
    4 s with the first of its levels, and a fraction of a second to run; the numbers are the same.
    """
    if jax.default_backend() == "cpu" and not jax.config.read("jax_disable_most_optimizations"):
        options["compiler_options"] = {"xla_backend_optimization_level": 1}
    return jax.jit(function, **options)

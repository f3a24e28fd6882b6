"""Attention kernels: one function with several equivalent backends, its biases, and the hash behind dropout.

Importing this package imports nothing heavy; JAX comes with the first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends import BACKENDS
    from .bias import AlibiBias, Bias, DenseBias, DistanceKeys, RelativeBias, relative_position_bucket, toeplitz_row
    from .dispatch import attention
    from .hash import hash_dropout, row_seeds
    from .split import splitting
    from .weights import attention_weights

_MODULES = {
    "BACKENDS": ".backends",
    "AlibiBias": ".bias",
    "Bias": ".bias",
    "DenseBias": ".bias",
    "DistanceKeys": ".bias",
    "RelativeBias": ".bias",
    "attention": ".dispatch",
    "attention_weights": ".weights",
    "hash_dropout": ".hash",
    "relative_position_bucket": ".bias",
    "row_seeds": ".hash",
    "splitting": ".split",
    "toeplitz_row": ".bias",
}

__all__ = [
    "BACKENDS",
    "AlibiBias",
    "Bias",
    "DenseBias",
    "DistanceKeys",
    "RelativeBias",
    "attention",
    "attention_weights",
    "hash_dropout",
    "relative_position_bucket",
    "row_seeds",
    "splitting",
    "toeplitz_row",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __package__), name)

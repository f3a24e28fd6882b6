"""Attention kernels: one function with several equivalent backends, its biases, and the hash behind dropout."""

from .attention import attention
from .backends import BACKENDS
from .bias import AlibiBias, Bias, DenseBias, RelativeBias, relative_position_bucket, toeplitz_row
from .hash import hash_dropout, row_seeds
from .split import splitting
from .weights import attention_weights

__all__ = [
    "BACKENDS",
    "AlibiBias",
    "Bias",
    "DenseBias",
    "RelativeBias",
    "attention",
    "attention_weights",
    "hash_dropout",
    "relative_position_bucket",
    "row_seeds",
    "splitting",
    "toeplitz_row",
]

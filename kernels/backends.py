"""The backends of attention by name, and what each of them offers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Protocol, cast

from jax import Array

from .call import Call


class Backend(Protocol):
    """Interface of a backend's module."""

    def supports(self, call: Call) -> str | None:
        """Return None, or the reason why this backend does not support the call on the default device."""
        ...

    def run(self, call: Call) -> tuple[Array, Array]:
        """Return the output and lse, as defined by `attention`."""
        ...


class _Backends(Mapping[str, Backend]):
    """Backends by name, imported on first use, since importing Pallas takes a second."""

    def __init__(self, **modules: str):
        self._modules = modules

    def __getitem__(self, name: str) -> Backend:
        return cast(Backend, importlib.import_module(self._modules[name], __package__))

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


# Fastest first: `implementation=None` selects the first that supports the call, unless another was measured as faster.
BACKENDS: Mapping[str, Backend] = _Backends(hopper=".hopper.backend", tpu=".tpu.backend", cudnn=".cudnn", xla=".xla")

# Compiled for their chips and tested in their interpreters: chosen by default only for calls that are on record as
# right on this chip, or that agree with plain JAX when compared there (selfcheck.py).
NEEDS_PROOF = frozenset({"hopper", "tpu"})

# Written in Pallas. On a CPU, context managers in their modules interpret them or compile them for a chip.
PALLAS = frozenset({"hopper", "tpu"})

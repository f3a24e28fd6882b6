"""The backends of attention by name, and what each of them offers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Protocol, cast

from jax import Array

from .call import Call


class Backend(Protocol):
    """What the module of a backend offers."""

    def supports(self, call: Call) -> str | None:
        """None, or the reason why this backend cannot do this call on the default device."""
        ...

    def run(self, call: Call) -> tuple[Array, Array]:
        """The output and lse, as `attention` says."""
        ...


class _Backends(Mapping[str, Backend]):
    """The modules of these names; Pallas, which takes a second to import, comes with the first use of its backends."""

    def __init__(self, **modules: str):
        self._modules = modules

    def __getitem__(self, name: str) -> Backend:
        return cast(Backend, importlib.import_module(self._modules[name], __package__))

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


# Fastest first: `implementation=None` takes the first that supports the call.
BACKENDS: Mapping[str, Backend] = _Backends(hopper=".hopper.backend", tpu=".tpu.backend", cudnn=".cudnn", xla=".xla")

# Compiled for their chips and held to the reference in their interpreters, but not yet run on a chip: taken unasked
# only where they give the reference's numbers on the device that is here (selfcheck.py).
UNPROVEN = frozenset({"hopper", "tpu"})

# Written in Pallas: on a CPU they are interpreted, or compiled for a chip, by context managers of their own modules.
PALLAS = frozenset({"hopper", "tpu"})

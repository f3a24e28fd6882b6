"""The platform that programs are made for: that of the devices, or another one for which they are only compiled."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target_platform", default=None)


def platform() -> str:
    """Return "cpu", "gpu" or "tpu"."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Let functions traced within make the choices of another platform, "gpu" or "tpu", to be compiled ahead of time.

    Attention kernels that need such a chip also ask for `compiling()` of their module.
    """
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)

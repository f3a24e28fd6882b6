"""Errors for the user; the command line prints their message without a traceback."""

import math
from collections.abc import Iterable
from typing import Any

MOST_SEED = (1 << 32) - 1
"""Largest random seed: JAX's keys are made of 32 bits."""


class RunError(ValueError):
    """Raised if a run cannot start or continue as asked."""


def check_text(name: str, texts: Iterable[str]) -> None:
    """Check texts of the command line, where Python passes bytes that are not UTF-8 as halves of surrogate pairs.

    Raises:
        RunError: a text has such a byte.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RunError(f"{name}: not UTF-8: {text!a}.") from None


def check_setting(
    config: Any,
    name: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Check the bounds of a number that a flag sets; None is not checked.

    Args:
        config: holds the number as its attribute `name`.
        name: of the flag, with underscores.
        least: the number must be at least this.
        above: the number must be above this.
        most: the number must be at most this.
        below: the number must be below this.

    Raises:
        RunError: `--steps is 0; it must be at least 1.`
    """
    value = getattr(config, name)
    if value is None:
        return
    bounds = (
        (least, "at least", lambda bound: value >= bound),
        (above, "above", lambda bound: value > bound),
        (most, "at most", lambda bound: value <= bound),
        (below, "below", lambda bound: value < bound),
    )
    if isinstance(value, float) and math.isinf(value):
        raise RunError(f"--{name.replace('_', '-')} is {value}; it must be finite.")
    given = [(bound, words, holds) for bound, words, holds in bounds if bound is not None]
    if not all(holds(bound) for bound, _, holds in given):  # nothing holds of NaN
        wanted = " and ".join(f"{words} {bound}" for bound, words, _ in given)
        raise RunError(f"--{name.replace('_', '-')} is {value}; it must be {wanted}.")

"""Learning-rate schedules: warmup, then a decay, a plateau, or both."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..config import OptimConfig
from ..errors import RunError

WSD_DECAY = 0.1  # default length of the decay of warmup-stable-decay, a fraction of the steps after the warmup

T5_STEPS = 10_000  # of T5's schedule that have a constant rate


def schedule(config: OptimConfig, phases: list[tuple[int, float | None]]) -> optax.Schedule:
    """Make the learning-rate schedule.

    Args:
        config: peak, warmup, schedule and cooldown.
        phases: (steps, peak) of each phase. A phase with its own peak has its own warmup and decay, as LAMB's second
            phase (You et al. 2019, 4.1); one with None continues the schedule of the previous phase.

    Returns:
        step (int, from 0) -> learning rate; the first update already has a rate above zero.
    """
    courses: list[list[float]] = []  # [steps, peak] of each warmup and decay
    for steps, peak in phases:
        if peak is not None or not courses:
            courses.append([0, config.learning_rate if peak is None else peak])
        courses[-1][0] += steps
    pieces = [_course(config, int(steps), peak) for steps, peak in courses]
    ends = [0]
    for steps, _ in courses:
        ends.append(ends[-1] + int(steps))
    return optax.schedules.join_schedules(pieces, ends[1:-1])


def warmup_steps(config: OptimConfig, steps: int) -> int:
    """Return the number of warmup steps of `steps` steps."""
    return round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)


def _course(config: OptimConfig, steps: int, peak: float) -> optax.Schedule:
    warmup = warmup_steps(config, steps)
    length = config.cooldown or (WSD_DECAY if config.schedule == "wsd" else 0.0)
    cooldown = round(length * max(0, steps - warmup)) if length < 1 else int(length)
    if warmup + cooldown > steps:
        both, flags = f"{warmup} steps", "--warmup"
        if cooldown:
            both, flags = f"{both} and cooldown {cooldown}", "--warmup or --cooldown"
        raise RunError(f"Warmup takes {both}, but the phase has {steps}. Lower {flags}.")
    rest = max(1, steps - warmup)

    def rate(count: Any) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        done = jnp.clip((step - warmup) / rest, 0.0, 1.0)
        down = {
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
            "constant": jnp.ones_like(done),
            "inverse_sqrt": jnp.sqrt(max(1, warmup) / jnp.maximum(step + 1, warmup)),
            "t5": jnp.sqrt(T5_STEPS / jnp.maximum(step + 1, T5_STEPS)),
            "wsd": jnp.ones_like(done),
        }
        left = jnp.clip((steps - step) / max(1, cooldown), 0.0, 1.0) if cooldown else jnp.ones_like(done)
        end = 1.0 - jnp.sqrt(1.0 - left) if config.schedule == "wsd" else left
        return peak * end * jnp.where(step < warmup, (step + 1) / max(1, warmup), down[config.schedule])

    return rate

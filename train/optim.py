"""Optimisers and schedules: AdamW and LAMB with the masks of their papers, and warmup followed by decay.

Weight decay and LAMB's trust ratio apply to all parameters but biases and normalisation scales (Devlin et al. 2018,
A.2; You et al. 2019, 3.3 and the released code). The last part of a parameter's name decides, and a name in neither
list is an error, so that a new kind of parameter cannot be decayed by accident.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .config import OptimConfig
from .errors import RunError

DECAYED = frozenset({"kernel", "embedding", "lora_a", "lora_b"})
NOT_DECAYED = frozenset({"bias", "scale", "start", "transitions", "end"})  # the last three are a CRF's scores


def schedule(config: OptimConfig, phases: list[tuple[int, float | None]]) -> optax.Schedule:
    """Make the learning-rate schedule.

    Args:
        config: peak, warmup, decay and cooldown.
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
    cooldown = round(config.cooldown * max(0, steps - warmup)) if config.cooldown < 1 else int(config.cooldown)
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
        }
        left = jnp.clip((steps - step) / max(1, cooldown), 0.0, 1.0) if cooldown else 1.0
        return peak * left * jnp.where(step < warmup, (step + 1) / max(1, warmup), down[config.decay])

    return rate


def decay_mask(params: Any) -> Any:
    """Return True for every parameter that weight decay and the trust ratio apply to.

    Raises:
        ValueError: the last part of a parameter's name is in neither DECAYED nor NOT_DECAYED.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        name = str(getattr(path[-1], "key", path[-1]))
        if name not in DECAYED | NOT_DECAYED:
            raise ValueError(
                f"Parameter {jax.tree_util.keystr(path)}: no rule says whether {name!r} is decayed (train/optim.py)."
            )
        return name in DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def optimizer(
    config: OptimConfig, learning_rate: optax.Schedule, stacked: Any, scales: Any = None
) -> optax.GradientTransformation:
    """Build the update: clip, Adam moments, weight decay, trust ratio (LAMB), learning rate.

    Args:
        config: settings of the optimiser.
        learning_rate: schedule, by `schedule`.
        stacked: tree of bool like the parameters; True if the first axis is layers, which have separate trust ratios.
        scales: tree like the parameters, of factors of the learning rate, or None.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    steps = [
        clip,
        _adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    ]
    if config.optimizer == "lamb":
        steps.append(scale_by_layer_trust_ratio(stacked))
    if scales is not None:
        steps.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales)))
    steps.append(optax.scale_by_learning_rate(learning_rate))
    if config.ema:
        steps.append(running_mean(config.ema))
    return optax.chain(*steps)


def _adam(config: OptimConfig) -> optax.GradientTransformation:
    """Scale by Adam's moments; Optax raises a float to an integer power, which strict dtype promotion forbids."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return adam.update(updates, state, params)

    return optax.GradientTransformation(adam.init, update)


class RunningMean(NamedTuple):
    """State of `running_mean`: a tree like the parameters."""

    running_mean: Any


def running_mean(decay: float) -> optax.GradientTransformation:
    """Keep mean <- decay * mean + (1 - decay) * parameters after each update; must be last in a chain.

    `optax.tree.get(opt_state, "running_mean")` finds it. It starts at the first parameters.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, RunningMean]:
        mean = jax.tree.map(
            lambda mean, param, update: decay * mean + (1 - decay) * (param + update),
            state.running_mean,
            params,
            updates,
        )
        return updates, RunningMean(mean)

    return optax.GradientTransformation(lambda params: RunningMean(jax.tree.map(lambda leaf: leaf, params)), update)


def scale_by_layer_trust_ratio(stacked: Any) -> optax.GradientTransformation:
    """Scale by LAMB's ratio of norms ||w|| / ||update|| for each layer's tensor (You et al. 2019, algorithm 2).

    Layers that are stacked for a scan share one array; each slice has its own ratio. The ratio is one for biases and
    normalisation scales, and if the tensor or the update has norm zero.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(update: jax.Array, param: jax.Array, layered: bool, decays: bool) -> jax.Array:
            if not decays:
                return update
            axes = tuple(range(1 if layered else 0, param.ndim))
            weight_norm = jnp.sqrt(jnp.sum(jnp.square(param), axes, keepdims=True))
            update_norm = jnp.sqrt(jnp.sum(jnp.square(update), axes, keepdims=True))
            usual = (weight_norm > 0) & (update_norm > 0)
            return update * jnp.where(usual, weight_norm / jnp.where(usual, update_norm, 1.0), 1.0)

        return jax.tree.map(one, updates, params, stacked, decay_mask(params)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

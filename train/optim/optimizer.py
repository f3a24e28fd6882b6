"""Optimisers with the masks of their papers, each of which treats a stack of layers as it treats single ones.

Weight decay and LAMB's trust ratio apply to all parameters but biases and normalisation scales (Devlin et al. 2018,
A.2; You et al. 2019, 3.3 and the released code). The last part of a parameter's name decides, and a name in neither
list is an error, so that a new kind of parameter cannot be decayed by accident.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from ..config import OptimConfig
from ..errors import RunError
from .layout import Layout, for_each_matrix, layouts, mean_square
from .schedule import schedule

DECAYED = frozenset({"kernel", "embedding", "table", "lora_a", "lora_b"})  # "table" is T5's of relative positions
NOT_DECAYED = frozenset({"bias", "scale", "start", "transitions", "end"})  # the last three are a CRF's scores


EMBEDDINGS = frozenset({"embedding"})


def decay_mask(params: Any, embeddings: bool = True) -> Any:
    """Return True for every parameter that weight decay and the trust ratio apply to; embeddings are optional.

    Raises:
        ValueError: the last part of a parameter's name is in neither DECAYED nor NOT_DECAYED.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        name = str(getattr(path[-1], "key", path[-1]))
        if name not in DECAYED | NOT_DECAYED:
            raise ValueError(
                f"Parameter {jax.tree_util.keystr(path)}: no rule says whether {name!r} is decayed "
                "(train/optim/optimizer.py)."
            )
        return name in DECAYED and (embeddings or name not in EMBEDDINGS)

    return jax.tree_util.tree_map_with_path(decays, params)


def decayed_by(config: OptimConfig) -> Callable[[Any], Any]:
    """Return the function from parameters to whether weight decay applies to each."""
    return partial(decay_mask, embeddings=config.decay_embeddings)


def decay_strength(config: OptimConfig) -> float:
    """Return the factor of the weights that is added to the step, before the learning rate."""
    return config.weight_decay / config.learning_rate if config.independent_decay else config.weight_decay


def optimizer(
    config: OptimConfig, learning_rate: optax.Schedule, specs: Any, scales: Any = None
) -> optax.GradientTransformation:
    """Build the update: clip, the optimiser's own rule, weight decay, learning rate.

    Args:
        config: settings of the optimiser.
        learning_rate: schedule, by `schedule`.
        specs: tree of the parameters' logical PartitionSpecs, which say which axes are layers and which a matrix: each
            layer has its own trust ratio, RMS, factors or orthogonalisation, whether layers are stacked or not.
        scales: tree like the parameters, of factors of the learning rate, or None.
    """
    shapes = layouts(specs)
    decay = optax.add_decayed_weights(decay_strength(config), mask=decayed_by(config))
    rules: dict[str, Callable[[], list[optax.GradientTransformation]]] = {
        "adamw": lambda: [adam(config), decay],
        "lamb": lambda: [adam(config), decay, scale_by_layer_trust_ratio(shapes)],
        "stable-adamw": lambda: [stable_adam(config, shapes)],
        "adafactor": lambda: [adafactor(shapes), decay],
        "muon": lambda: [muon(config, shapes), decay],
        "sgd": lambda: [optax.trace(config.beta1), decay],
    }
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    steps = [clip, *rules[config.optimizer]()]
    if scales is not None:
        steps.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales)))
    steps.append(optax.scale_by_learning_rate(learning_rate))
    if config.ema:
        steps.append(running_mean(config.ema))
    return optax.chain(*steps)


def reference_optimizer(settings: Mapping[str, Any], where: str) -> optax.GradientTransformation:
    """Build the update of a parity fixture's trajectory.json.

    Args:
        settings: its settings, without the losses.
        where: the file, for messages.

    Raises:
        RunError: the reference was trained otherwise than this package trains.
    """
    fixed = {"optimizer": "AdamW", "decayed": "tensors of two axes or more, as stored"}
    numbers = ("steps", "learning_rate", "b1", "b2", "eps", "weight_decay", "clip_global_norm")
    if set(settings) != {*fixed, *numbers} or any(settings[name] != value for name, value in fixed.items()):
        expected = ", ".join([*(f"{name} {value!r}" for name, value in fixed.items()), *numbers])
        raise RunError(f"{where}: expected {expected}; found {dict(settings)}.")
    config = OptimConfig(
        learning_rate=settings["learning_rate"],
        warmup=0,
        schedule="constant",
        weight_decay=settings["weight_decay"],
        beta1=settings["b1"],
        beta2=settings["b2"],
        epsilon=settings["eps"],
        clip_norm=settings["clip_global_norm"],
    )
    return optimizer(config, schedule(config, [(settings["steps"], None)]), specs={})


# --- rules ------------------------------------------------------------------------------------------------------------


def _promoting(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Run a transformation under standard dtype promotion: Optax mixes floats and integers, which tests refuse."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return transform.update(updates, state, params)

    return optax.GradientTransformation(transform.init, update)


def bias_correction(beta: float, count: jax.Array) -> jax.Array:
    """Compute 1 - beta^count, float32, to its last digits.

    Optax subtracts the power from 1, which leaves an error of 1e-5 in the first step for a beta of 0.999: enough for
    losses to differ from the reference implementation's by more than 1e-4 after some steps.
    """
    return -jnp.expm1(count.astype(jnp.float32) * (math.log(beta) if beta else -math.inf))


def adam(config: OptimConfig) -> optax.GradientTransformation:
    """Scale by Adam's moments (Kingma and Ba 2014), with or without the correction of their bias."""
    beta1, beta2 = config.beta1, config.beta2

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = jax.tree.map(lambda m, g: (1 - beta1) * g + beta1 * m, state.mu, updates)
        nu = jax.tree.map(lambda v, g: (1 - beta2) * jnp.square(g) + beta2 * v, state.nu, updates)
        first = second = jnp.float32(1)
        if config.bias_correction:
            first, second = bias_correction(beta1, count), bias_correction(beta2, count)
        scaled = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + config.epsilon), mu, nu)
        return scaled, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def stable_adam(config: OptimConfig, shapes: Any) -> optax.GradientTransformation:
    """AdamW whose step is divided by max(1, RMS(g / sqrt(v))) of each layer's tensor.

    Wortsman et al. 2023, algorithm 2. The weight decay is part of it: the factor applies to the learning rate, and so
    to the decay too.
    """
    moments = adam(config)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        steps, state = moments.update(updates, state, params)
        correction = bias_correction(config.beta2, state.count)

        def one(
            step: jax.Array, gradient: jax.Array, second: jax.Array, param: jax.Array, layout: Layout, decays: bool
        ) -> jax.Array:
            spread = jnp.maximum(jnp.sqrt(second / correction), config.epsilon)
            rms = jnp.sqrt(mean_square(gradient / spread, layout))
            step = step + decay_strength(config) * param if decays else step
            return step / jnp.maximum(rms, 1.0)

        mask = decayed_by(config)(params)
        return jax.tree.map(one, steps, updates, state.nu, params, shapes, mask), state

    return optax.GradientTransformation(moments.init, update)


def adafactor(shapes: Any) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018, algorithms 4 and 5): no momentum, update clipping at an RMS of 1.

    Steps are relative to the parameters' RMS, at least 1e-3; second moments are factored where both sides of a matrix
    have 128 or more.
    """
    rule = optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms(min_scale=1e-3)
    )
    return for_each_matrix(_promoting(rule), shapes)


MUON_RMS = 0.2  # of an update's entries, as AdamW's usually are


def muon(config: OptimConfig, shapes: Any) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for linear maps between hidden states, Adam for everything else.

    The momentum of a layer's matrix, 0.95 with Nesterov's step, is made orthogonal, and scaled so that its entries have
    Adam's usual RMS (Liu et al. 2025, 2.2): both parts have one learning rate.
    """

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda _, layout: "muon" if layout.hidden else "adam", params, shapes)

    def numbers(params: Any) -> Any:
        def one(leaf: Any, layout: Layout) -> Any:
            if isinstance(leaf, optax.MaskedNode):
                return leaf
            assert layout.matrix is not None
            return optax.contrib.MuonDimensionNumbers(*layout.matrix)

        return jax.tree.map(one, params, shapes, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))

    def scaled(updates: Any, _: Any = None) -> Any:
        def one(leaf: jax.Array, dimensions: Any) -> jax.Array:
            longest = max(math.prod(leaf.shape[axis] for axis in side) for side in dimensions)
            return leaf * jnp.asarray(MUON_RMS * math.sqrt(longest), leaf.dtype)

        return jax.tree.map(one, updates, numbers(updates))

    orthogonal = _promoting(optax.contrib.scale_by_muon(weight_dimension_numbers=numbers))
    matrices = optax.chain(orthogonal, optax.stateless(scaled))
    return optax.partition({"muon": matrices, "adam": adam(config)}, labels)


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


def scale_by_layer_trust_ratio(shapes: Any) -> optax.GradientTransformation:
    """Scale by LAMB's ratio of norms ||w|| / ||update|| for each layer's tensor (You et al. 2019, algorithm 2).

    The ratio is one for biases and normalisation scales, and if the tensor or the update has norm zero.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(update: jax.Array, param: jax.Array, layout: Layout, decays: bool) -> jax.Array:
            if not decays:
                return update
            axes = layout.axes(param)
            weight_norm = jnp.sqrt(jnp.sum(jnp.square(param), axes, keepdims=True))
            update_norm = jnp.sqrt(jnp.sum(jnp.square(update), axes, keepdims=True))
            usual = (weight_norm > 0) & (update_norm > 0)
            return update * jnp.where(usual, weight_norm / jnp.where(usual, update_norm, 1.0), 1.0)

        return jax.tree.map(one, updates, params, shapes, decay_mask(params)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

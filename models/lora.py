"""LoRA: low-rank adapters on the linear maps of any model.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1: a map W gets a parallel branch,

    y = x·W + b + (alpha / rank) · drop(x)·A·B        A [inputs, rank], B [rank, outputs]

of which only A and B are trained; B is initialised to zero, so that training starts from the unchanged model. With
rank-stabilised scaling the factor is alpha / sqrt(rank) (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for
Fine-Tuning with LoRA").

An adapter is part of the parameter tree, as `lora_a` and `lora_b` next to the `kernel` that it adapts, stacked along a
first axis "layers" if the kernel is; an adapter whose factor is not that of all others has it as `lora_scale`, which is
never trained. All functions here take a tree and return a new one; none modifies a kernel:

    targets = lora_targets(model, ("query", "value"))
    params = add_lora(params, targets, config, key)
    with adapted(config): model.apply({"params": params}, ...)     # outside, the adapters are ignored
    merged, kept = merge_lora(params, config)                      # a plain tree, for the plain model
    params = unmerge_lora(merged, kept)                            # the original tree, bit for bit

`checkpoints.peft` saves and loads only the adapters, in peft's format.

Merging is exact: the kernel becomes the float32 nearest to W + (alpha / rank)·A·B, accumulated in float64. A rounded
sum cannot be undone by subtraction, so the original kernels are kept next to the merged tree.
"""

import inspect
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array

from .checkpoints.tables import Entry, Kernel, Params, flatten, merge
from .layers.dropout import drop, dropout_seed
from .layers.linear import Linear, matmul
from .layers.segments import row_numbers
from .registry import family_of_model

LORA_A, LORA_B, LORA_SCALE = "lora_a", "lora_b", "lora_scale"

ALIASES = {"output": "out", "feed-forward": "feed_forward"}
ALL = "all-linear"


class LoraError(ValueError):
    """Raised for adapters that cannot be created as requested."""


@dataclass(frozen=True)
class LoraConfig:
    """Settings of all adapters of a model."""

    rank: int = 8
    """Rank of the adapters, r."""
    alpha: float = 16.0
    """Numerator of the scale alpha / rank of an adapter's output."""
    dropout: float = 0.0
    """Dropout rate of the inputs of the adapters."""
    stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LoraError(f"LoRA: the rank is {self.rank}; it must be at least 1.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise LoraError(f"LoRA: alpha is {self.alpha}; it must be above 0.")
        if not 0 <= self.dropout < 1:
            raise LoraError(f"LoRA: the dropout is {self.dropout}; it must be at least 0 and below 1.")

    @property
    def scale(self) -> float:
        """Factor of an adapter's product."""
        return self.scale_of(self.rank, self.alpha)

    def scale_of(self, rank: int, alpha: float) -> float:
        """Return the factor of an adapter with a rank and an alpha of its own."""
        return alpha / self.divisor(rank)

    def divisor(self, rank: int) -> float:
        """Return the number that alpha is divided by."""
        return math.sqrt(rank) if self.stabilised else rank


class Target(NamedTuple):
    """A linear map that gets an adapter, or a stack of maps of which some layers do."""

    entry: Entry  # checkpoint-table entry of its kernel
    kernel: Kernel  # the entry's transform
    chosen: tuple[bool, ...] | None  # whether each layer of a stack gets an adapter; None without a stack

    @property
    def path(self) -> tuple[str, ...]:
        """Path in the parameter tree."""
        return self.entry.path[:-1]

    @property
    def name(self) -> str:
        """Name in a checkpoint; `{layer}` stands for the layer's number. Maps that are fused there share one."""
        return self.entry.name.removesuffix(".weight")

    @property
    def names(self) -> list[str]:
        """Names of the maps of all layers in a checkpoint, chosen or not."""
        return [name.removesuffix(".weight") for name in self.entry.names]


# --- which maps -------------------------------------------------------------------------------------------------------


def linear_maps(model: nn.Module) -> list[Target]:
    """Return every linear map of a model, in all of its layers."""
    family, _ = family_of_model(model)
    return [
        Target(entry, entry.transform, None if entry.numbers is None else (True,) * len(entry.numbers))
        for entry in family.checkpoint_table(model).entries
        if isinstance(entry.transform, Kernel)
    ]


def lora_targets(model: nn.Module, patterns: Sequence[str]) -> list[Target]:
    """Return the linear maps of a model's layers that match any of the patterns; poolers and heads are trained fully.

    Args:
        model: a model of this package.
        patterns: each is one of

            - a part of the path in the parameter tree: `query`, `key`, `value`, `output` (of the attention),
              `attention` (all four), `feed-forward` (both of its maps), or `inner` and `outer` separately;
            - the end of the name in a checkpoint, as in peft's target_modules: `attention.self.query`, `output.dense`,
              or `c_attn`, which is three maps in the tree;
            - a regular expression for the whole name in a checkpoint, as in peft: `.*layer\\.[0-3]\\..*query`. Only
              this can choose single layers;
            - `all-linear`.

    Raises:
        LoraError: a pattern matches nothing; the message lists the maps.
    """
    family, _ = family_of_model(model)
    maps = [target for target in linear_maps(model) if family.is_encoder_parameter((*target.path, "kernel"))]
    if not patterns:
        raise LoraError("LoRA: no targets." + _listed(maps))
    chosen: dict[tuple[str, ...], np.ndarray] = {}
    for pattern in patterns:
        found = False
        for target in maps:
            names = target.names
            hits = np.array([_matches(pattern, target.path, name) for name in names])
            chosen[target.path] = chosen.get(target.path, np.zeros(len(names), bool)) | hits
            found |= bool(hits.any())
        if not found:
            raise LoraError(f"LoRA: the target {pattern!r} is no linear map of this model." + _listed(maps))
    return [
        target._replace(chosen=None if target.chosen is None else tuple(chosen[target.path].tolist()))
        for target in maps
        if chosen[target.path].any()
    ]


def _matches(pattern: str, path: tuple[str, ...], name: str) -> bool:
    if pattern == ALL or ALIASES.get(pattern, pattern) in path or ends_with(name, pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise LoraError(f"LoRA: the target {pattern!r} is no name and no regular expression ({error}).") from None


def ends_with(name: str, pattern: str) -> bool:
    """Compare an entry of a list of target_modules with a module's name, as peft does."""
    return name == pattern or name.endswith(f".{pattern}")


def _listed(maps: Sequence[Target]) -> str:
    lines = "".join(f"\n  {'.'.join(m.path):<44} {m.name}" for m in maps)
    return (
        f" Known: query, key, value, output, attention, feed-forward, {ALL}, or a part of (left) or the end of or a"
        f" regular expression for (right) these names:{lines}"
    )


# --- the tree ---------------------------------------------------------------------------------------------------------


def add_lora(params: Params, targets: Sequence[Target], config: LoraConfig, key: Array) -> dict[str, Any]:
    """Add new adapters to a tree.

    A is initialised as in peft, uniformly within ±1/√inputs (Kaiming's rule with a = √5); B is zero. The random key of
    each adapter is derived from its name, so that it does not depend on the other adapters. In the layers of a stack
    that were not chosen, A is zero too: then neither gets a gradient, and the layer does not change.

    Args:
        params: arrays, or boxed arrays as returned by `Module.init`; the adapters are then boxed as well.
        targets: maps to adapt, from `lora_targets`.
        config: settings of the adapters.
        key: random key.

    Returns:
        a new tree, which shares the leaves of the old one.
    """
    leaves = dict(flatten(params))
    for target in targets:
        kernel = leaves[*target.path, "kernel"]
        stack = () if target.chosen is None else (len(target.chosen),)
        bound = 1 / math.sqrt(math.prod(target.kernel.inputs))
        draw = jax.random.fold_in(key, zlib.crc32("/".join(target.path).encode()))
        a = jax.random.uniform(draw, (*stack, *target.kernel.inputs, config.rank), jnp.float32, -bound, bound)
        if target.chosen is not None:
            a = a * np.array(target.chosen, np.float32).reshape(-1, *(1 for _ in target.kernel.inputs), 1)
        b = jnp.zeros((*stack, config.rank, *target.kernel.outputs), jnp.float32)
        if isinstance(kernel, nn.LogicallyPartitioned):
            names = kernel.names
            lead = len(stack) + len(target.kernel.inputs)
            a = nn.LogicallyPartitioned(a, (*names[:lead], None))
            b = nn.LogicallyPartitioned(b, (*names[: len(stack)], None, *names[lead:]))
        leaves |= {(*target.path, LORA_A): a, (*target.path, LORA_B): b}
    return unflatten_dict(leaves)


def is_lora(path: Sequence[str]) -> bool:
    """Tell whether the parameter at this path is trained as part of an adapter."""
    return path[-1] in (LORA_A, LORA_B)


def merge_lora(params: Params, config: LoraConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge the adapters into the kernels: the plain model then has the adapted model's outputs.

    Args:
        params: a tree with adapters, arrays on any device that this process can read.
        config: settings of the adapters.

    Returns:
        (the merged tree, without adapters; what `unmerge_lora` needs: the adapters and the original kernels). Leaves
        without adapters are the same objects.
    """
    merged: dict[tuple[str, ...], Any] = {}
    kept: dict[tuple[str, ...], Any] = {}
    leaves = dict(flatten(params))
    for path, leaf in leaves.items():
        a, b = (leaves.get((*path[:-1], name)) for name in (LORA_A, LORA_B))
        if path[-1] == "kernel" and a is not None and b is not None:
            merged[path] = _merged_kernel(leaf, a, b, leaves.get((*path[:-1], LORA_SCALE), config.scale))
            kept[path] = leaf
        elif is_lora(path) or path[-1] == LORA_SCALE:
            kept[path] = leaf
        else:
            merged[path] = leaf
    return unflatten_dict(merged), unflatten_dict(kept)


def unmerge_lora(merged: Params, kept: Params) -> dict[str, Any]:
    """Restore the tree with adapters, bit for bit, from the two results of `merge_lora`."""
    return merge(kept, merged)


def _merged_kernel(kernel: Any, a: Any, b: Any, scale: Any) -> np.ndarray:
    kernel, a, b = (np.asarray(array) for array in (kernel, a, b))
    rank = a.shape[-1]
    stacked = a.ndim + b.ndim - 2 > kernel.ndim  # then both have the axis of the layers
    lead = kernel.shape[:1] if stacked else ()
    wide_a = a.astype(np.float64).reshape(*lead, -1, rank)
    wide_b = b.astype(np.float64).reshape(*lead, rank, -1)
    factor = np.asarray(scale, np.float64).reshape(-1, *[1] * (kernel.ndim - 1)) if np.ndim(scale) else float(scale)
    return (kernel.astype(np.float64) + factor * (wide_a @ wide_b).reshape(kernel.shape)).astype(kernel.dtype)


# --- the model --------------------------------------------------------------------------------------------------------


@contextmanager
def adapted(config: LoraConfig) -> Iterator[None]:
    """Return a context in which every model's linear maps apply the adapters in its parameters.

    Enter it where the model is traced: within the function that `jax.jit` compiles, around `model.apply`. The inputs of
    adapters are dropped if the model applies dropout at all (`deterministic` is off), depending on the "dropout" stream
    and the rows or examples as everywhere, so that neither the mesh nor accumulation changes what is dropped.

    Generation (`train.generate`) takes a merged tree.
    """
    calls: list[dict[str, Any]] = []  # arguments of the modules being called, outermost first

    def intercept(
        next_call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if isinstance(module, Linear):
            outputs = next_call(*args, **kwargs)
            if context.method_name == "__call__" and module.has_variable("params", LORA_A):
                outputs = outputs + _adapter(module, args[0], calls, config)
            return outputs
        calls.append(inspect.signature(context.orig_method).bind(*args, **kwargs).arguments)
        try:
            return next_call(*args, **kwargs)
        finally:
            calls.pop()

    with nn.intercept_methods(intercept):
        yield


def _adapter(module: Linear, inputs: Array, calls: Sequence[Mapping[str, Any]], config: LoraConfig) -> Array:
    """Compute scale · drop(inputs)·A·B, in the shape of the map's outputs."""
    a, b = (module.get_variable("params", name) for name in (LORA_A, LORA_B))
    if config.dropout and not _innermost(calls, "deterministic", default=True):
        rows = row_numbers(_innermost(calls, "rows", default=None), inputs)
        inputs = drop(inputs, config.dropout, dropout_seed(module), rows)
    contracted = a.ndim - 1
    lead, rank = inputs.shape[: inputs.ndim - contracted], a.shape[-1]
    inner = matmul(inputs.reshape(*lead, -1), a.reshape(-1, rank), 0, module.dtype, module.dtype)
    outer = matmul(inner, b.reshape(rank, -1), 0, module.dtype, module.dtype)
    scale = module.get_variable("params", LORA_SCALE) if module.has_variable("params", LORA_SCALE) else config.scale
    return (outer * jnp.asarray(scale, outer.dtype)).reshape(*lead, *module.features)


def _innermost(calls: Sequence[Mapping[str, Any]], name: str, *, default: Any) -> Any:
    return next((call[name] for call in reversed(calls) if call.get(name) is not None), default)

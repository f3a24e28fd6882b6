"""Low-rank adapters on the linear maps of any model: LoRA.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1: a map W gets a second way beside it,

    y = x·W + b + (alpha / rank) · drop(x)·A·B        A [inputs, rank], B [rank, outputs]

of which only A and B are trained; B starts at zero, so that training starts from the model as it is.

An adapter lives in the parameter tree, as `lora_a` and `lora_b` beside the `kernel` that it adapts, stacked along a
first axis "layers" where the kernel is. All functions here take a tree and give a new one, and change no kernel:

    targets = lora_targets(model, ("query", "value"))
    params = add_lora(params, targets, config, key)
    with adapted(config): model.apply({"params": params}, ...)     # without this, the adapters are not seen
    merged, kept = merge_lora(params, config)                      # a plain tree, for the model as it is
    params = unmerge_lora(merged, kept)                            # the tree from before, bit for bit
    save_lora(folder, model, params, config)                       # alone, in peft's format
    params, config = load_lora(folder, model, params)

Merging is exact in that the kernel becomes the float32 nearest to W + (alpha / rank)·A·B, accumulated in float64. A sum
that was rounded cannot be undone by subtraction, so the kernels from before are kept beside the merged tree.
"""

import inspect
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..kernels.hash import hash_dropout, row_seeds
from .checkpoints.tables import LAYER, CheckpointError, Entry, Params, Table, Transposed, flatten, merge
from .layers import Linear, dropout_seed, matmul, row_numbers
from .registry import family_of_model

LORA_A, LORA_B = "lora_a", "lora_b"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before every name in peft's files

ALIASES = {"output": "out", "feed-forward": "feed_forward"}
ALL = "all-linear"

# The peft name of what a model is for; a model for something else has none.
TASKS = {
    "classification": "SEQ_CLS",
    "tokens": "TOKEN_CLS",
    "span": "QUESTION_ANS",
    "translation": "SEQ_2_SEQ_LM",
    "encoder": "FEATURE_EXTRACTION",
}


class LoraError(ValueError):
    """Adapters that cannot be made as asked."""


@dataclass(frozen=True)
class LoraConfig:
    """Of all adapters of a model."""

    rank: int = 8
    """Inner width of an adapter, r."""
    alpha: float = 16.0
    """What an adapter gives is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LoraError(f"LoRA: the rank is {self.rank}; it must be at least 1.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise LoraError(f"LoRA: alpha is {self.alpha}; it must be above 0.")
        if not 0 <= self.dropout < 1:
            raise LoraError(f"LoRA: the dropout is {self.dropout}; it must be at least 0 and below 1.")

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return self.alpha / self.rank


class Target(NamedTuple):
    """A linear map that gets an adapter, or a stack of them of which some layers do."""

    path: tuple[str, ...]  # in the parameter tree
    name: str  # of the map in a checkpoint; {layer} stands for the layer's number
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    chosen: tuple[bool, ...] | None  # of each layer of a stack; None where there is no stack

    def names(self, *, all_layers: bool = False) -> list[str]:
        """Names in a checkpoint of the maps that get an adapter."""
        if self.chosen is None:
            return [self.name]
        return [self.name.replace(LAYER, str(i)) for i, here in enumerate(self.chosen) if here or all_layers]


# --- which maps -------------------------------------------------------------------------------------------------------


def linear_maps(model: nn.Module) -> list[Target]:
    """Every linear map of a model, in all of its layers."""
    family, _ = family_of_model(model)
    return [
        Target(
            entry.path[:-1],
            entry.name.removesuffix(".weight"),
            entry.transform.inputs,
            entry.transform.outputs,
            None if entry.numbers is None else (True,) * len(entry.numbers),
        )
        for entry in family.checkpoint_table(model).entries
        if isinstance(entry.transform, Transposed)
    ]


def lora_targets(model: nn.Module, patterns: Sequence[str]) -> list[Target]:
    """The linear maps of a model's layers that any of the patterns names; poolers and heads are trained whole.

    Args:
        model: of a family of this package.
        patterns: each is one of
            - a part of the path in the parameter tree: `query`, `key`, `value`, `output` (of the attention),
              `attention` (all four), `feed-forward` (both of its maps), or `inner` and `outer` alone;
            - the end of the name in a checkpoint, as peft's target_modules: `attention.self.query`, `output.dense`;
            - a regular expression for the whole name in a checkpoint, as peft's: `.*layer\\.[0-3]\\..*query`. It alone
              can choose single layers;
            - `all-linear`.

    Raises:
        LoraError: a pattern that names nothing; the message lists what there is.
    """
    family, _ = family_of_model(model)
    maps = [target for target in linear_maps(model) if family.is_encoder_parameter((*target.path, "kernel"))]
    if not patterns:
        raise LoraError("LoRA: no targets were named." + _listed(maps))
    chosen: dict[tuple[str, ...], np.ndarray] = {}
    for pattern in patterns:
        found = False
        for target in maps:
            names = target.names(all_layers=True)
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
    if pattern == ALL or ALIASES.get(pattern, pattern) in path or _ends(name, pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise LoraError(f"LoRA: the target {pattern!r} is no name and no regular expression ({error}).") from None


def _ends(name: str, pattern: str) -> bool:
    """How peft compares an entry of a list of target_modules with a module's name."""
    return name == pattern or name.endswith(f".{pattern}")


def _listed(maps: Sequence[Target]) -> str:
    lines = "".join(f"\n  {'.'.join(m.path):<44} {m.name}" for m in maps)
    return (
        f" Known: query, key, value, output, attention, feed-forward, {ALL}, or a part of (left) or the end of or a"
        f" regular expression for (right) these names:{lines}"
    )


# --- the tree ---------------------------------------------------------------------------------------------------------


def add_lora(params: Params, targets: Sequence[Target], config: LoraConfig, key: Array) -> dict[str, Any]:
    """The tree with new adapters in it.

    A is drawn as by peft, uniform within ±1/√inputs (Kaiming's rule with a = √5), B is zero. Each is drawn by its own
    name, so that it does not depend on which others there are. In a layer of a stack that was not chosen A is zero too:
    then neither gets a gradient, and the layer stays as it is.

    Args:
        params: arrays, or the boxes of logical axis names that `Module.init` gives; the adapters come in boxes as well.
        targets: from `lora_targets`.
        config: their rank.
        key: of the draw.

    Returns:
        another tree, which shares the old one's leaves.
    """
    added: dict[str, Any] = {}
    for target in targets:
        kernel = _at(params, target.path)["kernel"]
        stack = () if target.chosen is None else (len(target.chosen),)
        bound = 1 / math.sqrt(math.prod(target.inputs))
        draw = jax.random.fold_in(key, zlib.crc32("/".join(target.path).encode()))
        a = jax.random.uniform(draw, (*stack, *target.inputs, config.rank), jnp.float32, -bound, bound)
        if target.chosen is not None:
            a = a * np.array(target.chosen, np.float32).reshape(-1, *(1 for _ in target.inputs), 1)
        b = jnp.zeros((*stack, config.rank, *target.outputs), jnp.float32)
        if isinstance(kernel, nn.LogicallyPartitioned):
            names = kernel.names
            lead = len(stack) + len(target.inputs)
            a = nn.LogicallyPartitioned(a, (*names[:lead], None))
            b = nn.LogicallyPartitioned(b, (*names[: len(stack)], None, *names[lead:]))
        added = merge(added, _branch(target.path, {LORA_A: a, LORA_B: b}))
    return merge(added, params)


def is_lora(path: Sequence[str]) -> bool:
    """Whether the parameter at this path is an adapter's."""
    return path[-1] in (LORA_A, LORA_B)


def merge_lora(params: Params, config: LoraConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plain model that gives the adapted one's outputs.

    Args:
        params: a tree with adapters, arrays on any device that this process can read.
        config: theirs.

    Returns:
        (the merged tree, without adapters; what `unmerge_lora` needs: the adapters, and the kernels that were merged,
        as they were). Leaves without adapters are the same objects.
    """
    merged: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    leaves = dict(flatten(params))
    for path, leaf in leaves.items():
        a, b = (leaves.get((*path[:-1], name)) for name in (LORA_A, LORA_B))
        if path[-1] == "kernel" and a is not None and b is not None:
            merged = merge(merged, _branch(path, _merged_kernel(leaf, a, b, config.scale)))
            kept = merge(kept, _branch(path, leaf))
        elif is_lora(path):
            kept = merge(kept, _branch(path, leaf))
        else:
            merged = merge(merged, _branch(path, leaf))
    return merged, kept


def unmerge_lora(merged: Params, kept: Params) -> dict[str, Any]:
    """The tree with adapters that `merge_lora` was given, bit for bit, from the two that it gave."""
    return merge(kept, merged)


def _merged_kernel(kernel: Any, a: Any, b: Any, scale: float) -> np.ndarray:
    kernel, a, b = (np.asarray(array) for array in (kernel, a, b))
    rank = a.shape[-1]
    stacked = a.ndim + b.ndim - 2 > kernel.ndim  # then the axis of the layers is in both
    lead = kernel.shape[:1] if stacked else ()
    wide_a = a.astype(np.float64).reshape(*lead, -1, rank)
    wide_b = b.astype(np.float64).reshape(*lead, rank, -1)
    return (kernel.astype(np.float64) + scale * (wide_a @ wide_b).reshape(kernel.shape)).astype(kernel.dtype)


def _at(tree: Params, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _branch(path: tuple[str, ...], leaf: Any) -> dict[str, Any]:
    for name in reversed(path):
        leaf = {name: leaf}
    return leaf


# --- the model --------------------------------------------------------------------------------------------------------


@contextmanager
def adapted(config: LoraConfig) -> Iterator[None]:
    """Within this, every model's linear maps add what the adapters in its parameters give.

    It must be entered where the model is traced: within the function that `jax.jit` compiles, around `model.apply`.
    Adapters drop their inputs where the model drops at all (`deterministic` is off), by the stream "dropout" and the
    rows' numbers as everything else, so that neither the mesh nor accumulation changes what is dropped.

    Decoding (train/decode.py) takes a merged tree.
    """
    calls: list[dict[str, Any]] = []  # arguments of the modules that are being called, from the outermost

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
    """scale · drop(inputs)·A·B, shaped as the map's outputs."""
    a, b = (module.get_variable("params", name) for name in (LORA_A, LORA_B))
    if config.dropout and not _innermost(calls, "deterministic", default=True):
        rows = row_numbers(_innermost(calls, "rows", default=None), inputs)
        inputs = hash_dropout(inputs, config.dropout, row_seeds(dropout_seed(module), rows))
    contracted = a.ndim - 1
    lead, rank = inputs.shape[: inputs.ndim - contracted], a.shape[-1]
    inner = matmul(inputs.reshape(*lead, -1), a.reshape(-1, rank), 0, module.dtype, module.dtype)
    outer = matmul(inner, b.reshape(rank, -1), 0, module.dtype, module.dtype)
    return (outer * config.scale).reshape(*lead, *module.features)


def _innermost(calls: Sequence[Mapping[str, Any]], name: str, *, default: Any) -> Any:
    return next((call[name] for call in reversed(calls) if call.get(name) is not None), default)


# --- peft's files -----------------------------------------------------------------------------------------------------

# What an adapter_config.json may say; a key that is absent is at its first value. Everything else that peft writes
# there is of the training, of the base model's copy, or of how the adapter was first drawn.
REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "lora_bias": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others change the base model as well
}


def save_lora(
    folder: str | os.PathLike[str], model: nn.Module, params: Params, config: LoraConfig, *, base: str | None = None
) -> None:
    """Write a model's adapters alone, as peft does: adapter_config.json and adapter_model.safetensors.

    What lies outside of the embeddings and layers, poolers and heads, goes with them whole, as peft's modules_to_save.
    Layers of a stack whose adapter is zero are left out.

    Args:
        folder: made if it is not there.
        model: of a family of this package.
        params: a tree with adapters, unboxed; arrays of any device that this process can read.
        config: theirs.
        base: folder or name of the model that they belong to, for whoever reads the file.

    Raises:
        LoraError: there are no adapters in the tree.
    """
    family, architecture = family_of_model(model)
    table: Table = family.checkpoint_table(model)
    leaves = dict(flatten(params))
    tensors: dict[str, np.ndarray] = {}
    adapted_maps: list[str] = []
    for target in linear_maps(model):
        if (*target.path, LORA_A) not in leaves:
            continue
        a, b = (np.asarray(leaves[*target.path, name]) for name in (LORA_A, LORA_B))
        if target.chosen is None:
            a, b = a[None], b[None]
        for name, layer_a, layer_b in zip(target.names(), a, b, strict=True):
            if layer_a.any() or layer_b.any():
                adapted_maps.append(name)
                tensors |= {
                    f"{PREFIX}{name}.lora_A.weight": np.ascontiguousarray(layer_a.reshape(-1, config.rank).T),
                    f"{PREFIX}{name}.lora_B.weight": np.ascontiguousarray(layer_b.reshape(config.rank, -1).T),
                }
    if not adapted_maps:
        raise LoraError(f"{folder}: these parameters hold no adapters to save.")
    whole = [
        entry
        for entry in table.entries
        if not family.is_encoder_parameter(entry.path) and (*entry.path[:-1], LORA_A) not in leaves
    ]
    for entry in whole:
        tensors[PREFIX + entry.name] = np.ascontiguousarray(entry.transform.save(np.asarray(leaves[entry.path])))
    stored = {
        "peft_type": "LORA",
        "task_type": TASKS.get(architecture.head),
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _shortest(adapted_maps, table),
        "modules_to_save": _outermost(whole) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS)
    partial.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(folder / CONFIG)


def _shortest(names: Sequence[str], table: Table) -> list[str]:
    """target_modules that name just these maps: the ends of their names if those fit no other module, else them all."""
    adapted = set(names)
    weights = [entry for entry in table.entries if entry.name.endswith(".weight")]
    ends = {
        entry.name.removesuffix(".weight").split(f"{LAYER}.")[-1]
        for entry in weights
        if any(name.removesuffix(".weight") in adapted for name in entry.names)
    }
    modules = [name.removesuffix(".weight") for entry in weights for name in entry.names]
    fitting = {module for module in modules if any(_ends(module, end) for end in ends)}
    return sorted(ends) if fitting == adapted else sorted(adapted)


def _outermost(entries: Sequence[Entry]) -> list[str]:
    """The modules that hold these parameters, without those that lie in another of them."""
    modules = sorted({entry.name.rpartition(".")[0] for entry in entries})
    return [name for name in modules if not any(name.startswith(f"{other}.") for other in modules)]


def load_lora(folder: str | os.PathLike[str], model: nn.Module, params: Params) -> tuple[dict[str, Any], LoraConfig]:
    """Read adapters, and the poolers and heads saved with them, as peft writes them, into a model's parameters.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: the model that they are for, of a family of this package.
        params: its parameters, unboxed and without adapters.

    Returns:
        (the tree with adapters, their configuration). A layer of a stack that the file has no adapter for gets zeros.

    Raises:
        FileNotFoundError: a file is missing.
        CheckpointError: settings that are not implemented, or tensors that are not this model's; all of them are named.
    """
    folder = Path(folder)
    config = _read_config(folder)
    table: Table = family_of_model(model)[0].checkpoint_table(model)
    pairs: dict[str, dict[str, np.ndarray]] = {}  # name of a map's weight -> its A and B
    whole: dict[str, np.ndarray] = {}
    for name, tensor in _read_tensors(folder).items():
        name = name.removeprefix(PREFIX)
        half = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if half:
            pairs.setdefault(f"{half[1]}.weight", {})[half[2]] = tensor
        else:
            whole[name] = tensor
    placed = table.place([*pairs, *whole])
    problems = [f"{name}: no parameter of this model" for name in placed.unmapped]
    problems += [f"{name}: a tied copy; only the original is implemented" for name in placed.repeated]
    added: dict[str, Any] = {}
    for target in linear_maps(model):
        stored = [placed.sources.get(f"{name}.weight") for name in target.names()]
        if any(name in pairs for name in stored):
            layers = [_adapter_of(name, pairs.pop(str(name), None), target, config, problems) for name in stored]
            if not problems:
                a, b = ([layer[i] for layer in layers] for i in range(2))
                halves = {LORA_A: np.stack(a), LORA_B: np.stack(b)} if target.chosen else {LORA_A: a[0], LORA_B: b[0]}
                added = merge(added, _branch(target.path, halves))
    problems += [f"{name}: has an adapter, but is no linear map" for name in pairs if name not in placed.unmapped]
    for entry in table.entries:
        held = [placed.sources[name] for name in entry.names if placed.sources.get(name) in whole]
        for name in held:
            if whole[name].shape != entry.transform.stored_shape:
                expected, found = list(entry.transform.stored_shape), list(whole[name].shape)
                problems.append(f"{name}: expected shape {expected}, found {found}")
        if held and entry.layers is not None:
            problems.append(f"{held[0]}: saved whole, but one of a stack of layers")
        elif held and not problems:
            added = merge(added, _branch(entry.path, entry.transform.load(whole[held[0]]).astype(np.float32)))
    if problems:
        raise CheckpointError("\n  ".join([f"{folder / WEIGHTS}: not the adapters of this model:", *problems]))
    return merge(added, params), config


def _adapter_of(
    name: str | None, pair: dict[str, np.ndarray] | None, target: Target, config: LoraConfig, problems: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one map as the tree has them, from a file's; zeros where the file has none."""
    rows, columns = math.prod(target.inputs), math.prod(target.outputs)
    shapes = {"A": (config.rank, rows), "B": (columns, config.rank)}
    pair = {half: np.zeros(shape, np.float32) for half, shape in shapes.items()} if pair is None else pair
    for half, shape in shapes.items():
        found = list(pair[half].shape) if half in pair else "none"
        if found != list(shape):
            where = str(name).removesuffix(".weight")
            problems.append(f"{where}.lora_{half}.weight: expected shape {list(shape)}, found {found}")
            return np.zeros(0), np.zeros(0)
    a, b = (pair[half].astype(np.float32).T for half in "AB")
    return a.reshape(*target.inputs, config.rank), b.reshape(config.rank, *target.outputs)


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG}; an adapter's folder holds {CONFIG} and {WEIGHTS}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        config = LoraConfig(stored["r"], float(stored["lora_alpha"]), float(stored.get("lora_dropout", 0.0)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected JSON with r, lora_alpha and lora_dropout ({error!r})") from None
    problems = [
        f"{key}: only {' or '.join(map(json.dumps, allowed))} is implemented, found {json.dumps(stored[key])}"
        for key, allowed in REQUIRED.items()
        if key in stored and stored[key] not in allowed
    ]
    if problems:
        raise CheckpointError("\n  ".join([f"{path}:", *problems]))
    return config


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        hint = f" It holds {', '.join(pickles)}, a pickle, which is refused: it can run any code." if pickles else ""
        raise FileNotFoundError(f"{folder}: no {WEIGHTS}.{hint}")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from None

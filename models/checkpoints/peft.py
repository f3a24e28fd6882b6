"""Save and load adapters in peft's files: adapter_config.json and adapter_model.safetensors.

peft adapts the modules of the reference implementation. If one of them fuses several maps of this package (GPT-2's
`c_attn` is query, key and value), their adapters are saved as one: the A's are stacked and B is block-diagonal, so that
the rank is multiplied by the number of maps, as `rank_pattern` and `alpha_pattern` in the file say. Loading splits it
again; for a fused adapter of another tool, each map gets the whole A and its part of B.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...data.files import replacing
from ...data.json_files import read_object, value_of, write_json
from ..lora import LORA_A, LORA_B, LORA_SCALE, LoraConfig, LoraError, Target, ends_with, linear_maps
from ..registry import family_of_model
from .folder import WEIGHT_KINDS, Loaded, family_of_folder, load_with_report, read_config
from .tables import (
    LAYER,
    CheckpointError,
    Entry,
    Params,
    Table,
    Untransposed,
    flatten,
    merge,
    shortened,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in peft's files

# peft's task type of each head; other heads have none.
TASKS = {
    "classification": "SEQ_CLS",
    "tokens": "TOKEN_CLS",
    "span": "QUESTION_ANS",
    "generation": "SEQ_2_SEQ_LM",
    "encoder": "FEATURE_EXTRACTION",
}
# Supported values in adapter_config.json; the first is the default for absent keys. Everything else that peft writes
# there is about training, the copy of the base model, or the initialisation of the adapter.
REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False, True),
    "use_dora": (False,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "ensure_weight_tying": (False, None),
    **dict.fromkeys(("arrow_config", "kasa_config", "monteclora_config", "velora_config"), (None,)),  # other branches
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base model as well
}

Fused = dict[str, list[Target]]  # name of a module of the reference implementation -> the maps that it holds


def _modules(maps: Sequence[Target]) -> Fused:
    """Group the maps by the modules that contain them, in stored order; `{layer}` stands for the layer's number."""
    modules: Fused = {}
    for target in maps:
        modules.setdefault(target.name, []).append(target)
    return modules


def save_lora(
    folder: str | os.PathLike[str], model: nn.Module, params: Params, config: LoraConfig, *, base: str | None = None
) -> None:
    """Save a model's adapters as peft does: adapter_config.json and adapter_model.safetensors.

    Poolers and heads are saved fully along with them, as peft's modules_to_save. Layers of a stack whose adapter is
    zero are left out.

    Args:
        folder: folder to write; created if needed.
        model: a model of this package.
        params: a tree with adapters, unboxed; arrays on any device that this process can read.
        config: settings of the adapters.
        base: folder or name of the base model, for readers of the file.

    Raises:
        LoraError: there are no adapters in the tree.
    """
    family, architecture = family_of_model(model)
    table: Table = family.checkpoint_table(model)
    leaves = dict(flatten(params))
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}  # rank of each adapted module
    scales: dict[str, float] = {}  # and its factor
    untransposed = False
    for targets in _modules(linear_maps(model)).values():
        for row, name in enumerate(targets[0].names):
            a, b = _fuse([_halves(leaves, target, row) for target in targets])
            if len(a):
                ranks[name], scales[name] = len(a), _factor(leaves, targets, row, config)
                tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
                untransposed |= isinstance(targets[0].kernel, Untransposed)
    if not ranks:
        raise LoraError(f"{folder}: these parameters hold no adapters to save.")
    whole = [
        entry
        for entry in table.entries
        if not family.is_encoder_parameter(entry.path) and (*entry.path[:-1], LORA_A) not in leaves
    ]
    outside = unflatten_dict({entry.path: leaves[entry.path] for entry in whole})
    for name, tensor in Table(tuple(whole)).save(outside):
        tensors[PREFIX + name] = np.ascontiguousarray(tensor)
    others = {name: rank for name, rank in ranks.items() if rank != config.rank}
    stored = {
        "peft_type": "LORA",
        "task_type": TASKS.get(architecture.head),
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "rank_pattern": others,
        "alpha_pattern": {
            name: _number(_alpha(scale, config.divisor(rank)))
            for name, scale in scales.items()
            if (rank := ranks[name]) != config.rank or np.float32(scale) != np.float32(config.scale)
        },
        "lora_dropout": config.dropout,
        "target_modules": _shortest(list(ranks), table),
        "modules_to_save": _outermost(whole) or None,
        "bias": "none",
        "fan_in_fan_out": untransposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": config.stabilised,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    write_json(folder / CONFIG, dict(sorted(stored.items())))


def _factor(leaves: Mapping[tuple[str, ...], Any], targets: Sequence[Target], row: int, config: LoraConfig) -> float:
    """Return the factor of the adapter of one module, which all maps that it holds have."""
    found = set()
    for target in targets:
        own = leaves.get((*target.path, LORA_SCALE))
        found.add(config.scale if own is None else float(own if target.chosen is None else own[row]))
    if len(found) > 1:
        raise LoraError(f"{targets[0].names[row]}: its maps have adapters of different factors, {sorted(found)}")
    return found.pop()


def _alpha(scale: float, divisor: float) -> float:
    """Return the alpha of a factor stored in float32: the rounded number that it came of, if there is one."""
    rounded = round(scale * divisor, 6)
    return rounded if np.float32(rounded / divisor) == np.float32(scale) else scale * divisor


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _halves(leaves: Mapping[tuple[str, ...], Any], target: Target, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one map's A [rank, inputs] and B [outputs, rank]; of rank 0 if it has no adapter, or one of zeros."""
    inputs, outputs = math.prod(target.kernel.inputs), math.prod(target.kernel.outputs)
    if (*target.path, LORA_A) in leaves:
        a, b = (np.asarray(leaves[*target.path, name]) for name in (LORA_A, LORA_B))
        a, b = (a, b) if target.chosen is None else (a[row], b[row])
        a, b = a.reshape(inputs, -1).T, b.reshape(-1, outputs).T
        used = a.any(axis=1) | b.any(axis=0)  # the rest pads a stack whose layers have other ranks
        return a[used], b[:, used]
    return np.zeros((0, inputs), np.float32), np.zeros((outputs, 0), np.float32)


def _fuse(halves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of a module that contains several maps, from those of each: B has one block per map."""
    b = np.zeros((sum(len(b) for _, b in halves), sum(len(a) for a, _ in halves)), np.float32)
    row = column = 0
    for _, part in halves:
        b[row : row + part.shape[0], column : column + part.shape[1]] = part
        row, column = row + part.shape[0], column + part.shape[1]
    return np.ascontiguousarray(np.concatenate([a for a, _ in halves])), b


def _shortest(names: Sequence[str], table: Table) -> list[str]:
    """Return target_modules for exactly these maps: the ends of their names if no other module matches, else all."""
    adapted = set(names)
    weights = [entry for entry in table.entries if entry.name.endswith(".weight")]
    ends = {
        entry.name.removesuffix(".weight").split(f"{LAYER}.")[-1]
        for entry in weights
        if any(name.removesuffix(".weight") in adapted for name in entry.names)
    }
    modules = [name.removesuffix(".weight") for name in table.names if name.endswith(".weight")]
    fitting = {module for module in modules if any(ends_with(module, end) for end in ends)}
    return sorted(ends) if fitting == adapted else sorted(adapted)


def _outermost(entries: Sequence[Entry]) -> list[str]:
    """Return the modules that contain these parameters, without those inside another of them."""
    modules = sorted({entry.name.rpartition(".")[0] for entry in entries})
    return [name for name in modules if not any(name.startswith(f"{other}.") for other in modules)]


def load_adapted(
    folder: str | os.PathLike[str], adapter: str | os.PathLike[str]
) -> tuple[Loaded, dict[str, Any], LoraConfig]:
    """Load a checkpoint with an adapter, and with the head that the adapter was trained for.

    Args:
        folder: checkpoint folder of the model that was adapted; another head than the adapter's is replaced.
        adapter: folder of the adapter.

    Returns:
        (the checkpoint, without adapters; its parameters with them, as from `load_lora`; their configuration)

    Raises:
        CheckpointError: as from `load` and `load_lora`; or neither of the two folders holds a parameter of the model.
    """
    folder, adapter = Path(folder), Path(adapter)
    task = _read_config(adapter).get("task_type")
    heads: dict[Any, str] = {name: head for head, name in TASKS.items()}
    family = family_of_folder(read_config(folder), folder)
    head = heads.get(task) if heads.get(task) in family.heads and not family.one_kind else None
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in _read_tensors(adapter).items()}
    loaded, report = load_with_report(folder, head=head)
    if head is not None:
        classes = _classes(family.checkpoint_table(loaded.model), tensors, head)
        if classes is not None and classes != loaded.config.num_labels:
            loaded, report = load_with_report(folder, head=head, num_labels=classes)
    placed = family.checkpoint_table(loaded.model).place(tensors)
    missing = [name for name in report.initialised if name not in placed.sources]
    if missing:
        listed = shortened([f"{name}: neither in the checkpoint nor in the adapter" for name in missing])
        raise CheckpointError("\n  ".join([f"{folder} with {adapter}:", *listed]))
    params, config = load_lora(adapter, loaded.model, loaded.params)
    return loaded, params, config


def _classes(table: Table, tensors: Mapping[str, np.ndarray], head: str) -> int | None:
    """Return the number of classes of a head in an adapter's file; None if that does not say."""
    if head not in ("classification", "tokens"):
        return None
    for name, stored in table.place(tensors).sources.items():
        expected, found = table.stored_shape(name), tensors[stored].shape
        if len(found) == len(expected) and found[1:] == expected[1:] and found[:1] != expected[:1]:
            return found[0]
    return None


def load_lora(folder: str | os.PathLike[str], model: nn.Module, params: Params) -> tuple[dict[str, Any], LoraConfig]:
    """Read adapters, and the poolers and heads saved with them, as peft writes them, into a model's parameters.

    Args:
        folder: folder with adapter_config.json and adapter_model.safetensors.
        model: the model to adapt, of this package.
        params: its parameters, unboxed and without adapters.

    Returns:
        (the tree with adapters, their configuration). Layers of a stack without an adapter in the file get zeros.

    Raises:
        FileNotFoundError: a file is missing.
        CheckpointError: settings are not implemented, or tensors do not fit this model; all of them are listed.
    """
    folder = Path(folder)
    stored = _read_config(folder)
    config = _config(stored)
    table: Table = family_of_model(model)[0].checkpoint_table(model)
    pairs: dict[str, dict[str, np.ndarray]] = {}  # name of a module's weight -> its A and B
    whole: dict[str, np.ndarray] = {}
    for name, tensor in _read_tensors(folder).items():
        name = name.removeprefix(PREFIX)
        half = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if half:
            pairs.setdefault(f"{half[1]}.weight", {})[half[2]] = tensor
        else:
            whole[name] = tensor
    placed = table.place([*pairs, *whole])
    problems = shortened([f"{name}: no parameter of this model" for name in placed.unmapped], "no parameter of it")
    problems += [f"{name}: a tied copy; only the original is implemented" for name in placed.repeated]
    problems += shortened([
        *(f"{name}: not of target_modules and layers_to_transform" for name in pairs if not _is_target(name, stored)),
        *(f"{name}: not of modules_to_save" for name in whole if not _is_saved(name, stored)),
    ])  # fmt: skip
    unlike: list[str] = []  # tensors with another shape
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    for targets in _modules(linear_maps(model)).values():
        names = [placed.sources.get(f"{name}.weight", "") for name in targets[0].names]
        if any(name in pairs for name in names):
            read = [_read_adapter(name, pairs.pop(name, None), targets, stored, unlike) for name in names]
            if not unlike:
                leaves |= _take_apart(targets, read) | _own_factors(targets, names, stored, config)
    problems += [f"{name}: has an adapter, but is no linear map" for name in pairs if name not in placed.unmapped]
    for entry in table.entries:
        held = [placed.sources[name] for name in entry.names if placed.sources.get(name) in whole]
        for name in held:
            if whole[name].shape != entry.transform.stored_shape:
                expected, found = list(entry.transform.stored_shape), list(whole[name].shape)
                unlike.append(f"{name}: expected shape {expected}, found {found}")
        if held and (entry.numbers is not None or entry.fused is not None):
            problems.append(f"{held[0]}: saved whole, but one of a stack of layers or of fused maps")
        elif held and not unlike:
            leaves[entry.path] = entry.transform.load(whole[held[0]]).astype(np.float32)
    problems += shortened(unlike)
    if problems:
        raise CheckpointError("\n  ".join([f"{folder / WEIGHTS}: not the adapters of this model:", *problems]))
    return merge(unflatten_dict(leaves), params), config


def _read_adapter(
    name: str,
    pair: Mapping[str, np.ndarray] | None,
    targets: Sequence[Target],
    stored: Mapping[str, Any],
    problems: list[str],
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return one module's A [rank, inputs] and B [outputs of all its maps, rank] from a file, or None."""
    if pair is None:
        return None
    module = name.removesuffix(".weight")
    rank = _of_module(module, stored, *RANK_KEYS)
    outputs = sum(math.prod(target.kernel.outputs) for target in targets)
    shapes = {"A": (rank, math.prod(targets[0].kernel.inputs)), "B": (outputs, rank)}
    for half, shape in shapes.items():
        found = list(pair[half].shape) if half in pair else "none"
        if found != list(shape):
            problems.append(f"{module}.lora_{half}.weight: expected shape {list(shape)}, found {found}")
    return None if problems else (pair["A"].astype(np.float32), pair["B"].astype(np.float32))


def _is_target(name: str, stored: Mapping[str, Any]) -> bool:
    """Tell whether peft gives the module of this weight an adapter; it ignores tensors of others."""
    module, targets = name.removesuffix(".weight"), stored.get("target_modules")
    layers, excluded = stored.get("layers_to_transform"), stored.get("exclude_modules")
    number = re.search(r"\.(\d+)\.", module)
    if layers is not None and number and int(number[1]) not in (layers if isinstance(layers, list) else [layers]):
        return False
    return (targets in (None, "all-linear") or _named(module, targets)) and not (excluded and _named(module, excluded))


def _named(module: str, names: str | list[str]) -> bool:
    """Tell whether a regular expression, or one of a list of ends of names, is that of a module, as peft does."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(ends_with(module, end) for end in names)


SAVED = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task type -> modules that peft saves whole, whatever modules_to_save says."""


def _is_saved(name: str, stored: Mapping[str, Any]) -> bool:
    """Tell whether peft saves the module of this tensor whole."""
    modules = (*(stored.get("modules_to_save") or ()), *SAVED.get(stored.get("task_type") or "", ()))
    return any(f".{module}." in f".{name}." for module in modules)


def _own_factors(
    targets: Sequence[Target], names: Sequence[str], stored: Mapping[str, Any], config: LoraConfig
) -> dict[tuple[str, ...], np.ndarray]:
    """Return the tree's factors of a module's maps, if one of its layers has another than the general one."""
    modules = [name.removesuffix(".weight") for name in names]
    factors = [
        config.scale_of(*(_of_module(module, stored, *keys) for keys in (RANK_KEYS, ALPHA_KEYS))) for module in modules
    ]
    if all(factor == config.scale for factor in factors):
        return {}
    array = np.array(factors, np.float32)
    return {(*target.path, LORA_SCALE): array[0] if target.chosen is None else array for target in targets}


RANK_KEYS, ALPHA_KEYS = ("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")


def _of_module(module: str, stored: Mapping[str, Any], key: str, pattern: str) -> Any:
    """Return peft's value for a module: of the first pattern that matches the end of its name, or the general one."""
    for ending, value in (stored.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({ending})$", module):
            return value
    return stored[key]


def _take_apart(
    targets: Sequence[Target], layers: Sequence[tuple[np.ndarray, np.ndarray] | None]
) -> dict[tuple[str, ...], np.ndarray]:
    """Return the tree's adapters of a module's maps, from those of its layers; missing layers are zero.

    Each map of a fused module keeps the part of the rank that affects it, which undoes the fusion on saving. As long as
    B is zero, every map keeps everything.
    """
    found: dict[tuple[str, ...], np.ndarray] = {}
    fresh = not any(layer is not None and layer[1].any() for layer in layers)
    start = 0
    for target in targets:
        part = slice(start, start := start + math.prod(target.kernel.outputs))
        used: list[tuple[np.ndarray, np.ndarray]] = []
        for a, b in (layer or (np.zeros((0, 0)), np.zeros((part.stop, 0))) for layer in layers):
            keep = np.ones(len(a), bool) if fresh or len(targets) == 1 else b[part].any(axis=0)
            used.append((a[keep], b[part][:, keep]))
        rank = max(len(a) for a, _ in used)
        if not rank:
            continue
        halves = (
            np.zeros((len(used), rank, math.prod(target.kernel.inputs)), np.float32),
            np.zeros((len(used), math.prod(target.kernel.outputs), rank), np.float32),
        )
        for layer, (a, b) in enumerate(used):
            if len(a):
                halves[0][layer, : len(a)], halves[1][layer, :, : len(a)] = a, b
        stack = () if target.chosen is None else (len(used),)
        a, b = (np.swapaxes(half, 1, 2) for half in halves)
        found[*target.path, LORA_A] = a.reshape(*stack, *target.kernel.inputs, rank)
        found[*target.path, LORA_B] = b.reshape(*stack, rank, *target.kernel.outputs)
    return found


def _config(stored: Mapping[str, Any]) -> LoraConfig:
    return LoraConfig(
        stored["r"],
        float(stored["lora_alpha"]),
        float(stored.get("lora_dropout", 0.0)),
        stored.get("use_rslora", False),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed adapter_config.json, after checking that all settings are implemented."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG}; an adapter's folder holds {CONFIG} and {WEIGHTS}")
    stored, where = read_object(path), str(path)
    for key, kind in (("r", int), ("lora_alpha", float)):
        value_of(stored, key, kind, where)
    value_of(stored, "lora_dropout", float, where, 0.0)
    value_of(stored, "use_rslora", bool, where, False)
    value_of(stored, "task_type", str | None, where, None)
    value_of(stored, "modules_to_save", list[str] | None, where, None)
    value_of(stored, "layers_to_transform", int | list[int] | None, where, None)
    expressions = [
        names
        for key in ("target_modules", "exclude_modules")
        if isinstance(names := value_of(stored, key, str | list[str] | None, where, None), str)
    ]
    ranks = value_of(stored, "rank_pattern", dict[str, int] | None, where, None) or {}
    alphas = value_of(stored, "alpha_pattern", dict[str, float] | None, where, None) or {}
    try:
        _config(stored)
        for expression in expressions:
            re.compile(expression)
        for pattern in (*ranks, *alphas):
            re.compile(pattern)
            LoraConfig(ranks.get(pattern, 1), alphas.get(pattern, 1.0))
    except (LoraError, re.error) as error:
        raise CheckpointError(f"{path}: {error}") from None
    problems = [
        f"{key}: only {' or '.join(map(json.dumps, allowed))} is implemented, found {json.dumps(stored[key])}"
        for key, allowed in REQUIRED.items()
        if key in stored and stored[key] not in allowed
    ]
    if problems:
        raise CheckpointError("\n  ".join([f"{path}:", *problems]))
    return stored


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        hint = f" It holds {', '.join(pickles)}, a pickle, which is refused: it can run any code." if pickles else ""
        raise FileNotFoundError(f"{folder}: no {WEIGHTS}.{hint}")
    try:
        with safe_open(path, framework="np") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a mapping)
            wrong = [f"{name}: {kind}" for name, kind in kinds.items() if kind not in WEIGHT_KINDS]
            found = {} if wrong else {name: file.get_tensor(name).astype(np.float32) for name in kinds}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from None
    wrong += [f"{name}: NaN or infinite" for name, tensor in found.items() if not np.isfinite(tensor).all()]
    if wrong:
        expected = ", ".join(WEIGHT_KINDS)
        said = f"{path}: expected finite weights, stored as {expected}"
        raise CheckpointError("\n  ".join([said, *shortened(wrong)]))
    return found

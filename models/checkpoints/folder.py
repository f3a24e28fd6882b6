"""Checkpoint folders of the released format: config.json, safetensors, tokenizer files.

    model, params, config, tokenizer = load("bert-base-uncased")
    save("folder", model, params, tokenizer)

config.json determines the family, and the family's reversible table matches the tensors. Tensors that are not in the
table and parameters without a tensor are errors, and all of them are listed. A task model is made from another model's
encoder only on request (`head=`); newly initialised parameters and unused tensors are then reported.
"""

import dataclasses
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...data.files import replacing, temporary
from ...data.images.processor import FILE as PROCESSOR_FILE
from ...data.images.processor import Processor
from ...data.json_files import read_object, value_of, write_json
from ..family import Architecture, Family, FamilyConfig, Member
from ..once import jit_once
from ..registry import FAMILIES, families, family_of_model, init_params, stored_family
from .config import ConfigError, require_checkpoint
from .tables import CheckpointError, Params, Placed, Table, flatten, merge, shortened

log = logging.getLogger("bestiary.models")

VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "source.spm",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "target.spm",
    "target_vocab.json",
    "source.json",
    "target.json",
    "subwords.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    PROCESSOR_FILE,
)
WEIGHT_KINDS = ("F32", "F16", "BF16", "F64")
FEW_LAYERS = 1000  # up to which the tensors that a checkpoint lacks are listed
BUFFER_DTYPES = {"BOOL": "bool", "U8": "uint8", "I32": "int32", "I64": "int64", "F16": "float16", "F32": "float32"}
STORED_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


class Tokenizer(Protocol):
    """A tokenizer that can be saved to a folder."""

    def save(self, folder: Path) -> None: ...


class Loaded(NamedTuple):
    """A checkpoint in memory. `model.apply({"params": params}, ...)` runs it."""

    model: Any  # the family's flax.linen module
    params: dict[str, Any]  # float32 NumPy arrays on the host; `jax.device_put` places them, with any sharding
    config: Any  # the family's config dataclass, also `model.config`
    tokenizer: Any  # of data.tokenizers; of images, data.images.processor.Processor; None if the folder has no files


class Report(NamedTuple):
    """Differences between a checkpoint and the model made from it."""

    initialised: tuple[str, ...]  # stored names of parameters that the checkpoint lacks
    unused: tuple[str, ...]  # stored names of tensors that the model does not use


def load(
    folder: str | os.PathLike[str],
    *,
    head: str | None = None,
    num_labels: int | None = None,
    seed: int = 0,
    **changes: Any,
) -> Loaded:
    """Read a checkpoint folder.

    Args:
        folder: a local folder with config.json and model.safetensors (or its shards and index).
        head: None for exactly the model in the checkpoint. Otherwise, the head of the model to make from its encoder
            ("encoder", "pretraining", "masked_lm", "classification", "tokens", "crf", "span" or "choice" for BERT; crf
            is tokens with a CRF over them): parameters that the checkpoint lacks are newly initialised, and logged
            together with its unused tensors.
        num_labels: number of classes of the head; if the checkpoint's head has another number, it is newly initialised
            (with `head`).
        seed: random seed of newly initialised parameters.
        changes: changes to fields of the config, such as `dtype="bfloat16"`, `remat=True` or `dropout=0.0`.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        CheckpointError: the family is unknown or does not have this head, the checkpoint is a pickle, or tensors do not
            fit.
        ConfigError: settings are not implemented.
    """
    loaded, report = load_with_report(folder, head=head, num_labels=num_labels, seed=seed, **changes)
    if report.initialised:
        log.warning("newly initialised (not in checkpoint %s): %s", folder, ", ".join(report.initialised))
    if report.unused:
        log.warning("not used (in checkpoint %s): %s", folder, ", ".join(report.unused))
    return loaded


def load_with_report(
    folder: str | os.PathLike[str],
    *,
    head: str | None = None,
    num_labels: int | None = None,
    seed: int = 0,
    **changes: Any,
) -> tuple[Loaded, Report]:
    """Load like `load`, but return which parameters are new or unused instead of logging it."""
    folder = Path(folder)
    stored = read_config(folder)
    family = family_of_folder(stored, folder)
    if head is not None:
        check_head(family, head, folder)
    config: Any = _config_of(family, stored, folder)
    if num_labels is not None and num_labels != config.num_labels:
        changes = {"num_labels": num_labels, "label_names": None, **changes}
    config = dataclasses.replace(config, **changes)
    with Tensors(folder) as tensors:
        if family.settled is not None:
            config = family.settled(config, tensors.shapes.keys())
        _check_layers(family, config, tensors, folder)
        if head is None:
            architecture = _architecture_held(family, stored, config, tensors, folder)
        else:
            architecture = _architecture_for(family, head, config, tensors)
        model = architecture.build(config)
        table = architecture.table(config)
        placed = table.place(tensors.shapes)
        if head is None:
            report = Report((), ())
            _require_all(placed, folder)
        else:
            placed, report = _take_encoder(family, config, table, placed, tensors, folder)
        _check_kinds(placed, tensors, folder)
        params = table.load(placed, tensors.shapes, tensors.read, str(folder))
        repeated = tuple(
            table.kept(name, tensors.read(at), BUFFER_DTYPES.get(tensors.kinds[at], ""))
            for at, name in placed.repeated.items()
        )
        config = dataclasses.replace(config, repeated=repeated, unprefixed=head is None and placed.unprefixed(table))
    model: Any = model.clone(config=config)
    if placed.missing:
        params = merge(params, _initialise(model, table, placed, seed))
    return Loaded(model, params, config, _load_tokenizer(folder, config)), report


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    params: Params,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint folder that `load` and the reference implementation read.

    The folder appears complete or not at all: it is written under a temporary name and then renamed. An existing
    checkpoint folder is replaced by two renames; if the machine stops between them, the old folder is still there, next
    to `folder` under a hidden name, and the next `save` puts it back first.

    Args:
        folder: folder to write.
        model: the module; its config becomes config.json.
        params: its parameters, unboxed; arrays on any device that this process can read.
        tokenizer: an object that writes its files by `save(folder)`, or a folder to copy tokenizer files from.
        dtype: dtype to store: float32, float16 or bfloat16.
        shard_bytes: maximum size of a file; larger checkpoints are written as shards with an index.

    Raises:
        CheckpointError: the parameters do not fit the model or are not finite in `dtype`, or `folder` exists and is not
            a checkpoint folder.
    """
    folder = Path(folder)
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(STORED_DTYPES)}, found {dtype!r}")
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))):
        raise CheckpointError(f"{folder}: exists and is not a checkpoint folder (no config.json); not replaced")
    _, architecture = family_of_model(model)
    config: Any = model.config  # type: ignore[attr-defined]
    table = architecture.table(config)
    prefix = table.prefix if config.unprefixed else ""
    tensors = (
        (
            name.removeprefix(prefix),
            np.ascontiguousarray(_narrowed(name, tensor, dtype) if _is_float(tensor) else tensor),
        )
        for name, tensor in table.save(params, config.repeated)
    )
    stored = config.to_json() | {"architectures": [architecture.name]}
    for key in ("dtype", "torch_dtype"):
        if key in stored:
            stored[key] = dtype
    folder.parent.mkdir(parents=True, exist_ok=True)
    before = sorted(folder.parent.glob(f".unfinished-*-{folder.name}.old"))
    if before and not folder.exists():  # the machine stopped between the two renames
        before[0].rename(folder)
    new, old = temporary(folder), temporary(folder.with_name(f"{folder.name}.old"))
    new.mkdir()
    try:
        write_json(new / "config.json", dict(sorted(stored.items())))
        _write_tensors(new, tensors, shard_bytes)
        _save_tokenizer(new, tokenizer)
        for path in (*new.iterdir(), new):
            _sync(path)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


# Families and architectures


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed config.json of a checkpoint folder."""
    require_checkpoint(folder)
    return read_object(folder / "config.json")


def _config_of(family: Family, stored: Mapping[str, Any], folder: Path) -> FamilyConfig:
    members = {}
    for name, key in family.members:
        inner = value_of(stored, key, dict | None, str(folder / "config.json"), None)
        if inner is not None:
            other = family_of_folder(inner, folder)
            members[name] = Member(other, _config_of(other, inner, folder))
    try:
        return family.config.from_json(stored, **members)
    except ConfigError as error:  # which cannot know the folder
        raise ConfigError(str(error).replace("config.json", str(folder / "config.json"), 1)) from None


def family_of_folder(stored: Mapping[str, Any], folder: Path) -> Family:
    """Return the family that a config.json names by `model_type` or, failing that, by `architectures`."""
    name = value_of(stored, "model_type", str | None, str(folder / "config.json"), None)
    if name is None:
        wanted = _architectures(stored)
        for family in families():
            if any(a.name in wanted for a in family.architectures):
                return family
        name = ", ".join(wanted) or "a checkpoint without model_type and architectures"
    if name not in FAMILIES:
        raise CheckpointError(f"{folder}: {name} is not a family of this version; known: {', '.join(FAMILIES)}")
    return stored_family(name, _architectures(stored))


def check_head(family: Family, head: str, folder: Path) -> None:
    """Raise CheckpointError if the family of a checkpoint folder has no such head."""
    if head not in family.heads:
        known = ", ".join(family.heads)
        raise CheckpointError(f"{folder}: a checkpoint of {family.name}; head: expected one of {known}, found {head!r}")


def _architectures(stored: Mapping[str, Any]) -> list[str]:
    names = stored.get("architectures") or []
    return [str(name) for name in names] if isinstance(names, list) else [str(names)]


def _architecture_held(
    family: Family, stored: Mapping[str, Any], config: FamilyConfig, tensors: "Tensors", folder: Path
) -> Architecture:
    """Return the architecture that matches the tensors exactly, trying the one that config.json names first.

    Released folders do not always contain what they say: bert-base-uncased calls itself BertForMaskedLM and contains
    both pretraining heads.
    """
    named = _architectures(stored)
    known = [a.name for a in family.architectures]
    if named and not set(named) & set(known):
        raise CheckpointError(
            f"{folder}: {', '.join(named)} is not an architecture of this version; known: "
            f"{', '.join(dict.fromkeys(known))} (head= takes the encoder alone)"
        )
    first = [a for a in family.architectures if a.name in named]
    others = [a for a in family.architectures if a.name not in named]
    for group in (first, others):
        fitting = [a for a in group if _fits(a, config, tensors)]
        if len({a.name for a in fitting}) > 1:
            raise CheckpointError(
                f"{folder}: its tensors fit {', '.join(a.name for a in fitting)}, and config.json names none of them;"
                " choose one with head="
            )
        if fitting:
            if named and group is others:
                log.warning("%s: called %s, but holds a %s", folder, ", ".join(named), fitting[0].name)
            return fitting[0]
    return first[0] if first else family.architectures[0]


def _fits(architecture: Architecture, config: FamilyConfig, tensors: "Tensors") -> bool:
    placed = architecture.table(config).place(tensors.shapes)
    return not placed.unmapped and not placed.missing


def _architecture_for(family: Family, head: str, config: FamilyConfig, tensors: "Tensors") -> Architecture:
    """Return the architecture with this head; if there are several, the one with the fewest missing tensors."""
    candidates = [a for a in family.architectures if a.head == head]
    return min(candidates, key=lambda a: len(a.table(config).place(tensors.shapes).missing))


def _check_layers(family: Family, config: FamilyConfig, tensors: "Tensors", folder: Path) -> None:
    """Refuse more layers than there are tensors, before the names and the memory of all of them are made.

    Raises:
        CheckpointError: there are more.
    """
    counts = (len(e.numbers) - len(e.absent) for e in family.architectures[0].table(config).entries if e.numbers)
    layers = max(counts, default=0)
    if layers > max(len(tensors.shapes), FEW_LAYERS):
        raise CheckpointError(
            f"{folder}: config.json says {layers:,} layers, and the checkpoint has {len(tensors.shapes):,} tensors"
        )


def _check_kinds(placed: Placed, tensors: "Tensors", folder: Path) -> None:
    """Refuse weights that are not floating-point numbers of at least 16 bits.

    Raises:
        CheckpointError: there are some; all of them are listed.
    """
    found = {stored: tensors.kinds[stored] for stored in placed.sources.values()}
    problems = [f"{name}: {kind}" for name, kind in found.items() if kind not in WEIGHT_KINDS]
    if problems:
        expected = ", ".join(WEIGHT_KINDS)
        raise CheckpointError(
            "\n  ".join([f"{folder}: expected weights stored as {expected}, found", *shortened(problems)])
        )


def _require_all(placed: Placed, folder: Path) -> None:
    problems = []
    for names, what in ((placed.unmapped, "no parameter of this model"), (placed.missing, "not in the checkpoint")):
        problems += shortened([f"{name}: {what}" for name in names], what)
    if problems:
        raise CheckpointError("\n  ".join([f"{folder}: the tensors are not those of the model:", *problems]))


def _take_encoder(
    family: Family, config: FamilyConfig, table: Table, placed: Placed, tensors: "Tensors", folder: Path
) -> tuple[Placed, Report]:
    """Select the encoder of a checkpoint, for a model with another head. Unknown tensors are an error."""
    tables = [a.table(config) for a in family.architectures]
    known = {name for t in tables for name in set(tensors.shapes) - set(t.place(tensors.shapes).unmapped)}
    core = {n for e in table.entries if family.is_encoder_parameter(e.path) for n in e.names}
    refitted = [
        name
        for name, stored in placed.sources.items()
        if name not in core and tensors.shapes[stored] != table.stored_shape(name)
    ]
    unused = [*placed.unmapped, *(placed.sources[name] for name in refitted)]
    missing = [*placed.missing, *refitted]
    _require_all(
        placed._replace(
            unmapped=[n for n in placed.unmapped if n not in known], missing=[n for n in missing if n in core]
        ),
        folder,
    )
    sources = {name: stored for name, stored in placed.sources.items() if name not in refitted}
    return Placed(sources, placed.repeated, [], missing), Report(tuple(missing), tuple(unused))


def _initialise(model: nn.Module, table: Table, placed: Placed, seed: int) -> Params:
    """Initialise the missing parameters as in a new model (the compiler removes the initialisation of the others)."""
    missing = set(placed.missing)
    paths = {entry.path for entry in table.entries if not missing.isdisjoint(entry.names)}

    def draw(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        params = nn.unbox(init_params(model, key))
        return {path: leaf for path, leaf in flatten(params) if path in paths}

    drawn: dict[str, Any] = {}
    for path, leaf in jit_once(draw)(jax.random.key(seed)).items():
        branch: dict[str, Any] = {}
        inner = branch
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = np.asarray(leaf)
        drawn = merge(drawn, branch)
    return drawn


# Tensors


class Tensors:
    """Tensors of a checkpoint folder, in one file or several, read one by one. A context manager."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, str] = {}
        files, index = _tensor_files(folder)
        places: dict[str, str] = {}
        for path in files:
            try:
                handle = self._stack.enter_context(safe_open(path, framework="np"))
            except SafetensorError as error:
                raise CheckpointError(f"{path}: not a safetensors file ({error}){_pointer_hint(path)}") from None
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                if name in places:
                    raise CheckpointError(f"{folder}: {name} is in two files, {places[name]} and {path.name}")
                places[name], self._files[name] = path.name, handle
                part = handle.get_slice(name)
                self.shapes[name], self.kinds[name] = tuple(part.get_shape()), part.get_dtype()
        if index is not None and index != places:
            missing, more = sorted(index.keys() - places.keys()), sorted(places.keys() - index.keys())
            moved = [f"{n} in {places[n]}" for n in sorted(index.keys() & places.keys()) if index[n] != places[n]]
            found = {"missing": missing, "not listed": more, "elsewhere": moved}
            said = "; ".join(f"{what}: {', '.join(shortened(names))}" for what, names in found.items() if names)
            raise CheckpointError(f"{folder / INDEX}: does not match its shards: {said}")

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, as stored."""
        return self._files[name].get_tensor(name)

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _tensor_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the folder's safetensors files, and their index (name -> file), if there is one."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    index = folder / INDEX
    if not index.is_file():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        if others:
            raise CheckpointError(
                f"{folder}: holds {', '.join(others)}, but no {SINGLE}. A pickle can run any code when it is read, so"
                " it is refused; convert it once, where you trust it, with the reference implementation."
            )
        raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX}")
    places: dict[str, str] = value_of(read_object(index), "weight_map", dict[str, str], str(index))
    shards = sorted(set(places.values()))
    if any(Path(shard).name != shard for shard in shards):
        raise CheckpointError(f"{index}: shards must lie in the folder itself, found {', '.join(shards)}")
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder}: {INDEX} lists files that are missing: {', '.join(absent)}")
    return [folder / shard for shard in shards], places


def _pointer_hint(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            return "; it is a Git LFS pointer, fetch the file itself with `git lfs pull`"
    return ""


def _narrowed(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    """Return a tensor in the dtype to store."""
    with np.errstate(over="ignore"):
        narrowed = tensor.astype(STORED_DTYPES[dtype])
    if not np.isfinite(narrowed.astype(np.float32)).all():
        raise CheckpointError(f"{name}: not finite in {dtype}; nothing was saved")
    return narrowed


def _is_float(tensor: np.ndarray) -> bool:
    return jnp.issubdtype(tensor.dtype, jnp.floating)


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """Write one file, or shards of at most `shard_bytes` (a larger tensor gets its own shard) and their index."""
    written: list[tuple[Path, list[str]]] = []
    shard: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        path = folder / f"shard-{len(written)}"
        with replacing(path) as unfinished:  # with the permissions of the umask
            save_file(shard, unfinished, metadata={"format": "pt"})
        written.append((path, list(shard)))
        shard, size = {}, 0

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(written) == 1:
        written[0][0].rename(folder / SINGLE)
        return
    places = {}
    for number, (path, names) in enumerate(written, start=1):
        shard_name = f"model-{number:05}-of-{len(written):05}.safetensors"
        path.rename(folder / shard_name)
        places |= dict.fromkeys(names, shard_name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / INDEX, index)


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk: a rename must not survive a crash that loses the contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Tokenizers


def _load_tokenizer(folder: Path, config: Any) -> Any:
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        return Processor.read(folder)
    if any((folder / name).is_file() for name in ("subwords.json", "source.spm")):
        from ...data.tokenizers.pairs import load_subwords

        return load_subwords(folder)
    from ...data.tokenizers.loading import load_tokenizer
    from ...data.tokenizers.tokenizer import check_vocabulary

    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size, str(folder))
    return tokenizer


def _save_tokenizer(folder: Path, tokenizer: Tokenizer | str | os.PathLike[str] | None) -> None:
    if tokenizer is None:
        return
    if not isinstance(tokenizer, str | os.PathLike):
        tokenizer.save(folder)
        return
    source = Path(tokenizer)
    copied = [shutil.copy2(source / name, folder) for name in TOKENIZER_FILES if (source / name).is_file()]
    if not copied:
        raise FileNotFoundError(f"{source}: no tokenizer files (none of {', '.join(TOKENIZER_FILES)})")

"""Reversible tables between a model's parameters and the names in a released checkpoint.

A table is a list of entries, one for each parameter: the stored name, the path in the parameter tree, and a transform
between the two layouts. `{layer}` in a stored name stands for the layer's number; those tensors are stacked along the
parameter's first axis. The same table reads, writes, and renames gradients, so that reading and then writing gives back
the same bytes.

How a table describes what released checkpoints contain:

- a linear map stored as PyTorch's Linear [outputs, inputs], or as GPT-2's Conv1D [inputs, outputs]: `Transposed`,
  `Untransposed`, both of them a `Kernel`;
- several maps fused into one tensor (query, key and value): entries that share a name (`fused_entries`);
- a stack of only some of the layers, or with layers that lack the tensor: `Entry.layers`, `Entry.absent`;
- sets of tensors that layers share, numbered by group and within the group (ALBERT): `Entry.inner`;
- a tensor of only one layer (T5's relative bias): a name without `{layer}`,
  `encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight`;
- copies of tied tensors, constants, and unused buffers: `Table.tied`, `Table.buffers`, `Table.dropped`.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

LAYER, INNER = "{layer}", "{inner}"
Params = Mapping[str, Any]


class CheckpointError(ValueError):
    """Raised for a checkpoint folder that cannot be read as requested; the message lists every problem."""


PROBLEMS_SHOWN = 20


def shortened(problems: Sequence[str], kind: str = "") -> list[str]:
    """Return the first twenty problems, and the number of further ones of this kind."""
    more = len(problems) - PROBLEMS_SHOWN
    return [*problems[:PROBLEMS_SHOWN], *([f"and {more:,} more{kind and f': {kind}'}"] if more > 0 else [])]


class Transform(Protocol):
    """A reversible change of layout: `save(load(x))` is `x`, byte for byte."""

    @property
    def stored_shape(self) -> tuple[int, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def load(self, stored: np.ndarray) -> np.ndarray: ...

    def save(self, parameter: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Reshaped:
    """The same numbers in the same order: a bias [H·D] as [H, D]."""

    stored_shape: tuple[int, ...]
    shape: tuple[int, ...]

    def load(self, stored: np.ndarray) -> np.ndarray:
        return stored.reshape(self.shape)

    def save(self, parameter: np.ndarray) -> np.ndarray:
        return parameter.reshape(self.stored_shape)


@dataclass(frozen=True)
class Kernel(ABC):
    """A linear map's weight as a kernel [*inputs, *outputs] of `layers.Linear`; subclasses define the stored layout."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.inputs, *self.outputs)

    @property
    @abstractmethod
    def stored_shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def output_axis(self) -> int:
        """Axis of the outputs in the stored tensor."""

    @abstractmethod
    def load(self, stored: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def save(self, parameter: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Transposed(Kernel):
    """A linear map's weight, stored [outputs, inputs] (PyTorch's Linear), as a kernel [*inputs, *outputs]."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (math.prod(self.outputs), math.prod(self.inputs))

    @property
    def output_axis(self) -> int:
        return 0

    def load(self, stored: np.ndarray) -> np.ndarray:
        return stored.T.reshape(self.shape)

    def save(self, parameter: np.ndarray) -> np.ndarray:
        return parameter.reshape(math.prod(self.inputs), math.prod(self.outputs)).T


@dataclass(frozen=True)
class Untransposed(Kernel):
    """A linear map's weight, stored [inputs, outputs] (GPT-2's Conv1D), as a kernel [*inputs, *outputs]."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (math.prod(self.inputs), math.prod(self.outputs))

    @property
    def output_axis(self) -> int:
        return 1

    def load(self, stored: np.ndarray) -> np.ndarray:
        return stored.reshape(self.shape)

    def save(self, parameter: np.ndarray) -> np.ndarray:
        return parameter.reshape(self.stored_shape)


def same(*shape: int) -> Reshaped:
    """Return the transform of a parameter that is stored in its own shape."""
    return Reshaped(shape, shape)


Layers = int | Sequence[int] | None


class Entry(NamedTuple):
    """One parameter, and its place in a checkpoint.

    Attributes:
        name: name of the stored tensor; `{layer}` stands for the number of the layer.
        path: path in the parameter tree.
        transform: between the stored layout and the parameter's; for a stack, of one layer; for a fused tensor, of this
            parameter's part.
        layers: None for one tensor. N for a stack of layers 0 to N - 1 along the parameter's first axis; or the numbers
            of the layers, one per row of the stack: `range(0, 12, 3)` for every third of twelve.
        fused: axis of the stored tensor along which the entries that share this name are concatenated, in the table's
            order; None if the tensor contains only this parameter.
        absent: layers of the stack that lack the tensor. Their rows are read as `fill` and never written.
        fill: value of the rows of `absent` layers.
        inner: number of layers that the stored name numbers within a `{layer}`: layer i is number i % inner, `{inner}`,
            within number i // inner.
    """

    name: str
    path: tuple[str, ...]
    transform: Transform
    layers: Layers = None
    fused: int | None = None
    absent: tuple[int, ...] = ()
    fill: float = 0.0
    inner: int = 1

    @property
    def numbers(self) -> Sequence[int] | None:
        """Layer number of each row of the stack; None without a stack."""
        return range(self.layers) if isinstance(self.layers, int) else self.layers

    @property
    def rows(self) -> dict[str, int | None]:
        """Stored name -> row of the stack; None without a stack."""
        if self.numbers is None:
            return {self.name: None}
        return {
            self.name.replace(LAYER, str(number // self.inner)).replace(INNER, str(number % self.inner)): row
            for row, number in enumerate(self.numbers)
            if number not in self.absent
        }

    @property
    def names(self) -> list[str]:
        """All stored names."""
        return list(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.transform.shape if self.numbers is None else (len(self.numbers), *self.transform.shape)


def linear_entries(
    name: str,
    path: tuple[str, ...],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    layers: Layers = None,
    *,
    bias: bool = True,
    kernel: type[Kernel] = Transposed,
) -> list[Entry]:
    """Return the entries of one linear map's weight and bias, `layers.Linear` at `path`."""
    return fused_entries(name, [path], inputs, outputs, layers, bias=bias, kernel=kernel)


def fused_entries(
    name: str,
    paths: Sequence[tuple[str, ...]],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    layers: Layers = None,
    *,
    bias: bool = True,
    kernel: type[Kernel] = Transposed,
) -> list[Entry]:
    """Return the entries of linear maps of the same inputs, whose outputs are stored concatenated.

    Args:
        name: stored name of the fused map.
        paths: path of each `layers.Linear` in the tree, in stored order.
        inputs: sizes of the input axes of each map.
        outputs: sizes of the output axes of each map.
        layers: as in `Entry`.
        bias: whether the maps have a bias.
        kernel: stored layout of the weight.
    """
    weight = kernel(inputs, outputs)
    flat = Reshaped((math.prod(outputs),), outputs)
    fused = len(paths) > 1
    entries = []
    for path in paths:
        axis = weight.output_axis if fused else None
        entries.append(Entry(f"{name}.weight", (*path, "kernel"), weight, layers, axis))
        if bias:
            entries.append(Entry(f"{name}.bias", (*path, "bias"), flat, layers, 0 if fused else None))
    return entries


def norm_entries(
    name: str,
    path: tuple[str, ...],
    width: int,
    layers: Layers = None,
    *,
    bias: bool = True,
    absent: tuple[int, ...] = (),
) -> list[Entry]:
    """Return the entries of a `layers.LayerNorm` or `RMSNorm` at `path`; `absent` layers get gain 1 and bias 0."""
    gain = Entry(f"{name}.weight", (*path, "scale"), same(width), layers, absent=absent, fill=1.0)
    return [gain, *([Entry(f"{name}.bias", (*path, "bias"), same(width), layers, absent=absent)] if bias else [])]


class Placed(NamedTuple):
    """Assignment of a checkpoint's names to a table."""

    sources: dict[str, str]  # the table's name -> the checkpoint's name
    repeated: dict[str, str]  # the checkpoint's name of a tied copy or buffer -> the table's name for it
    unmapped: list[str]  # the checkpoint's names that are not in the table
    missing: list[str]  # the table's names that are not in the checkpoint

    def unprefixed(self, table: "Table") -> bool:
        """Tell whether the checkpoint's names lack the table's prefix, where the table's have it."""
        stored = [at for name, at in self.sources.items() if table.prefix and name.startswith(table.prefix)]
        return bool(stored) and not any(at.startswith(table.prefix) for at in stored)


@dataclass(frozen=True)
class Table:
    """The entries of one model, and what else its checkpoints may contain.

    Attributes:
        entries: one per parameter.
        prefix: prefix of the encoder's names in task models' checkpoints; names with and without it are read.
        renamed: (regular expression, replacement) of names that differ in other versions' checkpoints.
        tied: name -> name of the tensor that it repeats. Such a copy must be equal, and is written if it was read.
        buffers: name -> required value, for constants of the implementation that used to be stored. They are written in
            the dtype in which they were read.
        computed: name -> value of constants that the implementation computes, in a rounding that depends on its
            machine. They are written as they were read.
        dropped: names of tensors that are neither read nor written, such as causal masks.
    """

    entries: tuple[Entry, ...]
    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, np.ndarray] = field(default_factory=dict)
    computed: Mapping[str, np.ndarray] = field(default_factory=dict)
    dropped: Collection[str] = ()

    def place(self, stored_names: Iterable[str]) -> Placed:
        """Match a checkpoint's names, in any of the accepted forms, with the table's."""
        known = {*self._parts, *self.tied, *self.buffers, *self.computed, *self.dropped}
        sources: dict[str, str] = {}
        repeated: dict[str, str] = {}
        unmapped: list[str] = []
        for stored in stored_names:
            name = self._canonical(stored, known)
            if name is None or name in sources:
                unmapped.append(stored)
            elif name in self._parts:
                sources[name] = stored
            elif name not in self.dropped:
                repeated[stored] = name
        for stored, name in list(repeated.items()):
            # Of two tied tensors, a checkpoint may contain only the copy.
            if name in self.tied and self.tied[name] not in sources:
                sources[self.tied[name]] = stored
                del repeated[stored]
        return Placed(sources, repeated, unmapped, [name for name in self.names if name not in sources])

    @property
    def names(self) -> list[str]:
        """All stored names, in the order of the entries."""
        return list(self._parts)

    @cached_property
    def _parts(self) -> Mapping[str, Sequence["_Part"]]:
        """Stored name -> the parts of parameters in its tensor, in order."""
        parts: dict[str, list[_Part]] = {}
        for entry in self.entries:
            for name, row in entry.rows.items():
                held = parts.setdefault(name, [])
                if held and (entry.fused is None or held[0].entry.fused != entry.fused):
                    raise ValueError(f"{name}: of two entries, which are not parts of one tensor along one axis")
                held.append(_Part(entry, row))
        return parts

    def _canonical(self, stored: str, known: set[str]) -> str | None:
        for old, new in self.renamed:
            stored = re.sub(old, new, stored)
        forms = (stored, self.prefix + stored, stored.removeprefix(self.prefix))
        return next((form for form in forms if form in known), None)

    def load(
        self, placed: Placed, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], where: str
    ) -> dict[str, Any]:
        """Read the parameter tree of a checkpoint, float32 NumPy arrays, without entries that are missing in `placed`.

        Args:
            placed: assignment of the names, by `place`.
            shapes: shapes of the stored tensors, by the checkpoint's names.
            read: returns a stored tensor by the checkpoint's name.
            where: the folder, for messages.

        Raises:
            CheckpointError: a stored tensor has another shape than the parameter or is not finite, or a tied copy or a
                buffer has another value than required; all of them are listed.
        """
        problems = []
        missing = set(placed.missing)
        for name, stored in placed.sources.items():
            expected = self.stored_shape(name)
            if shapes[stored] != expected:
                problems.append(f"{stored}: expected shape {list(expected)}, found {list(shapes[stored])}")
        for stored, name in placed.repeated.items():
            problem = self._check_repeated(stored, name, placed, read)
            if problem:
                problems.append(problem)
        if problems:
            raise CheckpointError(
                "\n  ".join([f"{where}: tensors that do not fit the model of config.json:", *shortened(problems)])
            )
        params = {
            entry.path: np.full(entry.shape, entry.fill, np.float32)
            for entry in self.entries
            if missing.isdisjoint(entry.names)
        }
        for name, parts in self._parts.items():
            if any(part.entry.path in params for part in parts):
                for part, piece in zip(parts, _split(parts, read(placed.sources[name])), strict=True):
                    slot = part.slot(params)
                    with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite, and refused
                        slot[...] = part.entry.transform.load(piece)
                    if not np.isfinite(slot).all():
                        problems.append(placed.sources[name])
        if problems:
            listed = ", ".join(shortened(list(dict.fromkeys(problems))))
            raise CheckpointError(f"{where}: weights that are NaN or infinite, in {listed}")
        return unflatten_dict(params)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in which the tensor of this name is stored."""
        parts = self._parts[name]
        axis = parts[0].entry.fused
        shape = list(parts[0].entry.transform.stored_shape)
        if axis is not None:
            shape[axis] = sum(part.entry.transform.stored_shape[axis] for part in parts)
        return tuple(shape)

    def _check_repeated(self, stored: str, name: str, placed: Placed, read: Callable[[str], np.ndarray]) -> str | None:
        constant = self.buffers.get(name, self.computed.get(name))
        if constant is not None:
            found = read(stored)
            near = found.shape == constant.shape and np.allclose(found, constant, rtol=1e-5, atol=0)
            if not (near if name in self.computed else np.array_equal(found, constant)):
                return f"{stored}: expected the constant {constant}, found {found}"
        else:
            original = placed.sources[self.tied[name]]
            if not np.array_equal(read(stored), read(original)):
                return f"{stored}: differs from {original}; only tied weights are supported"
        return None

    def kept(self, name: str, stored: np.ndarray, dtype: str) -> tuple[str, str]:
        """Return what `save` needs to write a tied copy or buffer as it is stored: (name, dtype, or dtype:bytes)."""
        return name, f"{dtype}:{stored.tobytes().hex()}" if name in self.computed else dtype

    def save(self, params: Params, repeated: Sequence[tuple[str, str]] = ()) -> Iterator[tuple[str, np.ndarray]]:
        """Yield a parameter tree's tensors with their stored names.

        Args:
            params: the parameter tree.
            repeated: tied copies and buffers to write too, by `kept`; a copy's dtype is that of the parameters.

        Raises:
            CheckpointError: a parameter is not in the table, is missing, or has another shape.
        """
        leaves = dict(flatten(params))
        known = {entry.path for entry in self.entries}
        problems = [f"{'/'.join(path)}: no stored name" for path in leaves if path not in known]
        for entry in self.entries:
            if entry.path not in leaves:
                problems.append(f"{'/'.join(entry.path)}: missing")
            elif leaves[entry.path].shape != entry.shape:
                found = list(leaves[entry.path].shape)
                problems.append(f"{'/'.join(entry.path)}: expected shape {list(entry.shape)}, found {found}")
        if problems:
            raise CheckpointError("\n  ".join(["parameters that do not fit the model:", *shortened(problems)]))
        arrays = {path: np.asarray(leaf) for path, leaf in leaves.items()}
        originals = {self.tied[name]: np.zeros(0) for name, _ in repeated if name in self.tied}
        for name, parts in self._parts.items():
            pieces = [part.entry.transform.save(part.slot(arrays)) for part in parts]
            tensor = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=parts[0].entry.fused)
            if name in originals:
                originals[name] = tensor
            yield name, tensor
        for name, kept in repeated:
            dtype, _, stored = kept.partition(":")
            if name in self.computed:
                yield name, np.frombuffer(bytes.fromhex(stored), dtype).reshape(self.computed[name].shape)
            else:
                yield name, originals[self.tied[name]] if name in self.tied else self.buffers[name].astype(dtype)


class _Part(NamedTuple):
    """The part of a parameter that one stored tensor, or a part of it, contains: all of it, or a row of the stack."""

    entry: Entry
    row: int | None

    def slot(self, arrays: Mapping[tuple[str, ...], np.ndarray]) -> np.ndarray:
        """Return the part as a view of the parameter in `arrays`."""
        array = arrays[self.entry.path]
        return array if self.row is None else array[self.row, ...]


def _split(parts: Sequence[_Part], tensor: np.ndarray) -> Sequence[np.ndarray]:
    axis = parts[0].entry.fused
    if axis is None:
        return [tensor]
    sizes = [part.entry.transform.stored_shape[axis] for part in parts]
    return np.split(tensor, np.cumsum(sizes)[:-1], axis=axis)


def flatten(tree: Params) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Return the (path, leaf) pairs of nested dictionaries."""
    return flatten_dict(tree).items()


def merge(first: Params, second: Params) -> dict[str, Any]:
    """Return a tree with the leaves of both; `first` takes precedence."""
    return unflatten_dict({**flatten_dict(second), **flatten_dict(first)})

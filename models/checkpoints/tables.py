"""Reversible tables between a model's parameters and the names in a released checkpoint.

A table is a list of entries, one a parameter: the stored name, the path in the parameter tree, and a transform between
the two layouts. `{layer}` in a stored name stands for 0..N-1; those tensors are stacked along a parameter's first axis.
The same table reads, writes, and renames gradients, so that reading and then writing gives back the same bytes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

LAYER = "{layer}"
Params = Mapping[str, Any]


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be read as asked, with everything that is wrong with it."""


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
class Transposed:
    """A linear map's weight, stored [outputs, inputs], as a kernel [*inputs, *outputs]."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (math.prod(self.outputs), math.prod(self.inputs))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.inputs, *self.outputs)

    def load(self, stored: np.ndarray) -> np.ndarray:
        return stored.T.reshape(self.shape)

    def save(self, parameter: np.ndarray) -> np.ndarray:
        return parameter.reshape(math.prod(self.inputs), math.prod(self.outputs)).T


def same(*shape: int) -> Reshaped:
    """Stored as it is."""
    return Reshaped(shape, shape)


class Entry(NamedTuple):
    """One parameter: stored as `name`, found in the tree at `path`; `layers` of them where the name holds `{layer}`."""

    name: str
    path: tuple[str, ...]
    transform: Transform
    layers: int | None = None

    @property
    def names(self) -> list[str]:
        return [self.name] if self.layers is None else [self.name.replace(LAYER, str(i)) for i in range(self.layers)]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.transform.shape if self.layers is None else (self.layers, *self.transform.shape)


def linear_entries(
    name: str, path: tuple[str, ...], inputs: tuple[int, ...], outputs: tuple[int, ...], layers: int | None = None
) -> list[Entry]:
    """The weight and bias of one linear map, `layers.Linear` at `path`."""
    return [
        Entry(f"{name}.weight", (*path, "kernel"), Transposed(inputs, outputs), layers),
        Entry(f"{name}.bias", (*path, "bias"), Reshaped((math.prod(outputs),), outputs), layers),
    ]


def norm_entries(name: str, path: tuple[str, ...], width: int, layers: int | None = None) -> list[Entry]:
    """The gain and bias of one `layers.LayerNorm` at `path`."""
    return [
        Entry(f"{name}.weight", (*path, "scale"), same(width), layers),
        Entry(f"{name}.bias", (*path, "bias"), same(width), layers),
    ]


class Placed(NamedTuple):
    """Where the names of a checkpoint go."""

    sources: dict[str, str]  # the table's name -> the checkpoint's name
    repeated: dict[str, str]  # the checkpoint's name of a tied copy or buffer -> the table's name for it
    unmapped: list[str]  # the checkpoint's names that the table does not know
    missing: list[str]  # the table's names that the checkpoint does not hold


@dataclass(frozen=True)
class Table:
    """The entries of one model, and what else its checkpoints may hold.

    Attributes:
        entries: one a parameter.
        prefix: what a task model's checkpoint puts before the encoder's names; either form is read.
        renamed: (old ending, new ending) of names that older checkpoints have otherwise.
        tied: name -> the name whose tensor it repeats. Such a copy is read if it is equal, and written where it was.
        buffers: name -> what it must hold. Constants of the implementation that once were stored.
    """

    entries: tuple[Entry, ...]
    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, np.ndarray] = field(default_factory=dict)

    def place(self, stored_names: Iterable[str]) -> Placed:
        """Match a checkpoint's names against the table's, under any of the accepted forms."""
        known = {name for entry in self.entries for name in entry.names}
        sources: dict[str, str] = {}
        repeated: dict[str, str] = {}
        unmapped: list[str] = []
        for stored in stored_names:
            name = self._canonical(stored, {*known, *self.tied, *self.buffers})
            if name is None or name in sources:
                unmapped.append(stored)
            elif name in known:
                sources[name] = stored
            else:
                repeated[stored] = name
        for stored, name in list(repeated.items()):
            # Of two tied tensors a checkpoint may hold the copy alone.
            if name in self.tied and self.tied[name] not in sources:
                sources[self.tied[name]] = stored
                del repeated[stored]
        return Placed(sources, repeated, unmapped, [name for name in self.names if name not in sources])

    @property
    def names(self) -> list[str]:
        """All stored names, in the entries' order."""
        return [name for entry in self.entries for name in entry.names]

    def _canonical(self, stored: str, known: set[str]) -> str | None:
        for old, new in self.renamed:
            if stored.endswith(old):
                stored = stored.removesuffix(old) + new
        forms = (stored, self.prefix + stored, stored.removeprefix(self.prefix))
        return next((form for form in forms if form in known), None)

    def load(
        self, placed: Placed, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], where: str
    ) -> dict[str, Any]:
        """The parameter tree of a checkpoint, float32 NumPy arrays; entries that `placed` calls missing are left out.

        Args:
            placed: where the names go.
            shapes: the stored tensors' shapes, by the checkpoint's names.
            read: gives a stored tensor by the checkpoint's name.
            where: the folder, for messages.

        Raises:
            CheckpointError: a stored tensor has another shape than the parameter, or a tied copy or a buffer is not
                what it should be; all of them are named.
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
                "\n  ".join([f"{where}: tensors that do not fit the model of config.json:", *problems])
            )
        params: dict[str, Any] = {}
        for entry in self.entries:
            if missing.isdisjoint(entry.names):
                parameter = np.empty(entry.shape, np.float32)
                slots = [parameter] if entry.layers is None else parameter
                for slot, name in zip(slots, entry.names, strict=True):
                    slot[...] = entry.transform.load(read(placed.sources[name]))
                _insert(params, entry.path, parameter)
        return params

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape in which a tensor of this name is stored."""
        return next(entry.transform.stored_shape for entry in self.entries if name in entry.names)

    def _check_repeated(self, stored: str, name: str, placed: Placed, read: Callable[[str], np.ndarray]) -> str | None:
        if name in self.buffers:
            if not np.array_equal(read(stored), self.buffers[name]):
                return f"{stored}: expected the constant {self.buffers[name]}, found {read(stored)}"
        else:
            original = placed.sources[self.tied[name]]
            if not np.array_equal(read(stored), read(original)):
                return f"{stored}: differs from {original}; only tied weights are supported"
        return None

    def save(self, params: Params, repeated: Iterable[str] = ()) -> Iterator[tuple[str, np.ndarray]]:
        """A parameter tree's tensors by their stored names; `repeated` names tied copies and buffers to write too.

        Raises:
            CheckpointError: a parameter that the table does not name, or one missing, or of another shape.
        """
        leaves = dict(flatten(params))
        problems = [
            f"{'/'.join(path)}: no stored name" for path in leaves if path not in {e.path for e in self.entries}
        ]
        for entry in self.entries:
            if entry.path not in leaves:
                problems.append(f"{'/'.join(entry.path)}: missing")
            elif leaves[entry.path].shape != entry.shape:
                found = list(leaves[entry.path].shape)
                problems.append(f"{'/'.join(entry.path)}: expected shape {list(entry.shape)}, found {found}")
        if problems:
            raise CheckpointError("\n  ".join(["parameters that do not fit the model:", *problems]))
        written: dict[str, np.ndarray] = {}
        for entry in self.entries:
            parameter = np.asarray(leaves[entry.path])
            slots = [parameter] if entry.layers is None else parameter
            for name, slot in zip(entry.names, slots, strict=True):
                written[name] = entry.transform.save(slot)
                yield name, written[name]
        for name in repeated:
            yield name, self.buffers[name] if name in self.buffers else written[self.tied[name]]


def flatten(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, leaf) of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, (*path, key))
        else:
            yield (*path, key), value


def _insert(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def merge(first: Params, second: Params) -> dict[str, Any]:
    """A tree with the leaves of both; `first` wins."""
    merged: dict[str, Any] = {}
    for tree in (second, first):
        for path, leaf in flatten(tree):
            _insert(merged, path, leaf)
    return merged

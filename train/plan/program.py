"""Read a compiled program (XLA's HLO as text): operations, bytes moved and collectives of one run on one device.

The compiler's own cost analysis counts the body of a loop once. Here each loop counts as often as it runs, which its
condition says, so that a scan over layers counts all of them.
"""

import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}  # fmt: skip

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "after-all"}
FREE |= {"partition-id", "replica-id", "add-dependency", "opt-barrier", "iota", "domain"}
"""Instructions that move nothing by themselves."""


class Array(NamedTuple):
    """Type of an array."""

    dtype: str
    dims: tuple[int, ...]
    main_memory: bool  # whether it is in the device's main memory, rather than in one on the chip

    @property
    def bytes(self) -> float:
        """Size without padding."""
        return BYTES.get(self.dtype, 1) * math.prod(self.dims)

    @property
    def moved(self) -> float:
        """Bytes that reading or writing it moves from or to main memory."""
        return self.bytes if self.main_memory else 0.0


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    arrays: tuple[Array, ...]  # of its result
    opcode: str
    operands: tuple[str, ...]
    inside: str  # what stands between its parentheses
    attributes: str

    def called(self, key: str = "calls") -> str | None:
        """Return the name of the computation that it calls."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def numbers(self, key: str) -> tuple[int, ...]:
        """Return the numbers of an attribute such as `lhs_contracting_dims={1,2}`."""
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(number) for number in found[1].split(",") if number) if found else ()


class Collective(NamedTuple):
    """A collective operation, as often as a step runs it."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, along which devices take part
    devices: int  # that take part
    bytes: float  # of one device's data, at each run: of the whole result for all-gather
    runs: int  # in a step

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, by the usual algorithms on a ring."""
        n = max(1, self.devices)
        factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return factor * self.bytes * self.runs


class Totals(NamedTuple):
    """What a step does on one device."""

    flops: float  # of matrix products and convolutions
    bytes: float  # read from and written to main memory
    collectives: tuple[Collective, ...]
    kernels: dict[str, int]  # custom kernels, whose operations are not in the program -> runs

    def times(self, count: int) -> "Totals":
        collectives = tuple(one._replace(runs=one.runs * count) for one in self.collectives)
        kernels = {name: runs * count for name, runs in self.kernels.items()}
        return Totals(self.flops * count, self.bytes * count, collectives, kernels)

    def plus(self, other: "Totals") -> "Totals":
        kernels = {n: self.kernels.get(n, 0) + other.kernels.get(n, 0) for n in {**self.kernels, **other.kernels}}
        return Totals(self.flops + other.flops, self.bytes + other.bytes, self.collectives + other.collectives, kernels)


NOTHING = Totals(0.0, 0.0, (), {})


class Program:
    """A compiled program.

    Args:
        text: its HLO, `compiled.as_text()`.
        mesh: names and sizes of the mesh's axes; devices are numbered in the mesh's order.
    """

    def __init__(self, text: str, mesh: dict[str, int]):
        self._mesh = mesh
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._roots: dict[str, str] = {}
        self._known: dict[str, Totals] = {}
        self._entry = ""
        self._read(text)

    @cached_property
    def totals(self) -> Totals:
        """What one run does on one device."""
        found = self._totals(self._entry)
        merged: dict[Collective, int] = {}
        for one in found.collectives:
            key = one._replace(runs=0)
            merged[key] = merged.get(key, 0) + one.runs
        collectives = tuple(one._replace(runs=count) for one, count in merged.items())
        return found._replace(collectives=tuple(sorted(collectives, key=lambda one: -one.sent)))

    # --- text ---

    def _read(self, text: str) -> None:
        current = ""
        for line in text.splitlines():
            if not current:
                header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
                if header:
                    current = header[2]
                    self._computations[current] = {}
                    self._entry = current if header[1] else self._entry
            elif line.startswith("}"):
                current = ""
            else:
                found = _instruction(line.strip())
                if found is not None:
                    self._computations[current][found.name] = found
                    if line.lstrip().startswith("ROOT "):
                        self._roots[current] = found.name

    # --- operations ---

    def _totals(self, name: str) -> Totals:
        if name not in self._known:
            self._known[name] = NOTHING  # a computation never calls itself
            total = NOTHING
            for instruction in self._computations[name].values():
                total = total.plus(self._of(instruction, self._computations[name]))
            self._known[name] = total
        return self._known[name]

    def _of(self, i: Instruction, here: dict[str, Instruction]) -> Totals:
        base = i.opcode.removesuffix("-start")
        called = i.called()
        if i.opcode == "while":
            body = i.called("body")
            return NOTHING if body is None else self._totals(body).times(self._trips(i))
        if i.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
            names = re.findall(r"[\w.\-]+", branches[1]) if branches else [
                name for key in ("true_computation", "false_computation") if (name := i.called(key))
            ]  # fmt: skip
            return max((self._totals(name) for name in names), key=lambda t: t.flops + t.bytes, default=NOTHING)
        if i.opcode == "call":
            to = i.called("to_apply") or called
            return NOTHING if to is None else self._totals(to)
        moved = 0.0 if i.opcode in FREE or i.opcode.endswith("-done") else self._moved(i, here)
        if base == "fusion" and called is not None:
            return self._totals(called)._replace(bytes=moved)
        if i.opcode == "async-start" and called is not None:
            return self._totals(called)
        flops, kernels, collectives = 0.0, {}, ()
        if i.opcode == "dot":
            flops = _dot(i, here[i.operands[0]].arrays[0], i.numbers("lhs_contracting_dims"))
        elif i.opcode == "convolution":
            flops = _convolution(i, *(here[name].arrays[0] for name in i.operands[:2]))
        elif i.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
            flops, kernels = _custom_call(i, target[1] if target else "", here)
        elif base in COLLECTIVES:
            collectives = (self._collective(i, base, here),)
        return Totals(flops, moved, collectives, kernels)

    def _trips(self, loop: Instruction) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        name = loop.called("condition")
        condition = self._computations.get(name or "", {})
        limits = [
            int(one.inside)
            for one in condition.values()
            if one.opcode == "constant" and re.fullmatch(r"\d+", one.inside)
        ]
        return max(limits, default=1)

    # --- bytes ---

    def _moved(self, i: Instruction, here: dict[str, Instruction]) -> float:
        """Return the bytes that an instruction outside of fusions reads from and writes to main memory."""
        if i.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            return i.arrays[0].bytes
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * sum(array.moved for array in i.arrays)
        if i.opcode == "dynamic-update-slice":
            return 2 * here[i.operands[1]].arrays[0].moved
        called = i.called() if i.opcode in ("fusion", "fusion-start") else None
        if called is None:
            read = sum(array.moved for name in i.operands if name in here for array in here[name].arrays)
            return read + sum(array.moved for array in i.arrays)
        read = 0.0
        for number, name in enumerate(i.operands):
            arrays = here[name].arrays if name in here else ()
            if arrays and arrays[0].main_memory:
                read += min(sum(array.bytes for array in arrays), self._read_of(called, number))
        written = self._written(called, self._roots[called])
        return read + min(sum(array.moved for array in i.arrays), written)

    def _read_of(self, computation: str, number: int) -> float:
        """Return the bytes that a fusion reads of its operand: of slices, only what they take."""
        here = self._computations[computation]
        parameter = next((i for i in here.values() if i.opcode == "parameter" and i.inside == str(number)), None)
        if parameter is None:
            return math.inf
        total = 0.0
        for user in here.values():
            if parameter.name not in user.operands:
                continue
            place = user.operands.index(parameter.name)
            called = user.called() if user.opcode == "fusion" else None
            if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode == "dynamic-update-slice" and place == 0:
                continue  # in place
            elif called is not None:
                total += self._read_of(called, place)
            else:
                return math.inf
        return total

    def _written(self, computation: str, name: str) -> float:
        """Return the bytes that a fusion writes: of an updated slice, only the slice."""
        here = self._computations[computation]
        i = here[name]
        if i.opcode == "tuple":
            return sum(self._written(computation, part) for part in i.operands)
        if i.opcode == "bitcast":
            return self._written(computation, i.operands[0])
        if i.opcode == "dynamic-update-slice":
            return here[i.operands[1]].arrays[0].bytes
        called = i.called() if i.opcode == "fusion" else None
        if called is not None:
            return self._written(called, self._roots[called])
        return sum(array.bytes for array in i.arrays)

    # --- collectives ---

    def _collective(self, i: Instruction, kind: str, here: dict[str, Instruction]) -> Collective:
        read = sum(array.bytes for name in i.operands if name in here for array in here[name].arrays)
        group = self._group(i)
        size = read * len(group) if kind == "all-gather" else read
        axes = tuple(
            name for name, place in zip(self._mesh, zip(*group, strict=True), strict=True) if len(set(place)) > 1
        )
        devices = math.prod(self._mesh[name] for name in axes) if kind == "collective-permute" else len(group)
        return Collective(kind, axes, devices, size, 1)

    def _group(self, i: Instruction) -> list[tuple[int, ...]]:
        """Return the places in the mesh of one group of devices that take part together."""
        sizes = tuple(self._mesh.values())
        devices: Sequence[int] = range(math.prod(sizes))
        iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.attributes)
        listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", i.attributes)
        if iota:
            groups, dims = ([int(n) for n in iota[g].split(",")] for g in (1, 2))
            order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(dims))
            numbers = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(groups)
            devices = numbers.reshape(-1, groups[-1])[0].tolist()
        elif listed:
            devices = [int(n) for n in listed[1].split(",")]
        return [tuple(int(n) for n in np.unravel_index(device, sizes)) for device in devices]


# --- one instruction --------------------------------------------------------------------------------------------------


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"(?:ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(found[1], tuple(_arrays(kind)), rest[:opening], operands, inside, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    depth = 0
    for found in re.finditer(r"[()]", text[opening:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return opening + found.start()
    return len(text)


def _arrays(kind: str) -> Iterator[Array]:
    for found in re.finditer(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?", kind):
        dims = tuple(int(size) for size in found[2].split(",") if size)
        yield Array(found[1], dims, "S(" not in (found[3] or ""))


def _dot(i: Instruction, left: Array, contracted: Sequence[int]) -> float:
    return 2.0 * math.prod(i.arrays[0].dims) * math.prod(left.dims[axis] for axis in contracted)


def _convolution(i: Instruction, left: Array, right: Array) -> float:
    """Count the products of a convolution, but for those with padding: a product of batches is one on a TPU."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if not labels:
        return 0.0
    of_left, of_right, of_out = labels.groups()
    out = i.arrays[0].dims
    total = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * right.dims[of_right.index("i")]
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    for number in range(len(of_out) - 2):
        label = str(number)

        def setting(name: str, default: str, number: int = number) -> str:
            return fields[name].split("x")[number] if name in fields else default

        size, stride, dilation = (int(setting(name, "1")) for name in ("size", "stride", "rhs_dilate"))
        base, low = int(setting("lhs_dilate", "1")), int(setting("pad", "0_0").split("_")[0])
        places = np.arange(out[of_out.index(label)])[:, None] * stride + np.arange(size) * dilation - low
        valid = (places >= 0) & (places % base == 0) & (places // base < left.dims[of_left.index(label)])
        total *= int(valid.sum())
    return total


def _custom_call(i: Instruction, target: str, here: dict[str, Instruction]) -> tuple[float, dict[str, int]]:
    """Return the operations of a library's matrix product, or the name of another kernel."""
    if "gemm" in target or "matmul" in target:
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
        axes = [int(axis) for axis in re.findall(r"\d+", found[1])] if found else []
        return _dot(i, here[i.operands[0]].arrays[0], axes), {}
    kernel = "tpu_custom_call" in target or "mosaic" in target or "cudnn" in target
    return 0.0, {target: 1} if kernel else {}

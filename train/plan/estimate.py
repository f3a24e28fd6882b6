"""What a compiled step needs on each device, and how long it takes at least: a roofline.

Assumed: matrix products at the chip's peak; memory at its published bandwidth; a collective by the usual algorithm on
a ring, over as many dimensions of the torus as its devices need, at an equal share of the chip's links for each. The
three times either overlap entirely (the longest one remains) or not at all (their sum); a real step lies between. What
is left out: latency, uneven kernels, input, logging.
"""

import dataclasses
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax

from ..learner import count_parameters
from ..machine.chips import GIB, Target
from .planned import Step
from .program import Collective, Program


@dataclass(frozen=True)
class Memory:
    """Bytes on each device: as the compiler reports them, and the part of the arguments that is known by name."""

    arguments: int
    outputs: int
    aliased: int  # outputs in the memory of arguments
    temporaries: int
    code: int
    parameters: int
    optimizer: int
    batch: int

    @property
    def peak(self) -> int:
        """The most that is in use at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def others(self) -> int:
        """Arguments without a name, and padding; none if the compiler leaves out arguments that nothing reads."""
        return max(0, self.arguments - self.parameters - self.optimizer - self.batch)


@dataclass(frozen=True)
class Plan:
    """The plan of one step."""

    target: str
    chip: str
    devices: int
    mesh: dict[str, int]
    fits: bool
    available: int  # bytes of a device's memory
    memory: Memory | None  # None if the compiler gave up, with `problem`
    problem: str | None
    parameters: int  # of the model
    unit: str  # what a step's batch consists of: tokens or images
    units: int  # in a batch, padding included
    model_flops: float  # of a step, on all devices, that the model needs
    flops: float  # of a step, on each device, as compiled
    bytes_moved: float  # on each device
    kernels: dict[str, int]  # whose operations are not in `flops`
    collectives: tuple[Collective, ...]
    seconds: dict[str, float]  # compute, memory, network; at_least (overlapping), at_most (in turn); {} if unknown
    compile_seconds: float

    @property
    def rates(self) -> tuple[float, float]:
        """Units per second: one after the other, and overlapping."""
        return tuple(self.units / max(self.seconds[name], 1e-12) for name in ("at_most", "at_least"))  # type: ignore

    def mfu(self, peak: float) -> tuple[float, float]:
        """Model FLOPs utilisation: one after the other, and overlapping."""
        need = self.model_flops / self.devices / peak
        return need / max(self.seconds["at_most"], 1e-12), need / max(self.seconds["at_least"], 1e-12)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        found = dataclasses.asdict(dataclasses.replace(self, collectives=()))
        found["collectives"] = [one._asdict() | {"sent": one.sent} for one in self.collectives]
        if self.memory is not None:
            found["memory"]["peak"] = self.memory.peak
            found[f"{self.unit}_per_second"] = self.rates
        return found


def make_plan(step: Step, target: Target, needed: float) -> tuple[Plan, Any]:
    """Compile a step.

    Args:
        step: the step.
        target: the chips it is traced for.
        needed: operations that the model needs, on all devices.

    Returns:
        (the plan, the compiled program or None if it does not fit)
    """
    clock = time.perf_counter()
    compiled: Any = None
    problem = None
    try:
        compiled = step.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        problem = re.sub(r"^(?:[A-Z_]+: |E\d+: |\w+Oom: )+", "", str(error).partition("\n")[0])
    seconds = time.perf_counter() - clock
    unit, units = batch_units(step.batch)
    chip = target.chip
    common: dict[str, Any] = dict(
        target=target.name,
        chip=chip.title,
        devices=len(target.devices),
        mesh=step.mesh,
        available=chip.memory,
        parameters=count_parameters(step.state.params),
        unit=unit,
        units=units,
        model_flops=needed,
        compile_seconds=seconds,
        problem=problem,
    )
    if compiled is None:
        unknown: dict[str, Any] = dict(memory=None, flops=0, bytes_moved=0, kernels={}, collectives=(), seconds={})
        return Plan(fits=False, **unknown, **common), None
    memory = measure(compiled, step)
    totals = Program(compiled.as_text(), step.mesh).totals
    model = common["model_flops"] / common["devices"]
    compute = (max(totals.flops, model) if totals.kernels else totals.flops) / chip.flops
    network = sum(seconds_of(one, target, step.mesh) for one in totals.collectives)
    times = {"compute": compute, "memory": totals.bytes / chip.bandwidth, "network": network}
    times |= {"at_least": max(times.values()), "at_most": sum(times.values())}
    found = Plan(
        fits=memory.peak <= chip.memory,
        memory=memory,
        flops=totals.flops,
        bytes_moved=totals.bytes,
        kernels=totals.kernels,
        collectives=totals.collectives,
        seconds=times,
        **common,
    )
    return found, compiled


def measure(compiled: Any, step: Step) -> Memory:
    """Return the memory of a compiled step."""
    report = compiled.memory_analysis()
    return Memory(
        arguments=report.argument_size_in_bytes,
        outputs=report.output_size_in_bytes,
        aliased=report.alias_size_in_bytes,
        temporaries=report.temp_size_in_bytes,
        code=report.generated_code_size_in_bytes,
        parameters=shard_bytes(step.state.params),
        optimizer=shard_bytes(step.state.opt_state),
        batch=shard_bytes((step.batch, step.fixed)),
    )


def shard_bytes(tree: Any) -> int:
    """Return the bytes of a tree of shapes on each device, without the padding of the chip's layouts."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def seconds_of(one: Collective, target: Target, mesh: dict[str, int]) -> float:
    """Return the time of a collective, at the bandwidth of its links."""
    chip, inside = target.chip, len(target.devices) // target.slices
    crosses = target.slices > 1 and "data" in one.axes
    devices = max(1, one.devices // target.slices) if crosses else one.devices
    side = max(2.0, inside ** (1 / chip.links))
    dimensions = min(chip.links, max(1, math.ceil(math.log(max(devices, 2)) / math.log(side) - 1e-6)))
    found = one._replace(devices=devices).sent / (chip.network * dimensions / chip.links)
    if crosses:  # what is left after reducing within each slice
        found += one._replace(devices=target.slices, bytes=one.bytes / devices).sent / chip.beyond
    return found


def batch_units(batch: dict[str, Any]) -> tuple[str, int]:
    """Return what a batch consists of, and how many: tokens with padding, of both sides, or images."""
    if "pixel_values" in batch:
        return "images", batch["pixel_values"].shape[0]
    ids = [value for name, value in batch.items() if name.endswith("input_ids") or name in ("source_ids", "target_ids")]
    return "tokens", sum(math.prod(value.shape) for value in ids)


def gib(count: float) -> str:
    """Format bytes."""
    return f"{count / GIB:,.2f} GiB"

"""Plan a training command for chips that are not here: `bestiary plan COMMAND --target CHIP:TOPOLOGY`."""

import dataclasses
import math
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...data.files import replacing, write_text
from ...data.json_files import write_json
from ..machine.chips import Target, open_target
from ..machine.operations import operations
from .config import PlanConfig
from .estimate import Plan, gib, make_plan
from .planned import Step, trace
from .report import draw, lines, tensor_lines, tensors
from .stand_ins import StandIns


class Command(NamedTuple):
    """The command to plan."""

    words: tuple[str, ...]
    arguments: Sequence[str]
    options: Any  # class of its settings
    parse: Callable[[Sequence[str]], Any]
    main: Callable[[Any], int]


def plan(config: PlanConfig, command: Command) -> int:
    """Run `bestiary plan`; return the exit status: 0 if it fits, 1 if it does not.

    Raises:
        RunError: the target, or a setting of the command, does not fit.
    """
    target = open_target(config.target)
    with tempfile.TemporaryDirectory(prefix="bestiary-plan-") as folder:
        stand_ins = StandIns(command.words, command.arguments, command.options, Path(folder))
        settings, stage = largest_stage(command.parse(stand_ins.arguments()))
        stand_ins.remarks += stage
        planner = Planner(target, command, settings, Path(folder))
        if config.search:
            return _search(config, planner, stand_ins.remarks)
        planned = planner.plan()
        beside = planner.plan(parallel="mesh")[0][1] if setting(settings, "parallel") == "pmap" else None
    for step, found, _ in planned:
        if step.task:
            print(f"task         {step.task}")
        for line in lines(found, target.chip):
            print(line)
        if beside is not None:
            print(pmap_line(found, beside))
    step, found, compiled = largest(planned)
    listed = tensors(step)
    for remark in stand_ins.remarks:
        print(f"assumed      {remark}")
    if setting(settings, "attention") is None:
        kernel = "tpu" if target.chip.platform == "tpu" else "hopper"
        print(f"assumed      attention in plain JAX; --attention {kernel} plans with the kernel")
    print(f"launch       {' '.join(('bestiary', *command.words))} {shlex.join(command.arguments)}")
    if config.shardings:
        print("\n".join(tensor_lines(listed)))
    if config.json is not None:
        tasks = {step.task: one.to_json() for step, one, _ in planned if step.task}
        more = {"tasks": tasks} if tasks else {"mesh_instead": beside.to_json()} if beside else {}
        write_json(config.json, found.to_json() | more | {"assumed": stand_ins.remarks, "tensors": listed})
    if config.chart is not None:
        with replacing(config.chart) as unfinished:
            draw(found, unfinished)
    if config.program is not None:
        if compiled is None:
            print("program      none was compiled, so that none is written")
        else:
            write_text(config.program, compiled.as_text())
    return 0 if found.fits else 1


def largest(planned: Sequence[tuple[Step, Plan, Any]]) -> tuple[Step, Plan, Any]:
    """Return what needs most memory, of the plans of several tasks."""
    return max(planned, key=lambda one: one[1].memory.peak if one[1].memory else math.inf)


def pmap_line(found: Plan, mesh: Plan) -> str:
    """Say what pmap costs beside a mesh on whose data axis all devices are."""
    if found.memory is None or mesh.memory is None:
        return "pmap         one of the two does not fit: no comparison with --parallel mesh"
    sent, there = (sum(one.sent for one in plan.collectives) for plan in (found, mesh))
    times = [" to ".join(f"{1e3 * plan.seconds[end]:.2f}" for end in ("at_least", "at_most")) for plan in (found, mesh)]
    return (
        f"pmap         {gib(found.memory.peak)} on each device, {gib(sent)} sent, {times[0]} ms; with --parallel "
        f"mesh {gib(mesh.memory.peak)}, {gib(there)}, {times[1]} ms"
    )


class Planner:
    """Plan a command with several settings."""

    def __init__(self, target: Target, command: Command, settings: Any, folder: Path):
        self.target, self.settings = target, settings
        self._command, self._folder = command, folder

    def steps(self, settings: Any) -> list[Step]:
        """Trace the step of these settings, or those of their tasks."""
        return trace(self._command.main, settings, self.target, setting(settings, "attention"), self._folder)

    def plan(self, **changes: Any) -> list[tuple[Step, Plan, Any]]:
        """Plan the settings with some changed: their step, or those of their tasks."""
        settings = self.settings
        for name, value in changes.items():
            settings = changed(settings, name, value)
        steps = counted = self.steps(settings)
        plain = settings
        if setting(settings, "attention") not in (None, "xla"):  # kernels' operations are those of plain attention
            plain = changed(plain, "attention", "xla")
        if setting(settings, "remat"):  # which recomputes not quite all of a layer
            plain = changed(plain, "remat", False)
        if plain is not settings:
            counted = self.steps(plain)
        return [
            (step, *make_plan(step, self.target, operations(whole.traced.jaxpr.jaxpr)))
            for step, whole in zip(steps, counted, strict=True)
        ]


def largest_stage(settings: Any) -> tuple[Any, list[str]]:
    """Return settings of the largest of several stages (--phases, --batch-ramp) alone, and remarks on it."""
    stages = {(stage.rows * stage.length, stage.length) for stage in getattr(settings, "plan", ())}
    if len(stages) < 2:
        return settings, []
    tokens, length = max(stages)
    alone = {"phases": (), "batch_ramp": (), "sequence_length": length, "batch_tokens": tokens}
    remark = f"the largest of {len(stages)} kinds of batches: {tokens // length:,} rows of {length:,} tokens"
    return dataclasses.replace(settings, **alone), [remark]


# --- search -----------------------------------------------------------------------------------------------------------


def _search(config: PlanConfig, planner: Planner, remarks: Sequence[str]) -> int:
    rows: list[dict[str, Any]] = []
    count = len(planner.target.devices)
    print(f"{'mesh':<24} {'remat':<6} {'accumulate':<11} {'memory':<12} {'fits':<5} {'ms a step':<16} compiled")
    for mesh, remat, accumulate in candidates(count, setting(planner.settings, "accumulate") or 1):
        if len(rows) == config.tries:
            break
        if any(row["fits"] and row["mesh"] == mesh and not row["remat"] for row in rows):
            continue  # recomputing or accumulating would only be slower
        try:
            _, found, _ = largest(planner.plan(mesh=mesh, remat=remat, accumulate=accumulate))
        except ValueError as error:
            print(f"{mesh:<24} {remat!s:<6} {accumulate:<11} {str(error).partition(chr(10))[0]}")
            continue
        rows.append({**found.to_json(), "mesh": mesh, "axes": found.mesh, "remat": remat, "accumulate": accumulate})
        memory = gib(found.memory.peak) if found.memory else "too much"
        times = " to ".join(f"{1e3 * found.seconds[name]:.2f}" for name in ("at_least", "at_most") if found.seconds)
        fits = "yes" if found.fits else "no"
        took = f"{found.compile_seconds:.1f} s"
        print(f"{mesh:<24} {remat!s:<6} {accumulate:<11} {memory:<12} {fits:<5} {times:<16} {took}", flush=True)
    fitting = [row for row in rows if row["fits"]]
    best = min(fitting, key=lambda row: row["seconds"]["at_most"], default=None)
    if best is None:
        print("nothing fits: take more chips, smaller batches, or a smaller model")
    else:
        more = [f"--mesh {best['mesh']}", *(["--remat"] if best["remat"] else [])]
        more += [f"--accumulate {best['accumulate']}"] if best["accumulate"] > 1 else []
        print(f"fastest that fits: {' '.join(more)}")
    if config.json is not None:
        write_json(config.json, {"tried": rows, "best": best, "assumed": list(remarks)})
    return 0 if best else 1


def candidates(devices: int, accumulate: int) -> Iterator[tuple[str, bool, int]]:
    """Yield meshes, with remat and accumulation, the simplest first."""
    meshes = [f"data={devices}", f"fsdp={devices}"]
    for part in (8, 4, 2):
        if devices % part == 0 and devices > part:
            meshes += [f"data={devices // part},fsdp={part}", f"data={devices // part},tensor={part}"]
            meshes += [f"fsdp={devices // part},tensor={part}"]
    for parts in (accumulate, 2 * accumulate, 4 * accumulate):
        for remat in (False, True):
            for mesh in meshes:
                yield mesh, remat, parts


def setting(config: Any, name: str) -> Any:
    """Return a setting of a command, which may be nested; None if it has none of that name."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == name and not dataclasses.is_dataclass(value):
            return value
        if dataclasses.is_dataclass(value) and (found := setting(value, name)) is not None:
            return found
    return None


def changed(config: Any, name: str, value: Any) -> Any:
    """Return settings with one of them changed, which may be nested."""
    for field in dataclasses.fields(config):
        here = getattr(config, field.name)
        if field.name == name and not dataclasses.is_dataclass(here):
            return dataclasses.replace(config, **{name: value})
        if dataclasses.is_dataclass(here) and not isinstance(here, type):
            inner = changed(here, name, value)
            if inner is not here:
                return dataclasses.replace(config, **{field.name: inner})
    return config

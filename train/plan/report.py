"""Show a plan: text, the list of tensors, and a chart."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from ..machine.chips import Chip
from .estimate import Plan, gib
from .planned import Step

MOST_COLLECTIVES = 8


def lines(plan: Plan, chip: Chip) -> Iterator[str]:
    """Yield the plan as text."""
    axes = ",".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1) or "data=1"
    yield f"target       {plan.devices} x {plan.chip} ({plan.target}), --mesh {axes}"
    yield f"model        {plan.parameters:,} parameters; a batch has {plan.units:,} {plan.unit}, padding included"
    memory = plan.memory
    if memory is None:
        yield f"memory       does not fit: {plan.problem}"
        yield f"compiled     in {plan.compile_seconds:.1f} s, until the compiler gave up"
        return
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield f"memory       {verdict}: {gib(memory.peak)} of {gib(plan.available)} on each device, by the compiler"
    others = memory.others
    yield (
        f"             parameters {gib(memory.parameters)}, optimiser {gib(memory.optimizer)}, batch "
        f"{gib(memory.batch)}, padding and others {gib(others)}, temporaries {gib(memory.temporaries)}, code "
        f"{gib(memory.code)}"
    )
    each = plan.model_flops / max(plan.units, 1)
    yield (
        f"operations   {plan.model_flops:.4g} FLOPs a step, {each:.4g} for each of the {plan.unit}; compiled: "
        f"{plan.flops:.4g} on each device ({plan.flops * plan.devices / plan.model_flops:.2f} of what is needed)"
    )
    for name, runs in plan.kernels.items():
        yield f"             and {runs} runs of the kernel {name}, whose operations the program does not tell"
    yield f"bytes        {gib(plan.bytes_moved)} from and to the memory of each device"
    sent = sum(one.sent for one in plan.collectives)
    yield f"collectives  {gib(sent)} sent by each device" if plan.collectives else "collectives  none"
    for one in plan.collectives[:MOST_COLLECTIVES]:
        over = " x ".join(one.axes) or "nothing"
        yield (
            f"             {one.runs:>5} x {one.kind} of {one.bytes / 2**20:,.2f} MiB over {over} ({one.devices} "
            f"devices): {gib(one.sent)}"
        )
    if len(plan.collectives) > MOST_COLLECTIVES:
        yield f"             and {len(plan.collectives) - MOST_COLLECTIVES} smaller ones"
    seconds = plan.seconds
    yield (
        f"time         compute {1e3 * seconds['compute']:.2f} ms, memory {1e3 * seconds['memory']:.2f} ms, network "
        f"{1e3 * seconds['network']:.2f} ms; a step takes {1e3 * seconds['at_least']:.2f} (if they overlap) to "
        f"{1e3 * seconds['at_most']:.2f} ms"
    )
    low, high = plan.rates
    least, most = plan.mfu(chip.flops)
    yield f"speed        {low:,.0f} to {high:,.0f} {plan.unit}/s, MFU {least:.0%} to {most:.0%}, with peaks of"
    yield (
        f"             {chip.flops / 1e12:.0f} TFLOP/s bfloat16, {chip.bandwidth / 1e9:,.0f} GB/s memory, "
        f"{chip.network / 1e9:.0f} GB/s links, one way ({chip.source})"
    )
    yield f"compiled     in {plan.compile_seconds:.1f} s"


def tensors(step: Step) -> list[dict[str, Any]]:
    """Return every tensor of the state and the batch: name, shape, dtype, mesh axes of each dimension, bytes here."""
    found = []
    for part, tree in (("params", step.state.params), ("opt_state", step.state.opt_state), ("batch", step.batch)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            spec = [*leaf.sharding.spec, *[None] * len(leaf.shape)][: len(leaf.shape)]
            here = leaf.sharding.shard_shape(leaf.shape)
            size = leaf.dtype.itemsize
            for side in here:
                size *= side
            name = part + jax.tree_util.keystr(path)
            found.append(
                {"name": name, "shape": leaf.shape, "dtype": str(leaf.dtype), "spec": spec, "bytes_here": size}
            )
    return found


def tensor_lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the list of tensors as text."""
    width = max(len(one["name"]) for one in found)
    for one in found:
        sides = " x ".join(
            f"{side} ({axis if isinstance(axis, str) else '+'.join(axis)})" if axis else str(side)
            for side, axis in zip(one["shape"], one["spec"], strict=True)
        )
        yield f"{one['name']:<{width}}  {one['dtype']:<8} {sides or 'scalar'}  {one['bytes_here']:,} bytes"


def draw(plan: Plan, path: Path) -> None:
    """Draw the memory of a device and the time of a step (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    memory = plan.memory
    if memory is not None:
        parts = {
            "parameters": memory.parameters,
            "optimiser": memory.optimizer,
            "batch": memory.batch,
            "others": memory.others,
            "temporaries": memory.temporaries,
            "code": memory.code,
        }
        start = 0.0
        for name, size in parts.items():
            left.barh(["memory"], [size / 2**30], left=start, label=name)
            start += size / 2**30
        for name in ("compute", "memory", "network"):
            right.barh([name], [1e3 * plan.seconds[name]])
    left.axvline(plan.available / 2**30, color="black", linestyle="--", linewidth=1)
    left.set_xlabel("GiB on each device; dashed: what it has")
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=3)
    right.set_xlabel("ms of a step, at the published peaks")
    figure.suptitle(f"{plan.devices} x {plan.chip}", fontsize=10)
    figure.savefig(path, dpi=110, format="png")

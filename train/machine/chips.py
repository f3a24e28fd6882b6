"""Published facts of chips, and their topologies without the chips."""

import math
import os
import re
from importlib.util import find_spec
from typing import Any, NamedTuple

from ...kernels.tuning import chip_name
from ..errors import RunError


class Chip(NamedTuple):
    """One chip. Rates are the published peaks, per second; `network` is what a chip sends, in one direction."""

    title: str
    platform: str  # tpu or gpu
    flops: float  # bfloat16
    memory: int  # bytes
    bandwidth: float  # bytes/s of the memory
    network: float  # bytes/s to the other chips of the slice or node, over all links
    beyond: float  # bytes/s to other slices or nodes, per chip
    links: int  # dimensions of the torus; 1: all chips are connected by switches
    source: str


GIB = 2**30
CHIPS: dict[str, Chip] = {
    "v4": Chip("TPU v4", "tpu", 275e12, 32 * GIB, 1.228e12, 150e9, 3.1e9, 3, "cloud.google.com/tpu/docs/v4"),
    "v5e": Chip("TPU v5e", "tpu", 197e12, 16 * GIB, 0.819e12, 100e9, 3.1e9, 2, "cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip("TPU v5p", "tpu", 459e12, 95 * GIB, 2.765e12, 300e9, 6.25e9, 3, "cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip("TPU v6e", "tpu", 918e12, 32 * GIB, 1.638e12, 224e9, 6.25e9, 2, "cloud.google.com/tpu/docs/v6e"),
    "h100": Chip("H100 SXM", "gpu", 989e12, 80 * 10**9, 3.35e12, 450e9, 50e9, 1, "nvidia.com/en-us/data-center/h100"),
    "h200": Chip("H200 SXM", "gpu", 989e12, 141 * 10**9, 4.8e12, 450e9, 50e9, 1, "nvidia.com/en-us/data-center/h200"),
}
"""Network of TPUs: the published interconnect bandwidth of a chip in both directions, half of it; between slices, the
hosts' data-centre network, 100 to 200 Gbit/s of a host, divided by its chips. NVLink 4: half of 900 GB/s; between nodes
one 400 Gbit/s adapter for each GPU."""


def chip_of(kind: str) -> Chip | None:
    """Return the chip of a device kind, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"; None if it is not known."""
    return CHIPS.get(chip_name(kind))


PER_NODE = 8  # GPUs
PACKAGES = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_cuda13_plugin", "cuda")}


class Target(NamedTuple):
    """Chips to plan for."""

    name: str
    chip: Chip
    devices: list[Any]
    slices: int


def parse_target(text: str) -> tuple[int, str, str]:
    """Return slices, chip and topology of `2xv5e:16x16`.

    Raises:
        RunError: it is no such text, or there is no such chip.
    """
    found = re.fullmatch(r"(?:(\d+)x(?=[a-z]))?([a-z]\w*):(\d+(?:x\d+)*)", text)
    if not found or found[2] not in CHIPS:
        raise RunError(
            f"--target {text}: expected CHIP:TOPOLOGY with a chip of {', '.join(CHIPS)}, such as v5e:16x16, "
            "v5p:4x4x4 or h200:8; 2xv5e:16x16 for two slices."
        )
    return int(found[1] or 1), found[2], found[3]


def open_target(text: str) -> Target:
    """Return the devices of a topology, which can only be compiled for.

    Raises:
        RunError: there is no such topology, or the compiler for it is not installed.
    """
    slices, name, topology = parse_target(text)
    chip = CHIPS[name]
    package, extra = PACKAGES[chip.platform]
    if find_spec(package) is None:
        raise RunError(
            f"--target {text}: the compiler for it is not installed: `uv run --extra plan ...`, or `pip install "
            "'.[plan]'` (the chip is not "
            f"needed; {package} is what the extra {extra} has too)."
        )
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs on a chip here
    from jax.experimental import topologies

    if chip.platform == "gpu":
        from ...kernels.bench.tune import H200

        count = int(topology) if topology.isdigit() else 0
        if count < 1 or (count > PER_NODE and count % PER_NODE):
            raise RunError(f"--target {text}: expected a number of GPUs, up to {PER_NODE} or a multiple of it.")
        nodes = -(-count // PER_NODE) * slices
        shape = f"1x{nodes}x{min(count, PER_NODE)}"
        found = topologies.get_topology_desc(platform="cuda", topology=shape, target_config=H200)
        return Target(text, chip, list(found.devices), nodes)
    more = {"num_slices": slices} if slices > 1 else {}
    if math.prod(map(int, topology.split("x"))) > 1 << 14:
        raise RunError(f"--target {text}: no such topology.")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{topology}", **more)
    except Exception as error:
        known = ("1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16" if chip.links == 2 else
                 "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8, 8x8x16")  # fmt: skip
        said = str(error).strip().splitlines()
        raise RunError(
            f"--target {text}: no such topology ({said[0] if said else type(error).__name__}). {name} has {known}, and "
            "other products of these sides."
        ) from None
    return Target(text, chip, list(found.devices), slices)

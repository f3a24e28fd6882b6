"""The Hopper kernels compiled ahead of time for an H200, without one: registers, spills, tensor cores, memory.

The compiler runs in a process of its own (this file, run as a script): it writes its reports where the environment
says. The package promises jax 0.11.2 and later; these are the tests of that for the kernels:

    uv run --isolated --no-project --with-editable . --with jax==0.11.2 --with jax-cuda13-plugin==0.11.2 \
        --with jax-cuda13-pjrt==0.11.2 --with nvidia-cuda-nvdisasm --with pytest \
        pytest tests/kernels/test_hopper_compile.py
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("optimised")

ALL = {"bias": "row", "segments": True, "rate": 0.1}
# Name: what differs from 2 x 512 tokens, 4 heads of 64, no extras.
CASES: dict[str, dict[str, Any]] = {
    "plain 64": {},
    "causal 128": {"causal": True, "size": 128},
    "everything 64": ALL | {"length": 2048},
    "everything 128": ALL | {"size": 128},
    "odd, dense 64": {"bias": "dense", "length": 509},
    "everything 256": ALL | {"size": 256},
    "dense 128": {"size": 128, "bias": "dense", "segments": True, "rate": 0.1},
    "causal 256": {"size": 256, "causal": True},
    "window, everything 256": ALL | {"size": 256, "bias": "dense", "softcap": 2.0, "window": (100, 100)},
    "cross, softcap, window 32": {"size": 32, "value_size": 96, "keys": 700, "group": 2, "dtype": "float16",
                                  "softcap": 3.0, "window": (100, 7)},
    "short 64": {"length": 128},
    "short, everything 64": ALL | {"length": 128},
    "short, odd 128": {"length": 61, "size": 128, "segments": True},
    "short, 256 keys": ALL | {"length": 256},
}  # fmt: skip

FORWARD = {"forward", "one_pass"}
# Bytes a thread may spill, by case and kernel of the backward pass. What is not listed spills nothing.
SPILLS = {
    ("everything 64", "key_gradient"): 128,
    ("short, everything 64", "fused"): 64,
    ("causal 128", "key_gradient"): 256,
    ("everything 128", "key_gradient"): 256,
    ("everything 256", "key_gradient"): 1024,
    ("everything 256", "query_gradient"): 1024,
    ("everything 256", "bias_gradient"): 256,
    ("dense 128", "key_gradient"): 256,
    ("causal 256", "key_gradient"): 512,
    ("causal 256", "query_gradient"): 256,
    ("window, everything 256", "key_gradient"): 1024,
    ("window, everything 256", "query_gradient"): 1024,
    ("window, everything 256", "bias_gradient"): 256,
    ("short, 256 keys", "key_gradient"): 128,
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler says of one kernel."""

    name: str
    registers: int
    spilled: int
    tensor_core: int
    """Matrix products in the machine code."""
    atomic: int
    """Instructions that add to memory in whatever order blocks come."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Of each case, bytes of temporary memory and its kernels; and the collectives of a program over a mesh."""

    memory: dict[str, int]
    kernels: dict[str, list[Kernel]]
    collectives: list[str]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Report:
    if not all(importlib.util.find_spec(name) for name in ("jax_plugins", "jax_plugins.xla_cuda13")):
        pytest.skip("needs jax-cuda13-plugin, which compiles for a GPU that is not there")
    try:
        disassembler = distribution("nvidia-cuda-nvdisasm")
    except PackageNotFoundError:
        pytest.skip("needs nvidia-cuda-nvdisasm, which shows what was compiled")
    folder = tmp_path_factory.mktemp("dump")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "CUDA_ROOT": str(disassembler.locate_file("nvidia/cu13")),
        "MOSAIC_GPU_DUMP_TO": str(folder),
    }
    result = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads((folder / "report.json").read_text())
    kernels = {name: [Kernel(**kernel) for kernel in kernels] for name, kernels in found["kernels"].items()}
    return Report(found["memory"], kernels, found["collectives"])


@pytest.mark.parametrize("case", CASES)
def test_registers_and_tensor_cores(case: str, compiled: Report) -> None:
    kernels = compiled.kernels[case]
    names = {kernel.name for kernel in kernels}
    short = case.startswith("short")
    backward = {"fused"} if short and "256" not in case else {"query_gradient", "key_gradient"}
    assert names == backward | {"one_pass" if short else "forward"} | (
        {"bias_gradient"} if "bias" in CASES[case] else set()
    )
    for kernel in kernels:
        assert kernel.tensor_core > 0, kernel
        assert kernel.atomic == 0, kernel
        assert kernel.spilled <= SPILLS.get((case, kernel.name), 0), kernel
    listed = {name for name_of_case, name in SPILLS if name_of_case == case}
    assert listed == {kernel.name for kernel in kernels if kernel.spilled}
    assert not listed & FORWARD


def test_memory_is_linear_in_the_length(compiled: Report) -> None:
    short, long = compiled.memory["short, everything 64"], compiled.memory["everything 64"]
    assert 0 < long < 20 * short  # for 16 times the length
    assert long < 2 * 4 * 2048 * 2048 / 2  # Four bits for each score.


def test_a_mesh_gathers_nothing(compiled: Report) -> None:
    """Rows and heads split two by two: all that is exchanged is the sum of the table's gradient over the rows."""
    assert compiled.collectives == ["all-reduce"]


def main(folder: Path) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from bestiary.kernels import DenseBias, RelativeBias
    from bestiary.kernels.bench.tune import H200
    from bestiary.kernels.call import Call
    from bestiary.kernels.hopper import backend as hopper
    from bestiary.kernels.split import splitting

    def devices(topology: str) -> Any:
        return topologies.get_topology_desc(platform="cuda", topology=topology, target_config=H200).devices

    def compile_(
        mesh: Mesh,
        length: int = 512,
        keys: int | None = None,
        size: int = 64,
        value_size: int | None = None,
        dtype: str = "bfloat16",
        group: int = 1,
        bias: str | None = None,
        segments: bool = False,
        rate: float = 0.0,
        causal: bool = False,
        window: tuple[int | None, int | None] = (None, None),
        softcap: float | None = None,
    ) -> Any:
        batch, heads = 2 * mesh.shape["rows"], 4 * mesh.shape["heads"]
        keys, value_size = keys or length, value_size or size

        def array(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: Any = dtype) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

        def matrices(length: int, heads: int, size: int) -> Any:
            return array((batch, length, heads, size), ("rows", None, "heads"))

        biases = {
            "row": RelativeBias(array((32, heads), (None, "heads"), jnp.float32)),
            "dense": DenseBias(array((1, heads, length, keys), (None, "heads"), jnp.float32)),
            None: None,
        }
        query, key = matrices(length, heads, size), matrices(keys, heads // group, size)
        value, gradient = matrices(keys, heads // group, value_size), matrices(length, heads, value_size)
        ids = [array((batch, tokens), ("rows",), jnp.int32) if segments else None for tokens in (length, keys)]
        seeds = array((batch, 2), ("rows",), jnp.uint32) if rate else None

        def step(query: Any, key: Any, value: Any, bias: Any, ids: Any, seeds: Any, gradient: Any) -> Any:
            def run(query: Any, key: Any, value: Any, bias: Any) -> Any:
                call = Call(query, key, value, bias, *ids, seeds, causal, window, size**-0.5, softcap, rate)
                return hopper.run(call)[0]

            out, back = jax.vjp(run, query, key, value, bias)
            return out, back(gradient)

        with hopper.compiling(), splitting(mesh, batch="rows", heads="heads") if mesh.size > 1 else nullcontext():
            traced = jax.jit(step).trace(query, key, value, biases[bias], ids, seeds, gradient)
        return traced.lower().compile()

    one = Mesh(np.array(devices("1x1x1")).reshape(1, 1), ("rows", "heads"))
    four = Mesh(np.array(devices("2x2x1")).reshape(2, 2), ("rows", "heads"))
    report: dict[str, Any] = {"memory": {}, "kernels": {}}
    for name, options in CASES.items():
        for old in folder.glob("*"):
            old.unlink()
        report["memory"][name] = compile_(one, **options).memory_analysis().temp_size_in_bytes
        kernels = report["kernels"][name] = []
        for path in sorted(folder.glob("*.ptxas")):
            text = path.read_text()
            code = path.with_suffix(".sass_ctrl").read_text()
            (registers,) = re.findall(r"Used (\d+) registers", text)
            (kernel,) = set(re.findall(r"function '(?:attention_)?(\w+?)_mosaic_gpu_kernel'", text))
            kernels.append(
                {
                    "name": kernel,
                    "registers": int(registers),
                    "spilled": max(int(n) for n in re.findall(r"(\d+) bytes spill", text)),
                    "tensor_core": len(re.findall(r"\bHGMMA\.", code)),
                    "atomic": len(re.findall(r"\b(?:ATOM|ATOMG|RED|REDG|UTMAREDG)\b", code)),
                }
            )
    # For each device what "everything 64" is: the compiler has those kernels already.
    text = compile_(four, **CASES["everything 64"]).as_text()
    names = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    report["collectives"] = sorted(set(re.findall(names, text)))
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Tune block sizes and write them to the table: `bestiary bench attention --tune`.

Candidates are listed for every kernel of a call (forward, and each of the backward pass), varying one kernel at a time.
They are first filtered without a chip: each is compiled ahead of time, in a separate process, which reports registers,
spilled bytes and shared memory; candidates that do not compile, or spill more than the default choice, are discarded.
The others are timed if the chip is available, and the fastest of each kernel make up the row. The row must be faster
than the default choice, and give the same numbers.

This file is also the compiling process: `python -m bestiary.kernels.bench.tune` reads a job from standard input and
answers with one line per candidate.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import tuning_table
from ..call import Call
from ..hash import row_seeds
from ..tuning import Key, chip, flatten, rebuild
from .cases import Arrays, BenchError, Case, bias_of, draw
from .timing import machine, sampled, time_jax, write, write_json
from .workers import first_line

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GPUS = ("h100", "h200")

# The description of a GPU that XLA needs to compile for it remotely. An H100 differs only in its memory.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a" name: "NVIDIA H200"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 patch: 0 } device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Block sizes to try: `row` is the default choice except for one kernel."""

    kernel: str
    row: dict[str, Any]


def backend_of(name: str) -> tuple[Any, type, Callable[[Call], Any], Callable[[], AbstractContextManager[None]]]:
    """Return a chip's backend, its class of block sizes, their default, and a context to compile without the chip."""
    if name in GPUS:
        from ..hopper import backend as hopper

        return hopper, hopper.Tuning, hopper.rule, hopper.compiling
    if name in TPUS:
        from ..tpu import backend as tpu

        return tpu, tpu.Blocks, tpu.choose_blocks, tpu.compiling
    raise BenchError(f"--tune: there are no kernels for {name!r}; known chips: {', '.join((*GPUS, *TPUS))}")


FORWARD = ("forward", "one_pass")
"""Kernels of the forward pass; all others belong to the backward pass."""


def candidates(name: str, rule: dict[str, Any], call: Call) -> Iterator[Candidate]:
    """Generate the candidates for a chip, the default choice of each kernel first.

    For short rows on Hopper these are the number of pipeline stages of the short-row kernels, and whether to use them
    at all; tiles of the general kernels are tried where the default is to use those.
    """
    if name in GPUS:
        from ..hopper import backend as hopper

        short = hopper.short_stages(call)
        for kernel, stages in short.items():
            if stages:
                taken = rule[kernel] if rule[kernel] in stages else 0
                yield Candidate(kernel, rule)
                yield from (Candidate(kernel, rule | {kernel: n}) for n in (0, *stages) if n != taken)
        kernels = [] if rule["one_pass"] in short["one_pass"] else ["forward"]
        kernels += [] if rule["fused"] in short["fused"] else ["query_gradient", "key_gradient"]
        kernels += [] if call.bias is None else ["bias_gradient"]
        for kernel in kernels:
            seen = [(rule[kernel], rule["together"])]
            for warpgroups, columns, stages, together in itertools.product(
                (1, 2, 3),
                (64, 128, 192) if kernel == "forward" else (64, 128),
                (1, 2, 3),
                (True, False) if kernel == "key_gradient" else (rule["together"],),
            ):
                seen.append(((warpgroups, columns, stages), together))
            for blocks, together in dict.fromkeys(seen):
                yield Candidate(kernel, rule | {kernel: blocks, "together": together})
        return
    # Rows this short use the short-row kernels, for which the number of heads per step is the only choice.
    queries, keys = call.query.shape[1], call.key.shape[1]
    if max(queries, keys) <= 256:
        for heads in dict.fromkeys((rule["key_heads"], 1, 2, 4, 8, 0)):
            yield Candidate("key_heads", rule | {"key_heads": heads})
        return
    from ..tpu import backend as tpu

    for kernel in tpu.kernels_of(call, tpu.Tiling(*rule["key_value"])):
        streamed, held = (queries, keys) if kernel == "key_value" else (keys, queries)
        seen = [rule[kernel]]
        for own, other, times in itertools.product((128, 256, 512, 1024), (128, 256, 512, 1024), (1, 2, 4, 8)):
            if own < 2 * held and other < 2 * streamed and other * times < 2 * max(streamed, other):
                tile = (other, own) if kernel == "key_value" else (own, other)
                seen.append((*tile, other * times))
        for tiling in dict.fromkeys(seen):
            yield Candidate(kernel, rule | {kernel: tiling})


def tune(
    cases: Sequence[Case],
    *,
    chip_name: str | None,
    path: Path | None,
    out: Path,
    samples: int,
    report_of: Path | None = None,
) -> int:
    """Tune the rows of the given cases; return the exit status.

    Args:
      cases: one case per row. Cases with the same key are tuned once.
      chip_name: the chip to compile for; None for the chip of this machine.
      path: the table to write; None for that of the package.
      out: folder of the report, `tune-CHIP.json`: every candidate with its result, written anew after each time.
      samples: number of samples per time.
      report_of: a report made without the chip, whose candidates are timed instead of compiling them here first.
    """
    here = chip()
    name = chip_name or here
    if name is None:
        raise BenchError(f"--tune: no accelerator found; name a chip to compile for, --chip {'|'.join((*GPUS, *TPUS))}")
    _, kind, choose, _ = backend_of(name)
    out.mkdir(parents=True, exist_ok=True)
    path = path or Path(tuning_table.__file__)
    rows = {Key(*key): row for key, row in tuning_table.ROWS.items()}
    report: dict[str, Any] = {
        "bench": "tune",
        "date": datetime.now(UTC).date().isoformat(),
        "chip": name,
        **machine(),
        "keys": [],
    }
    known = {} if report_of is None else read_report(report_of, name)
    if report_of is not None and name != here:
        raise BenchError(f"--candidates: a {name} is needed to time them, found {here or 'no accelerator'}")
    done: set[Key] = set()
    for case in cases:
        shapes = jax.eval_shape(lambda case=case: draw(case, 1, 0)[0])
        call = call_of(case, shapes)
        key = Key.of(call, name)
        if key in done:
            continue
        done.add(key)
        rule = flatten(choose(call))
        if report_of is None:
            tried = list(candidates(name, rule, call))
            _say(f"{case.label}: {len(tried)} candidates")
            found = thinned(name, case, tried)
        else:
            tried, found = from_report(known, key, rule, report_of)
        fit = [n for n, result in enumerate(found) if fits(tried, found, n)]
        _say(f"{case.label}: {len(fit)} of {len(tried)} compile and spill no more than the default choice")
        for candidate, result in zip(tried, found, strict=True):
            result |= {"kernel": candidate.kernel, "blocks": candidate.row[candidate.kernel], "row": candidate.row}
        entry: dict[str, Any] = {
            "key": dataclasses.asdict(key),
            "case": dataclasses.asdict(case),
            "rule": rule,
            "row": None,
            "candidates": found,
        }
        report["keys"].append(entry)
        save = functools.partial(write_json, out / f"tune-{name}.json", report)
        save()
        row = timed(kind, case, [tried[n] for n in fit], found, fit, rule, samples, save) if name == here else None
        if row is not None:
            rows[key] = entry["row"] = row
            write(path, table_text(rows))
            save()
    if name == here:
        print(f"Written: {path} ({len(rows)} rows) and {out / f'tune-{name}.json'}")
    else:
        print(
            f"No {name} found: candidates were compiled for it and filtered but not timed, and the table is unchanged. "
            f"Written: {out / f'tune-{name}.json'}. Run the same command on a {name} to fill the table."
        )
    return 0


def read_report(path: Path, name: str) -> dict[Key, dict[str, Any]]:
    """Return the entries of a report of `--tune` for this chip, by key; raise a BenchError if it is not one."""
    try:
        report = json.loads(path.read_text())
        entries = {Key(**entry["key"]): entry for entry in report["keys"]}
        found = report["chip"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(
            f"--candidates: {path}: expected a report of --tune, found {type(error).__name__}: {error}"
        ) from error
    if found != name:
        raise BenchError(f"--candidates: {path}: expected candidates for a {name}, found some for a {found}")
    return entries


def from_report(
    known: dict[Key, dict[str, Any]], key: Key, rule: dict[str, Any], path: Path
) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """Return a key's candidates and what the compiler said of them, from the entries of a report."""
    if key not in known:
        raise BenchError(f"--candidates: {path}: expected an entry for {key}, found {len(known)} others")
    entry = known[key]

    def row(fields: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}

    if row(entry["rule"]) != rule:
        raise BenchError(f"--candidates: {path}: made for the default choice {entry['rule']}, which now is {rule}")
    tried = [Candidate(candidate["kernel"], row(candidate["row"])) for candidate in entry["candidates"]]
    skipped = ("seconds", "kernel", "blocks", "row")
    found = [
        {name: value for name, value in candidate.items() if name not in skipped} for candidate in entry["candidates"]
    ]
    return tried, found


def fits(tried: Sequence[Candidate], found: Sequence[dict[str, Any]], n: int) -> bool:
    """Tell whether a candidate compiled, and spills no more than the default choice, the first of its kernel."""
    first = next(i for i, candidate in enumerate(tried) if candidate.kernel == tried[n].kernel)
    if "error" in found[n]:
        return False
    return found[n].get("spilled", 0) <= found[first].get("spilled", 0)


def call_of(case: Case, inputs: Arrays) -> Call:
    """Return a case's arrays in the form that the backends receive."""
    seeds = None if inputs.seed is None else row_seeds(inputs.seed, jnp.arange(case.batch))
    return Call(
        query=inputs.query,
        key=inputs.key,
        value=inputs.value,
        bias=bias_of(case, inputs.parameter),
        query_segment_ids=inputs.segment_ids,
        key_segment_ids=inputs.segment_ids,
        dropout_seeds=seeds,
        causal=case.causal,
        window=case.window,
        scale=1 / math.sqrt(case.size),
        softcap=None,
        dropout_rate=case.dropout,
    )


def thinned(name: str, case: Case, tried: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Return the compiler's report on each candidate, from a separate process, since this one holds the chip."""
    if name in TPUS and chip() == name:
        # Only one process can use a TPU's runtime. A candidate that does not compile will fail when it is timed.
        return [{} for _ in tried]
    package = "jax_plugins.xla_cuda13" if name in GPUS else "libtpu"
    if importlib.util.find_spec(package) is None:
        raise BenchError(f"--tune: compiling for a {name} needs {'jax-cuda13-plugin' if name in GPUS else package}")
    job = {
        "chip": name,
        "case": dataclasses.asdict(case),
        "candidates": [dataclasses.asdict(candidate) for candidate in tried],
    }
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "0",  # a program that is read leaves no report
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "MOSAIC_GPU_DUMP_TO": folder,
        }
        errors = Path(folder) / "errors.txt"
        with (
            errors.open("w") as log,  # not a pipe, which could fill up and block the compiler
            subprocess.Popen(
                [sys.executable, "-m", __name__, folder],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            ) as process,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            found = []
            for line in process.stdout:
                found.append(json.loads(line))
                _say(f"  {len(found)}/{len(tried)} {tried[len(found) - 1].kernel}: {found[-1]}")
        if process.returncode or len(found) != len(tried):
            raise BenchError(
                f"--tune: the compiling process ended with {process.returncode}: {errors.read_text()[-2000:]}"
            )
    return found


def timed(
    kind: type,
    case: Case,
    fit: Sequence[Candidate],
    found: Sequence[dict[str, Any]],
    places: Sequence[int],
    rule: dict[str, Any],
    samples: int,
    save: Callable[[], None],
) -> dict[str, Any] | None:
    """Time candidates, add their times to `found`, each saved as it comes, and return the fastest row.

    The result is None if the default choice is as fast, or if the row gives wrong numbers.
    """
    backend = backend_of(chip() or "")[0]
    sets = draw(case, 4, 0)
    timing = {"samples": samples, "least_seconds": 0.1}

    def outputs(row: dict[str, Any], inputs: Arrays, *primals: Any) -> Any:
        query, key, value, *parameter = primals
        changed = {"parameter": parameter[0]} if parameter else {}
        call = call_of(case, inputs._replace(query=query, key=key, value=value, **changed))
        return backend.run(call, rebuild(kind, row))[0]

    def primals(inputs: Arrays) -> tuple[Any, ...]:
        return tuple(x for x in (inputs.query, inputs.key, inputs.value, inputs.parameter) if x is not None)

    def pass_of(row: dict[str, Any], inputs: Arrays) -> Any:
        return jax.vjp(lambda *given: outputs(row, inputs, *given), *primals(inputs))

    def seconds(candidate: Candidate) -> float:
        if candidate.kernel in FORWARD:
            return time_jax(lambda x: outputs(candidate.row, x, *primals(x)), [(x,) for x in sets], **timing).median
        if candidate.kernel == "key_heads":
            both = jax.jit(lambda x: pass_of(candidate.row, x)[1](x.wave))
            return sampled(lambda: [both(x) for x in sets], jax.block_until_ready, len(sets), **timing).median
        kept = jax.jit(lambda inputs: pass_of(candidate.row, inputs)[1])
        return time_jax(lambda pull, wave: pull(wave), [(kept(x), x.wave) for x in sets], **timing).median

    best: dict[str, tuple[float, Candidate]] = {}
    first: dict[str, float] = {}
    for n, candidate in zip(places, fit, strict=True):
        try:
            time = seconds(candidate)
        except Exception as error:  # a candidate that compiles remotely may still not run
            found[n]["error"] = first_line(error)
            save()
            continue
        found[n]["seconds"] = time
        save()
        _say(f"  {candidate.kernel} {candidate.row[candidate.kernel]}: {time * 1e6:.0f} us")
        first.setdefault(candidate.kernel, time)
        if candidate.kernel not in best or time < best[candidate.kernel][0]:
            best[candidate.kernel] = (time, candidate)
    row = dict(rule)
    for kernel, (time, candidate) in best.items():
        if time < 0.98 * first[kernel]:  # a smaller difference is within the noise
            row[kernel] = candidate.row[kernel]
            if kernel == "key_gradient":
                row["together"] = candidate.row["together"]
    if row == rule:
        return None

    def everything(row: dict[str, Any]) -> list[np.ndarray]:
        out, pull = jax.jit(lambda x: pass_of(row, x))(sets[0])
        return [np.asarray(x, np.float32) for x in (out, *pull(sets[0].wave))]

    for ours, theirs in zip(everything(row), everything(rule), strict=True):
        if not np.linalg.norm(ours - theirs) <= 2e-2 * np.linalg.norm(theirs):
            _say(f"{case.label}: WRONG numbers with {row}: not written")
            return None
    return row


def table_text(rows: dict[Key, dict[str, Any]]) -> str:
    """Return the text of `tuning_table.py`, formatted as the formatter would."""
    kept = Path(tuning_table.__file__).read_text().split("ROWS:")[0]
    lines = []
    for key, row in sorted(rows.items()):
        lines += [
            f"    {dataclasses.astuple(key)!r}: {{",
            *(f"        {name!r}: {row[name]!r}," for name in row),
            "    },",
        ]
    shown = "\n".join(["{", *lines, "}"]).replace("'", '"') if lines else "{}"
    return f"{kept}ROWS: dict[tuple[str, str, int, int, str, str, bool], dict[str, Any]] = {shown}\n"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# The compiling process


def compile_(job: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield one result per candidate: registers, spilled bytes, shared memory, temporary memory; or an error."""
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    name, case = job["chip"], Case(**job["case"] | {"window": tuple(job["case"]["window"])})
    if name in GPUS:
        target = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
    else:
        target = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[name])
    place = NamedSharding(Mesh(np.array(target.devices[:1]), ("x",)), PartitionSpec())
    backend, kind, _, compiling = backend_of(name)
    shapes = jax.eval_shape(lambda: draw(case, 1, 0)[0])
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)

    def step(inputs: Arrays, row: dict[str, Any], backward: bool) -> Any:
        def outputs(query: Any, key: Any, value: Any, parameter: Any) -> Any:
            given = inputs._replace(query=query, key=key, value=value, parameter=parameter)
            return backend.run(call_of(case, given), rebuild(kind, row))[0]

        primals = inputs.query, inputs.key, inputs.value, inputs.parameter
        if not backward:
            return outputs(*primals)
        out, pull = jax.vjp(outputs, *primals)
        return out, pull(inputs.wave)

    known: dict[tuple[str, str, bool], dict[str, int]] = {}
    for candidate in job["candidates"]:
        for old in folder.glob("attention_*"):
            old.unlink()
        kernel, row = candidate["kernel"], candidate["row"]
        try:
            with compiling():
                program = jax.jit(lambda x, row=row, k=kernel: step(x, row, k not in FORWARD)).trace(inputs)
                platforms = ("cuda",) if name in GPUS else ("tpu",)
                compiled = program.lower(lowering_platforms=platforms).compile()
        except Exception as error:  # the compiler's own, of many kinds: too much memory, an unknown shape
            yield {"error": (str(error).strip() or type(error).__name__).splitlines()[0][:200]}
            continue
        for field, blocks in row.items():
            if name in GPUS:
                known.setdefault((field, str(blocks), row["together"]), {}).update(usage(folder, field))
        memory = compiled.memory_analysis()
        result = {"temporary_bytes": 0 if memory is None else memory.temp_size_in_bytes}
        yield result | (known.get((kernel, str(row[kernel]), row["together"]), {}) if name in GPUS else {})


def usage(folder: Path, kernel: str) -> dict[str, int]:
    """Read registers, spilled bytes and bytes of shared memory of a Hopper kernel from the compiler's dump in `folder`.

    A kernel that was compiled in two parts (dk and dv separately) counts as the worse of them. The result is empty if
    there is no dump, since the compiler caches what it has compiled before.
    """
    found: dict[str, int] = {}
    for ending, patterns in (
        ("ptxas", {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill"}),
        ("resources.txt", {"shared": r"smem_scratch_bytes=(\d+)"}),
    ):
        for path in folder.glob(f"attention_{kernel}_*.{ending}"):
            text = path.read_text()
            for name, pattern in patterns.items():
                found[name] = max(found.get(name, 0), *map(int, re.findall(pattern, text)))
    return found


def _serve() -> None:
    job = json.load(sys.stdin)
    answers = sys.stdout
    sys.stdout = sys.stderr  # keep the compiler's own output out of the answer
    for result in compile_(job, Path(sys.argv[1])):
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    _serve()

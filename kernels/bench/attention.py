"""Measure attention: our backends and every other implementation that is installed, on this chip.

    bestiary bench attention --bias none,relative --peers all --out bench/
    bestiary bench attention --packed wikipedia --out bench/
    bestiary bench attention --tune

Each contestant's output and gradients are first compared with those of XLA in float32 at the highest precision; one
that differs by more than rounding is listed with its error and not timed. Contestants run in a process of their own,
with a time limit: one that hangs, or takes its process with it, is listed with that, and the others go on. Operations
are counted for unmasked query-key pairs only: two matrix products forward, five backward. The *ceiling* of a case is
the time that its operations would take at the rate of a large matrix product, or its bytes at the rate of a large copy,
whichever is longer; both rates are measured on this chip first. Files, written anew after each measurement:
`attention-CHIP[...].json` (everything), `.md` (the table), and at the end `.png` (the chart).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from .cases import BIASES, CORPORA, BenchError, Case, parse_shapes, parse_window
from .config import AttentionBenchConfig
from .jobs import worker
from .peers import OURS, contestants, known_peers
from .report import chart, command, described, entered, markdown
from .timing import METHOD, Ceilings, write, write_json
from .tune import tune
from .workers import Worker

# Default shapes. On an accelerator: 16k tokens, 2048 wide, as in the published tables.
SMALL = "2x128x4x64,1x512x4x64"
LARGE = ",".join(
    f"{16384 // length}x{length}x{2048 // size}x{size}" for size in (64, 128) for length in (128, 512, 1024, 2048, 4096)
)
PACKED = {False: "1x1024x4x64", True: "32x512x32x64,8x2048x32x64,4x4096x32x64"}


def main(config: AttentionBenchConfig) -> int:
    """Run `bestiary bench attention`; return the exit status: 0 done, 1 wrong results of ours, 2 bad arguments."""
    try:
        biases, peers = check(config)
        if config.tune:
            cases = plan(config, biases, on_cpu=False)
            return tune(
                cases,
                chip_name=config.chip,
                path=config.table,
                out=config.out,
                samples=config.samples,
                report_of=config.candidates,
            )
        config.out.mkdir(parents=True, exist_ok=True)
        with worker(config.out / "attention.log") as asked:
            result = run(config, biases, contestants(peers), asked)
    except BenchError as error:
        print(f"bestiary bench attention: {error}", file=sys.stderr)
        return 2
    if not any(entry.get("failed") for case in result["cases"] for entry in case["contestants"]):
        (config.out / "attention.log").unlink()
    wrong = [
        f"{case['label']}: {entry['name']}: {entry['reason']}"
        for case in result["cases"]
        for entry in case["contestants"]
        if entry["name"].startswith(OURS) and entry.get("wrong")
    ]
    for line in wrong:
        print(f"bestiary bench attention: WRONG: {line}", file=sys.stderr)
    return 1 if wrong else 0


def check(config: AttentionBenchConfig) -> tuple[list[str], list[str]]:
    """Return the biases and peers that are asked for; raise a BenchError that names an invalid option."""
    biases = [bias.strip() for bias in config.bias.split(",")]
    for bias in biases:
        if bias not in BIASES:
            raise BenchError(f"--bias: expected some of {', '.join(BIASES)}, found {bias!r}")
    if config.packed is not None and config.packed not in CORPORA:
        raise BenchError(f"--packed: expected one of {', '.join(CORPORA)}, found {config.packed!r}")
    if not 0 <= config.dropout < 1:
        raise BenchError(f"--dropout: expected a rate in [0, 1), found {config.dropout}")
    if config.samples < 1:
        raise BenchError(f"--samples: expected at least 1, found {config.samples}")
    if config.limit <= 0:
        raise BenchError(f"--limit: expected seconds above 0, found {config.limit:g}")
    peers = [peer.strip() for peer in config.peers.split(",")]
    for peer in peers:
        if peer not in known_peers():
            raise BenchError(f"--peers: expected some of {', '.join(known_peers())}, found {peer!r}")
    plan(config, biases, on_cpu=True)
    if config.chip is not None and not config.tune:
        raise BenchError("--chip: only with --tune; measurements always use the chip of this machine")
    if config.candidates is not None and not config.tune:
        raise BenchError("--candidates: only with --tune")
    return biases, peers


def plan(config: AttentionBenchConfig, biases: Sequence[str], *, on_cpu: bool) -> list[Case]:
    """Return the cases; raise a BenchError that names an invalid shape or window."""
    default = PACKED[not on_cpu] if config.packed else SMALL if on_cpu else LARGE
    dtype = config.dtype if config.dtype != "auto" else "float32" if on_cpu else "bfloat16"
    shapes = parse_shapes(config.shapes or default)
    window = parse_window(config.window)
    for b, queries, keys, *_ in shapes:
        if config.packed is not None and queries != keys:
            raise BenchError(f"--shapes: packed rows attend to themselves, found {b}x{queries} queries x {keys} keys")
    return [
        Case(*shape, dtype, bias, config.causal, config.packed, config.dropout, window)
        for shape in shapes
        for bias in biases
    ]


def run(config: AttentionBenchConfig, biases: Sequence[str], names: Sequence[str], asked: Worker) -> dict[str, Any]:
    """Measure; return the contents of the JSON file, and write it with its table after each measurement."""
    here = answered(asked, {"kind": "where"}, 120)
    on_cpu = here.pop("platform_name") == "cpu"
    here.pop("seconds")
    cases = plan(config, biases, on_cpu=on_cpu)
    timing = {"samples": config.samples, "least_seconds": config.sample_seconds or (0.05 if on_cpu else 0.2)}
    if on_cpu:
        _say(
            "No accelerator: measuring the reference backend (xla) and the peers that run on a CPU, at small shapes. "
            "The kernels for TPU and Hopper cannot be measured here."
        )
    job = {"kind": "ceilings", "dtype": cases[0].dtype, "timing": timing}
    measured = answered(asked, job, config.limit)
    ceilings = Ceilings(measured["operations"], measured["bytes"])
    _say(f"ceilings: {ceilings.operations / 1e12:.3g} TFLOP/s of matrix products, {ceilings.bytes / 1e12:.3g} TB/s")
    result: dict[str, Any] = {
        "bench": "attention",
        "date": datetime.now(UTC).date().isoformat(),
        "command": command(config),
        **here,
        "method": METHOD,
        "dtype": cases[0].dtype,
        "ceilings": {"matmul_tflops": ceilings.operations / 1e12, "copy_tb_per_s": ceilings.bytes / 1e12},
        "cases": [],
    }
    window = f"window-{config.window.replace(',', '-')}" if config.window else ""
    stem = config.out / "-".join(
        filter(None, ["attention", result["chip"], config.packed or "", "causal" if config.causal else "", window])
    )
    for case in cases:
        entries = described(case, config.seed)
        result["cases"].append(entries)
        for name in names:
            _say(f"{case.label}: {name}")
            job = {
                "kind": "contest",
                "case": dataclasses.asdict(case),
                "name": name,
                "sets": 2 if on_cpu else 4,
                "seed": config.seed,
                "timing": timing,
            }
            entries["contestants"].append(entered(entries, name, asked.ask(job, config.limit), ceilings))
            write_json(stem.with_name(stem.name + ".json"), result)
            write(stem.with_name(stem.name + ".md"), markdown(result))
    write(stem.with_name(stem.name + ".png"), chart(result))
    print(markdown(result))
    print(f"Written: {stem}.json, .md, .png")
    return result


def answered(asked: Worker, job: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the answer to a job without which there is nothing to measure; raise a BenchError if there is none."""
    answer = asked.ask(job, seconds)
    if "failed" in answer:
        raise BenchError(f"{job['kind']}: {answer['failed']} (its messages: {asked.log})")
    return answer


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

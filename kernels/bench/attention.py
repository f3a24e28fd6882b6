"""Measure attention: our backends and every other implementation that is installed, in one process, on this chip.

    bestiary bench attention --bias none,relative --peers all --out bench/
    bestiary bench attention --packed wikipedia --out bench/
    bestiary bench attention --tune

Each contestant's output and gradients are first compared with ours; one that differs by more than rounding is listed
with its error and not timed. Operations are counted for unmasked query-key pairs only: two matrix products forward,
five backward. The *ceiling* of a case is the time that its operations would take at the rate of a large matrix product,
or its bytes at the rate of a large copy, whichever is longer; both rates are measured on this chip first. Files:
`attention-CHIP[...].json` (everything), `.md` (the table), `.png` (the chart).
"""

from __future__ import annotations

import dataclasses
import io
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from .. import tuning
from .cases import (
    BIASES,
    CORPORA,
    BenchError,
    Case,
    draw,
    needed_area,
    needed_work,
    parse_shapes,
    parse_window,
)
from .config import AttentionBenchConfig
from .peers import OURS, Refused, contestants, enter, first_line, known_peers
from .timing import METHOD, Ceilings, Seconds, machine, measure_ceilings, table, write, write_json
from .tune import tune

# Default shapes. On an accelerator: 16k tokens, 2048 wide, as in the published tables.
SMALL = "2x128x4x64,1x512x4x64"
LARGE = ",".join(
    f"{16384 // length}x{length}x{2048 // size}x{size}" for size in (64, 128) for length in (128, 512, 1024, 2048, 4096)
)
PACKED = {False: "1x1024x4x64", True: "32x512x32x64,8x2048x32x64,4x4096x32x64"}

# Largest relative error (of norms) against ours: a few roundings to 8, 11 and 24 bits.
TOLERANCE = {"bfloat16": 3e-2, "float16": 5e-3, "float32": 2e-3}


def main(config: AttentionBenchConfig) -> int:
    """Run `bestiary bench attention`; return the exit status: 0 done, 1 wrong results of ours, 2 bad arguments."""
    try:
        cases, names = plan(config)
        if config.chip is not None and not config.tune:
            raise BenchError("--chip: only with --tune; measurements always use the chip of this machine")
        if config.tune:
            return tune(cases, chip_name=config.chip, path=config.table, out=config.out, samples=config.samples)
    except BenchError as error:
        print(f"bestiary bench attention: {error}", file=sys.stderr)
        return 2
    config.out.mkdir(parents=True, exist_ok=True)
    result = run(config, cases, names)
    window = f"window-{config.window.replace(',', '-')}" if config.window else ""
    stem = config.out / "-".join(
        filter(None, ["attention", result["chip"], config.packed or "", "causal" if config.causal else "", window])
    )
    text = markdown(result)
    write_json(stem.with_name(stem.name + ".json"), result)
    write(stem.with_name(stem.name + ".md"), text)
    write(stem.with_name(stem.name + ".png"), chart(result))
    print(text)
    print(f"Written: {stem}.json, .md, .png")
    wrong = [
        f"{case['label']}: {entry['name']}: {entry['reason']}"
        for case in result["cases"]
        for entry in case["contestants"]
        if entry["name"].startswith(OURS) and entry.get("wrong")
    ]
    for line in wrong:
        print(f"bestiary bench attention: WRONG: {line}", file=sys.stderr)
    return 1 if wrong else 0


def plan(config: AttentionBenchConfig) -> tuple[list[Case], list[str]]:
    """Return the cases and the names of the contestants; raise a BenchError that names an invalid option."""
    on_cpu = jax.default_backend() == "cpu" and config.chip is None
    default = PACKED[not on_cpu] if config.packed else SMALL if on_cpu else LARGE
    dtype = config.dtype if config.dtype != "auto" else "float32" if on_cpu else "bfloat16"
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
    peers = [peer.strip() for peer in config.peers.split(",")]
    for peer in peers:
        if peer not in known_peers():
            raise BenchError(f"--peers: expected some of {', '.join(known_peers())}, found {peer!r}")
    shapes = parse_shapes(config.shapes or default)
    window = parse_window(config.window)
    for b, queries, keys, *_ in shapes:
        if config.packed is not None and queries != keys:
            raise BenchError(f"--shapes: packed rows attend to themselves, found {b}x{queries} queries x {keys} keys")
    cases = [
        Case(*shape, dtype, bias, config.causal, config.packed, config.dropout, window)
        for shape in shapes
        for bias in biases
    ]
    return cases, contestants(peers)


def run(config: AttentionBenchConfig, cases: Sequence[Case], names: Sequence[str]) -> dict[str, Any]:
    """Measure; return the contents of the JSON file."""
    on_cpu = jax.default_backend() == "cpu"
    timing = {"samples": config.samples, "least_seconds": config.sample_seconds or (0.05 if on_cpu else 0.2)}
    if on_cpu:
        _say(
            "No accelerator: measuring the reference backend (xla) and the peers that run on a CPU, at small shapes. "
            "The kernels for TPU and Hopper cannot be measured here."
        )
    ceilings = measure_ceilings(cases[0].dtype, **timing)
    _say(f"ceilings: {ceilings.operations / 1e12:.3g} TFLOP/s of matrix products, {ceilings.bytes / 1e12:.3g} TB/s")
    return {
        "bench": "attention",
        "date": datetime.now(UTC).date().isoformat(),
        "command": command(config),
        "chip": tuning.chip() or "cpu",
        **machine(),
        "method": METHOD,
        "dtype": cases[0].dtype,
        "ceilings": {"matmul_tflops": ceilings.operations / 1e12, "copy_tb_per_s": ceilings.bytes / 1e12},
        "cases": [measure(case, names, ceilings, timing, config.seed) for case in cases],
    }


def measure(case: Case, names: Sequence[str], ceilings: Ceilings, timing: dict[str, Any], seed: int) -> dict[str, Any]:
    """Measure one case; return the work it needs, and one entry per contestant."""
    sets = draw(case, 2 if jax.default_backend() == "cpu" else 4, seed)
    ids = None if sets[0].segment_ids is None else np.asarray(sets[0].segment_ids)
    area = needed_area(case, ids)
    forward, backward = needed_work(case, area)
    reference: dict[str, np.ndarray] | None = None
    entries = []
    for name in names:
        _say(f"{case.label}: {name}")
        entry: dict[str, Any] = {"name": name}
        entries.append(entry)
        try:
            runner = enter(name, case, sets, timing)
            found = runner.results()
            reference = found if reference is None else reference
            entry["errors"] = {key: relative_error(found[key], reference[key]) for key in reference}
            worst = max(entry["errors"], key=lambda key: entry["errors"][key])
            if not entry["errors"][worst] <= TOLERANCE[case.dtype]:
                entry["wrong"] = True
                entry["reason"] = f"{worst} differs from ours by {entry['errors'][worst]:.2g}: not timed"
                entry["errors"] = {key: error for key, error in entry["errors"].items() if np.isfinite(error)}
                continue
            for which, call, needed in (
                ("forward", runner.forward, forward),
                ("backward", runner.backward, backward),
            ):
                entry[which] = rated(call(), needed.operations, ceilings.seconds(*needed))
        except Refused as refusal:
            entry["reason"] = str(refusal)
        except Exception as error:  # one contestant's failure (out of memory, an untested chip) must not end the others
            entry["reason"] = f"{type(error).__name__}: {first_line(error)}"
    return {
        "label": case.label,
        **dataclasses.asdict(case),
        "needed_share_of_area": area / (case.batch * case.queries * case.keys),
        "tokens_share": 1.0 if ids is None else float((ids != 0).mean()),
        "needed": {"forward": forward._asdict(), "backward": backward._asdict()},
        "contestants": entries,
    }


def rated(seconds: Seconds, operations: float, at_the_ceiling: float) -> dict[str, float]:
    """Add to a time its rate, and the fraction of the ceiling."""
    return {
        **seconds._asdict(),
        "tflops": operations / seconds.median / 1e12,
        "share_of_ceiling": at_the_ceiling / seconds.median,
    }


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference over the norm of `expected`; infinite if anything is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))


def command(config: Any, words: str = "attention") -> str:
    """Return the command line that produces a config."""
    parts = ["bestiary", "bench", words]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            flag = field.name.replace("_", "-")
            parts += [f"--{flag}"] if value is True else [f"--{flag}", shlex.quote(str(value))]
    return " ".join(parts)


def markdown(result: dict[str, Any]) -> str:
    """Return the table, with an explanation, as Markdown."""
    ceilings = result["ceilings"]
    lines = [
        f"# Attention on {result['device']}, {result['dtype']}",
        "",
        f"{result['date']}, `{result['command']}`; jax {result['versions']['jax']}. "
        f"Ceilings measured here: {ceilings['matmul_tflops']:.3g} TFLOP/s of matrix products, "
        f"{ceilings['copy_tb_per_s']:.3g} TB/s of copying.",
        "",
        "TFLOP/s count unmasked query-key pairs only: two matrix products forward, five backward. Share: fraction of "
        "the ceiling, which is the time that the operations or the bytes take at the rates above, whichever is "
        f"longer. {result['method']}",
        "",
    ]
    for case in result["cases"]:
        share = case["needed_share_of_area"]
        area = "" if share == 1 else f" ({share:.3g} of the score area needed)"
        lines += [f"## {case['label']}{area}", ""]
        timed = [entry for entry in case["contestants"] if "forward" in entry]
        rows = [
            [entry["name"], *_cells(entry["forward"]), *_cells(entry["backward"])]
            for entry in timed
            if "backward" in entry
        ]
        headers = [""]
        headers += [f"{which} {what}" for which in ("fwd", "bwd") for what in ("ms", "(range)", "TFLOP/s", "share")]
        lines += [table(headers, rows) if rows else "Nothing could be timed.", ""]
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in result["cases"]:
        for entry in case["contestants"]:
            if "reason" in entry:
                reasons.setdefault((entry["name"], entry["reason"]), []).append(case["label"])
    if reasons:
        lines += ["## Not measured", ""]
        for (name, reason), labels in reasons.items():
            where = "" if len(labels) == len(result["cases"]) else f" ({'; '.join(labels)})"
            lines.append(f"- {name}: {reason}{where}")
        lines.append("")
    return "\n".join(lines)


def _cells(part: dict[str, float]) -> list[str]:
    return [
        f"{part['median'] * 1e3:.3g}",
        f"{part['shortest'] * 1e3:.3g}-{part['longest'] * 1e3:.3g}",
        f"{part['tflops']:.3g}",
        f"{part['share_of_ceiling']:.0%}",
    ]


def chart(result: dict[str, Any]) -> bytes:
    """Return a PNG with the TFLOP/s of every contestant in each case; forward above, backward below."""
    names = list(
        dict.fromkeys(entry["name"] for case in result["cases"] for entry in case["contestants"] if "backward" in entry)
    )
    labels = [case["label"].replace(", ", "\n", 1) for case in result["cases"]]
    figure = Figure(figsize=(max(7.0, 1.5 * len(labels) + 3), 7), layout="constrained")
    for axes, which in zip(figure.subplots(2, 1, sharex=True), ("forward", "backward"), strict=True):
        width = 0.8 / max(1, len(names))
        for n, name in enumerate(names):
            rates, low, high = [], [], []
            for case in result["cases"]:
                (entry,) = (entry for entry in case["contestants"] if entry["name"] == name)
                part = entry.get(which)
                rates.append(part["tflops"] if part else 0.0)
                low.append(part["tflops"] * (1 - part["median"] / part["longest"]) if part else 0.0)
                high.append(part["tflops"] * (part["median"] / part["shortest"] - 1) if part else 0.0)
            places = np.arange(len(labels)) + (n - (len(names) - 1) / 2) * width
            axes.bar(places, rates, width, yerr=(low, high), label=name, error_kw={"linewidth": 0.8})
        axes.axhline(result["ceilings"]["matmul_tflops"], color="black", linewidth=0.8, linestyle="--")
        axes.set_ylabel(f"{which}, TFLOP/s")
        axes.set_xticks(np.arange(len(labels)), labels, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    if names:
        figure.axes[0].legend(fontsize=8, frameon=False, ncols=2)
    figure.suptitle(f"Attention on {result['device']}, {result['dtype']}; dashed: matrix products", fontsize=10)
    return png(figure)


def png(figure: Figure) -> bytes:
    """Return a figure as PNG bytes, without a date, so that the same figures give the same file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

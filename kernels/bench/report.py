"""What a benchmark of attention shows: the facts of its cases, its table in Markdown, and its chart."""

from __future__ import annotations

import dataclasses
import io
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .cases import Case, needed_area, needed_work, segment_ids
from .timing import METHOD, Ceilings, Seconds, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def described(case: Case, seed: int) -> dict[str, Any]:
    """Return a case with the work that it needs, as it stands in the file of results."""
    ids = segment_ids(case, seed)
    area = needed_area(case, ids)
    forward, backward = needed_work(case, area)
    return {
        "label": case.label,
        **dataclasses.asdict(case),
        "needed_share_of_area": area / (case.batch * case.queries * case.keys),
        "tokens_share": 1.0 if ids is None else float((ids != 0).mean()),
        "needed": {"forward": forward._asdict(), "backward": backward._asdict()},
        "contestants": [],
    }


def entered(case: Mapping[str, Any], name: str, answer: Mapping[str, Any], ceilings: Ceilings | None) -> dict[str, Any]:
    """Return a contestant's entry in a case: the answer of `jobs.contest`, with rates and shares of the ceiling."""
    entry = {"name": name} | {key: answer[key] for key in ("errors", "wrong", "reason") if key in answer}
    if "failed" in answer:
        entry |= {"failed": True, "reason": answer["failed"]}
    for which in ("forward", "backward"):
        if which in answer:
            needed = case["needed"][which]
            limit = None if ceilings is None else ceilings.seconds(needed["operations"], needed["bytes"])
            entry[which] = rated(Seconds(**answer[which]), needed["operations"], limit)
    return entry


def rated(seconds: Seconds, operations: float, at_the_ceiling: float | None) -> dict[str, Any]:
    """Add to a time its rate, and the fraction of the ceiling where that was measured."""
    return {
        **seconds._asdict(),
        "tflops": operations / seconds.median / 1e12,
        "share_of_ceiling": None if at_the_ceiling is None else at_the_ceiling / seconds.median,
    }


def command(config: Any, words: str = "attention") -> str:
    """Return the command line that produces a config."""
    parts = ["bestiary", "bench", words]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            flag = field.name.replace("_", "-")
            parts += [f"--{flag}"] if value is True else [f"--{flag}", shlex.quote(str(value))]
    return " ".join(parts)


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables, with an explanation, as Markdown."""
    ceilings = result["ceilings"]
    lines = [
        f"# Attention on {result['device']}, {result['dtype']}",
        "",
        f"{result['date']}, `{result['command']}`; jax {result['versions']['jax']}. "
        + (
            "The ceilings were not measured."
            if ceilings is None
            else f"Ceilings measured here: {ceilings['matmul_tflops']:.3g} TFLOP/s of matrix products, "
            f"{ceilings['copy_tb_per_s']:.3g} TB/s of copying."
        ),
        "",
        "TFLOP/s count unmasked query-key pairs only: two matrix products forward, five backward. Share: fraction of "
        "the ceiling, which is the time that the operations or the bytes take at the rates above, whichever is "
        f"longer. {METHOD}",
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


def _cells(part: Mapping[str, Any]) -> list[str]:
    return [
        f"{part['median'] * 1e3:.3g}",
        f"{part['shortest'] * 1e3:.3g}-{part['longest'] * 1e3:.3g}",
        f"{part['tflops']:.3g}",
        "" if part["share_of_ceiling"] is None else f"{part['share_of_ceiling']:.0%}",
    ]


def chart(result: Mapping[str, Any]) -> bytes:
    """Return a PNG with the TFLOP/s of every contestant in each case; forward above, backward below."""
    from matplotlib.figure import Figure

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
                entries = [entry for entry in case["contestants"] if entry["name"] == name]
                part = entries[0].get(which) if entries else None
                rates.append(part["tflops"] if part else 0.0)
                low.append(part["tflops"] * (1 - part["median"] / part["longest"]) if part else 0.0)
                high.append(part["tflops"] * (part["median"] / part["shortest"] - 1) if part else 0.0)
            places = np.arange(len(labels)) + (n - (len(names) - 1) / 2) * width
            axes.bar(places, rates, width, yerr=(low, high), label=name, error_kw={"linewidth": 0.8})
        if result["ceilings"] is not None:
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

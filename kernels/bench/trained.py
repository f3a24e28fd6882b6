"""The table of `bestiary bench layers --runs`: translators with each kind of layer, as trained.

It reads what `bestiary translate train` wrote: results.json, and the evaluations in metrics.jsonl.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .cases import BenchError
from .config import LayersBenchConfig
from .report import png
from .timing import table, write, write_json

STEM = "layers-trained"
FIGURE = "bleu_lowercase"


def read_run(folder: Path) -> dict[str, Any]:
    """Return the figures of one run; raise a BenchError if it is no finished translator's."""
    try:
        results = json.loads((folder / "results.json").read_text())
        settings = json.loads((folder / "config.json").read_text())
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        curve = [(line["step"], line[f"eval/{FIGURE}"]) for line in lines if f"eval/{FIGURE}" in line]
        per_step = results["seconds_in_steps"] / max(1, results["steps"])
        return {
            "run": folder.name,
            "preset": settings["preset"],
            "parameters": results["parameters"],
            "bleu": results["held_out"][FIGURE],
            "target_tokens": results["target_tokens"],
            "target_tokens_per_second": results["target_tokens_per_second"],
            "seconds": results["seconds_in_steps"],
            "curve": [(step * per_step, bleu) for step, bleu in curve],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"--runs {folder}: no finished run of `bestiary translate train` ({error})") from None


def time_to(curve: list[tuple[float, float]], bleu: float) -> float | None:
    """Return the seconds after which an evaluation first reached this BLEU, or None if none did."""
    return next((seconds for seconds, found in curve if found >= bleu), None)


def compare(config: LayersBenchConfig) -> int:
    """Write the table and the chart; return the exit status."""
    runs = [read_run(folder) for folder in config.runs]
    half = max(run["bleu"] for run in runs) / 2
    rows = []
    for run in runs:
        reached = time_to(run["curve"], half)
        rows.append(
            [
                run["preset"],
                f"{run['parameters'] / 1e6:.2f}",
                f"{run['bleu']:.2f}",
                f"{run['target_tokens'] / 1e6:.2f}",
                f"{run['target_tokens_per_second']:,.0f}",
                "not reached" if reached is None else f"{reached / 60:.1f}",
            ]
        )
    date = datetime.now(UTC).date().isoformat()
    headers = ["model", "M parameters", "BLEU", "M target tokens", "tokens/s", f"min. to {half:.1f} BLEU"]
    text = "\n".join(
        [
            "# Trained translators, by their layers",
            "",
            f"{date}, `bestiary bench layers --runs {' '.join(map(str, config.runs))}`. "
            "BLEU is lower-cased, of the dev set by the last beam search; times are of updates alone.",
            "",
            table(headers, rows),
            "",
        ]
    )
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / f"{STEM}.json", {"bench": STEM, "half": half, "runs": runs})
    write(config.out / f"{STEM}.md", text)
    write(config.out / f"{STEM}.png", chart(runs))
    print(text)
    print(f"Written: {config.out / STEM}.json, .md, .png")
    return 0


def chart(runs: list[dict[str, Any]]) -> bytes:
    """Return a PNG of BLEU over the time of training."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        minutes, bleu = zip(*[(seconds / 60, found) for seconds, found in run["curve"]], strict=True)
        axes.plot(minutes, bleu, marker=".", label=run["preset"])
    axes.set_xlabel("minutes of updates")
    axes.set_ylabel("BLEU of the dev set, lower-cased")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return png(figure)

"""Run a fine-tuning command once per seed, and write the means of its metrics."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import RunError


def for_each_seed(config: Any, run_one: Callable[[Any], int]) -> int:
    """Run a command, once per `--seeds`; return the exit status.

    Each run has its own folder, `OUT/seed-N`; `OUT` gets results.json and table.md with mean, standard deviation and
    each value of every metric. The same command again resumes.

    Args:
        config: configuration of a command, with the settings that all tasks share as its field `run`.
        run_one: the command for one seed.

    Raises:
        RunError: `OUT` is the folder of one run.
    """
    seeds = config.run.seeds
    if not seeds:
        return run_one(config)
    from ...data.files import write_text
    from ...data.json_files import read_object, write_json

    out = config.run.out
    if (out / "config.json").exists():
        raise RunError(f"{out}: the folder of one run. Choose another --out for a folder of several.")
    found = []
    for seed in seeds:
        print(f"--- seed {seed}")
        folder = out / f"seed-{seed}"
        one = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed, seeds=(), out=folder))
        status = run_one(one)
        if status or not (folder / "results.json").is_file():
            return status
        found.append(read_object(folder / "results.json"))
    metrics = means([result["metrics"] for result in found])
    rows = [
        f"| {split} | {name} | {value['mean']:.4f} | {_shown(value['std'])} | {' '.join(map(_shown, value['each']))} |"
        for split, values in metrics.items()
        for name, value in values.items()
    ]
    table = "\n".join(["| split | metric | mean | std | each |", "| --- | --- | --- | --- | --- |", *rows, ""])
    write_text(out / "table.md", table)
    write_json(out / "results.json", {"task": found[0]["task"], "seeds": list(seeds), "metrics": metrics})
    print(table, end="")
    return 0


def means(found: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return mean, sample standard deviation (None of one run) and each value, of every metric that all runs have."""
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for split, values in found[0].items():
        for name in values:
            each = [run[split][name] for run in found if name in run[split]]
            if len(each) == len(found):
                std = statistics.stdev(each) if len(each) > 1 else None
                result.setdefault(split, {})[name] = {"mean": statistics.fmean(each), "std": std, "each": each}
    return result


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"

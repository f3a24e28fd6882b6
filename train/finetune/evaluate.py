"""Evaluate a fine-tuned model on labelled examples.

bestiary evaluate runs/mrpc --data glue/MRPC
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ...data.files import check_output_folder
from ..config import ParallelConfig
from .config import finished_run


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Print a fine-tuned model's official metrics on labelled examples, as JSON."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished fine-tuning run."""
    data: Path
    """The examples, in the format of the run's task: a file, or a folder with a file for --split."""
    split: str = "dev"
    """Split of a folder to evaluate."""
    out: Path | None = None
    """Folder for the metrics, for the report of each class, and for the predictions in the benchmark's format."""
    parallelism: Annotated[ParallelConfig, tyro.conf.arg(name="")] = field(default_factory=ParallelConfig)


def main(config: EvaluateConfig) -> int:
    """Run `bestiary evaluate`; return the exit status."""
    if config.out is not None:
        check_output_folder(config.out)
    folder = finished_run(config.run)
    # Imported here, since they import JAX, which would delay --help.
    from ...data.json_files import json_text, write_json
    from ..report import write_report
    from .prediction import open_run, read_examples

    run = open_run(folder, config.parallelism)
    examples = read_examples(run.task, config.data, config.split, labelled=True)
    features, predicted = run.predict(examples)
    metrics = {**predicted.means, **run.task.metrics(predicted.collected, features, examples)}
    results = {
        "task": run.task.name,
        "data": str(config.data),
        "examples": len(examples),
        "metrics": metrics,
        "explained": dict(run.task.explained),
    }
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "results.json", results)
        classified = run.task.classified(predicted.collected, features, examples)
        if classified is not None:
            write_report(config.out / "report", config.split, classified)
        run.task.write_predictions(config.out / "predictions", config.split, predicted.collected, features, examples)
    print(json_text(results, "the results", indent=2))
    return 0

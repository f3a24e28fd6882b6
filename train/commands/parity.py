"""`bestiary parity FOLDER...`: compare models with the reference implementation's numbers."""

import dataclasses
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ...data.json_files import read_object, write_json

if TYPE_CHECKING:
    from ...models.checkpoints.parity import Report


@dataclass(frozen=True)
class ParityConfig:
    """Compare checkpoints with the reference implementation's stored outputs, losses and gradients."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Fixture folders: a checkpoint, expected.safetensors and, if there is a loss, grads.safetensors and
    trajectory.json; generate.json where the reference generated too."""
    json: bool = False
    """Print one JSON object instead of text."""
    record: Path | None = None
    """JSON file to write the largest errors of each family to, in the place of earlier ones; what it has of other
    families stays."""
    output_tolerance: float = 1e-5
    """Largest absolute error of any output, and of the loss."""
    gradient_tolerance: float = 1e-4
    """Largest relative error of any gradient tensor, as a fraction of the reference's norm."""
    trajectory_tolerance: float = 1e-4
    """Largest relative error of the loss of any training step in trajectory.json."""


def main(config: ParityConfig) -> int:
    """Run the fixtures and print the errors; return 0 if all are within tolerance, else 1."""
    # Imported here, since they import JAX, which would delay --help.
    from ...models.checkpoints.parity import check
    from ..generate.released import reference_generate
    from ..optim.optimizer import reference_optimizer

    if not config.folders:
        print("bestiary parity: no folders given", file=sys.stderr)
        return 2
    names = ("output_tolerance", "gradient_tolerance", "trajectory_tolerance")
    tolerances = {name: getattr(config, name) for name in names}
    how = {"make_optimiser": reference_optimizer, "generate": reference_generate}
    reports = [check(folder, **tolerances, **how) for folder in config.folders]
    passed = all(report.passed for report in reports)
    if config.record is not None:
        record(config.record, reports)
    if config.json:
        # Infinity and NaN are not valid JSON, so they are shown as text.
        finite = json.loads(json.dumps([dataclasses.asdict(r) for r in reports]), parse_constant=str)
        print(json.dumps({"passed": passed, **tolerances, "folders": finite}, indent=2))
    else:
        for report in reports:
            print("\n".join(describe(report)))
    return 0 if passed else 1


def record(path: Path, reports: Sequence["Report"]) -> None:
    """Write the largest errors of each family of the reports to a JSON file: family -> measure -> error.

    Args:
        path: the file; what it has of other families stays.
        reports: of fixtures that could be compared.
    """
    from ...models.registry import families

    owners = {
        architecture.name: family.name for family in reversed([*families()]) for architecture in family.architectures
    }
    found: dict[str, list[Report]] = {}
    for report in reports:
        if report.error is None and report.model is not None:
            found.setdefault(owners[report.model], []).append(report)
    recorded = read_object(path) if path.exists() else {}
    for family, own in found.items():
        errors = {
            "outputs": [error for report in own for error in report.outputs.values()],
            "loss": [report.loss for report in own],
            "gradients": [report.gradient for report in own],
            "training": [report.trajectory for report in own],
        }
        recorded[family] = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()} CPU, jax {version('jax')}",
            "fixtures": sorted(Path(report.folder).resolve().name for report in own),
            **{
                name: max((error for error in some if error is not None), default=None) for name, some in errors.items()
            },
            "same_bytes": not any(report.saved_differently for report in own),
        }
    write_json(path, dict(sorted(recorded.items())))


def describe(report: "Report") -> list[str]:
    """Format a report as lines of text."""
    verdict = "ok" if report.passed else "FAILED"
    if report.error is not None:
        return [f"{report.folder}: {verdict}: {report.error}"]
    lines = [f"{report.folder}: {verdict} ({report.model})"]
    lines += [f"  {name:32} {error:.2e}" for name, error in report.outputs.items()]
    if report.loss is not None:
        lines.append(f"  {'loss':32} {report.loss:.2e}")
    if report.gradient is not None:
        lines.append(f"  {'gradients (relative)':32} {report.gradient:.2e}  {report.gradient_tensor}")
    if report.trajectory is not None:
        lines.append(f"  {'trajectory (relative)':32} {report.trajectory:.2e}  step {report.trajectory_step}")
    if report.generated_differently is not None:
        differs = f"DIFFERS: {report.generated_differently} of the inputs"
        lines.append(f"  {'generated tokens':32} {differs if report.generated_differently else 'same'}")
    if report.scores is not None:
        lines.append(f"  {'scores of generated tokens':32} {report.scores:.2e}")
    saved = "same bytes" if not report.saved_differently else f"DIFFERS: {', '.join(report.saved_differently)}"
    lines.append(f"  {'saved again':32} {saved}")
    return lines

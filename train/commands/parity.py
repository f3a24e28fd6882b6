"""`bestiary parity FOLDER...`: compare models with the reference implementation's numbers."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

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
    if config.json:
        # Infinity and NaN are not valid JSON, so they are shown as text.
        finite = json.loads(json.dumps([dataclasses.asdict(r) for r in reports]), parse_constant=str)
        print(json.dumps({"passed": passed, **tolerances, "folders": finite}, indent=2))
    else:
        for report in reports:
            print("\n".join(describe(report)))
    return 0 if passed else 1


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

"""Settings of `bestiary plan`."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import RunError, check_setting


@dataclass(frozen=True)
class PlanConfig:
    """Plan a run on chips that are not here: does it fit, how fast can it be, what do its devices exchange.

    bestiary plan COMMAND --target CHIP:TOPOLOGY, with the flags of the command: pretrain, distill, finetune TASK,
    translate train, text2text train, images train, images finetune or multitask train, for each task. Its training
    step is compiled as it would be there; with --parallel pmap, beside that of the mesh. Data, tokenizers and
    checkpoints that are not given are replaced by others of the same sizes; --model may be a size of `bestiary models`
    everywhere. Of the batches of --phases and --batch-ramp, the largest are planned.
    """

    target: str
    """Chips to plan for: v5e:16x16, v5p:4x4x4, v6e:8x8, v4:2x2x2, h100:8, h200:8; 2xv5e:16x16 for two slices."""
    search: bool = False
    """Compare meshes, with and without --remat, and numbers of --accumulate: which fit, and which is fastest."""
    tries: int = 12
    """Maximum number of programs that --search compiles."""
    shardings: bool = False
    """List every tensor of the training state, and how it is divided."""
    json: Path | None = None
    """JSON file to write the plan to."""
    chart: Path | None = None
    """PNG file to draw the memory and the time of a step in."""
    program: Path | None = None
    """File to write the compiled program (HLO) to."""

    def __post_init__(self) -> None:
        check_setting(self, "tries", least=1)
        of_one = {"--shardings": self.shardings, "--chart": self.chart, "--program": self.program}
        given = [flag for flag, value in of_one.items() if value]
        if self.search and given:
            raise RunError(f"{given[0]} is of a single plan: leave out --search, and give the settings that it found.")

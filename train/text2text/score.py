"""Score outputs: of a model for a test set, or that exist already.

bestiary text2text score --metric rouge --model runs/summaries --source test.src --reference test.tgt
bestiary text2text score --metric exact --hypothesis answers.txt --reference test.tgt
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ...data.progress import counted
from ..arguments import flags
from ..errors import RunError
from ..generate.config import DecodeConfig, refuse_decoding_flags
from ..progress import Progress
from ..translate.score import read_two
from .config import Metric
from .run import DECODE


@dataclass(frozen=True)
class Text2TextScore:
    """Score the outputs of a model for a test set, or outputs that exist already."""

    reference: Path
    """File of targets, one per line (.gz and .zst too)."""
    metric: Metric = "rouge"
    """rouge (ROUGE-1, 2 and L), sacrebleu (BLEU and chrF) or exact (share of outputs that are the target)."""
    model: Path | None = None
    """Run folder or checkpoint folder of the model that reads --source."""
    source: Path | None = None
    """File of sources, one per line: those of --reference."""
    hypothesis: Path | None = None
    """File of outputs to score, instead of --model and --source."""
    prefix: str | None = None
    """Text before every source. None: that of the model's training."""
    encoding: str = "utf-8"
    """Character encoding of the files."""
    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")] = DECODE
    batch: int = 64
    """Texts per batch."""
    longest: int = 0
    """Maximum length of a source, in tokens; longer ones are cut, and counted. 0: the length used in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation."""
    outputs: Path | None = None
    """With --model: file to write the outputs to."""
    out: Path | None = None
    """JSON file to write the figures to; they are also printed."""

    def __post_init__(self) -> None:
        if (self.model is None) != (self.source is None) or (self.model is None) == (self.hypothesis is None):
            raise RunError("Give --model and --source, or --hypothesis alone.")

    @staticmethod
    def check_arguments(arguments: Sequence[str]) -> None:
        """Refuse flags that another flag makes meaningless, whatever their values."""
        given = flags(arguments)
        if "hypothesis" in given:
            refuse_decoding_flags(given, "--hypothesis is written already")
            unused = [name for name in ("batch", "longest", "dtype", "outputs", "prefix") if name in given]
            if unused:
                raise RunError(f"--hypothesis is written already: leave --{unused[0]} out.")


def main(config: Text2TextScore) -> int:
    """Run `bestiary text2text score`; return the exit status."""
    # Imported here, since they import JAX, which would delay --help.
    from ...data.files import check_output, write_text
    from ...data.json_files import json_text, write_json
    from ..translate.translator import open_translator
    from .metrics import scoring, text_scores

    for path in (config.out, config.outputs):
        if path is not None:
            check_output(path)
    scoring(config.metric)  # a missing package is reported before the work
    progress = Progress()
    result: dict[str, Any] = {"task": "text2text score", "metric": config.metric}
    if config.model is None or config.source is None:
        assert config.hypothesis is not None
        references, outputs = read_two(config.reference, config.hypothesis, config.encoding)
    else:
        sources, references = read_two(config.source, config.reference, config.encoding)
        how: dict[str, Any] = {"rows": config.batch, "longest": config.longest, "prefix": config.prefix}
        model = open_translator(config.model, config.decode, too_long="cut", dtype=config.dtype, **how)
        outputs = [found[0].text for found in model.translate(sources)]
        result["settings"] = {**asdict(model.decode), "batch": config.batch, "dtype": config.dtype}
        for note in model.findings:
            progress.line(note)
        if config.outputs is not None:
            write_text(config.outputs, "".join(f"{text}\n" for text in outputs))
    found = text_scores(config.metric, outputs, references)
    result |= {"texts": len(references), **found.values, **found.signatures}
    progress.line(counted(len(references), "text"))
    if config.out is not None:
        write_json(config.out, result)
    print(json_text(result, "the scores", indent=2))
    return 0

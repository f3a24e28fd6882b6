"""Fine-tune on questions whose answers are spans of a text: SQuAD 1.1 and 2.0.

bestiary finetune squad --data squad/train-v1.1.json --eval-data squad/dev-v1.1.json --model FOLDER --out runs/squad
bestiary predict runs/squad --question "Who wrote it?" --context "It was written by Ada."
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ....data.progress import counted
from ....models.checkpoints.config import require_checkpoint
from ...errors import RunError
from ..config import FinetuneConfig
from ..seeds import for_each_seed


@dataclass(frozen=True, kw_only=True)
class SquadConfig:
    """Fine-tune an encoder to answer questions by a span of a text, on SQuAD 1.1 or 2.0.

    The official exact match and F1 are written to results.json, the files for the official scripts to predictions/:
    predictions.json, nbest_predictions.json and, for 2.0, null_odds.json.
    """

    data: Path
    """Questions to train on, in SQuAD's JSON format."""
    eval_data: Path
    """Questions to evaluate on."""
    test_data: Path | None = None
    """Questions to predict at the end; they need no answers."""
    doc_stride: int = 128
    """Distance between the starts of consecutive windows of a long context, in tokens."""
    max_question: int = 64
    """Maximum length of a question, in tokens; longer questions are truncated."""
    max_answer_length: int = 30
    """Maximum length of an answer, in tokens."""
    n_best: int = 20
    """Number of answers per question in nbest_predictions.json."""
    null_threshold: float | None = None
    """For version 2.0: a question has no answer if the score for that exceeds the score of the best span by more than
    this. None: the value with the best F1 on the evaluation data."""
    skip_bad_answers: bool = False
    """Do not stop at bad answers: skip training questions whose answer is not at the given position of their context,
    and treat windows as unanswerable if no window contains the answer."""
    run: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: FinetuneConfig(model=tyro.MISSING, out=tyro.MISSING, max_length=384, epochs=2.0)
    )

    def __post_init__(self) -> None:
        for name, least in (("max_answer_length", 1), ("n_best", 1)):
            if getattr(self, name) < least:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}.")


def main(config: SquadConfig) -> int:
    """Run `bestiary finetune squad`; return the exit status."""
    require_checkpoint(config.run.model)
    return for_each_seed(config, _main)


def _main(config: SquadConfig) -> int:
    from ..loop import finetune
    from ..tasks.squad import SquadTask, read_questions
    from ..tasks.task import TaskData

    task = SquadTask(
        "squad",
        config.run.max_length,
        config.doc_stride,
        config.max_question,
        config.max_answer_length,
        config.n_best,
        config.null_threshold,
        config.skip_bad_answers,
    )

    def data() -> TaskData:
        train, skipped = read_questions(task, config.data, "train")
        dev = task.read(config.eval_data, "dev", labelled=True)
        test = (
            {}
            if config.test_data is None or config.run.no_test
            else {"test": task.read(config.test_data, "test", labelled=False)}
        )
        notes = [f"{counted(skipped, 'question')} skipped whose answer is not in the context"] if skipped else []
        return TaskData(train, {"dev": dev}, test, notes)

    return finetune(config, config.run, task, data)

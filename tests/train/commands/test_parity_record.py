"""`bestiary parity --record`: the largest errors of each family, and what was recorded of others stays."""

import json
from pathlib import Path

from bestiary.models.checkpoints.parity import Report
from bestiary.train.commands.parity import record


def report(folder: str, model: str, **errors: object) -> Report:
    return Report(folder, model=model, saved_differently=[], **errors)  # pyright: ignore[reportArgumentType]


def test_the_largest_errors_are_kept_by_family(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    path.write_text(json.dumps({"vit": {"outputs": 1.0}}))
    first = report("a/bert_span", "BertForQuestionAnswering", outputs={"x": 1e-6, "y": 3e-6}, loss=1e-7, gradient=1e-5)
    second = report("a/bert_choice", "BertForMultipleChoice", outputs={"x": 2e-6}, loss=2e-7, trajectory=1e-6)
    unread = Report("a/broken", error="no config.json")
    record(path, [first, second, unread])
    stored = json.loads(path.read_text())
    assert stored["vit"] == {"outputs": 1.0}
    bert = stored["bert"]
    assert (bert["outputs"], bert["loss"], bert["gradients"], bert["training"]) == (3e-6, 2e-7, 1e-5, 1e-6)
    assert bert["fixtures"] == ["bert_choice", "bert_span"]
    assert bert["same_bytes"] is True
    assert set(stored) == {"bert", "vit"}

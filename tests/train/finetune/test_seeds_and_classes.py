"""Several seeds make one table, and the class that f1 is of can be chosen."""

import dataclasses
import json

import numpy as np
import pytest

from bestiary.data.batches import pack_features
from bestiary.data.tasks.tables import TextExample
from bestiary.train.errors import RunError
from bestiary.train.finetune.commands.glue import GlueConfig
from bestiary.train.finetune.config import FinetuneConfig
from bestiary.train.finetune.seeds import for_each_seed
from bestiary.train.finetune.tasks.table import TableTask, table_task
from bestiary.train.finetune.tasks.task import Collected


def test_the_class_that_f1_is_of_can_be_chosen(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,no\nb,yes\n")

    def task(positive: str | None, labels: tuple[str, ...] = ()) -> TableTask:
        options = dict(text="text", text_pair=None, label="label", regression=False, max_length=8)
        return table_task(path, labels=labels, positive=positive, **options)

    examples = [TextExample("", None, label, "", "") for label in (0, 0, 0, 1)]
    collected = Collected(segment={"logits": np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]})
    for positive, f1 in ((None, 2 / 3), ("yes", 2 / 3), ("no", 0.8)):
        asked = task(positive)
        assert asked.metrics(collected, pack_features([], []), examples)["f1"] == pytest.approx(f1)
        assert asked.explained == {
            "score": "the mean of accuracy and f1", "f1": f"of the class {positive or 'yes'!r}"
        }  # fmt: skip
    with pytest.raises(RunError, match="--positive 'maybe': expected one of two labels; the labels are 'no', 'yes'"):
        task("maybe")
    with pytest.raises(RunError, match="each label once"):
        task(None, ("no", "yes", "no"))


def test_one_run_a_seed_makes_one_table(tmp_path):
    asked = GlueConfig(
        task="sst2", data="glue", run=FinetuneConfig(model=tmp_path, out=tmp_path / "runs", seeds=(3, 5))
    )  # fmt: skip
    scores = {3: 0.5, 5: 0.75}

    def run_one(config: GlueConfig) -> int:
        run = config.run
        assert (run.seeds, run.out) == ((), tmp_path / "runs" / f"seed-{run.seed}")
        run.out.mkdir(parents=True)
        results = {"task": "sst2", "metrics": {"dev": {"accuracy": scores[run.seed]}}}
        (run.out / "results.json").write_text(json.dumps(results))
        return 0

    assert for_each_seed(asked, run_one) == 0
    found = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert found["metrics"]["dev"]["accuracy"] == {
        "mean": 0.625, "std": pytest.approx(0.125 * 2**0.5), "each": [0.5, 0.75]
    }  # fmt: skip
    assert "| dev | accuracy | 0.6250 | 0.1768 | 0.5000 0.7500 |" in (tmp_path / "runs" / "table.md").read_text()
    for seeds in ((3, 3), (0, -1)):
        with pytest.raises(RunError, match=r"--seeds .*: expected numbers from 0 to 4294967295, each once"):
            dataclasses.replace(asked.run, seeds=seeds)

"""Fine-tune on GLUE tasks as text (Raffel et al. 2020, 2.4), with the prefixes and answers of data/tasks/glue_text.py.

    bestiary finetune glue --as-text --data glue --tasks mrpc rte --model FOLDER --out runs/as-text

Each run is one of text to text in its own folder, `OUT/TASK/seed-N`. To resume, give the same command again.
"""

import dataclasses
from typing import Any

from ...data.json_files import read_object
from ...data.tasks.glue import GLUE, read_glue
from ...data.tasks.glue_text import as_pairs
from ..finetune.tasks.glue_table import trainable, write_table
from ..run import start_run
from ..translate.config import FREE
from ..translate.data import Texts, fingerprint
from ..translate.train import translate
from .config import GlueTextConfig
from .metrics import GlueScoring


def planned(config: GlueTextConfig) -> list[GlueTextConfig]:
    """Return the runs, each of one task and seed, in order.

    Raises:
        RunError: there is no task to train on.
    """
    return [
        dataclasses.replace(config, tasks=(task,), seed=seed, seeds=(), out=config.out / task / f"seed-{seed}")
        for task in config.tasks or trainable(config.data)
        for seed in config.seeds or (config.seed,)
    ]


def texts_of(name: str, data: str) -> Texts:
    """Return the pairs of a GLUE task: its training set, and its (first) development set."""
    task = GLUE[name]
    train = as_pairs(name, read_glue(task, data, "train", labelled=True).examples)
    dev = as_pairs(name, read_glue(task, data, task.evaluation[0], labelled=True).examples)
    return Texts(lambda: train, dev, fingerprint(train), f"{task.folder} as text", list)


def main(config: GlueTextConfig) -> int:
    """Run `bestiary finetune glue --as-text`; return the exit status."""
    runs = planned(config)
    texts = {task: texts_of(task, str(config.data)) for task in dict.fromkeys(run.tasks[0] for run in runs)}
    found: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        (task,) = one.tasks
        print(f"--- {task}, seed {one.seed}")
        with start_run(one, FREE) as run:
            status = translate(run, one, "text2text", GlueScoring(task), lambda task=task: texts[task])
        results = one.out / "results.json"
        if status or not results.is_file():
            return status
        stored = read_object(results)
        found.setdefault(task, []).append({**stored, "metrics": {GLUE[task].evaluation[0]: stored["held_out"]}})
    write_table(config.out, found, len(config.seeds) or 1)
    return 0

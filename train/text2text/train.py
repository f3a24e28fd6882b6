"""Train a text-to-text model: the loop, batches, decoding and export of translation, with other texts and figures.

bestiary text2text train --train pairs.tsv --model FOLDER --prefix "summarize: " --metric rouge --out runs/summaries
bestiary text2text train --glue mrpc --data glue/MRPC --model FOLDER --out runs/mrpc
"""

from functools import partial

from ...data.tasks.glue import GLUE, read_glue
from ...data.tasks.glue_text import as_pairs
from ..run import start_run
from ..translate.config import FREE
from ..translate.data import Texts, fingerprint
from ..translate.train import translate
from .config import Text2TextConfig
from .metrics import scoring


def glue_texts(name: str, data: str) -> Texts:
    """Return the pairs of a GLUE task: its training set, and its (first) development set."""
    task = GLUE[name]
    train = as_pairs(name, read_glue(task, data, "train", labelled=True).examples)
    dev = as_pairs(name, read_glue(task, data, task.evaluation[0], labelled=True).examples)
    return Texts(lambda: train, dev, fingerprint(train), f"{task.folder} as text", list)


def main(config: Text2TextConfig) -> int:
    """Run `bestiary text2text train`; return the exit status."""
    read = None
    if config.glue is not None and config.data is not None:
        read = partial(glue_texts, config.glue, config.data)
    with start_run(config, FREE) as run:
        return translate(run, config, "text2text", scoring(config.metric, config.glue), read)

"""Train a text-to-text model: the loop, batches, decoding and export of translation, with other texts and figures.

bestiary text2text train --train pairs.tsv --model FOLDER --prefix "summarize: " --metric rouge --out runs/summaries
"""

from ..run import start_run
from ..translate.config import FREE
from ..translate.train import translate
from .config import Text2TextConfig
from .metrics import scoring


def main(config: Text2TextConfig) -> int:
    """Run `bestiary text2text train`; return the exit status."""
    with start_run(config, FREE) as run:
        return translate(run, config, "text2text", scoring(config.metric))

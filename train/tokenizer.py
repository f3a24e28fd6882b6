"""Train a tokenizer on a corpus.

bestiary tokenizer train --kind wordpiece --vocab-size 16384 --corpus books/ --out tokenizers/books
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..data import Corpus, train_wordpiece
from .errors import RunError
from .progress import Progress


@dataclass(frozen=True)
class TokenizerConfig:
    """Train a tokenizer and write it in the released format."""

    corpus: tuple[str, ...]
    """Files or folders of text, Markdown, WikiText or JSON lines (.gz and .zst too), prepared tensorflow-datasets
    folders, or tfds:NAME."""
    out: Path
    """Folder to write: tokenizer.json, vocab.txt, tokenizer_config.json, special_tokens_map.json."""
    kind: Literal["wordpiece"] = "wordpiece"
    """wordpiece: BERT's."""
    vocab_size: int = 16384
    """Pieces, the special tokens counted in."""
    lowercase: bool = True
    """Lower-case the text and strip accents first, as the uncased models do."""
    encoding: str = "utf-8"
    """Character encoding of the corpus."""
    text_field: str = "text"
    """Field of JSON lines, or feature of a tensorflow-datasets folder, that holds the text."""
    blank_line: Literal["paragraph", "document"] = "paragraph"
    """What blank lines separate in plain text: paragraphs, or documents with a sentence a line (BERT's own format)."""


def main(config: TokenizerConfig) -> int:
    """`bestiary tokenizer train`; returns the exit status."""
    if config.out.exists() and any(config.out.iterdir()):
        raise RunError(f"{config.out} exists and is not empty. Choose another --out.")
    progress = Progress()
    options: Any = dict(encoding=config.encoding, text_field=config.text_field, blank_line=config.blank_line)
    corpus = Corpus(config.corpus, **options)
    tokenizer = train_wordpiece(
        corpus,
        vocab_size=config.vocab_size,
        lowercase=config.lowercase,
        progress=lambda report: progress.update(str(report)),
    )
    tokenizer.save(config.out)
    progress.line(f"{config.out}: {tokenizer.vocab_size:,} pieces from {corpus.counts.documents:,} documents")
    return 0

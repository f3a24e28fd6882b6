"""Train a tokenizer on a corpus.

bestiary tokenizer train --kind wordpiece --vocab-size 16384 --corpus books/ --out tokenizers/books
bestiary tokenizer train --kind byte-bpe --corpus books/ --out tokenizers/books-bytes
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...data import Corpus, train_tokenizer
from ...data.files import check_output_folder
from ...data.progress import counted
from ...data.tokenizers.kinds import FAMILIES, TextKind
from ..errors import RunError
from ..progress import Progress


@dataclass(frozen=True)
class TokenizerConfig:
    """Train a tokenizer, and save it in the released format."""

    corpus: tuple[str, ...]
    """Files or folders of text, Markdown, WikiText or JSON lines (.gz and .zst too), prepared tensorflow-datasets
    folders, or tfds:NAME."""
    out: Path
    """Folder to write: tokenizer.json, the kind's own files of the vocabulary, tokenizer_config.json and
    special_tokens_map.json."""
    kind: TextKind = "wordpiece"
    """wordpiece: BERT's. byte-bpe: RoBERTa's and GPT-2's byte-level BPE. unigram: ALBERT's and T5's SentencePiece."""
    family: Literal["bert", "roberta", "gpt2", "albert", "t5"] | None = None
    """Model family, which determines special tokens and normalisation. None: bert, roberta or albert, by the kind."""
    vocab_size: int = 16384
    """Vocabulary size, including special tokens (but not T5's 100 sentinels)."""
    lowercase: bool = True
    """Lower-case the text and strip accents first, as the uncased models do; byte-bpe and T5 keep the text as it is."""
    encoding: str = "utf-8"
    """Character encoding of the corpus."""
    text_field: str = "text"
    """Field of JSON lines, or feature of a tensorflow-datasets folder, that holds the text."""
    blank_line: Literal["paragraph", "document"] = "paragraph"
    """What blank lines separate in plain text: paragraphs, or documents with one sentence per line (BERT's own
    format)."""

    def __post_init__(self) -> None:
        families = FAMILIES[self.kind]
        if self.family not in (None, *families):
            known = " or ".join(families)
            raise RunError(f"--family {self.family} does not have --kind {self.kind}; expected {known}.")


def main(config: TokenizerConfig) -> int:
    """Run `bestiary tokenizer train`; return the exit status."""
    check_output_folder(config.out, new=True)
    progress = Progress()
    options: Any = dict(encoding=config.encoding, text_field=config.text_field, blank_line=config.blank_line)
    corpus = Corpus(config.corpus, **options)
    tokenizer = train_tokenizer(
        config.kind,
        corpus,
        vocab_size=config.vocab_size,
        family=config.family,
        lowercase=config.lowercase,
        progress=lambda report: progress.update(str(report)),
    )
    tokenizer.save(config.out)
    progress.line(f"{config.out}: {tokenizer.vocab_size:,} tokens from {counted(corpus.counts.documents, 'document')}")
    return 0

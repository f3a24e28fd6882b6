"""Train a tokenizer on a corpus.

bestiary tokenizer train --kind wordpiece --vocab-size 16384 --corpus books/ --out tokenizers/books
bestiary tokenizer train --kind byte-bpe --corpus books/ --out tokenizers/books-bytes
bestiary tokenizer train --kind words --vocab-size 33278 --verbatim --corpus wiki.train.tokens --out tokenizers/words
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    """wordpiece: BERT's. byte-bpe: RoBERTa's and GPT-2's byte-level BPE. unigram: ALBERT's and T5's SentencePiece.
    words: what stands between white space, by frequency. characters: Unicode code points."""
    family: Literal["bert", "roberta", "gpt2", "albert", "t5", "transfo-xl"] | None = None
    """Model family, which determines special tokens and normalisation. None: bert, roberta, albert or
    transfo-xl, by the kind."""
    vocab_size: int = 16384
    """Vocabulary size, including special tokens (but not T5's 100 sentinels)."""
    lowercase: bool = True
    """Lower-case the text and strip accents first, as the uncased models do; only wordpiece and ALBERT's unigram."""
    encoding: str = "utf-8"
    """Character encoding of the corpus."""
    text_field: str = "text"
    """Field of JSON lines, or feature of a tensorflow-datasets folder, that holds the text."""
    blank_line: Literal["paragraph", "document"] = "paragraph"
    """What blank lines separate in plain text: paragraphs, or documents with one sentence per line (BERT's own
    format)."""
    verbatim: bool = False
    """Keep markup, line ends and white space of the text as they are."""

    def __post_init__(self) -> None:
        families = FAMILIES[self.kind]
        if self.family not in (None, *families):
            known = " or ".join(families)
            raise RunError(f"--family {self.family} does not have --kind {self.kind}; expected {known}.")


def main(config: TokenizerConfig) -> int:
    """Run `bestiary tokenizer train`; return the exit status."""
    check_output_folder(config.out, new=True)
    progress = Progress()
    reading = (config.encoding, config.text_field, config.blank_line)
    corpus = Corpus(config.corpus, *reading, verbatim=config.verbatim)
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

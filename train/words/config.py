"""Options of `bestiary words`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import MOST_SEED, RunError, check_setting


@dataclass(frozen=True)
class WordsConfig:
    """Train word vectors on a corpus by word2vec, and write them to a file that gensim reads."""

    corpus: tuple[str, ...]
    """Files or folders of text, Markdown, WikiText or JSON lines (.gz and .zst too), prepared tensorflow-datasets
    folders, or tfds:NAME. A paragraph is a sentence: windows stay within it."""
    out: Path
    """File to write: binary if its name ends in .bin, else text."""
    kind: Literal["skipgram", "cbow"] = "skipgram"
    """Predict a word from each word around it, or from their mean."""
    width: int = 100
    """Size of the vectors."""
    window: int = 5
    """Maximum number of words on each side; each word draws its own from 1 to this."""
    negatives: int = 5
    """Number of words drawn against each prediction."""
    min_count: int = 5
    """Leave out words that occur less often."""
    sample: float = 1e-3
    """Frequency above which occurrences of a word are left out at random, the more the more frequent it is. 0: none."""
    epochs: int = 5
    """Number of passes over the corpus."""
    learning_rate: float | None = None
    """Initial learning rate, which falls linearly to nothing. None: 0.025, or 0.05 for cbow."""
    cbow_gradient: Literal["sum", "mean"] = "sum"
    """Gradient of each word in cbow's window: that of their mean (sum; word2vec.c's and gensim's), or its share of it
    (mean; the true gradient, for a higher learning rate)."""
    batch_words: int = 256
    """Number of words whose updates are computed together. Large batches are less accurate for frequent words."""
    lowercase: bool = True
    """Lower-case the text."""
    split: Literal["letters", "spaces"] = "letters"
    """What words are: runs of letters, with apostrophes between letters; or whatever spaces separate."""
    encoding: str = "utf-8"
    """Character encoding of the corpus."""
    text_field: str = "text"
    """Field of JSON lines, or feature of a tensorflow-datasets folder, that holds the text."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        check_setting(self, "seed", least=0, most=MOST_SEED)
        for name in ("width", "window", "negatives", "min_count", "epochs", "batch_words"):
            if getattr(self, name) < 1:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1.")
        if self.sample < 0:
            raise RunError(f"--sample is {self.sample}; it must be at least 0.")
        if self.rate <= 0:
            raise RunError(f"--learning-rate is {self.rate}; it must be above 0.")
        if self.cbow_gradient == "mean" and self.kind != "cbow":
            raise RunError("--cbow-gradient is for --kind cbow.")

    @property
    def rate(self) -> float:
        """Initial learning rate."""
        default = 0.05 if self.kind == "cbow" else 0.025
        return default if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True)
class NearestConfig:
    """List the words whose vectors are nearest to a word's, by cosine; or draw them."""

    vectors: Annotated[Path, tyro.conf.Positional]
    """File of word vectors, text or binary."""
    words: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The words."""
    count: int = 10
    """Number of neighbours of each."""
    plot: Path | None = None
    """PNG to draw: the words and their neighbours, on the two principal components of their vectors."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if not self.words:
            raise RunError("Name at least one word.")
        if self.count < 1:
            raise RunError(f"--count is {self.count}; it must be at least 1.")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate word vectors by similarities that people gave, and by analogies."""

    vectors: Annotated[Path, tyro.conf.Positional]
    """File of word vectors, text or binary."""
    similarities: tuple[Path, ...] = ()
    """Files such as WordSim-353 and SimLex-999: two words and a score a line, separated by tabs or commas. Spearman's
    correlation with the cosines is printed."""
    analogies: Path | None = None
    """File such as questions-words.txt: four words a line. The fraction is printed whose fourth word is the nearest to
    second - first + third."""
    restrict: int = 30_000
    """Number of the most frequent words that analogies are about; questions with others are left out and counted."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if not self.similarities and self.analogies is None:
            raise RunError("Nothing to evaluate by: give --similarities FILE ..., or --analogies FILE.")
        if self.restrict < 4:
            raise RunError(f"--restrict is {self.restrict}; it must be at least 4.")

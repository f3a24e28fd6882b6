"""Settings of `bestiary embed` and `bestiary probe`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...data.tasks.glue import GlueName
from ...models.checkpoints.config import require_folder
from ..errors import MOST_SEED, RunError, check_setting, check_text


def _yes_or_no(words: list[str]) -> bool:
    return not words or words[0] == "yes"


YES_OR_NO = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[yes|no]",
    instance_from_str=_yes_or_no,
    is_instance=lambda value: value is None or isinstance(value, bool),
    str_from_instance=lambda value: ["as the folder says" if value is None else "yes" if value else "no"],
    choices=("yes", "no"),
)


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Options of feature extraction."""

    model: Path
    """Checkpoint folder of an encoder, or a sentence-transformers folder, whose pooling, normalisation and maximum
    length are then the defaults."""
    layers: str = "-1"
    """Layers to take hidden states from, as numbers separated by commas: 0 is the embeddings, 1 the first layer, -1 the
    last; `all` for every layer."""
    combine: Literal["sum", "mean", "concat"] = "mean"
    """How to combine several layers."""
    pooling: str | None = None
    """How to make one vector per text: cls (the first token), mean, max or mean_sqrt_len (over the tokens), or several
    of them, separated by commas, concatenated; token: no pooling. None: what the folder says, else mean."""
    normalize: Annotated[bool | None, YES_OR_NO] = None
    """Scale each vector to length 1. None: what the folder says; vectors of tokens are not scaled."""
    max_length: int | None = None
    """Maximum length of a text, in tokens, special tokens included; longer texts are truncated. None: what the folder
    says, else the model's maximum."""
    prompt: str | None = None
    """Text to put before every text. None: what the folder says."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the encoder's computation."""

    def __post_init__(self) -> None:
        require_folder(self.model)
        check_text("--prompt", () if self.prompt is None else (self.prompt,))


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Draw what the tokens of texts attend to in a pretrained encoder, or store the weights.

    The texts are the arguments, or the lines of standard input. A page shows the first 20 of them. Of each text, the
    first 512 tokens are read, or as many as the model has positions.
    """

    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts. None: the lines of standard input."""
    model: Path
    """Checkpoint folder of an encoder, of a model that was fine-tuned from one, or of sentence-transformers."""
    out: Path
    """File to write: .html, a page with a table for each layer and head, or .npz, with arrays weights.I [layers, heads,
    tokens, tokens] float32 and tokens.I of text I, from 0."""
    layers: tuple[int, ...] = ()
    """Layers, from 1. None: the last one on a page, all of them in an .npz file."""
    heads: tuple[int, ...] = ()
    """Heads, from 1. None: all; a page shows their mean too."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the encoder's computation."""

    def __post_init__(self) -> None:
        require_folder(self.model)
        check_text("a text", self.texts)
        if self.out.suffix not in (".html", ".npz"):
            raise RunError(f"--out {self.out}: expected a name that ends in .html or .npz.")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(FeatureConfig):
    """Turn texts, one per line, into vectors: a float32 array [lines, width] in NumPy's format.

    With --pooling token, an .npz file: vectors [tokens, width], starts [lines + 1] (where each line's tokens begin) and
    input_ids [tokens]. The text is streamed: files may be larger than memory.
    """

    input: Path | None = None
    """Text file, one text per line (.gz and .zst too). None: standard input."""
    out: Path | None = None
    """File to write, .npy or .npz. None: standard output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None and self.out.suffix not in (".npy", ".npz"):
            raise RunError(f"--out {self.out}: expected a name that ends in .npy or .npz.")
        if self.out is not None and self.out.suffix == ".npy" and self.pooling == "token":
            raise RunError(f"--out {self.out}: vectors of tokens need an .npz file, which says where each line begins.")
        if self.out is None and sys.stdout.isatty():
            raise RunError("The output is binary: give --out FILE, or redirect the output to a file.")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Train logistic or ridge regression on an encoder's features for a task, and report the official metrics."""

    task: GlueName | None = None
    """GLUE task. None: --data is a table."""
    data: str
    """With --task: the task's folder, as for `bestiary finetune`. Otherwise the training examples: .tsv, .csv or .jsonl
    with named columns."""
    dev: Path | None = None
    """Table to evaluate on. None: a fraction of the training examples is held out."""
    dev_fraction: float = 0.1
    """Fraction of the table to hold out if there is no --dev."""
    text: str = "sentence"
    """Column of the text, or of the first text of a pair."""
    text_pair: str | None = None
    """Column of the second text of a pair."""
    label: str = "label"
    """Column of the label."""
    labels: tuple[str, ...] = ()
    """The labels. None: all labels in the training file."""
    regression: bool = False
    """The labels are numbers to predict."""
    pairs: Literal["apart", "together"] = "apart"
    """How to encode a pair of texts. apart: |u - v| and u · v of their vectors u and v (Conneau and Kiela 2018);
    together: the vector of both, encoded as one input."""
    mix: bool = False
    """Learn a weighted sum of --layers (default: all), with softmax weights and a scale (Peters et al. 2018), instead
    of --combine."""
    strength: float | None = None
    """Inverse regularisation strength. None: chosen by cross-validation on the training examples."""
    train_examples: int = 0
    """Number of training examples to sample; 0: all."""
    seed: int = 0
    """Seed of the sampling and of held-out examples."""
    features: Annotated[FeatureConfig, tyro.conf.arg(name="")]
    cache: Path | None = None
    """Folder to cache features in, which later probes reuse. None: bestiary/ in the user's cache folder."""
    out: Path = Path("runs/probe")
    """Folder for results.json, head.npz and predictions/."""

    def __post_init__(self) -> None:
        check_setting(self, "seed", least=0, most=MOST_SEED)
        if self.strength is not None and not self.strength > 0:
            raise RunError(f"--strength is {self.strength}; it must be above 0.")
        if self.features.pooling == "token":
            raise RunError("--pooling token: a probe needs one vector per text; choose cls, mean or max.")
        if self.regression and self.labels:
            raise RunError("--regression predicts numbers: leave --labels out.")
        if self.train_examples < 0:
            raise RunError(f"--train-examples is {self.train_examples}; it must not be negative.")

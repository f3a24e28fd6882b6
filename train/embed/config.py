"""The settings of `bestiary embed` and `bestiary probe`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...data.tasks.glue import GlueName
from ..errors import RunError


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
    """Which features."""

    model: Path
    """Checkpoint folder of an encoder, or a sentence-transformers folder, whose pooling, normalisation and length are
    then the defaults."""
    layers: str = "-1"
    """Layers whose hidden states are taken, by numbers with commas: 0 is the embeddings, 1 the first layer, -1 the
    last; `all` for every one."""
    combine: Literal["sum", "mean", "concat"] = "mean"
    """How several layers become one."""
    pooling: str | None = None
    """What a text's vector is made of: cls (its first token), mean, max or mean_sqrt_len (over its tokens), several
    with commas side by side; or token: no pooling. None: what the folder says, else mean."""
    normalize: Annotated[bool | None, YES_OR_NO] = None
    """Divide each vector by its length. Default: what the folder says; tokens' vectors stay as they are."""
    max_length: int | None = None
    """Tokens of a text, special ones included; what is longer is cut. None: what the folder says, else what the model
    takes."""
    prompt: str | None = None
    """Put before every text. None: what the folder says."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the encoder is computed in."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(FeatureConfig):
    """Turn texts, one a line, into vectors: one a line, in the lines' order, as float32 in NumPy's format.

    With --pooling token, an .npz file: vectors [tokens, width], starts [lines + 1] (where each line's tokens begin) and
    input_ids [tokens]. The text is streamed: files larger than the memory are fine.
    """

    input: Path | None = None
    """Text file (.gz and .zst too). None: standard input."""
    out: Path | None = None
    """File to write, .npy or .npz. None: standard output."""

    def __post_init__(self) -> None:
        if self.out is not None and self.out.suffix not in (".npy", ".npz"):
            raise RunError(f"--out {self.out}: expected a name that ends in .npy or .npz.")
        if self.out is not None and self.out.suffix == ".npy" and self.pooling == "token":
            raise RunError(f"--out {self.out}: vectors of tokens need an .npz file, which says where each line begins.")
        if self.out is None and sys.stdout.isatty():
            raise RunError("Vectors are no text: give --out FILE, or send the output into a file.")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Train logistic or ridge regression on an encoder's features of a task, and give its official metrics."""

    task: GlueName | None = None
    """A task of GLUE. None: --data is a table."""
    data: str
    """With --task: the task's folder, as `bestiary finetune` takes it. Else training examples: .tsv, .csv or .jsonl
    with named columns."""
    dev: Path | None = None
    """A table to evaluate on. None: a share of the training examples is held out."""
    dev_fraction: float = 0.1
    """Share that is held out of a table where there is no --dev."""
    text: str = "sentence"
    """Column of the text, or of a pair's first text."""
    text_pair: str | None = None
    """Column of a pair's second text."""
    label: str = "label"
    """Column of the label."""
    labels: tuple[str, ...] = ()
    """The label set. None: every label of the training file."""
    regression: bool = False
    """The labels are numbers to be predicted as such."""
    pairs: Literal["apart", "together"] = "apart"
    """Of two texts: apart, |u - v| and u · v of their vectors u and v (Conneau and Kiela 2018); together, the vector of
    both, read by the encoder at once."""
    mix: bool = False
    """Learn how much of each of --layers (all of them, unless they are named) is taken, with a softmax and a factor
    (Peters et al. 2018), instead of --combine."""
    strength: float | None = None
    """Inverse strength of the regularisation. None: chosen by cross-validation on the training examples."""
    train_examples: int = 0
    """Train on so many examples, drawn by the seed; 0: all."""
    seed: int = 0
    """Of what is drawn."""
    features: Annotated[FeatureConfig, tyro.conf.arg(name="")]
    cache: Path | None = None
    """Folder for features, which later probes share. None: bestiary/ in the user's cache folder."""
    out: Path = Path("runs/probe")
    """Folder for results.json, head.npz and predictions/."""

    def __post_init__(self) -> None:
        if self.strength is not None and not self.strength > 0:
            raise RunError(f"--strength is {self.strength}; it must be above 0.")
        if self.features.pooling == "token":
            raise RunError("--pooling token: a probe needs one vector a text; choose cls, mean or max.")
        if self.regression and self.labels:
            raise RunError("--regression predicts numbers: leave --labels out.")
        if self.train_examples < 0:
            raise RunError(f"--train-examples is {self.train_examples}; it must not be negative.")

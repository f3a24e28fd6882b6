"""The options of `bestiary translate train`, and their defaults for each size of model."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro

from ..config import LoopConfig, OptimConfig, SpreadConfig
from ..errors import RunError
from ..generate.config import DecodeConfig

Subwords = Literal["unigram", "bpe", "word-bpe"]
TooLong = Literal["split", "refuse"]

DECODE = DecodeConfig(beam=5, max_length=256)
"""How the commands decode, unless their flags say otherwise."""


@dataclass(frozen=True)
class TranslateConfig:
    """Train a translator on parallel text.

    With no arguments: English-German dates, durations, amounts and quantities, minutes on two CPU cores. With text of
    your own the defaults are those of the --preset's paper; --source FILE --preset NAME --help shows them.
    """

    source: Path | None = None
    """File of source sentences, one a line (.gz and .zst too)."""
    target: Path | None = None
    """File of their translations, with as many lines."""
    pairs: str | None = None
    """Instead of both: a .tsv or .jsonl file, a prepared tensorflow-datasets folder such as wmt14_translate's, or
    tfds:NAME."""
    fields: tuple[str, str] | None = None
    """Where --pairs has the two sides: column numbers of a .tsv, from 1, or names of fields or features. None: the
    first two columns, or what --languages names."""
    languages: tuple[str, str] = ("en", "de")
    """Source and target (ISO 639-1)."""
    dev: tuple[str, ...] = ()
    """Held-out text: two files, or one as for --pairs, of a data set its validation split. None: --dev-pairs of the
    training text are held out."""
    dev_pairs: int = 1000
    """About how many pairs are held out where --dev is not given; pairs with the same source stay together."""
    encoding: str = "utf-8"
    """Character encoding of the text."""

    subwords: Subwords = "unigram"
    """Pieces: SentencePiece's unigram or bpe, or BPE within words (word-bpe)."""
    vocab_size: int = 8000
    """Pieces, four special ones included; of each side where they are separate."""
    joint: bool = True
    """One vocabulary for both sides."""
    split_digits: bool | None = None
    """Make every digit a piece of its own. None: where the pieces are SentencePiece's."""
    lowercase: bool = False
    """Lower-case both sides."""
    moses: bool = False
    """Normalise punctuation and split words as the Moses scripts do; translations are joined again."""
    tokenizer: Path | None = None
    """Folder of a tokenizer that was saved with a translator, or a SentencePiece model file for both sides. None: one
    is trained on the text."""
    sample_subwords: float = 0.0
    """Cut words up anew in every epoch: alpha of unigram pieces (Kudo 2018), or the share of BPE merges that is dropped
    (Provilkov et al. 2020)."""
    cache: Path | None = None
    """Folder for tokenised text, which later runs share. None: bestiary/ in the user's cache folder."""

    preset: str = "transformer-tiny"
    """Size: transformer-tiny (4+4 layers, 128 wide), -base or -big."""
    tying: Literal["all", "decoder", "none"] | None = None
    """Which of the source's, the target's and the output's embeddings are one. None: all where the vocabulary is joint,
    else decoder."""
    pre_norm: bool = False
    """Normalise what goes into a sub-layer instead of what comes out (not the paper's)."""
    dropout: float = 0.0
    """Share of embeddings and of sub-layers' outputs that is dropped."""
    attention_dropout: float = 0.0
    """Share of attention probabilities that is dropped."""
    activation_dropout: float = 0.0
    """Share of the feed-forward layers' inner values that is dropped."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in; parameters are float32 always. auto: bfloat16 on an accelerator, float32 on a CPU."""
    scan_layers: bool = True
    """Compile one layer and loop over it; off writes all layers out: same numbers, longer compilation."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more work."""
    attention: str | None = None
    """Backend of the attention kernel; None takes the fastest that supports the call."""

    row_tokens: int = 64
    """Tokens of a row, on each side; several pairs share one. A pair that is longer is left out and counted."""
    too_long: Literal["drop", "refuse"] = "drop"
    """What happens to pairs that are longer than a row."""
    batch_tokens: int = 1024
    """Target tokens of an update, padding included: rows times --row-tokens."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory; the numbers stay the same."""
    steps: int = 900
    """Updates, at most."""
    label_smoothing: float = 0.1
    """Share of the probability that is spread over all words."""
    r_drop: float = 0.0
    """Weight of the divergence between two passes with dropout of their own (R-Drop, Liang et al. 2021); 0: one
    pass."""
    seed: int = 0
    """Of everything random."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimConfig(
            learning_rate=3e-3,
            warmup=0.2,
            decay="inverse_sqrt",
            cooldown=0.3,
            weight_decay=0.0,
            beta2=0.98,
            epsilon=1e-9,
            clip_norm=0.0,
        )
    )
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: LoopConfig(evaluate_every=450, checkpoint_every=450)
    )
    dev_beam: int = 1
    """Beam that the dev text is translated with at each evaluation; 1 is greedy, and fast."""
    final_beam: int = 5
    """Beam that the dev text is translated with at the end."""
    patience: int = 0
    """End after so many evaluations in turn, those of the warm-up apart, with a dev BLEU no better than the best; 0: at
    the last step only."""
    average: int = 0
    """Leave behind the mean of the weights at so many evaluations; 0: no mean."""
    average_of: Literal["last", "best"] = "last"
    """Which evaluations --average takes: the last ones, or those with the best dev BLEU."""

    out: Path = Path("runs/translate")
    """Run folder. A run that was stopped goes on when the same command is given again."""
    resume_from: Path | None = None
    """Run folder, or one step of its checkpoints, that a new run goes on from, with optimiser and data position."""
    init_from: Path | None = None
    """Checkpoint folder (config.json, model.safetensors) whose weights a new run starts from."""
    spread: Annotated[SpreadConfig, tyro.conf.arg(name="")] = field(default_factory=SpreadConfig)

    def __post_init__(self) -> None:
        if (self.source is None) != (self.target is None):
            raise RunError("--source and --target come together: give both files.")
        if self.source is not None and self.pairs is not None:
            raise RunError("--pairs holds both sides: leave --source and --target out.")
        if self.dev and self.source is None and self.pairs is None:
            raise RunError("--dev is for text of your own: give --source and --target, or --pairs, too.")
        if self.preset not in SETTINGS:
            raise RunError(f"no preset {self.preset!r} of the Transformer; known: {', '.join(SETTINGS)}")
        if len(self.dev) > 2:
            raise RunError(f"--dev names {len(self.dev)} files; expected two, or one that holds both sides.")
        for name in ("dropout", "attention_dropout", "activation_dropout", "label_smoothing", "sample_subwords"):
            if not 0 <= getattr(self, name) < 1:
                raise RunError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 0 and below 1."
                )
        least = {"row_tokens": 8, "accumulate": 1, "steps": 1, "dev_beam": 1, "final_beam": 1, "dev_pairs": 1}
        for name, value in {**least, "patience": 0, "average": 0, "r_drop": 0, "seed": 0}.items():
            if getattr(self, name) < value:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {value}.")
        if self.batch_tokens % self.row_tokens:
            raise RunError(f"--batch-tokens {self.batch_tokens} is not a multiple of --row-tokens {self.row_tokens}.")
        if self.r_drop and not (self.dropout or self.attention_dropout or self.activation_dropout):
            raise RunError("--r-drop compares two passes that drop different values: give a --dropout, say 0.1.")
        if self.average and self.optim.ema:
            raise RunError("--average and --ema are two ways to a mean of the weights: with --ema give --average 0.")
        if self.tying == "all" and not self.joint and self.tokenizer is None:
            raise RunError("--tying all shares one table: it takes a joint vocabulary. Take --tying decoder.")

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Self:
        """The defaults of a command line: those of the embedded phrases, or of the size where text is given."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name in ("source", "pairs", "preset"):
            parser.add_argument(f"--{name}")
        given, _ = parser.parse_known_args(arguments)
        phrases = cls()
        preset = given.preset or phrases.preset
        if (given.source is None and given.pairs is None) or preset not in SETTINGS:
            return phrases
        setting = dict(SETTINGS[preset])
        for part in ("optim", "loop"):
            setting[part] = dataclasses.replace(getattr(phrases, part), **setting[part])
        return dataclasses.replace(phrases, **setting)

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.batch_tokens // self.row_tokens


# How text of one's own is trained on: the settings of the papers (Vaswani et al. 2017, 5 and 6.1; for Multi30k Wu et
# al. 2021). The own defaults of the dataclass are for the embedded phrases.
VASWANI: Mapping[str, Any] = {
    "vocab_size": 37_000,
    "row_tokens": 256,
    "batch_tokens": 25_600,
    "loop": {"evaluate_every": 1000, "checkpoint_every": 1000},
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "transformer-tiny": {
        "dropout": 0.3,
        "batch_tokens": 8192,
        "steps": 8000,
        "patience": 10,
        "average": 10,
        "loop": {"log_every": 54, "evaluate_every": 54, "checkpoint_every": 108},  # 54: an epoch of Multi30k
        "optim": {"learning_rate": 5e-3, "warmup": 0.25, "cooldown": 0.0},
    },
    "transformer-base": {
        **VASWANI,
        "dropout": 0.1,
        "steps": 100_000,
        "average": 5,
        "optim": {"learning_rate": 7e-4, "warmup": 4000, "cooldown": 0.0},
    },
    "transformer-big": {
        **VASWANI,
        "dropout": 0.3,
        "steps": 300_000,
        "average": 20,
        "optim": {"learning_rate": 5e-4, "warmup": 4000, "cooldown": 0.0},
    },
}


# Settings that change neither the numbers of a run nor what it leaves behind: they may differ when it is started again.
FREE = frozenset({
    "out", "cache", "remat", "scan_layers", "loop.keep", "loop.checkpoint_every",
    *(f"spread.{f.name}" for f in dataclasses.fields(SpreadConfig)),
})  # fmt: skip

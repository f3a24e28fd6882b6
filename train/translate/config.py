"""Options of `bestiary translate train`, and their defaults for each size of model."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro

from ...data.tokenizers.kinds import PairKind
from ...data.tokenizers.pairs import TextForm
from ..arguments import did_you_mean, flags
from ..config import FREE as EVERY_FREE
from ..config import Attention, LoopConfig, OptimConfig, ParallelConfig, upgrade_optim
from ..errors import MOST_SEED, RunError, check_setting
from ..generate.config import DecodeConfig

TooLong = Literal["split", "cut", "refuse"]

TOKENIZER_FILES = (
    "subwords.json",
    "source.spm",
    "tokenizer.json",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Of which a checkpoint with a tokenizer has one."""

DECODE = DecodeConfig(beam=5, max_length=256)
"""Default decoding options of the commands."""

# --- recipes ----------------------------------------------------------------------------------------------------------
# Settings for your own text, by --preset, if they differ from the defaults of `TranslateConfig` (which are for the
# built-in phrases).

VASWANI: Mapping[str, Any] = {  # Vaswani et al. 2017, 5 and 6.1: batches of 25,000 tokens, a joint vocabulary of 37,000
    "vocab_size": 37_000,
    "row_tokens": 256,
    "batch_tokens": 25_600,
    "loop": {"evaluate_every": 1000, "checkpoint_every": 1000},
}
RECURRENT: Mapping[str, Any] = {
    "dropout": 0.3,
    "row_tokens": 48,
    "batch_tokens": 3072,
    "steps": 1800,
    "average": 3,
    "loop": {"log_every": 50, "evaluate_every": 150, "checkpoint_every": 300},  # 150 updates are an epoch of Multi30k
    "optim": {"learning_rate": 3e-3, "warmup": 0.1, "cooldown": 0.5, "clip_norm": 1.0},
}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    # Multi30k, English-German (29,000 captions), in the setting of Wu et al. 2021:
    #   bestiary translate train --source train.en.gz --target train.de.gz --dev val.en.gz val.de.gz --moses \
    #       --lowercase --subwords word-bpe --vocab-size 10000 --dtype bfloat16 --seed 1 --out runs/multi30k
    # Published: 41.02 tokenised, lower-cased BLEU on test2016. Here: 41.82, in an hour on two CPU cores.
    "transformer-tiny": {
        "dropout": 0.3,
        "batch_tokens": 8192,
        "steps": 8000,
        "patience": 10,
        "average": 10,
        "loop": {"log_every": 54, "evaluate_every": 54, "checkpoint_every": 108},  # 54 updates are an epoch
        "optim": {"learning_rate": 5e-3, "warmup": 0.25, "cooldown": 0.0},
    },
    # WMT 2014, English-German (4.5 million pairs):
    #   bestiary translate train --pairs tfds:wmt14_translate/de-en --languages en de --subwords bpe \
    #       --preset transformer-base --out runs/wmt14
    # Published (Vaswani et al. 2017, table 2): 27.3 BLEU on newstest2014, in 12 hours on 8 P100. Not run here.
    "transformer-base": {
        **VASWANI,
        "dropout": 0.1,
        "steps": 100_000,
        "average": 5,
        "optim": {"learning_rate": 7e-4, "warmup": 4000, "cooldown": 0.0},
    },
    # The same with --preset transformer-big. Published: 28.4 BLEU, in 3.5 days on 8 P100. Not run here.
    "transformer-big": {
        **VASWANI,
        "dropout": 0.3,
        "steps": 300_000,
        "average": 20,
        "optim": {"learning_rate": 5e-4, "warmup": 4000, "cooldown": 0.0},
    },
    # Before the Transformer, for Multi30k: a GRU with Bahdanau's attention, an LSTM with Luong's, and one with none.
    # Not tuned; their BLEU was not measured.
    "gru-attention": RECURRENT,
    "lstm-luong": RECURRENT,
    "lstm-plain": RECURRENT,
    # Bahdanau et al. 2015, A.2 and B.2, WMT 2014, English-French: 80 pairs a step, in 5 days on a Quadro K6000. Those
    # of up to 50 words have some 25 tokens, and share rows: about 2,400 tokens, an estimate. Their optimiser is
    # Adadelta; Adam's learning rate is a choice. Not run here.
    "rnnsearch": {
        "subwords": "word-bpe",
        "vocab_size": 30_000,
        "joint": False,
        "row_tokens": 50,
        "batch_tokens": 2400,
        "steps": 288_000,
        "label_smoothing": 0.0,
        "loop": {"log_every": 100, "evaluate_every": 2000, "checkpoint_every": 2000},
        "optim": {"learning_rate": 5e-4, "warmup": 4000, "cooldown": 0.0, "clip_norm": 1.0},
    },
}

# --- options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TranslateConfig:
    """Train a translator on parallel text.

    Without arguments: English-German dates, durations, amounts and quantities, in minutes on two CPU cores. For your
    own text, the defaults are those of the --preset's paper; --source FILE --preset NAME --help shows them.
    """

    source: Path | None = None
    """File of source sentences, one per line (.gz and .zst too)."""
    target: Path | None = None
    """File of target sentences, one per line: the translations of the lines of --source."""
    pairs: str | None = None
    """Instead of --source and --target: a .tsv or .jsonl file, a prepared tensorflow-datasets folder (such as
    wmt14_translate), or tfds:NAME."""
    fields: tuple[str, str] | None = None
    """Source and target in --pairs: column numbers of a .tsv, from 1, or names of fields or features. None: the first
    two columns, or the fields that --languages names."""
    languages: tuple[str, str] = ("en", "de")
    """Source and target language (ISO 639-1)."""
    dev: tuple[str, ...] = ()
    """Held-out text: two files, or one as for --pairs (the validation split of a data set). None: --dev-pairs pairs of
    the training text are held out."""
    dev_pairs: int = 1000
    """Without --dev: number of pairs to hold out, approximately; pairs with the same source stay together."""
    encoding: str = "utf-8"
    """Character encoding of the text."""

    subwords: PairKind = "unigram"
    """Kind of subwords: SentencePiece's unigram or bpe, or BPE within words (word-bpe)."""
    vocab_size: int = 8000
    """Vocabulary size, including four special tokens; of each side if the vocabularies are separate."""
    joint: bool = True
    """Use one vocabulary for both languages."""
    split_digits: bool | None = None
    """Make every digit a separate token. None: yes for SentencePiece's subwords."""
    lowercase: bool = False
    """Lower-case both languages."""
    moses: bool = False
    """Normalise punctuation and split words as the Moses scripts do; translations are detokenised."""
    tokenizer: Path | None = None
    """Folder of a tokenizer, such as that of a translator or of BART, or a SentencePiece model file for both languages.
    None: that of --init-from, or one trained on the text."""
    sample_subwords: float = 0.0
    """Subword regularisation: split words differently in every epoch. Alpha of unigram sampling (Kudo 2018), or the
    dropout rate of BPE merges (Provilkov et al. 2020)."""
    cache: Path | None = None
    """Folder to cache tokenised text in, which later runs reuse. None: bestiary/ in the user's cache folder."""

    preset: str = "transformer-tiny"
    """Model size: transformer-tiny (4+4 layers, width 128), -base or -big; or a recurrent network: gru-attention
    (Bahdanau's), lstm-luong (with his attention and input feeding) or lstm-plain (without attention)."""
    tying: Literal["all", "decoder", "none"] | None = None
    """Embeddings to share: source, target and output (all), target and output (decoder), or none. None: all if the
    vocabulary is joint, else decoder."""
    pre_norm: bool = False
    """Normalise the input of each sub-layer instead of its output (not the paper's)."""
    dropout: float = 0.0
    """Dropout rate of embeddings and sub-layer outputs."""
    attention_dropout: float = 0.0
    """Dropout rate of attention probabilities."""
    activation_dropout: float = 0.0
    """Dropout rate inside the feed-forward layers."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the computation; parameters are always float32. auto: bfloat16 on an accelerator, float32 on a
    CPU."""
    scan_layers: bool = True
    """Compile one layer and loop over it. Off: unroll the layers, with the same results but longer compilation."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more computation."""
    attention: Attention | None = None
    """Attention backend. None: the fastest that supports the call."""

    row_tokens: int = 64
    """Length of a packed row, in tokens, on either side; several pairs share a row. Longer pairs are dropped and
    counted (see --too-long)."""
    too_long: Literal["drop", "cut", "refuse"] = "drop"
    """Handling of pairs that are longer than a row: leave them out and count them, cut and count them, or refuse
    them."""
    batch_tokens: int = 1024
    """Target tokens per step, padding included: rows per step times --row-tokens."""
    accumulate: int = 1
    """Number of gradient-accumulation micro-batches: parts of a batch that are computed in turn, to save memory. The
    results stay the same."""
    steps: int = 900
    """Maximum number of updates."""
    label_smoothing: float = 0.1
    """Label smoothing: probability mass spread over all words."""
    r_drop: float = 0.0
    """Weight of the divergence between two passes with different dropout (R-Drop, Liang et al. 2021). 0: one pass."""
    seed: int = 0
    """Seed of everything random."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: OptimConfig(
            learning_rate=3e-3,
            warmup=0.2,
            schedule="inverse_sqrt",
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
    """Beam size for translating the dev text at each evaluation; 1 is greedy, and fast."""
    final_beam: int = 5
    """Beam size for translating the dev text at the end."""
    patience: int = 0
    """Early stopping: number of evaluations after the warm-up without a better dev BLEU. 0: no early stopping."""
    average: int = 0
    """Export the average of the weights at this many evaluations. 0: no averaging."""
    average_of: Literal["last", "best"] = "last"
    """Evaluations to average: the last ones, or those with the best figure of the dev set."""

    out: Path = Path("runs/translate")
    """Run folder. To resume a run that was stopped, give the same command again."""
    resume_from: Path | None = None
    """Run folder, or one step of its checkpoints, from which a new run continues, with optimiser state and data
    position."""
    init_from: Path | None = None
    """Checkpoint folder (config.json, model.safetensors) with the initial weights of a new run, and with its tokenizer
    unless --tokenizer is given: a translator, BART, T5."""
    vectors: Path | None = None
    """File of word vectors, such as `bestiary words train` writes: initial embeddings of a new model's tokens that are
    words; of byte-level BPE's, those in ASCII. They must be as wide as its embeddings."""
    parallelism: Annotated[ParallelConfig, tyro.conf.arg(name="")] = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if (self.source is None) != (self.target is None):
            raise RunError("--source and --target belong together: give both files.")
        if self.source is not None and self.pairs is not None:
            raise RunError("--pairs holds both sides: leave --source and --target out.")
        if self.dev and self.source is None and self.pairs is None:
            raise RunError("--dev is for text of your own: give --source and --target, or --pairs, too.")
        if self.preset not in RECIPES:
            meant = did_you_mean(self.preset, RECIPES) or f" Expected one of {', '.join(RECIPES)}."
            raise RunError(f"--preset {self.preset}: there is no such size.{meant}")
        self.check()

    def check(self) -> None:
        """Check the settings that every model and text has.

        Raises:
            RunError: one is invalid.
        """
        check_setting(self, "seed", least=0, most=MOST_SEED)
        if self.vectors is not None and self.init_from is not None:
            raise RunError("--vectors is for new embeddings; --init-from has its own. Leave one of them out.")
        if len(self.dev) > 2:
            raise RunError(f"--dev names {len(self.dev)} files; expected two, or one that holds both sides.")
        for name in ("dropout", "attention_dropout", "activation_dropout", "label_smoothing", "sample_subwords"):
            if not 0 <= (getattr(self, name) or 0) < 1:
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
            raise RunError("--r-drop compares two passes with different dropout: give a --dropout, such as 0.1.")
        if self.average and self.optim.ema:
            raise RunError("--average and --ema are mutually exclusive ways to average the weights.")
        if self.tying == "all" and not self.joint and self.tokenizer is None:
            raise RunError("--tying all needs a joint vocabulary. Use --tying decoder.")

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Self:
        """Return the defaults for a command line: for the built-in phrases or, for a text, of the --preset's recipe."""
        phrases, given = cls(), flags(arguments)
        recipe = RECIPES.get(given.get("preset", phrases.preset))
        if recipe is None or not {"source", "pairs"} & given.keys():
            return phrases
        optim = dataclasses.replace(phrases.optim, **recipe["optim"])
        loop = dataclasses.replace(phrases.loop, **recipe["loop"])
        return dataclasses.replace(phrases, **{**recipe, "optim": optim, "loop": loop})

    @property
    def rows(self) -> int:
        """Number of rows of a batch."""
        return self.batch_tokens // self.row_tokens

    @property
    def lengths(self) -> tuple[int, int]:
        """Length of a row of sources, and of one of targets."""
        return self.row_tokens, self.row_tokens

    @property
    def longest_output(self) -> int | None:
        """Maximum length of the outputs for the dev set; None: as `translator.longest_output` says."""
        return None

    @property
    def form(self) -> TextForm:
        """Preparation of the texts."""
        return TextForm(self.languages, self.lowercase, self.moses)

    @property
    def field_names(self) -> tuple[str, str]:
        """Names of the fields with source and target in a file with both, unless --fields gives others."""
        return self.languages

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder or file of the tokenizer, that of --init-from unless another is given; None to train one."""
        if self.tokenizer is None and self.init_from is not None:
            return self.init_from if any((self.init_from / name).is_file() for name in TOKENIZER_FILES) else None
        return self.tokenizer

    @property
    def sources_too_long(self) -> TooLong:
        """What becomes of sources of the dev set that are longer than a row."""
        return "split"


# Settings that change neither the numbers of a run nor what it exports: they may change when it is resumed.
FREE = (*EVERY_FREE, "cache")


def upgrade(stored: dict[str, Any]) -> dict[str, Any]:
    """Convert a run folder's settings to this version's.

    Raises:
        RunError: this version cannot continue the run.
    """
    if "too_long" not in stored and stored.get("init_from") is None:
        raise RunError(
            f"{stored['out']} was begun by an earlier version, whose decoder starts from another token. That run "
            "cannot go on; choose another --out."
        )
    renamed = {"parallelism" if name == "spread" else name: value for name, value in stored.items()}
    return renamed | {"optim": upgrade_optim(renamed.get("optim"))}

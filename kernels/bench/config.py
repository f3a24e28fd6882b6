"""The settings of `bestiary bench attention` and `bestiary bench layers`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class AttentionBenchConfig:
    """Measure attention kernels, forward and backward, or tune the block sizes of ours."""

    shapes: str = ""
    """Shapes to measure: BxLxHxD (batch, length, heads, head size) or BxLxSxHxKxD, separated by commas. Empty: small
    shapes on a CPU, 16k tokens of width 2048 on an accelerator."""
    bias: str = "none"
    """Biases to measure, separated by commas: none, relative (T5, with the gradient of its table), alibi, dense."""
    causal: bool = False
    """Mask later keys."""
    window: str = ""
    """Attention window LEFT,RIGHT: numbers of keys visible before and after the query; an empty side has no limit."""
    packed: str | None = None
    """Pack rows with documents of simulated lengths: wikipedia (mean 261 tokens) or short (mean 131)."""
    dropout: float = 0.0
    """Dropout rate. Measures our backends only, since others generate different bits."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the inputs. auto: float32 on a CPU, else bfloat16."""
    peers: str = "all"
    """Other implementations to measure, separated by commas: all, none, or names (jax.nn, cudnn, tokamax, splash,
    torch)."""
    limit: float = 300.0
    """Seconds that one implementation may take in one case, compilation included; then it is ended and listed so."""
    samples: int = 7
    """Number of samples per time; the median is reported, with the shortest and the longest."""
    sample_seconds: float = 0.0
    """Minimum duration of a sample, in seconds; 0: 0.05 on a CPU, else 0.2."""
    seed: int = 0
    """Seed of the inputs and lengths."""
    tune: bool = False
    """Tune the block sizes of our kernels for these shapes instead, and write them to the table (see `tuning.py`)."""
    chip: str | None = None
    """With --tune, without the chip: the chip to compile for (h200, v5e, v5p, v6e); nothing is timed then."""
    candidates: Path | None = None
    """With --tune, on the chip: a report that --tune --chip made, whose candidates are timed without compiling them all
    first."""
    table: Path | None = None
    """With --tune: the table to write. None: that of the package."""
    out: Path = Path("bench")
    """Folder to write the results to."""


@dataclass(frozen=True)
class LayersBenchConfig:
    """Measure self-attention, recurrent, convolutional and restricted self-attention layers by sequence length.

    With --runs, compare translators that were trained with such layers instead.
    """

    lengths: str = "64,128,256,512,1024"
    """Sequence lengths, in positions, separated by commas."""
    tokens: int = 2048
    """Positions per batch; the number of sequences follows from their length."""
    width: int = 512
    """Number of channels, d; a multiple of 64. The paper's base model has 512."""
    kernel: int = 3
    """Kernel width of the convolution, k, in positions."""
    neighbourhood: int = 64
    """Neighbourhood of restricted attention, r, in positions: half of them on each side."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype to compute in. auto: float32 on a CPU, else bfloat16."""
    samples: int = 5
    """Number of samples per time; the median is reported."""
    sample_seconds: float = 0.05
    """Minimum duration of a sample, in seconds."""
    seed: int = 0
    """Seed of the inputs and weights."""
    runs: tuple[Path, ...] = ()
    """Run folders of `bestiary translate train`, finished ones: one table and chart of their BLEU, parameters, target
    tokens/s and time to half of the best BLEU, instead of measuring layers."""
    out: Path = Path("bench")
    """Folder to write the results to."""

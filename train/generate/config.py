"""Decoding options, which are fields of the commands that generate text."""

import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal

from ..errors import RunError

MOST_HYPOTHESES = 1024
"""Maximum number of hypotheses of a sentence, which are computed together."""


@dataclass(frozen=True)
class DecodeConfig:
    """Options of text generation."""

    beam: int = 1
    """Beam size: number of hypotheses per sentence. 1: greedy search."""
    max_length: int = 128
    """Maximum length of an output, in tokens, end token included."""
    min_length: int = 0
    """Minimum length of an output, in tokens, end token excluded."""
    length_penalty: float = 1.0
    """Exponent of the length by which the log probability of a hypothesis is divided; 0: no length normalisation."""
    length_penalty_form: Literal["reference", "gnmt"] = "reference"
    """Form of the length penalty. reference: length^p; gnmt: ((5 + length) / 6)^p (Wu et al. 2016, eq. 14)."""
    coverage_penalty: float = 0.0
    """Weight of the coverage penalty, the sum over source tokens of log(min(attention received, 1)), added to the score
    of a finished hypothesis (Wu et al. 2016, eq. 14). The attention is that of the last layer, averaged over its
    heads."""
    n_best: int = 1
    """Number of hypotheses to return per sentence; with --sample, of independent samples."""
    early_stopping: Literal["heuristic", "first", "exhaustive"] = "heuristic"
    """Stopping rule of beam search. heuristic: stop when no live beam can beat the worst finished hypothesis at the
    current length; first: stop once `beam` hypotheses are finished; exhaustive: stop when no live beam can win at any
    length."""
    diverse_groups: int = 1
    """Diverse beam search: number of groups that the beams are divided into; each group avoids the tokens chosen by the
    groups before it (Vijayakumar et al. 2016)."""
    diversity_penalty: float = 0.5
    """Diverse beam search: penalty of a token for each earlier group that chose it at the same step."""
    sample: bool = False
    """Sample tokens instead of choosing the most probable one; needs --beam 1."""
    temperature: float = 1.0
    """Sampling: temperature by which the logits are divided."""
    top_k: int = 0
    """Sampling: sample from the K most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Sampling: sample from the fewest tokens whose probabilities add up to this (Holtzman et al. 2019)."""
    seed: int = 0
    """Sampling: random seed. The samples of a sentence depend only on this and on the sentence's number."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens that have already occurred by this, and multiply negative ones (Keskar et al.
    2019)."""
    no_repeat_ngram: int = 0
    """Length of n-grams that may occur only once in an output; 0: no limit."""
    suppressed: tuple[int, ...] = ()
    """Ids of tokens that are never generated."""
    renormalise: bool = False
    """Beam search: renormalise the probabilities of the allowed tokens before comparing beams."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise RunError(f"{field.name}: expected a finite number, found {value}")
        for name in ("beam", "n_best"):
            if getattr(self, name) > MOST_HYPOTHESES:
                raise RunError(f"{name}: expected at most {MOST_HYPOTHESES:,}, found {getattr(self, name):,}")
        if abs(self.length_penalty) > 10:
            raise RunError(f"length_penalty: expected a number from -10 to 10, found {self.length_penalty:g}")
        if not 0 <= self.seed < 1 << 32:
            raise RunError(f"seed: expected a number from 0 to {(1 << 32) - 1:,}, found {self.seed}")
        self._at_least(1, "beam", "max_length", "n_best", "diverse_groups")
        self._at_least(0, "min_length", "top_k", "no_repeat_ngram", "coverage_penalty")
        if self.min_length >= self.max_length:
            raise RunError(f"min_length: expected less than max_length {self.max_length}, found {self.min_length}")
        if not self.temperature > 0 or not self.repetition_penalty > 0:
            raise RunError("temperature and repetition_penalty: expected numbers above 0")
        if not 0 < self.top_p <= 1:
            raise RunError(f"top_p: expected a number above 0 and at most 1, found {self.top_p}")
        if self.beam % self.diverse_groups:
            raise RunError(f"diverse_groups: expected a divisor of beam {self.beam}, found {self.diverse_groups}")
        if self.sample and self.beam > 1:
            raise RunError("sample: samples are independent, so beam must be 1 (--beam 1); n_best is their number")
        if not self.sample and self.n_best > self.beam:
            raise RunError(f"n_best: expected at most beam {self.beam}, found {self.n_best}")
        if not self.sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise RunError("temperature, top_k and top_p change what is sampled; they need sample")
        if not self.sample and self.seed:
            raise RunError("seed: nothing is random without sample")
        if not self.searches and (self.renormalise or self.coverage_penalty or self.early_stopping != "heuristic"):
            raise RunError(
                "renormalise, coverage_penalty and early_stopping are for beam search; they need beam above 1"
            )
        if self.diverse_groups == 1 and self.diversity_penalty != DecodeConfig.diversity_penalty:
            raise RunError("diversity_penalty: applies between groups of beams; it needs diverse_groups above 1")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= least:
                raise RunError(f"{name}: expected at least {least}, found {getattr(self, name)}")

    @property
    def searches(self) -> bool:
        """Whether this is beam search; otherwise hypotheses are independent of each other."""
        return self.beam > 1

    @property
    def width(self) -> int:
        """Number of hypotheses of a sentence that are computed together, K."""
        return self.beam if self.searches else self.n_best


def refuse_decoding_flags(given: Collection[str], reason: str) -> None:
    """Raise RunError if a command line has decoding flags that would be ignored.

    Args:
        given: names of the given flags, with underscores.
        reason: why they would be ignored.
    """
    names = [field.name for field in fields(DecodeConfig)]
    for name in names:
        if name in given or f"no_{name}" in given:
            raise RunError(f"{reason}: leave --{name.replace('_', '-')} out.")

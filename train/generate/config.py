"""The options of decoding, which are fields of the commands that generate text."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal

from ..errors import RunError


@dataclass(frozen=True)
class DecodeConfig:
    """How text is generated."""

    beam: int = 1
    """Beam size: hypotheses kept for each sentence. 1: greedy search."""
    max_length: int = 128
    """Most tokens of an output, its end token included."""
    min_length: int = 0
    """Fewest tokens of an output, its end token not included."""
    length_penalty: float = 1.0
    """Exponent of the length that a hypothesis's log probability is divided by; 0 for none."""
    length_penalty_form: Literal["reference", "gnmt"] = "reference"
    """How the length counts. reference: length^p; gnmt: ((5 + length) / 6)^p (Wu et al. 2016, eq. 14)."""
    coverage_penalty: float = 0.0
    """Weight of the sum over source tokens of log(min(attention received, 1)), added to a finished hypothesis's score
    (Wu et al. 2016, eq. 14); the attention is the last layer's, averaged over its heads."""
    n_best: int = 1
    """Hypotheses returned for each sentence; with sampling, independent samples."""
    early_stopping: Literal["heuristic", "first", "exhaustive"] = "heuristic"
    """With beams, when to stop. heuristic: when no live beam can beat the worst finished hypothesis at the current
    length; first: once `beam` hypotheses are finished; exhaustive: when no live beam can win at any length."""
    diverse_groups: int = 1
    """Groups that the beams are divided into; each avoids the tokens that the groups before it chose (Vijayakumar et
    al. 2016)."""
    diversity_penalty: float = 0.5
    """With groups: subtracted from a token's score for each time that an earlier group chose it at this step."""
    sample: bool = False
    """Sample tokens instead of taking the most probable one; needs beam 1."""
    temperature: float = 1.0
    """When sampling: what logits are divided by."""
    top_k: int = 0
    """When sampling: choose among the K most probable tokens; 0 for all."""
    top_p: float = 1.0
    """When sampling: choose among the fewest tokens that together have this probability (Holtzman et al. 2019)."""
    seed: int = 0
    """Random seed of sampling; a sentence's samples depend on this and on its number alone."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that occur already, and multiplies negative ones (Keskar et al. 2019)."""
    no_repeat_ngram: int = 0
    """Length of n-grams that may occur only once in an output; 0 for no limit."""
    suppressed: tuple[int, ...] = ()
    """Ids of tokens that are never generated."""
    renormalise: bool = False
    """With beams: renormalise the probabilities of the tokens that are allowed, before beams are compared."""

    def __post_init__(self) -> None:
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
            raise RunError("sample: samples are independent, so beam must be 1 (--beam 1); n_best says how many")
        if not self.sample and self.n_best > self.beam:
            raise RunError(f"n_best: expected at most beam {self.beam}, found {self.n_best}")
        if not self.sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise RunError("temperature, top_k and top_p change what is sampled; they need sample")
        if not self.sample and self.seed:
            raise RunError("seed: nothing is random without sample")
        if not self.searches and (self.renormalise or self.coverage_penalty or self.early_stopping != "heuristic"):
            raise RunError(
                "renormalise, coverage_penalty and early_stopping are of beam search; they need beam above 1"
            )
        if self.diverse_groups == 1 and self.diversity_penalty != DecodeConfig.diversity_penalty:
            raise RunError("diversity_penalty: is between groups of beams; it needs diverse_groups above 1")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise RunError(f"{name}: expected at least {least}, found {getattr(self, name)}")

    @property
    def searches(self) -> bool:
        """Whether this is beam search; else hypotheses are independent of each other."""
        return self.beam > 1

    @property
    def width(self) -> int:
        """Hypotheses of a sentence that are computed together, K."""
        return self.beam if self.searches else self.n_best


def refuse_decoding_flags(given: Collection[str], reason: str) -> None:
    """Raise RunError if a command line gives flags of decoding that would be ignored.

    Args:
        given: names of the flags that are given, with underscores.
        reason: why they would be ignored.
    """
    names = [field.name for field in fields(DecodeConfig)]
    for name in names:
        if name in given or f"no_{name}" in given:
            raise RunError(f"{reason}: leave --{name.replace('_', '-')} out.")

"""The options of decoding, which are fields of the commands that generate text."""

from dataclasses import dataclass
from typing import Literal

from ..errors import RunError


@dataclass(frozen=True)
class DecodeConfig:
    """How text is generated."""

    beam: int = 1
    """hypotheses kept for each sentence; 1 takes the most probable token each time"""
    max_length: int = 128
    """most tokens of an output, its end among them"""
    min_length: int = 0
    """fewest tokens of an output, its end not among them"""
    length_penalty: float = 1.0
    """exponent of the length that a hypothesis's log probability is divided by; 0 for none"""
    length_penalty_form: Literal["reference", "gnmt"] = "reference"
    """reference: length^p; gnmt: ((5 + length) / 6)^p (Wu et al. 2016, eq. 14)"""
    coverage_penalty: float = 0.0
    """weight of the sum over source tokens of log(min(attention received, 1)), added to a finished hypothesis's score
    (Wu et al. 2016, eq. 14); the attention is the last layer's, the mean of its heads"""
    n_best: int = 1
    """hypotheses given for each sentence; with sampling, independent ones"""
    early_stopping: Literal["no", "yes", "never"] = "no"
    """when a sentence is finished. no: no running hypothesis would beat the worst finished one at its present length;
    yes: as soon as there are as many finished ones as beams; never: none can beat it at any length"""
    diverse_groups: int = 1
    """groups that the beams are divided into, each searching what the ones before it did not choose (Vijayakumar et al.
    2016)"""
    diversity_penalty: float = 0.5
    """what a token loses for each time that a group before has chosen it at this step"""
    sample: bool = False
    """draw tokens instead of taking the most probable; takes beam 1"""
    temperature: float = 1.0
    """what logits are divided by before drawing"""
    top_k: int = 0
    """draw from this many most probable tokens; 0 for all"""
    top_p: float = 1.0
    """draw from the fewest tokens that hold this share of the probability (Holtzman et al. 2019)"""
    seed: int = 0
    """of drawing; a sentence's draws depend on this and its number alone"""
    repetition_penalty: float = 1.0
    """divides positive scores of tokens that are there already, and multiplies negative ones (Keskar et al. 2019)"""
    no_repeat_ngram: int = 0
    """length of token sequences that may occur only once; 0 for no limit"""
    suppressed: tuple[int, ...] = ()
    """tokens that are never generated"""
    renormalise: bool = False
    """with beams: share out among the others what tokens that may not come would have had, before beams are compared"""

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
            raise RunError("sample: draws independent outputs, so beam must be 1 (--beam 1); n_best says how many")
        if not self.sample and self.n_best > self.beam:
            raise RunError(f"n_best: expected at most beam {self.beam}, found {self.n_best}")
        if not self.sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise RunError("temperature, top_k and top_p change what is drawn; they need sample")
        if self.renormalise and not self.searches:
            raise RunError("renormalise: changes what beams are compared by, so beam must be above 1")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise RunError(f"{name}: expected at least {least}, found {getattr(self, name)}")

    @property
    def searches(self) -> bool:
        """Whether this is beam search; else chains of tokens that know nothing of each other."""
        return self.beam > 1

    @property
    def width(self) -> int:
        """Hypotheses of a sentence that are computed at a time, K."""
        return self.beam if self.searches else self.n_best

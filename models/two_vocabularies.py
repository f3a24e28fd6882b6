"""Encoder-decoders whose source and target may have a vocabulary each: which tables there are, and which are shared."""

from jax import Array

from .encoder_decoder import EncoderDecoder
from .layers.linear import Embed

TYINGS = ("all", "decoder", "none")


class TwoVocabularies:
    """What such a model's config has, besides the fields that it declares: this mix-in declares none."""

    vocab_size: int
    target_vocab_size: int | None
    tying: str

    @property
    def target_words(self) -> int:
        """Vocabulary size of the target."""
        return self.vocab_size if self.target_vocab_size is None else self.target_vocab_size

    def check_tying(self) -> None:
        """Check that what shares a table has one vocabulary.

        Raises:
            ValueError: it has two.
        """
        if self.tying == "all" and self.target_words != self.vocab_size:
            raise ValueError(
                f"{type(self).__name__}: tying 'all' shares one table, but the source has {self.vocab_size} words and "
                f"the target {self.target_words}; take one vocabulary for both, or tying 'decoder'"
            )


class WithTwoTables(EncoderDecoder):
    """Such a model: `setup` creates `source`, `target` unless all is shared, `output` if nothing is shared."""

    @property
    def _target_table(self) -> Embed:
        return self.source if self.config.tying == "all" else self.target

    @property
    def output_table(self) -> Embed:
        """See `EncoderDecoder.output_table`."""
        return self.output if self.config.tying == "none" else self._target_table

    def logits_bias(self) -> Array | None:
        """See `EncoderDecoder.logits_bias`."""
        return self.final_logits_bias if self.config.logits_bias else None

"""Replaced token detection: tell which tokens a small generator has replaced (Clark et al. 2020, 2 and 3).

The generator is a masked language model, and its loss is "mlm". A token drawn from its prediction takes the place of
each masked one; the loss "rtd" of the discriminator, weighted by 50, is over all tokens, whether each was replaced. A
drawn token that equals the original one counts as original. Nothing is learnt through the drawing.

The tokens to mask are drawn with replacement, as in the original; a token drawn twice is one prediction, where the
original counts its loss twice and averages the numbers of two drawn tokens. Examples are two consecutive texts of a
document, without a label of their own, so that both token types are learnt.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from ...data import DocumentStore, SentencePairRows, Tokenizer
from ...data.corpus.document_store import Split
from ...data.stream import RowSource
from ...models.encoders.electra import ElectraConfig, separate
from ...models.family import EncoderConfig
from ...models.heads.losses import PredictionSums, WeightedSum, prediction_sums, sequence_losses
from ...models.heads.with_head import encoder_inputs
from ...models.registry import family_of
from ..loop import InitialWeights
from .config import PretrainConfig
from .masking import Masking
from .mlm import make_masking, mask
from .model import Folders, fitted_generator, pair_weights
from .objective import Batch, LossSums, Network, Objective, Term
from .samples import fill_in


@dataclass(frozen=True, eq=False)
class ReplacedTokens(Objective):
    """The objective `rtd`, with the losses "mlm" and "rtd", and "replaced", the fraction of tokens that were."""

    masking: Masking
    tokenizer: Tokenizer
    folders: Folders  # to start from
    head = "pretraining"
    shown = ("mlm_loss", "rtd_loss", "rtd_accuracy", "replaced")
    terms = (Term("mlm"), Term("rtd", factor=50.0))
    units: ClassVar = ("token",)
    own_rows: ClassVar = "two consecutive texts each"

    @classmethod
    def create(cls, config: PretrainConfig, tokenizer: Tokenizer) -> Self:
        """See `ObjectiveClass.create`."""
        masking = make_masking(config, tokenizer, "electra", keep=0.15, random=0.0)
        return cls(masking, tokenizer, Folders(config.init_from, config.generator))

    def fitted(self, architecture: EncoderConfig) -> EncoderConfig:
        """See `Objective.fitted`. Gives the generator the size that its folder says."""
        assert isinstance(architecture, ElectraConfig)
        return fitted_generator(architecture, self.folders)

    def initial(self, config: PretrainConfig, model: Any) -> InitialWeights | None:
        """See `Objective.initial`."""
        return pair_weights(self.folders, config.seed) or super().initial(config, model)

    def rows(self, store: DocumentStore, split: Split, **settings: Any) -> RowSource:
        """See `Objective.rows`."""
        return SentencePairRows(store, self.tokenizer, split, pairs="consecutive", **settings)

    def networks(self, architecture: EncoderConfig) -> tuple[Network, ...]:
        """Return both networks."""
        assert isinstance(architecture, ElectraConfig)
        return Network(architecture.generator), Network(architecture, "flags")

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """Mask tokens for the generator; adds `drawing_keys` [B, 2] uint32, for what it draws."""
        mask_key, drawing_key = jax.random.split(key)

        def own(row_id: jax.Array) -> jax.Array:
            return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(drawing_key, row_id[0]), row_id[1]))

        return {**mask(self.masking, mask_key, batch), "drawing_keys": jax.vmap(own)(batch["row_ids"])}

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Return the numbers of masked tokens and of all tokens."""
        return {"mlm": batch["mlm_weights"].sum(), "rtd": (batch["segment_ids"] > 0).sum().astype(jnp.float32)}

    def losses(self, model: Any, params: Any, batch: Batch, **mode: Any) -> LossSums:
        """Compute the generator's cross-entropy, and the discriminator's after drawing from it."""
        mode["rows"] = batch["rows"]
        inputs, places = encoder_inputs(model.config, batch), batch["mlm_positions"]
        words = model.apply({"params": params}, *inputs, mlm_positions=places, method="generate", **mode)
        corrupted, replaced = replace_tokens(batch, draw_tokens(batch["drawing_keys"], words))
        inputs = encoder_inputs(model.config, {**batch, "input_ids": corrupted})
        logits = model.apply({"params": params}, *inputs, method="discriminate", **mode)
        real = (batch["segment_ids"] > 0).astype(jnp.float32)
        found = sequence_losses("multi_label_classification", logits[..., None], replaced, real)["loss"]
        right = jnp.where((logits > 0) == replaced, real, 0.0).sum()
        guessed = prediction_sums(words, batch["mlm_labels"], batch["mlm_weights"])
        share = WeightedSum(replaced.sum().astype(jnp.float32), real.sum())
        return {"mlm": guessed, "rtd": PredictionSums(found.total, right, found.weight), "replaced": share}

    def samples(self, model: Any, params: Any, rows: dict[str, np.ndarray]) -> Iterable[str]:
        """Show texts with masked words and the generator's predictions."""

        def apply(params: Any, batch: Batch) -> jax.Array:
            return model.apply({"params": params}, *encoder_inputs(model.config, batch), method="generate")

        return fill_in(apply, params, self.tokenizer, rows)

    def exports(self, model: Any, params: Any) -> dict[str, tuple[Any, Any]]:
        """Return both networks: the discriminator is the model to fine-tune."""
        build, (discriminator, generator) = family_of(model.config).build, separate(params)
        return {
            "model": (build("discriminator", model.config), discriminator),
            "generator": (build("masked_lm", model.config.generator), generator),
        }


def draw_tokens(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """Draw a token from each prediction, at temperature 1; without a gradient.

    Args:
        keys: [B, 2] uint32, data of each row's key.
        logits: [B, P, V].

    Returns:
        [B, P] int32
    """
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.wrap_key_data(key), row))
    return draw(keys, logits).astype(jnp.int32)


def replace_tokens(batch: Batch, drawn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Replace the masked tokens of the original text, those that were left unchanged too.

    Args:
        batch: a masked batch.
        drawn: [B, P] int32, a token for each prediction.

    Returns:
        ([B, L] int32, the text after it; [B, L] bool, which tokens differ from the original)
    """
    length = batch["input_ids"].shape[1]
    places = jnp.where(batch["mlm_weights"] > 0, batch["mlm_positions"], length)  # beyond the row: nothing
    put = jax.vmap(lambda row, place, value: row.at[place].set(value, mode="drop"))
    original = put(batch["input_ids"], places, batch["mlm_labels"])
    corrupted = put(original, places, drawn)
    return corrupted, corrupted != original

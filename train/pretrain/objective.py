"""The base of pretraining objectives.

An objective says what its rows are made of, how they are corrupted on the device, what each of its losses is divided by
before the model runs, and the losses. The loop knows nothing else of it. A new one is a file beside this one, a line in
`OBJECTIVES` (objectives.py), and a word in the families that can learn it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ...data import DocumentStore
from ...data.corpus.document_store import Split, Unit
from ...data.stream import RowSource
from ...models.family import EncoderConfig
from ...models.heads.losses import LossSum, PredictionSums, WeightedSum
from ..loop import InitialWeights
from ..sharding import Parallelism
from .config import MaskingKind, PretrainConfig
from .model import initial_weights

Batch = dict[str, jax.Array]
LossSums = dict[str, PredictionSums | LossSum | WeightedSum]


class Term(NamedTuple):
    """A loss's part in the sum to minimise: factor * (sum of the losses) / (weight + added)."""

    name: str
    factor: float = 1.0
    added: float = 0.0


class Network(NamedTuple):
    """A network that a step runs on every token, for counting operations."""

    config: EncoderConfig
    predicts: Literal["masked", "all", "flags", "nothing"] = "masked"
    """words at the masked positions, words at all positions, one number for each token, or nothing"""
    trained: bool = True


class Objective:
    """A way of learning from text without labels. Each of its losses has a name, such as `mlm`."""

    head: ClassVar[str]
    """head of the model that it needs"""
    shown: ClassVar[tuple[str, ...]]
    """metrics to show on the progress line, in addition to the loss"""
    terms: tuple[Term, ...]
    """what to minimise"""
    units: ClassVar[tuple[MaskingKind, ...]] = get_args(MaskingKind)
    """units of masking that it can use, the default first"""
    text: ClassVar[Unit] = "sentences"
    """what documents are divided into"""
    own_rows: ClassVar[str | None] = None
    """what its rows are, in words, if there is only one kind; None if --rows chooses"""

    learns: ClassVar[str | None] = None
    """the objective that a family must have for this one, which no family names; None if families name this one"""

    def rows(
        self,
        store: DocumentStore,
        split: Split,
        *,
        sequence_length: int,
        seed: int,
        copies: int | None,
        validation_fraction: float,
    ) -> RowSource:
        """Return the rows of a tokenised corpus; the arguments are those of `DocumentRows`."""
        raise NotImplementedError

    def networks(self, architecture: EncoderConfig) -> tuple[Network, ...]:
        """Return the networks that a step runs for a model of this configuration."""
        return (Network(architecture),)

    def fitted(self, architecture: EncoderConfig) -> EncoderConfig:
        """Return the model's configuration, adapted to the objective.

        Raises:
            RunError: the objective cannot train such a model.
        """
        return architecture

    def initial(self, config: PretrainConfig, model: Any) -> InitialWeights | None:
        """Return the weights that a new run starts from, those of --init-from; None for new ones.

        Args:
            config: settings of the run.
            model: a model with `head`.
        """
        del model
        return initial_weights(config, self.head)

    def remarks(self, model: Any) -> Iterable[str]:
        """Yield lines about what it learns from, to show before the training."""
        del model
        return ()

    def fixed(self, parallelism: Parallelism) -> tuple[Any, ...]:
        """Return arrays on the devices that the losses read and nothing changes, such as a teacher's parameters."""
        del parallelism
        return ()

    def reading(self, *fixed: Any) -> Self:
        """Return the objective with these arrays, or their tracers, in place of its own."""
        del fixed
        return self

    def held_out(self) -> Self:
        """Return the objective by which to evaluate."""
        return self

    def corrupt(self, key: jax.Array, batch: Batch) -> Batch:
        """Draw the model's inputs and labels, on the device.

        Args:
            key: random key, the same for the whole run; each row folds its `row_ids` into it, so that the result does
                not depend on the mesh, accumulation or the number of hosts.
            batch: a batch of `rows`.
        """
        raise NotImplementedError

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Return each loss's weight, its denominator, summed over a corrupted batch; float32 scalars."""
        raise NotImplementedError

    def losses(self, model: Any, params: Any, batch: Batch, **mode: Any) -> LossSums:
        """Compute the sums of each loss over a corrupted batch; others than those of `terms` are only reported.

        Args:
            model: a model with `head`.
            params: its parameters.
            batch: a corrupted batch, with row numbers as `rows`.
            mode: `deterministic` and `rngs` for the model.
        """
        raise NotImplementedError

    def memory(self, model: Any) -> Batch:
        """Return what the model remembers before the first batch, arrays [rows, ...]; empty if it has no memory."""
        del model
        return {}

    def losses_and_memory(
        self, model: Any, params: Any, batch: Batch, memory: Batch, **mode: Any
    ) -> tuple[LossSums, Batch]:
        """Compute `losses`, and the memory after the batch from that before it, both of the batch's rows."""
        return self.losses(model, params, batch, **mode), memory

    def samples(self, model: Any, params: Any, rows: dict[str, np.ndarray]) -> Iterable[str]:
        """Yield lines that illustrate what the model has learnt.

        Args:
            model: a model with `head`.
            params: its parameters, on the host.
            rows: a batch of held-out rows.
        """
        raise NotImplementedError

    def exports(self, model: Any, params: Any) -> dict[str, tuple[Any, Any]]:
        """Return what to export: name of a folder -> (model, its parameters); "model" is the one to fine-tune."""
        return {"model": (model, params)}


def total(terms: Iterable[Term], sums: Mapping[str, Any], weights: Mapping[str, jax.Array]) -> jax.Array:
    """Compute the loss to minimise.

    Args:
        terms: of an objective.
        sums: sums of its losses, over a part of a batch or over all of it.
        weights: their weights, summed over the whole batch.
    """
    return sum(
        (term.factor * sums[term.name].loss / jnp.maximum(weights[term.name] + term.added, 1.0) for term in terms),
        start=jnp.float32(0),
    )

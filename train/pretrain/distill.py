"""Distillation of a masked language model into a smaller one (Sanh et al. 2019, 2 and 3).

Three losses, each a mean, as in the original's distiller.py: "kl", the divergence of the student's predictions from the
teacher's, over all tokens, at a temperature T and times T², weighted by 5; "mlm", the cross-entropy of masked words,
weighted by 2; "cosine", 1 - cosine of the last hidden states, over all tokens, weighted by 1. Both models read the same
masked text; the teacher has no dropout.

What differs from the original: tokens are masked by the rules of the student's family (there, rare words more often, in
proportion to count^-0.7), rows are packed, and position vectors are trained.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax.numpy as jnp

from ...data import Tokenizer
from ...models.checkpoints.teacher import Teacher, load_teacher
from ...models.family import EncoderConfig
from ...models.heads.distillation import cosine_distance, divergence_of_words
from ...models.heads.losses import LossSum, prediction_sums
from ...models.heads.with_head import encoder_inputs, words_parameters
from ...models.layers.segments import gather_positions
from ..errors import RunError
from ..learner import compute_dtype, count_parameters
from ..loop import InitialWeights
from ..sharding import Parallelism
from .config import DistillConfig, PretrainConfig
from .mlm import MaskedWords
from .model import student_params
from .objective import Batch, LossSums, Network, Term


@dataclass(frozen=True, eq=False)
class Distillation(MaskedWords):
    """The objective of `bestiary distill`, with the losses "kl", "mlm" and "cosine"."""

    teacher: Teacher
    temperature: float
    terms: tuple[Term, ...]
    shown = ("kl_loss", "mlm_accuracy", "cosine_loss")
    learns: ClassVar = "mlm"

    @classmethod
    def create(cls, config: PretrainConfig, tokenizer: Tokenizer) -> Self:
        """See `ObjectiveClass.create`. Reads the teacher.

        Raises:
            RunError: see `load_teacher`.
        """
        assert isinstance(config, DistillConfig)
        teacher = load_teacher(
            *(config.teacher, cls.head, tokenizer),
            max_length=max(phase.length for phase in config.plan),
            where=str(config.tokenizer_folder),
            dtype=compute_dtype(config.dtype),
            attention_implementation=config.attention,
        )
        factors = {"kl": config.kl_weight, "mlm": config.mlm_weight, "cosine": config.cosine_weight}
        terms = tuple(Term(name, factor) for name, factor in factors.items() if factor)
        masked = MaskedWords.create(config, tokenizer)
        plain = {field.name: getattr(masked, field.name) for field in dataclasses.fields(masked)}
        return cls(**plain, teacher=teacher, temperature=config.temperature, terms=terms)

    def networks(self, architecture: EncoderConfig) -> tuple[Network, ...]:
        """Return the student and the teacher."""
        if self._has("kl"):
            return Network(architecture, "all"), Network(self.teacher.config, "all", trained=False)
        return Network(architecture), Network(self.teacher.config, "nothing", trained=False)

    def fitted(self, architecture: EncoderConfig) -> EncoderConfig:
        """See `Objective.fitted`. Refuses a student of another width, if the cosine is a loss."""
        wide = self.teacher.config.width
        if self._has("cosine") and wide != architecture.width:
            raise RunError(
                f"--teacher {self.teacher.folder}: its hidden states have {wide} numbers, the student's "
                f"{architecture.width}: there is no cosine between them. --cosine-weight 0 does without."
            )
        return architecture

    def initial(self, config: PretrainConfig, model: Any) -> InitialWeights | None:
        """See `Objective.initial`. Without --init-from, the teacher's weights, if they are asked for or fit."""
        assert isinstance(config, DistillConfig)
        if config.init_from is not None or config.copy_layers is False:
            return super().initial(config, model)
        found = student_params(self.teacher, model)
        if isinstance(found, str):
            if config.copy_layers:
                raise RunError(f"--copy-layers: {found}.")
            return None
        params, layers = found
        return InitialWeights(lambda: params, f"the embeddings, head and layers {layers} of {self.teacher.folder}")

    def remarks(self, model: Any) -> Iterable[str]:
        """Describe the teacher."""
        theirs, count = self.teacher.config, count_parameters(self.teacher.params)
        yield f"teacher: {theirs.layers} layers, {theirs.width} wide, {count:,} parameters, from {self.teacher.folder}"
        found = student_params(self.teacher, model)
        if isinstance(found, str):
            yield f"the student cannot start from the teacher's layers: {found}"

    def fixed(self, parallelism: Parallelism) -> tuple[Any, ...]:
        """Return the teacher's parameters."""
        return (parallelism.place_model(self.teacher.model, self.teacher.params),)

    def reading(self, *fixed: Any) -> Self:
        """See `Objective.reading`."""
        return dataclasses.replace(self, teacher=self.teacher._replace(params=fixed[0]))

    def weights(self, batch: Batch) -> dict[str, Any]:
        """Return the numbers of masked tokens and of all tokens."""
        tokens = (batch["segment_ids"] > 0).sum().astype(jnp.float32)
        return {**super().weights(batch), "kl": tokens, "cosine": tokens}

    def losses(self, model: Any, params: Any, batch: Batch, **mode: Any) -> LossSums:
        """Compute the losses, of which only those with a weight need the teacher's outputs."""
        teacher, tokens = self.teacher, (batch["segment_ids"] > 0).astype(jnp.float32)
        inputs = encoder_inputs(model.config, batch)
        hidden = model.apply({"params": params}, *inputs, rows=batch["rows"], method="hidden", **mode)
        inputs = encoder_inputs(teacher.config, batch)
        taught = teacher.model.apply({"params": teacher.params}, *inputs, method="hidden")

        def words(of: Any) -> Any:
            return lambda params, hidden: of.apply({"params": params}, hidden, method="words")

        logits = words(model)(params, gather_positions(hidden, batch["mlm_positions"]))
        found: LossSums = {"mlm": prediction_sums(logits, batch["mlm_labels"], batch["mlm_weights"])}
        if self._has("kl"):
            apart = divergence_of_words(
                words(model),
                words_parameters(params),
                hidden,
                words(teacher.model),
                words_parameters(teacher.params),
                taught,
                tokens,
                temperature=self.temperature,
                vocabulary=self.tokenizer.vocab_size,
            )
            found["kl"] = LossSum(apart, tokens.sum())
        if self._has("cosine"):
            found["cosine"] = LossSum((cosine_distance(hidden, taught) * tokens).sum(), tokens.sum())
        return found

    def _has(self, name: str) -> bool:
        """Tell whether a loss has a weight."""
        return any(term.name == name for term in self.terms)

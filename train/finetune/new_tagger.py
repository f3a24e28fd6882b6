"""A new tagger: LSTMs over the vectors of the training data's words, and over the states of a frozen ELMo."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from ...data.tasks.tagging import Sentence
from ...data.tokenizers.word_level import ranked, word_tokenizer
from ...data.vectors import read_vectors
from ...models.checkpoints.folder import Loaded
from ...models.once import jit_once
from ...models.recurrent.bilstm import FAMILY, BiLstmConfig
from ...models.registry import init_params
from ..errors import RunError
from ..learner import compute_dtype
from ..vectors import vectors_weights
from .config import TaggingConfig
from .tasks.tagging import TaggingTask, features_shape

LEAST = 2
"""Occurrences of a word with a vector of its own; the others share one, which words that are not known get too."""


def new_tagger(config: TaggingConfig, task: TaggingTask, sentences: Sequence[Sentence]) -> Loaded:
    """Draw a new tagger.

    Args:
        config: settings of the run.
        task: the task.
        sentences: the training data.

    Raises:
        RunError: a setting has no use in this model, or see `vectors_weights`.
        DataError: see `read_vectors`.
    """
    # The tokenizer splits at white space, which words of some languages have.
    counts = Counter(part for sentence in sentences for word in sentence.words for part in word.split())
    words = ranked({word: count for word, count in counts.items() if count >= LEAST})
    changes = task.model_changes()
    if config.vectors is not None:
        given = read_vectors(config.vectors)
        words += ranked(dict.fromkeys(set(given.words) - set(words), 1))
        changes["embedding_width"] = given.vectors.shape[1]
    changes["features"] = features_shape(task)
    if config.dropout is not None:
        changes["dropout"] = config.dropout
    tokenizer = word_tokenizer(words)
    try:
        shaped = BiLstmConfig(
            vocab_size=tokenizer.vocab_size,
            dtype=compute_dtype(config.dtype),
            remat=config.remat,
            attention_implementation=config.attention,
            **changes,
        )
    except ValueError as error:
        raise RunError(f"{error}.") from None
    model = FAMILY.build(task.head, shaped)

    def draw() -> Any:
        return nn.unbox(jit_once(lambda key: init_params(model, key))(jax.random.key(config.seed)))

    if config.vectors is None:
        params = jax.device_get(draw())
    else:
        params = vectors_weights(config.vectors, draw, {"word": tokenizer.tokens}, whole=True).load()
    return Loaded(model, params, shaped, tokenizer)

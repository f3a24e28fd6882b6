"""Transformer-XL one token at a time: what its memory gives, for prompts of unlike lengths together."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.models.decoders.transformer_xl import TransformerXLConfig, TransformerXLModel
from bestiary.train.errors import RunError
from bestiary.train.generate.config import DecodeConfig
from bestiary.train.generate.generator import Generator

SIZES: dict[str, Any] = dict(
    vocab_size=23, cutoffs=(5, 11), tie_projections=(False, True, True), divisor=2, width=16, embedding_size=16,
    layers=2, heads=2, head_size=6, feed_forward=20, memory=4, dropout=0.0, eos_token_id=None,
)  # fmt: skip
PROMPTS = [[7], [3, 1, 22, 9, 9, 4, 2], [12, 5, 0]]
TEXT = np.array([[1, 8, 20, 3, 3], [6, 2, 11, 0, 17], [9, 9, 1, 4, 22]], np.int32)


@partial(jax.jit, static_argnums=0)
def read(model: Any, variables: Any, ids: jax.Array, memory: Any) -> Any:
    states, memory = model.apply(variables, ids, memory, method="read")
    return model.apply(variables, states, method="log_probabilities")[:, -1], memory


def by_memory(model: Any, variables: Any, prompt: list[int], text: Any) -> list[jax.Array]:
    """The log-probabilities after a prompt, whose tokens but the last are one segment, and after those of a text."""
    memory = model.empty_memory(1)
    if prompt[:-1]:
        _, memory = read(model, variables, jnp.array([prompt[:-1]]), memory)
    found = []
    for token in (prompt[-1], *text):
        scores, memory = read(model, variables, jnp.array([[token]]), memory)
        found.append(scores[0])
    return found


def test_steps_see_the_memory(random_params: Any) -> None:
    model = TransformerXLModel(TransformerXLConfig(**SIZES, same_length=True, clamp=2, untied_biases=False))
    params = random_params(model)
    steps = model.incremental()
    prepared = steps.prepare(params)
    longest = max(map(len, PROMPTS)) - 1
    ids, segments = np.zeros((3, longest), np.int32), np.zeros((3, longest), np.int32)
    for row, (*before, _) in enumerate(PROMPTS):
        ids[row, : len(before)], segments[row, : len(before)] = before, 1
    memory, cache = jax.jit(steps.start)(prepared, ids, segments), steps.cache(3, 8)
    step = jax.jit(steps.step)
    read_tokens = np.concatenate([[[prompt[-1]] for prompt in PROMPTS], TEXT], axis=1)
    found = []
    for age in range(TEXT.shape[1] + 1):
        at = jnp.full(3, age, jnp.int32)
        history = jnp.broadcast_to(jnp.arange(8) <= age, (3, 1, 8))
        scores, cache, _ = step(prepared, memory, cache, read_tokens[:, age : age + 1], at, at[:, None], history)
        found.append(scores[:, 0])
    for row, prompt in enumerate(PROMPTS):
        expected = by_memory(model, {"params": params}, prompt, TEXT[row].tolist())
        np.testing.assert_allclose([scores[row] for scores in found], expected, atol=2e-5)


def test_generated_together_as_alone(random_params: Any) -> None:
    model = TransformerXLModel(TransformerXLConfig(**SIZES))
    params = random_params(model)
    generate = Generator(model, params, DecodeConfig(max_length=6), rows=4)
    together = generate(PROMPTS)
    for prompt, (best,) in zip(PROMPTS, together, strict=True):
        tokens: list[int] = []
        for _ in range(6):
            *_, scores = by_memory(model, {"params": params}, prompt, tokens)
            tokens.append(int(scores.argmax()))
        assert best.tokens == tokens


def test_without_a_memory_nothing_is_generated(random_params: Any) -> None:
    model = TransformerXLModel(TransformerXLConfig(**{**SIZES, "memory": 0}))
    with pytest.raises(RunError, match="without a memory"):
        Generator(model, random_params(model), DecodeConfig(), rows=1)

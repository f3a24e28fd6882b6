"""What marks ELECTRA: two networks with one set of embeddings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary import models
from bestiary.models.checkpoints.config import ConfigError
from bestiary.models.encoders.electra import FAMILY, ElectraConfig, Logits, separate

CONFIG = ElectraConfig(
    vocab_size=61, width=16, layers=2, heads=2, feed_forward=24, positions=16, embedding_size=12,
    generator_fraction=0.5, initializer_range=0.2,
)  # fmt: skip
IDS = jax.random.randint(jax.random.key(1), (2, 7), 5, 61)
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
PLACES = jnp.array([[1, 4], [0, 3]])


@pytest.fixture(scope="module")
def pair(random_params: Any) -> Any:
    """(the model of both networks, its parameters)."""
    model = FAMILY.build("pretraining", CONFIG)
    return model, random_params(model)


def test_the_networks_of_a_pair_are_the_released_models(pair: Any) -> None:
    model, params = pair
    found: Logits = jax.jit(model.apply)({"params": params}, IDS, SEGMENTS, mlm_positions=PLACES)
    assert found.mlm_logits.shape == (2, 2, 61)
    discriminator, generator = separate(params)
    alone = jax.jit(FAMILY.build("discriminator", CONFIG).apply)({"params": discriminator}, IDS, SEGMENTS)
    np.testing.assert_allclose(found.replaced_logits, alone, atol=1e-6)
    masked = FAMILY.build("masked_lm", CONFIG.generator)
    alone = jax.jit(masked.apply)({"params": generator}, IDS, SEGMENTS, mlm_positions=PLACES)
    np.testing.assert_allclose(found.mlm_logits, alone, atol=1e-6)


def test_both_networks_train_the_embeddings(pair: Any) -> None:
    model, params = pair

    def gradient(method: str) -> Any:
        def total(params: Any) -> jax.Array:
            return jnp.sin(model.apply({"params": params}, IDS, method=method)).sum()

        return jax.jit(jax.grad(total))(params)

    for method, silent in (("generate", "discriminator"), ("discriminate", "generator")):
        found = gradient(method)
        embeddings = found["discriminator"]["encoder"].pop("embeddings")
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(embeddings))
        assert all(not leaf.any() for leaf in jax.tree.leaves(found[silent]))


def test_a_pair_and_its_networks_are_saved_and_loaded(pair: Any, tmp_path: Any) -> None:
    model, params = pair
    models.save(tmp_path / "pair", model, params)
    loaded = models.load(tmp_path / "pair")
    assert loaded.model == model
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    discriminator, generator = separate(params)
    models.save(tmp_path / "discriminator", FAMILY.build("discriminator", CONFIG), discriminator)
    models.save(tmp_path / "generator", FAMILY.build("masked_lm", CONFIG.generator), generator)
    found = models.load(tmp_path / "discriminator", head="pretraining").params
    jax.tree.map(np.testing.assert_array_equal, found["discriminator"], params["discriminator"])
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path / "generator").params, generator)


def test_the_generator_has_heads_of_64() -> None:
    sizes = {name: ElectraConfig.preset(name).generator for name in ("electra-small", "electra-base", "electra-large")}
    assert {name: (c.width, c.heads, c.feed_forward, c.layers) for name, c in sizes.items()} == {
        "electra-small": (64, 1, 256, 12),
        "electra-base": (256, 4, 1024, 12),
        "electra-large": (256, 4, 1024, 24),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator_hidden_size": 1.5}, "generator_hidden_size: expected a fraction .* found 1.5"),
        ({"summary_type": "mean"}, 'summary_type: only "first" is implemented, found "mean"'),
        ({"summary_use_proj": False}, "summary_use_proj: only true is implemented, found false"),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ElectraConfig.from_json(CONFIG.to_json() | changes)


def test_a_head_that_it_lacks_is_named(pair: Any, tmp_path: Any) -> None:
    models.save(tmp_path / "pair", *pair)
    with pytest.raises(ValueError, match=r"expected one of encoder, pretraining, discriminator, .* found 'nsp'"):
        models.load(tmp_path / "pair", head="nsp")

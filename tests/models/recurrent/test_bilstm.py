"""The LSTM tagger: examples of a packed row are read apart, and the mix of a frozen encoder's layers is trained."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary.models import registry
from bestiary.models.checkpoints.tables import flatten
from bestiary.models.recurrent.bilstm import FAMILY, BiLstmConfig

SIZES = dict(vocab_size=11, embedding_width=4, width=6, layers=2, features=(3, 5), num_labels=3)
CONFIG = BiLstmConfig(**SIZES, label_names=("O", "B-x", "I-x"))  # type: ignore[arg-type]


def test_an_example_in_a_packed_row_is_as_it_is_alone(random_params: Any) -> None:
    model = FAMILY.build("crf", CONFIG)
    params = random_params(model)
    draw = np.random.default_rng(1)
    ids = jnp.asarray(draw.integers(0, 11, (1, 9)), jnp.int32)
    features = jnp.asarray(draw.normal(size=(1, 9, 3, 5)), jnp.float32)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 0]])
    run = jax.jit(lambda *inputs: model.apply({"params": params}, inputs[0], inputs[1], None, inputs[2]))
    together = run(ids, segments, features)
    alone = run(ids[0, :8].reshape(2, 4), jnp.ones((2, 4), jnp.int32), features[0, :8].reshape(2, 4, 3, 5))
    np.testing.assert_allclose(together[0, :8].reshape(2, 4, 3), alone, atol=1e-6)
    planted = run(ids.at[0, 8].set(1), segments, features.at[0, 4:].set(1e6))
    np.testing.assert_array_equal(planted[0, :4], together[0, :4])
    assert np.abs(planted[0, 4:8] - together[0, 4:8]).min() > 0


def test_the_mix_starts_as_a_mean_and_is_trained(random_params: Any) -> None:
    model = FAMILY.build("tokens", CONFIG)
    params = random_params(model)
    mix = {"bias": jnp.zeros(3), "scale": jnp.ones(1)}
    features = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 3, 5)), jnp.float32)

    @jax.jit
    def total(mix: Any, features: Any) -> Any:
        own = {**params, "encoder": {**params["encoder"], "mix": mix}}
        return jnp.square(model.apply({"params": own}, jnp.zeros((1, 3), jnp.int32), None, None, features)).sum()

    mean = jnp.broadcast_to(features.mean(axis=2, keepdims=True), features.shape)
    np.testing.assert_allclose(total(mix, features), total(mix, mean), rtol=1e-5)
    gradient = jax.jit(jax.grad(total))(mix, features)
    assert float(jnp.abs(gradient["bias"]).min()) > 0
    assert float(jnp.abs(gradient["scale"][0])) > 0


def test_every_parameter_has_a_name_and_a_depth() -> None:
    for features in ((), (3, 5)):
        for architecture in FAMILY.architectures:
            model = architecture.build(BiLstmConfig(vocab_size=11, width=6, layers=2, features=features))
            shapes: Any = jax.eval_shape(lambda model=model: registry.init_params(model, jax.random.key(0)))
            leaves = {path: leaf.shape for path, leaf in flatten(nn.unbox(shapes))}
            table = {entry.path: entry.shape for entry in architecture.table(model.config).entries}
            assert leaves == table
            depths = FAMILY.depths(model)
            assert depths[("encoder", "layers", "forward_0", "input")] == 2
            assert depths[("encoder", "embeddings", "word")] == 0
            assert depths[("classifier",)] == 3
            assert ("encoder", "mix") in depths or not features


def test_what_the_config_says_must_be_in_the_batch() -> None:
    assert BiLstmConfig.from_json(json.loads(json.dumps(CONFIG.to_json()))) == CONFIG
    ids = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"features of \[3, 5\] in the config, None in the batch"):
        jax.eval_shape(FAMILY.build("tokens", CONFIG).init, jax.random.key(0), ids)
    for wrong in (dict(width=5), dict(features=(3,)), dict(remat=True), dict(num_labels=2, label_names=("a",))):
        with pytest.raises(ValueError, match="BiLstmConfig"):
            BiLstmConfig(**wrong)

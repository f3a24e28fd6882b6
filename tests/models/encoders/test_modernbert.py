"""What marks ModernBERT: windows, two kinds of rotary frequencies, and config files of two generations."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary.models.checkpoints.config import ConfigError
from bestiary.models.encoders.modernbert import FAMILY, ModernBertConfig
from bestiary.models.registry import init_params

CONFIG = ModernBertConfig(
    vocab_size=61, width=16, layers=3, heads=2, feed_forward=24, positions=64, local_attention=4, pad_token_id=0,
    initializer_range=0.2,
)  # fmt: skip
IDS = jax.random.randint(jax.random.key(1), (1, 9), 5, 61)


@pytest.mark.parametrize("window", [0, 2, 4, 5, 18])
def test_a_local_layer_sees_half_of_the_window_on_each_side(window: int, random_params: Any) -> None:
    config = dataclasses.replace(CONFIG, layers=1, global_layers=(), local_attention=window)
    model = FAMILY.build("encoder", config)
    params = random_params(model)

    def seen(params: Any, hidden: jax.Array) -> jax.Array:
        block, stack = model.bind({"params": params}).layers.unbind()
        layer = jax.tree.map(lambda leaf: leaf[0], stack)
        mode = dict(deterministic=True, **config.kinds[0])
        return block.apply(layer, hidden, None, jnp.zeros(1, jnp.uint32), None, **mode)

    hidden = jax.random.normal(jax.random.key(2), (1, 9, 16))
    reach = np.abs(np.asarray(jax.jit(jax.jacobian(seen, argnums=1))(params, hidden))).sum(axis=(0, 2, 3, 5)) > 0
    distance = np.abs(np.arange(9)[:, None] - np.arange(9)[None])
    np.testing.assert_array_equal(reach, distance <= window // 2)


def test_every_third_layer_of_the_released_models_sees_everything() -> None:
    base = ModernBertConfig.preset("modernbert-base")
    assert [i for i, kind in enumerate(base.kinds) if kind["window"] is None] == [0, 3, 6, 9, 12, 15, 18, 21]
    assert {(kind["window"], kind["theta"]) for kind in base.kinds} == {(None, 160_000.0), ((64, 64), 10_000.0)}
    ettin = ModernBertConfig.preset("ettin-encoder-17m")
    assert {(kind["window"], kind["theta"]) for kind in ettin.kinds} == {(None, 160_000.0), ((64, 64), 160_000.0)}


def test_only_the_first_layer_lacks_the_norm_before_its_attention() -> None:
    names = FAMILY.architectures[0].table(CONFIG).names
    norms = [name for name in names if "attn_norm" in name]
    assert norms == ["layers.1.attn_norm.weight", "layers.2.attn_norm.weight"]
    assert not [name for name in names if name.endswith("bias")]


def test_a_classifier_of_a_model_that_ends_with_a_window_reads_the_same_first_token(random_params: Any) -> None:
    """Such a layer computes every token, where others compute [CLS] alone."""
    model = FAMILY.build("encoder", CONFIG)
    assert CONFIG.kinds[-1]["window"] is not None
    params = random_params(model)
    whole = jax.jit(model.apply)({"params": params}, IDS)
    places = jnp.array([[0, 5]])
    alone = jax.jit(partial(model.apply, cls_only=True))({"params": params}, IDS, cls_positions=places)
    np.testing.assert_allclose(alone.first, whole.hidden[:, [0, 5]], atol=1e-6)
    assert alone.hidden.shape == (1, 2, 16)


def test_the_mean_is_over_an_example_of_a_packed_row(random_params: Any) -> None:
    config = dataclasses.replace(CONFIG, classifier_pooling="mean", global_every=2)
    model = FAMILY.build("classification", config)
    params = random_params(model)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    places = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]])
    run = partial(jax.jit(model.apply), {"params": params})
    packed = run(IDS, segments, places, cls_positions=jnp.array([[0, 4]]))
    alone = [run(IDS[:, part]) for part in (slice(0, 4), slice(4, 7))]
    np.testing.assert_allclose(packed[0], jnp.concatenate(alone), atol=1e-5)
    padded = run(IDS, (segments == 1).astype(jnp.int32))
    np.testing.assert_allclose(padded, alone[0], atol=1e-5)


def test_no_tensor_of_a_long_row_has_its_length_twice() -> None:
    """8,192 tokens, forward and backward: neither masks nor scores of all pairs."""
    length = 8192
    config = dataclasses.replace(CONFIG, positions=length, remat=True)
    model = FAMILY.build("masked_lm", config)
    params = jax.eval_shape(lambda: nn.unbox(init_params(model, jax.random.key(0))))

    def total(params: Any, ids: jax.Array) -> jax.Array:
        return model.apply({"params": params}, ids, jnp.ones_like(ids), mlm_positions=ids[:, :8]).sum()

    text = jax.jit(jax.grad(total)).lower(params, jax.ShapeDtypeStruct((1, length), jnp.int32)).as_text()
    assert f"x{length}x" in text
    assert f"{length}x{length}" not in text


# --- config.json ------------------------------------------------------------------------------------------------------

OLD = {key: value for key, value in CONFIG.to_json().items() if key not in ("layer_types", "rope_parameters")}
NEW = {
    key: value
    for key, value in CONFIG.to_json().items()
    if key not in ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta")
}


def test_both_generations_of_files_are_read_and_written() -> None:
    assert ModernBertConfig.from_json(OLD) == ModernBertConfig.from_json(NEW) == CONFIG
    written = CONFIG.to_json()
    assert written["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert written["rope_parameters"]["sliding_attention"] == {"rope_theta": 10_000.0, "rope_type": "default"}
    assert written["global_rope_theta"] == 160_000.0
    alike = ModernBertConfig.from_json(OLD | {"local_rope_theta": None})
    assert {kind["theta"] for kind in alike.kinds} == {160_000.0}
    listed = ModernBertConfig.from_json(
        NEW | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    )
    assert listed.global_layers == (1, 2)
    assert ModernBertConfig.from_json(listed.to_json()) == listed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_bias": True}, "norm_bias: only false is implemented, found true"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias: .*\n  mlp_bias: "),
        ({"decoder_bias": False}, "decoder_bias: only true is implemented"),
        ({"classifier_pooling": "max"}, 'classifier_pooling: expected "cls" or "mean", found "max"'),
        ({"layer_types": ["full_attention"]}, "layer_types: expected .* for each of 3 layers"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters: only a rope_theta"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters: only a rope_theta"),
        ({"rope_parameters": [1]}, "rope_parameters: only a rope_theta"),
        ({"local_attention": -1}, "local_attention: expected a number at least 0, found -1"),
        (
            {"global_attn_every_n_layers": 0},
            "global_attn_every_n_layers in config.json.: expected a number at least 1, found 0",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModernBertConfig.from_json(NEW | changes)

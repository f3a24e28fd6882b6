"""What every family of encoders must do, whichever it is; and what marks RoBERTa among them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary.models import registry
from bestiary.models.attention_maps import attention_maps
from bestiary.models.checkpoints.config import ConfigError
from bestiary.models.checkpoints.tables import flatten
from bestiary.models.encoder import StackEncoder
from bestiary.models.family import EncoderConfig, Family
from bestiary.models.heads.with_head import encoder_inputs, is_head_parameter
from bestiary.models.layers.attention import Attention
from bestiary.models.lora import linear_maps

ENCODERS = [family for family in registry.families() if "encoder" in family.heads and family.reads == "text"]
SIZES = dict(vocab_size=61, width=16, layers=3, heads=2, feed_forward=24, positions=16, num_labels=3)

# What is a family's own, in sizes that show it.
OWN: dict[str, dict[str, Any]] = {
    "albert": dict(embedding_size=8, groups=2),
    "electra": dict(embedding_size=8),
    "modernbert": dict(local_attention=2, global_every=2, pad_token_id=0),
    "openai-gpt": dict(feed_forward=64),
    "gpt3": dict(band_size=2),
    "gpt_neo": dict(window_size=2, bos_token_id=1, eos_token_id=1),
    "transfo-xl": dict(
        positions=512, cutoffs=(20,), tie_projections=(False, True), divisor=2, embedding_size=16, head_size=4, memory=3
    ),
}

families = pytest.mark.parametrize("family", ENCODERS, ids=lambda family: family.name)


def small(family: Family, **changes: Any) -> EncoderConfig:
    config = family.config(**{**SIZES, **OWN.get(family.name, {}), **changes})
    assert isinstance(config, EncoderConfig)
    return config


@pytest.mark.parametrize("name", ["albert", "bert", "gpt3", "modernbert"])  # sets of layers, windows, rotation
def test_attention_maps_are_the_weights_that_every_layer_averages_values_by(name: str, random_params: Any) -> None:
    family = registry.family_named(name)
    config = small(family)
    model = family.build("encoder", config)
    params = random_params(model)
    segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 0]])
    batch = {"input_ids": jax.random.randint(jax.random.key(1), (1, 9), 5, 61), "segment_ids": segments}
    seen: list[tuple[Any, ...]] = []
    outputs: list[jax.Array] = []  # of layers that are called by themselves

    def see(next_call: Any, args: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
        found = next_call(*args, **options)
        if isinstance(context.module, Attention) and context.method_name == "__call__":
            seen.append((context.module.value(args[0]), context.module.out.variables["params"], found))
        if context.module.path == () and not isinstance(context.module, StackEncoder):
            outputs.append(found)
        return found

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        with nn.intercept_methods(see):
            weights = attention_maps(model, params, batch)
        chosen = attention_maps(model, params, batch, layers=[-1, 0], heads=[1], queries=[3])
        every = model.apply({"params": params}, *encoder_inputs(config, batch), every_layer=True).every_hidden
        return weights, seen[-3:], chosen, outputs[-3:], every

    weights, layers, chosen, own, every = run(params, batch)
    for found, expected in zip(own[:2], every[1:3], strict=True):  # what follows the last layer may be a norm
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert weights.shape == (3, 1, 2, 9, 9)
    for of_layer, (value, out, found) in zip(weights, layers, strict=True):
        attended = jnp.einsum("bhls,bshd,hde->ble", of_layer, value, out["kernel"])
        attended += out.get("bias", jnp.zeros(16))[None, None]
        np.testing.assert_allclose(attended, found, atol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=-1), jnp.broadcast_to(segments[0] > 0, (3, 1, 2, 9)), atol=1e-5)
    np.testing.assert_allclose(chosen[:, :, 0, 0], weights[jnp.array([2, 0]), :, 1, 3], atol=1e-6)


def test_attention_of_another_form_has_no_maps(random_params: Any) -> None:
    config = small(registry.family_named("transfo-xl"))
    model = registry.family_named("transfo-xl").build("encoder", config)
    with pytest.raises(NotImplementedError, match="TransformerXL have attention of another form"):
        attention_maps(model, random_params(model), {"input_ids": jnp.ones((1, 4), jnp.int32)})


@families
def test_an_example_in_a_packed_row_is_as_it_is_alone(family: Family, random_params: Any) -> None:
    """Two examples and padding in one row: positions start anew, nothing crosses."""
    config = small(family)
    model = family.build("classification", config)
    params = random_params(model)
    ids = jax.random.randint(jax.random.key(1), (1, 9), 5, 61)
    packed = {
        "input_ids": ids.at[0, 8].set(config.pad_token_id or 0),
        "segment_ids": jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 0]]),
        "position_ids": jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 0]]),
        "token_type_ids": jnp.zeros((1, 9), jnp.int32),
    }
    run = jax.jit(lambda *inputs, **at: model.apply({"params": params}, *inputs, **at))
    together = run(*encoder_inputs(config, packed), cls_positions=jnp.array([[0, 4]]))
    alone = run(*encoder_inputs(config, {"input_ids": ids[0, :8].reshape(2, 4)}))
    np.testing.assert_allclose(together[0], alone, atol=1e-5)


@families
def test_every_parameter_has_a_name_a_depth_and_a_part(family: Family) -> None:
    for architecture in family.architectures:
        model = architecture.build(small(family))
        params = jax.eval_shape(lambda model=model: nn.unbox(registry.init_params(model, jax.random.key(0))))
        leaves = {path: leaf.shape for path, leaf in flatten(params)}
        assert leaves == {entry.path: entry.shape for entry in architecture.table(model.config).entries}
        assert registry.family_of_model(model) == (family, architecture)
        depths = family.depths(model)
        for path in leaves:
            depth = depths[path[:-1]]
            part = path[path.index("encoder") + 1] if "encoder" in path else path[0]
            if part == "layers":
                assert depth.tolist() == ([2, 3] if family.name == "albert" else [1, 2, 3])
            elif "layers" in path:
                assert family.name == "electra"  # its generator
            elif part in family.below:
                assert depth == 0
            elif part in family.above:
                assert depth == 3
            else:
                assert depth == 4
                assert not family.is_encoder_parameter(path)
                assert "pooler" in path or is_head_parameter(path)


@families
def test_a_config_survives_json(family: Family) -> None:
    config = small(family, dropout=0.25, problem_type="regression", label_names=("a", "b", "c"))
    assert type(config).from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="add_cross_attention"):
        type(config).from_json(config.to_json() | {"add_cross_attention": True})
    with pytest.raises(ConfigError, match="not a multiple of heads"):
        type(config).from_json(config.to_json() | {config.KEYS["heads"]: 3})


@families
def test_a_row_that_is_too_long_is_refused(family: Family) -> None:
    config = small(family)
    if config.max_length is None:
        assert family.name == "transfo-xl"  # which has distances, and no positions
        return
    model = family.build("encoder", config)
    for length, fits in ((config.max_length, True), (config.max_length + 1, False)):
        ids = jnp.ones((1, length), jnp.int32)
        if fits:
            jax.eval_shape(model.init, jax.random.key(0), ids)
        else:
            with pytest.raises(ValueError, match=f"the model has {config.max_length} positions"):
                jax.eval_shape(model.init, jax.random.key(0), ids)


@families
def test_every_linear_map_is_seen_by_adapters(family: Family) -> None:
    names = {target.path[-1] for target in linear_maps(family.build("classification", small(family)))}
    assert {"query", "key", "value", "out", "inner", "outer", "classifier"} <= names


def test_a_preset_is_of_one_family() -> None:
    found = registry.presets()
    assert {"bert-base", "roberta-base", "transformer-base"} <= set(found)
    assert len(found) == sum(len(family.config.PRESETS) for family in registry.families())
    assert all(name in family.config.PRESETS for name, family in found.items())


def test_a_family_is_found_by_the_type_of_a_config() -> None:
    for family in registry.families():
        assert registry.family_of(family.config()) is family
    with pytest.raises(TypeError, match="not a model of a family"):
        registry.family_of_model(nn.Dense(2))


def test_a_variant_is_found_by_the_models_that_only_it_has() -> None:
    for stored, variants in registry.VARIANTS.items():
        for name in variants:
            family = registry.family_named(name)
            assert family.config().to_json()["model_type"] == family.config.STORED_TYPE == stored
            base = registry.family_named(stored)
            shared = {architecture.name for architecture in base.architectures}
            (own,) = {architecture.name for architecture in family.architectures} - shared
            assert registry.stored_family(stored, [own]) is family
            assert registry.stored_family(stored, shared) is base


# --- RoBERTa ----------------------------------------------------------------------------------------------------------


def test_roberta_takes_two_tokens_less_than_it_has_positions(random_params: Any) -> None:
    family = registry.family_named("roberta")
    config = family.config.preset("roberta-base")
    assert config.max_length == 512
    model = family.build("encoder", small(family, token_types=1))
    params = random_params(model)
    ids = jax.random.randint(jax.random.key(1), (2, 6), 5, 61)
    run = jax.jit(lambda params, *positions: model.apply({"params": params}, ids, None, *positions).hidden)
    np.testing.assert_array_equal(run(params), run(params, jnp.arange(6)[None]))
    used = jax.jit(jax.grad(lambda params: run(params).sum()))(params)["embeddings"]["position"]
    assert np.flatnonzero(np.abs(used["embedding"]).sum(axis=1)).tolist() == [2, 3, 4, 5, 6, 7]


def test_roberta_with_one_sentence_kind_refuses_token_types() -> None:
    """They would be read outside of the table, and give NaN."""
    family = registry.family_named("roberta")
    config = small(family, token_types=1)
    ids = jnp.ones((1, 4), jnp.int32)
    assert len(encoder_inputs(config, {"input_ids": ids, "token_type_ids": ids})) == 3
    with pytest.raises(ValueError, match="only one token type"):
        jax.eval_shape(lambda: family.build("encoder", config).init(jax.random.key(0), ids, None, None, ids))

"""Adapters: what they add, what merging gives, which maps they sit on, and peft's files."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bestiary import models
from bestiary.data import DataError
from bestiary.models import lora
from bestiary.models.checkpoints.peft import load_lora, save_lora
from bestiary.models.checkpoints.tables import CheckpointError, flatten
from bestiary.models.encoder_decoders.transformer import Transformer, TransformerConfig
from bestiary.models.encoders.bert import FAMILY, BertConfig
from bestiary.models.layers.linear import Linear
from bestiary.models.lora import (
    LoraConfig,
    LoraError,
    adapted,
    add_lora,
    lora_targets,
    merge_lora,
    unmerge_lora,
)

FIXTURES = Path(__file__).parent / "fixtures"
SIZES: Any = dict(vocab_size=23, width=8, layers=3, heads=2, feed_forward=12, positions=16, num_labels=3)
IDS = jnp.asarray(np.random.default_rng(0).integers(1, 23, (4, 6)), jnp.int32)
SOME = ("query", "value", "feed-forward")
QUERY = ("encoder", "layers", "attention", "query")


@lru_cache
def make(scan: bool = True) -> tuple[Any, Any]:
    """A tiny model and parameters for it."""
    model = FAMILY.build("classification", BertConfig(**SIZES, scan_layers=scan))
    return model, drawn(model)


def drawn(model: Any) -> Any:
    """Parameters, drawn without compiling anything."""
    random = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        return np.float32(random.normal(size=leaf.shape) * 0.4 + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(
        draw, nn.unbox(jax.eval_shape(model.init, jax.random.key(0), IDS))["params"]
    )


@lru_cache
def compiled(model: Any, config: LoraConfig | None) -> Any:
    """(params, *inputs, **more) -> the model's outputs, adapted if there is a configuration."""

    def run(params: Any, *inputs: Any, **more: Any) -> Any:
        with nullcontext() if config is None else adapted(config):
            return model.apply({"params": params}, *inputs, **more)

    return jax.jit(run)


def trained(params: Any, seed: int = 1) -> Any:
    """The tree with every B newly drawn, as if it had been trained; what is zero in A stays so in B."""
    random = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Any:
        return jnp.asarray(random.normal(size=leaf.shape) * 0.3, jnp.float32) if path[-1].key == "lora_b" else leaf

    return jax.tree_util.tree_map_with_path(draw, params)


def equal(first: Any, second: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


# --- what adapters add ------------------------------------------------------------------------------------------------


def test_new_adapters_change_nothing():
    model, params = make()
    config = LoraConfig(rank=3)
    extended = add_lora(params, lora_targets(model, SOME), config, jax.random.key(1))
    np.testing.assert_array_equal(compiled(model, config)(extended, IDS), compiled(model, None)(params, IDS))
    kept = {path: leaf for path, leaf in flatten(extended) if not lora.is_lora(path)}
    assert all(kept[path] is leaf for path, leaf in flatten(params))
    assert len(dict(flatten(extended))) == len(kept) + 8  # four maps, two matrices each


def test_an_adapter_adds_its_product():
    """y = x·W + b + (alpha / rank)·x·A·B, by hand, on a map whose inputs and outputs have several axes."""
    model, params = make()
    config = LoraConfig(rank=2, alpha=6.0)
    params = trained(add_lora(params, lora_targets(model, ("output",)), config, jax.random.key(1)))
    out = params["encoder"]["layers"]["attention"]["out"]
    assert (out["lora_a"].shape, out["lora_b"].shape) == ((3, 2, 4, 2), (3, 2, 8))
    product = np.einsum("nhdr,nre->nhde", *(np.float64(out[name]) for name in ("lora_a", "lora_b")))
    merged, _ = merge_lora(params, config)
    expected = np.float32(np.float64(out["kernel"]) + 3 * product)
    np.testing.assert_array_equal(merged["encoder"]["layers"]["attention"]["out"]["kernel"], expected)


@pytest.mark.parametrize("scan", [True, False])
def test_the_merged_model_is_the_adapted_one(scan: bool):
    model, base = make(scan)
    config = LoraConfig(rank=3)
    targets = lora_targets(model, SOME)
    params = trained(add_lora(base, targets, config, jax.random.key(1)))
    merged, _ = merge_lora(params, config)
    assert not any(lora.is_lora(path) for path, _ in flatten(merged))
    found, plain = compiled(model, config)(params, IDS), compiled(model, None)(merged, IDS)
    np.testing.assert_allclose(found, plain, atol=1e-5)
    assert np.abs(found - compiled(model, None)(base, IDS)).max() > 1e-2


def test_a_translator_is_adapted_on_both_sides():
    changes: Any = dict(width=8, feed_forward=12, heads=2, layers=2, vocab_size=23, positions=16)
    sizes = {
        name: changes[name.removeprefix("encoder_").removeprefix("decoder_")]
        for name in TransformerConfig.__dataclass_fields__
        if name.removeprefix("encoder_").removeprefix("decoder_") in changes
    }
    model = Transformer(TransformerConfig(**sizes, pad_token_id=0))
    base = drawn(model)
    config = LoraConfig(rank=2)
    targets = lora_targets(model, ("query",))
    assert {target.path[0] for target in targets} == {"encoder", "decoder"}
    params = trained(add_lora(base, targets, config, jax.random.key(1)))
    inputs = IDS, jnp.ones_like(IDS), None, IDS, jnp.ones_like(IDS)
    found = compiled(model, config)(params, *inputs)
    np.testing.assert_allclose(found, compiled(model, None)(merge_lora(params, config)[0], *inputs), atol=1e-4)
    assert np.abs(found - compiled(model, None)(base, *inputs)).max() > 1e-2


def test_unmerging_gives_back_the_same_bits():
    model, params = make()
    config = LoraConfig(rank=2, alpha=7.3)
    params = trained(add_lora(params, lora_targets(model, ("all-linear",)), config, jax.random.key(1)))
    merged, kept = merge_lora(params, config)
    before = dict(flatten(params))[(*QUERY, "kernel")]
    assert np.abs(merged["encoder"]["layers"]["attention"]["query"]["kernel"] - before).max() > 1e-3
    equal(unmerge_lora(merged, kept), params)


def test_layers_that_were_not_chosen_stay_as_they_are():
    model, params = make()
    config = LoraConfig(rank=2)
    targets = lora_targets(model, (r".*layer\.[02]\..*query",))
    assert [target.chosen for target in targets] == [(True, False, True)]
    params = add_lora(params, targets, config, jax.random.key(1))

    def loss(params: Any) -> jax.Array:
        with adapted(config):
            return jnp.square(model.apply({"params": params}, IDS)).sum()

    query = jax.jit(jax.grad(loss))(params)["encoder"]["layers"]["attention"]["query"]
    moving = [bool(np.any(query["lora_b"][layer])) for layer in range(3)]
    assert moving == [True, False, True]
    assert not np.any(query["lora_a"][1])  # and B is zero there, so neither will ever move


def test_the_adapters_are_divided_as_their_maps():
    model, _ = make()
    targets = lora_targets(model, ("query", "output"))

    def extended() -> Any:
        return add_lora(model.init(jax.random.key(0), IDS)["params"], targets, LoraConfig(rank=2), jax.random.key(1))

    attention = jax.eval_shape(extended)["encoder"]["layers"]["attention"]
    assert attention["query"]["lora_a"].names == ("layers", "embed", None)
    assert attention["query"]["lora_b"].names == ("layers", None, "heads", "head_dim")
    assert attention["out"]["lora_a"].names == ("layers", "heads", "head_dim", None)
    assert attention["out"]["lora_b"].names == ("layers", None, "embed")


# --- dropout ----------------------------------------------------------------------------------------------------------


class OneMap(nn.Module):
    """A linear map, and whether something is dropped."""

    @nn.compact
    def __call__(self, inputs: Any, rows: Any, *, deterministic: bool) -> Any:
        return Linear((6,), ("embed", "mlp"), nn.initializers.zeros_init(), name="map")(inputs)


def test_dropout_is_on_the_adapters_inputs_alone():
    """With W = 1, A = 1 and B = 1 the outputs show which inputs the adapter saw."""
    config = LoraConfig(rank=6, alpha=12.0, dropout=0.25)  # a scale of 2
    one = jnp.eye(6)
    params = {"params": {"map": {"kernel": one, "bias": jnp.zeros(6), "lora_a": one, "lora_b": one}}}
    inputs = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (500, 6)), jnp.float32)
    rows = jnp.arange(500, dtype=jnp.uint32)

    def run(inputs: Any, rows: Any, seed: int = 0, **mode: Any) -> Any:
        with adapted(config):
            return OneMap().apply(params, inputs, rows, rngs={"dropout": jax.random.key(seed)}, **mode)

    np.testing.assert_allclose(run(inputs, rows, deterministic=True), inputs + 2 * inputs, rtol=1e-6)
    dropped = run(inputs, rows, deterministic=False)
    seen = np.asarray(dropped - inputs) > 1e-3
    np.testing.assert_allclose(dropped, inputs + np.where(seen, 2 * inputs / 0.75, 0), rtol=1e-5)
    assert 0.7 < seen.mean() < 0.8
    assert np.any(run(inputs, rows, seed=1, deterministic=False) != dropped)
    # What is dropped in a row depends on its number, not on the rows beside it.
    np.testing.assert_array_equal(run(inputs[300:], rows[300:], deterministic=False), dropped[300:])


def test_a_models_layers_drop_their_adapters_inputs():
    """The model's own dropout is off, but `deterministic` and the rows' numbers reach the adapters in its layers."""
    config = LoraConfig(rank=2, dropout=0.5)
    model, params = make()
    model = model.clone(config=replace(model.config, dropout=0.0, attention_dropout=0.0))
    params = trained(add_lora(params, lora_targets(model, ("query", "feed-forward")), config, jax.random.key(1)))

    @jax.jit
    def run(seed: Any, rows: Any) -> Any:
        with adapted(config):
            key = {"dropout": jax.random.key(seed)}
            return model.apply({"params": params}, IDS, rows=rows, deterministic=False, rngs=key)

    rows = jnp.arange(4, dtype=jnp.uint32)
    dropped = run(0, rows)
    assert np.all(np.abs(dropped - run(1, rows)).max(axis=-1) > 1e-3)
    other = np.abs(dropped - run(0, rows.at[1].set(9))).max(axis=-1)
    np.testing.assert_array_equal(other > 1e-3, [False, True, False, False])


# --- which maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "paths"),
    [
        (("query", "value"), {"attention.query", "attention.value"}),
        (("output",), {"attention.out"}),
        (("attention",), {"attention.query", "attention.key", "attention.value", "attention.out"}),
        (("feed-forward",), {"feed_forward.inner", "feed_forward.outer"}),
        (("inner",), {"feed_forward.inner"}),
        (("attention.output.dense",), {"attention.out"}),
        (("output.dense",), {"attention.out", "feed_forward.outer"}),  # as peft compares names
        ((r".*self\.(key|value)",), {"attention.key", "attention.value"}),
        (("all-linear",), {"attention.query", "attention.key", "attention.value", "attention.out"}
         | {"feed_forward.inner", "feed_forward.outer"}),
    ],
)  # fmt: skip
def test_targets_by_name_ending_and_expression(patterns: tuple[str, ...], paths: set[str]):
    targets = lora_targets(make()[0], patterns)
    assert {".".join(target.path).removeprefix("encoder.layers.") for target in targets} == paths
    assert all(target.chosen == (True, True, True) for target in targets)


@pytest.mark.parametrize("pattern", ["quary", "pooler", "classifier", "embeddings", "layer.0"])
def test_a_target_that_names_nothing_is_told_what_there_is(pattern: str):
    listed = r"(?s)encoder\.layers\.feed_forward\.inner .*layer\.\{layer\}\.intermediate"
    with pytest.raises(LoraError, match=listed) as told:
        lora_targets(make()[0], ("query", pattern))
    assert repr(pattern) in str(told.value)


def test_a_broken_expression_is_named():
    with pytest.raises(LoraError, match=r"'\[' is no name and no regular expression"):
        lora_targets(make()[0], ("[",))


@pytest.mark.parametrize(("settings", "said"), [({"rank": 0}, "rank is 0"), ({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout")])  # fmt: skip  # noqa: E501
def test_settings_out_of_range_are_refused(settings: Any, said: str):
    with pytest.raises(LoraError, match=said):
        LoraConfig(**settings)


# --- peft's files -----------------------------------------------------------------------------------------------------


def test_adapters_that_peft_wrote_give_its_outputs():
    loaded = models.load(FIXTURES / "bert_classification")
    params, config = load_lora(FIXTURES / "peft_lora", loaded.model, loaded.params)
    assert (config.rank, config.alpha, config.dropout) == (3, 6.0, 0.1)
    expected = load_file(FIXTURES / "peft_lora" / "expected.safetensors")
    given = jnp.asarray(expected["input_ids"]), jnp.asarray(expected["segment_ids"])
    np.testing.assert_allclose(compiled(loaded.model, config)(params, *given), expected["logits"], atol=1e-5)


def test_adapters_are_saved_as_peft_names_them(tmp_path: Path):
    model, params = make()
    config = LoraConfig(rank=2, alpha=4.0, dropout=0.25)
    params = trained(add_lora(params, lora_targets(model, ("query", "output")), config, jax.random.key(1)))
    save_lora(tmp_path, model, params, config, base="the-base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    encoder = "base_model.model.bert.encoder.layer."
    names = {
        f"{encoder}{layer}.attention.{part}.lora_{half}.weight"
        for layer in range(3)
        for part in ("self.query", "output.dense")
        for half in "AB"
    }
    head = {f"base_model.model.{part}.{kind}" for part in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}  # fmt: skip  # noqa: E501
    assert set(tensors) == names | head
    query = params["encoder"]["layers"]["attention"]["query"]
    found = tensors[f"{encoder}1.attention.self.query.lora_A.weight"]
    np.testing.assert_array_equal(found, query["lora_a"][1].T)
    found = tensors[f"{encoder}1.attention.self.query.lora_B.weight"]
    np.testing.assert_array_equal(found, query["lora_b"][1].reshape(2, 8).T)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["target_modules"] == ["attention.output.dense", "attention.self.query"]
    assert stored["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    wanted = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.25,
        "bias": "none",
    }
    assert stored.items() >= (wanted | {"base_model_name_or_path": "the-base", "use_rslora": False}).items()


@pytest.mark.parametrize(
    "patterns", [("query",), ("feed-forward",), ("all-linear",), (r".*layer\.[02]\.output\.dense", "key")]
)
def test_the_modules_that_a_file_names_are_just_the_adapted_ones(tmp_path: Path, patterns: tuple[str, ...]):
    """peft takes a module whose name is, or ends with a dot and, an entry of target_modules."""
    model, params = make()
    config = LoraConfig(rank=2)
    save_lora(tmp_path, model, trained_where_chosen(model, params, patterns, config), config)
    entries = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    modules = [f"bert.encoder.layer.{layer}.{part}" for layer in range(3) for part in PARTS]
    modules += ["bert.pooler.dense", "classifier", "bert.embeddings.word_embeddings"]
    taken = {name for name in modules if any(name == entry or name.endswith(f".{entry}") for entry in entries)}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert taken == {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in tensors if ".lora_" in n}


PARTS = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    "attention.output.dense", "intermediate.dense", "output.dense", "attention.output.LayerNorm", "output.LayerNorm",
)  # fmt: skip


def trained_where_chosen(model: Any, params: Any, patterns: tuple[str, ...], config: LoraConfig) -> Any:
    """As after training, where the layers that were not chosen have stayed zero."""
    targets = lora_targets(model, patterns)
    params = trained(add_lora(params, targets, config, jax.random.key(1)))
    for target in targets:
        branch = params
        for name in target.path:
            branch = branch[name]
        chosen = np.array(target.chosen, np.float32)
        branch["lora_b"] = branch["lora_b"] * chosen.reshape(-1, *[1] * (branch["lora_b"].ndim - 1))
    return params


@pytest.mark.parametrize("patterns", [("query", "feed-forward"), (r".*layer\.[02]\..*dense",)])
def test_written_and_read_again_is_the_same(tmp_path: Path, patterns: tuple[str, ...]):
    model, params = make()
    config = LoraConfig(rank=2, alpha=5.5, dropout=0.1)
    extended = trained_where_chosen(model, params, patterns, config)
    extended["classifier"] = jax.tree.map(lambda leaf: leaf + 1, extended["classifier"])
    save_lora(tmp_path, model, extended, config)
    found, found_config = load_lora(tmp_path, model, params)
    assert found_config == config
    assert dict(flatten(found)).keys() == dict(flatten(extended)).keys()
    equal(found, extended)


def adapter(tmp_path: Path, *, drop: str = "", config: Any = None, **more: np.ndarray) -> Path:
    """peft's fixture, with tensors left out or added and its settings changed."""
    tensors = load_file(FIXTURES / "peft_lora" / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in (tensors | more).items() if not (drop and drop in name)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    stored = json.loads((FIXTURES / "peft_lora" / "adapter_config.json").read_text()) | (config or {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    return tmp_path


BASE = "base_model.model."
LAYER_1 = f"{BASE}bert.encoder.layer.1."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": {"use_dora": True}}, "use_dora: only false is implemented, found true"),
        ({"config": {"use_qalora": True, "bias": "all"}}, r"(?s)bias: only \"none\".*use_qalora"),
        ({"config": {"rank_pattern": {"query": 4}}}, r"query\.lora_A\.weight: expected shape \[4, 16\], found"),
        ({"config": {"rank_pattern": {"query": 0}}}, "the rank is 0"),
        ({"config": {"alpha_pattern": {"(": 2}}}, "unterminated subpattern"),
        ({"config": {"alpha_pattern": {"query": "2"}}}, "alpha_pattern: expected a JSON object, each value a number"),
        ({"config": {"use_rslora": 1}}, "use_rslora: expected true or false"),
        ({f"{BASE}classifier.bias": np.array([0, np.nan, 0], np.float32)}, r"classifier\.bias: NaN or infinite"),
        ({f"{BASE}classifier.bias": np.zeros(3, np.int32)}, r"classifier\.bias: I32"),
        ({"config": {"peft_type": "IA3"}}, 'peft_type: only "LORA"'),
        ({"config": {"r": 5}}, r"query\.lora_A\.weight: expected shape \[5, 16\], found \[3, 16\]"),
        ({"config": {"r": "x"}}, "r: expected a whole number, found \"x\""),
        ({"drop": "layer.1.attention.self.query.lora_B"}, r"layer\.1\.attention\.self\.query\.lora_B\.weight: .*none"),
        ({f"{BASE}score.weight": np.zeros((3, 16), np.float32)}, r"score\.weight: no parameter of this model"),
        ({f"{BASE}bert.encoder.layer.7.output.dense.lora_A.weight": np.zeros((3, 16), np.float32)}, "layer.7"),
        ({f"{BASE}classifier.weight": np.zeros((5, 16), np.float32)}, r"classifier\.weight: expected shape \[3, 16\]"),
        ({f"{LAYER_1}output.dense.lora_magnitude_vector": np.zeros(16, np.float32)}, "lora_magnitude_vector"),
        ({f"{LAYER_1}output.dense.weight": np.zeros((16, 24), np.float32)}, "saved whole"),
        ({f"{LAYER_1}output.LayerNorm.lora_A.weight": np.zeros((3, 16), np.float32)}, "no linear map"),
    ],
)  # fmt: skip
def test_files_of_something_else_are_refused(tmp_path: Path, changes: Any, said: str):
    loaded = models.load(FIXTURES / "bert_classification")
    with pytest.raises((CheckpointError, DataError), match=said):
        load_lora(adapter(tmp_path, **changes), loaded.model, loaded.params)


def test_layers_without_an_adapter_are_left_alone(tmp_path: Path):
    """peft's layers_to_transform leaves layers out."""
    loaded = models.load(FIXTURES / "bert_classification")
    params, _ = load_lora(adapter(tmp_path, drop="layer.1."), loaded.model, loaded.params)
    query = params["encoder"]["layers"]["attention"]["query"]
    assert [bool(query["lora_a"][layer].any()) for layer in range(3)] == [True, False, True]


def test_missing_files_and_pickles_are_named(tmp_path: Path):
    loaded = models.load(FIXTURES / "bert_classification")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_lora(tmp_path, loaded.model, loaded.params)
    shutil.copy(FIXTURES / "peft_lora" / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(FileNotFoundError, match="a pickle, which is refused"):
        load_lora(tmp_path, loaded.model, loaded.params)
    with pytest.raises(LoraError, match="no adapters to save"):
        save_lora(tmp_path, loaded.model, loaded.params, LoraConfig())

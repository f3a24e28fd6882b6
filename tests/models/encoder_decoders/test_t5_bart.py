"""T5 and BART: sizes, packing, forms, what a checkpoint says of its head, one token at a time, and the reference."""

import dataclasses
import json
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bestiary import models
from bestiary.models.checkpoints.config import ConfigError
from bestiary.models.checkpoints.parity import check
from bestiary.models.checkpoints.tables import CheckpointError
from bestiary.models.encoder_decoders.bart import FAMILY as BART
from bestiary.models.encoder_decoders.bart import Bart, BartConfig
from bestiary.models.encoder_decoders.t5 import FAMILY as T5_FAMILY
from bestiary.models.encoder_decoders.t5 import T5, MT5Config, T5Config
from bestiary.models.heads import losses
from bestiary.models.layers.dropout import Dropout
from bestiary.models.registry import init_params, presets
from bestiary.train.commands.parity import describe
from bestiary.train.generate.released import reference_generate
from bestiary.train.optim.optimizer import reference_optimizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
SOURCE = jax.random.randint(jax.random.key(1), (3, 9), 3, 37)
TARGET = jax.random.randint(jax.random.key(2), (3, 7), 3, 37)
SMALL: dict[str, Any] = {
    "t5": T5(T5Config(
        vocab_size=37, width=16, encoder_layers=2, decoder_layers=3, heads=2, head_size=6, feed_forward=24, buckets=6,
        max_distance=4,
    )),
    "t5-v1_1": T5(T5Config(
        vocab_size=37, width=16, encoder_layers=3, decoder_layers=2, heads=4, head_size=4, feed_forward=24,
        projection="gated-gelu", tied=False, scale_outputs=False,
    )),
    "bart": Bart(BartConfig(
        vocab_size=37, width=16, encoder_layers=2, decoder_layers=2, encoder_heads=2, decoder_heads=4,
        encoder_feed_forward=24, decoder_feed_forward=20, positions=16,
    )),
}  # fmt: skip
each = pytest.mark.parametrize("name", SMALL)


def drawn(model: Any) -> Any:
    """Parameters with nothing at zero or one that could hide a mistake."""
    draw = np.random.default_rng(0).normal
    shapes = nn.unbox(jax.eval_shape(partial(init_params, model), jax.random.key(0)))
    return jax.tree.map(lambda leaf: draw(scale=0.3, size=leaf.shape).astype(np.float32), shapes)


@cache
def params(name: str) -> Any:
    return drawn(SMALL[name])


def run(name: str, *arguments: Any, model: Any = None, **named: Any) -> Any:
    apply = partial((model or SMALL[name]).apply, **named)
    return jax.jit(apply)({"params": params(name)}, *arguments)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        # As the released safetensors files count them; BART's without the constants of the logits.
        ("t5-small", 60_506_624),
        ("t5-base", 222_903_552),
        ("t5-large", 737_668_096),
        ("t5-3b", 2_851_598_336),
        ("t5-11b", 11_307_321_344),
        ("t5-v1_1-small", 76_961_152),
        ("t5-v1_1-base", 247_577_856),
        ("t5-v1_1-large", 783_150_080),
        ("t5-v1_1-xl", 2_849_757_184),
        ("t5-v1_1-xxl", 11_135_332_352),
        ("mt5-small", 300_176_768),
        ("mt5-base", 582_401_280),
        ("mt5-large", 1_229_581_312),
        ("mt5-xl", 3_742_619_648),
        ("mt5-xxl", 12_921_057_280),
        ("bart-base", 139_420_416),
        ("bart-large", 406_291_456),
    ],
)
def test_sizes(preset: str, parameters: int) -> None:
    family = presets()[preset]
    model = family.build("generation", family.config.preset(preset))
    tree = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    constants = tree.pop("final_logits_bias", None)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters
    assert (constants is not None) == preset.startswith("bart")


@each
def test_packed_pairs_are_as_each_alone(name: str) -> None:
    def pack(size: int, total: int) -> tuple[jax.Array, jax.Array]:
        segments = np.concatenate([np.repeat([1, 2], size), np.zeros(total - 2 * size)])
        return jnp.asarray(segments[None], jnp.int32), jnp.arange(total)[None] % size

    packed = run(name, SOURCE[:1], *pack(4, 9), TARGET[:1], *pack(3, 7))
    alone = run(name, SOURCE[:1, :8].reshape(2, 4), None, None, TARGET[:1, :6].reshape(2, 3))
    np.testing.assert_allclose(packed[0, :6].reshape(2, 3, -1), alone, atol=1e-5)


@each
def test_the_stack_is_the_same_in_all_forms(name: str) -> None:
    named: dict[str, Any] = {"deterministic": False, "rngs": {"dropout": jax.random.key(3)}}
    unrolled = SMALL[name].clone(config=dataclasses.replace(SMALL[name].config, scan_layers=False))
    found = [run(name, SOURCE, None, None, TARGET, model=model, **named) for model in (SMALL[name], unrolled)]
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


@each
def test_one_token_at_a_time(name: str) -> None:
    """Steps with a cache give the logits of the whole sequence, wherever in it the tokens of a beam are."""
    mask = (jnp.arange(9)[None] < jnp.array([9, 6, 1])[:, None]).astype(jnp.int32)
    steps = SMALL[name].incremental()
    slots = np.arange(14)

    @jax.jit
    def decode(prepared: Any) -> Any:
        memory = steps.start(prepared, SOURCE, mask)

        def step(cache: Any, i: Any) -> Any:
            tokens = jnp.stack([TARGET[:, i], TARGET[:, i] - 1], axis=1)
            # From the last slot down: a token's place says nothing of its position.
            places = jnp.broadcast_to(13 - 2 * i - jnp.arange(2), (3, 2))
            seen = jnp.stack([((13 - slots) % 2 == beam) & ((13 - slots) // 2 <= i) for beam in range(2)])
            seen = jnp.broadcast_to(seen, (3, 2, 14))
            logits, cache, _ = steps.step(prepared, memory, cache, tokens, jnp.full(3, i), places, seen)
            return cache, logits

        return jax.lax.scan(step, steps.cache(3, 14), jnp.arange(7))[1]

    logits = decode(steps.prepare(params(name)))
    whole = run(name, SOURCE, mask, None, TARGET)
    np.testing.assert_allclose(jnp.swapaxes(logits[:, :, 0], 0, 1), whole, atol=2e-5)
    assert np.abs(jnp.swapaxes(logits[:, :, 1], 0, 1) - whole).max() > 1e-2


def test_the_loss_is_that_of_the_logits_and_of_their_normaliser() -> None:
    name, labels = "t5-v1_1", jnp.where(TARGET % 5 == 0, losses.IGNORED_LABEL, TARGET)
    weights = (labels != losses.IGNORED_LABEL).astype(jnp.float32)

    def by_chunks(tree: Any) -> Any:
        apply = partial(SMALL[name].apply, {"params": tree})
        states = apply(SOURCE, None, None, TARGET, None, None, method="output_states")
        return apply([states], labels, z_loss=0.1, method="loss").loss

    def by_definition(tree: Any) -> Any:
        logits: Any = SMALL[name].apply({"params": tree}, SOURCE, None, None, TARGET)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return ((normaliser - chosen + 0.1 * normaliser**2) * weights).sum()

    found, expected = (jax.jit(jax.value_and_grad(f))(params(name)) for f in (by_chunks, by_definition))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), found, expected)


def test_dropout_can_be_shared_along_the_length() -> None:
    shared = SMALL["t5"].clone(config=dataclasses.replace(SMALL["t5"].config, shared_dropout=True))
    masks: list[np.ndarray] = []

    def record(call: Any, arguments: Any, named: Any, context: Any) -> Any:
        result = call(*arguments, **named)
        if isinstance(context.module, Dropout):
            jax.debug.callback(lambda x: masks.append(np.asarray(x) == 0), result)
        return result

    with nn.intercept_methods(record):
        named: dict[str, Any] = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
        jax.block_until_ready(run("t5", SOURCE, None, None, TARGET, model=shared, **named))
    jax.effects_barrier()
    assert len(masks) == (1 + 2 * 3 + 1) + (1 + 3 * 4 + 1)
    for mask in masks:
        if mask.shape[-1] == 16:  # not those of ReLU's outputs, which are often zero by themselves
            assert (mask == mask.all(axis=1, keepdims=True)).all()
    assert any(mask.all(axis=1).any() for mask in masks)


def test_a_text_is_read_twice_and_represented_by_its_last_end() -> None:
    """Two examples of a row, each with an end within; as each alone."""
    config = dataclasses.replace(SMALL["bart"].config, num_labels=3)
    model = BART.build("classification", config)
    tree = drawn(model)
    ids = SOURCE[:1].at[0, jnp.array([1, 4, 5, 8])].set(config.eos_token_id)
    segments, places = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2]]), jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    run = jax.jit(lambda *inputs, **at: model.apply({"params": tree}, *inputs, **at))
    together = run(ids, segments, places, cls_positions=jnp.array([[0, 5]]))
    alone = jnp.concatenate([run(ids[:, :5]), run(ids[:, 5:])])
    np.testing.assert_allclose(together[0], alone, atol=1e-6)
    depths = BART.depths(model)
    assert depths[("encoder", "encoder", "attention", "query")].tolist() == [1, 2]
    assert depths[("encoder", "decoder", "attention", "query")].tolist() == [3, 4]
    assert depths[("encoder", "source")] == 0
    assert depths[("classifier",)] == 5


@pytest.mark.parametrize("name", ["t5_v1_0", "t5_v1_1", "mt5", "bart_generation", "bart_classification", "bart_span"])
def test_parity_on_the_own_fixtures(name: str) -> None:
    report = check(FIXTURES / name, make_optimiser=reference_optimizer, generate=reference_generate)
    assert report.passed, "\n".join(describe(report))
    assert (report.scores is not None) == (name in ("t5_v1_0", "t5_v1_1", "bart_generation"))
    assert (report.trajectory is not None) == (name in ("t5_v1_0", "bart_generation"))


@each
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    models.save(tmp_path / "model", SMALL[name], params(name))
    loaded = models.load(tmp_path / "model")
    assert loaded.config == SMALL[name].config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params(name))


def change(folder: Path, target: Path, **settings: Any) -> Path:
    shutil.copytree(folder, target)
    stored = json.loads((target / "config.json").read_text()) | settings
    (target / "config.json").write_text(json.dumps({k: v for k, v in stored.items() if v is not None}))
    return target


def test_what_a_checkpoint_says_of_its_head(tmp_path: Path) -> None:
    """Tied and scaled, or neither; the reference implementation (5) says tied of all of them, but not scaled."""
    untied = models.load(FIXTURES / "t5_v1_1")
    assert (untied.config.tied, untied.config.scale_outputs) == (False, False)
    newer = change(FIXTURES / "t5_v1_1", tmp_path / "newer", tie_word_embeddings=True)
    assert not models.load(newer).config.tied
    older = change(FIXTURES / "t5_v1_0", tmp_path / "older", scale_decoder_outputs=None)
    assert models.load(older).config == models.load(FIXTURES / "t5_v1_0").config
    lying = change(FIXTURES / "t5_v1_1", tmp_path / "lying", tie_word_embeddings=True, scale_decoder_outputs=True)
    with pytest.raises(CheckpointError, match=r"lm_head.weight: differs from shared.weight"):
        models.load(lying)
    tensors = load_file(older / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["shared.weight"]}, older / "model.safetensors", {"format": "pt"})
    assert models.load(older).config.repeated == (("lm_head.weight", "float32"),)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"projection .*found 'gated-wave'"):
        T5Config(projection="gated-wave")
    with pytest.raises(ConfigError, match="scale_decoder_outputs: only false"):
        MT5Config.from_json({"model_type": "mt5", "scale_decoder_outputs": True})
    with pytest.raises(ConfigError, match="normalize_embedding: only true"):
        BartConfig.from_json({"model_type": "bart", "normalize_embedding": False})
    with pytest.raises(ValueError, match="a row has 17 tokens, but the model has 16 positions"):
        SMALL["bart"].init(jax.random.key(0), jnp.zeros((1, 17), jnp.int32))
    assert BartConfig.from_json({"model_type": "bart"}).num_labels == 3
    assert T5_FAMILY.config.from_json({"model_type": "t5", "num_layers": 4}).decoder_layers == 4

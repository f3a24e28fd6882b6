"""The Transformer and Marian: sizes, packing, forms of one network, the loss, saving, and one token at a time."""

import dataclasses
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary import models
from bestiary.models.checkpoints.config import ConfigError
from bestiary.models.checkpoints.parity import check
from bestiary.models.encoder_decoders.marian import MarianConfig, from_transformer
from bestiary.models.encoder_decoders.transformer import EncoderBlock, Transformer, TransformerConfig
from bestiary.models.heads import losses
from bestiary.models.incremental import cross_attention_maps
from bestiary.models.layers.dropout import Dropout
from bestiary.models.layers.linear import LOGICAL_AXES
from bestiary.models.layers.positions import sinusoids
from bestiary.train.commands.parity import describe

FIXTURE = Path(__file__).parents[1] / "fixtures" / "marian_translation"
SMALL = TransformerConfig(
    vocab_size=37, width=16, encoder_layers=2, decoder_layers=2, encoder_heads=2, decoder_heads=4,
    encoder_feed_forward=24, decoder_feed_forward=20, positions=16,
)  # fmt: skip
SOURCE = jax.random.randint(jax.random.key(1), (3, 9), 3, 37)
TARGET = jax.random.randint(jax.random.key(2), (3, 7), 3, 37)
VARIANTS = {
    "plain": {},
    "pre_norm": {"pre_norm": True, "activation": "gelu"},
    "decoder": {"tying": "decoder", "target_vocab_size": 41, "embedding_width": 12},
    "none": {"tying": "none", "target_vocab_size": 41, "embedding_width": 12, "pre_norm": True},
    "untied": {"tying": "none", "target_vocab_size": 41},
    "biased": {"logits_bias": True, "sinusoids": "halves", "scale_embeddings": False},
}


def model(name: str = "plain", **changes: Any) -> Transformer:
    return Transformer(dataclasses.replace(SMALL, **VARIANTS[name], **changes))


@cache
def params(name: str = "plain") -> Any:
    """Parameters with nothing at zero or one that could hide a mistake."""
    draw = np.random.default_rng(0).normal
    shapes = nn.unbox(jax.eval_shape(model(name).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return jax.tree.map(lambda leaf: draw(scale=0.2, size=leaf.shape).astype(np.float32), shapes)


def run(name: str, *arguments: Any, model: Any = None, tree: Any = None, **named: Any) -> Any:
    apply = partial((model or globals()["model"](name)).apply, **named)
    return jax.jit(apply)({"params": params(name) if tree is None else tree}, *arguments)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        # The paper's table 3 says 65 and 213 million, of 37,000 shared words.
        ("transformer-base", 63_082_496),
        ("transformer-big", 214_245_376),
        ("transformer-tiny", 2_605_056),
    ],
)
def test_sizes(preset: str, parameters: int) -> None:
    small = Transformer(TransformerConfig.preset(preset))
    tree = jax.eval_shape(small.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters


def test_every_parameter_names_its_axes() -> None:
    for name in ("none", "biased"):
        tree = jax.eval_shape(model(name).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        specs = nn.get_partition_spec(tree)
        for leaf, spec in zip(jax.tree.leaves(nn.unbox(tree)), jax.tree.leaves(specs), strict=True):
            assert len(spec) == leaf.ndim == len(set(spec))
            assert set(spec) <= set(LOGICAL_AXES)


def test_new_weights() -> None:
    tree = nn.unbox(jax.jit(EncoderBlock(SMALL).init, static_argnames="deterministic")(
        jax.random.key(0), jnp.zeros((1, 2, 16)), None, jnp.zeros(1, jnp.uint32), deterministic=True
    ))["params"]  # fmt: skip
    for kernel, limit in (
        (tree["attention"]["query"]["kernel"], (6 / 32) ** 0.5),
        (tree["attention"]["out"]["kernel"], (6 / 32) ** 0.5),
        (tree["feed_forward"]["inner"]["kernel"], (6 / 40) ** 0.5),
    ):
        assert 0.95 * limit < float(jnp.abs(kernel).max()) <= limit


def test_positions_are_the_papers() -> None:
    table = sinusoids(50, 12, interleaved=True)
    halves = sinusoids(50, 12, interleaved=False)
    for position, i in ((0, 0), (7, 2), (49, 5)):
        angle = position / 10_000 ** (2 * i / 12)
        np.testing.assert_allclose(table[position, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-7)
        np.testing.assert_allclose(halves[position, [i, 6 + i]], [np.sin(angle), np.cos(angle)], atol=1e-7)


def test_packed_pairs_are_as_each_alone() -> None:
    """Every pair keeps to itself in the encoder, the decoder and between them, whatever the others hold."""

    def pack(size: int, total: int) -> tuple[jax.Array, jax.Array]:
        segments = np.concatenate([np.repeat([1, 2], size), np.zeros(total - 2 * size)])
        return jnp.asarray(segments[None], jnp.int32), jnp.arange(total)[None] % size

    packed = run("plain", SOURCE[:1], *pack(4, 9), TARGET[:1], *pack(3, 7))
    alone = run("plain", SOURCE[:1, :8].reshape(2, 4), None, None, TARGET[:1, :6].reshape(2, 3))
    np.testing.assert_allclose(packed[0, :6].reshape(2, 3, -1), alone, atol=2e-6)


def test_the_decoder_sees_no_later_token_and_no_padding() -> None:
    mask = (jnp.arange(9) < 6).astype(jnp.int32)[None].repeat(3, 0)
    apply = jax.jit(model().apply)
    whole = apply({"params": params()}, SOURCE, mask, None, TARGET)
    later = apply({"params": params()}, SOURCE.at[:, 6:].set(5), mask, None, TARGET.at[:, 4:].set(8))
    np.testing.assert_array_equal(whole[:, :4], later[:, :4])
    assert np.abs(whole[:, 4:] - later[:, 4:]).max() > 1e-3


def test_the_stack_is_the_same_in_all_forms() -> None:
    named: dict[str, Any] = {"deterministic": False, "rngs": {"dropout": jax.random.key(3)}}
    found = [run("plain", SOURCE, None, None, TARGET, model=model(scan_layers=scan), **named) for scan in (True, False)]
    np.testing.assert_allclose(*found, rtol=1e-5, atol=2e-6)


def test_the_loss_is_that_of_the_logits() -> None:
    labels = jnp.where(TARGET % 5 == 0, losses.IGNORED_LABEL, TARGET)
    arguments = (SOURCE, None, None, TARGET, None, None)
    states = run("biased", *arguments, method="output_states")
    found = run("biased", [states], labels, label_smoothing=0.1, method="loss")
    expected = sums_by_definition([run("biased", *arguments)], labels, jnp.ones(labels.shape), 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_dropout_is_where_the_paper_has_it() -> None:
    """On both sums of embeddings and positions and on each sub-layer's output (5.4), another one each time."""
    dropped: list[np.ndarray] = []

    def record(call: Any, arguments: Any, named: Any, context: Any) -> Any:
        result = call(*arguments, **named)
        if isinstance(context.module, Dropout) and context.module.rate:
            jax.debug.callback(lambda x: dropped.append(np.asarray(x) == 0), result)
        return result

    with nn.intercept_methods(record):
        named: dict[str, Any] = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
        jax.block_until_ready(run("plain", SOURCE, None, None, TARGET, **named))
    jax.effects_barrier()
    assert len(dropped) == (1 + 2 * 2) + (1 + 3 * 2)
    for i, mask in enumerate(dropped):
        np.testing.assert_allclose(mask.mean(), 0.1, atol=0.05)
        assert all(mask.shape != other.shape or (mask != other).any() for other in dropped[:i])


def sums_by_definition(passes: Any, labels: Any, weights: Any, smoothing: float, r_drop: float = 0.0) -> Any:
    """Of logits: cross-entropy with the mixed distribution, and Liang et al. 2021, equations 2 to 4."""
    weights = jnp.where(labels == losses.IGNORED_LABEL, 0, weights)
    right = jax.nn.one_hot(labels, passes[0].shape[-1])
    loss = nll = correct = divergence = jnp.float32(0)
    logs = [jax.nn.log_softmax(logits) for logits in passes]
    for log_p in logs:
        target = (1 - smoothing) * right + smoothing / right.shape[-1]
        loss -= ((target * log_p).sum(-1) * weights).sum()
        nll -= ((right * log_p).sum(-1) * weights).sum()
        correct += ((log_p.argmax(-1) == labels).astype(weights.dtype) * weights).sum()
    for log_p in logs:
        for log_q in logs:
            divergence += 0.5 * ((jnp.exp(log_p) * (log_p - log_q)).sum(-1) * weights).sum()
    return losses.SmoothedSums(loss + r_drop * divergence, nll, correct, divergence, len(logs) * weights.sum())


@pytest.mark.parametrize("count", [1, 2])
def test_loss_in_chunks_is_that_of_all_logits(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.CHUNK_LOGITS, "cpu", count * 2 * 3 * 37)  # two columns of the three rows at a time
    labels = jnp.where(TARGET % 5 == 0, losses.IGNORED_LABEL, TARGET)
    weights = jax.random.uniform(jax.random.key(0), labels.shape)
    passes = tuple(jax.random.normal(jax.random.key(1), (count, *labels.shape, 16)) / 2)
    bias = jax.random.normal(jax.random.key(2), (37,))

    def chunked(passes: Any, kernel: Any) -> Any:
        sums = losses.projected_sums(passes, kernel, labels, weights, 0.1, bias, 0.7)
        return 3 * sums.loss, sums

    def whole(passes: Any, kernel: Any) -> Any:
        logits = [hidden @ kernel.T + bias[None, None] for hidden in passes]
        sums = sums_by_definition(logits, labels, weights, 0.1, 0.7)
        return 3 * sums.loss, sums

    kernel = jax.random.normal(jax.random.key(3), (37, 16))
    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(passes, kernel) for f in (chunked, whole)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), found, expected)
    assert (found[0][1].divergence > 1) == (count == 2)
    primal = jax.jit(chunked)(passes, kernel)[1]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), primal, found[0][1])


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    original = model(name)
    models.save(tmp_path / "model", original, params(name))
    loaded = models.load(tmp_path / "model")
    assert loaded.config == original.config
    assert type(loaded.model) is Transformer
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params(name))


@pytest.mark.parametrize("last", [False, True], ids=["padding first", "padding last"])
@pytest.mark.parametrize("name", ["plain", "untied"])
def test_a_transformer_becomes_a_marian_model(name: str, last: bool, tmp_path: Path) -> None:
    """Moving channels and words changes no logit but padding's; what is saved is what the reference calls its own."""
    original = model(name, decoder_start_token_id=0)
    converted, moved = from_transformer(original, params(name), padding_last=last)
    models.save(tmp_path / "model", converted, moved)
    loaded = models.load(tmp_path / "model")
    assert isinstance(loaded.config, MarianConfig)
    assert loaded.config.tying == original.config.tying
    words = original.config.target_words
    assert loaded.config.pad_token_id == loaded.config.decoder_start_token_id == (words - 1 if last else 0)
    assert not loaded.params["target" if name == "untied" else "source"]["embedding"][loaded.config.pad_token_id].any()
    target = TARGET.at[:, 0].set(0)  # outputs start from padding
    shift = int(last)
    source, moved_target = (SOURCE - shift) % 37, (target - shift) % words
    found = np.roll(run(name, source, None, None, moved_target, model=loaded.model, tree=loaded.params), shift, axis=-1)
    expected = run(name, SOURCE, None, None, target, model=original)
    np.testing.assert_allclose(found[..., 1:], expected[..., 1:], atol=5e-6)


def test_one_token_at_a_time() -> None:
    """Steps with a cache give the logits of the whole sequence; attention sums to one and leaves padding out."""
    name = "none"
    mask = (jnp.arange(9)[None] < jnp.array([9, 6, 1])[:, None]).astype(jnp.int32)
    steps = model(name).incremental()
    slots = np.arange(14)

    @jax.jit
    def decode(prepared: Any) -> Any:
        memory = steps.start(prepared, SOURCE, mask)

        def step(cache: Any, i: Any) -> Any:
            # Two beams, the second with another past.
            tokens = jnp.stack([TARGET[:, i], TARGET[:, i] - 1], axis=1)
            seen = jnp.stack([(slots % 2 == beam) & (slots // 2 <= i) for beam in range(2)])
            logits, cache, attention = steps.step(
                prepared,
                memory,
                cache,
                tokens,
                jnp.full(3, i),
                jnp.broadcast_to(2 * i + jnp.arange(2), (3, 2)),
                jnp.broadcast_to(seen, (3, 2, 14)),
            )
            return cache, (logits, attention[-1])

        return jax.lax.scan(step, steps.cache(3, 14), jnp.arange(7))[1]

    logits, attention = decode(steps.prepare(params(name)))
    whole = run(name, SOURCE, mask, None, TARGET)
    np.testing.assert_allclose(jnp.swapaxes(logits[:, :, 0], 0, 1), whole, atol=5e-6)
    assert np.abs(jnp.swapaxes(logits[:, :, 1], 0, 1) - whole).max() > 1e-2
    maps = cross_attention_maps(model(name), steps.prepare(params(name)), SOURCE, TARGET, mask)
    assert maps.shape == (2, 3, 4, 7, 9)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    assert not np.asarray(maps)[np.broadcast_to((mask == 0)[None, :, None, None], maps.shape)].any()
    np.testing.assert_allclose(maps[-1], jnp.moveaxis(attention[:, :, :, 0], 0, 2), atol=1e-6)


def test_parity_on_the_own_fixture() -> None:
    report = check(FIXTURE)
    assert report.passed, "\n".join(describe(report))
    assert report.model == "MarianMTModel"
    assert report.gradients["final_logits_bias"] == 0


def test_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width 16 is not a multiple of decoder_heads 3"):
        dataclasses.replace(SMALL, decoder_heads=3)
    with pytest.raises(ValueError, match="the source has 37 words and the target 41"):
        dataclasses.replace(SMALL, target_vocab_size=41)
    with pytest.raises(ValueError, match="tying is one of all, decoder, none, not 'some'"):
        dataclasses.replace(SMALL, tying="some")
    with pytest.raises(ValueError, match="no preset 'transformer-huge'"):
        TransformerConfig.preset("transformer-huge")
    with pytest.raises(ValueError, match="a row has 17 tokens, but the model has 16 positions"):
        model().init(jax.random.key(0), jnp.zeros((1, 17), jnp.int32))
    with pytest.raises(ValueError, match="decoder_input_ids: expected"):
        run("plain", SOURCE)
    with pytest.raises(ValueError, match="no pre_norm and no embedding_width"):
        from_transformer(model("none"), params("none"))
    with pytest.raises(ConfigError, match="normalize_before: only false is implemented"):
        MarianConfig.from_json({"model_type": "marian", "normalize_before": True})

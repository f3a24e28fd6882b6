"""Recurrent encoder-decoders: packed rows, both directions, every attention, and PyTorch's equations."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary.models import registry
from bestiary.models.checkpoints.config import ConfigError
from bestiary.models.checkpoints.tables import CheckpointError, flatten
from bestiary.models.incremental import cross_attention_maps
from bestiary.models.recurrent import g2p, recurrence
from bestiary.models.recurrent.config import RecurrentConfig
from bestiary.models.recurrent.seq2seq import FAMILY, recurrent_table
from bestiary.train.errors import RunError
from bestiary.train.generate.config import DecodeConfig
from bestiary.train.generate.generator import Generator

SIZES: dict[str, Any] = dict(vocab_size=23, width=8, embedding_width=6, encoder_width=4)
KINDS: dict[str, dict[str, Any]] = {
    "bahdanau": dict(decoder_layers=1, tying="none"),
    "luong": dict(
        **dict(encoder_layers=2, decoder_layers=2, cell="lstm", attention="general", input_feeding=True),
        **dict(output="attentional", bridge="last", tying="all"),
    ),
    "dot": dict(decoder_layers=2, cell="gru-reset-after", attention="dot", output="attentional", bridge="bridge"),
    "concat": dict(decoder_layers=1, cell="lstm", attention="concat", output="attentional", bridge="zero"),
    "none": dict(
        **dict(encoder_layers=2, decoder_layers=2, cell="lstm", attention="none", output="state", bridge="last"),
        **dict(bidirectional=False, encoder_width=8, logits_bias=True, tying="decoder"),
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str) -> tuple[Any, Any]:
    model: Any = FAMILY.build("generation", RecurrentConfig(**{**SIZES, **KINDS[kind]}))
    shapes = nn.unbox(jax.eval_shape(lambda: registry.init_params(model, jax.random.key(0))))
    draw = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), shapes)


@kinds
def test_packed_pairs_are_as_alone_and_as_read_word_by_word(kind: str) -> None:
    """Planted words in the padding and in another pair change nothing, in either direction."""
    model, params = make(kind)
    ids = jnp.array([[5, 6, 7, 8, 2, 9, 10, 2, 22, 22], [5, 6, 7, 8, 2, *[20] * 5], [9, 10, 2, *[21] * 7]])
    segments = jnp.array([[1] * 5 + [2] * 3 + [0] * 2, [1] * 5 + [0] * 5, [1] * 3 + [0] * 7])
    decoder = jnp.array([[2, 11, 12, 2, 13, 14, 15, 16, 21], [2, 11, 12, *[20] * 6], [2, 13, 14, 15, 16, *[21] * 4]])
    own = jnp.array([[1] * 3 + [2] * 5 + [0], [1] * 3 + [0] * 6, [1] * 5 + [0] * 4])
    logits = jax.jit(lambda *given: model.apply({"params": params}, given[0], given[1], None, given[2], given[3]))(
        ids, segments, decoder, own
    )
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[0, :3], logits[1, :3], atol=1e-5)
    np.testing.assert_allclose(logits[0, 3:8], logits[2, :5], atol=1e-5)

    # Word by word, in slots that a reordered beam may have been given, with what others left there.
    steps, slots = model.incremental(), jnp.array([3, 0, 4, 1, 2])

    @jax.jit
    def read(params: Any) -> Any:
        memory = steps.start(params, ids[1:], segments[1:])

        def one(cache: Any, position: Any) -> Any:
            mask = jnp.zeros(6, bool).at[slots].set(jnp.arange(5) <= position)
            rows = (jnp.full(2, position), jnp.full((2, 1), slots[position]), jnp.broadcast_to(mask, (2, 1, 6)))
            logits, cache, _ = steps.step(params, memory, cache, decoder[1:, position, None], *rows)
            return cache, logits[:, 0]

        cache = jax.tree.map(lambda leaf: leaf + leaf.dtype.type(7), steps.cache(2, 6))
        return jax.lax.scan(one, cache, jnp.arange(5))[1]

    stepped = jnp.moveaxis(read(params), 0, 1)
    np.testing.assert_allclose(stepped[0, :3], logits[1, :3], atol=1e-5)
    np.testing.assert_allclose(stepped[1], logits[2, :5], atol=1e-5)


def test_gradients_are_those_of_a_plain_loop() -> None:
    """Of weights, of a row's own matrices, of constants, inputs and the first state; in both directions."""
    draw = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    def step(product: Any, carry: Any, x: Any, constants: Any) -> tuple[Any, Any]:
        new = jnp.tanh(product("own", carry) + x) * constants
        return new, product("rows", new)

    given = ({"own": random(3, 3), "rows": random(2, 3, 4)}, random(2, 3), random(5, 2, 3), random(2, 3))
    factor = random(5, 2, 4)

    def loss(loop: Any, reverse: bool, *given: Any) -> Any:
        last, outputs = loop(step, *given, reverse, "float32")
        return (outputs * factor).sum() + last.sum()

    def plain(step: Any, weights: Any, *given: Any) -> Any:
        return recurrence._scan(step, weights, None, *given)[0]

    for reverse in (False, True):
        found, expected = (
            jax.jit(jax.grad(partial(loss, loop, reverse), (0, 1, 2, 3)))(*given) for loop in (recurrence.loop, plain)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@kinds
def test_every_parameter_has_a_name_and_the_config_survives_json(kind: str) -> None:
    model, params = make(kind)
    table = recurrent_table(model.config)
    assert {path: leaf.shape for path, leaf in flatten(params)} == {e.path: e.shape for e in table.entries}
    assert RecurrentConfig.from_json(model.config.to_json()) == model.config
    assert registry.family_of_model(model)[0] is FAMILY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(bidirectional=False), "needs a bidirectional encoder"),
        (dict(bridge="last"), "as many layers"),
        (dict(attention="dot", output="state"), "'general' has a matrix"),
        (dict(attention="none"), "output is 'state'"),
        (dict(input_feeding=True), "before the cell"),
        (dict(attention="general"), "belongs to additive"),
        (dict(remat=True), "no use for remat"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecurrentConfig(**changes)


def test_an_unknown_cell_is_refused() -> None:
    with pytest.raises(ConfigError, match="cell"):
        RecurrentConfig.from_json(RecurrentConfig().to_json() | {"cell": "gru"})


@pytest.mark.parametrize("cell", recurrence.GATES)
def test_cells_are_as_written_in_numpy(cell: str) -> None:
    """Gates in PyTorch's order, reset before or after the product."""
    draw = np.random.default_rng(0)
    gates, width = recurrence.GATES[cell], 5
    shapes = dict(input_kernel=(3, gates * width), state_kernel=(width, gates * width))
    weights = {name: draw.normal(size=shape) for name, shape in shapes.items()}
    weights |= {name: draw.normal(size=gates * width) for name in ("input_bias", "state_bias")}
    inputs = draw.normal(size=(1, 4, 3))
    w, u, b, d = (weights[name] for name in ("input_kernel", "state_kernel", "input_bias", "state_bias"))
    h = c = np.zeros(width)
    expected = []
    for x in inputs[0]:
        given, own = x @ w + b, h @ u + d
        if cell == "lstm":
            i, f, g, o = np.split(given + own, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            r, z = np.split(sigmoid((given + own)[: 2 * width]), 2)
            recalled = r * own[2 * width :]
            if cell == "gru-reset-before":
                recalled = (r * h) @ u[:, 2 * width :] + d[2 * width :]
            h = (1 - z) * np.tanh(given[2 * width :] + recalled) + z * h
        expected.append(h)
    cast = {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}
    found = recurrence.read_rows(
        cell, cast, jnp.asarray(inputs, jnp.float32), jnp.ones((1, 4), int), reverse=False, dtype="float32"
    )
    np.testing.assert_allclose(found[0][0], expected, atol=1e-5)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def test_attention_maps_are_distributions_over_the_source() -> None:
    model, params = make("luong")
    ids = jnp.array([[5, 6, 7, 2]])
    maps = cross_attention_maps(model, params, ids, jnp.array([[2, 9, 10]]))
    assert maps.shape == (2, 1, 1, 3, 4)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-5)
    assert maps.std() > 0.01


def test_g2p_reads_letters_to_phonemes(tmp_path: Path) -> None:
    """Arrays as g2p-en has them, and the greedy search of its own code."""
    draw = np.random.default_rng(0)
    shapes = {
        "enc_emb": (29, 256),
        "dec_emb": (74, 256),
        "fc_w": (74, 256),
        "fc_b": (74,),
        **{f"{side}_w_{of}": (768, 256) for side in ("enc", "dec") for of in ("ih", "hh")},
        **{f"{side}_b_{of}": (768,) for side in ("enc", "dec") for of in ("ih", "hh")},
    }
    arrays = {name: draw.normal(scale=0.2, size=shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "checkpoint20.npz", **arrays)

    def cell(side: str, x: Any, h: Any) -> Any:
        given, own = (v @ arrays[f"{side}_w_{of}"].T + arrays[f"{side}_b_{of}"] for v, of in ((x, "ih"), (h, "hh")))
        r, z = np.split(sigmoid((given + own)[:512]), 2)
        return (1 - z) * np.tanh(given[512:] + r * own[512:]) + z * h

    def predict(word: list[int]) -> list[int]:
        h, token, found = np.zeros(256), 2, []
        for letter in word:
            h = cell("enc", arrays["enc_emb"][letter], h)
        for _ in range(6):
            h = cell("dec", arrays["dec_emb"][token], h)
            token = int((arrays["fc_w"] @ h + arrays["fc_b"]).argmax())
            if token == 3:
                break
            found.append(token)
        return found

    model, params = g2p.read_g2p(tmp_path / "checkpoint20.npz")
    words = g2p.letters(["bestiary", "Ox", "it's"])
    assert words[1] == [17, 26, 2]
    generate = Generator(model, params, DecodeConfig(max_length=6))
    assert [found[0].tokens for found in generate(words)] == [predict(word) for word in words]
    assert len(g2p.PHONEMES) == 74
    np.savez(tmp_path / "other.npz", enc_emb=arrays["enc_emb"])
    with pytest.raises(CheckpointError, match="it has no dec_emb"):
        g2p.read_g2p(tmp_path / "other.npz")


def test_sources_of_length_0_are_refused() -> None:
    model, params = make("none")
    with pytest.raises(RunError, match="source 1: expected at least 1 token, found 0"):
        Generator(model, params, DecodeConfig(max_length=6))([[5, 2], []])

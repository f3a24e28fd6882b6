"""Transformer-XL: released sizes, what its memory means, its adaptive softmax."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from bestiary import models
from bestiary.models import registry
from bestiary.models.checkpoints.tables import CheckpointError
from bestiary.models.decoders.transformer_xl import TransformerXLConfig, TransformerXLModel
from bestiary.models.heads import adaptive_softmax
from bestiary.models.heads.adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax, Clusters
from bestiary.models.heads.memory_lm import Memory

FIXTURES = Path(__file__).parents[1] / "fixtures"
SIZES: dict[str, Any] = dict(
    vocab_size=23, cutoffs=(), tie_projections=(False,), divisor=1, width=16, embedding_size=16, layers=3, heads=2,
    head_size=6, feed_forward=20, memory=8, dropout=0.0,
)  # fmt: skip

PARAMETERS = {
    # "#params" of the authors' run_wt103_base.sh; 151M in Dai et al. 2019, table 1.
    "transformer-xl-base": 151_107_538,
    # The released checkpoint's, transfo-xl-wt103.
    "transformer-xl-large": 285_205_322,
    # 41M in table 2.
    "transformer-xl-enwik8": 41_055_436,
}


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters_as_released(size: str) -> None:
    model = TransformerXLModel(TransformerXLConfig.preset(size))
    shapes = jax.eval_shape(lambda: registry.init_params(model, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == PARAMETERS[size]


def made(random_params: Any, **changes: Any) -> tuple[TransformerXLModel, Any]:
    model = TransformerXLModel(TransformerXLConfig(**{**SIZES, **changes}))
    return model, {"params": random_params(model)}


@partial(jax.jit, static_argnums=0)
def step(model: TransformerXLModel, variables: Any, ids: jax.Array, memory: Memory, segments: Any = None) -> Any:
    return model.apply(variables, ids, memory, segments, method="read")


@partial(jax.jit, static_argnums=0)
def at_once(model: TransformerXLModel, variables: Any, ids: jax.Array) -> Any:
    return model.apply(variables, ids, method="output_states")


def read(model: TransformerXLModel, variables: Any, ids: jax.Array, cuts: tuple[int, ...], slots: int) -> np.ndarray:
    """Read a text in segments."""
    memory, found = model.empty_memory(len(ids), slots), []
    for first, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        states, memory = step(model, variables, ids[:, first:end], memory)
        found.append(states)
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("changes", [{}, {"clamp": 3, "untied_biases": False}, {"pre_norm": True}], ids=str)
def test_a_text_in_segments_is_the_text_at_once(random_params: Any, changes: dict[str, Any]) -> None:
    model, variables = made(random_params, **changes)
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 23)
    whole = at_once(model, variables, ids)
    np.testing.assert_allclose(read(model, variables, ids, (4, 8), 12), whole, atol=1e-5)
    np.testing.assert_allclose(read(model, variables, ids, (5,), 5), whole, atol=1e-5)
    shorter = read(model, variables, ids, (4, 8), 2)
    np.testing.assert_allclose(shorter[:, :4], whole[:, :4], atol=1e-5)
    assert np.abs(shorter[:, 4:] - whole[:, 4:]).max() > 1e-3


def test_every_token_attends_to_the_same_number(random_params: Any) -> None:
    """Of one layer, whose output so depends on the last 4 tokens alone, however the text is cut."""
    model, variables = made(random_params, layers=1, memory=4, same_length=True)
    ids = jax.random.randint(jax.random.key(1), (1, 12), 0, 23)
    other = ids.at[0, :3].set((ids[0, :3] + 1) % 23)
    for slots, cuts in ((4, (4, 8)), (2, (2, 4, 6, 8, 10)), (9, (6,))):
        first, second = (read(model, variables, x, cuts, slots) for x in (ids, other))
        np.testing.assert_allclose(first[:, 6:], second[:, 6:], atol=1e-6)
        if slots >= 4:
            assert np.abs(first[:, 5] - second[:, 5]).max() > 1e-4


def test_nothing_is_seen_of_other_segments_or_by_gradient(random_params: Any) -> None:
    model, variables = made(random_params)
    ids = jax.random.randint(jax.random.key(1), (1, 10), 0, 23)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2, 2, 0]])
    memory = model.empty_memory(1, 6)
    _, memory = step(model, variables, ids[:, :5], memory, segments[:, :5])
    found, after = step(model, variables, ids[:, 5:], memory, segments[:, 5:])
    alone = at_once(model, variables, ids[:, 3:9])
    np.testing.assert_allclose(found[:, :4], alone[:, 2:], atol=1e-5)
    np.testing.assert_array_equal(after.segment_ids, [[2, 2, 2, 2, 2, 0]])

    def loss(params: Any) -> jax.Array:
        _, memory = model.apply({"params": params}, ids, model.empty_memory(1, 6), method="read")
        return jnp.square(memory.hidden).sum()

    assert all(not np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(variables["params"])))


def test_constants_are_written_as_they_were_read(tmp_path: Path) -> None:
    """The reference's frequencies are rounded otherwise on other machines; others than these are refused."""
    folder = tmp_path / "copy"
    folder.mkdir()
    source, name = FIXTURES / "transformer_xl_lm", "transformer.pos_emb.inv_freq"
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors[name] = np.nextafter(tensors[name], np.float32(2))
    save_file(tensors, folder / "model.safetensors")
    loaded = models.load(folder)
    models.save(tmp_path / "again", loaded.model, loaded.params)
    np.testing.assert_array_equal(load_file(tmp_path / "again" / "model.safetensors")[name], tensors[name])
    save_file({**tensors, name: tensors[name] * np.float32(1.01)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="inv_freq: expected the constant"):
        models.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"cutoffs": (9, 5)}, "cutoffs must ascend"), ({"cutoffs": (5, 9)}, "tie_projections for 3 clusters"),
     ({"memory": 0, "same_length": True}, "same_length needs a memory")],
)  # fmt: skip
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerXLConfig(**{**SIZES, **changes})


# The adaptive softmax.


class Both(nn.Module):
    """An adaptive input and softmax."""

    clusters: Clusters

    def setup(self) -> None:
        init = nn.initializers.normal(0.5)
        self.embedding = AdaptiveEmbedding(self.clusters, init, init)
        self.softmax = AdaptiveSoftmax(self.clusters, init, init)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding(ids)

    def both(self, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = self.softmax.token_losses(hidden, labels, self.embedding)
        return self.softmax.log_probabilities(hidden, self.embedding), losses

    def everything(self, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        hidden = self(ids)
        return hidden, self.both(hidden, ids)


def written_out(c: Clusters, p: Any, hidden: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64, from the paper's equations."""

    def projected(i: int) -> np.ndarray:
        if not c.projections:
            return hidden
        own = not c.tied[i]
        at = p["softmax"][f"projections_{i}"] if own else p["embedding"][f"projections_{0 if c.divisor == 1 else i}"]
        return hidden @ np.asarray(at["kernel"], np.float64).T

    def part(i: int) -> tuple[np.ndarray, np.ndarray]:
        first, end = c.spans[i]
        at, span = (0, slice(first, end)) if c.divisor == 1 else (i, slice(None))
        table = np.asarray(p["embedding"][f"tables_{at}"]["embedding"], np.float64)[span]
        return table, np.asarray(p["softmax"][f"biases_{at}"]["bias"], np.float64)[span]

    def normalised(x: np.ndarray) -> np.ndarray:
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    table, bias = part(0)
    extra, extra_bias = p["softmax"]["tails"]["embedding"], p["softmax"]["tail_bias"]["bias"]
    head = normalised(projected(0) @ np.concatenate([table, extra]).T + np.concatenate([bias, extra_bias]))
    tails = [normalised(projected(i) @ part(i)[0].T + part(i)[1]) for i in range(1, len(c.spans))]
    first = c.cutoffs[0]
    return np.concatenate(
        [head[..., :first], *(tail + head[..., first + i : first + i + 1] for i, tail in enumerate(tails))], axis=-1
    )


@pytest.mark.parametrize("divisor", [1, 2])
def test_adaptive_softmax_of_wikitext(divisor: int) -> None:
    """All 33,278 words of WikiText-2, with targets in every tail."""
    c = Clusters(33_278, (2_000, 8_000), 24, divisor, 16, (False, True, True))
    model = Both(c)
    generator = np.random.default_rng(0)
    hidden = generator.normal(size=(2, 6, 16)).astype(np.float32)
    labels = np.array([[0, 1_999, 2_000, 7_999, 8_000, 33_277], [5, 3_000, 9_000, 20_000, 30_000, 31_000]], np.int32)
    draw = jax.jit(partial(model.init, method="everything"))
    params = nn.unbox(draw(jax.random.key(0), jnp.asarray(labels))["params"])
    params = jax.tree.map(lambda x: x + 0.1 if x.ndim == 1 else x, params)
    params["softmax"]["tail_bias"]["bias"] = jnp.array([0.3, -0.4])
    found, losses = jax.jit(lambda p: model.apply({"params": p}, hidden, labels, method="both"))(params)
    expected = written_out(c, params, hidden.astype(np.float64))
    assert np.abs(np.exp(np.asarray(found, np.float64)).sum(-1) - 1).max() < 1e-5
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(-losses, np.take_along_axis(expected, labels[..., None], axis=-1)[..., 0], atol=1e-5)


@pytest.mark.parametrize("divisor", [1, 2])
def test_gradients_of_the_losses_are_those_of_the_log_probabilities(divisor: int, monkeypatch: Any) -> None:
    """In several chunks, some of which are skipped."""
    monkeypatch.setitem(adaptive_softmax.CHUNK_LOGITS, "cpu", 40)
    c = Clusters(37, (7, 19), 12, divisor, 16, (False, True, True))
    model = Both(c)
    ids = jax.random.randint(jax.random.key(1), (2, 9), 0, 19).at[0, 3].set(30)
    hidden = jax.random.normal(jax.random.key(2), (2, 9, 16))
    params: Any = nn.unbox(jax.jit(partial(model.init, method="everything"))(jax.random.key(0), ids)["params"])

    def slow(params: Any, hidden: jax.Array) -> jax.Array:
        found, _ = model.apply({"params": params}, hidden, ids, method="both")
        return -jnp.take_along_axis(found, ids[..., None], axis=-1).sum()  # type: ignore[union-attr]

    def fast(params: Any, hidden: jax.Array) -> jax.Array:
        return model.apply({"params": params}, hidden, ids, method="both")[1].sum()  # type: ignore[index]

    found, expected = (jax.jit(jax.grad(function, (0, 1)))(params, hidden) for function in (fast, slow))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), found, expected)

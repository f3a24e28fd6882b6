"""BERT: sizes, the stack of layers in its forms, packing, dropout, and what is computed where."""

import dataclasses
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.models.encoders import bert
from bestiary.models.heads import losses
from bestiary.models.layers.dropout import Dropout
from bestiary.models.layers.linear import LOGICAL_AXES
from bestiary.models.layers.segments import reference_segments

SMALL = bert.BertConfig(vocab_size=61, width=16, layers=2, heads=2, feed_forward=24, positions=12)
MODEL = bert.BertForPreTraining(SMALL)
IDS = jax.random.randint(jax.random.key(5), (4, 12), 1, 61)


def shapes(model: nn.Module) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@cache
def params(model: nn.Module = MODEL) -> Any:
    """Parameters with nothing at zero or one that could hide a mistake."""
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda leaf: draw(scale=0.2, size=leaf.shape).astype(np.float32), nn.unbox(shapes(model)))


def run(model: nn.Module, tree: Any, *arguments: Any, **named: Any) -> Any:
    return jax.jit(partial(model.apply, **named))({"params": tree}, *arguments)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        # Of the encoder with its pooler: Devlin et al. 2018, and the released small sizes (Turc et al. 2019, table 1,
        # gives 4.4, 11.3, 29.1 and 41.7 million, each with the pretraining heads).
        ("bert-base", 109_482_240),
        ("bert-large", 335_141_888),
        ("bert-base-cased", 108_310_272),
        ("bert-large-cased", 333_579_264),
        ("bert-tiny", 4_385_920),
        ("bert-mini", 11_170_560),
        ("bert-small", 28_763_648),
        ("bert-medium", 41_373_184),
    ],
)
def test_parameter_counts(preset: str, parameters: int) -> None:
    assert count(shapes(bert.Bert(bert.BertConfig.preset(preset)))) == parameters


def test_initial_parameters_are_drawn_as_released() -> None:
    def draw(scan: bool) -> Any:
        config = dataclasses.replace(SMALL, width=32, feed_forward=64, scan_layers=scan)
        return nn.unbox(jax.jit(bert.BertForPreTraining(config).init)(jax.random.key(0), IDS))["params"]

    tree = draw(scan=True)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        kind = path[-1].key
        if kind in ("kernel", "embedding"):
            assert float(jnp.abs(leaf).max()) <= 0.04
            # A normal distribution cut off at two deviations keeps 0.8796 of its deviation.
            np.testing.assert_allclose(leaf.std(), 0.02 * 0.8796, rtol=0.2)
        else:
            np.testing.assert_array_equal(leaf, 1.0 if kind == "scale" else 0.0)
    first, second = tree["encoder"]["layers"]["attention"]["query"]["kernel"]
    assert (first != second).any()
    jax.tree.map(np.testing.assert_array_equal, tree, draw(scan=False))


def test_every_parameter_names_its_axes() -> None:
    tree = shapes(bert.BertForPreTraining(SMALL))
    specs = nn.get_partition_spec(tree)
    for leaf, spec in zip(jax.tree.leaves(nn.unbox(tree)), jax.tree.leaves(specs), strict=True):
        assert len(spec) == leaf.ndim
        assert set(spec) <= set(LOGICAL_AXES)
        assert len(set(spec)) == len(spec)
    query = specs["encoder"]["layers"]["attention"]["query"]["kernel"]
    assert tuple(query) == ("layers", "embed", "heads", "head_dim")


@cache
def trained(config: bert.BertConfig) -> tuple[jax.Array, Any]:
    """A loss under dropout, and its gradients."""
    model = bert.BertForPreTraining(config)

    def loss(tree: Any) -> jax.Array:
        logits = model.apply({"params": tree}, IDS, deterministic=False, rngs={"dropout": jax.random.key(1)})
        nsp = losses.class_losses(logits.nsp_logits, jnp.zeros(4, jnp.int32))["loss"]
        return losses.class_losses(logits.mlm_logits, IDS)["loss"].total / IDS.size + nsp.total

    return jax.jit(jax.value_and_grad(loss))(params())


@pytest.mark.parametrize("form", [{"scan_layers": False}, {"remat": True}], ids=str)
def test_the_stack_is_the_same_in_all_forms(form: dict[str, bool]) -> None:
    (loss, gradient), (other_loss, other_gradient) = trained(SMALL), trained(dataclasses.replace(SMALL, **form))
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), gradient, other_gradient)


def test_the_program_does_not_grow_with_depth() -> None:
    def size(depth: int, scan: bool) -> int:
        model = bert.BertForPreTraining(dataclasses.replace(SMALL, layers=depth, scan_layers=scan))

        def loss(tree: Any) -> jax.Array:
            rngs = {"dropout": jax.random.key(1)}
            return model.apply({"params": tree}, IDS, deterministic=False, rngs=rngs).mlm_logits.sum()

        text = jax.jit(jax.grad(loss)).lower(nn.unbox(shapes(model))).as_text()
        return len(text.splitlines())

    assert size(6, scan=True) == size(24, scan=True)
    assert size(2, scan=False) < size(4, scan=False)


def test_packed_examples_are_as_each_alone() -> None:
    lengths = (5, 4, 2)
    types = jnp.arange(12)[None] % 2
    segments = jnp.repeat(jnp.arange(4), jnp.array([0, *lengths]), total_repeat_length=12)[None]
    segments = jnp.where(jnp.arange(12) < sum(lengths), segments, 0)
    positions = jnp.concatenate([jnp.arange(n) for n in (*lengths, 1)])[None]
    starts = jnp.array([[0, 5, 9]])
    packed = run(MODEL, params(), IDS[:1], segments, positions, types, cls_positions=starts)
    for i, (start, length) in enumerate(zip((0, 5, 9), lengths, strict=True)):
        part = slice(start, start + length)
        alone = run(MODEL, params(), IDS[:1, part], token_type_ids=types[:, part])
        np.testing.assert_allclose(packed.mlm_logits[:, part], alone.mlm_logits, atol=1e-6)
        np.testing.assert_allclose(packed.nsp_logits[:, i], alone.nsp_logits, atol=1e-6)


def test_padding_changes_nothing() -> None:
    short = run(MODEL, params(), IDS[:, :7])
    mask = (jnp.arange(12) < 7).astype(jnp.int32)[None].repeat(4, 0)
    for segments in (mask, reference_segments(mask)):
        padded = run(MODEL, params(), IDS, segments)
        np.testing.assert_allclose(padded.mlm_logits[:, :7], short.mlm_logits, atol=1e-6)
        np.testing.assert_allclose(padded.nsp_logits, short.nsp_logits, atol=1e-6)


def test_dropout_does_not_change_with_how_a_batch_is_split() -> None:
    named: dict[str, Any] = {"deterministic": False, "rngs": {"dropout": jax.random.key(3)}}
    rows = jnp.arange(4, dtype=jnp.uint32)
    whole = run(MODEL, params(), IDS, **named)
    np.testing.assert_array_equal(run(MODEL, params(), IDS, rows=rows, **named).mlm_logits, whole.mlm_logits)
    for part in (slice(0, 1), slice(1, 4)):
        split = run(MODEL, params(), IDS[part], rows=rows[part], **named)
        np.testing.assert_allclose(split.mlm_logits, whole.mlm_logits[part], atol=1e-6)
        np.testing.assert_allclose(split.nsp_logits, whole.nsp_logits[part], atol=1e-6)
    same_rows = run(MODEL, params(), IDS[:1].repeat(2, 0), **named)
    assert np.abs(same_rows.mlm_logits[0] - same_rows.mlm_logits[1]).max() > 1e-3


def test_dropout_differs_between_layers_and_places() -> None:
    dropped: list[np.ndarray] = []

    def record(call: Any, arguments: Any, named: Any, context: Any) -> Any:
        result = call(*arguments, **named)
        if isinstance(context.module, Dropout) and context.method_name == "__call__":
            jax.debug.callback(lambda x: dropped.append(np.asarray(x) == 0), result)
        return result

    with nn.intercept_methods(record):
        named: dict[str, Any] = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
        jax.block_until_ready(run(MODEL, params(), IDS, **named))
    jax.effects_barrier()
    assert len(dropped) == 1 + 2 * SMALL.layers
    for i, mask in enumerate(dropped):
        np.testing.assert_allclose(mask.mean(), SMALL.dropout, atol=0.04)
        for other in dropped[:i]:
            np.testing.assert_allclose((mask & other).mean(), SMALL.dropout**2, atol=0.02)


def test_logits_where_words_are_predicted_are_those_of_all_positions_there() -> None:
    places = jnp.array([[0, 3, 11]]).repeat(4, 0)
    everywhere, there = run(MODEL, params(), IDS), run(MODEL, params(), IDS, mlm_positions=places)
    assert there.mlm_logits.shape == (4, 3, 61)
    np.testing.assert_allclose(there.mlm_logits, everywhere.mlm_logits[:, places[0]], atol=1e-6)
    masked = bert.FAMILY.build("masked_lm", SMALL)
    tree = {"encoder": {k: v for k, v in params()["encoder"].items() if k != "pooler"}, "mlm": params()["mlm"]}
    np.testing.assert_allclose(run(masked, tree, IDS, mlm_positions=places), there.mlm_logits, atol=1e-6)


def test_every_layer_gives_the_hidden_states() -> None:
    encoder = params()["encoder"]
    encoded = run(bert.Bert(SMALL), encoder, IDS, every_layer=True)
    assert encoded.every_hidden.shape == (3, 4, 12, 16)
    np.testing.assert_allclose(encoded.every_hidden[-1], encoded.hidden, atol=1e-6)
    first = dataclasses.replace(SMALL, layers=1)
    one = run(bert.Bert(first), encoder | {"layers": jax.tree.map(lambda x: x[:1], encoder["layers"])}, IDS)
    np.testing.assert_allclose(encoded.every_hidden[1], one.hidden, atol=1e-6)


def test_bfloat16_is_near_float32() -> None:
    narrow = dataclasses.replace(SMALL, dtype="bfloat16")
    (loss, gradient), (wide_loss, wide) = trained(narrow), trained(SMALL)
    logits = jax.eval_shape(bert.BertForPreTraining(narrow).apply, {"params": params()}, IDS)
    assert logits.mlm_logits.dtype == logits.nsp_logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(loss, wide_loss, rtol=1e-2)
    error = sum(jnp.square(a - b).sum() for a, b in zip(*map(jax.tree.leaves, (wide, gradient)), strict=True))
    assert float(error) < 0.03**2 * float(sum(jnp.square(a).sum() for a in jax.tree.leaves(wide)))


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="a row has 13 tokens, but the model has 12 positions"):
        bert.Bert(SMALL).init(jax.random.key(0), jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(ValueError, match="width 16 is not a multiple of heads 3"):
        dataclasses.replace(SMALL, heads=3)
    with pytest.raises(ValueError, match="unknown activation 'gelo'"):
        dataclasses.replace(SMALL, activation="gelo")
    with pytest.raises(ValueError, match="float32 or bfloat16, not 'float16'"):
        dataclasses.replace(SMALL, dtype="float16")
    with pytest.raises(ValueError, match="no preset 'bert-huge'"):
        bert.BertConfig.preset("bert-huge")
    assert bert.BertConfig.preset("bert-mini", vocab_size=7).vocab_size == 7


@pytest.mark.parametrize("scan", [True, False])
def test_the_last_layer_can_compute_cls_alone(scan: bool) -> None:
    """The pooled [CLS], and its gradients, are those of the whole last layer."""
    model = bert.Bert(dataclasses.replace(SMALL, scan_layers=scan, remat=scan))
    segments = jnp.asarray([[1] * 5 + [2] * 7, [1] * 4 + [2] * 4 + [0] * 4, [1] * 12, [0] * 12])
    positions = jnp.asarray([[0, 5], [0, 4], [0, 0], [0, 0]])
    used = jnp.asarray([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])

    def summed(tree: Any, cls_only: bool) -> tuple[jax.Array, jax.Array]:
        encoded = model.apply({"params": tree}, IDS, segments, cls_positions=positions, cls_only=cls_only)
        assert encoded.hidden.shape == ((4, 2, 16) if cls_only else (4, 12, 16))
        pooled = encoded.pooled * used[..., None]
        return jnp.sin(pooled * jnp.arange(16.0)[None, None]).sum(), pooled

    with jax.default_matmul_precision("highest"):
        (_, found), gradients = jax.jit(jax.value_and_grad(partial(summed, cls_only=True), has_aux=True))(params(model))
        (_, expected), wanted = jax.jit(jax.value_and_grad(partial(summed, cls_only=False), has_aux=True))(
            params(model)
        )
        first = run(model, params(model), IDS, segments, cls_only=True).pooled
    np.testing.assert_allclose(found, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, wanted)
    np.testing.assert_allclose(first[:3], found[:3, 0], atol=1e-6)

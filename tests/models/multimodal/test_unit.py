"""UniT: what padding, a missing modality and the other tasks do not change, whichever the encoders are."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary import models
from bestiary.models import registry
from bestiary.models.checkpoints.config import ConfigError
from bestiary.models.checkpoints.tables import flatten
from bestiary.models.family import Member
from bestiary.models.multimodal.unit import Unit, UnitConfig, UnitTask

SIZES: dict[str, Any] = dict(width=16, layers=2, heads=2, feed_forward=24)
TASKS = (
    UnitTask("vqa", "image and text", ("a", "b", "c"), 3, "sigmoid"),
    UnitTask("mood", "text", ("bad", "good"), 2),
    UnitTask("digit", "image", ("0", "1"), 1),
)


def member(name: str, **more: Any) -> Member:
    family = registry.family_named(name)
    own = {"image_size": 8, "patch_size": 4, "channels": 2} if family.reads == "images" else {}
    own |= {"vocab_size": 50, "positions": 16} if family.reads == "text" else {}
    return Member(family, family.config(**{**SIZES, **own, **more}))


def config(image: str = "conv-vit", text: str = "bert", **more: Any) -> UnitConfig:
    return UnitConfig(image=member(image), text=member(text), **{**SIZES, "tasks": TASKS, **more})


@pytest.fixture(scope="module")
def unit(random_params) -> tuple[Unit, Any]:
    model = Unit(config())
    return model, random_params(model)


PIXELS = jax.random.normal(jax.random.key(1), (2, 8, 8, 2))
IDS = jnp.array([[2, 9, 3, 0, 0], [2, 7, 8, 9, 3]])
SEGMENTS = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


@partial(jax.jit, static_argnums=(0, 1))
def run(model: Unit, task: str, params: Any, pixels: Any, ids: Any, segments: Any, has_image: Any) -> jax.Array:
    return model.apply({"params": params}, pixels, ids, segments, task=task, has_image=has_image)


def vqa(unit: tuple[Unit, Any], pixels: Any = PIXELS, ids: Any = IDS, segments: Any = SEGMENTS, has: Any = (1, 1)):
    return np.asarray(run(unit[0], "vqa", unit[1], pixels, ids, segments, jnp.array(has)))


def test_padding_has_no_effect(unit):
    """Other tokens there, and more of them, beside an image; and a row alone is what it is in a batch."""
    found = vqa(unit)
    np.testing.assert_array_equal(found, vqa(unit, ids=IDS.at[0, 3:].set(44)))
    longer = [jnp.pad(array, [(0, 0), (0, 3)], constant_values=fill) for array, fill in ((IDS, 31), (SEGMENTS, 0))]
    np.testing.assert_allclose(found, vqa(unit, ids=longer[0], segments=longer[1]), atol=1e-5)
    alone = vqa(unit, PIXELS[:1], IDS[:1, :3], SEGMENTS[:1, :3], (1,))
    np.testing.assert_allclose(found[:1], alone, atol=1e-5)


def test_a_missing_image_is_not_seen_and_changes_no_other_row(unit):
    found = vqa(unit, has=(1, 0))
    np.testing.assert_array_equal(found, vqa(unit, PIXELS.at[1].set(1e4), has=(1, 0)))
    np.testing.assert_array_equal(found[0], vqa(unit)[0])
    assert np.abs(found[1] - vqa(unit)[1]).max() > 1e-3


def test_a_missing_text_is_not_seen_and_changes_no_other_row(unit):
    none = SEGMENTS.at[1].set(0)
    found = vqa(unit, segments=none)
    np.testing.assert_array_equal(found, vqa(unit, ids=IDS.at[1].set(20), segments=none))
    np.testing.assert_array_equal(found[0], vqa(unit)[0])
    assert np.isfinite(vqa(unit, segments=none, has=(0, 0))).all()


def test_both_modalities_and_every_query_are_read(unit):
    model, params = unit

    def total(params: Any, pixels: Any) -> jax.Array:
        return model.apply({"params": params}, pixels, IDS, SEGMENTS, task="vqa").sum()

    of_params, of_pixels = jax.jit(jax.grad(total, argnums=(0, 1)))(params, PIXELS)
    assert (np.abs(of_pixels).max(axis=(1, 2, 3)) > 0).all()
    touched = {path: float(np.abs(leaf).max()) for path, leaf in flatten(of_params)}
    others = ("queries_mood", "queries_digit", "heads_mood", "heads_digit")
    for path, most in touched.items():
        keys = path[-2:] == ("key", "bias")  # a constant in all scores of a query
        assert keys or (most > 0) == (path[0] not in others), path
    words = np.abs(of_params["text_encoder"]["embeddings"]["word"]["embedding"]).max(axis=1)
    assert set(np.flatnonzero(words)) == {2, 3, 7, 8, 9}
    vectors = np.abs(of_params["text_task"]["embedding"]).max(axis=1)
    assert (vectors > 0).tolist() == [True, False]  # of vqa, and of mood, the other task of texts


def test_a_task_of_texts_keeps_cls_alone(unit):
    """As the released code does: what the decoder sees of another token is nothing, of [CLS] everything."""
    model, params = unit
    rows = jnp.arange(2, dtype=jnp.uint32)
    read = partial(model.apply, task="mood", rows=rows, deterministic=True, method="read_texts")
    side: Any = jax.eval_shape(read, {"params": params}, IDS, SEGMENTS, None)
    assert (side.states.shape, side.places.shape, side.segments.shape) == ((2, 1, 16), (1, 16), (2, 1))


@pytest.mark.parametrize(
    ("image", "text"), [("vit", "modernbert"), ("plain-vit", "albert"), ("conv-vit", "roberta"), ("vit", "gpt2")]
)
def test_any_encoders(image: str, text: str, random_params, tmp_path: Path):
    """Their checkpoint is read, and saved again as it was; padding does nothing."""
    own = {"albert": {"embedding_size": 8}, "modernbert": {"pad_token_id": 0}, "roberta": {"pad_token_id": 0}}
    two = UnitConfig(image=member(image), text=member(text, **own.get(text, {})), **{**SIZES, "tasks": TASKS[:1]})
    model = Unit(two)
    params = random_params(model)
    leaves = {path: leaf.shape for path, leaf in flatten(params)}
    family, architecture = registry.family_of_model(model)
    assert leaves == {entry.path: entry.shape for entry in architecture.table(two).entries}
    models.save(tmp_path / "model", model, params)
    loaded = models.load(tmp_path / "model")
    assert (family.name, loaded.model) == ("unit", model)
    models.save(tmp_path / "again", loaded.model, loaded.params)
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")]
    assert both[0] == both[1]
    found = vqa((model, params))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, vqa((model, params), ids=IDS.at[0, 3:].set(0 if text == "roberta" else 44)))


def test_a_model_of_one_modality(random_params):
    model = Unit(UnitConfig(text=member("bert"), **SIZES, tasks=TASKS[1:2]))
    params = random_params(model)
    assert not any(name.startswith("image") for name in params)
    assert jax.jit(partial(model.apply, task="mood"))({"params": params}, None, IDS, SEGMENTS).shape == (2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "task vqa reads image and text, but there is no image encoder"),
        ({"heads": 3}, "width 16: expected a multiple of heads 3"),
        ({"tasks": (TASKS[1], TASKS[1])}, "two tasks have one name"),
        ({"tasks": (TASKS[1]._replace(name="A b"),)}, "task 'A b': expected a name of letters"),
        ({"text_length": 17}, "text_length 17: expected 1 to the encoder's 16"),
        ({"text": Member(registry.family_named("t5"), None)}, "T5 has no encoder by itself"),
    ],
)
def test_mistakes_in_a_config(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config().__class__(**{**SIZES, "image": member("vit"), "text": member("bert"), "tasks": TASKS, **changes})


def test_tasks_in_config_json_are_checked():
    stored = config().to_json()
    assert stored["tasks"]["vqa"] == {"reads": "image and text", "labels": ["a", "b", "c"], "queries": 3,
                                      "loss": "sigmoid", "pairs": False}  # fmt: skip
    stored["tasks"]["vqa"]["reads"] = "sound"
    with pytest.raises(ConfigError, match="tasks: vqa: expected reads, labels, queries and loss"):
        UnitConfig.from_json(stored, image=member("vit"), text=member("bert"))


def test_attention_adds_places_to_queries_and_keys_but_not_to_values(random_params):
    """Against self-attention of inputs that have them, whose values alone differ."""
    from bestiary.models.layers.attention import Attention

    layer = Attention(8, 2, 0.0, nn.initializers.normal(0.5))
    hidden, places = jax.random.normal(jax.random.key(0), (2, 1, 5, 8))
    rows = jnp.zeros(1, jnp.uint32)
    run: Any = partial(jax.jit, static_argnames="deterministic")
    params = run(layer.init)(jax.random.key(1), hidden, None, rows, deterministic=True)
    found = run(layer.apply)(params, hidden, None, rows, places=places, deterministic=True)
    kept = jax.tree.map(lambda leaf: leaf, nn.unbox(params))["params"]
    shown = run(layer.apply)(params, hidden + places, None, rows, deterministic=True)
    of_places = (places @ kept["value"]["kernel"].reshape(8, 8)).reshape(1, 5, 2, 4)
    query, key = (
        ((hidden + places) @ kept[name]["kernel"].reshape(8, 8)).reshape(1, 5, 2, 4) for name in ("query", "key")
    )
    weights = jax.nn.softmax(jnp.einsum("blhd,bshd->bhls", query, key) / 2, axis=-1)
    more = jnp.einsum("bhls,bshd->blhd", weights, of_places).reshape(1, 5, 8) @ kept["out"]["kernel"].reshape(8, 8)
    np.testing.assert_allclose(found, shown - more, atol=1e-5)

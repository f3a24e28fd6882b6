"""What marks SpanBERT: the span boundary objective's head, on BERT's encoder and in BERT's checkpoints."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary import models
from bestiary.models.checkpoints.folder import load_with_report
from bestiary.models.encoders.spanbert import FAMILY, SpanBertConfig, SpanTargets

CONFIG = SpanBertConfig(
    vocab_size=61, width=16, layers=2, heads=2, feed_forward=24, positions=16, span_targets=4, span_position_size=6,
    initializer_range=0.2,
)  # fmt: skip
IDS = jax.random.randint(jax.random.key(1), (2, 9), 5, 61)
TARGETS = SpanTargets(
    jnp.array([[1, 1, 4], [0, 0, 0]]), jnp.array([[4, 4, 6], [3, 3, 0]]), jnp.array([[0, 1, 0], [0, 1, 0]])
)


@pytest.fixture(scope="module")
def drawn(random_params: Any) -> Any:
    model = FAMILY.build("pretraining", CONFIG)
    return model, random_params(model)


def test_a_target_is_predicted_from_the_boundaries_and_its_place(drawn: Any) -> None:
    """Joshi et al. 2020, 3.2: h0 = [x_(s-1); x_(e+1); p_(i-s+1)], twice LayerNorm(GeLU(W h))."""
    model, params = drawn
    found = jax.jit(model.apply)({"params": params}, IDS, span_targets=TARGETS)
    encode = jax.jit(lambda params: model.bind({"params": params}).encoder(IDS).hidden)
    hidden = np.asarray(encode(params), np.float64)
    sbo = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["sbo"])
    row = np.arange(2)[:, None]
    h = np.concatenate(
        [hidden[row, TARGETS.left], hidden[row, TARGETS.right], sbo["position"]["embedding"][TARGETS.offsets]], axis=-1
    )
    for part in ("first", "second"):
        h = np.asarray(jax.nn.gelu(h @ sbo[part]["kernel"] + sbo[part]["bias"], approximate=False), np.float64)
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + CONFIG.norm_epsilon)
        h = h * sbo[f"{part}_norm"]["scale"] + sbo[f"{part}_norm"]["bias"]
    expected = h @ np.asarray(params["encoder"]["embeddings"]["word"]["embedding"]).T + sbo["bias"]
    np.testing.assert_allclose(found.sbo_logits, expected, atol=1e-4)
    assert found.mlm_logits.shape == (2, 9, 61)
    assert jax.eval_shape(model.apply, {"params": params}, IDS).sbo_logits is None


def test_its_checkpoints_are_berts_with_one_more_head(drawn: Any, tmp_path: Any) -> None:
    model, params = drawn
    models.save(tmp_path / "model", model, params)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "bert"
    again = models.load(tmp_path / "model")
    assert again.model == model
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    loaded, report = load_with_report(tmp_path / "model", head="span")
    assert report.initialised == ("qa_outputs.weight", "qa_outputs.bias")
    assert "cls.pair_target_predictions.mlp_layer_norm.linear1.weight" in report.unused
    models.save(tmp_path / "answers", loaded.model, loaded.params)
    found = models.load(tmp_path / "answers")
    assert type(found.config).MODEL_TYPE == "bert"
    assert dict(found.config.extra)["max_pair_targets"] == "4"
    jax.tree.map(np.testing.assert_array_equal, found.params, jax.tree.map(np.asarray, loaded.params))

"""The objective `bilm`: both directions' words and weights, and a state that goes on from batch to batch."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary.models import load
from bestiary.models.recurrent.elmo import BidirectionalLM, ElmoConfig, elmo_table
from bestiary.models.registry import init_params
from bestiary.train.cli import main
from bestiary.train.pretrain.streams.bilm import BothDirections

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefg"]
CONFIG = ElmoConfig(
    vocab_size=10, character_width=3, filters=(1, 4, 2, 4), most_characters=6, width=6, cells=8, dropout=0.0
)


def test_states_go_on_and_words_before_are_predicted() -> None:
    objective: Any = BothDirections(SimpleNamespace(eos_id=1, tokens=WORDS), 2)  # type: ignore[arg-type]
    model = BidirectionalLM(CONFIG)
    shapes = nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), shapes)
    assert {entry.path for entry in elmo_table(CONFIG).entries} == {
        tuple(part.key for part in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    text = draw.integers(3, 10, (2, 9)).astype(np.int32)

    def batch(ids: np.ndarray, labels: np.ndarray) -> Any:
        ones = np.ones(ids.shape)
        made = {"input_ids": ids, "labels": labels, "label_weights": ones.astype(np.float32)}
        made |= {"segment_ids": ones.astype(np.int32), "rows": np.arange(2, dtype=np.uint32)}
        return objective.corrupt(None, jax.tree.map(jnp.asarray, made))

    run = jax.jit(lambda given, memory: objective.losses_and_memory(model, params, given, memory, deterministic=True))
    parts = [batch(text[:, at : at + 4], text[:, at + 1 : at + 5]) for at in (0, 4)]
    assert parts[0]["before"].tolist() == np.pad(text[:, :3], ((0, 0), (1, 0))).tolist()
    first, memory = run(parts[0], objective.memory(model))
    second, after = run(parts[1], memory)
    whole, end = run(batch(text[:, :8], text[:, 1:9]), objective.memory(model))
    np.testing.assert_allclose(first["forward"].loss + second["forward"].loss, whole["forward"].loss, rtol=1e-5)
    np.testing.assert_allclose(after["ahead_1_cell"], end["ahead_1_cell"], atol=1e-5)
    assert np.abs(memory["back_0_output"]).max() > 0
    # Against the logits, one by one.
    characters = jnp.asarray(objective._characters(6))[text[:, :8]]
    logits = jax.nn.log_softmax(jax.jit(lambda x: model.apply({"params": params}, x))(characters))
    rows = np.arange(2)[:, None]
    ahead, back = (np.asarray(logits[:, side]) for side in (0, 1))
    forward = -ahead[rows, np.arange(8)[None], text[:, 1:9]].sum()
    backward = -back[rows, np.arange(1, 8)[None], text[:, :7]].sum()
    np.testing.assert_allclose(whole["forward"].loss, forward, rtol=1e-5)
    np.testing.assert_allclose(whole["backward"].loss, backward, rtol=1e-5)
    assert float(whole["backward"].weight) == 14


def test_a_run_is_exported_and_refuses_other_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"the ship number {n % 7} of line {n % 5} went by , and the sea was calm ." for n in range(120)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    given = ["pretrain", "--model", "elmo-small", "--corpus", tmp_path / "text.txt", "--vocab-size", 40]
    given += ["--cache", tmp_path / "cache", "--sequence-length", 8, "--batch-tokens", 64, "--steps", 2]
    given += ["--validation-corpus", tmp_path / "text.txt", "--evaluation-rows", 8]
    given = [str(part) for part in given]
    assert main([*given, "--out", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["objective"] == "bilm"
    assert 0 < results["held_out"]["backward_loss"] < 2 * np.log(40)
    found = load(tmp_path / "run/model")
    assert found.config.filters == (1, 16, 2, 16, 3, 32)
    assert main(["embed", "--model", str(tmp_path / "run/model"), "--input", str(tmp_path / "text.txt"),
                 "--out", str(tmp_path / "vectors.npy")]) == 1  # fmt: skip
    assert "text 2: it has no words" in capsys.readouterr().err
    (tmp_path / "lines.txt").write_text("\n".join(lines[:4]))
    assert main(["embed", "--model", str(tmp_path / "run/model"), "--input", str(tmp_path / "lines.txt"),
                 "--out", str(tmp_path / "vectors.npy")]) == 0  # fmt: skip
    vectors = np.load(tmp_path / "vectors.npy")
    assert vectors.shape == (4, 2 * found.config.width)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-6
    wrong = ["--batch-ramp", "128:1", "--out", str(tmp_path / "other")]
    assert main([*given, *wrong]) == 1
    assert "one phase and one batch size" in capsys.readouterr().err

"""Pretraining of a language model: its loss, a run, and what it writes generates."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file

from bestiary import models
from bestiary.models import registry
from bestiary.train.cli import main
from bestiary.train.pretrain.causal import NextTokens


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        lines = [f"Line {n} of text {number}: the sea was calm, and ship {n * number} went by." for n in range(9)]
        (folder / f"{number}.txt").write_text("\n\n".join(lines))
    return folder


def arguments(corpus: Path, out: Path, *more: Any) -> list[str]:
    given = ["pretrain", "--model", "gpt2-tiny", "--corpus", corpus, "--vocab-size", 300, "--out", out]
    given += ["--cache", out.parent / "cache", "--sequence-length", 32, "--batch-tokens", 256, "--steps", 6]
    given += ["--log-every", 2, "--checkpoint-every", 4, "--evaluation-rows", 8, "--learning-rate", 3e-3]
    return [str(argument) for argument in (*given, *more)]


def test_a_run_learns_and_generates(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(corpus, tmp_path / "whole")) == 0
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["objective"] == "causal"
    assert results["held_out"]["causal_loss"] < np.log(300)
    model = tmp_path / "whole" / "model"
    loaded = models.load(model)
    assert loaded.config.eos_token_id == loaded.config.bos_token_id == loaded.tokenizer.eos_id
    assert "transformer.wte.weight" in load_file(model / "model.safetensors")
    capsys.readouterr()
    assert main(["generate", "--model", str(tmp_path / "whole"), "--prompt", "Line 3", "--max-length", "5"]) == 0
    assert capsys.readouterr().out
    text = tmp_path / "held.txt"
    text.write_text("Line 2 of text 40: the sea was calm.")
    assert main(["perplexity", "--model", str(tmp_path / "whole"), "--text", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity_per_token"] < 300


def test_the_loss_is_that_of_all_logits() -> None:
    """Both with one segment a row and with several, and by chunks as from all logits at once."""
    family = registry.family_named("gpt2")
    config = family.config.preset("gpt2-tiny", vocab_size=50, bos_token_id=1, eos_token_id=1, positions=16)
    model = family.build("causal_lm", config)
    random = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(lambda: registry.init_params(model, jax.random.key(0))))
    params = jax.tree.map(lambda leaf: np.float32(random.normal(scale=0.2, size=leaf.shape)), shapes)
    segments = np.array([[1] * 12, [1] * 5 + [2] * 4 + [0] * 3], np.int32)
    rows = {
        "input_ids": random.integers(2, 50, (2, 12)).astype(np.int32),
        "labels": random.integers(2, 50, (2, 12)).astype(np.int32),
        "label_weights": np.float32(segments > 0),
        "segment_ids": segments,
        "position_ids": np.array([range(12), [*range(5), *range(4), *range(9, 12)]], np.int32),
        "rows": np.arange(2, dtype=np.uint32),
    }
    objective = NextTokens(None, True)  # pyright: ignore[reportArgumentType]

    @jax.jit
    def both(params: Any, rows: Any) -> Any:
        alone = [
            model.apply({"params": params}, rows["input_ids"][row : row + 1, part])
            for row, part in ((0, slice(0, 12)), (1, slice(0, 5)), (1, slice(5, 9)))
        ]
        logits = jnp.concatenate([some[0] for some in alone])
        labels = jnp.concatenate([rows["labels"][0], rows["labels"][1, :9]])
        expected = -jax.nn.log_softmax(logits)[jnp.arange(21), labels].sum()
        return objective.losses(model, params, rows, deterministic=True)["causal"], objective.weights(rows), expected

    found, weights, expected = both(params, rows)
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(found.weight) == float(weights["causal"]) == 21


def test_options_that_change_nothing_are_refused(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    for more, said in (
        (("--masking", "word"), "--objective causal masks nothing"),
        (("--mask-rate", "0.2"), "--objective causal masks nothing"),
        (("--rows", "sentences"), "has rows of its own, running text"),
        (("--model", "bert-tiny", "--no-across-documents"), "it is for --objective causal"),
        (("--objective", "mlm"), "GPT-2 can learn causal"),
    ):
        assert main(arguments(corpus, tmp_path / "run", *more)) == 1
        assert said in capsys.readouterr().err

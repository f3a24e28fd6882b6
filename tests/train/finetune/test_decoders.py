"""Fine-tuning decoders: read from the last token, with tokens around texts and the loss of next tokens, as GPT was."""

import json
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary import models
from bestiary.data import load_tokenizer
from bestiary.data.batches import pack_features
from bestiary.models import registry
from bestiary.models.decoders.gpt1 import GPT1Config
from bestiary.models.heads.with_head import encoder_inputs
from bestiary.train.cli import main
from bestiary.train.finetune.auxiliary import forward_with_states, next_token_loss
from bestiary.train.finetune.config import FinetuneConfig
from bestiary.train.finetune.model import load_model
from bestiary.train.finetune.tasks.glue import glue_task

WORDS = ["good", "bad", "a", "film", "it", "was"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT, drawn at random, whose tokenizer knows whole words."""
    folder = tmp_path_factory.mktemp("gpt")
    letters = sorted(set("".join(WORDS)))
    pieces, merges = ["<unk>", *letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = ["".join(parts[:2])]
            pieces.append(parts[0])
    pieces = list(dict.fromkeys(pieces))
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges), ""]))
    config = GPT1Config(
        vocab_size=len(pieces), width=32, layers=1, heads=2, feed_forward=128, positions=32, initializer_range=0.1,
        dropout=0.0, attention_dropout=0.0, embedding_dropout=0.0,
    )  # fmt: skip
    model = registry.family_named("openai-gpt").build("causal_lm", config)
    params = jax.device_get(nn.unbox(jax.jit(partial(registry.init_params, model))(jax.random.key(0))))
    models.save(folder / "model", model, params, load_tokenizer(folder / "vocab.json"))
    return folder / "model"


@pytest.fixture(scope="module")
def sst2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("SST-2")
    draw = random.Random(0)
    for split, count in (("train", 128), ("dev", 48)):
        rows = ""
        for n in range(count):
            words = draw.choices(WORDS[2:], k=draw.randint(2, 8))
            words.insert(draw.randrange(len(words)), ("bad", "good")[n % 2])
            rows += f"{' '.join(words)}\t{n % 2}\n"
        (folder / f"{split}.tsv").write_text(f"sentence\tlabel\n{rows}")
    return folder


def finetune(decoder: Path, sst2: Path, out: Path, *more: str) -> int:
    fast = ("--learning-rate", "1e-2", "--batch-size", "16", "--max-length", "16", "--epochs", "4")
    return main(["finetune", "sst2", "--data", str(sst2), "--model", str(decoder), "--out", str(out), *fast, *more])


def test_as_gpt_was(decoder: Path, sst2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(decoder, sst2, tmp_path / "run", "--auxiliary-lm", "0.5") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"]["dev"]["accuracy"] > 0.9
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["auxiliary_loss"] for line in lines if "auxiliary_loss" in line]
    assert losses[-1] < losses[0]
    model, params, config, tokenizer = models.load(tmp_path / "run" / "model")
    assert tokenizer.tokens[-3:] == ["_start_", "_delimiter_", "_classify_"]
    assert config.vocab_size == tokenizer.vocab_size
    inputs = encoder_inputs(config, tokenizer(["it was good", "a bad film"]))
    assert jax.jit(model.apply)({"params": params}, *inputs).argmax(-1).tolist() == [1, 0]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(sst2), "--out", str(tmp_path / "again")]) == 0
    # It still predicts next tokens.
    assert main(["generate", "--model", str(tmp_path / "run"), "--prompt", "it was", "--max-length", "3"]) == 0


def test_only_new_tokens_are_said_to_be_new(decoder: Path, tmp_path: Path) -> None:
    task, said = glue_task("sst2", 16), []
    progress: Any = SimpleNamespace(line=said.append)
    for folder, new in ((decoder, True), (tmp_path / "model", False)):
        said.clear()
        loaded = load_model(FinetuneConfig(model=folder, out=tmp_path / "run", max_length=16), task, progress)
        assert any("the vectors of _start_, _delimiter_, _classify_" in line for line in said) == new
        models.save(tmp_path / "model", loaded.model, loaded.params, loaded.tokenizer)


def test_adapters_train_without_new_tokens(decoder: Path, sst2: Path, tmp_path: Path) -> None:
    assert finetune(decoder, sst2, tmp_path / "run", "--lora-rank", "4", "--lora-targets", "c_attn") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"]["dev"]["accuracy"] > 0.8
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["fan_in_fan_out"] is True
    assert adapter["target_modules"] == ["attn.c_attn"]
    assert models.load(tmp_path / "run" / "model").config.vocab_size == models.load(decoder).config.vocab_size


def test_the_auxiliary_loss_is_a_mean_over_tokens_then_over_examples(decoder: Path) -> None:
    """In a packed row, as each example alone."""
    model, params, config, _ = models.load(decoder, head="classification")
    task = glue_task("sst2", 16)
    texts = [[3, 5, 7, 9], [4, 6], [8, 10, 12, 14, 16]]
    features = pack_features(
        texts, [[0] * len(text) for text in texts], segment_fields={"labels": np.zeros(3, np.int32)}
    )
    assert features.count == 3
    row = np.zeros((1, 12), np.int32)
    segments, positions = np.zeros_like(row), np.zeros_like(row)
    starts = []
    at = 0
    for number, text in enumerate(texts):
        starts.append(at)
        row[0, at : at + len(text)] = text
        segments[0, at : at + len(text)] = number + 1
        positions[0, at : at + len(text)] = range(len(text))
        at += len(text)
    batch = {
        "input_ids": jnp.asarray(row), "segment_ids": jnp.asarray(segments), "position_ids": jnp.asarray(positions),
        "cls_positions": jnp.array([starts]), "feature_ids": jnp.asarray(segments),
    }  # fmt: skip

    @jax.jit
    def packed(params: Any, batch: Any) -> Any:
        logits, states = forward_with_states(task, model, params, batch, deterministic=True)
        return logits, next_token_loss(model, params, states, batch)

    logits, loss = packed(params, batch)
    assert logits.shape == (1, 3, config.num_labels)
    language_model = registry.family_named("openai-gpt").build("causal_lm", config)
    alone = np.zeros((3, 5), np.int32)
    for own, text in zip(alone, texts, strict=True):
        own[: len(text)] = text
    scores: Any = jax.jit(language_model.apply)({"params": {"encoder": params["encoder"]}}, alone)
    found = np.asarray(jax.nn.log_softmax(scores))
    expected = 0.0
    for number, text in enumerate(texts):
        expected -= float(np.mean([found[number, i, text[i + 1]] for i in range(len(text) - 1)]))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_only_decoders_have_these(
    sst2: Path, decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert = Path(__file__).parents[2] / "models" / "fixtures" / "bert_model"
    for folder, more, said in (
        (bert, ("--auxiliary-lm", "0.5", "--max-length", "12"), "--auxiliary-lm: BERT is no decoder"),
        (bert, ("--delimiters", "True", "--max-length", "12"), "--delimiters: BERT is no decoder"),
        (decoder, ("--delimiters", "True", "--lora-rank", "2"), "adapters leave the vectors of new tokens"),
    ):
        assert finetune(folder, sst2, tmp_path / "run", *more) == 1
        assert said in capsys.readouterr().err

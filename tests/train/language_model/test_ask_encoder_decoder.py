"""Tasks by prompts with an encoder-decoder: the prompt is its source, an answer its output; and translation."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary import models
from bestiary.data import Corpus, train_tokenizer
from bestiary.data.tokenizers.pairs import TextForm
from bestiary.data.tokenizers.pairs_training import train_subwords
from bestiary.models.encoder_decoders.bart import Bart, BartConfig
from bestiary.train.cli import main

REVIEWS = [("a joy from start to end", 1), ("dull", 0), ("warm and funny", 1), ("it never ends", 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("bart")
    (found / "all.txt").write_text("Review: it is warm and funny\nSentiment: negative positive\n" * 3)
    tokenizer = train_tokenizer("byte-bpe", Corpus((str(found / "all.txt"),)), vocab_size=290, family="roberta")
    model = Bart(BartConfig(
        vocab_size=tokenizer.vocab_size, width=16, encoder_layers=1, decoder_layers=1, encoder_heads=2, decoder_heads=2,
        encoder_feed_forward=24, decoder_feed_forward=20, positions=128, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_bos_token_id=0,
    ))  # fmt: skip
    draw = np.random.default_rng(0).normal
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    params = jax.tree.map(lambda leaf: draw(scale=0.3, size=leaf.shape).astype(np.float32), shapes)
    models.save(found / "model", model, params, tokenizer)
    return found / "model"


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["ask", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_likeliest_output(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in REVIEWS))
    out = tmp_path / "results.json"
    data = ("--task", "sst2", "--data", tmp_path / "dev.tsv", "--by", "per-token", "--json", "--out", out)
    status, _, said = run(capsys, "--model", folder, *data)
    assert status == 0, said
    loaded = models.load(folder, head="generation")
    model, params, tokenizer = loaded.model, loaded.params, loaded.tokenizer
    assert tokenizer is not None
    answers = [tokenizer.encode_batch([text])[0] for text in ("negative", "positive")]
    longest = max(map(len, answers))

    @jax.jit
    def scores(ids: Any, segments: Any, inputs: Any) -> Any:
        return jax.nn.log_softmax(model.apply({"params": params}, ids, segments, None, inputs))

    expected = []
    for text, _ in REVIEWS:
        (ids,) = tokenizer.encode_batch([f"Review: {text}\nSentiment:"], add_special_tokens=True)
        row, segments = np.zeros((1, 64), np.int32), np.zeros((1, 64), np.int32)
        row[0, : len(ids)], segments[0, : len(ids)] = ids, 1
        values = []
        for answer in answers:
            inputs = [2, 0, *answer, *[1] * (longest - len(answer))]
            found = scores(row, segments, jnp.array([inputs]))[0]
            values.append(float(found[1 + jnp.arange(len(answer)), jnp.array(answer)].mean()))
        expected.append(int(np.argmax(values)))
    assert list(json.loads(out.read_text())["answers"].values()) == expected


def test_translation(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.en").write_text("warm\ndull and warm\n")
    (tmp_path / "a.de").write_text("warm\ntrüb und warm\n")
    (tmp_path / "pairs.tsv").write_text("it ends\tes endet\n")
    model = ("--model", folder, "--task", "translation", "--data", tmp_path / "a.en")
    target = ("--target", tmp_path / "a.de")
    status, out, said = run(
        capsys,
        *model,
        *target,
        "--train",
        tmp_path / "pairs.tsv",
        "--shots",
        1,
        "--json",
        "--prompt",
        "en: {first} de:",
    )
    assert status == 0, said
    found = json.loads(out)
    assert (found["examples"], found["by"], set(found["metrics"])) == (2, "generation", {"bleu", "chrf"})
    assert found["baseline"] == {"bleu": 0, "chrf": 0}
    for more, message in (
        (("--data", "tfds:pairs"), "tfds:pairs: a data set. Expected lines, with --target for their translations"),
        ((*target, "--by", "likelihood"), "answers of translation are generated"),
        ((*target, "--train-target", tmp_path / "a.de"), "--train-target: it holds the translations of --train"),
        ((*target, "--task", "sst2"), "--target and --train-target are for translation"),
    ):
        status, _, said = run(capsys, *model, *more)
        assert (status, message in said) == (1, True), said


def test_a_translator_has_no_tokenizer_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixture = Path(__file__).parents[2] / "models" / "fixtures" / "marian_translation"
    for name in ("config.json", "model.safetensors"):
        shutil.copy(fixture / name, tmp_path)
    texts = [text for text, _ in REVIEWS]
    train_subwords("bpe", lambda: texts, lambda: texts, vocab_size=40, joint=True, form=TextForm()).save(tmp_path)
    (tmp_path / "a.tsv").write_text("warm\twarm\n")
    status, _, said = run(capsys, "--model", tmp_path, "--task", "translation", "--data", tmp_path / "a.tsv")
    assert (status, "its tokenizer is one of two languages, for `bestiary translate`" in said) == (1, True), said

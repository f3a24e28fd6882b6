"""Generation and perplexity from the command line, with a small model of random weights."""

import io
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary import models
from bestiary.data import Corpus, Tokenizer, train_tokenizer
from bestiary.data.tokenizers.text_stream import TextStream
from bestiary.models import registry
from bestiary.models.decoders.gpt2 import GPT2Config
from bestiary.models.decoders.transformer_xl import TransformerXLConfig, TransformerXLModel
from bestiary.train.cli import main
from bestiary.train.language_model import generate
from bestiary.train.language_model.generate import GenerateConfig, PromptDecodeConfig, one_line
from bestiary.train.language_model.model import LanguageModel
from bestiary.train.language_model.perplexity import windows

TEXT = "The sea was calm, and a ship went by. Größe, 海は静か, ёж 🙂🙃.\n" * 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("text") / "all.txt"
    path.write_text(TEXT)
    return train_tokenizer("byte-bpe", Corpus((str(path),)), vocab_size=290, family="gpt2")


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = GPT2Config.vocabulary_fields(tokenizer.vocab_size, tokenizer.special_ids)
    config = GPT2Config(width=16, layers=2, heads=2, feed_forward=32, positions=64, **vocabulary)
    model = registry.family_named("gpt2").build("causal_lm", config)
    params = nn.unbox(jax.jit(partial(registry.init_params, model))(jax.random.key(1)))
    params = jax.tree.map(lambda leaf: np.asarray(leaf) * (1 if leaf.ndim == 1 else 15), params)
    found = tmp_path_factory.mktemp("gpt2")
    models.save(found / "model", model, params, tokenizer)
    return found / "model"


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def of_lines(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    class Stdin:
        buffer = io.BytesIO("".join(f"{line}\n" for line in lines).encode())

    monkeypatch.setattr(sys, "stdin", Stdin)


# Text, piece by piece


def test_no_half_of_a_character_is_shown(tokenizer: Tokenizer) -> None:
    text = "Größe 海は ёж 🙂🙃!"
    before, ids = tokenizer.encode_batch(["The sea ", text])
    stream = TextStream(tokenizer, before)
    pieces = [stream.push([token]) for token in ids]
    assert "".join(pieces) + stream.finish() == stream.text == text
    assert "\ufffd" not in "".join(pieces)
    assert any(not piece for piece in pieces)
    # The end is missing: what is whole is shown.
    cut = TextStream(tokenizer, before)
    cut.push(ids[: [i for i, piece in enumerate(pieces) if not piece][-1] + 1])
    cut.finish()
    assert text.startswith(cut.text)
    assert "\ufffd" not in cut.text


def test_a_stop_string_across_tokens_is_not_shown(tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_batch(["and a ship went by. The sea"])
    # The first to be complete ends the text.
    for stop, expected in (
        (["ip we"], "and a sh"),
        (["zzz", "went by. T"], "and a ship "),
        (["ship", "a ship went"], "and a "),
    ):
        stream = TextStream(tokenizer, (), stop)
        shown = "".join(stream.push([token]) for token in ids)
        assert stream.stopped
        assert shown + stream.finish() == stream.text == expected
    stream = TextStream(tokenizer, (), ["sea at night"])
    shown = "".join(stream.push([token]) for token in ids)
    assert not stream.stopped
    assert shown != "and a ship went by. The sea"
    assert shown + stream.finish() == "and a ship went by. The sea"


# bestiary generate


def test_prompts_of_unlike_length_together_are_as_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["The sea", "", "a ship went by. Größe, 海は静か", "T"]
    of_lines(monkeypatch, *prompts)
    status, out, _ = run(capsys, "generate", "--model", folder, "--json", "--max-length", 12, "--batch", 4)
    assert status == 0
    together = [json.loads(line) for line in out.splitlines()]
    assert [found["prompt"] for found in together] == prompts
    for found in together:
        status, alone, _ = run(capsys, "generate", "--model", folder, "--max-length", 12, "--prompt", found["prompt"])
        assert status == 0
        assert alone == found["text"] + "\n"
        assert found["ended"] in ("length", "end")


def test_stop_strings_end_outputs(
    folder: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Recorded(generate.Output):
        def __init__(self, prompt: str, text: str, hypothesis: Any, ended: str):
            super().__init__(prompt, text, hypothesis, ended)
            made.append(hypothesis)

    monkeypatch.setattr(generate, "Output", Recorded)
    _, whole, _ = run(capsys, "generate", "--model", folder, "--max-length", 24, "--prompt", "The sea")
    whole = whole.removesuffix("\n")
    stop = whole[6:9]
    expected = whole.partition(stop)[0]
    status, shown, _ = run(
        capsys, "generate", "--model", folder, "--max-length", 24, "--prompt", "The sea", "--stop", stop
    )
    assert (status, shown) == (0, expected + "\n")
    all_tokens, stopped = made[0].tokens, made[1]
    stream = TextStream(tokenizer, tokenizer.encode_batch(["The sea"])[0], [stop])
    count = next(n for n, token in enumerate(all_tokens, 1) if stream.push([token]) is not None and stream.stopped)
    assert stopped.tokens == all_tokens[:count]
    for more in ((), ("--beam", "2")):
        of_lines(monkeypatch, "The sea", "a ship")
        status, out, _ = run(capsys, "generate", "--model", folder, "--max-length", 24, "--json", "--stop", stop, *more)
        first = json.loads(out.splitlines()[0])
        assert status == 0
        assert stop not in first["text"]
        if not more:
            assert (first["text"], first["ended"]) == (expected, "stop")
            assert first["tokens"] == count  # whatever is continued with it
            assert first["score"] == pytest.approx(stopped.score, rel=1e-5)


def test_samples_depend_on_the_seed_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(*more: Any) -> str:
        arguments = ("generate", "--model", folder, "--max-length", 12, "--prompt", "The sea", "--top-p", 0.95)
        status, out, _ = run(capsys, *arguments, *more)
        assert status == 0
        return out

    assert sample("--seed", 1) == sample("--seed", 1) != sample("--seed", 2)
    several = sample("--seed", 1, "--n-best", 3).removesuffix("\n").split("\n")
    assert len(several) == 3
    assert several[0] == one_line(sample("--seed", 1).removesuffix("\n"))
    assert len(set(several)) > 1


def test_a_prompt_that_is_too_long_is_refused_or_cut(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = TEXT * 2
    status, _, said = run(capsys, "generate", "--model", folder, "--max-length", 12, "--prompt", long)
    assert status == 1
    assert "tokens and --max-length 12 more do not fit the model's 64 positions" in said
    status, out, said = run(
        capsys, "generate", "--model", folder, "--max-length", 12, "--prompt", long, "--too-long", "cut"
    )
    assert status == 0
    assert "1 prompt cut at the beginning" in said
    assert out


def test_what_is_no_language_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    bert = Path(__file__).parents[2] / "models" / "fixtures" / "bert_model"
    status, _, said = run(capsys, "generate", "--model", bert, "--prompt", "The sea")
    assert status == 1
    assert "holds a BERT, which is no language model" in said
    status, _, said = run(capsys, "generate", "--model", bert.with_name("gpt2_lm"), "--prompt", "The sea")
    assert status == 1
    assert "no tokenizer files" in said
    assert PromptDecodeConfig(top_k=5).sample
    with pytest.raises(ValueError, match="--stop: an empty string"):
        GenerateConfig(bert, stop=("",))


# bestiary perplexity


def test_every_token_is_predicted_once() -> None:
    for length in range(2, 40):
        for window in range(1, 12):
            for stride in range(1, window + 1):
                predicted = [
                    token for first, end, count in windows(length, window, stride) for token in range(end - count, end)
                ]
                assert predicted == list(range(1, length))
                for number, (first, end, count) in enumerate(windows(length, window, stride)):
                    assert first == number * stride
                    assert count < end - first <= window + 1


def test_a_model_without_a_limit_needs_a_window(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(LanguageModel, "positions", None)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    status, _, said = run(capsys, "perplexity", "--model", folder, "--text", path)
    assert (status, "--window: the model has no limit of positions" in said) == (1, True)


def test_perplexity_with_a_memory_of_the_text_before(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With enough of it, windows are the text at once."""
    vocabulary = TransformerXLConfig.vocabulary_fields(tokenizer.vocab_size, tokenizer.special_ids)
    sizes: dict[str, Any] = dict(width=16, embedding_size=16, layers=1, heads=2, head_size=8, feed_forward=32)
    model = TransformerXLModel(TransformerXLConfig(**sizes, divisor=1, memory=16, **vocabulary))
    params = nn.unbox(jax.jit(partial(registry.init_params, model))(jax.random.key(1)))
    params = jax.tree.map(lambda leaf: np.asarray(leaf) * (1 if leaf.ndim == 1 else 15), params)
    models.save(tmp_path / "model", model, params, tokenizer)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    (ids,) = tokenizer.encode_batch([TEXT])
    scores = jax.jit(lambda ids: model.apply({"params": params}, ids))
    half = len(ids) // 2  # in two parts, each with a memory of its own
    expected = 0.0
    for part in (ids[: half + 1], ids[half : 2 * half + 1]):
        found = np.asarray(scores(jnp.array([part])))[0]
        expected -= float(found[np.arange(len(part) - 1), part[1:]].sum())
    command = ("perplexity", "--model", tmp_path / "model", "--text", path, "--json", "--window", 16)
    status, out, _ = run(capsys, *command, "--memory", 10**9, "--batch", 2)
    found = json.loads(out)
    assert (status, found["memory"], found["parts"], found["tokens_predicted"]) == (0, 10**9, 2, len(ids) - 1)
    _, out, _ = run(capsys, *command[:5], "--window", 16, "--memory", 512, "--batch", 2)
    assert f"in 2 parts that are read together, each in {found['windows']} windows of 16 tokens, with a memory" in out
    assert found["nats"] == pytest.approx(expected, rel=1e-5)
    status, _, said = run(capsys, *command, "--stride", 8)
    assert (status, "--stride: windows of a model with a memory follow each other" in said) == (1, True)


def test_perplexity_is_that_of_the_probabilities(
    folder: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    model, params, _, _ = models.load(folder)
    (ids,) = tokenizer.encode_batch([TEXT])
    scores_of = jax.jit(lambda ids: jax.nn.log_softmax(model.apply({"params": params}, ids)[0]))
    for window, stride, begin in ((32, 8, False), (64, 64, True)):
        given = [*([tokenizer.eos_id] if begin else []), *ids]
        total = 0.0
        for first, end, count in windows(len(given), window, stride):
            text = np.zeros((1, 64), np.int32)  # one length for all: no token sees what follows
            text[0, : end - first - 1] = given[first : end - 1]
            chosen = np.asarray(scores_of(text))[np.arange(end - first - 1), given[first + 1 : end]]
            total -= float(chosen[-count:].sum())
        flags = ["--stride", stride, "--window", window, *(["--begin"] if begin else [])]
        status, out, _ = run(capsys, "perplexity", "--model", folder, "--text", path, "--json", *flags)
        found = json.loads(out)
        assert status == 0
        assert found["nats"] == pytest.approx(total, rel=1e-5)
        assert found["tokens_predicted"] == len(given) - 1
        assert found["perplexity_per_token"] == pytest.approx(math.exp(total / (len(given) - 1)), rel=1e-5)
        assert found["bits_per_character"] == pytest.approx(total / math.log(2) / len(TEXT), rel=1e-5)
        assert (found["words"], found["characters"]) == (len(TEXT.split()), len(TEXT))
    status, out, _ = run(capsys, "perplexity", "--model", folder, "--text", path)
    assert status == 0
    assert "windows of 64 tokens, 64 apart" in out
    path.write_text("T")
    status, _, said = run(capsys, "perplexity", "--model", folder, "--text", path)
    assert (status, "nothing to predict" in said) == (1, True)

"""Tasks by prompts: prompts as written, probabilities as computed apart, official metrics; with a random model."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary import models
from bestiary.data import Corpus, Tokenizer, train_tokenizer
from bestiary.models import registry
from bestiary.models.decoders.gpt2 import GPT2Config
from bestiary.train.cli import main
from bestiary.train.language_model.ask import with_shots
from bestiary.train.language_model.asked_tasks import NAMES, asked_task, default_template
from bestiary.train.language_model.templates import TEMPLATES

pytestmark = pytest.mark.usefixtures("optimised")

REVIEWS = [("a joy from start to end", 1), ("dull", 0), ("warm and funny", 1), ("it never ends", 0), ("a mess", 0)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("text") / "all.txt"
    texts = [template.prompt for template in TEMPLATES.values()] + [text for text, _ in REVIEWS]
    path.write_text("\n".join(texts * 3))
    return train_tokenizer("byte-bpe", Corpus((str(path),)), vocab_size=300, family="gpt2")


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = GPT2Config.vocabulary_fields(tokenizer.vocab_size, tokenizer.special_ids)
    config = GPT2Config(width=16, layers=2, heads=2, feed_forward=32, positions=256, **vocabulary)
    model = registry.family_named("gpt2").build("causal_lm", config)
    params = nn.unbox(registry.init_params(model, jax.random.key(1)))
    params = jax.tree.map(lambda leaf: np.asarray(leaf) * (1 if leaf.ndim == 1 else 12), params)
    found = tmp_path_factory.mktemp("gpt2") / "model"
    models.save(found, model, params, tokenizer)
    return found


@pytest.fixture(scope="module")
def sst2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("SST-2")
    for name, rows in (("train", REVIEWS), ("dev", [(f"so {text}", label) for text, label in REVIEWS])):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        (found / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return found


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["ask", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_task_has_a_template() -> None:
    assert set(NAMES) <= set(TEMPLATES)
    for name, template in TEMPLATES.items():
        assert not template.prompt.endswith(" ")
        assert "{first}" in template.prompt
        assert all(answer.startswith(" ") for answer in template.answers or ()), name
    assert TEMPLATES["sst2"].context == "Sentiment:"
    assert TEMPLATES["swag"].context == ""


def test_shots_are_drawn_by_the_seed_and_the_example(sst2: Path) -> None:
    task = asked_task("sst2", sst2, None, "dev", None, default_template("sst2", False), {})
    prompt = with_shots(task, 3, 2, 5)
    assert prompt == with_shots(task, 3, 2, 5)
    assert prompt.endswith("\n\nReview: so it never ends\nSentiment:")
    assert prompt.count("Review:") == 3
    for shot in prompt.split("\n\n")[:-1]:
        text = shot.removeprefix("Review: ").partition("\n")[0]
        assert shot.endswith((" negative", " positive")[dict(REVIEWS)[text]])
    assert len({with_shots(task, 3, 2, seed) for seed in range(20)}) > 5
    assert with_shots(task, 0, 0, 5) == "Review: so a joy from start to end\nSentiment:"


@pytest.mark.parametrize("by", ["likelihood", "per-token", "calibrated"])
def test_the_likeliest_answer(
    folder: Path, sst2: Path, tokenizer: Tokenizer, by: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    status, printed, said = run(
        capsys, "--model", folder, "--task", "sst2", "--data", sst2, "--shots", 1, "--by", by, "--json", "--out", out
    )
    assert status == 0, said
    results = json.loads(printed)
    answers = json.loads(out.read_text())["answers"]
    model, params, _, _ = models.load(folder)
    task = asked_task("sst2", sst2, None, "dev", None, default_template("sst2", False), {})

    def log_p(prompt: str, answer: str) -> tuple[float, int]:
        before, after = tokenizer.encode_batch([prompt, answer])
        logits = model.apply({"params": params}, jnp.array([[*before, *after]]))[0]
        rows = jax.nn.log_softmax(logits)[len(before) - 1 : -1]
        return float(rows[jnp.arange(len(after)), jnp.array(after)].sum()), len(after)

    expected = []
    for number in range(len(task.items)):
        scores = []
        for answer in (" negative", " positive"):
            value, count = log_p(with_shots(task, number, 1, 0), answer)
            value -= log_p("Sentiment:", answer)[0] if by == "calibrated" else 0
            scores.append(value / count if by == "per-token" else value)
        expected.append(int(np.argmax(scores)))
    assert list(answers.values()) == expected
    labels = np.array([label for _, label in REVIEWS])
    assert results["metrics"]["accuracy"] == pytest.approx((np.array(expected) == labels).mean())
    assert results["baseline"]["accuracy"] == pytest.approx(0.6)


def test_generated_answers_and_every_kind_of_data(
    folder: Path, sst2: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = ("--model", folder)
    status, out, said = run(capsys, *model, "--task", "sst2", "--data", sst2, "--by", "generation", "--json")
    assert status == 0, said
    found = json.loads(out)
    assert found["answers_outside"] + round(found["metrics"]["accuracy"] * 5) <= 5

    codah = tmp_path / "codah.tsv"
    codah.write_text("".join(f"c\tThe sea {n}\tis calm\tis dry\tis a\tis b\t{n % 4}\n" for n in range(20)))
    status, out, said = run(capsys, *model, "--task", "codah", "--data", codah, "--shots", 1, "--json")
    assert status == 0, said
    assert json.loads(out)["examples"] == 4

    squad = {"paragraphs": [{"context": "Bede wrote it.", "qas": [
        {"id": "a", "question": "Who?", "answers": [{"text": "Bede", "answer_start": 0}], "is_impossible": False},
        {"id": "b", "question": "When?", "answers": [], "is_impossible": True},
    ]}]}  # fmt: skip
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "2", "data": [squad]}))
    status, out, said = run(capsys, *model, "--task", "squad", "--data", path, "--train", path, "--shots", 1, "--json")
    assert status == 0, said
    assert json.loads(out)["baseline"]["exact"] == 50

    table = tmp_path / "table.csv"
    table.write_text("review,stars\ngood,five\nbad,one\nfine,five\n")
    status, out, said = run(
        capsys, *model, "--task", "classification", "--data", table, "--text", "review", "--label", "stars"
    )
    assert status == 0, said
    assert "baseline" in out

    stsb = tmp_path / "STS-B"
    stsb.mkdir()
    rows = "".join(f"{n}\ta {n}\tb {n}\t{n}.0\n" for n in range(5))
    (stsb / "dev.tsv").write_text("index\tsentence1\tsentence2\tscore\n" + rows)
    status, out, said = run(capsys, *model, "--task", "stsb", "--data", stsb / "dev.tsv", "--limit", 3, "--json")
    assert status == 0, said
    assert set(json.loads(out)["metrics"]) == {"pearson", "spearman", "score"}


def test_what_cannot_be_asked_is_refused(folder: Path, sst2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: Any) -> str:
        status, _, said = run(capsys, "--model", folder, "--task", "sst2", "--data", sst2, *arguments)
        assert status == 1
        return said

    assert "there are 5 examples to show" in refused("--shots", 6)
    long = "Review: {first} " + "and so on " * 60 + "\nSentiment:"
    assert "its prompt with 0 shots takes" in refused("--prompt", long)
    assert "have the same tokens" in refused("--answers", "good", "good")
    assert "expected 2, found 1" in refused("--answers", "good")
    assert "expected {first}" in refused("--prompt", "Well?")
    squad = refused("--by", "likelihood", "--task", "squad")
    assert "answers of squad are generated" in squad

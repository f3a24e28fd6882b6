"""Tasks by prompts: prompts as written, probabilities as computed apart, official metrics; with a random model."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from bestiary import models
from bestiary.data import Corpus, Tokenizer, train_tokenizer
from bestiary.models import registry
from bestiary.models.decoders.gpt2 import GPT2Config
from bestiary.train.cli import main
from bestiary.train.errors import RunError
from bestiary.train.language_model import ask
from bestiary.train.language_model.ask import AskConfig, with_shots
from bestiary.train.language_model.asked_tasks import NAMES, AskedTask, Item, asked_task, default_template
from bestiary.train.language_model.model import LanguageModel
from bestiary.train.language_model.templates import TEMPLATES
from bestiary.train.progress import Progress

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
    params = nn.unbox(jax.jit(partial(registry.init_params, model))(jax.random.key(1)))
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


def test_the_question_itself_is_not_shown(sst2: Path) -> None:
    task = asked_task("sst2", sst2, None, "train", None, default_template("sst2", False), {})
    for number, item in enumerate(task.items):
        prompt = with_shots(task, number, 4, 0)
        assert (prompt.count("Review:"), prompt.count(item.prompt)) == (5, 1)
    with pytest.raises(
        RunError, match=f"4 examples to show before example {task.items[2].key}, whose own prompt is not shown"
    ):
        with_shots(task, 2, 5, 0)


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

    scores_of = jax.jit(lambda ids: jax.nn.log_softmax(model.apply({"params": params}, ids)[0]))

    def log_p(prompt: str, answer: str) -> tuple[float, int]:
        before, after = tokenizer.encode_batch([prompt, answer])
        ids = np.zeros((1, model.config.positions), np.int32)  # one length for all: no token sees what follows
        ids[0, : len(before) + len(after)] = before + after
        rows = np.asarray(scores_of(ids))[len(before) - 1 :]
        return float(rows[np.arange(len(after)), after].sum()), len(after)

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


@pytest.fixture
def unlimited(tokenizer: Tokenizer) -> LanguageModel:
    """A model that only its tokenizer is used of."""
    config = SimpleNamespace(max_length=None, bos_token_id=None, eos_token_id=None)
    return LanguageModel(SimpleNamespace(config=config), None, tokenizer)


def test_answers_begin_with_whole_words() -> None:
    item = Item("0", "", (" no", " nothing", " 1", " is calm.", " not at all"), 0)
    for text, expected in (
        ("No.", 0),
        ("nothing", 1),
        ("none", None),
        ("1990", None),
        ("1, I think", 2),
        ("is calm.Really", 3),
        ("not at all", 4),
        ("not", None),
        ("", None),
    ):
        assert ask.matched(text, item) == expected, text


def test_answers_outside_tell_nothing_of_values(
    unlimited: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "dev.tsv"
    rows = "".join(f"{n}\ta {n}\tb {n}\t{n}.0\n" for n in range(5))
    path.write_text("index\tsentence1\tsentence2\tscore\n" + rows)
    config = AskConfig(tmp_path, "stsb", path, by="generation")
    task = asked_task("stsb", path, None, "dev", None, default_template("stsb", False), {})
    monkeypatch.setattr(ask, "by_generation", lambda *_: ["babble", "4", "babble", "0", "babble"])
    predictions, counts = ask.answer(unlimited, task, config, Progress())
    assert (predictions, counts) == ([2.0, 4, 2.0, 0, 2.0], {"answers_outside": 3})
    results = {"task": "stsb", "examples": 5, "shots": 0, "by": "generation", "metrics": {}, "baseline": {}, **counts}
    results["metrics"] = task.metrics(predictions)
    assert "3 answers were none of the candidates, which counts as the mean" in ask.described(results, values=True)
    assert "3 answers were none of the candidates, which counts as wrong" in ask.described(results, values=False)


def test_a_generated_answer_may_be_as_long_as_the_candidates(
    unlimited: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = " and so on" * 20

    class Typist:
        def __init__(self, model: Any, params: Any, decode: Any, *, rows: int):
            self.most = decode.max_length

        def __call__(self, prompts: list[list[int]], *, watch: Any) -> None:
            (typed,) = unlimited.tokenizer.encode_batch([f"{long} b\n"])
            for number in range(len(prompts)):
                watch.seen(number, typed[: self.most], True)

    monkeypatch.setattr("bestiary.train.generate.generator.Generator", Typist)
    item = Item("0", "Well:", (f"{long} a", f"{long} b"), 1)
    task = AskedTask(TEMPLATES["codah"], [item], [], False, lambda _: {}, [0])
    config = AskConfig(Path(), "codah", Path(), by="generation")
    assert ask.answer(unlimited, task, config, Progress()) == ([1], {"answers_outside": 0})


def test_messages_name_the_example(unlimited: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    item = Item("seven", "", (" a", " a"), 0)
    with pytest.raises(RunError, match=r"^example seven: the answers ' a' and ' a' have the same tokens\.$"):
        ask.encode_answers(unlimited, item, common=False)
    with pytest.raises(RunError, match=r"^the answers .* have the same tokens; give other --answers\.$"):
        ask.encode_answers(unlimited, item, common=True)
    task = AskedTask(TEMPLATES["codah"], [item._replace(answers=(" a", " b"))], [], False, lambda _: {}, [0])
    monkeypatch.setattr(LanguageModel, "first_id", None)
    for by in ("likelihood", "generation"):
        with pytest.raises(RunError, match=r"^example seven: its prompt is empty, and the model has no token"):
            ask.answer(unlimited, task, AskConfig(Path(), "codah", Path(), by=by), Progress())


def test_answers_of_a_table_are_as_many_as_its_labels(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("review,stars\ngood,five\nbad,one\nfine,three\n")
    columns = {"text": "review", "text_pair": None, "label": "stars"}
    template = default_template("classification", False)
    for answers in ((" bad", " good"), (" a", " b", " c", " d")):
        with pytest.raises(RunError, match=f"expected 3, for the labels .*'three'.*; found {len(answers)}: '"):
            asked_task("classification", table, None, "dev", None, template._replace(answers=answers), columns)
    answers = (" a", " b", " c")
    task = asked_task("classification", table, None, "dev", None, template._replace(answers=answers), columns)
    assert task.items[0].answers == answers


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
    assert "expected {second} too" in refused("--prompt", "Text: {first}", "--task", "mrpc")
    squad = refused("--by", "likelihood", "--task", "squad")
    assert "answers of squad are generated" in squad

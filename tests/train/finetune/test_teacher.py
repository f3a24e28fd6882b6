"""Distillation of a fine-tuned teacher: what is imitated in each task, runs, and teachers that do not fit."""

import json
import random
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from bestiary import models
from bestiary.models.encoders.bert import BertConfig
from bestiary.train.cli import main
from bestiary.train.finetune.tasks.choice import ChoiceTask
from bestiary.train.finetune.tasks.squad import SquadTask
from bestiary.train.finetune.tasks.tagging import Tagged, TaggingTask
from bestiary.train.finetune.tasks.text import TextTask
from bestiary.train.finetune.teacher import imitation

DRAW = np.random.default_rng(3)


def drawn(*shape: int) -> np.ndarray:
    return DRAW.normal(size=shape).astype(np.float32) * 2


def apart(taught: np.ndarray, own: np.ndarray, temperature: float) -> float:
    """T² times the divergence of one prediction, in float64."""
    told, said = (log_softmax(logits.astype(np.float64) / temperature) for logits in (taught, own))
    return temperature**2 * float((np.exp(told) * (told - said)).sum())


def found(task, own, taught, batch, temperature: float = 3.0) -> float:
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    return float(imitation(task, own, taught, arrays, temperature))


def text_task(labels: tuple[str, ...] | None) -> TextTask:
    return TextTask("classification", 8, labels, labels, ("accuracy",), False)


def test_classes_and_values_of_texts():
    own, taught, weights = drawn(2, 3, 4), drawn(2, 3, 4), np.float32([[1, 1, 0], [1, 0, 0]])
    task, batch = text_task(("a", "b", "c", "d")), {"segment_weights": weights}
    expected = sum(apart(taught[i], own[i], 3.0) for i in zip(*np.nonzero(weights), strict=True))
    assert found(task, jnp.asarray(own), jnp.asarray(taught), batch) == pytest.approx(expected, rel=1e-5)
    own, taught = own[..., :1], taught[..., :1]
    expected = (np.square(own - taught)[..., 0] * weights).sum()
    assert found(text_task(None), jnp.asarray(own), jnp.asarray(taught), batch) == pytest.approx(expected, rel=1e-5)


def test_choices():
    own, taught, weights = drawn(2, 8), drawn(2, 8), np.float32([[1] * 8, [1] * 4 + [0] * 4])
    expected = sum(apart(taught[row, at : at + 4], own[row, at : at + 4], 3.0) for row, at in ((0, 0), (0, 4), (1, 0)))
    task = ChoiceTask("swag", 8)
    given = jnp.asarray(own), jnp.asarray(taught)
    assert found(task, *given, {"segment_weights": weights}) == pytest.approx(expected, rel=1e-5)


def tagger(*, crf: bool) -> TaggingTask:
    labels = ("O", "B-x", "I-x")
    return TaggingTask("ner", 8, labels, crf, 1.0, False, "iob2", False, 0, -1, "upos")  # type: ignore[arg-type]


def test_tags():
    own, taught, weights = drawn(2, 5, 3), drawn(2, 5, 3), np.float32([[0, 1, 1, 0, 0], [0, 1, 0, 1, 0]])
    expected = sum(apart(taught[i], own[i], 3.0) for i in zip(*np.nonzero(weights), strict=True))
    given = (Tagged(jnp.asarray(logits), None) for logits in (own, taught))
    assert found(tagger(crf=False), *given, {"label_weights": weights}) == pytest.approx(expected, rel=1e-5)
    assert tagger(crf=False).inimitable is None
    assert "a CRF predicts whole sequences" in (tagger(crf=True).inimitable or "")


def test_spans_are_of_their_windows_alone():
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]], np.int32)
    batch = {"segment_ids": segments, "cls_positions": np.array([[0, 3], [0, 0]], np.int32),
             "segment_weights": np.float32([[1, 1], [1, 0]])}  # fmt: skip
    own, taught = ((drawn(2, 6), drawn(2, 6)) for _ in range(2))
    windows = ((0, slice(0, 3)), (0, slice(3, 5)), (1, slice(0, 4)))
    sides = zip(own, taught, strict=True)
    expected = sum(apart(theirs[i][w], mine[i][w], 3.0) / 2 for mine, theirs in sides for i, w in windows)
    task = SquadTask("squad", 16, 8, 4, 4, 3, None, False)
    given = [tuple(map(jnp.asarray, side)) for side in (own, taught)]
    assert found(task, *given, batch) == pytest.approx(expected, rel=1e-5)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sentence_encoder) -> Path:
    """Examples, whose class is whether a word is in them; teachers, drawn at random; and a student."""
    folder = tmp_path_factory.mktemp("teachers")
    draw = random.Random(0)
    for name, count in (("train", 48), ("dev", 16)):
        rows = (" ".join(draw.choices(("ban", "kord", "list", "mulo", "terma"), k=6)) for _ in range(count))
        lines = (f"{text},{'yes' if 'ban' in text else 'no'}\n" for text in rows)
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(lines))

    def teacher(name: str, labels: tuple[str, ...] = ("no", "yes"), **changes) -> None:
        shaped = dict(num_labels=len(labels), label_names=labels, problem_type="single_label_classification")
        loaded = models.load(sentence_encoder, head="classification", **shaped, seed=5)
        model, params = loaded.model, loaded.params
        params["classifier"]["kernel"] = params["classifier"]["kernel"] * 30  # it is sure of what it says
        if changes:
            model = model.clone(config=BertConfig(**{**vars(loaded.config), **changes}))
            table = params["encoder"]["embeddings"]["position"]
            table["embedding"] = table["embedding"][: changes["positions"]]
        models.save(folder / name, model, params, loaded.tokenizer)

    teacher("teacher")
    teacher("other-classes", ("bad", "good"))
    teacher("short", positions=8)
    (folder / "headless").symlink_to(sentence_encoder)
    teacher("run/model")
    (folder / "run" / "task.json").write_text(json.dumps({"name": "rte"}))
    return folder


def finetune(folder: Path, out: Path, *more: str, teacher: str = "teacher", steps: str = "6") -> int:
    flags = {"train": "train.csv", "dev": "dev.csv", "model": "headless", "teacher": teacher}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(folder / value))]
    fast = ("--text", "text", "--max-length", "16", "--steps", steps, "--learning-rate", "5e-3", "--log-every", "1")
    return main(["finetune", "classification", *words, *fast, "--checkpoint-every", "3", "--out", str(out), *more])


def test_a_run_and_one_that_goes_on(folder, tmp_path):
    sure = ("--teacher-weight", "1")
    assert finetune(folder, tmp_path / "run", *sure) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    taught = [line["teacher_loss"] for line in lines if "teacher_loss" in line]
    assert len(taught) == 6
    assert min(taught[3:]) < taught[0]
    named = ("--resume-from", str(tmp_path / "run" / "checkpoints" / "3"))
    assert finetune(folder, tmp_path / "resumed", *sure, *named) == 0
    kept, expected = ((tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("resumed", "run"))
    assert kept == expected
    config = json.loads((tmp_path / "run" / "config.json").read_text())["run"]["distil"]
    assert len(config["teacher_fingerprint"]) == 32


@pytest.mark.parametrize(
    ("teacher", "flags", "message"),
    [
        ("run", [], "it was fine-tuned on rte, not on classification"),
        ("run/model", [], "it was fine-tuned on rte, not on classification"),
        ("other-classes", [], "its classes are bad, good, not no, yes"),
        ("headless", [], "expected the head classification, found encoder"),
        ("short", [], "it has 8 positions, and rows have up to 16 tokens"),
        ("teacher", ["--temperature", "0"], "--temperature is 0.0; it must be above 0."),
        ("teacher", ["--teacher-weight", "1.5"], "--teacher-weight is 1.5; it must be above 0 and at most 1."),
        ("nowhere", [], "nowhere: no such folder"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(folder, tmp_path, capsys, teacher, flags, message):
    assert finetune(folder, tmp_path / "run", *flags, teacher=teacher) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_of_a_teacher_without_one_are_refused(folder, tmp_path, capsys):
    words = ["--train", str(folder / "train.csv"), "--model", str(folder / "headless"), "--out", str(tmp_path / "run")]
    assert main(["finetune", "classification", *words, "--temperature", "3"]) == 1
    assert "--temperature and --teacher-weight go with --teacher" in capsys.readouterr().err

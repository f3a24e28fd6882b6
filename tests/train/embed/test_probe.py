"""Probes: the head, the learned mix of layers, and features that are computed once."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from bestiary.train.cli import main
from bestiary.train.embed.extract import Extractor
from bestiary.train.embed.probe import Head, fit_head, joined, learn_mix

# --- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_a_classifiers_head_is_scikit_learns(classes: int):
    draw = np.random.default_rng(0)
    inputs, targets = draw.normal(size=(60, 5)) * 3 + 1, draw.integers(0, classes, 60)
    inputs[:, 0] += targets
    head = fit_head(inputs, targets, classes, 0.5, seed=0)
    scaled = StandardScaler().fit_transform(inputs)
    expected = LogisticRegression(C=0.5, max_iter=2000).fit(scaled, targets).predict_log_proba(scaled)
    logits = head(inputs)
    found = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert head.strength == 0.5


def test_a_class_without_examples_is_never_predicted():
    draw = np.random.default_rng(0)
    inputs, targets = draw.normal(size=(40, 3)), draw.choice([0, 2], 40)
    head = fit_head(inputs, targets, 4, 1.0, seed=0)
    assert set(head(draw.normal(size=(500, 3))).argmax(axis=1)) == {0, 2}
    one_vs_other = LogisticRegression(max_iter=2000).fit(StandardScaler().fit_transform(inputs), targets)
    np.testing.assert_array_equal(
        head(inputs).argmax(axis=1), one_vs_other.predict(StandardScaler().fit_transform(inputs))
    )


def test_a_regressions_head_is_scikit_learns():
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(50, 4))
    targets = inputs @ [1.0, -2.0, 0.0, 0.5] + 3
    scaled = StandardScaler().fit_transform(inputs)
    head = fit_head(inputs, targets, None, 0.1, seed=0)
    np.testing.assert_allclose(head(inputs)[:, 0], Ridge(alpha=10).fit(scaled, targets).predict(scaled), atol=1e-9)
    chosen = fit_head(inputs, targets, None, None, seed=0)
    assert chosen.strength == pytest.approx(100)  # without noise, the weakest penalty that is tried
    np.testing.assert_allclose(chosen(inputs)[:, 0], targets, atol=1e-2)


def test_the_strength_is_chosen_where_none_is_given():
    """One feature in fifty tells: strong regularisation predicts unseen examples better than almost none."""
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 2, 120)
    inputs = draw.normal(size=(120, 50))
    inputs[:, 0] += targets
    assert fit_head(inputs, targets, 2, None, seed=0).strength <= 0.1


def test_pairs_are_joined():
    u, v = np.float32([[1, -2]]), np.float32([[3, 4]])
    np.testing.assert_array_equal(joined([u]), u)
    np.testing.assert_array_equal(joined([u, v]), [[2, 6, 3, -8]])


@pytest.mark.parametrize("classes", [2, None])
def test_the_mix_takes_the_layer_that_tells(classes: int | None):
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 2, 200)
    vectors = draw.normal(size=(200, 4, 6)).astype(np.float32)
    vectors[:, 2, :3] += 3 * targets[:, None] - 1.5
    mixed = learn_mix([vectors], targets if classes else targets.astype(np.float64), classes)
    assert np.argmax(mixed.shares) == 2
    assert mixed.shares[2] > 0.5
    assert sum(mixed.shares) == pytest.approx(1)
    (found,) = mixed([vectors])
    np.testing.assert_allclose(found, mixed.gamma * np.einsum("k,nke->ne", mixed.shares, vectors), atol=1e-4)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory, made_up) -> Path:
    """Sentences that are long or short, as CSV."""
    path = tmp_path_factory.mktemp("table") / "lengths.csv"
    rows = "".join(f"{text},{'long' if len(text.split()) > 7 else 'short'}\n" for text in made_up(120))
    path.write_text(f"said,size\n{rows}")
    return path


def arguments(encoder: Path, table: Path, out: Path, *more: str) -> list[str]:
    columns = ["--data", str(table), "--text", "said", "--label", "size", "--cache", str(out.parent / "cache")]
    return ["probe", *columns, "--model", str(encoder), "--max-length", "20", "--out", str(out), *more]


def test_features_are_computed_once(sentence_encoder, table, tmp_path, monkeypatch, capsys):
    assert main(arguments(sentence_encoder, table, tmp_path / "first")) == 0
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    assert results["metrics"]["dev"].keys() == {"accuracy", "f1", "score"}
    assert results["metrics"]["train"]["accuracy"] > 0.7  # a mean's length tells something about how many it is of
    assert (results["training_examples"], results["features"], results["truncated_tokens"]) == (108, 16, 0)
    lines = (tmp_path / "first" / "predictions" / "dev.tsv").read_text().splitlines()
    assert len(lines) == 13
    assert set(lines[1].split("\t")[1:]) <= {"long", "short"}
    with np.load(tmp_path / "first" / "head.npz") as stored:
        head = Head(**stored, strength=0.0)
    assert head.kernel.shape == (16, 2)

    def computed(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Extractor, "__call__", computed)
    assert main(arguments(sentence_encoder, table, tmp_path / "second")) == 0
    assert (tmp_path / "second" / "results.json").read_text() == (tmp_path / "first" / "results.json").read_text()
    assert "read from" in capsys.readouterr().err
    for number, other in enumerate((("--pooling", "max"), ("--seed", "1"))):  # other features, other texts
        assert main(arguments(sentence_encoder, table, tmp_path / f"other-{number}", *other)) == 1
        assert "AssertionError: computed again" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["half", "a flipped bit", "something else"])
def test_damaged_features_are_computed_again(sentence_encoder, table, tmp_path, capsys, damage: str):
    assert main(arguments(sentence_encoder, table, tmp_path / "first")) == 0
    for path in (tmp_path / "cache").rglob("*.npz"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        half = bytes(content[: len(content) // 2])
        path.write_bytes({"half": half, "a flipped bit": bytes(content), "something else": b"[]"}[damage])
    capsys.readouterr()
    assert main(arguments(sentence_encoder, table, tmp_path / "second")) == 0
    assert (tmp_path / "second" / "results.json").read_text() == (tmp_path / "first" / "results.json").read_text()
    assert "is damaged" in capsys.readouterr().err


def test_pairs_with_a_mix_of_layers(sentence_encoder, made_up, tmp_path):
    """GLUE's files, with the official metrics of a regression; a pair's two texts are read apart."""
    folder = tmp_path / "STS-B"
    folder.mkdir()
    draw = random.Random(0)
    for split, count in (("train", 60), ("dev", 20)):
        rows = ""
        for number in range(count):
            first, other = made_up(2, seed=draw.random())
            same = draw.random() < 0.5
            rows += f"{number}\t{first}\t{first if same else other}\t{5 * same}\n"
        (folder / f"{split}.tsv").write_text(f"index\tsentence1\tsentence2\tscore\n{rows}")
    flags = ["--task", "stsb", "--data", str(tmp_path), "--mix", "--normalize", "--cache", str(tmp_path / "cache")]
    assert main(["probe", *flags, "--model", str(sentence_encoder), "--out", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["layers"] == [0, 1, 2]
    assert sum(results["mix"]["shares"]) == pytest.approx(1)
    assert results["features"] == 2 * 16
    assert results["metrics"]["dev"]["pearson"] > 0.8
    answers = (tmp_path / "run" / "predictions" / "dev" / "STS-B.tsv").read_text().splitlines()
    assert len(answers) == 21


def test_bad_input_is_one_message(sentence_encoder, table, tmp_path, capsys):
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("said,size\nbast,long\nbast\n")
    assert main(arguments(sentence_encoder, wrong, tmp_path / "run")) == 1
    assert f"{wrong}, line 3: expected 2 fields" in capsys.readouterr().err
    wrong.write_text("said,size\nbast,long\nkost,long\n")
    assert main(arguments(sentence_encoder, wrong, tmp_path / "run")) == 1
    assert "there is nothing to learn" in capsys.readouterr().err
    assert main(arguments(sentence_encoder, table, tmp_path / "run", "--label", "other")) == 1
    assert "no column 'other' (found: said, size)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

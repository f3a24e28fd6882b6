"""`bestiary words`: training, looking up and evaluating, on a text with a structure."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from bestiary.data.vectors import read_vectors
from bestiary.train.cli import main
from bestiary.train.words.unfinished import Unfinished

PLACES, FOODS = ("paris", "london", "rome", "berlin"), ("bread", "cheese", "soup", "rice")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences in which words of a kind have the same neighbours."""
    path = tmp_path_factory.mktemp("words") / "text.txt"
    draw = np.random.default_rng(0)
    kinds = ((PLACES, "we travel slowly to {} by train"), (FOODS, "they eat warm {} with spoons"))
    lines = [form.format(draw.choice(words)) for words, form in kinds for _ in range(300)]
    path.write_text("\n\n".join(draw.permutation(lines)) + "\n\nrare\n")
    return path


def train(corpus: Path, out: Path, *more: str) -> int:
    options = ["--width", "16", "--epochs", "8", "--sample", "0", "--learning-rate", "0.05", "--batch-words", "8"]
    return main(["words", "train", "--corpus", str(corpus), "--out", str(out), *options, *more])


@pytest.fixture(scope="module")
def vectors(corpus: Path) -> Path:
    assert train(corpus, corpus.parent / "v.txt") == 0
    return corpus.parent / "v.txt"


def test_words_with_the_same_neighbours_are_near(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_vectors(vectors)
    assert "rare" not in found.index
    assert main(["words", "nearest", str(vectors), "paris", "soup", "--count", "3", "--json"]) == 0
    near = {word: {other for other, _ in listed} for word, listed in json.loads(capsys.readouterr().out).items()}
    assert near == {"paris": set(PLACES) - {"paris"}, "soup": set(FOODS) - {"soup"}}


def test_the_same_seed_gives_the_same_vectors(corpus: Path, vectors: Path, tmp_path: Path) -> None:
    assert train(corpus, tmp_path / "again.bin") == 0
    again, first = read_vectors(tmp_path / "again.bin"), read_vectors(vectors)
    assert again.words == first.words
    np.testing.assert_allclose(again.vectors, first.vectors, rtol=1e-6)


def test_a_stopped_run_goes_on_to_the_same_vectors(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM in its second epoch; then a file that is not its own, or damaged, is refused."""
    saves = []

    def due(_: Unfinished) -> bool:
        saves.append(None)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    monkeypatch.setattr("bestiary.train.words.train.BATCHES", 4)
    monkeypatch.setattr(Unfinished, "due", due)
    out, quick = tmp_path / "v.txt", ("--epochs", "3", "--batch-words", "64")
    assert train(corpus, out, *quick) == 75
    unfinished = tmp_path / "v.txt.unfinished.npz"
    assert f"stopped and saved in {unfinished}" in capsys.readouterr().err
    assert not out.exists()
    (tmp_path / "praha.txt").write_text(corpus.read_text().replace("paris", "praha"))
    for text, more in ((corpus, ("--seed", "1")), (tmp_path / "praha.txt", ())):
        assert train(text, out, *quick, *more) == 1
        assert "of a run with other settings or another text, which was stopped" in capsys.readouterr().err
    assert train(corpus, out, *quick) == 0
    assert "resuming in epoch 2, after 4 batches" in capsys.readouterr().err
    assert not unfinished.exists()
    whole = tmp_path / "whole.txt"
    assert train(corpus, whole, *quick) == 0
    assert out.read_bytes() == whole.read_bytes()
    unfinished.write_bytes(b"PK")
    assert train(corpus, out, *quick) == 1
    assert "damaged" in capsys.readouterr().err


def test_similarities_and_analogies_are_scored(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.csv").write_text("Word 1,Word 2,Human\nParis,London,9\nparis,soup,1\nbread,rice,8\nno,such,3\n")
    (tmp_path / "simlex.txt").write_text("word1\tword2\tPOS\tSimLex999\nparis\trome\tN\t1\nparis\tsoup\tN\t9\n")
    (tmp_path / "a.txt").write_text(": kind\nparis bread rome soup\nparis rome bread nowhere\n")
    files = ["--similarities", str(tmp_path / "pairs.csv"), str(tmp_path / "simlex.txt")]
    given = ["words", "evaluate", str(vectors), *files, "--analogies", str(tmp_path / "a.txt"), "--json"]
    assert main(given) == 0
    pairs, simlex, analogies = json.loads(capsys.readouterr().out).values()
    assert (pairs["used"], pairs["missing"]) == (3, 1)
    assert pairs["spearman"] >= 0.5
    assert simlex["spearman"] == pytest.approx(-1)
    assert (analogies["used"], analogies["missing"]) == (1, 1)


def test_a_picture_of_neighbours_is_drawn(vectors: Path, tmp_path: Path) -> None:
    assert main(["words", "nearest", str(vectors), "paris", "--plot", str(tmp_path / "map.png")]) == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--min-count", "1000000"], "--min-count 1000000: of 20 words, 0"),
        (["--sample", "1e-12"], "--sample 1e-12: it leaves 0 words"),
        (["--cbow-gradient", "mean"], "is for --kind cbow"),
        (["--window", "0"], "--window is 0"),
        (["--learning-rate", "0"], "--learning-rate is 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    given = ["words", "train", "--corpus", str(corpus), "--out", str(tmp_path / "v.txt"), *more]
    assert main(given) == 1
    assert message in capsys.readouterr().err


def test_an_unknown_word_is_named(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["words", "nearest", str(vectors), "pariss"]) == 1
    assert "'pariss' is not among its 19 words. Did you mean 'paris'?" in capsys.readouterr().err

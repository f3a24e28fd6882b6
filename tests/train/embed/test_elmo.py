"""`bestiary embed` and `probe` by ELMo, of bilm-tf's files."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bestiary.models.recurrent.bilm_tf import read_bilm
from bestiary.models.recurrent.elmo import character_ids
from bestiary.train.cli import main

LINES = ["A dog runs .", "No", "the élan of the one and of the many"]


@pytest.fixture(scope="module")
def fixture(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("h5py")
    theirs = shared / "parity_elmo"
    if not theirs.is_dir():
        pytest.skip(f"{theirs} is not there")
    folder = tmp_path_factory.mktemp("elmo")
    for name in ("options.json", "lm_weights.hdf5"):
        (folder / name).symlink_to(theirs / name)
    (folder / "text.txt").write_text("\n".join(LINES) + "\n")
    return folder


def embed(folder: Path, out: Path, *more: str) -> Any:
    given = ["embed", "--model", str(folder), "--input", str(folder / "text.txt"), "--out", str(out), *more]
    assert main(given) == 0
    return np.load(out)


def test_vectors_are_those_of_the_model(fixture: Path, tmp_path: Path) -> None:
    model, params = read_bilm(fixture / "options.json", fixture / "lm_weights.hdf5")
    run = jax.jit(lambda ids: model.apply({"params": params}, ids)[0])
    mean = embed(fixture, tmp_path / "a.npy", "--layers", "all")
    tokens = embed(fixture, tmp_path / "b.npz", "--pooling", "token", "--layers", "0,2", "--combine", "concat")
    assert tokens["starts"].tolist() == [0, 4, 5, 14]
    for number, line in enumerate(LINES):
        layers = run(character_ids([["<S>", *line.split(), "</S>"]]))[0, :, 1:-1]
        np.testing.assert_allclose(mean[number], np.asarray(layers).mean(axis=(0, 1)), atol=1e-5)
        own = tokens["vectors"][tokens["starts"][number] : tokens["starts"][number + 1]]
        np.testing.assert_allclose(own, np.concatenate([layers[0], layers[2]], axis=-1), atol=1e-5)


def test_the_mix_is_learnt_by_a_probe(fixture: Path, tmp_path: Path) -> None:
    rows = [("good", 1), ("bad", 0)] * 12
    (tmp_path / "t.csv").write_text(
        "text,label\n" + "\n".join(f"a {word} one {n},{y}" for n, (word, y) in enumerate(rows))
    )
    given = ["probe", "--data", str(tmp_path / "t.csv"), "--text", "text", "--dev-fraction", "0.3", "--mix"]
    given += ["--model", str(fixture), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "probe")]
    assert main(given) == 0
    assert (tmp_path / "probe/results.json").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pooling", "cls"], "ELMo has no such token"),
        (["--layers", "3"], "there is no layer 3"),
        (["--prompt", "query: "], "no meaning for ELMo"),
    ],
)
def test_what_it_cannot_do_is_refused(
    fixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    given = ["embed", "--model", str(fixture), "--input", str(fixture / "text.txt"), "--out", str(tmp_path / "a.npy")]
    assert main([*given, *more]) == 1
    assert message in capsys.readouterr().err


def test_texts_without_words_are_named(fixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("a\n\n")
    given = ["embed", "--model", str(fixture), "--input", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "a.npy")]
    assert main(given) == 1
    assert "text 2: it has no words" in capsys.readouterr().err

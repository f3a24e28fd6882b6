"""ELMo: its authors' fixture, and what a fixture does not show."""

import builtins
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary.models.checkpoints.tables import CheckpointError
from bestiary.models.recurrent.bilm_tf import read_bilm
from bestiary.models.recurrent.elmo import CHARACTERS, Elmo, ElmoConfig, character_ids

SMALL = ElmoConfig(character_width=3, filters=(1, 4, 2, 4), most_characters=12, width=6, cells=8)
WORDS = ["<S>", "a", "bestiary", "of", "élans", "</S>"]


@pytest.fixture(scope="module")
def small() -> tuple[Elmo, Any]:
    model = Elmo(SMALL)
    ids = jnp.ones((1, 2, 12), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), ids)))["params"]
    draw = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), shapes)


def test_the_authors_fixture_is_met(repository: Path) -> None:
    """Three streams of ten sentences, each going on with the state after the one before."""
    h5py = pytest.importorskip("h5py")
    folder = repository.parent / "shared/parity_elmo"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    model, params = read_bilm(folder / "options.json", folder / "lm_weights.hdf5")
    streams = json.loads((folder / "lm_embeddings_sentences.json").read_text())
    expected = [h5py.File(folder / f"lm_embeddings_{number}.hdf5") for number in range(3)]
    run, state = jax.jit(lambda ids, state: model.apply({"params": params}, ids, state)), model.start(3)
    for number, batch in enumerate(zip(*streams, strict=True)):
        words = [["<S>", *sentence.split(), "</S>"] for sentence in batch]
        ids = character_ids(words)
        layers, state = run(np.pad(ids, ((0, 0), (0, 60 - ids.shape[1]), (0, 0))), state)
        for row, (held, given) in enumerate(zip(expected, words, strict=True)):
            top = np.concatenate(list(held[str(number)][()]), axis=-1)
            np.testing.assert_allclose(layers[row, -1, 1 : len(given) - 1], top, atol=1e-5)


def test_padding_changes_nothing_and_the_state_goes_on(small: tuple[Elmo, Any]) -> None:
    """A text in two batches is read from left to right as in one; its padding has planted characters' neighbours."""
    model, params = small
    run = jax.jit(lambda ids, state: model.apply({"params": params}, ids, state))
    start = model.start(2)
    ids = character_ids([WORDS, WORDS[:4]], 12)
    layers, state = run(ids, start)
    np.testing.assert_allclose(layers[1, :, 4:], 0)
    halves = [run(np.pad(part, ((0, 0), (0, 6 - part.shape[1]), (0, 0))), start)[0] for part in (ids[:, :4],)]
    np.testing.assert_allclose(halves[0][1, :, :4], layers[1, :, :4], atol=1e-5)
    after = run(ids, state)[0]
    joined = jax.jit(lambda ids: model.apply({"params": params}, ids))(np.concatenate([ids[:1], ids[:1]], axis=1))[0]
    np.testing.assert_allclose(after[0, :, :, :6], joined[0, :, 6:, :6], atol=1e-5)  # from left to right
    np.testing.assert_allclose(after[0, 0], layers[0, 0], atol=1e-6)  # words alone do not depend on it
    assert np.abs(after[0, 1] - layers[0, 1]).max() > 1e-3


def test_words_become_bytes_between_marks() -> None:
    ids = character_ids([["é", "<S>"], ["abcdefghijklmn"]], 6)
    assert ids.tolist() == [
        [[259, 0xC3 + 1, 0xA9 + 1, 260, 261, 261], [259, 257, 260, 261, 261, 261]],
        [[259, 98, 99, 100, 101, 260], [0] * 6],
    ]
    assert ids.max() < CHARACTERS
    with pytest.raises(ValueError, match="a word is empty"):
        character_ids([["a", ""]])


def test_files_that_are_no_model_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, weights = tmp_path / "options.json", tmp_path / "weights.hdf5"
    with pytest.raises(CheckpointError, match="expected bilm-tf's options"):
        read_bilm(options, weights)
    lstm = dict(cell_clip=3, proj_clip=3, use_skip_connections=True, n_layers=1, projection_dim=4, dim=6)
    cnn = dict(embedding={"dim": 2}, filters=[[1, 3]], n_highway=1, n_characters=262, max_characters_per_token=9)
    options.write_text(json.dumps({"lstm": lstm, "char_cnn": {**cnn, "activation": "relu"}}))
    ours = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "h5py":
            raise ModuleNotFoundError(name)
        return ours(name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", without)
        with pytest.raises(CheckpointError, match="needs h5py"):
            read_bilm(options, weights)
    h5py = pytest.importorskip("h5py")
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_bilm(options, weights)
    weights.write_bytes(b"text")
    with pytest.raises(CheckpointError, match="not an HDF5 file"):
        read_bilm(options, weights)
    with h5py.File(weights, "w") as handle:
        handle["char_embed"] = np.zeros((261, 2), np.float32)
    with pytest.raises(CheckpointError, match=r"missing or of another shape: CNN/W_cnn_0 \[1, 1, 2, 3\]"):
        read_bilm(options, weights)

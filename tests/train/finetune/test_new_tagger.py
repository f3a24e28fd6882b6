"""A new tagger, on words alone and on the states of a frozen ELMo: learnt, predicted again, and refused."""

import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from safetensors import safe_open

from bestiary import models
from bestiary.data.tokenizers.word_level import word_tokenizer
from bestiary.data.vectors import WordVectors, write_vectors
from bestiary.models.recurrent.elmo import BidirectionalLM, Elmo, ElmoConfig, character_ids
from bestiary.models.recurrent.elmo_reader import ElmoReader
from bestiary.models.registry import init_params
from bestiary.train.cli import main
from bestiary.train.finetune.config import TaggingConfig
from bestiary.train.finetune.new_tagger import new_tagger
from bestiary.train.finetune.tasks.tagging import TaggingTask

PLAIN = ("the", "film", "was", "a", "story", "of", "two", "men", "and", "one", "house", "in", "town")
ELMO = ElmoConfig(
    vocab_size=3, character_width=4, filters=(1, 4, 3, 8), highways=1, most_characters=12, width=8, cells=16
)


def write_elmo(folder: Path, seed: int) -> Path:
    """Write an ELMo drawn at random: it tells words apart by their letters."""
    model: Any = BidirectionalLM(ELMO)
    params = nn.unbox(jax.jit(lambda key: init_params(model, key))(jax.random.key(seed)))
    models.save(folder, model, jax.device_get(params), word_tokenizer(["a"]))
    return folder


TASK = TaggingTask(
    "ner", 128, ("O", "B-per", "I-per"), False, 1.0, legal=True, scheme="iob2", repair=False, word_column=0,
    tag_column=-1, column="upos",
)  # fmt: skip


@pytest.fixture(scope="module")
def elmo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_elmo(tmp_path_factory.mktemp("elmo") / "model", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person's name ends in xx, and no two sentences have the same: only its letters tell."""
    folder, draw = tmp_path_factory.mktemp("names"), random.Random(0)
    for name, count in (("train", 96), ("dev", 24)):
        blocks = []
        for _ in range(count):
            lines = [f"{draw.choice(PLAIN)}\tO" for _ in range(draw.randint(2, 6))]
            letters = "".join(draw.choices("abcdefgh", k=6))
            lines.insert(draw.randrange(len(lines)), f"{letters}xx\tB-per")
            blocks.append("\n".join(lines))
        (folder / f"{name}.conll").write_text("\n\n".join(blocks) + "\n")
    return folder


def train(data: Path, out: Path, *more: str) -> int:
    given = [
        "--epochs",
        "8",
        "--evaluate-epochs",
        "8",
        "--dropout",
        "0.1",
        "--batch-size",
        "16",
        "--learning-rate",
        "1e-2",
    ]
    return main(["finetune", "ner", "--data", str(data), "--out", str(out), *given, *more])


@pytest.fixture(scope="module")
def run(elmo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    write_vectors(out.parent / "v.txt", WordVectors(["film", "unseen"], np.array([[0, 3], [4, 0]], np.float32)))
    assert train(data, out, "--features", str(elmo), "--vectors", str(out.parent / "v.txt"), "--crf") == 0
    return out


def test_letters_are_read_by_the_frozen_elmo(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads((run / "results.json").read_text())["metrics"]["dev"]["f1"] > 0.9
    with safe_open(run / "model" / "model.safetensors", "np") as tensors:
        assert np.ptp(tensors.get_tensor("scalar_mix.weights")) > 1e-3
        assert tensors.get_tensor("words.weight").shape == (2 + len(PLAIN) + 1, 2)
        assert not any(name.startswith("words.filters") for name in tensors.keys())  # noqa: SIM118 (not a mapping)
    assert main(["predict", str(run), "--text", "the story of hahafaxx", " ", "one bedgafxx was in town"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tags"] for line in said] == [["O", "O", "O", "B-per"], [], ["O", "B-per", "O", "O", "O"]]


def test_a_sentence_is_read_as_it_is_alone(elmo: Path) -> None:
    reader, loaded = ElmoReader(elmo), models.load(elmo)
    reader.longest = 4
    sentences = [["a", "b", "élan"], [], ["word"] * 9, ["the"] * 2]
    states = reader.states(sentences)
    assert states.shape == (14, 3, 16)
    assert not np.array_equal(states[3], states[4])
    np.testing.assert_array_equal(states[3], states[7])  # a long sentence is read in parts
    ids = character_ids([["</S>", *sentences[0], "</S>"]], 12)
    layers, _ = jax.jit(lambda ids: Elmo(loaded.config).apply({"params": loaded.params["encoder"]}, ids))(ids)
    np.testing.assert_allclose(states[:3], np.moveaxis(layers[0, :, 1:4], 0, 1), atol=1e-6)


def test_the_elmo_of_the_training_must_be_there(
    run: Path, elmo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = json.loads((run / "task.json").read_text())
    for folder in (tmp_path / "other", tmp_path / "gone"):
        (folder / "model").mkdir(parents=True)
        for path in (run / "model").iterdir():
            (folder / "model" / path.name).symlink_to(path)
    (tmp_path / "other/task.json").write_text(json.dumps(task | {"features": str(write_elmo(tmp_path / "elmo", 1))}))
    (tmp_path / "gone/task.json").write_text(json.dumps(task | {"features": str(tmp_path / "nothing")}))
    assert main(["predict", str(tmp_path / "other"), "--text", "a"]) == 1
    assert "another ELMo than the model was trained on" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "gone"), "--text", "a"]) == 1
    assert "the model reads the states of this ELMo. Put it back" in capsys.readouterr().err
    # A tagger is a checkpoint to start from, with the same states.
    start = ("--model", str(run / "model"), "--crf")
    assert train(data, tmp_path / "a", *start) == 1
    assert "it reads an ELMo's states; give its folder with --features" in capsys.readouterr().err
    assert train(data, tmp_path / "a", *start, "--vectors", "v.txt") == 1
    assert "--vectors is for new embeddings" in capsys.readouterr().err
    assert train(data, tmp_path / "a", "--features", str(run / "model")) == 1
    assert "not an ELMo" in capsys.readouterr().err


def test_vectors_are_those_of_all_their_words(data: Path, tmp_path: Path) -> None:
    write_vectors(tmp_path / "v.txt", WordVectors(["film", "unseen"], np.array([[0, 3], [4, 0]], np.float32)))
    config = TaggingConfig(vectors=tmp_path / "v.txt", out=tmp_path / "run")
    loaded = new_tagger(config, TASK, TASK.read(data, "train", labelled=True))
    assert loaded.config.embedding_width == 2
    assert loaded.tokenizer.tokens[-1] == "unseen"
    table = loaded.params["encoder"]["embeddings"]["word"]["embedding"]
    assert abs(table[-1, 1]) < 1e-6 < table[-1, 0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora-rank", "2"], "--lora-rank is for pretrained models; --model bilstm is new"),
        (["--freeze-layers", "1"], "--freeze-layers is for pretrained models"),
        (["--layer-decay", "0.9"], "--layer-decay is for pretrained models"),
        (["--remat"], "a recurrent model has no use for remat"),
        (["--features", "nowhere"], "nowhere"),
        (["--vectors", "nowhere.txt"], "nowhere.txt: there is no such file"),
    ],
)
def test_what_a_new_tagger_has_no_use_for_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert train(data, tmp_path / "run", *more) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""A new tagger, on words alone and on the states of a frozen ELMo: learnt, predicted again, and refused."""

import dataclasses
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from safetensors import safe_open

from bestiary import models
from bestiary.data.tasks.tagging import Sentence
from bestiary.data.tokenizers.word_level import word_tokenizer
from bestiary.data.vectors import WordVectors, write_vectors
from bestiary.models.checkpoints.config import fingerprint
from bestiary.models.recurrent.bilstm import BiLstmConfig
from bestiary.models.recurrent.elmo import BidirectionalLM, Elmo, ElmoConfig, character_ids
from bestiary.models.recurrent.elmo_reader import ElmoReader
from bestiary.models.registry import init_params
from bestiary.train.cli import main
from bestiary.train.errors import RunError
from bestiary.train.finetune.config import TaggingConfig, TeacherConfig
from bestiary.train.finetune.loop import sampled_train, starting
from bestiary.train.finetune.new_tagger import new_tagger
from bestiary.train.finetune.tasks import tagging
from bestiary.train.finetune.tasks.tagging import TaggingTask
from bestiary.train.finetune.tasks.task import TaskData
from bestiary.train.finetune.teacher import task_teacher
from bestiary.train.progress import Progress
from bestiary.train.sharding import make_mesh

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


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Narrow taggers, trained on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bestiary.train.finetune.new_tagger.BiLstmConfig", partial(BiLstmConfig, width=32))
        patch.setattr("bestiary.train.sharding.make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        yield


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
    given = "--steps 60 --checkpoint-every 48 --evaluate-epochs 10 --dropout 0.1 --batch-size 16 --learning-rate 3e-2"
    return main(["finetune", "ner", "--data", str(data), "--out", str(out), *given.split(), *more])


@pytest.fixture(scope="module")
def run(elmo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    write_vectors(out.parent / "v.txt", WordVectors(["film", "unseen"], np.array([[0, 3], [4, 0]], np.float32)))
    assert train(data, out, "--crf", "--features", str(elmo), "--vectors", str(out.parent / "v.txt")) == 0
    return out


def test_it_goes_on_from_a_checkpoint_and_is_evaluated_again_and_trained_further(
    run: Path, elmo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--features", str(elmo), "--crf")
    from_checkpoint = ("--resume-from", str(run / "checkpoints" / "48"), "--vectors", str(run.parent / "v.txt"))
    assert train(data, tmp_path / "resumed", *given, *from_checkpoint) == 0
    assert (tmp_path / "resumed/model/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(data)]) == 0
    metrics = json.loads((run / "results.json").read_text())["metrics"]["dev"]
    assert json.loads(capsys.readouterr().out)["metrics"] == pytest.approx(metrics, rel=1e-5)
    further = ("--model", str(run / "model"))
    assert train(data, tmp_path / "further", *given, *further) == 0
    assert json.loads((tmp_path / "further/results.json").read_text())["metrics"]["dev"]["f1"] > 0.9
    assert train(data, tmp_path / "lora", *given, *further, "--lora-rank", "2", "--lora-targets", "all-linear") == 1
    assert f"--lora-rank: the LSTMs of {run / 'model'} have no adapters" in capsys.readouterr().err
    assert train(data, tmp_path / "scanned", *given, *further, "--scan-layers", "True") == 1
    assert f"--scan-layers: {run / 'model'} has recurrent layers" in capsys.readouterr().err


def test_processes_join_before_an_elmo_is_on_a_device(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def join(_: object) -> None:
        raise RunError("joining")

    monkeypatch.setattr("bestiary.train.run.start_parallelism", join)
    monkeypatch.setattr(tagging, "ElmoReader", None)
    assert train(data, tmp_path / "run", "--features", str(write_elmo(tmp_path / "elmo", 1))) == 1
    assert "joining" in capsys.readouterr().err


def test_an_elmo_may_be_in_a_store(elmo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tagging.elmo(f"file://{elmo}").fingerprint == fingerprint(elmo)


def test_the_position_in_the_data_is_of_words_not_of_their_states(elmo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of another machine may differ in their last bits."""
    task = dataclasses.replace(TASK, features=str(elmo), features_fingerprint=fingerprint(elmo))
    sentences = [Sentence(("one", "two"), ("O", "O"), "text", (1, 2))]
    made = [task.encode(word_tokenizer(["a"]), sentences).fingerprint]
    monkeypatch.setattr(ElmoReader, "states", lambda self, words, report: np.ones((2, 3, 16), np.float32))
    made.append(task.encode(word_tokenizer(["a"]), sentences).fingerprint)
    others = [dataclasses.replace(sentences[0], words=("one", "six"))]
    made.append(task.encode(word_tokenizer(["a"]), others).fingerprint)
    assert made[0] == made[1] != made[2]


def test_a_teacher_that_reads_other_states_is_refused(run: Path, tmp_path: Path) -> None:
    config = TaggingConfig(model=run / "model", out=tmp_path / "run", distil=TeacherConfig(teacher=run / "model"))
    with pytest.raises(RunError, match="reads the states of an ELMo that is not this run's"):
        task_teacher(config, TASK, word_tokenizer(["a"]))


def test_a_run_folder_of_its_name_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "model/config.json", "model/model.safetensors"):
        (tmp_path / "bilstm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bilstm" / name).write_text("{}")
    assert TaggingConfig(out=Path("bilstm")).new
    (tmp_path / "bilstm" / "model.safetensors").write_text("")
    assert not TaggingConfig(out=Path("bilstm")).new


def test_its_words_are_the_tokens_of_the_examples_that_are_trained_on(tmp_path: Path) -> None:
    config = TaggingConfig(train_examples=1, out=tmp_path / "run")
    sentences = [Sentence((word, word), ("O", "O"), "text", (1, 2)) for word in ("Hà Nội", "Việt Nam")]
    loaded, _ = starting(config, TASK, TaskData(sentences, {}), Progress())
    (trained,) = sampled_train(config, sentences)
    assert loaded.tokenizer.tokens[2:] == trained.words[0].split()


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
        (["--auxiliary-lm", "0.5"], "--auxiliary-lm is for pretrained models"),
        (["--delimiters", "True"], "--delimiters is for pretrained models"),
        (["--scan-layers", "True"], "--scan-layers is for pretrained models"),
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

"""One small model for two tasks, trained by the command, stopped and resumed, and asked."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from bestiary import models
from bestiary.data.multitask.examples import Examples
from bestiary.models import registry
from bestiary.train.cli import main
from bestiary.train.errors import RunError
from bestiary.train.multitask.config import PredictConfig, TrainConfig
from bestiary.train.multitask.loop import Evaluation, forward
from bestiary.train.multitask.model import make_start
from bestiary.train.multitask.predict import read_examples
from bestiary.train.multitask.task_file import read_task_file
from bestiary.train.multitask.tasks import encode, read_task

PARTS = """
[image]
model = "vit-tiny"
image_size = 8
patch_size = 4
width = 16
layers = 1
heads = 2

[text]
width = 16
layers = 1
heads = 2
max_length = 12
dropout = 0.0

[decoder]
width = 16
layers = 1
heads = 2
feed_forward = 32
dropout = 0.05
"""
VQA = """
[tasks.vqa]
kind = "question-answering"
data = "vqa.csv"
eval_data = "few.csv"
queries = 2
share = 3.0
flip = true
"""
BRIGHT = """
[tasks.bright]
kind = "image-classification"
data = "pictures"
held_out = 0.25
queries = 1
loss = "softmax"
"""
MOOD = """
[tasks.mood]
kind = "text-classification"
data = "mood.tsv"
text = "review"
queries = 1
"""
SETTINGS = "--steps 30 --batch-size 8 --learning-rate 1e-2 --warmup 0.1 --checkpoint-every 15 --evaluate-every 30"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, random = tmp_path_factory.mktemp("multitask"), np.random.default_rng(0)
    rows = ["question,answer,image"]
    for number in range(24):
        bright = number % 2 == 0
        name = f"{'bright' if bright else 'dark'}/{number}.png"
        path = folder / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(150, 250, (8, 8, 3)) if bright else random.integers(0, 100, (8, 8, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        rows += [f"is it bright?,{'yes' if bright else 'no'},pictures/{name}"]
        rows += [f"is it dark?,{'no' if bright else 'yes'},pictures/{name}"]
    (folder / "vqa.csv").write_text("\n".join([*rows, "is it?,no,", ""]))
    (folder / "few.csv").write_text("\n".join([*rows[:9], ""]))  # as many as `ask` pads to, for the same programs
    moods = ["review\tlabel", *(f"{'good fun' if n % 2 else 'bad bore'} number {n}\t{n % 2}" for n in range(20))]
    (folder / "mood.tsv").write_text("\n".join([*moods, ""]))
    (folder / "tasks.toml").write_text(PARTS + VQA + BRIGHT)
    (folder / "three.toml").write_text(PARTS + VQA + BRIGHT + MOOD)
    return folder


def train(data: Path, out: Path, *more: str, file: str = "tasks.toml") -> int:
    words = ["multitask", "train", "--config", str(data / file), "--out", str(out)]
    return main([*words, *shlex.split(SETTINGS), *more])


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """The folder of a finished run of two tasks."""
    assert train(data, data / "run") == 0
    return data / "run"


def drawn(model: Any) -> Any:
    """Parameters at random, on the host."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: nn.unbox(registry.init_params(model, jax.random.key(0))))
    return jax.tree.map(lambda leaf: np.float32(random.normal(scale=0.2, size=leaf.shape)), shapes)


def ask(capsys, run: Path, *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["multitask", "predict", str(run), *words]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_it_learns_and_leaves_everything_behind(run: Path):
    results = json.loads((run / "results.json").read_text())
    assert {name: list(found) for name, found in results["metrics"].items()} == {"vqa": ["dev"], "bright": ["dev"]}
    assert results["metrics"]["bright"]["dev"]["accuracy"] > 0.8
    assert results["training_examples"] == {"vqa": 49, "bright": 18}
    assert results["examples"] == 30 * 8
    assert (run / "report" / "vqa-dev.png").is_file()
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"eval/accuracy", "eval/vqa/accuracy", "eval/bright/loss"} <= set(line)
    loaded = models.load(run / "model")
    assert [task.name for task in loaded.config.tasks] == ["vqa", "bright"]
    assert loaded.config.task("vqa").loss == "sigmoid"
    assert loaded.config.max_length == 12
    assert results["metrics"]["vqa"]["dev"]["loss"] == pytest.approx(line["eval/vqa/loss"], rel=1e-5)
    names = {path.name for path in (run / "model").iterdir()}
    assert {"preprocessor_config.json", "tokenizer.json", "config.json", "model.safetensors"} <= names


def test_a_stopped_run_goes_on_as_if_nothing_happened(run: Path, data: Path, tmp_path: Path, capsys):
    """The steps to 15 by one start, the rest by another, from the checkpoint."""
    settings = json.loads((run / "config.json").read_text())
    out = tmp_path / "again"
    out.mkdir()
    settings["run"]["out"] = str(out)
    (out / "config.json").write_text(json.dumps(settings))
    shutil.copytree(run / "checkpoints" / "15", out / "checkpoints" / "15")
    shutil.copy(run / "checkpoints" / "15.json", out / "checkpoints")
    assert train(data, out) == 0
    assert "resuming from step 15" in capsys.readouterr().err
    assert (out / "model" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()


def test_an_evaluation_is_by_the_loss_of_training():
    examples = Examples(np.zeros(1, np.int32), ("a", "b"))
    answerer: Any = lambda *_: np.array([[1.0, 1.0]], np.float32)  # noqa: E731
    evaluation = Evaluation(
        answerer, {"x": {"dev": examples}, "y": {"dev": examples}}, {"x": "softmax", "y": "sigmoid"}
    )
    state: Any = SimpleNamespace(opt_state=(), params={})
    stop: Any = None
    found = evaluation(state, stop)
    assert found is not None
    assert found["x/loss"] == pytest.approx(np.log(2))
    assert found["y/loss"] == pytest.approx(np.log1p(np.exp(-1)) + np.log1p(np.exp(1)))


def test_another_file_of_tasks_is_not_resumed(run: Path, data: Path, capsys):
    assert train(data, run, file="three.toml") == 1
    assert "holds a run with another configuration" in capsys.readouterr().err


def test_answers(run: Path, data: Path, capsys):
    bright, dark = (str(data / "pictures" / name) for name in ("bright/0.png", "dark/1.png"))
    said = ask(capsys, run, "--task", "vqa", "--image", bright, dark, "--question", "is it bright?")
    assert [set(one) for one in said] == [{"image", "question", "answer", "probability", "top"}] * 2
    assert said[1]["image"] == dark
    assert set(said[0]["top"]) == {"yes", "no"}
    several = ask(capsys, run, "--task", "vqa", "--image", bright, "--question", "is it bright?", "is it dark?")
    assert [one["image"] for one in several] == [bright, bright]
    assert several[0]["top"] == pytest.approx(said[0]["top"], abs=1e-5)
    blind = ask(capsys, run, "--task", "vqa", "--question", "is it bright?")
    assert blind[0]["image"] is None
    assert blind[0]["top"] != said[0]["top"]
    images = [str(path) for path in sorted((data / "pictures" / "dark").iterdir())[:8]]
    found = ask(capsys, run, "--task", "bright", "--image", *images)
    assert [one["image"] for one in found] == images
    assert sum(one["class"] == "dark" for one in found) >= 6


def test_a_third_task_by_the_file_alone(data: Path, tmp_path: Path):
    """Its texts are read, and the model has its queries and its head, which give logits of its classes."""
    file = read_task_file(data / "three.toml")
    config = TrainConfig(config=data / "three.toml", out=tmp_path / "out", batch_size=4)
    tasks = {name: read_task(name, part) for name, part in file.tasks.items()}
    texts = [text for one in tasks.values() for text in one.training_texts()]
    start = make_start(config, file, [one.task for one in tasks.values()], texts)
    progress: Any = SimpleNamespace(line=lambda said: None)
    found = encode(tasks["mood"], start.inputs.tokenizer, start.inputs.longest, 0, progress)
    assert {split: own.count for split, own in found.items()} == {"train": 18, "dev": 2}
    batch = found["train"].batch(range(4), None)
    params = jax.eval_shape(lambda: nn.unbox(registry.init_params(start.model, jax.random.key(0))))
    assert {"queries_mood", "heads_mood"} <= set(params)
    task = start.model.config.task("mood")
    assert jax.eval_shape(lambda params: forward(start.model, params, task, batch), params).shape == (4, 2)
    asked = PredictConfig(run=tmp_path, task="mood", text=("good fun", "bad"), text_pair=())
    said, examples = read_examples(asked, task, start.inputs)
    assert [one["text"] for one in said] == ["good fun", "bad"]
    assert examples.lengths.tolist() == [4, 3]
    with pytest.raises(RunError, match="--task mood was trained on texts alone: leave out --text-pair"):
        read_examples(replace(asked, text_pair=("a", "b")), task, start.inputs)
    with pytest.raises(RunError, match="--task mood was trained on pairs of texts: expected a --text-pair for each"):
        read_examples(asked, task._replace(pairs=True), start.inputs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task vqs --question x", "has no such task. Did you mean 'vqa'?"),
        (
            "--task vqa --image pictures",
            "--task vqa reads image and text: expected --image and --question, found no --question",
        ),
        ("--task bright --text x", "--task bright reads image: expected --image, found --text"),
        ("--task vqa --question 'is it is it is it is it is it is it is it?'", "--question: a question of"),
        ("--task vqa --text-pair x --question y", "expected --image and --question, found --text-pair"),
        ("--task vqa --image pictures --question a b", "24 images and 2 questions"),
        ("--task bright --image nowhere.png", "nowhere.png: there is no such file"),
    ],
)
def test_mistaken_questions_are_named(run: Path, data: Path, monkeypatch, capsys, words: str, message: str):
    monkeypatch.chdir(data)
    assert main(["multitask", "predict", str(run), *shlex.split(words)]) == 1
    assert message in capsys.readouterr().err


def test_from_checkpoints_of_both_encoders(data: Path, sentence_encoder: Path, tmp_path: Path, capsys):
    """A ViT and a BERT, at another image size; what the tables must not say then."""
    family = registry.family_named("vit")
    sizes = dict(width=16, layers=1, heads=2, feed_forward=24, image_size=8, patch_size=4)
    model = family.build("classification", family.config(**sizes, num_labels=2, label_names=("a", "b")))
    models.save(tmp_path / "vit" / "model", model, drawn(model))
    encoders = f'[image]\ncheckpoint = "{tmp_path}/vit/model"\nimage_size = 12\n'
    encoders += f'[text]\ncheckpoint = "{sentence_encoder}"\nmax_length = 30\n'
    decoder = PARTS[PARTS.index("[decoder]") :]
    path = data / "loaded.toml"
    path.write_text(encoders + decoder + VQA)
    config, file = TrainConfig(config=path, out=tmp_path / "out"), read_task_file(path)
    start = make_start(config, file, [read_task("vqa", file.tasks["vqa"]).task], [])
    assert start.loaded
    assert start.model.config.image.config.image_size == start.inputs.processor.output[0] == 12
    found = start.params(seed=0)
    for side, folder in (("text", sentence_encoder), ("image", tmp_path / "vit" / "model")):
        before = models.load(folder, head="encoder").params["layers"]["attention"]["query"]["kernel"]
        np.testing.assert_array_equal(before, found[f"{side}_encoder"]["layers"]["attention"]["query"]["kernel"])
    shapes = jax.eval_shape(lambda: nn.unbox(registry.init_params(start.model, jax.random.key(0))))
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, shapes)
    path.write_text(encoders.replace("image_size", "width") + decoder + VQA)
    assert train(data, tmp_path / "other", file="loaded.toml") == 1
    assert "[image]: width does not go with checkpoint" in capsys.readouterr().err


# --- the file ---------------------------------------------------------------------------------------------------------

WHOLE = PARTS + VQA + BRIGHT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[tasks", "not a TOML file"),
        (PARTS, "no tasks. Expected a table"),
        (WHOLE + "[task.x]\n", "there is no table 'task'. Did you mean 'tasks'?"),
        (WHOLE.replace("queries = 2", "query = 2"), r"\[tasks.vqa\]: there is no key 'query'. Did you mean 'queries'?"),
        (WHOLE.replace("queries = 2", "queries = 0"), r"\[tasks.vqa\]: queries is 0; it must be at least 1"),
        (WHOLE.replace("queries = 2", 'queries = "2"'), r"\[tasks.vqa\]: queries: expected a whole number, found"),
        (WHOLE.replace("question-answering", "question-answer"), "there is no kind of task 'question-answer'. Did you"),
        (WHOLE.replace("question-answering", "detection"), r"\[tasks.vqa\]: detection is not implemented"),
        (WHOLE.replace("queries = 2", 'head = "detection"'), r"\[tasks.vqa\]: detection is not implemented"),
        (
            WHOLE.replace("queries = 2", 'loss = "hinge"'),
            r'\[tasks.vqa\]: loss: expected "softmax" or "sigmoid", found "h',
        ),
        (WHOLE.replace("queries = 2", 'head = "span"'), "there is no head 'span'. Expected classification"),
        (WHOLE.replace("[text]", "[txt]"), "there is no table 'txt'. Did you mean 'text'?"),
        (WHOLE.replace('\ndata = "vqa.csv"', ""), r"\[tasks.vqa\]: the key 'data' is missing"),
        (WHOLE.replace("queries = 2", 'glue = "sst2"'), "glue does not go with question-answering"),
        (WHOLE.replace("queries = 1", 'question = "q"'), "question does not go with image-classification"),
        (WHOLE + MOOD + "flip = true\n", r"\[tasks.mood\]: flip does not go with text-classification"),
        (WHOLE + MOOD + 'glue = "sst2"\n', r"\[tasks.mood\]: text does not go with glue"),
        (WHOLE.replace("[text]", '[text]\ntokenizer = "x"\nvocab_size = 99'), "vocab_size does not go with tokenizer"),
        (WHOLE.replace("[text]", '[text]\ncheckpoint = "x"'), r"\[text\]: width does not go with checkpoint"),
        (
            WHOLE.replace('model = "vit', 'checkpoint = "x"\nmodel = "vit'),
            r"\[image\]: model does not go with checkpoint",
        ),
        (WHOLE.replace("share = 3.0", "share = 0.0"), "share is 0.0; it must be above 0"),
        (VQA, r"\[tasks.vqa\]: question-answering needs an encoder: a table \[image\]"),
        (PARTS + BRIGHT, r"\[text\]: no task reads texts. Leave the table out"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, content: str, message: str):
    (tmp_path / "tasks.toml").write_text(content)
    with pytest.raises(RunError, match=message):
        read_task_file(tmp_path / "tasks.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('model = "vit-tiny"', 'model = "vit-tin"', "there is no encoder of images called 'vit-tin'. Did you mean"),
        ('model = "vit-tiny"', 'model = "bert-tiny"', "there is no encoder of images called 'bert-tiny'"),
        ("[text]", '[text]\nmodel = "t5-small"', "there is no encoder of text called 't5-small'"),
        ("max_length = 12", "max_length = 3", "vqa.csv, line 2: a question of"),
        ("max_length = 12", "max_length = 1000", "max_length is 1000, beyond the encoder's 512 positions"),
        ("patch_size = 4", "patch_size = 3", "image size 8 is not a multiple of patch size 3"),
        ("feed_forward = 32", "feed_forward = 32\nwidth = 18", "Cannot overwrite a value"),
        ('data = "pictures"', 'data = "tfds:none"\neval_data = "vqa.csv"', "cannot be its evaluation set"),
        (
            '"vqa.csv"\neval',
            '"none.csv"\neval',
            "there is no such folder or file. Expected a folder with train_questions",
        ),
    ],
)
def test_mistakes_of_the_model_and_the_data(data: Path, tmp_path: Path, capsys, old: str, new: str, message: str):
    assert old in WHOLE
    (data / "mistaken.toml").write_text(WHOLE.replace(old, new, 1))
    assert train(data, tmp_path / "out", file="mistaken.toml") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

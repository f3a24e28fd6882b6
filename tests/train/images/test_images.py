"""Training, resuming, fine-tuning and predicting on pictures of eight pixels a side."""

import json
import shlex
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from bestiary import models
from bestiary.models import registry
from bestiary.train.cli import main
from bestiary.train.errors import RunError
from bestiary.train.images.attention_map import last_attention
from bestiary.train.images.config import TrainConfig
from bestiary.train.images.loop import read_splits
from bestiary.train.images.loss import calibration_error, class_sums, evaluate

CLASSES = ("cross", "dot", "edge")
REGULARISED = shlex.split(
    "--flip --mixup 0.1 --label-smoothing 0.05 --ema 0.8 --dropout 0.02 --checkpoint-every 50 --evaluate-every 100"
)


def picture(label: int, random: np.random.Generator) -> np.ndarray:
    """A noisy picture of a class."""
    shape = np.zeros((8, 8), np.float32)
    shape[tuple(([slice(None), 3], [slice(2, 5), slice(2, 5)], [0, slice(None)])[label])] = 200
    return np.clip(shape + random.integers(0, 50, (8, 8)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, random = tmp_path_factory.mktemp("images") / "data", np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 7)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(picture(label, random)).save(folder / split / name / f"{number}.png")
    return folder


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    sizes = "--model vit-tiny --width 16 --layers 2 --heads 2 --patch-size 4 --batch-size 16 --learning-rate 1e-2"
    return ["images", "train", "--data", str(data), "--out", str(out), *shlex.split(sizes), "--steps", "100", *more]


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """The folder of a finished run."""
    out = data.parent / "run"
    assert main(arguments(data, out, *REGULARISED)) == 0
    return out


def test_it_learns_and_leaves_everything_behind(run: Path):
    results = json.loads((run / "results.json").read_text())
    assert results["metrics"]["dev"]["accuracy"] > 0.8
    assert set(results["metrics"]["dev"]) == {"loss", "accuracy", "calibration_error"}
    assert results["images"] == 100 * 16
    assert (run / "report" / "dev.png").is_file()
    assert sum(map(sum, json.loads((run / "report" / "dev.json").read_text())["confusion"]["counts"])) == 21
    model, params, config, processor = models.load(run / "model")
    pixels = processor(picture(1, np.random.default_rng(5))[..., None])
    assert pixels.shape == (8, 8, 1)
    assert config.label_names == CLASSES
    assert params["encoder"]["embeddings"]["position"]["embedding"].shape == (5, 16)
    logits = jax.jit(model.apply)({"params": params}, pixels[None])
    assert logits.argmax() == 1
    stored = json.loads((run / "model" / "preprocessor_config.json").read_text())
    assert (stored["size"], stored["image_mean"]) == ({"height": 8, "width": 8}, [0.5])


def test_a_stopped_run_goes_on_as_if_nothing_happened(run: Path, data: Path, tmp_path: Path, capsys):
    """The steps to 50 by one start, the rest by another, from the checkpoint."""
    settings = json.loads((run / "config.json").read_text())
    out = tmp_path / "again"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(settings | {"out": str(out)}))
    shutil.copytree(run / "checkpoints" / "50", out / "checkpoints" / "50")
    shutil.copy(run / "checkpoints" / "50.json", out / "checkpoints")
    assert main(arguments(data, out, *REGULARISED)) == 0
    assert "resuming from step 50" in capsys.readouterr().err
    assert (out / "model" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()


def finetune(run: Path, data: Path, out: Path, *more: str) -> Any:
    """Fine-tune for one step; the parameters."""
    words = ["images", "finetune", "--data", str(data), "--model", str(run / "model"), "--out", str(out)]
    assert main([*words, "--steps", "1", "--batch-size", "8", *more]) == 0
    return models.load(out / "model").params


def test_fine_tuning_at_another_size_with_frozen_layers(run: Path, data: Path, tmp_path: Path, capsys, monkeypatch):
    evaluated = []

    def record(logits: np.ndarray, labels: np.ndarray, kind: str = "softmax") -> dict[str, float]:
        evaluated.append(evaluate(logits, labels, kind)["loss"] == evaluate(logits, labels, "sigmoid")["loss"])
        return evaluate(logits, labels, kind)

    monkeypatch.setattr("bestiary.train.images.loop.evaluate", record)
    settings = ["--image-size", "12", "--loss", "sigmoid", "--freeze-layers", "1"]
    after = finetune(run, data, tmp_path / "finer", *settings)
    assert len(evaluated) > 1
    assert all(evaluated), "the metrics are those of the loss"
    said = capsys.readouterr().err
    assert "positions resized from 8 to 12 pixels (bicubic)" in said
    assert "newly initialised" not in said
    assert models.load(tmp_path / "finer" / "model").config.image_size == 12
    assert after["encoder"]["embeddings"]["position"]["embedding"].shape == (10, 16)
    before = models.load(run / "model").params
    old, new = (params["encoder"]["layers"]["attention"]["query"]["kernel"] for params in (before, after))
    assert [bool((a == b).all()) for a, b in zip(old, new, strict=True)] == [True, False]
    np.testing.assert_array_equal(*(params["encoder"]["embeddings"]["patch"]["kernel"] for params in (before, after)))


def test_fine_tuning_adapters_on_classes_of_other_names(run: Path, data: Path, tmp_path: Path, capsys):
    table = data.parent / "table.csv"
    lines = [f"data/train/{name}/{n}.png,{name[0]}" for name in CLASSES for n in range(16)]
    table.write_text("\n".join(["image,label", *lines]))
    after = finetune(run, table, tmp_path / "lora", "--held-out", "0.25", "--lora-rank", "2")
    said = capsys.readouterr().err
    assert "newly initialised (not in checkpoint" in said
    assert "dev: 12 images of 3 classes" in said
    assert models.load(tmp_path / "lora" / "model").config.label_names == ("c", "d", "e")
    assert (tmp_path / "lora" / "adapter" / "adapter_config.json").is_file()
    before = models.load(run / "model").params
    np.testing.assert_array_equal(*(p["encoder"]["layers"]["attention"]["key"]["kernel"] for p in (before, after)))
    assert not np.array_equal(before["classifier"]["kernel"], after["classifier"]["kernel"])


def test_prediction(run: Path, data: Path, tmp_path: Path, capsys):
    colours = np.repeat(picture(2, np.random.default_rng(9))[..., None], 3, axis=-1)
    Image.fromarray(colours).resize((40, 40)).save(tmp_path / "photo.jpg")
    capsys.readouterr()
    assert (
        main(["images", "predict", str(run), str(tmp_path / "photo.jpg"), str(data / "val" / "dot"), "--top", "2"]) == 0
    )
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(said) == 8
    assert said[0]["class"] == "edge"
    assert [len(one["top"]) for one in said] == [2] * 8
    assert sum(one["class"] == "dot" for one in said[1:]) >= 6
    drawn = tmp_path / "attention.png"
    assert main(["images", "predict", str(run), str(tmp_path / "photo.jpg"), "--attention", str(drawn)]) == 0
    with Image.open(drawn) as picture_of_it:
        assert picture_of_it.size[0] > 400
    (tmp_path / "text.png").write_text("no")
    assert main(["images", "predict", str(run), str(tmp_path / "text.png")]) == 1
    assert "text.png: not an image that can be read" in capsys.readouterr().err


def test_vectors_of_images(run: Path, data: Path, tmp_path: Path, capsys):
    out = tmp_path / "vectors.npy"
    words = [
        "images",
        "embed",
        str(run),
        str(data / "val"),
        "--layers",
        "1,-1",
        "--combine",
        "concat",
        "--out",
        str(out),
    ]
    assert main([*words, "--batch-size", "5"]) == 0
    found = np.load(out)
    assert found.shape == (21, 32)
    model, params, _, processor = models.load(run / "model")
    with Image.open(data / "val" / "cross" / "0.png") as image:
        pixels = processor(np.asarray(image)[..., None])
    encoder = model.parts.encoder(model.config, pooler=False)
    apply = jax.jit(partial(encoder.apply, every_layer=True))
    hidden = apply({"params": params["encoder"]}, pixels[None]).every_hidden
    np.testing.assert_allclose(found[0], jnp.concatenate([hidden[1, 0, 0], hidden[2, 0, 0]]), atol=1e-5)
    assert main([*words, "--layers", "3"]) == 1
    assert "there is no layer 3" in capsys.readouterr().err


def test_attention_is_a_distribution_over_patches():
    """Of a plain ViT too, which has no [CLS]."""
    sizes = dict(width=16, layers=2, heads=2, feed_forward=24, image_size=8, patch_size=4, channels=1)
    pixels = jax.random.normal(jax.random.key(1), (2, 8, 12, 1))
    for name, least in (("vit", 0.0), ("plain-vit", 0.999)):
        family = registry.family_named(name)
        model = family.build("classification", family.config(**sizes))
        params = nn.unbox(jax.jit(registry.init_params, static_argnums=0)(model, jax.random.key(0)))
        found = jax.jit(last_attention, static_argnums=0)(model, params, pixels)
        assert found.shape == (2, 2, 3)
        assert ((found.sum(axis=(1, 2)) > least) & (found.sum(axis=(1, 2)) < 1.001)).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "vit-tny"], "there is no such size. Did you mean 'vit-tiny'?"),
        (
            ["--model", "bert-tiny"],
            "BERT reads text, not images. Sizes that do: conv-vit-tiny, conv-vit-small, plain-vit-tiny,",
        ),
        (["--patch-size", "3"], "image size 8 is not a multiple of patch size 3"),
        (["--heads", "3"], "width 16 is not a multiple of heads 3"),
        (["--label-smoothing", "0.1", "--loss", "sigmoid"], "--label-smoothing goes with --loss softmax"),
        (["--initializer-range", "0"], "--initializer-range is 0.0"),
        (["--model", "plain-vit-tiny", "--initializer-range", "0.1"], "--initializer-range: Plain ViT draws"),
        (["--mixup", "3"], "--mixup is 3.0; it must be at least 0 and at most 2"),
        (["--accumulate", "3"], "--batch-size 16 is not a multiple of --accumulate 3"),
        (["--eval-data", "x.csv"], "not a table, so that x.csv cannot be its evaluation set"),
        (["--data", "nowhere"], "nowhere: there is no such folder or file. Expected IDX files"),
    ],
)
def test_mistakes_are_named(data: Path, tmp_path: Path, capsys, more: list[str], message: str):
    assert main([*arguments(data, tmp_path / "out"), *more]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def split(data: Path, *names: str, **settings: Any) -> Any:
    """Read the splits of a table of some images: a name of a class for each."""
    numbers = {name: iter(range(16)) for name in CLASSES}
    table = data.parent / "some.csv"
    table.write_text("\n".join(["image,label", *(f"data/train/{n}/{next(numbers[n])}.png,{n}" for n in names), ""]))
    run: Any = SimpleNamespace(progress=SimpleNamespace(line=lambda said: None))
    return read_splits(TrainConfig(data=table, out=data.parent / "none", **settings), run)


@pytest.mark.parametrize(
    ("names", "held_out", "message"),
    [(CLASSES, 0.1, "dev: no images with --held-out 0.1"), (CLASSES[:1] * 2, 0.9, "train: .* --held-out 0.9")],
)
def test_a_split_without_images_is_refused(data: Path, names: tuple[str, ...], held_out: float, message: str):
    with pytest.raises(RunError, match=message):
        split(data, *names, held_out=held_out)


def test_a_number_of_training_images(data: Path):
    """Exactly that many, at random: of the one image of a class too."""
    found = [split(data, *["dot"] * 12, "edge", train_examples=3, seed=seed)[0].labels.tolist() for seed in range(30)]
    assert {len(labels) for labels in found} == {3}
    assert all(labels == sorted(labels) for labels in found)
    assert 0 < sum(1 in labels for labels in found) < 30


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A new plain ViT, two of whose classes have one name."""
    folder, family = tmp_path_factory.mktemp("plain") / "model", registry.family_named("plain-vit")
    sizes = dict(width=16, layers=1, heads=2, feed_forward=24, image_size=8, patch_size=4, channels=1)
    classes = dict(num_labels=3, label_names=("crane", "kite", "crane"))
    model = family.build("classification", family.config(**sizes, **classes))
    params = jax.device_get(nn.unbox(jax.jit(registry.init_params, static_argnums=0)(model, jax.random.key(0))))
    models.save(folder, model, params)
    return folder


def test_a_plain_vit_has_no_cls_to_embed(plain: Path, data: Path, tmp_path: Path, capsys):
    words = ["images", "embed", str(plain), str(data / "val" / "dot"), "--out", str(tmp_path / "vectors.npy")]
    assert main([*words, "--pooling", "cls"]) == 1
    assert "--pooling cls: " in capsys.readouterr().err
    assert main(words) == 0


def test_predicted_classes_of_one_name_are_numbered(plain: Path, data: Path, capsys):
    assert main(["images", "predict", str(plain), str(data / "val" / "dot" / "0.png")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said["top"]) == {"crane (0)", "kite", "crane (2)"}
    assert said["class"] in said["top"]


def test_a_vit_is_not_fine_tuned_on_text(run: Path, tmp_path: Path, capsys):
    words = ["finetune", "mrpc", "--data", str(tmp_path), "--model", str(run / "model"), "--out", str(tmp_path / "x")]
    assert main(words) == 1
    assert "ViT reads images, not text. `bestiary images` trains it." in capsys.readouterr().err


# --- losses and metrics -----------------------------------------------------------------------------------------------


def test_losses_by_their_formulas():
    random = np.random.default_rng(0)
    logits = random.normal(size=(4, 3)).astype(np.float32)
    batch: dict[str, Any] = {"labels": jnp.array([0, 2, 1, 1]), "other_labels": jnp.array([1, 1, 1, 0])}
    batch["shares"] = jnp.array([0.6, 1.0, 0.5, 0.9], jnp.float32)
    wanted = np.eye(3)[[0, 2, 1, 1]] * np.array([[0.6], [1.0], [0.5], [0.9]])
    wanted += np.eye(3)[[1, 1, 1, 0]] * np.array([[0.4], [0.0], [0.5], [0.1]])
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    total, count = class_sums(jnp.asarray(logits), batch, "softmax", 0.3)["loss"]
    assert float(count) == 4
    assert float(total) == pytest.approx(-((0.7 * wanted + 0.1) * log_p).sum(), rel=1e-5)
    sigmoid = 1 / (1 + np.exp(-logits))
    expected = -(wanted * np.log(sigmoid) + (1 - wanted) * np.log(1 - sigmoid)).sum()
    assert float(class_sums(jnp.asarray(logits), batch, "sigmoid", 0.0)["loss"][0]) == pytest.approx(expected, rel=1e-5)
    for kind in ("softmax", "sigmoid"):
        total, _ = class_sums(jnp.asarray(logits), {"labels": batch["labels"]}, kind, 0.0)["loss"]
        assert 4 * evaluate(logits, np.array([0, 2, 1, 1]), kind)["loss"] == pytest.approx(float(total), rel=1e-5)


def test_metrics():
    logits = np.zeros((3, 7), np.float32)
    logits[[0, 1, 2], [4, 2, 6]] = 9
    logits[1, [0, 1, 3, 4]] = 1
    found = evaluate(logits, np.array([4, 5, 6]))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["top5"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(float(-jax.nn.log_softmax(jnp.asarray(logits))[[0, 1, 2], [4, 5, 6]].mean()))
    correct = np.array([True] * 7 + [False] * 3)
    assert calibration_error(np.full(10, 0.72), correct) == pytest.approx(0.02)
    assert calibration_error(np.array([0.9, 0.6]), np.array([True, True])) == pytest.approx(0.25)

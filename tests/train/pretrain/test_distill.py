"""Distillation: the original's losses and gradients, a student made of its teacher's layers, and runs."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file

from bestiary import models
from bestiary.models.checkpoints.teacher import Teacher
from bestiary.models.encoders.distilbert import FAMILY, DistilBertConfig
from bestiary.models.heads import losses as loss_module
from bestiary.models.registry import family_named, init_params
from bestiary.train.cli import main
from bestiary.train.pretrain.config import DistillConfig
from bestiary.train.pretrain.distill import Distillation
from bestiary.train.pretrain.model import evenly_spaced, new_config, student_params
from bestiary.train.pretrain.objective import Term, total

FIXTURE = Path(__file__).parents[2] / "models" / "fixtures" / "distillation"
TERMS = (Term("kl", 5.0), Term("mlm", 2.0), Term("cosine", 1.0))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    loaded = models.load(FIXTURE / "teacher")
    return Teacher(FIXTURE / "teacher", loaded.model, loaded.params)


class Vocabulary:
    vocab_size = 61


def objective(teacher: Teacher, terms: tuple[Term, ...] = TERMS) -> Distillation:
    plain: dict = dict(masking=None, tokenizer=Vocabulary(), kind="sentences", evaluation_rate=0.15)
    return Distillation(**plain, teacher=teacher, temperature=2.0, terms=terms)


def given() -> tuple[dict[str, np.ndarray], dict[str, jax.Array]]:
    """(what is expected, the batch as a corrupted one)."""
    expected = load_file(FIXTURE / "expected.safetensors")
    labels = expected["labels"]
    slots = (labels >= 0).sum(1).max()
    order = np.argsort(labels < 0, axis=1, kind="stable")[:, :slots].astype(np.int32)
    chosen = np.take_along_axis(labels, order, 1)
    batch = dict(
        input_ids=expected["input_ids"],
        segment_ids=expected["attention_mask"],
        mlm_positions=order,
        mlm_labels=np.maximum(chosen, 0),
        mlm_weights=(chosen >= 0).astype(np.float32),
        rows=np.arange(len(labels), dtype=np.uint32),
    )
    return expected, {name: jnp.asarray(value) for name, value in batch.items()}


@pytest.mark.parametrize("chunk", [None, 61 * 2 * 4 * 3])
def test_losses_and_gradients_are_the_originals(teacher, monkeypatch, chunk):
    """At once, and in chunks of three columns, of which the last is not full."""
    if chunk is not None:
        monkeypatch.setitem(loss_module.CHUNK_LOGITS, "cpu", chunk)
    expected, batch = given()
    student = models.load(FIXTURE / "student")
    distillation = objective(teacher)
    weights = distillation.weights(batch)

    def loss(params):
        sums = distillation.losses(student.model, params, batch, deterministic=True)
        return total(TERMS, sums, weights), sums

    (value, sums), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(student.params)
    for name in ("kl", "mlm", "cosine"):
        assert float(sums[name].loss / sums[name].weight) == pytest.approx(float(expected[name]), abs=1e-5)
        assert sums[name].weight == weights[name]
    assert float(value) == pytest.approx(float(expected["loss"]), abs=2e-5)
    references = load_file(FIXTURE / "grads.safetensors")
    found = dict(FAMILY.checkpoint_table(student.model).save(jax.device_get(gradients), ()))
    assert set(references) == set(found)
    for name, reference in references.items():
        if name.endswith("k_lin.bias"):  # no gradient but for rounding: softmax takes no notice of them
            assert max(np.abs(found[name]).max(), np.abs(reference).max()) < 1e-5
        else:
            error = np.linalg.norm(found[name] - reference) / np.linalg.norm(reference)
            assert error < 1e-4, (name, error)


def test_a_loss_without_a_weight_is_left_out(teacher):
    expected, batch = given()
    student = models.load(FIXTURE / "student")
    distillation = objective(teacher, (Term("cosine", 1.0),))
    sums = jax.jit(lambda params: distillation.losses(student.model, params, batch, deterministic=True))(student.params)
    assert set(sums) == {"mlm", "cosine"}  # masked words are reported
    assert float(sums["cosine"].loss / sums["cosine"].weight) == pytest.approx(float(expected["cosine"]), abs=1e-5)


# --- the student's first weights --------------------------------------------------------------------------------------


def test_layers_are_spaced_as_in_the_original():
    assert evenly_spaced(12, 6) == (0, 2, 4, 7, 9, 11)
    assert evenly_spaced(4, 2) == (0, 3)
    assert evenly_spaced(3, 3) == (0, 1, 2)
    assert evenly_spaced(5, 1) == (0,)


def student_of(**changes):
    sizes = dict(vocab_size=61, width=24, layers=2, heads=3, feed_forward=40, positions=20)
    return FAMILY.build("masked_lm", DistilBertConfig(**{**sizes, **changes}))


def test_a_student_starts_from_its_teachers_layers(teacher):
    found, layers = student_params(teacher, student_of(positions=16, layers=3))
    assert layers == (0, 2, 4)
    words, theirs = found["encoder"], teacher.params["encoder"]
    np.testing.assert_array_equal(words["embeddings"]["position"]["embedding"],
                                  theirs["embeddings"]["position"]["embedding"][:16])  # fmt: skip
    np.testing.assert_array_equal(words["embeddings"]["word"]["embedding"], theirs["embeddings"]["word"]["embedding"])
    assert "token_type" not in words["embeddings"]
    jax.tree.map(lambda own, of: np.testing.assert_array_equal(own, of[[0, 2, 4]]), words["layers"], theirs["layers"])
    jax.tree.map(np.testing.assert_array_equal, found["mlm"], teacher.params["mlm"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": 6}, "the teacher has 5 layers, and the student 6"),
        ({"width": 12}, "the teacher's sizes are others: encoder.embeddings.norm.bias is [24] there, [12] in the"),
        ({"positions": 21}, "encoder.embeddings.position.embedding is [20, 24] there, [21, 24] in the student"),
        ({"heads": 2}, "encoder.layers.attention.key.bias is [2, 3, 8] there, [2, 2, 12] in the student"),
    ],
)
def test_layers_that_do_not_fit_say_why(teacher, changes, reason):
    assert reason in student_params(teacher, student_of(**changes))


@pytest.mark.parametrize("name", ["albert", "modernbert"])
def test_a_copy_of_its_teacher_has_nothing_to_learn(name):
    """Of other families; with half of the layers, it starts from those."""
    family, own = family_named(name), {"albert": {"embedding_size": 8, "groups": 2}, "modernbert": {"pad_token_id": 0}}
    sizes = dict(vocab_size=64, width=16, layers=2, heads=2, feed_forward=24, positions=20)
    model = family.build("masked_lm", family.config(**sizes, **own.get(name, {})))
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(model, jax.random.key(0)))
    teacher = Teacher(Path(name), model, jax.device_get(params))
    copied, layers = student_params(teacher, model)
    assert layers == (0, 1)
    batch = given()[1]
    sums = jax.jit(lambda params: objective(teacher).losses(model, params, batch, deterministic=True))(copied)
    assert float(sums["kl"].loss) == pytest.approx(0, abs=1e-4)
    assert float(sums["cosine"].loss) == pytest.approx(0, abs=1e-4)
    changes = {"groups": 1} if name == "albert" else {}
    half = family.build("masked_lm", dataclasses.replace(model.config, layers=1, **changes))
    assert student_params(teacher, half)[1] == (0,)


# --- runs -------------------------------------------------------------------------------------------------------------

SETTINGS = dict(
    model="distilbert-tiny", vocab_size=None, steps="4", log_every="1", evaluate_every="4", checkpoint_every="2"
)


@pytest.fixture(scope="module")
def distil(workshop, uninterrupted):
    """(folder, flags) -> exit status of a run in this process, taught by the undisturbed run's model."""

    def run(out: Path, *more: str, teacher: Path = uninterrupted / "model", **settings: str | None) -> int:
        return main(
            ["distill", *workshop.arguments(out, *more, **{"teacher": str(teacher), **SETTINGS, **settings})[1:]]
        )

    return run


@pytest.fixture(scope="module")
def student(distil, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("students") / "student"
    assert distil(out) == 0
    return out


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run(student, uninterrupted):
    held_out = json.loads((student / "results.json").read_text())["held_out"]
    parts = [5 * held_out["kl_loss"], 2 * held_out["mlm_loss"], held_out["cosine_loss"]]
    assert held_out["loss"] == pytest.approx(sum(parts))
    assert json.loads((student / "model" / "config.json").read_text())["architectures"] == ["DistilBertForMaskedLM"]
    taught, own = models.load(uninterrupted / "model"), models.load(student / "model")
    assert own.tokenizer.tokens == taught.tokenizer.tokens
    assert (own.config.layers, taught.config.layers) == (1, 2)
    stored = [path for path in (student / "checkpoints").rglob("*") if path.is_file()]
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(own.params))
    assert sum(path.stat().st_size for path in stored) < 2 * 3.5 * parameters  # two, without the teacher


def test_a_run_goes_on_from_a_checkpoint_as_if_never_stopped(distil, student, tmp_path):
    assert distil(tmp_path / "resumed", "--resume-from", str(student / "checkpoints" / "2")) == 0
    found, expected = ((run / "model" / "model.safetensors").read_bytes() for run in (tmp_path / "resumed", student))
    assert found == expected
    assert lines(tmp_path / "resumed") == [line for line in lines(student) if line["step"] > 2]


def test_half_of_a_teacher(uninterrupted):
    """Without --model, the student is of the teacher's family and sizes."""
    taught = models.load(uninterrupted / "model")
    half = new_config(DistillConfig(teacher=uninterrupted / "model"), taught.tokenizer)
    assert half == dataclasses.replace(taught.config, layers=1, repeated=())


def test_another_teacher_at_the_same_place_is_noticed(distil, student, uninterrupted, tmp_path, capsys):
    teacher, out = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(uninterrupted / "model", teacher)
    shutil.copytree(student, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "teacher": str(teacher)}))
    assert distil(out, teacher=teacher) == 0  # it has ended, and nothing is left to do
    loaded = models.load(teacher)
    loaded.params["mlm"]["bias"][0] += 1
    models.save(teacher, loaded.model, loaded.params, loaded.tokenizer)
    assert distil(out, teacher=teacher) == 1
    assert "teacher_fingerprint: '" in capsys.readouterr().err


@pytest.fixture(scope="module")
def unfit(uninterrupted, tmp_path_factory) -> Path:
    """A folder of teachers that do not fit."""
    folder = tmp_path_factory.mktemp("teachers")
    model, params, _, tokenizer = models.load(uninterrupted / "model", head="classification", num_labels=3)
    models.save(folder / "classifier", model, params, tokenizer)
    words = [token for token in tokenizer.tokens if not token.startswith("[")]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words[::-1]]))
    model, params, config, _ = models.load(uninterrupted / "model", head="masked_lm", positions=512)
    models.save(folder / "words", model, params)
    short = model.clone(config=config.__class__(**{**vars(config), "positions": 24}))
    table = params["encoder"]["embeddings"]["position"]
    table["embedding"] = table["embedding"][:24]
    models.save(folder / "short", short, params, tokenizer)
    return folder


@pytest.mark.parametrize(
    ("teacher", "flags", "message"),
    [
        (
            "classifier",
            [],
            "expected the head masked_lm, found classification (not in the checkpoint: ",
        ),
        ("short", [], "it has 24 positions, and rows have up to 32 tokens"),
        (None, ["--tokenizer", "vocab.txt"], "tokens, which differ from number 5, "),
        (None, ["--model", "distilbert-mini"], "its hidden states have 128 numbers, the student's 256"),
        (None, ["--copy-layers", "True", "--model", "distilbert-mini", "--cosine-weight", "0"], "--copy-layers: the"),
        (None, ["--kl-weight", "0", "--cosine-weight", "0"], "Nothing is learnt from the teacher"),
        (None, ["--temperature", "0"], "--temperature is 0.0; it must be above 0."),
        ("nowhere", [], "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_distilled_is_refused(distil, unfit, uninterrupted, tmp_path, capsys, teacher, flags, message):
    flags = [str(unfit / flag) if flag == "vocab.txt" else flag for flag in flags]
    chosen = uninterrupted / "model" if teacher is None else unfit / teacher
    model = {"model": None} if "--model" in flags else {}
    assert distil(tmp_path / "run", *flags, teacher=chosen, **model) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pretraining_does_not_offer_it(workshop, tmp_path, capsys):
    assert main(workshop.arguments(tmp_path / "run", "--objective", "distill")) == 1
    assert "--objective distill: BERT can learn mlm+nsp, mlm." in capsys.readouterr().err

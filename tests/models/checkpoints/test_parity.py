"""The reference implementation's outputs, losses, gradients and bytes, on stored fixtures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bestiary.models.checkpoints.parity import Report, check, gradient_errors
from bestiary.train.commands.parity import ParityConfig, describe, main
from bestiary.train.generate.released import reference_generate
from bestiary.train.optim.optimizer import reference_optimizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = (
    "bert_pretraining",
    "bert_model",
    "bert_classification",
    "bert_regression",
    "bert_tokens",
    "bert_span",
    "bert_choice",
    "roberta_model",
    "roberta_mlm",
    "roberta_classification",
    "roberta_tokens",
    "roberta_span",
    "roberta_choice",
    "distilbert_model",
    "distilbert_mlm",
    "distilbert_classification",
    "distilbert_tokens",
    "distilbert_span",
    "distilbert_choice",
    "albert_model",
    "albert_pretraining",
    "albert_mlm",
    "electra_model",
    "electra_discriminator",
    "electra_generator",
    "electra_classification",
    "electra_choice",
    "modernbert_model",
    "modernbert_mlm",
    "modernbert_classification",
    "modernbert_tokens",
    "modernbert_span",
    "modernbert_choice",
    "vit_model",
    "vit_classification",
    "vit_resized",
    "xlm_roberta_mlm",
    "gpt1_lm",
    "gpt1_classification",
    "gpt2_model",
    "gpt2_lm",
    "gpt2_classification",
    "gpt2_tokens",
    "gpt2_span",
    "gpt2_choice",
    "gptneo_lm",
    "gptneo_classification",
    "transformer_xl_lm",
    "transformer_xl_shared",
    "transformer_xl_classification",
)


TRAJECTORIES = (
    "bert_pretraining",
    "roberta_mlm",
    "distilbert_classification",
    "gpt2_lm",
    "gpt1_classification",
    "vit_classification",
    "transformer_xl_lm",
)


def assert_passes(folder: Path) -> Report:
    report = check(folder, make_optimiser=reference_optimizer)
    assert report.passed, "\n".join(describe(report))
    return report


@pytest.mark.parametrize("name", NAMES)
def test_own_fixtures(name: str) -> None:
    report = assert_passes(FIXTURES / name)
    assert report.outputs
    if name.endswith("_model"):
        assert {"hidden_states.0", "hidden_states.3", "attentions.0", "attentions.2"} <= set(report.outputs)
    else:
        assert report.loss is not None
        stored = set(load_file(FIXTURES / name / "grads.safetensors"))
        # The reference names XLM-R's word embeddings by their tied copy.
        words = {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"}
        if not name.startswith("vit_"):  # whose parameters the reference names otherwise in memory
            assert {words.get(tensor, tensor) for tensor in stored} <= set(report.gradients)
        assert len(stored) <= len(report.gradients)
    assert (report.trajectory is not None) == (name in TRAJECTORIES)


def copy(tmp_path: Path, name: str = "bert_span") -> Path:
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def spoil(path: Path, name: str, amount: float) -> None:
    tensors = {key: value.copy() for key, value in load_file(path).items()}
    tensors[name].flat[0] += amount
    save_file(tensors, path, metadata={"format": "pt"})


def run_json(capsys: pytest.CaptureFixture[str], *folders: Path) -> tuple[int, dict]:
    status = main(ParityConfig(folders, json=True))
    return status, json.loads(capsys.readouterr().out)


def test_json_names_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = run_json(capsys, FIXTURES / "bert_span")
    (report,) = printed["folders"]
    assert status == 0
    assert printed["passed"] is True
    assert set(report["outputs"]) == {"start_logits", "end_logits"}
    assert 0 <= report["loss"] <= 1e-5
    assert report["gradient"] == report["gradients"][report["gradient_tensor"]] <= 1e-4
    assert report["saved_differently"] == []


def test_what_differs_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, tensor in (
        ("expected.safetensors", "output.start_logits"),
        ("expected.safetensors", "loss"),
        ("grads.safetensors", "qa_outputs.weight"),
    ):
        folder = copy(tmp_path / tensor)
        spoil(folder / file, tensor, 1e-2)
        status, printed = run_json(capsys, FIXTURES / "bert_span", folder)
        assert status == 1
        assert [report["passed"] for report in printed["folders"]] == [True, False]


def test_training_that_differs_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the loss of one step, by a setting of the optimiser, or since nothing is known of how it was trained."""
    folder = copy(tmp_path, "distilbert_classification")
    stored = json.loads((folder / "trajectory.json").read_text())

    def run(**changes) -> dict:
        (folder / "trajectory.json").write_text(json.dumps(stored | changes))
        status, printed = run_json(capsys, folder)
        (report,) = printed["folders"]
        assert status == (0 if report["passed"] else 1)
        return report

    assert run()["passed"]
    wrong = run(losses=[loss * (1 + 1e-3 * (step == 6)) for step, loss in enumerate(stored["losses"])])
    assert (wrong["passed"], wrong["trajectory_step"]) == (False, 7)
    assert wrong["trajectory"] == pytest.approx(1e-3, rel=0.1)
    assert not run(weight_decay=0.5)["passed"]
    assert "trajectory.json: expected optimizer 'AdamW'" in run(optimizer="SGD")["error"]
    assert "trajectory.json: expected the losses of 30 steps, found 20" in run(steps=30)["error"]
    assert "losses" in run(losses="none")["error"]


def test_nan_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(tmp_path)
    spoil(folder / "expected.safetensors", "output.start_logits", float("nan"))
    status, printed = run_json(capsys, folder)
    assert status == 1
    assert printed["folders"][0]["outputs"]["start_logits"] == "NaN"


def test_a_spoilt_weight_fails(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    spoil(folder / "model.safetensors", "bert.encoder.layer.1.attention.self.key.weight", 0.1)
    report = check(folder)
    assert not report.passed
    assert report.gradient is not None
    assert report.gradient > 1e-4


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "neither model.safetensors nor"),
        ("expected.safetensors", "expected.safetensors: no such file"),
        ("grads.safetensors", "grads.safetensors: no such file"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, file: str, message: str) -> None:
    folder = copy(tmp_path)
    (folder / file).unlink()
    report = check(folder)
    assert not report.passed
    assert message in (report.error or "")


def test_another_family_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(tmp_path)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"model_type": "llama"}))
    assert main(ParityConfig((folder,))) == 1
    assert "llama is not a family of this version; known: albert, bart, bert" in capsys.readouterr().out


def test_no_folders_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ParityConfig(())) == 2
    assert "no folders" in capsys.readouterr().err


def test_gradients_that_are_zero_but_for_rounding_are_measured_against_the_largest() -> None:
    expected = {"large": np.array([3.0, 4.0]), "noise": np.array([1e-9, 0.0])}
    found = {"large": np.array([3.0, 4.0]), "noise": np.array([0.0, 1e-9]), "unused": np.zeros(2)}
    errors = gradient_errors(found, expected)
    assert errors["large"] == errors["unused"] == 0
    assert errors["noise"] < 1e-9
    assert gradient_errors(found | {"unused": np.ones(2)}, expected)["unused"] > 0.1


# Last, since the fixture lasts until the module's end. Compiled as for users.
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", ["bert_model", "gpt2_lm"])
def test_own_fixtures_as_users_compile_them(name: str) -> None:
    report = check(FIXTURES / name, make_optimiser=reference_optimizer, generate=reference_generate)
    assert report.passed, "\n".join(describe(report))


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", [*NAMES[:2], "transformer_xl_lm"])
def test_shared_fixtures(shared: Path, name: str) -> None:
    """Compiled as for users."""
    assert_passes(shared / "parity" / name)

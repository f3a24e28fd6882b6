"""The command line: typos and folders of another kind are answered before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from bestiary.data.tasks.glue import FINETUNED
from bestiary.kernels import BACKENDS
from bestiary.train.cli import COMMANDS, main
from bestiary.train.config import Attention

FINETUNE = ["finetune", "mrpc", "--data", "x", "--out", "/nowhere/run", "--model"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["finetune", "squd"], "bestiary finetune: there is no 'squd'. Did you mean 'squad'?"),
        (["finetune", "mrcp"], "bestiary finetune: there is no 'mrcp'. Did you mean 'mrpc'?"),
        (["finetune", "poetry"], "bestiary finetune: there is no 'poetry'. Expected one of cola, sst2,"),
        (["models", "shw"], "bestiary models: there is no 'shw'. Did you mean 'show'?"),
        (["translate", "trian"], "bestiary: there is no command 'translate trian'. Did you mean 'translate train'?"),
        (["finetun", "mrpc"], "bestiary: there is no command 'finetun'. Did you mean 'finetune'?"),
        (["translate"], "bestiary: 'translate' needs a subcommand: translate train, translate run, translate score"),
    ],
)
def test_a_typo_gets_a_suggestion(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(said)


def test_every_task_of_glue_is_known_to_the_command_line():
    assert COMMANDS[("finetune",)].first == "..data.tasks.glue:FINETUNED"
    assert "ax" not in FINETUNED


def test_backends_of_attention_are_those_of_the_kernels():
    assert set(get_args(Attention)) == set(BACKENDS)


def test_a_size_is_not_a_checkpoint_folder(capsys: pytest.CaptureFixture[str]):
    assert main([*FINETUNE, "bert-base"]) == 1
    error = capsys.readouterr().err
    assert "bert-base: no such folder. Expected a checkpoint folder (config.json, model.safetensors" in error
    assert "Only `bestiary pretrain` and `bestiary distill` take the name of a size" in error


def test_the_folder_of_a_run_and_that_of_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    for path in (run / "config.json", run / "task.json", run / "model" / "config.json"):
        path.write_text("{}")
    assert main([*FINETUNE, str(run)]) == 1
    assert f"{run}: the folder of a run; expected that of its model, {run / 'model'}." in capsys.readouterr().err
    assert main(["evaluate", str(run / "model"), "--data", "x"]) == 1
    assert f"(no task.json and model/ in it). Did you mean {run}?" in capsys.readouterr().err
    assert main([*FINETUNE, str(tmp_path)]) == 1
    assert f"{tmp_path}: no config.json. A checkpoint folder holds" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [*FINETUNE, "bert-base"],
        ["evaluate", "nowhere", "--data", "x"],
        ["predict", "nowhere", "--text", "x"],
        ["embed", "--model", "nowhere", "--out", "x.npy"],
        ["pretrain", "--init-from", "nowhere"],
        ["pretrain", "--steps", "0"],
    ],
)
def test_what_flags_alone_show_wrong_is_refused_without_importing_jax(words: list[str]):
    run = f"from bestiary.train.cli import main; status = main({words!r})"
    script = f"import sys; {run}; print(status, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "1 False\n", done.stderr


def test_help_texts_flow_to_the_width_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["finetune", "squad", "--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    at = lines.index("model.safetensors, tokenizer files). If it has another")
    assert lines[at + 1 : at + 3] == ["head than the task needs, only its encoder is used.", "(required)"]

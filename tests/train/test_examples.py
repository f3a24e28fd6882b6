"""Every command's --help opens with an example, whose words, flags and files are there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bestiary.train.cli import COMMANDS, config_of, main, opening
from bestiary.train.plan.arguments import divide

# What the examples' earlier lines make, by the run's folder.
MADE = ("pretrain", "translate", "gpt2-tiny", "text2text", "sst2", "shapes", "unit", "lora")


@pytest.fixture(scope="module")
def checkout(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a checkout, where the examples' runs have been made."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("docs", "tests", "README.md", "CONTRIBUTING.md"):
        (root / name).symlink_to(repository / name)
    for run in MADE:
        for folder in (f"runs/{run}", f"runs/{run}/model", f"runs/{run}/adapter"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "model.safetensors", "adapter_config.json", "task.json"):
                (root / folder / name).write_text("{}")
    return root


def lines_of(example: str) -> list[list[str]]:
    """The words of an example's lines, without `bestiary` and redirections."""
    return [shlex.split(re.split(r" [<>] ", line)[0])[1:] for line in example.splitlines()]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_that_it_understands(
    words: tuple[str, ...], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    example = COMMANDS[words].example
    assert example.startswith("bestiary ")
    given = lines_of(example)[-1]
    assert tuple(given[: len(words)]) == words
    rest = given[len(words) :]
    if words == ("plan",):  # before its own flags stands the command that it plans
        rest = divide(rest)[0]
    assert config_of(words, rest) is not None
    for path in re.findall(r"(?:docs|tests)/\S+|\w+\.md", example):
        assert (checkout / path).exists(), path


def test_an_earlier_line_is_another_commands_example() -> None:
    """So that an example runs if those of the commands it needs do."""
    last = {command.example.splitlines()[-1] for command in COMMANDS.values()}
    pretrained = "bestiary pretrain --model gpt2-tiny --steps 20 --out runs/gpt2-tiny"
    lora = next(line for line in COMMANDS["adapter", "load"].example.splitlines() if "--lora-rank" in line)
    earlier = {line for command in COMMANDS.values() for line in command.example.splitlines()[:-1]}
    assert earlier - last == {pretrained, lora}


def test_help_opens_with_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("example:\n  bestiary pretrain\n")
    assert max(map(len, opening(("finetune", "squad")).splitlines())) <= 84


def test_a_shell_completes_commands_flags_and_choices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {words: COMMANDS[words] for words in (("pretrain",), ("finetune",), ("finetune", "squad"))}
    monkeypatch.setattr("bestiary.train.cli.COMMANDS", kept)
    assert main(["--completion", "bash"]) == 0
    (tmp_path / "bestiary").write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        line = f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _shtab_bestiary; echo "${{COMPREPLY[@]}}"'
        script = f"source {tmp_path / 'bestiary'}; {line}"
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()

    assert completed("bestiary", "pre") == ["pretrain"]
    assert completed("bestiary", "pretrain", "--learning-r") == ["--learning-rate"]
    assert completed("bestiary", "pretrain", "--optimizer", "la") == ["lamb"]
    assert completed("bestiary", "finetune", "s") == ["sst2", "stsb", "squad"]


def test_the_completion_ends_quietly_when_its_reader_leaves() -> None:
    one = "from bestiary.train import cli; cli.COMMANDS = {('pretrain',): cli.COMMANDS[('pretrain',)]}; "
    command = [sys.executable, "-c", one + "raise SystemExit(cli.main(['--completion', 'zsh']))"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141, said.decode()
    assert said == b""


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "dos"]) == 2
    assert "--completion dos: expected one of bash" in capsys.readouterr().err

"""The wheel holds what the repository holds, and the commands that need no JAX do not import it."""

import subprocess
import sys
import tomllib
import zipfile

import pytest

from bestiary.train.cli import COMMANDS, main

ROOMS = ("data", "kernels", "models", "train")


def test_wheel_has_every_file_of_the_four_rooms(repository, tmp_path):
    """A module that is missing from the wheel works in an editable install and fails for users."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOMS],
        cwd=repository, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    source = tmp_path / "source"
    for name in (*listed, "pyproject.toml", "README.md", "LICENSE"):
        if (repository / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((repository / name).read_bytes())
    build = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == {f"bestiary/{name}" for name in listed if (repository / name).is_file()}


def test_constraints_pin_every_dependency_within_its_bounds(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lines = (repository / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split(" ;")[0].strip().split("==") for line in lines if "==" in line)
    from packaging.requirements import Requirement

    for text in project["dependencies"]:
        requirement = Requirement(text)
        assert len(list(requirement.specifier)) == 2, f"{text}: no lower and upper bound"
        assert pinned[requirement.name] in requirement.specifier, text


HEAVY = {
    "jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "scipy", "sklearn", "matplotlib", "pandas",
    "sacrebleu", "seqeval", "sentencepiece",
}  # fmt: skip


@pytest.mark.parametrize("words", [(), *COMMANDS], ids=" ".join)
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\nfrom bestiary.train.cli import main\n"
        f"try: main([*{words!r}, '--help'])\nexcept SystemExit: pass\n"
        f"print('heavy:', *sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    assert f"bestiary {' '.join(words)}" in capsys.readouterr().out


def test_an_unknown_command_is_named():
    code = "from bestiary.train.cli import main; raise SystemExit(main(['pretrian', '--out', 'x']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no command 'pretrian'. Did you mean 'pretrain'?" in done.stderr


def test_a_command_without_arguments_starts(capsys: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    assert "bert-base" in capsys.readouterr().out


def test_half_a_command_is_told_the_rest(capsys: pytest.CaptureFixture[str]):
    assert main(["translate", "--help"]) == 2
    assert "translate train, translate run, translate score" in capsys.readouterr().err

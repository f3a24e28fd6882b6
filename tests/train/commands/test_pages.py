"""The pages of the zoo are what the code says, and the papers' commands are commands of this version."""

import shlex
from pathlib import Path

import pytest

from bestiary.data.json_files import read_object
from bestiary.models.registry import FAMILIES, family_named, presets
from bestiary.train.cli import COMMANDS, config_of
from bestiary.train.commands.diagram import draw, module_tree
from bestiary.train.commands.pages import COMMAND, contents, page, picture, small_command
from bestiary.train.commands.recipes import RECIPES
from bestiary.train.optim.optimizer import decay_strength


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_page_is_what_the_code_says(name: str, repository: Path) -> None:
    family, folder = family_named(name), repository / "docs" / "zoo"
    measured = read_object(repository / "bench" / "parity.json")
    assert (folder / f"{name}.md").read_text() == page(family, measured), f"Write the pages anew: {COMMAND}"
    assert (folder / f"{name}.svg").read_text() == picture(family), f"Write the pages anew: {COMMAND}"


def test_the_contents_are_what_the_code_says(repository: Path) -> None:
    assert (repository / "docs" / "zoo" / "README.md").read_text() == contents(), f"Write the pages anew: {COMMAND}"


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's checkpoint folder that DistilBERT's command names."""
    (tmp_path / "bert-base").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bert-base" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)


COMMANDS_OF_PAGES = [
    (name, command) for name, one in RECIPES.items() for command in (one.command, one.small) if command
]


@pytest.mark.usefixtures("teacher")
@pytest.mark.parametrize(("name", "command"), COMMANDS_OF_PAGES)
def test_a_command_of_a_page_is_understood(name: str, command: str) -> None:
    program, *given = shlex.split(command)
    words = max((words for words in COMMANDS if tuple(given[: len(words)]) == words), key=len)
    config = config_of(words, given[len(words) :])
    assert program == "bestiary"
    config = getattr(config, "run", config)
    if name != "unit":  # its sizes are in the task file
        family = presets()[str(getattr(config, "preset", None) or config.model)].name
        assert family == ("transformer" if name == "marian" else name)  # a translator is saved as Marian
    optim = config.optim
    assert decay_strength(optim) * optim.learning_rate < 0.01  # of each weight in a step: more leaves nothing to learn


def test_the_small_command_has_the_smallest_size() -> None:
    assert small_command(family_named("bert")) == "bestiary pretrain --model bert-tiny --steps 300 --out runs/bert-tiny"
    assert small_command(family_named("marian")) is None


def test_a_diagram_has_the_modules_in_the_order_of_their_calls() -> None:
    bert = family_named("bert")
    tree = module_tree(bert, "pretraining", bert.config.preset("bert-tiny"))
    assert list(tree.parts) == ["encoder", "mlm", "nsp"]
    assert list(tree.parts["encoder"].parts) == ["embeddings", "layers", "pooler"]
    layers = tree.parts["encoder"].parts["layers"]
    assert layers.repeated == 2
    assert list(layers.parts) == ["attention", "attention_norm", "feed_forward", "feed_forward_norm"]
    assert (128, 2, 64) in layers.parts["attention"].parts["query"].shapes
    assert "layers × 2" in draw(tree)

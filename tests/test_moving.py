"""The page for those who come from Flax: every class it names is here, and its lines run on a saved folder."""

import re
from pathlib import Path

import pytest

from bestiary.models.registry import family_named

# Family -> a saved folder of it among the fixtures.
SAVED = {
    "albert": "albert_mlm",
    "bart": "bart_generation",
    "bert": "bert_pretraining",
    "distilbert": "distilbert_mlm",
    "electra": "electra_discriminator",
    "gpt2": "gpt2_lm",
    "gpt_neo": "gptneo_lm",
    "marian": "marian_translation",
    "mt5": "mt5",
    "roberta": "roberta_mlm",
    "t5": "t5_v1_0",
    "vit": "vit_classification",
    "xlm-roberta": "xlm_roberta_mlm",
}


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "moving.md").read_text(encoding="utf-8")


def rows(page: str) -> list[tuple[str, str, str]]:
    """The table's rows: class, family, head; a row without a family belongs to the one above."""
    found, family = [], ""
    for name, link, head in re.findall(r"^\| `Flax(\w+)` \|([^|]*)\| `(\w+)` \|$", page, re.MULTILINE):
        family = re.sub(r".*\(zoo/(.+)\.md\).*", r"\1", link.strip()) or family
        found.append((name, family, head))
    return found


def test_every_class_is_an_architecture_of_its_family(page: str) -> None:
    named = rows(page)
    missing = [
        name
        for name, family, head in named
        if (name, head) not in {(one.name, one.head) for one in family_named(family).architectures}
    ]
    assert missing == []
    assert {family for _, family, _ in named} == set(SAVED)


@pytest.mark.parametrize("family", SAVED)
def test_the_lines_load_a_saved_folder(family: str, page: str, repository: Path) -> None:
    (lines,) = [text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "encoder_inputs" not in text]
    names: dict = {}
    exec(lines.replace("FOLDER", str(repository / "tests" / "models" / "fixtures" / SAVED[family])), names)
    assert family == names["config"].MODEL_TYPE
    assert names["params"]

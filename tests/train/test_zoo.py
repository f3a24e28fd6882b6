"""`bestiary models` and `bestiary models show`: what they list is what there is."""

import json
import math

import pytest

from bestiary.models import registry
from bestiary.train.cli import main


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["models", *words]) == 0
    return capsys.readouterr().out


def test_every_family_and_size_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    found = {family["family"]: family for family in json.loads(printed(capsys, "--json"))}
    assert set(found) == set(registry.FAMILIES)
    for family in registry.families():
        assert set(found[family.name]["sizes"]) == set(family.config.PRESETS)
        assert found[family.name]["heads"] == list(family.heads)
    # The papers' 110 M, 340 M, 125 M, 66 M.
    assert found["bert"]["sizes"]["bert-base"] == 109_482_240
    assert found["bert"]["sizes"]["bert-large"] == 335_141_888
    assert found["roberta"]["sizes"]["roberta-base"] == 124_645_632
    assert found["distilbert"]["sizes"]["distilbert-base"] == 66_362_880
    text = printed(capsys)
    for name in registry.presets():
        assert f"  {name} " in text


def test_a_size_is_shown_with_its_axes_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(printed(capsys, "show", "roberta-tiny", "--head", "masked_lm", "--json"))
    tree = {parameter["name"]: parameter for parameter in shown["tree"]}
    query = tree["encoder/layers/attention/query/kernel"]
    assert query == {
        "name": "encoder/layers/attention/query/kernel",
        "shape": [2, 128, 2, 64],
        "axes": ["layers", "embed", "heads", "head_dim"],
        "bytes": 4 * 2 * 128 * 128,
    }
    assert "encoder/pooler/kernel" not in tree
    assert shown["parameters"] == sum(math.prod(parameter["shape"]) for parameter in shown["tree"])
    text = printed(capsys, "show", "roberta-tiny")
    assert "embeddings/position/embedding" in text
    assert "positions 514 x embed 128" in text


def test_what_there_is_not_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", "bert-bse"]) == 1
    assert "'bert-bse' is not a size of this version. Did you mean 'bert-base'?" in capsys.readouterr().err
    assert main(["models", "show", "whale"]) == 1
    assert "'whale' is not a size of this version. Expected one of bert-tiny," in capsys.readouterr().err
    assert main(["models", "show", "distilbert-base", "--head", "pretraining"]) == 1
    assert "DistilBERT has no head 'pretraining'; known: encoder, masked_lm," in capsys.readouterr().err

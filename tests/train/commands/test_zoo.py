"""`bestiary models` and `bestiary models show`: what they list is what there is."""

import json
import math

import pytest

from bestiary.models import registry
from bestiary.train.cli import main

# Of the encoders with their poolers, if they have one: what the reference's classes have in these sizes.
COUNTS = {
    # Devlin et al. 2018: 110 M, 340 M; Liu et al. 2019: 125 M; Sanh et al. 2019: 66 M.
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "roberta-base": 124_645_632,
    "distilbert-base": 66_362_880,
    # Lan et al. 2019, table 2: 12 M, 18 M, 60 M, 235 M.
    "albert-base": 11_683_584,
    "albert-large": 17_683_968,
    "albert-xlarge": 58_724_864,
    "albert-xxlarge": 222_595_584,
    # Clark et al. 2020, tables 1 and 2: 14 M, 110 M, 335 M.
    "electra-small": 13_483_008,
    "electra-base": 108_891_648,
    "electra-large": 334_092_288,
    "electra-small-generator": 13_483_008,
    "electra-base-generator": 33_511_168,
    "electra-large-generator": 50_999_552,
    # Warner et al. 2024: 149 M, 395 M; Weller et al. 2025: 17 M, 32 M, 68 M, 150 M, 400 M, 1 B.
    "modernbert-base": 149_014_272,
    "modernbert-large": 394_781_696,
    "ettin-encoder-17m": 16_797_440,
    "ettin-encoder-32m": 31_883_136,
    "ettin-encoder-68m": 68_144_640,
    "ettin-encoder-150m": 149_014_272,
    "ettin-encoder-400m": 394_781_696,
    "ettin-encoder-1b": 1_028_050_688,
    # Dosovitskiy et al. 2021, table 1: 86 M; Steiner et al. 2021: 5.8 M with the classes; Beyer et al. 2022: 22 M.
    # Joshi et al. 2020 have BERT's sizes, cased; Conneau et al. 2020: 270 M, 550 M.
    "plain-vit-small": 21_589_632,
    "spanbert-base": 108_310_272,
    "spanbert-large": 333_579_264,
    "vit-base": 86_389_248,
    "vit-tiny": 5_561_472,
    "xlm-roberta-base": 278_043_648,
    "xlm-roberta-large": 559_890_432,
}


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["models", *words]) == 0
    return capsys.readouterr().out


def test_every_family_and_size_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    found = {family["family"]: family for family in json.loads(printed(capsys, "--json"))}
    assert set(found) == set(registry.FAMILIES)
    for family in registry.families():
        assert set(found[family.name]["sizes"]) == set(family.config.PRESETS)
        assert found[family.name]["heads"] == list(family.heads)
    sizes = {name: count for family in found.values() for name, count in family["sizes"].items()}
    assert {name: sizes[name] for name in COUNTS} == COUNTS
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
    assert "'whale' is not a size of this version. Expected one of albert-tiny," in capsys.readouterr().err
    assert main(["models", "show", "distilbert-base", "--head", "pretraining"]) == 1
    assert "DistilBERT has no head 'pretraining'; known: encoder, masked_lm," in capsys.readouterr().err

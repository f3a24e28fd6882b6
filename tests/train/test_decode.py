"""Decoding: the reference's sequences and scores, and what batches, buckets and stopping must not change."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bestiary import models
from bestiary.train.decode import DecodeConfig, Generator, Hypothesis
from safetensors.numpy import load_file

FIXTURE = Path(__file__).parent.parent / "models" / "fixtures" / "marian_translation"
CASES = json.loads((FIXTURE / "generations.json").read_text())
STOPPING = {False: "no", True: "yes", "never": "never"}


@cache
def loaded() -> models.Loaded:
    return models.load(FIXTURE)


def sources() -> list[list[int]]:
    inputs = load_file(FIXTURE / "expected.safetensors")
    ids, mask = inputs["input.input_ids"], inputs["input.attention_mask"]
    return [row[kept == 1].tolist() for row, kept in zip(ids, mask, strict=True)]


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """Ours for the reference's; its min_length counts the start token."""
    return {
        "beam": case["num_beams"],
        "max_length": case["max_new_tokens"],
        "length_penalty": case.get("length_penalty", 1.0),
        "early_stopping": STOPPING[case.get("early_stopping", False)],
        "n_best": case.get("num_return_sequences", 1),
        "repetition_penalty": case.get("repetition_penalty", 1.0),
        "no_repeat_ngram": case.get("no_repeat_ngram_size", 0),
        "min_length": case.get("min_new_tokens", max(0, case.get("min_length", 0) - 1)),
        "suppressed": tuple(sum(case.get("bad_words_ids", []), [])) + tuple(case.get("suppress_tokens", [])),
    }


def generator(rows: int = 64, **named: Any) -> Generator:
    return Generator(loaded().model, loaded().params, DecodeConfig(**named), rows=rows)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case["settings"].values())))
def test_sequences_and_scores_are_the_references(case: dict[str, Any]) -> None:
    given = case["settings"].get("prefix", [])
    found = generator(rows=4, **settings(case["settings"]))(sources(), [given] * 3)
    for row, expected in zip(found, case["sequences"], strict=True):
        for hypothesis, sequence in zip(row, expected, strict=True):
            body = sequence[1:]
            assert hypothesis.tokens == (body[: body.index(2)] if 2 in body else body)
    if case["scores"] is not None:
        np.testing.assert_allclose([[h.score for h in row] for row in found], case["scores"], atol=1e-5)

"""Fine-tuning BART: a classifier at the last end token, and spans of answers, by the encoders' commands."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

from bestiary import models
from bestiary.data import Corpus, train_tokenizer
from bestiary.models.encoder_decoders.bart import FAMILY
from bestiary.models.registry import init_params
from bestiary.train.cli import main

WORDS = [
    "red",
    "green",
    "blue",
    "black",
    "white",
    "small",
    "large",
    "old",
    "new",
    "house",
    "tree",
    "river",
    "road",
    "bird",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny BART as it generates, drawn at random."""
    root = tmp_path_factory.mktemp("bart")
    (root / "corpus.txt").write_text(
        "\n\n".join(" ".join(np.random.default_rng(i).permutation(WORDS)) for i in range(40))
    )
    tokenizer = train_tokenizer("byte-bpe", Corpus([str(root / "corpus.txt")]), vocab_size=300)
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder")
             for name, size in (("layers", 2), ("heads", 2), ("feed_forward", 24))}  # fmt: skip
    words = FAMILY.config.vocabulary_fields(tokenizer.vocab_size, tokenizer.special_ids)
    model = FAMILY.build("generation", FAMILY.config(**sizes, **words, width=16, positions=64, initializer_range=0.2))
    models.save(root / "model", model, nn.unbox(jax.jit(partial(init_params, model))(jax.random.key(0))), tokenizer)
    return root / "model"


def test_a_classifier_learns_and_predicts(folder: Path, tmp_path: Path, capsys) -> None:
    random = np.random.default_rng(0)
    for name, count in (("train", 64), ("dev", 16)):
        texts = [" ".join(random.choice(WORDS, random.integers(2, 8))) for _ in range(count)]
        rows = [f"{text}\t{'yes' if 'red' in text or 'house' in text else 'no'}" for text in texts]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    out = tmp_path / "run"
    flags = [
        "--train",
        str(tmp_path / "train.tsv"),
        "--dev",
        str(tmp_path / "dev.tsv"),
        "--text",
        "text",
        "--label",
        "label",
    ]
    more = ["--epochs", "2", "--batch-size", "16", "--max-length", "32", "--freeze-layers", "1", "--dropout", "0.1"]
    assert main(["finetune", "classification", *flags, "--model", str(folder), "--out", str(out), *more]) == 0
    assert "accuracy" in json.loads((out / "results.json").read_text())["metrics"]["dev"]
    saved, first = models.load(out / "model"), models.load(folder)
    assert saved.config.label_names == ("no", "yes")
    before, after = (loaded.params["encoder"] for loaded in (first, saved))
    own = after["encoder"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(own[0], before["attention"]["query"]["kernel"][0])  # frozen
    assert (own[1] != before["attention"]["query"]["kernel"][1]).any()
    capsys.readouterr()
    assert main(["predict", str(out), "--text", "red house", "small tree"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_answers_are_found(folder: Path, tmp_path: Path) -> None:
    def paragraph(number: int) -> dict:
        words = np.random.default_rng(number).permutation(WORDS).tolist()
        context, answer = " ".join(words), words[3]
        answers = [{"text": answer, "answer_start": context.index(answer)}]
        return {"context": context, "qas": [{"id": str(number), "question": f"{words[2]} ?", "answers": answers}]}

    for name, numbers in (("train", range(24)), ("dev", range(24, 32))):
        data = {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph(i) for i in numbers]}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    flags = ["--data", str(tmp_path / "train.json"), "--eval-data", str(tmp_path / "dev.json"), "--model", str(folder)]
    more = ["--epochs", "1", "--batch-size", "8", "--max-length", "48", "--doc-stride", "16", "--max-question", "8"]
    assert main(["finetune", "squad", *flags, "--out", str(tmp_path / "run"), *more]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= results["metrics"]["dev"]["f1"] <= 100
    assert models.load(tmp_path / "run" / "model").params["span"]["kernel"].shape == (16, 2)

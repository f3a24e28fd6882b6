"""Text to text: training T5 and BART on pairs, GLUE as text, outputs, figures, and what is refused."""

import io
import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

from bestiary import models
from bestiary.data import Corpus, load_tokenizer, train_tokenizer
from bestiary.data.tasks.glue import GLUE
from bestiary.data.tasks.glue_text import answer_of, answer_text, as_pairs
from bestiary.data.tasks.tables import TextExample
from bestiary.data.tokenizers.pairs import load_subwords
from bestiary.models.encoder_decoders.bart import FAMILY as BART
from bestiary.models.encoder_decoders.t5 import FAMILY as T5
from bestiary.models.registry import init_params
from bestiary.train.cli import main
from bestiary.train.generate.config import DecodeConfig
from bestiary.train.language_model.model import open_language_model
from bestiary.train.loop import RESTART, Stop
from bestiary.train.text2text.metrics import GlueScoring, text_scores
from bestiary.train.translate.translator import Translation, open_translator

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


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(2, 7))) for _ in range(count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny models, drawn at random, and pairs: a text, and its first two words."""
    root = tmp_path_factory.mktemp("text2text")
    (root / "corpus.txt").write_text("\n\n".join(f"{text}. summarize: {text}" for text in texts(200, 1)))
    documents = Corpus([str(root / "corpus.txt")])
    made = {"root": root}
    sides = {"encoder_layers": 1, "decoder_layers": 1, "width": 16, "dropout": 0.0}
    for family, kind, like in ((T5, "unigram", "t5"), (BART, "byte-bpe", "roberta")):
        tokenizer = train_tokenizer(kind, documents, vocab_size=290 if kind == "byte-bpe" else 90, family=like)
        config = family.config
        sizes = {"heads": 2, "head_size": 8, "feed_forward": 24}
        if family is BART:
            each = (("heads", 2), ("feed_forward", 24))
            sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in each}
            sizes["positions"] = 64
        words = config.vocabulary_fields(tokenizer.vocab_size, tokenizer.special_ids)
        model = family.build("generation", config(**sides, **sizes, **words))
        made[family.name] = root / family.name
        params = nn.unbox(jax.jit(partial(init_params, model))(jax.random.key(0)))
        models.save(made[family.name], model, params, tokenizer)
    made["pairs"] = root / "pairs.tsv"
    made["pairs"].write_text("".join(f"{text}\t{' '.join(text.split()[:2])}\n" for text in texts(80)))
    return made


def train(folders, out: Path, *more: str, model: str = "t5") -> int:
    flags = {
        "model": folders[model], "out": out, "cache": folders["root"] / "cache", "steps": 6, "source_tokens": 32,
        "target_tokens": 16, "batch_rows": 8, "dev_pairs": 12, "final_beam": 2, "evaluate_every": 3,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    pairs = [] if "--train" in more else ["--train", str(folders["pairs"])]
    return main(["text2text", "train", *words, *pairs, *more])


@pytest.fixture(scope="module")
def trained(folders) -> Path:
    assert train(folders, folders["root"] / "run", "--prefix", "summarize: ", "--metric", "rouge") == 0
    return folders["root"] / "run"


def test_a_run_folder_and_its_outputs(trained: Path, folders, monkeypatch, capsys, tmp_path) -> None:
    results = json.loads((trained / "results.json").read_text())
    assert results["task"] == "text2text"
    assert {"rouge1", "rouge2", "rougeL", "rouge", "exact_match"} <= set(results["held_out"])
    model = models.load(trained / "model")
    assert model.config.MODEL_TYPE == "t5"
    assert model.tokenizer.form.prefix == "summarize: "
    assert model.tokenizer.longest == 32
    (ids,) = model.tokenizer.encode_source(["old tree"])
    assert ids == load_subwords(folders["t5"]).encode_source(["summarize: old tree"])[0]

    asked = open_language_model(trained, encoder_decoder=True)  # as `bestiary ask` opens it
    assert asked.tokenizer.fingerprint == load_tokenizer(folders["t5"]).fingerprint
    assert asked.encode(["old tree"]) == [[*ids, model.config.eos_token_id]]

    lines = ["red house", "", " ".join(WORDS * 4)]
    monkeypatch.setattr(sys, "stdin", type("Stream", (), {"buffer": io.BytesIO("\n".join(lines).encode() + b"\n")}))
    assert main(["text2text", "run", "--model", str(trained), "--beam", "2", "--max-length", "8"]) == 0
    written = capsys.readouterr()
    assert len(written.out.splitlines()) == 3
    assert written.out.splitlines()[1] == ""
    assert "1 line with more than 32 tokens (see --longest), cut: 3" in written.err
    assert main(["text2text", "run", "--model", str(trained), "--too-long", "refuse", "--longest", "4"]) == 0

    source, reference = tmp_path / "source.txt", tmp_path / "reference.txt"
    source.write_text("red house\nold tree\n")
    reference.write_text("red house\nold tree\n")
    flags = ["--source", str(source), "--reference", str(reference), "--out", str(tmp_path / "scores.json")]
    assert main(["text2text", "score", "--model", str(trained), *flags, "--metric", "exact", "--beam", "1"]) == 0
    assert 0 <= json.loads((tmp_path / "scores.json").read_text())["exact_match"] <= 100
    hypothesis = ["--hypothesis", str(reference), "--reference", str(reference)]
    assert main(["text2text", "score", *hypothesis, "--metric", "rouge"]) == 0
    assert '"rouge": 100.0' in capsys.readouterr().out


class StopAfter(Stop):
    """As if a signal came during a step."""

    def agreed(self, step: int) -> bool:
        if step == 4:
            self.signal = 15
        return step == 4


def test_a_resumed_run_equals_the_uninterrupted_one(trained: Path, folders, monkeypatch) -> None:
    """The second half begins from the checkpoint of the first, as after a kill."""
    out = folders["root"] / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr("bestiary.train.run.Stop", StopAfter)
        assert train(folders, out, "--prefix", "summarize: ", "--metric", "rouge") == RESTART
    assert not (out / "model").exists()
    assert train(folders, out, "--prefix", "summarize: ", "--metric", "rouge") == 0
    weights = "model/model.safetensors"
    assert (out / weights).read_bytes() == (trained / weights).read_bytes()
    first, again = (json.loads((folder / "results.json").read_text())["held_out"] for folder in (trained, out))
    assert first == again


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_translation_starts_from_a_pretrained_model(folders, tmp_path, family) -> None:
    lines = [line.split("\t") for line in folders["pairs"].read_text().splitlines()]
    for number, side in enumerate(("en", "de")):
        (tmp_path / side).write_text("".join(f"{line[number]}\n" for line in lines))
    flags = ["--init-from", folders[family], "--cache", folders["root"] / "cache", "--out", tmp_path / "run"]
    flags += ["--source", tmp_path / "en", "--target", tmp_path / "de", "--dev-pairs", 8, "--final-beam", 1]
    flags += ["--row-tokens", 32, "--batch-tokens", 256, "--steps", 1, "--warmup", 0, "--average", 0, "--patience", 0]
    assert main(["translate", "train", *map(str, flags)]) == 0
    before, after = models.load(folders[family]), models.load(tmp_path / "run" / "model")
    assert after.config.MODEL_TYPE == before.config.MODEL_TYPE
    assert jax.tree.map(np.shape, after.params) == jax.tree.map(np.shape, before.params)
    assert "bleu" in json.loads((tmp_path / "run" / "results.json").read_text())["held_out"]


def test_bart_reads_and_writes_texts_with_both_ends(folders, tmp_path) -> None:
    assert train(folders, tmp_path / "run", "--metric", "exact", model="bart") == 0
    model = models.load(tmp_path / "run" / "model")
    c = model.config
    (ids,) = model.tokenizer.encode_target(["red house"])
    assert ids[0] == c.bos_token_id
    assert c.eos_token_id not in ids
    assert model.tokenizer.decode([*ids, c.eos_token_id]) == "red house"
    assert not np.any(model.params["final_logits_bias"])
    translator = open_translator(tmp_path / "run", DecodeConfig(beam=2, max_length=6))
    assert all(len(part.target) <= 6 for part in translator.translate(["red house"])[0][0].parts)


def test_texts_that_are_too_long_are_counted(folders, tmp_path, capsys) -> None:
    pairs = tmp_path / "long.tsv"
    pairs.write_text("".join(f"{text}\t{text}\n" for text in texts(40)) + f"{' '.join(WORDS * 3)}\tred\n")
    assert train(folders, tmp_path / "cut", "--train", str(pairs), "--too-long", "cut", "--steps", "1") == 0
    assert "1 cut" in capsys.readouterr().err
    assert train(folders, tmp_path / "refused", "--train", str(pairs), "--too-long", "refuse") == 1
    assert "1 pairs are longer than rows of 32 and 16 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "first", "second", "label", "source", "target"),
    [
        ("cola", "A b.", None, 1, "cola sentence: A b.", "acceptable"),
        ("sst2", "Good", None, 1, "sst2 sentence: Good", "positive"),
        ("mrpc", "A", "B", 0, "mrpc sentence1: A sentence2: B", "not_equivalent"),
        ("qqp", "A?", "B?", 1, "qqp question1: A? question2: B?", "duplicate"),
        ("mnli", "Premise.", "Guess.", 2, "mnli hypothesis: Guess. premise: Premise.", "contradiction"),
        ("qnli", "Who?", "He.", 0, "qnli question: Who? sentence: He.", "entailment"),
        ("rte", "A", "B", 1, "rte sentence1: A sentence2: B", "not_entailment"),
        ("stsb", "A", "B", 3.25, "stsb sentence1: A sentence2: B", "3.2"),
        ("stsb", "A", "B", 4.5, "stsb sentence1: A sentence2: B", "4.4"),
    ],
)
def test_glue_as_text(task, first, second, label, source, target) -> None:
    (pair,) = as_pairs(task, [TextExample(first, second, label, "0", "here")])
    assert (pair.source, pair.target) == (source, target)
    found = answer_of(GLUE[task], target)
    assert found == (label if isinstance(label, int) else float(target))


def test_an_answer_outside_the_set_is_wrong() -> None:
    assert answer_of(GLUE["mrpc"], "maybe") is None
    assert answer_of(GLUE["stsb"], "5.4") is None
    assert answer_text(GLUE["stsb"], 5.0) == "5.0"
    outputs = [Translation(text, text, 0.0) for text in ("equivalent", "nonsense", "not_equivalent", "equivalent")]
    scores = GlueScoring("mrpc")(outputs, ["equivalent", "equivalent", "not_equivalent", "not_equivalent"])
    assert scores.values["accuracy"] == 0.5
    assert scores.values["outside"] == 0.25
    assert scores.values["f1"] == pytest.approx(0.5)


def test_glue_trains_as_text(folders, tmp_path, capsys) -> None:
    data = tmp_path / "MRPC"
    data.mkdir()
    for split, count in (("train", 40), ("dev", 12)):
        rows = [
            f"{i % 2}\t{i}\t{i}\t{a}\t{b}" for i, (a, b) in enumerate(zip(texts(count), texts(count, 3), strict=True))
        ]
        (data / f"{split}.tsv").write_text("\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows]) + "\n")
    out = tmp_path / "run"
    flags = {
        "model": folders["t5"], "data": tmp_path, "out": out, "cache": folders["root"] / "cache", "steps": 3,
        "source_tokens": 64, "target_tokens": 16, "batch_rows": 8, "final_beam": 1, "seeds": 2,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["finetune", "glue", *words, "--as-text", "--tasks", "mrpc"]) == 0
    held = json.loads((out / "mrpc" / "seed-2" / "results.json").read_text())["held_out"]
    assert set(held) == {"accuracy", "f1", "score", "outside"}
    whole = json.loads((out / "results.json").read_text())
    assert whole["score"] == held["score"]
    assert f"| mrpc | f1 | {held['f1']:.4f} |" in (out / "table.md").read_text()
    capsys.readouterr()
    assert main(["finetune", "glue", *words, "--as-text", "--tasks", "cola"]) == 1
    assert "CoLA" in capsys.readouterr().err
    assert main(["finetune", "glue", "--as-text", *words, "--seeds", "1", "1"]) == 1
    assert "--seeds 1 1: each may be given once" in capsys.readouterr().err


def test_figures() -> None:
    outputs, references = ["the cat sat", "a dog"], ["the cat sat down", "a dog"]
    found = text_scores("rouge", outputs, references).values
    assert found["rouge1"] == pytest.approx(100 * (6 / 7 + 1) / 2)
    assert found["rouge2"] == pytest.approx(100 * (4 / 5 + 1) / 2)
    assert found["exact_match"] == 50
    assert text_scores("exact", outputs, references).values == {"exact_match": 50}
    assert text_scores("sacrebleu", references, references).values["bleu"] == pytest.approx(100)


def test_what_does_not_fit_is_refused(folders, tmp_path, capsys) -> None:
    def said(*more: str, model: str = "t5") -> str:
        assert train(folders, tmp_path / "no", *more, model=model) == 1
        return capsys.readouterr().err

    assert "--train names 3 files; expected one with both sides, or two" in said("--train", "a", "b", "c")
    assert "a new model of that size needs --tokenizer" in said("--model", "t5-small")
    assert "no size of a text-to-text model; expected one of" in said(
        "--model", "bert-tiny", "--tokenizer", str(folders["t5"])
    )
    assert "other ids than those of" in said("--tokenizer", str(folders["t5"]), model="bart")
    assert "beyond the model's" in said(
        *("--model", "bart-base", "--tokenizer", str(folders["bart"]), "--source-tokens", "2048")
    )
    assert "beyond the model's 64 positions" in said("--source-tokens", "128", model="bart")
    assert "--target-tokens is 4" in said("--target-tokens", "4")

"""The tokenizer of a pretraining run: what is said of another kind than the family's, and what is refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary.data import Corpus, Tokenizer, train_tokenizer
from bestiary.data.tokenizers.kinds import TITLES
from bestiary.models.registry import families, presets
from bestiary.train.cli import main
from bestiary.train.pretrain.config import PretrainConfig
from bestiary.train.pretrain.model import describe_tokenizer, model_config
from bestiary.train.pretrain.samples import fill_in

TEXT = "The lobster sees the lobsters, and the lobsters see the sea.\n\nIt's a lobster's life under the sea!\n" * 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def trained(corpus: Path) -> dict[str, Tokenizer]:
    """A tokenizer of each kind, on the same text."""
    sizes = {"wordpiece": 120, "byte-bpe": 300, "unigram": 60}
    return {kind: train_tokenizer(kind, Corpus([corpus]), vocab_size=size) for kind, size in sizes.items()}  # pyright: ignore[reportArgumentType]


def said(tokenizer: Tokenizer, size: str) -> str:
    config = PretrainConfig(model=size)
    return describe_tokenizer(tokenizer, presets()[size], model_config(config, tokenizer, "masked_lm"))


def test_every_family_names_its_kinds():
    assert all(set(family.tokenizers) <= set(TITLES) for family in families())
    assert all(bool(family.tokenizers) == (family.reads == "text") for family in families())


def test_a_tokenizer_of_another_kind_is_said_with_the_inputs_that_it_makes(trained: dict[str, Tokenizer]):
    sizes = {kind: f"{tokenizer.vocab_size} tokens" for kind, tokenizer in trained.items()}
    assert said(trained["wordpiece"], "bert-tiny") == f"tokenizer: WordPiece, {sizes['wordpiece']}"
    assert said(trained["byte-bpe"], "roberta-tiny") == f"tokenizer: byte-level BPE, {sizes['byte-bpe']}"
    assert said(trained["wordpiece"], "roberta-tiny") == (
        f"tokenizer: WordPiece, {sizes['wordpiece']} (RoBERTa's own is byte-level BPE): inputs are "
        "[CLS] A [SEP] B [SEP]"
    )
    assert said(trained["byte-bpe"], "bert-tiny") == (
        f"tokenizer: byte-level BPE, {sizes['byte-bpe']} (BERT's own is WordPiece): inputs are "
        "<s> A </s></s> B </s>, B of token type 0"
    )
    assert said(trained["unigram"], "bert-tiny").endswith("[CLS] A [SEP] B [SEP], B of token type 1")


@pytest.mark.parametrize("kind", ["wordpiece", "byte-bpe"])
@pytest.mark.parametrize("size", ["bert-tiny", "roberta-tiny"])
def test_a_models_padding_is_the_tokenizers(trained: dict[str, Tokenizer], kind: str, size: str):
    model = model_config(PretrainConfig(model=size), trained[kind], "masked_lm")
    assert model.pad_token_id == trained[kind].special_ids["pad"]
    assert model.vocab_size == trained[kind].vocab_size
    assert model.max_length is not None
    assert model.max_length >= 512


def test_a_tokenizer_without_the_special_tokens_is_refused_before_the_corpus_is_read(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer = train_tokenizer("byte-bpe", Corpus([corpus]), vocab_size=300, family="gpt2")
    tokenizer.save(tmp_path / "gpt2")
    command = ["pretrain", "--corpus", str(corpus), "--tokenizer", str(tmp_path / "gpt2"), "--model", "roberta-tiny"]
    assert main([*command, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "gpt2: a tokenizer without a mask token, a pad token, a token before a text, a token after a text" in error
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()


def filled(tokenizer: Tokenizer, rows: dict[str, np.ndarray]) -> list[str]:
    """The samples of a model that predicts each token to be itself, by its token type: type 1 makes it wrong."""

    def apply(params: object, batch: dict[str, jax.Array]) -> jax.Array:
        del params
        right = jnp.where(
            batch["token_type_ids"] == 1, 5, jnp.asarray(rows["input_ids"][:, : batch["input_ids"].shape[1]])
        )
        return 100.0 * jax.nn.one_hot(right, tokenizer.vocab_size)

    return fill_in(apply, {}, tokenizer, rows)


def test_samples_begin_within_a_word_and_keep_two_texts_apart(tmp_path: Path):
    from bestiary.data import load_tokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "wrong", "lob", "##ster", "a", "sea", "is", "deep", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    first = ["##ster", "is", "deep", ".", "a", "lob", "##ster", "is", "[UNK]", "."]
    second = ["a", "sea", "is", "deep", "."]
    pieces = ["[CLS]", *first, "[SEP]", *second, "[SEP]"]
    ids = np.array([[vocabulary.index(piece) for piece in pieces] + [0, 0]], np.int32)
    types = np.array([[0] * (len(first) + 2) + [1] * (len(second) + 1) + [0, 0]], np.int32)
    rows = {"input_ids": ids, "segment_ids": np.int32([[1] * len(pieces) + [0, 0]]), "token_type_ids": types}
    assert filled(tokenizer, rows) == [
        "…ster is deep . [a 100%, ok] lobster is [UNK] . | a sea [wrong 100%, for is] deep ."
    ]


def test_samples_of_bytes_show_whole_characters(trained: dict[str, Tokenizer]):
    tokenizer = trained["byte-bpe"]
    ids, _ = tokenizer.join(*tokenizer.encode_batch(["naïve lobsters see the sea, 象, and see the lobster."]))
    rows = {"input_ids": np.int32([ids]), "segment_ids": np.ones((1, len(ids)), np.int32)}
    (line,) = filled(tokenizer, {**rows, "token_type_ids": np.zeros((1, len(ids)), np.int32)})
    assert "naïve" in line
    assert "象" in line
    assert "|" not in line

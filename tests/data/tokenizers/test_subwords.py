"""Subword tokenizers: what they give, that it is the same each time, and what sampling draws."""

import io
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece

from bestiary.data.errors import DataError
from bestiary.data.tokenizers.pairs import PairTokenizer, TextForm, load_subwords, sample
from bestiary.data.tokenizers.pairs_training import train_subwords
from bestiary.data.tokenizers.segmentation import merge

KINDS = ("unigram", "bpe", "word-bpe")
SOURCE = [
    f"the {a} {b} walks near the {c}" for a in ("red", "old", "new") for b in ("dog", "cat") for c in ("sea", "bay")
]
TARGET = [
    f"der {a}e {b} läuft am {c}" for a in ("rot", "alt", "neu") for b in ("hund", "kater") for c in ("meer", "ufer")
]


def train(kind: str, joint: bool = True, **form: bool) -> PairTokenizer:
    text = TextForm(**form)
    return train_subwords(
        kind,  # pyright: ignore[reportArgumentType]
        lambda: (text.prepare(line, target=False) for line in SOURCE),
        lambda: (text.prepare(line, target=True) for line in TARGET),
        vocab_size=70,
        joint=joint,
        form=text,
    )


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PairTokenizer:
    return train(request.param)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_text_survives_and_so_does_the_folder(tmp_path: Path, kind: str, joint: bool):
    tokenizer = train(kind, joint, lowercase=True)
    assert tokenizer.joint == joint
    ids = tokenizer.encode_target(TARGET)
    assert [tokenizer.decode(line) for line in ids] == TARGET
    assert (
        tokenizer.decode([tokenizer.target.bos_id, *ids[0], tokenizer.target.eos_id, tokenizer.target.pad_id])
        == TARGET[0]
    )
    assert "".join(tokenizer.target.pieces(ids[0])).replace("▁", " ").replace("</w>", " ").strip() == TARGET[0]
    tokenizer.save(tmp_path)
    again = load_subwords(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.form == tokenizer.form
    assert again.encode_source(SOURCE) == tokenizer.encode_source(SOURCE)


def test_training_is_the_same_in_every_process():
    code = (
        "from bestiary.data.tokenizers.pairs_training import *\n"
        "lines = [f'wort{i} zug{i % 7} halt ende{i % 3}' for i in range(200)]\n"
        "print([train_subwords(k, lambda: lines, lambda: lines, vocab_size=90, joint=True, form=TextForm()).fingerprint"
        " for k in ('unigram', 'bpe', 'word-bpe')])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout


@pytest.mark.parametrize("kind", ["bpe", "word-bpe"])
def test_without_dropout_merging_is_the_librarys(kind: str):
    tokenizer = train(kind)
    drawn = sample(tokenizer.target, TARGET, 0.0, seed=0, epoch=0, indexes=range(len(TARGET)), role=1)
    assert drawn == tokenizer.target.encode(TARGET)


def test_sampling_is_a_function_of_seed_epoch_and_index(tokenizer: PairTokenizer):
    def draw(texts: list[str], indexes: range, **key: int) -> list[list[int]]:
        return sample(tokenizer.source, texts, 0.2, indexes=indexes, **({"seed": 1, "epoch": 2, "role": 0} | key))

    lines = SOURCE * 5
    whole = draw(lines, range(len(lines)))
    assert draw(lines[20:40], range(20, 40)) == whole[20:40]
    for other in ({"seed": 2}, {"epoch": 3}, {"role": 1}):
        assert draw(lines, range(len(lines)), **other) != whole
    assert [tokenizer.source.decode(ids) for ids in whole] == lines
    assert len({tuple(ids) for ids in whole}) > len(SOURCE)


def test_unigram_draws_with_the_power_of_the_probability():
    tokenizer = train("unigram")
    processor, word, alpha, count = tokenizer.source.processor, "walks", 0.5, 40_000  # pyright: ignore
    drawn = sample(tokenizer.source, [word] * count, alpha, seed=3, epoch=0, indexes=range(count), role=0)
    found = Counter(map(tuple, drawn))
    every = processor.nbest_encode(word, nbest_size=500)
    weights = [math.exp(alpha * sum(processor.get_score(i) for i in ids)) for ids in every]
    assert set(found) <= {tuple(ids) for ids in every}
    for ids, weight in zip(every, weights, strict=True):
        expected = weight / sum(weights)
        spread = math.sqrt(expected * (1 - expected) / count)
        assert abs(found[tuple(ids)] / count - expected) < 5 * spread + 1e-9


def test_dropped_merges():
    ranks = {("a", "b"): 0, ("ab", "c"): 1, ("b", "c"): 2}
    rank = lambda left, right: ranks.get((left, right))  # noqa: E731
    assert merge(list("abc"), rank, 0.0, iter(())) == ["abc"]
    assert merge(list("abc"), rank, 0.5, iter([0.4, 0.9])) == ["a", "bc"]  # the first merge is dropped
    assert merge(list("abc"), rank, 0.5, iter([0.9, 0.9, 0.1])) == ["ab", "c"]


def test_moses_splits_and_joins():
    form = TextForm(("en", "de"), lowercase=True, moses=True)
    assert form.prepare("Ein Mann, z.B. „Otto“, geht's?", target=True) == 'ein mann , z.b. " otto " , geht \' s ?'
    assert form.finish("ein hund , der rennt .") == "ein hund, der rennt."
    assert TextForm().prepare("As it is.", target=False) == "As it is."


def test_multi30k_reference_has_the_published_number_of_tokens(shared: Path):
    from bestiary.data.reading import read_lines

    form = TextForm(("en", "de"), lowercase=True, moses=True)
    lines = read_lines(shared / "data/multi30k/test_2016_flickr.de.gz", "utf-8")
    assert sum(len(form.prepare(line, target=True).split()) for line in lines) == 12_103


def test_errors(tmp_path: Path):
    with pytest.raises(DataError, match="too small"):
        train_subwords("word-bpe", lambda: SOURCE, lambda: TARGET, vocab_size=10, joint=True, form=TextForm())
    with pytest.raises(DataError, match="digits"):
        train_subwords(
            "word-bpe", lambda: SOURCE, lambda: TARGET, vocab_size=99, joint=True, form=TextForm(), split_digits=True
        )
    with pytest.raises(DataError, match="no tokenizer in this folder"):
        load_subwords(tmp_path)
    (tmp_path / "x.model").write_bytes(b"no")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_subwords(tmp_path / "x.model")


def test_a_marian_folder_takes_its_ids_from_the_vocabulary(tmp_path: Path):
    joint = train("bpe")
    processor = joint.source.processor  # pyright: ignore
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocabulary = {piece: number for number, piece in enumerate(["</s>", "<unk>", *pieces[4:], "<pad>"])}
    for name in ("source.spm", "target.spm"):
        (tmp_path / name).write_bytes(joint.source.state)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    marian = load_subwords(tmp_path)
    (ids,) = marian.encode_source(SOURCE[:1])
    assert ids == [vocabulary[processor.id_to_piece(i)] for i in joint.encode_source(SOURCE[:1])[0]]
    assert (marian.target.pad_id, marian.target.eos_id) == (len(vocabulary) - 1, 0)
    assert marian.decode([*marian.encode_target(TARGET[:1])[0], 0]) == TARGET[0]
    marian.save(tmp_path / "again")
    assert load_subwords(tmp_path / "again").fingerprint == marian.fingerprint
    assert sample(marian.source, SOURCE[:1], 0.0, seed=0, epoch=0, indexes=[0], role=0) == [ids]


def test_a_marian_folder_knows_language_codes_bytes_and_unknown_tokens(tmp_path: Path):
    """As transformers' MarianTokenizer, which gave these texts and tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE * 9),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(i) for i in range(3, processor.get_piece_size())]
    vocabulary = {piece: number for number, piece in enumerate(["</s>", "<unk>", *pieces, ">>fra<<", "<pad>"])}
    for name in ("source.spm", "target.spm"):
        (tmp_path / name).write_bytes(model.getvalue())
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    marian = load_subwords(tmp_path)

    whole, plain, unknown, later = marian.encode_source([
        ">>fra<< the red dog", "the red dog", ">>deu<< the red dog", "the >>fra<<"
    ])  # fmt: skip
    assert whole == [vocabulary[">>fra<<"], *plain]
    assert unknown == [vocabulary["<unk>"], *plain]
    assert vocabulary[">>fra<<"] not in later
    assert [marian.language_code(text) for text in (">>fra<< a", "a >>fra<<", ">>fra")] == [">>fra<<", "", ""]
    assert sample(marian.source, [">>fra<< the red dog"], 0.0, seed=0, epoch=0, indexes=[0], role=0) == [whole]

    (euro,) = marian.encode_target(["the 5€"])
    assert vocabulary["<0xE2>"] in euro
    assert marian.decode(euro) == "the 5€"
    assert marian.decode([vocabulary["<unk>"], *plain, vocabulary["<unk>"], vocabulary["</s>"]]) == "the red dog"

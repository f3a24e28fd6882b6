"""Rows of running text, compared with the text written out."""

from itertools import islice

import numpy as np
import pytest

from bestiary.data import (
    Corpus,
    DataError,
    DocumentStore,
    Tokenizer,
    build_documents,
    train_tokenizer,
    training_batches,
)
from bestiary.data.rows.running_text import RunningTextRows

TEXTS = [
    "The sea was calm. A ship went by.\n\nNobody saw it go.",
    "Short.",
    "One line after another, and so on; the longest of these texts by far, which takes more than a single row. " * 3,
    "A last one, of two sentences. Here is the second.",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("text") / "all.txt"
    path.write_text("\n".join(TEXTS))
    return train_tokenizer("byte-bpe", Corpus((str(path),)), vocab_size=300, family="gpt2")


@pytest.fixture(scope="module")
def store(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return build_documents(Corpus((str(folder),)), tokenizer, tmp_path_factory.mktemp("store"), unit="paragraphs")


def rows(store: DocumentStore, tokenizer: Tokenizer, length: int = 16, **more: bool) -> RunningTextRows:
    return RunningTextRows(store, tokenizer, "all", sequence_length=length, seed=3, **more)


def test_paragraphs_keep_the_line_between_them(store: DocumentStore, tokenizer: Tokenizer) -> None:
    whole = [tokenizer.decode(np.concatenate(store.document(number))) for number in range(4)]
    assert whole[0] == "The sea was calm. A ship went by.\nNobody saw it go."
    assert whole[1] == "Short."


@pytest.mark.parametrize("length", [1, 7, 16, 1000])
def test_every_token_is_predicted_once_from_those_before(
    store: DocumentStore, tokenizer: Tokenizer, length: int
) -> None:
    source = rows(store, tokenizer, length)
    plan = source.plan(0, 0)
    tokens = source.read_tokens(plan)
    batch = source.assemble(plan, tokens, np.arange(plan.rows), 0)
    order = np.argsort(plan.order)
    used = batch["segment_ids"][order] > 0
    text = batch["input_ids"][order][used]
    expected = [
        token for number in plan.documents for token in (tokenizer.eos_id, *np.concatenate(store.document(number)))
    ]
    assert text.tolist() == expected
    assert batch["labels"][order][used].tolist() == [*expected[1:], tokenizer.eos_id]
    assert (batch["label_weights"][order] == used).all()
    places = np.broadcast_to(np.arange(length), used.shape)
    assert (batch["position_ids"][order][used] == places[used]).all()
    assert source.statistics().tokens == len(expected)
    # Rows read one by one need only their own records.
    for number in (0, plan.rows - 1):
        alone = source.row(number)
        for name, values in alone.items():
            np.testing.assert_array_equal(values, batch[name][number], name)


def test_documents_of_a_row_are_segments_of_their_own(store: DocumentStore, tokenizer: Tokenizer) -> None:
    source = rows(store, tokenizer, 32, cross_documents=False)
    plan = source.plan(0, 0)
    batch = source.assemble(plan, source.read_tokens(plan), np.arange(plan.rows), 0)
    across = rows(store, tokenizer, 32)
    same = across.assemble(across.plan(0, 0), across.read_tokens(across.plan(0, 0)), np.arange(plan.rows), 0)
    for name in ("input_ids", "labels", "label_weights"):
        np.testing.assert_array_equal(batch[name], same[name])
    assert batch["segment_ids"].max() > 1
    for ids, segments, positions in zip(batch["input_ids"], batch["segment_ids"], batch["position_ids"], strict=True):
        used = np.count_nonzero(segments)
        new = np.flatnonzero(ids[:used] == tokenizer.eos_id)
        begins = np.unique([0, *new])
        expected = np.searchsorted(begins, np.arange(used), side="right")
        np.testing.assert_array_equal(segments[:used], expected)
        np.testing.assert_array_equal(positions[:used], np.arange(used) - begins[expected - 1])
    assert source.fingerprint != across.fingerprint


def test_a_resumed_stream_goes_on(store: DocumentStore, tokenizer: Tokenizer) -> None:
    def stream() -> object:
        return training_batches(rows(store, tokenizer), batch_rows=3, host_index=0, host_count=1)

    whole = list(islice(stream(), 40))
    first = stream()
    for _ in range(17):
        next(first)
    second = stream()
    second.set_state(first.get_state())
    for expected, found in zip(whole[17:], second, strict=False):
        for name in expected:
            np.testing.assert_array_equal(expected[name], found[name])


def test_a_tokenizer_without_an_end_is_refused(store: DocumentStore, tokenizer: Tokenizer) -> None:
    endless = Tokenizer.__new__(type(tokenizer))
    endless.__setstate__(tokenizer.__getstate__() | {"special_ids": {}})
    with pytest.raises(DataError, match="no eos token"):
        rows(store, endless)

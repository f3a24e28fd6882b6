"""Rows of streams: each row of a batch goes on where that of the batch before stopped."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from bestiary.data import Corpus, DocumentStore, Tokenizer, build_documents, train_tokenizer, training_batches
from bestiary.data.rows.running_text import RunningTextRows
from bestiary.data.rows.streams import StreamRows

TEXTS = ["The sea was calm. A ship went by.", "Short.", "One line after another, and so on. " * 5, "A last one."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return train_tokenizer("byte-bpe", Corpus((str(folder),)), vocab_size=270, family="gpt2")


@pytest.fixture(scope="module")
def store(folder: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    return build_documents(Corpus((str(folder),)), tokenizer, tmp_path_factory.mktemp("store"), unit="paragraphs")


@pytest.mark.parametrize(("columns", "length"), [(1, 16), (3, 7), (4, 500), (90, 2), (400, 1)])
def test_columns_are_the_text(store: DocumentStore, tokenizer: Tokenizer, columns: int, length: int) -> None:
    source = StreamRows(store, tokenizer, "all", columns=columns, sequence_length=length, seed=3)
    plan = source.plan(0, 0)
    assert plan.rows % columns == 0
    tokens = source.read_tokens(plan)
    batch = source.assemble(plan, tokens, np.arange(plan.rows), 0)
    running = RunningTextRows(store, tokenizer, "all", sequence_length=10_000, seed=3)
    whole = running.plan(0, 0)
    text = running.assemble(whole, running.read_tokens(whole), np.arange(1), 0)
    for name in ("input_ids", "labels"):
        by_column = batch[name].reshape(-1, columns, length).swapaxes(0, 1).reshape(columns, -1)
        there = batch["label_weights"].reshape(-1, columns, length).swapaxes(0, 1).reshape(columns, -1) > 0
        np.testing.assert_array_equal(by_column[there], text[name][0, : plan.length])
    np.testing.assert_array_equal(batch["segment_ids"] > 0, batch["label_weights"] > 0)


def test_segments_tell_documents_and_windows_apart(store: DocumentStore, tokenizer: Tokenizer) -> None:
    options = {"columns": 2, "sequence_length": 8, "seed": 3}
    apart = StreamRows(store, tokenizer, "all", cross_documents=False, **options)
    steps = apart.rows_in_window(0, 0) // 2
    batches = list(islice(training_batches(apart, batch_rows=2, prefetch=0), steps + 1))
    column = np.concatenate([batch["segment_ids"][0] for batch in batches[:steps]])
    assert (np.diff(column[column > 0]) >= 0).all()
    first = [batch["input_ids"] == tokenizer.eos_id for batch in batches[:steps]]
    begun = np.concatenate([x[0] & (b["segment_ids"][0] > 0) for x, b in zip(first, batches, strict=False)])
    np.testing.assert_array_equal(column[column > 0], np.cumsum(begun)[column > 0])
    # The next epoch's text is another.
    assert batches[steps]["segment_ids"].min() > column.max()
    together = StreamRows(store, tokenizer, "all", **options)
    found = [batch["segment_ids"] for batch in islice(training_batches(together, batch_rows=2, prefetch=0), steps + 1)]
    assert np.unique(np.concatenate(found[:steps])).tolist() in ([1], [0, 1])
    assert found[steps].min() > 1
    assert together.fingerprint != apart.fingerprint


@pytest.mark.parametrize("crossing", [True, False])
def test_no_window_has_segments_of_those_before(store: DocumentStore, tokenizer: Tokenizer, crossing: bool) -> None:
    source = StreamRows(
        store, tokenizer, "all", columns=2, sequence_length=8, seed=3, cross_documents=crossing, window_tokens=12
    )
    places = [(epoch, window) for epoch in range(18) for window in range(source.windows_in_epoch(epoch))]
    assert {epoch for epoch, window in places if window > 2}  # more windows than two kinds would tell apart
    found = []
    for epoch, window in places:
        plan = source.plan(epoch, window)
        segments = source.assemble(plan, source.read_tokens(plan), np.arange(plan.rows), 0)["segment_ids"]
        assert segments.min() >= 0
        found.append(set(segments[segments > 0].tolist()))
    assert all(one.isdisjoint(other) for apart in (1, 2, 3) for one, other in zip(found, found[apart:], strict=False))

"""RoBERTa's rows, compared with rows made sentence by sentence; nothing lost, resumed and spread alike."""

from itertools import islice

import numpy as np
import pytest

from bestiary.data import (
    Corpus,
    DataError,
    DocumentStore,
    Tokenizer,
    build_documents,
    evaluation_batches,
    training_batches,
)
from bestiary.data.rows.full_sentences import FullSentenceRows
from bestiary.data.rows.rows import Batch

FIELDS = ("input_ids", "segment_ids", "position_ids", "token_type_ids", "row_ids")


def examples_of(documents: list[list[list[int]]], most: int, cls: int, sep: int, cross: bool) -> list[list[int]]:
    """The examples of a window's documents, built up sentence by sentence."""
    examples: list[list[int]] = []
    row: list[int] = []

    def leave() -> None:
        if row:
            examples.append([cls, *row, sep])
            row.clear()

    for document in documents:
        if not cross:
            leave()
        first = True
        for sentence in document:
            border = [sep] if first and row else []
            first = False
            if len(row) + len(border) + len(sentence) > most:
                leave()
                border = []
            row += border + sentence
            while len(row) > most:  # a sentence that alone is longer than a row
                rest = row[most:]
                del row[most:]
                leave()
                row += rest
    leave()
    return examples


def read_back(batch: Batch, tokenizer: Tokenizer) -> list[list[int]]:
    """The examples of a batch by its segments, row after row; checks what the other arrays must be."""
    found = []
    for ids, segments, positions in zip(batch["input_ids"], batch["segment_ids"], batch["position_ids"], strict=True):
        used = np.count_nonzero(segments)
        assert (segments[:used] > 0).all()
        assert (ids[used:] == tokenizer.pad_id).all()
        assert not positions[used:].any()
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            assert (np.diff(places) == 1).all()
            np.testing.assert_array_equal(positions[places], np.arange(len(places)))
            found.append(ids[places].tolist())
    assert not batch["token_type_ids"].any()
    return found


@pytest.fixture(scope="module")
def long_cache(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> DocumentStore:
    """Documents of one sentence each, some of them longer than a row of 32."""
    folder = tmp_path_factory.mktemp("long")
    lengths = [3, 29, 30, 31, 95, 1, 64, 2, 300, 12]
    text = "\n\n".join("Baao " + "caao " * (length - 2) + "." if length > 1 else "." for length in lengths)
    (folder / "a.txt").write_text(text)
    return build_documents(Corpus([folder / "a.txt"], blank_line="document"), tokenizer, folder / "caches")


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize(("sequence_length", "window_tokens"), [(24, 3000), (64, 10**7), (300, 3000)])
def test_rows_are_those_made_sentence_by_sentence(
    cache: DocumentStore, tokenizer: Tokenizer, sequence_length: int, window_tokens: int, cross: bool
):
    rows = FullSentenceRows(
        cache,
        tokenizer,
        "all",
        sequence_length=sequence_length,
        cross_documents=cross,
        seed=3,
        window_tokens=window_tokens,
    )
    assert (rows.windows_in_epoch(1) > 2) == (window_tokens == 3000)
    tokens = 0
    for window in range(rows.windows_in_epoch(1)):
        plan = rows.plan(1, window)
        documents = [[sentence.tolist() for sentence in cache.document(number)] for number in plan.documents]
        expected = examples_of(documents, sequence_length - 2, tokenizer.cls_id, tokenizer.sep_id, cross)
        batch = rows.assemble(plan, rows.read_tokens(plan), np.arange(plan.rows), 7)
        found = read_back(batch, tokenizer)
        assert sorted(found) == sorted(expected)
        assert found != expected, "rows are shuffled"
        np.testing.assert_array_equal(batch["row_ids"], [(1, 7 + row) for row in range(plan.rows)])
        if cross:
            assert plan.rows == len(expected)
            assert batch["segment_ids"].max() == 1
        statistics = plan.statistics
        assert (statistics.rows, statistics.examples) == (plan.rows, len(expected))
        assert statistics.tokens == sum(map(len, expected)) == np.count_nonzero(batch["segment_ids"])
        tokens += statistics.source_tokens
    assert tokens == cache.counts.tokens
    assert rows.statistics(1).truncated_tokens == 0


@pytest.mark.parametrize("cross", [True, False])
def test_sentences_longer_than_a_row_go_on(long_cache: DocumentStore, tokenizer: Tokenizer, cross: bool):
    rows = FullSentenceRows(long_cache, tokenizer, "all", sequence_length=32, cross_documents=cross)
    plan = rows.plan(0, 0)
    documents = [[sentence.tolist() for sentence in long_cache.document(number)] for number in plan.documents]
    batch = rows.assemble(plan, rows.read_tokens(plan), np.arange(plan.rows), 0)
    expected = examples_of(documents, 30, tokenizer.cls_id, tokenizer.sep_id, cross)
    assert sorted(read_back(batch, tokenizer)) == sorted(expected)
    longer = sum(len(sentence) > 30 for document in documents for sentence in document)
    assert plan.statistics.split_sentences == longer == 4
    assert f"{longer} sentences split over rows" in str(plan.statistics)
    special = np.isin(batch["input_ids"], [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id])
    assert np.count_nonzero(~special) == long_cache.counts.tokens


def test_document_sentences_share_rows(cache: DocumentStore, tokenizer: Tokenizer):
    statistics = FullSentenceRows(cache, tokenizer, sequence_length=128, cross_documents=False).statistics()
    assert statistics.examples > statistics.rows
    assert statistics.packing_efficiency > 0.85


def test_only_needed_records_are_read(cache: DocumentStore, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    rows = FullSentenceRows(cache, tokenizer, sequence_length=64)
    plan = rows.plan(0, 0)
    whole = rows.read_tokens(plan)
    read: list[int] = []
    read_records = cache.read_records
    monkeypatch.setattr(cache, "read_records", lambda numbers: (read.extend(numbers), read_records(numbers))[1])
    wanted = np.arange(5, 9)
    some = rows.read_tokens(plan, wanted)
    assert 0 < len(read) < 20 < cache.counts.records
    for name, values in rows.assemble(plan, some, wanted, 0).items():
        np.testing.assert_array_equal(values, rows.assemble(plan, whole, wanted, 0)[name])


@pytest.mark.parametrize("cross", [True, False])
def test_the_stream_goes_on_from_its_state_and_divides_among_hosts(
    cache: DocumentStore, tokenizer: Tokenizer, cross: bool
):
    def fresh() -> FullSentenceRows:
        return FullSentenceRows(cache, tokenizer, sequence_length=64, cross_documents=cross, seed=5, window_tokens=6000)

    rows = fresh()
    count = rows.statistics(0).rows // 4  # some two epochs of batches of eight
    stream = training_batches(rows, batch_rows=8)
    before = list(islice(stream, count - 9))
    state = stream.get_state()
    after = list(islice(stream, 9))
    assert after[-1]["row_ids"][:, 0].max() >= 1
    again = training_batches(fresh(), batch_rows=8, prefetch=0)
    again.set_state(state)
    halves = [training_batches(fresh(), batch_rows=8, host_index=host, host_count=2, prefetch=0) for host in range(2)]
    for expected in before:
        parts = [next(half) for half in halves]
        for name in FIELDS:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), expected[name])
    for expected in after:
        found = next(again)
        for name in FIELDS:
            np.testing.assert_array_equal(found[name], expected[name])
    for number in (0, 8, 8 * len(before) - 1):
        for name, values in fresh().row(number).items():
            np.testing.assert_array_equal(before[number // 8][name][number % 8], values)
    stream.close()


def test_evaluation_fills_up_with_padding(cache: DocumentStore, tokenizer: Tokenizer):
    rows = FullSentenceRows(cache, tokenizer, "validation", sequence_length=64, validation_fraction=0.3)
    total = rows.statistics().rows
    batches = list(evaluation_batches(rows, batch_rows=8))
    used = np.concatenate([batch["segment_ids"].any(1) for batch in batches])
    assert used.sum() == total
    assert len(used) == 8 * -(-total // 8)


def test_other_rows_have_another_fingerprint(cache: DocumentStore, tokenizer: Tokenizer):
    settings = [{}, {"cross_documents": False}, {"seed": 1}, {"sequence_length": 32}, {"copies": 2}, {"split": "all"}]
    made = [FullSentenceRows(cache, tokenizer, **{"sequence_length": 64, **options}) for options in settings]
    assert len({rows.fingerprint for rows in made}) == len(settings)
    assert made[0].fingerprint == FullSentenceRows(cache, tokenizer, sequence_length=64).fingerprint


def test_a_row_without_room_is_refused(cache: DocumentStore, tokenizer: Tokenizer):
    with pytest.raises(DataError, match="A sequence length of 2: no room"):
        FullSentenceRows(cache, tokenizer, sequence_length=2)

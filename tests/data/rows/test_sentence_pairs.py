"""Rows hold the right tokens at the right places, under numbers that always mean the same row."""

import copy
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from bestiary.data import DataError, DocumentStore, SentencePairRows, Tokenizer
from bestiary.data.rows.rows import Batch, Position
from bestiary.data.rows.sentence_pairs import Pairs
from bestiary.data.tokenizers.tokenizer import Template

FIELDS = {
    "input_ids": np.int32,
    "segment_ids": np.int32,
    "position_ids": np.int32,
    "token_type_ids": np.int32,
    "row_ids": np.uint32,
    "cls_positions": np.int32,
    "next_sentence_labels": np.int32,
    "next_sentence_weights": np.float32,
}


def epoch_of(dataset: SentencePairRows, epoch: int = 0) -> Batch:
    """All rows of an epoch, in order."""
    parts, first = [], 0
    for window in range(dataset.windows_in_epoch(epoch)):
        plan = dataset.plan(epoch, window)
        parts.append(dataset.assemble(plan, dataset.read_tokens(plan), np.arange(plan.rows), first))
        first += plan.rows
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def place(documents: list[list[int]], tokens: list[int]) -> tuple[int, int]:
    """Which document the tokens are from, and where in it."""
    found = [
        (number, start)
        for number, document in enumerate(documents)
        for start in range(len(document) - len(tokens) + 1)
        if document[start] == tokens[0] and document[start : start + len(tokens)] == tokens
    ]
    return found[0] if len(found) == 1 else (-1, -1)  # a few words may stand in many places


@pytest.mark.parametrize(("sequence_length", "window_tokens"), [(64, 8_000_000), (128, 8_000_000), (64, 5_000)])
def test_rows(cache: DocumentStore, sequence_length: int, window_tokens: int, tokenizer: Tokenizer):
    dataset = SentencePairRows(
        cache,
        tokenizer,
        "train",
        sequence_length=sequence_length,
        seed=3,
        window_tokens=window_tokens,
        validation_fraction=0.2,
    )
    assert (dataset.windows_in_epoch(0) > 2) == (window_tokens == 5_000)
    rows = epoch_of(dataset)
    count, slots = len(rows["input_ids"]), dataset.examples_per_row
    assert slots == max(2, sequence_length // 32)
    for name, dtype in FIELDS.items():
        width = {"row_ids": 2, "input_ids": sequence_length}.get(name, sequence_length if "_ids" in name else slots)
        assert (rows[name].dtype, rows[name].shape) == (dtype, (count, width)), name
    documents = [np.concatenate(cache.document(number)).tolist() for number in range(cache.counts.documents)]
    train = set(dataset.documents.tolist())
    seen, labels, tokens, matched = Counter(), Counter(), 0, 0
    for row in range(count):
        ids, segment_ids = rows["input_ids"][row], rows["segment_ids"][row]
        examples = segment_ids.max()
        assert 1 <= examples <= slots
        used = int((segment_ids > 0).sum())
        tokens += used
        assert (np.diff(segment_ids[:used]) >= 0).all()
        assert (ids[used:] == tokenizer.pad_id).all()
        assert not rows["position_ids"][row, used:].any()
        assert not rows["token_type_ids"][row, used:].any()
        np.testing.assert_array_equal(rows["next_sentence_weights"][row], np.arange(slots) < examples)
        assert not rows["cls_positions"][row, examples:].any()
        assert not rows["next_sentence_labels"][row, examples:].any()
        for example in range(examples):
            places = np.flatnonzero(segment_ids == example + 1)
            assert (np.diff(places) == 1).all()
            assert rows["cls_positions"][row, example] == places[0]
            np.testing.assert_array_equal(rows["position_ids"][row, places], np.arange(len(places)))
            own = ids[places].tolist()
            assert own[0] == tokenizer.cls_id
            middle = own.index(tokenizer.sep_id)
            first, second = own[1:middle], own[middle + 1 : -1]
            assert own[-1] == tokenizer.sep_id
            assert min(len(first), len(second)) >= 1
            assert tokenizer.sep_id not in second
            assert rows["token_type_ids"][row, places].tolist() == [0] * (middle + 1) + [1] * (len(second) + 1)
            label = int(rows["next_sentence_labels"][row, example])
            labels[label] += 1
            (a, a_start), (b, b_start) = place(documents, first), place(documents, second)
            if -1 in (a, b):
                continue
            matched += 1
            assert {a, b} <= train
            if label == 0:
                assert a == b
                assert b_start >= a_start + len(first)
                if len(own) < sequence_length:
                    assert b_start == a_start + len(first)
            else:
                assert a != b
            seen.update((a, position) for position in range(a_start, a_start + len(first)))
    assert matched > 0.8 * sum(labels.values())
    assert max(seen.values()) == 1, "no token is in two first segments"
    assert 0.4 < labels[1] / sum(labels.values()) < 0.75
    statistics = dataset.statistics()
    assert (statistics.rows, statistics.tokens) == (count, tokens)
    assert (statistics.examples, statistics.random_examples) == (sum(labels.values()), labels[1])
    assert statistics.source_tokens == dataset.tokens == sum(len(documents[number]) for number in train)
    assert (statistics.documents, statistics.windows) == (len(train), dataset.windows_in_epoch(0))
    assert statistics.dropped_examples == 0
    assert statistics.packing_efficiency == tokens / (count * sequence_length) > 0.9
    assert dataset.statistics().rows == count
    assert dataset.statistics(0, windows=1) == dataset.plan(0, 0).statistics


def test_rows_without_next_sentences(cache: DocumentStore, tokenizer: Tokenizer):
    dataset = SentencePairRows(cache, tokenizer, "all", sequence_length=64, pairs="none")
    rows = epoch_of(dataset)
    assert not rows["next_sentence_weights"].any()
    assert not rows["token_type_ids"].any()
    ids = rows["input_ids"]
    special = (ids == tokenizer.cls_id) | (ids == tokenizer.sep_id)
    content = ids[(rows["segment_ids"] > 0) & ~special]
    everything = np.concatenate(cache.read_records(range(cache.counts.records)))
    np.testing.assert_array_equal(np.sort(content), np.sort(everything))
    assert dataset.statistics(0).truncated_tokens == 0
    assert special.sum() == 2 * dataset.statistics(0).examples


def test_rows_in_order_and_swapped(cache: DocumentStore, tokenizer: Tokenizer):
    """Each pair is recognised in its document; B follows A, or A follows B and the label says so."""
    dataset = SentencePairRows(cache, tokenizer, "all", sequence_length=128, seed=2, pairs="order", short_fraction=0.5)
    rows = epoch_of(dataset)
    documents = [np.concatenate(cache.document(number)).tolist() for number in range(cache.counts.documents)]
    labels, lone, recognised = [], 0, 0
    for row in range(len(rows["input_ids"])):
        for example in range(rows["segment_ids"][row].max()):
            places = np.flatnonzero(rows["segment_ids"][row] == example + 1)
            own = rows["input_ids"][row, places].tolist()
            middle = own.index(tokenizer.sep_id)
            first, second = own[1:middle], own[middle + 1 : -1]
            label, weight = (rows[f"sentence_order_{name}"][row, example] for name in ("labels", "weights"))
            types = rows["token_type_ids"][row, places]
            np.testing.assert_array_equal(types, np.arange(len(own)) > middle)
            if not second:
                lone += 1
                assert (label, weight) == (0, 0)
                continue
            assert weight == 1
            labels.append(label)
            (a, a_start), (b, b_start) = place(documents, first), place(documents, second)
            if -1 not in (a, b) and len(own) < 128:  # a longer pair was cut
                recognised += 1
                assert a == b
                assert (b_start == a_start + len(first)) == (label == 0)
                assert (a_start == b_start + len(second)) == (label == 1)
    assert recognised > 0.5 * len(labels)
    statistics = dataset.statistics()
    assert (statistics.swapped_examples, statistics.lone_examples) == (sum(labels), lone)
    assert statistics.examples == len(labels) + lone
    assert "swapped" in str(statistics)


def test_documents_of_one_sentence_have_no_order(
    cache: DocumentStore, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache, "document_sentences", np.arange(cache.counts.documents + 1))
    with pytest.raises(DataError, match=r"each of the .* documents of the train split has a single sentence"):
        SentencePairRows(cache, tokenizer, sequence_length=64, pairs="order")


@pytest.mark.parametrize("pairs", ["next", "order", "none"])
def test_special_tokens_are_those_of_the_template(cache: DocumentStore, tokenizer: Tokenizer, pairs: Pairs):
    other = copy.copy(tokenizer)
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    other.template = Template(before=(cls,), between=(sep, sep), after=(sep,))  # RoBERTa's
    dataset = SentencePairRows(cache, other, "all", sequence_length=64, pairs=pairs)
    plan = dataset.plan(0, 0)
    batch = dataset.assemble(plan, dataset.read_tokens(plan), np.arange(plan.rows), 0)
    documents = [np.concatenate(cache.document(number)).tolist() for number in plan.documents]
    text = np.concatenate(documents).tolist()
    of, example = plan.examples, 0
    for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            first = text[of.first_start[example] :][: of.first_length[example]]
            second = text[of.second_start[example] :][: of.second_length[example]]
            expected, types = other.join(first, second or None)
            assert ids[segments == segment].tolist() == expected
            assert not any(types)
            example += 1
    assert example == len(plan.lengths)
    assert not batch["token_type_ids"].any()
    assert plan.lengths.max() == 64


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_same_settings_give_the_same_rows(cache: DocumentStore, tokenizer: Tokenizer):
    def rows(epoch: int = 0, **options) -> Batch:
        return epoch_of(SentencePairRows(cache, tokenizer, sequence_length=64, **{"seed": 1, **options}), epoch)

    original = rows()
    for name, values in rows().items():
        np.testing.assert_array_equal(values, original[name])
    for other in (rows(seed=2), rows(epoch=1), rows(short_fraction=0.5), rows(window_tokens=5000)):
        assert other["input_ids"].shape != original["input_ids"].shape or (
            (other["input_ids"] != original["input_ids"]).any(1).mean() > 0.9
        )


def test_row_ids_are_never_the_same_twice(cache: DocumentStore, tokenizer: Tokenizer):
    dataset = SentencePairRows(cache, tokenizer, sequence_length=64, window_tokens=5000)
    ids = [tuple(row) for epoch in range(3) for row in epoch_of(dataset, epoch)["row_ids"].tolist()]
    assert len(set(ids)) == len(ids)
    assert [row for epoch, row in ids if epoch == 1] == list(range(dataset.statistics(1).rows))


def test_copies_come_back_with_their_ids(cache: DocumentStore, tokenizer: Tokenizer):
    dataset = SentencePairRows(cache, tokenizer, sequence_length=64, copies=2, window_tokens=5000)
    epochs = [epoch_of(dataset, epoch) for epoch in range(4)]
    for name in FIELDS:
        np.testing.assert_array_equal(epochs[0][name], epochs[2][name])
        np.testing.assert_array_equal(epochs[1][name], epochs[3][name])
    assert (epochs[0]["row_ids"][:, 0] == 0).all()
    assert (epochs[1]["row_ids"][:, 0] == 1).all()


def test_a_row_by_its_number(cache: DocumentStore, tokenizer: Tokenizer):
    dataset = SentencePairRows(cache, tokenizer, sequence_length=64, window_tokens=5000)
    epochs = [epoch_of(dataset, epoch) for epoch in range(2)]
    both = {name: np.concatenate([epoch[name] for epoch in epochs]) for name in FIELDS}
    total = len(both["input_ids"])
    fresh = SentencePairRows(cache, tokenizer, sequence_length=64, window_tokens=5000)
    for number in (total - 1, 0, 17, len(epochs[0]["input_ids"]) - 1, len(epochs[0]["input_ids"])):
        row = fresh.row(number)
        for name in FIELDS:
            np.testing.assert_array_equal(row[name], both[name][number], err_msg=f"{name} of row {number}")


def test_positions_are_found_from_any_earlier_one(cache: DocumentStore, tokenizer: Tokenizer):
    dataset = SentencePairRows(cache, tokenizer, sequence_length=64, window_tokens=5000)
    positions = [dataset.locate(row) for row in range(0, 3 * dataset.statistics().rows, 37)]
    for before, after in pairwise(positions):
        assert dataset.locate(after.row, start=before) == after
        assert dataset.locate(before.row, start=after) == before
    assert positions[0] == Position()
    assert positions[-1].epoch >= 2


def test_only_needed_records_are_read(cache: DocumentStore, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer):
    dataset = SentencePairRows(cache, tokenizer, sequence_length=64)
    plan = dataset.plan(0, 0)
    whole = dataset.read_tokens(plan)
    read: list[int] = []
    read_records = cache.read_records
    monkeypatch.setattr(cache, "read_records", lambda numbers: (read.extend(numbers), read_records(numbers))[1])
    rows = np.arange(5, 9)
    some = dataset.read_tokens(plan, rows)
    assert 0 < len(read) < 20 < cache.counts.records
    for name, values in dataset.assemble(plan, some, rows, 0).items():
        np.testing.assert_array_equal(values, dataset.assemble(plan, whole, rows, 0)[name])


def test_splits_share_no_document(cache: DocumentStore, tokenizer: Tokenizer):
    train, held = (SentencePairRows(cache, tokenizer, split, sequence_length=64) for split in ("train", "validation"))
    assert not set(train.documents) & set(held.documents)
    assert len(train.documents) + len(held.documents) == cache.counts.documents
    assert train.fingerprint != held.fingerprint


def test_windows_hold_whole_documents_once_each(cache: DocumentStore, tokenizer: Tokenizer):
    dataset = SentencePairRows(cache, tokenizer, sequence_length=64, window_tokens=3000)
    for epoch in range(2):
        windows = [dataset.plan(epoch, window).documents for window in range(dataset.windows_in_epoch(epoch))]
        assert len(windows) > 5
        assert min(map(len, windows)) >= 2
        np.testing.assert_array_equal(np.sort(np.concatenate(windows)), dataset.documents)
    assert dataset.plan(0, 0).documents.tolist() != dataset.plan(1, 0).documents.tolist()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 7}, "A sequence length of 7: too short for two sentences"),
        ({"seed": -1}, "A seed of -1: expected 0 or more"),
        ({"copies": 0}, "0 copies of the corpus; expected at least 1"),
        ({"examples_per_row": 0}, "0 examples a row: expected at least 1"),
        ({"validation_fraction": 2.0}, r"A validation fraction of 2\.0"),
    ],
)
def test_refusals(cache: DocumentStore, options: dict, message: str, tokenizer: Tokenizer):
    with pytest.raises(DataError, match=message):
        SentencePairRows(cache, tokenizer, **{"sequence_length": 64, **options})

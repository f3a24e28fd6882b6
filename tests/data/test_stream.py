"""A batch is the same whatever the number of hosts, and a stream that was stopped goes on as if it had not been."""

import json
from itertools import islice

import numpy as np
import pytest

from bestiary.data import DataError, DocumentStore, SentencePairRows, Tokenizer, evaluation_batches, training_batches
from bestiary.data.rows.rows import Batch


@pytest.fixture
def dataset(cache: DocumentStore, tokenizer: Tokenizer) -> SentencePairRows:
    """Several windows an epoch, of uneven numbers of rows."""
    return SentencePairRows(cache, tokenizer, "train", sequence_length=64, seed=5, window_tokens=6000)


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def joined(parts: list[Batch]) -> Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def enough(dataset: SentencePairRows, batch_rows: int) -> int:
    """Batches for somewhat more than two epochs."""
    return 2 * dataset.statistics().rows // batch_rows + 10


@pytest.mark.parametrize("prefetch", [0, 3])
def test_batches_are_the_rows_in_order(dataset: SentencePairRows, prefetch: int):
    count = enough(dataset, 8)
    found = joined(list(islice(training_batches(dataset, batch_rows=8, prefetch=prefetch), count)))
    for number in (0, 1, 8 * count - 1, dataset.statistics().rows, dataset.rows_in_window(0, 0)):
        row = dataset.row(number)
        for name, values in row.items():
            np.testing.assert_array_equal(found[name][number], values)
    assert found["row_ids"][-1, 0] == 2


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_take_their_shares_of_the_same_batches(
    dataset: SentencePairRows, cache: DocumentStore, hosts: int, tokenizer: Tokenizer
):
    alone = training_batches(dataset, batch_rows=8)
    shares = [
        training_batches(
            SentencePairRows(cache, tokenizer, "train", sequence_length=64, seed=5, window_tokens=6000),
            batch_rows=8,
            host_index=host,
            host_count=hosts,
        )
        for host in range(hosts)
    ]
    for _ in range(enough(dataset, 8)):
        parts = [next(share) for share in shares]
        assert all(len(part["input_ids"]) == 8 // hosts for part in parts)
        assert_equal(joined(parts), next(alone))
        states = [share.get_state() for share in shares]
        assert all(state == alone.get_state() for state in states)


def test_a_batch_larger_than_an_epoch(dataset: SentencePairRows):
    rows = 2 * dataset.statistics().rows + 50
    batch = next(training_batches(dataset, batch_rows=rows, prefetch=0))
    assert set(batch["row_ids"][:, 0].tolist()) == {0, 1, 2}
    assert_equal(batch, joined(list(islice(training_batches(dataset, batch_rows=1, prefetch=0), rows))))


@pytest.mark.parametrize("stop", [0, 1, 7, 40, 200])
def test_a_resumed_stream_is_the_uninterrupted_one(
    dataset: SentencePairRows, cache: DocumentStore, stop: int, tokenizer: Tokenizer
):
    whole = list(islice(training_batches(dataset, batch_rows=8), stop + 60))
    before = training_batches(dataset, batch_rows=8)
    list(islice(before, stop))
    state = json.loads(json.dumps(before.get_state()))
    fresh = SentencePairRows(cache, tokenizer, "train", sequence_length=64, seed=5, window_tokens=6000)
    after = training_batches(fresh, batch_rows=8)
    next(after)  # whatever it did before
    after.set_state(state)
    assert after.get_state() == state
    for expected, found in zip(whole[stop:], islice(after, 60), strict=True):
        assert_equal(found, expected)


def test_a_resumed_stream_plans_no_window_it_has_passed(
    dataset: SentencePairRows, cache: DocumentStore, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    before = training_batches(dataset, batch_rows=8, prefetch=0)
    list(islice(before, enough(dataset, 8)))
    fresh = SentencePairRows(cache, tokenizer, "train", sequence_length=64, seed=5, window_tokens=6000)
    after = training_batches(fresh, batch_rows=8, prefetch=0)
    after.set_state(before.get_state())
    planned: list[int] = []
    make_plan = fresh._make_plan
    monkeypatch.setattr(
        fresh, "_make_plan", lambda epoch, window: (planned.append(window), make_plan(epoch, window))[1]
    )
    next(after)
    assert len(planned) <= 2


@pytest.mark.parametrize(("batch_rows", "hosts"), [(8, 2), (4, 1), (12, 3)])
def test_a_run_may_go_on_with_other_hosts_and_another_batch_size(
    dataset: SentencePairRows, batch_rows: int, hosts: int
):
    before = training_batches(dataset, batch_rows=8)
    list(islice(before, 33))
    shares = [
        training_batches(dataset, batch_rows=batch_rows, host_index=host, host_count=hosts) for host in range(hosts)
    ]
    for share in shares:
        share.set_state(before.get_state())
    found = joined([joined([next(share) for share in shares]) for _ in range(24)])
    expected = joined(list(islice(before, 24 * batch_rows // 8 + 1)))
    assert_equal(found, {name: values[: 24 * batch_rows] for name, values in expected.items()})


def test_the_state_of_other_data_is_refused(dataset: SentencePairRows, cache: DocumentStore, tokenizer: Tokenizer):
    state = training_batches(dataset, batch_rows=8).get_state()
    other = SentencePairRows(cache, tokenizer, "train", sequence_length=64, seed=6, window_tokens=6000)
    with pytest.raises(DataError, match="The saved position belongs to other data"):
        training_batches(other, batch_rows=8).set_state(state)
    with pytest.raises(DataError, match="The saved position belongs to other data"):
        training_batches(dataset, batch_rows=8).set_state({"rows_of": state["rows_of"]})


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("rows", [None, 20, 1, 10**9])
def test_evaluation_is_one_pass_filled_up_with_padding(
    cache: DocumentStore, hosts: int, rows: int | None, tokenizer: Tokenizer
):
    dataset = SentencePairRows(
        cache, tokenizer, "validation", sequence_length=64, window_tokens=1000, validation_fraction=0.3
    )
    total = dataset.statistics().rows if rows is None else min(rows, dataset.statistics().rows)
    shares = [
        list(evaluation_batches(dataset, batch_rows=8, host_index=host, host_count=hosts, rows=rows))
        for host in range(hosts)
    ]
    assert [len(share) for share in shares] == [-(-total // 8)] * hosts
    assert {batch["input_ids"].shape for share in shares for batch in share} == {(8 // hosts, 64)}
    whole = joined([joined([share[number] for share in shares]) for number in range(len(shares[0]))])
    real = whole["segment_ids"].any(1)
    assert real[:total].all()
    assert not real[total:].any()
    assert not whole["next_sentence_weights"][total:].any()
    assert (whole["input_ids"][total:] == tokenizer.pad_id).all()
    assert_equal({name: values[total - 1] for name, values in whole.items()}, dataset.row(total - 1))
    again = joined(list(evaluation_batches(dataset, batch_rows=8, rows=rows)))
    assert_equal(again, whole)


def test_refusals(dataset: SentencePairRows):
    with pytest.raises(DataError, match="A batch of 9 rows does not divide among 2 hosts"):
        training_batches(dataset, batch_rows=9, host_count=2)
    with pytest.raises(DataError, match="Host 2 of 2: expected a number from 0 to 1"):
        training_batches(dataset, batch_rows=8, host_index=2, host_count=2)

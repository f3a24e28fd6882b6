"""Masking: exact budgets, whole units, the paper's shares, and nothing that depends on how a batch is split."""

import functools

import jax
import numpy as np
import pytest

from bestiary.train.pretrain.config import MaskingKind
from bestiary.train.pretrain.masking import UNIT_LENGTHS, Masked, Masking

VOCAB, MASK, FIRST_WORD, FIRST_CONTINUATION = 1000, 4, 5, 600
ROWS, LENGTH = 48, 128
KEY = jax.random.key(3)


def tables() -> tuple[np.ndarray, np.ndarray]:
    special, continuation = np.zeros(VOCAB, bool), np.zeros(VOCAB, bool)
    special[:FIRST_WORD] = True
    continuation[FIRST_CONTINUATION:] = True
    return special, continuation


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Two packed examples a row with [CLS] and [SEP], then padding; four tokens in ten continue a word."""
    rng = np.random.default_rng(0)
    input_ids = rng.integers(FIRST_WORD, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    segment_ids = np.repeat([1, 2, 0], [60, 50, 18])[None].repeat(ROWS, 0).astype(np.int32)
    input_ids[:, [0, 60]], input_ids[:, [20, 59, 109]] = 2, 3
    input_ids[:, 110:] = 0
    row_ids = np.stack([np.zeros(ROWS), np.arange(ROWS)], 1).astype(np.uint32)
    return dict(input_ids=input_ids, segment_ids=segment_ids, row_ids=row_ids)


@functools.cache
def compiled(kind: MaskingKind):
    return jax.jit(Masking(kind, 0.15, MASK, *tables()))


def run(kind: MaskingKind, batch: dict[str, np.ndarray], key: jax.Array = KEY):
    return jax.tree.map(np.asarray, compiled(kind)(key, **batch))


@pytest.fixture(scope="module", params=["token", "word", "ngram", "span"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def masked(kind, batch):
    return run(kind, batch)


def test_slots_hold_what_stood_there(kind, batch, masked):
    used = masked.weights > 0
    original = np.take_along_axis(batch["input_ids"], masked.positions, 1)
    np.testing.assert_array_equal(masked.labels[used], original[used])
    assert not masked.labels[~used].any()
    assert not masked.positions[~used].any()
    for positions, weights in zip(masked.positions, masked.weights, strict=True):
        assert (np.diff(positions[weights > 0]) > 0).all()


def test_only_chosen_places_change_and_special_tokens_never(batch, masked):
    chosen = np.zeros((ROWS, LENGTH), bool)
    for row in range(ROWS):
        chosen[row, masked.positions[row][masked.weights[row] > 0]] = True
    np.testing.assert_array_equal(masked.input_ids[~chosen], batch["input_ids"][~chosen])
    assert not (chosen & tables()[0][batch["input_ids"]]).any()
    assert not chosen[batch["segment_ids"] == 0].any()


def test_budget_is_exact_for_tokens_and_never_exceeded(kind, batch, masked):
    maskable = ((batch["segment_ids"] > 0) & ~tables()[0][batch["input_ids"]]).sum(1)
    budget = np.round(0.15 * maskable)
    counts = masked.weights.sum(1)
    assert masked.weights.shape[1] == Masking(kind, 0.15, MASK, *tables()).slots(LENGTH)
    assert (counts <= budget).all()
    if kind == "token":
        np.testing.assert_array_equal(counts, budget)
    else:
        assert counts.mean() > 0.97 * budget.mean()


@pytest.mark.parametrize("kind", ["word", "ngram", "span"])
def test_whole_words_are_hidden_together(kind, batch):
    masked = run(kind, batch)
    special, continuation = tables()
    ids = batch["input_ids"]
    for row in range(ROWS):
        chosen = set(masked.positions[row][masked.weights[row] > 0].tolist())
        for place in range(1, LENGTH):
            joined = continuation[ids[row, place]] and not special[ids[row, place - 1]]
            if joined and batch["segment_ids"][row, place]:
                assert (place in chosen) == (place - 1 in chosen)


def test_shares_are_80_10_10(kind, batch):
    masked_runs = [run(kind, {**batch, "row_ids": batch["row_ids"] + np.uint32([epoch, 0])}) for epoch in range(6)]
    hidden = np.concatenate([np.take_along_axis(m.input_ids, m.positions, 1)[m.weights > 0] for m in masked_runs])
    labels = np.concatenate([m.labels[m.weights > 0] for m in masked_runs])
    # Spans draw once for some 3.8 words of 1.7 tokens each, so their shares scatter about 2.5 times as much.
    tolerance = 4 * np.sqrt(0.8 * 0.2 / len(labels)) * (3 if kind == "span" else 1)
    assert abs((hidden == MASK).mean() - 0.8) < tolerance
    assert abs((hidden == labels).mean() - 0.1) < tolerance
    others = hidden[(hidden != MASK) & (hidden != labels)]
    assert np.unique(others).size > min(len(others) / 3, 100)


def test_a_span_shares_one_fate(batch):
    masked = run("span", batch)
    fates = []
    for row in range(ROWS):
        places = masked.positions[row][masked.weights[row] > 0]
        for stretch in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            fates.append((masked.input_ids[row, stretch] == MASK).mean())
    # Two neighbouring spans may differ; most stretches are one span.
    assert np.isin(fates, [0.0, 1.0]).mean() > 0.8


def test_epochs_differ_and_repeated_numbers_repeat(batch):
    first, again = run("token", batch), run("token", batch)
    np.testing.assert_array_equal(first.positions, again.positions)
    np.testing.assert_array_equal(first.input_ids, again.input_ids)
    next_epoch = run("token", {**batch, "row_ids": batch["row_ids"] + np.uint32([1, 0])})
    other_seed = run("token", batch, key=jax.random.key(4))
    used = first.weights > 0
    for other in (next_epoch, other_seed):
        assert (other.positions != first.positions)[used].mean() > 0.9


def test_split_of_the_batch_changes_nothing(kind, batch, masked):
    order = np.random.default_rng(1).permutation(ROWS)
    shuffled = run(kind, {name: value[order] for name, value in batch.items()})
    for mixed, whole in zip(shuffled, masked, strict=True):
        np.testing.assert_array_equal(mixed, whole[order])


def test_rows_without_words_predict_nothing(kind, batch):
    empty = {**batch, "segment_ids": np.zeros_like(batch["segment_ids"])}
    masked = run(kind, empty)
    assert not masked.weights.any()
    np.testing.assert_array_equal(masked.input_ids, empty["input_ids"])


def test_short_rows_predict_at_least_one_token(batch):
    short = {**batch, "segment_ids": (np.arange(LENGTH)[None] < 4).astype(np.int32).repeat(ROWS, 0)}
    assert (run("token", short).weights.sum(1) == 1).all()


def test_unit_lengths_are_the_papers():
    assert UNIT_LENGTHS["ngram"] == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert UNIT_LENGTHS["span"].sum() == pytest.approx(1)
    mean = (UNIT_LENGTHS["span"] * np.arange(1, 11)).sum()
    assert mean == pytest.approx(3.8, abs=0.01)  # Joshi et al. 2019, 3.1


# --- RoBERTa's rules --------------------------------------------------------------------------------------------------

ROBERTA_ROWS = 1024


@pytest.fixture(scope="module", params=["token", "word"])
def roberta(request) -> tuple[str, np.ndarray, np.ndarray, Masked]:
    """(kind, ids, lengths, what was masked) of 10^5 tokens in rows `<s> ... </s>` of 70 to 128 tokens."""
    rng = np.random.default_rng(1)
    ids = rng.integers(FIRST_WORD, VOCAB, (ROBERTA_ROWS, LENGTH)).astype(np.int32)
    lengths = rng.integers(70, LENGTH + 1, ROBERTA_ROWS)
    ids[:, 0] = 2
    ids[np.arange(ROBERTA_ROWS), lengths - 1] = 3
    inside = np.arange(LENGTH)[None] < lengths[:, None]
    ids[~inside] = 0
    row_ids = np.stack([np.zeros(ROBERTA_ROWS), np.arange(ROBERTA_ROWS)], 1).astype(np.uint32)
    masking = jax.jit(Masking(request.param, 0.15, MASK, *tables(), rules="roberta"))
    return request.param, ids, lengths, jax.tree.map(np.asarray, masking(KEY, ids, inside.astype(np.int32), row_ids))


def test_roberta_masks_the_right_number_on_average(roberta):
    kind, _, lengths, masked = roberta
    counts = masked.weights.sum(1)
    wanted = 0.15 * lengths
    assert (counts <= np.ceil(wanted)).all()
    if kind == "token":  # fairseq's int(0.15 * length + U[0, 1)); words may not fill the budget
        assert (counts >= np.floor(wanted)).all()
        assert counts.sum() == pytest.approx(wanted.sum(), abs=4 * np.sqrt(0.25 * ROBERTA_ROWS))
    else:
        assert counts.sum() > 0.97 * wanted.sum()


def test_roberta_masks_special_tokens_as_often_as_others(roberta):
    kind, ids, lengths, masked = roberta
    chosen = np.zeros(ids.shape, bool)
    np.put_along_axis(chosen, masked.positions, masked.weights > 0, 1)
    chosen[:, 0] = (masked.positions[:, 0] == 0) & (masked.weights[:, 0] > 0)  # unused slots point at 0 too
    ends = chosen[np.arange(ROBERTA_ROWS), lengths - 1]
    for share in (chosen[:, 0].mean(), ends.mean()):
        assert share == pytest.approx(
            0.15, abs=4 * np.sqrt(0.15 * 0.85 / ROBERTA_ROWS) + (0.02 if kind == "word" else 0)
        )


def test_roberta_replaces_by_ordinary_tokens(roberta):
    _, _, _, masked = roberta
    used = masked.weights > 0
    hidden, labels = np.take_along_axis(masked.input_ids, masked.positions, 1)[used], masked.labels[used]
    tolerance = 4 * np.sqrt(0.8 * 0.2 / used.sum())
    assert (hidden == MASK).mean() == pytest.approx(0.8, abs=tolerance)
    assert (hidden == labels).mean() == pytest.approx(0.1, abs=tolerance)
    others = hidden[(hidden != MASK) & (hidden != labels)]
    assert (others >= FIRST_WORD).all()
    assert others.mean() == pytest.approx((FIRST_WORD + VOCAB - 1) / 2, rel=0.05)


def test_a_word_does_not_join_the_special_token_before_it(roberta):
    """The first piece of a text has no space before it, and yet begins a word of its own."""
    kind, ids, _, masked = roberta
    if kind == "word":
        first = ids[:, 1] >= FIRST_CONTINUATION
        chosen = np.zeros(ids.shape, bool)
        np.put_along_axis(chosen, masked.positions, masked.weights > 0, 1)
        starts = (masked.positions[:, 0] == 0) & (masked.weights[:, 0] > 0)
        assert (starts & ~chosen[:, 1])[first].any()
        assert (~starts & chosen[:, 1])[first].any()

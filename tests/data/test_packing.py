"""Planned pairs are those of BERT's own script; packing splits nothing and loses nothing."""

import random
from itertools import pairwise

import numpy as np
import pytest

from bestiary.data.packing import Statistics, pack
from bestiary.data.random import RandomStream
from bestiary.data.rows.sentence_pairs import Examples, _truncated, plan_ordered_pairs, plan_pairs, plan_singles


def window(documents: int, seed: int, longest: int = 40, sentences: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Sentence lengths of some documents, and where each document's sentences start."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, sentences + 1, documents)
    return draw.integers(1, longest + 1, counts.sum()), np.concatenate([[0], np.cumsum(counts)])


def script(
    lengths: np.ndarray, bounds: np.ndarray, sequence_length: int, short_fraction: float, stream: RandomStream
) -> list[tuple[list[int], list[int], bool]]:
    """create_instances_from_document of BERT's create_pretraining_data.py, sentence by sentence and token by token.

    It differs from the original where plan_pairs says it does, and takes its decisions from the same random numbers;
    those of the truncation come from elsewhere. A token is its number in the window.
    """
    ends = np.cumsum(lengths)
    sentences = [list(range(end - length, end)) for length, end in zip(lengths.tolist(), ends.tolist(), strict=True)]
    documents = [sentences[first:last] for first, last in pairwise(bounds.tolist())]
    draw, coin_tosses = stream.tuples(6), random.Random(0)
    most = sequence_length - 3
    instances = []
    for document_index, document in enumerate(documents):
        current_chunk: list[list[int]] = []
        current_length, i, numbers = 0, 0, None
        while i < len(document):
            if numbers is None:
                numbers = next(draw)
                target = 2 + int(numbers[1] * (most - 1)) if numbers[0] < short_fraction else most
            current_chunk.append(document[i])
            current_length += len(document[i])
            if i == len(document) - 1 or current_length >= target:
                a_end = 1
                if len(current_chunk) >= 2:
                    a_end = 1 + int(numbers[2] * (len(current_chunk) - 1))
                tokens_a = [token for sentence in current_chunk[:a_end] for token in sentence]
                tokens_b: list[int] = []
                is_random_next = False
                if len(current_chunk) == 1 or numbers[3] < 0.5:
                    is_random_next = True
                    target_b_length = target - len(tokens_a)
                    others = [index for index in range(len(documents)) if index != document_index]
                    random_document = documents[others[int(numbers[4] * len(others))]]
                    random_start = int(numbers[5] * len(random_document))
                    for j in range(random_start, len(random_document)):
                        tokens_b.extend(random_document[j])
                        if len(tokens_b) >= target_b_length:
                            break
                    i -= len(current_chunk) - a_end
                else:
                    for sentence in current_chunk[a_end:]:
                        tokens_b.extend(sentence)
                while len(tokens_a) + len(tokens_b) > most:
                    longer = tokens_a if len(tokens_a) > len(tokens_b) else tokens_b
                    if coin_tosses.random() < 0.5:
                        del longer[0]
                    else:
                        longer.pop()
                instances.append((tokens_a, tokens_b, is_random_next))
                current_chunk, current_length, numbers = [], 0, None
            i += 1
    return instances


def segments(examples: Examples) -> list[tuple[list[int], list[int]]]:
    columns = examples.first_start, examples.first_length, examples.second_start, examples.second_length
    return [
        (list(range(a, a + m)), list(range(b, b + n)))
        for a, m, b, n in zip(*(column.tolist() for column in columns), strict=True)
    ]


@pytest.mark.parametrize("sequence_length", [16, 64, 512])
@pytest.mark.parametrize("short_fraction", [0.0, 0.1, 1.0])
def test_pairs_are_those_of_the_script(sequence_length: int, short_fraction: float):
    lengths, bounds = window(30, seed=sequence_length)
    planned = plan_pairs(lengths, bounds, sequence_length - 3, short_fraction, RandomStream(1))
    expected = script(lengths, bounds, sequence_length, short_fraction, RandomStream(1))
    assert planned.label.tolist() == [is_random for *_, is_random in expected]
    most = sequence_length - 3
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for (first, second), (tokens_a, tokens_b, _), cut in zip(
        segments(planned), expected, planned.truncated.tolist(), strict=True
    ):
        assert (len(first), len(second)) == (len(tokens_a), len(tokens_b))
        assert min(len(first), len(second)) >= 1
        assert len(first) + len(second) <= most
        if not cut:
            assert (first, second) == (tokens_a, tokens_b)
        else:
            # Cut at other ends than the script's, since those coins are others, but out of the same sentences.
            assert len(first) + len(second) == most
            for mine, theirs in ((first, tokens_a), (second, tokens_b)):
                assert abs(mine[0] - theirs[0]) <= cut
    assert set(planned.first_start[planned.truncated == 0]) <= set(starts.tolist())


def test_every_sentence_is_used_once_where_nothing_is_truncated():
    lengths, bounds = window(40, seed=2, sentences=30)
    planned = plan_pairs(lengths, bounds, 2045, 0.0, RandomStream(2))
    assert not planned.truncated.any()
    used = np.zeros(lengths.sum(), np.int64)
    for (first, second), is_random in zip(segments(planned), planned.label, strict=True):
        used[first] += 1
        used[second] += not is_random
    assert (used == 1).all()


def test_truncated_tokens_are_all_that_is_missing():
    lengths, bounds = window(40, seed=3)
    planned = plan_pairs(lengths, bounds, 61, 0.1, RandomStream(3))
    used = np.zeros(lengths.sum(), np.int64)
    for (first, second), is_random in zip(segments(planned), planned.label, strict=True):
        used[first] += 1
        used[second] += not is_random
    assert used.max() == 1
    real = planned.truncated[~planned.label].sum()
    assert real <= (used == 0).sum() <= planned.truncated.sum()


def test_random_segments_are_from_another_document_and_the_others_follow():
    lengths, bounds = window(50, seed=4)
    planned = plan_pairs(lengths, bounds, 125, 0.1, RandomStream(4))
    token_document = np.repeat(np.arange(50), np.add.reduceat(lengths, bounds[:-1]))
    first, second = token_document[planned.first_start], token_document[planned.second_start]
    assert (first != second)[planned.label].all()
    assert (first == second)[~planned.label].all()
    untouched = ~planned.label & (planned.truncated == 0)
    np.testing.assert_array_equal(
        planned.second_start[untouched], (planned.first_start + planned.first_length)[untouched]
    )
    np.testing.assert_array_equal(token_document[planned.second_start + planned.second_length - 1], second)


def test_shares():
    lengths, bounds = window(400, seed=5, sentences=400)
    planned = plan_pairs(lengths, bounds, 125, 0.1, RandomStream(5))
    count = len(planned.label)
    assert count > 10_000
    assert abs(planned.label.mean() - 0.5) < 4 * 0.5 / count**0.5 + 0.02  # a document's last sentence is left alone
    assert abs(planned.short.mean() - 0.1) < 4 * (0.09 / count) ** 0.5
    full = planned.tokens[~planned.short & (planned.truncated > 0)]
    assert (full == 125).all()
    # Random targets from 2 up, half of the row on average; the last sentence overshoots by half its length or so.
    assert 125 / 2 < planned.tokens[planned.short].mean() < 125 / 2 + 25


def test_two_documents_are_enough():
    planned = plan_pairs(np.array([5, 5]), np.array([0, 1, 2]), 29, 0.0, RandomStream(0))
    assert segments(planned) == [
        (list(range(5)), list(range(5, 10))),
        (list(range(5, 10)), list(range(5))),
    ]


def test_half_of_a_hundred_thousand_ordered_pairs_are_swapped_and_no_sentence_is_lost():
    lengths, bounds = window(24_000, seed=7, longest=20)
    planned = plan_ordered_pairs(lengths, bounds, 45, 0.1, RandomStream(7))
    pairs = planned.second_length > 0
    assert pairs.sum() > 1e5
    assert abs(planned.label[pairs].mean() - 0.5) < 4 * (0.25 / pairs.sum()) ** 0.5
    assert not planned.label[~pairs].any()
    # A pair is one stretch of whole sentences, cut between two of them, whichever half comes first.
    whole = planned.truncated == 0
    first_end = planned.first_start + planned.first_length
    second_end = planned.second_start + planned.second_length
    follows = np.where(planned.label, second_end == planned.first_start, first_end == planned.second_start)
    assert follows[pairs & whole].all()
    starts = np.concatenate([[0], np.cumsum(lengths)])
    assert np.isin(planned.first_start[whole], starts).all()
    assert np.isin(planned.second_start[whole & pairs], starts).all()
    assert (planned.tokens + planned.truncated).sum() == lengths.sum()
    assert planned.tokens.max() == 45


def test_truncation_tosses_a_coin_for_each_token():
    count, most = 4000, 61
    first, second = np.full(count, 300), np.full(count, 40)
    zero, no = np.zeros(count, np.int64), np.zeros(count, np.bool_)
    cut = _truncated(zero, first, zero, second, no, no, most, RandomStream(6))
    assert set(cut.first_length) == {31}  # 300 down to 40, then by turns, the second first: 30 + 31
    assert set(cut.second_length) == {30}
    removed = 300 - 31
    front = cut.first_start  # binomial(269, 1/2)
    assert abs(front.mean() - removed / 2) < 4 * (removed / 4 / count) ** 0.5
    assert abs(front.var() / (removed / 4) - 1) < 0.15
    assert front.min() >= 0
    assert (front + cut.first_length).max() <= 300
    assert set(cut.truncated) == {340 - most}


def test_singles_lose_nothing():
    lengths, bounds = window(40, seed=7, longest=60)
    lengths[[3, 100]] = [500, 126]
    planned = plan_singles(lengths, bounds, 62, 0.1, RandomStream(7))
    assert not planned.truncated.any()
    assert planned.tokens.max() == 62
    assert (planned.first_length >= 1).all()
    np.testing.assert_array_equal(planned.first_start[1:], (planned.first_start + planned.first_length)[:-1])
    assert planned.first_start[0] == 0
    assert planned.first_length.sum() == lengths.sum()
    ends = np.cumsum(lengths)
    at_end = np.isin(planned.first_start + planned.first_length, ends)
    long = np.isin(np.searchsorted(ends, planned.first_start, side="right"), np.flatnonzero(lengths > 62))
    assert (at_end | long).all(), "only a sentence longer than a row is split"
    document_ends = ends[bounds[1:] - 1]
    crossing = np.searchsorted(document_ends, planned.first_start, side="right") != np.searchsorted(
        document_ends, planned.first_start + planned.first_length - 1, side="right"
    )
    assert not crossing.any()


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 16])
def test_packing_splits_nothing_and_loses_nothing(most: int):
    lengths = np.random.default_rng(most).integers(5, 129, 3000)
    rows, count = pack(lengths, 128, most)
    assert len(rows) == 3000
    assert set(rows) == set(range(count))
    assert np.bincount(rows, lengths).max() <= 128
    assert np.bincount(rows).max() <= most


def test_packing_is_tight():
    lengths = np.random.default_rng(0).integers(5, 129, 3000)
    _, count = pack(lengths, 128, 16)
    assert lengths.sum() / (count * 128) > 0.98
    _, count = pack(np.array([128, 64, 64, 100, 28, 60, 40, 28]), 128, 16)
    assert count == 4


def test_one_example_a_row_if_no_two_fit():
    rows, count = pack(np.full(10, 65), 128, 16)
    assert count == 10
    assert sorted(rows) == list(range(10))


# --- random numbers and statistics ------------------------------------------------------------------------------------


def test_random_numbers_never_change():
    """A change here changes the rows of every run: a run could not be resumed."""
    stream = RandomStream(1, 2, 3)
    assert stream.words(2).tolist() == [13279728891206244966, 234311473967787377]
    assert stream.uniforms(2).tolist() == [0.09963616681365695, 0.8874396368723878]
    assert stream.permutation(8).tolist() == [4, 0, 2, 1, 5, 3, 6, 7]
    assert stream.coins(np.array([0, 1, 64, 65, 1000])).tolist() == [0, 1, 30, 27, 482]


def test_coins_are_binomial():
    for tosses in (1, 7, 64, 100):
        heads = RandomStream(tosses).coins(np.full(20_000, tosses))
        assert heads.min() >= 0
        assert heads.max() <= tosses
        assert abs(heads.mean() - tosses / 2) < 5 * (tosses / 4 / 20_000) ** 0.5
        assert abs(heads.var() / (tosses / 4) - 1) < 0.05


def test_statistics_add_up():
    one = Statistics(128, windows=1, rows=3, tokens=300, truncated_tokens=20)
    two = Statistics(128, windows=1, rows=1, tokens=84, truncated_tokens=4)
    both = one + two
    assert (both.windows, both.rows, both.tokens) == (2, 4, 384)
    assert both.packing_efficiency == 0.75
    assert both.truncated_fraction == 24 / 408
    assert "75.0% full" in str(both)
    with pytest.raises(ValueError, match="do not add up"):
        one + Statistics(64)

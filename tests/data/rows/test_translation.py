"""Pairs in packed rows: nothing lost, both sides alike, addressed by number."""

import random
from pathlib import Path

import numpy as np
import pytest

from bestiary.data.corpus.pair_store import PairStore, build_pairs
from bestiary.data.corpus.parallel import Pair
from bestiary.data.corpus.phrases import phrase_pairs
from bestiary.data.errors import DataError
from bestiary.data.rows.translation import TranslationRows, pack_pairs
from bestiary.data.stream import evaluation_batches, training_batches
from bestiary.data.tokenizers.pairs import PairTokenizer, TextForm
from bestiary.data.tokenizers.pairs_training import train_subwords

DRAW = random.Random(0)
WORDS = [a + b for a in ("ba", "ko", "li", "mu") for b in ("n", "rd", "st", "lo")]
PAIRS = [
    Pair(
        " ".join(DRAW.choices(WORDS, k=DRAW.randint(1, 9))), " ".join(DRAW.choices(WORDS, k=DRAW.randint(1, 9))), i + 1
    )
    for i in range(300)
]


@pytest.fixture(scope="module")
def tokenizer() -> PairTokenizer:
    texts = [pair.source for pair in PAIRS] + [pair.target for pair in PAIRS]
    return train_subwords("bpe", lambda: texts, lambda: texts, vocab_size=60, joint=True, form=TextForm())


@pytest.fixture(scope="module")
def store(tokenizer: PairTokenizer, tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    return build_pairs(lambda: PAIRS, tokenizer, tmp_path_factory.mktemp("pairs"), fingerprint="x")


def make_rows(store: PairStore, tokenizer: PairTokenizer, **settings: int | float) -> TranslationRows:
    return TranslationRows(
        store, tokenizer, **({"source_length": 24, "target_length": 32, "start_id": 1, "window_pairs": 80} | settings)
    )


def read_back(batch: dict[str, np.ndarray], tokenizer: PairTokenizer) -> list[tuple[str, str]]:
    """The pairs of a batch, by its segments; checks what the other arrays must be."""
    pairs = []
    for r in range(len(batch["input_ids"])):
        segments, targets = batch["segment_ids"][r], batch["decoder_segment_ids"][r]
        assert set(segments) - {0} == set(targets) - {0}
        for segment in range(1, segments.max() + 1):
            source, target = segments == segment, targets == segment
            ids, labels = batch["input_ids"][r, source], batch["labels"][r, target]
            assert ids[-1] == labels[-1] == tokenizer.target.eos_id
            assert batch["decoder_input_ids"][r, target].tolist() == [1, *labels[:-1]]
            for name, where in (("position_ids", source), ("decoder_position_ids", target)):
                assert batch[name][r, where].tolist() == list(range(where.sum()))
            pairs.append((tokenizer.source.decode(ids), tokenizer.target.decode(labels)))
    assert (batch["label_weights"] == (batch["decoder_segment_ids"] > 0)).all()
    assert (batch["labels"][batch["label_weights"] == 0] == tokenizer.target.pad_id).all()
    return pairs


def test_every_pair_is_in_an_epoch_once(store: PairStore, tokenizer: PairTokenizer):
    rows = make_rows(store, tokenizer)
    statistics = rows.statistics()
    longest = [pair for pair in PAIRS if len(tokenizer.source.encode([pair.source])[0]) >= 24]
    found = [pair for batch in evaluation_batches(rows, batch_rows=7) for pair in read_back(batch, tokenizer)]
    kept = sorted((pair.source, pair.target) for pair in PAIRS if pair not in longest)
    assert statistics.too_long == len(PAIRS) - len(found)
    assert sorted(found) == [pair for pair in kept if len(tokenizer.target.encode([pair[1]])[0]) < 32]
    assert rows.windows_in_epoch(0) > 1
    assert statistics.target_tokens / (statistics.rows * 32) > 0.7


def test_packing_respects_both_sides():
    random_lengths = np.random.default_rng(0).integers(1, 30, (2, 500))
    rows = pack_pairs(*random_lengths, 30, 40)
    for lengths, capacity in zip(random_lengths, (30, 40), strict=True):
        assert np.bincount(rows, lengths).max() <= capacity
    assert sorted(set(rows)) == list(range(rows.max() + 1))
    lower = max(-(-random_lengths[0].sum() // 30), -(-random_lengths[1].sum() // 40))
    assert rows.max() + 1 < 1.15 * lower


def test_an_epoch_has_an_order_of_its_own(store: PairStore, tokenizer: PairTokenizer):
    rows = make_rows(store, tokenizer)
    first, second = rows.plan(0, 0), rows.plan(1, 0)
    assert first.pairs.tolist() != second.pairs.tolist()
    assert make_rows(store, tokenizer).plan(1, 0).pairs.tolist() == second.pairs.tolist()
    assert make_rows(store, tokenizer, seed=5).plan(1, 0).pairs.tolist() != second.pairs.tolist()


@pytest.mark.parametrize("sampling", [0.0, 0.3])
def test_the_stream_goes_on_from_its_state_and_divides_among_hosts(
    tokenizer: PairTokenizer, tmp_path: Path, sampling: float
):
    store = build_pairs(lambda: PAIRS, tokenizer, tmp_path, fingerprint="x", as_text=bool(sampling))
    rows = make_rows(store, tokenizer, sampling=sampling, target_length=48, source_length=48)
    stream = training_batches(rows, batch_rows=8)
    seen = [next(stream) for _ in range(30)]
    assert seen[-1]["row_ids"][:, 0].max() >= 1  # into the second epoch
    again = training_batches(
        make_rows(store, tokenizer, sampling=sampling, target_length=48, source_length=48), batch_rows=8
    )
    halves = [training_batches(rows, batch_rows=8, host_index=host, host_count=2, prefetch=0) for host in range(2)]
    for _ in range(12):
        state = (next(again), again.get_state())[1]
    again.set_state(state)
    for expected in seen[12:]:
        found = next(again)
        assert all((found[name] == expected[name]).all() for name in expected)
    for expected in seen[:12]:
        parts = [next(half) for half in halves]
        assert all((np.concatenate([p[name] for p in parts]) == expected[name]).all() for name in expected)
    for iterator in (stream, again):
        iterator.close()


def test_sampled_pieces_say_the_same_text(tokenizer: PairTokenizer, tmp_path: Path):
    store = build_pairs(lambda: PAIRS, tokenizer, tmp_path, fingerprint="x", as_text=True)
    rows = make_rows(store, tokenizer, sampling=0.3, source_length=64, target_length=64)
    found = [pair for batch in evaluation_batches(rows, batch_rows=8) for pair in read_back(batch, tokenizer)]
    assert sorted(found) == sorted((pair.source, pair.target) for pair in PAIRS)
    assert rows.statistics(0).target_tokens != rows.statistics(1).target_tokens


def test_no_pair_fits(store: PairStore, tokenizer: PairTokenizer):
    with pytest.raises(DataError, match="No pair"):
        make_rows(store, tokenizer, source_length=1, target_length=1)


def test_phrases_are_two_languages_and_disjoint():
    train, held_out = phrase_pairs("train", count=2000), phrase_pairs("held-out", count=200)
    assert not {pair.source for pair in train} & {pair.source for pair in held_out}
    assert len({pair.source for pair in train}) == 2000
    assert phrase_pairs("train", count=50) == train[:50]
    text = "\n".join(f"{pair.source} | {pair.target}" for pair in train)
    for sample in ("1st quarter", "1. Quartal", " ago", "vor ", "March", "März", "euros | ", "Kilometer"):
        assert sample in text
    assert not set(text) & {"\u00a0", "\u202f"}  # spaces that nobody types, and SentencePiece does not tell apart
    french = phrase_pairs("train", ("en", "fr"), count=50)
    assert [pair.source for pair in french][:5] != [pair.target for pair in french][:5]
    with pytest.raises(DataError, match="CLDR"):
        phrase_pairs("train", ("en", "xx"), count=5)

"""A store of pairs holds every pair, is built once, goes on after a kill, and is built again where it is damaged."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bestiary.data.corpus import pair_store
from bestiary.data.corpus.pair_store import PairStore, build_pairs, outdated_pairs
from bestiary.data.corpus.parallel import Pair
from bestiary.data.errors import CorpusError
from bestiary.data.progress import Report
from bestiary.data.tokenizers.pairs import PairTokenizer, TextForm
from bestiary.data.tokenizers.pairs_training import train_subwords

PAIRS = [Pair(f"ban lird {'kost ' * (i % 7)}", f"muko {'list ' * (i % 11)}ban", i + 1) for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> PairTokenizer:
    texts = [pair.source for pair in PAIRS] + [pair.target for pair in PAIRS]
    return train_subwords("bpe", lambda: texts, lambda: texts, vocab_size=30, joint=True, form=TextForm())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_store, "_PAIRS_AT_ONCE", 32)


def build(root: Path, tokenizer: PairTokenizer, **options) -> PairStore:
    return build_pairs(lambda: PAIRS, tokenizer, root, fingerprint="x", notes=lambda: ["noted"], **options)


@pytest.mark.usefixtures("small_chunks")
def test_every_pair_is_there(tmp_path: Path, tokenizer: PairTokenizer):
    store = build(tmp_path, tokenizer)
    assert len(store) == store.counts.pairs == 200
    order = np.random.default_rng(0).permutation(200)
    expected = [
        side.encode([getattr(PAIRS[i], name) for i in order])
        for name, side in (("source", tokenizer.source), ("target", tokenizer.target))
    ]
    lengths = store.lengths(order)
    for side, (ids, flat) in enumerate(zip(expected, store.ids(order), strict=True)):
        assert lengths[side].tolist() == [len(tokens) for tokens in ids]
        assert flat.tolist() == [token for tokens in ids for token in tokens]
    counts = store.counts
    assert (counts.source_tokens, counts.target_tokens) == tuple(lengths.sum(axis=1))
    assert (counts.longest_source, counts.longest_target) == tuple(lengths.max(axis=1))
    assert store.notes == ["noted"]


@pytest.mark.usefixtures("small_chunks")
def test_texts_are_kept_where_pieces_are_sampled(tmp_path: Path, tokenizer: PairTokenizer):
    store = build(tmp_path, tokenizer, as_text=True)
    source, target = store.texts(np.arange(200))
    assert source == [tokenizer.form.prepare(pair.source, False) for pair in PAIRS]
    assert target == [tokenizer.form.prepare(pair.target, True) for pair in PAIRS]
    assert store.fingerprint != build(tmp_path, tokenizer).fingerprint


@pytest.mark.parametrize("as_text", [False, True])
def test_tensorflow_datasets_reads_it(tmp_path: Path, tokenizer: PairTokenizer, as_text: bool):
    import tensorflow_datasets as tfds

    store = build(tmp_path, tokenizer, as_text=as_text)
    source = tfds.builder_from_directory(store.folder).as_data_source(split="pairs")
    assert len(source) == 200
    example = source[70]
    if as_text:
        assert example["source"] == tokenizer.form.prepare(PAIRS[70].source, False).encode()
    else:
        np.testing.assert_array_equal(example["target"], tokenizer.target.encode([PAIRS[70].target])[0])


@pytest.mark.usefixtures("small_chunks")
def test_a_build_that_was_broken_off_goes_on(tmp_path: Path, tokenizer: PairTokenizer):
    def broken() -> Iterator[Pair]:
        yield from PAIRS[:150]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_pairs(broken, tokenizer, tmp_path, fingerprint="x")
    assert not list(tmp_path.glob("*/cache.json"))
    reports: list[Report] = []
    store = build(tmp_path, tokenizer, progress=reports.append)
    assert 0.064 <= reports[-1].resumed <= 0.128  # two to four chunks of 32, as far as they were done
    whole = build(tmp_path / "uninterrupted", tokenizer)
    assert store.counts == whole.counts
    for mine, theirs in zip(store.ids(np.arange(200)), whole.ids(np.arange(200)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_it_is_built_once_and_again_where_it_is_damaged(tmp_path: Path, tokenizer: PairTokenizer):
    store = build(tmp_path, tokenizer)
    reports: list[Report] = []
    build(tmp_path, tokenizer, progress=reports.append)
    assert not reports
    (store.folder / "source_lengths.npy").write_bytes(b"")
    again = build(tmp_path, tokenizer, progress=reports.append)
    assert "source_lengths.npy: 0 bytes" in str(reports[-1])
    assert again.counts == store.counts


def test_no_pair_at_all_is_refused(tmp_path: Path, tokenizer: PairTokenizer):
    with pytest.raises(CorpusError, match="contains no pair of sentences"):
        build_pairs(list, tokenizer, tmp_path, fingerprint="x")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_caches_of_an_earlier_version_are_named_once(tmp_path: Path, tokenizer: PairTokenizer):
    assert outdated_pairs(tmp_path / "nowhere") == []
    for name in ("0123456789abcdef", "fedcba9876543210"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pairs.json").write_text("{}")
    assert outdated_pairs(tmp_path) == [tmp_path / "0123456789abcdef", tmp_path / "fedcba9876543210"]
    build(tmp_path, tokenizer)
    assert outdated_pairs(tmp_path) == []

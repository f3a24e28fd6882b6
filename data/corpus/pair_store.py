"""A store of tokenised sentence pairs.

A record is a pair. If segmentations are sampled in each epoch, it contains the prepared texts (UTF-8), otherwise their
ids without special tokens (uint16 or uint32):

    source, target

The index:

    source_lengths.npy, target_lengths.npy  [P] uint32: number of ids, or of bytes of text
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import batched, chain
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorpusError
from ..progress import ProgressCallback, counted
from ..store import HEADER, Store, token_dtype
from ..store_build import Builder, Chunk, Encoded, open_or_build
from ..tokenizers.pairs import PairTokenizer
from .parallel import Pair

_TEXT_VERSION = 1  # increased when readers or tokenizers change their results
_PAIRS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class PairCounts:
    """Statistics of a text. Tokens are those of the pairs that were kept, without special tokens."""

    pairs: int = 0
    source_tokens: int = 0
    target_tokens: int = 0
    unknown_tokens: int = 0
    longest_source: int = 0
    longest_target: int = 0

    def __add__(self, other: PairCounts) -> PairCounts:
        return PairCounts(
            self.pairs + other.pairs,
            self.source_tokens + other.source_tokens,
            self.target_tokens + other.target_tokens,
            self.unknown_tokens + other.unknown_tokens,
            max(self.longest_source, other.longest_source),
            max(self.longest_target, other.longest_target),
        )


class PairStore(Store):
    """An open store of pairs, see `build_pairs`."""

    kind = "pairs"
    index = ("source_lengths", "target_lengths")

    source_lengths: np.ndarray
    target_lengths: np.ndarray

    @cached_property
    def counts(self) -> PairCounts:
        """Statistics of the contents."""
        return PairCounts(**self.header.counts)

    @property
    def as_text(self) -> bool:
        """Whether it contains texts instead of ids."""
        return self.header.made_from["as_text"]

    @property
    def notes(self) -> list[str]:
        """Remarks on the text, for the user."""
        return self.header.made_from["notes"]

    def __len__(self) -> int:
        return len(self.source_lengths)

    def lengths(self, pairs: np.ndarray) -> np.ndarray:
        """Return [2, n] int64, the number of ids, or of bytes of text, of each pair's source and target."""
        return np.stack([self.source_lengths[pairs], self.target_lengths[pairs]]).astype(np.int64)

    def ids(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of these pairs' sources, concatenated, and of their targets."""
        source, target = self._sides(pairs)
        dtype = np.dtype(self.header.made_from["dtype"])
        return np.frombuffer(b"".join(source), dtype), np.frombuffer(b"".join(target), dtype)

    def texts(self, pairs: np.ndarray) -> tuple[list[str], list[str]]:
        """Return the prepared sources and targets of these pairs; only for a store of texts."""
        source, target = self._sides(pairs)
        return [text.decode() for text in source], [text.decode() for text in target]

    def _sides(self, pairs: np.ndarray) -> tuple[list[bytes], list[bytes]]:
        records = list(self.read(pairs, "source", "target"))
        return [source for source, _ in records], [target for _, target in records]


def outdated_pairs(root: Path) -> list[Path]:
    """Return the stores of an earlier version in `root`, which are no longer read.

    Empty if `root` already has a store of this version, so that they are named only once.
    """
    if any(root.glob(f"*/{HEADER}")):
        return []
    return sorted(path.parent for path in root.glob("*/pairs.json"))


def build_pairs(
    text: Callable[[], Iterable[Pair]],
    tokenizer: PairTokenizer,
    root: str | Path,
    *,
    fingerprint: str,
    as_text: bool = False,
    notes: Callable[[], list[str]] = list,
    progress: ProgressCallback | None = None,
) -> PairStore:
    """Tokenise pairs into a store in `root`, or open it if it exists; see `open_or_build`.

    Args:
        text: returns the pairs, the same ones each time.
        tokenizer: tokenizer of both sides.
        root: folder of stores.
        fingerprint: fingerprint of the text.
        as_text: store prepared texts, for sampling segmentations in each epoch.
        notes: called after reading; returns remarks on the text, which are stored with the pairs.
        progress: called at most once a second with the progress.

    Raises:
        DataError: reading failed, there is no pair, or the disk is full; finished work is kept.
    """
    dtype = token_dtype(max(tokenizer.source.size, tokenizer.target.size))

    def chunks() -> Iterator[Chunk]:
        read = 0
        for number, some in enumerate(batched(text(), _PAIRS_AT_ONCE)):
            first, read = read, read + len(some)
            yield Chunk(number, first, some, read / 1000)

    def finish(counts: PairCounts) -> tuple[PairCounts, dict[str, Any]]:
        if not counts.pairs:
            raise CorpusError("The parallel text contains no pair of sentences.")
        made_from = {
            "text_fingerprint": fingerprint,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "as_text": as_text,
            "dtype": dtype.name,
            "notes": notes(),
        }
        return counts, made_from

    builder = Builder(
        store=PairStore,
        features=dict.fromkeys(("source", "target"), str if as_text else dtype),
        chunks=chunks,
        encode=_Encoder(tokenizer, as_text, dtype),
        counts=PairCounts,
        finish=finish,
        unit="thousand pairs",
    )
    made_of = f"{_TEXT_VERSION} {fingerprint} {tokenizer.fingerprint} {as_text}"
    key = hashlib.sha256(made_of.encode()).hexdigest()[:32]
    return open_or_build(builder, Path(root), key, processes=1, progress=progress)


@dataclass(frozen=True)
class _Encoder:
    """Tokenise both sides."""

    tokenizer: PairTokenizer
    as_text: bool
    dtype: np.dtype

    def __call__(self, items: Sequence[Pair], first: int) -> Encoded:
        sides, lengths, counts = [], [], []
        for target, side in enumerate((self.tokenizer.source, self.tokenizer.target)):
            texts = [
                self.tokenizer.form.prepare(pair.target if target else pair.source, bool(target)) for pair in items
            ]
            ids = side.encode(texts)
            sizes = np.array([len(tokens) for tokens in ids], np.int64)
            flat = np.fromiter(chain.from_iterable(ids), self.dtype, int(sizes.sum()))
            counts.append((len(flat), int((flat == side.unk_id).sum()), int(sizes.max())))
            if self.as_text:
                contents = [text.encode() for text in texts]
            else:
                ends = np.cumsum(sizes).tolist()
                contents = [flat[end - size : end].tobytes() for end, size in zip(ends, sizes.tolist(), strict=True)]
            sides.append(contents)
            lengths.append(np.array([len(content) for content in contents] if self.as_text else sizes, np.uint32))
        (source_tokens, unknown_source, longest_source), (target_tokens, unknown_target, longest_target) = counts
        return Encoded(
            ({"source": source, "target": target} for source, target in zip(*sides, strict=True)),
            {"source_lengths": lengths[0], "target_lengths": lengths[1]},
            PairCounts(
                len(items),
                source_tokens,
                target_tokens,
                unknown_source + unknown_target,
                longest_source,
                longest_target,
            ),
        )


def describe_pairs(store: PairStore, name: str) -> list[str]:
    """Describe a text that was read."""
    counts: Any = store.counts
    return [
        f"{name}: {counted(counts.pairs, 'pair')}, {counts.source_tokens:,} source and "
        f"{counts.target_tokens:,} target tokens, {counts.unknown_tokens:,} of them unknown; the longest "
        f"{counts.longest_source} and {counts.longest_target}",
        *(f"{name}: {note}" for note in store.notes),
    ]

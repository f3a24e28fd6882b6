"""`bestiary words train`: word2vec on a corpus, to a file of vectors.

    bestiary words train --corpus books/ --kind skipgram --out vectors.txt

The corpus is read once, to numbers of words, and kept in memory: four bytes a word. A run that was stopped or killed
goes on, when the same command is given again, from what it has saved every minute; its vectors are those of an
uninterrupted one.
"""

import json
import math
import re
import signal
import time
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...data import Corpus
from ...data.files import check_output
from ...data.progress import counted
from ...data.vectors import WordVectors, write_vectors
from ...models.words.word2vec import (
    Stream,
    Word2VecConfig,
    drawn_against,
    keep_probabilities,
    new_tables,
    updates,
)
from ..errors import RunError
from ..loop import RESTART, Stop
from ..progress import Progress, Work
from .config import WordsConfig
from .unfinished import Place, Unfinished

LETTERS = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
UNKNOWN = "<unk>"
"""What stands for a rare word in WikiText."""
BATCHES = 64
"""Batches that are computed before the host looks again."""


class Words(NamedTuple):
    """A corpus as numbers of words, without the rare ones."""

    words: list[str]  # by their frequency
    counts: np.ndarray  # [V] int64
    ids: np.ndarray  # [T] int32
    sentences: np.ndarray  # [T] int32, number of each word's sentence


def read_words(config: WordsConfig, progress: Progress) -> Words:
    """Read the corpus.

    Raises:
        RunError: no word is frequent enough.
    """
    corpus = Corpus(config.corpus, encoding=config.encoding, text_field=config.text_field)
    numbers: dict[str, int] = {}
    ids, lengths = array("i"), array("i")
    for document in corpus:
        for paragraph in document.paragraphs():
            text = paragraph.replace(UNKNOWN, " ")
            text = text.lower() if config.lowercase else text
            found = LETTERS.findall(text) if config.split == "letters" else text.split()
            ids.extend([numbers.setdefault(word, len(numbers)) for word in found])
            lengths.append(len(found))
        progress.update(f"reading: {len(ids):,} words")
    every = np.frombuffer(ids, np.int32) if ids else np.zeros(0, np.int32)
    counts = np.bincount(every, minlength=len(numbers))
    order = np.lexsort((np.arange(len(counts)), -counts))
    order = order[counts[order] >= config.min_count]
    if len(order) < 2:
        raise RunError(
            f"--min-count {config.min_count}: of {counted(len(numbers), 'word')}, {len(order)} occur that often. Give "
            "more text, or a lower --min-count."
        )
    place = np.full(len(counts), -1, np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    names = list(numbers)
    sentences = np.repeat(np.arange(len(lengths), dtype=np.int32), np.frombuffer(lengths, np.int32))
    kept = place[every]
    frequent = kept >= 0
    return Words([names[number] for number in order], counts[order], kept[frequent], sentences[frequent])


def batches(
    config: WordsConfig, words: Words, epoch: int, keep: np.ndarray, first: int
) -> Iterator[tuple[Stream, np.ndarray, int]]:
    """Yield what is left of an epoch's text, `BATCHES` batches at a time, with the words before each and up to the end.

    The `first` groups of batches are left out.

    Raises:
        RunError: too few words are left.
    """
    draw = np.random.default_rng((config.seed, epoch)).random(len(words.ids), np.float32)
    left = np.flatnonzero(draw < keep[words.ids])
    if len(left) < 2:
        raise RunError(
            f"--sample {config.sample}: it leaves {counted(len(left), 'word')} of the text. Give a higher one."
        )
    edge, size = config.window, config.batch_words
    block = size * BATCHES
    padded = -(-len(left) // block) * block
    ids = np.zeros(padded + 2 * edge, np.int32)
    sentences = np.full(padded + 2 * edge, -1, np.int32)
    ids[edge : edge + len(left)], sentences[edge : edge + len(left)] = words.ids[left], words.sentences[left]
    rows = np.arange(BATCHES)[:, None] * size + np.arange(size + 2 * edge)[None]
    for start in range(first * block, padded, block):
        last = min(start + block, len(left)) - 1
        before = left[np.minimum(start + size * np.arange(BATCHES), len(left) - 1)]
        stream = Stream(jnp.asarray(ids[start + rows]), jnp.asarray(sentences[start + rows]))
        yield stream, before, int(left[last]) + 1


def added(place: Place, waiting: Iterable[tuple[jax.Array, jax.Array]]) -> Place:
    """Return the place with the sums of further groups of batches."""
    for loss, pairs in jax.device_get(list(waiting)):
        place = place._replace(losses=place.losses + float(loss), pairs=place.pairs + float(pairs))
    return place


def main(config: WordsConfig) -> int:
    """Run `bestiary words train`; return the exit status."""
    check_output(config.out)
    progress = Progress()
    words = read_words(config, progress)
    total = len(words.ids)
    progress.line(f"{total:,} words, {len(words.words):,} different ones that occur at least {config.min_count} times")
    model = Word2VecConfig(config.kind, config.width, config.window, config.negatives, config.cbow_gradient)
    bounds = jnp.asarray(drawn_against(words.counts))
    keep, key = keep_probabilities(words.counts, config.sample), jax.random.key(config.seed)
    unfinished = Unfinished(config, words.words, words.ids, words.sentences)
    found = unfinished.read()
    if found is None:
        tables, place = new_tables(model, len(words.words), config.seed), Place()
    else:
        tables, place = found
        progress.line(f"resuming in epoch {place.epoch + 1}, after {place.groups * BATCHES:,} batches")
    resumed, loss = place.words, float("nan")
    started, work = time.monotonic(), Work(progress, config.kind, total * config.epochs - resumed, "words")
    with Stop() as stop:
        stop.preparing = False
        for epoch in range(place.epoch, config.epochs):
            waiting: list[tuple[jax.Array, jax.Array]] = []
            for streams, before, until in batches(config, words, epoch, keep, place.groups):
                share = 1 - (epoch * total + before) / (total * config.epochs)
                rates = (config.rate * np.maximum(share, 1e-4)).astype(np.float32)
                own_key = jax.random.fold_in(key, place.number)
                tables, *sums = updates(model, tables, streams, bounds, rates, own_key)
                waiting.append((sums[0], sums[1]))
                place = place._replace(groups=place.groups + 1, number=place.number + 1, words=epoch * total + until)
                asked = stop.requested
                if place.number % 8 and not asked:
                    continue
                place, waiting = added(place, waiting), []
                work.update(place.words - resumed)
                if asked or unfinished.due():
                    unfinished.save(tables, place)
                if asked:
                    progress.line(f"stopped and saved in {unfinished.path}; give the same command again to resume")
                    return RESTART if stop.signal == signal.SIGTERM else 128 + signal.SIGINT
            place = added(place, waiting)
            loss = place.losses / max(place.pairs, 1.0)
            progress.line(f"epoch {epoch + 1} of {config.epochs}: loss {loss:.4f} a pair")
            if not loss < 2 * (1 + config.negatives) * math.log(2):  # twice that of vectors of zeros
                raise RunError(
                    f"The loss is {loss:.3g} and diverges: frequent words get too many updates at a time. Give fewer "
                    f"--batch-words than {config.batch_words}, or a lower --learning-rate than {config.rate}."
                )
            place = Place(epoch + 1, 0, place.number, place.words)
    seconds = time.monotonic() - started
    inputs = jax.device_get(tables.inputs)
    write_vectors(config.out, WordVectors(words.words, inputs))
    unfinished.remove()
    rate = (total * config.epochs - resumed) / seconds
    progress.line(f"{config.out}: {len(words.words):,} vectors of {config.width}; {rate:,.0f} words/s")
    figures = {"words": len(words.words), "text": total, "loss": loss, "seconds": seconds, "words_per_second": rate}
    print(json.dumps(figures))
    return 0

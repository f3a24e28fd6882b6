"""Span corruption and denoising: the original's noise for the same random numbers, its statistics, and runs."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bestiary import models
from bestiary.data import Corpus, train_tokenizer
from bestiary.models.encoder_decoders.bart import FAMILY as BART
from bestiary.models.encoder_decoders.t5 import T5, T5Config
from bestiary.models.registry import init_params
from bestiary.train.cli import main
from bestiary.train.config import OptimConfig
from bestiary.train.optim.schedule import schedule
from bestiary.train.pretrain.denoising.infilling import Infilling, draw_spans
from bestiary.train.pretrain.denoising.span_corruption import (
    SpanCorruption,
    noise_mask,
    parts,
    raw_length,
    sizes,
)

KEY = jax.random.key(3)
RATE = 0.15

# --- span corruption --------------------------------------------------------------------------------------------------


def noise_mask_by_the_original(length: int, noise: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """random_spans_noise_mask of t5/data/preprocessors.py, whose shuffles are those of the given numbers."""

    def segmentation(items: int, count: int, numbers: np.ndarray) -> np.ndarray:
        first = (np.arange(items - 1) < count - 1)[np.argsort(np.argsort(numbers[: items - 1]))]
        return np.bincount(np.cumsum(np.pad(first, (1, 0))), minlength=count)

    noise_tokens = min(max(int(np.round(np.float32(length) * RATE)), 1), length - 1)
    spans = max(int(np.round(noise_tokens / 3.0)), 1)
    lengths = np.stack(
        [segmentation(length - noise_tokens, spans, kept), segmentation(noise_tokens, spans, noise)], axis=1
    ).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def test_rows_of_512_have_568_tokens_and_targets_of_114() -> None:
    assert raw_length(512, RATE) == 568
    assert sizes(568, RATE) == (85, 28, 512, 114)
    for source in range(8, 700):
        length = raw_length(source, RATE)
        assert sizes(length, RATE).source <= source < sizes(length + 1, RATE).source


def test_the_noise_is_the_originals_for_the_same_random_numbers() -> None:
    mask = jax.jit(jax.vmap(partial(noise_mask, rate=RATE)))
    numbers = jax.random.uniform(KEY, (2, 60, 568))
    lengths = np.r_[568, 567, 2, 3, 4, np.random.default_rng(0).integers(5, 568, 55)]
    found = np.asarray(mask(numbers[0], numbers[1], jnp.asarray(lengths, jnp.int32)))
    for row, length, noise, kept in zip(found, lengths, *np.asarray(numbers), strict=True):
        assert (row[:length] == noise_mask_by_the_original(length, noise, kept)).all()
        assert not row[length:].any()


def test_every_division_into_parts_is_as_likely() -> None:
    count = 100_000
    divide = jax.jit(jax.vmap(lambda uniforms: parts(uniforms, jnp.int32(6), jnp.int32(3))))
    found = Counter(map(tuple, np.asarray(divide(jax.random.uniform(KEY, (count, 8)))).tolist()))
    assert len(found) == math.comb(5, 2)
    assert all(sum(sizes) == 6 and min(sizes[:3]) > 0 and sizes[3:] == (0,) * 5 for sizes in found)
    spread = math.sqrt(count * 0.1 * 0.9)
    assert all(abs(number - count / 10) < 4.5 * spread for number in found.values())


@dataclass(frozen=True)
class Words:
    """A vocabulary of which nothing is read but the special tokens."""

    special_ids: dict[str, int]


def corrupt(ids: np.ndarray, lengths: list[int]) -> dict[str, np.ndarray]:
    sentinels = np.arange(199, 99, -1, dtype=np.int32)
    objective = SpanCorruption(Words({"eos": 1, "pad": 0}), 0.0, 0, RATE, sentinels)  # type: ignore[arg-type]
    segments = (np.arange(ids.shape[1])[None] < np.array(lengths)[:, None]).astype(np.int32)
    row_ids = np.stack([np.zeros(len(ids)), np.arange(len(ids))], 1).astype(np.uint32)
    return jax.device_get(jax.jit(objective.corrupt)(KEY, dict(input_ids=ids, segment_ids=segments, row_ids=row_ids)))


def test_both_sides_together_are_the_text() -> None:
    ids = np.random.default_rng(0).integers(2, 100, (64, 568)).astype(np.int32)
    lengths = [568] * 60 + [40, 2, 1, 0]
    batch = corrupt(ids, lengths)
    assert batch["input_ids"].shape == (64, 512)
    assert batch["labels"].shape == (64, 114)
    assert (batch["segment_ids"][:60] == 1).all()
    assert (batch["label_weights"][:60] == 1).all()
    for row, length in enumerate(lengths):
        source = batch["input_ids"][row][batch["segment_ids"][row] > 0].tolist()
        target = batch["labels"][row][batch["label_weights"][row] > 0].tolist()
        start = batch["decoder_input_ids"][row][batch["decoder_segment_ids"][row] > 0].tolist()
        if length < 2:
            assert target == []
            continue
        assert source[-1] == target[-1] == 1
        assert start == [0, *target[:-1]]
        assert source[0] < 100 <= source[-2]  # it starts with what is kept and ends in noise
        sentinels = [token for token in source if token >= 100]
        assert sentinels == [token for token in target if token >= 100] == list(range(199, 199 - len(sentinels), -1))
        spans = {}
        for token in target[:-1]:
            if token >= 100:
                spans[token] = []
            else:
                spans[sentinels[len(spans) - 1]].append(token)
        whole = [t for token in source[:-1] for t in (spans[token] if token >= 100 else [token])]
        assert whole == ids[row, :length].tolist()
    assert (batch["input_ids"][0] != batch["input_ids"][1]).any()
    one = corrupt(ids[:1], [568])
    assert (one["input_ids"][0] == batch["input_ids"][0]).all()  # of its row number alone


# --- denoising --------------------------------------------------------------------------------------------------------

MASK, STOP, FIRST, CONTINUES = 4, 5, 6, 120
NOISE = Infilling(
    0.3, MASK, np.arange(200) < 5, np.arange(200) >= CONTINUES, np.arange(200) == STOP
)  # fmt: skip


def test_lengths_of_spans() -> None:
    """P(no words) = exp(-3), and the words of all spans are exactly the budget."""
    rows, budget = 100_000, 20
    spans = jax.jit(jax.vmap(lambda u: draw_spans(u, jnp.int32(budget))))(jax.random.uniform(KEY, (rows, 2 * budget)))
    lengths, inserted = map(np.asarray, spans)
    assert (lengths.sum(axis=1) == budget).all()
    first = np.asarray(jax.jit(jax.vmap(lambda u: draw_spans(u, jnp.int32(1000)).lengths[0]))(
        jax.random.uniform(jax.random.key(9), (rows, 1))
    ))  # fmt: skip
    expected = [math.exp(-3) * 3**k / math.factorial(k) for k in range(9)]
    found = np.bincount(first, minlength=9)[:9] / rows
    assert expected[0] == pytest.approx(0.0498, abs=5e-5)
    assert (np.abs(found - expected) < 4.5 * np.sqrt(np.array(expected) / rows)).all()
    spans_drawn = (lengths > 0).sum(axis=1) + inserted
    assert inserted.sum() / spans_drawn.sum() == pytest.approx(0.0498, abs=0.002)


def infill_by_the_original(key: jax.Array, ids: list[int]) -> list[int]:
    """add_whole_word_mask of fairseq's denoising_dataset.py, with the random numbers of `Infilling.infill`."""
    start_key, length_key, fate_key, token_key, insert_key = jax.random.split(key, 5)
    count = len(ids)
    word_start = [FIRST - 1 <= token < CONTINUES for token in ids]
    for i in range(count):
        word_start[i] = word_start[i] or (ids[i] >= CONTINUES and ids[i - 1] < 5)
    starts = [i for i in range(1, count - 1) if word_start[i] and ids[i] >= 5]
    budget = math.ceil(round(len(starts) * 0.3, 6))
    edges = np.cumsum([math.exp(-3) * 3**k / math.factorial(k) for k in range(24)]).astype(np.float32)
    lengths, inserts = [], 0
    for number in np.asarray(jax.random.uniform(length_key, (2 * count,))):
        if sum(lengths) >= budget:
            break
        length = int(np.searchsorted(edges, number, side="right"))
        if length:
            lengths.append(min(length, budget - sum(lengths)))
        else:
            inserts += 1
    priority = np.asarray(jax.random.uniform(start_key, (count,)))
    chosen = sorted(starts, key=lambda i: priority[i])[: len(lengths)]
    fate = np.asarray(jax.random.uniform(fate_key, (count,))) < 0.1
    drawn = np.arange(5, 200)[np.asarray(jax.random.randint(token_key, (2, count), 0, 195))]
    new, keep = list(ids), [True] * count
    for start in chosen:
        new[start] = int(drawn[0, start]) if fate[start] else MASK
    for start, length in zip(chosen, lengths, strict=True):
        left, i = length - 1, start + 1
        while True:
            if i == count - 1 or ids[i] < 5:
                break
            left -= word_start[i]
            if left < 0:
                break
            keep[i] = False
            i += 1
    new = [token for token, kept in zip(new, keep, strict=True) if kept]
    inserts = min(inserts, count - len(new))
    total = len(new) + inserts
    numbers = np.asarray(jax.random.uniform(insert_key, (count,)))
    places = sorted(range(1, total - 1), key=lambda i: numbers[i])[:inserts]
    put = {place: int(drawn[1, place]) if i < math.ceil(inserts * 0.1) else MASK for i, place in enumerate(places)}
    rest = iter(new)
    return [put[i] if i in put else next(rest) for i in range(total)]


def texts(rows: int, length: int) -> np.ndarray:
    random = np.random.default_rng(1)
    ids = random.integers(FIRST, 200, (rows, length)).astype(np.int32)
    ids[random.random(ids.shape) < 0.1] = STOP
    ids[:, 0], ids[:, -1] = 2, 3
    ids[::3, length // 2] = 3  # a document ends
    return ids


def test_infilling_is_the_originals_for_the_same_random_numbers() -> None:
    ids, keys = texts(60, 40), jax.random.split(KEY, 60)
    found, lengths = jax.jit(jax.vmap(lambda key, row: NOISE.infill(key, row, jnp.int32(40))))(keys, ids)
    for key, row, out, length in zip(keys, ids.tolist(), np.asarray(found).tolist(), lengths.tolist(), strict=True):
        assert out[:length] == infill_by_the_original(key, row)


def test_statistics_of_infilling() -> None:
    rows, length = 20_000, 40
    ids = np.random.default_rng(2).integers(FIRST, CONTINUES, (rows, length)).astype(np.int32)  # each a word
    ids[:, 0], ids[:, -1] = 2, 3
    apply = jax.jit(jax.vmap(lambda key, row: NOISE.infill(key, row, jnp.int32(length))))
    found, lengths = map(np.asarray, apply(jax.random.split(KEY, rows), ids))
    used = np.arange(length)[None] < lengths[:, None]
    assert (found[:, 0] == 2).all()
    assert (found[np.arange(rows), lengths - 1] == 3).all()
    masks = (found == MASK) & used
    # Twelve of 38 words in spans of 3 on average, some of which run into another.
    assert 3.0 < masks.sum() / rows < 4.5
    assert 31 < lengths.mean() < 35


def test_sentences_are_permuted() -> None:
    """All orders are as likely; what follows the last stop of several stays, as do the ends."""
    text = [2, 10, 11, STOP, 12, STOP, STOP, 13, 14, 3, 0, 0]
    #          first sentence  second     third, which begins with a stop
    rows = 60_000
    permute = jax.jit(jax.vmap(lambda u: NOISE.permute(u, jnp.array(text, jnp.int32), jnp.int32(10))))
    found = Counter(map(tuple, np.asarray(permute(jax.random.uniform(KEY, (rows, 12)))).tolist()))
    sentences = ((10, 11, STOP), (12, STOP), (STOP, 13, 14))
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    expected = {(2, *(t for i in order for t in sentences[i]), 3, 0, 0) for order in orders}
    assert set(found) == expected
    assert all(abs(number - rows / 6) < 4.5 * math.sqrt(rows / 6) for number in found.values())


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(workshop) -> dict[str, Path]:
    """A tiny model of each family with a tokenizer of its kind."""
    corpus, made = Corpus([str(workshop.folder / "corpus")]), {}
    sides = {"encoder_layers": 1, "decoder_layers": 1, "width": 16}
    for family, kind, like in (("t5", "unigram", "t5"), ("bart", "byte-bpe", "roberta")):
        tokenizer = train_tokenizer(kind, corpus, vocab_size=300, family=like)
        if family == "t5":
            words = T5Config.vocabulary_fields(tokenizer.vocab_size, tokenizer.special_ids)
            model = T5(T5Config(**sides, **words, heads=2, head_size=8, feed_forward=24))
            assert model.config.vocab_size % 128 == 0
        else:
            words = BART.config.vocabulary_fields(tokenizer.vocab_size, tokenizer.special_ids)
            sizes = {f"{side}_{name}": size for side in ("encoder", "decoder")
                     for name, size in (("heads", 2), ("feed_forward", 24))}  # fmt: skip
            model = BART.build("generation", BART.config(**sides, **sizes, **words, positions=64))
        params = nn.unbox(jax.jit(partial(init_params, model))(jax.random.key(0)))
        made[family] = workshop.folder / f"{family}-tiny"
        models.save(made[family], model, params, tokenizer)
    return made


OBJECTIVES = {
    "t5": "span-corruption --optimizer adafactor --schedule t5 --learning-rate 0.01 --warmup 0 --z-loss 1e-4"
    " --shared-dropout",
    "bart": "denoise --learning-rate 1e-2",
}


def pretrain(workshop, folders, family: str, out: Path, *more: str) -> int:
    flags = {
        "corpus": workshop.folder / "corpus", "cache": workshop.folder / "cache", "init_from": folders[family],
        "sequence_length": 32, "batch_tokens": 256, "steps": 12, "log_every": 2, "checkpoint_every": 4,
        "evaluation_rows": 16, "out": out,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return main(["pretrain", *words, "--objective", *OBJECTIVES[family].split(), *more])


@pytest.mark.parametrize("family", OBJECTIVES)
def test_a_run_learns_and_a_resumed_one_is_the_same(workshop, folders, family, tmp_path, capsys) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert pretrain(workshop, folders, family, whole) == 0, capsys.readouterr().err
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    name = {"t5": "spans_loss", "bart": "denoise_loss"}[family]
    losses = [record[name] for record in records if name in record]
    assert losses[-1] < losses[0]
    assert ("nll" in records[0]) == (family == "t5")
    if family == "t5":
        assert records[0]["learning_rate"] == pytest.approx(0.01)
        assert 0 < records[0][name] - records[0]["nll"] < 0.02
    assert pretrain(workshop, folders, family, stopped, "--resume-from", str(whole / "checkpoints" / "8")) == 0
    found, expected = ((run / "model" / "model.safetensors").read_bytes() for run in (stopped, whole))
    assert found == expected
    assert models.load(whole / "model").tokenizer is not None


def test_what_does_not_fit_is_refused(workshop, folders, tmp_path, capsys) -> None:
    def said(family: str, *more: str) -> str:
        assert pretrain(workshop, folders, family, tmp_path / "no", *more) == 1
        return capsys.readouterr().err

    assert "T5 can learn span-corruption" in said("t5", "--objective", "denoise")
    assert "has rows of its own, blocks of running text" in said("t5", "--rows", "sentences")
    assert "sentinels, but rows of 2304 tokens have" in said(
        "t5", "--sequence-length", "2304", "--batch-tokens", "18432"
    )
    assert "--shared-dropout: BART has no such dropout" in said("bart", "--shared-dropout")
    assert "beyond the model's 64 positions" in said("bart", "--sequence-length", "128", "--batch-tokens", "1024")
    without = workshop.folder / "wordpiece"
    train_tokenizer("wordpiece", Corpus([str(workshop.folder / "corpus")]), vocab_size=200).save(without)
    assert "a tokenizer without sentinels" in said("t5", "--tokenizer", str(without))


def test_the_rate_is_constant_and_then_falls_with_the_root() -> None:
    rate = schedule(OptimConfig(learning_rate=0.01, schedule="t5", warmup=0), [(50_000, None)])
    for step in (0, 5_000, 9_999, 10_000, 39_999):
        assert float(rate(step)) == pytest.approx(1 / math.sqrt(max(step + 1, 10_000)), rel=1e-6)

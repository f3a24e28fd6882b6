"""What each objective asks of a model, over a hundred thousand examples, and runs that go on as if never stopped."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bestiary import models
from bestiary.models.heads.losses import PredictionSums
from bestiary.train.cli import main
from bestiary.train.pretrain.masking import Masking
from bestiary.train.pretrain.objective import Term, total
from bestiary.train.pretrain.rtd import draw_tokens, replace_tokens
from bestiary.train.pretrain.spans import SpanMasking

VOCAB, MASK, FIRST_WORD, FIRST_CONTINUATION = 1000, 4, 5, 600
SPECIAL, CONTINUATION = np.arange(VOCAB) < FIRST_WORD, np.arange(VOCAB) >= FIRST_CONTINUATION
KEY = jax.random.key(5)


def texts(rows: int, length: int, *, first: int = FIRST_WORD, last: int = VOCAB) -> dict[str, np.ndarray]:
    """Rows of one example, [CLS] ... [SEP]."""
    ids = np.random.default_rng(0).integers(first, last, (rows, length)).astype(np.int32)
    ids[:, 0], ids[:, -1] = 2, 3
    row_ids = np.stack([np.zeros(rows), np.arange(rows)], 1).astype(np.uint32)
    return dict(input_ids=ids, segment_ids=np.ones((rows, length), np.int32), row_ids=row_ids)


def run(masking: Masking | SpanMasking, batch: dict[str, np.ndarray]):
    return jax.tree.map(np.asarray, jax.jit(masking.__call__)(KEY, **batch))


# --- n-grams (ALBERT) -------------------------------------------------------------------------------------------------


def test_lengths_of_ngrams():
    """The first n-gram of a row, which no budget cuts: P(n) = 6/11, 3/11, 2/11."""
    rows, length = 100_000, 16
    masking = Masking("ngram", 0.3, MASK, SPECIAL, CONTINUATION)
    batch = texts(rows, length, last=FIRST_CONTINUATION)

    def first_unit(key: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        order_key, length_key = jax.random.split(key)
        special = jnp.asarray(SPECIAL)[ids]
        priority = jax.random.uniform(order_key, (length,))
        chosen, unit = masking._choose_units(priority, length_key, ids, ~special, special, jnp.int32(3))
        mine = chosen & (unit == 0)
        return mine.sum(), jnp.argmax(mine)

    counts, starts = jax.jit(jax.vmap(first_unit))(jax.random.split(KEY, rows), batch["input_ids"])
    counts = np.asarray(counts)[np.asarray(starts) <= length - 4]  # at the end of a text there is no room for three
    found = np.bincount(counts, minlength=4)[1:] / len(counts)
    expected = np.array([6, 3, 2]) / 11
    assert (np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / len(counts))).all()
    assert counts.mean() == pytest.approx(18 / 11, abs=0.015)


# --- spans (SpanBERT) -------------------------------------------------------------------------------------------------

SPANS = SpanMasking(0.15, MASK, SPECIAL, CONTINUATION)


def packed(rows: int) -> dict[str, np.ndarray]:
    """Two examples a row of 128, then padding."""
    batch = texts(rows, 128)
    ids, segments = batch["input_ids"], batch["segment_ids"]
    ids[:, [59, 60, 109]] = 3, 2, 3
    ids[:, 110:], segments[:, 60:110], segments[:, 110:] = 0, 2, 0
    return batch


def spans_by_the_original(ids: list[int], priority: np.ndarray, words: np.ndarray) -> list[bool]:
    """PairWithSpanMaskingScheme.mask of the original, which draws anchors and numbers of words from those given."""
    length, continues = len(ids), [token >= FIRST_CONTINUATION for token in ids]
    mask: set[int] = set()
    budget = math.ceil(length * 0.15)

    def word_end(place: int) -> int:
        place += 1
        while place < length and continues[place]:
            place += 1
        return place

    for anchor in np.argsort(-priority, kind="stable").tolist():
        if len(mask) >= budget:
            break
        if anchor in mask:
            continue
        right = anchor
        while right > 0 and continues[right]:
            right -= 1
        for _ in range(words[anchor]):
            if right >= length:
                break
            left, right = right, word_end(right)
            for place in range(left, right):
                if len(mask) < budget:
                    mask.add(place)
    return [place in mask for place in range(length)]


def test_spans_are_those_of_the_original():
    batch = packed(64)
    masked = run(SPANS, batch)
    for row in range(64):
        key = jax.random.fold_in(jax.random.fold_in(KEY, 0), row)
        order_key, length_key, *_ = jax.random.split(key, 4)
        priority = np.asarray(jax.random.uniform(order_key, (128,)))
        shares = jnp.asarray(0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10), jnp.float32)
        words = 1 + np.asarray(jax.random.choice(length_key, 10, (128,), p=shares))
        chosen = np.zeros(128, bool)
        chosen[masked.masked.positions[row][masked.masked.weights[row] > 0]] = True
        expected = np.zeros(128, bool)
        for text in (slice(1, 59), slice(61, 109)):
            ids = batch["input_ids"][row, text].tolist()
            expected[text] = spans_by_the_original(ids, priority[text], words[text])
        np.testing.assert_array_equal(chosen, expected)


def test_budget_boundaries_and_fates_of_spans():
    rows = 1500  # 159,000 tokens
    batch = packed(rows)
    found = run(SPANS, batch)
    ids, after = batch["input_ids"], found.masked.input_ids
    assert found.masked.positions.shape[1] == SPANS.slots(128)
    counts, fates, targets = set(), [], []
    for row in range(rows):
        used = found.masked.weights[row] > 0
        places = found.masked.positions[row][used]
        np.testing.assert_array_equal(found.masked.labels[row][used], ids[row, places])
        counts.add((int((places < 60).sum()), int((places >= 60).sum())))
        chosen = set(places.tolist())
        by_place = dict(zip(places.tolist(), np.flatnonzero(used).tolist(), strict=True))
        for span in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            left, right = span[0] - 1, span[-1] + 1
            inside = ids[row, left] >= FIRST_WORD and ids[row, right] >= FIRST_WORD
            assert not {left, right} & chosen
            assert ids[row, span[0]] < FIRST_CONTINUATION or ids[row, left] < FIRST_WORD
            for offset, place in enumerate(span.tolist()):
                slot = by_place[place]
                predicted = inside and offset < 15
                targets.append(predicted)
                told = tuple(int(getattr(found, name)[row, slot]) for name in ("left", "right", "offsets"))
                assert found.weights[row, slot] == predicted
                assert told == ((left, right, offset) if predicted else (0, 0, 0))
            hidden, before = after[row, span], ids[row, span]
            fate = "masked" if (hidden == MASK).all() else "kept" if (hidden == before).all() else "random"
            if fate == "random":
                assert np.isin(hidden, ids[row][ids[row] >= FIRST_WORD]).all()
            fates.append(fate)
        assert not found.weights[row][~used].any()
    assert counts == {(math.ceil(0.15 * 58), math.ceil(0.15 * 48))}
    for fate, share in (("masked", 0.8), ("kept", 0.1), ("random", 0.1)):
        assert fates.count(fate) / len(fates) == pytest.approx(share, abs=4 * (share * (1 - share) / len(fates)) ** 0.5)
    assert 0.8 < np.mean(targets) < 1


def test_words_per_span():
    """Geometric with p = 0.2 on 1 to 10: a mean of 3.797 words, where nothing else cuts or merges spans."""
    shares = 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10)
    assert (shares * np.arange(1, 11)).sum() == pytest.approx(3.797, abs=5e-4)
    # A budget of ten tokens in a text of 1,022 words of one token: the number of spans is that of a renewal process.
    rows = 2000
    masking = SpanMasking(9.5 / 1022, MASK, SPECIAL, CONTINUATION)
    batch = texts(rows, 1024, last=FIRST_CONTINUATION)
    found = run(masking, batch).masked
    positions, used = found.positions, found.weights > 0
    assert (used.sum(1) == 10).all()
    spans = (used[:, 1:] & used[:, :-1] & (np.diff(positions) > 1)).sum(1) + 1
    renewals = [0.0]
    for budget in range(1, 11):
        renewals.append(1 + sum(shares[n - 1] * renewals[budget - n] for n in range(1, budget + 1)))
    # Two spans of the row's thousand places meet now and then.
    error = 4 * spans.std() / rows**0.5
    assert renewals[10] * (1 - 3 * 10 / 1022) - error < spans.mean() < renewals[10] + error


# --- replaced tokens (ELECTRA) ----------------------------------------------------------------------------------------


def test_masks_of_electra():
    """19 draws with replacement from 126 tokens: 17.7 different ones, 13.8 % of all; 85 % of them [MASK]."""
    rows = 8000
    batch = texts(rows, 128)
    masked = run(Masking("token", 0.15, MASK, SPECIAL, CONTINUATION, "electra", keep=0.15, random=0.0), batch)
    counts = masked.weights.sum(1)
    different = 126 * (1 - (125 / 126) ** 19)
    assert counts.max() <= 19 == masked.weights.shape[1]
    assert counts.mean() == pytest.approx(different, abs=4 * float(counts.std()) / rows**0.5)
    assert counts.mean() / 128 == pytest.approx(0.138, abs=1e-3)
    used = masked.weights > 0
    hidden = np.take_along_axis(masked.input_ids, masked.positions, 1)[used]
    assert (hidden == MASK).mean() == pytest.approx(0.85, abs=4 * (0.85 * 0.15 / used.sum()) ** 0.5)
    assert ((hidden == MASK) | (hidden == masked.labels[used])).all()
    assert (masked.labels[used] >= FIRST_WORD).all()


def test_drawn_tokens_follow_the_prediction_and_depend_on_their_row_alone():
    rows, slots = 2000, 50
    logits = jnp.broadcast_to(jnp.log(jnp.asarray([0.1, 0.2, 0.3, 0.4])), (rows, slots, 4))
    keys = jax.vmap(jax.random.key_data)(jax.random.split(KEY, rows))
    drawn = np.asarray(draw_tokens(keys, logits))
    found = np.bincount(drawn.ravel(), minlength=4) / drawn.size
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=4 * (0.24 / drawn.size) ** 0.5)
    np.testing.assert_array_equal(draw_tokens(keys[::-1], logits), drawn[::-1])


def test_a_drawn_token_that_is_the_original_one_is_not_replaced():
    batch = dict(
        input_ids=jnp.asarray([[2, MASK, 7, MASK, 3]], jnp.int32),  # the 7 was to be predicted, and left as it was
        mlm_positions=jnp.asarray([[1, 2, 3, 0]], jnp.int32),
        mlm_labels=jnp.asarray([[6, 7, 8, 0]], jnp.int32),
        mlm_weights=jnp.asarray([[1.0, 1.0, 1.0, 0.0]]),
    )
    corrupted, replaced = replace_tokens(batch, jnp.asarray([[6, 9, 10, 11]], jnp.int32))
    assert corrupted.tolist() == [[2, 6, 9, 10, 3]]
    assert replaced.tolist() == [[False, False, True, True, False]]


def test_terms_are_weighted_and_divided():
    sums = {name: PredictionSums(jnp.float32(loss), jnp.float32(0), jnp.float32(0)) for name, loss in
            (("mlm", 6.0), ("sbo", 8.0))}  # fmt: skip
    weights = {"mlm": jnp.float32(3), "sbo": jnp.float32(1)}
    assert total((Term("mlm"), Term("sbo", added=1.0)), sums, weights) == 2 + 4
    assert total((Term("mlm"), Term("sbo", factor=50.0)), sums, weights) == 2 + 400
    assert total((Term("mlm"),), sums, {"mlm": jnp.float32(0)}) == 6  # a batch without a prediction


# --- independent masks (ModernBERT) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.3, 0.15])
def test_independent_masks(rate):
    rows = 1000
    batch = texts(rows, 128)
    masked = run(Masking("token", rate, MASK, SPECIAL, CONTINUATION, "independent"), batch)
    counts = masked.weights.sum(1)
    deviation = (rate * (1 - rate)) ** 0.5
    assert counts.mean() == pytest.approx(rate * 128, abs=4 * deviation * (128 / rows) ** 0.5)
    assert counts.std() == pytest.approx(deviation * 128**0.5, rel=4 / (2 * rows) ** 0.5)  # binomial
    assert counts.max() < masked.weights.shape[1]
    used = masked.weights > 0
    chosen = np.zeros((rows, 128), bool)
    for row in range(rows):
        chosen[row, masked.positions[row][used[row]]] = True
    for place in (0, 127):  # [CLS] and [SEP]
        assert chosen[:, place].mean() == pytest.approx(rate, abs=4 * deviation / rows**0.5)
    hidden, labels = np.take_along_axis(masked.input_ids, masked.positions, 1)[used], masked.labels[used]
    tolerance = 4 * (0.16 / used.sum()) ** 0.5
    assert (hidden == MASK).mean() == pytest.approx(0.8, abs=tolerance)
    assert (hidden == labels).mean() == pytest.approx(0.1, abs=tolerance)


# --- runs -------------------------------------------------------------------------------------------------------------

RUNS = {
    "albert-tiny": (["--masking", "ngram"], "AlbertForPreTraining", ("mlm_loss", "sop_loss", "sop_accuracy")),
    "spanbert-tiny": ([], "SpanBertForPreTraining", ("mlm_loss", "sbo_loss", "sbo_accuracy")),
    "electra-tiny": ([], "ElectraForPreTraining", ("mlm_loss", "rtd_loss", "rtd_accuracy", "replaced")),
    "modernbert-tiny": ([], "ModernBertForMaskedLM", ("mlm_loss", "mlm_accuracy")),
}


@pytest.mark.parametrize("model", RUNS)
def test_a_run_by_its_own_objective_goes_on_from_a_checkpoint_as_if_never_stopped(workshop, model):
    flags, architecture, names = RUNS[model]
    size = "300" if model == "modernbert-tiny" else "120"
    settings = dict(model=model, vocab_size=size, steps="4", log_every="1", evaluate_every="4", checkpoint_every="2")
    out, resumed = workshop.folder / model, workshop.folder / f"{model}-resumed"
    said = workshop.pretrain(out, *flags, **settings)
    assert "nan" not in said
    workshop.pretrain(resumed, *flags, "--resume-from", str(out / "checkpoints" / "2"), **settings)
    folders = ["model", *(["generator"] if model == "electra-tiny" else [])]
    for name in folders:
        found, expected = ((folder / name / "model.safetensors").read_bytes() for folder in (resumed, out))
        assert found == expected
    assert json.loads((out / "model" / "config.json").read_text())["architectures"] == [architecture]
    held_out = json.loads((out / "results.json").read_text())["held_out"]
    assert set(names) <= set(held_out)
    factor = {"electra-tiny": 50}.get(model, 1)
    parts = [held_out["mlm_loss"], *(factor * held_out[f"{part}_loss"] for part in ("sop", "sbo", "rtd")
                                     if f"{part}_loss" in held_out)]  # fmt: skip
    assert held_out["loss"] == pytest.approx(sum(parts))
    if model == "electra-tiny":
        # All tokens are guessed about as badly, so that nearly all that are drawn are replaced.
        assert 0.1 < held_out["replaced"] < 0.14
        discriminator, generator = (models.load(out / name) for name in folders)
        assert (discriminator.config.width, generator.config.width) == (128, 64)
        shared = [loaded.params["encoder"]["embeddings"] for loaded in (discriminator, generator)]
        jax.tree.map(np.testing.assert_array_equal, *shared)
    if model == "albert-tiny":
        assert "swapped" in said


def test_electra_goes_on_from_both_of_its_networks(workshop, tmp_path, capsys):
    """Without --generator, the generator is a new one."""
    run, out = workshop.folder / "electra-tiny", tmp_path / "run"
    if not (run / "generator").is_dir():
        workshop.pretrain(run, model="electra-tiny", vocab_size="120", steps="4", evaluate_every="0")
    settings = dict(model=None, vocab_size=None, steps="1", warmup="0", learning_rate="1e-9", evaluate_every="0",
                    log_every="1")  # fmt: skip
    both = ["--init-from", str(run / "model"), "--generator", str(run / "generator")]
    assert main(workshop.arguments(out, *both, **settings)) == 0
    assert "of the generator" in capsys.readouterr().err
    for name in ("model", "generator"):
        kept, before = (models.load(folder / name).params for folder in (out, run))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kept, before)
    for flags, message in (
        (["--init-from", str(run / "generator")], "a generator (ElectraForMaskedLM). Give the discriminator's folder"),
        (
            ["--init-from", str(run / "model"), "--generator", str(run / "model")],
            "expected a generator (ElectraForM",
        ),
        (["--generator", str(run / "generator")], "--generator goes with --init-from"),
        ([*both, "--objective", "mlm"], "--generator: --objective mlm has no generator"),
    ):
        assert main(workshop.arguments(tmp_path / "refused", *flags, **settings)) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "bert-tiny", "--objective", "mlm+sop"], "--objective mlm+sop: BERT can learn mlm+nsp, mlm."),
        (["--model", "albert-tiny", "--objective", "rtd"], "--objective rtd: ALBERT can learn mlm+sop, mlm."),
        (["--model", "electra-tiny", "--masking", "word"], "--masking word: --objective rtd masks by token."),
        (["--model", "spanbert-tiny", "--masking", "ngram"], "--masking ngram: --objective span+sbo masks by span."),
        (["--model", "electra-tiny", "--generator-size", "1.5"], "--generator-size is 1.5; it must be above 0"),
        (["--model", "bert-tiny", "--generator-size", "0.5"], "--generator-size: --objective mlm+nsp has no generator"),
        (["--model", "electra-tiny", "--rows", "sentences"], "--objective rtd has rows of its own"),
        (["--model", "spanbert-tiny", "--rows", "sentences"], "--objective span+sbo has rows of its own"),
    ],
)
def test_what_does_not_fit_together_is_refused(workshop, tmp_path, capsys, flags, message):
    assert main(workshop.arguments(tmp_path / "run", *flags, model=None)) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""Fine-tuning's batches: which examples, in which rows, in how many shapes."""

import numpy as np
import pytest
import tokenizers

from bestiary.data.batches import (
    TrainingBatches,
    assemble,
    epoch_batches,
    pack_features,
    plan_shapes,
    prediction_batches,
)
from bestiary.data.errors import DataError
from bestiary.data.packing import pack


@pytest.fixture(scope="module")
def features():
    """150 features of 4 to 40 tokens, in units of one, with a label each and a tag a token."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(4, 41, 150)
    ids = [draw.integers(5, 100, n).tolist() for n in lengths]
    return pack_features(
        ids,
        [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths],
        segment_fields={"labels": draw.integers(0, 3, 150).astype(np.int32)},
        token_fields={"tags": [[token * 2 for token in some] for some in ids]},
    )


def test_long_texts_are_cut_as_the_library_cuts_them(tokenizer):
    draw = np.random.default_rng(1)
    words = [tokenizer.tokens[number] for number in range(10, 60)]
    first = [" ".join(draw.choice(words, draw.integers(1, 30))) for _ in range(60)]
    second = [" ".join(draw.choice(words, draw.integers(1, 30))) for _ in range(60)]
    reference = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    reference.enable_truncation(20)
    for pairs in (second, None):
        inputs = first if pairs is None else list(zip(first, pairs, strict=True))
        found = tokenizer.encode(first, pairs, 20)
        expected = reference.encode_batch(inputs)
        assert found.ids == [encoding.ids for encoding in expected]
        assert found.types == [encoding.type_ids for encoding in expected]
        assert max(map(len, found.ids)) == 20
        whole = tokenizer.backend.encode_batch(inputs)
        assert found.truncated == sum(len(encoding.ids) for encoding in whole) - sum(map(len, found.ids))


def test_an_epoch_takes_each_unit_once_and_spreads_the_lengths():
    draw = np.random.default_rng(2)
    lengths = np.exp(draw.normal(3, 0.7, 1003)).astype(int) + 3
    for units, batch in ((1003, 32), (1000, 8), (7, 32), (64, 32), (1, 4)):
        some = lengths[:units]
        found = epoch_batches(some, batch, seed=3, epoch=1)
        assert found.shape == (-(-units // batch), batch)
        assert sorted(found[found >= 0]) == list(range(units))
        sizes = (found >= 0).sum(axis=1)
        assert (sizes[:-1] == batch).all(), "only the last batch may be smaller"
        assert np.array_equal(found, epoch_batches(some, batch, seed=3, epoch=1))
    found = epoch_batches(lengths, 32, 3, 1)
    assert not np.array_equal(found, epoch_batches(lengths, 32, 3, 2))
    assert not np.array_equal(found, epoch_batches(lengths, 32, 4, 1))
    tokens = np.array([lengths[units].sum() for units in found if (units >= 0).all()])
    alike = np.array([lengths[draw.permutation(1003)[:32]].sum() for _ in range(200)])
    assert tokens.std() < alike.std() / 3


def test_neighbours_in_a_batch_are_drawn_anew_in_every_epoch():
    lengths = np.random.default_rng(4).integers(5, 50, 256)
    together = []
    for epoch in range(2):
        batches = epoch_batches(lengths, 16, 0, epoch)
        together.append({frozenset(pair) for units in batches for pair in zip(units, np.roll(units, 1), strict=True)})
    assert len(together[0] & together[1]) < len(together[0]) / 4


def test_rows_hold_what_the_features_say(features):
    units = np.array([3, 140, 7, 21, 60, 61, 62])
    row_of, rows = pack(features.unit_lengths[units], 64, 8)
    placed = assemble(features, units, row_of, range(rows + 1), length=64, slots=8, pad_id=9)
    batch, seen = placed.batch, []
    for row in range(rows + 1):
        used = np.flatnonzero(placed.features[row] >= 0)
        assert used.tolist() == list(range(len(used)))
        at = 0
        for slot in used:
            feature = placed.features[row, slot]
            seen.append(feature)
            span = slice(features.starts[feature], features.starts[feature + 1])
            here = slice(at, at + features.lengths[feature])
            at = here.stop
            assert batch["cls_positions"][row, slot] == here.start
            assert np.array_equal(batch["input_ids"][row, here], features.input_ids[span])
            assert np.array_equal(batch["token_type_ids"][row, here], features.token_type_ids[span])
            assert np.array_equal(batch["tags"][row, here], features.token_fields["tags"][span])
            assert np.array_equal(batch["position_ids"][row, here], np.arange(features.lengths[feature]))
            assert (batch["segment_ids"][row, here] == slot + 1).all()
            assert (batch["feature_ids"][row, here] == feature).all()
            assert batch["labels"][row, slot] == features.segment_fields["labels"][feature]
        assert (batch["segment_ids"][row, at:] == 0).all()
        assert (batch["input_ids"][row, at:] == 9).all()
    assert sorted(seen) == sorted(units)
    assert np.array_equal(batch["segment_weights"], (placed.features >= 0).astype(np.float32))


def test_the_choices_of_a_question_stay_together_and_in_order():
    draw = np.random.default_rng(5)
    ids = [draw.integers(5, 9, n).tolist() for n in draw.integers(3, 12, 4 * 30)]
    features = pack_features(ids, ids, unit_size=4)
    for placed in prediction_batches(features, pad_id=0, positions=512):
        groups = placed.features.reshape(-1, 4)
        groups = groups[groups[:, 0] >= 0]
        assert np.array_equal(groups, groups[:, :1] + np.arange(4))
        assert (groups[:, 0] % 4 == 0).all()


def test_a_run_has_few_shapes_and_little_padding(features):
    shapes = plan_shapes(features.unit_lengths, 1, batch=16, seed=0, epochs=3, positions=512)
    batches = TrainingBatches(features, batch=16, shapes=shapes, seed=0, pad_id=0)
    found = [next(batches) for _ in range(3 * batches.per_epoch)]
    assert {batch["input_ids"].shape for batch in found} <= {(rows, shapes.length) for rows in shapes.rows}
    assert len(shapes.rows) <= 2
    for epoch in range(3):
        part = found[epoch * batches.per_epoch : (epoch + 1) * batches.per_epoch]
        assert sum(int(batch["segment_weights"].sum()) for batch in part) == 150
        sizes = sorted(int(batch["segment_weights"].sum()) for batch in part)
        assert sizes == [6] + [16] * 9
    full = [batch for batch in found if batch["segment_weights"].sum() == 16]
    assert np.mean([(batch["segment_ids"] > 0).mean() for batch in full]) > 0.85


def test_the_number_of_rows_divides_among_devices(features):
    shapes = plan_shapes(features.unit_lengths, 1, batch=16, seed=0, epochs=1, positions=512, divisor=8)
    assert all(rows % 8 == 0 for rows in shapes.rows)
    whole = TrainingBatches(features, batch=16, shapes=shapes, seed=0, pad_id=0)
    parts = [TrainingBatches(features, batch=16, shapes=shapes, seed=0, pad_id=0, index=i, count=4) for i in range(4)]
    for _ in range(3):
        expected, shares = next(whole), [next(part) for part in parts]
        for name, values in expected.items():
            assert np.array_equal(values, np.concatenate([share[name] for share in shares])), name


def test_a_position_that_was_saved_goes_on(features):
    shapes = plan_shapes(features.unit_lengths, 1, batch=16, seed=0, epochs=2, positions=512)

    def start(of=features, **changed):
        return TrainingBatches(of, shapes=shapes, pad_id=0, **{"batch": 16, "seed": 0, **changed})

    first = start()
    for _ in range(13):
        next(first)
    state = first.get_state()
    again = start()
    assert again.set_state(state) is None
    for _ in range(9):
        expected, found = next(first), next(again)
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
    for changed in ({"batch": 8}, {"seed": 1}):
        with pytest.raises(DataError, match="in batches of 16 examples in the order of seed 0"):
            start(**changed).set_state(state)
    other = pack_features([[1, 2, 3]] * 150, [[0, 0, 0]] * 150)
    with pytest.raises(DataError, match="belongs to other data"):
        start(other).set_state(state)
    old = {"features": state["features"], "done": 13}  # of a version that drew dropout by row
    again = start()
    assert "from here on it is drawn by example" in str(again.set_state(old))
    assert again.get_state() == {**old, "dropout": "by example"}, "the order of that version goes on"
    seen = [next(again)["segment_weights"].sum() for _ in range(7)]
    assert sorted(seen) == sorted((epoch_batches(features.unit_lengths, 16, 0, 1, smaller_last=False) >= 0).sum(1)[3:])


@pytest.mark.parametrize("done", [0, 7, 10, 13, 20])
def test_the_position_counts_examples(features, done: int):
    """150 examples are 9 batches of 16 and one of 6."""
    shapes = plan_shapes(features.unit_lengths, 1, batch=16, seed=0, epochs=2, positions=512)
    batches = TrainingBatches(features, batch=16, shapes=shapes, seed=0, pad_id=0)
    seen = sum(int(next(batches)["segment_weights"].sum()) for _ in range(done))
    assert batches.get_state()["examples"] == seen


def test_predictions_need_few_shapes_whatever_the_lengths():
    shapes = set()
    draw = np.random.default_rng(6)
    for count in (1, 3, 100, 1000):
        for longest in (10, 33, 60):
            lengths = draw.integers(3, longest + 1, count)
            features = pack_features([[7] * n for n in lengths], [[0] * n for n in lengths])
            seen = []
            for placed in prediction_batches(features, pad_id=0, positions=512):
                shapes.add(placed.batch["input_ids"].shape)
                seen += placed.features[placed.features >= 0].tolist()
            assert sorted(seen) == list(range(count))
    assert len(shapes) <= 6
    assert {length for _, length in shapes} == {64}


def test_an_example_longer_than_the_model_takes():
    features = pack_features([[1] * 40, [1] * 700], [[0] * 40, [0] * 700])
    for attempt in (
        lambda: plan_shapes(features.unit_lengths, 1, batch=2, seed=0, epochs=1, positions=512),
        lambda: list(prediction_batches(features, pad_id=0, positions=512)),
    ):
        with pytest.raises(DataError, match="An example has 700 tokens, but the model supports at most 512"):
            attempt()

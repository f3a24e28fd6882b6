"""What marks ALBERT: layers that share parameters, and word vectors smaller than the hidden states."""

from typing import Any

import pytest

from bestiary.models.checkpoints.config import ConfigError
from bestiary.models.encoders.albert import FAMILY, AlbertConfig

SIZES: dict[str, Any] = dict(vocab_size=61, width=16, heads=2, feed_forward=24, positions=16, embedding_size=8)


@pytest.mark.parametrize(
    ("layers", "groups", "inner", "sets"),
    [
        (4, 1, 1, (0, 0, 0, 0)),
        (4, 2, 1, (0, 0, 1, 1)),
        (5, 2, 1, (0, 0, 0, 1, 1)),  # as int(i / (5 / 2))
        (3, 3, 1, (0, 1, 2)),
        (6, 1, 2, (0, 1, 0, 1, 0, 1)),
        (8, 2, 2, (0, 1, 0, 1, 2, 3, 2, 3)),
    ],
)
def test_layers_take_the_sets_of_their_group(layers: int, groups: int, inner: int, sets: tuple[int, ...]) -> None:
    config = AlbertConfig(**SIZES, layers=layers, groups=groups, inner=inner)
    assert config.sets == sets
    stored = config.to_json()
    assert (stored["num_hidden_layers"], stored["inner_group_num"]) == (layers // inner, inner)
    assert AlbertConfig.from_json(stored) == config
    names = FAMILY.architectures[0].table(config).names
    stacks = {name.removesuffix(".ffn.weight") for name in names if name.endswith(".ffn.weight")}
    assert stacks == {
        f"encoder.albert_layer_groups.{group}.albert_layers.{number}"
        for group in range(groups)
        for number in range(inner)
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_groups": 4}, "expected 1 to 3 groups of layers, found 4"),
        ({"num_hidden_groups": 0}, "num_hidden_groups in config.json.: expected a number at least 1, found 0"),
        ({"inner_group_num": 0}, "inner_group_num in config.json.: expected a number at least 1, found 0"),
        ({"inner_group_num": "two"}, "inner_group_num: expected"),
        ({"net_structure_type": 1}, "net_structure_type: only 0 is implemented, found 1"),
        ({"layers_to_keep": [0]}, r"layers_to_keep: only \[\] is implemented"),
    ],
)
def test_groups_and_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    stored = AlbertConfig(**SIZES, layers=3).to_json()
    with pytest.raises(ConfigError, match=message):
        AlbertConfig.from_json(stored | changes)

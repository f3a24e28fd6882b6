"""tf.train.Example, the record format of tensorflow-datasets, without TensorFlow.

The serialiser of tensorflow-datasets takes ten times as long, and its generated classes take seconds to import and are
not public. The message is small enough to be defined here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

_DEFINITION = """
name: "bestiary/example.proto" package: "bestiary" syntax: "proto3"
message_type {
  name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES }
}
message_type {
  name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 }
}
message_type {
  name: "Feature"
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".bestiary.BytesList" }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".bestiary.Int64List" }
}
message_type {
  name: "Features"
  field {
    name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".bestiary.Features.FeatureEntry"
  }
  nested_type {
    name: "FeatureEntry"
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".bestiary.Feature" }
    options { map_entry: true }
  }
}
message_type {
  name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".bestiary.Features" }
}
"""


def encode_example(features: Mapping[str, bytes | int]) -> bytes:
    """Encode named byte strings and integers as a record."""
    example = _example()()
    feature = example.features.feature
    for name, value in features.items():
        if isinstance(value, int):
            feature[name].int64_list.value.append(value)
        else:
            feature[name].bytes_list.value.append(value)
    return example.SerializeToString(deterministic=True)


def decode_bytes(record: bytes, *names: str) -> tuple[bytes, ...]:
    """Return the byte strings of these names in a record made by `encode_example`."""
    feature = _example().FromString(record).features.feature
    return tuple(feature[name].bytes_list.value[0] for name in names)


@cache
def _example() -> Any:
    """Return the message class, in its own pool: TensorFlow may define the same one in the default pool."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_DEFINITION, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("bestiary.Example"))

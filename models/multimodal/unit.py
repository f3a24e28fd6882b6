"""UniT: one Transformer for many tasks, of images, of texts and of both.

Hu and Singh 2021, "UniT: Multimodal Multitask Learning with a Unified Transformer", and its released code.

An encoder for each modality reads the task's own vector before its input; the outputs, without that vector's, are
mapped to one width and stand side by side as the memory of one decoder. The decoder's inputs are zeros; what it reads
are the task's query vectors, which are added to the queries and keys of every layer, as positions are to those of the
memory (Carion et al. 2020). A task's head reads the first query's state.

The encoders are any of this package's: a ViT, on a convolutional stem in place of the paper's ResNet, and an encoder of
texts. They have positions of their own, and add them once. The memory's are sines and cosines for texts too, where the
released code maps BERT's learnt ones, since not every encoder has such. A row may lack a modality: what stands there
instead has no effect.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer

from ...data.json_files import fits
from ..checkpoints.config import ConfigError
from ..checkpoints.tables import Entry, Table, linear_entries, norm_entries, same
from ..encoder import StackEncoder
from ..encoders.bert import FAMILY as BERT
from ..family import Architecture, Family, FamilyConfig, Member
from ..images.patches import sines_2d
from ..images.vit import FAMILY as VIT
from ..layers.activations import ACTIVATIONS
from ..layers.dropout import Dropout
from ..layers.linear import Embed, Linear, xavier
from ..layers.norms import LayerNorm
from ..layers.positions import sinusoids
from ..layers.segments import Rows, row_numbers
from ..layers.stack import run_layers
from .query_decoder import DecoderBlock

Reads = Literal["image", "text", "image and text"]
Loss = Literal["softmax", "sigmoid"]
TASK_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
HEAD_EPSILON = 1e-12


class UnitTask(NamedTuple):
    """A task of classes."""

    name: str
    reads: Reads
    labels: tuple[str, ...]  # names of the classes
    queries: int = 25  # number of query vectors
    loss: Loss = "softmax"  # what it is trained by: one class of all, or independent yes-or-no classes
    pairs: bool = False  # whether its texts are pairs

    @property
    def sides(self) -> tuple[str, ...]:
        """The encoders that it needs: "image", "text" or both."""
        return tuple(self.reads.split(" and "))


@dataclass(frozen=True)
class UnitConfig(FamilyConfig):
    """Sizes and settings of a UniT model. The defaults are those of the paper's decoder, shared by all tasks.

    "unit-base" has three of the paper's tasks, and a ViT where the paper has a ResNet.
    """

    MODEL_TYPE: ClassVar[str] = "unit"
    KEYS: ClassVar[Mapping[str, str]] = {
        "width": "d_model",
        "layers": "decoder_layers",
        "heads": "decoder_attention_heads",
        "feed_forward": "decoder_ffn_dim",
        "activation": "activation_function",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "norm_epsilon": "layer_norm_eps",
        "text_length": "max_text_length",
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **FamilyConfig.REQUIRED,
        "activation_function": tuple(ACTIVATIONS),
    }
    WRITTEN_ANEW: ClassVar[tuple[str, ...]] = (*FamilyConfig.WRITTEN_ANEW, "image_config", "text_config", "tasks")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "unit-base": {
            "image": Member(VIT, VIT.config.preset("vit-base")),
            "text": Member(BERT, BERT.config.preset("bert-base")),
            "tasks": (
                UnitTask("vqa2", "image and text", tuple(map(str, range(3129))), loss="sigmoid"),
                UnitTask("snli-ve", "image and text", ("entailment", "neutral", "contradiction")),
                UnitTask("sst2", "text", ("negative", "positive")),
            ),
        }
    }

    width: int = 768
    """size of the decoder's hidden states, E; a multiple of 4"""
    layers: int = 6
    """number of layers of the decoder"""
    heads: int = 12
    """number of attention heads of the decoder; must divide the width"""
    feed_forward: int = 2048
    """inner width of the decoder's feed-forward sub-layers"""
    activation: str = "relu"
    """activation function of the decoder, a name in layers.ACTIVATIONS"""
    dropout: float = 0.1
    """dropout rate of the decoder's sub-layer outputs and of the heads"""
    attention_dropout: float = 0.1
    """dropout rate of the decoder's attention probabilities"""
    norm_epsilon: float = 1e-5
    """epsilon of the decoder's layer normalisation"""
    image: Member | None = None
    """the encoder of images"""
    text: Member | None = None
    """the encoder of texts"""
    text_length: int | None = None
    """maximum length of a text in training, in tokens; None: the encoder's positions"""
    tasks: tuple[UnitTask, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads or self.width % 4 or self.width < 8:
            raise ValueError(
                f"UnitConfig: width {self.width}: expected a multiple of heads {self.heads} and of 4, at least 8"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"UnitConfig: unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")
        for task in self.tasks:
            lacking = [side for side in task.sides if getattr(self, side) is None]
            if lacking:
                raise ValueError(
                    f"UnitConfig: task {task.name} reads {task.reads}, but there is no {lacking[0]} encoder"
                )
            if not TASK_NAME.fullmatch(task.name):
                raise ValueError(f"UnitConfig: task {task.name!r}: expected a name of letters a-z, digits, _ and -")
            if len(task.labels) < 2 or task.queries < 1:
                raise ValueError(f"UnitConfig: task {task.name}: expected two classes and a query, at least")
        if len({task.name for task in self.tasks}) < len(self.tasks):
            raise ValueError("UnitConfig: two tasks have one name")
        for side in ("image", "text"):
            member = getattr(self, side)
            if member is not None and not isinstance(bare_encoder(member).build(member.config), StackEncoder):
                raise ValueError(f"UnitConfig: {member.family.title} is no encoder of one stack of layers")
        positions = None if self.text is None else self.text.config.max_length
        if self.text_length is not None and not 1 <= self.text_length <= (positions or self.text_length):
            raise ValueError(f"UnitConfig: text_length {self.text_length}: expected 1 to the encoder's {positions}")

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the encoder of texts; 0 if there is none."""
        return 0 if self.text is None else self.text.config.vocab_size

    @property
    def max_length(self) -> int | None:
        """Maximum length of a text, in tokens."""
        if self.text is None or self.text_length is not None:
            return self.text_length
        return self.text.config.max_length  # type: ignore[no-any-return]

    @property
    def initializer(self) -> Initializer:
        """Initialiser of the decoder's kernels: Xavier's, uniform, of the map from and to all heads together."""
        return xavier(self.width)

    def task(self, name: str) -> UnitTask:
        """Return the task of this name.

        Raises:
            KeyError: there is none.
        """
        return {task.name: task for task in self.tasks}[name]

    def member(self, side: str) -> Member | None:
        """Return the encoder of a side, "image" or "text", with this model's settings of the computation."""
        found: Member | None = getattr(self, side)
        run = {name: getattr(self, name) for name in ("dtype", "scan_layers", "remat", "attention_implementation")}
        return None if found is None else found._replace(config=replace(found.config, **run))

    def readers(self, side: str) -> tuple[str, ...]:
        """Return the names of the tasks that read a side, in the order of their vectors."""
        return tuple(task.name for task in self.tasks if side in task.sides)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], **more: Any) -> Self:
        """See `FamilyConfig.from_json`."""
        listed = stored.get("tasks", {})
        tasks = []
        for name, task in listed.items() if isinstance(listed, dict) else [("tasks", None)]:
            kinds = {"reads": Reads, "labels": list[str], "queries": int, "loss": Loss, "pairs": bool}
            own = {"pairs": False, **task} if isinstance(task, dict) else {}
            if not all(fits(own.get(key), kind) for key, kind in kinds.items()):
                raise ConfigError(f"config.json:\n  tasks: {name}: expected reads, labels, queries and loss")
            found = own["reads"], tuple(own["labels"]), own["queries"], own["loss"], own["pairs"]
            tasks.append(UnitTask(name, *found))
        return super().from_json(stored, tasks=tuple(tasks), **more)

    def to_json(self) -> dict[str, Any]:
        """See `FamilyConfig.to_json`."""
        tasks = {}
        for task in self.tasks:
            own = task._asdict() | {"labels": list(task.labels)}
            tasks[own.pop("name")] = own
        members = {key: getattr(self, side) for side, key in MEMBERS}
        return (
            super().to_json()
            | {key: member.config.to_json() for key, member in members.items() if member is not None}
            | {"tasks": tasks}
        )


MEMBERS = (("image", "image_config"), ("text", "text_config"))


def bare_encoder(member: Member) -> Architecture:
    """Return the architecture of an encoder without a pooler.

    Raises:
        ValueError: the family has no encoder.
    """
    found = [architecture for architecture in member.family.architectures if architecture.head == "encoder"]
    if not found:
        raise ValueError(f"{member.family.title} has no encoder by itself")
    return found[-1]


class Head(nn.Module):
    """A task's classes: a dense layer, GELU, a norm, then a linear map, as in the released code."""

    config: UnitConfig
    classes: int

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        """Compute logits [B, classes] of states [B, E]."""
        c = self.config
        linear = partial(Linear, kernel_init=c.initializer, dtype=c.dtype)
        hidden = ACTIVATIONS["gelu"](linear((c.width,), ("embed", "embed_out"), name="transform")(hidden))
        hidden = LayerNorm(HEAD_EPSILON, c.dtype, name="norm")(hidden)
        return linear((self.classes,), ("embed", "labels"), name="classifier")(hidden)


class Side(NamedTuple):
    """One modality's part of the memory."""

    states: Array  # [B, S, E]
    places: np.ndarray  # [S, E]
    segments: Array  # [B, S] int32, 0 for padding


class Unit(nn.Module):
    """The encoders, the decoder and the heads."""

    config: UnitConfig

    def setup(self) -> None:
        c = self.config
        table = partial(Embed, axis="positions", embedding_init=nn.initializers.normal(1.0), dtype=c.dtype)
        for side in ("image", "text"):
            member = c.member(side)
            if member is not None:
                width = getattr(member.config, "table_width", member.config.width)
                setattr(self, f"{side}_encoder", bare_encoder(member).build(member.config))
                vectors = nn.initializers.normal(0.02)
                count = max(1, len(c.readers(side)))
                setattr(self, f"{side}_task", table(count, width, embedding_init=vectors))
                projection = Linear((c.width,), ("embed", "embed_out"), c.initializer, c.dtype)
                setattr(self, f"{side}_projection", projection)
        self.decoder = DecoderBlock(c)
        self.decoder_norm = LayerNorm(c.norm_epsilon, c.dtype)
        self.drop = Dropout(c.dropout)
        self.queries = {task.name: table(task.queries, c.width) for task in c.tasks}
        self.heads = {task.name: Head(c, len(task.labels)) for task in c.tasks}

    def __call__(
        self,
        pixel_values: Array | None = None,
        input_ids: Array | None = None,
        segment_ids: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        task: str | None = None,
        has_image: Array | None = None,
        rows: Rows | None = None,
        deterministic: bool = True,
    ) -> Any:
        """Compute the logits of a task.

        Args:
            pixel_values: [B, H, W, C] float32, as for the encoder of images; tasks of texts do not read it.
            input_ids: [B, L] int32; tasks of images do not read it.
            segment_ids: [B, L] int32, 1 for tokens and 0 for padding, all of a row for a row without a text; None for
                no padding.
            token_type_ids: [B, L] int32, sentence A (0) or B (1); None for all A.
            task: name of the task; None: of all tasks, as initialising takes.
            has_image: [B] int32, 0 for a row without an image, whose pixels may be anything finite; None: all have one.
            rows: [B] uint32, row numbers, or None.
            deterministic: disable dropout.

        Returns:
            logits [B, classes] in the compute dtype; if `task` is None, of each task by its name.
        """
        if task is None:
            given = pixel_values, input_ids, segment_ids, token_type_ids
            same_mode: Any = {"has_image": has_image, "rows": rows, "deterministic": deterministic}
            return {one.name: self(*given, task=one.name, **same_mode) for one in self.config.tasks}
        own = self.config.task(task)
        mode: Any = {"task": task, "rows": rows, "deterministic": deterministic}
        found = []
        if "image" in own.sides:
            if pixel_values is None:
                raise ValueError(f"task {task} reads {own.reads}: pixel_values are missing")
            mode["rows"] = row_numbers(rows, pixel_values)
            found.append(self.read_images(pixel_values, has_image, **mode))
        if "text" in own.sides:
            if input_ids is None:
                raise ValueError(f"task {task} reads {own.reads}: input_ids are missing")
            mode["rows"] = row_numbers(rows, input_ids)
            found.append(self.read_texts(input_ids, segment_ids, token_type_ids, **mode))
        return self.decode(found, own, mode["rows"], deterministic=deterministic)

    def read_images(self, pixel_values: Array, has_image: Array | None, **mode: Any) -> Side:
        """Encode images for a task."""
        encoder: Any = self.image_encoder
        embedded = encoder.embeddings(pixel_values, rows=mode["rows"], deterministic=mode["deterministic"])
        batch, length = embedded.shape[:2]
        present = jnp.ones(batch, jnp.int32) if has_image is None else has_image.astype(jnp.int32)
        segments = jnp.broadcast_to(present[:, None], (batch, length))
        states = self._encode("image", embedded, segments, **mode)
        size = encoder.config.patch_size
        places = sines_2d(pixel_values.shape[1] // size, pixel_values.shape[2] // size, self.config.width)
        return Side(states, np.pad(places, [(length - len(places), 0), (0, 0)]), segments)  # none for [CLS]

    def read_texts(
        self, input_ids: Array, segment_ids: Array | None, token_type_ids: Array | None, **mode: Any
    ) -> Side:
        """Encode texts for a task; of a text alone, only [CLS] is kept, as in the released code."""
        encoder: Any = self.text_encoder
        segments = jnp.ones(input_ids.shape, jnp.int32) if segment_ids is None else segment_ids
        types = () if token_type_ids is None or encoder.config.token_types < 2 else (token_type_ids,)
        embedded = encoder.embeddings(input_ids, None, *types, rows=mode["rows"], deterministic=mode["deterministic"])
        states = self._encode("text", embedded, segments, **mode)
        places = sinusoids(input_ids.shape[1], self.config.width, interleaved=False)
        alone = self.config.task(mode["task"]).reads == "text" and encoder.config.pooling == "cls"
        kept = slice(1 if alone else None)
        return Side(states[:, kept], places[kept], segments[:, kept])

    def _encode(
        self, side: str, embedded: Array, segments: Array, *, task: str, rows: Rows, deterministic: bool
    ) -> Array:
        """Run an encoder on embedded inputs [B, L, ...] with the task's vector before them -> [B, L, E]."""
        number = self.config.readers(side).index(task)
        vector = getattr(self, f"{side}_task")(jnp.full((1, 1), number)).astype(embedded.dtype)
        vector = jnp.broadcast_to(vector, (len(embedded), 1, embedded.shape[-1]))
        encoded = getattr(self, f"{side}_encoder").encode(
            jnp.concatenate([vector, embedded], axis=1),
            jnp.concatenate([segments[:, :1], segments], axis=1),
            None,
            cls_positions=None,
            rows=rows,
            deterministic=deterministic,
        )
        return getattr(self, f"{side}_projection")(encoded.hidden[:, 1:])

    def decode(self, sides: list[Side], task: UnitTask, rows: Rows, *, deterministic: bool) -> Array:
        """Compute a task's logits [B, classes] from the memory."""
        c = self.config
        memory = jnp.concatenate([side.states for side in sides], axis=1)
        places = jnp.asarray(np.concatenate([side.places for side in sides])[None], c.dtype)
        segments = jnp.concatenate([side.segments for side in sides], axis=1)
        numbers = jnp.arange(task.queries, dtype=jnp.int32)[None]
        hidden, _ = run_layers(
            self.decoder,
            jnp.zeros((len(memory), task.queries, c.width), c.dtype),
            self.queries[task.name](numbers).astype(c.dtype),
            memory,
            places,
            (jnp.ones((len(memory), task.queries), jnp.int32), segments),
            rows,
            count=c.layers,
            scan=c.scan_layers,
            remat=c.remat,
            deterministic=deterministic,
        )
        first = self.drop(self.decoder_norm(hidden[:, 0]), rows, deterministic=deterministic)
        return self.heads[task.name](first)


# The two-way table between the parameters and their names in a checkpoint.


def table(c: UnitConfig) -> Table:
    """Return the table of a model."""
    n, width, heads = c.layers, (c.width,), (c.heads, c.width // c.heads)
    entries: list[Entry] = []
    for side in ("image", "text"):
        member = c.member(side)
        if member is None:
            continue
        for entry in bare_encoder(member).table(member.config).entries:
            entries.append(entry._replace(name=f"{side}_encoder.{entry.name}", path=(f"{side}_encoder", *entry.path)))
        into = getattr(member.config, "table_width", member.config.width)
        count = max(1, len(c.readers(side)))
        vectors = Entry(f"{side}_task_embeddings.weight", (f"{side}_task", "embedding"), same(count, into))
        project = linear_entries(f"{side}_projection", (f"{side}_projection",), (member.config.width,), width)
        entries += [vectors, *project]
    layer, at = "decoder.layers.{layer}.", ("decoder",)
    for ours, stored in (("attention", "self_attn"), ("cross_attention", "multihead_attn")):
        for part in ("query", "key", "value"):
            entries += linear_entries(f"{layer}{stored}.{part[0]}_proj", (*at, ours, part), width, heads, n)
        entries += linear_entries(f"{layer}{stored}.out_proj", (*at, ours, "out"), heads, width, n)
    inner = (c.feed_forward,)
    entries += linear_entries(f"{layer}linear1", (*at, "feed_forward", "inner"), width, inner, n)
    entries += linear_entries(f"{layer}linear2", (*at, "feed_forward", "outer"), inner, width, n)
    for number, ours in enumerate(("attention_norm", "cross_attention_norm", "feed_forward_norm"), 1):
        entries += norm_entries(f"{layer}norm{number}", (*at, ours), c.width, n)
    entries += norm_entries("decoder.norm", ("decoder_norm",), c.width)
    for task in c.tasks:
        queries = same(task.queries, c.width)
        entries.append(Entry(f"query_embeds.{task.name}.weight", (f"queries_{task.name}", "embedding"), queries))
        head = (f"heads_{task.name}",)
        entries += linear_entries(f"classifiers.{task.name}.dense", (*head, "transform"), width, width)
        entries += norm_entries(f"classifiers.{task.name}.LayerNorm", (*head, "norm"), c.width)
        entries += linear_entries(f"classifiers.{task.name}.decoder", (*head, "classifier"), width, (len(task.labels),))
    return Table(tuple(entries))


def example(c: UnitConfig) -> tuple[Any, ...]:
    """Return the input shapes: one image, float32, and one token, int32; of a missing modality, what is ignored."""
    side, channels = (1, 1) if c.image is None else (c.image.config.image_size, c.image.config.channels)
    return jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.int32)


FAMILY = Family(
    config=UnitConfig,
    title="UniT",
    paper="Hu and Singh 2021",
    reads="images and text",
    members=MEMBERS,
    architectures=(Architecture("UnitForTasks", "tasks", Unit, table),),
    example=example,
    one_kind=True,
)

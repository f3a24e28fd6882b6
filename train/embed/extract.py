"""Extract features of texts with a pretrained encoder: hidden states of its layers, for tokens or whole texts.

Texts are sorted into a few row lengths and packed, several per row, each as a segment of its own, so that a handful of
compiled programs process any stream of texts with hardly any padding. Results are in the order of the texts.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ...data.batches import Features, Placed, assemble, pack_features
from ...data.packing import pack
from ...models import load
from ...models.checkpoints.folder import TOKENIZER_FILES, family_of_folder, read_config
from ...models.checkpoints.sentence_folder import SentenceFolder, read_sentence_folder
from ...models.heads.pooling import POOLINGS, combine, normalize, pool
from ...models.heads.with_head import encoder_inputs
from ..arguments import parse_layers
from ..errors import RunError
from ..finetune.tasks.task import Collected, collect
from ..sharding import Parallelism, Replicas, make_mesh
from .config import FeatureConfig

ROW_LENGTHS = (64, 128, 256, 512)
"""Row lengths, in tokens; a text goes into the shortest row that it fits."""
BATCH_TOKENS = 2048
"""Tokens per batch and device."""
FEW = 8
"""If at most this fraction of a batch is left, use a batch of that size: each row length has two programs."""
WINDOW_TEXTS, WINDOW_CHARACTERS = 4096, 1 << 18
"""Maximum number of texts that are sorted and packed together, to bound the memory of a stream."""


class Settings(NamedTuple):
    """A FeatureConfig with all defaults resolved."""

    encoder: Path
    layers: tuple[int, ...]  # from 0
    combine: str | None  # None keeps the layers separate
    pooling: tuple[str, ...]  # empty: one vector per token
    normalize: bool
    max_length: int
    lowercase: bool
    prompt: str
    skipped: int  # tokens at the start of each text that are not pooled: those of the prompt, where the folder says so
    dtype: str


class Extracted(NamedTuple):
    """Features of n texts."""

    vectors: np.ndarray  # [n, E] float32; [n, K, E] with separate layers; [T, E] over all T tokens without pooling
    starts: np.ndarray  # [n + 1] int64, index of each text's first token
    input_ids: np.ndarray  # [T] int32


class Extractor:
    """An encoder that extracts features.

    Args:
        config: the options.
        apart: keep the selected layers separate, instead of combining them.

    Raises:
        RunError: the model does not have these layers, this pooling or this length, or the folder has no tokenizer.
        FileNotFoundError: see `models.load`.
        CheckpointError: see `models.load`.
        ConfigError: see `models.load`.
    """

    def __init__(self, config: FeatureConfig, *, apart: bool = False):
        folder = sentence_folder(config.model)
        self.model, params, model_config, self.tokenizer = open_encoder(folder, config.dtype)
        self.settings = _settings(config, folder, model_config, self.tokenizer, apart)
        self.truncated = 0  # truncated tokens so far
        self._limit = model_config.max_length or ROW_LENGTHS[-1]  # tokens of the longest row
        parallelism = Parallelism(make_mesh("data=-1"))
        self._parallelism = parallelism
        self._params = jax.device_put(params, NamedSharding(parallelism.mesh, P()))
        self._step = parallelism.compile_evaluate(self._features)

    def _features(self, params: Any, batch: dict[str, jax.Array], replicas: Replicas) -> jax.Array:
        del replicas
        s = self.settings
        with jax.default_matmul_precision("highest" if s.dtype == "float32" else "default"):
            encoded = self.model.apply(
                {"params": params},
                *encoder_inputs(self.model.config, batch),
                every_layer=s.layers != (self.model.config.layers,),
            )
        if encoded.every_hidden is None:
            hidden = encoded.hidden[None]
        else:
            hidden = jnp.stack([encoded.every_hidden[layer] for layer in s.layers])
        pooled_ids, firsts = after(s.skipped, batch) if s.skipped else (batch["segment_ids"], batch["cls_positions"])
        return features_of(hidden, pooled_ids, firsts, s)

    def __call__(self, texts: Sequence[str], seconds: Sequence[str] | None = None) -> Extracted:
        """Compute the features of texts, or of pairs of texts that are encoded together."""
        s = self.settings
        texts = [s.prompt + text for text in texts]
        ids, types, truncated = self.tokenizer.encode(texts, seconds, s.max_length)
        self.truncated += truncated
        features = pack_features(ids, types)
        parts: list[tuple[Collected, Placed]] = []
        running: deque[tuple[jax.Array, Placed]] = deque()
        for placed in self._batches(features):
            running.append((self._step(self._params, self._parallelism.shard_batch(placed.batch)), placed))
            if len(running) > 1:  # assemble the next batch while this one is computed
                parts.append(_fetched(*running.popleft(), pooled=bool(s.pooling)))
        parts.extend(_fetched(*some, pooled=bool(s.pooling)) for some in running)
        collected = collect(parts, features)
        vectors = (collected.segment if s.pooling else collected.token)["vectors"]
        if not np.isfinite(vectors).all():
            raise RunError(f"{s.encoder}: the vectors of some texts are not finite.")
        return Extracted(vectors, features.starts, features.input_ids)

    def _batches(self, features: Features) -> Iterator[Placed]:
        lengths = sorted({min(length, self._limit) for length in ROW_LENGTHS} | {self._limit})
        for shorter, length in zip([0, *lengths], lengths, strict=False):
            mine = np.flatnonzero((features.lengths > shorter) & (features.lengths <= length))
            slots = max(1, length // 4)
            most = max(1, BATCH_TOKENS // length) * self._parallelism.divisor
            few = max(1, BATCH_TOKENS // length // FEW) * self._parallelism.divisor
            row_of, needed = pack(features.lengths[mine], length, slots)
            order = np.argsort(row_of, kind="stable")
            for first in range(0, needed, most):
                rows = most if needed - first > few else few
                here = order[np.searchsorted(row_of[order], first) : np.searchsorted(row_of[order], first + rows)]
                some = range(first, first + rows)
                pad_id = self.tokenizer.pad_id
                yield assemble(features, mine[here], row_of[here], some, length=length, slots=slots, pad_id=pad_id)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal; it differs if the weights, the tokenizer or the settings differ."""
        digest = hashlib.sha256()
        for path in sorted(self.settings.encoder.iterdir()):
            if path.suffix == ".safetensors" or path.name in ("config.json", *TOKENIZER_FILES):
                with path.open("rb") as file:
                    digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        digest.update(json.dumps(self.settings._replace(encoder=Path())._asdict(), default=str).encode())
        return digest.hexdigest()


def sentence_folder(folder: Path) -> SentenceFolder:
    """Return the settings of a sentence-transformers folder; of another encoder's, the defaults."""
    return read_sentence_folder(folder) or SentenceFolder(folder, ("mean",), False, None, False, "")


def open_encoder(sentence: SentenceFolder, dtype: str) -> tuple[Any, Any, Any, Any]:
    """Load an encoder with its tokenizer: (model, parameters, config, tokenizer).

    Raises:
        RunError: the folder's model is no encoder of texts, or it has no tokenizer; and see `models.load`.
    """
    folder = sentence.encoder
    stored = read_config(folder)
    family = family_of_folder(stored, folder)
    if family.reads != "text":
        raise RunError(
            f"{folder}: a {stored.get('model_type')} reads {family.reads}; expected an encoder of texts. For images: "
            "bestiary images embed, and bestiary images predict --attention."
        )
    if "encoder" not in family.heads:
        raise RunError(f"{folder}: a {stored.get('model_type')} is not an encoder. Expected one, or what began as one.")
    model, params, config, tokenizer = load(folder, head="encoder", dtype=dtype)
    if tokenizer is None:
        raise RunError(f"{folder}: no tokenizer files in this folder (tokenizer.json or vocab.txt).")
    if sentence.lowercase and not tokenizer.lowercase:
        _lower_case(tokenizer)
    return model, params, config, tokenizer


def features_of(hidden: jax.Array, segment_ids: jax.Array, firsts: jax.Array, settings: Settings) -> jax.Array:
    """Combine and pool selected layers as the settings say.

    Args:
        hidden: [K, B, L, E].
        segment_ids: [B, L] int32; text x of a row is where it is x + 1.
        firsts: [B, X] int32, the first token of each text.
        settings: combination, pooling and normalisation.

    Returns:
        [B, X, E] float32, or [B, L, E] without pooling; [..., K, E] if the layers stay separate.
    """
    hidden = hidden.astype(jnp.float32)
    kept = hidden if settings.combine is None else combine(hidden, settings.combine)[None]

    def pooled(states: jax.Array) -> jax.Array:
        parts = [pool(states, segment_ids, firsts, how) for how in settings.pooling]
        vectors = jnp.concatenate(parts, axis=-1) if parts else states
        return normalize(vectors) if settings.normalize else vectors

    vectors = jnp.stack([pooled(states) for states in kept], axis=2)  # [B, X or L, K, E]
    return vectors if settings.combine is None else vectors[:, :, 0]


def after(count: int, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return (segment_ids [B, L], cls_positions [B, X]) without the first `count` tokens of each text.

    A text that has no others keeps its first token as that of "cls".
    """
    segments, firsts = batch["segment_ids"], batch["cls_positions"]
    texts = jnp.arange(1, firsts.shape[1] + 1, dtype=segments.dtype)
    lengths = (segments[:, None, :] == texts[None, :, None]).sum(axis=-1)
    kept = jnp.where(batch["position_ids"] < count, 0, segments)
    return kept, firsts + jnp.where(lengths > count, count, 0)


def _lower_case(tokenizer: Any) -> None:
    """Make a tokenizer lower-case texts first, as do_lower_case of sentence_bert_config.json does."""
    from tokenizers import normalizers

    own = tokenizer.backend.normalizer
    steps: list[Any] = [normalizers.Lowercase(), *([] if own is None else [own])]
    tokenizer.backend.normalizer = normalizers.Sequence(steps)


def _fetched(vectors: jax.Array, placed: Placed, *, pooled: bool) -> tuple[Collected, Placed]:
    host = {"vectors": jax.device_get(vectors)}
    return (Collected(segment=host) if pooled else Collected(token=host)), placed


def windows(texts: Iterable[str]) -> Iterator[list[str]]:
    """Cut a stream of texts into lists of bounded size."""
    window: list[str] = []
    characters = 0
    for text in texts:
        window.append(text)
        characters += len(text)
        if len(window) == WINDOW_TEXTS or characters >= WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _settings(config: FeatureConfig, folder: SentenceFolder, model: Any, tokenizer: Any, apart: bool) -> Settings:
    layers = parse_layers(config.layers, model.layers)
    limit = model.max_length or ROW_LENGTHS[-1]
    length = config.max_length
    if length is None:
        stored = folder.max_length or tokenizer.settings.get("model_max_length") or limit
        if isinstance(stored, bool) or not isinstance(stored, int | float) or not stored >= 3:
            raise RunError(f"{folder.encoder}: the maximum length is {stored!r}; expected at least 3 tokens.")
        length = int(min(stored, limit))
    if not 3 <= length <= limit:
        raise RunError(f"--max-length {length}: expected 3 to {limit}, the positions of this model.")
    pooling = folder.pooling if config.pooling is None else parse_pooling(config.pooling)
    # A folder's normalisation follows its pooling: sentence-transformers does not normalise vectors of tokens either.
    normalized = folder.normalize and bool(pooling) if config.normalize is None else config.normalize
    prompt = folder.prompt if config.prompt is None else config.prompt
    return Settings(
        folder.encoder,
        layers,
        None if apart else config.combine if len(layers) > 1 else "sum",
        pooling,
        normalized,
        length,
        folder.lowercase,
        prompt,
        0 if folder.pools_prompt or not prompt else _prompt_tokens(tokenizer, prompt, length),
        config.dtype,
    )


def _prompt_tokens(tokenizer: Any, prompt: str, length: int) -> int:
    """Return the number of tokens of a prompt alone, without the special one that ends it.

    Raises:
        RunError: they leave no room for a text.
    """
    ((ids,), _, _) = tokenizer.encode([prompt], None, length)
    count = len(ids) - bool(tokenizer.special[ids[-1]])
    if count >= length - 1:
        raise RunError(f"--prompt takes all of the {length} tokens of a text (--max-length).")
    return count


def parse_pooling(text: str) -> tuple[str, ...]:
    """Parse `--pooling`, such as `cls,mean`; `token` gives an empty tuple.

    Raises:
        RunError: there is no such pooling.
    """
    if text == "token":
        return ()
    names = tuple(text.split(","))
    wrong = [name for name in names if name not in POOLINGS]
    if wrong:
        raise RunError(f"--pooling {text}: expected token, or {', '.join(POOLINGS)} (with commas), found {wrong[0]!r}.")
    return names

"""Adaptive input and softmax: words in clusters by frequency, rarer ones with smaller vectors and computed on demand.

Grave et al. 2017, "Efficient softmax approximation for GPUs"; Baevski and Auli 2019 (the input); as in Transformer-XL.

The first cluster is the head. Its softmax is over its own words and one more class for each other cluster, a tail:

    log p(word) = head(word)                          for a word of the head
    log p(word) = head(tail) + softmax of tail(word)  for a word of a tail

Tail i is class (words of the head) + i - 1 of the head, as in the TensorFlow code, whose weights were released, and in
the reference implementation. (The authors' PyTorch code assigns the classes in the reverse order.)

Words of all clusters have vectors of one table if they are of one size, else each cluster has a table of its own. A
projection brings them to the model's width; the softmax projects hidden states back, by the same projections ("tied")
or by its own. Its vectors are always those of the input.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer

from ...kernels.platform import platform
from ..checkpoints.tables import Entry, Transposed, same
from ..layers.linear import Embed, Vectors, add_bias, matmul
from .losses import CHUNK_LOGITS, cross_entropy


@dataclass(frozen=True)
class Clusters:
    """A vocabulary, the most frequent words first, cut into clusters.

    Attributes:
        words: number of words, V.
        cutoffs: first word of each tail, ascending; empty for a plain softmax.
        size: size of the vectors of the head's words.
        divisor: by which the size shrinks from one cluster to the next.
        width: the model's width, E.
        tied: for each cluster, whether input and output share its projection.
    """

    words: int
    cutoffs: tuple[int, ...]
    size: int
    divisor: int
    width: int
    tied: tuple[bool, ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First word of each cluster, and the one after its last."""
        ends = (0, *self.cutoffs, self.words)
        return list(pairwise(ends))

    @property
    def sizes(self) -> list[int]:
        """Size of the vectors of each cluster."""
        return [self.size // self.divisor**i for i in range(len(self.spans))]

    @property
    def tables(self) -> list[tuple[int, int]]:
        """Words and size of each table of vectors."""
        if self.divisor == 1:
            return [(self.words, self.size)]
        return [(end - first, size) for (first, end), size in zip(self.spans, self.sizes, strict=True)]

    @property
    def projections(self) -> list[int]:
        """Size of the vectors that each projection of the input is of."""
        if self.divisor == 1:
            return [] if self.size == self.width else [self.size]
        return self.sizes

    @property
    def own_projections(self) -> list[int]:
        """Clusters for which the softmax has a projection of its own."""
        return [i for i in range(len(self.spans)) if self.projections and not self.tied[i]]


class AdaptiveEmbedding(nn.Module):
    """Word vectors of all clusters, projected to the model's width.

    Attributes:
        clusters: the clusters.
        embedding_init: initialiser of the tables.
        projection_init: initialiser of the projections.
        dtype: compute dtype.
    """

    clusters: Clusters
    embedding_init: Initializer
    projection_init: Initializer
    dtype: str = "float32"

    def setup(self) -> None:
        c = self.clusters
        self.tables = [Embed(count, size, "vocab", self.embedding_init, self.dtype) for count, size in c.tables]
        make = partial(Vectors, axes=("embed_out", "embed"), initializer=self.projection_init, kind="kernel")
        self.projections = [make((size, c.width)) for size in c.projections]

    def __call__(self, ids: Array) -> Array:
        """Look up ids [B, L] int -> [B, L, E] in the compute dtype."""
        c = self.clusters
        if c.divisor == 1:
            return self._projected(0, self.tables[0](ids))
        found = jnp.zeros((*ids.shape, c.width), self.dtype)
        for i, (first, end) in enumerate(c.spans):
            here = (ids >= first) & (ids < end)
            vectors = self._projected(i, self.tables[i](jnp.where(here, ids - first, 0)))
            found = jnp.where(here[..., None], vectors, found)
        return found

    def _projected(self, number: int, vectors: Array) -> Array:
        if not self.projections:
            return vectors.astype(self.dtype)
        return matmul(vectors, self.projections[number].kernel, 0, self.dtype, self.dtype)


class AdaptiveSoftmax(nn.Module):
    """The softmax over all clusters, with the vectors of an `AdaptiveEmbedding`.

    Attributes:
        clusters: the clusters.
        embedding_init: initialiser of the vectors of the tails in the head.
        projection_init: initialiser of projections of its own.
        dtype: compute dtype; products are accumulated in float32, and the softmax computed in it.
    """

    clusters: Clusters
    embedding_init: Initializer
    projection_init: Initializer
    dtype: str = "float32"

    def setup(self) -> None:
        c = self.clusters
        tails = len(c.cutoffs)
        bias = partial(Vectors, axes=("vocab",), initializer=nn.initializers.zeros_init(), kind="bias")
        self.biases = [bias((count,)) for count, _ in c.tables]
        if tails:
            self.tails = Embed(tails, c.size, "labels", self.embedding_init, self.dtype)
            self.tail_bias = bias((tails,), axes=("labels",))
        make = partial(Vectors, axes=("embed_out", "embed"), initializer=self.projection_init, kind="kernel")
        own = {str(i): make((c.projections[0 if c.divisor == 1 else i], c.width)) for i in c.own_projections}
        self.projections = own

    def log_probabilities(self, hidden: Array, embedding: AdaptiveEmbedding) -> Array:
        """Compute the log-probabilities of all words, [..., V] float32, from hidden states [..., E]."""
        head = jax.nn.log_softmax(self._logits(hidden, embedding, 0), axis=-1)
        first = self.clusters.spans[0][1]
        found = [head[..., :first]]
        for i in range(1, len(self.clusters.spans)):
            tail = jax.nn.log_softmax(self._logits(hidden, embedding, i), axis=-1)
            found.append(tail + head[..., first + i - 1 : first + i])
        return jnp.concatenate(found, axis=-1)

    def token_losses(self, hidden: Array, labels: Array, embedding: AdaptiveEmbedding) -> Array:
        """Compute -log p of a word after each token, without logits of all of them at a time.

        A tail is computed only for the words of it: those of each row are put first, and chunks of columns without any
        are skipped. The backward pass computes the logits again.

        Args:
            hidden: [B, L, E].
            labels: [B, L] int.
            embedding: the input's vectors.

        Returns:
            [B, L] float32
        """
        spans = self.clusters.spans
        of_head = labels
        for i, (first, end) in enumerate(spans[1:], 1):
            of_head = jnp.where((labels >= first) & (labels < end), spans[0][1] + i - 1, of_head)
        losses = self._in_chunks(embedding, 0, hidden, of_head, jnp.ones(labels.shape, bool))
        for i, (first, end) in enumerate(spans[1:], 1):
            here = (labels >= first) & (labels < end)
            order = jnp.argsort(~here, axis=1, stable=True)
            sorted_labels, sorted_here = (jnp.take_along_axis(x, order, axis=1) for x in (labels - first, here))
            states = jnp.take_along_axis(hidden, order[..., None], axis=1)
            found = self._in_chunks(embedding, i, states, jnp.where(sorted_here, sorted_labels, 0), sorted_here)
            back = jnp.take_along_axis(found, jnp.argsort(order, axis=1), axis=1)
            losses = losses + jnp.where(here, back, 0.0)
        return losses

    def _in_chunks(
        self, embedding: AdaptiveEmbedding, number: int, hidden: Array, labels: Array, needed: Array
    ) -> Array:
        """Compute the cross-entropies [B, L] in a cluster of its classes, in chunks of columns that need any."""
        batch, length = labels.shape
        first, end = self.clusters.spans[number]
        columns = max(1, CHUNK_LOGITS.get(platform(), 1 << 28) // ((end - first) * batch))
        count = -(-length // columns)
        columns = -(-length // count)
        parameters = self._parameters(embedding, number)

        def cut(x: Array) -> Array:
            x = jnp.pad(x, ((0, 0), (0, count * columns - length), *((0, 0),) * (x.ndim - 2)))
            return jnp.moveaxis(x.reshape(batch, count, columns, *x.shape[2:]), 1, 0)

        @jax.checkpoint
        def losses(parameters: Any, hidden: Array, labels: Array) -> Array:
            return cross_entropy(self._product(parameters, hidden), labels)[0]

        def nothing(parameters: Any, hidden: Array, labels: Array) -> Array:
            del parameters, hidden
            return jnp.zeros(labels.shape, jnp.float32)

        def step(_: None, xs: tuple[Array, Array, Array]) -> tuple[None, Array]:
            hidden, labels, needed = xs
            return None, jax.lax.cond(needed.any(), losses, nothing, parameters, hidden, labels)

        _, found = jax.lax.scan(step, None, (cut(hidden), cut(labels), cut(needed)))
        return jnp.moveaxis(found, 0, 1).reshape(batch, -1)[:, :length]

    def _logits(self, hidden: Array, embedding: AdaptiveEmbedding, number: int) -> Array:
        return self._product(self._parameters(embedding, number), hidden)

    def _parameters(self, embedding: AdaptiveEmbedding, number: int) -> tuple[Array | None, Array, Array]:
        """Return a cluster's projection, vectors and bias; the head's include the tails."""
        c = self.clusters
        if c.divisor == 1:
            first, end = c.spans[number]
            table, bias = embedding.tables[0].embedding[first:end], self.biases[0].bias[first:end]
        else:
            table, bias = embedding.tables[number].embedding, self.biases[number].bias
        if number == 0 and c.cutoffs:
            table = jnp.concatenate([table, self.tails.embedding])
            bias = jnp.concatenate([bias, self.tail_bias.bias])
        projection = None
        if c.projections:
            shared = embedding.projections[0 if c.divisor == 1 else number]
            projection = (shared if c.tied[number] else self.projections[str(number)]).kernel
        return projection, table, bias

    def _product(self, parameters: tuple[Array | None, Array, Array], hidden: Array) -> Array:
        """Compute logits [..., classes] float32."""
        projection, table, bias = parameters
        if projection is not None:
            hidden = matmul(hidden, projection, 1, self.dtype, self.dtype)
        return add_bias(matmul(hidden, table, 1, self.dtype, "float32"), bias)


def embedding_entries(c: Clusters, name: str, path: tuple[str, ...]) -> list[Entry]:
    """Return the entries of an `AdaptiveEmbedding` at `path`."""
    tables = [
        Entry(f"{name}.emb_layers.{i}.weight", (*path, f"tables_{i}", "embedding"), same(*shape))
        for i, shape in enumerate(c.tables)
    ]
    return tables + [
        Entry(f"{name}.emb_projs.{i}", (*path, f"projections_{i}", "kernel"), Transposed((size,), (c.width,)))
        for i, size in enumerate(c.projections)
    ]


def softmax_entries(c: Clusters, name: str, path: tuple[str, ...]) -> list[Entry]:
    """Return the entries of an `AdaptiveSoftmax` at `path`."""
    found = [
        Entry(f"{name}.out_layers.{i}.bias", (*path, f"biases_{i}", "bias"), same(count))
        for i, (count, _) in enumerate(c.tables)
    ]
    if c.cutoffs:
        tails = len(c.cutoffs)
        found.append(Entry(f"{name}.cluster_weight", (*path, "tails", "embedding"), same(tails, c.size)))
        found.append(Entry(f"{name}.cluster_bias", (*path, "tail_bias", "bias"), same(tails)))
    for i in c.own_projections:
        kernel = Transposed((c.projections[0 if c.divisor == 1 else i],), (c.width,))
        found.append(Entry(f"{name}.out_projs.{i}", (*path, f"projections_{i}", "kernel"), kernel))
    return found


def tied_names(c: Clusters, embedding: str, softmax: str) -> dict[str, str]:
    """Return the copies that checkpoints contain: name -> name of the original."""
    copies = {f"{softmax}.out_layers.{i}.weight": f"{embedding}.emb_layers.{i}.weight" for i in range(len(c.tables))}
    for i in range(len(c.spans) if c.projections else 0):
        if c.tied[i]:
            copies[f"{softmax}.out_projs.{i}"] = f"{embedding}.emb_projs.{0 if c.divisor == 1 else i}"
    return copies

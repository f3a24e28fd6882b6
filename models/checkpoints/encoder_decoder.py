"""Names of a Transformer's parameters in released encoder-decoders: those of BART, and so of Marian."""

from typing import Any

from ..layers.positions import sinusoids
from .tables import Entry, Reshaped, Table, linear_entries, norm_entries, same


def _attention_entries(name: str, path: tuple[str, ...], width: int, heads: int, layers: int) -> list[Entry]:
    inner = (heads, width // heads)
    return [
        *(
            entry
            for part in ("query", "key", "value")
            for entry in linear_entries(f"{name}.{part[0]}_proj", (*path, part), (width,), inner, layers)
        ),
        *linear_entries(f"{name}.out_proj", (*path, "out"), inner, (width,), layers),
    ]


def _layer_entries(c: Any, side: str) -> list[Entry]:
    layers, heads, inner = (getattr(c, f"{side}_{size}") for size in ("layers", "heads", "feed_forward"))
    stored, width = f"model.{side}.layers.{{layer}}", (c.width,)
    attentions = [("attention", "self_attn"), *([("cross_attention", "encoder_attn")] if side == "decoder" else [])]
    entries = []
    for name, stored_name in attentions:
        entries += _attention_entries(f"{stored}.{stored_name}", (side, name), c.width, heads, layers)
        entries += norm_entries(f"{stored}.{stored_name}_layer_norm", (side, f"{name}_norm"), c.width, layers)
    return [
        *entries,
        *linear_entries(f"{stored}.fc1", (side, "feed_forward", "inner"), width, (inner,), layers),
        *linear_entries(f"{stored}.fc2", (side, "feed_forward", "outer"), (inner,), width, layers),
        *norm_entries(f"{stored}.final_layer_norm", (side, "feed_forward_norm"), c.width, layers),
    ]


def logits_bias_entry(words: int) -> Entry:
    """Return the entry of the constant of each word's logit."""
    return Entry("final_logits_bias", ("final_logits_bias",), Reshaped((1, words), (words,)))


def encoder_decoder_entries(c: Any) -> tuple[list[Entry], dict[str, str]]:
    """Return the entries of both stacks of layers and of the embeddings of words, and (tied copy -> original).

    Args:
        c: a `TransformerConfig`, or a sibling's that has its sizes, `tying` and `pre_norm`.
    """
    shared, source, target = (
        "model.shared.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
    )
    output = "lm_head.weight"
    words, width = c.target_words, c.table_width
    tied: dict[str, str] = {}
    if c.tying == "all":
        entries = [Entry(shared, ("source", "embedding"), same(c.vocab_size, width))]
        tied = dict.fromkeys((source, target, output), shared)
    else:
        entries = [
            Entry(source, ("source", "embedding"), same(c.vocab_size, width)),
            Entry(target, ("target", "embedding"), same(words, width)),
        ]
        if c.tying == "decoder":
            tied = {output: target}
        else:
            entries.append(Entry(output, ("output", "embedding"), same(words, c.width)))
    if width != c.width:
        for side, name in (("encoder", "source"), ("decoder", "target")):
            stored, path = f"model.{side}.embed_projection", (f"{name}_projection",)
            entries += linear_entries(stored, path, (width,), (c.width,), bias=False)
        if c.tying != "none":
            entries += linear_entries("lm_projection", ("output_projection",), (c.width,), (width,), bias=False)
    for side in ("encoder", "decoder"):
        entries += _layer_entries(c, side)
        if c.pre_norm:
            entries += norm_entries(f"model.{side}.layer_norm", (f"{side}_norm",), c.width)
    return entries, tied


def encoder_decoder_table(c: Any) -> Table:
    """Return the table of a `transformer.Transformer` with this `TransformerConfig`, or Marian's."""
    entries, tied = encoder_decoder_entries(c)
    if c.logits_bias:
        entries.append(logits_bias_entry(c.target_words))
    places = sinusoids(c.positions, c.width, interleaved=c.sinusoids == "interleaved")
    return Table(
        tuple(entries),
        tied=tied,
        buffers=dict.fromkeys(("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"), places),
    )

"""The sizes and settings of recurrent encoder-decoders; `seq2seq.py` says what they mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..encoder_decoder import TOKEN_KEYS, EncoderDecoderConfig
from ..two_vocabularies import TYINGS, TwoVocabularies
from .recurrence import GATES

ATTENTIONS = ("none", "additive", "dot", "general", "concat")
BRIDGES = ("zero", "last", "bridge", "backward")
OUTPUTS = ("state", "attentional", "maxout")


@dataclass(frozen=True)
class RecurrentConfig(TwoVocabularies, EncoderDecoderConfig):
    """Sizes and settings. The defaults are those of Bahdanau et al. 2015 (A.2), but for its two vocabularies."""

    MODEL_TYPE: ClassVar[str] = "recurrent"
    KEYS: ClassVar[Mapping[str, str]] = {
        **{name: name for name in ("vocab_size", "target_vocab_size", "width", "embedding_width", "encoder_width")},
        **{name: name for name in ("encoder_layers", "decoder_layers", "cell", "bidirectional", "attention")},
        **{name: name for name in ("input_feeding", "bridge", "output", "tying", "logits_bias", "dropout")},
        **TOKEN_KEYS,
    }
    REQUIRED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **EncoderDecoderConfig.REQUIRED,
        "cell": tuple(GATES),
        "attention": ATTENTIONS,
        "bridge": BRIDGES,
        "output": OUTPUTS,
        "tying": TYINGS,
    }
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # For Multi30k: one kind of model each, at about the size of transformer-tiny.
        "gru-attention": dict(
            width=256, embedding_width=128, encoder_width=128, output="attentional", bridge="backward", dropout=0.3
        ),
        "lstm-luong": dict(
            **dict(width=256, embedding_width=128, encoder_width=128, cell="lstm", attention="general"),
            **dict(input_feeding=True, output="attentional", bridge="last", dropout=0.3),
        ),
        "lstm-plain": dict(
            **dict(width=256, embedding_width=128, encoder_width=128, cell="lstm", attention="none"),
            **dict(output="state", bridge="last", dropout=0.3),
        ),
        "rnnsearch": {},  # Bahdanau et al. 2015, A.2
    }

    width: int = 1000
    """size of the decoder's states, E"""
    encoder_layers: int = 1
    decoder_layers: int = 1
    dropout: float = 0.0
    """dropout rate of embeddings, of what one layer gives to the next, and of the output"""
    target_vocab_size: int | None = None
    """vocabulary size of the target; None: that of the source"""
    embedding_width: int = 620
    """size of the embeddings"""
    encoder_width: int = 1000
    """size of the encoder's states, in each direction"""
    cell: str = "gru-reset-before"
    """cell: lstm, gru-reset-after (PyTorch's) or gru-reset-before (Cho et al. 2014)"""
    bidirectional: bool = True
    """read the source in both directions"""
    attention: str = "additive"
    """attention to the source: none, additive (Bahdanau), dot, general or concat (Luong)"""
    input_feeding: bool = False
    """give the output's state of one step to the next step's cell (Luong et al. 2015, 3.3)"""
    bridge: str = "backward"
    """how the decoder starts: zero, last, bridge or backward"""
    output: str = "maxout"
    """state that is multiplied by the output embeddings: state (the cell's), attentional (tanh of a map of it and the
    context) or maxout (of the state before, the word and the context; Bahdanau et al. 2015, A.2.2)"""
    tying: str = "none"
    """which embedding tables are shared: all (source, target, output), decoder (target and output) or none"""
    logits_bias: bool = False
    """add a constant per word to the logits, which is loaded and saved but not trained"""
    bos_token_id: int | None = 1
    decoder_start_token_id: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        for field, known in self.REQUIRED.items():
            if field in ("cell", "attention", "bridge", "output", "tying") and getattr(self, field) not in known:
                raise ValueError(f"{name}: {field} is one of {', '.join(known)}, not {getattr(self, field)!r}")
        if self.remat or self.attention_implementation is not None:
            what = "remat" if self.remat else "an attention backend"
            raise ValueError(f"{name}: a recurrent model has no use for {what}; leave it out")
        if self.bridge == "backward" and not self.bidirectional:
            raise ValueError(f"{name}: bridge 'backward' needs a bidirectional encoder")
        if self.bridge == "last" and (self.memory_width, self.encoder_layers) != (self.width, self.decoder_layers):
            raise ValueError(
                f"{name}: bridge 'last' needs as many layers and as wide states on both sides; found "
                f"{self.encoder_layers} of {self.memory_width} and {self.decoder_layers} of {self.width}"
            )
        if self.attention == "dot" and self.memory_width != self.width:
            raise ValueError(
                f"{name}: attention 'dot' needs states as wide as the memory; found {self.width} and "
                f"{self.memory_width}; 'general' has a matrix between them"
            )
        if self.attention == "none" and (self.input_feeding or self.output != "state"):
            raise ValueError(f"{name}: without attention there is no input feeding, and output is 'state'")
        if self.attention == "additive" and self.input_feeding:
            raise ValueError(f"{name}: additive attention comes before the cell, which reads its context already")
        if self.input_feeding and self.output != "attentional":
            raise ValueError(f"{name}: input feeding is of the output 'attentional', not {self.output!r}")
        if self.output == "maxout" and self.attention != "additive":
            raise ValueError(f"{name}: output 'maxout' belongs to additive attention, not {self.attention!r}")
        if self.attention in ("dot", "general", "concat") and self.output != "attentional":
            raise ValueError(
                f"{name}: attention {self.attention!r} needs the output 'attentional', not {self.output!r}"
            )
        self.check_tying()

    @property
    def memory_width(self) -> int:
        """Size of the encoder's output for a word, M."""
        return self.encoder_width * (2 if self.bidirectional else 1)

    @property
    def fed_width(self) -> int:
        """Size of what the decoder's first cell reads besides a word: a context, or the last step's output."""
        if self.attention == "additive":
            return self.memory_width
        return self.embedding_width if self.input_feeding else 0

    @property
    def decoder_heads(self) -> int:
        """Number of attentions to the source."""
        return 0 if self.attention == "none" else 1

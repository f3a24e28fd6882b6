"""g2p-en's pronunciation model (Park and Kim 2019): a GRU encoder-decoder from letters to ARPAbet phonemes.

The package g2p-en on PyPI has its weights as plain arrays in `g2p_en/checkpoint20.npz` (3 MB, Apache-2.0).

    model, params = read_g2p(Path("checkpoint20.npz"))
    generate = Generator(model, params, DecodeConfig(max_length=20))
    found = [[PHONEMES[token] for token in best.tokens] for [best] in generate(letters(["bestiary"]))]
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..checkpoints.tables import CheckpointError
from .config import RecurrentConfig
from .seq2seq import FAMILY, Recurrent, recurrent_table

LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")
OTHERS = (*"BDFGKLMNPRSTVWYZ", "CH", "DH", "HH", "JH", "NG", "SH", "TH", "UW", "ZH")
# In alphabetical order, and vowels with each of three stresses.
PHONEMES = (
    "<pad>", "<unk>", "<s>", "</s>",
    *sorted([*OTHERS, *(f"{vowel}{stress}" for vowel in VOWELS for stress in range(3))]),
)  # fmt: skip
CONFIG = RecurrentConfig(
    vocab_size=len(LETTERS),
    target_vocab_size=len(PHONEMES),
    width=256,
    embedding_width=256,
    encoder_width=256,
    cell="gru-reset-after",
    bidirectional=False,
    attention="none",
    output="state",
    bridge="last",
    logits_bias=True,
    bos_token_id=2,
    decoder_start_token_id=2,
    eos_token_id=3,
)
# Name in this package's checkpoints -> name in the file.
STORED = {
    "source.weight": "enc_emb",
    "target.weight": "dec_emb",
    "output.weight": "fc_w",
    "output.bias": "fc_b",
    **{
        f"{side}.{part}_{of}_l0": f"{side[:3]}_{part[0]}_{of}"
        for side in ("encoder", "decoder")
        for part in ("weight", "bias")
        for of in ("ih", "hh")
    },
}


def read_g2p(path: Path) -> tuple[Recurrent, dict[str, Any]]:
    """Read g2p-en's file of arrays; return the model and its parameters.

    Raises:
        CheckpointError: it is no such file, or an array is missing or has another shape.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stored = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, TypeError, BadZipFile) as error:
        raise CheckpointError(f"{path}: expected g2p-en's checkpoint20.npz: {error}") from None
    table = recurrent_table(CONFIG)
    placed = table.place(name for name, other in STORED.items() if other in stored)
    if placed.missing:
        lacking = ", ".join(STORED[name] for name in placed.missing)
        raise CheckpointError(f"{path}: not g2p-en's checkpoint20.npz; it has no {lacking}")
    shapes = {name: stored[other].shape for name, other in STORED.items()}
    return FAMILY.build("generation", CONFIG), table.load(placed, shapes, lambda name: stored[STORED[name]], str(path))


def letters(words: Iterable[str]) -> list[list[int]]:
    """Return the ids of words' letters, in lower case, with the end token: sources of `generate.Generator`."""
    known = {letter: number for number, letter in enumerate(LETTERS)}
    return [[*(known.get(letter, known["<unk>"]) for letter in word.lower()), known["</s>"]] for word in words]

"""Score translations: sacreBLEU's BLEU and chrF with their signatures, and tokenised BLEU under its own name.

    bestiary translate score --model runs/ende --source test.en.gz --reference test.de.gz
    bestiary translate score --hypothesis translation.txt --reference test.de.gz

`bleu` and `chrf` are what to report: sacreBLEU (Post 2018) splits words itself, so they compare between systems.
`tokenised_bleu` is multi-bleu.perl's, of words as the Moses scripts split them, and `tokenised_bleu_lowercase` the same
with -lc. They compare only where both sides were prepared so, as with the figures of papers that quote them.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from ...data.corpus.parallel import ParallelText
from ...data.tokenizers.pairs import TextForm
from ..errors import RunError
from ..generate.config import DecodeConfig
from ..progress import Progress
from ..run_folder import write_json, write_text
from .run import DECODE, Translation, chosen, open_translator


class Scores(NamedTuple):
    """Figures by name, and the signatures of sacreBLEU's."""

    values: dict[str, float]
    signatures: dict[str, str]
    details: dict[str, str]  # of the tokenised ones, as multi-bleu.perl prints them

    def __str__(self) -> str:
        shown = "  ".join(f"{name} {value:.2f}" for name, value in self.values.items())
        return f"{shown}  ({self.signatures['bleu_signature']})"


def deciding(form: TextForm) -> str:
    """The figure that decides between two models: one that only writes lower case is not charged for it."""
    return "bleu_lowercase" if form.lowercase else "bleu"


def corpus_scores(
    translations: Sequence[str],
    references: Sequence[str],
    form: TextForm,
    prepared: Sequence[str] | None = None,
) -> Scores:
    """Score translations against one reference each.

    Args:
        translations, references: running text.
        form: the languages, the second of which this is, and whether translations are in lower case, as the references
            then are for the tokenised BLEU.
        prepared: the translations as a model wrote them, in Moses' words already; None: they are split as references.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    cased, lower, chrf = BLEU(), BLEU(lowercase=True), CHRF()
    lists = list(translations), [list(references)]
    bleu = cased.corpus_score(*lists)
    in_words = replace(form, moses=True)
    words = (
        [in_words.prepare(text, target=True) for text in translations] if prepared is None else list(prepared),
        [[in_words.prepare(text, target=True) for text in references]],
    )
    tokenised = {
        name: BLEU(tokenize="none", force=True, smooth_method="none", lowercase=lowercase).corpus_score(*words)
        for name, lowercase in (("tokenised_bleu", False), ("tokenised_bleu_lowercase", True))
    }
    values = {
        "bleu": bleu.score,
        "bleu_lowercase": lower.corpus_score(*lists).score,
        "chrf": chrf.corpus_score(*lists).score,
        **{name: found.score for name, found in tokenised.items()},
        "exact_match": 100 * sum(map(str.__eq__, translations, references)) / max(1, len(references)),
    }
    signatures = {"bleu_signature": str(cased.get_signature()), "chrf_signature": str(chrf.get_signature())}
    details = {
        name: f"BLEU = {found.score:.2f}, {'/'.join(f'{precision:.1f}' for precision in found.precisions)} "
        f"(BP={found.bp:.3f}, ratio={found.sys_len / max(1, found.ref_len):.3f}, hyp_len={found.sys_len}, "
        f"ref_len={found.ref_len})"
        for name, found in tokenised.items()
    }
    return Scores(values, signatures, details)


def translation_scores(translations: Sequence[Translation], references: Sequence[str], form: TextForm) -> Scores:
    """Score a model's translations, of this form; where it writes Moses' words, these are taken as they are."""
    prepared = [found.prepared for found in translations] if form.moses else None
    return corpus_scores([found.text for found in translations], references, form, prepared)


@dataclass(frozen=True)
class ScoreConfig:
    """Translate a test set and score it, or score a translation that is there."""

    reference: Path
    """File of reference translations, one a line (.gz and .zst too)."""
    model: Path | None = None
    """Run folder or checkpoint folder to translate --source with."""
    source: Path | None = None
    """File of source sentences, as many as references."""
    hypothesis: Path | None = None
    """File of translations to score, instead of --model and --source."""
    language: str = "de"
    """With --hypothesis: language of the text (ISO 639-1), by which the tokenised BLEU splits words."""
    encoding: str = "utf-8"
    """Character encoding of the files."""
    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")] = DECODE
    batch: int = 64
    """Sentences that are translated together."""
    longest: int = 0
    """Tokens that a sentence may have before it is translated in parts; 0: as many as in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in."""
    generation_config: bool = False
    """Decode as the checkpoint's generation_config.json says, instead of by flags."""
    translations: Path | None = None
    """File to write the translations to."""
    out: Path | None = None
    """JSON file to write the figures to; they are printed too."""

    def __post_init__(self) -> None:
        if (self.model is None) != (self.source is None) or (self.model is None) == (self.hypothesis is None):
            raise RunError("Give --model and --source, or --hypothesis alone.")
        chosen(self.decode, self.generation_config)


def main(config: ScoreConfig) -> int:
    """`bestiary translate score`; returns the exit status."""
    progress = Progress()
    result: dict[str, Any] = {"task": "translate score"}
    if config.model is None or config.source is None:
        assert config.hypothesis is not None
        references, translations = read_two(config.reference, config.hypothesis, config.encoding)
        found = corpus_scores(translations, references, TextForm((config.language, config.language)))
    else:
        sources, references = read_two(config.source, config.reference, config.encoding)
        decode = chosen(config.decode, config.generation_config)
        translator = open_translator(
            config.model, decode, rows=config.batch, longest=config.longest, dtype=config.dtype
        )
        clock = time.perf_counter()
        translated = [answers[0] for answers in translator.translate(sources)]
        seconds = time.perf_counter() - clock
        result["settings"] = {**asdict(translator.decode), "batch": config.batch, "dtype": config.dtype}
        result["seconds_with_compilation"] = seconds
        for note in translator.findings:
            progress.line(note)
        if config.translations is not None:
            write_text(config.translations, "".join(f"{translation.text}\n" for translation in translated))
        found = translation_scores(translated, references, translator.tokenizer.form)
    result |= {"sentences": len(references), **found.values, **found.signatures}
    result["tokenised_bleu_details"] = found.details
    progress.line(f"{len(references):,} sentences")
    for name, line in found.details.items():
        progress.line(f"{name} (multi-bleu style): {line}")
    if config.out is not None:
        write_json(config.out, result)
    print(json.dumps(result, indent=2))
    return 0


def read_two(first: Path, second: Path, encoding: str) -> tuple[list[str], list[str]]:
    """The lines of two files of one length, control characters taken for spaces.

    Raises:
        CorpusError: their numbers of lines differ, or one is not in this encoding.
    """
    pairs = list(ParallelText([first, second], encoding=encoding))
    return [pair.source for pair in pairs], [pair.target for pair in pairs]
